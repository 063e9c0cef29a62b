"""Using trajectories in ComfyUI's sampling: played back by a sampler, or as rows of a batch that is being edited."""

from __future__ import annotations

import inspect
import logging
from itertools import pairwise
from typing import Any

import comfy.latent_formats
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..inversion import solver
from ..trajectory import Playback, Trajectory, clean_scale, same_schedule
from .inverting import model_mark, with_embedding
from .rows import PairedRows

log = logging.getLogger(__name__)

KEY = "scalpel.replay"


def check_trajectory(trajectory: Trajectory, model: Any, name: str = "trajectory") -> None:
    """ValueError if the trajectory was made with a model of another family; a warning if with another checkpoint."""
    mark = model_mark(model)
    for what, own, given in (
        ("model family", trajectory.model.family, mark.family),
        ("latent format", trajectory.model.latent_format, mark.latent_format),
    ):
        if own != given:
            raise ValueError(
                f"{name}: it was made with a model of another {what} ({own}) than this one ({given}); make it again "
                "with this model"
            )
    if trajectory.sampler not in comfy.samplers.KSampler.SAMPLERS:
        raise ValueError(
            f"{name}: it was recorded with the sampler {trajectory.sampler!r}, which this ComfyUI does not have; "
            "update ComfyUI, or make the trajectory again"
        )
    if trajectory.model.fingerprint != mark.fingerprint:
        log.warning("Scalpel: the trajectory was made with another checkpoint; the source will not come out as it was")


def start_latent(trajectory: Trajectory) -> dict[str, Any]:
    """x_T as a LATENT in ComfyUI's convention, for a sampler that adds no noise."""
    latent_format = getattr(comfy.latent_formats, trajectory.model.latent_format, None)
    if latent_format is None:
        raise ValueError(f"trajectory: this ComfyUI does not know its latent format {trajectory.model.latent_format!r}")
    return {"samples": latent_format().process_out(trajectory.start)}


def function_of(sampler: Any) -> str:
    """The name of a SAMPLER's function, "" where there is none."""
    return getattr(getattr(sampler, "sampler_function", None), "__name__", "")


def playback(trajectory: Trajectory, sigmas: torch.Tensor, sampler: Any) -> Playback:
    """What a run on these sigmas with this SAMPLER reads."""
    own = function_of(comfy.samplers.sampler_object(trajectory.sampler))
    return Playback(trajectory, same_schedule(trajectory.sigmas, sigmas) and function_of(sampler) == own)


# ---------------------------------------------------------------- null-text


class NullTextEmbeddings:
    """OUTER_SAMPLE wrapper: in every step of a run the negative prompt has its own embedding.

    rows: which of the trajectory's images each row of the batch is; None: they are in order.
    """

    def __init__(self, trajectory: Trajectory, rows: tuple[int, ...] | None = None) -> None:
        self.trajectory = trajectory
        self.rows = rows

    def __call__(self, executor: Any, *args: Any, **kwargs: Any) -> Any:
        guider, trajectory, rows = executor.class_obj, self.trajectory, self.rows
        assert trajectory.uncond is not None
        embeddings = trajectory.uncond

        def evaluate(
            executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, *more: Any
        ) -> Any:  # fmt: skip
            own = embeddings[trajectory.step_of(float(timestep.flatten()[0]))]
            own = own if rows is None else own[list(rows)]
            negative = guider.conds.get("negative")
            conds = [with_embedding(c, own) if c is not None and c is negative else c for c in conds]
            return executor(model, conds, x, timestep, *more)

        options = guider.model_options.setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, evaluate, options)
        return executor(*args, **kwargs)


def replay_model(model: Any, trajectory: Trajectory) -> Any:
    """The MODEL that plays the trajectory back: with null-text embeddings if it has them."""
    patched = model.clone()
    if trajectory.uncond is not None:
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, NullTextEmbeddings(trajectory))
    return patched


# ---------------------------------------------------------------- a sampler


