"""Run the example workflows and make the pictures that the README and the template browser show.

Run it after changing the demo model, its tokens, a sampler or a workflow::

    python dev.py python -m scalpel.devtools.make_pictures

It writes a picture of every template's results into ``docs/`` and a thumbnail beside the template. The screenshot of
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
        train = run(server, "train_a_token", ["heat maps", "loss curve"], each=3)
        own = run(server, "edit_with_your_token", ["source", "mask", "edited"])
        two = run(server, "two_parts", ["source", "mask", "edited", "heat maps"], each=2)
        word = run(server, "word_or_token", ["picture", "the word", "the token"])
    for name, pictures in (
        ("edit_one_part", edit),
        ("find_a_part", find),
        ("train_a_token", train),
        ("edit_with_your_token", own),
        ("two_parts", two),
        ("word_or_token", word),
    ):
        demo.side_by_side(pictures).save(DOCS / f"{name}.png", optimize=True)
    for name, main_picture, inset in (
        ("Train a part token", train["heat maps"], train["heat maps 2"]),
        ("Edit with your token", own["edited"], own["source"]),
        ("Two parts at once", two["edited"], two["source"]),
        ("Word or token (heat maps)", word["the token"], word["the word"]),
    ):
        thumbnail(main_picture, inset).save(FOLDER / f"{name}.jpg", quality=88)
    for name, main_picture, inset in (
        ("Edit one part", edit["edited"], edit["source"]),
        ("Find a part (heat map)", find["found"], find["heat map"]),
    ):
        card = thumbnail(main_picture, inset)
        card.save(FOLDER / f"{name}.jpg", quality=88)
        sdxl = name.removesuffix(" (heat map)") + " (SDXL)"
        with_band(card, "for SDXL (picture: demo model)").save(FOLDER / f"{sdxl}.jpg", quality=88)
    return 0


def run(server: ComfyServer, workflow: str, titles: list[str], each: int = 1) -> dict[str, Image.Image]:
    """The first picture of the SaveImage nodes with these titles, and up to `each` of those that have several."""
    print(workflow, flush=True)
    prompt = json.loads((FOLDER / "api" / f"{workflow}.json").read_text(encoding="utf-8"))
    prompt_id, _ = asyncio.run(demo.follow(server, prompt))
    outputs = server.wait(prompt_id, timeout=30)["outputs"]
    found = {}
    for title in titles:
        images = outputs[demo.node_titled(prompt, title)]["images"]
        for number, image in enumerate(images[:each], 1):
            found[title if number == 1 else f"{title} {number}"] = demo.picture(server, {"images": [image]})
    return found


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
