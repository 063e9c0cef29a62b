"""PartEdit: edit one part of a picture while it is being generated."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import torch
from comfy_api.latest import io

from ..core.part_token import PartToken
from ..core.prompt_to_prompt import PromptControl
from ..core.trajectory import Trajectory, same_schedule
from ..core.unet import mag, sampling
from ..core.unet.blend import BlendSpec
from ..core.unet.inputs import checked_latent, model_sigmas
from ..core.unet.layers import layer_table
from ..core.unet.replay import check_latent_size, check_trajectory
from ..core.unet.rows import PairedRows, batch_of, stack
from .common import (
    CATEGORY,
    PartTokenType,
    PromptControlType,
    TrajectoryType,
    check_conditioning,
    check_range,
    check_token,
    checked_mask,
    layers_input,
    padding_input,
    schema,
    seed_input,
)
from .prompt_to_prompt import check_prompt_control

MASK_MODES = ("replace", "multiply")
EDIT_CATEGORY = f"{CATEGORY}/edit"


class EditBatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="EditBatch",
            display_name="Edit Batch",
            category=EDIT_CATEGORY,
            description="Several edits of one picture in one run: the source is denoised once for all of them. Chain "
            "the node for more than two.",
            inputs=[
                io.Conditioning.Input("edit_a", tooltip="An edit prompt, or the edits of another Edit Batch."),
                io.Conditioning.Input("edit_b", tooltip="Another edit prompt."),
            ],
            outputs=[
                io.Conditioning.Output(display_name="edits", tooltip="For the 'edit' input of a Feature Blend Sampler.")
            ],
        )

    @classmethod
    def execute(cls, edit_a: Any, edit_b: Any) -> io.NodeOutput:
        counts = [batch_of(edit_a), batch_of(edit_b)]
        return io.NodeOutput(stack([edit_a, edit_b], counts, ["edit_a", "edit_b"]))


def _prompt_inputs() -> list[Any]:
    return [
        io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA."),
        io.Conditioning.Input("source", tooltip="What the picture shows: 'a closeup of a man'."),
        io.Conditioning.Input("edit", tooltip="The same with the part changed: 'a closeup of a robot'. Several at once "
                              "through Edit Batch."),
        io.Conditioning.Input("negative", tooltip="Negative prompt, for source and edit alike."),
    ]  # fmt: skip


def _cfg_input() -> Any:
    return io.Float.Input(
        "cfg", default=7.5, min=1.0, max=100.0, step=0.1, round=0.01,
        tooltip="Classifier-free guidance. At 1 the negative prompt is not computed.",
    )  # fmt: skip


def _blend_inputs() -> list[Any]:
    return [
        io.Float.Input(
            "omega", default=1.5, min=0.25, max=4.0, step=0.05,
            tooltip="Threshold of the part's mask: smaller lets more of the edit through, larger keeps its rim softer.",
        ),
        io.Float.Input(
            "blend_until", default=1.0, min=0.0, max=1.0, step=0.01,
            tooltip="Until which fraction of the steps source and edit are blended (t_e / T in the paper). Less lets "
            "the edit fit itself in, and changes more around it.",
        ),
        layers_input(),
        padding_input(),
    ]  # fmt: skip


def _optional_inputs() -> list[Any]:
    return [
        PartTokenType.Input("part_token", optional=True, tooltip="The part to edit. Without one, give a mask."),
        io.Mask.Input("mask", optional=True, tooltip="Your own mask of what may change (white)."),
        io.Combo.Input(
            "mask_mode", options=list(MASK_MODES), default="replace", optional=True,
            tooltip="replace: your mask is used instead of the token's. multiply: it limits the token's.",
        ),
        PromptControlType.Input(
            "prompt_control", optional=True,
            tooltip="From Prompt to Prompt, which also gives the source and the edit prompt. Without a token or a mask "
            "it edits the whole picture.",
        ),
        TrajectoryType.Input(
            "trajectory", optional=True,
            tooltip="The picture to edit, from an inversion node or Record Trajectory, in the place of a generated "
            "one. The noise levels must be its own; latent_image is the latent it came with.",
        ),
    ]  # fmt: skip


def _outputs() -> list[Any]:
    return [
        io.Latent.Output(display_name="edited", tooltip="The edited pictures, one per edit prompt."),
        io.Latent.Output(display_name="source", tooltip="The picture before the edit, from the same noise."),
        io.Mask.Output(display_name="mask", tooltip="What was allowed to change, mean over the steps."),
        io.Mask.Output(display_name="step_masks", tooltip="The mask after each step, first to last."),
    ]


class FeatureBlendSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatureBlendSampler",
            display_name="Feature Blend Sampler (PartEdit)",
            category=EDIT_CATEGORY,
            description="Generates a picture and its edit side by side. The part token finds the part in the source at "
            "every step; the edit is blended into the source's features there and nowhere else.",
            search_aliases=["partedit", "part edit", "local edit"],
            inputs=[
                *_prompt_inputs(),
                io.Latent.Input("latent_image", tooltip="An empty latent, or a picture with denoise < 1."),
                seed_input(),
                io.Int.Input("steps", default=50, min=1, max=10000, tooltip="Denoising steps."),
                _cfg_input(),
                io.Combo.Input(
                    "sampler_name", options=list(comfy.samplers.KSampler.SAMPLERS), default="euler",
                    tooltip="Samplers that draw noise draw the same for source and edit.",
                ),
                io.Combo.Input(
                    "scheduler", options=list(comfy.samplers.KSampler.SCHEDULERS), default="ddim_uniform",
                    tooltip="How the noise levels are spread.",
                ),
                io.Float.Input(
                    "denoise", default=1.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Less than 1 starts from latent_image, as in KSampler.",
                ),
                *_blend_inputs(),
                *_optional_inputs(),
            ],
            outputs=_outputs(),
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, source: Any, edit: Any, negative: Any, latent_image: dict[str, Any], seed: int, steps: int,
        cfg: float, sampler_name: str, scheduler: str, denoise: float, omega: float, blend_until: float, layers: str,
        padding: str, part_token: PartToken | None = None, mask: torch.Tensor | None = None, mask_mode: str = "replace",
        prompt_control: PromptControl | None = None, trajectory: Trajectory | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        check_range("steps", steps, 1, 10000)
        check_range("denoise", denoise, 0.0, 1.0)
        layer_table(model)  # refuses models without a U-Net before anything is computed
        sigmas = model_sigmas(model, sampler_name, scheduler, steps, denoise)
        if trajectory is not None:
            sigmas = _recorded_part(sigmas, trajectory, scheduler)
        return _sample(
            model, source, edit, negative, _SeededNoise(seed), comfy.samplers.sampler_object(sampler_name), sigmas,
            latent_image, cfg, omega, blend_until, layers, padding, part_token, mask, mask_mode, prompt_control,
            trajectory,
        )  # fmt: skip


class FeatureBlendSamplerAdvanced(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="FeatureBlendSamplerAdvanced",
            display_name="Feature Blend Sampler Advanced (PartEdit)",
            category=EDIT_CATEGORY,
            description="Feature Blend Sampler with ComfyUI's custom sampling: any NOISE, SAMPLER and SIGMAS.",
            search_aliases=["partedit", "part edit", "local edit"],
            inputs=[
                *_prompt_inputs(),
                io.Noise.Input("noise", tooltip="Random Noise, or Disable Noise for a latent that is noisy already."),
                io.Sampler.Input("sampler", tooltip="From KSamplerSelect or any other SAMPLER node."),
                io.Sigmas.Input("sigmas", tooltip="From Basic Scheduler or any other SIGMAS node."),
                io.Latent.Input("latent_image", tooltip="As for SamplerCustomAdvanced."),
                _cfg_input(),
                *_blend_inputs(),
                *_optional_inputs(),
            ],
            outputs=_outputs(),
        )

    @classmethod
    def execute(
        cls, model: Any, source: Any, edit: Any, negative: Any, noise: Any, sampler: Any, sigmas: torch.Tensor,
        latent_image: dict[str, Any], cfg: float, omega: float, blend_until: float, layers: str, padding: str,
        part_token: PartToken | None = None, mask: torch.Tensor | None = None, mask_mode: str = "replace",
        prompt_control: PromptControl | None = None, trajectory: Trajectory | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        return _sample(
            model, source, edit, negative, noise, sampler, sigmas, latent_image, cfg, omega, blend_until, layers,
            padding, part_token, mask, mask_mode, prompt_control, trajectory,
        )  # fmt: skip


class _SeededNoise:
    """KSampler's noise as a NOISE object."""

    def __init__(self, seed: int) -> None:
        self.seed = seed

    def generate_noise(self, latent: dict[str, Any]) -> torch.Tensor:
        return comfy.sample.prepare_noise(latent["samples"], self.seed, latent.get("batch_index"))


