"""ControlNets on paired rows: each group of rows gets the residuals of its own ControlNet, or none."""

from __future__ import annotations

from typing import Any

import torch


class RowControl:
    """Stands where ComfyUI expects one ControlNet; serves several, each on its own rows of every chunk.

    controls: one per group of rows (None: no control); counts: rows of each group.
    """

    extra_hooks = None
    previous_controlnet = None

    def __init__(self, controls: list[Any], counts: list[int]) -> None:
        self.controls = controls
        self.counts = counts

    def _each(self) -> list[Any]:
        return [control for control in self.controls if control is not None]

    def pre_run(self, model: Any, percent_to_timestep: Any) -> None:
        for control in self._each():
            control.pre_run(model, percent_to_timestep)

    def cleanup(self) -> None:
        for control in self._each():
            control.cleanup()

    def get_models(self) -> list[Any]:
        return [model for control in self._each() for model in control.get_models()]

    def get_extra_hooks(self) -> list[Any]:
        return [hook for control in self._each() for hook in control.get_extra_hooks()]

    def inference_memory_requirements(self, dtype: torch.dtype) -> int:
        return sum(control.inference_memory_requirements(dtype) for control in self._each())

    def get_control(self, x: torch.Tensor, t: torch.Tensor, cond: dict[str, Any], chunks: int, options: Any) -> Any:
        """Residual lists of all rows, as ComfyUI's `ControlBase.get_control` gives them."""
        rows = x.shape[0]
        per_chunk = torch.arange(rows, device=x.device).view(chunks, -1)
        merged: dict[str, list[torch.Tensor | None]] = {}
        start = 0
        for control, count in zip(self.controls, self.counts, strict=True):
            own = per_chunk[:, start : start + count].flatten()
            start += count
            if control is None:
                continue
            own_cond = {k: _take(v, own, rows) for k, v in cond.items()}
            residuals = control.get_control(x[own], t[own], own_cond, chunks, options)
            for place, tensors in (residuals or {}).items():
                slots = merged.setdefault(place, [None] * len(tensors))
                slots += [None] * (len(tensors) - len(slots))
                for i, tensor in enumerate(tensors):
                    if tensor is not None:
                        if slots[i] is None:
                            slots[i] = tensor.new_zeros(rows, *tensor.shape[1:])
                        slots[i][own] = tensor.expand(len(own), *tensor.shape[1:])  # type: ignore[index]
        return merged or None


def _take(value: Any, rows: torch.Tensor, total: int) -> Any:
    return value[rows] if isinstance(value, torch.Tensor) and value.shape[:1] == (total,) else value
