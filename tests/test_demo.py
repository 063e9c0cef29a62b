"""What the demo measures and how it follows a run."""

from __future__ import annotations

import numpy as np
import pytest
from PIL import Image

from scalpel.devtools import demo
from scalpel.devtools.server import ComfyError


@pytest.fixture
def pictures():
    """A noisy picture, the same with a blue square in the middle, and the square's mask."""
    source = np.random.default_rng(0).integers(0, 200, (64, 48, 3), dtype=np.uint8)
    mask = np.zeros_like(source)
    mask[20:40, 12:30] = 255
    edited = np.where(mask > 0, np.uint8([0, 0, 255]), source)
    return [Image.fromarray(array) for array in (source, edited, mask)]


def test_an_edit_that_stays_inside_leaves_the_outside_perfect(pictures):
    found = demo.measure(*pictures)
    assert found["psnr_outside_db"] is None
    assert found["psnr_farther_than_8_pixels_db"] is None
    assert found["ssim_outside"] == 1.0
    assert found["largest_difference_outside"] == 0
    assert found["mean_colour_inside"]["edited"] == [0, 0, 255]
    assert found["part_of_the_image"] == pytest.approx(20 * 18 / (64 * 48), abs=1e-4)


def test_a_known_error_outside_has_the_psnr_of_the_formula(pictures):
    source, edited, mask = pictures
    brighter = Image.fromarray(np.asarray(edited) // 2 * 2 + 1)
    exactly = np.where(np.asarray(mask) > 0, 0, np.asarray(brighter, float) - np.asarray(source))
    error = np.square(exactly).sum() / (np.asarray(mask) == 0).sum() / 255**2
    assert demo.measure(source, brighter, mask)["psnr_outside_db"] == pytest.approx(-10 * np.log10(error), abs=0.01)


@pytest.mark.parametrize("value", [0, 255])
def test_an_empty_or_full_mask_gives_none_and_no_error(pictures, value):
    found = demo.measure(*pictures[:2], Image.new("RGB", (48, 64), (value,) * 3))
    assert (found["mean_colour_inside"]["source"] is None) == (value == 0)
    assert (found["ssim_outside"] is None) == (value == 255)


def test_a_mask_of_another_size_is_brought_to_the_pictures(pictures):
    source, edited, mask = pictures
    assert demo.measure(source, edited, mask.resize((96, 128), 0)) == demo.measure(source, edited, mask)


def test_pictures_of_different_sizes_are_refused(pictures):
    with pytest.raises(ComfyError, match="cannot be compared"):
        demo.measure(pictures[0], pictures[1].resize((8, 8)), pictures[2])


def test_outputs_are_found_by_their_titles():
    prompt = {"4": {"class_type": "SaveImage", "inputs": {}, "_meta": {"title": "Edited"}}}
    assert demo.node_titled(prompt, "edited") == "4"
    with pytest.raises(ComfyError, match=r"one SaveImage node titled 'mask'; it has 0"):
        demo.node_titled(prompt, "mask")


def test_progress_goes_from_node_to_node_and_ends(capsys):
    progress = demo.Progress({"1": {"class_type": "Load"}, "2": {"class_type": "Sample"}})
    events = [
        ("execution_start", {}),
        ("executing", {"node": "1"}),
        ("executing", {"node": "2"}),
        ("progress", {"value": 5, "max": 10}),
    ]
    assert not any(progress.ended_by(*event) for event in events)
    assert progress.ended_by("execution_success", {})
    assert capsys.readouterr().out.splitlines() == ["  0%  Load", " 50%  Sample", " 75%  Sample 5/10", "done"]
