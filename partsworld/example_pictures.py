"""Writes the pictures that come with the pack: those for the template "Train a part token", and "photos" to edit::

    python dev.py python -m scalpel.partsworld.example_pictures

Rendered scenes and the exact masks of one part or of the object, as a user would have painted them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from . import tokens
from .render import render
from .scene import Scene, like_objects, sample_scene

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "pictures"
KIND, PART, COUNT = "figure", "head", 10
PHOTO = 6_000_124
"""A scene that nothing was trained on: a red figure on a green field, with yellow hair and orange legs."""

DOG = 6_000_132
"""Another: a yellow dog with a blue head and purple legs."""

THREE, THREE_PURPLE = 57, 60
"""Three orange figures on snow, and three purple ones."""


def main() -> None:
    """Write them anew."""
    write(f"partsworld_{KIND}_{PART}", tokens.scenes(KIND, COUNT), PART)
    write("partsworld_photo", [sample_scene(PHOTO, KIND, background="field", colour="red", mixed=True)], PART)
    write("partsworld_dog", [sample_scene(DOG, "dog", background="beach", mixed=True)])
    write("partsworld_three", [like_objects(THREE, 3, "figure")], index=1)
    write("partsworld_three_left", [like_objects(THREE, 3, "figure")], index=0)
    write("partsworld_three_purple", [like_objects(THREE_PURPLE, 3, "figure")], index=1)


def write(name: str, scenes: list[Scene], part: str | None = None, index: int = 0) -> None:
    """Write pictures of these scenes, all of one kind, and masks of one object or a part of it to a folder."""
    folder = FOLDER / name
    folder.mkdir(parents=True, exist_ok=True)
    kind = scenes[0].things[0].kind
    for number, drawn in enumerate(map(render, scenes), 1):
        mask = drawn.masks[index][part] if part else drawn.object_mask(index)
        for file, values in ((f"{kind}_{number:02}", drawn.image), (f"{kind}_{number:02}_mask", mask)):
            picture = Image.fromarray(np.round(values * 255).astype(np.uint8))
            picture.save(folder / f"{file}.png", optimize=True)
    log.info("%d pairs in %s", len(scenes), folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
