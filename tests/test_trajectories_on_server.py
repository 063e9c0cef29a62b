"""Real pictures through a real server: inverted, edited, played back, saved and loaded; cancelled; photographs."""

from __future__ import annotations

import os
import time

import numpy as np
import pytest
import skimage.data
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from scalpel.devtools.server import ComfyError
from scalpel.partsworld import tokens
from scalpel.tests.test_partedit_on_server import edit_graph, latents, plain_graph, save, scene, text

IDS = {
    "RecordTrajectory", "DDIMInversion", "NullTextInversion", "EditFriendlyInversion", "LEDITSInversion",
    "ReplayTrajectory", "TrajectorySave", "TrajectoryLoad",
}  # fmt: skip
STEPS = 4
CFG = 5.0
INVERSIONS = {
    "DDIMInversion": {"refine_steps": 1},
    "NullTextInversion": {"negative": ["negative", 0], "cfg": CFG, "inner_steps": 2, "learning_rate": 0.01},
    "EditFriendlyInversion": {"negative": ["negative", 0], "cfg": CFG, "skip": 0.36, "eta": 1.0, "seed": 3},
    "LEDITSInversion": {"skip": 0.15, "seed": 3},
}


@pytest.fixture(scope="module")
def photo(server, tmp_path_factory):
    """A rendered figure in the input folders."""
    pixels, _ = tokens.pictures(tokens.scenes("figure", 1, 6_000_000), "head")
    file = tmp_path_factory.mktemp("photos") / "figure.png"
    Image.fromarray((pixels[0] * 255).round().byte().numpy()).save(file)
    return file


def inverted(server, file, node="DDIMInversion", **inputs):
    """The picture, encoded and inverted."""
    return scene() | {
        "load": {"class_type": "LoadImage", "inputs": {"image": server.upload_image(file)}},
        "encode": {"class_type": "VAEEncode", "inputs": {"pixels": ["load", 0], "vae": ["model", 2]}},
        "invert": {
            "class_type": node,
            "inputs": {
                "model": ["model", 0], "positive": ["source", 0], "latent": ["encode", 0], "steps": STEPS,
                "scheduler": "ddim_uniform", **INVERSIONS[node], **inputs,
            },
        },
        "photo": save(["encode", 0], "photo"),
    }  # fmt: skip


def edited(graph, maker="invert", **inputs):
    """Feature Blend Sampler on a trajectory."""
    own = edit_graph(**{"trajectory": [maker, 0], "latent_image": [maker, 1], "cfg": CFG, **inputs})
    return graph | {name: own[name] for name in ("token", "blend", "edited", "unedited")}


def replayed(graph, maker="invert", cfg=CFG):
    """The trajectory played back in SamplerCustom."""
    return graph | {
        "replay": {"class_type": "ReplayTrajectory", "inputs": {"model": ["model", 0], "trajectory": [maker, 0]}},
        "custom": {
            "class_type": "SamplerCustom",
            "inputs": {
                "model": ["replay", 0], "add_noise": False, "noise_seed": 9, "cfg": cfg, "positive": ["source", 0],
                "negative": ["negative", 0], "sampler": ["replay", 1], "sigmas": ["replay", 2],
                "latent_image": ["replay", 3],
            },
        },
        "again": save(["custom", 0], "again"),
    }  # fmt: skip


def far(a, b):
    return ((a - b).abs().max() / b.abs().max()).item()


@pytest.mark.parametrize("which", ["server", "old_server"])
def test_the_nodes_are_there(which, request):
    assert set(request.getfixturevalue(which).object_info()) >= IDS


@pytest.mark.parametrize("which", ["server", "old_server"])
@pytest.mark.parametrize("node", INVERSIONS)
def test_a_picture_is_inverted_edited_and_played_back_in_one_graph(which, node, photo, request):
    server = request.getfixturevalue(which)
    before = latents(server, plain_graph())["plain"]
    cfg = {"DDIMInversion": 1.0, "LEDITSInversion": 1.0}.get(node, CFG)
    found = latents(server, edited(replayed(inverted(server, photo, node), cfg=cfg)) | plain_graph())
    assert torch.isfinite(found["edited"]).all()
    assert far(found["edited"], found["unedited"]) > 1e-3
    if node in ("EditFriendlyInversion", "LEDITSInversion"):
        assert far(found["again"], found["photo"]) < 1e-5
    if node != "NullTextInversion":  # its source is what guided sampling makes of its embeddings
        assert far(found["unedited"], found["photo"]) < 1e-5
    assert torch.isfinite(found["again"]).all()  # in four steps DDIM does not come near
    assert torch.equal(found["plain"], before)
    assert torch.equal(latents(server, plain_graph())["plain"], before)


