"""CPAM through a real server: whole graphs with the demo model, their run logs, and what is said of bad input."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image

from scalpel.devtools.server import ComfyError
from scalpel.partsworld import tokens
from scalpel.tests.test_partedit_on_server import HEAD, latents, plain_graph, save, scene, text

IDS = {"CPAMSelfAttnPatch", "CPAMCrossAttnPatch", "RegionPrompts", "RunLogShow"}
STEPS = 3
EDIT = "a blue figure on a green field"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


@pytest.fixture(scope="module")
def files(tmp_path_factory):
    """A rendered figure, and a mask of a disc in its middle."""
    folder = tmp_path_factory.mktemp("cpam")
    pixels, _ = tokens.pictures(tokens.scenes("figure", 1, 6_000_000), "head")
    Image.fromarray((pixels[0] * 255).round().byte().numpy()).save(folder / "cpam_figure.png")
    y, x = np.mgrid[:256, :256]
    disc = ((y - 128) ** 2 + (x - 128) ** 2 < 70**2).astype(np.uint8) * 255
    Image.fromarray(disc).convert("RGB").save(folder / "cpam_mask.png")
    return folder


def graph(server, files, own=(), cross=(), mask=("painted", 0)):
    """A picture inverted and edited under both patches, with a log of each."""
    mask = list(mask)
    return scene() | {
        "load": node("LoadImage", image=server.upload_image(files / "cpam_figure.png")),
        "painted": node("LoadImageMask", image=server.upload_image(files / "cpam_mask.png"), channel="red"),
        "encode": node("VAEEncode", pixels=["load", 0], vae=["model", 2]),
        "edit": text(EDIT),
        "invert": node(
            "DDIMInversion", model=["model", 0], positive=["negative", 0], latent=["encode", 0], steps=STEPS,
            scheduler="ddim_uniform", refine_steps=0,
        ),
        "own": node(
            "CPAMSelfAttnPatch", **{
                "model": ["model", 0], "trajectory": ["invert", 0], "source_mask": mask, "task": "replace object",
                "start_step": -1, "start_layer": -1, "dilation": 0.1, "softness": 0.0, "background_keys": "source",
                "plain_fraction": 0.0, "seed": 0, **dict(own),
            },
        ),
        "cross": node(
            "CPAMCrossAttnPatch", **{
                "model": ["own", 0], "null": ["negative", 0], "target_mask": mask, "refine": True,
                "refine_from_step": 1, "refine_threshold": 0.45, "clip": ["model", 1], "text": EDIT, **dict(cross),
            },
        ),
        "euler": node("KSamplerSelect", sampler_name="euler"),
        "custom": node(
            "SamplerCustom", model=["cross", 0], add_noise=False, noise_seed=1, cfg=4.0, positive=["edit", 0],
            negative=["negative", 0], sampler=["euler", 0], sigmas=["invert", 2], latent_image=["invert", 1],
        ),
        "edited": save(["custom", 0], "edited"),
        "log": node("RunLogShow", run_log=["cross", 1], latent=["custom", 0]),
        "preview": node("PreviewImage", images=["log", 0]),
        "values": node("PreviewAny", source=["log", 2]),
    }  # fmt: skip


def unpatched(server, files):
    """The same run without the patches."""
    plain = graph(server, files)
    plain["custom"]["inputs"]["model"] = ["model", 0]
    return {name: plain[name] for name in plain if name not in ("own", "cross", "log", "preview", "values", "painted")}


def pictures(server, found):
    return np.stack([np.asarray(Image.open(io.BytesIO(server.fetch(one))).convert("L")) for one in found["images"]])


def test_the_nodes_are_there_with_their_outputs(server):
    info = server.object_info()
    assert set(info) >= IDS
    assert info["CPAMSelfAttnPatch"]["output"] == info["CPAMCrossAttnPatch"]["output"] == ["MODEL", "RUN_LOG"]
    assert info["RunLogShow"]["output"] == ["IMAGE", "MASK", "STRING"]


def test_a_picture_is_inverted_edited_and_its_masks_shown_in_one_graph(server, files):
    before = latents(server, plain_graph())["plain"]
    whole = graph(server, files) | plain_graph()
    found = latents(server, whole)
    assert torch.isfinite(found["edited"]).all()
    assert torch.equal(found["plain"], before)
    other = latents(server, unpatched(server, files))["edited"]
    assert (found["edited"] - other).abs().max() > 1e-2 * other.abs().max()
    assert torch.equal(latents(server, whole)["edited"], found["edited"])
    assert torch.equal(latents(server, plain_graph())["plain"], before)


def test_a_second_submission_comes_from_the_cache_and_the_log_still_shows(server, files):
    whole = graph(server, files)
    first = server.run(whole)["outputs"]
    masks = pictures(server, first["preview"])
    assert masks.shape == (STEPS, 256, 256)
    assert set(np.unique(masks)) == {0, 255}
    (values,) = first["values"]["text"]
    assert [line.split(":")[0] for line in values.splitlines()] == [f"step {i + 1}" for i in range(STEPS)]
    whole["log again"] = node("RunLogShow", run_log=["cross", 1], latent=["custom", 1])
    whole["preview again"] = node("PreviewImage", images=["log again", 0])
    whole["own log"] = node("RunLogShow", run_log=["own", 1], latent=["custom", 0])
    whole["preview own"] = node("PreviewImage", images=["own log", 0])
    entry = server.run(whole)
    (cached,) = (data["nodes"] for event, data in entry["status"]["messages"] if event == "execution_cached")
    assert {"custom", "own", "cross", "log", "preview"} <= set(cached)
    assert "log again" not in cached
    for name in ("preview again", "preview own"):
        assert np.array_equal(pictures(server, entry["outputs"][name]), masks)


def test_a_found_part_is_the_mask(server, files):
    """Heat map, threshold, CPAM; and regions beside it."""
    whole = graph(server, files, mask=("threshold", 0)) | {
        "token": node("PartTokenLoader", token=HEAD),
        "find": node(
            "AttentionMaskExtractor", model=["model", 0], part_token=["token", 0], latent=["encode", 0],
            layers="official", noise_level=0.25, timesteps=1, seed=0,
        ),
        "threshold": node("AdaptiveThreshold", mask=["find", 0], mode="otsu", omega=1.5, lower=0.5),
        "field": text("a yellow field"),
        "region": node("RegionPrompts", model=["cross", 0], region=["painted", 0], prompt=["field", 0]),
    }  # fmt: skip
    whole["cross"]["inputs"]["refine"] = False
    whole["custom"]["inputs"]["model"] = ["region", 0]
    outputs = server.run(whole)["outputs"]
    masks = pictures(server, outputs["preview"])
    assert masks.shape == (STEPS, 256, 256)
    assert (masks == masks[0]).all()
    assert 0 < (masks[0] > 0).mean() < 0.5
    assert outputs["edited"]["latents"]


def test_what_does_not_fit_gets_a_sentence_each_and_the_run_after_them_works(server, files):
    expected = latents(server, graph(server, files))["edited"]
    nothing = {"nothing": node("SolidMask", value=0.0, width=256, height=256)}
    everything = {"everything": node("SolidMask", value=1.0, width=256, height=256)}
    wide = {"wide": node("SolidMask", value=1.0, width=512, height=256)}
    twice = graph(server, files)
    twice["again"] = {"class_type": "CPAMSelfAttnPatch", "inputs": {**twice["own"]["inputs"], "model": ["cross", 0]}}
    twice["custom"]["inputs"]["model"] = ["again", 0]
    without = graph(server, files)
    del without["cross"]["inputs"]["clip"]
    bad = [
        (graph(server, files, own={"source_mask": ["nothing", 0]}) | nothing, r"source_mask: it is empty \(all 0\)"),
        (
            graph(server, files, own={"source_mask": ["everything", 0]}) | everything,
            "source_mask: it covers the whole picture",
        ),
        (
            graph(server, files, own={"target_mask": ["everything", 0]}) | everything,
            "target_mask: the region that may change is 100 % of the picture",
        ),
        (graph(server, files, own={"source_mask": ["wide", 0]}) | wide, "source_mask: it is 512 × 256 where the image"),
        (graph(server, files, cross={"target_mask": ["wide", 0]}) | wide, "target_mask: it is 512 × 256 where the im"),
        (twice, "model: it has a CPAM Self-Attention already"),
        (without, "clip: it is needed to find the words of 'text'"),
        (graph(server, files, own={"dilation": 2.0}), "dilation"),
        (graph(server, files, own={"task": "add object"}), "task"),
    ]
    for wrong, words in bad:
        with pytest.raises(ComfyError, match=words):
            server.run(wrong)
    assert torch.equal(latents(server, graph(server, files))["edited"], expected)
