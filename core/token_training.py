"""Learning a part token from cached queries (PartEdit, section 3.2; OVAM, Marcos-Manchón 2024).

The queries of a UNet do not depend on the token, so the UNet runs once per image and timestep and never backward:
only the token's few rows are optimised, against queries kept from that run. A softmax does not see what all its logits
share, so that the first row's key is taken off all others and itself never computed.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

from .part_token import CONTEXT_LENGTH, PartToken, row_counts

LOSSES = ("bce", "l2")


@dataclass(frozen=True)
class Recipe:
    """How a token is optimised.

    layers: a selection as in `core/unet/layers.py`. optimiser: "adamw", its rate falling by 0.7 every 80 steps, or
    "lbfgs" with a line search, whose rate is the first length it tries. weight_decay: AdamW's. flatness: how much the
    mean square of each row − the first adds to the loss; without it the training pictures are fitted and no others.
    backgrounds, parts: how many rows of each. padded: the backgrounds fill the softmax to 77 keys, as at inference.
    scale: what is stretched to 0…1 before the loss, each "image"'s map for itself, or the whole "tensor" of all images'
    part and background maps. resolution: map and mask are compared at the size of the largest of the "layers", or of
    the "masks".
    """

    steps: int
    learning_rate: float
    loss: str
    layers: str
    optimiser: str = "lbfgs"
    weight_decay: float = 0.0
    flatness: float = 0.0
    backgrounds: int = 1
    parts: int = 1
    padded: bool = True
    scale: str = "image"
    resolution: str = "layers"

    @property
    def counts(self) -> tuple[int, ...]:
        """How often each row stands in the softmax of the training, backgrounds first."""
        return row_counts(
            self.backgrounds, self.parts, CONTEXT_LENGTH if self.padded else self.backgrounds + self.parts
        )


RECIPES = {
    "paper": Recipe(2000, 30.0, "l2", "first8", "adamw", 0.01, padded=False, scale="tensor", resolution="masks"),
    "fast": Recipe(150, 1.0, "l2", "first8", flatness=1e-4, backgrounds=2, parts=2),
}
"""The authors' training as their program runs it, and the one that is better on parts-world (`bench/tokens.py`)."""


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
    """embedding: [rows, context_dim] float32 on the CPU, backgrounds first, then `parts` part rows; losses: one per
    step; heatmaps: [images, h, w] of the training images at the resolution of the loss, each scaled to 0…1 by its own
    minimum and maximum.
    """

    embedding: torch.Tensor
    parts: int
    losses: list[float]
    heatmaps: torch.Tensor

    def token(self, name: str, info: dict[str, str]) -> PartToken:
        """The part token that was learned."""
        rows = len(self.embedding)
        part_rows = tuple(range(rows - self.parts, rows))
        counts = row_counts(rows - self.parts, self.parts, CONTEXT_LENGTH)
        return PartToken(self.embedding, part_rows, counts, (name,) * self.parts, info)


# ---------------------------------------------------------------- the map that a token draws


LARGEST_LOGIT = 60.0
"""From here on the first row's share is 0 in single precision, and the exponential still a number."""


class _SummedAttention(torch.autograd.Function):
    """Attention on the last `parts` of a token's rows, summed over timesteps and heads.

    One image at a time is brought to the keys' device in single precision, forward and again backward: beside the
    queries as they are, only the attention [images, rows − 1, heads, timesteps · pixels] is held.
    """

    @staticmethod
    def forward(ctx: torch.autograd.function.FunctionCtx, keys: torch.Tensor, queries: torch.Tensor,
                shifts: torch.Tensor, parts: int) -> torch.Tensor:  # fmt: skip
        """keys: [rows − 1, heads, d], minus the first row's, scaled; queries: [images, timesteps, pixels, heads·d];
        shifts: [rows − 1], log of each count over the first row's. Returns [images, pixels].
        """
        images, timesteps, pixels, _ = queries.shape
        rows, heads, _ = keys.shape
        blocks = torch.cat([torch.block_diag(*key) for key in keys])
        attention = keys.new_empty(images, rows, heads, timesteps * pixels)
        for image, a in zip(queries, attention, strict=True):
            torch.matmul(blocks, image.to(blocks).flatten(0, 1).T, out=a.view(rows * heads, -1))
            a.add_(shifts[:, None, None]).clamp_(max=LARGEST_LOGIT).exp_()
            a.div_(a.sum(0).add_(1))
        ctx.queries, ctx.parts = queries, parts  # type: ignore[attr-defined]
        ctx.save_for_backward(attention)
        return attention[:, rows - parts :].unflatten(-1, (timesteps, pixels)).sum((1, 2, 3))

    @staticmethod
    def backward(
        ctx: torch.autograd.function.FunctionCtx, *gradients: torch.Tensor
    ) -> tuple[torch.Tensor, None, None, None]:
        (attention,) = ctx.saved_tensors  # type: ignore[attr-defined]
        queries: torch.Tensor = ctx.queries  # type: ignore[attr-defined]
        (_, rows, heads, _), timesteps = attention.shape, queries.shape[1]
        background = rows - ctx.parts  # type: ignore[attr-defined]
        total = attention.new_zeros(rows * heads, queries.shape[-1])
        for image, a, gradient in zip(queries, attention, gradients[0], strict=True):
            on_part = a[background:].sum(0)
            slope = a * gradient.repeat(timesteps)
            slope[background:] *= 1 - on_part
            slope[:background] *= -on_part
            total.addmm_(slope.view(rows * heads, -1), image.to(slope).flatten(0, 1))
        own = total.view(rows, heads, heads, -1).diagonal(dim1=1, dim2=2)  # each head's key from its own queries
        return own.transpose(1, 2), None, None, None


