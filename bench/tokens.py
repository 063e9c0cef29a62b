"""Do learned part tokens find their part: mean IoU on unseen pictures, by pictures learned from, layers and noise::

    python dev.py bench tokens [--tokens figure-head car-hood] [--markdown BENCHMARKS.md]

Rendered scenes, exact masks. Training: the first of the seeds that `partsworld/tokens.py` uses, each with its mirror
image (the paper's recipe: without). Test: 50 scenes
a kind from `TEST` on, with which nothing was trained and no setting chosen (settings were chosen on 50 scenes a kind
from 5,500,000 on). The heat map is AttentionMaskExtractor's with its defaults, unconditional, binarised at Otsu's
threshold. The ceiling is the same of the true mask, averaged to 16 × 16 as the model's finest attention is.
"""

from __future__ import annotations

import argparse
import dataclasses
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import comfy.utils
import numpy as np
import torch
import torch.nn.functional as F

from ..core.heatmap import normalise
from ..core.threshold import otsu
from ..core.token_training import RECIPES, LayerQueries, Recipe, Trained, optimise_token, predicted_map
from ..core.unet.layers import layer_table
from ..core.unet.queries import collect_queries
from ..partsworld import tokens
from ..partsworld.loader import WEIGHTS, load
from . import _report

TEST = 41_000_000
TESTED = 50
COUNTS = (1, 2, 5, 10, 20)
EXTRACTED = ((0.25, 0.0), 4)
"""Noise range and number of timesteps of AttentionMaskExtractor's defaults."""
LAYERS = ("input.3", "input.5", "middle.0", "output.0", "output.1", "output.2", "output.3",
          "level:16", "decoder", "all")  # fmt: skip
NOISES = {"early": (0.95, 0.65), "intermediate": (0.65, 0.35), "late": (0.35, 0.05), "as shipped": tokens.NOISE}
NOISE_TIMESTEPS = 4
LONGER = ((0.5, 0.0), 8)
"""A longer look at a noisier picture, which costs twice as much."""
NOISE_TOKENS = ("figure-head", "car-hood")
CURVE_TOKEN = "figure-head"
PAPER_SIDE = 64  # pixels to which the paper's recipe gets its masks averaged: at 256 it takes an hour for all tokens


@dataclasses.dataclass(frozen=True)
class Seen:
    """What the UNet makes of pictures: the queries of every layer by its address, and masks [n, 256, 256] by part."""

    queries: dict[str, LayerQueries]
    masks: dict[str, torch.Tensor]


class Bench:
    """The model, and what it has seen so far."""

    def __init__(self, weights: Path) -> None:
        self.model, _, self.vae = load(weights)
        self.table = layer_table(self.model)
        self._latents: dict[tuple[str, bool], torch.Tensor] = {}

    def see(self, kind: str, test: bool, noise: tuple[float, float], timesteps: int) -> Seen:
        """Training or test pictures of a kind at these noise levels."""
        scenes = tokens.scenes(kind, TESTED, TEST) if test else tokens.scenes(kind, max(COUNTS))
        parts = [name.split("-")[1] for name in tokens.SHIPPED if name.split("-")[0] == kind]
        drawn = {part: tokens.pictures(scenes, part) for part in parts}
        if not test:
            drawn = {part: (tokens.with_mirrored(p), tokens.with_mirrored(m)) for part, (p, m) in drawn.items()}
        if (kind, test) not in self._latents:
            self._latents[kind, test] = tokens.encode(self.vae, drawn[parts[0]][0])
        latent = {"samples": self._latents[kind, test]}
        kept = collect_queries(self.model, latent, "all", noise, timesteps, tokens.SEED)
        names = (f"{block}.{number}" for block, number, _ in self.table.layers)
        return Seen(dict(zip(names, kept, strict=True)), {part: masks for part, (_, masks) in drawn.items()})

    def chosen(self, seen: Seen, layers: str, pictures: int | None = None) -> list[LayerQueries]:
        """The queries of a selection of layers, of the first few pictures (a training picture is followed by its
        mirror image).
        """
        names = {f"{block}.{number}" for block, number, _ in self.table.select(layers)}
        return [dataclasses.replace(q, queries=q.queries[:pictures]) for n, q in seen.queries.items() if n in names]


def mean_iou(maps: torch.Tensor, masks: torch.Tensor) -> float:
    """Of heat maps [n, H, W], each binarised at its own Otsu threshold, with masks [n, H, W]."""
    values = []
    for heatmap, mask in zip(maps, masks, strict=True):
        found, true = heatmap > otsu(heatmap), mask > 0.5
        values.append(((found & true).sum() / (found | true).sum().clamp(min=1)).item())
    return float(np.mean(values))


