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

from .part_token import CONTEXT_LENGTH

LOSSES = ("bce", "l2")


@dataclass(frozen=True)
class Recipe:
    """How a token is optimised. layers: a selection as in `core/unet/layers.py`."""

    steps: int
    learning_rate: float
    loss: str
    layers: str


RECIPES = {
    "paper": Recipe(steps=2000, learning_rate=30.0, loss="l2", layers="first8"),
    "fast": Recipe(steps=500, learning_rate=0.2, loss="bce", layers="decoder"),
}


@dataclass(frozen=True)
class LayerQueries:
    """What the UNet's one run leaves of a layer.

    queries: [images, timesteps, h·w, heads·d], half or single precision; to_k: [heads·d, context_dim] float32, the
    weight that makes keys of a token.
    """

    queries: torch.Tensor
    to_k: torch.Tensor
    heads: int
    h: int
    w: int


@dataclass(frozen=True)
class Trained:
    """embedding: [2, context_dim] float32 on the CPU, background and part; losses: one per step; heatmaps: [images,
    h, w] of the training images at the resolution of the loss, each scaled to 0…1 by its own minimum and maximum.
    """

    embedding: torch.Tensor
    losses: list[float]
    heatmaps: torch.Tensor


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
    recipe: Recipe,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
) -> Trained:
    """A token whose attention is high on the part and low elsewhere.

    masks: [images, H, W] in 0…1 (any resolution). `on_step(step, loss)` is called after each step and may raise to
    cancel. Must be called outside `torch.inference_mode`, with ordinary tensors.
    """
    masks = F.interpolate(masks[:, None], (64, 64), mode="area")[:, 0]
    generator = torch.Generator().manual_seed(seed)
    width = layers[0].to_k.shape[1]
    embedding = (torch.randn(2, width, generator=generator) * 0.5).to(masks.device).requires_grad_()
    optimiser = torch.optim.Adam([embedding], lr=recipe.learning_rate, betas=(0.9, 0.99))
    losses = []
    for step in range(recipe.steps):
        for group in optimiser.param_groups:
            group["lr"] = recipe.learning_rate * 0.5 * (1 + math.cos(math.pi * step / recipe.steps))
        heatmap = predicted_map(embedding, layers, (masks.shape[-2], masks.shape[-1]))
        if step >= recipe.steps // 2:
            low, high = heatmap.amin(), heatmap.amax()
            heatmap = (heatmap - low) / (high - low + 1e-8)
        loss = F.binary_cross_entropy(heatmap.clamp(1e-5, 1 - 1e-5), masks)
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        losses.append(loss.item())
        if on_step is not None:
            on_step(step, losses[-1])
    with torch.no_grad():
        maps = predicted_map(embedding, layers, (masks.shape[-2], masks.shape[-1]))
        low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return Trained(embedding.detach().cpu().float(), losses, ((maps - low) / (high - low + 1e-8)).cpu())
