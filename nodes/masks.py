"""Finding a part in a picture, and making a mask of what was found."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..core.part_token import PartToken
from ..core.threshold import threshold
from ..core.unet import sampling
from .common import (
    CATEGORY,
    PartTokenType,
    check_conditioning,
    check_range,
    check_token,
    layers_input,
    schema,
    seed_input,
)


class AttentionMaskExtractor(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AttentionMaskExtractor",
            display_name="Find Part (attention heat map)",
            category=f"{CATEGORY}/mask",
            description="Where a part is in given pictures: the heat map of its token in the model's own "
            "cross-attention. The latent is noised a little and shown to the model a few times; nothing is generated.",
            search_aliases=["partedit", "attention map", "heatmap", "segment"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model (or the demo model)."),
                PartTokenType.Input("part_token", tooltip="The part to find, trained for this model family."),
                io.Latent.Input("latent", tooltip="The pictures to search, from VAE Encode or a sampler."),
                layers_input(),
                io.Float.Input(
                    "noise_level", default=0.25, min=0.01, max=1.0, step=0.01,
                    tooltip="How much noise is added at most, as a fraction of the training steps. PartEdit's "
                    "authors train tokens at 0.25.",
                ),
                io.Int.Input(
                    "timesteps", default=4, min=1, max=100,
                    tooltip="At how many noise levels, evenly spread up to noise_level, the model looks.",
                ),
                seed_input(),
                io.Conditioning.Input(
                    "positive", optional=True,
                    tooltip="What the picture shows. Without it the model looks unconditionally, as in training.",
                ),
            ],
            outputs=[
                io.Mask.Output(
                    display_name="heatmap",
                    tooltip="One map per picture and part, picture by picture, in the picture's size, each scaled "
                    "to 0…1.",
                )
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, part_token: PartToken, latent: dict[str, Any], layers: str, noise_level: float, timesteps: int,
        seed: int, positive: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        check_token(part_token, model)
        check_range("noise_level", noise_level, 0.01, 1.0)
        check_range("timesteps", timesteps, 1, 100)
        if positive is not None:
            check_conditioning("positive", positive, model)
        maps = sampling.part_heatmaps(model, part_token, latent, layers, noise_level, timesteps, seed, positive)
        return io.NodeOutput(maps.flatten(0, 1))


class AdaptiveThreshold(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="AdaptiveThreshold",
            display_name="Adaptive Threshold",
            category=f"{CATEGORY}/mask",
            description="A mask from a heat map. 'partedit' keeps a soft rim between half of Otsu's threshold and "
            "omega times it; 'otsu' and 'fixed' are black and white.",
            search_aliases=["otsu", "binarize mask", "threshold mask"],
            inputs=[
                io.Mask.Input("mask", tooltip="Heat maps, 0…1; each is thresholded on its own."),
                io.Combo.Input(
                    "mode", options=["partedit", "otsu", "fixed"], default="partedit",
                    tooltip="partedit: 0 below k/2, 1 from omega·k, the map itself between (k: Otsu's threshold). "
                    "otsu: 1 above k. fixed: 1 from 'lower' on.",
                ),
                io.Float.Input(
                    "omega", default=1.5, min=0.25, max=4.0, step=0.05,
                    tooltip="partedit only: the smaller, the more of the map becomes fully edited.",
                ),
                io.Float.Input(
                    "lower", default=0.5, min=0.0, max=1.0, step=0.01, tooltip="fixed only: the threshold."
                ),
            ],
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="The masks, 0…1, as many as heat maps."),
                io.Float.Output(display_name="threshold", tooltip="The threshold of the first map."),
                io.String.Output(display_name="thresholds", tooltip="The thresholds of all maps, separated by commas."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, mask: torch.Tensor, mode: str, omega: float, lower: float) -> io.NodeOutput:
        maps = mask[None] if mask.ndim == 2 else mask
        if maps.ndim != 3 or maps.numel() == 0:
            raise ValueError(
                f"mask: its shape is {list(mask.shape)}; accepted are [height, width] and [batch, height, width]"
            )
        check_range("omega", omega, 0.25, 4.0)
        check_range("lower", lower, 0.0, 1.0)
        try:
            found = [threshold(heatmap, mode, omega, lower) for heatmap in maps]
        except ValueError as error:
            raise ValueError(f"mask: {error}") from error
        thresholds = [k for _, k in found]
        text = ", ".join(f"{k:.6g}" for k in thresholds)
        return io.NodeOutput(torch.stack([m for m, _ in found]), thresholds[0], text)
