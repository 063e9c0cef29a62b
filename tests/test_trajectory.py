"""Trajectories as data: what is read at a noise level, what is refused, files."""

from __future__ import annotations

import dataclasses
import json

import pytest
import torch
from safetensors.torch import save_file

from scalpel.core import trajectory as files
from scalpel.core.trajectory import ModelMark, Playback, Trajectory, same_schedule

SIGMAS = torch.tensor([10.0, 4.0, 1.0, 0.0])
MARK = ModelMark("SD15, text width 32", "abc", "SD15")


def randn(*shape, seed=0):
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def trajectory(**changes):
    prompt = [[randn(1, 77, 8), {"pooled_output": randn(1, 6), "width": 256, "note": "a cat", "crop": None}]]
    settings = {
        "kind": "ddim", "model": MARK, "sigmas": SIGMAS, "levels": SIGMAS, "latents": randn(4, 2, 4, 3, 5),
        "positive": prompt, **changes,
    }  # fmt: skip
    return Trajectory(**settings)


def test_a_recorded_level_gives_the_recorded_latent_and_one_between_the_straight_line():
    t = trajectory()
    for i, sigma in enumerate(SIGMAS.tolist()):
        assert torch.equal(t.at(sigma), t.latents[i])
    assert torch.equal(t.at(4.0 * (1 + 1e-6)), t.latents[1])
    torch.testing.assert_close(t.at(5.5), t.latents[1] + (5.5 - 4) / 6 * (t.latents[0] - t.latents[1]))


def test_of_levels_that_differ_by_rounding_the_last_recorded_counts():
    """An ancestral sampler's trial point lies at the next level, up to rounding, above it or below."""
    for wrong in (1 + 2e-7, 1 - 2e-7):
        levels = torch.tensor([2.0, 1.0 * wrong, 1.0, 0.0])
        latents = randn(4, 1, 4, 8, 8)
        own = trajectory(sigmas=torch.tensor([2.0, 1.0, 0.0]), levels=levels, latents=latents)
        assert torch.equal(own.at(1.0), latents[2])
        assert torch.equal(own.at(float(levels[1])), latents[2])


