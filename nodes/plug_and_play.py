"""Plug-and-Play: the layout of a source picture kept by taking its features."""

from __future__ import annotations

from typing import Any

from comfy.patcher_extension import WrappersMP
from comfy_api.latest import io

from ..core.trajectory import Trajectory
from ..core.unet import plug_and_play
from ..core.unet.layers import layer_table
from ..core.unet.replay import check_trajectory
from .common import CATEGORY, TrajectoryType, check_range, schema


class PlugAndPlayPatch(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PlugAndPlayPatch",
            display_name="Plug-and-Play",
            category=f"{CATEGORY}/patch",
            description="The sampled picture takes its layout from a source picture, whatever the prompt says: in the "
            "first steps residual features and self-attention of the decoder are the source's.",
            search_aliases=["pnp", "plug and play", "feature injection", "structure"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA."),
                TrajectoryType.Input("trajectory", tooltip="The source picture: an inversion, or a recorded run."),
                io.Float.Input(
                    "feature_until", default=0.8, min=0.0, max=1.0, step=0.01,
                    tooltip="For which fraction of the steps residual features are the source's; 0: never. Less gives "
                    "the prompt more room.",
                ),
                io.Float.Input(
                    "attention_until", default=0.5, min=0.0, max=1.0, step=0.01,
                    tooltip="For which fraction of the steps self-attention is the source's; 0: never.",
                ),
            ],
            outputs=[io.Model.Output(display_name="model", tooltip="For a sampler within its noise levels.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, model: Any, trajectory: Trajectory, feature_until: float, attention_until: float) -> io.NodeOutput:
        check_range("feature_until", feature_until, 0.0, 1.0)
        check_range("attention_until", attention_until, 0.0, 1.0)
        layer_table(model)
        check_trajectory(trajectory, model)
        patched = model.clone()
        if patched.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(plug_and_play.KEY):
            raise ValueError("model: it has a Plug-and-Play already, and takes the features of one source only")
        spec = plug_and_play.PlugAndPlaySpec(trajectory, feature_until, attention_until)
        patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, plug_and_play.KEY, plug_and_play.PlugAndPlay(spec))
        return io.NodeOutput(patched)
