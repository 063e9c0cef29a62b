"""Calling a UNet for what its attention holds: with patches of one's own, and only as far as they need it.

The source of an edit is shown to the UNet this way, once per noise level, and its features are kept for all calls at
that level.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from typing import Any

import comfy.sampler_helpers
import comfy.samplers
import torch
from comfy.patcher_extension import WrappersMP

from ..trajectory import Conditioning, Trajectory
from .attention import Replacement, attention, replace_attention
from .layers import Address, LayerTable, address_of
from .rider import NOT_OF_THE_RECORD, source_prompt

SHOWING_THE_SOURCE = "scalpel.showing_the_source"
"""Set in the transformer options of such a call: what an edit takes from its source, the source does not take."""

SELF, CROSS, RESIDUAL = "attn1", "attn2", "residual"
Features = dict[tuple[str, Address], tuple[torch.Tensor, ...]]
"""(queries, keys) by (SELF or CROSS, layer); the residual branch's output by (RESIDUAL, (block, number, 0))."""


class Enough(Exception):
    """Raised in a patch: everything is there, the rest of the UNet need not run."""


def call_partly(
    model: Any, conds: list[dict[str, Any]], x: torch.Tensor, sigma: float, model_options: dict[str, Any],
    table: LayerTable, patches: dict[str, Callable[..., torch.Tensor]],
) -> None:  # fmt: skip
    """One call of the model with these attention replacements (see `replace_attention`), up to `Enough`.

    Neither Scalpel's evaluation of a sampling run nor another node's sees it. Hooks (LoRAs of a prompt) are afterwards
    on the model as they were, as it may be about to be called. RuntimeError if no patch said enough.
    """
    options = dict(model_options.get("transformer_options", {}))
    wrappers = dict(options.get("wrappers", {}))
    wrappers.pop(WrappersMP.CALC_COND_BATCH, None)
    around = dict(wrappers.get(WrappersMP.DIFFUSION_MODEL, {}))
    around.pop("easycache", None)  # it would answer in the place of the UNet
    wrappers[WrappersMP.DIFFUSION_MODEL] = around
    options["wrappers"] = wrappers
    hooks = model.current_patcher.current_hooks
    for name, function in patches.items():
        replace_attention(options, name, table, function)
    try:
        comfy.samplers.calc_cond_batch(
            model, [conds], x, x.new_full((len(x),), sigma), {**model_options, "transformer_options": options}
        )
    except Enough:
        return
    finally:
        model.current_patcher.apply_hooks(hooks)
    raise RuntimeError("model: its cross-attention was never called; another node on it replaces it whole")


class SourceFeatures:
    """What one sampling run takes of its source's features: one UNet row per image and noise level, without guidance.

    The source is not shown ControlNets and the like that only the sampler's prompt has.
    """

    def __init__(self, guider: Any, table: LayerTable, trajectory: Trajectory, prompt: Conditioning, key: str) -> None:
        """prompt: the source's (see `source_prompt`); key: names this source among others of the run."""
        prompt = source_prompt(prompt)
        guider.conds[key] = comfy.sampler_helpers.convert_cond(prompt)
        self._guider, self._table, self._trajectory, self._key = guider, table, trajectory, key
        self._own = prompt[0][1]
        self._last = list(table.layers)[-1]
        self._sigma = float("nan")
        self._features: Features = {}

    def at(self, sigma: float, wanted: Callable[[str, Address], bool], model_options: dict[str, Any]) -> Features:
        """What is `wanted` of the features at a noise level; asked for once more they are those of the first time."""
        if sigma != self._sigma:
            self._features = {}  # not beside the new ones
            self._features = self._show(sigma, wanted, model_options)
            self._sigma = sigma
        return self._features

    def forget(self) -> None:
        """Let go of the features."""
        self._features, self._sigma = {}, float("nan")

    def _show(self, sigma: float, wanted: Callable[[str, Address], bool], model_options: dict[str, Any]) -> Features:
        found: Features = {}

        def kept(name: str) -> Callable[..., torch.Tensor]:
            def function(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                         options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
                address = address_of(options)
                if wanted(name, address):
                    found[name, address] = (q, k)
                if name == CROSS and address == self._last:
                    raise Enough
                return (inner or attention)(q, k, v, options)

            return function

        def residual(block: Address) -> Callable[..., None]:
            def hook(_module: Any, _arguments: Any, output: torch.Tensor) -> None:
                found[RESIDUAL, block] = (output,)

            return hook

        entry = self._guider.conds[self._key][0]
        entry = {name: value for name, value in entry.items() if name not in NOT_OF_THE_RECORD or name in self._own}
        options = {**model_options.get("transformer_options", {}), SHOWING_THE_SOURCE: True}
        model_options = {**model_options, "transformer_options": options}
        x = self._trajectory.at(sigma).to(self._guider.model_patcher.load_device)
        with torch.no_grad(), ExitStack() as hooks:
            for block, module in residual_branches(self._guider.model_patcher, self._table).items():
                if wanted(RESIDUAL, block):
                    hooks.callback(module.register_forward_hook(residual(block)).remove)
            call_partly(
                self._guider.inner_model, [entry], x, sigma, model_options, self._table,
                {SELF: kept(SELF), CROSS: kept(CROSS)},
            )  # fmt: skip
        return found


def residual_branches(model: Any, table: LayerTable) -> dict[Address, torch.nn.Module]:
    """The last part of the residual branch, to whose output the block's input is added, of each block of the decoder
    that has attention; by (block, number, 0).
    """
    blocks = model.get_model_object("diffusion_model").output_blocks
    numbers = sorted({number for name, number, _ in table.layers if name == "output"})
    return {("output", number, 0): blocks[number][0].out_layers for number in numbers}
