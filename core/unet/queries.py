"""Queries of cross-attention layers, kept from one pass over given pictures: what a part token is trained against."""

from __future__ import annotations

import dataclasses
import logging
from collections.abc import Callable
from typing import Any

import comfy.model_management
import torch

from ..token_training import LayerQueries
from .inputs import checked_latent
from .layers import Address, LayerTable, layer_table
from .rows import Conditioning
from .sampling import noise_levels, probe

log = logging.getLogger(__name__)

SINGLE_PRECISION_BYTES = 2**30
"""Queries that a model computes in float32 are kept so up to this size in all, beyond it in float16."""

CALL_AREA = 128 * 128
"""Latent pixels shown to the UNet in one call: one SDXL picture, four of SD1.5, sixteen of the demo model."""


def collect_queries(
    model: Any, latent: dict[str, Any], layers: str, noise: tuple[float, float], timesteps: int, seed: int,
    positive: Conditioning | None = None, on_call: Callable[[int], None] | None = None,
) -> list[LayerQueries]:  # fmt: skip
    """The queries of the chosen layers for each picture of `latent` at each of `timesteps` noise levels, on the CPU.

    noise: (start, end), fractions of the training steps, start > end. The UNet sees each picture once per timestep, a
    few pictures at a time; picture i has the noise of `batch_index` i, however they are divided. positive: one prompt,
    or a batch of one per picture; zeros without it. `on_call(pictures)` is called after each UNet call with the number
    of pictures it showed, and may raise to cancel.

    Keys are made by calling `to_k`, so that LoRA, casts and offloading apply: on the rows of a unit matrix it gives
    its own weight. Everything returned is an ordinary tensor, also under `torch.inference_mode`. ValueError if the
    queries do not fit into memory, hold NaN, or the model was not run as expected.
    """
    table = layer_table(model)
    wanted = table.select(layers)
    samples = checked_latent(model, latent, "latent")
    pictures, (h, w) = len(samples), samples.shape[-2:]
    numbers = query_numbers(table, wanted, pictures, timesteps, (h, w))
    dtype = _kept_dtype(model, numbers)
    _check_memory(numbers * dtype.itemsize, pictures, timesteps, len(wanted))
    _check_prompt(positive, pictures)
    store = _Store(table, wanted, pictures, timesteps, dtype)
    sigmas = noise_levels(model, timesteps, *noise)
    indices = list(latent.get("batch_index", range(pictures)))

    def called(*_: Any) -> None:
        shown = store.next_level()
        if on_call is not None:
            on_call(shown)

    at_once = max(1, CALL_AREA // (h * w))
    with torch.no_grad():
        for first in range(0, pictures, at_once):
            rows = slice(first, min(first + at_once, pictures))
            store.begin(rows)
            chunk = {"samples": samples[rows], "batch_index": indices[rows]}
            probe(model, chunk, sigmas, seed, _prompt_of(positive, rows), store.look, called)
            store.check_whole()
    return store.layers()


def query_numbers(
    table: LayerTable, layers: frozenset[Address], pictures: int, timesteps: int, size: tuple[int, int]
) -> int:
    """How many numbers the queries of these layers are. size: (h, w) of the latent."""
    h, w = size
    numbers = 0
    for address in layers:
        scale = table[address].downsample
        numbers += -(-h // scale) * -(-w // scale) * int(table[address].block.attn2.to_q.out_features)
    return pictures * timesteps * numbers


def for_training(layers: list[LayerQueries], needed: int, device: torch.device) -> list[LayerQueries]:
    """The keys on `device`, where the token is optimised, and the queries too if ComfyUI can make room for them there.

    needed: bytes that the optimisation takes with its queries there (`optimisation_bytes`). Queries that stay in main
    memory are streamed from it at every step, picture by picture.
    """
    if comfy.model_management.is_device_cpu(device):
        return layers
    comfy.model_management.free_memory(needed, device)
    fits = comfy.model_management.get_free_memory(device) >= needed
    if not fits:
        log.warning("Scalpel: %.1f GB are not free on %s; the queries stay in main memory", needed / 1e9, device)
    with torch.inference_mode(False):
        return [
            dataclasses.replace(
                layer, queries=layer.queries.to(device) if fits else layer.queries, to_k=layer.to_k.to(device)
            )
            for layer in layers
        ]


class _Store:
    """One tensor per layer, [pictures, timesteps, h·w, heads·d], filled in place as the UNet runs."""

    def __init__(
        self, table: LayerTable, wanted: frozenset[Address], pictures: int, timesteps: int, dtype: torch.dtype
    ) -> None:
        self.table = table
        self.wanted = [address for address in table.layers if address in wanted]
        self.pictures, self.timesteps, self.dtype = pictures, timesteps, dtype
        self._queries: dict[Address, torch.Tensor] = {}
        self._keys: dict[Address, torch.Tensor] = {}
        self._sizes: dict[Address, tuple[int, int]] = {}
        self._rows = slice(0)
        self._step = 0
        self._seen: dict[Address, int] = {}

    def begin(self, rows: slice) -> None:
        """The pictures `rows` are shown from now on, from the first noise level."""
        self._rows, self._step = rows, 0
        self._seen = dict.fromkeys(self.wanted, 0)

    def next_level(self) -> int:
        """The UNet is done with a noise level. Returns the number of pictures it saw."""
        self._step += 1
        return int(self._rows.stop - self._rows.start)

    def look(self, address: Address, hidden: torch.Tensor, h: int, w: int) -> None:
        """Keep a layer's queries. Nodes that call the UNet again at a noise level (PAG) are not seen twice."""
        if self._seen.get(address) != self._step:
            return
        attention = self.table[address].block.attn2
        queries = attention.to_q(hidden)
        if address not in self._queries:
            self._allocate(address, queries, attention, hidden, (h, w))
        place = self._queries[address][self._rows, self._step]
        if place.shape != queries.shape:
            raise ValueError(
                f"the model sees {h} × {w} pixels of a picture in layer {_name(address)} where it saw "
                f"{self._sizes[address][0]} × {self._sizes[address][1]} before: take areas and masks off positive, and "
                "nodes that change the resolution inside the model (deep shrink) off the model"
            )
        place.copy_(queries)
        if not torch.isfinite(place).all():
            raise ValueError(
                f"model: the queries of its layer {_name(address)} hold NaN or infinite values; run it in another "
                "precision (ComfyUI's --bf16-unet, --fp32-unet or --force-upcast-attention)"
            )
        self._seen[address] += 1

    def _allocate(
        self, address: Address, queries: torch.Tensor, attention: Any, hidden: torch.Tensor, size: tuple[int, int]
    ) -> None:
        with torch.inference_mode(False):
            self._queries[address] = torch.empty(self.pictures, self.timesteps, *queries.shape[1:], dtype=self.dtype)
        weight = attention.to_k(torch.eye(attention.to_k.in_features).to(hidden)).float().cpu().T
        with torch.inference_mode(False):
            self._keys[address] = weight.clone(memory_format=torch.contiguous_format)
        self._sizes[address] = size

    def check_whole(self) -> None:
        """ValueError if a layer was not run at every noise level."""
        for address, seen in self._seen.items():
            if seen != self.timesteps:
                raise ValueError(
                    f"the model ran its layer {_name(address)} at {seen} of {self.timesteps} noise levels: take time "
                    "ranges off positive, and nodes that skip steps (EasyCache) off the model"
                )

    def layers(self) -> list[LayerQueries]:
        """What was kept, in execution order."""
        return [
            LayerQueries(self._queries[a], self._keys[a], self.table[a].heads, *self._sizes[a]) for a in self.wanted
        ]


def _name(address: Address) -> str:
    return f"{address[0]}.{address[1]}[{address[2]}]"


def _kept_dtype(model: Any, numbers: int) -> torch.dtype:
    """Half precision as the model computes it; single precision while it is small."""
    dtype: torch.dtype = model.model.manual_cast_dtype or model.model.get_dtype()
    if dtype in (torch.float16, torch.bfloat16):
        return dtype
    return torch.float32 if 4 * numbers <= SINGLE_PRECISION_BYTES else torch.float16


def _check_memory(needed: int, pictures: int, timesteps: int, layers: int) -> None:
    free = comfy.model_management.get_free_memory(torch.device("cpu"))
    log.info(
        "Scalpel: queries of %d pictures, %d timesteps, %d layers: %.2f GB", pictures, timesteps, layers, needed / 1e9
    )
    if needed > free:
        raise ValueError(
            f"images: the queries of {pictures} pictures at {timesteps} timesteps in {layers} layers take "
            f"{needed / 1e9:.1f} GB of memory, and {free / 1e9:.1f} GB are free; give fewer or smaller pictures, fewer "
            "timesteps, or fewer layers (first8)"
        )


def _check_prompt(positive: Conditioning | None, pictures: int) -> None:
    if positive is None:
        return
    if len(positive) != 1:
        raise ValueError(
            f"positive: it has {len(positive)} entries (combined prompts); accepted are one prompt, or one batch with "
            "a prompt per picture"
        )
    prompts = len(positive[0][0])
    if prompts not in (1, pictures):
        raise ValueError(f"positive: {prompts} prompts for {pictures} pictures; give 1 or {pictures}")


def _prompt_of(positive: Conditioning | None, rows: slice) -> Conditioning | None:
    """The prompts of these pictures: a prompt for all stays, of a batch their rows are taken."""
    if positive is None:
        return None
    (context, options), *_ = positive
    pooled = options.get("pooled_output")
    if pooled is not None and len(pooled) > 1:
        options = {**options, "pooled_output": pooled[rows]}
    return [[context[rows] if len(context) > 1 else context, options]]
