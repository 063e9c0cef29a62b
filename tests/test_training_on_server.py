"""Training through a real server: train and edit in one graph, save and load, cancel, and what is said of bad input."""

from __future__ import annotations

import os
import time

import pytest
import torch
from PIL import Image

from scalpel.core import part_token
from scalpel.devtools.server import ComfyError
from scalpel.partsworld import tokens
from scalpel.tests.test_partedit_on_server import edit_graph, latents, plain_graph

IDS = {"PartTokenDataset", "PartTokenTrainer", "PartTokenSave"}


def _as_image(tensor):
    return Image.fromarray((tensor * 255).round().byte().numpy())


@pytest.fixture(scope="module")
def heads(server):
    """A folder of two figures and the masks of their heads in the server's input folder."""
    folder = server.base / "input" / "heads"
    folder.mkdir()
    for i, (picture, mask) in enumerate(zip(*tokens.pictures(tokens.scenes("figure", 2), "head"), strict=True)):
        _as_image(picture).save(folder / f"{i}.png")
        _as_image(mask).save(folder / f"{i}_mask.png")
    return folder


def training(**inputs):
    """The demo model, the pictures and the trainer, with few steps."""
    return {
        "model": {"class_type": "PartsWorldLoader", "inputs": {}},
        "pictures": {"class_type": "PartTokenDataset", "inputs": {"directory": "heads", "size": 0, "limit": 0}},
        "train": {
            "class_type": "PartTokenTrainer",
            "inputs": {
                "model": ["model", 0], "vae": ["model", 2], "images": ["pictures", 0], "masks": ["pictures", 1],
                "name": "head", "recipe": "fast", "steps": 5, "learning_rate": 0.0, "loss": "recipe",
                "layers": "recipe", "noise_start": 0.6, "noise_end": 0.05, "timesteps": 2, "seed": 0, **inputs,
            },
        },
    }  # fmt: skip


def shown(*source):
    return {"class_type": "PreviewImage", "inputs": {"images": list(source)}}


def saved(prefix):
    return {"class_type": "PartTokenSave", "inputs": {"part_token": ["train", 0], "filename_prefix": prefix}}


def files(server):
    return sorted(p.name for p in (server.base / "models" / "part_tokens").rglob("*") if p.is_file())


@pytest.mark.parametrize("which", ["server", "old_server"])
def test_the_training_nodes_are_there(which, request):
    assert set(request.getfixturevalue(which).object_info()) >= IDS


def test_a_token_is_trained_and_edits_in_one_graph_and_the_model_is_as_before(server, heads):
    before = latents(server, plain_graph())["plain"]
    found = latents(server, edit_graph() | training() | edit_with(["train", 0]) | plain_graph())
    assert not torch.equal(found["edited"], found["unedited"])
    assert torch.equal(found["plain"], before)
    assert torch.equal(latents(server, plain_graph())["plain"], before)


def edit_with(token):
    return {"blend": edit_graph(part_token=token)["blend"]}


def test_the_loss_curve_and_the_heat_maps_are_pictures(server, heads):
    graph = training() | {"curve": shown("train", 1), "maps": shown("train", 2)}
    outputs = server.run(graph)["outputs"]
    assert len(outputs["curve"]["images"]) == 1
    assert len(outputs["maps"]["images"]) == 2
    assert server.fetch(outputs["maps"]["images"][0])[:4] == b"\x89PNG"


def test_a_saved_token_is_listed_and_edits_in_another_graph_as_it_did_in_the_first(server, heads):
    graph = edit_graph() | training() | edit_with(["train", 0]) | {"save": saved("mine/head")}
    first = latents(server, graph)
    again = server.run(training(seed=1) | {"save": saved("mine/head")})["outputs"]["save"]["text"]
    assert again == ["models/part_tokens/mine/head_00002.safetensors"]
    listed = server.object_info()["PartTokenLoader"]["input"]["required"]["token"][1]["options"]
    name = os.path.join("mine", "head_00001.safetensors")  # noqa: PTH118 - as ComfyUI lists it
    assert name in listed
    edited = latents(server, edit_graph(name))["edited"]
    assert (edited - first["edited"]).abs().mean() < 1e-3  # a pixel of a mask may fall to the other side of a threshold
    token = part_token.load(server.base / "models" / "part_tokens" / name)
    assert list(token.parts) == ["head"]
    assert token.info["images"] == "2"


