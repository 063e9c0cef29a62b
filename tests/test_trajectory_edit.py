"""Feature blending with a trajectory: live rows on the recorded run, and exact outside the edit on any other."""

from __future__ import annotations

import functools
import gc
import weakref

import comfy.samplers
import pytest
import torch

from scalpel.nodes.feature_blend import EditBatch, FeatureBlendSampler
from scalpel.nodes.inversion import DDIMInversion, EditFriendlyInversion, LEDITSInversion, NullTextInversion
from scalpel.nodes.trajectories import RecordTrajectory, ReplayTrajectory
from scalpel.tests import tiny
from scalpel.tests.test_inversion import invert, picture

KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
KIND = tiny.SD15
pytestmark = pytest.mark.usefixtures("inference")
BETWEEN = 0.1
"""Relative difference from live rows if the source of an 8-step run is read off a record of 16 other steps."""


def recorded(patcher, kind=KIND, sampler="euler", steps=4, latent=None, scheduler="normal", cfg=4.0, **prompts):
    """The source's run in `tiny.edit`, recorded."""
    positive, negative = prompts.get("positive", tiny.prompt(kind, 1)), prompts.get("negative", tiny.prompt(kind, 3))
    return RecordTrajectory.execute(
        patcher, 7, steps, cfg, sampler, scheduler, positive, negative, latent or tiny.latent(), 1.0
    ).args[1]


def both(patcher, kind=KIND, sampler="euler", steps=3, record=None, **settings):
    """The same edit with live source rows and with recorded ones."""
    prompts = {"positive": settings["source"]} if "source" in settings else {}
    prompts |= {"negative": settings["negative"]} if "negative" in settings else {}
    prompts |= {"latent": settings["latent_image"]} if "latent_image" in settings else {}
    trajectory = (record or recorded)(patcher, kind, sampler, steps, **prompts)
    sigmas = trajectory.sigmas
    live = tiny.edit(patcher, kind, sampler_name=sampler, sigmas=sigmas, **settings)
    return live, tiny.edit(patcher, kind, sampler_name=sampler, sigmas=sigmas, trajectory=trajectory, **settings)


def agree(live, replayed, bound=1e-5):
    assert tiny.relative(replayed.source, live.source) < bound
    assert tiny.relative(replayed.edited, live.edited) < bound
    assert (replayed.step_masks - live.step_masks).abs().mean() < 1e-4
    assert tiny.relative(live.edited, live.source) > 1e-2


@pytest.mark.parametrize(
    "sampler",
    ["euler", "heun", "dpm_2", "dpmpp_2m", "lms", "euler_ancestral", "dpmpp_2s_ancestral", "dpmpp_sde", "ddim",
     "uni_pc"],
)  # fmt: skip
def test_on_the_recorded_run_recorded_rows_are_live_rows(model, sampler):
    agree(*both(model, sampler=sampler), bound=1e-4 if sampler == "uni_pc" else 1e-5)


@pytest.mark.parametrize("name", KINDS)
def test_both_families(name):
    kind = KINDS[name]
    agree(*both(tiny.model(kind), kind))


def test_cond_and_uncond_in_two_calls(model):
    trajectory = recorded(model)
    live = tiny.edit(model, KIND, sigmas=trajectory.sigmas)
    agree(live, tiny.edit(tiny.short_of_memory(model), KIND, sigmas=trajectory.sigmas, trajectory=trajectory), 1e-4)


def test_prompts_for_areas_and_masks(model):
    left = tiny.with_options(tiny.prompt(KIND, 4), area=(24, 8, 0, 0))
    right = tiny.with_options(tiny.prompt(KIND, 5), mask=torch.ones(1, 192, 128), mask_strength=0.5)
    agree(*both(model, source=[*tiny.prompt(KIND, 1), *left, *right]))


def test_prompts_of_several_lengths(model):
    agree(*both(model, source=tiny.prompt(KIND, 1, 154), edit=tiny.prompt(KIND, 2, 231)))


