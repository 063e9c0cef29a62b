"""How much memory a gradient through ComfyUI's UNets will take, and asking ComfyUI for it before a run."""

from __future__ import annotations

from collections.abc import Callable, Collection, Iterable, Iterator
from dataclasses import dataclass
from typing import Any

import comfy.controlnet
import comfy.ldm.modules.attention
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from .checkpointing import parts_of
from .layers import Address


@dataclass(frozen=True)
class _Cost:
    """Of one block, in bytes. own: its input; inside: all it keeps; outside: kept beside it, whatever is checkpointed;
    held: until the end.
    """

    own: int
    inside: int
    outside: int = 0
    held: int = 0


def estimate(
    unet: Any, rows: int, latent: tuple[int, int], itemsize: int, last: Address | None = None,
    checkpointed: bool = False, maps: Collection[Address] = (), tokens: int = 77,
) -> int:  # fmt: skip
    """Bytes that a gradient through the UNet keeps at most at one time, weights not counted; a little too many or few.

    latent: (h, w); itemsize: bytes of a number in the activations; last: the transformer block in whose
    cross-attention the forward pass ends; maps: blocks whose cross-attention on `tokens` is what the gradient comes
    from, written out in float32. Weights of another size than the activations are cast, and then kept too.
    """
    costs = list(_costs(unet, rows, latent, itemsize, last, frozenset(maps), tokens))
    kept = most = sum(cost.held for cost in costs)
    for cost in costs:
        most = max(most, kept + cost.outside + cost.inside)
        kept += cost.outside + (cost.own if checkpointed else cost.inside)
    return most


def _costs(
    unet: Any, rows: int, latent: tuple[int, int], itemsize: int, last: Address | None, maps: frozenset[Address],
    tokens: int,
) -> Iterator[_Cost]:  # fmt: skip
    """Of every block in execution order."""
    sizes = [latent]
    names = [("input", i) for i in range(len(unet.input_blocks))]
    names += [("middle", 0)] * (unet.middle_block is not None)
    names += [("output", i) for i in range(len(unet.output_blocks))]
    skipped: list[tuple[int, int]] = []
    for (kind, number), parts in zip(names, parts_of(unet), strict=True):
        if kind == "output":
            skipped.pop()
        for part in parts:
            h, w = sizes[-1]
            name = type(part).__name__
            transformers = getattr(part, "transformer_blocks", None)
            if transformers is not None:
                size = rows * h * w * part.in_channels * itemsize
                around = [part.norm, part.proj_in, part.proj_out]
                yield _Cost(0, 0, size * (1 if part.use_linear else 3) + _cast(around, itemsize))
                for index, block in enumerate(transformers):
                    address = (kind, number, index)
                    yield _transformer(block, rows, h * w, tokens, itemsize, address in maps, address == last)
                    if address == last:
                        return
                continue
            if name == "Downsample":
                sizes.append((-(-h // 2), -(-w // 2)))
            elif name == "Upsample":
                sizes.append(skipped[-1])
            before, after = rows * h * w * itemsize, rows * sizes[-1][0] * sizes[-1][1] * itemsize
            if name == "ResBlock":
                own, inside = before * part.channels, before * 3 * (part.channels + part.out_channels)
            elif name == "Upsample":
                own, inside = before * part.channels, before * part.channels + after * part.channels
            else:
                channels = getattr(part, "channels", None) or part.in_channels
                own = inside = before * channels
            yield _Cost(own, inside + _cast([part], itemsize))
        if kind == "input":
            skipped.append(sizes[-1])


def _transformer(
    block: Any, rows: int, places: int, tokens: int, itemsize: int, is_map: bool, is_last: bool
) -> _Cost:  # fmt: skip
    of_place = rows * block.n_heads * block.d_head * itemsize
    own = places * of_place
    spelled_out = attention_keeps_probabilities()
    self_attention = 3 if spelled_out else 4  # queries, keys, values, output
    cross_attention = 0 if spelled_out or is_map else 2  # queries, output
    feed_forward = 0 if is_last else 1 + 8 + 4
    inside = own * (1 + self_attention + 1 + cross_attention + feed_forward) + 2 * tokens * of_place
    probabilities = rows * block.n_heads * places * tokens
    of_map = 4 * probabilities if is_map else 0
    if spelled_out:
        inside += rows * block.n_heads * places**2 * itemsize
    if spelled_out and not is_map:
        inside += itemsize * probabilities
    # beside the softmax: the map that comes of it, and its gradient until the backward pass has come to its block
    return _Cost(own, inside + of_map + _cast([block], itemsize), outside=of_map, held=of_map)


_FROM_ELSEWHERE = ("attn2.to_k.", "attn2.to_v.", "emb_layers.")
"""Weights that read the prompt or the time, where no gradient goes."""


def _cast(modules: Iterable[torch.nn.Module], itemsize: int) -> int:
    """Bytes of the weights of another size than the activations, as cast."""
    named = (item for module in modules for item in module.named_parameters())
    weights = [p for name, p in named if p.ndim > 1 and not name.startswith(_FROM_ELSEWHERE)]
    return sum(p.numel() * itemsize for p in weights if p.element_size() != itemsize)


def attention_keeps_probabilities() -> bool:
    """Whether the user's choice of attention writes out [places, places], which the backward pass then keeps."""
    name = getattr(comfy.ldm.modules.attention.optimized_attention, "__name__", "")
    return name in ("attention_basic", "attention_sub_quad", "attention_split")


# ---------------------------------------------------------------- asking ComfyUI for it


class _Need(comfy.controlnet.ControlBase):  # type: ignore[misc]
    """A ControlNet without a model, that needs memory."""

    def __init__(self, need: int) -> None:
        super().__init__()
        self._need = need

    def inference_memory_requirements(self, _: torch.dtype) -> int:
        return self._need


def reserve(options: dict[str, Any], key: str, bytes_of: Callable[[tuple[int, ...]], int]) -> None:
    """Let ComfyUI leave so many bytes free when it loads the models of a run, beside what sampling needs.

    options: the run's (or a model clone's) transformer options, not shared with others; key: the wrapper's name;
    bytes_of: from the noise's shape [rows, channels, h, w]. ComfyUI asks ControlNets for what they need and adds it up;
    so it is shown a prompt with one more, which is gone once the models are loaded.
    """

    def prepare(executor: Any, model: Any, noise_shape: Any, conds: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
        need = _Need(bytes_of(tuple(noise_shape)))
        prepared, _, models = executor(model, noise_shape, {**conds, key: [{"control": need}]}, *args, **kwargs)
        return prepared, conds, models

    add_wrapper_with_key(WrappersMP.PREPARE_SAMPLING, key, prepare, options)
