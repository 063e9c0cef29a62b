"""The rider: a recorded source beside any sampler's rows reads as the same source denoised along with them.

The patch under test adds the mean of the source's self- and cross-attention output to every other row's, at every
layer: whoever gets another source, another step or no source at all gets another picture.
"""

from __future__ import annotations

import functools

import comfy.sample
import comfy.samplers
import pytest
import torch
from comfy.patcher_extension import WrappersMP

from scalpel.core.unet.layers import address_of
from scalpel.core.unet.rider import Rider
from scalpel.core.unet.rows import PairedRows, stack
from scalpel.core.unet.samplers import paired_sampler
from scalpel.nodes.feature_blend import EditBatch
from scalpel.nodes.trajectories import RecordTrajectory
from scalpel.tests import tiny

KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
KIND = tiny.SD15
pytestmark = pytest.mark.usefixtures("inference")
SHARE = 0.5


def changed(rows, source):
    """What the patch makes of attention outputs [n, tokens, channels], given their source's [n or 1, tokens, …]."""
    return rows + SHARE * source.mean(1, keepdim=True)


def with_rider(patcher, trajectory, conditioning):
    """A clone on which every run has the source riding along; and the riders of its runs."""
    riders = []

    def wrapper(executor, noise, latent, sampler, sigmas, *args, **kwargs):
        guider, features = executor.class_obj, {}
        rider = Rider(trajectory, conditioning, "test")
        rider.install(guider, sigmas, sampler)
        riders.append(rider)

        def patch(name, n, options):
            source, others = rider.split(n, options)
            if source is not None:
                features[name, address_of(options)] = source.clone()
            for _, chunk in others:
                own = features[name, address_of(options)][trajectory.image_of(len(chunk))]
                chunk.copy_(changed(chunk, own))
            return n

        patches = guider.model_options["transformer_options"].setdefault("patches", {})
        for name in ("attn1_output_patch", "attn2_output_patch"):
            patches[name] = [*patches.get(name, []), functools.partial(patch, name)]
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)

    patched = patcher.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "test", wrapper)
    return patched, riders


def with_live_rows(patcher, rows):
    """The same with the source as rows of the sampler's batch: its positive entry's features serve all entries.

    Cond and uncond must be in one call, the whole picture's positive entry first.
    """
    patched = patcher.clone()

    def patch(n, options):
        chunks = rows.chunks(n, options)
        source = chunks[options["cond_or_uncond"].index(0)][rows.edits :].clone()
        for chunk in chunks:
            chunk[: rows.edits] = changed(chunk[: rows.edits], source[rows.source_of])
        return n

    patched.set_model_attn1_output_patch(patch)
    patched.set_model_attn2_output_patch(patch)
    return patched


def settings(patcher, kind, **changes):
    return {
        "edit": tiny.prompt(kind, 2), "source": tiny.prompt(kind, 1), "negative": tiny.prompt(kind, 3),
        "sampler": "euler", "steps": 3, "cfg": 4.0, "batch": 1, "scheduler": "normal", **changes,
    }  # fmt: skip


def live(patcher, kind=KIND, edits=1, **changes):
    """The edits of a run with live source rows; source and edits share their noise."""
    s, rows = settings(patcher, kind, **changes), PairedRows(edits, changes.get("batch", 1))
    image = tiny.latent(batch=s["batch"])
    noise = rows.join(comfy.sample.prepare_noise(image["samples"], 7))
    sigmas = comfy.samplers.KSampler(patcher, s["steps"], "cpu", s["sampler"], s["scheduler"], 1.0, {}).sigmas
    sampler = paired_sampler(comfy.samplers.sampler_object(s["sampler"]), rows, noise, sigmas, 7, "cpu")
    positive = stack([s["edit"], s["source"]], [rows.edits, rows.sources], ["edit", "source"])
    return comfy.sample.sample_custom(
        with_live_rows(patcher, rows), noise, s["cfg"], sampler, sigmas, positive, s["negative"],
        rows.join(image["samples"]), disable_pbar=True, seed=7,
    )[: rows.edits]  # fmt: skip


