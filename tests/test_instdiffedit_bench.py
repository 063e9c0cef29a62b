"""The measurements of InstDiffEdit: what is asked for, how Editing-Mask's layout is read, what the numbers mean."""

from __future__ import annotations

import json

import comfy.model_management
import numpy as np
import pytest
import torch
from PIL import Image

from scalpel.bench import instdiffedit as bench
from scalpel.bench._diffedit import DiffEdit, diffusers_unet
from scalpel.bench._pictures import encode
from scalpel.partsworld import loader
from scalpel.partsworld.scene import BACKGROUNDS, COLOURS, PARTS
from scalpel.tests import tiny


@pytest.mark.parametrize("change", bench.CHANGES)
def test_edits_come_in_turn_and_the_text_is_a_short_phrase(change):
    jobs = [bench.scene_job(number, change) for number in range(6)]
    assert [job.edit for job in jobs] == 2 * list(bench.EDITS)
    for job in jobs:
        assert 0.01 < job.mask.mean() < 0.99
        assert job.picture.shape == (256, 256, 3)
        if job.edit == bench.BACKGROUND:
            assert {job.source, job.text} < set(BACKGROUNDS.values())
            continue
        (_, colour, kind), (_, new_colour, new_kind) = job.source.split(), job.text.split()
        assert {kind, new_kind} <= set(PARTS)
        assert {colour, new_colour} <= set(COLOURS)
        assert (kind != new_kind) == (change != "colour")
        assert (colour != new_colour) == (change != "kind")
    again = bench.scene_job(1, change)
    assert (again.text, again.mask.sum()) == (jobs[1].text, jobs[1].mask.sum())


def editing_mask(folder, lines):
    for part in ("image", "mask"):
        (folder / part).mkdir()
    shade = np.zeros((40, 60, 3), np.uint8)
    shade[:, 30:] = 255
    for name in ("1_2", "ILSVRC2012_val_00028602"):
        Image.fromarray(shade).save(folder / "image" / f"{name}.jpg")
    for name in ("1", "ILSVRC2012_val_00028602"):
        Image.fromarray(shade[..., 0]).save(folder / "mask" / f"{name}.png")
    (folder / "list.txt").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


IMAGEN = "1 <> An oil painting of a dog in a garden. <> dog <> a raccoon"
IMAGENET = "ILSVRC2012_val_00028602.JPEG <> beagle <> Afghan hound"


def test_the_published_layout_is_read(tmp_path):
    first, second = bench.folder_jobs(editing_mask(tmp_path, [IMAGEN, IMAGENET]), 64)
    assert (first.source, first.text) == ("dog", "a raccoon")
    assert (second.source, second.text) == ("beagle", "a Afghan hound")
    for job in (first, second):
        assert job.picture.shape == (64, 64, 3)
        assert job.mask.mean() == 0.5
        assert job.mask[:, 40:].all()


@pytest.mark.parametrize(
    ("lines", "words"),
    [(["1 a raccoon"], "is not of the form"), ([IMAGEN.replace("1 ", "7 ", 1)], "there is no picture of '7'")],
)
def test_a_list_that_does_not_fit_gets_a_sentence(tmp_path, lines, words):
    with pytest.raises(ValueError, match=words):
        list(bench.folder_jobs(editing_mask(tmp_path, lines), 64))


def test_without_a_list_there_is_a_sentence(tmp_path):
    with pytest.raises(ValueError, match=r"it holds 0 lists"):
        list(bench.folder_jobs(tmp_path, 64))


def job_and_result(inside, outside, found):
    true = np.zeros((8, 8), bool)
    true[:, :4] = True
    picture = np.full((8, 8, 3), 0.5, np.float32)
    edited = picture + np.where(true[..., None], inside, outside).astype(np.float32)
    job = bench.Job("0", bench.MAIN, picture, true, "a red dog", "a red car")
    return job, bench.Result(found(true), edited, (36, 76), (1.0, 2.0))


def test_the_numbers_are_the_paper_s():
    seen = bench.measured(*job_and_result(0.25, 0.05, lambda true: true & (np.arange(8)[:, None] < 4)))
    assert seen["iou"] == 0.5
    assert (round(seen["inside"], 6), round(seen["outside"], 6)) == (0.25, 0.05)
    line = bench.row("InstDiffEdit", [seen])
    assert line[:3] == ["InstDiffEdit", "0.50", "0.50"]
    assert "5.00" in line  # C_m / C_non