def test_a_recorded_generation_is_ksampler_s_is_played_back_and_edits_as_it_does_live(server):
    graph = plain_graph()
    settings = dict(graph["sampler"]["inputs"])
    graph["record"] = {"class_type": "RecordTrajectory", "inputs": settings}
    own = edit_graph(trajectory=["record", 1])
    own["recorded"] = save(["record", 0], "recorded")
    graph |= {name: own[name] for name in ("token", "blend", "edited", "unedited", "recorded")}
    graph |= {
        "replay": {"class_type": "ReplayTrajectory", "inputs": {"model": ["model", 0], "trajectory": ["record", 1]}},
        **{name: replayed({})[name] for name in ("custom", "again")},
    }
    found = latents(server, graph)
    assert torch.equal(found["recorded"], found["plain"])
    assert torch.equal(found["again"], found["plain"])
    live = latents(server, edit_graph())
    assert far(found["unedited"], live["unedited"]) < 1e-4
    assert far(found["edited"], live["edited"]) < 1e-3  # a pixel of a mask may fall to the other side of a threshold


def test_four_edits_of_a_picture_in_one_run(server, photo):
    graph = edited(inverted(server, photo))
    for i, colour in enumerate(("green", "yellow", "white")):
        graph[colour] = text(f"a {colour} figure on a green field")
        before = ["edit", 0] if i == 0 else [f"batch{i - 1}", 0]
        graph[f"batch{i}"] = {"class_type": "EditBatch", "inputs": {"edit_a": before, "edit_b": [colour, 0]}}
    graph["blend"]["inputs"]["edit"] = ["batch2", 0]
    found = latents(server, graph)
    assert found["edited"].shape == (4, 4, 32, 32)
    assert found["unedited"].shape == (1, 4, 32, 32)
    assert far(found["edited"][:1], found["edited"][1:2]) > 1e-3


# ---------------------------------------------------------------- files


def keep(graph, prefix="kept", maker="invert"):
    return graph | {
        "keep": {
            "class_type": "TrajectorySave",
            "inputs": {"trajectory": [maker, 0], "filename_prefix": prefix},
        }
    }


def loaded(name):
    return scene() | {"file": {"class_type": "TrajectoryLoad", "inputs": {"file": name}}}


def test_a_saved_trajectory_is_listed_and_edits_as_it_did(server, photo):
    graph = keep(edited(inverted(server, photo, "EditFriendlyInversion")), "photos/mine")
    first = latents(server, graph)
    again = server.run(keep(inverted(server, photo), "photos/mine"))["outputs"]["keep"]["text"]
    assert again == ["output/trajectories/photos/mine_00002.safetensors"]
    name = os.path.join("photos", "mine_00001.safetensors")  # noqa: PTH118 - as ComfyUI lists it
    assert name in server.object_info()["TrajectoryLoad"]["input"]["required"]["file"][1]["options"]
    found = latents(server, edited(replayed(loaded(name), "file"), "file"))
    assert torch.equal(found["edited"], first["edited"])
    assert far(found["again"], first["photo"]) < 1e-5


def test_names_that_leave_the_folder_are_refused(server, photo):
    for name in ("../secret", "/etc/passwd", "a/../../b"):
        with pytest.raises(ComfyError, match=r"TrajectorySave: filename_prefix: .* inside trajectories"):
            server.run(keep(inverted(server, photo), name))
    with pytest.raises(ComfyError, match=r"is not in output/trajectories|not in list"):
        server.run(edited(loaded("../input/figure.png"), "file"))


def test_a_trajectory_of_another_family_is_refused_in_a_sentence(server, photo):
    written = server.run(keep(inverted(server, photo), "other"))["outputs"]["keep"]["text"][0]
    path = server.base / written
    with_other = path.with_name("sdxl_00001.safetensors")
    from safetensors import safe_open

    with safe_open(str(path), "pt") as file:
        metadata = file.metadata() | {"model_family": "SDXL, text width 2048", "latent_format": "SDXL"}
    save_file(load_file(path), with_other, metadata)
    server.object_info()
    for graph in (edited(loaded(with_other.name), "file"), replayed(loaded(with_other.name), "file")):
        with pytest.raises(ComfyError, match=r"made with a model of another model family \(SDXL, text width 2048\)"):
            server.run(graph)
    assert latents(server, edited(loaded(path.name), "file"))


