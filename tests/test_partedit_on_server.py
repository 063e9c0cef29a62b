"""PartEdit through a real server: what a user's graph does, leaves behind, and says when something is wrong."""

from __future__ import annotations

import pickle
import re
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load, save_file

from scalpel.devtools.server import ComfyError

NODES = {
    "PartsWorldLoader", "PartTokenLoader", "AttentionMaskExtractor", "AdaptiveThreshold", "EditBatch",
    "FeatureBlendSampler", "FeatureBlendSamplerAdvanced",
}  # fmt: skip
HEAD = "partsworld_figure_head.safetensors"
STEPS = 4


def text(words):
    return {"class_type": "CLIPTextEncode", "inputs": {"clip": ["model", 1], "text": words}}


def save(latent, prefix):
    return {"class_type": "SaveLatent", "inputs": {"samples": latent, "filename_prefix": prefix}}


def scene():
    return {
        "model": {"class_type": "PartsWorldLoader", "inputs": {}},
        "source": text("a red figure on a green field"),
        "edit": text("a blue figure on a green field"),
        "negative": text(""),
        "empty": {"class_type": "EmptyLatentImage", "inputs": {"width": 256, "height": 256, "batch_size": 1}},
    }


def plain_graph():
    """An ordinary KSampler on the demo model."""
    return scene() | {
        "sampler": {
            "class_type": "KSampler",
            "inputs": {
                "model": ["model", 0], "positive": ["source", 0], "negative": ["negative", 0],
                "latent_image": ["empty", 0], "seed": 1, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler",
                "scheduler": "ddim_uniform", "denoise": 1.0,
            },
        },
        "plain": save(["sampler", 0], "plain"),
    }  # fmt: skip


def edit_graph(token=HEAD, **inputs):
    """The source and its edit, both saved."""
    return scene() | {
        "token": {"class_type": "PartTokenLoader", "inputs": {"token": token}},
        "blend": {
            "class_type": "FeatureBlendSampler",
            "inputs": {
                "model": ["model", 0], "source": ["source", 0], "edit": ["edit", 0], "negative": ["negative", 0],
                "latent_image": ["empty", 0], "seed": 1, "steps": STEPS, "cfg": 5.0, "sampler_name": "euler",
                "scheduler": "ddim_uniform", "denoise": 1.0, "omega": 1.5, "blend_until": 1.0, "layers": "official",
                "padding": "background", "part_token": ["token", 0], **inputs,
            },
        },
        "edited": save(["blend", 0], "edited"),
        "unedited": save(["blend", 1], "unedited"),
    }  # fmt: skip


def latents(server, graph):
    """Run the graph anew and return the latents that it saves, by node."""
    wanted = {node for node, content in graph.items() if content["class_type"] == "SaveLatent"}
    for _ in range(5):  # what is still in the server's cache is not saved again
        server._request("/free", b'{"free_memory": true}')
        time.sleep(1.2)  # the server frees its cache once a second, if it has the time
        outputs = server.run(graph)["outputs"]
        found = {node: outputs[node]["latents"][0] for node in wanted if "latents" in outputs.get(node, {})}
        if len(found) == len(wanted):
            return {node: load(server.fetch(file))["latent_tensor"] for node, file in found.items()}
    raise AssertionError(f"the server's cache was not emptied: {sorted(wanted - set(found))} saved nothing")


@pytest.mark.parametrize("which", ["server", "old_server"])
def test_every_node_is_there(which, request):
    info = request.getfixturevalue(which).object_info()
    assert set(info) >= NODES
    assert HEAD in info["PartTokenLoader"]["input"]["required"]["token"][1]["options"]


def test_an_edit_on_the_oldest_comfyui_changes_the_picture(old_server):
    found = latents(old_server, edit_graph())
    assert not torch.equal(found["edited"], found["unedited"])


def test_the_model_gives_the_same_bits_before_an_edit_after_it_and_beside_it(server):
    before = latents(server, plain_graph())["plain"]
    beside = latents(server, edit_graph() | plain_graph())
    after = latents(server, plain_graph())["plain"]
    assert torch.equal(before, after)
    assert torch.equal(before, beside["plain"])
    assert not torch.equal(beside["edited"], beside["unedited"])


def test_the_same_graph_twice_gives_the_same_bits(server):
    first, second = latents(server, edit_graph()), latents(server, edit_graph())
    assert torch.equal(first["edited"], second["edited"])
    assert torch.equal(first["unedited"], second["unedited"])


def test_the_source_is_what_ksampler_makes_of_its_prompt(server):
    plain = latents(server, plain_graph())["plain"]
    assert (latents(server, edit_graph())["unedited"] - plain).abs().max() < 1e-4 * plain.abs().max()


def test_a_cancelled_edit_leaves_nothing_behind(server):
    expected = latents(server, edit_graph())
    running = server.submit(edit_graph(steps=1000, scheduler="normal"))
    deadline = time.monotonic() + 120
    while not re.search(r" [1-9]\d*/1000 ", server.log_tail()):  # the sampler's own progress bar
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.05)
    server.interrupt()
    with pytest.raises(ComfyError, match=r"(?i)interrupted|cancel"):
        server.wait(running, 60)
    again = latents(server, edit_graph())
    assert torch.equal(expected["edited"], again["edited"])


