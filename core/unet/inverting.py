"""Making trajectories with ComfyUI's sampling: a generation recorded, a picture inverted."""

from __future__ import annotations

import hashlib
import logging
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, TypeVar

import comfy.conds
import comfy.latent_formats
import comfy.model_management
import comfy.sample
import comfy.samplers
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..inversion import CONVENTIONS, ddim_inversion, leading_timesteps, noise_map_inversion, solver
from ..null_text import null_text_inversion
from ..trajectory import Conditioning, ModelMark, Trajectory
from .gradients import gradients, ordinary
from .inputs import checked_latent, model_sigmas
from .layers import context_width

log = logging.getLogger(__name__)

KEY = "scalpel.record"
DDIM_LEADING = "ddim_leading"
SCHEDULERS = (*comfy.samplers.KSampler.SCHEDULERS, DDIM_LEADING)
T = TypeVar("T")


def model_mark(model: Any) -> ModelMark:
    """What a trajectory remembers of a MODEL."""
    family = f"{type(model.model.model_config).__name__}, text width {context_width(model)}"
    return ModelMark(family, _fingerprint(model), _format_name(model.get_model_object("latent_format")))


def _fingerprint(model: Any) -> str:
    """Of the UNet's first weights, as half precision: enough to tell checkpoints apart."""
    unet = model.get_model_object("diffusion_model")
    weight = unet.input_blocks[0][0].weight.detach().to("cpu", torch.float16).contiguous()
    return hashlib.sha256(weight.numpy().tobytes()).hexdigest()[:16]


def _format_name(latent_format: Any) -> str:
    """The name of the latent format in ComfyUI's own list."""
    classes = type(latent_format).__mro__
    return next((c.__name__ for c in classes if c.__module__ == comfy.latent_formats.__name__), classes[0].__name__)


def inversion_sigmas(model: Any, scheduler: str, steps: int) -> torch.Tensor:
    """The schedule to invert on, falling: one of ComfyUI's, or `ddim_leading`."""
    if scheduler == DDIM_LEADING:
        sampling = model.get_model_object("model_sampling")
        timesteps = leading_timesteps(steps, CONVENTIONS[DDIM_LEADING], len(sampling.sigmas))
        sigmas: torch.Tensor = sampling.sigma(torch.tensor(timesteps, dtype=torch.float32)).float().cpu()
        if not torch.isfinite(sigmas).all():
            raise ValueError(f"scheduler: this model's noise levels have no timesteps, which {DDIM_LEADING} needs")
        return sigmas
    return model_sigmas(model, "euler", scheduler, steps, 1.0)


# ---------------------------------------------------------------- recording


def record(
    model: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Conditioning,
    negative: Conditioning, latent: dict[str, Any], denoise: float,
) -> tuple[torch.Tensor, Trajectory]:  # fmt: skip
    """What KSampler makes of these settings, bit for bit, and its trajectory."""
    samples = checked_latent(model, latent)
    seen = _Recorder()
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, seen)
    result = comfy.sample.sample(
        patched,
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        steps, cfg, sampler_name, scheduler, positive, negative, samples,
        denoise=denoise,
        noise_mask=latent.get("noise_mask"),
        callback=latent_preview.prepare_callback(patched, steps),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=seed,
    )  # fmt: skip
    if len(seen.levels) < 2:
        raise ValueError("denoise: there is no step to record; accepted are values above 0, with steps of 1 or more")
    return result, Trajectory(
        "recorded", model_mark(model), seen.sigmas, torch.tensor(seen.levels), torch.stack(seen.latents), positive,
        negative, cfg, sampler_name, scheduler, seed=seed,
    )  # fmt: skip


