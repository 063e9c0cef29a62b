"""Writes the pictures that come with the pack: those for the template "Train a part token", and a "photo" to edit::

    python dev.py python -m scalpel.partsworld.example_pictures

Rendered scenes and the exact masks of one part, as a user would have painted them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from . import tokens
from .scene import Scene, sample_scene

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "pictures"
KIND, PART, COUNT = "figure", "head", 10
PHOTO = 6_000_124
"""A scene that nothing was trained on: a red figure on a green field, with yellow hair and orange legs."""


def main() -> None:
    """Write them anew."""
    write(f"partsworld_{KIND}_{PART}", tokens.scenes(KIND, COUNT))
    write("partsworld_photo", [sample_scene(PHOTO, KIND, background="field", colour="red", mixed=True)])


def write(name: str, scenes: list[Scene]) -> None:
    """Write pictures and masks of these scenes to a folder of this name."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    images, masks = tokens.pictures(scenes, PART)
    for number, (image, mask) in enumerate(zip(images.numpy(), masks.numpy(), strict=True), 1):
        for file, values in ((f"{KIND}_{number:02}", image), (f"{KIND}_{number:02}_mask", mask)):
            picture = Image.fromarray(np.round(values * 255).astype(np.uint8))
            picture.save(folder / f"{file}.png", optimize=True)
    log.info("%d pairs in %s", len(scenes), folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
