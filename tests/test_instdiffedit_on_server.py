"""InstDiffEdit through a real server: a photo's mask found and inpainted in one graph, and what bad input is told."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from scalpel.devtools.server import CHECKOUT, ComfyError
from scalpel.tests.test_partedit_on_server import latents, plain_graph, save, scene, text

STEPS = 6
GROUND = "on a green field"
DOG = CHECKOUT / "partsworld" / "pictures" / "partsworld_dog"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def graph(server, **changes):
    """A photo whose mask is found twice, by the sampler and by the mask node, and inpainted."""
    inputs = {
        "model": ["model", 0], "clip": ["model", 1], "edit_text": GROUND, "negative": ["negative", 0],
        "latent_image": ["encode", 0], "seed": 1, "steps": STEPS, "cfg": 7.5, "sampler_name": "euler",
        "scheduler": "ddim_uniform", "strength": 0.5, "rounds": 2, "related": 0.9, "unrelated": 0.6, "threshold": 0.2,
        **changes,
    }  # fmt: skip
    return scene() | {
        "load": node("LoadImage", image=server.upload_image(DOG / "dog_01.png")),
        "encode": node("VAEEncode", pixels=["load", 0], vae=["model", 2]),
        "ground": text(GROUND),
        "find": node("InstDiffEditSampler", **inputs),
        "alone": node("InstDiffEditMask", **inputs),
        "masked": node("SetLatentNoiseMask", samples=["encode", 0], mask=["alone", 0]),
        "inpaint": node(
            "KSampler", model=["model", 0], positive=["ground", 0], negative=["negative", 0],
            latent_image=["masked", 0], seed=1, steps=STEPS, cfg=7.5, sampler_name="euler", scheduler="ddim_uniform",
            denoise=1.0,
        ),
        "blended": save(["find", 1], "blended"),
        "inpainted": save(["inpaint", 0], "inpainted"),
        "original": save(["encode", 0], "original"),
    }  # fmt: skip


def previews():
    """The masks of `graph` as pictures."""
    nodes = {}
    for name, link in {"mask": ["find", 0], "steps": ["find", 2], "alone": ["alone", 0]}.items():
        nodes[f"{name} image"] = node("MaskToImage", mask=link)
        nodes[f"{name} shown"] = node("PreviewImage", images=[f"{name} image", 0])
    return nodes


def shown(server, found):
    return np.stack([np.asarray(Image.open(io.BytesIO(server.fetch(one))).convert("L")) for one in found["images"]])


@pytest.mark.parametrize("which", ["server", "old_server"])
def test_a_mask_is_found_and_inpainted_in_one_graph_beside_an_ordinary_one(which, request):
    server = request.getfixturevalue(which)
    before = latents(server, plain_graph())["plain"]
    whole = graph(server, seed=11) | plain_graph()
    found = latents(server, whole)
    outputs = server.run(whole | previews())["outputs"]
    assert torch.equal(found["plain"], before)
    for name in ("blended", "inpainted"):
        assert torch.isfinite(found[name]).all()
        assert (found[name] - found["original"]).abs().max() > 0.1
    mask, steps, alone = (shown(server, outputs[f"{name} shown"]) for name in ("mask", "steps", "alone"))
    assert mask.shape == (1, 256, 256)
    assert steps.shape == (3, 256, 256)
    assert np.array_equal(mask, alone)
    assert np.array_equal(steps[-1:], mask)
    assert set(np.unique(steps)) == {0, 255}
    dog = np.asarray(Image.open(DOG / "dog_01_mask.png").convert("L")) > 127
    ground = mask[0] > 127
    assert (ground & ~dog).sum() / (ground | ~dog).sum() > 0.7
    outside = torch.nn.functional.avg_pool2d(torch.from_numpy(ground).float()[None, None], 8)[0, 0] == 0
    difference = (found["blended"] - found["original"]).abs().amax(1)[0]
    assert difference[outside].max() < 1e-4


def test_the_same_graph_twice_is_the_same_to_the_bit(server):
    first, second = (latents(server, graph(server))["blended"] for _ in range(2))
    assert torch.equal(first, second)


def test_an_sdxl_model_with_its_two_encoders_finds_masks_of_a_batch(server_with_tiny_models):
    """Not square, and with more words than one run of the encoders takes."""
    server = server_with_tiny_models
    whole = graph(server, edit_text="Two Labradoodles, (sleeping:1.3) on chartreuse grass! " * 8)
    for name in ("inpaint", "masked", "inpainted", "ground"):
        del whole[name]
    whole["model"] = node("TinySDXL")
    whole["encode"] = node("EmptyLatentImage", width=320, height=192, batch_size=2)
    found = latents(server, whole)
    assert found["blended"].shape == (2, 4, 24, 40)
    assert torch.isfinite(found["blended"]).all()
    outputs = server.run(whole | previews())["outputs"]
    mask, steps, alone = (shown(server, outputs[f"{name} shown"]) for name in ("mask", "steps", "alone"))
    assert mask.shape == (2, 192, 320)
    assert np.array_equal(mask, alone)
    assert 0 < (mask > 127).mean() < 1
    assert np.array_equal(steps[[len(steps) // 2 - 1, -1]], mask)
    change = found["blended"].abs().amax(1)
    for picture, own in zip(change, mask, strict=True):
        outside = torch.nn.functional.avg_pool2d(torch.from_numpy(own > 127).float()[None, None], 8)[0, 0] == 0
        assert picture[outside].max() < 1e-4
        assert picture[~outside].max() > 0.1


def test_what_does_not_fit_gets_a_sentence_each_and_the_run_after_them_works(server):
    small = graph(server)
    small["encode"] = node("EmptyLatentImage", width=32, height=32, batch_size=1)
    bad = [
        (graph(server, edit_text=""), "edit_text: there is no word in ''"),
        (graph(server, edit_text="()"), "edit_text: there is no word"),
        (graph(server, strength=0.0), "strength"),
        (graph(server, rounds=0), "rounds"),
        (graph(server, sampler_name="uni_pc"), "sampler_name"),
        (graph(server, related=0.5), "unrelated: 0.6 is above related, 0.5"),
        (small, "latent_image: the picture is 32 × 32 pixels"),
    ]
    for wrong, words in bad:
        with pytest.raises(ComfyError, match=words):
            server.run(wrong)
    found = latents(server, graph(server, edit_text="☃"))
    assert torch.isfinite(found["blended"]).all()
