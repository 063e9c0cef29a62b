"""Queries of cross-attention layers, kept from one pass over given pictures: what a part token is trained against."""

from __future__ import annotations

from typing import Any

import torch

from ..token_training import LayerQueries
from .layers import Address, layer_table
from .rows import Conditioning
from .sampling import noise_levels, probe


def collect_queries(
    model: Any, latent: dict[str, Any], layers: str, noise: tuple[float, float], timesteps: int, seed: int,
    positive: Conditioning | None = None,
) -> list[LayerQueries]:  # fmt: skip
    """The queries of the chosen layers for each picture of `latent` at each of `timesteps` noise levels.

    noise: (start, end), fractions of the training steps, start > end. The UNet sees each picture once per timestep.
    Keys are made by calling `to_k`, so that LoRA, casts and offloading apply: on the rows of a unit matrix it gives
    its own weight. Everything returned is an ordinary tensor, also under `torch.inference_mode`.
    """
    table = layer_table(model)
    wanted = table.select(layers)
    queries: dict[Address, list[torch.Tensor]] = {}
    keys: dict[Address, torch.Tensor] = {}
    sizes: dict[Address, tuple[int, int]] = {}

    def look(address: Address, hidden: torch.Tensor, h: int, w: int) -> None:
        if address not in wanted:
            return
        attention = table[address].block.attn2
        queries.setdefault(address, []).append(attention.to_q(hidden))
        if address not in keys:
            keys[address] = attention.to_k(torch.eye(attention.to_k.in_features).to(hidden)).float()
        sizes[address] = (h, w)

    with torch.no_grad():
        probe(model, latent, noise_levels(model, timesteps, *noise), seed, positive, look)
    with torch.inference_mode(False):
        return [
            LayerQueries(
                torch.stack([q.clone() for q in queries[address]], 1),
                keys[address].clone().T.contiguous(),
                table[address].heads,
                *sizes[address],
            )
            for address in queries
        ]