def test_between_levels_an_image_with_constant_noise_is_met_exactly():
    clean, noise = randn(2, 4, 3, 5, seed=1), randn(2, 4, 3, 5, seed=2)
    t = trajectory(latents=torch.stack([clean + sigma * noise for sigma in SIGMAS.tolist()]))
    for sigma in (9.0, 4.0, 2.5, 0.3):
        torch.testing.assert_close(t.at(sigma), clean + sigma * noise, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("sigma", [10.1, 1000.0, -0.1])
def test_a_sigma_outside_the_record_is_refused_with_the_range_that_it_has(sigma):
    with pytest.raises(ValueError, match=r"sigma .* lies outside the trajectory, .* from 10 to 0; sample on"):
        trajectory().at(sigma)


def test_the_recorded_run_gets_its_evaluations_in_order_and_another_the_last_at_a_level():
    levels = torch.tensor([10.0, 4.0, 4.0, 1.0, 1.0, 0.0])  # Heun's
    t = trajectory(levels=levels, latents=randn(6, 2, 4, 3, 5))
    same, other = Playback(t, in_order=True), Playback(t, in_order=False)
    for i, level in enumerate(levels.tolist()):
        assert torch.equal(same.next(level), t.latents[i])
        assert torch.equal(same.next(level, again=True), t.latents[i])
    for level, i in ((10.0, 0), (4.0, 2), (1.0, 4), (0.0, 5)):
        assert torch.equal(other.next(level), t.latents[i])
    lost = Playback(t, in_order=True)  # an evaluation that the record does not have
    assert torch.equal(lost.next(4.0), t.latents[2])


def test_steps_are_told_by_the_noise_level():
    assert [trajectory().step_of(sigma) for sigma in (20.0, 10.0, 9.9, 4.0, 3.0, 1.0, 0.5)] == [0, 0, 0, 1, 1, 2, 2]


def test_the_clean_latent_of_a_schedule_that_ends_above_zero_has_its_scale_taken_off():
    sigmas = torch.tensor([10.0, 4.0, 1.0, 0.75])
    t = trajectory(sigmas=sigmas, levels=sigmas)
    torch.testing.assert_close(t.clean, t.latents[-1] / 1.25)
    assert torch.equal(trajectory().clean, trajectory().latents[-1])


def test_schedules_are_the_same_up_to_rounding():
    assert same_schedule(SIGMAS, SIGMAS * (1 + 1e-6))
    assert not same_schedule(SIGMAS, SIGMAS * 1.001)
    assert not same_schedule(SIGMAS, SIGMAS[1:])


@pytest.mark.parametrize(
    ("change", "words"),
    [
        ({"sigmas": SIGMAS.flip(0)}, "do not fall"),
        ({"sigmas": torch.tensor([1.0])}, "do not fall"),
        ({"levels": SIGMAS[:3]}, r"latents \[4, 2, 4, 3, 5\] for 3 noise levels"),
        ({"levels": SIGMAS + 1}, "last latent is not that of the last sigma"),
        ({"latents": torch.full((4, 2, 4, 3, 5), torch.nan)}, "NaN"),
        ({"uncond": torch.zeros(2, 2, 77, 8)}, r"embeddings \[2, 2, 77, 8\] for 3 steps of 2 images"),
        ({"noise_maps": torch.zeros(3, 1, 4, 3, 5)}, r"noise maps \[3, 1, 4, 3, 5\] for 3 steps of 2 images"),
    ],
)
def test_what_does_not_fit_together_is_refused(change, words):
    with pytest.raises(ValueError, match=words):
        trajectory(**change)


def test_bytes_are_those_of_all_tensors():
    t = trajectory(negative=[[randn(1, 77, 8), {}]], uncond=randn(3, 2, 77, 8))
    numbers = 4 + 4 + 4 * 2 * 4 * 3 * 5 + 77 * 8 + 6 + 77 * 8 + 3 * 2 * 77 * 8
    assert t.get_ram_usage() == 4 * numbers


# ---------------------------------------------------------------- files


def test_a_saved_trajectory_comes_back_whole(tmp_path):
    t = trajectory(
        negative=[[randn(1, 77, 8), {}], [randn(1, 154, 8), {"mask": randn(1, 3, 5)}]], cfg=3.5, sampler="heun",
        scheduler="karras", skipped=2, seed=2**63, uncond=randn(3, 2, 77, 8), noise_maps=randn(3, 2, 4, 3, 5),
        solver="ddpm", eta=0.5,
    )  # fmt: skip
    files.save(t, tmp_path / "t.safetensors")
    back = files.load(tmp_path / "t.safetensors")
    for field in dataclasses.fields(Trajectory):
        a, b = getattr(t, field.name), getattr(back, field.name)
        if isinstance(a, torch.Tensor):
            assert torch.equal(a, b), field.name
        elif field.name not in ("positive", "negative"):
            assert a == b, field.name
    for name in ("positive", "negative"):
        for (a, more), (b, others) in zip(getattr(t, name), getattr(back, name), strict=True):
            assert torch.equal(a, b)
            assert more.keys() == others.keys()
            assert all(torch.equal(v, others[k]) if isinstance(v, torch.Tensor) else v == others[k]
                       for k, v in more.items())  # fmt: skip


def test_what_is_not_there_stays_away(tmp_path):
    files.save(trajectory(), tmp_path / "t.safetensors")
    back = files.load(tmp_path / "t.safetensors")
    assert back.negative is None
    assert back.uncond is None
    assert back.noise_maps is None


def test_a_prompt_with_a_controlnet_is_not_saved_without_it(tmp_path):
    t = trajectory(positive=[[randn(1, 77, 8), {"control": object()}]])
    with pytest.raises(ValueError, match=r"its positive prompt carries 'control' \(object\), which a file cannot hold"):
        files.save(t, tmp_path / "t.safetensors")
    assert not (tmp_path / "t.safetensors").exists()


def test_a_file_that_exists_is_not_overwritten(tmp_path):
    (tmp_path / "t.safetensors").write_bytes(b"mine")
    with pytest.raises(FileExistsError):
        files.save(trajectory(), tmp_path / "t.safetensors")
    assert (tmp_path / "t.safetensors").read_bytes() == b"mine"


def _metadata(path):
    content = path.read_bytes()
    return json.loads(content[8 : 8 + int.from_bytes(content[:8], "little")])["__metadata__"]


def test_the_metadata_tell_version_model_and_latent_format(tmp_path):
    files.save(trajectory(), tmp_path / "t.safetensors")
    found = _metadata(tmp_path / "t.safetensors")
    assert found["schema_version"] == "1"
    assert (found["model_family"], found["model_fingerprint"], found["latent_format"]) == tuple(vars(MARK).values())


def _rewritten(tmp_path, **metadata):
    files.save(trajectory(), tmp_path / "t.safetensors")
    known = _metadata(tmp_path / "t.safetensors") | metadata
    save_file({"sigmas": SIGMAS}, tmp_path / "u.safetensors", {k: v for k, v in known.items() if v is not None})
    return tmp_path / "u.safetensors"


@pytest.mark.parametrize(
    ("metadata", "words"),
    [
        ({"format": None}, "it is not a trajectory; accepted are files that Save Trajectory wrote"),
        ({"schema_version": "2"}, "format is version 2, and this Scalpel reads up to version 1; update Scalpel"),
        ({"description": None}, "lacks 'description'"),
        ({"description": "[1"}, "u.safetensors"),
        ({}, "lacks 'positive.0'"),
    ],
)
def test_other_files_are_refused_by_name(tmp_path, metadata, words):
    with pytest.raises(ValueError, match=words) as caught:
        files.load(_rewritten(tmp_path, **metadata))
    assert "'u.safetensors'" in str(caught.value)


def test_a_truncated_file_is_refused(tmp_path):
    path = tmp_path / "t.safetensors"
    files.save(trajectory(), path)
    path.write_bytes(path.read_bytes()[:-100])
    with pytest.raises(ValueError, match=r"'t.safetensors': it is not a whole safetensors file"):
        files.load(path)