def test_two_edits_of_one_source_come_out_of_one_run(server):
    graph = edit_graph(edit=["batch", 0]) | {
        "edit2": text("a yellow figure on a green field"),
        "batch": {"class_type": "EditBatch", "inputs": {"edit_a": ["edit", 0], "edit_b": ["edit2", 0]}},
    }
    found = latents(server, graph)
    assert found["edited"].shape[0] == 2
    assert found["unedited"].shape[0] == 1
    assert not torch.equal(found["edited"][0], found["edited"][1])


def test_a_heat_map_and_its_mask_are_found_in_a_generated_picture(server):
    graph = plain_graph() | {
        "token": {"class_type": "PartTokenLoader", "inputs": {"token": HEAD}},
        "find": {
            "class_type": "AttentionMaskExtractor",
            "inputs": {
                "model": ["model", 0], "part_token": ["token", 0], "latent": ["sampler", 0], "layers": "official",
                "noise_level": 0.25, "timesteps": 2, "seed": 0,
            },
        },
        "threshold": {
            "class_type": "AdaptiveThreshold",
            "inputs": {"mask": ["find", 0], "mode": "otsu", "omega": 1.5, "lower": 0.5},
        },
        "picture": {"class_type": "MaskToImage", "inputs": {"mask": ["threshold", 0]}},
        "mask": {"class_type": "SaveImage", "inputs": {"images": ["picture", 0], "filename_prefix": "mask"}},
    }  # fmt: skip
    outputs = server.run(graph)["outputs"]
    assert len(outputs["mask"]["images"]) == 1


# ---------------------------------------------------------------- bad input


class _CreatesAFile:
    def __init__(self, path):
        self.path = path

    def __reduce__(self):
        return Path.touch, (Path(self.path),)


@pytest.fixture(scope="module")
def bad_tokens(server):
    """Token files that must be refused, in the server's own models/part_tokens."""
    folder = server.base / "models" / "part_tokens"
    save_file({"embedding": torch.zeros(2, 2048)}, str(folder / "sdxl.safetensors"))
    whole = (folder / "sdxl.safetensors").read_bytes()
    (folder / "truncated.safetensors").write_bytes(whole[: len(whole) // 2])
    save_file({"weight": torch.zeros(2, 4)}, str(folder / "no_token.safetensors"))
    (folder / "hostile.pt").write_bytes(pickle.dumps(_CreatesAFile(server.base / "owned")))
    return folder


@pytest.mark.parametrize(
    ("token", "words"),
    [
        ("sdxl.safetensors", "2048 wide (SDXL).*128"),
        ("truncated.safetensors", "truncated.safetensors.*not a whole safetensors file"),
        ("no_token.safetensors", "no tensor named 'embedding'"),
        ("hostile.pt", "hostile.pt.*not loaded|hostile.pt.*not a whole"),
    ],
)
def test_a_bad_token_file_gets_a_sentence_and_the_next_run_works(server, bad_tokens, token, words):
    pattern = words.replace("(", r"\(").replace(")", r"\)")
    with pytest.raises(ComfyError, match=f"(?s){pattern}"):
        server.run(edit_graph(token))
    assert not (server.base / "owned").exists()
    assert server.run(edit_graph())["outputs"]


@pytest.mark.parametrize("name", ["../vae/x.safetensors", "/etc/passwd", "missing.safetensors"])
def test_a_token_name_outside_the_folder_is_refused(server, name):
    with pytest.raises(ComfyError, match="is not in models/part_tokens"):
        server.submit(edit_graph(name))


@pytest.mark.parametrize(
    ("inputs", "words"),
    [
        ({"layers": "output.99"}, "layers: 'output.99' names no layer.*This model has: input"),
        ({"layers": ""}, "layers: the input is empty"),
        ({"part_token": None}, "neither a part token nor a mask"),
        ({"denoise": 0.0}, "no step to take"),
    ],
)
def test_a_bad_setting_gets_a_sentence_and_the_next_run_works(server, inputs, words):
    graph = edit_graph(**inputs)
    graph["blend"]["inputs"] = {k: v for k, v in graph["blend"]["inputs"].items() if v is not None}
    with pytest.raises(ComfyError, match=f"(?s){words}"):
        server.run(graph)
    assert server.run(edit_graph())["outputs"]


@pytest.mark.parametrize(("name", "value"), [("omega", 0.0), ("blend_until", 1.5), ("steps", 0), ("cfg", 0.0)])
def test_a_number_out_of_range_is_refused_by_name(server, name, value):
    with pytest.raises(ComfyError, match=name):
        server.submit(edit_graph(**{name: value}))


def test_one_step_and_guidance_of_one_run(server):
    found = latents(server, edit_graph(steps=1, cfg=1.0))
    assert torch.isfinite(found["edited"]).all()
