"""CPAM: patches that keep one part of a picture while any sampler changes the rest; prompts for regions."""

from __future__ import annotations

import logging
from typing import Any

import torch
from comfy_api.latest import io

from ..core import cpam as masks
from ..core.run_log import RunLog
from ..core.trajectory import Trajectory
from ..core.unet import cpam
from ..core.unet.layers import is_sdxl, layer_table
from ..core.unet.prompt_tokens import read_prompt
from ..core.unet.replay import check_trajectory
from .common import (
    CATEGORY,
    RunLogType,
    TrajectoryType,
    check_conditioning,
    check_range,
    checked_mask,
    schema,
    seed_input,
)

log = logging.getLogger(__name__)

PATCH_CATEGORY = f"{CATEGORY}/patch"
REPLACE, KEEP, BACKGROUND, REMOVE = TASKS = ("replace object", "keep object", "change background", "remove object")
KEEP_FROM_STEP = 3
"""From which step on "keep object" keeps, counted from 0."""


def _log_output() -> Any:
    return RunLogType.Output(display_name="run_log", tooltip="The target mask of every step, for Run Log.")


class CPAMSelfAttnPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="CPAMSelfAttnPatch",
            display_name="CPAM Self-Attention",
            category=PATCH_CATEGORY,
            description="Keeps the background or the object of a picture, under any sampler: where the mask says so, "
            "the new picture attends to the old one instead of to itself.",
            search_aliases=["cpam", "keep background", "remove object", "masactrl", "inpaint"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA."),
                TrajectoryType.Input("trajectory", tooltip="The picture: from DDIM Inversion, or any other that makes "
                                     "one. Sample on its sigmas, starting from its latent."),
                io.Mask.Input("source_mask", tooltip="The object, in white."),
                io.Combo.Input(
                    "task", options=list(TASKS), default=REPLACE,
                    tooltip="replace object: it becomes what the prompt says, the background stays. keep object: its "
                    "pose or view follows the prompt, its looks stay, the background stays. change background: the "
                    "object stays, the rest follows the prompt. remove object: background everywhere; leave the "
                    "prompt empty.",
                ),
                io.Int.Input(
                    "start_step", default=-1, min=-1, max=10000,
                    tooltip="keep object only: from which step on (the first is 0). -1: 3.",
                ),
                io.Int.Input(
                    "start_layer", default=-1, min=-1, max=1000,
                    tooltip="keep object only: from which attention layer on (the first is 0). -1: 7 of SD1.5's 16, "
                    "54 of SDXL's 70.",
                ),
                io.Float.Input(
                    "dilation", default=0.1, min=0.0, max=1.0, step=0.01,
                    tooltip="By how much the object may outgrow its mask, as a fraction of the root of its area. Not "
                    "used with change background, or with a target_mask.",
                ),
                io.Float.Input(
                    "softness", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Blurs the edge of the region that may change, as a fraction of the root of its area. At "
                    "0 it is sharp.",
                ),
                io.Combo.Input(
                    "background_keys", options=["source", "target"], default="source",
                    tooltip="What of the old picture counts as background: all outside the source_mask (the paper's), "
                    "or only what is wholly outside the region that may change, which leaves fringes and shadows out. "
                    "remove object always does the latter.",
                ),
                io.Float.Input(
                    "plain_fraction", default=0.0, min=0.0, max=1.0, step=0.01,
                    tooltip="Share of the layers, drawn anew each step, that attend as usual. The paper says 0.1, its "
                    "code 0.",
                ),
                seed_input("Which layers plain_fraction draws."),
                io.Mask.Input("target_mask", optional=True, tooltip="The region that may change, if it is not the "
                              "widened source_mask: where the object shall be."),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler that takes SIGMAS."),
                _log_output(),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, trajectory: Trajectory, source_mask: torch.Tensor, task: str, start_step: int,
        start_layer: int, dilation: float, softness: float, background_keys: str, plain_fraction: float, seed: int,
        target_mask: torch.Tensor | None = None,
    ) -> io.NodeOutput:  # fmt: skip
        if task not in TASKS:
            raise ValueError(f"task: {task!r} is unknown; accepted are {', '.join(TASKS)}")
        if background_keys not in ("source", "target"):
            raise ValueError(f"background_keys: {background_keys!r} is unknown; accepted are source, target")
        for name, value in (("dilation", dilation), ("softness", softness), ("plain_fraction", plain_fraction)):
            check_range(name, value, 0.0, 1.0)
        table = layer_table(model)
        check_trajectory(trajectory, model)
        if cpam.spec_of(model).self_attention is not None:
            raise ValueError("model: it has a CPAM Self-Attention already, and a second has no meaning; leave one out")
        size = (8 * trajectory.size[0], 8 * trajectory.size[1])
        source = masks.binary(checked_mask(source_mask, trajectory.images, size, "source_mask"))
        _check_layers(source, trajectory.size, table, "source_mask")
        if task == BACKGROUND:
            source = 1 - source
        if target_mask is not None:
            target = checked_mask(target_mask, trajectory.images, size, "target_mask")
            target = target if softness else masks.binary(target)
        else:
            target = source if task == BACKGROUND else masks.dilated(source, dilation)
        target = masks.softened(target, softness) if softness else target
        clear_of_target = background_keys == "target" or task == REMOVE
        if clear_of_target:
            wide = torch.nn.functional.interpolate(target[:, None], source.shape[-2:], mode="nearest")[:, 0]
            source = torch.maximum(*torch.broadcast_tensors(source, masks.binary(wide)))
        if bool((target > 0.5).flatten(1).all(1).any()) or not bool((target > 0.5).flatten(1).any(1).all()):
            raise ValueError(
                f"{'dilation' if target_mask is None else 'target_mask'}: the region that may change is "
                f"{100 * float((target > 0.5).float().mean()):.0f} % of the picture; it must be some of it, not all"
            )
        keep = (
            KEEP_FROM_STEP if start_step < 0 else start_step,
            _first_layer(model, len(table)) if start_layer < 0 else start_layer,
        )
        run_log = RunLog("CPAM Self-Attention")
        spec = cpam.SelfAttentionSpec(
            trajectory, source, target, task == REMOVE, keep if task == KEEP else None, plain_fraction, seed,
            run_log, clear_of_target,
        )  # fmt: skip
        return io.NodeOutput(cpam.patched(model, self_attention=spec), run_log)


