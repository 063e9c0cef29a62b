"""Plug-and-Play on a running UNet: all rows of an edit take their layout from the source's features.

Tumanyan et al.: Plug-and-Play Diffusion Features for Text-Driven Image-to-Image Translation, CVPR 2023, section 4. In
the decoder, up to a step, one block's residual features are the source's, and so are the queries and keys of
self-attention from that block on; with and without the prompt.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..trajectory import Trajectory, step_at
from .attention import Replacement, attention, check_places, replace_attention
from .layers import Address, LayerTable, address_of, layer_table
from .partly import RESIDUAL, SELF, SHOWING_THE_SOURCE, Features, SourceFeatures, residual_branches
from .replay import check_latent_size

KEY = "scalpel.plug_and_play"


@dataclass(frozen=True)
class PlugAndPlaySpec:
    """feature_until, attention_until: fractions of the steps in which residual features, self-attention are taken."""

    trajectory: Trajectory
    feature_until: float
    attention_until: float


class PlugAndPlay:
    """OUTER_SAMPLE wrapper: lets one run take the source's features."""

    def __init__(self, spec: PlugAndPlaySpec) -> None:
        self.spec = spec

    def __call__(self, executor: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        check_latent_size(self.spec.trajectory, (noise.shape[-2], noise.shape[-1]))
        self.spec.trajectory.image_of(len(noise))
        with ExitStack() as hooks:
            _Run(self.spec, executor.class_obj, [float(sigma) for sigma in sigmas], hooks)
            return executor(noise, latent, sampler, sigmas, *args, **kwargs)


class _Run:
    """State of one sampling run; its patches end with the run's options, its hooks with `hooks`."""

    def __init__(self, spec: PlugAndPlaySpec, guider: Any, sigmas: list[float], hooks: ExitStack) -> None:
        self.spec = spec
        self.guider = guider
        self.sigmas = sigmas
        steps = len(sigmas) - 1
        self.until = {RESIDUAL: int(spec.feature_until * steps + 1e-6), SELF: int(spec.attention_until * steps + 1e-6)}
        for sigma in sigmas[: max(self.until.values())]:
            spec.trajectory.at(sigma)  # refuses a schedule that it does not reach, before anything is sampled
        table = layer_table(guider.model_patcher)
        self.block = first_block(table)
        self.source = SourceFeatures(guider, table, spec.trajectory, spec.trajectory.positive, KEY)
        self._features: Features = {}
        self._options: dict[str, Any] = {}
        self._showing = False
        options = guider.model_options.setdefault("transformer_options", {})
        add_wrapper_with_key(WrappersMP.APPLY_MODEL, KEY, self._apply, options)
        replace_attention(options, SELF, table, self._self_attention)
        module = residual_branches(guider.model_patcher, table)[self.block]
        hooks.callback(module.register_forward_hook(self._residual).remove)

    def _apply(self, executor: Any, x: torch.Tensor, t: torch.Tensor, *args: Any, **kwargs: Any) -> Any:
        """APPLY_MODEL: before a call of the UNet, what it takes is there."""
        options = kwargs.get("transformer_options") or args[3]
        if options.get(SHOWING_THE_SOURCE):
            self._showing = True
            try:
                return executor(x, t, *args, **kwargs)
            finally:
                self._showing = False
        sigma = float(t.flatten()[0])
        step = step_at(self.sigmas, sigma)
        if step < max(self.until.values()):
            self._features = self.source.at(sigma, self._wanted(step), self.guider.model_options)
        else:
            self._features = {}
            self.source.forget()
        self._options = options
        return executor(x, t, *args, **kwargs)

    def _wanted(self, step: int) -> Callable[[str, Address], bool]:
        def wanted(name: str, address: Address) -> bool:
            if name == RESIDUAL:
                return address == self.block and step < self.until[name]
            return name == SELF and step < self.until[name] and address[0] == "output" and address >= self.block

        return wanted

    def _self_attention(
        self, inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        found = self._features.get((SELF, address_of(options)))
        if found is not None and not self._showing:
            check_places(options, q, k)
            if q.shape[1:] == found[0].shape[1:]:  # a prompt for an area has other places
                q, k = (self._for_all(kept, len(q), options) for kept in found)
        return (inner or attention)(q, k, v, options)

    def _residual(self, _module: Any, _arguments: Any, output: torch.Tensor) -> torch.Tensor | None:
        found = self._features.get((RESIDUAL, self.block))
        if found is None or self._showing or output.shape[1:] != found[0].shape[1:]:
            return None
        return self._for_all(found[0], len(output), self._options)

    def _for_all(self, kept: torch.Tensor, rows: int, options: dict[str, Any]) -> torch.Tensor:
        """[rows, …]: for each row of a call what was kept [images, …] of its source."""
        chunks = len(options["cond_or_uncond"])
        return kept[self.spec.trajectory.image_of(rows // chunks) * chunks]


def first_block(table: LayerTable) -> Address:
    """Where features are taken: the second block with attention of the decoder (SD1.5: the authors' block 4)."""
    numbers = sorted({number for name, number, _ in table.layers if name == "output"})
    return ("output", numbers[min(1, len(numbers) - 1)], 0)
