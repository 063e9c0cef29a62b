"""Addresses of a UNet's transformer blocks, read off the loaded model, and the small language that names them."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass
from typing import Any

import torch

Address = tuple[str, int, int]
"""(block, number, index) as ComfyUI's `transformer_options` say: ("output", 3, 0)."""

HELP = "all, decoder, first8, official, level:16, or addresses such as input.7-8,output.3-5 or output.0[0-7]"

_SDXL_BLOCKS = 70
_OFFICIAL_SDXL = (*range(24, 60), *range(4))


@dataclass(frozen=True)
class Layer:
    """One transformer block. `downsample`: the latent's side divided by this layer's (1, 2, 4, …)."""

    address: Address
    downsample: int
    heads: int
    block: torch.nn.Module


class LayerTable:
    """The transformer blocks of one model in execution order."""

    def __init__(self, layers: list[Layer], native: int) -> None:
        self.layers = {layer.address: layer for layer in layers}
        self.native = native

    def __getitem__(self, address: Address) -> Layer:
        return self.layers[address]

    def __len__(self) -> int:
        return len(self.layers)

    def select(self, text: str) -> frozenset[Address]:
        """The addresses that `text` names (see `HELP`). ValueError lists what exists."""
        chosen: set[Address] = set()
        for item in filter(None, (piece.strip() for piece in text.split(","))):
            found = self._select_one(item)
            if not found:
                raise ValueError(f"layers: {item!r} names no layer of this model. Accepted: {HELP}. {self._existing()}")
            chosen |= found
        if not chosen:
            raise ValueError(f"layers: the input is empty. Accepted: {HELP}. {self._existing()}")
        return frozenset(chosen)

    def _select_one(self, item: str) -> set[Address]:
        addresses = list(self.layers)
        decoder = [a for a in addresses if a[0] == "output"]
        if item == "all":
            return set(addresses)
        if item == "decoder" or (item == "official" and len(addresses) != _SDXL_BLOCKS):
            return set(decoder)
        if item == "official":
            return {addresses[i] for i in _OFFICIAL_SDXL}
        if item == "first8":
            return set(decoder[:8])
        level = re.fullmatch(r"level:(\d+)", item)
        if level:
            return self._level(int(level[1]))
        match = re.fullmatch(r"(input|middle|output)(?:\.(\d+)(?:-(\d+))?)?(?:\[(\d+)(?:-(\d+))?\])?", item)
        if not match:
            return set()
        block, first, last, low, high = match.groups()
        numbers = range(int(first), int(last or first) + 1) if first else None
        indices = range(int(low), int(high or low) + 1) if low else None
        return {
            a
            for a in addresses
            if a[0] == block and (numbers is None or a[1] in numbers) and (indices is None or a[2] in indices)
        }

    def _level(self, side: int) -> set[Address]:
        """All layers of the resolution nearest `side` (in octaves) on the model's native square latent."""
        if side < 1:
            return set()
        scales = {layer.downsample for layer in self.layers.values()}
        nearest = min(scales, key=lambda scale: abs(math.log2(self.native / scale / side)))
        return {a for a, layer in self.layers.items() if layer.downsample == nearest}

    def _existing(self) -> str:
        blocks: dict[tuple[str, int], int] = {}
        for block, number, _ in self.layers:
            blocks[block, number] = blocks.get((block, number), 0) + 1
        listing = ", ".join(f"{b}.{n}" + (f"[0-{c - 1}]" if c > 1 else "") for (b, n), c in blocks.items())
        return f"This model has: {listing}"


def map_layers(table: LayerTable) -> frozenset[Address]:
    """Where the attention to a word tells its place: the level nearest 16 × 16, without the middle block (SD1.5: the
    five layers that MAG-Edit and InstDiffEdit read).
    """
    return frozenset(address for address in table.select("level:16") if address[0] != "middle")


def layer_table(model: Any) -> LayerTable:
    """The table of a MODEL (ComfyUI's ModelPatcher). ValueError if it is no UNet with cross-attention."""
    unet = model.get_model_object("diffusion_model")
    if not all(hasattr(unet, name) for name in ("input_blocks", "middle_block", "output_blocks")):
        raise ValueError(_unsupported(model))
    layers = list(_walk(unet))
    if not layers:
        raise ValueError(_unsupported(model))
    return LayerTable(layers, native_latent_size(model))


def native_latent_size(model: Any) -> int:
    """Side of the square latent that the model was trained on: 128 for SDXL, 64 for SD1.x unless the model says."""
    native = getattr(model.model.model_config, "native_latent_size", None)
    return int(native) if native else (128 if is_sdxl(model) else 64)


def is_sdxl(model: Any) -> bool:
    """Whether the model is of the SDXL family."""
    from comfy.model_base import SDXL, SDXLRefiner

    return isinstance(model.model, (SDXL, SDXLRefiner))


def context_width(model: Any) -> int:
    """Width of the text context that the model's cross-attention reads."""
    layer = next(iter(layer_table(model).layers.values()))
    return int(layer.block.attn2.to_k.in_features)


def pooled_width(model: Any) -> int:
    """Width of the pooled text output that an SDXL model reads beside six sizes (its refiner: five); 0 for others."""
    from comfy.model_base import SDXLRefiner

    if not is_sdxl(model):
        return 0
    sizes = 5 if isinstance(model.model, SDXLRefiner) else 6
    return int(model.model.model_config.unet_config["adm_in_channels"]) - 256 * sizes


def _unsupported(model: Any) -> str:
    return (
        f"model: {type(model.model).__name__} has no U-Net with cross-attention on text; "
        "supported are the SD1.x, SD2.x and SDXL families"
    )


def _walk(unet: Any) -> Any:
    """Layers in execution order. A block whose last module changes the resolution counts for those after it."""
    scale = 1
    for number, block in enumerate(unet.input_blocks):
        if any(type(module).__name__ == "Downsample" for module in block):
            scale *= 2
        yield from _layers(block, "input", number, scale)
    if unet.middle_block is not None:
        yield from _layers(unet.middle_block, "middle", 0, scale)
    for number, block in enumerate(unet.output_blocks):
        yield from _layers(block, "output", number, scale)
        if any(type(module).__name__ == "Upsample" for module in block):
            scale //= 2


def _layers(modules: Any, block: str, number: int, scale: int) -> Any:
    for module in modules:
        for index, transformer in enumerate(getattr(module, "transformer_blocks", ())):
            if getattr(transformer, "attn2", None) is not None:
                yield Layer((block, number, index), scale, transformer.n_heads, transformer)


def address_of(options: dict[str, Any]) -> Address:
    """Where an attention patch is being called, from its `extra_options`."""
    block, number = options["block"]
    return block, number, options.get("block_index", 0)
