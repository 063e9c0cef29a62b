"""Prompt-to-Prompt: which words of an edit take their attention from the source, and for how long."""

from __future__ import annotations

import math
from typing import Any

import torch
from comfy_api.latest import io

from ..core.prompt_to_prompt import MODES, Prompt, PromptControl, align_refinement, align_replacement
from ..core.unet.prompt_tokens import read_prompt
from .common import CATEGORY, PromptControlType, check_range, schema

LARGEST_WEIGHT = 100.0


class PromptToPrompt(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PromptToPrompt",
            display_name="Prompt to Prompt",
            category=f"{CATEGORY}/edit",
            description="Encodes a source and an edit prompt and says which words take their attention from the "
            "source, so that the edit keeps the source's layout. For the 'prompt_control' of a Feature Blend Sampler, "
            "alone or with a part token.",
            search_aliases=["p2p", "cross attention control", "attention replace", "attention refine"],
            inputs=[
                io.Clip.Input("clip", tooltip="The text encoder of an SD1.x, SD2.x or SDXL model."),
                io.String.Input("source_text", multiline=True,
                                tooltip="What the picture shows: 'a closeup of a man'."),
                io.String.Input("edit_text", multiline=True,
                                tooltip="What the edit shows: 'a closeup of a robot'. Empty: the same as source_text."),
                io.Combo.Input(
                    "mode", options=list(MODES), default="replace",
                    tooltip="replace: words were exchanged; each takes the attention of the word it stands for. "
                    "refine: words were added; what both prompts share takes the source's, new words keep their own. "
                    "reweight: as refine, to make words stronger or weaker (word_weights).",
                ),
                io.Float.Input(
                    "cross_replace", default=0.8, min=0.0, max=1.0, step=0.01,
                    tooltip="For which fraction of the steps, from the first, words take the source's attention. More "
                    "keeps more of the source's layout.",
                ),
                io.Float.Input(
                    "self_replace", default=0.4, min=0.0, max=1.0, step=0.01,
                    tooltip="For which fraction of the steps the edit takes the source's self-attention, in layers of "
                    "up to 32 × 32. More keeps more of the source's shapes. 0 with a part token, as its authors do.",
                ),
                io.String.Input(
                    "word_cross_replace", default="",
                    tooltip="cross_replace for single words of edit_text, as 'robot: 0.4, big dog: 0.2'. Less gives a "
                    "word more freedom.",
                ),
                io.String.Input(
                    "word_weights", default="",
                    tooltip="By how much the attention to words of edit_text is multiplied, as 'fluffy: 3, red: 0.5', "
                    "while they take the source's.",
                ),
                io.String.Input(
                    "local_blend_words", default="",
                    tooltip="Words of either text, as 'man, robot': nothing changes outside the region that they "
                    "attend to. Empty: no such limit.",
                ),
            ],
            outputs=[
                PromptControlType.Output(
                    display_name="prompt_control", tooltip="For a Feature Blend Sampler, or MAG Guidance."
                ),
                io.Conditioning.Output(display_name="source", tooltip="The source prompt, for the same sampler."),
                io.Conditioning.Output(display_name="edit", tooltip="The edit prompt, for the same sampler."),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, clip: Any, source_text: str, edit_text: str, mode: str, cross_replace: float, self_replace: float,
        word_cross_replace: str, word_weights: str, local_blend_words: str,
    ) -> io.NodeOutput:  # fmt: skip
        check_range("cross_replace", cross_replace, 0.0, 1.0)
        check_range("self_replace", self_replace, 0.0, 1.0)
        if mode not in MODES:
            raise ValueError(f"mode: {mode!r} is unknown; accepted are {', '.join(MODES)}")
        if clip is None:
            raise ValueError("clip: it is empty; connect the CLIP of a checkpoint that has one")
        edit_text = edit_text if edit_text.strip() else source_text
        source = read_prompt(clip, source_text, "source_text")
        edit = read_prompt(clip, edit_text, "edit_text")
        for name, prompt in (("source_text", source), ("edit_text", edit)):
            if not prompt.words:
                raise ValueError(f"{name}: it has no words; write what the picture shows")
        weights = _per_word(clip, edit, "word_weights", word_weights, -LARGEST_WEIGHT, LARGEST_WEIGHT, 1.0)
        if mode == "reweight" and not word_weights.strip():
            raise ValueError("word_weights: it is empty, so there is nothing to reweight; write for example 'red: 2'")
        until = _per_word(clip, edit, "word_cross_replace", word_cross_replace, 0.0, 1.0, cross_replace)
        if mode == "reweight" and not ((weights != 1) & (until > 0)).any():
            raise ValueError(
                "cross_replace: it is 0 for every word that has a weight, and weights act in the steps that it gives; "
                "raise it"
            )
        mapping, mapped = (align_replacement if mode == "replace" else align_refinement)(source, edit)
        encoded = [clip.encode_from_tokens_scheduled(clip.tokenize(text)) for text in (source_text, edit_text)]
        _check_length(encoded[0], source, "source_text")
        _check_length(encoded[1], edit, "edit_text")
        source_words, edit_words = _local_blend(clip, source, edit, local_blend_words)
        control = PromptControl(
            mapping, mapped, until, weights, self_replace,
            tuple(entry[0] for entry in encoded[0]), tuple(entry[0] for entry in encoded[1]),
            source_words, edit_words,
        )  # fmt: skip
        return io.NodeOutput(control, *encoded)


def check_prompt_control(control: PromptControl, source: Any, edit: Any, edits: int) -> None:
    """ValueError unless the prompts are those that the control was made with.

    edits: batch size of the edit prompt, which may not be larger than the control's.
    """
    if edits > max(len(known) for known in control.edit_contexts):
        raise ValueError(f"prompt_control: it tells of one edit prompt, but 'edit' holds {edits}; give one at a time")
    for name, conditioning, known in (
        ("source", source, control.source_contexts),
        ("edit", edit, control.edit_contexts),
    ):
        for context, _ in conditioning:
            if not any(context.shape == k.shape and torch.equal(context, k) for k in known):
                raise ValueError(
                    f"prompt_control: the prompt at '{name}' is not the one it was made with; connect the output "
                    f"'{name}' of the same Prompt to Prompt node"
                )


def _per_word(clip: Any, edit: Prompt, name: str, text: str, low: float, high: float, default: float) -> torch.Tensor:
    """[edit tokens]: the numbers that `text` ("robot: 0.4, big dog: 0.2") gives to words, `default` for the others."""
    values = torch.full((edit.length,), float(default))
    for item in items(text):
        words, colon, number = item.rpartition(":")
        try:
            value = float(number)
        except ValueError:
            value = math.nan
        if not colon or not low <= value <= high:
            raise ValueError(
                f"{name}: {item!r} is not understood; write 'word: number' with numbers from {low:g} to {high:g}, "
                "several separated by commas"
            )
        values[places(clip, [edit], name, words)[0]] = value
    return values


def _local_blend(clip: Any, source: Prompt, edit: Prompt, text: str) -> tuple[tuple[int, ...], tuple[int, ...]]:
    """Places of the words in the source and in the edit."""
    found = [places(clip, [source, edit], "local_blend_words", words) for words in items(text)]
    in_source, in_edit = ([place for where in found for place in where[i]] for i in (0, 1))
    return tuple(in_source), tuple(in_edit)


def items(text: str) -> list[str]:
    """The pieces of a list, separated by commas or new lines."""
    return [piece.strip() for piece in text.replace("\n", ",").split(",") if piece.strip()]


def places(clip: Any, prompts: list[Prompt], name: str, words: str) -> list[list[int]]:
    """Where `words` stand in each of the prompts. ValueError if in none."""
    phrase = read_prompt(clip, words.strip(), name)
    found = [prompt.find(phrase) for prompt in prompts]
    if not any(found):
        texts = " or ".join(repr(prompt.text) for prompt in prompts)
        raise ValueError(f"{name}: {words.strip()!r} is not a word of {texts}")
    return found


def _check_length(conditioning: Any, prompt: Prompt, name: str) -> None:
    for context, _ in conditioning:
        if context.shape[1] != prompt.length:
            raise ValueError(
                f"{name}: its encoding has {context.shape[1]} columns for {prompt.length} tokens, so words cannot be "
                "told apart; take the node off that changes this CLIP"
            )
