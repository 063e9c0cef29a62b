"""Capture of a part's heat map from the cross-attention layers of a running UNet."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch

from ..heatmap import HeatmapSum, part_attention
from ..part_token import PartToken
from .layers import Address, LayerTable


class PartCapture:
    """Computes the attention of a token's parts from the queries of chosen layers.

    Keys come from calling each layer's `to_k`, queries from calling `to_q`, so that LoRA, casts and offloading apply.
    Keys are kept between calls only if `keep_keys`: hooks that change weights during a run forbid it.
    """

    def __init__(self, table: LayerTable, layers: frozenset[Address], token: PartToken, keep_keys: bool) -> None:
        self.table = table
        self.layers = layers
        self.token = token
        self.keep_keys = keep_keys
        self._keys: dict[Address, torch.Tensor] = {}

    def record(self, into: HeatmapSum, address: Address, hidden: torch.Tensor, h: int, w: int) -> None:
        """Add layer `address`'s map to `into`. hidden: [rows, h·w, channels], the cross-attention's input."""
        if address not in self.layers:
            return
        layer = self.table[address]
        attention = layer.block.attn2
        queries = attention.to_q(hidden)
        keys = self._key(address, attention.to_k, hidden)
        counts = torch.tensor(self.token.counts, device=hidden.device)
        maps = [
            part_attention(queries, keys[rows], counts[rows], parts, layer.heads)
            for rows, parts in self.token.softmaxes
        ]
        into.add(torch.cat(maps, 1), h, w)

    def _key(self, address: Address, to_k: Callable[[torch.Tensor], torch.Tensor], like: torch.Tensor) -> torch.Tensor:
        if address in self._keys:
            return self._keys[address]
        keys = to_k(self.token.embedding.to(like))
        if self.keep_keys:
            self._keys[address] = keys
        return keys


def spatial_size(options: dict[str, Any]) -> tuple[int, int]:
    """(h, w) of the layer whose attention patch is being called."""
    h, w = options["activations_shape"][-2:]
    return h, w


def map_size(latent: torch.Size, sdxl: bool) -> tuple[int, int]:
    """Resolution at which maps are thresholded: pixels, or, for SDXL, as many pixels as 1024² whatever the image.

    The authors resize every map to 1024 × 1024; for another aspect ratio the area is kept.
    """
    h, w = latent[-2:]
    if not sdxl:
        return 8 * h, 8 * w
    scale = 1024 / (h * w) ** 0.5
    return round(h * scale), round(w * scale)
