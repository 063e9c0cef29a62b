"""Pictures of a training: the loss curve as a line chart, heat maps laid over the pictures."""

from __future__ import annotations

import math

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image, ImageDraw, ImageFont

_SIZE, _SCALE = (640, 400), 2
_LEFT, _TOP, _RIGHT, _BOTTOM = 72, 44, 616, 348
_COLOURS = ((0, 0, 4), (87, 16, 110), (188, 55, 84), (249, 142, 9), (252, 255, 164))  # "inferno" at 0, ¼, … 1


def loss_curve(losses: list[float], title: str) -> torch.Tensor:
    """A line chart of the loss per step as [1, 400, 640, 3] in 0…1; its axis is logarithmic from a range of 20 on."""
    low, high = min(losses), max(losses)
    logarithmic = low > 0 and high / low >= 20
    low, high, ticks = _log_axis(low, high) if logarithmic else _linear_axis(low, high)
    last = max(len(losses), 2)

    def x(step: float) -> float:
        return _LEFT + (_RIGHT - _LEFT) * (step - 1) / (last - 1)

    def y(value: float) -> float:
        part = math.log(value / low) / math.log(high / low) if logarithmic else (value - low) / (high - low)
        return _BOTTOM + (_TOP - _BOTTOM) * part

    picture = Image.new("RGB", (_SIZE[0] * _SCALE, _SIZE[1] * _SCALE), "white")
    draw = ImageDraw.Draw(picture)

    def write(at: tuple[float, float], text: str, anchor: str, size: int = 13) -> None:
        font = ImageFont.load_default(size * _SCALE)
        draw.text((at[0] * _SCALE, at[1] * _SCALE), text, fill="#333333", font=font, anchor=anchor)

    def line(points: list[tuple[float, float]], colour: str, width: float) -> None:
        draw.line([(a * _SCALE, b * _SCALE) for a, b in points], colour, round(width * _SCALE), joint="curve")

    for tick in ticks:
        line([(_LEFT, y(tick)), (_RIGHT, y(tick))], "#dddddd", 1)
        write((_LEFT - 8, y(tick)), f"{tick:.3g}", "rm")
    for step in sorted({1, *(round(1 + (last - 1) * i / 4) for i in range(1, 5))}):
        line([(x(step), _BOTTOM), (x(step), _BOTTOM + 5)], "#888888", 1)
        write((x(step), _BOTTOM + 9), str(step), "mt")
    line([(_LEFT, _TOP), (_LEFT, _BOTTOM), (_RIGHT, _BOTTOM)], "#888888", 1)
    line([(x(i), y(loss)) for i, loss in enumerate(losses * 2 if len(losses) == 1 else losses, 1)], "#1f6fb4", 2)
    write((_SIZE[0] / 2, 14), title, "mt", 16)
    write(((_LEFT + _RIGHT) / 2, _SIZE[1] - 8), "step", "mb")
    write((_LEFT - 8, _TOP - 10), "loss (log)" if logarithmic else "loss", "mb")
    small = picture.resize(_SIZE, Image.Resampling.LANCZOS)
    return torch.from_numpy(np.asarray(small, dtype=np.float32) / 255)[None]


def _linear_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Round ends around low…high, and about five round numbers between them."""
    spread = high - low or abs(high) or 1.0
    unit = 10 ** math.floor(math.log10(spread / 4))
    unit *= next((m for m in (1, 2, 5) if spread / 4 <= m * unit), 10)
    first, last = math.floor(low / unit), max(math.ceil(high / unit), math.floor(low / unit) + 1)
    return first * unit, last * unit, [i * unit for i in range(first, last + 1)]


def _log_axis(low: float, high: float) -> tuple[float, float, list[float]]:
    """Powers of ten around low…high, and those between them."""
    ticks = [10.0**i for i in range(math.floor(math.log10(low)), math.ceil(math.log10(high)) + 1)]
    return ticks[0], ticks[-1], ticks


def overlay(images: torch.Tensor, heatmaps: torch.Tensor, masks: torch.Tensor) -> torch.Tensor:
    """Heat maps in colour over darkened pictures, the masks' outlines in white.

    images: [n, H, W, 3]; heatmaps: [n, h, w], resized bilinearly; masks: [n, H, W]; all in 0…1. Returns [n, H, W, 3].
    """
    size = (images.shape[1], images.shape[2])
    heat = F.interpolate(heatmaps[:, None].float(), size, mode="bilinear", align_corners=False)[:, 0].clamp(0, 1)
    colours = torch.tensor(_COLOURS, dtype=torch.float32) / 255
    place = heat * (len(colours) - 1)
    below = place.floor().long().clamp(max=len(colours) - 2)
    tint = torch.lerp(colours[below], colours[below + 1], (place - below)[..., None])
    picture = torch.lerp(images.float() * 0.6, tint, 0.8 * heat[..., None])
    inside = (masks[:, None] > 0.5).float()
    width = 1 + 2 * max(1, round(min(size) / 512))
    outline = F.max_pool2d(inside, width, 1, width // 2) - inside
    return torch.where(outline[:, 0, ..., None] > 0, torch.ones(()), picture)
