"""Gradients through models whose weights are inference tensors, as in ComfyUI's server; null-text inversion."""

from __future__ import annotations

import comfy.samplers
import pytest
import torch
import torch.nn.functional as F

from scalpel.core.null_text import null_text_inversion, scaled_gradient
from scalpel.core.unet import inverting
from scalpel.core.unet.gradients import gradients, ordinary
from scalpel.nodes.inversion import NullTextInversion
from scalpel.tests import tiny
from scalpel.tests.test_inversion import invert, picture, replay

KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
KIND = tiny.SD15


def lora(patcher, strength=0.5):
    """A clone with patches on attention weights, as a LoRA loader makes them."""
    patched = patcher.clone()
    names = [n for n in patcher.model.state_dict() if "attn2.to_k.weight" in n or "attn1.to_q.weight" in n]
    patches = {n: ("diff", (0.3 * tiny.randn(*patcher.model.state_dict()[n].shape, seed=i),))
               for i, n in enumerate(names)}  # fmt: skip
    assert patched.add_patches(patches, strength)
    return patched


def gradient_of_the_prediction(patcher, kind):
    """d(sum of x₀²)/d(context) and d/dx of the positive prompt, computed where samplers run."""

    def body(run):
        with gradients():
            x = ordinary(run.clean).clone().requires_grad_()
            context = ordinary(run.guider.conds["positive"][0]["model_conds"]["c_crossattn"].cond).float().clone()
            context.requires_grad_()
            run.predict(x, 3.0, "positive", context).square().sum().backward()
            return context.grad.clone(), x.grad.clone()

    return inverting._run(patcher, tiny.prompt(kind, 1), [], 1.0, picture(), torch.tensor([1.0, 0.0]), body)


CASES = {"plain": {}, "half precision": {"dtype": torch.float16, "manual_cast": torch.float32}}


@pytest.mark.parametrize("with_lora", [False, True], ids=["no LoRA", "LoRA"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KINDS)
def test_inference_weights_give_the_gradients_of_ordinary_ones(name, case, with_lora):
    kind = KINDS[name]
    found = []
    for inference in (False, True):
        patcher = tiny.model(kind, inference=inference, **CASES[case])
        weights = list(patcher.model.diffusion_model.parameters())
        assert weights[0].is_inference() == inference
        patcher = lora(patcher) if with_lora else patcher
        with torch.inference_mode(inference):
            before = tiny.plain(patcher, kind, steps=1)
            found.append(gradient_of_the_prediction(patcher, kind))
            assert torch.equal(tiny.plain(patcher, kind, steps=1), before)
        assert all(weight.grad is None and weight.is_inference() == inference for weight in weights)
    for ordinary_one, inference_one in zip(*found, strict=True):
        assert ordinary_one.abs().max() > 0
        assert tiny.relative(inference_one, ordinary_one) < 1e-5


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16, torch.bfloat16, torch.int64])
def test_an_ordinary_tensor_shares_the_memory(dtype):
    with torch.inference_mode():
        tensor = torch.ones(3, 4).to(dtype)
    shared = ordinary(tensor)
    assert not shared.is_inference()
    assert shared.data_ptr() == tensor.data_ptr()
    assert ordinary(shared) is shared


def test_outside_nothing_has_changed():
    with torch.inference_mode():
        weight = torch.ones(2, 2)
        with gradients():
            x = torch.ones(1, 2, requires_grad=True)
            F.linear(x, weight).sum().backward()
            assert x.grad is not None
            assert torch.cat([weight, weight]).shape == (4, 2)
        assert torch.is_inference_mode_enabled()
    x = torch.ones(1, 2, requires_grad=True)
    with pytest.raises(RuntimeError, match="Inference tensors cannot be saved"):
        F.linear(x, weight)


# ---------------------------------------------------------------- null-text


def _toy():
    """A model that is told x₀ by its embedding, and a track to follow under guidance."""
    sigmas = torch.tensor([8.0, 4.0, 2.0, 1.0, 0.0])
    wanted = tiny.randn(1, 4, 6, 6, seed=1)
    track = torch.stack([wanted + s * tiny.randn(1, 4, 6, 6, seed=2) for s in sigmas.tolist()])

    def denoise(x, sigma):
        return wanted + 0.1 * torch.tanh(x / (1 + sigma))

    def without_prompt(x, sigma, embedding):
        return wanted + embedding.view(1, 4, 6, 6) + 0.1 * torch.tanh(x / (1 + sigma))

    return denoise, without_prompt, track, sigmas, torch.full((1, 1, 144), 0.3)


def test_the_embeddings_bring_guided_sampling_back_to_the_track():
    denoise, without_prompt, track, sigmas, start = _toy()
    short = null_text_inversion(denoise, without_prompt, track, sigmas, start, 7.5, 1, 1e-6)
    found = null_text_inversion(denoise, without_prompt, track, sigmas, start, 7.5, 100, 0.05)
    assert tiny.relative(found.latents[-1], track[-1]) < 0.1 * tiny.relative(short.latents[-1], track[-1])
    assert found.uncond.shape == (4, 1, 1, 144)
    assert found.latents.shape == track.shape
    assert torch.equal(found.latents[0], track[0])


