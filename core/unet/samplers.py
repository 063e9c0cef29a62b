"""Samplers whose paired rows share their noise, so that a source and its edit differ only where they should."""

from __future__ import annotations

import inspect
from collections.abc import Callable
from typing import Any

import comfy.k_diffusion.sampling
import comfy.samplers
import torch

from .rows import PairedRows

_DETERMINISTIC = {
    "sample_euler", "sample_euler_cfg_pp", "sample_heun", "sample_heunpp2", "sample_dpm_2", "sample_lms",
    "dpm_fast_function", "dpm_adaptive_function", "sample_dpmpp_2m", "sample_dpmpp_2m_cfg_pp", "sample_ipndm",
    "sample_ipndm_v", "sample_deis", "sample_gradient_estimation", "sample_gradient_estimation_cfg_pp",
    "sample_unipc", "sample_unipc_bh2", "replay",
}  # fmt: skip


def paired_sampler(
    sampler: Any, rows: PairedRows, noise: torch.Tensor, sigmas: torch.Tensor, seed: int, device: Any
) -> Any:
    """The same SAMPLER, drawing one noise for each source and the edits that come from it.

    noise: [total, C, h, w], for its shape. ValueError names a sampler that draws noise in a way that cannot be shared.
    """
    function = getattr(sampler, "sampler_function", None)
    if function is None:
        raise ValueError(_refusal(type(sampler).__name__))
    name = function.__name__
    options = dict(sampler.extra_options)
    if name in _DETERMINISTIC:
        if options.get("s_churn", 0):
            raise ValueError(_refusal(f"{name.removeprefix('sample_')} with s_churn > 0"))
    elif "noise_sampler" in inspect.signature(function).parameters:
        options["noise_sampler"] = _PairedNoise(rows, _noise_source(name, noise[rows.edits :], sigmas, seed, device))
    else:
        raise ValueError(_refusal(name.removeprefix("sample_")))
    # "random" inpainting noise would differ between rows; the run's own noise is shared
    inpaint = {k: v for k, v in sampler.inpaint_options.items() if k != "random"}
    return comfy.samplers.KSAMPLER(function, options, inpaint)


def _refusal(name: str) -> str:
    return (
        f"sampler: {name} draws noise that cannot be shared between the source and its edit; accepted are the samplers "
        "without noise (euler, heun, dpmpp_2m, uni_pc, …) and those that take a noise sampler (euler_ancestral, "
        "dpmpp_sde, lcm, …)"
    )


class _PairedNoise:
    def __init__(self, rows: PairedRows, draw: Callable[[Any, Any], torch.Tensor]) -> None:
        self.rows = rows
        self.draw = draw

    def __call__(self, sigma: Any, sigma_next: Any) -> torch.Tensor:
        return self.rows.join(self.draw(sigma, sigma_next))


def _noise_source(
    name: str, like: torch.Tensor, sigmas: torch.Tensor, seed: int, device: Any
) -> Callable[[Any, Any], torch.Tensor]:
    """What ComfyUI's own sampler of this name would draw for the sources alone."""
    like = torch.zeros(like.shape, dtype=torch.float32, device=device)
    tree = getattr(comfy.k_diffusion.sampling, "BrownianTreeNoiseSampler", None)
    positive = sigmas[sigmas > 0]
    if tree is not None and "sde" in name and name != "sample_er_sde" and len(positive):
        on_cpu = not name.endswith("_gpu")
        return tree(like, positive.min().to(device), sigmas.max().to(device), seed=seed, cpu=on_cpu)
    generator = torch.Generator(device=like.device).manual_seed(seed)
    return lambda *_: torch.randn(like.shape, generator=generator, device=like.device)
