"""Several parts, and words as parts, through a real server."""

from __future__ import annotations

import io

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import save_file

from scalpel.devtools.server import ComfyError

HEAD, TORSO = "partsworld_figure_head.safetensors", "partsworld_figure_torso.safetensors"


def node(kind, **inputs):
    return {"class_type": kind, "inputs": inputs}


def prompt(words):
    return node("CLIPTextEncode", clip=["model", 1], text=words)


SCENE = {
    "model": node("PartsWorldLoader"),
    "source": prompt("a red figure and a red car on a green field"),
    "edit": prompt("a blue figure and a blue car on a green field"),
    "negative": prompt(""),
    "empty": node("EmptyLatentImage", width=256, height=256, batch_size=1),
    "head": node("PartTokenLoader", token=HEAD),
    "torso": node("PartTokenLoader", token=TORSO),
    "both": node("PartTokenCombine", part_token_a=["torso", 0], part_token_b=["head", 0]),
}


def saved(image):
    return node("SaveImage", images=image, filename_prefix="parts")


def edit_graph(token):
    return SCENE | {
        "blend": node(
            "FeatureBlendSampler", model=["model", 0], source=["source", 0], edit=["edit", 0],
            negative=["negative", 0], latent_image=["empty", 0], seed=2, steps=8, cfg=5.0, sampler_name="euler",
            scheduler="ddim_uniform", denoise=1.0, omega=1.5, blend_until=1.0, layers="official",
            padding="background", part_token=[token, 0],
        ),
        "mask": node("MaskToImage", mask=["blend", 2]),
        "decoded": node("VAEDecode", samples=["blend", 0], vae=["model", 2]),
        "undecoded": node("VAEDecode", samples=["blend", 1], vae=["model", 2]),
        "save mask": saved(["mask", 0]),
        "save edited": saved(["decoded", 0]),
        "save source": saved(["undecoded", 0]),
    }  # fmt: skip


def find_graph(token, batch=1, **nodes):
    """The heat maps of a token in pictures of plain noise."""
    return SCENE | nodes | {
        "empty": node("EmptyLatentImage", width=256, height=256, batch_size=batch),
        "find": node(
            "AttentionMaskExtractor", model=["model", 0], part_token=[token, 0], latent=["empty", 0],
            layers="official", noise_level=0.25, timesteps=1, seed=0, positive=["source", 0],
        ),
        "map": node("MaskToImage", mask=["find", 0]),
        "save map": saved(["map", 0]),
    }  # fmt: skip


def pictures(server, graph):
    """What the graph saves: node → [pictures, H, W, 3] in 0…1."""
    outputs = server.run(graph)["outputs"]
    return {
        name.removeprefix("save "): np.stack(
            [np.asarray(Image.open(io.BytesIO(server.fetch(image))).convert("RGB")) / 255 for image in found["images"]]
        )
        for name, found in outputs.items()
    }


@pytest.mark.parametrize("which", ["server", "old_server"])
def test_both_nodes_are_there(which, request):
    info = request.getfixturevalue(which).object_info()
    assert {"PartTokenFromText", "PartTokenCombine"} <= set(info)
    assert list(info["PartTokenFromText"]["input"]["required"]) == ["clip", "text"]
    assert list(info["PartTokenCombine"]["input"]["required"]) == ["part_token_a", "part_token_b"]
    assert info["PartTokenFromText"]["output"] == info["PartTokenCombine"]["output"] == ["PART_TOKEN"]


def test_two_parts_combined_are_found_and_recoloured_in_one_run(server):
    both = pictures(server, edit_graph("both"))
    change = np.abs(both["edited"] - both["source"]).mean(-1)[0]
    masks = {token: pictures(server, edit_graph(token))["mask"][0, ..., 0] > 0.5 for token in ("head", "torso")}
    outside = change[~(masks["head"] | masks["torso"])].mean()
    for mask in masks.values():
        assert mask.any()
        assert (both["mask"][0, ..., 0] > 0.5)[mask].mean() > 0.5
        assert change[mask].mean() > 2 * outside


@pytest.mark.parametrize("which", ["server", "old_server"])
def test_a_combined_token_gives_a_map_of_each_part_for_each_picture(which, request):
    maps = pictures(request.getfixturevalue(which), find_graph("both", batch=2))["map"]
    assert maps.shape == (4, 256, 256, 3)
    assert len({one.tobytes() for one in maps}) == 4
    assert all(one.min() == 0 and one.max() > 0.99 for one in maps)


@pytest.mark.parametrize("which", ["server", "old_server"])
def test_a_word_gives_a_map_alone_and_beside_a_learned_part(which, request):
    server = request.getfixturevalue(which)
    word = node("PartTokenFromText", clip=["model", 1], text="(figure:1.1) hood")
    (alone,) = pictures(server, find_graph("word", word=word))["map"]
    assert alone.std() > 0.01
    mixed = node("PartTokenCombine", part_token_a=["head", 0], part_token_b=["word", 0])
    assert len(pictures(server, find_graph("mixed", word=word, mixed=mixed))["map"]) == 2


def test_another_word_gives_another_map(server):
    words = [node("PartTokenFromText", clip=["model", 1], text=text) for text in ("figure", "car")]
    one, other = (pictures(server, find_graph("word", word=word))["map"] for word in words)
    assert not np.array_equal(one, other)


def test_a_file_of_several_tokens_gives_a_map_of_each(server):
    folder = server.base / "models" / "part_tokens"
    torch.save(torch.randn(3, 2, 128, generator=torch.Generator().manual_seed(1)), folder / "three.pt")
    tokens = {"head": torch.zeros(2, 128), "torso": torch.ones(2, 128)}
    save_file(tokens, folder / "two.safetensors")
    for name, parts in (("three.pt", 3), ("two.safetensors", 2)):
        maps = pictures(server, find_graph("file", file=node("PartTokenLoader", token=name)))["map"]
        assert len(maps) == parts


@pytest.mark.parametrize("text", ["", "  \n"])
def test_an_empty_text_gets_a_sentence_and_the_next_run_works(server, text):
    word = node("PartTokenFromText", clip=["model", 1], text=text)
    with pytest.raises(ComfyError, match="text: it is empty; name the part in one or a few words"):
        server.run(find_graph("word", word=word))
    assert server.run(find_graph("both"))["outputs"]


def test_tokens_of_two_model_families_get_a_sentence(server):
    save_file({"embedding": torch.zeros(2, 2048)}, server.base / "models" / "part_tokens" / "for_sdxl.safetensors")
    nodes = {
        "sdxl": node("PartTokenLoader", token="for_sdxl.safetensors"),
        "mixed": node("PartTokenCombine", part_token_a=["head", 0], part_token_b=["sdxl", 0]),
    }
    with pytest.raises(ComfyError, match=r"(?s)part_token_b: it is 2048 wide \(SDXL\), but part_token_a is 128 wide"):
        server.run(find_graph("mixed", **nodes))


def test_a_file_whose_rows_are_odd_gets_a_sentence(server):
    torch.save(torch.zeros(3, 128), server.base / "models" / "part_tokens" / "odd.pt")
    with pytest.raises(ComfyError, match=r"(?s)'odd.pt': .*\[2, width\].*found \[3, 128\]"):
        server.run(find_graph("file", file=node("PartTokenLoader", token="odd.pt")))
