"""Null-text inversion (Mokady 2023): embeddings of the negative prompt that keep guided sampling on its track."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F

FIRST_BOUND, GROWTH = 1e-5, 1e-3
"""A step is done once its loss is below 1e-5 + 1e-3 · (fraction of the steps done); the authors' 2e-5 a step of 50."""
DECAY = 0.5
"""By the last step the learning rate has fallen to half, as the authors' has over 50 steps."""


@dataclass(frozen=True)
class NullText:
    """latents: [steps + 1, rows, …] of the guided sampling, the clean one last; uncond: [steps, rows, tokens, width];
    losses: of each step, before its last update, mean over the rows; inner: how many evaluations with gradient each
    step took.
    """

    latents: torch.Tensor
    uncond: torch.Tensor
    losses: list[float]
    inner: list[int]


def null_text_inversion(
    denoise: Callable[[torch.Tensor, float], torch.Tensor],
    denoise_unconditionally: Callable[[torch.Tensor, float, torch.Tensor], torch.Tensor],
    track: torch.Tensor,
    sigmas: torch.Tensor,
    uncond: torch.Tensor,
    cfg: float,
    inner_steps: int,
    learning_rate: float,
    on_step: Callable[[int, torch.Tensor, torch.Tensor, float], None] | None = None,
    on_evaluation: Callable[[], None] | None = None,
) -> NullText:
    """Embeddings for each step of an Euler (DDIM) run under guidance that follows `track`.

    denoise(x, sigma): x₀ by the positive prompt; denoise_unconditionally(x, sigma, embedding): by the embedding [rows,
    tokens, width], differentiable. track: [steps + 1, rows, …] at `sigmas`, the clean one last. uncond: [rows, tokens,
    width], where the first step's optimisation starts; each further step starts where the one before ended. A row's
    loss is the mean square error of its next latent, as z = x / √(1 + σ²); it stops by itself. Callbacks may raise to
    cancel. Needs ordinary tensors outside `torch.inference_mode`.
    """
    levels = [float(s) for s in sigmas]
    steps = len(levels) - 1
    x, latents, found, losses, inner = track[0], [track[0]], [], [], []
    for i, (sigma, following) in enumerate(pairwise(levels)):
        with torch.no_grad():
            wanted = denoise(x, sigma)
        scale = (1 + following**2) ** -0.5

        def next_latent(nothing: torch.Tensor) -> torch.Tensor:
            guided = nothing + cfg * (wanted - nothing)  # noqa: B023 - called within this turn only
            return guided + following / sigma * (x - guided)  # noqa: B023

        embedding = uncond.detach().clone().requires_grad_()
        optimiser = torch.optim.Adam([embedding], learning_rate * (1 - DECAY * i / steps))
        evaluations, done = 0, torch.zeros(len(x), dtype=torch.bool, device=x.device)
        while evaluations < inner_steps and not done.all():
            if on_evaluation is not None:
                on_evaluation()
            nothing = denoise_unconditionally(x, sigma, embedding)
            missed = F.mse_loss(next_latent(nothing) * scale, track[i + 1] * scale, reduction="none")
            errors = missed.flatten(1).mean(1)  # of each picture, which are optimised side by side
            if not errors.requires_grad:
                raise ValueError(
                    "model: its attention has no backward pass (sage attention has none); start ComfyUI with another "
                    "(--use-pytorch-cross-attention)"
                )
            embedding.grad = scaled_gradient(errors.sum(), embedding, 2.0 ** missed[0].numel().bit_length())
            before = embedding.detach().clone()
            optimiser.step()
            with torch.no_grad():
                embedding[done] = before[done]
            evaluations += 1
            done |= errors.detach() < FIRST_BOUND + GROWTH * i / steps
        uncond = embedding.detach()
        with torch.no_grad():
            x = next_latent(denoise_unconditionally(x, sigma, uncond))
        latents.append(x)
        found.append(uncond)
        losses.append(errors.mean().item())
        inner.append(evaluations)
        if on_step is not None:
            on_step(i, wanted, x, losses[-1])
    return NullText(torch.stack(latents), torch.stack(found), losses, inner)


def scaled_gradient(error: torch.Tensor, leaf: torch.Tensor, scale: float) -> torch.Tensor:
    """The gradient of an error, brought through a half-precision model `scale` times as large, or less if that is too
    large: small ones would round to 0 there.
    """
    while True:
        (gradient,) = torch.autograd.grad(error * scale, leaf, retain_graph=True)
        if scale <= 1 or torch.isfinite(gradient).all():
            return gradient / scale
        scale /= 16
