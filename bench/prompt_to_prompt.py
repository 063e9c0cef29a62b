"""Prompt-to-Prompt on parts-world: does the layout stay, and does a weight make a word stronger::

    python dev.py bench prompt_to_prompt [--scenes 20] [--markdown BENCHMARKS.md]

Swap: "a red figure …" becomes "a blue figure …" from the same noise, with and without Prompt-to-Prompt (no part token).
The judge (`partsworld/judge.py`) says where the object is, in the source and in the edit. Reweight: of "a red figure
with a blue head …" the word "blue" is given a weight, and the head's colour is measured. (PartEdit with and without
Prompt-to-Prompt stands in the bench `behaviour`.)
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from typing import Any

import comfy.utils
import numpy as np
import torch

from ..partsworld.judge import SMALLEST_PART, Judge, nearest_colour
from ..partsworld.scene import COLOURS
from . import _edits, _report
from ._edits import Editor
from .behaviour import core, overlap

WEIGHTS = (0.0, 0.5, 1.0, 2.0, 4.0)
SWAPS: dict[str, dict[str, Any] | None] = {
    "edit prompt alone, same noise": None,
    "cross_replace 0.8, self_replace 0.4": {"cross_replace": 0.8, "self_replace": 0.4, "word_cross_replace": ""},
    "cross_replace 1, the new word 0.4, self_replace 0": {},
    "cross_replace 1, self_replace 1": {"self_replace": 1.0, "word_cross_replace": ""},
}


def swap_rows(editor: Editor, judge: Judge, name: str, scenes: int) -> list[list[str]]:
    """Per setting: overlap of the object with the source's, change outside both, share of right colours."""
    asked = _edits.wishes(name, 0, scenes)
    sources = torch.cat([editor.generate([wish]) for wish in asked])
    before = [_object(verdict.masks) for verdict in judge.all(list(sources))]
    rows = []
    for label, words in SWAPS.items():
        edited = torch.cat([
            editor.prompt_alone([wish], "object") if words is None else editor.prompt_to_prompt([wish], **words)
            for wish in asked
        ])  # fmt: skip
        after = [_object(verdict.masks) for verdict in judge.all(list(edited))]
        kept = np.mean([overlap(a, b) for a, b in zip(before, after, strict=True)])
        outside = [
            -10 * np.log10(max(float(np.square(s - e)[~(a | b)].mean()), 1e-10))
            for s, e, a, b in zip(sources.numpy(), edited.numpy(), before, after, strict=True)
        ]
        right = np.mean([
            nearest_colour(e[core(b)]) == wish.wanted for e, b, wish in zip(edited.numpy(), after, asked, strict=True)
        ])  # fmt: skip
        rows.append([label, f"{kept:.2f}", f"{np.mean(outside):.1f} dB", f"{right:.0%}"])
        print(f"  {name}: {rows[-1]}", flush=True)
    return rows


def reweight_rows(editor: Editor, judge: Judge, name: str, scenes: int) -> tuple[list[list[str]], int]:
    """Per weight of the colour word: distance of the part's mean colour from that colour, share of right colours."""
    asked = _edits.wishes(name, 0, scenes)
    texts = {wish.number: wish.edit("part") for wish in asked}
    found: dict[float, list[tuple[float, bool]]] = {weight: [] for weight in WEIGHTS}
    for wish in asked:
        pictures = {
            weight: editor.prompt_to_prompt(
                [wish], source_text=texts[wish.number], edit_text="", mode="reweight", word_cross_replace="",
                word_weights=f"{wish.wanted}: {weight}",
            )[0] for weight in WEIGHTS
        }  # fmt: skip
        part = judge.all([pictures[1.0]])[0].masks[wish.part]
        if part.mean() < 2 * SMALLEST_PART:
            continue
        for weight, picture in pictures.items():
            inside = picture.numpy()[core(part)]
            distance = float(np.linalg.norm(inside.mean(0) - np.array(COLOURS[wish.wanted])))
            found[weight].append((distance, nearest_colour(inside) == wish.wanted))
    rows = [
        [f"{weight:g}", f"{np.mean([d for d, _ in seen]):.3f}", f"{np.mean([right for _, right in seen]):.0%}"]
        for weight, seen in found.items()
    ]
    return rows, len(found[1.0])


def _object(masks: dict[str, np.ndarray]) -> np.ndarray:
    """All parts together, [H, W] bool."""
    return np.logical_or.reduce(list(masks.values()))


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench prompt_to_prompt", description=__doc__)
    _report.add_arguments(parser, "prompt_to_prompt")
    _edits.add_arguments(parser)
    parser.add_argument("--scenes", type=int, default=20)
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    began = time.time()
    how = _edits.settings(arguments)
    editor, judge = Editor(arguments.weights, arguments.tokens, how), Judge()
    texts, numbers = [], {}
    for name in arguments.parts:
        swaps = swap_rows(editor, judge, name, arguments.scenes)
        weights, counted = reweight_rows(editor, judge, name, arguments.scenes)
        wish = _edits.wishes(name, 0, 1)[0]
        texts.append(
            f'### {name.partition("-")[0]}: "{wish.source}" → "{wish.edit("object")}", {arguments.scenes} scenes\n\n'
            + _report.table(("Prompt-to-Prompt", "object overlaps the source's (IoU)", "PSNR outside the objects",
                             "colour right"), swaps)
            + f'\n\nThe weight of the colour of the {wish.part} in "{wish.edit("part")}", {counted} scenes:\n\n'
            + _report.table(("weight", f"distance of the {wish.part}'s colour (RGB in 0…1)", "colour right"), weights)
        )  # fmt: skip
        numbers[name] = {"swap": swaps, "reweight": weights}
    texts.append(f"{_report.where_it_ran()}. Settings: {how}. {time.time() - began:.0f} s.")
    _report.publish(arguments, "\n\n".join(texts), numbers)


if __name__ == "__main__":
    main()
