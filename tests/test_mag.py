"""MAG-Edit: against the authors' numbers (golden/mag_a), against attention written out, inside ComfyUI's samplers."""

from __future__ import annotations

import asyncio
import inspect
import io
import json
import math
import re
from dataclasses import replace

import aiohttp
import comfy.ldm.modules.attention
import comfy.sample
import comfy.samplers
import comfy.supported_models
import pytest
import torch
from PIL import Image

from scalpel.core.mag import Push, constraint, normalised, spatial_ratio, token_ratio
from scalpel.core.prompt_to_prompt import PromptControl
from scalpel.core.run_log import RunLog
from scalpel.core.trajectory import Trajectory
from scalpel.core.unet import mag
from scalpel.core.unet.checkpointing import Checkpoints
from scalpel.core.unet.guided_sampler import SAMPLERS, guided_sampler, sampler_name
from scalpel.core.unet.inverting import model_mark
from scalpel.core.unet.layers import layer_table, map_layers
from scalpel.core.unet.taken_attention import Source
from scalpel.devtools.server import ComfyError
from scalpel.nodes.inversion import DDIMInversion
from scalpel.nodes.mag import MAGGuidance
from scalpel.nodes.prompt_to_prompt import PromptToPrompt
from scalpel.nodes.trajectories import RecordTrajectory
from scalpel.partsworld import loader
from scalpel.tests import tiny
from scalpel.tests.test_rider import Control

pytestmark = pytest.mark.usefixtures("inference")
KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
H, W = 24, 16


# ---------------------------------------------------------------- the authors' numbers


def golden_control(golden):
    mapping = torch.zeros(77, 77)
    for token, source in enumerate(golden["p2p_mapper"].int().tolist()):
        if source >= 0:
            mapping[source, token] = golden["p2p_alphas"][token]
    contexts = (golden["context_source"],), (golden["context_target"],)
    return PromptControl(mapping, golden["p2p_alphas"], torch.full((77,), 0.8), torch.ones(77), 0.5, *contexts)


class Enough(Exception):
    pass


@pytest.fixture(scope="module")
def golden_run():
    """Three guided steps of fifty: [(latent before its iterations, after them)], the run, and the rows it took."""
    with torch.inference_mode():
        case, golden = tiny.golden_case("mag_a")
        patcher = tiny.golden_model("mag_a", comfy.supported_models.SD15)
        sigmas = golden["sigmas"]
        known = torch.cat([golden["loop_start_ve"], golden["loop_source_ve"]])[:, None]
        latents = torch.cat([known, known[-1:].expand(len(sigmas) - 4, -1, -1, -1, -1)])  # the rest is never shown
        source = [[golden["context_source"], {}]]
        trajectory = Trajectory("ddim", model_mark(patcher), sigmas, sigmas, latents, source)
        region = mag.Region(
            tuple(Push(tuple(places)) for places in case["word_token_indices"]), golden["mask"][None], "token ratio",
            case["inner_iterations_loop"], 0.5, case["scale"], 3.0,
        )  # fmt: skip
        spec = mag.GuidanceSpec((region,), Source(trajectory, source, golden_control(golden)))
        seen, runs, counted = [], [], tiny.CountedCalls()

        class Watched(mag.GuidedRun):
            def before(self, x, sigma, arguments):
                entered = x.clone()
                if len(seen) < 3:
                    super().before(x, sigma, arguments)
                seen.append((entered, x.clone()))
                runs.append(self)
                if len(seen) == 4:
                    raise Enough

        guided = counted.attach(patcher)
        guided.add_wrapper_with_key("outer_sample", mag.KEY, mag.MAGGuidance(spec))
        start = patcher.get_model_object("latent_format").process_out(trajectory.start)
        original, mag.GuidedRun = mag.GuidedRun, Watched
        try:
            comfy.sample.sample_custom(
                guided, torch.zeros_like(start), case["cfg"], comfy.samplers.sampler_object("euler"), sigmas,
                [[golden["context_target"], {}]], [[golden["context_null"], {}]], start, disable_pbar=True,
            )  # fmt: skip
        except Enough:
            pass
        finally:
            mag.GuidedRun = original
        return golden, seen, runs[0], counted.rows


def test_latents_after_the_iterations_and_after_the_step_are_the_authors(golden_run):
    golden, seen, _, _ = golden_run
    for step in range(3):
        assert tiny.relative(seen[step][1], golden["loop_edit_ve_optimised"][step : step + 1]) < 5e-6
        made, wanted = seen[step + 1][0], golden["loop_edit_ve"][step : step + 1]
        source = golden["loop_source_ve"][step : step + 1]
        assert tiny.relative(made, wanted) < 5e-6
        assert tiny.relative(made - source, wanted - source) < 1e-4
        assert tiny.relative(seen[step][1], seen[step][0]) > 1e-5


def test_the_constraint_s_values_are_the_authors(golden_run):
    golden, _, run, _ = golden_run
    found = torch.tensor([run.values[0][step] for step in range(3)])
    torch.testing.assert_close(found, golden["loop_loss_TR"], rtol=0, atol=1e-5)


