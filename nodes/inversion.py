"""Real pictures: four inversions, each of which makes a trajectory."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..core.trajectory import Trajectory
from ..core.unet import inverting
from ..core.unet.inputs import checked_latent
from ..core.unet.layers import layer_table
from ..core.unet.replay import start_latent
from .common import CATEGORY, TrajectoryType, check_conditioning, check_range, schema, seed_input

INVERSION_CATEGORY = f"{CATEGORY}/trajectory"
SCHEDULER_TOOLTIP = (
    "How the noise levels are spread; use the same for the edit. ddim_leading ends a little above zero noise, as the "
    "authors' DDIM does, and is for samplers that take SIGMAS."
)


CAPTION = "What the picture shows. An empty prompt is good; a caption helps to edit words."
NEEDED_CAPTION = "What the picture shows, in a few words; with an empty prompt there is nothing to fit."


def _inputs(caption: str = CAPTION, *, negative: bool = False) -> list[Any]:
    inputs = [
        io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA."),
        io.Conditioning.Input("positive", tooltip=caption),
    ]
    if negative:
        inputs.append(io.Conditioning.Input("negative", tooltip="The negative prompt that the edit will have."))
    return [*inputs, io.Latent.Input("latent", tooltip="The picture, from VAE Encode.")]


def _schedule_inputs() -> list[Any]:
    return [
        io.Int.Input("steps", default=50, min=1, max=1000, tooltip="Steps of the schedule."),
        io.Combo.Input(
            "scheduler", options=list(inverting.SCHEDULERS), default="ddim_uniform", tooltip=SCHEDULER_TOOLTIP
        ),
    ]


def _cfg_input() -> Any:
    return io.Float.Input(
        "cfg", default=7.5, min=1.0, max=100.0, step=0.1, round=0.01,
        tooltip="The guidance that the edit will have.",
    )  # fmt: skip


def _skip_input(default: float) -> Any:
    return io.Float.Input(
        "skip", default=default, min=0.0, max=0.99, step=0.01,
        tooltip="Which fraction of the steps is left out at the noisy end. More keeps more of the picture, and lets "
        "the edit change less. (0.36 and 0.15 in the papers of edit-friendly DDPM and LEDITS++.)",
    )  # fmt: skip


def outputs() -> list[Any]:
    """What every maker of a trajectory gives out."""
    return [
        TrajectoryType.Output(display_name="trajectory", tooltip="The picture at every noise level."),
        io.Latent.Output(display_name="latent", tooltip="The noisiest latent, for a sampler that adds no noise."),
        io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels of the trajectory."),
    ]


def given_out(trajectory: Trajectory, latent: dict[str, Any] | None = None) -> io.NodeOutput:
    """The outputs; what the LATENT says of its rows is passed on, but for a mask: around it samplers would keep x_T."""
    kept = {key: value for key, value in (latent or {}).items() if key != "noise_mask"}
    return io.NodeOutput(trajectory, {**kept, **start_latent(trajectory)}, trajectory.sigmas.clone())


def _schedule(
    model: Any, latent: dict[str, Any], scheduler: str, steps: int, skip: float = 0.0
) -> tuple[torch.Tensor, int]:
    """The checked schedule without the steps that are skipped, and how many these are."""
    check_range("steps", steps, 1, 1000)
    if not 0.0 <= skip < 1.0:
        raise ValueError(f"skip: {skip} is out of range; accepted are numbers from 0 to below 1")
    if scheduler not in inverting.SCHEDULERS:
        raise ValueError(f"scheduler: {scheduler!r} is unknown; accepted are {', '.join(inverting.SCHEDULERS)}")
    layer_table(model)  # refuses models without a U-Net before anything is computed
    if not torch.isfinite(checked_latent(model, latent, "latent")).all():
        raise ValueError(
            "latent: it holds NaN or infinite values; encode the picture again, with --fp32-vae if need be"
        )
    sigmas = inverting.inversion_sigmas(model, scheduler, steps)
    first = round(skip * (len(sigmas) - 1))
    if first > len(sigmas) - 2:
        raise ValueError(f"skip: {skip} leaves none of {len(sigmas) - 1} steps; give a smaller one, or more steps")
    return sigmas[first:], first


class DDIMInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="DDIMInversion",
            display_name="DDIM Inversion",
            category=INVERSION_CATEGORY,
            description="Finds the noise from which a picture would be generated, step by step. Cheap: one UNet row a "
            "step. Exact without guidance if refined; edits follow the record whatever it loses.",
            search_aliases=["invert image", "real image editing", "unsampler"],
            inputs=[
                *_inputs(),
                *_schedule_inputs(),
                io.Int.Input(
                    "refine_steps", default=0, min=0, max=100,
                    tooltip="Fixed-point iterations per step, each one UNet row more: 1 to 3 make the way back without "
                    "guidance nearly exact.",
                ),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent: dict[str, Any], steps: int, scheduler: str, refine_steps: int
    ) -> io.NodeOutput:
        check_range("refine_steps", refine_steps, 0, 100)
        check_conditioning("positive", positive, model)
        sigmas, _ = _schedule(model, latent, scheduler, steps)
        return given_out(inverting.invert_ddim(model, positive, latent, sigmas, scheduler, refine_steps), latent)


class NullTextInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="NullTextInversion",
            display_name="Null-Text Inversion",
            category=INVERSION_CATEGORY,
            description="DDIM inversion, then an embedding of the negative prompt for every step, optimised so that "
            "guided sampling comes back to the picture. Slow: several UNet passes with gradients a step.",
            search_aliases=["invert image", "real image editing", "nti"],
            inputs=[
                *_inputs(NEEDED_CAPTION, negative=True),
                *_schedule_inputs(),
                _cfg_input(),
                io.Int.Input(
                    "inner_steps", default=10, min=1, max=1000,
                    tooltip="At most this many updates of a step's embedding; fewer where it is good enough.",
                ),
                io.Float.Input(
                    "learning_rate", default=0.01, min=0.0001, max=1.0, step=0.0001, round=0.0001,
                    tooltip="Adam's learning rate in the first step; it falls to half by the last.",
                ),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: dict[str, Any], steps: int, scheduler: str, cfg: float,
        inner_steps: int, learning_rate: float,
    ) -> io.NodeOutput:  # fmt: skip
        check_range("cfg", cfg, 1.0, 100.0)
        check_range("inner_steps", inner_steps, 1, 1000)
        check_range("learning_rate", learning_rate, 1e-5, 10.0)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            check_conditioning(name, conditioning, model)
            _check_single(name, conditioning, len(latent["samples"]))
        sigmas, _ = _schedule(model, latent, scheduler, steps)
        trajectory = inverting.invert_null_text(
            model, positive, negative, latent, sigmas, scheduler, cfg, inner_steps, learning_rate
        )
        return given_out(trajectory, latent)


def _check_single(name: str, conditioning: Any, pictures: int) -> None:
    if len(conditioning) != 1:
        raise ValueError(
            f"{name}: it has {len(conditioning)} entries (combined prompts); null-text inversion takes a single prompt"
        )
    if len(conditioning[0][0]) not in (1, pictures):
        raise ValueError(f"{name}: {len(conditioning[0][0])} prompts for {pictures} pictures; give 1 or {pictures}")


class EditFriendlyInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditFriendlyInversion",
            display_name="Edit-Friendly DDPM Inversion",
            category=INVERSION_CATEGORY,
            description="Independent noise at every level, and noise maps with which sampling comes back to the "
            "picture exactly, with this prompt and guidance.",
            search_aliases=["invert image", "real image editing", "ddpm inversion", "ef-ddpm"],
            inputs=[
                *_inputs(negative=True),
                *_schedule_inputs(),
                _cfg_input(),
                _skip_input(0.15),
                io.Float.Input(
                    "eta", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="How much noise a step adds: 1 as in DDPM, 0 as in DDIM.",
                ),
                seed_input(),
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, positive: Any, negative: Any, latent: dict[str, Any], steps: int, scheduler: str, cfg: float,
        skip: float, eta: float, seed: int,
    ) -> io.NodeOutput:  # fmt: skip
        check_range("cfg", cfg, 1.0, 100.0)
        check_range("eta", eta, 0.0, 1.0)
        for name, conditioning in (("positive", positive), ("negative", negative)):
            check_conditioning(name, conditioning, model)
        sigmas, skipped = _schedule(model, latent, scheduler, steps, skip)
        trajectory = inverting.invert_noise_maps(
            model, positive, negative, cfg, latent, sigmas, scheduler, skipped, "edit-friendly", "ddpm", eta, seed
        )
        return given_out(trajectory, latent)


class LEDITSInversion(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="LEDITSInversion",
            display_name="LEDITS++ Inversion",
            category=INVERSION_CATEGORY,
            description="Noise maps of a second-order solver, so that few steps are enough; sampling comes back to the "
            "picture exactly, with this prompt at cfg 1.",
            search_aliases=["invert image", "real image editing", "ledits++"],
            inputs=[*_inputs(), *_schedule_inputs(), _skip_input(0.15), seed_input()],
            outputs=outputs(),
        )

    @classmethod
    def execute(
        cls, model: Any, positive: Any, latent: dict[str, Any], steps: int, scheduler: str, skip: float, seed: int
    ) -> io.NodeOutput:
        check_conditioning("positive", positive, model)
        sigmas, skipped = _schedule(model, latent, scheduler, steps, skip)
        trajectory = inverting.invert_noise_maps(
            model, positive, None, 1.0, latent, sigmas, scheduler, skipped, "ledits++", "sde-dpm++", 1.0, seed
        )
        return given_out(trajectory, latent)
