"""The demo model as a checkpoint loader."""

from __future__ import annotations

from comfy_api.latest import io

from ..partsworld import loader
from .common import CATEGORY, schema


class PartsWorldLoader(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PartsWorldLoader",
            display_name="Load Parts-World (demo model)",
            category=f"{CATEGORY}/demo",
            description="The small model that comes with Scalpel, so that every workflow can be tried at once. "
            "It draws 256 × 256 pictures of a procedural world: figures, cars, chairs and dogs in eight colours. "
            "It is a demo: use your own SD1.5 or SDXL checkpoint for real pictures.",
            search_aliases=["demo model", "parts world"],
            outputs=[
                io.Model.Output(display_name="MODEL", tooltip="SD1.x-style U-Net for 256 × 256 pictures."),
                io.Clip.Output(
                    display_name="CLIP",
                    tooltip="Its text encoder, for captions such as 'a red figure with a blue head on a green field'.",
                ),
                io.Vae.Output(display_name="VAE", tooltip="Its VAE: 4 channels at an eighth of the size."),
            ],
        )

    @classmethod
    def execute(cls) -> io.NodeOutput:
        return io.NodeOutput(*loader.load())
