"""Source and edit share every noise that a sampler draws, and the source is the picture an ordinary run would give."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch

from scalpel.core.unet.rows import PairedRows
from scalpel.core.unet.samplers import paired_sampler
from scalpel.tests import tiny

pytestmark = [
    pytest.mark.usefixtures("inference"),
    *(
        pytest.mark.filterwarnings(f"ignore:{start}")  # remarks of ComfyUI's samplers on themselves
        for start in ("To copy construct from a tensor", "Should have", "__array_wrap__")
    ),
]
KIND = tiny.SD15
SMALL = tiny.latent(16, 8)
SAMPLERS = comfy.samplers.KSampler.SAMPLERS
PROMISED = ("euler", "heun", "dpmpp_2m", "dpmpp_sde", "lcm", "euler_ancestral", "dpmpp_2m_sde", "uni_pc", "ddim")


def test_the_samplers_that_were_promised_are_among_those_tried():
    assert set(PROMISED) <= set(SAMPLERS)


@pytest.mark.parametrize("name", SAMPLERS)
def test_the_same_prompt_twice_gives_the_same_picture_bit_for_bit(name, model):
    same = tiny.prompt(KIND, 1)
    output = tiny.edit(model, KIND, source=same, edit=same, sampler_name=name, latent_image=SMALL, cfg=1.5)
    assert torch.isfinite(output.edited).all()
    assert torch.equal(output.edited, output.source)


@pytest.mark.parametrize("name", [name for name in SAMPLERS if name != "dpm_adaptive"])
def test_the_source_is_what_an_ordinary_run_of_the_sampler_gives(name, model):
    output = tiny.edit(model, KIND, sampler_name=name, latent_image=SMALL, cfg=1.0)
    alone = tiny.plain(model, KIND, sampler_name=name, latent_image=SMALL, cfg=1.0)
    assert tiny.relative(output.source, alone) < 1e-4
    assert tiny.relative(output.edited, output.source) > 1e-2


@pytest.mark.parametrize("name", ["euler_ancestral", "dpmpp_sde", "lcm"])
def test_all_edits_of_a_batch_share_the_noise_of_their_source(name, model):
    same = tiny.prompt(KIND, 1)
    edits = tiny.prompt(KIND, 1, batch=1)[0][0].repeat(3, 1, 1)
    batch = tiny.edit(model, KIND, source=same, edit=[[edits, {}]], sampler_name=name, latent_image=SMALL, cfg=1.0)
    assert torch.equal(batch.edited, batch.source.expand_as(batch.edited))


def test_sources_of_a_batch_each_have_their_own_noise(model):
    same = tiny.prompt(KIND, 1)
    output = tiny.edit(
        model, KIND, source=same, edit=same, sampler_name="euler_ancestral", latent_image=tiny.latent(16, 8, 2), cfg=1.0
    )
    assert torch.equal(output.edited, output.source)
    assert tiny.relative(output.source[:1], output.source[1:]) > 0.1


@pytest.mark.parametrize("name", ["dpmpp_sde", "dpmpp_2m_sde", "euler_ancestral", "uni_pc", "lcm"])
def test_a_single_step_works_as_in_comfyui(name, model):
    output = tiny.edit(model, KIND, sampler_name=name, steps=1, latent_image=SMALL)
    assert torch.isfinite(output.edited).all()
    assert torch.isfinite(output.source).all()


def _with_noise_of_its_own(model, x, sigmas, extra_args=None, callback=None, disable=None):
    return x + torch.randn_like(x)


REFUSED = {
    "with_noise_of_its_own": comfy.samplers.KSAMPLER(_with_noise_of_its_own),
    "euler with s_churn > 0": comfy.samplers.ksampler("euler", {"s_churn": 1.0}),
    "Sampler": comfy.samplers.Sampler(),
}


@pytest.mark.parametrize("name", REFUSED)
def test_a_sampler_whose_noise_cannot_be_shared_is_refused_by_name(name, model):
    with pytest.raises(ValueError, match=rf"^sampler: _?{name} draws noise that cannot be shared .* accepted are"):
        tiny.edit(model, KIND, sampler=REFUSED[name], latent_image=SMALL)


def test_the_sampler_that_was_given_is_not_changed():
    given = comfy.samplers.sampler_object("dpmpp_sde")
    noise, rows = torch.zeros(2, 4, 8, 8), PairedRows(1, 1)
    ours = paired_sampler(given, rows, noise, torch.tensor([1.0, 0.5, 0.0]), 0, torch.device("cpu"))
    assert given.extra_options == {}
    assert set(ours.extra_options) == {"noise_sampler"}