def test_the_authors_loop_gives_the_same_embeddings():
    """Adam at a rate falling to half, warm starts, the early stop, the loss on z: written out."""
    denoise, without_prompt, track, sigmas, start = _toy()
    found = null_text_inversion(denoise, without_prompt, track, sigmas, start, 3.0, 30, 0.02)
    x, embedding, inner = track[0], start, []
    for i in range(4):
        s, following = sigmas[i], sigmas[i + 1]
        embedding = embedding.detach().clone().requires_grad_()
        adam = torch.optim.Adam([embedding], lr=0.02 * (1 - i / 8))
        for j in range(30):  # noqa: B007 - how many were needed
            guided = without_prompt(x, s, embedding) * (1 - 3.0) + 3.0 * denoise(x, s)
            z = (guided + following * (x - guided) / s) / (1 + following**2) ** 0.5
            loss = ((z - track[i + 1] / (1 + following**2) ** 0.5) ** 2).mean()
            adam.zero_grad()
            loss.backward()
            adam.step()
            if loss.item() < 1e-5 + i / 4 * 50 * 2e-5:
                break
        inner.append(j + 1)
        with torch.no_grad():
            guided = without_prompt(x, s, embedding) * (1 - 3.0) + 3.0 * denoise(x, s)
            x = guided + following * (x - guided) / s
        torch.testing.assert_close(found.uncond[i], embedding.detach(), rtol=1e-3, atol=1e-4)
    assert found.inner == inner
    torch.testing.assert_close(found.latents[-1], x, rtol=1e-3, atol=1e-3)


def test_gradients_that_half_precision_would_round_to_zero_arrive():
    """As through a UNet in fp16: what goes back into it is rounded to half precision."""

    class Half(torch.autograd.Function):
        @staticmethod
        def forward(ctx, value):
            return value.clone()

        @staticmethod
        def backward(ctx, gradient):
            return gradient.half().float()

    for size, missed in ((2**20, 1e-3), (2**8, 1e6)):  # rounded to 0; too large if scaled by all of the latent
        found, exact = torch.zeros(4, requires_grad=True), torch.zeros(4, requires_grad=True)
        for embedding, inside in ((found, Half.apply), (exact, torch.clone)):
            prediction = inside(embedding.repeat(size // 4) * torch.linspace(0.5, 1.5, size))
            error = (prediction - missed).square().mean()
            embedding.grad = scaled_gradient(error, embedding, 2.0 ** size.bit_length())
        assert exact.grad.abs().min() > 0
        assert tiny.relative(found.grad, exact.grad) < 0.01


def test_an_attention_without_backward_pass_is_named():
    denoise, without_prompt, *rest = _toy()
    with pytest.raises(ValueError, match="its attention has no backward pass"):
        null_text_inversion(denoise, lambda *a: without_prompt(*a).detach(), *rest, 3.0, 2, 0.01)


@pytest.mark.parametrize("name", KINDS)
def test_a_null_text_trajectory_is_played_back(name):
    kind = KINDS[name]
    patcher = tiny.model(kind, inference=True)
    with torch.inference_mode():
        before = tiny.plain(patcher, kind)
        trajectory = invert(patcher, NullTextInversion, kind, cfg=7.5)[0]
        made = replay(patcher, trajectory, kind, cfg=7.5)
        assert tiny.relative(made, patcher.get_model_object("latent_format").process_out(trajectory.clean)) < 2e-3
        assert torch.equal(tiny.plain(patcher, kind), before)
    assert trajectory.uncond.shape == (4, 1, 77, tiny.WIDTH)
    assert not torch.equal(trajectory.uncond[0], trajectory.uncond[3])


def test_more_inner_steps_follow_the_picture_more_closely():
    patcher = tiny.model(KIND)
    with torch.inference_mode():
        errors = []
        for inner_steps, rate in ((1, 1e-5), (40, 0.05)):
            settings = {"inner_steps": inner_steps, "learning_rate": rate, "cfg": 2.0, "steps": 8}
            trajectory = invert(patcher, NullTextInversion, **settings)[0]
            errors.append(tiny.relative(trajectory.clean * (1 / 0.18215), picture()["samples"]))
    assert errors[1] < 0.5 * errors[0]


def test_a_cancelled_inversion_leaves_the_model_as_it_was(monkeypatch):
    patcher, calls = tiny.model(KIND, inference=True), []

    def interrupt():
        calls.append(1)
        if len(calls) == 15:
            raise InterruptedError

    with torch.inference_mode():
        before = tiny.plain(patcher, KIND)
        monkeypatch.setattr(comfy.model_management, "throw_exception_if_processing_interrupted", interrupt)
        with pytest.raises(InterruptedError):
            invert(patcher, NullTextInversion)
        monkeypatch.undo()
        assert torch.equal(tiny.plain(patcher, KIND), before)
        assert invert(patcher, NullTextInversion)[0].steps == 4
