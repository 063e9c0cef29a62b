"""Learning a part token from cached queries (PartEdit, section 3.2; OVAM, Marcos-Manchón 2024).

The queries of a UNet do not depend on the token, so the UNet runs once per image and timestep and never backward:
only the token's two rows are optimised, against queries kept from that run. With one background and one part key the
softmax is a sigmoid of the difference of their logits.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .part_token import CONTEXT_LENGTH, PartToken


@dataclass(frozen=True)
class LayerQueries:
    """Queries of one layer: [images, timesteps, h·w, heads·d] and the weight [heads·d, context_dim] that makes keys."""

    queries: torch.Tensor
    to_k: torch.Tensor
    heads: int
    h: int
    w: int


def predicted_map(embedding: torch.Tensor, layers: list[LayerQueries], size: tuple[int, int]) -> torch.Tensor:
    """Mean attention on the part over layers, heads and timesteps, [images, H, W] in 0…1.

    embedding: [2, context_dim], background and part. The background counts as often as it stands in the padded
    context at inference.
    """
    shift = math.log(CONTEXT_LENGTH - 1)
    sums: dict[tuple[int, int], torch.Tensor] = {}
    for layer in layers:
        keys = embedding @ layer.to_k.T
        difference = (keys[1] - keys[0]).view(layer.heads, -1)
        queries = layer.queries.unflatten(-1, (layer.heads, -1))
        logits = torch.einsum("btphd,hd->btph", queries, difference) * difference.shape[-1] ** -0.5
        attention = torch.sigmoid(logits - shift).mean((1, 3)).unflatten(1, (layer.h, layer.w))
        previous = sums.get((layer.h, layer.w))
        sums[layer.h, layer.w] = attention if previous is None else previous + attention
    resized = [F.interpolate(m[:, None], size, mode="bilinear", align_corners=False)[:, 0] for m in sums.values()]
    return torch.stack(resized).sum(0) / len(layers)


def optimise_token(
    layers: list[LayerQueries],
    masks: torch.Tensor,
    name: str,
    steps: int = 500,
    rate: float = 0.2,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> tuple[PartToken, list[float]]:
    """A token whose attention is high on the part and low elsewhere, and the loss of each step.

    masks: [images, H, W] in 0…1; their resolution is that of the loss (binary cross-entropy). Adam with a cosine
    rate. The first half of the steps asks every head of every layer for the mask, which finds the part; the second
    half scales the map by its minimum and maximum over all images, as the authors do, so that the heads that see the
    part best may carry it alone. `on_step(step, loss)` may raise to cancel.
    """
    generator = torch.Generator().manual_seed(seed)
    width = layers[0].to_k.shape[1]
    embedding = (torch.randn(2, width, generator=generator) * 0.5).to(masks.device).requires_grad_()
    optimiser = torch.optim.Adam([embedding], lr=rate, betas=(0.9, 0.99))
    losses = []
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * 0.5 * (1 + math.cos(math.pi * step / steps))
        heatmap = predicted_map(embedding, layers, (masks.shape[-2], masks.shape[-1]))
        if step >= steps // 2:
            low, high = heatmap.amin(), heatmap.amax()
            heatmap = (heatmap - low) / (high - low + 1e-8)
        loss = F.binary_cross_entropy(heatmap.clamp(1e-5, 1 - 1e-5), masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    token = PartToken(embedding.detach().cpu().float(), (1,), (CONTEXT_LENGTH - 1, 1), (name,))
    return token, losses
