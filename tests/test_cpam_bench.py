"""The measurements of CPAM: what is asked for, what counts as background, how results are put together."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from scalpel.bench import cpam as bench
from scalpel.partsworld.judge import Judge
from scalpel.partsworld.scene import PARTS

RIGHT = ("right", "kind", "colour")


@pytest.fixture(scope="module")
def distance():
    return bench.Distance(Judge().network)


def pictures():
    rng = np.random.default_rng(0)
    return rng.random((2, 64, 64, 3)).astype(np.float32)


def square(low, high, side=64):
    mask = np.zeros((side, side), bool)
    mask[low:high, low:high] = True
    return mask


def result(task, method, scenes, label=None):
    """A record of (number, right, PSNR)."""
    same = {"picture": 20.0, "ssim": 0.9, "distance": 0.1}
    measured = [
        {"number": n, "rows": [20, 60], "kept": {"round_trip": db, **same}} | dict.fromkeys(RIGHT, right)
        for n, right, db in scenes
    ]
    return {"task": task, "method": method, "label": label or bench.LABELS[method], "scenes": measured}


def numbers(*records):
    settings = {"steps": 20, "around": 0.1, "cfg": 7.5, "mutual_step": 2, "mutual_layer": 4}
    results = {f"{r['task']}, {r['label']}": r for r in records}
    return bench.empty_numbers() | {"results": results, "settings": settings, "seconds": 1.0}


@pytest.mark.parametrize("task", bench.TASKS)
def test_a_scene_has_one_object_and_kinds_come_in_turn(task):
    scenes = [bench.scene_of(task, number) for number in range(8)]
    assert [scene.things[0].kind for scene in scenes] == 2 * list(PARTS)
    assert {len(scene.things) for scene in scenes} == {1}
    assert scenes == [bench.scene_of(task, number) for number in range(8)]


def test_what_is_to_be_kept_has_colours_that_the_prompt_does_not_name():
    for number in range(12):
        scene = bench.scene_of("keep", number)
        own = bench.own_colours(scene.things[0])
        wish = bench.wish_of("keep", scene, number)
        assert own
        assert scene.things[0].colour not in own.values()
        assert wish.prompt == scene.caption(colour=False)


def test_a_replacement_asks_for_another_kind_another_colour_or_both():
    changes = set()
    for number in range(12):
        scene = bench.scene_of("replace", number)
        wish, thing = bench.wish_of("replace", scene, number), scene.things[0]
        changes.add((wish.kind != thing.kind, wish.colour != thing.colour))
        assert wish.background == scene.background
    assert changes == {(True, True), (False, True), (True, False)}


def test_other_tasks_ask_for_another_background_or_for_an_empty_scene():
    scene = bench.scene_of("background", 3)
    wish, thing = bench.wish_of("background", scene, 3), scene.things[0]
    assert (wish.kind, wish.colour) == (thing.kind, thing.colour)
    assert wish.background != scene.background
    empty = bench.wish_of("remove", scene, 3)
    assert empty.kind is None
    assert empty.prompt.startswith("nothing ")


def test_the_background_begins_beyond_the_widened_object():
    mask = square(16, 48)  # 32 wide: a square of 6 pixels widens it by 3 or 2
    outside = bench.beyond(0.2, mask)
    assert not (outside & mask).any()
    assert (~outside).sum() == (32 + 5) ** 2
    assert np.array_equal(bench.beyond(0.0, mask, square(0, 4)), ~(mask | square(0, 4)))


def test_the_distance_sees_only_what_counts(distance):
    one, other = pictures()
    where = ~square(16, 48)
    inside = np.where(where[..., None], one, other)
    assert distance(one, one, where) == 0
    assert distance(one, inside, where) == 0
    near = np.where(where[..., None], 0.9 * one + 0.1 * other, one)
    assert 0 < distance(one, near, where) < distance(one, other, where)


def test_labels_say_which_options_differ_and_matter():
    default = bench.defaults(20)
    assert (default.mutual_step, default.mutual_layer) == (2, 4)
    own = bench.Options(**{**vars(default), "dilation": 0.25, "start_step": 5, "refine_threshold": 0.3})
    assert own.told("replace", "cpam", default) == "CPAM (dilation 0.25, refine_threshold 0.3)"
    assert own.told("keep", "cpam-self", default) == "CPAM, self-attention only (dilation 0.25, start_step 5)"
    assert own.told("background", "cpam-self", default) == "CPAM, self-attention only"
    assert own.told("remove", "cpam-self", default) == "CPAM, empty prompt (dilation 0.25)"
    assert own.told("replace", "sdedit-0.6", default) == "SDEdit, 0.6"


def test_methods_are_compared_on_the_scenes_that_both_did_as_asked():
    own = result("replace", "cpam", [(0, True, 30.0), (1, True, 40.0), (2, False, 10.0)])
    other = result("replace", "blending", [(0, True, 28.0), (1, False, 10.0), (2, True, 50.0)])
    assert bench.advantage(own, other) == (2.0, 1)
    assert bench.advantage(own, result("replace", "blending", [(2, True, 50.0)]))[1] == 0


def test_the_report_says_where_cpam_is_not_better():
    own = result("replace", "cpam", [(0, True, 30.0)])
    better, worse = (result("replace", m, [(0, True, db)]) for m, db in (("blending", 40.0), ("sdedit-0.6", 20.0)))
    text = bench.report(numbers(better, own, worse))
    assert text.index("| CPAM |") < text.index("| SDEdit, 0.6 |") < text.index("| latent blending |")
    assert "-10.0 dB (1)" in text
    assert "Not better: CPAM beside latent blending." in text
    assert "Better in all" in bench.report(numbers(own, worse))


def test_pieces_of_a_run_are_put_together(tmp_path):
    first = numbers(result("replace", "cpam", [(0, True, 30.0), (1, True, 31.0)]))
    second = numbers(
        result("replace", "cpam", [(1, False, 20.0), (2, True, 32.0)]),
        result("replace", "cpam", [(0, True, 1.0)], "CPAM (dilation 0.2)"),
    )
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, piece in zip(files, (first, second), strict=True):
        file.write_text(json.dumps(piece))
    together = bench.merged(files)
    scenes = together["results"]["replace, CPAM"]["scenes"]
    assert [(s["number"], s["kept"]["round_trip"]) for s in scenes] == [(0, 30.0), (1, 20.0), (2, 32.0)]
    assert len(together["results"]) == 2
    assert together["seconds"] == 2.0


@pytest.mark.parametrize("share", [0.1, 0.25, 0.5])
def test_a_disc_covers_its_share(share):
    disc = bench.disc(share)
    assert disc.shape == (bench.PLACES**2,)
    assert float(disc.mean()) == pytest.approx(share, abs=0.003)
    assert torch.equal(disc, disc.round())


@pytest.mark.parametrize("keep", [False, True])
def test_gathered_and_dense_attention_are_the_same(keep):
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, 64, bench.WIDTH, generator=generator) for _ in range(5)]
    mask = torch.zeros(64).index_fill(0, torch.arange(20, 33), 1.0)
    gathered, dense = bench.ways(mask, keep, *qkv)
    torch.testing.assert_close(gathered(), dense())