def _sample(
    model: Any, source: Any, edit: Any, negative: Any, noise: Any, sampler: Any, sigmas: torch.Tensor,
    latent_image: dict[str, Any], cfg: float, omega: float, blend_until: float, layers: str, padding: str,
    part_token: PartToken | None, mask: torch.Tensor | None, mask_mode: str, prompt_control: PromptControl | None,
    trajectory: Trajectory | None,
) -> io.NodeOutput:  # fmt: skip
    check_range("cfg", cfg, 1.0, 100.0)
    check_range("omega", omega, 0.25, 4.0)
    check_range("blend_until", blend_until, 0.0, 1.0)
    layer_table(model).select(layers)
    if mag.spec_of(model) is not None:
        raise ValueError(
            "model: it has a MAG Guidance, which would move the source with its edits; give that model to KSampler"
        )
    samples = checked_latent(model, latent_image)
    for name, conditioning in (("source", source), ("edit", edit), ("negative", negative)):
        check_conditioning(name, conditioning, model)
    if part_token is None and mask is None and prompt_control is None:
        raise ValueError("part_token: neither a part token nor a mask is connected; give one of them, or both")
    if prompt_control is not None:
        check_prompt_control(prompt_control, source, edit, batch_of(edit))
    if mask_mode not in MASK_MODES:
        raise ValueError(f"mask_mode: {mask_mode!r} is unknown; accepted are {' and '.join(MASK_MODES)}")
    if len(sigmas) < 2:
        raise ValueError("sigmas: there is no step to take; give at least two sigmas, or a denoise above 0")
    if trajectory is not None:
        check_trajectory(trajectory, model)
        _check_source(trajectory, samples, model, latent_image)
    rows = PairedRows.pair(batch_of(edit), len(samples))
    if part_token is not None:
        check_token(part_token, model)
        part_token = part_token.padded(padding, source[0][0][0])
    if mask is not None:
        mask = checked_mask(mask, rows.sources, (8 * samples.shape[-2], 8 * samples.shape[-1]))
    spec = BlendSpec(rows, part_token, omega, blend_until, layers, mask, mask_mode == "multiply", prompt_control)
    result = sampling.sample_edit(
        model, source, edit, negative, noise, sampler, sigmas, latent_image, cfg, spec, trajectory
    )
    return io.NodeOutput(
        _latent_like(latent_image, result.edited, rows.source_of),
        _latent_like(latent_image, result.source, list(range(rows.sources))),
        result.masks.mean(1),
        result.masks.flatten(0, 1),
    )


