"""PartEdit on parts-world: does the part change as asked, and does the rest stay::

    python dev.py bench behaviour [--parts figure-head car-hood] [--scenes 50] [--markdown BENCHMARKS.md]

The demo model generates each source from a prompt and noise of its own, so the judge (`partsworld/judge.py`) says
where the part is. A source in which it does not find the right object with this part is dropped. Everything is
measured against the decoded source. "Outside" is farther than 8 pixels (one latent cell) from the part.
"""

from __future__ import annotations

import argparse
import time
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any

import comfy.utils
import numpy as np
import torch
from scipy.ndimage import distance_transform_edt

from ..devtools.demo import ssim
from ..partsworld.judge import SMALLEST_PART, Judge, Verdict, nearest_colour
from . import _edits, _report
from ._edits import Edited, Editor, Wish

AIM_PSNR = 31.5
AIM_COLOUR = 0.90
CELL = 8  # pixels of one latent cell
RIM = 4  # pixels inside a part's edge that its colour is not told from
PILOT = 1000  # number of the first edit of the pilots; the counted ones start at 0
TOKEN = "PartEdit, part token"
CONTROLLED = "PartEdit, part token, Prompt-to-Prompt"
GIVEN = "PartEdit, the judge's mask instead"
ALONE = "edit prompt alone, same noise"


@dataclass(frozen=True)
class Measured:
    """One edited picture against its source. PSNRs in dB, capped at 100.

    errors: mean squared errors times share of the pixels, of those outside the part within 8, within 8 to 16 and
    farther than 16 pixels of it.
    """

    number: int
    psnr: float
    psnr_undilated: float
    psnr_far: float
    ssim: float | None
    ssim_undilated: float | None
    colour: str | None
    right: bool
    errors: tuple[float, ...]
    iou: float | None = None

    @property
    def aim(self) -> bool:
        return self.right and self.psnr >= AIM_PSNR


def measure(
    wish: Wish, part: np.ndarray, source: np.ndarray, edited: np.ndarray, found: np.ndarray | None = None
) -> Measured:
    """part: [H, W] bool, where the part is in the source; pictures [H, W, 3] in 0…1; found: [H, W] mask in 0…1."""
    away = distance_transform_edt(~part)
    square = np.square(source.astype(np.float64) - edited).mean(-1)
    colour = nearest_colour(edited[core(part)])
    rings = ~part & (away <= CELL), (away > CELL) & (away <= 2 * CELL), away > 2 * CELL
    return Measured(
        wish.number,
        _psnr(square[away > CELL]),
        _psnr(square[~part]),
        _psnr(square[away > 2 * CELL]),
        ssim(source, edited, away > CELL),
        ssim(source, edited, ~part),
        colour,
        colour == wish.wanted,
        tuple(float(square[ring].sum() / square.size) for ring in rings),
        None if found is None else overlap(found > 0.5, part),
    )


def core(part: np.ndarray) -> np.ndarray:
    """A part without its rim; of a thin part, the inner half."""
    depth = distance_transform_edt(part)
    return depth > min(RIM, depth.max() / 2)


def _psnr(square: np.ndarray) -> float:
    return float(-10 * np.log10(max(square.mean(), 1e-10)))


def overlap(found: np.ndarray, true: np.ndarray) -> float:
    """Intersection over union."""
    return float((found & true).sum() / max(1, (found | true).sum()))


# ---------------------------------------------------------------- one part


