"""Prompt-to-Prompt from a source that was shown to the UNet before: the positive rows take what was kept of it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import torch

from ..heatmap import probabilities
from ..mag import injected_attention
from ..prompt_to_prompt import PromptControl
from ..trajectory import Conditioning, Trajectory
from .attention import Replacement, attention, check_places
from .layers import Address, LayerTable, address_of
from .partly import CROSS, SELF, Features, SourceFeatures


@dataclass(frozen=True)
class Source:
    """Prompt-to-Prompt's source: a trajectory, its prompt, and what the edit takes of its attention (None: nothing)."""

    trajectory: Trajectory
    prompt: Conditioning
    control: PromptControl | None

    def same_as(self, other: Source) -> bool:
        """Whether both come from the same trajectory and control."""
        return self.trajectory is other.trajectory and self.control is other.control


class TakenAttention:
    """What one run takes of its source's attention. `at` gives what one of its calls of the model needs."""

    def __init__(self, source: Source | None, guider: Any, table: LayerTable, steps: int, key: str) -> None:
        """steps: of the run; key: names its source among others."""
        self.control = source.control if source else None
        self.table = table
        self.steps = steps
        self._features = SourceFeatures(guider, table, source.trajectory, source.prompt, key) if source else None

    def at(self, sigma: float, step: int, model_options: dict[str, Any]) -> Taken:
        """What is taken at a noise level of a step; the source is shown to the UNet unless it was, or nothing is."""
        control, features = self.control, self._features
        if control is None or features is None:
            return Taken(self.table)
        taken, own = control.taken_and_own(step, self.steps)
        across = (control.mapping * taken, own) if taken.any() or (own != 1).any() else None
        native = self.table.native
        within = frozenset(
            address
            for address, layer in self.table.layers.items()
            if control.replaces_self_attention(step, self.steps, native / layer.downsample)
        )
        if across is None and not within:
            features.forget()
            return Taken(self.table)

        def wanted(name: str, address: Address) -> bool:
            return (name == SELF and address in within) or (name == CROSS and across is not None)

        return Taken(self.table, features.at(sigma, wanted, model_options), across, within)


class Taken:
    """Of one step: (M · diag(taken) [source tokens, tokens], own [tokens]), the layers whose self-attention is taken,
    and the source's queries and keys. Without any of it all attention is the edit's own.
    """

    def __init__(
        self, table: LayerTable, features: Features | None = None,
        across: tuple[torch.Tensor, torch.Tensor] | None = None, within: frozenset[Address] = frozenset(),
    ) -> None:  # fmt: skip
        self.table = table
        self.features = features or {}
        self.across = across
        self.within = within
        self._maps: dict[Address, torch.Tensor] = {}

    def replacements(
        self, positive: Callable[[int, dict[str, Any]], list[slice]]
    ) -> dict[str, Callable[..., torch.Tensor]]:
        """Attention in which the positive rows take what is the source's; `positive(rows, options)` says which those
        are in a call of so many rows.
        """

        def self_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                           options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            address = address_of(options)
            if address in self.within:
                check_places(options, q, k)
                q, k = q.clone(), k.clone()
                for rows in positive(len(q), options):
                    q[rows], k[rows] = self._source_rows(SELF, address, rows)
            return (inner or attention)(q, k, v, options)

        def cross_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                            options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            if self.across is None:
                return (inner or attention)(q, k, v, options)
            taken, own = (t.to(v) for t in self.across)
            sources, tokens = taken.shape
            values, added = v.clone(), {}
            for rows in positive(len(q), options):
                # contexts of different lengths are repeated to a common one: the first copy of the columns is enough
                source_q, source_k = self._source_rows(CROSS, address_of(options), rows)
                added[rows.start] = attention(source_q, source_k[:, :sources], taken @ v[rows, :tokens], options)
                values[rows] = v[rows] * own.repeat(v.shape[1] // tokens)[:, None]
            out = (inner or attention)(q, k, values, options).clone()  # autograd keeps the output of some attentions
            for rows in positive(len(q), options):
                out[rows] = out[rows] + added[rows.start]
            return out

        return {SELF: self_attention, CROSS: cross_attention}

    def replaces(self, tokens: Sequence[int]) -> bool:
        """Whether the source's attention stands in the place of these tokens' own."""
        return self.across is not None and not self.across[1][list(tokens)].any()

    def probabilities(
        self, address: Address, q: torch.Tensor, k: torch.Tensor, heads: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Cross-attention with what is taken in it, and the edit's own, [rows, heads, places, tokens], float32."""
        own = probabilities(q, k, heads)
        if self.across is None:
            return own, own
        taken, share = (t.to(own) for t in self.across)
        if address not in self._maps:
            source_q, source_k = self.features[CROSS, address]
            self._maps[address] = probabilities(source_q, source_k, heads)[..., : len(taken)]
        source = self._maps[address]
        places = [row % len(source) for row in range(len(q))]
        own = own[..., : len(share)]
        return injected_attention(own, source[places], taken, share), own

    def _source_rows(self, name: str, address: Address, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
        q, k = self.features[name, address]
        places = [row % len(q) for row in range(rows.stop - rows.start)]
        return q[places], k[places]