def test_three_edits_of_one_source_take_two_rows_a_step_and_two_more_each(model):
    edits = functools.reduce(lambda a, b: EditBatch.execute(a, b).args[0], (tiny.prompt(KIND, s) for s in (2, 4, 5)))
    agree(*both(model, edit=edits))
    trajectory, counted = recorded(model), tiny.CountedCalls()
    tiny.edit(counted.attach(model), KIND, edit=edits, sigmas=trajectory.sigmas, trajectory=trajectory)
    assert set(counted.rows_per_sigma().values()) == {2 + 2 * 3}


def test_two_sources_pair_with_two_edits(model):
    agree(*both(model, latent_image=tiny.latent(batch=2)))


def test_a_noise_mask_holds(model):
    image = {**picture(), "noise_mask": (tiny.randn(1, 1, 24, 16, seed=3) > 0).float()}
    live, replayed = both(model, latent_image=image)
    agree(live, replayed)


def test_another_schedule_reads_between_the_recorded_levels(model):
    fine = recorded(model, steps=16, scheduler="karras")
    sigmas = torch.cat([fine.sigmas[:1] * 0.999, comfy.samplers.calculate_sigmas(
        model.get_model_object("model_sampling"), "normal", 8)[1:]])  # fmt: skip
    made, live = tiny.edit(model, KIND, sigmas=sigmas, trajectory=fine), tiny.edit(model, KIND, sigmas=sigmas)
    assert tiny.relative(made.edited, live.edited) < BETWEEN
    assert torch.equal(made.source, model.get_model_object("latent_format").process_out(fine.clean))


def test_a_noise_level_outside_the_record_is_refused(model):
    trajectory = invert(model, EditFriendlyInversion, skip=0.5)[0]
    with pytest.raises(ValueError, match=r"sigma 14\.61 lies outside the trajectory, which holds the noise levels"):
        tiny.edit(model, KIND, trajectory=trajectory)


# ---------------------------------------------------------------- real pictures

NODES = [DDIMInversion, NullTextInversion, EditFriendlyInversion, LEDITSInversion]


@pytest.mark.parametrize("node", NODES)
@pytest.mark.parametrize("name", KINDS)
def test_the_source_is_the_picture_and_where_nothing_is_edited_so_is_the_edit(name, node):
    """Whatever the inversion loses: a mask of the left half leaves the right half's features alone."""
    kind = KINDS[name]
    patcher = tiny.model(kind)
    trajectory, latent, sigmas = invert(patcher, node, kind)
    same = tiny.prompt(kind, 1)
    settings = {"sigmas": sigmas, "latent_image": latent, "trajectory": trajectory, "cfg": 7.5}
    output = tiny.edit(patcher, kind, source=same, edit=same, **settings)
    assert torch.equal(output.edited, output.source)
    if node is not NullTextInversion:  # its track is the guided reconstruction
        assert tiny.relative(output.source, picture()["samples"]) < 1e-6
    output = tiny.edit(patcher, kind, source=same, **settings)
    assert tiny.relative(output.edited, output.source) > 1e-3
    assert torch.isfinite(output.edited).all()


def test_null_text_embeddings_take_the_place_of_the_negative_prompt(model):
    trajectory, latent, sigmas = invert(model, NullTextInversion)
    settings = {"sigmas": sigmas, "latent_image": latent, "trajectory": trajectory}
    output = tiny.edit(model, KIND, **settings)
    other = tiny.edit(model, KIND, negative=tiny.prompt(KIND, 9), **settings)
    assert tiny.relative(other.edited, output.edited) < 1e-6


# ---------------------------------------------------------------- the node's own schedule, bad input


def simple(patcher, trajectory, latent, **changes):
    settings = {
        "source": tiny.prompt(KIND, 1), "edit": tiny.prompt(KIND, 2), "negative": tiny.prompt(KIND, 3), "seed": 0,
        "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "ddim_uniform", "denoise": 1.0, "omega": 1.0,
        "blend_until": 1.0, "layers": "official", "padding": "background", "part_token": tiny.token(),
    }  # fmt: skip
    return FeatureBlendSampler.execute(
        patcher, latent_image=latent, trajectory=trajectory, **{**settings, **changes}
    ).args