class PartBench:
    """Edits one part in many scenes, and collects what was measured of each method."""

    def __init__(self, name: str, editor: Editor, judge: Judge, batch: int) -> None:
        self.name = name
        self.editor = editor
        self.judge = judge
        self.batch = batch
        self.tried = 0
        self.dropped: Counter[str] = Counter()
        self.measured: dict[str, list[Measured]] = {}
        self.wishes: list[Wish] = []

    def pilot(self, scenes: int) -> tuple[str, str]:
        """The edit style that meets the aim in more of a few other scenes, and a sentence that says so."""
        scores: dict[str, tuple[float, float, float]] = {}
        for style in _edits.STYLES:
            found = [
                measured
                for wishes, parts, done in self._sources(PILOT, scenes, style)
                for measured in map(measure, wishes, parts, done.source.numpy(), done.edited.numpy())
            ]
            scores[style] = (_mean(m.aim for m in found), _mean(m.right for m in found), _mean(m.psnr for m in found))
        best = max(_edits.STYLES, key=lambda style: scores[style])
        said = ", ".join(f"{s}: aim met in {a:.0%}, colour right in {c:.0%}, {p:.1f} dB outside"
                         for s, (a, c, p) in scores.items())  # fmt: skip
        return best, f"edit style on {scenes} pilot scenes: {said}"

    def run(self, scenes: int, style: str, denoises: Sequence[float]) -> None:
        """Measure every method on `scenes` scenes; up to twice as many are tried."""
        for wishes, parts, done in self._sources(0, scenes, style, count=True):
            for method, pictures in self._methods(wishes, parts, done, style, denoises):
                masks = done.masks.numpy() if method == TOKEN else [None] * len(wishes)
                found = map(measure, wishes, parts, done.source.numpy(), pictures.numpy(), masks)
                self.measured.setdefault(method, []).extend(found)
            self.wishes += wishes
            print(f"  {self.name}: {len(self.wishes)} of {scenes}", flush=True)

    def _methods(
        self, asked: list[Wish], parts: list[np.ndarray], done: Edited, style: str, denoises: Sequence[float]
    ) -> Iterator[tuple[str, torch.Tensor]]:
        """Name and edited pictures of each method."""
        yield TOKEN, done.edited
        yield CONTROLLED, self.editor.with_prompt_to_prompt(asked)
        yield GIVEN, self.editor.partedit(asked, style, torch.from_numpy(np.stack(parts)).float()).edited
        yield ALONE, self.editor.prompt_alone(asked, style)
        for denoise in denoises:
            pictures = self.editor.image_to_image(asked, style, done.latents, denoise)
            yield f"img2img, denoise {denoise:g}", pictures

    def _sources(
        self, first: int, scenes: int, style: str, count: bool = False
    ) -> Iterator[tuple[list[Wish], list[np.ndarray], Edited]]:
        """Batches of PartEdit runs whose sources show what the prompt says, until there are `scenes` of them."""
        kept, tried = 0, 0
        while kept < scenes and tried < 2 * scenes:
            asked = _edits.wishes(self.name, first + tried, min(self.batch, scenes - kept))
            tried += len(asked)
            done = self.editor.partedit(asked, style)
            verdicts = self.judge.all(list(done.source))
            faults = [
                fault(wish, verdict, picture)
                for wish, verdict, picture in zip(asked, verdicts, done.source.numpy(), strict=True)
            ]
            good = [i for i, reason in enumerate(faults) if reason is None]
            if count:
                self.tried += len(asked)
                self.dropped.update(reason for reason in faults if reason)
            kept += len(good)
            if good:
                chosen = Edited(done.source[good], done.edited[good], done.latents[good], done.masks[good])
                yield [asked[i] for i in good], [verdicts[i].masks[asked[i].part] for i in good], chosen


def fault(wish: Wish, verdict: Verdict, source: np.ndarray) -> str | None:
    """Why a source cannot be measured, or None."""
    if verdict.kind != wish.kind:
        return f"no {wish.kind} found"
    part = verdict.masks[wish.part]
    if part.mean() < 2 * SMALLEST_PART:
        return f"no {wish.part} found"
    if nearest_colour(source[core(part)]) == wish.wanted:
        return f"the {wish.part} has the wanted colour already"
    return None


# ---------------------------------------------------------------- what is printed


def _mean(values: Any) -> float:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


HEAD = ("method", "PSNR outside", "PSNR outside, undilated", "SSIM outside", "SSIM outside, undilated", "colour right",
        "both (≥ 31.5 dB, colour right)", "IoU of the found mask")  # fmt: skip


def _row(method: str, found: list[Measured]) -> list[str]:
    ious = [m.iou for m in found if m.iou is not None]
    return [
        method,
        f"{_mean(m.psnr for m in found):.1f} dB",
        f"{_mean(m.psnr_undilated for m in found):.1f} dB",
        f"{_mean(m.ssim for m in found):.3f}",
        f"{_mean(m.ssim_undilated for m in found):.3f}",
        f"{_mean(m.right for m in found):.0%}",
        f"{_mean(m.aim for m in found):.0%}",
        f"{_mean(ious):.2f}" if ious else "–",
    ]


