"""Looking at results: several pictures beside the one that they should be like."""

from __future__ import annotations

from typing import Any

import torch
from comfy_api.latest import io

from ..core.comparison import psnr, side_by_side
from .common import CATEGORY, schema

NAMES = ("image_a", "image_b", "image_c", "image_d")


class PictureComparison(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PictureComparison",
            display_name="Compare Pictures (PSNR)",
            category=CATEGORY,
            description="Puts up to four pictures beside the one that they should be like, with the PSNR of each: "
            "above 40 dB no eye sees a difference, below 25 dB every eye does.",
            search_aliases=["psnr", "image difference", "image grid"],
            inputs=[
                io.Image.Input("reference", tooltip="What the others should be like. Of a batch the first picture."),
                io.Image.Input(NAMES[0], tooltip="A picture of the same size."),
                io.String.Input(
                    "labels", default="reference, a, b, c, d",
                    tooltip="What is written over each, the reference first, with commas between.",
                ),
                *(io.Image.Input(name, optional=True, tooltip="Another one.") for name in NAMES[1:]),
            ],
            outputs=[
                io.Image.Output(display_name="grid", tooltip="All in a row, with labels and PSNR."),
                io.String.Output(display_name="psnr", tooltip="The PSNR of each in dB, a line each."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(cls, reference: torch.Tensor, image_a: torch.Tensor, labels: str, **more: Any) -> io.NodeOutput:
        given = {"image_a": image_a, **{name: more[name] for name in NAMES[1:] if more.get(name) is not None}}
        for name, image in given.items():
            if image.shape[1:3] != reference.shape[1:3]:
                own, wanted = (f"{i.shape[2]} × {i.shape[1]}" for i in (image, reference))
                raise ValueError(f"{name}: it is {own} where the reference is {wanted}; give pictures of one size")
        written = [label.strip() for label in labels.split(",")]
        written += ["reference", *given][len(written) :]
        pictures = [image[0, ..., :3].cpu() for image in given.values()]
        first = reference[0, ..., :3].cpu()
        values = [
            f"{label}: {psnr(picture, first):.2f} dB" for label, picture in zip(written[1:], pictures, strict=False)
        ]
        grid = side_by_side(first, pictures, written[: len(pictures) + 1])
        return io.NodeOutput(grid, "\n".join(values))