def ceiling(masks: torch.Tensor, side: int = 16) -> float:
    """Mean IoU of the true masks, averaged to side × side and back."""
    return mean_iou(normalise(_resize(F.adaptive_avg_pool2d(masks[:, None], side), masks)), masks)


def found(trained: Trained, layers: list[LayerQueries], masks: torch.Tensor) -> float:
    """Mean IoU of a token."""
    size = (masks.shape[-2], masks.shape[-1])
    return mean_iou(normalise(predicted_map(trained.embedding, layers, size, trained.parts)), masks)


def _resize(maps: torch.Tensor, like: torch.Tensor) -> torch.Tensor:
    return F.interpolate(maps, like.shape[-2:], mode="bilinear", align_corners=False)[:, 0]


# ---------------------------------------------------------------- what is measured


def of_token(bench: Bench, name: str, train: Seen, test: Seen, closer: Seen, paper: bool) -> dict[str, Any]:
    """Mean IoU by pictures and by layers, the paper's recipe beside, losses and seconds."""
    part, fast = name.split("-")[1], RECIPES["fast"]
    masks, true = train.masks[part], test.masks[part]
    result: dict[str, Any] = {"ceiling": ceiling(true)}
    for count in COUNTS:
        began = time.time()
        trained = optimise_token(bench.chosen(train, fast.layers, 2 * count), masks[: 2 * count], fast, tokens.SEED)
        result[f"{count} images"] = found(trained, bench.chosen(test, fast.layers), true)
    result["longer look"] = found(trained, bench.chosen(closer, fast.layers), true)
    result["seconds"], result["losses"] = time.time() - began, trained.losses
    result["layers"] = {layers: _by_layers(bench, layers, train, test, part) for layers in LAYERS}
    if paper:
        recipe: Recipe = RECIPES["paper"]
        began, small = time.time(), F.adaptive_avg_pool2d(masks[:, None], PAPER_SIDE)[:, 0]
        few = bench.chosen(train, recipe.layers)
        trained = optimise_token([_every_other(layer) for layer in few], small[::2], recipe, tokens.SEED)
        result["paper"] = found(trained, bench.chosen(test, recipe.layers), true)
        result["paper seconds"], result["paper losses"] = time.time() - began, trained.losses
    return result


def _by_layers(bench: Bench, layers: str, train: Seen, test: Seen, part: str) -> float:
    few = _at(bench.chosen(train, layers), slice(0, None, 4))
    token = optimise_token(few, train.masks[part], RECIPES["fast"], tokens.SEED)
    return found(token, bench.chosen(test, layers), test.masks[part])


def _every_other(layer: LayerQueries) -> LayerQueries:
    """Without the mirror images."""
    return dataclasses.replace(layer, queries=layer.queries[::2])


def by_noise(bench: Bench, name: str) -> dict[str, list[tuple[float, float]]]:
    """For each range of training noise: (noise level, mean IoU there), as in the paper's figure 4."""
    kind, part = name.split("-")
    layers = RECIPES["fast"].layers
    test = bench.see(kind, True, (0.9, 0.0), 8)
    levels = np.linspace(0.9, 0.0, 10)[:8]  # as `noise_levels` places them
    result = {}
    for label, noise in NOISES.items():
        train = bench.see(kind, False, noise, NOISE_TIMESTEPS)
        token = optimise_token(bench.chosen(train, layers), train.masks[part], RECIPES["fast"], tokens.SEED)
        result[label] = [
            (float(level), found(token, _at(bench.chosen(test, layers), slice(step, step + 1)), test.masks[part]))
            for step, level in enumerate(levels)
        ]
    return result


def _at(layers: list[LayerQueries], steps: slice) -> list[LayerQueries]:
    """The queries of some of the noise levels."""
    return [dataclasses.replace(layer, queries=layer.queries[:, steps]) for layer in layers]


# ---------------------------------------------------------------- plots