class _Recorder:
    """OUTER_SAMPLE wrapper: keeps the latent of every evaluation of one run, and the last."""

    def __init__(self) -> None:
        self.sigmas = torch.empty(0)
        self.levels: list[float] = []
        self.latents: list[torch.Tensor] = []

    def __call__(self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: torch.Tensor, *args: Any,
                 **kwargs: Any) -> Any:  # fmt: skip
        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, self._evaluation, options)
        add_wrapper_with_key(WrappersMP.SAMPLER_SAMPLE, KEY, self._sampling, options)
        self.sigmas = sigmas.float().cpu().clone()  # uni_pc changes its own
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)

    def _evaluation(self, executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        self._keep(float(timestep.flatten()[0]), x)
        return executor(x, timestep, *args, **kwargs)

    def _sampling(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        result = executor(*args, **kwargs)
        self._keep(float(self.sigmas[-1]), result)
        return result

    def _keep(self, sigma: float, x: torch.Tensor) -> None:
        self.levels.append(sigma)
        self.latents.append(x.detach().float().cpu().clone())


# ---------------------------------------------------------------- inverting


@dataclass(frozen=True)
class _Run:
    """ComfyUI's sampling as an inversion sees it: the model loaded, the prompts prepared."""

    guider: Any
    options: dict[str, Any]
    clean: torch.Tensor
    callback: Callable[..., None]
    steps: int

    def denoise(self, x: torch.Tensor, sigma: float) -> torch.Tensor:
        """x₀ as the guider predicts it, with its cfg."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        result: torch.Tensor = self.guider(x, x.new_full((len(x),), sigma), **self.options)
        return result

    def progress(self, step: int, denoised: torch.Tensor, x: torch.Tensor) -> None:
        """Progress and preview; a point at which the run can be cancelled."""
        self.callback(step, denoised, x, self.steps)

    def predict(self, x: torch.Tensor, sigma: float, name: str, embedding: torch.Tensor | None = None) -> torch.Tensor:
        """x₀ by the conds of this name alone, with another embedding in the place of theirs."""
        comfy.model_management.throw_exception_if_processing_interrupted()
        conds = self.guider.conds[name]
        if embedding is not None:
            conds = with_embedding(conds, embedding)
        return comfy.samplers.calc_cond_batch(  # type: ignore[no-any-return]
            self.guider.inner_model, [conds], x, x.new_full((len(x),), sigma), self.options["model_options"]
        )[0]


def with_embedding(conds: list[dict[str, Any]], embedding: torch.Tensor) -> list[dict[str, Any]]:
    """Conds as ComfyUI prepared them, with another text embedding [rows, tokens, width] where theirs lies: ComfyUI puts
    no two conds into one call that lie on different devices.
    """
    found = []
    for entry in conds:
        own = entry["model_conds"]["c_crossattn"].cond
        other = comfy.conds.CONDCrossAttn(embedding.to(own.device))
        found.append({**entry, "model_conds": {**entry["model_conds"], "c_crossattn": other}})
    return found


class _Body(comfy.samplers.Sampler):
    """A "sampler" that runs an inversion and hands the picture back."""

    def __init__(self, body: Callable[[_Run], Any]) -> None:
        self.body = body
        self.result: Any = None

    def sample(
        self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, *_: Any, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        clean = torch.zeros_like(noise) if latent_image is None else latent_image
        self.result = self.body(_Run(model_wrap, extra_args, clean, callback, len(sigmas) - 1))
        return clean


def _run(
    model: Any, positive: Conditioning, negative: Conditioning, cfg: float, latent: dict[str, Any],
    sigmas: torch.Tensor, body: Callable[[_Run], T],
) -> T:  # fmt: skip
    """Run an inversion where ComfyUI's samplers run."""
    samples, sampler = checked_latent(model, latent, "latent"), _Body(body)
    patched = model.clone()
    comfy.sample.sample_custom(
        patched, torch.zeros_like(samples), cfg, sampler, sigmas, positive, negative, samples,
        callback=latent_preview.prepare_callback(patched, len(sigmas) - 1), disable_pbar=True, seed=0,
    )  # fmt: skip
    return sampler.result  # type: ignore[no-any-return]


def _kept(tensor: torch.Tensor) -> torch.Tensor:
    return tensor.detach().float().cpu()


def invert_ddim(
    model: Any, positive: Conditioning, latent: dict[str, Any], sigmas: torch.Tensor, scheduler: str, refine_steps: int
) -> Trajectory:
    """DDIM inversion by the prompt, without guidance."""

    def body(run: _Run) -> torch.Tensor:
        convention = CONVENTIONS.get(scheduler, CONVENTIONS["comfyui"])
        return ddim_inversion(
            run.denoise, run.clean, sigmas, refine_steps, convention.evaluated_at, run.progress
        )  # fmt: skip

    latents = _kept(_run(model, positive, [], 1.0, latent, sigmas, body))
    return Trajectory("ddim", model_mark(model), sigmas, sigmas, latents, positive, scheduler=scheduler)


def invert_noise_maps(
    model: Any, positive: Conditioning, negative: Conditioning | None, cfg: float, latent: dict[str, Any],
    sigmas: torch.Tensor, scheduler: str, skipped: int, kind: str, step: str, eta: float, seed: int,
) -> Trajectory:  # fmt: skip
    """Noise maps of a solver's steps under these prompts and guidance (see `core/inversion.py`).

    skipped: how many of the schedule's first steps `sigmas` is without.
    """
    samples, indices = checked_latent(model, latent, "latent"), latent.get("batch_index")
    steps = len(sigmas) - 1
    noise = comfy.sample.prepare_noise(samples.repeat(1, steps, 1, 1), seed, indices)
    noise = noise.unflatten(1, (steps, -1)).transpose(0, 1)

    def body(run: _Run) -> tuple[torch.Tensor, torch.Tensor]:
        return noise_map_inversion(
            run.denoise, run.clean, noise.to(run.clean), sigmas, solver(step, eta), run.progress
        )  # fmt: skip

    latents, maps = _run(model, positive, negative or [], cfg, latent, sigmas, body)
    return Trajectory(
        kind, model_mark(model), sigmas, sigmas, _kept(latents), positive, negative, cfg, scheduler=scheduler,
        skipped=skipped, seed=seed, noise_maps=_kept(maps), solver=step, eta=eta,
    )  # fmt: skip


def invert_null_text(
    model: Any, positive: Conditioning, negative: Conditioning, latent: dict[str, Any], sigmas: torch.Tensor,
    scheduler: str, cfg: float, inner_steps: int, learning_rate: float,
) -> Trajectory:  # fmt: skip
    """Null-text inversion: a DDIM inversion, then an embedding of the negative prompt for each step."""

    def body(run: _Run) -> tuple[torch.Tensor, torch.Tensor]:
        # the bar moves once a step of either half
        run = replace(run, steps=2 * run.steps)
        track = ddim_inversion(
            lambda x, sigma: run.predict(x, sigma, "positive"), run.clean, sigmas, on_step=run.progress
        )  # fmt: skip
        context = run.guider.conds["negative"][0]["model_conds"]["c_crossattn"].cond.to(run.clean.device)
        start = context.expand(len(run.clean), -1, -1)
        log.info(
            "Scalpel: optimising the negative prompt of %d steps, %d updates at most each", run.steps // 2, inner_steps
        )
        with gradients():
            found = null_text_inversion(
                lambda x, sigma: run.predict(x, sigma, "positive"),
                lambda x, sigma, embedding: run.predict(x, sigma, "negative", embedding),
                ordinary(track), sigmas, ordinary(start).float(), cfg, inner_steps, learning_rate,
                lambda i, denoised, x, _: run.progress(run.steps // 2 + i, denoised, x),
                comfy.model_management.throw_exception_if_processing_interrupted,
            )  # fmt: skip
        return found.latents, found.uncond

    latents, uncond = _run(model, positive, negative, cfg, latent, sigmas, body)
    return Trajectory(
        "null-text", model_mark(model), sigmas, sigmas, _kept(latents), positive, negative, cfg, scheduler=scheduler,
        uncond=_kept(uncond),
    )  # fmt: skip
