"""Heat maps of a part: how strongly each pixel's query attends the part's key (PartEdit, section 3.3).

Only the source's queries and the token's keys are needed. Resizing is linear, so the maps of one resolution are summed
first and resized once, and padding that repeats a key c times is one key with log c added to its logit.
"""

from __future__ import annotations

from collections.abc import Sequence

import torch
import torch.nn.functional as F


def part_attention(
    queries: torch.Tensor, keys: torch.Tensor, counts: torch.Tensor, parts: Sequence[Sequence[int]], heads: int
) -> torch.Tensor:
    """Attention on the parts, summed over each part's keys and over heads, in float32.

    queries: [rows, pixels, heads·d]; keys: [tokens, heads·d]; counts: [tokens], how often each key stands in the
    context; parts: which of the tokens belong to each part. Returns [rows, parts, pixels], each value in 0…heads.
    """
    rows, pixels, width = queries.shape
    d = width // heads
    q = queries.view(rows, pixels, heads, d).float()
    k = keys.view(-1, heads, d).float() * d**-0.5
    logits = torch.einsum("rphd,thd->rhpt", q, k) + counts.to(q).log()
    if logits.shape[-1] == 2 and len(parts) == 1 and len(parts[0]) == 1:  # softmax over two is a sigmoid
        part = parts[0][0]
        return torch.sigmoid(logits[..., part] - logits[..., 1 - part]).sum(1, keepdim=True)
    attention = logits.softmax(-1).sum(1)
    return torch.stack([attention[..., list(tokens)].sum(-1) for tokens in parts], 1)


def probabilities(q: torch.Tensor, k: torch.Tensor, heads: int) -> torch.Tensor:
    """Attention of q [rows, places, heads·d] on k [rows, tokens, heads·d]: [rows, heads, places, tokens], float32."""
    queries, keys = (t.unflatten(-1, (heads, -1)).transpose(1, 2).float() for t in (q, k))
    return (queries @ keys.transpose(-2, -1) * queries.shape[-1] ** -0.5).softmax(-1)


class HeatmapSum:
    """Adds up the maps of many layers (and timesteps), one running sum per resolution."""

    def __init__(self) -> None:
        self._sums: dict[tuple[int, int], torch.Tensor] = {}
        self._count = 0

    def add(self, attention: torch.Tensor, h: int, w: int) -> None:
        """attention: [rows, parts, h·w] from `part_attention`. Several parts are first brought to a common scale."""
        if attention.shape[1] > 1:
            attention = _joint_scale(attention)
        maps = attention.unflatten(-1, (h, w))
        self._sums[h, w] = self._sums[h, w] + maps if (h, w) in self._sums else maps
        self._count += 1

    @property
    def empty(self) -> bool:
        return self._count == 0

    def mean(self, size: tuple[int, int]) -> torch.Tensor:
        """The mean over everything added, [rows, parts, H, W] at `size`. ValueError if nothing was added."""
        if self.empty:
            raise ValueError("no attention map was recorded")
        resized = [F.interpolate(total, size, mode="bilinear", align_corners=False) for total in self._sums.values()]
        return torch.stack(resized).sum(0) / self._count if len(resized) > 1 else resized[0] / self._count


def _joint_scale(attention: torch.Tensor) -> torch.Tensor:
    """Each part from its own minimum to the maximum of all parts (PartEdit, appendix M). [rows, parts, pixels]."""
    low = attention.amin(-1, keepdim=True)
    high = attention.amax((-2, -1), keepdim=True)
    return (attention - low) / (high - low + 1e-6)


def normalise(maps: torch.Tensor) -> torch.Tensor:
    """Each map [..., H, W] scaled to 0…1 by its own minimum and maximum; a constant map becomes 0."""
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + 1e-6)
