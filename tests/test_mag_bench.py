"""The measurements of MAG-Edit: what is asked for, what counts as leakage and structure, how results are told."""

from __future__ import annotations

import json

import numpy as np
import pytest
import torch

from scalpel.bench import mag as bench
from scalpel.nodes.mag import MAGGuidance
from scalpel.partsworld import loader
from scalpel.partsworld.render import render
from scalpel.partsworld.scene import BACKGROUNDS, COLOURS, PARTS


@pytest.fixture(scope="module")
def tasks():
    return [bench.task_of(number) for number in range(8)]


def job_of(task):
    """A job whose round trip is the picture itself."""
    picture, truth = (render(scene).image for scene in (task.scene, task.truth))
    return bench.Job(task, picture, picture, truth, None)


def measured(job, picture):
    return bench.measure(job, bench.Edit(picture))


def record(name, *scenes):
    """A record of (number, right, PSNR outside)."""
    rest = {"others": True, "share": 0.5, "inside": 12.0, "far": 40.0, "edges": 0.5, "iterations": 30, "value": 0.7,
            "seconds": 1.0, "colour": "red"}  # fmt: skip
    found = [{"number": n, "right": right, "outside": db} | rest for n, right, db in scenes]
    return {"method": name, "label": bench.METHODS[name].label, "scenes": found}


def test_kinds_come_in_turn_with_two_and_with_three_objects(tasks):
    assert [task.scene.things[0].kind for task in tasks] == 2 * list(PARTS)
    assert [len(task.scene.things) for task in tasks] == 4 * [2] + 4 * [3]


def test_the_captions_differ_in_the_wanted_colour_of_one_object_and_in_its_article(tasks):
    for task in tasks:
        colour = task.scene.things[0].colour
        source, edit = task.scene.caption().split(" and "), task.truth.caption().split(" and ")
        assert [i for i in range(len(source)) if source[i] != edit[i]] == [task.index]
        assert colour in source[task.index]
        assert task.wanted in edit[task.index]


def test_the_wanted_colour_stands_in_the_prompt_once():
    for task in map(bench.task_of, range(100, 108)):
        assert task.truth.caption().split().count(task.wanted) == 1
        assert task.wanted not in BACKGROUNDS[task.scene.background].split()


def test_the_truth_differs_from_the_picture_inside_the_mask_alone(tasks):
    for task in tasks:
        changed = np.abs(render(task.scene).image - render(task.truth).image).max(-1)
        assert changed[~task.seen].max() < 0.02  # a pixel that hardly has a share of the object
        assert (changed[task.painted] > bench.VISIBLE).all()


def test_the_truth_is_right_and_the_source_is_not(tasks):
    for job in map(job_of, tasks):
        perfect, nothing = measured(job, job.truth), measured(job, job.picture)
        assert (perfect["right"], perfect["others"], perfect["edges"]) == (True, True, 1.0)
        assert (nothing["right"], nothing["others"]) == (False, True)
        assert nothing["inside"] < 25 < perfect["inside"]
        assert nothing["edges"] < 1


def test_a_change_outside_the_mask_is_leakage_and_counts_as_far_from_8_pixels_on(tasks):
    job = job_of(tasks[0])
    y, x = np.argwhere(job.task.seen)[0]
    near, far = job.truth.copy(), job.truth.copy()
    near[y - 4, x] = 1 - near[y - 4, x]
    far[-1, -1] = 1 - far[-1, -1]
    inside = job.truth.copy()
    inside[job.task.seen] = 0.5
    assert measured(job, inside)["outside"] == measured(job, job.truth)["outside"]
    assert measured(job, near)["outside"] < measured(job, job.truth)["outside"]
    assert measured(job, near)["far"] == measured(job, job.truth)["far"]
    assert measured(job, far)["far"] < measured(job, job.truth)["far"]


def test_another_object_that_changes_colour_is_noticed(tasks):
    job = job_of(tasks[0])
    spoilt = render(job.task.truth.repaint(job.task.wanted, job.task.others[0])).image
    assert measured(job, spoilt)["others"] is False


def test_the_share_of_a_colour_counts_pixels():
    pixels = np.array([COLOURS["red"], COLOURS["red"], COLOURS["blue"], (0.80, 0.15, 0.15)])
    assert bench.share_of(pixels, "red") == 0.75
    assert bench.share_of(pixels, "green") == 0


