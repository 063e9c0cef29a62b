"""Run the example workflows and make the pictures that the README and the template browser show.

Run it after changing the demo model, its tokens, a sampler or a workflow::

    python dev.py python -m scalpel.devtools.make_pictures

It writes ``docs/edit_one_part.png``, ``docs/find_a_part.png`` and a thumbnail beside every template. The screenshot of
the page is made by ``docs/screenshot.mjs``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys

from PIL import Image, ImageDraw, ImageFont

from . import demo
from .make_workflows import FOLDER
from .server import CHECKOUT, ComfyServer

DOCS = CHECKOUT / "docs"
THUMBNAIL, INSET, BORDER, BAND = 512, 176, 6, 44


def main() -> int:
    """Make all pictures."""
    DOCS.mkdir(exist_ok=True)
    with ComfyServer(os.environ["SCALPEL_COMFYUI"]) as server:
        edit = run(server, "edit_one_part", ["source", "mask", "edited"])
        find = run(server, "find_a_part", ["picture", "heat map", "mask", "found"])
    demo.side_by_side(edit).save(DOCS / "edit_one_part.png", optimize=True)
    demo.side_by_side(find).save(DOCS / "find_a_part.png", optimize=True)
    for name, main_picture, inset in (
        ("Edit one part", edit["edited"], edit["source"]),
        ("Find a part (heat map)", find["found"], find["heat map"]),
    ):
        card = thumbnail(main_picture, inset)
        card.save(FOLDER / f"{name}.jpg", quality=88)
        sdxl = name.removesuffix(" (heat map)") + " (SDXL)"
        with_band(card, "for SDXL (picture: demo model)").save(FOLDER / f"{sdxl}.jpg", quality=88)
    return 0


def run(server: ComfyServer, workflow: str, titles: list[str]) -> dict[str, Image.Image]:
    """The pictures of the SaveImage nodes with these titles."""
    print(workflow, flush=True)
    prompt = json.loads((FOLDER / "api" / f"{workflow}.json").read_text(encoding="utf-8"))
    prompt_id, _ = asyncio.run(demo.follow(server, prompt))
    outputs = server.wait(prompt_id, timeout=30)["outputs"]
    return {title: demo.picture(server, outputs[demo.node_titled(prompt, title)]) for title in titles}


def thumbnail(picture: Image.Image, inset: Image.Image) -> Image.Image:
    """A square card: one picture, and another small in its lower left corner, above where a band may come."""
    card = picture.resize((THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS)
    small = Image.new("RGB", (INSET + 2 * BORDER, INSET + 2 * BORDER), "white")
    small.paste(inset.resize((INSET, INSET), Image.Resampling.LANCZOS), (BORDER, BORDER))
    card.paste(small, (BORDER, THUMBNAIL - BAND - BORDER - small.height))
    return card


def with_band(card: Image.Image, words: str) -> Image.Image:
    """The card with words on a dark band at its foot."""
    card = card.copy()
    draw = ImageDraw.Draw(card)
    draw.rectangle((0, THUMBNAIL - BAND, THUMBNAIL, THUMBNAIL), fill="#202020")
    draw.text(
        (THUMBNAIL // 2, THUMBNAIL - BAND // 2), words, fill="white", anchor="mm", font=ImageFont.load_default(size=26)
    )
    return card


if __name__ == "__main__":
    sys.exit(main())