def test_a_step_shows_the_unet_the_source_once_and_the_edit_once_an_iteration(golden_run):
    """And cond and uncond of the sampler's own evaluation. (The authors' program: the source in every iteration.)"""
    _, _, _, rows = golden_run
    assert rows == 3 * [1, 1, 1, 1, 2]


@pytest.mark.parametrize("name", ["early", "late"])
def test_an_isolated_sample_s_maps_and_gradient_are_the_authors(name, golden_run):
    golden, _, run, _ = golden_run
    case, _ = tiny.golden_case("mag_a")
    sample = case["samples"][name]
    layers = ["input7", "input8", "output3", "output4", "output5"]  # in execution order
    own = torch.stack([golden[f"{name}_map_{layer}"] for layer in layers])
    inside = golden["mask_16"].flatten()[None]
    losses = [token_ratio(m[None], case["word_token_indices"][0], inside) for m in own]
    torch.testing.assert_close(torch.stack(losses).mean(), golden[f"{name}_loss_TR"][0], rtol=0, atol=1e-6)
    losses = [spatial_ratio(m[None], case["word_token_indices"][0], inside, 3.0) for m in own]
    torch.testing.assert_close(torch.stack(losses).mean(), golden[f"{name}_loss_SR"][0], rtol=0, atol=1e-6)
    assert sample["sigma"] == pytest.approx(float(golden["sigmas"][sample["step_index"]]), rel=1e-6)
    # the same maps and the gradient, from the UNet: a run of which only this step is made
    spec = run.spec
    sigma, levels = golden["sigmas"][sample["step_index"]], golden["sigmas"]
    latents = golden[f"{name}_source_ve"].expand(len(levels), 1, -1, -1, -1)
    trajectory = Trajectory("ddim", spec.source.trajectory.model, levels, levels, latents, spec.source.prompt)
    found = {}

    class Once(mag.GuidedRun):
        def before(self, _, __, arguments):
            options, step = arguments["model_options"], sample["step_index"]
            taken = self.taken.at(sigma, step, options)
            conds = self._whole_prompt(golden[f"{name}_edit_ve"], sigma)
            with mag.gradients():
                z = mag.ordinary(golden[f"{name}_edit_ve"]).clone()
                found["maps"] = [m.detach() for m in self.maps(z, sigma, taken, conds, options, Checkpoints())[0]]
                found["gradient"] = self._gradient(z, sigma, step, [0], taken, conds, options)
            raise Enough

    patcher = tiny.golden_model("mag_a", comfy.supported_models.SD15)
    region = replace(spec.regions[0], iterations=1, until=1.0, scale=1.0)
    alone = mag.GuidanceSpec((region,), Source(trajectory, spec.source.prompt, spec.source.control))
    patcher.add_wrapper_with_key("outer_sample", mag.KEY, mag.MAGGuidance(alone))
    start = patcher.get_model_object("latent_format").process_out(golden[f"{name}_edit_ve"])
    original, mag.GuidedRun = mag.GuidedRun, Once
    try:
        comfy.sample.sample_custom(
            patcher, torch.zeros_like(start), 3.0, comfy.samplers.sampler_object("euler"),
            golden["sigmas"], [[golden["context_target"], {}]], [[golden["context_null"], {}]],
            start, disable_pbar=True,
        )  # fmt: skip
    except Enough:
        pass
    finally:
        mag.GuidedRun = original
    for made, wanted in zip(found["maps"], own, strict=True):
        torch.testing.assert_close(made[0], wanted, rtol=0, atol=5e-5)
    assert tiny.relative(found["gradient"], golden[f"{name}_grad_ve"]) < 1e-4


# ---------------------------------------------------------------- arithmetic


def some_attention(rows=2):
    return torch.stack([tiny.randn(3, 6, 5, seed=seed).softmax(-1) for seed in range(rows)])


def test_token_ratio_is_the_share_of_the_words_inside():
    attention, inside = some_attention(), torch.tensor([[1.0, 0, 1, 0, 0, 1]])
    expected = []
    for row in attention:
        shares = [torch.stack([p[[1, 3]].mean() / p.sum() for p in head[[0, 2, 5]]]).mean() for head in row]
        expected.append(torch.stack([(1 - share) ** 2 for share in shares]).mean())
    torch.testing.assert_close(token_ratio(attention, [1, 3], inside), torch.stack(expected))


def test_spatial_ratio_is_the_share_of_the_words_attention_that_lies_inside():
    attention, inside = some_attention(), torch.tensor([[1.0, 0, 1, 0, 0, 1]])
    words = attention[..., [1, 3]].sum(-1)
    share = words[..., [0, 2, 5]].sum(-1) / words.sum(-1)
    torch.testing.assert_close(spatial_ratio(attention, [1, 3], inside, 3.0), (3 - 4 * share).mean(-1))


