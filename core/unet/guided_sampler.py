"""Samplers whose latent may be moved: before each of their evaluations of the model, and at the end."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import comfy.samplers
import torch

from .replay import function_of

SAMPLERS = frozenset({
    "ddpm", "deis", "dpm_2", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu", "dpmpp_3m_sde",
    "dpmpp_3m_sde_gpu", "dpmpp_sde", "dpmpp_sde_gpu", "euler", "euler_ancestral", "euler_ancestral_cfg_pp",
    "euler_cfg_pp", "gradient_estimation", "ipndm", "ipndm_v", "lcm", "lms", "res_multistep", "res_multistep_cfg_pp",
})  # fmt: skip
"""Those that show the model their own latent at the start of each step, and go on with it: moved, it stays moved.
(heun, dpm_2_ancestral and dpmpp_2s_ancestral show it a trial point at the next step's noise level first.)
"""


def guided_sampler(
    sampler: Any, before: Callable[..., None], after: Callable[[torch.Tensor], torch.Tensor], given_as: str = "sampler"
) -> Any:
    """The same SAMPLER, whose every evaluation of the model is preceded by `before(x, sigma, arguments)`, which may
    change x in place, and whose result is what `after` makes of it. ValueError names a sampler that would not notice,
    and the input that it was `given_as`.
    """
    function = getattr(sampler, "sampler_function", None)
    name = sampler_name(sampler)
    if function is None or name not in SAMPLERS:
        raise ValueError(
            f"{given_as}: {name} does not show its own latent at each step and go on with it, which must be changed "
            f"between the steps; accepted are {', '.join(sorted(SAMPLERS))}"
        )
    if sampler.extra_options.get("s_churn") or sampler.extra_options.get("r", 0.5) >= 1:
        raise ValueError(
            f"{given_as}: {name} is set to s_churn above 0, or r of 1 or more, and then shows other points than its "
            "latent at the noise levels of the schedule; leave them as they were"
        )

    def sample(model: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return after(function(_Guided(model, before), x, *args, **kwargs))

    sample.__name__ = function.__name__
    return comfy.samplers.KSAMPLER(sample, dict(sampler.extra_options), dict(sampler.inpaint_options))


def sampler_name(sampler: Any) -> str:
    """What a SAMPLER's function is called, as ComfyUI lists it."""
    return function_of(sampler).removeprefix("sample_") or type(sampler).__name__


class _Guided:
    """A sampler's model that lets its latent be changed before it is evaluated."""

    def __init__(self, model: Any, before: Callable[..., None]) -> None:
        self._model = model
        self._before = before

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._before(x, float(sigma.flatten()[0]), kwargs)
        return self._model(x, sigma, **kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)