def ridden(patcher, kind=KIND, edits=1, model=None, run_sampler=None, run_sigmas=None, **changes):
    """(the edits of an ordinary run with the recorded source riding along, the rider)."""
    s, rows = settings(patcher, kind, **changes), PairedRows(edits, changes.get("batch", 1))
    image = tiny.latent(batch=s["batch"])
    trajectory = RecordTrajectory.execute(
        patcher, 7, s["steps"], s["cfg"], s["sampler"], s["scheduler"], s["source"], s["negative"], image, 1.0
    ).args[1]
    patched, riders = with_rider(model or patcher, trajectory, s["source"])
    noise = comfy.sample.prepare_noise(image["samples"], 7)[rows.source_of]
    sampler = comfy.samplers.sampler_object(run_sampler or s["sampler"])
    sigmas = trajectory.sigmas if run_sigmas is None else run_sigmas
    paired = paired_sampler(sampler, rows, rows.join(noise[: rows.sources]), sigmas, 7, "cpu")
    if "noise_sampler" in paired.extra_options:  # the noise of the live run's edits
        draw = paired.extra_options["noise_sampler"]
        own = {**sampler.extra_options, "noise_sampler": lambda *levels: draw(*levels)[: rows.edits]}
        sampler = comfy.samplers.KSAMPLER(sampler.sampler_function, own)
    made = comfy.sample.sample_custom(
        patched, noise, s["cfg"], sampler, sigmas, s["edit"], s["negative"], image["samples"][rows.source_of],
        disable_pbar=True, seed=7,
    )  # fmt: skip
    return made, riders[0]


def batch(*seeds):
    return functools.reduce(lambda a, b: EditBatch.execute(a, b).args[0], (tiny.prompt(KIND, s) for s in seeds))


@pytest.mark.parametrize("name", KINDS)
def test_the_source_rides_in_the_sampler_s_call(name):
    kind = KINDS[name]
    patcher, counted = tiny.model(kind), tiny.CountedCalls()
    made, rider = ridden(patcher, kind)
    assert tiny.relative(made, live(patcher, kind)) < 1e-5
    assert rider.riding
    ridden(patcher, kind, model=counted.attach(patcher))
    assert counted.rows == [3, 3, 3]
    plain = tiny.plain(patcher, kind, positive=tiny.prompt(kind, 2))
    assert tiny.relative(made, plain) > 1e-2  # the patch does something


@pytest.mark.parametrize("sampler", ["euler", "heun", "dpm_2", "dpmpp_2m", "lms", "euler_ancestral", "dpmpp_sde"])
def test_any_sampler_s_evaluations_meet_their_own_source(model, sampler):
    made, _ = ridden(model, sampler=sampler)
    assert tiny.relative(made, live(model, sampler=sampler)) < 1e-5


def test_several_edits_share_a_source_that_runs_before_them(model):
    counted, edits = tiny.CountedCalls(), batch(2, 4, 5)
    made, rider = ridden(model, edits=3, edit=edits)
    assert tiny.relative(made, live(model, edits=3, edit=edits)) < 1e-5
    assert not rider.riding
    ridden(model, edits=3, edit=edits, model=counted.attach(model))
    assert counted.rows == [1, 6, 1, 6, 1, 6]
    assert set(counted.rows_per_sigma().values()) == {1 + 2 * 3}


def test_as_many_sources_as_edits_ride(model):
    made, rider = ridden(model, edits=2, batch=2)
    assert tiny.relative(made, live(model, edits=2, batch=2)) < 1e-5
    assert rider.riding


def test_without_guidance_there_are_two_rows(model):
    counted = tiny.CountedCalls()
    ridden(model, cfg=1.0, model=counted.attach(model))
    assert counted.rows == [2, 2, 2]
    made, _ = ridden(model, cfg=1.0)
    assert tiny.relative(made, live(model, cfg=1.0)) < 1e-5


def test_a_batch_that_memory_splits_has_the_source_in_its_first_call(model):
    counted, expected = tiny.CountedCalls(), live(model)
    made, rider = ridden(model, model=counted.attach(tiny.short_of_memory(model)))
    assert rider.riding
    assert counted.rows == [1] * 9
    assert tiny.relative(made, expected) < 1e-5
    made, _ = ridden(model, edits=3, edit=batch(2, 4, 5), model=tiny.short_of_memory(model))
    assert tiny.relative(made, live(model, edits=3, edit=batch(2, 4, 5))) < 1e-5


