"""Writes the training pictures that come with the pack, for the template "Train a part token"::

    python dev.py python -m scalpel.partsworld.example_pictures

Rendered scenes and the exact masks of one part, as a user would have painted them.
"""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
from PIL import Image

from . import tokens

log = logging.getLogger(__name__)

FOLDER = Path(__file__).parent / "pictures"
KIND, PART, COUNT = "figure", "head", 10


def main() -> None:
    """Write them anew."""
    folder = FOLDER / f"partsworld_{KIND}_{PART}"
    folder.mkdir(parents=True, exist_ok=True)
    images, masks = tokens.pictures(tokens.scenes(KIND, COUNT), PART)
    for number, (image, mask) in enumerate(zip(images.numpy(), masks.numpy(), strict=True), 1):
        for name, values in ((f"{KIND}_{number:02}", image), (f"{KIND}_{number:02}_mask", mask)):
            picture = Image.fromarray(np.round(values * 255).astype(np.uint8))
            picture.save(folder / f"{name}.png", optimize=True)
    log.info("%d pairs in %s", COUNT, folder)


if __name__ == "__main__":
    logging.basicConfig(level=logging.INFO, format="%(message)s")
    main()
