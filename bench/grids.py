"""Pictures of what PartEdit's settings do on parts-world, like the paper's figures 10, 11 and 13::

    python dev.py bench grids [--scenes 3] [--folder docs]

`grid_omega.png`: the threshold ω (figure 13). `grid_blend_until.png`: until which share of the steps source and edit
are blended, t_e / T (figure 10). `grid_threshold.png`: ways to make a mask of one and the same heat map (figure 11).
Under each edited picture stands the mask it was made with, mean over the steps.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import comfy.utils
import numpy as np
import torch
from PIL import Image, ImageDraw

from ..core.threshold import partedit_mask
from ..core.threshold import threshold as to_mask
from ..core.unet.sampling import part_heatmaps
from ..partsworld.judge import Judge
from . import _edits, _report
from ._edits import Edited, Editor, Wish
from .behaviour import fault

OMEGAS = (0.5, 0.75, 1.0, 1.25, 1.5, 2.0)
FRACTIONS = (0.2, 0.4, 0.6, 0.8, 1.0)
NOISE_LEVEL, TIMESTEPS = 0.25, 4  # of AttentionMaskExtractor, as by default
SIDE, GAP, HEAD, MARGIN = 104, 3, 16, 132
LARGEST = 400_000  # bytes


@dataclass(frozen=True)
class Column:
    """Its title, and a picture (and a mask) for each wish of a row of the grid."""

    title: str
    pictures: torch.Tensor
    masks: torch.Tensor | None = None


Grid = Callable[[Editor, list[Wish], str], list[Column]]


def omega(editor: Editor, asked: list[Wish], style: str) -> list[Column]:
    runs = {f"omega {value:g}": editor.partedit(asked, style, omega=value) for value in OMEGAS}
    return _columns(runs)


def blend_until(editor: Editor, asked: list[Wish], style: str) -> list[Column]:
    runs = {f"until {value:.0%}": editor.partedit(asked, style, blend_until=value) for value in FRACTIONS}
    columns = _columns(runs)
    return [columns[0], Column("never", editor.prompt_alone(asked, style)), *columns[1:]]


def threshold(editor: Editor, asked: list[Wish], style: str) -> list[Column]:
    """One heat map of each source, four masks of it given to the sampler."""
    first = editor.partedit(asked, style)
    with torch.inference_mode():
        heatmaps = part_heatmaps(
            editor.models[0], editor.token(asked[0]), {"samples": first.latents}, editor.how.layers, NOISE_LEVEL,
            TIMESTEPS, editor.how.seed,
        )[:, 0]  # fmt: skip
    ways: dict[str, Callable[[torch.Tensor], torch.Tensor]] = {
        "fixed at 0.5": lambda heatmap: to_mask(heatmap, "fixed", lower=0.5)[0],
        "Otsu": lambda heatmap: to_mask(heatmap, "otsu")[0],
        f"PartEdit, omega {editor.how.omega:g}": lambda heatmap: partedit_mask(heatmap, editor.how.omega)[0],
        "heat map itself": lambda heatmap: heatmap,
    }
    runs = {
        title: editor.partedit(asked, style, torch.stack([make(heatmap) for heatmap in heatmaps]))
        for title, make in ways.items()
    }
    return [*_columns(runs), Column("PartEdit, each step", first.edited, first.masks)]


def _columns(runs: dict[str, Edited]) -> list[Column]:
    source = next(iter(runs.values())).source
    return [Column("source", source), *(Column(title, run.edited, run.masks) for title, run in runs.items())]


GRIDS: dict[str, Grid] = {"omega": omega, "blend_until": blend_until, "threshold": threshold}


def scenes(editor: Editor, judge: Judge, name: str, count: int) -> list[Wish]:
    """The first `count` edits of a part whose sources show it."""
    asked = _edits.wishes(name, 0, 2 * count + 2)
    sources = editor.generate(asked)
    verdicts = judge.all(list(sources))
    good = [
        wish
        for wish, verdict, picture in zip(asked, verdicts, sources.numpy(), strict=True)
        if fault(wish, verdict, picture) is None
    ]
    return good[:count]


# ---------------------------------------------------------------- drawing


def draw(rows: list[tuple[Wish, str, list[Column], int]]) -> Image.Image:
    """rows: a wish, its edit prompt, the columns and which of their pictures are its own."""
    columns = rows[0][2]
    half = SIDE // 2
    height = SIDE + half + 2 * GAP
    sheet = Image.new("RGB", (MARGIN + len(columns) * (SIDE + GAP), HEAD + len(rows) * height), "white")
    pen = ImageDraw.Draw(sheet)
    for place, column in enumerate(columns):
        middle = MARGIN + place * (SIDE + GAP) + (SIDE - pen.textlength(column.title)) / 2
        pen.text((middle, 2), column.title, fill="black")
    for number, (wish, edit, own, index) in enumerate(rows):
        top = HEAD + number * height
        bottom = _words(pen, top + 4, wish.source)
        _words(pen, bottom + 6, f"edit: {edit}")
        for place, column in enumerate(own):
            left = MARGIN + place * (SIDE + GAP)
            sheet.paste(_thumbnail(column.pictures[index].numpy(), SIDE), (left, top))
            if column.masks is not None:
                mask = column.masks[index].numpy()[..., None].repeat(3, -1)
                sheet.paste(_thumbnail(mask, half), (left + (SIDE - half) // 2, top + SIDE + 1))
    return sheet


def _thumbnail(picture: np.ndarray, side: int) -> Image.Image:
    pixels = (picture.clip(0, 1) * 255 + 0.5).astype(np.uint8)
    return Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS)


def _words(pen: ImageDraw.ImageDraw, top: int, text: str) -> int:
    """Text broken into lines in the left margin; returns where it ends. The font has no Greek and no arrows."""
    line = ""
    for word in [*text.split(), ""]:
        if not word or pen.textlength(f"{line} {word}") > MARGIN - 6:
            pen.text((2, top), line, fill="black")
            line, top = word, top + 13
        else:
            line = f"{line} {word}".strip()
    return top


def save(sheet: Image.Image, file: Path) -> None:
    """As PNG of 256 colours or, where that is too large for a page, fewer."""
    for colours in (256, 128, 64, 32):
        sheet.quantize(colours, dither=Image.Dither.NONE).save(file, optimize=True)
        if file.stat().st_size <= LARGEST:
            return


def main(argv: Sequence[str] | None = None) -> None:
    """Draw the grids."""
    parser = argparse.ArgumentParser(prog="python dev.py bench grids", description=__doc__)
    _report.add_arguments(parser, "grids")
    _edits.add_arguments(parser)
    parser.add_argument("--scenes", type=int, default=3, help="rows per part (default: %(default)s)")
    parser.add_argument("--edit-style", choices=_edits.STYLES, default="object", help="how the edit is worded")
    parser.add_argument("--grids", nargs="+", choices=list(GRIDS), default=list(GRIDS))
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    arguments.folder.mkdir(parents=True, exist_ok=True)
    began = time.time()
    how, style = _edits.settings(arguments), arguments.edit_style
    editor, judge = Editor(arguments.weights, arguments.tokens, how), Judge()
    chosen = {name: scenes(editor, judge, name, arguments.scenes) for name in arguments.parts}
    lines, sizes = [], {}
    for grid in arguments.grids:
        rows = []
        for asked in filter(None, chosen.values()):
            columns = GRIDS[grid](editor, asked, style)
            rows += [(wish, wish.edit(style), columns, index) for index, wish in enumerate(asked)]
        file = arguments.folder / f"grid_{grid}.png"
        save(draw(rows), file)
        sizes[file.name] = file.stat().st_size
        lines.append(f"![{grid}]({arguments.folder.name}/{file.name})")
        print(f"  {file}: {sizes[file.name] / 1000:.0f} kB", flush=True)
    text = "\n\n".join(lines) + f'\n\nEdit style "{style}". {_report.where_it_ran()}. Settings: {how}. '
    _report.publish(arguments, text + f"{time.time() - began:.0f} s.", sizes)


if __name__ == "__main__":
    main()
