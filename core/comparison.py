"""Pictures side by side with one of them, and how near each comes to it."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

_GAP, _LINE = 8, 1.5


def psnr(picture: torch.Tensor, reference: torch.Tensor) -> float:
    """Peak signal-to-noise ratio in dB of two pictures of one shape in 0…1; inf if they are equal."""
    error = (picture.double() - reference.double()).square().mean()
    return float(-10 * error.log10())


def side_by_side(reference: torch.Tensor, pictures: Sequence[torch.Tensor], labels: Sequence[str]) -> torch.Tensor:
    """The reference and the pictures [H, W, 3] in a row, a label over each and the PSNR below: [1, H′, W′, 3] in 0…1.

    labels: of the reference and of each picture.
    """
    h, w, _ = reference.shape
    font = ImageFont.load_default(max(10, round(w / 16)))
    line = round(font.size * _LINE)  # type: ignore[union-attr]
    grid = Image.new("RGB", ((w + _GAP) * (len(pictures) + 1) - _GAP, h + 2 * line), "white")
    draw = ImageDraw.Draw(grid)
    below = ["", *(f"{psnr(picture, reference):.1f} dB" for picture in pictures)]
    for i, (picture, label, value) in enumerate(zip([reference, *pictures], labels, below, strict=True)):
        left = i * (w + _GAP)
        pixels = (picture.clamp(0, 1) * 255).round().byte().cpu().numpy()
        grid.paste(Image.fromarray(pixels), (left, line))
        draw.text((left + w / 2, line / 2), label, fill="#333333", font=font, anchor="mm")
        draw.text((left + w / 2, line + h + line / 2), value, fill="#333333", font=font, anchor="mm")
    return torch.from_numpy(np.asarray(grid, dtype=np.float32) / 255)[None]
