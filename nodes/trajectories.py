"""Trajectories: recorded, played back, saved and loaded."""

from __future__ import annotations

import logging
from pathlib import Path
from typing import Any

import comfy.samplers
import folder_paths
from comfy_api.latest import io, ui

from ..core import trajectory as files
from ..core.trajectory import Trajectory
from ..core.unet import inverting, replay
from ..core.unet.inputs import model_sigmas
from ..core.unet.layers import layer_table
from .common import TrajectoryType, check_conditioning, check_range, schema, seed_input
from .files import fingerprint, listed_path, save_numbered, validated
from .inversion import INVERSION_CATEGORY, given_out, outputs

log = logging.getLogger(__name__)

FOLDER = "trajectories"


def trajectory_folder() -> Path:
    """Where trajectories are saved: `output/trajectories` of this ComfyUI."""
    return Path(folder_paths.get_output_directory()) / FOLDER


def register_folder() -> None:
    """Tell ComfyUI of `output/trajectories`."""
    try:
        trajectory_folder().mkdir(parents=True, exist_ok=True)
    except OSError as error:  # a read-only volume
        log.warning("Scalpel: %s cannot be made (%s)", trajectory_folder(), error)
    folder_paths.add_model_folder_path(FOLDER, str(trajectory_folder()))
    folder_paths.folder_names_and_paths[FOLDER][1].add(".safetensors")


register_folder()


class RecordTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RecordTrajectory",
            display_name="Record Trajectory (KSampler)",
            category=INVERSION_CATEGORY,
            description="KSampler, bit for bit, which also remembers how the picture came to be: the source of any "
            "edit.",
            search_aliases=["ksampler", "record generation"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA."),
                seed_input(),
                io.Int.Input("steps", default=20, min=1, max=10000, tooltip="Denoising steps."),
                io.Float.Input(
                    "cfg", default=8.0, min=0.0, max=100.0, step=0.1, round=0.01, tooltip="Classifier-free guidance."
                ),
                io.Combo.Input(
                    "sampler_name", options=list(comfy.samplers.KSampler.SAMPLERS), default="euler",
                    tooltip="Any of ComfyUI's samplers.",
                ),
                io.Combo.Input(
                    "scheduler", options=list(comfy.samplers.KSampler.SCHEDULERS), default="ddim_uniform",
                    tooltip="How the noise levels are spread.",
                ),
                io.Conditioning.Input("positive", tooltip="What the picture shows."),
                io.Conditioning.Input("negative", tooltip="What it shall not show."),
                io.Latent.Input("latent_image", tooltip="An empty latent, or a picture with denoise < 1."),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01, tooltip="As in KSampler."
                ),
            ],
            outputs=[
                io.Latent.Output(display_name="latent", tooltip="The picture, as KSampler makes it."),
                TrajectoryType.Output(display_name="trajectory", tooltip="The picture at every noise level."),
                io.Sigmas.Output(display_name="sigmas", tooltip="The noise levels of the trajectory."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, seed: int, steps: int, cfg: float, sampler_name: str, scheduler: str, positive: Any,
        negative: Any, latent_image: dict[str, Any], denoise: float,
    ) -> io.NodeOutput:  # fmt: skip
        check_range("steps", steps, 1, 10000)
        check_range("denoise", denoise, 0.0, 1.0)
        layer_table(model)
        if (model_sigmas(model, sampler_name, scheduler, steps, denoise).diff() >= 0).any():
            raise ValueError(f"steps: {scheduler} has no {steps} different noise levels; give fewer")
        for name, conditioning in (("positive", positive), ("negative", negative)):
            check_conditioning(name, conditioning, model)
        samples, trajectory = inverting.record(
            model, seed, steps, cfg, sampler_name, scheduler, positive, negative, latent_image, denoise
        )
        return io.NodeOutput({**latent_image, "samples": samples}, trajectory, trajectory.sigmas.clone())


class ReplayTrajectory(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="ReplayTrajectory",
            display_name="Replay Trajectory",
            category=INVERSION_CATEGORY,
            description="What SamplerCustom needs to play a trajectory back, with its own prompt or another: the model "
            "(with null-text embeddings), the sampler (with noise maps), the noise levels and the noisiest latent.",
            search_aliases=["reconstruct", "invert image"],
            inputs=[
                io.Model.Input("model", tooltip="The model that the trajectory was made with."),
                TrajectoryType.Input("trajectory", tooltip="From Record Trajectory or an inversion."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For SamplerCustom."),
                io.Sampler.Output(display_name="sampler", tooltip="For SamplerCustom; starts from the trajectory's "
                                  "own noise, whatever add_noise and noise_seed say."),
                io.Sigmas.Output(display_name="sigmas", tooltip="For SamplerCustom."),
                io.Latent.Output(display_name="latent", tooltip="For SamplerCustom, with add_noise off."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, trajectory: Trajectory) -> io.NodeOutput:
        layer_table(model)
        replay.check_trajectory(trajectory, model)
        return io.NodeOutput(
            replay.replay_model(model, trajectory),
            replay.replay_sampler(trajectory),
            trajectory.sigmas.clone(),  # uni_pc changes what it gets
            replay.start_latent(trajectory),
        )


class TrajectorySave(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TrajectorySave",
            display_name="Save Trajectory",
            category=INVERSION_CATEGORY,
            description="Writes a trajectory to output/trajectories as <filename_prefix>_00001.safetensors. A file "
            "that exists is never overwritten.",
            search_aliases=["save inversion"],
            inputs=[
                TrajectoryType.Input("trajectory", tooltip="The trajectory to keep."),
                io.String.Input("filename_prefix", default="trajectory", tooltip="The file's name without its number."),
            ],
            is_output_node=True,
        )

    @classmethod
    def execute(cls, trajectory: Trajectory, filename_prefix: str) -> io.NodeOutput:
        folder = trajectory_folder()
        file = save_numbered(lambda path: files.save(trajectory, path), folder, filename_prefix)
        log.info("Scalpel: saved the trajectory %s", file)
        return io.NodeOutput(ui=ui.PreviewText(f"output/{FOLDER}/{file.relative_to(folder).as_posix()}"))


def trajectory_path(name: str) -> Path:
    """The file that a name from a workflow stands for. ValueError unless it is one of the listed files."""
    return listed_path(FOLDER, name, "file", f"output/{FOLDER}")


class TrajectoryLoad(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="TrajectoryLoad",
            display_name="Load Trajectory",
            category=INVERSION_CATEGORY,
            description="Reads a trajectory that Save Trajectory wrote to output/trajectories.",
            search_aliases=["load inversion"],
            inputs=[
                io.Combo.Input(
                    "file", options=folder_paths.get_filename_list(FOLDER),
                    tooltip="A file in output/trajectories. Press R after saving one.",
                )
            ],
            outputs=outputs(),
        )  # fmt: skip

    @classmethod
    def validate_inputs(cls, file: str) -> bool | str:
        return validated(trajectory_path, file)

    @classmethod
    def fingerprint_inputs(cls, file: str) -> str:
        return fingerprint(trajectory_path, file)

    @classmethod
    def execute(cls, file: str) -> io.NodeOutput:
        return given_out(files.load(trajectory_path(file)))