def _recorded_part(sigmas: torch.Tensor, trajectory: Trajectory, scheduler: str) -> torch.Tensor:
    """The end of a schedule that the trajectory has: an inversion may skip its first steps."""
    recorded = sigmas[-len(trajectory.sigmas) :]
    if same_schedule(recorded, trajectory.sigmas):
        return recorded
    skipped = f", of which the first {trajectory.skipped} are left out" if trajectory.skipped else ""
    made = f"{trajectory.steps + trajectory.skipped} steps of {trajectory.scheduler}{skipped},"
    raise ValueError(
        f"steps, scheduler, denoise, sampler_name: they give {len(sigmas) - 1} steps of {scheduler} from sigma "
        f"{float(sigmas[0]):.4g} to {float(sigmas[-1]):.4g}, but the trajectory was made with {made} from "
        f"{float(trajectory.sigmas[0]):.4g} to {float(trajectory.sigmas[-1]):.4g}; set them as in the node that made "
        "it (inversions have euler's noise levels; dpm_2 and uni_pc have others), or give its sigmas to Feature Blend "
        "Sampler Advanced"
    )


def _check_source(trajectory: Trajectory, samples: torch.Tensor, model: Any, latent: dict[str, Any]) -> None:
    """ValueError unless the latent has the trajectory's size and number of images."""
    check_latent_size(trajectory, (samples.shape[-2], samples.shape[-1]))
    if getattr(model.model, "concat_keys", ()) and "noise_mask" in latent:
        raise ValueError(
            "latent_image: an inpainting model takes a noise mask for what it is to fill in, and the picture around it "
            "from latent_image, which a trajectory takes the place of; give the mask to the sampler's mask input"
        )
    if len(samples) != trajectory.images:
        raise ValueError(
            f"latent_image: it has {len(samples)} pictures, and the trajectory {trajectory.images}; give the latent "
            "that the trajectory came with"
        )


def _latent_like(latent: dict[str, Any], samples: torch.Tensor, source_of: list[int]) -> dict[str, Any]:
    """The LATENT with new samples; what it says of each of its rows goes to the rows made from them."""
    result = {**latent, "samples": samples}
    if "batch_index" in latent:
        result["batch_index"] = [latent["batch_index"][i] for i in source_of]
    mask = latent.get("noise_mask")
    if mask is not None and len(mask) > 1:
        result["noise_mask"] = comfy.utils.repeat_to_batch_size(mask, len(latent["samples"]))[source_of]
    return result
