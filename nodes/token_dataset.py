"""Pictures and painted masks from a folder, for training a part token."""

from __future__ import annotations

import hashlib
import logging
from pathlib import Path

import folder_paths
from comfy_api.latest import io

from ..core.pairs import Pair, find_pairs, load_pairs
from .common import CATEGORY, check_range, schema

log = logging.getLogger(__name__)

LARGEST = 8192
PICTURES = Path(__file__).resolve().parent.parent / "partsworld" / "pictures"
_OWN_PICTURES = {folder.name for folder in PICTURES.iterdir()}


class PartTokenDataset(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PartTokenDataset",
            display_name="Load Part Pictures (folder)",
            category=f"{CATEGORY}/part token",
            description="Pictures and the masks painted for them, from a folder: name.png with name_mask.png, or the "
            "folders images/ and masks/ with equal names. A file that does not fit is named; nothing is left out.",
            search_aliases=["partedit", "load images from folder", "image mask pairs", "dataset"],
            inputs=[
                io.String.Input(
                    "directory", default="",
                    tooltip="The folder: relative to ComfyUI's input folder, or a full path on the server. "
                    "'partsworld_figure_head' comes with Scalpel, for the demo model.",
                ),
                io.Int.Input(
                    "size", default=0, min=0, max=LARGEST,
                    tooltip="Best the model's native size: 1024 for SDXL, 512 for SD1.5, 256 for the demo model. "
                    "Pictures are scaled, and their middle squares of this side kept. 0 = as they are; then all must "
                    "have one size.",
                ),
                io.Int.Input(
                    "limit", default=0, min=0, max=100000,
                    tooltip="Only the first so many, by name ('2' before '10'); 0 = all.",
                ),
            ],
            outputs=[
                io.Image.Output(display_name="images", tooltip="The pictures as one batch, by name."),
                io.Mask.Output(display_name="masks", tooltip="Their masks, in the same order."),
                io.String.Output(display_name="names", tooltip="Their names, one a line."),
            ],
        )  # fmt: skip

    @classmethod
    def fingerprint_inputs(cls, directory: str, size: int, limit: int) -> str:
        """Changes when a file is added, removed or written."""
        if directory is None:  # linked: what comes through the link counts already
            return ""
        try:
            files = [file for pair in _pairs(directory, limit) for file in (pair.picture, pair.mask)]
            facts = [(str(file), file.stat().st_size, file.stat().st_mtime_ns) for file in files]
        except (ValueError, OSError) as error:
            return str(error)
        return hashlib.sha256(repr((facts, size)).encode()).hexdigest()

    @classmethod
    def execute(cls, directory: str, size: int, limit: int) -> io.NodeOutput:
        check_range("size", size, 0, LARGEST)
        check_range("limit", limit, 0, 100000)
        try:
            loaded = load_pairs(_pairs(directory, limit), size)
        except ValueError as error:
            raise ValueError(f"directory: {error}") from error
        if loaded.cropped:
            log.warning("Scalpel: only the middle squares of these pictures are used: %s", ", ".join(loaded.cropped))
        return io.NodeOutput(loaded.images, loaded.masks, "\n".join(loaded.names))


def _pairs(directory: str, limit: int) -> list[Pair]:
    """The pairs of a directory that a user named; quotes around a pasted path are dropped."""
    text = directory.strip().strip("\"'")
    if not text:
        raise ValueError("it is empty; name a folder in ComfyUI's input folder, or give a full path")
    try:
        folder = Path(folder_paths.get_input_directory()) / Path(text).expanduser()
    except RuntimeError as error:  # "~somebody"
        raise ValueError(f"{text}: {error}") from error
    if not folder.exists() and text in _OWN_PICTURES:
        folder = PICTURES / text
    pairs = find_pairs(folder)
    return pairs[:limit] if limit else pairs
