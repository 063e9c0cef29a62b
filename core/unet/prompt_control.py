"""Prompt-to-Prompt on a running UNet: the positive prompt's edit rows take attention from their source rows.

What is taken is said by a `PromptControl`. Self-attention is taken by giving the edit rows the source's queries and
keys with their own values; cross-attention by adding a second attention (see `core/prompt_to_prompt.py`).
"""

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F

from ..heatmap import HeatmapSum, part_attention
from ..prompt_to_prompt import PromptControl
from .attention import Replacement, attention, replace_attention
from .capture import spatial_size
from .evaluation import Evaluation
from .layers import LayerTable, address_of
from .rows import PairedRows

LOCAL_BLEND_LAYERS = "level:16"
LOCAL_BLEND_FROM = 0.2
LOCAL_BLEND_THRESHOLD = 0.3
"""As in the authors' code: from a fifth of the steps on, where a word's map exceeds 0.3 of its maximum."""


class PromptControlRun:
    """State of one sampling run with a prompt control. masks: by sigma, where a local blend let the picture change,
    [edits, h, w] of the latent.
    """

    def __init__(self, control: PromptControl, rows: PairedRows, evaluation: Evaluation, table: LayerTable) -> None:
        self.control = control
        self.rows = rows
        self.evaluation = evaluation
        self.table = table
        self._taken: torch.Tensor | None = None  # [source tokens, edit tokens] of this step; None if nothing is taken
        self._own = torch.empty(0)
        self._word_layers = table.select(LOCAL_BLEND_LAYERS) if control.source_words or control.edit_words else set()
        self._word_maps = {"source": HeatmapSum(), "edit": HeatmapSum()}
        self._word_size = (0, 0)  # all layers of a level have one
        self.masks: dict[float, torch.Tensor] = {}

    def install(self, model_options: dict[str, Any]) -> None:
        """Put the patches of this run into the run's own model options."""
        options = model_options.setdefault("transformer_options", {})
        patches = options.setdefault("patches", {})
        patches["attn1_patch"] = [*patches.get("attn1_patch", []), self._take_self_attention]
        replace_attention(options, "attn2", self.table, self._take_cross_attention)  # around an IPAdapter's
        if self._word_layers:
            patches["attn2_patch"] = [*patches.get("attn2_patch", []), self._record_words]
            name = "sampler_post_cfg_function"
            model_options[name] = [*model_options.get(name, []), self._blend_locally]
        self.evaluation.listeners.append(self._begin)

    def _begin(self, x: torch.Tensor) -> None:
        now = self.evaluation
        taken, own = (t.to(x.device) for t in self.control.taken_and_own(now.step, now.steps))
        self._taken = self.control.mapping.to(x.device) * taken if taken.any() or (own != 1).any() else None
        self._own = own

    def _positive_chunks(self, rows: torch.Tensor, options: dict[str, Any], whole: bool = False) -> list[torch.Tensor]:
        """Views [total, …] of the chunks that hold the positive prompt; with `whole`, only for the whole picture."""
        now, chunks = self.evaluation, self.rows.chunks(rows, options)
        wanted = [key for key in now.positive if now.areas[key] is None] if whole else now.positive
        return [chunk for chunk, key in zip(chunks, now.keys(options), strict=True) if key in wanted]

    def _source_rows(self, chunk: torch.Tensor) -> torch.Tensor:
        """[edits, …]: for each edit row of a chunk, its source row."""
        return chunk[self.rows.edits :][self.rows.source_of]

    # ------------------------------------------------------------------ patches

    def _take_self_attention(self, n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> Any:
        """attn1_patch: source queries and keys, the edit's own values."""
        now, layer = self.evaluation, self.table[address_of(options)]
        if not self.control.replaces_self_attention(now.step, now.steps, self.table.native / layer.downsample):
            return n, context, value
        queries, keys = n.clone(), context.clone()
        for rows in (queries, keys):
            for chunk in self._positive_chunks(rows, options):
                chunk[: self.rows.edits] = self._source_rows(chunk)
        return queries, keys, value

    def _take_cross_attention(
        self, existing: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
    ) -> torch.Tensor:
        """attn2 replacement: attention with the edit's own share of its values, plus what it takes from the source."""
        inner = existing or attention
        if self._taken is None:
            return inner(q, k, v, options)
        taken, edits = self._taken.to(v), self.rows.edits
        sources, tokens = taken.shape
        values, added = v.clone(), []
        chunks = zip(*(self._positive_chunks(t, options) for t in (q, k, values)), strict=True)
        for queries, keys, chunk in chunks:
            if chunk.shape[1] % tokens or keys.shape[1] % sources:
                raise RuntimeError(
                    f"the prompts have {tokens} and {sources} tokens, but attention has {chunk.shape[1]}: another node "
                    "on this model adds tokens to the prompt, which Prompt-to-Prompt cannot follow; take it off"
                )
            # contexts of different lengths are repeated to a common one: the first copy of the columns is enough
            mine = taken @ chunk[:edits, :tokens]
            added.append(attention(self._source_rows(queries), self._source_rows(keys)[:, :sources], mine, options))
            chunk[:edits] *= self._own.to(v).repeat(chunk.shape[1] // tokens)[:, None]
        out = inner(q, k, values, options)
        sums = torch.zeros_like(out)
        for chunk, more in zip(self._positive_chunks(sums, options), added, strict=True):
            chunk[:edits] = more
        return out + sums

    def _record_words(self, n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> Any:
        """attn2_patch: add up the attention of the words that limit the change."""
        address = address_of(options)
        if address not in self._word_layers or self.evaluation.again:
            return n, context, value
        layer, (h, w) = self.table[address], spatial_size(options)
        self._word_size = (h, w)
        chunks = zip(*(self._positive_chunks(t, options, whole=True) for t in (n, context)), strict=True)
        for hidden, keys in chunks:
            for name, rows, words, length in (
                ("source", slice(self.rows.edits, None), self.control.source_words, self.control.mapping.shape[0]),
                ("edit", slice(0, self.rows.edits), self.control.edit_words, self.control.mapping.shape[1]),
            ):
                if words:
                    queries = layer.block.attn2.to_q(hidden[rows])
                    tokens = layer.block.attn2.to_k(keys[rows][0, :length])
                    counts = torch.ones(length, device=n.device)
                    maps = part_attention(queries, tokens, counts, (words,), layer.heads)
                    self._word_maps[name].add(maps, h, w)
        return n, context, value

    def _blend_locally(self, arguments: dict[str, Any]) -> torch.Tensor:
        """sampler_post_cfg_function: outside the words' region the edit's prediction is the source's."""
        denoised: torch.Tensor = arguments["denoised"]
        now = self.evaluation
        nothing_seen = all(maps.empty for maps in self._word_maps.values())  # every prompt holds for an area only
        if now.step < int(LOCAL_BLEND_FROM * now.steps) or nothing_seen:
            return denoised
        mask = torch.zeros(self.rows.edits, 1, *denoised.shape[-2:], device=denoised.device)
        for name, maps in self._word_maps.items():
            if not maps.empty:
                found = self._word_mask(maps, denoised.shape)
                mask = torch.maximum(mask, found[self.rows.source_of] if name == "source" else found)
        self.masks[now.sigma] = mask[:, 0].cpu()
        blended = denoised.clone()
        blended[: self.rows.edits] = torch.lerp(self._source_rows(denoised), denoised[: self.rows.edits], mask)
        return blended

    def _word_mask(self, maps: HeatmapSum, latent: torch.Size) -> torch.Tensor:
        """[rows, 1, h, w] of the latent: 1 where the map so far, widened by one of its cells, exceeds the threshold."""
        wide = F.max_pool2d(maps.mean(self._word_size), 3, 1, 1)
        found = F.interpolate(wide, latent[-2:], mode="bilinear", align_corners=False)
        return (found > LOCAL_BLEND_THRESHOLD * found.amax((-2, -1), keepdim=True)).float()
