"""ComfyUI's attention: the user's choice of it, and replacing it layer by layer."""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import comfy.ldm.modules.attention
import torch

from .layers import LayerTable

Replacement = Callable[[torch.Tensor, torch.Tensor, torch.Tensor, dict[str, Any]], torch.Tensor]
"""(q, k, v, extra options) → the attention's output before `to_out`, as ComfyUI calls it."""


def attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    """The attention that the user has chosen for ComfyUI. q: [rows, pixels, heads·d]; k, v: [rows, tokens, heads·d]."""
    function = comfy.ldm.modules.attention.optimized_attention
    more = {"transformer_options": options} if _takes_options(function) else {}
    return function(q, k, v, options["n_heads"], attn_precision=options.get("attn_precision"), **more)


@functools.cache
def _takes_options(function: Callable[..., Any]) -> bool:
    """ComfyUI 0.3.52 knows no `transformer_options` here."""
    parameters = inspect.signature(function).parameters.values()
    return any(p.name == "transformer_options" or p.kind is p.VAR_KEYWORD for p in parameters)


def check_places(options: dict[str, Any], *tensors: torch.Tensor) -> None:
    """ValueError unless queries (and keys of self-attention) [rows, places, C] have the layer's own h · w places."""
    h, w = options["activations_shape"][-2:]
    found = {tensor.shape[1] for tensor in tensors} - {h * w}
    if found:
        raise ValueError(
            f"model: attention has {found.pop()} places where the layer has {h} × {w}: another node on this model "
            "(Token Merging, HyperTile) merges or splits them, and a mask has no meaning there; take it off the model"
        )


def replace_attention(
    options: dict[str, Any], name: str, table: LayerTable, function: Callable[..., torch.Tensor]
) -> None:
    """Put `function(inner, q, k, v, extra options)` in the place of every layer's attention `name` ("attn1", "attn2").

    inner: what was there before (another node's replacement), or None. options: transformer options; what they hold is
    not changed but replaced, as copies of the model share it.
    """
    replacements = dict(options.get("patches_replace", {}))
    existing = replacements.get(name, {})
    ours = {
        address: functools.partial(function, existing.get(address) or existing.get(address[:2]))
        for address in table.layers
    }
    replacements[name] = {**existing, **ours}
    options["patches_replace"] = replacements
