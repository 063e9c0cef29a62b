"""Every part token that ships, with Prompt-to-Prompt as in the PartEdit authors' demo, on 50 scenes each::

    python dev.py bench shipped_tokens [--parts figure-head …] [--scenes 50] [--markdown BENCHMARKS.md]

Sources, judge and measures are those of `behaviour`; each scene is drawn and edited in one run. With `--json` the
numbers are kept, and `--merge FILE …` makes one table of several such files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.utils
import numpy as np

from ..partsworld import tokens
from ..partsworld.judge import Judge
from . import _edits, _report
from ._edits import Editor
from .behaviour import AIM_COLOUR, AIM_PSNR, Measured, fault, measure

HEAD = ("token", "scenes (dropped)", "PSNR outside", "worst tenth", "colour right", "both", "IoU of the found mask")


def run(editor: Editor, judge: Judge, name: str, scenes: int, batch: int) -> dict[str, Any]:
    """What was measured of one token, scene by scene."""
    found: list[Measured] = []
    tried = 0
    while len(found) < scenes and tried < 2 * scenes:
        asked = _edits.wishes(name, tried, min(batch, scenes - len(found)))
        tried += len(asked)
        done = editor.partedit_controlled(asked)
        verdicts = judge.all(list(done.source))
        pictures = zip(done.source.numpy(), done.edited.numpy(), done.masks.numpy(), strict=True)
        for wish, verdict, (source, edited, mask) in zip(asked, verdicts, pictures, strict=True):
            if fault(wish, verdict, source) is None:
                found.append(measure(wish, verdict.masks[wish.part], source, edited, mask))
        print(f"  {name}: {len(found)} of {scenes}", flush=True)
    return {
        "dropped": tried - len(found),
        "psnr": [m.psnr for m in found],
        "right": [m.right for m in found],
        "iou": [m.iou for m in found],
    }


def report(numbers: dict[str, dict[str, Any]]) -> str:
    """The table, and which tokens meet the aim."""
    rows, met = [], []
    for name, seen in numbers.items():
        psnr, right = float(np.mean(seen["psnr"])), float(np.mean(seen["right"]))
        both = np.mean([p >= AIM_PSNR and r for p, r in zip(seen["psnr"], seen["right"], strict=True)])
        rows.append([
            name, f"{len(seen['psnr'])} ({seen['dropped']})", f"{psnr:.1f} dB",
            f"{np.quantile(seen['psnr'], 0.1):.1f} dB",
            f"{right:.0%}", f"{both:.0%}", f"{np.mean(seen['iou']):.2f}",
        ])  # fmt: skip
        if psnr >= AIM_PSNR and right >= AIM_COLOUR:
            met.append(name)
    means = [float(np.mean([np.mean(seen[key]) for seen in numbers.values()])) for key in ("psnr", "right", "iou")]
    rows.append(["mean", "", f"{means[0]:.1f} dB", "", f"{means[1]:.0%}", "", f"{means[2]:.2f}"])
    said = f"Wanted, PSNR outside of {AIM_PSNR} dB or more and the colour right in {AIM_COLOUR:.0%} or more: "
    return _report.table(HEAD, rows) + f"\n\n{said}met by {', '.join(met) or 'none'}."


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench shipped_tokens", description=__doc__)
    _report.add_arguments(parser, "shipped_tokens")
    _edits.add_arguments(parser)
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, make one table of these JSON files")
    parser.set_defaults(parts=list(tokens.SHIPPED), steps=50)
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    numbers: dict[str, Any] = {}
    if arguments.merge:
        for file in arguments.merge:
            numbers |= json.loads(file.read_text(encoding="utf-8"))
        _report.publish(arguments, report(numbers) + f"\n\n{_report.where_it_ran()}.", numbers)
        return
    began, how = time.time(), _edits.settings(arguments)
    editor, judge = Editor(arguments.weights, arguments.tokens, how), Judge()
    for name in arguments.parts:
        numbers[name] = run(editor, judge, name, arguments.scenes, arguments.batch)
    said = f"{_report.where_it_ran()}. Settings: {how}. {time.time() - began:.0f} s."
    _report.publish(arguments, f"{report(numbers)}\n\n{said}", numbers)


if __name__ == "__main__":
    main()
