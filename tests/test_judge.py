"""The judge of pictures: right on renders it has not seen, whole or disturbed."""

from __future__ import annotations

import numpy as np
import pytest
import torch

from scalpel.partsworld import judge as judging
from scalpel.partsworld.render import render
from scalpel.partsworld.scene import COLOURS, PARTS, sample_scene

UNSEEN = 50_000_000


@pytest.fixture(scope="module")
def judge():
    return judging.Judge()


def test_its_weights_are_small():
    assert judging.WEIGHTS.stat().st_size < 1_000_000


@pytest.mark.parametrize("disturbed", [False, True])
def test_it_is_right_on_unseen_renders(judge, disturbed):
    numbers = judging.accuracy(judge, 30, disturbed)
    assert min(numbers[name] for name in ("kind", "background", "colour")) >= 0.98
    assert numbers["part colour"] > 0.95
    assert numbers["mask IoU"] > 0.85


def test_verdicts_name_every_part_with_disjoint_masks_of_the_pictures_size(judge):
    verdict = judge(render(sample_scene(UNSEEN, "dog"), 512).image)
    assert verdict.kind == "dog"
    assert set(verdict.masks) == set(verdict.colours) == set(PARTS["dog"])
    masks = np.stack(list(verdict.masks.values()))
    assert masks.shape == (4, 512, 512)
    assert masks.dtype == bool
    assert masks.sum(0).max() == 1


@pytest.mark.parametrize("part", PARTS["figure"])
def test_it_sees_which_part_was_recoloured(judge, part):
    before = sample_scene(UNSEEN + 1, "figure", colour="red")
    verdict = judge(render(before.recolour(part, "blue")).image)
    assert verdict.colours == {name: "blue" if name == part else "red" for name in PARTS["figure"]}


def test_it_sees_that_there_is_no_object(judge):
    verdict = judge(render(sample_scene(UNSEEN + 2, background="snow").without()).image)
    assert (verdict.kind, verdict.colour, verdict.background) == (None, None, "snow")
    assert not verdict.masks


def test_one_by_one_and_together_give_the_same(judge):
    pictures = [torch.from_numpy(render(sample_scene(UNSEEN + i)).image) for i in range(3)]
    together = judge.all(pictures)
    assert [(v.kind, v.background, v.colours) for v in together] == [
        (v.kind, v.background, v.colours) for v in map(judge, pictures)
    ]


@pytest.mark.parametrize("name", COLOURS)
def test_a_colours_name_survives_a_dark_rim(name):
    pixels = np.tile(np.array(COLOURS[name]), (100, 1))
    pixels[:30] *= 0.6
    assert judging.nearest_colour(pixels) == name
    assert judging.nearest_colour(pixels, frame=1_000_000) is None
    assert judging.nearest_colour(pixels[:0]) is None


def test_missing_weights_are_said(tmp_path):
    with pytest.raises(FileNotFoundError, match=r"partsworld\.judge train"):
        judging.Judge(tmp_path / "none.safetensors")
