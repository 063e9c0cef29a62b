"""PartEdit on a running UNet: find the part in the source rows, blend its edit into them at every layer and step.

After each step the token's heat map over the source gives a mask; during the next step every self- and
cross-attention output of an edit row becomes source · (1 − mask) + edit · mask (PartEdit, section 3.3, equation 5).
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F

from ..heatmap import HeatmapSum, normalise
from ..part_token import PartToken
from ..prompt_to_prompt import PromptControl
from ..threshold import partedit_mask
from .capture import PartCapture, map_size, spatial_size
from .evaluation import Area, ConditionKey, Evaluation, region
from .layers import LayerTable, address_of, is_sdxl, layer_table
from .prompt_control import PromptControlRun
from .rows import PairedRows

KEY = "scalpel.feature_blend"


@dataclass(frozen=True)
class BlendSpec:
    """What a feature-blending run does.

    mask: the user's own, [1 or sources, H, W] in 0…1, or None; multiply: it limits the token's mask rather than
    replacing it. blend_until: fraction of the steps; step i (from 0) blends iff 1 ≤ i < round(blend_until · steps).
    control: Prompt-to-Prompt beside the blending, or, with neither token nor mask, instead of it.
    """

    rows: PairedRows
    token: PartToken | None
    omega: float
    blend_until: float
    layers: str
    mask: torch.Tensor | None = None
    multiply: bool = False
    control: PromptControl | None = None

    @property
    def uses_token(self) -> bool:
        return self.token is not None and (self.mask is None or self.multiply)


class FeatureBlend:
    """OUTER_SAMPLE wrapper: makes one run's state, lets the sampler run, and hands the state to `report`."""

    def __init__(self, spec: BlendSpec, report: Callable[[BlendRun], None]) -> None:
        self.spec = spec
        self.report = report

    def __call__(self, executor: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        guider = executor.class_obj
        evaluation = Evaluation(guider, sigmas, KEY)
        run = BlendRun(self.spec, guider, evaluation, noise)
        evaluation.install(run.install(guider.model_options))
        if self.spec.control is not None:
            run.control = PromptControlRun(self.spec.control, self.spec.rows, evaluation, run.table)
            run.control.install(guider.model_options)
        result = executor(noise, latent, sampler, sigmas, *args, **kwargs)
        run.finish()
        self.report(run)
        return result


class BlendRun:
    """State of one sampling run. Conditioning entries and steps are `evaluation`'s, rows `spec.rows`'.

    `guider.model_options` is the copy that ComfyUI made for this run, so what is installed there ends with it.
    """

    def __init__(self, spec: BlendSpec, guider: Any, evaluation: Evaluation, noise: torch.Tensor) -> None:
        self.spec = spec
        self.guider = guider
        self.evaluation = evaluation
        self.latent_size: tuple[int, int] = (noise.shape[-2], noise.shape[-1])
        self.map_size = map_size(noise.shape, is_sdxl(guider.model_patcher))
        self.table: LayerTable = layer_table(guider.model_patcher)
        self.capture = self._make_capture()
        self.control: PromptControlRun | None = None
        self.masks: dict[float, torch.Tensor] = {}
        self.thresholds: dict[float, list[float]] = {}
        self._maps: dict[ConditionKey, tuple[Area, HeatmapSum]] = {}
        self._maps_sigma = float("inf")
        self._latest = (float("inf"), torch.empty(0))  # the newest mask where the model runs; all others on the CPU
        self._weights: dict[tuple[Area, int, int], torch.Tensor] = {}
        self._blend_mask: torch.Tensor | None = None
        self._recording: list[ConditionKey] = []

    def _make_capture(self) -> PartCapture | None:
        if not self.spec.uses_token or self.spec.token is None:
            return None
        hooked = any(entry.get("hooks") is not None for conds in self.guider.conds.values() for entry in conds)
        return PartCapture(self.table, self.table.select(self.spec.layers), self.spec.token, keep_keys=not hooked)

    def install(self, model_options: dict[str, Any]) -> dict[str, Any]:
        """Put the patches of this run into the run's own model options; returns its transformer options."""
        options: dict[str, Any] = model_options.setdefault("transformer_options", {})
        patches = options.setdefault("patches", {})
        for name, patch in (
            ("attn1_output_patch", self._blend),
            ("attn2_output_patch", self._blend),
            ("attn2_patch", self._record),
        ):
            patches[name] = [*patches.get(name, []), patch]
        self.evaluation.listeners.append(self._begin)
        return options

    # ------------------------------------------------------------------ one evaluation of the model

    def _begin(self, x: torch.Tensor) -> None:
        now = self.evaluation
        if now.sigma != self._maps_sigma:
            self._close_map()
        self._maps_sigma = now.sigma
        self._recording = [] if now.again else now.whole
        if self._recording:  # a second evaluation at this sigma (Heun) replaces the first
            self._maps = {key: (now.areas[key], HeatmapSum()) for key in self._recording}
        self._blend_mask = self._mask_for_this_step(x)
        self._weights = {}

    def _mask_for_this_step(self, x: torch.Tensor) -> torch.Tensor | None:
        if not 1 <= self.evaluation.step < round(self.spec.blend_until * self.evaluation.steps):
            return None
        if not self.spec.uses_token and self.spec.mask is not None:
            return self._user_mask(x)
        earlier = [sigma for sigma in self.masks if sigma > self.evaluation.sigma]
        if not earlier:
            return None
        sigma = min(earlier)
        if self._latest[0] != sigma:
            self._latest = (sigma, self.masks[sigma].to(x.device))
        return self._latest[1]

    def _user_mask(self, like: torch.Tensor) -> torch.Tensor:
        assert self.spec.mask is not None
        mask = self.spec.mask.to(device=like.device, dtype=torch.float32)[:, None]
        mask = F.interpolate(mask, self.map_size, mode="bilinear", align_corners=False)[:, 0]
        return mask.expand(self.spec.rows.sources, -1, -1)

    def _close_map(self) -> None:
        """Turn the maps of the evaluation that has ended into the mask of its sigma."""
        recorded = [(area, maps) for area, maps in self._maps.values() if not maps.empty]
        if not recorded:
            return
        maps = normalise(self._put_together(recorded))
        found = [partedit_mask(heatmap, self.spec.omega) for heatmap in maps]
        mask = torch.stack([m for m, _ in found])
        if self.spec.mask is not None:
            mask = mask * self._user_mask(mask)
        self._latest = (self._maps_sigma, mask)
        self.masks[self._maps_sigma] = mask.cpu()
        self.thresholds[self._maps_sigma] = [k for _, k in found]
        self._maps = {}

    def _put_together(self, recorded: list[tuple[Area, HeatmapSum]]) -> torch.Tensor:
        """One map [sources, H, W] of the whole latent; where areas overlap, their mean; 0 where there is none."""
        if recorded[0][0] is None:
            return recorded[0][1].mean(self.map_size).sum(1)
        total, cover = torch.zeros(()), torch.zeros(self.map_size)
        for area, maps in recorded:
            rows, columns = region(area, self.latent_size, self.map_size)
            size = (rows.stop - rows.start, columns.stop - columns.start)
            part = maps.mean(size).sum(1)
            margin = (columns.start, self.map_size[1] - columns.stop, rows.start, self.map_size[0] - rows.stop)
            total = total.to(part) + F.pad(part, margin)
            cover[rows, columns] += 1
        return total / cover.clamp(min=1).to(total)

    def finish(self) -> None:
        """Close the last evaluation's map."""
        self._close_map()
        self.evaluation.finish()

    def step_masks(self) -> torch.Tensor:
        """The mask after each step, [sources, steps, H, W] on the CPU; the user's own mask where no token is used.

        All 1 where there is neither: Prompt-to-Prompt alone may change everything, but for a local blend.
        """
        masks = self._blending_masks()
        if self.control is not None and self.control.masks:
            masks = masks.clone()
            for step, sigma in enumerate(self.evaluation.sigmas[:-1]):
                if sigma in self.control.masks:
                    local = self.control.masks[sigma][:, None]
                    masks[:, step] *= F.interpolate(local, self.map_size, mode="bilinear", align_corners=False)[:, 0]
        return masks

    def _blending_masks(self) -> torch.Tensor:
        if self.masks:
            per_step = []
            for sigma in self.evaluation.sigmas[:-1]:
                nearest = min(self.masks, key=lambda known: abs(known - sigma))
                per_step.append(self.masks[nearest])
            return torch.stack(per_step, 1)
        if self.spec.uses_token:
            raise RuntimeError("no attention map was recorded: the model's cross-attention was never called")
        everything = torch.ones(self.spec.rows.sources, *self.map_size)
        mask = self._user_mask(everything) if self.spec.mask is not None else everything
        return mask[:, None].expand(-1, self.evaluation.steps, -1, -1)

    # ------------------------------------------------------------------ patches

    def _record(self, n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> Any:
        """attn2_patch: take the part's map from the source rows of the first unrestricted positive entry."""
        if self.capture is not None and self._recording:
            h, w = spatial_size(options)
            for chunk, key in zip(self.spec.rows.chunks(n, options), self.evaluation.keys(options), strict=True):
                if key in self._recording:
                    self.capture.record(self._maps[key][1], address_of(options), chunk[self.spec.rows.edits :], h, w)
        return n, context, value

    def _blend(self, n: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """attn1/attn2_output_patch: blend every edit row with its source, in cond and uncond alike."""
        if self._blend_mask is None:
            return n
        rows = self.spec.rows
        h, w = spatial_size(options)
        if n.shape[1] != h * w:
            raise RuntimeError(
                f"attention has {n.shape[1]} places where the layer has {h} × {w}: another node on this model merges "
                "or splits attention tokens, which feature blending cannot follow; take it off the model"
            )
        chunks = rows.chunks(n, options)
        for chunk, key in zip(chunks, self.evaluation.keys(options), strict=True):
            weight = self._weight(self.evaluation.areas.get(key), h, w, n)
            source = chunk[rows.edits :][rows.source_of] if rows.sources > 1 else chunk[rows.edits :]
            chunk[: rows.edits] = torch.lerp(source, chunk[: rows.edits], weight)
        return n

    def _weight(self, area: Area, h: int, w: int, like: torch.Tensor) -> torch.Tensor:
        """The blending mask at a layer, [edits or 1, h·w, 1]; cropped to `area` where the call is."""
        key = (area, h, w)
        if key not in self._weights:
            assert self._blend_mask is not None
            mask = self._blend_mask
            if area is not None:
                rows, columns = region(area, self.latent_size, self.map_size)
                mask = mask[:, rows, columns]
            mask = F.interpolate(mask[:, None], (h, w), mode="bilinear", align_corners=False)
            weight = mask.flatten(1)[..., None].to(like.dtype)
            self._weights[key] = weight[self.spec.rows.source_of] if self.spec.rows.sources > 1 else weight
        return self._weights[key]