def test_a_normalised_gradient_has_length_1_inside_whatever_it_is_outside():
    gradient, inside = 1e-6 * tiny.randn(2, 4, 6, 5, seed=1), torch.zeros(2, 1, 6, 5)
    inside[0, :, 1:3, 2:4] = inside[1, :, 4:] = 1
    gradient[1] *= 50
    found = normalised(gradient, inside)
    for row in range(2):
        region = found[row][:, inside[row, 0] > 0]
        assert float(region.square().mean()) == pytest.approx(1, rel=1e-5)
        assert tiny.relative(found[row] / found[row].abs().max(), gradient[row] / gradient[row].abs().max()) < 1e-5
    assert torch.equal(normalised(torch.zeros(1, 4, 6, 5), inside[:1]), torch.zeros(1, 4, 6, 5))
    assert tiny.relative(normalised(1e-24 * gradient, inside), found) < 1e-5  # whose squares are 0 in single precision


def test_words_are_weighted_and_negative_ones_count_against():
    maps, insides = [some_attention(), some_attention().flip(-1)], [torch.ones(1, 6), torch.ones(1, 6)]

    def one(places):
        return sum(token_ratio(m, places, i) for m, i in zip(maps, insides, strict=True)) / 2

    pushes = [Push((1,)), Push((2, 3), 0.5), Push((4,), -0.25)]
    made = constraint("token ratio", pushes, [maps] * 3, insides, 3.0)
    torch.testing.assert_close(made, (one([1]) + 0.5 * one([2, 3])) / 2 - 0.25 * one([4]))


def test_an_unknown_constraint_is_named():
    with pytest.raises(ValueError, match="constraint: 'ratio' is unknown; accepted are token ratio, spatial ratio"):
        constraint("ratio", [Push((1,))], [[some_attention()]], [torch.ones(1, 6)], 3.0)


# ---------------------------------------------------------------- in ComfyUI


def mask():
    region = torch.zeros(1, 8 * H, 8 * W)
    region[:, 64:128, 32:96] = 1
    return region


def guided(patcher, source=None, **changes):
    settings = {
        "pushes": (Push((5,)),), "mask": mask(), "kind": "token ratio", "iterations": 2, "until": 0.5, "scale": 2.5,
        "outside_weight": 3.0, "log": RunLog("test"), **changes,
    }  # fmt: skip
    return mag.guide(patcher, mag.GuidanceSpec((mag.Region(**settings),), source)), settings["log"]


def told(lines):
    """The values of each step from a run log's lines."""
    *steps, memory = lines
    assert re.fullmatch(r"memory: \d+ MB kept for a gradient, with(out)? checkpoints", memory)
    return [[float(value) for value in line.split(": ")[1].split(" → ")] for line in steps]


def sampled(patcher, kind=tiny.SD15, sampler="euler", batch=1, **changes):
    settings = {
        "cfg": 4.0, "positive": tiny.prompt(kind, 2), "negative": tiny.prompt(kind, 3), "seed": 7,
        "latent_image": torch.zeros(batch, 4, H, W), **changes,
    }  # fmt: skip
    noise = comfy.sample.prepare_noise(settings["latent_image"], 7)
    return comfy.sample.sample(
        patcher, noise, 4, settings.pop("cfg"), sampler, "normal", settings.pop("positive"),
        settings.pop("negative"), settings.pop("latent_image"), disable_pbar=True, **settings,
    )  # fmt: skip


@pytest.mark.parametrize("name", KINDS)
@pytest.mark.parametrize("inference", [False, True])
def test_the_constraint_falls_and_the_model_is_as_it_was(name, inference):
    kind = KINDS[name]
    patcher = tiny.model(kind, inference=inference)
    before = sampled(patcher, kind)
    clone, log = guided(patcher, iterations=3, scale=5.0)
    made = sampled(clone, kind)
    assert torch.isfinite(made).all()
    assert tiny.relative(made, before) > 1e-3
    for values in told(log.lines):
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
    assert torch.equal(sampled(clone, kind), made)
    assert torch.equal(sampled(patcher, kind), before)


def test_a_run_cancelled_between_two_iterations_leaves_the_model_as_it_was(monkeypatch):
    patcher, calls = tiny.model(tiny.SD15, inference=True), []
    before = sampled(patcher)
    patched, _ = guided(patcher, iterations=3, scale=5.0)
    whole = sampled(patched)

    def interrupt():
        calls.append(1)
        if len(calls) == 2:
            raise InterruptedError

    monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
    with pytest.raises(InterruptedError):
        sampled(patched)
    monkeypatch.undo()
    assert torch.equal(sampled(patcher), before)
    assert torch.equal(sampled(patched), whole)


def test_a_run_tells_of_every_iteration():
    said = []
    sampled(guided(tiny.model(tiny.SD15), tell=said.append)[0])
    assert len(said) == 2 * 2
    assert re.fullmatch(r"step 2 of 4, iteration 2 of 2\ntoken ratio: 0\.\d{4} → 0\.\d{4}", said[-1])


def test_outside_of_the_guided_steps_nothing_is_different():
    patcher = tiny.model(tiny.SD15)
    assert torch.equal(sampled(guided(patcher, until=0.0)[0]), sampled(patcher))
    assert torch.equal(sampled(guided(patcher, scale=0.0)[0]), sampled(patcher))


