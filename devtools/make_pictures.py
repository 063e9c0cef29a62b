"""Run the example workflows and make the pictures that the README and the template browser show.

Run it after changing the demo model, its tokens, a sampler or a workflow::

    python dev.py python -m scalpel.devtools.make_pictures
    python dev.py python -m scalpel.devtools.make_pictures edit_a_photo four_edits  # these only

It writes a picture of every template's results into ``docs/`` and a thumbnail beside the template. The screenshot of
the page is made by ``docs/screenshot.mjs``.
"""

from __future__ import annotations

import asyncio
import json
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass

from PIL import Image, ImageDraw, ImageFont, ImageOps

from . import demo
from .make_workflows import FOLDER
from .server import CHECKOUT, ComfyServer

DOCS = CHECKOUT / "docs"
THUMBNAIL, INSET, BORDER, BAND = 512, 176, 6, 44


@dataclass(frozen=True)
class Shown:
    """What is shown of a template: `titles` of the SaveImage nodes for ``docs/``, up to `each` pictures of each; on the
    thumbnail `card`, and small in its corner `inset`, if any. for_sdxl: the SDXL version that gets the same thumbnail.
    """

    template: str
    titles: tuple[str, ...]
    card: str
    inset: str = ""
    each: int = 1
    for_sdxl: str = ""


EDIT = ("source", "mask", "edited")
CHANGED = ("photo", "edited")
SHOWN = {
    "edit_one_part": Shown("Edit one part", EDIT, "edited", "source", for_sdxl="Edit one part (SDXL)"),
    "find_a_part": Shown(
        "Find a part (heat map)", ("picture", "heat map", "mask", "found"), "found", "heat map",
        for_sdxl="Find a part (SDXL)",
    ),
    "train_a_token": Shown("Train a part token", ("heat maps", "loss curve"), "heat maps", "heat maps 2", each=3),
    "edit_with_your_token": Shown("Edit with your token", EDIT, "edited", "source"),
    "two_parts": Shown("Two parts at once", (*EDIT, "heat maps"), "edited", "source", each=2),
    "word_or_token": Shown(
        "Word or token (heat maps)", ("picture", "the word", "the token"), "the token", "the word"
    ),
    "edit_a_photo": Shown("Edit a photo's part", EDIT, "edited", "source"),
    "compare_inversions": Shown("Compare four inversions", ("comparison",), "comparison"),
    "four_edits": Shown("One photo, four edits at once", ("source", "edited"), "edited 2", "source", each=4),
    "replace_object": Shown("Replace an object", CHANGED, "edited", "photo"),
    "keep_object": Shown("Keep an object", CHANGED, "edited", "photo"),
    "change_background": Shown("Change the background", CHANGED, "edited", "photo"),
    "remove_object": Shown("Remove an object", CHANGED, "edited", "photo"),
    "recolour_one": Shown(
        "Recolour one of three", CHANGED, "edited", "photo", for_sdxl="Change a texture (SDXL)",
    ),
    "push_two_words": Shown("Push two words at once", CHANGED, "edited", "photo"),
    "negative_words": Shown("Attenuate with negative words", ("photo", "without", "edited"), "edited", "without"),
    "region_prompts": Shown("Several prompts, several regions", ("one prompt", "regions"), "regions", "one prompt"),
    "edit_without_a_mask": Shown("Edit without a mask", ("photo", "mask", "edited"), "edited", "mask"),
}  # fmt: skip


def main(workflows: Sequence[str]) -> int:
    """Make the pictures of these workflows (names as in ``example_workflows/api``), or of all."""
    DOCS.mkdir(exist_ok=True)
    with ComfyServer(os.environ["SCALPEL_COMFYUI"]) as server:
        for name in workflows or SHOWN:
            shown = SHOWN[name]
            pictures = run(server, name, shown.titles, shown.each)
            demo.side_by_side(pictures).save(DOCS / f"{name}.png", optimize=True)
            card = thumbnail(pictures[shown.card], pictures.get(shown.inset))
            card.save(FOLDER / f"{shown.template}.jpg", quality=88)
            if shown.for_sdxl:
                banded = with_band(card, "for SDXL (picture: demo model)")
                banded.save(FOLDER / f"{shown.for_sdxl}.jpg", quality=88)
    return 0


def run(server: ComfyServer, workflow: str, titles: Sequence[str], each: int = 1) -> dict[str, Image.Image]:
    """The first picture of the SaveImage nodes with these titles, and up to `each` of those that have several."""
    print(workflow, flush=True)
    prompt = json.loads((FOLDER / "api" / f"{workflow}.json").read_text(encoding="utf-8"))
    prompt_id, _ = asyncio.run(demo.follow(server, prompt))
    outputs = server.wait(prompt_id, timeout=30)["outputs"]
    found = {}
    for title in titles:
        images = outputs[demo.node_titled(prompt, title.lower())]["images"]
        for number, image in enumerate(images[:each], 1):
            found[title if number == 1 else f"{title} {number}"] = demo.picture(server, {"images": [image]})
    return found


def thumbnail(picture: Image.Image, inset: Image.Image | None) -> Image.Image:
    """A square card: one picture, and another small in its lower left corner, above where a band may come."""
    card = ImageOps.pad(picture, (THUMBNAIL, THUMBNAIL), Image.Resampling.LANCZOS, color="white")
    if inset is None:
        return card
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
    sys.exit(main(sys.argv[1:]))