def room_for(patcher, rows):
    """A clone for which ComfyUI finds room for so many rows in a call."""
    tight = patcher.clone()
    tight.add_object_patch("memory_required", lambda shape, *_, **__: 0 if shape[0] <= rows else 1e30)
    return tight


def test_room_for_two_rows_makes_two_calls_the_source_in_the_first(model):
    """Also shows that ComfyUI counts the rider's row: of three, two fit."""
    counted = tiny.CountedCalls()
    made, _ = ridden(model, model=counted.attach(room_for(model, 2)))
    assert counted.rows in ([1, 2] * 3, [1, 1, 1] * 3, [2, 1] * 3)
    assert tiny.relative(made, live(model)) < 1e-5


def test_uncond_before_cond_is_the_same(model):
    """Other guiders give their conds in another order."""

    def turned(executor, model, conds, *args):
        return executor(model, conds[::-1], *args)[::-1]

    other = model.clone()
    other.add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, "turned", turned)
    for edits, edit in ((1, tiny.prompt(KIND, 2)), (3, batch(2, 4, 5))):
        made, _ = ridden(model, edits=edits, edit=edit, model=other)
        assert tiny.relative(made, live(model, edits=edits, edit=edit)) < 1e-5


def test_prompts_of_another_length_make_a_call_of_its_own(model):
    edit = tiny.prompt(KIND, 2, 154)
    made, rider = ridden(model, edit=edit)
    assert not rider.riding
    assert tiny.relative(made, live(model, edit=edit)) < 1e-5


def area_prompts():
    return [*tiny.prompt(KIND, 2), *tiny.with_options(tiny.prompt(KIND, 4), area=(24, 8, 0, 8))]


def test_area_conditioning(model):
    """Each entry's rows read the source of the whole picture, whichever call they are in."""
    made, rider = ridden(model, edit=area_prompts())
    assert not rider.riding
    whole, _ = ridden(model)
    assert tiny.relative(made, whole) > 1e-3
    apart, _ = ridden(model, edit=area_prompts(), model=tiny.short_of_memory(model))
    assert tiny.relative(made, apart) < 1e-5
    # the same features by hand: an ordinary run of the source alone, its features kept by noise level
    assert tiny.relative(made, by_hand(model, area_prompts())) < 1e-5


def by_hand(patcher, edit):
    """A run of the source with its features kept by noise level and layer, then one of the edit that reads them."""
    kept = {}

    def keep(name, n, options):
        if 0 in options["cond_or_uncond"]:
            place = options["cond_or_uncond"].index(0)
            kept[name, float(options["sigmas"][0]), address_of(options)] = n[place : place + 1].clone()
        return n

    def read(name, n, options):
        return changed(n, kept[name, float(options["sigmas"][0]), address_of(options)])

    for patch, prompt in ((keep, tiny.prompt(KIND, 1)), (read, edit)):
        patched = patcher.clone()
        patched.set_model_attn1_output_patch(functools.partial(patch, 1))
        patched.set_model_attn2_output_patch(functools.partial(patch, 2))
        made = tiny.plain(patched, KIND, positive=prompt)
    return made


def test_masked_conditioning(model):
    mask = (tiny.randn(1, 24, 16, seed=8) > 0).float()
    edit = [*tiny.prompt(KIND, 2), *tiny.with_options(tiny.prompt(KIND, 4), mask=mask, mask_strength=0.7)]
    made, _ = ridden(model, edit=edit)
    assert tiny.relative(made, by_hand(model, edit)) < 1e-5


class Control:
    """Adds a number to the middle block's input, as a ControlNet adds residuals; counts the rows it is asked for."""

    extra_hooks = None
    previous_controlnet = None

    def __init__(self, strength):
        self.strength, self.rows = strength, []

    def get_models(self):
        return []

    def get_extra_hooks(self):
        return []

    def pre_run(self, *_):
        pass

    def cleanup(self):
        pass

    def inference_memory_requirements(self, dtype):
        return 0

    def get_control(self, x, t, cond, chunks, options):
        self.rows.append(len(x))
        return {"middle": [torch.full((len(x), 128, 3, 2), self.strength)]}


def controlled(prompt, control, **more):
    return tiny.with_options(prompt, control=control, **more)