@pytest.mark.parametrize("name", KINDS)
def test_checkpoints_give_the_same_picture_from_less_memory(name):
    kind = KINDS[name]
    patcher = tiny.model(kind, inference=True)
    made, kept = [], []

    class Watched(mag.GuidedRun):
        def finish(self):
            super().finish()
            kept.append(self._kept_bytes)

    original, mag.GuidedRun = mag.GuidedRun, Watched
    try:
        for checkpointing in (False, True):
            spec = mag.spec_of(guided(patcher)[0])
            made.append(sampled(mag.guide(patcher, replace(spec, checkpointing=checkpointing)), kind))
    finally:
        mag.GuidedRun = original
    assert tiny.relative(made[1], made[0]) < 1e-6
    assert 0 < kept[1] < 0.5 * kept[0]


def test_comfyui_is_asked_for_a_gradient_s_memory(monkeypatch):
    patcher, asked = tiny.model(tiny.SD15), []
    load = comfy.model_management.load_models_gpu

    def recorded(models, memory_required=0, **options):
        asked.append(memory_required)
        return load(models, memory_required=memory_required, **options)

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", recorded)
    sampled(patcher)
    sampled(guided(patcher, until=0.0)[0])
    sampled(guided(patcher)[0])
    assert asked[1] == asked[0]
    assert asked[2] > asked[0] + 2**20


def test_a_batch_is_guided_row_by_row():
    patcher = tiny.model(tiny.SD15)
    both = sampled(guided(patcher)[0], batch=2)
    noise = comfy.sample.prepare_noise(torch.zeros(2, 4, H, W), 7)[1:]
    alone = comfy.sample.sample(
        guided(patcher)[0], noise, 4, 4.0, "euler", "normal", tiny.prompt(tiny.SD15, 2), tiny.prompt(tiny.SD15, 3),
        torch.zeros(1, 4, H, W), disable_pbar=True, seed=7,
    )  # fmt: skip
    assert tiny.relative(both[1:], alone) < 1e-4


def test_even_moves_are_as_far_in_every_step():
    patcher, seen = tiny.model(tiny.SD15), []

    class Watched(mag.GuidedRun):
        def before(self, x, sigma, arguments):
            entered = x.clone()
            super().before(x, sigma, arguments)
            inside = self.small_masks[0].expand_as(x) > 0
            seen.append(((x - entered)[inside].square().mean().sqrt().item() / sigma, torch.equal(x, entered)))

    original, mag.GuidedRun = mag.GuidedRun, Watched
    try:
        sampled(guided(patcher, iterations=1, even=True, scale=0.1)[0])
    finally:
        mag.GuidedRun = original
    assert [moved for moved, _ in seen[:2]] == pytest.approx([0.1, 0.1], rel=1e-3)
    assert all(same for _, same in seen[2:])


def test_two_regions_with_one_gradient_move_the_latent_in_both_masks():
    """By the sum of their gradients, each scaled by its own; the one with fewer iterations drops out."""
    patcher = tiny.model(tiny.SD15)
    left, right = mask(), mask().flip(-1).roll(32, 1)
    common = {"kind": "token ratio", "until": 0.25, "outside_weight": 3.0}
    one = mag.Region((Push((5,)),), left, iterations=1, scale=2.0, **common)
    two = mag.Region((Push((7,)),), right, iterations=2, scale=3.0, **common)
    moved = {}

    class Watched(mag.GuidedRun):
        def _gradient(self, z, sigma, step, asking, *args):
            found = super()._gradient(z, sigma, step, asking, *args)
            moved.setdefault(self.spec, []).append((z.detach().clone(), asking, found))
            return found

    original, mag.GuidedRun = mag.GuidedRun, Watched
    try:
        for spec in (mag.GuidanceSpec((one,)), mag.GuidanceSpec((two,)), mag.GuidanceSpec((one, two))):
            sampled(mag.guide(patcher, spec))
    finally:
        mag.GuidedRun = original
    ((_, _, first),) = moved[mag.GuidanceSpec((one,))]
    both = moved[mag.GuidanceSpec((one, two))]
    second = moved[mag.GuidanceSpec((two,))][0][2]
    assert [asking for _, asking, _ in both] == [[0, 1], [1]]
    assert tiny.relative(both[0][2], first + second) < 1e-5
    change = (both[1][0] - both[0][0])[0].abs().amax(0) > 0
    union = (left + right)[0, ::8, ::8] > 0
    assert torch.equal(change, union)


def test_a_noise_mask_is_honoured():
    patcher = tiny.model(tiny.SD15)
    picture, inside = tiny.randn(1, 4, H, W, seed=1), torch.zeros(1, 1, H, W)
    inside[..., 8:] = 1
    made = sampled(guided(patcher)[0], latent_image=picture, noise_mask=inside)
    assert torch.equal(made[..., :8], sampled(patcher, latent_image=picture, noise_mask=inside)[..., :8])