def _first_layer(model: Any, layers: int) -> int:
    """The authors' first layer that keeps, at the same depth of a model with another number of layers."""
    first, of = (54, 70) if is_sdxl(model) else (7, 16)
    return round(first * layers / of)


def _check_layers(mask: torch.Tensor, latent: tuple[int, int], table: Any, name: str) -> None:
    """ValueError if a mask [n, H, W] has nothing, or nothing else, at the finest layer; a warning of coarser ones."""
    whole = mask.flatten(1).all(1)
    if whole.any() or not mask.flatten(1).any(1).all():
        what = "covers the whole picture" if whole.any() else "is empty"
        raise ValueError(f"{name}: it {what}; paint the object in white and leave the background black")
    scales = sorted({layer.downsample for layer in table.layers.values()})
    for scale in scales:
        h, w = (-(-side // scale) for side in latent)
        seen = torch.nn.functional.interpolate(mask[:, None], (h, w), mode="nearest").flatten(1)
        if seen.any(1).all() and not seen.all(1).any():
            continue
        what = "nothing of the object" if not seen.any(1).all() else "nothing of the background"
        if scale == scales[0]:
            raise ValueError(
                f"{name}: {what} is left of it at {w} × {h}, the finest attention of this model; each side of object "
                f"and background must be at least {8 * scale} pixels of the picture"
            )
        log.warning("Scalpel: %s: %s is left at the layers of %d × %d", name, what, w, h)


class CPAMCrossAttnPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="CPAMCrossAttnPatch",
            display_name="CPAM Cross-Attention",
            category=PATCH_CATEGORY,
            description="Lets the positive prompt speak inside a mask only, and makes the mask follow the object's new "
            "shape while it is denoised. With CPAM Self-Attention on the same model both use the refined mask.",
            search_aliases=["cpam", "regional prompt", "localized extraction"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA."),
                io.Conditioning.Input("null", tooltip="What is said outside the mask: the empty prompt."),
                io.Mask.Input("target_mask", tooltip="Where the positive prompt holds, in white."),
                io.Boolean.Input("refine", default=True, tooltip="Whether the mask follows the object."),
                io.Int.Input(
                    "refine_from_step", default=1, min=0, max=10000,
                    tooltip="After how many steps the first refined mask is made.",
                ),
                io.Float.Input(
                    "refine_threshold", default=0.45, min=0.0, max=1.0, step=0.01,
                    tooltip="How strongly a place must attend to the words: the higher, the smaller the mask.",
                ),
                io.Clip.Input("clip", optional=True, tooltip="With text: tells which tokens of the prompt are words. "
                              "Without it all but the first count."),
                io.String.Input("text", default="", multiline=True, optional=True, tooltip="The text of the positive "
                                "prompt."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For any sampler."), _log_output()],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, null: Any, target_mask: torch.Tensor, refine: bool, refine_from_step: int,
        refine_threshold: float, clip: Any = None, text: str = "",
    ) -> io.NodeOutput:  # fmt: skip
        check_range("refine_from_step", refine_from_step, 0, 10000)
        check_range("refine_threshold", refine_threshold, 0.0, 1.0)
        layer_table(model)
        check_conditioning("null", null, model)
        if cpam.spec_of(model).cross_attention is not None:
            raise ValueError("model: it has a CPAM Cross-Attention already; for several prompts use Region Prompt")
        mask = checked_mask(target_mask, None, None, "target_mask")
        words = None
        if text.strip() and clip is None:
            raise ValueError("clip: it is needed to find the words of 'text'; connect the CLIP, or leave 'text' empty")
        if text.strip():
            words = tuple(place for word in read_prompt(clip, text).words for place in word.places)
            if not words:
                raise ValueError(f"text: the text encoder finds no word in {text!r}; give the positive prompt's text")
        follow = cpam.FollowSpec(refine_from_step, refine_threshold, words) if refine else None
        run_log = RunLog("CPAM Cross-Attention")
        spec = cpam.CrossAttentionSpec(null, mask, follow, run_log)
        return io.NodeOutput(cpam.patched(model, cross_attention=spec), run_log)


class RegionPrompts(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RegionPrompts",
            display_name="Region Prompt",
            category=PATCH_CATEGORY,
            description="Inside a mask the positive prompt is another one, at the cost of no further UNet row. Chain "
            "the node for several; where masks overlap the last one holds.",
            search_aliases=["regional prompt", "attention couple", "cpam", "several prompts"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA."),
                io.Mask.Input("region", tooltip="Where the prompt holds, in white."),
                io.Conditioning.Input("prompt", tooltip="What is to be seen there."),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For any sampler.")],
        )

    @classmethod
    def execute(cls, model: Any, region: torch.Tensor, prompt: Any) -> io.NodeOutput:
        layer_table(model)
        check_conditioning("prompt", prompt, model)
        mask = checked_mask(region, None, None, "region")
        regions = (*cpam.spec_of(model).regions, cpam.Region(mask, prompt))
        return io.NodeOutput(cpam.patched(model, regions=regions))