def test_reports_of_several_runs_are_put_together_and_say_what_was_missed(tmp_path):
    _, good = job_and_result(0.25, 0.05, lambda true: true)
    job, bad = job_and_result(0.25, 0.05, lambda true: ~true)
    settings = {"steps": 20, "mask_steps": 8, "sampler": "euler", "scheduler": "normal", "cfg": 7.5, "strength": 0.5,
                "rounds": 2, "related": 0.9, "unrelated": 0.6, "threshold": 0.3}  # fmt: skip
    files = []
    for name, method, result in (("0", "instdiffedit", good), ("1", "instdiffedit", bad), ("0", "diffedit", bad)):
        scene = bench.measured(job, result) | {"name": name}
        numbers = bench.empty_numbers() | {"results": {"kind": {method: [scene]}}, "settings": settings}
        files.append(tmp_path / f"{len(files)}.json")
        files[-1].write_text(json.dumps(numbers))
    numbers = bench.merged(files)
    assert [scene["name"] for scene in numbers["results"]["kind"]["instdiffedit"]] == ["0", "1"]
    text = bench.report(numbers)
    assert "| InstDiffEdit | 0.50 |" in text
    assert "| DiffEdit's mask, first 1 | 0.00 |" in text
    assert "IoU: 0.50 (aim: 0.56, missed); C_m / C_non: 5.00 (aim: 3.7)" in text
    assert "DiffEdit's mask is made: 1.00 times (aim: 5, missed)" in text


def test_the_best_settings_are_named():
    found = [
        {"steps": 20, "rounds": r, "strength": 0.5, "threshold": 0.3, "count": 15, "iou": iou, "rows": 18 * r}
        | dict.fromkeys(bench.EDITS, iou)
        for r, iou in ((1, 0.6), (2, 0.64))
    ]
    assert "Best: steps 20, rounds 2, strength 0.5, threshold 0.3." in bench.sweep_report(found)


# ---------------------------------------------------------------- DiffEdit, which it is compared with


@pytest.fixture(scope="module")
def demo():
    return loader.load()


def prompts(clip, *texts):
    return [encode(clip, [text])[0][0] for text in texts]


@pytest.mark.usefixtures("inference")
@pytest.mark.parametrize("kind", ["demo", "SD1.5"])
def test_diffusers_unet_with_the_model_s_weights_predicts_what_the_model_does(kind, demo):
    model, clip, _ = demo
    x, context = torch.randn(2, 4, 32, 32), torch.cat(prompts(clip, "a red dog", ""))
    if kind == "SD1.5":
        model, context = tiny.model(tiny.SD15), torch.randn(2, 77, tiny.WIDTH)
    comfy.model_management.load_models_gpu([model])
    times = torch.tensor([801, 151])
    expected = model.model.diffusion_model(x, times, context)
    torch.testing.assert_close(diffusers_unet(model)(x, times, context).sample, expected, rtol=0, atol=1e-5)


@pytest.mark.usefixtures("inference")
def test_diffedit_s_mask_is_where_two_texts_predict_different_noise(demo):
    model, clip, _ = demo
    comfy.model_management.load_models_gpu([model])
    texts = prompts(clip, "a red dog", "a green dog", "")
    latent = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    diffedit = DiffEdit(model)
    found = diffedit.mask(latent, texts, steps=20, cfg=7.5, seed=3)
    assert diffedit.taken() == 2 * 2 * 10  # guided
    noise = torch.randn(10, 4, 32, 32, generator=torch.Generator().manual_seed(3))
    kept = 1 / (1 + model.get_model_object("model_sampling").sigma(torch.tensor([451.0])) ** 2)
    noised = kept.sqrt() * model.model.process_latent_in(latent) + (1 - kept).sqrt() * noise
    times = torch.full((10,), 451)
    source, target = (model.model.diffusion_model(noised, times, text.repeat(10, 1, 1)) for text in texts[:2])
    difference = (target - source).abs().mean((0, 1))
    assert torch.equal(found[0], (difference.clamp(max=3 * difference.mean()) > 1.5 * difference.mean()).float())


@pytest.mark.usefixtures("inference")
def test_diffedit_s_edit_keeps_the_picture_outside_its_mask(demo):
    model, clip, _ = demo
    latent = torch.randn(1, 4, 32, 32, generator=torch.Generator().manual_seed(5))
    mask = torch.zeros(1, 32, 32)
    mask[:, :16] = 1
    diffedit = DiffEdit(model)
    edited = diffedit.edit(latent, mask, prompts(clip, "a red dog", "a green dog", ""), steps=5, cfg=2.0)
    assert diffedit.taken() == 2 * 2 * 4  # 0.8 of 5 steps, there and back
    near, far = (edited - latent)[:, :, :16].abs().mean(), (edited - latent)[:, :, 16:].abs().mean()
    assert far < near / 2


def test_diffedit_of_another_family_is_refused_with_a_sentence():
    with pytest.raises(ValueError, match=r"SD1\.x and SD2\.x"):
        DiffEdit(tiny.model(tiny.SDXL))