@pytest.mark.parametrize("which", ["server", "old_server"])
def test_a_mask_painted_in_load_image_trains_on_both_comfyuis(which, request, tmp_path):
    """The mask editor saves what was painted as transparency; Load Image gives it as 1."""
    server = request.getfixturevalue(which)
    (picture,), (mask,) = tokens.pictures(tokens.scenes("figure", 1), "head")
    painted = _as_image(picture)
    painted.putalpha(_as_image(1 - mask))
    painted.save(tmp_path / "painted.png")
    graph = training() | {"save": saved("painted"), "maps": shown("train", 2)}
    graph["pictures"] = {"class_type": "LoadImage", "inputs": {"image": server.upload_image(tmp_path / "painted.png")}}
    outputs = server.run(graph)["outputs"]
    assert outputs["save"]["text"] == ["models/part_tokens/painted_00001.safetensors"]
    assert len(outputs["maps"]["images"]) == 1


def test_a_changed_picture_is_loaded_again_and_an_unchanged_one_is_not(server, heads):
    graph = {"pictures": training()["pictures"], "show": shown("pictures", 0)}
    server.run(graph)
    assert "pictures" in cached(server.run(graph))
    os.utime(heads / "0.png")
    assert "pictures" not in cached(server.run(graph))


def cached(entry):
    return next(data["nodes"] for event, data in entry["status"]["messages"] if event == "execution_cached")


def test_a_cancelled_training_leaves_no_file_and_the_next_run_works(server, heads):
    before, had = latents(server, plain_graph())["plain"], files(server)
    started = server.log.stat().st_size
    running = server.submit(training(steps=100000) | {"save": saved("never")})
    deadline = time.monotonic() + 120
    while b"training for 100000 steps" not in server.log.read_bytes()[started:]:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.05)
    server.interrupt()
    with pytest.raises(ComfyError, match=r"(?i)interrupted|cancel"):
        server.wait(running, 60)
    assert files(server) == had
    assert server.run(training(seed=1) | {"save": saved("next")})["outputs"]["save"]["text"]
    assert files(server) == sorted([*had, "next_00001.safetensors"])
    assert torch.equal(latents(server, plain_graph())["plain"], before)


# ---------------------------------------------------------------- bad input


BAD = {
    "layers: 'output.99' names no layer.*This model has: input": {"layers": "output.99"},
    "recipe: 'best' is unknown; accepted are paper and fast": {"recipe": "best"},
    "name: it is empty; say what the part is called": {"name": " "},
    r"noise_start: 0\.6 is not above noise_end \(0\.7\)": {"noise_end": 0.7},
    "masks: 1 masks for 2 images; give one mask per image": {"masks": ["empty", 0]},
}


def test_bad_settings_get_a_sentence_each_and_the_run_after_them_works(server, heads):
    others = {
        "empty": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 256, "height": 256}},
        "curve": shown("train", 1),
    }
    for words, inputs in BAD.items():
        with pytest.raises(ComfyError, match=f"(?s)PartTokenTrainer: {words}"):
            server.run(training(**inputs) | others)
    assert server.run(training(steps=1) | others)["outputs"]


@pytest.mark.parametrize(("name", "value"), [("steps", -1), ("timesteps", 0), ("noise_start", 2.0)])
def test_a_value_out_of_range_is_refused_by_name(server, heads, name, value):
    with pytest.raises(ComfyError, match=name):
        server.submit(training(**{name: value}) | {"curve": shown("train", 1)})


def test_a_folder_with_a_missing_mask_is_refused_by_the_files_name(server, heads):
    lonely = server.base / "input" / "lonely"
    lonely.mkdir()
    Image.open(heads / "0.png").save(lonely / "x.png")
    graph = {"pictures": training()["pictures"], "show": shown("pictures", 0)}
    graph["pictures"]["inputs"]["directory"] = "lonely"
    with pytest.raises(ComfyError, match=r"PartTokenDataset: directory: x\.png has no mask; x_mask\.png is missing"):
        server.run(graph)
    Image.open(heads / "0_mask.png").save(lonely / "x_mask.png")
    assert server.run(graph)["outputs"]


def test_a_prefix_out_of_the_folder_is_refused_and_writes_nothing(server, heads):
    had = files(server)
    with pytest.raises(ComfyError, match=r"PartTokenSave: filename_prefix: '\.\./\.\./owned' cannot be used"):
        server.run(training(steps=1) | {"save": saved("../../owned")})
    assert files(server) == had
    assert not list(server.base.rglob("owned*"))
