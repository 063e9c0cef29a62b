"""What the measurements share: pictures out of the demo model, sheets of them, numbers about them."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw


def encode(clip: Any, prompts: Sequence[str]) -> list:
    """One CONDITIONING entry for a batch: row i has prompt i."""
    rows, pooled = zip(
        *(clip.encode_from_tokens(clip.tokenize(text), return_pooled=True) for text in prompts), strict=True
    )
    return [[torch.cat(rows), {"pooled_output": torch.cat(pooled)}]]


def generate(
    models: tuple[Any, Any, Any],
    prompts: Sequence[str],
    seeds: Sequence[int],
    steps: int = 25,
    cfg: float = 6.0,
    sampler: str = "dpmpp_2m",
    scheduler: str = "karras",
    batch: int = 8,
) -> torch.Tensor:
    """[n, 256, 256, 3] pictures by ComfyUI's own sampling; picture i depends on prompt i and seed i alone."""
    import comfy.sample

    model, clip, vae = models
    pictures = []
    with torch.inference_mode():
        negative = encode(clip, [""])
        for start in range(0, len(prompts), batch):
            block = slice(start, start + batch)
            empty = torch.zeros(len(prompts[block]), 4, 32, 32)
            noise = torch.cat([comfy.sample.prepare_noise(empty[:1], seed) for seed in seeds[block]])
            positive = encode(clip, prompts[block])
            latent = comfy.sample.sample(
                model, noise, steps, cfg, sampler, scheduler, positive, negative, empty, disable_pbar=True
            )
            pictures.append(vae.decode(latent).cpu())
    return torch.cat(pictures)


def psnr(one: torch.Tensor | np.ndarray, other: torch.Tensor | np.ndarray) -> float:
    """Of two pictures in 0…1, in dB."""
    error = np.square(np.asarray(one, np.float64) - np.asarray(other, np.float64)).mean()
    return float(-10 * np.log10(max(error, 1e-12)))


def contact_sheet(
    path: Path,
    pictures: Sequence[Any],
    captions: Sequence[str],
    marked: Sequence[bool],
    columns: int = 8,
    side: int = 160,
) -> None:
    """Write a grid of [H, W, 3] pictures in 0…1 with their captions; the marked ones have a red frame."""
    line, lines = 12, 3
    rows = -(-len(pictures) // columns)
    sheet = Image.new("RGB", (columns * (side + 4), rows * (side + 4 + lines * line)), "white")
    draw = ImageDraw.Draw(sheet)
    for number, (picture, caption, mark) in enumerate(zip(pictures, captions, marked, strict=True)):
        x, y = number % columns * (side + 4) + 2, number // columns * (side + 4 + lines * line) + 2
        pixels = (np.asarray(picture).clip(0, 1) * 255 + 0.5).astype(np.uint8)
        sheet.paste(Image.fromarray(pixels).resize((side, side), Image.Resampling.LANCZOS), (x, y))
        if mark:
            draw.rectangle((x - 2, y - 2, x + side + 1, y + side + 1), outline="red", width=2)
        for row, text in enumerate(_wrap(draw, caption, side)[:lines]):
            draw.text((x, y + side + 1 + row * line), text, fill="black")
    path.parent.mkdir(parents=True, exist_ok=True)
    sheet.save(path)


def _wrap(draw: ImageDraw.ImageDraw, text: str, width: int) -> list[str]:
    lines = [""]
    for word in text.split():
        longer = f"{lines[-1]} {word}".strip()
        if draw.textlength(longer) <= width:
            lines[-1] = longer
        else:
            lines.append(word)
    return lines
