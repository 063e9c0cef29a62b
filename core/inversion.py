"""Inversions: from a clean latent to the latents (and noise maps) from which sampling comes back to it.

All in the variance-exploding space of ComfyUI's samplers, x = z · √(1 + σ²), where a DDIM step is Euler's
x + (σ′ − σ) · ε. Models are given as functions denoise(x, sigma) → x₀; schedules fall.

What programs do differently is in `CONVENTIONS`; a schedule that ends at σ > 0 has the clean latent live there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from itertools import pairwise
from typing import Protocol

import torch

from .trajectory import clean_scale

Denoise = Callable[[torch.Tensor, float], torch.Tensor]
OnStep = Callable[[int, torch.Tensor, torch.Tensor], None]
"""Called after each step with its number, x₀ as predicted, and x; may raise to cancel."""


@dataclass(frozen=True)
class Convention:
    """offset: the timestep of the last step (diffusers' `steps_offset`); ends_at: the timestep at whose noise level the
    schedule ends and the clean latent lives, None for σ = 0; evaluated_at: whether ε of an inversion step is evaluated
    with the noise level that the step goes to ("next") or comes from ("own").
    """

    offset: int
    ends_at: int | None
    evaluated_at: str = "next"


CONVENTIONS = {
    "comfyui": Convention(1, None),
    "ddim_leading": Convention(1, 0),
    "ddim_own_loop": Convention(0, 0),
    "sd2_inversion": Convention(1, 0, "own"),
}
""""comfyui": every schedule of ComfyUI, which has its own timesteps, `ddim_uniform` those of offset 1. "ddim_leading":
diffusers' pipelines with `set_alpha_to_one=False`, which MAG-Edit, CPAM and MasaCtrl run for SD1.x. "ddim_own_loop":
Prompt-to-Prompt's, whose timesteps end at 0. "sd2_inversion": CPAM's for SD2.1.
"""


def leading_timesteps(steps: int, convention: Convention, trained: int = 1000) -> list[int]:
    """Timesteps spaced as diffusers' "leading" does, falling, with the one at which the schedule ends."""
    if not 1 <= steps <= trained:
        raise ValueError(f"steps: {steps} is out of range; accepted are numbers from 1 to {trained}")
    spacing = trained // steps
    falling = [i * spacing + convention.offset for i in reversed(range(steps))]
    return falling if convention.ends_at is None else [*falling, convention.ends_at]


# ---------------------------------------------------------------- DDIM


def ddim_inversion(
    denoise: Denoise, clean: torch.Tensor, sigmas: torch.Tensor, refine_steps: int = 0, evaluated_at: str = "next",
    on_step: OnStep | None = None,
) -> torch.Tensor:  # fmt: skip
    """DDIM backwards (Song 2020): latents [steps + 1, …] at `sigmas`, the clean one last.

    Each step needs ε at the noisier end, which is not known yet: it is evaluated for the latent at the clearer end, as
    if it were as noisy as the other ("next"). refine_steps: so many accelerated fixed-point iterations then solve for
    the latent from which the sampling step comes back, each with one more evaluation.
    """
    levels = [float(s) for s in sigmas]
    x = clean * clean_scale(sigmas)
    latents = [x]
    for low in range(len(levels) - 1, 0, -1):
        here, there = levels[low], levels[low - 1]
        label = there if evaluated_at == "next" or here == 0 else here
        predicted = x * ((1 + label**2) / (1 + here**2)) ** 0.5
        denoised = denoise(predicted, label)
        noisier = x + (there - here) * (predicted - denoised) / label

        def solved_once(guess: torch.Tensor) -> torch.Tensor:
            return x + (there - here) * (guess - denoise(guess, there)) / there  # noqa: B023 - within this turn only

        x = _fixed_point(solved_once, noisier, refine_steps)
        latents.append(x)
        if on_step is not None:
            on_step(len(levels) - 1 - low, denoised, x)
    return torch.stack(latents[::-1])


def _fixed_point(
    function: Callable[[torch.Tensor], torch.Tensor], guess: torch.Tensor, iterations: int
) -> torch.Tensor:
    """x with x = function(x), by as many evaluations; Anderson's acceleration over the last three of them."""
    guesses: list[torch.Tensor] = []
    values: list[torch.Tensor] = []
    for _ in range(iterations):
        guesses, values = [*guesses[-2:], guess], [*values[-2:], function(guess)]
        guess = values[-1]
        misses = [(value - x).cpu().double().flatten() for x, value in zip(guesses, values, strict=True)]
        if not misses[-1].any():
            break
        changes = torch.stack([b - a for a, b in pairwise(misses)]) if misses[1:] else None
        if changes is not None:
            system = changes @ changes.T
            system += 1e-12 * system.trace() * torch.eye(len(system)).to(system)
            shares = torch.linalg.lstsq(system, changes @ misses[-1]).solution
            for share, before, after in zip(shares.tolist(), values, values[1:], strict=False):
                guess = guess - share * (after - before)
    return guess


# ---------------------------------------------------------------- noise maps


class Solver(Protocol):
    """One stochastic step: the mean of x at the next level, and the standard deviation of the noise added to it.

    It may remember what it was given; a new run needs a new one.
    """

    def __call__(
        self, x: torch.Tensor, denoised: torch.Tensor, sigma: float, following: float
    ) -> tuple[torch.Tensor, float]: ...


@dataclass
class DDPMStep:
    """DDIM's step with noise: eta 1 is DDPM's, 0 has none (Song 2020, equation 12)."""

    eta: float = 1.0

    def __call__(
        self, x: torch.Tensor, denoised: torch.Tensor, sigma: float, following: float
    ) -> tuple[torch.Tensor, float]:
        added = self.eta * following * (1 - (following / sigma) ** 2) ** 0.5
        kept = max(following**2 - added**2, 0.0) ** 0.5
        return denoised + kept / sigma * (x - denoised), added


class SDEDPMStep:
    """Second-order SDE-DPM-Solver++, midpoint, as LEDITS++ uses it (Lu 2022; Brack 2024, section 3.1)."""

    def __init__(self) -> None:
        self._earlier: tuple[torch.Tensor, float] | None = None

    def __call__(
        self, x: torch.Tensor, denoised: torch.Tensor, sigma: float, following: float
    ) -> tuple[torch.Tensor, float]:
        earlier, self._earlier = self._earlier, (denoised, sigma)
        ratio = following / sigma  # e^−h, h the step in log σ
        mean = ratio**2 * x + (1 - ratio**2) * denoised
        if earlier is not None and following > 0:
            before, level = earlier
            lengths = torch.tensor([level / sigma, sigma / following], dtype=torch.float64).log()
            mean = mean + 0.5 * (1 - ratio**2) * float(lengths[1] / lengths[0]) * (denoised - before)
        return mean, following * (1 - ratio**2) ** 0.5


def solver(name: str, eta: float) -> Solver:
    """A new solver of this name: "ddpm" or "sde-dpm++"."""
    if name == "ddpm":
        return DDPMStep(eta)
    if name == "sde-dpm++":
        return SDEDPMStep()
    raise ValueError(f"unknown solver {name!r}")


def noise_map_inversion(
    denoise: Denoise, clean: torch.Tensor, noise: torch.Tensor, sigmas: torch.Tensor, step: Solver,
    on_step: OnStep | None = None,
) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
    """Edit-friendly noise maps (Huberman-Spiegelglas 2024, section 3.3).

    noise: [steps, …], independent at each level: x_i = x₀ + σ_i · noise_i. Returns latents [steps + 1, …], the clean
    one last, and what has to be added to the solver's mean after each step, [steps, …] (the paper's σ_t · z_t; in the
    last step, where no noise is added, what remains). Adding it up again gives the same latents to the last bit.
    """
    levels = [float(s) for s in sigmas]
    x = clean + levels[0] * noise[0]
    latents, maps = [x], []
    for i, (sigma, following) in enumerate(pairwise(levels)):
        last = i == len(levels) - 2
        target = clean * clean_scale(sigmas) if last else clean + following * noise[i + 1]
        denoised = denoise(x, sigma)
        mean, _ = step(x, denoised, sigma, following)
        maps.append(target - mean)
        x = mean + maps[-1]  # not the target: rounding must not add up at replay
        latents.append(x)
        if on_step is not None:
            on_step(i, denoised, x)
    return torch.stack(latents), torch.stack(maps)
