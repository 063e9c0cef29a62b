"""MAG-Edit: a stubborn local edit made to appear by guiding the latent while any sampler denoises it."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..core.cpam import binary
from ..core.mag import CONSTRAINTS, TOKEN_RATIO, Push
from ..core.prompt_to_prompt import Prompt, PromptControl
from ..core.run_log import RunLog
from ..core.trajectory import Trajectory
from ..core.unet import mag
from ..core.unet.layers import is_sdxl, layer_table
from ..core.unet.prompt_tokens import read_prompt
from ..core.unet.replay import check_trajectory
from ..core.unet.taken_attention import Source
from .common import (
    CATEGORY,
    PromptControlType,
    RunLogType,
    TrajectoryType,
    check_range,
    checked_mask,
    schema,
    tell_of,
)
from .prompt_to_prompt import items, places

PAPER, FAST = PRESETS = ("paper", "fast")
FEWER, EVEN = 5, 1 / 20
"""What "fast" divides the iterations by, and of how many σ its moves are at a scale of 1."""
MOST_ITERATIONS, LARGEST_SCALE = 100, 100.0


class MAGGuidance(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="MAGGuidance",
            display_name="MAG Guidance",
            category=f"{CATEGORY}/patch",
            description="Before each of the first steps the latent is moved until, inside a mask, the model attends to "
            "the words of the edit. For edits that prompts alone do not bring about: one of several like objects, a "
            "colour that will not come.",
            search_aliases=["mag-edit", "attention guidance", "attend and excite", "recolour"],
            inputs=[
                io.Model.Input(
                    "model",
                    tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA; or one that comes from another MAG "
                    "Guidance, whose words and mask then count too.",
                ),
                io.Clip.Input("clip", tooltip="Its text encoder, to find the words."),
                io.String.Input("edit_text", multiline=True, tooltip="The sampler's positive prompt."),
                io.String.Input(
                    "words", default="",
                    tooltip="Words of edit_text that shall show in the mask, separated by commas: 'yellow', 'polar "
                    "bear'. With a weight: 'yellow: 1, furry: 0.5'.",
                ),
                io.Mask.Input("mask", tooltip="Where they shall show, in white."),
                io.Combo.Input(
                    "constraint", options=list(CONSTRAINTS), default=TOKEN_RATIO,
                    tooltip="token ratio: the words' share of each place's attention; for colour and texture. spatial "
                    "ratio: the mask's share of the words' attention; for shape.",
                ),
                io.Combo.Input(
                    "preset", options=list(PRESETS), default=PAPER,
                    tooltip="paper: as the numbers here say. fast: a fifth of the iterations, whose moves do not get "
                    "shorter from step to step; on the demo model it brings more colours, in a fifth of the passes.",
                ),
                io.Int.Input(
                    "iterations", default=15, min=1, max=MOST_ITERATIONS,
                    tooltip="Moves before each guided step, at most.",
                ),
                io.Float.Input(
                    "until", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="For which fraction of the steps, from the first. 0.2 is often enough for a colour.",
                ),
                io.Float.Input(
                    "scale", default=2.5, min=0.0, max=LARGEST_SCALE, step=0.1, tooltip="How far each move goes."
                ),
                io.Float.Input(
                    "spatial_weight", default=3.0, min=0.0, max=100.0, step=0.1,
                    tooltip="spatial ratio only: how much attention outside the mask counts against attention inside.",
                ),
                io.String.Input(
                    "negative_words", default="",
                    tooltip="Words of edit_text that shall not show in the mask, such as an old texture.",
                ),
                io.Float.Input(
                    "negative_scale", default=0.0, min=0.0, max=10.0, step=0.05,
                    tooltip="How strongly negative_words are pushed away; 0: not at all.",
                ),
                PromptControlType.Input(
                    "prompt_control", optional=True,
                    tooltip="From Prompt to Prompt, with a trajectory: what the edit takes of the source's attention.",
                ),
                TrajectoryType.Input(
                    "trajectory", optional=True,
                    tooltip="The source picture: what lies outside the mask comes back from it in the last steps.",
                ),
                io.Boolean.Input(
                    "checkpointing", default=False, optional=True,
                    tooltip="Gradients in much less memory, for which the UNet's blocks run twice: for large pictures "
                    "or small cards.",
                ),
            ],
            outputs=[
                io.Model.Output(display_name="model", tooltip="For any sampler that goes on with its own latent."),
                RunLogType.Output(display_name="run_log", tooltip="The constraint at every iteration, for Run Log."),
            ],
            hidden=[io.Hidden.unique_id],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, clip: Any, edit_text: str, words: str, mask: torch.Tensor, constraint: str, preset: str,
        iterations: int, until: float, scale: float, spatial_weight: float, negative_words: str,
        negative_scale: float, prompt_control: PromptControl | None = None, trajectory: Trajectory | None = None,
        checkpointing: bool = False,
    ) -> io.NodeOutput:  # fmt: skip
        for name, value, low, high in (
            ("iterations", iterations, 1, MOST_ITERATIONS),
            ("until", until, 0.0, 1.0),
            ("scale", scale, 0.0, LARGEST_SCALE),
            ("spatial_weight", spatial_weight, 0.0, 100.0),
            ("negative_scale", negative_scale, 0.0, 10.0),
        ):
            check_range(name, value, low, high)
        for name, given, known in (("constraint", constraint, CONSTRAINTS), ("preset", preset, PRESETS)):
            if given not in known:
                raise ValueError(f"{name}: {given!r} is unknown; accepted are {', '.join(known)}")
        layer_table(model)
        edit = read_prompt(clip, edit_text, "edit_text")
        pushes = _pushes(clip, edit, "words", words)
        if not pushes:
            raise ValueError("words: it is empty; name the words of edit_text that shall show in the mask")
        if negative_scale:
            against = _pushes(clip, edit, "negative_words", negative_words)
            pushes += [Push(push.tokens, -negative_scale * push.weight) for push in against]
        size = None if trajectory is None else (8 * trajectory.size[0], 8 * trajectory.size[1])
        where = binary(checked_mask(mask, None, size))
        if not where.any():
            raise ValueError("mask: no value of it reaches one half; paint the region in white")
        source = _source(model, clip, edit_text, prompt_control, trajectory)
        run_log = RunLog("MAG Guidance")
        if preset == FAST:
            iterations, scale = max(1, round(iterations / FEWER)), scale * EVEN
        region = mag.Region(
            tuple(pushes), where, constraint, iterations, until, scale, spatial_weight, preset == FAST, edit_text,
            run_log, tell_of(cls),
        )  # fmt: skip
        return io.NodeOutput(mag.guide(model, _with(mag.spec_of(model), region, source, checkpointing)), run_log)


def _with(
    spec: mag.GuidanceSpec | None, region: mag.Region, source: Source | None, checkpointing: bool
) -> mag.GuidanceSpec:
    """What is asked for with one region more. ValueError if it does not go together with the others."""
    if spec is None:
        return mag.GuidanceSpec((region,), source, checkpointing)
    if spec.regions[0].edit_text != region.edit_text:
        raise ValueError(
            f"edit_text: {region.edit_text!r}, but the MAG Guidance before this one has "
            f"{spec.regions[0].edit_text!r}; both want the sampler's positive prompt"
        )
    if spec.source is not None and source is not None and not spec.source.same_as(source):
        raise ValueError(
            "trajectory: the MAG Guidance before this one has another trajectory or prompt_control; one source serves "
            "all regions, so connect it to one of the two nodes"
        )
    return mag.GuidanceSpec((*spec.regions, region), spec.source or source, spec.checkpointing or checkpointing)


def _pushes(clip: Any, edit: Prompt, name: str, text: str) -> list[Push]:
    """The words of a list such as "yellow, polar bear: 0.5"."""
    found = []
    for item in items(text):
        words, colon, number = item.rpartition(":")
        try:
            weight = float(number) if colon else 1.0
        except ValueError:
            words, weight = item, 1.0
        if not 0 < weight <= LARGEST_SCALE:
            raise ValueError(
                f"{name}: {item!r} has a weight of {weight:g}; accepted are numbers above 0, to {LARGEST_SCALE:g}"
            )
        found.append(Push(tuple(places(clip, [edit], name, words if colon else item)[0]), weight))
    return found


def _source(
    model: Any, clip: Any, edit_text: str, control: PromptControl | None, trajectory: Trajectory | None
) -> Source | None:
    """What Prompt-to-Prompt and the picture outside the mask come from."""
    if trajectory is None:
        if control is not None:
            raise ValueError("trajectory: prompt_control needs one, the source's; connect an inversion's trajectory")
        return None
    check_trajectory(trajectory, model)
    if control is None:
        return Source(trajectory, trajectory.positive, None)
    if control.source_words or control.edit_words:
        raise ValueError(
            "prompt_control: it has local_blend_words, but here the mask limits the change; leave them empty"
        )
    encoded = [entry[0] for entry in clip.encode_from_tokens_scheduled(clip.tokenize(edit_text))]
    if not any(_same(e, k) for e in encoded for k in control.edit_contexts):
        raise ValueError(
            "edit_text: it is not the edit_text of the Prompt to Prompt at prompt_control; give both the same"
        )
    own, options = trajectory.positive[0]
    context = control.source_contexts[0]
    if is_sdxl(model) and not _same(own, context):
        raise ValueError(
            "trajectory: its prompt is not the source_text of the Prompt to Prompt at prompt_control, as SDXL needs; "
            "invert with the output 'source' of that node as the prompt"
        )
    return Source(trajectory, [[context, options]], control)


def _same(a: torch.Tensor, b: torch.Tensor) -> bool:
    """Whether two encodings are of one text, wherever they lie and wherever they were made."""
    return a.shape == b.shape and torch.allclose(a.float().cpu(), b.float().cpu(), rtol=1e-2, atol=1e-3)
