"""Pictures and the masks painted for them, as files of a folder.

Either `name.png` beside `name_mask.png`, or folders `images/` and `masks/` whose files have equal stems. Nothing is
guessed and nothing is converted silently: what does not fit is an error that names the file.
"""

from __future__ import annotations

import re
import struct
import zlib
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps

SUFFIXES = (".png", ".jpg", ".jpeg", ".webp", ".bmp")
MASK_ENDING = "_mask"
GREY_TOLERANCE = 8
"""Largest difference between the channels (of 255) of a mask that still counts as grey: JPEG rounds."""

_UNREADABLE = (
    OSError, SyntaxError, ValueError, EOFError, TypeError, LookupError, ArithmeticError, struct.error, zlib.error,
    Image.DecompressionBombError,
)  # fmt: skip
"""What Pillow raises on damaged files."""


@dataclass(frozen=True)
class Pair:
    """A picture's file and its mask's."""

    picture: Path
    mask: Path

    @property
    def name(self) -> str:
        return self.picture.stem


@dataclass(frozen=True)
class Pairs:
    """images: [n, H, W, 3] and masks: [n, H, W], both in 0…1; names: stems of the pictures; cropped: those of them
    that were cropped to a square.
    """

    images: torch.Tensor
    masks: torch.Tensor
    names: list[str]
    cropped: list[str]


def find_pairs(folder: Path) -> list[Pair]:
    """All pairs of a folder, in natural order ("2" before "10"). ValueError names the file without a partner."""
    if not folder.is_dir():
        raise ValueError(f"{folder} is not a folder")
    loose = _pictures_of(folder)
    two = [folder / "images", folder / "masks"]
    if not any(path.is_dir() for path in two):
        return _matched(
            [file for file in loose if not file.stem.endswith(MASK_ENDING)],
            {file: file.stem.removesuffix(MASK_ENDING) for file in loose if file.stem.endswith(MASK_ENDING)},
            folder,
            f"{{stem}}{MASK_ENDING}.png",
        )
    for path in two:
        if not path.is_dir():
            raise ValueError(f"{folder} has a folder '{'masks' if path.name == 'images' else 'images'}', but no folder "
                             f"'{path.name}' beside it")  # fmt: skip
    if loose:
        raise ValueError(
            f"{loose[0].name} lies beside the folders 'images' and 'masks' of {folder}; move it into one of them"
        )
    masks = {file: file.stem for file in _pictures_of(two[1])}
    return _matched(_pictures_of(two[0]), masks, folder, "masks/{stem}.png")


def load_pairs(pairs: list[Pair], size: int) -> Pairs:
    """The files as tensors. ValueError names the file that is unreadable, or does not fit the others.

    size: 0 keeps the files' own size, which must be one for all. Otherwise the shorter side is scaled to `size` and
    the middle square is kept.
    """
    images: list[torch.Tensor] = []
    masks: list[torch.Tensor] = []
    cropped: list[str] = []
    for pair in pairs:
        picture, mask = _read_picture(pair.picture), _read_mask(pair.mask)
        if picture.size != mask.size:
            raise ValueError(
                f"{pair.mask.name} is {_extent(mask)} where its picture {pair.picture.name} is {_extent(picture)}; "
                "give a mask of the picture's size"
            )
        if size:
            if picture.width != picture.height:
                cropped.append(pair.name)
            picture = _square(picture, size, Image.Resampling.LANCZOS)
            mask = _square(mask, size, Image.Resampling.BILINEAR)
        image = torch.from_numpy(np.asarray(picture, dtype=np.float32) / 255)
        if images and image.shape != images[0].shape:
            h, w = images[0].shape[:2]
            raise ValueError(
                f"{pair.picture.name} is {_extent(picture)} where {pairs[0].picture.name} is {w} × {h}; pictures of "
                "one batch have one size: set 'size', and all are scaled and cropped to squares of that side"
            )
        images.append(image)
        masks.append(_checked_mask(mask, pair, bool(size)))
    return Pairs(torch.stack(images), torch.stack(masks), [pair.name for pair in pairs], cropped)


def natural(name: str) -> list[tuple[int, int, str]]:
    """A key that sorts numbers in names by value: "a2" before "a10"."""
    pieces = re.findall(r"\d+|\D+", name)
    return [(0, int(p), "") if p.isdecimal() else (1, 0, p.casefold()) for p in pieces] + [(2, 0, name)]


def _pictures_of(folder: Path) -> list[Path]:
    try:
        files = [f for f in folder.iterdir() if f.suffix.lower() in SUFFIXES and f.name[0] != "." and f.is_file()]
    except OSError as error:
        raise ValueError(f"{folder} cannot be read: {error.strerror}") from error
    return sorted(files, key=lambda file: natural(file.name))