@pytest.mark.parametrize("name", sorted(set(comfy.samplers.KSampler.SAMPLERS)))
def test_samplers_go_on_with_a_latent_that_was_moved(name):
    """Moved before its first evaluation, it is as if the run had begun there, and what the model is shown first at a
    step's noise level is the latent of that step. All others are refused by name.
    """
    sampler = comfy.samplers.sampler_object(name)
    if sampler_name(sampler) not in SAMPLERS:
        with pytest.raises(ValueError, match=r"sampler: .* does not show its own latent at each step"):
            guided_sampler(sampler, None, None)
        return
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.5])
    shown, own, levels = {}, {}, []
    patcher = tiny.model(tiny.SD15)

    class Model:
        class inner_model:  # noqa: N801
            class inner_model:  # noqa: N801
                model_sampling = patcher.get_model_object("model_sampling")
                model_patcher = patcher

            model_patcher = patcher

        def __call__(self, x, sigma, model_options, **_):
            for function in model_options.get("sampler_post_cfg_function", ()):
                function({"denoised": 0.3 * x, "uncond_denoised": 0.2 * x})
            return 0.3 * x

    def run(start, moved):
        waiting = [True]

        def before(x, sigma, _):
            levels.append(round(3 - math.log2(sigma), 4))  # the step's number
            shown.setdefault(levels[-1], x.clone())
            if waiting.pop() if waiting else False:
                x.add_(moved)

        function = guided_sampler(sampler, before, lambda x: x).sampler_function
        x = start.clone()
        takes_noise = "noise_sampler" in inspect.signature(sampler.sampler_function).parameters
        options = {"noise_sampler": lambda *_: torch.zeros_like(x)} if takes_noise else {}
        return function(Model(), x, sigmas, extra_args={"model_options": {}}, disable=True,
                        callback=lambda told: own.setdefault(told["i"], told["x"].clone()), **options)  # fmt: skip

    start, move = tiny.randn(1, 4, 8, 8, seed=3), tiny.randn(1, 4, 8, 8, seed=4)
    assert tiny.relative(run(start, move), run(start + move, 0.0)) < 1e-5
    assert tiny.relative(run(start, move), run(start, 0.0)) > 1e-2
    shown.clear(), own.clear(), levels.clear()
    run(start, 0.0)
    assert levels == [0, 1, 2, 3] or all(torch.equal(shown[step], own[step]) for step in range(4))


@pytest.mark.parametrize("options", [{"s_churn": 1.0}, {"r": 1.0}])
def test_a_sampler_set_to_other_points_is_refused(options):
    sampler = comfy.samplers.ksampler("euler" if "s_churn" in options else "dpmpp_sde", options)
    with pytest.raises(ValueError, match=r"^sampler: (euler|dpmpp_sde) is set to s_churn above 0, or r of 1 or more"):
        guided_sampler(sampler, None, None)