def test_a_changed_file_is_read_again(server, photo):
    path = server.base / server.run(keep(inverted(server, photo), "changed"))["outputs"]["keep"]["text"][0]
    first = latents(server, replayed(loaded(path.name), "file"))["again"]
    other = (
        server.base / server.run(keep(inverted(server, photo, "LEDITSInversion"), "two"))["outputs"]["keep"]["text"][0]
    )
    other.replace(path)
    second = server.run(replayed(loaded(path.name), "file"))["outputs"]["again"]["latents"]
    assert second
    assert not torch.equal(latents(server, replayed(loaded(path.name), "file"))["again"], first)


# ---------------------------------------------------------------- cancel, bad input


def test_a_cancelled_inversion_leaves_the_model_as_it_was_and_the_next_run_works(server, photo):
    before = latents(server, plain_graph())["plain"]
    started = server.log.stat().st_size
    running = server.submit(edited(inverted(server, photo, "NullTextInversion", inner_steps=1000, learning_rate=1e-4)))
    deadline = time.monotonic() + 120
    while b"optimising the negative prompt" not in server.log.read_bytes()[started:]:
        assert time.monotonic() < deadline, server.log_tail()
        time.sleep(0.05)
    server.interrupt()
    with pytest.raises(ComfyError, match=r"(?i)interrupted|cancel"):
        server.wait(running, 60)
    assert torch.equal(latents(server, plain_graph())["plain"], before)
    assert latents(server, edited(inverted(server, photo, "NullTextInversion")))


def test_what_does_not_fit_gets_a_sentence_each_and_the_run_after_them_works(server, photo):
    small = {"small": {"class_type": "EmptyLatentImage", "inputs": {"width": 128, "height": 256, "batch_size": 1}}}
    nothing = {"nothing": {"class_type": "SolidMask", "inputs": {"value": 0.0, "width": 256, "height": 256}}}
    bad = [
        ({}, {"latent_image": ["small", 0]}, "latent_image: it is a picture of 128 × 256, and the trajectory's is 256"),
        (
            {},
            {"steps": STEPS + 1},
            "steps, scheduler, denoise, sampler_name: they give 5 steps of ddim_uniform .* 4 steps of ddim_uni",
        ),
        ({}, {"mask": ["nothing", 0]}, r"mask: it is empty \(all 0\)"),
        ({"skip": 0.95}, {}, "skip: 0.95 leaves none of 4 steps"),
    ]
    for inversion, sampler, words in bad:
        node = "LEDITSInversion" if inversion else "DDIMInversion"
        with pytest.raises(ComfyError, match=words):
            server.run(edited(inverted(server, photo, node, **inversion), **sampler) | small | nothing)
    for name, value in (("steps", 0), ("skip", 1.0)):
        with pytest.raises(ComfyError, match=f"{name}"):
            server.run(edited(inverted(server, photo, "LEDITSInversion", **{name: value})))
    assert latents(server, edited(inverted(server, photo)))


# ---------------------------------------------------------------- photographs


@pytest.mark.parametrize("name", ["astronaut", "chelsea", "coffee", "rocket"])
def test_photographs_of_any_shape_go_all_the_way(server, name, tmp_path):
    """What the demo model makes of them is not judged."""
    pixels = getattr(skimage.data, name)()
    h, w = (side // 2 for side in pixels.shape[:2])  # half the size: four times as fast
    Image.fromarray(np.asarray(pixels)).resize((w, h)).save(tmp_path / f"{name}.png")
    shape = (1, 4, h // 8, w // 8)
    for node in INVERSIONS:
        graph = inverted(server, tmp_path / f"{name}.png", node, steps=2)
        found = latents(server, edited(replayed(graph), steps=2))
        for key in ("edited", "unedited", "again"):
            assert found[key].shape == shape, (node, key)
            assert torch.isfinite(found[key]).all(), (node, key)
        if node in ("DDIMInversion", "EditFriendlyInversion", "LEDITSInversion"):
            assert far(found["unedited"], found["photo"]) < 1e-5