def draw(folder: Path, results: dict[str, dict[str, Any]], noises: dict[str, dict[str, list[tuple[float, float]]]]) -> (
    list[str]
):  # fmt: skip
    """Write the plots, and say how they are called."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    drawn = []

    def save(name: str) -> None:
        plt.tight_layout()
        plt.savefig(folder / f"{name}.png", dpi=90)
        plt.close()
        drawn.append(name)

    plt.figure(figsize=(6, 4))
    for name, result in results.items():
        plt.plot(COUNTS, [result[f"{count} images"] for count in COUNTS], "o-", ms=3, label=name)
    plt.xscale("log")
    plt.xticks(COUNTS, [str(c) for c in COUNTS])
    plt.gca().set(xlabel="training images", ylabel="mIoU on 50 test images")
    plt.legend(fontsize=8)
    save("tokens_images")

    plt.figure(figsize=(7, 4))
    means = [np.mean([result["layers"][layers] for result in results.values()]) for layers in LAYERS]
    plt.bar(LAYERS, means, color=["#888"] * 3 + ["#4477aa"] * 4 + ["#cc7722"] * 3)
    plt.xticks(rotation=40, ha="right")
    plt.gca().set(ylabel=f"mIoU, mean over {len(results)} tokens")
    save("tokens_layers")

    if noises:
        _, axes = plt.subplots(1, len(noises), figsize=(4.5 * len(noises), 3.8), sharey=True, squeeze=False)
        for axis, (name, lines) in zip(axes[0], noises.items(), strict=True):
            for label, line in lines.items():
                axis.plot(*zip(*line, strict=True), "o-", ms=3, label=f"{label} {NOISES[label][0]}–{NOISES[label][1]}")
            axis.set(title=name, xlabel="noise level of the picture", ylabel="mIoU")
        axes[0, 0].legend(title="trained at noise", fontsize=8)
        save("tokens_noise")

    curves = results.get(CURVE_TOKEN, {})
    if "paper losses" in curves:
        _, axes = plt.subplots(1, 2, figsize=(8, 3.5))
        for axis, name, key in zip(axes, ("fast", "paper"), ("losses", "paper losses"), strict=True):
            axis.plot(curves[key], lw=1)
            axis.set(title=f"{CURVE_TOKEN}, recipe {name}", xlabel="step", ylabel="loss", yscale="log")
        save("tokens_curves")
    return drawn


# ---------------------------------------------------------------- report


def report(results: dict[str, dict[str, Any]], drawn: Sequence[str], seconds: float) -> str:
    """The section of BENCHMARKS.md."""
    columns = [*(f"{count} images" for count in COUNTS), "longer look", "paper", "ceiling"]
    rows = [[name, *(_cell(result.get(column)) for column in columns)] for name, result in results.items()]
    means = [
        [result[column] for result in results.values() if column in result] if results else [] for column in columns
    ]
    rows.append(["mean", *(_cell(float(np.mean(m)) if m else None) for m in means)])
    head = ["mIoU on 50 test images", *columns[:-3], "20, noise 0.5, 8 timesteps", "`paper`, 20 images", "ceiling"]
    taken = ", ".join(
        f"{np.mean([r[key] for r in results.values() if key in r]):.0f} s `{name}`"
        for name, key in (("fast", "seconds"), ("paper", "paper seconds"))
        if any(key in r for r in results.values())
    )
    pictures = "\n\n".join(f"![{name}](docs/{name}.png)" for name in drawn)
    return f"""{_report.table(head, rows)}

Optimisation of a token on 20 images, mean: {taken}. Noise {tokens.NOISE}, \
{tokens.TIMESTEPS} timesteps, `fast` but where `paper` stands over a column.

By layer: trained and read on those layers alone, at three of the noise levels. By noise: trained at \
{NOISE_TIMESTEPS} levels of each range.

{pictures}

{_report.where_it_ran()}. {seconds:.0f} s."""


def _cell(value: float | None) -> str:
    return "–" if value is None else f"{value:.3f}"


def main(argv: Sequence[str] | None = None) -> None:
    """Train, measure, draw and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench tokens", description=__doc__)
    _report.add_arguments(parser, "tokens")
    parser.add_argument("--tokens", nargs="+", choices=tokens.SHIPPED, default=tokens.SHIPPED)
    parser.add_argument("--paper", nargs="*", choices=tokens.SHIPPED, default=tokens.SHIPPED, help="by this recipe too")
    parser.add_argument("--noise", nargs="*", choices=tokens.SHIPPED, default=NOISE_TOKENS, help="plot these by noise")
    parser.add_argument("--weights", type=Path, default=WEIGHTS, help="another checkpoint")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "docs")
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    began, bench = time.time(), Bench(arguments.weights)
    results: dict[str, dict[str, Any]] = {}
    for kind in dict.fromkeys(name.split("-")[0] for name in arguments.tokens):
        train = bench.see(kind, False, tokens.NOISE, tokens.TIMESTEPS)
        test, closer = bench.see(kind, True, *EXTRACTED), bench.see(kind, True, *LONGER)
        for name in (name for name in arguments.tokens if name.startswith(kind)):
            results[name] = of_token(bench, name, train, test, closer, name in arguments.paper)
            shown = {key: value for key, value in results[name].items() if "losses" not in key}
            print(f"  {name} ({time.time() - began:.0f} s): {shown}", flush=True)
    noises = {name: by_noise(bench, name) for name in arguments.noise}
    drawn = draw(arguments.folder, results, noises)
    _report.publish(arguments, report(results, drawn, time.time() - began), {"tokens": results, "noise": noises})


if __name__ == "__main__":
    main()
