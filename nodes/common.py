"""What the nodes share: socket types, category, inputs that several have, checks."""

from __future__ import annotations

import dataclasses
import sys
from collections.abc import Callable
from typing import Any

import torch
from comfy_api.latest import io

from ..core.part_token import PADDINGS, PartToken, family
from ..core.unet.inputs import check_aspect
from ..core.unet.layers import HELP, context_width, is_sdxl

CATEGORY = "Scalpel"
PartTokenType = io.Custom("PART_TOKEN")
PromptControlType = io.Custom("PROMPT_CONTROL")
TrajectoryType = io.Custom("TRAJECTORY")
RunLogType = io.Custom("RUN_LOG")

_KNOWN = {field.name for field in dataclasses.fields(io.Schema)}


def schema(**settings: Any) -> io.Schema:
    """io.Schema with the fields that this ComfyUI knows; newer ones are dropped."""
    return io.Schema(**{k: v for k, v in settings.items() if k in _KNOWN})


def layers_input() -> io.String.Input:
    return io.String.Input("layers", default="official", tooltip=f"Attention layers that locate the part: {HELP}.")


def padding_input() -> io.Combo.Input:
    return io.Combo.Input(
        "padding",
        options=list(PADDINGS),
        default="background",
        tooltip="What fills the rest of the token's context of 77: its background row (the authors' choice), nothing, "
        "the source prompt's first or last row, or zeros.",
    )


def seed_input(tooltip: str = "Seed of the noise.") -> io.Int.Input:
    return io.Int.Input(
        "seed",
        default=0,
        min=0,
        max=0xFFFFFFFFFFFFFFFF,
        control_after_generate=True,
        tooltip=tooltip,
    )


def tell_of(node: type[io.ComfyNode]) -> Callable[[str], None]:
    """A function that shows a text on the node while a run goes on; it needs `io.Hidden.unique_id` in the schema. Where
    no page is listening, as in tests, nothing is shown.
    """
    number = getattr(getattr(node, "hidden", None), "unique_id", None)

    def tell(text: str) -> None:
        server = getattr(getattr(sys.modules.get("server"), "PromptServer", None), "instance", None)
        if server is not None and number is not None:
            server.send_progress_text(text, number)

    return tell


def check_range(name: str, value: float, low: float, high: float) -> None:
    """ValueError unless low ≤ value ≤ high. The API does not always enforce a widget's range."""
    if not low <= value <= high:
        raise ValueError(f"{name}: {value} is out of range; accepted are numbers from {low} to {high}")


def check_token(token: PartToken, model: Any) -> None:
    """ValueError if the token belongs to a model of another text width."""
    width = context_width(model)
    if token.width != width:
        raise ValueError(
            f"part_token: it is {token.width} wide ({family(token.width)}), but the model's text context is {width} "
            f"wide ({family(width)}); use a token trained for this model"
        )


def check_conditioning(name: str, conditioning: Any, model: Any) -> None:
    """ValueError if a CONDITIONING is empty, or does not come from this model's text encoder."""
    width = context_width(model)
    if not conditioning:
        raise ValueError(f"{name}: the conditioning is empty; connect a CLIP Text Encode")
    for context, options in conditioning:
        if context.shape[-1] != width:
            raise ValueError(
                f"{name}: it is {context.shape[-1]} wide ({family(context.shape[-1])}), but the model's text context "
                f"is {width} wide ({family(width)}); encode the prompt with the CLIP of this model"
            )
        if is_sdxl(model) and options.get("pooled_output") is None:
            raise ValueError(
                f"{name}: it has no pooled output, which SDXL models need; encode the prompt with the CLIP of this "
                "model (CLIP Text Encode)"
            )


def checked_mask(
    mask: torch.Tensor, batch: int | None, size: tuple[int, int] | None, name: str = "mask"
) -> torch.Tensor:
    """A MASK as [1 or batch, H, W] in 0…1. ValueError if it is empty, of another shape than the image, or NaN.

    size: (height, width) of the image in pixels. Masks of the same aspect ratio are accepted at any resolution. What
    is not yet known of the image (None) is not checked.
    """
    if mask.ndim == 2:
        mask = mask[None]
    if mask.ndim == 4 and mask.shape[1] == 1:
        mask = mask[:, 0]
    if mask.ndim != 3:
        raise ValueError(
            f"{name}: its shape is {list(mask.shape)}; a mask is [height, width] or [batch, height, width]"
        )
    if batch is not None and mask.shape[0] not in (1, batch):
        raise ValueError(f"{name}: {mask.shape[0]} masks for {batch} images; give 1 or {batch}")
    if not torch.isfinite(mask).all():
        raise ValueError(f"{name}: it holds NaN or infinite values; a mask's values are 0 to 1")
    if size is not None:
        check_aspect(mask, size, name)
    if mask.max() <= 0:
        raise ValueError(f"{name}: it is empty (all 0), so nothing could change; paint the part to edit in white")
    return mask.float().clamp(0, 1)
