"""Trains the part tokens that come with the demo model::

    python dev.py python -m scalpel.partsworld.tokens figure-head car-hood

From rendered scenes, their mirror images and their exact masks, by the recipe "fast" (`core/token_training.py`). Which
scenes: seeds from `FIRST_SEED` on, far from those the model was trained on and from those the benches use.
"""

from __future__ import annotations

import argparse
import json
import logging
import time
from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import torch

from . import loader
from .render import render
from .scene import PARTS, Scene, sample_scene

log = logging.getLogger(__name__)

FIRST_SEED = 5_000_000
FOLDER = Path(__file__).parent / "weights" / "part_tokens"
SHIPPED = ("figure-head", "figure-torso", "figure-hair", "car-hood", "car-body", "chair-seat", "dog-head")
NOISE = (0.7, 0.0)
TIMESTEPS = 12
SEED = 0
SETTINGS: dict[str, dict[str, Any]] = {"car-body": {"flatness": 2e-5}}
"""Tokens that edit better with other settings than the recipe's: of five tried, on 16 scenes that no bench uses."""


def scenes(kind: str, count: int, first: int = FIRST_SEED) -> list[Scene]:
    """Training scenes of one kind, half of them with independently coloured parts."""
    return [sample_scene(first + i, kind, mixed=i % 2 == 1) for i in range(count)]


def pictures(chosen: list[Scene], part: str) -> tuple[torch.Tensor, torch.Tensor]:
    """(images [n, 256, 256, 3], masks of the part [n, 256, 256]) of scenes with one object each."""
    drawn = [render(scene) for scene in chosen]
    images = torch.from_numpy(np.stack([r.image for r in drawn]))
    return images, torch.from_numpy(np.stack([r.masks[0][part] for r in drawn]))


def with_mirrored(maps: torch.Tensor) -> torch.Tensor:
    """Pictures or masks [n, height, width, …], each followed by its mirror image: [2n, …]."""
    return torch.stack([maps, maps.flip(2)], 1).flatten(0, 1)


def encode(vae: Any, pixels: torch.Tensor) -> torch.Tensor:
    """Latents of pictures [n, 256, 256, 3], without the graph of the VAE, which is 130 MB a picture."""
    with torch.no_grad():
        return vae.encode(pixels)


def train_token(model: Any, vae: Any, kind: str, part: str, images: int) -> Any:
    """A part token of the demo model and its loss curve."""
    from ..core.token_training import RECIPES, optimise_token
    from ..core.unet.queries import collect_queries

    recipe = replace(RECIPES["fast"], **SETTINGS.get(f"{kind}-{part}", {}))
    pixels, masks = map(with_mirrored, pictures(scenes(kind, images), part))
    layers = collect_queries(model, {"samples": encode(vae, pixels)}, recipe.layers, NOISE, TIMESTEPS, SEED)
    trained = optimise_token(layers, masks, recipe, SEED)
    info = {
        "model_family": "parts-world",
        "layers": recipe.layers,
        "noise_range": json.dumps(NOISE),
        "images": f"{images}, and their mirror images",
        "loss": f"{trained.losses[-1]:.5f}",
    }
    return trained.token(f"{kind} {part}", info), trained.losses


def main(argv: Sequence[str] | None = None) -> None:
    """Train the tokens named on the command line (those that ship, by default) and save them."""
    from ..core import part_token

    every = [f"{kind}-{part}" for kind, parts in PARTS.items() for part in parts]
    parser = argparse.ArgumentParser(prog="python -m scalpel.partsworld.tokens", description=__doc__)
    parser.add_argument("tokens", nargs="*", default=[], help=f"of: {', '.join(every)}")
    parser.add_argument("--images", type=int, default=20)
    parser.add_argument("--output", type=Path, default=FOLDER)
    parser.add_argument("--weights", type=Path, default=loader.WEIGHTS)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(message)s", force=True)
    model, _, vae = loader.load(arguments.weights)
    for name in arguments.tokens or SHIPPED:
        began, (kind, part) = time.time(), name.split("-")
        token, losses = train_token(model, vae, kind, part, arguments.images)
        file = arguments.output / f"partsworld_{kind}_{part}.safetensors"
        file.unlink(missing_ok=True)
        part_token.save(token, file)
        log.info("%s: loss %.4f → %.4f, %.0f s, %s", name, losses[0], losses[-1], time.time() - began, file.name)


if __name__ == "__main__":
    main()
