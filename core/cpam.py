"""CPAM's arithmetic: its masks, self-attention that they divide (equations 1 to 3), the mask that follows the edit."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from scipy import ndimage

from .heatmap import probabilities


def binary(mask: torch.Tensor) -> torch.Tensor:
    """1 where a mask in 0…1 is at least one half, 0 elsewhere."""
    return (mask >= 0.5).float()


def dilated(mask: torch.Tensor, fraction: float) -> torch.Tensor:
    """Masks [n, H, W], each widened by a square whose side is `fraction` of the root of its area, in whole pixels.

    M_t from M_s (CPAM, section 4.2). A soft mask stays soft. A square of an even side lies half a pixel to the upper
    left, as the authors' does.
    """

    def widen(one: torch.Tensor) -> np.ndarray:
        side = max(1, int(fraction * float(one.sum()) ** 0.5))
        return ndimage.maximum_filter(one.cpu().numpy(), side, mode="constant", origin=0)

    return _each(mask, widen)


def softened(mask: torch.Tensor, softness: float) -> torch.Tensor:
    """Masks [n, H, W] with edges blurred by a Gaussian whose sigma is `softness` times the root of each one's area; the
    largest value stays 1.
    """

    def blur(one: torch.Tensor) -> np.ndarray:
        blurred = ndimage.gaussian_filter(one.cpu().numpy(), softness * float(one.sum()) ** 0.5)
        return blurred / max(float(blurred.max()), 1e-6) * float(one.max())

    return _each(mask, blur)


def _each(mask: torch.Tensor, change: Callable[[torch.Tensor], np.ndarray]) -> torch.Tensor:
    return torch.stack([torch.from_numpy(change(one)) for one in mask]).to(mask)


def keys_at(k: torch.Tensor, v: torch.Tensor, places: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """The keys and values [rows, tokens, C] at some places [m]. Of no places at all: one key with the mean of all
    values, which is what attention over keys that are all masked gives.
    """
    if len(places):
        return k[:, places], v[:, places]
    return torch.zeros_like(k[:, :1]), v.mean(1, keepdim=True)


@dataclass(frozen=True)
class Share:
    """How much of an attention each place of a layer gets. weight: [places] in 0…1; some: the places where it is more
    than 0; most: more than one half; whole: whether it is 1 everywhere.
    """

    weight: torch.Tensor
    some: torch.Tensor
    most: torch.Tensor
    whole: bool

    @staticmethod
    def of(weight: torch.Tensor) -> Share:
        some, most = (places.nonzero()[:, 0] for places in (weight > 0, weight > 0.5))
        return Share(weight, some, most, bool((weight == 1).all()))


def divided(
    q: torch.Tensor, *parts: tuple[Share, Callable[[torch.Tensor, torch.Tensor | slice], torch.Tensor]]
) -> torch.Tensor:
    """The sum of several attentions, weighted place by place, each computed only where it counts (CPAM, equation 3).

    q: [rows, places, C]. Each part: its share, and a function of (queries [rows, m, C], the places they are of). All
    shares together are 1 everywhere.
    """
    for share, attend in parts:
        if share.whole:
            return attend(q, slice(None))
    total = torch.zeros_like(q)
    for share, attend in parts:
        if len(share.some):
            weight = share.weight[share.some, None].to(q)
            total[:, share.some] += weight * attend(q[:, share.some], share.some)
    return total


def word_attention(
    q: torch.Tensor, k: torch.Tensor, words: Sequence[int], heads: int
) -> tuple[torch.Tensor, torch.Tensor]:
    """How strongly each place attends to some words: the mean over heads and words [rows, places], and the largest
    single value [rows]. q: [rows, places, heads·d]; k: [rows, tokens, heads·d]; words: which of the tokens.
    """
    attention = probabilities(q, k, heads)[..., list(words)]
    return attention.mean((1, 3)), attention.amax((1, 2, 3))


class FollowingMask:
    """The target mask refined while denoising: where the edit's words are attended to (CPAM, section 4.4).

    Maps of all layers and noise levels so far are summed, each divided by the largest single attention in it (of any
    head, word and place); the sum is scaled to 0…1 and cut at `threshold`.
    """

    def __init__(self, threshold: float) -> None:
        self.threshold = threshold
        self._before: torch.Tensor | None = None  # of the noise levels that are over
        self._now: torch.Tensor | None = None

    def next_level(self, *, again: bool) -> None:
        """Another evaluation begins; `again`: at the same noise level, so that its maps replace what there is."""
        if not again and self._now is not None:
            self._before = self._now if self._before is None else self._before + self._now
        self._now = None

    def add(self, attention: torch.Tensor, largest: torch.Tensor, size: tuple[int, int]) -> None:
        """attention: [rows, h, w], the mean over heads and words; largest: [rows]; size: of the mask."""
        maps = F.interpolate((attention / largest[:, None, None])[:, None], size, mode="nearest")[:, 0]
        self._now = maps if self._now is None else self._now + maps

    def mask(self) -> torch.Tensor | None:
        """[rows, h, w] of 0 and 1; None as long as no map was added. A constant map gives an empty mask."""
        raw = self.raw()
        return None if raw is None else (raw >= self.threshold).float()

    def raw(self) -> torch.Tensor | None:
        """The sum, scaled to 0…1, [rows, h, w]."""
        parts = [part for part in (self._before, self._now) if part is not None]
        if not parts:
            return None
        total = sum(parts[1:], parts[0])
        low, high = total.amin((-2, -1), keepdim=True), total.amax((-2, -1), keepdim=True)
        return torch.where(high > low, (total - low) / (high - low), torch.zeros_like(total))