def replay_sampler(trajectory: Trajectory) -> Any:
    """The SAMPLER that plays the trajectory back, from its own x_T to the last bit, whatever noise and seed it gets.

    With noise maps it takes the solver's steps and adds them, and wants the trajectory's own sigmas; otherwise it is
    the sampler that was recorded.
    """
    recorded = comfy.samplers.sampler_object(trajectory.sampler)

    def sample(
        model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any = None,
        disable: Any = None, noise_sampler: Any = None, **options: Any,
    ) -> torch.Tensor:  # fmt: skip
        if noise_sampler is not None and "noise_sampler" in inspect.signature(recorded.sampler_function).parameters:
            options["noise_sampler"] = noise_sampler
        check_latent_size(trajectory, (x.shape[-2], x.shape[-1]))
        start = trajectory.at(float(sigmas[0]))[trajectory.image_of(len(x))].to(x)
        extra_args = {**extra_args, "seed": trajectory.seed}
        if trajectory.noise_maps is None:
            result = recorded.sampler_function(
                model, start, sigmas.clone(), extra_args=extra_args, callback=callback, disable=disable, **options
            )
        else:
            result = _add_noise_maps(trajectory, model, start, sigmas, extra_args, callback)
        return result / clean_scale(sigmas) if same_schedule(trajectory.sigmas, sigmas) else result

    sample.__name__ = "replay" if trajectory.noise_maps is not None else function_of(recorded)
    return comfy.samplers.KSAMPLER(sample, dict(recorded.extra_options), dict(recorded.inpaint_options))


def _add_noise_maps(
    trajectory: Trajectory, model: Any, x: torch.Tensor, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any
) -> torch.Tensor:
    assert trajectory.noise_maps is not None
    if not same_schedule(trajectory.sigmas, sigmas):
        raise ValueError(
            f"sigmas: they have {len(sigmas) - 1} steps from {float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}, and "
            f"the trajectory's noise maps hold for its own {trajectory.steps} from {float(trajectory.sigmas[0]):.4g} "
            f"to {float(trajectory.sigmas[-1]):.4g}; connect the sigmas of Replay Trajectory"
        )
    step, levels = solver(trajectory.solver, trajectory.eta), trajectory.sigmas.tolist()
    for i, (sigma, following) in enumerate(pairwise(levels)):
        denoised = model(x, x.new_full((len(x),), sigma), **extra_args)
        mean, _ = step(x, denoised, sigma, following)
        x = mean + trajectory.noise_maps[i][trajectory.image_of(len(x))].to(x)
        if callback is not None:
            callback({"x": x, "i": i, "sigma": sigma, "sigma_hat": sigma, "denoised": denoised})
    return x


def check_latent_size(trajectory: Trajectory, size: tuple[int, int], name: str = "latent_image") -> None:
    """ValueError unless a latent has the trajectory's (height, width)."""
    if size != trajectory.size:
        own, given = (f"{8 * w} × {8 * h}" for h, w in (trajectory.size, size))
        raise ValueError(
            f"{name}: it is a picture of {given}, and the trajectory's is {own}; give the latent that the "
            "trajectory came with"
        )


# ---------------------------------------------------------------- rows of a batch


class RecordedSource:
    """OUTER_SAMPLE wrapper: the source rows of a batch look as recorded at every evaluation of the model.

    The sampler may move its rows as it likes: what it has made the edits differ from their source by, is what they
    differ from the record by. So whatever the source row loses to an inversion's error is given back to the edits too,
    and without any edit they are the record. On the recorded run itself it changes nothing.
    """

    def __init__(self, trajectory: Trajectory, rows: PairedRows) -> None:
        self.trajectory = trajectory
        self.rows = rows

    def __call__(self, executor: Any, noise: Any, latent: Any, sampler: Any, sigmas: torch.Tensor, *args: Any,
                 **kwargs: Any) -> Any:  # fmt: skip
        record, rows = playback(self.trajectory, sigmas, sampler), self.rows

        def evaluate(
            executor: Any, x: torch.Tensor, timestep: torch.Tensor, *args: Any, **kwargs: Any
        ) -> torch.Tensor:  # fmt: skip
            recorded = rows.join(record.next(float(timestep.flatten()[0])).to(x))
            sampled = rows.join(x[rows.edits :])
            denoised: torch.Tensor = executor(recorded + (x - sampled), timestep, *args, **kwargs)
            return denoised - (recorded - sampled)

        options = executor.class_obj.model_options.setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.PREDICT_NOISE, KEY, evaluate, options)
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)


def ride_along(patched: Any, trajectory: Trajectory, rows: PairedRows) -> None:
    """Let a trajectory be the source rows of every run of this MODEL clone, with its null-text embeddings if any."""
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, f"{KEY}.source", RecordedSource(trajectory, rows))
    if trajectory.uncond is not None:
        own = (*rows.source_of, *range(rows.sources))
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, NullTextEmbeddings(trajectory, own))