def test_a_controlnet_of_the_edit_does_not_reach_the_source(model):
    """Also where ComfyUI hands it on to every other entry (control_apply_to_uncond)."""
    for to_all in (False, True):
        control = Control(1.0)
        edit = controlled(tiny.prompt(KIND, 2), control, control_apply_to_uncond=to_all)
        made, rider = ridden(model, edit=edit)
        assert not rider.riding
        assert tiny.relative(made, by_hand(model, edit)) < 1e-5
        without, _ = ridden(model)
        assert tiny.relative(made, without) > 1e-3
        assert sum(control.rows) == (2 * 2 * 3 if to_all else 2 * 3)


def test_a_controlnet_of_the_record_reaches_the_source_alone(model):
    control = Control(1.0)
    source = controlled(tiny.prompt(KIND, 1), control)
    made, rider = ridden(model, source=source)
    assert not rider.riding
    assert tiny.relative(made, live(model)) > 1e-3
    recording, riding = control.rows[:3], control.rows[3:]
    assert recording == riding == [1, 1, 1]


def test_a_replaced_attention_of_another_pack_counts_its_rows(model):
    """IPAdapter divides the rows by the number of entries: every chunk must be of one size."""
    sizes = []

    def replace(q, k, v, options):
        chunks = len(options["cond_or_uncond"])
        assert len(q) % chunks == 0
        sizes.append(len(q) // chunks)
        from scalpel.core.unet.attention import attention

        return 0.9 * attention(q, k, v, options)

    replaced = model.clone()
    for number in (4, 5):
        replaced.set_model_attn2_replace(replace, "input", number)
    made, _ = ridden(replaced)
    assert tiny.relative(made, live(replaced)) < 1e-5
    made, _ = ridden(replaced, edits=3, edit=batch(2, 4, 5))
    assert tiny.relative(made, live(replaced, edits=3, edit=batch(2, 4, 5))) < 1e-5
    assert set(sizes) == {1, 2, 3, 4}


def test_a_second_pass_at_the_same_noise_level_reads_the_same_source(model):
    """As PAG asks for: no more rows for the source."""

    def second(arguments):
        conds = [arguments["cond"]]
        (again,) = comfy.samplers.calc_cond_batch(
            arguments["model"], conds, arguments["input"], arguments["sigma"], arguments["model_options"]
        )
        return arguments["denoised"] + 0.1 * (arguments["denoised"] - again)

    guided, counted = model.clone(), tiny.CountedCalls()
    guided.set_model_sampler_post_cfg_function(second)
    made, _ = ridden(guided)
    assert tiny.relative(made, live(guided)) < 1e-5
    ridden(guided, model=counted.attach(guided))
    assert counted.rows == [3, 1] * 3


BETWEEN = 0.1
"""Bound on the relative change of a 6-step edit when its source is read off 24 recorded steps of another schedule."""


def test_another_schedule_reads_between_the_recorded_levels(model):
    coarse = comfy.samplers.KSampler(model, 6, "cpu", "euler", "normal", 1.0, {}).sigmas
    own, _ = ridden(model, steps=6)
    made, _ = ridden(model, steps=24, scheduler="simple", run_sigmas=coarse)
    assert 0 < tiny.relative(made, own) < BETWEEN


def test_a_noise_level_outside_the_record_is_refused_and_the_next_run_works(model):
    sigmas = torch.tensor([20.0, 5.0, 0.0])
    before = tiny.plain(model, KIND)
    with pytest.raises(ValueError, match="sigma 20 lies outside the trajectory"):
        ridden(model, run_sigmas=sigmas)
    assert torch.equal(tiny.plain(model, KIND), before)
    assert ridden(model)[1].riding


def test_batches_that_do_not_pair_are_refused(model):
    two = RecordTrajectory.execute(
        model, 7, 2, 1.0, "euler", "normal", tiny.prompt(KIND, 1), tiny.prompt(KIND, 3), tiny.latent(24, 16, 2), 1.0
    ).args[1]
    patched, _ = with_rider(model, two, tiny.prompt(KIND, 1))
    with pytest.raises(ValueError, match="its batch of 3 does not fit the trajectory's 2 images"):
        tiny.plain(patched, KIND, latent_image=tiny.latent(batch=3), sigmas=two.sigmas)


def test_the_model_and_its_clones_are_as_before(model):
    before = tiny.plain(model, KIND)
    first, _ = ridden(model)
    second, _ = ridden(model.clone())
    assert torch.equal(first, second)
    assert torch.equal(tiny.plain(model, KIND), before)
