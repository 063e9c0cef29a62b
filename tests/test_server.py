"""The private ComfyUI server that tests and demo share, on a pack of three lines of interest."""

from __future__ import annotations

import io
import time

import pytest
from PIL import Image

from scalpel.devtools.server import ComfyError

PACK = """
import time
import torch
import comfy.model_management
from comfy_api.latest import ComfyExtension, io

class Grey(io.ComfyNode):
    @classmethod
    def define_schema(cls):
        inputs = [io.Float.Input("value", default=0.5), io.Float.Input("seconds", default=0.0, max=60.0)]
        return io.Schema(node_id="TestGrey", inputs=inputs, outputs=[io.Image.Output()])

    @classmethod
    def execute(cls, value, seconds):
        end = time.monotonic() + seconds
        while time.monotonic() < end:
            comfy.model_management.throw_exception_if_processing_interrupted()
            time.sleep(0.01)
        if value > 1:
            raise ValueError("value is above 1")
        return io.NodeOutput(torch.full((1, 8, 16, 3), value))

class Extension(ComfyExtension):
    async def get_node_list(self):
        return [Grey]

async def comfy_entrypoint():
    return Extension()
"""


@pytest.fixture(scope="module")
def grey_server(start_server, tmp_path_factory):
    pack = tmp_path_factory.mktemp("packs") / "grey_pack"
    pack.mkdir()
    (pack / "__init__.py").write_text(PACK)
    return start_server(packs=[pack])


def workflow(**inputs):
    return {
        "1": {"class_type": "TestGrey", "inputs": {"value": 0.5, "seconds": 0.0, **inputs}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "grey"}},
    }


def saved_picture(server, entry, node="2"):
    return Image.open(io.BytesIO(server.fetch(entry["outputs"][node]["images"][0])))


def test_a_workflow_runs_and_its_picture_comes_back(grey_server):
    picture = saved_picture(grey_server, grey_server.run(workflow(value=0.2)))
    assert picture.size == (16, 8)
    assert picture.getpixel((0, 0)) == (51, 51, 51)


def test_an_uploaded_picture_can_be_loaded(grey_server, tmp_path):
    Image.new("RGB", (5, 3), (1, 2, 3)).save(tmp_path / "small.png")
    name = grey_server.upload_image(tmp_path / "small.png")
    prompt = {
        "1": {"class_type": "LoadImage", "inputs": {"image": name}},
        "2": {"class_type": "SaveImage", "inputs": {"images": ["1", 0], "filename_prefix": "copy"}},
    }
    assert saved_picture(grey_server, grey_server.run(prompt)).getpixel((4, 2)) == (1, 2, 3)


def test_a_failing_node_gives_its_own_message_and_the_next_run_works(grey_server):
    with pytest.raises(ComfyError, match=r"^TestGrey: value is above 1$"):
        grey_server.run(workflow(value=1.5))
    assert grey_server.run(workflow(value=0.4))["outputs"]


def test_an_invalid_workflow_is_refused_with_the_reason(grey_server):
    with pytest.raises(ComfyError, match=r"TestGrey \(node 1\): .*value"):
        grey_server.run(workflow(value="much"))


def test_a_workflow_with_one_invalid_output_is_refused_whole(grey_server):
    prompt = {**workflow(value=0.3), "3": {"class_type": "SaveImage", "inputs": {"images": ["1", 0]}}}
    with pytest.raises(ComfyError, match=r"SaveImage \(node 3\): .*filename_prefix"):
        grey_server.submit(prompt)


def test_a_run_can_be_interrupted(grey_server):
    prompt_id = grey_server.submit(workflow(seconds=30.0))
    time.sleep(0.3)
    grey_server.interrupt()
    with pytest.raises(ComfyError, match="interrupted"):
        grey_server.wait(prompt_id, timeout=10)


def test_a_run_that_takes_too_long_says_so(grey_server):
    with pytest.raises(ComfyError, match="did not end within 0 s"):
        grey_server.run(workflow(seconds=3.0), timeout=0.2)
    grey_server.interrupt()


def test_a_server_that_cannot_start_shows_its_log(start_server, tmp_path):
    (tmp_path / "main.py").write_text("raise SystemExit('no such model')")
    with pytest.raises(ComfyError, match=r"exit code 1(.|\n)*no such model"):
        start_server(tmp_path)