@pytest.mark.parametrize("node", [DDIMInversion, EditFriendlyInversion])
def test_the_simple_sampler_takes_what_an_inversion_did_not_skip(model, node):
    trajectory, latent, sigmas = invert(model, node)
    edited, *_, step_masks = simple(model, trajectory, latent)
    expected = tiny.edit(model, KIND, sigmas=sigmas, latent_image=latent, trajectory=trajectory)
    assert torch.equal(edited["samples"], expected.edited)
    assert len(step_masks) == len(sigmas) - 1


def test_a_schedule_that_an_inversion_skipped_a_part_of_is_told_as_it_was_set(model):
    trajectory, latent, _ = invert(model, EditFriendlyInversion, steps=8, skip=0.25)
    with pytest.raises(ValueError, match=r"made with 8 steps of ddim_uniform, of which the first 2 are left out, from"):
        simple(model, trajectory, latent, steps=6)
    assert len(simple(model, trajectory, latent, steps=8)[3]) == 6


def test_of_two_inversions_with_independent_noise_an_edit_sees_the_same(model):
    """Whatever their prompts, guidance and noise maps, as the docs say."""
    friendly = invert(model, EditFriendlyInversion, steps=8, skip=0.25, cfg=7.5)[0]
    ledits = invert(model, LEDITSInversion, steps=8, skip=0.25, positive=tiny.prompt(KIND, 6))[0]
    assert tiny.relative(friendly.latents, ledits.latents) < 1e-5


@pytest.mark.parametrize("node", [EditFriendlyInversion, LEDITSInversion])
def test_the_sampler_with_the_noise_maps_keeps_what_is_not_edited_as_well(model, node):
    trajectory, latent, sigmas = invert(model, node)
    sampler = ReplayTrajectory.execute(model, trajectory).args[1]
    same = tiny.prompt(KIND, 1)
    settings = {"sampler": sampler, "sigmas": sigmas, "latent_image": latent, "trajectory": trajectory}
    output = tiny.edit(model, KIND, source=same, edit=same, **settings)
    assert torch.equal(output.edited, output.source)
    output = tiny.edit(model, KIND, **settings)
    assert tiny.relative(output.edited, output.source) > 1e-3


@pytest.mark.parametrize("change", [{"steps": 5}, {"scheduler": "karras"}, {"denoise": 0.5}])
def test_another_schedule_than_the_trajectory_s_is_refused_with_both(model, change):
    trajectory, latent, _ = invert(model, DDIMInversion)
    with pytest.raises(
        ValueError, match=r"steps, scheduler, denoise, sampler_name: they give \d steps of .* 4 steps of ddim_unif"
    ):
        simple(model, trajectory, latent, **change)


def test_latents_that_do_not_fit_are_refused(model):
    trajectory, latent, _ = invert(model, DDIMInversion)
    with pytest.raises(ValueError, match="latent_image: it is a picture of 64 × 64, and the trajectory's is 128 × 192"):
        simple(model, trajectory, tiny.latent(8, 8))
    with pytest.raises(ValueError, match="latent_image: it has 2 pictures, and the trajectory 1"):
        simple(model, trajectory, tiny.latent(batch=2))
    with pytest.raises(ValueError, match=r"mask: it is empty \(all 0\)"):
        simple(model, trajectory, latent, mask=torch.zeros(1, 192, 128))
    before = tiny.plain(model, KIND)
    with pytest.raises(ValueError, match="another model family"):
        tiny.edit(tiny.model(tiny.SDXL), tiny.SDXL, trajectory=trajectory)
    assert torch.equal(tiny.plain(model, KIND), before)


@pytest.mark.parametrize("node", [RecordTrajectory, *NODES])
def test_a_trajectory_is_freed_with_the_outputs_that_hold_it(model, node):
    """Nothing else keeps it: neither the model nor its clones, nor what sampling leaves behind."""
    if node is RecordTrajectory:
        trajectory, latent, sigmas = recorded(model), tiny.latent(), tiny.sigmas(model, 4)
    else:
        trajectory, latent, sigmas = invert(model, node)
    assert trajectory.get_ram_usage() > trajectory.latents.nbytes
    tiny.edit(model, KIND, sigmas=sigmas, latent_image=latent, trajectory=trajectory)
    kept = weakref.ref(trajectory)
    del trajectory, latent, sigmas
    gc.collect()
    assert kept() is None