def test_a_prompt_for_an_area_as_large_as_the_picture_is_one_for_the_whole():
    patcher, kind = tiny.model(tiny.SD15), tiny.SD15
    whole = tiny.with_options(tiny.prompt(kind, 2), area=(H, W, 0, 0))
    assert torch.equal(sampled(guided(patcher)[0], positive=whole), sampled(guided(patcher)[0]))
    part = tiny.with_options(tiny.prompt(kind, 2), area=(H, W // 2, 0, 0))
    with pytest.raises(ValueError, match=r"^positive: at noise level .* no prompt holds for the whole picture"):
        sampled(guided(patcher)[0], positive=part)


def test_a_guided_model_is_refused_where_a_source_rides_along(model):
    with pytest.raises(ValueError, match=r"^model: it has a MAG Guidance, which would move the source"):
        tiny.edit(guided(model)[0], tiny.SD15)


def test_prompt_to_prompt_acts_without_iterations_and_outside_the_mask_the_source_comes_back(model):
    kind = tiny.SD15
    sampled_once, trajectory, _ = RecordTrajectory.execute(
        model, 7, 4, 1.0, "euler", "normal", tiny.prompt(kind, 1), tiny.prompt(kind, 3), tiny.latent(H, W), 1.0
    ).args
    control = PromptControl(torch.eye(77), torch.ones(77), torch.full((77,), 0.8), torch.ones(77), 0.5)
    source = Source(trajectory, tiny.prompt(kind, 1), control)
    made = sampled(guided(model, source, scale=0.0, mask=torch.ones(1, 8 * H, 8 * W))[0])
    plain = sampled(guided(model, scale=0.0)[0])
    assert tiny.relative(made, plain) > 1e-2
    pasted = sampled(guided(model, source, scale=0.0)[0])
    assert torch.equal(pasted[:, :, :6], sampled_once["samples"][:, :, :6])


@pytest.mark.parametrize("name", ["attention_pytorch", "attention_basic", "attention_split"])
def test_any_of_comfyui_s_attentions_gives_the_gradient(model, name, monkeypatch):
    """Under Prompt-to-Prompt, which adds to the attention's output: some keep it for the backward pass."""
    kind = tiny.SD15
    trajectory = RecordTrajectory.execute(
        model, 7, 4, 1.0, "euler", "normal", tiny.prompt(kind, 1), tiny.prompt(kind, 3), tiny.latent(H, W), 1.0
    ).args[1]
    control = PromptControl(0.5 * torch.eye(77), torch.ones(77), torch.full((77,), 0.8), torch.ones(77), 0.5)
    source = Source(trajectory, tiny.prompt(kind, 1), control)
    usual = sampled(guided(model, source)[0])
    attention = getattr(comfy.ldm.modules.attention, name)
    monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", attention)
    assert tiny.relative(sampled(guided(model, source)[0]), usual) < 1e-4


def test_a_controlnet_of_the_prompt_is_part_of_the_gradient(model):
    """ComfyUI adds it in place to what the encoder hands to the decoder."""

    class ToTheDecoder(Control):
        def get_control(self, x, *args):
            middle = super().get_control(x, *args)
            return {**middle, "output": [None] * 11 + [torch.full((len(x), 128, 3, 2), self.strength)]}

    runs = []
    for strength in (0.0, 1.0):
        control = ToTheDecoder(strength)
        positive = tiny.with_options(tiny.prompt(tiny.SD15, 2), control=control)
        patched, log = guided(model, iterations=3, scale=50.0)
        runs.append((sampled(patched, positive=positive), told(log.lines)))
        assert sum(control.rows) == 2 * 3 + 4  # each iteration, each step
    (plain, _), (made, values) = runs
    assert tiny.relative(made, plain) > 1e-3
    assert values[0] == sorted(values[0], reverse=True)


@pytest.mark.parametrize("negative", [False, True])
def test_a_word_whose_attention_is_the_source_s_is_pushed_by_its_own(model, negative):
    """Under Prompt-to-Prompt the latent has no say in what is taken; so the word's own attention is what counts."""
    kind = tiny.SD15
    trajectory = RecordTrajectory.execute(
        model, 7, 4, 1.0, "euler", "normal", tiny.prompt(kind, 1), tiny.prompt(kind, 3), tiny.latent(H, W), 1.0
    ).args[1]
    mapped = torch.ones(77)
    mapped[5] = 0  # a new word
    control = PromptControl(torch.eye(77) * mapped, mapped, torch.full((77,), 0.8), torch.ones(77), 0.5)
    source = Source(trajectory, tiny.prompt(kind, 1), control)
    weight = -1.0 if negative else 1.0
    patched, log = guided(model, source, pushes=(Push((9,), weight),), iterations=4, scale=200.0)
    sampled(patched)
    falls = []
    for values in told(log.lines):
        assert values == sorted(values, reverse=True)
        falls.append(values[0] - values[-1])
    assert falls[0] > 1e-3


def test_the_mask_must_be_there_where_the_constraint_is_measured():
    small = torch.zeros(1, 8 * H, 8 * W)
    small[:, 9:12, 9:12] = 1
    with pytest.raises(ValueError, match=r"mask: nothing is left of it at 4 × 6, .* a square of 32 × 32 of its pixels"):
        sampled(guided(tiny.model(tiny.SD15), mask=small)[0])


def test_the_constraint_is_measured_in_the_authors_five_layers():
    table = layer_table(tiny.golden_model("mag_a", comfy.supported_models.SD15))
    five = {("input", 7, 0), ("input", 8, 0), ("output", 3, 0), ("output", 4, 0), ("output", 5, 0)}
    assert map_layers(table) == five


# ---------------------------------------------------------------- the node


@pytest.fixture(scope="module")
def demo():
    return loader.load()


def node(demo, **changes):
    model, clip, _ = demo
    settings = {
        "model": model, "clip": clip, "edit_text": "a red car and a blue car on a grey street", "words": "blue",
        "mask": rectangle(), "constraint": "token ratio", "preset": "paper", "iterations": 2, "until": 0.5,
        "scale": 2.5, "spatial_weight": 3.0, "negative_words": "", "negative_scale": 0.0, **changes,
    }  # fmt: skip
    return MAGGuidance.execute(**settings).args


def rectangle():
    region = torch.zeros(1, 256, 256)
    region[:, 64:192, 128:240] = 1
    return region


def region_of(patched):
    (region,) = mag.spec_of(patched).regions
    return region


def test_words_are_found_with_their_weights(demo):
    spec = region_of(node(demo, words="blue: 0.5, grey street", negative_words="red", negative_scale=0.4)[0])
    assert spec.pushes == (Push((6,), 0.5), Push((10, 11)), Push((2,), -0.4))
    assert region_of(node(demo, negative_words="red")[0]).pushes == (Push((6,)),)


def test_the_fast_preset_takes_fewer_moves_of_even_length(demo):
    fast, paper = (region_of(node(demo, preset=preset, iterations=15)[0]) for preset in ("fast", "paper"))
    assert (fast.iterations, fast.scale, fast.even) == (3, 0.125, True)
    assert (paper.iterations, paper.scale, paper.even) == (15, 2.5, False)


@pytest.mark.parametrize(
    ("changes", "said"),
    [
        ({"words": ""}, "words: it is empty"),
        ({"words": "green"}, "words: 'green' is not a word of"),
        ({"words": "blue: -1"}, "words: 'blue: -1' has a weight of -1; accepted are numbers above 0"),
        ({"mask": torch.zeros(1, 256, 256)}, "mask: it is empty"),
        ({"constraint": "ratio"}, "constraint: 'ratio' is unknown; accepted are token ratio, spatial ratio"),
        ({"preset": "slow"}, "preset: 'slow' is unknown; accepted are paper, fast"),
        ({"iterations": 0}, "iterations: 0 is out of range"),
        ({"until": 1.5}, "until: 1.5 is out of range"),
        ({"prompt_control": "control"}, "trajectory: prompt_control needs one"),
    ],
)
def test_a_bad_input_is_named(demo, changes, said):
    if "prompt_control" in changes:
        changes = {"prompt_control": p2p(demo)[0]}
    with pytest.raises(ValueError, match=said):
        node(demo, **changes)


def p2p(demo, edit="a red car and a blue car on a grey street", words=""):
    source = "a red car and a red car on a grey street"
    return PromptToPrompt.execute(demo[1], source, edit, "refine", 0.8, 0.5, "", "", words).args


def test_the_prompt_control_must_be_of_the_same_text_and_without_local_blend(demo):
    model = demo[0]
    control, source, _ = p2p(demo, edit="a red car and a green car on a grey street")
    trajectory = DDIMInversion.execute(model, source, {"samples": torch.zeros(1, 4, 32, 32)}, 2, "normal", 0).args[0]
    with pytest.raises(ValueError, match="edit_text: it is not the edit_text of the Prompt to Prompt"):
        node(demo, prompt_control=control, trajectory=trajectory)
    with pytest.raises(ValueError, match="prompt_control: it has local_blend_words"):
        node(demo, prompt_control=p2p(demo, words="car")[0], trajectory=trajectory)
    assert mag.spec_of(node(demo, prompt_control=p2p(demo)[0], trajectory=trajectory)[0]).source.control is not None


def test_a_second_guidance_on_one_model_adds_its_region(demo):
    first, log = node(demo)
    both, other = node(demo, model=first, words="red: 0.5", constraint="spatial ratio", mask=rectangle().flip(-1))
    regions = mag.spec_of(both).regions
    assert [region.pushes for region in regions] == [(Push((6,)),), (Push((2,), 0.5),)]
    assert [region.kind for region in regions] == ["token ratio", "spatial ratio"]
    assert regions[0].log is log
    assert regions[1].log is other
    assert len(mag.spec_of(first).regions) == 1


def test_regions_of_one_model_share_its_prompt_and_its_source(demo):
    with pytest.raises(ValueError, match="edit_text: 'a blue car', but the MAG Guidance before this one has 'a red"):
        node(demo, model=node(demo)[0], edit_text="a blue car")
    image = {"samples": torch.zeros(1, 4, 32, 32)}
    one, other = (DDIMInversion.execute(demo[0], p2p(demo)[1], image, 2, "normal", 0).args[0] for _ in range(2))
    first = node(demo, trajectory=one)[0]
    with pytest.raises(ValueError, match="trajectory: the MAG Guidance before this one has another trajectory"):
        node(demo, model=first, trajectory=other)
    assert mag.spec_of(node(demo, model=first)[0]).source.trajectory is one
    assert mag.spec_of(node(demo, model=first, trajectory=one)[0]).source.trajectory is one
    assert mag.spec_of(node(demo, model=node(demo)[0], trajectory=one)[0]).source.trajectory is one


# ---------------------------------------------------------------- through the server


def graph(again=False, **changes):
    """A picture with a guided word, one without, and what the run tells. again: not from ComfyUI's cache."""
    size = {"width": 256, "height": 256}
    text = "a red car and a blue car on a grey street"
    guidance = {
        "model": ["model", 0], "clip": ["model", 1], "edit_text": text, "words": "blue", "mask": ["mask", 0],
        "constraint": "token ratio", "preset": "fast", "iterations": 10, "until": 0.5, "scale": 2.5,
        "spatial_weight": 3.0, "negative_words": "", "negative_scale": 0.0, **changes,
    }  # fmt: skip
    nodes = {
        "model": ("PartsWorldLoader", {}),
        "positive": ("CLIPTextEncode", {"clip": ["model", 1], "text": text}),
        "negative": ("CLIPTextEncode", {"clip": ["model", 1], "text": ""}),
        "nothing": ("SolidMask", {"value": 0.0, **size}),
        "half": ("SolidMask", {"value": 1.0, "width": 120, "height": 128}),
        "mask": ("MaskComposite", {
            "destination": ["nothing", 0], "source": ["half", 0], "x": 128, "y": 64, "operation": "add",
        }),
        "empty": ("EmptyLatentImage", {**size, "batch_size": 1}),
        "latent": ("LatentFromBatch" if again else "RepeatLatentBatch", {
            "samples": ["empty", 0], **({"batch_index": 0, "length": 1} if again else {"amount": 1}),
        }),
        "guided": ("MAGGuidance", guidance),
    }  # fmt: skip
    for name, model in (("with", "guided"), ("without", "model")):
        nodes[name] = ("KSampler", {
            "model": [model, 0], "seed": 3, "steps": 4, "cfg": 7.5, "sampler_name": "euler",
            "scheduler": "ddim_uniform", "positive": ["positive", 0], "negative": ["negative", 0],
            "latent_image": ["latent", 0], "denoise": 1.0,
        })  # fmt: skip
        nodes[f"{name} picture"] = ("VAEDecode", {"samples": [name, 0], "vae": ["model", 2]})
        nodes[f"{name} saved"] = ("PreviewImage", {"images": [f"{name} picture", 0]})
    nodes["log"] = ("RunLogShow", {"run_log": ["guided", 1], "latent": ["with", 0]})
    nodes["curve"] = ("PreviewImage", {"images": ["log", 0]})
    nodes["values"] = ("PreviewAny", {"source": ["log", 2]})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


def pixels(server, output):
    return Image.open(io.BytesIO(server.fetch(output["images"][0]))).tobytes()


def test_a_server_guides_with_gradients_and_leaves_the_model_as_it_was(server):
    outputs = server.run(graph())["outputs"]
    values = told(outputs["values"]["text"][0].splitlines())
    assert len(values) == 2
    for numbers in values:
        assert len(numbers) == 2
        assert numbers[1] < numbers[0]
    pictures = {name: pixels(server, outputs[f"{name} saved"]) for name in ("with", "without")}
    assert pictures["with"] != pictures["without"]
    assert outputs["curve"]["images"]
    with pytest.raises(ComfyError, match="words: 'green' is not a word of"):
        server.run(graph(words="green"))
    again = server.run(graph(again=True))["outputs"]
    assert {name: pixels(server, again[f"{name} saved"]) for name in pictures} == pictures


def test_a_server_shows_the_constraint_on_the_node_while_it_runs(server):
    async def texts():
        client, found = "watching", []
        address = f"http://{server.address}/ws?clientId={client}"
        async with aiohttp.ClientSession() as session, session.ws_connect(address, max_msg_size=0) as socket:
            prompt_id = await asyncio.to_thread(server.submit, graph(scale=2.4), client)
            async for message in socket:
                if message.type is aiohttp.WSMsgType.BINARY and int.from_bytes(message.data[:4]) == 3:  # a text
                    length = int.from_bytes(message.data[4:8])
                    found.append((message.data[8 : 8 + length].decode(), message.data[8 + length :].decode()))
                elif message.type is aiohttp.WSMsgType.TEXT:
                    event = json.loads(message.data)
                    if event["type"] in ("execution_success", "execution_error", "execution_interrupted"):
                        assert event["data"]["prompt_id"] == prompt_id
                        return found
        return found

    found = asyncio.run(asyncio.wait_for(texts(), 120))
    assert {node for node, _ in found} == {"guided"}
    assert found[-1][1].startswith("step 2 of 4, iteration 2 of 2\ntoken ratio: 0.")


# ---------------------------------------------------------------- small models of both families on the server


def tiny_graph(kind, half, lora):
    """A run without guidance, one with, and one without once more, all of the same model."""
    text = "a red car and a blue car on a grey street"
    nodes = {
        "demo": ("PartsWorldLoader", {}),
        "model": ("TinyModel", {"kind": kind, "half": half, "lora": lora}),
        "positive": ("TinyPrompt", {"kind": kind, "seed": 2}),
        "negative": ("TinyPrompt", {"kind": kind, "seed": 3}),
        "mask": ("SolidMask", {"value": 1.0, "width": 128, "height": 192}),
        "empty": ("EmptyLatentImage", {"width": 128, "height": 192, "batch_size": 1}),
        "guided": ("MAGGuidance", {
            "model": ["model", 0], "clip": ["demo", 1], "edit_text": text, "words": "blue", "mask": ["mask", 0],
            "constraint": "token ratio", "preset": "paper", "iterations": 3, "until": 0.5, "scale": 50.0,
            "spatial_weight": 3.0, "negative_words": "", "negative_scale": 0.0,
        }),
    }  # fmt: skip
    before = ["empty", 0]
    for name, model in (("before", "model"), ("with", "guided"), ("after", "model")):
        nodes[name] = ("KSampler", {
            "model": [model, 0], "seed": 3, "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
            "positive": ["positive", 0], "negative": ["negative", 0], "latent_image": before, "denoise": 1.0,
        })  # fmt: skip
        nodes[f"{name} bits"] = ("TinyFingerprint", {"latent": [name, 0], "model": [model, 0]})
        # the next run begins after this one, from the same noise
        nodes[f"nothing {name}"] = ("LatentMultiply", {"samples": [name, 0], "multiplier": 0.0})
        before = [f"nothing {name}", 0]
    nodes["log"] = ("RunLogShow", {"run_log": ["guided", 1], "latent": ["with", 0]})
    nodes["values"] = ("PreviewAny", {"source": ["log", 2]})
    return {name: {"class_type": kind, "inputs": inputs} for name, (kind, inputs) in nodes.items()}


@pytest.mark.parametrize("lora", [False, True], ids=["", "LoRA"])
@pytest.mark.parametrize("half", [False, True], ids=["single", "half"])
@pytest.mark.parametrize("kind", KINDS)
def test_a_server_takes_gradients_through_both_families(server_with_tiny_models, kind, half, lora):
    """Whose weights are inference tensors, also in half precision or with a LoRA; they keep their bits."""
    outputs = server_with_tiny_models.run(tiny_graph(kind, half, lora))["outputs"]
    bits = {name: outputs[f"{name} bits"]["text"] for name in ("before", "with", "after")}
    assert bits["before"] == bits["after"]
    assert bits["with"][0] != bits["before"][0]
    assert bits["with"][1] == bits["before"][1]
    for values in told(outputs["values"]["text"][0].splitlines()):
        assert len(values) == 3
        assert values == sorted(values, reverse=True)
        assert values[0] > values[-1]
