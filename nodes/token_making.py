"""Part tokens made of other things: of words, and of other tokens."""

from __future__ import annotations

from typing import Any

from comfy_api.latest import io

from ..core.part_token import PartToken, combine
from ..core.unet.text_tokens import token_from_text
from .common import CATEGORY, PartTokenType, schema

TOKEN_CATEGORY = f"{CATEGORY}/part token"


class PartTokenFromText(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PartTokenFromText",
            display_name="Part Token from Text",
            category=TOKEN_CATEGORY,
            description="The model's own word for a part as a part token: nothing to train, and as good as the word "
            "is. The baseline that PartEdit's learned tokens are compared with.",
            search_aliases=["partedit", "part token", "word attention", "daam"],
            inputs=[
                io.Clip.Input("clip", tooltip="The CLIP of the model that the token is used on."),
                io.String.Input(
                    "text", default="head",
                    tooltip="A word or a phrase that names one part: 'head'. All its words together are the part.",
                ),
            ],
            outputs=[PartTokenType.Output(display_name="part_token", tooltip="The words as a part token.")],
        )  # fmt: skip

    @classmethod
    def execute(cls, clip: Any, text: str) -> io.NodeOutput:
        if clip is None:
            raise ValueError("clip: it is missing; this checkpoint has no text encoder, load one with Load CLIP")
        return io.NodeOutput(token_from_text(clip, text))


class PartTokenCombine(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PartTokenCombine",
            display_name="Combine Part Tokens",
            category=TOKEN_CATEGORY,
            description="Several parts at once: head and torso in one run. Chain the node for more than two.",
            search_aliases=["partedit", "several parts", "multiple parts"],
            inputs=[
                PartTokenType.Input("part_token_a", tooltip="A part token, or several combined."),
                PartTokenType.Input("part_token_b", tooltip="Another, of the same model family."),
            ],
            outputs=[
                PartTokenType.Output(
                    display_name="part_token",
                    tooltip="All parts of both: a Feature Blend Sampler edits them together, Find Part gives a map of "
                    "each.",
                )
            ],
        )

    @classmethod
    def execute(cls, part_token_a: PartToken, part_token_b: PartToken) -> io.NodeOutput:
        return io.NodeOutput(combine(part_token_a, part_token_b))