def _matched(pictures: list[Path], masks: dict[Path, str], folder: Path, expected: str) -> list[Pair]:
    """Pair files of equal stems. masks: file → the stem of the picture it belongs to."""
    if not pictures and not masks:
        raise ValueError(f"{folder} holds no pictures; accepted are {', '.join(SUFFIXES)}, each with a mask")
    by_stem: dict[str, Path] = {}
    for mask, stem in masks.items():
        if stem in by_stem:
            raise ValueError(f"{mask.name} and {by_stem[stem].name} are both masks of '{stem}'; keep one")
        by_stem[stem] = mask
    seen: dict[str, Path] = {}
    for picture in pictures:
        if picture.stem in seen:
            raise ValueError(f"{picture.name} and {seen[picture.stem].name} have one mask between them; rename one")
        seen[picture.stem] = picture
        if picture.stem not in by_stem:
            raise ValueError(f"{picture.name} has no mask; {expected.format(stem=picture.stem)} is missing in {folder}")
    for stem, mask in by_stem.items():
        if stem not in seen:
            raise ValueError(f"{mask.name} is the mask of no picture; '{stem}' (with one of {', '.join(SUFFIXES)}) "
                             f"is missing in {folder}")  # fmt: skip
    return [Pair(picture, by_stem[picture.stem]) for picture in pictures]


def _opened(path: Path) -> Any:
    """The file's one picture, turned as its EXIF orientation says."""
    try:
        with Image.open(path) as file:
            frames = getattr(file, "n_frames", 1)
            if frames > 1:
                raise ValueError(f"it is an animation of {frames} pictures")
            file.load()
            return ImageOps.exif_transpose(file)
    except _UNREADABLE as error:
        raise ValueError(f"{path.name} cannot be read as a picture: {error}") from error


def _read_picture(path: Path) -> Any:
    """A picture in 8-bit RGB. Grey and palettes become RGB, which loses nothing; what would lose colours is refused."""
    picture = _without_alpha(_opened(path), path, "lay it on a background")
    if picture.mode not in ("RGB", "L", "1"):
        raise ValueError(f"{path.name} is a picture of the kind {picture.mode}; save it as 8-bit RGB")
    return picture.convert("RGB")


def _read_mask(path: Path) -> Any:
    """A mask as Pillow's mode F with values 0…1: grey of 1, 8 or 16 bits, or colours that are all grey."""
    mask = _without_alpha(_opened(path), path, "save it as black and white without transparency")
    if mask.mode.startswith("I"):
        return Image.fromarray(np.asarray(mask).astype(np.float32) / 65535)
    if mask.mode == "RGB":
        channels = np.asarray(mask, dtype=np.int16)
        if (channels.max(-1) - channels.min(-1)).max() > GREY_TOLERANCE:
            raise ValueError(f"{path.name} is coloured; a mask is grey, white where the part is and black elsewhere")
    if mask.mode not in ("RGB", "L", "1"):
        raise ValueError(f"{path.name} is a mask of the kind {mask.mode}; save it as grey of 8 or 16 bits")
    return Image.fromarray(np.asarray(mask.convert("L"), dtype=np.float32) / 255)


def _without_alpha(picture: Any, path: Path, remedy: str) -> Any:
    """The picture without an alpha channel that says nothing. ValueError if anything is transparent."""
    if picture.mode in ("RGBA", "LA", "PA", "La", "RGBa") or "transparency" in picture.info:
        picture = picture.convert("RGBA")
        if picture.getchannel("A").getextrema()[0] < 255:
            raise ValueError(f"{path.name} is transparent in places; {remedy}")
        return picture.convert("RGB")
    return picture.convert("RGB") if picture.mode == "P" else picture


def _square(picture: Any, size: int, how: Image.Resampling) -> Any:
    """The middle square of a picture, its shorter side scaled to `size`."""
    side = min(picture.size)
    left, top = (picture.width - side) // 2, (picture.height - side) // 2
    return picture.resize((size, size), how, (left, top, left + side, top + side))


def _checked_mask(mask: Any, pair: Pair, was_cropped: bool) -> torch.Tensor:
    values = torch.from_numpy(np.asarray(mask, dtype=np.float32).copy()).clamp(0, 1)
    if values.max() < 0.5:
        where = ", or lies outside of the middle square" if was_cropped else ""
        raise ValueError(
            f"{pair.mask.name} is empty: its brightest value is {float(values.max()):.3g} of 1; the part is painted in "
            f"white (255){where}"
        )
    return values


def _extent(picture: Any) -> str:
    return f"{picture.width} × {picture.height}"