def test_edges_know_no_colour_but_shape_and_contrast():
    black = np.zeros((64, 64, 3))
    left = black.copy()
    left[:, :32] = 1
    assert bench.edges(left).max() == pytest.approx(1)
    assert np.allclose(bench.edges(left), bench.edges(1 - left))
    where = np.zeros((64, 64), bool)
    where[16:48, 16:48] = True
    assert bench.edge_ssim(left, 1 - left, where) == pytest.approx(1)
    assert bench.edge_ssim(left, black, where) < 0.9


def test_a_report_has_a_line_for_each_method_and_counts_scenes():
    numbers = bench.empty_numbers()
    numbers["results"] = {
        "p2p": record("p2p", (0, False, 20.0), (4, True, 22.0)),
        "mag-token": record("mag-token", (0, True, 30.0)),
    }
    text = bench.report(numbers)
    assert "### MAG: one of like objects, 2 scenes" in text
    assert "| P2P | 50% | 0% | 100% | 100% | 50% | 12.0 dB | 0.500 | 21.0 dB |" in text
    assert "| MAG, token ratio, 1 scenes | 100% | 100% | – |" in text


def test_methods_are_compared_on_the_scenes_that_both_have():
    own, other = record("mag-token", (0, True, 30.0)), record("p2p", (0, False, 20.0), (1, True, 90.0))
    assert bench.beside(own, other) == "+100, +10.0 dB, +0.000"
    assert bench.beside(own, record("p2p", (5, True, 20.0))) == "–"


def test_runs_of_other_scenes_and_methods_make_one_report(tmp_path):
    runs = [
        {"p2p": record("p2p", (1, True, 20.0), (2, True, 20.0))},
        {"p2p": record("p2p", (0, True, 20.0), (2, False, 25.0)), "mag-token": record("mag-token", (0, True, 30.0))},
    ]
    files = [tmp_path / "a.json", tmp_path / "b.json"]
    for file, results in zip(files, runs, strict=True):
        file.write_text(json.dumps(bench.empty_numbers() | {"results": results, "seconds": 2.0}))
    numbers = bench.merged(files)
    assert [(s["number"], s["right"]) for s in numbers["results"]["p2p"]["scenes"]] == [
        (0, True),
        (1, True),
        (2, False),
    ]
    assert set(numbers["results"]) == {"p2p", "mag-token"}
    assert numbers["seconds"] == 4


def test_a_curve_is_told_and_drawn(tmp_path):
    points = [{"at": at, "scenes": record("mag-token", (0, at > 0, 30.0))["scenes"]} for at in (0.0, 0.5)]
    axis = {"axis": "until", "label": "MAG, token ratio", "points": points}
    assert "| 0.5 | 0.700 | 100% | 50% | 12.0 dB | 0.500 | 30.0 dB |" in bench.curve_table(axis)
    bench.plot(axis, [np.zeros((8, 8, 3))] * 3, tmp_path / "plot.png")
    assert (tmp_path / "plot.png").stat().st_size > 1000


def test_all_methods_are_given_inputs_that_the_node_has():
    inputs = {entry.id for entry in MAGGuidance.define_schema().inputs}
    asked = {name for method in bench.METHODS.values() for name in method.guidance}
    assert set(bench.PAPERS_INPUTS) | asked <= inputs


@torch.inference_mode()
def test_a_mask_blend_keeps_what_is_far_and_moves_change_the_picture():
    run = bench.Bench(loader.WEIGHTS, 4, "ddim")
    job = run.job(0)
    alone, blended = (run.edit(job, bench.METHODS[name]) for name in ("p2p", "p2p-blend"))
    moved = run.edit(job, bench.Method("", {"iterations": 2, "until": 0.5}))
    assert (alone.iterations, blended.iterations, moved.iterations) == (0, 0, 4)
    assert 0 < moved.value < 1
    far = [bench.measure(job, edit)["far"] for edit in (alone, blended, moved)]
    assert far[0] + 10 < min(far[1:])
    assert np.abs(blended.picture - moved.picture)[job.task.seen].max() > 0.01