def _summed_map(
    embedding: torch.Tensor, layers: Sequence[LayerQueries], size: tuple[int, int], counts: Sequence[int], parts: int,
    in_two: bool,
) -> torch.Tensor:  # fmt: skip
    """Attention on the last `parts` rows, summed over timesteps, heads and layers: [images, H, W].

    in_two: resize to the largest layer first, as the authors do, and not at once.
    """
    sums: dict[tuple[int, int], torch.Tensor] = {}
    shifts = torch.tensor([math.log(count / counts[0]) for count in counts[1:]]).to(embedding)
    for layer in layers:
        keys = (embedding[1:] - embedding[0]) @ layer.to_k.T
        keys = keys.unflatten(1, (layer.heads, -1))
        attention = _SummedAttention.apply(keys * keys.shape[-1] ** -0.5, layer.queries, shifts, parts)
        maps = attention.unflatten(1, (layer.h, layer.w))
        sums[layer.h, layer.w] = sums[layer.h, layer.w] + maps if (layer.h, layer.w) in sums else maps
    if in_two:
        largest = _largest(layers)
        sums = {largest: torch.stack([_resize(maps, largest) for maps in sums.values()]).sum(0)}
    return torch.stack([_resize(maps, size) for maps in sums.values()]).sum(0)


def _resize(maps: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    return F.interpolate(maps[:, None], size, mode="bilinear", align_corners=False)[:, 0]


def _count(layers: Sequence[LayerQueries]) -> int:
    """How many attention maps are summed per image."""
    return sum(layer.queries.shape[1] * layer.heads for layer in layers)


def predicted_map(
    embedding: torch.Tensor, layers: list[LayerQueries], size: tuple[int, int], parts: int = 1
) -> torch.Tensor:
    """Mean attention on the part over layers, heads and timesteps, [images, H, W] in 0…1.

    embedding: [rows, context_dim], the last `parts` rows the part's. The backgrounds count as often as they stand in
    the padded context at inference; every head counts the same, as in `heatmap.py`.
    """
    counts = row_counts(len(embedding) - parts, parts, CONTEXT_LENGTH)
    return _summed_map(embedding, layers, size, counts, parts, in_two=False) / _count(layers)


# ---------------------------------------------------------------- loss


def token_loss(
    embedding: torch.Tensor, layers: Sequence[LayerQueries], masks: torch.Tensor, recipe: Recipe
) -> torch.Tensor:
    """What the recipe minimises, a scalar. masks: [images, H, W] in 0…1 at the loss's resolution."""
    together = recipe.scale == "tensor"
    size = (masks.shape[-2], masks.shape[-1])
    maps = _summed_map(embedding, layers, size, recipe.counts, recipe.parts, in_two=together)
    if together:
        maps = torch.cat([_count(layers) - maps, maps])  # what is not on the part is on the background
        masks = torch.cat([1 - masks, masks])
        scaled = (maps - maps.min()) / (maps.max() - maps.min() + 1e-8)
    else:
        scaled = _scale_each(maps).clamp(1e-5, 1 - 1e-5)
    loss = F.mse_loss(scaled, masks) if recipe.loss == "l2" else F.binary_cross_entropy(scaled, masks)
    return loss + recipe.flatness * (embedding[1:] - embedding[0]).square().mean()


def _scale_each(maps: torch.Tensor) -> torch.Tensor:
    low, high = maps.amin((-2, -1), keepdim=True), maps.amax((-2, -1), keepdim=True)
    return (maps - low) / (high - low + 1e-8)


def _targets(masks: torch.Tensor, layers: Sequence[LayerQueries], recipe: Recipe) -> torch.Tensor:
    """masks at the loss's resolution: binary at their own, area averages at the largest layer's."""
    if recipe.resolution == "masks":
        return (masks > 0.5).to(masks.dtype)
    small = F.interpolate(masks[:, None].cpu(), _largest(layers), mode="area")  # Apple's GPU has whole ratios only
    return small[:, 0].to(masks.device)


def _largest(layers: Sequence[LayerQueries]) -> tuple[int, int]:
    return max(((layer.h, layer.w) for layer in layers), key=lambda size: size[0] * size[1])


MAPS_HELD = {"image": 8, "tensor": 16}
"""How many maps of an image the loss and its gradient hold at once at the loss's resolution, the mask included."""


def optimisation_bytes(layers: Sequence[LayerQueries], size: tuple[int, int], recipe: Recipe) -> int:
    """Memory that `optimise_token` takes at its peak with masks of this size, the queries and all else together.

    Only shapes and types of `layers` are read: queries on the device "meta" tell before there are any.
    """
    images = layers[0].queries.shape[0]
    h, w = size if recipe.resolution == "masks" else _largest(layers)
    kept, work, rows = 0, 0, len(recipe.counts) - 1
    for layer in layers:
        positions = layer.queries.shape[1] * layer.h * layer.w
        kept += layer.queries.numel() * layer.queries.element_size() + 4 * layer.to_k.numel()
        kept += 4 * images * (positions * rows * layer.heads + 3 * layer.h * layer.w)
        copied = layer.queries.shape[-1] if layer.queries.dtype != torch.float32 else 0
        work = max(work, 4 * positions * (copied + (2 * rows + 1) * layer.heads))
    return kept + work + 4 * images * MAPS_HELD[recipe.scale] * h * w


# ---------------------------------------------------------------- optimisation


def optimise_token(
    layers: list[LayerQueries],
    masks: torch.Tensor,
    recipe: Recipe,
    seed: int = 0,
    on_step: Callable[[int, float], None] | None = None,
    on_evaluation: Callable[[], None] | None = None,
) -> Trained:
    """A token whose attention is high on the part and low elsewhere.

    masks: [images, H, W] in 0…1 (any resolution); the optimisation runs on their device, the queries may lie
    elsewhere. `on_step(step, loss)` is called after each step, `on_evaluation()` before each evaluation of the loss, of
    which a step may take several; both may raise to cancel. Must be called outside `torch.inference_mode`, with
    ordinary tensors.
    """
    masks = _targets(masks.float(), layers, recipe)
    generator = torch.Generator().manual_seed(seed)
    width = layers[0].to_k.shape[1]
    embedding = torch.randn(len(recipe.counts), width, generator=generator).to(masks.device).requires_grad_()
    optimiser, schedule = _optimiser(recipe, embedding)
    losses = []

    def closure() -> float:
        if on_evaluation is not None:
            on_evaluation()
        optimiser.zero_grad()
        loss = token_loss(embedding, layers, masks, recipe)
        loss.backward()
        return loss.item()

    for step in range(recipe.steps):
        losses.append(float(optimiser.step(closure)))
        if step and losses[-1] >= losses[-2] and recipe.optimiser == "lbfgs":
            optimiser.state.clear()  # a line search that finds nothing would find nothing again: begin anew from here
        schedule.step()
        if on_step is not None:
            on_step(step, losses[-1])
    with torch.no_grad():
        maps = _scale_each(predicted_map(embedding, layers, (masks.shape[-2], masks.shape[-1]), recipe.parts))
    return Trained(embedding.detach().cpu(), recipe.parts, losses, maps.cpu())


def _optimiser(
    recipe: Recipe, embedding: torch.Tensor
) -> tuple[torch.optim.Optimizer, torch.optim.lr_scheduler.LRScheduler]:
    if recipe.optimiser == "adamw":
        adamw = torch.optim.AdamW([embedding], lr=recipe.learning_rate, weight_decay=recipe.weight_decay)
        return adamw, torch.optim.lr_scheduler.StepLR(adamw, 80, 0.7)
    lbfgs = torch.optim.LBFGS(
        [embedding], recipe.learning_rate, max_iter=1, max_eval=25, history_size=20, tolerance_grad=0.0,
        tolerance_change=0.0, line_search_fn="strong_wolfe",
    )  # fmt: skip
    return lbfgs, torch.optim.lr_scheduler.ConstantLR(lbfgs, 1.0)
