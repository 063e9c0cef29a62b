"""The node reproduces what the PartEdit authors' own program computed, at four UNet rows a step (golden/partedit_*).

Their program runs three paths (source, edit, localisation) of two rows each; two paths give the same numbers. One case
is blending alone, the other has their Prompt-to-Prompt replacement with it.
"""

from __future__ import annotations

import comfy.k_diffusion.sampling
import comfy.samplers
import pytest
import torch
import torch.nn.functional as F

from scalpel.core.part_token import from_tensor
from scalpel.core.prompt_to_prompt import PromptControl
from scalpel.core.unet import sampling
from scalpel.core.unet.blend import FeatureBlend
from scalpel.tests import tiny

CASES = {name: tiny.golden_case(name) for name in ("partedit_a", "partedit_p2p")}
STEPS = range(8)
ROBOT = 5
"""Place of the edit word: start, a, closeup, of, a, robot."""


def prompt_control(case, golden):
    """All words for all steps, the edit word for fewer; word counts are equal, so each token is its own counterpart."""
    if not case["cross_replace"]:
        return None
    until = torch.full((77,), case["cross_replace"]["default"])
    until[ROBOT] = case["cross_replace"]["robot"]
    contexts = golden["positive"].split(1)
    return PromptControl(torch.eye(77), torch.ones(77), until, torch.ones(77), 0.0, contexts[:1], contexts[1:])


class Run:
    """One run of FeatureBlendSamplerAdvanced on the golden inputs, with every step's latents kept."""

    def __init__(self, name, patcher, monkeypatch):
        case, golden = self.case, self.golden = CASES[name]
        self.latents = []
        self.states = []
        self.counted = tiny.CountedCalls()

        def kept(spec, report):
            return FeatureBlend(spec, lambda run: (self.states.append(run), report(run)))

        monkeypatch.setattr(sampling, "FeatureBlend", kept)
        size = tiny.SIZE
        conditionings = {
            "source": [[golden["positive"][:1], {"pooled_output": golden["positive_pooled"][:1], **size}]],
            "edit": [[golden["positive"][1:], {"pooled_output": golden["positive_pooled"][1:], **size}]],
            "negative": [[golden["negative"], {"pooled_output": golden["negative_pooled"], **size}]],
        }
        self.output = tiny.edit(
            self.counted.attach(patcher), tiny.SDXL, **conditionings, noise=tiny.NoNoise(), sigmas=golden["sigmas"],
            sampler=comfy.samplers.KSAMPLER(self._euler), cfg=case["cfg"], omega=case["omega"],
            latent_image={"samples": patcher.get_model_object("latent_format").process_out(golden["x_0"])},
            part_token=from_tensor(golden["part_embedding"], "head"), prompt_control=prompt_control(case, golden),
        )  # fmt: skip

    def _euler(self, model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
        def keep(step):
            if step["i"] > 0:
                self.latents.append(step["x"].clone())
            callback(step)

        last = comfy.k_diffusion.sampling.sample_euler(model, x, sigmas, extra_args, keep, disable)
        self.latents.append(last)
        return last


@pytest.fixture(scope="module", params=[(name, calls) for name in CASES for calls in (1, 2)], ids=str)
def run(request):
    name, calls = request.param  # cond and uncond in one call of the UNet, or in two
    patcher = tiny.golden_model(name)
    if calls == 2:
        patcher = tiny.short_of_memory(patcher)
    with torch.inference_mode(), pytest.MonkeyPatch.context() as monkeypatch:
        done = Run(name, patcher, monkeypatch)
    done.calls_per_step = calls
    return done


@pytest.mark.parametrize("step", STEPS)
def test_latents_are_the_authors_to_1e_5_after_each_step(run, step):
    edited, source = run.latents[step]
    golden_source, golden_edited = run.golden["x"][step]
    assert tiny.relative(source, golden_source) < 1e-5
    assert tiny.relative(edited, golden_edited) < 1e-5


@pytest.mark.parametrize("step", STEPS)
def test_masks_are_the_authors_to_1e_3_in_the_mean_after_each_step(run, step):
    mask = run.output.step_masks[step]
    assert mask.shape == (1024, 1024)
    small = F.avg_pool2d(mask[None], 4)[0]
    assert (small - run.golden["masks"][step]).abs().mean() < 1e-3


def test_otsu_s_thresholds_are_the_authors_to_one_bin(run):
    (state,) = run.states
    thresholds = [state.thresholds[float(sigma)][0] for sigma in run.golden["sigmas"][:-1]]
    assert thresholds == pytest.approx(run.golden["otsu"].tolist(), abs=1 / 256)


def test_the_outputs_are_the_last_latents_and_the_mean_of_the_masks(run):
    latent_format = tiny.SDXL.base.latent_format()
    edited, source = latent_format.process_out(run.latents[-1])
    assert torch.equal(run.output.edited[0], edited)
    assert torch.equal(run.output.source[0], source)
    assert torch.equal(run.output.mask[0], run.output.step_masks.mean(0))


def test_a_step_costs_four_unet_rows(run):
    assert run.counted.rows_per_sigma() == {float(sigma): 4 for sigma in run.golden["sigmas"][:-1]}
    assert run.counted.rows == [4 // run.calls_per_step] * run.calls_per_step * run.case["steps"]


@pytest.mark.parametrize("edits", [1, 2, 3])
def test_n_edits_of_one_source_cost_2_plus_2n_rows_a_step(edits):
    counted, kind = tiny.CountedCalls(), tiny.SD15
    patcher = counted.attach(tiny.model(kind))
    with torch.inference_mode():
        output = tiny.edit(
            patcher, kind, edit=tiny.prompt(kind, 2, batch=edits), steps=2, latent_image=tiny.latent(16, 8)
        )
    assert counted.rows == [2 + 2 * edits] * 2
    assert len(output.edited) == edits


def test_without_guidance_a_step_costs_two_rows():
    counted, kind = tiny.CountedCalls(), tiny.SD15
    with torch.inference_mode():
        tiny.edit(counted.attach(tiny.model(kind)), kind, cfg=1.0, steps=2, latent_image=tiny.latent(16, 8))
    assert counted.rows == [2, 2]
