"""Masks of the picture at the resolution of any layer."""

from __future__ import annotations

import torch
import torch.nn.functional as F

from ..cpam import Share
from .evaluation import Area, region
from .inputs import check_aspect


class LayerMask:
    """Masks [n, H, W] in 0…1 of the whole picture, of any resolution: one for each of n pictures, or one for all."""

    def __init__(self, mask: torch.Tensor, latent: tuple[int, int], name: str, generous: bool = False) -> None:
        """latent: (h, w) of the whole latent. generous: a layer's cell has the largest value in it, not that of one
        pixel. ValueError, which begins with `name`, if the mask has another shape.
        """
        check_aspect(mask, (8 * latent[0], 8 * latent[1]), name)
        self.mask = mask
        self.latent = latent
        self.generous = generous
        self._shares: dict[tuple[int, Area, int, int], tuple[Share, Share]] = {}

    def number(self, row: int) -> int:
        """Which of the masks holds for a row of a batch."""
        return row % len(self.mask)

    def at(self, number: int, area: Area, size: tuple[int, int], device: torch.device) -> tuple[Share, Share]:
        """One mask, cropped to an entry's `area`, at a layer of `size` (h, w): it, and 1 − it."""
        key = (number, area, *size)
        if key not in self._shares:
            rows, columns = region(area, self.latent, (self.mask.shape[-2], self.mask.shape[-1]))
            cropped = self.mask[number, None, None, rows, columns].float()
            resized = F.adaptive_max_pool2d(cropped, size) if self.generous else F.interpolate(cropped, size)
            weight = resized.flatten().to(device)
            self._shares[key] = (Share.of(weight), Share.of(1 - weight))
        return self._shares[key]
