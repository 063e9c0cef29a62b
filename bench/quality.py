"""Is the demo model good enough: 64 fixed prompts and seeds, judged, and the VAE's reconstruction of unseen renders::

    python dev.py bench quality [--out sheet.png]

The judge is a network of its own (`partsworld/judge.py`); how good it is on unseen renders is printed first.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch

from ..partsworld import judge as judging
from ..partsworld.loader import WEIGHTS, load
from ..partsworld.render import render
from ..partsworld.scene import BACKGROUNDS, COLOURS, MAIN_PART, PARTS, Scene, sample_scene
from . import _report
from ._pictures import contact_sheet, generate, psnr

BAR = 0.90
JUDGE_BAR = 0.98
VAE_BAR = 28.0  # dB
UNSEEN = 40_000_000  # seeds from here on are nowhere trained on
TOLERANCE = 0.15  # of a part's place, in units of the object's size


def plain_scenes() -> list[Scene]:
    """Every kind in every colour twice, the backgrounds in turn."""
    backgrounds = list(BACKGROUNDS)
    pairs = [(kind, colour) for _ in range(2) for kind in PARTS for colour in COLOURS]
    return [
        sample_scene(UNSEEN + i, kind, background=backgrounds[i % len(backgrounds)], colour=colour)
        for i, (kind, colour) in enumerate(pairs)
    ]


def part_scenes() -> list[Scene]:
    """Two for each part that is not its object's main one: that part in another colour."""
    names, backgrounds = list(COLOURS), list(BACKGROUNDS)
    parts = [(kind, part) for kind in PARTS for part in PARTS[kind] if part != MAIN_PART[kind]]
    scenes = []
    for i, (kind, part) in enumerate(parts * 2):
        colour, other = names[i % 8], names[(i + 3 + i // 8) % 8]
        if (part, other) == ("wheels", "black"):  # no caption mentions these
            other = "white"
        scene = sample_scene(UNSEEN + 1000 + i, kind, background=backgrounds[i % len(backgrounds)], colour=colour)
        scenes.append(scene.recolour(part, other))
    return scenes


class Places:
    """Where the parts of each kind are in renders, and how large: measured on unseen ones."""

    def __init__(self, scenes: int = 40) -> None:
        self.ranges: dict[str, tuple[np.ndarray, np.ndarray]] = {}
        for number, kind in enumerate(PARTS):
            seeds = range(UNSEEN + 2000 + number * scenes, UNSEEN + 2000 + (number + 1) * scenes)
            layouts = [layout(kind, render(sample_scene(seed, kind), 128).masks[0]) for seed in seeds]
            self.ranges[kind] = np.nanmin(layouts, 0), np.nanmax(layouts, 0)

    def right(self, verdict: judging.Verdict) -> bool:
        """Whether every part is there, of a size and in a place that occurs."""
        if verdict.kind is None:
            return False
        found = layout(verdict.kind, verdict.masks)
        low, high = self.ranges[verdict.kind]
        return bool(((found >= low - TOLERANCE) & (found <= high + TOLERANCE)).all())


def layout(kind: str, masks: dict[str, np.ndarray]) -> np.ndarray:
    """[parts, 3]: each part's distance sideways and downwards from the object's middle and the root of its area.

    In units of the root of the object's area; NaN where a part is absent. Looking left or right is the same.
    """
    whole = np.maximum.reduce([masks[part] for part in PARTS[kind]])
    size, middle = np.sqrt(whole.sum()), _centre(whole)
    rows = []
    for part in PARTS[kind]:
        x, y = (_centre(masks[part]) - middle) / size
        rows.append((abs(x), y, np.sqrt(masks[part].sum()) / size if masks[part].any() else np.nan))
    return np.array(rows)


def _centre(mask: np.ndarray) -> np.ndarray:
    if not mask.any():
        return np.full(2, np.nan)
    rows, columns = np.indices(mask.shape)
    return np.array([(mask * columns).sum(), (mask * rows).sum()]) / mask.sum()


def reconstruction(vae: Any, count: int = 50) -> list[float]:
    """PSNR of each of `count` unseen renders, encoded and decoded."""
    values = []
    with torch.inference_mode():
        for i in range(count):
            picture = render(sample_scene(UNSEEN + 5000 + i, mixed=True)).image
            decoded = vae.decode(vae.encode(torch.from_numpy(picture)[None]))[0]
            values.append(psnr(decoded.cpu(), picture))
    return values


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench quality", description=__doc__)
    _report.add_arguments(parser, "quality")
    parser.add_argument("--out", type=Path, help="write a sheet of all pictures here; what was judged wrong is framed")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="another checkpoint")
    parser.add_argument("--steps", type=int, default=25)
    parser.add_argument("--cfg", type=float, default=6.0)
    parser.add_argument("--sampler", default="dpmpp_2m")
    parser.add_argument("--scheduler", default="karras")
    parser.add_argument("--seed", type=int, default=1, help="added to every picture's own number")
    arguments = parser.parse_args(argv)
    began, told = time.time(), _report.Transcript()

    judge = judging.Judge()
    itself = judging.accuracy(judge, 100)
    for name, value in itself.items():
        bar = JUDGE_BAR if name in ("kind", "background", "colour") else None
        told(_line(f"judge on 100 unseen renders: {name}", value, bar))

    models = load(arguments.weights)
    quality = reconstruction(models[2])
    told(_line("VAE on 50 unseen renders: PSNR, mean", float(np.mean(quality)), VAE_BAR, "dB"))
    told(_line("VAE on 50 unseen renders: PSNR, worst", min(quality), None, "dB"))

    plain, parts = plain_scenes(), part_scenes()
    scenes = plain + parts
    prompts = [scene.caption(parts=1) for scene in scenes]
    seeds = [arguments.seed + i for i in range(len(scenes))]
    sampled = time.time()
    pictures = generate(models, prompts, seeds, arguments.steps, arguments.cfg, arguments.sampler, arguments.scheduler)
    sampled = time.time() - sampled
    verdicts = judge.all(list(pictures))
    places = Places()
    checks = [_checks(scene, verdict, places) for scene, verdict in zip(scenes, verdicts, strict=True)]
    for name in ("object class", "object colour", "background"):
        told(_line(f"{len(plain)} plain prompts: {name} right", _mean(checks[: len(plain)], name), BAR))
    told(_line(f"{len(plain)} plain prompts: parts in place", _mean(checks[: len(plain)], "parts in place")))
    for name in ("object class", "object colour", "background", "part colour", "parts in place"):
        told(_line(f"{len(parts)} part prompts: {name} right", _mean(checks[len(plain) :], name)))
    for kind in PARTS:
        rows = [check for check, scene in zip(checks, scenes, strict=True) if scene.things[0].kind == kind]
        named = ", ".join(f"{name} {_mean(rows, name):.2f}" for name in checks[0])
        told(f"  {kind}: {named}")
    settings = {name: vars(arguments)[name] for name in ("sampler", "scheduler", "steps", "cfg", "seed")}
    told(f"{len(pictures)} pictures in {sampled:.0f} s, all in {time.time() - began:.0f} s; {settings}")
    if arguments.out:
        contact_sheet(arguments.out, list(pictures), prompts, [not all(check.values()) for check in checks])
        print(f"sheet: {arguments.out}")
    told(_report.where_it_ran())
    told.publish(arguments)


def _checks(scene: Scene, verdict: judging.Verdict, places: Places) -> dict[str, bool]:
    thing = scene.things[0]
    right = verdict.kind == thing.kind
    checks = {
        "object class": right,
        "object colour": verdict.colour == thing.colour,
        "background": verdict.background == scene.background,
        "parts in place": right and places.right(verdict),
    }
    for part, colour in thing.colours:
        if colour != thing.colour and (part, colour) != ("wheels", "black"):
            checks["part colour"] = verdict.colours.get(part) == colour
    return checks


def _mean(checks: Sequence[dict[str, bool]], name: str) -> float:
    return float(np.mean([check[name] for check in checks if name in check]))


def _line(what: str, value: float, bar: float | None = None, unit: str = "") -> str:
    shown, wanted = (f"{v:.1f} {unit}" if unit else f"{v:.1%}" for v in (value, bar or 0))
    return f"{what:<58} {shown:>9}" + (f"   (wanted: {wanted}) {'ok' if value >= bar else 'MISSED'}" if bar else "")


if __name__ == "__main__":
    main()
