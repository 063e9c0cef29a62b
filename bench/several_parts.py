"""Several parts at once on parts-world: head and torso recoloured in one run, beside a run for each::

    python dev.py bench several_parts [--parts figure-torso figure-head] [--scenes 20] [--markdown BENCHMARKS.md]

Sources, judge and measures are those of `behaviour`. All runs of a scene have the same source, edit prompt and noise;
they differ in the token alone.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import comfy.utils
import numpy as np

from ..core.part_token import PartToken, combine
from ..partsworld.judge import Judge, Verdict, nearest_colour
from . import _edits, _report
from ._edits import Edited, Editor, Wish
from .behaviour import _mean, core, fault, measure

STYLE = "object"


@dataclass(frozen=True)
class Run:
    """One way to edit: `parts` are those its token holds."""

    parts: tuple[str, ...]
    token: PartToken

    @property
    def name(self) -> str:
        return f"{' + '.join(self.parts)} in one run" if len(self.parts) > 1 else f"{self.parts[0]} alone"


@dataclass(frozen=True)
class Found:
    """One edited picture. psnr, ssim: farther than 8 pixels from the parts of the run; psnr_all: from all the parts;
    right: part → whether it has the wanted colour now; iou: of the mask with the run's parts.
    """

    number: int
    psnr: float
    psnr_all: float
    ssim: float | None
    right: dict[str, bool]
    iou: float | None


class TokenEditor(Editor):
    """Edits with one given token, whatever part a wish names."""

    chosen: PartToken

    def token(self, wish: Wish) -> PartToken:  # noqa: ARG002 - the editor's own asks for one per part
        return self.chosen

    def edit(self, asked: Sequence[Wish], token: PartToken) -> Edited:
        self.chosen = token
        return self.partedit(asked, STYLE)


class PartsBench:
    """Edits several parts of one kind of object in many scenes, in one run and in a run for each."""

    def __init__(self, names: Sequence[str], editor: TokenEditor, judge: Judge, batch: int) -> None:
        self.first = names[0]
        self.parts = tuple(name.partition("-")[2] for name in names)
        self.editor = editor
        self.judge = judge
        self.batch = batch
        tokens = {
            part: Editor.token(editor, _edits.wishes(name, 0, 1)[0])
            for name, part in zip(names, self.parts, strict=True)
        }
        self.runs = [Run(self.parts, _combined([tokens[part] for part in self.parts]))]
        self.runs += [Run((part,), tokens[part]) for part in self.parts]
        self.tried = 0
        self.dropped: Counter[str] = Counter()
        self.wishes: list[Wish] = []
        self.found: dict[str, list[Found]] = {run.name: [] for run in self.runs}

    def run(self, scenes: int) -> None:
        """Measure every run on `scenes` scenes; up to twice as many are tried."""
        while len(self.wishes) < scenes and self.tried < 2 * scenes:
            asked = _edits.wishes(self.first, self.tried, min(self.batch, scenes - len(self.wishes)))
            self.tried += len(asked)
            verdicts, good = None, []
            for run in self.runs:
                done = self.editor.edit(asked, run.token)
                if verdicts is None:
                    verdicts = self.judge.all(list(done.source))
                    good = list(self._usable(asked, verdicts, done.source.numpy()))
                self.found[run.name] += [self._measure(run, asked[i], verdicts[i], done, i) for i in good]
            self.wishes += [asked[i] for i in good]
            print(f"  {len(self.wishes)} of {scenes}", flush=True)

    def _usable(self, asked: Sequence[Wish], verdicts: Sequence[Verdict], sources: np.ndarray) -> Iterator[int]:
        """Which sources show what the prompt says, with all the parts."""
        for i, (wish, verdict, source) in enumerate(zip(asked, verdicts, sources, strict=True)):
            faults = [fault(replace(wish, part=part), verdict, source) for part in self.parts]
            reasons = [reason for reason in faults if reason]
            self.dropped.update(reasons[:1])
            if not reasons:
                yield i

    def _measure(self, run: Run, wish: Wish, verdict: Verdict, done: Edited, i: int) -> Found:
        source, edited, mask = done.source[i].numpy(), done.edited[i].numpy(), done.masks[i].numpy()
        own = np.logical_or.reduce([verdict.masks[part] for part in run.parts])
        every = np.logical_or.reduce([verdict.masks[part] for part in self.parts])
        measured = measure(wish, own, source, edited, mask)
        right = {part: nearest_colour(edited[core(verdict.masks[part])]) == wish.wanted for part in self.parts}
        outside_all = measure(wish, every, source, edited).psnr
        return Found(wish.number, measured.psnr, outside_all, measured.ssim, right, measured.iou)

    def section(self) -> str:
        """Markdown: the table, and an example."""
        dropped = ", ".join(f"{n} × {reason}" for reason, n in self.dropped.most_common()) or "none"
        title = f"{self.tried} sources generated, {len(self.wishes)} used, dropped: {dropped}."
        if not self.wishes:
            return title
        example = self.wishes[0]
        head = ["run", "PSNR outside its parts", "PSNR outside all parts", "SSIM outside its parts"]
        head += [f"{part}: colour right" for part in self.parts] + ["IoU of the found mask"]
        rows = [self._row(run) for run in self.runs]
        return f'{title} "{example.source}" → "{example.edit(STYLE)}".\n\n{_report.table(head, rows)}'

    def _row(self, run: Run) -> list[str]:
        found = self.found[run.name]
        colours = [f"{_mean(f.right[part] for f in found):.0%}" for part in self.parts]
        return [
            run.name,
            f"{_mean(f.psnr for f in found):.1f} dB",
            f"{_mean(f.psnr_all for f in found):.1f} dB",
            f"{_mean(f.ssim for f in found):.3f}",
            *(c if part in run.parts else f"{c} (not asked)" for part, c in zip(self.parts, colours, strict=True)),
            f"{_mean(f.iou for f in found):.2f}",
        ]


def _combined(tokens: Sequence[PartToken]) -> PartToken:
    token = tokens[0]
    for other in tokens[1:]:
        token = combine(token, other)
    return token


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench several_parts", description=__doc__)
    _report.add_arguments(parser, "several_parts")
    _edits.add_arguments(parser)
    parser.set_defaults(parts=["figure-torso", "figure-head"])
    parser.add_argument("--scenes", type=int, default=20, help="default: %(default)s")
    arguments = parser.parse_args(argv)
    if len({name.partition("-")[0] for name in arguments.parts}) != 1 or len(arguments.parts) < 2:
        parser.error("--parts: two or more parts of one kind of object are needed, such as figure-torso figure-head")
    comfy.utils.set_progress_bar_enabled(False)
    began = time.time()
    how = _edits.settings(arguments)
    bench = PartsBench(arguments.parts, TokenEditor(arguments.weights, arguments.tokens, how), Judge(), arguments.batch)
    bench.run(arguments.scenes)
    text = f"{bench.section()}\n\n{_report.where_it_ran()}. Settings: {how}. {time.time() - began:.0f} s."
    numbers: dict[str, Any] = {
        "tried": bench.tried,
        "dropped": dict(bench.dropped),
        "wishes": [vars(wish) for wish in bench.wishes],
        "runs": {name: [vars(f) for f in found] for name, found in bench.found.items()},
    }
    _report.publish(arguments, text, numbers)


if __name__ == "__main__":
    main()
