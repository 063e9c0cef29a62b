"""What a sampler's run tells of itself."""

from __future__ import annotations

from typing import Any

import torch.nn.functional as F
from comfy_api.latest import io

from ..core.run_log import RunLog
from .common import CATEGORY, RunLogType, schema


class RunLogShow(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="RunLogShow",
            display_name="Run Log",
            category=CATEGORY,
            description="Shows what a patched model did in its latest run: the mask of every step, and values.",
            search_aliases=["cpam masks", "debug", "refined mask"],
            inputs=[
                RunLogType.Input("run_log", tooltip="From the node that patched the model."),
                io.Latent.Input("latent", tooltip="The sampler's result, so that this is shown after the run."),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The masks as pictures, a step each."),
                io.Mask.Output(display_name="masks", tooltip="The masks, a step each; picture after picture."),
                io.String.Output(display_name="values", tooltip="In words, a line each."),
            ],
        )

    @classmethod
    def execute(cls, run_log: RunLog, latent: dict[str, Any]) -> io.NodeOutput:  # noqa: ARG003 (orders this after the sampler)
        if run_log.masks is None:
            raise ValueError(
                f"run_log: {run_log.title} has recorded nothing; give the latent of the sampler that its model goes to"
            )
        masks = run_log.masks.flatten(0, 1)
        size = tuple(8 * side for side in masks.shape[-2:])
        large = F.interpolate(masks[:, None], size, mode="nearest")[:, 0]
        images = run_log.pictures if run_log.pictures is not None else large[..., None].expand(-1, -1, -1, 3)
        return io.NodeOutput(images.contiguous(), masks, "\n".join(run_log.lines))