def section(bench: PartBench, style: str) -> str:
    """Markdown on one part: the table, and what limits PartEdit."""
    found = bench.measured.get(TOKEN, [])
    title = f"### {bench.name}: {len(found)} scenes\n\n"
    dropped = ", ".join(f"{n} × {reason}" for reason, n in bench.dropped.most_common()) or "none"
    title += f"{bench.tried} sources generated, dropped: {dropped}. "
    if not found:
        return title
    example = bench.wishes[0]
    title += f'Edit style "{style}": "{example.source}" → "{example.edit(style)}".\n\n'
    rows = [_row(method, measured) for method, measured in bench.measured.items()]
    return title + _report.table(HEAD, rows) + "\n\n" + limits(found, bench.measured[GIVEN], bench.wishes)


def limits(found: list[Measured], given: list[Measured], asked: list[Wish]) -> str:
    """Where PartEdit's error outside lies, and what became of the parts whose colour is wrong."""
    errors = np.array([m.errors for m in found])
    shares = errors.mean(0) / max(errors.mean(), 1e-12) / 3
    quantiles = np.quantile([m.psnr for m in found], (0.1, 0.5, 0.9))
    psnr, right = _mean(m.psnr for m in found), _mean(m.right for m in found)
    wrong = Counter(
        f"{wish.wanted} wanted, {m.colour} came (from {wish.colour})"
        for m, wish in zip(found, asked, strict=True)
        if not m.right
    )
    lines = [
        (
            f"Aim for the part token: PSNR outside ≥ {AIM_PSNR} dB: {'met' if psnr >= AIM_PSNR else 'missed'} "
            f"({psnr:.1f} dB); colour right ≥ {AIM_COLOUR:.0%}: {'met' if right >= AIM_COLOUR else 'missed'} "
            f"({right:.0%})."
        ),
        (
            f"Of its squared error outside the part, {shares[0]:.0%} lies within {CELL} pixels of the part, "
            f"{shares[1]:.0%} within {CELL} to {2 * CELL}, {shares[2]:.0%} farther away. Farther away the PSNR is "
            f"{_mean(m.psnr_far for m in found):.1f} dB. PSNR outside of the worst tenth, the middle and the best "
            f"tenth of the scenes: {quantiles[0]:.1f}, {quantiles[1]:.1f}, {quantiles[2]:.1f} dB."
        ),
        (
            f"With the judge's mask instead of the token's: {_mean(m.psnr for m in given) - psnr:+.1f} dB outside, "
            f"{_mean(m.right for m in given) - right:+.0%} colour right: so much is due to the found mask."
        ),
        f"Colours that came out wrong: {', '.join(f'{what} × {n}' for what, n in wrong.most_common()) or 'none'}.",
    ]
    return "\n".join(f"- {line}" for line in lines)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench behaviour", description=__doc__)
    _report.add_arguments(parser, "behaviour")
    _edits.add_arguments(parser)
    parser.add_argument("--scenes", type=int, default=50, help="per part (default: %(default)s)")
    parser.add_argument(
        "--edit-style", choices=(*_edits.STYLES, "best"), default="best",
        help="how the edit is worded; best: what meets the aim more often on the pilot scenes",
    )  # fmt: skip
    parser.add_argument("--pilot", type=int, default=8, help="scenes per part and style that choose the best style")
    parser.add_argument("--denoise", type=float, nargs="*", default=[0.5, 0.8], help="of img2img")
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    began = time.time()
    how = _edits.settings(arguments)
    editor, judge = Editor(arguments.weights, arguments.tokens, how), Judge()
    texts, numbers = [], {}
    for name in arguments.parts:
        bench, style, said = PartBench(name, editor, judge, arguments.batch), arguments.edit_style, ""
        if style == "best":
            style, said = bench.pilot(arguments.pilot)
            print(f"  {name}: {said}", flush=True)
        bench.run(arguments.scenes, style, arguments.denoise)
        texts.append(section(bench, style) + (f"\n- {said[0].upper()}{said[1:]}." if said else ""))
        numbers[name] = {
            "style": style,
            "tried": bench.tried,
            "dropped": dict(bench.dropped),
            "wishes": [vars(wish) for wish in bench.wishes],
            "methods": {method: [vars(m) for m in found] for method, found in bench.measured.items()},
        }
    texts.append(f"{_report.where_it_ran()}. Settings: {how}. {time.time() - began:.0f} s.")
    _report.publish(arguments, "\n\n".join(texts), numbers)


if __name__ == "__main__":
    main()
