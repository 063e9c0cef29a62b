"""Which evaluation of the model is running: its noise level, its step, and the conditioning entries it is asked for.

ComfyUI calls the UNet with cond and uncond together, in either order, or apart, and samplers evaluate a noise level
more than once. So entries are told by (uuid, place) as the guider's own conds have them, and steps by sigma.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator
from typing import Any

import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..trajectory import step_at

ConditionKey = tuple[Any, int]
"""(uuid of a conditioning entry, its place among the guider's conds)."""
Area = tuple[int, int, int, int] | None
"""(height, width, top, left) in latent cells; None: the whole latent."""


class Evaluation:
    """Follows one sampling run. `begin` listeners are called before each evaluation of the model.

    sigma, step: of the running evaluation. again: the same latent at the same sigma once more, as a guidance's extra
    pass (PAG) asks for. areas: of every entry; positive: the entries of the positive prompt; whole: those of them
    that tell the picture as a whole, now.
    """

    def __init__(self, guider: Any, sigmas: torch.Tensor, key: str) -> None:
        self.sigmas = [float(s) for s in sigmas]
        self.sigma = float("inf")
        self.again = False
        self.areas: dict[ConditionKey, Area] = {}
        self.positive: list[ConditionKey] = []
        self.whole: list[ConditionKey] = []
        self.listeners: list[Callable[[torch.Tensor], None]] = []
        self._guider = guider
        self._key = key
        self._x: torch.Tensor | None = None

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def step(self) -> int:
        """The step this evaluation belongs to, from 0: the last whose sigma is not below this one."""
        return step_at(self.sigmas, self.sigma)

    def install(self, transformer_options: dict[str, Any]) -> None:
        """Follow the run that has these options: ComfyUI's copy for this run, so that it ends with it."""
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, self._key, self._evaluate, transformer_options)

    def finish(self) -> None:
        """Let go of the last latent."""
        self._x = None

    def keys(self, options: dict[str, Any]) -> list[ConditionKey]:
        """The entries of a UNet call, chunk by chunk, from an attention patch's options."""
        return list(zip(options["uuids"], options["cond_or_uncond"], strict=True))

    def chunks(self, count: int, options: dict[str, Any]) -> Iterator[tuple[ConditionKey, slice]]:
        """(entry, its rows) for each of a UNet call of `count` rows."""
        keys = self.keys(options)
        size = count // len(keys)
        for place, key in enumerate(keys):
            yield key, slice(place * size, (place + 1) * size)

    def _evaluate(
        self, executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any
    ) -> Any:
        sigma = float(timestep.flatten()[0])
        self.again = sigma == self.sigma and x is self._x
        self.sigma, self._x = sigma, x
        placed = [(place, entry) for place, entries in enumerate(conds) for entry in entries or ()]
        self.areas = {(entry["uuid"], place): latent_area(entry.get("area"), x) for place, entry in placed}
        positive = self._guider.conds.get("positive", [])
        told = [(place, entry) for place, entry in placed if conds[place] is positive]
        self.positive = [(entry["uuid"], place) for place, entry in told]
        active = [(entry["uuid"], place) for place, entry in told if applies(entry, sigma)]
        self.whole = [key for key in active if self.areas[key] is None][:1] or active
        for listener in self.listeners:
            listener(x)
        return executor(model, conds, x, timestep, model_options)


def applies(entry: dict[str, Any], sigma: float) -> bool:
    """Whether a conditioning entry is used at a sigma; ComfyUI's "default" entries only fill what others leave."""
    start, end = float(entry.get("timestep_start", "inf")), float(entry.get("timestep_end", "-inf"))
    return end <= sigma <= start and "default" not in entry


def latent_area(area: Any, x: torch.Tensor) -> Area:
    """The area of an entry as ComfyUI crops it to the latent; None for the whole."""
    if area is None:
        return None
    height, width, top, left = (int(v) for v in area)
    height, width = min(height, x.shape[-2] - top), min(width, x.shape[-1] - left)
    return None if (height, width) == tuple(x.shape[-2:]) else (height, width, top, left)


def region(area: Area, latent: tuple[int, int], size: tuple[int, int]) -> tuple[slice, slice]:
    """Rows and columns of a map of `size` over the latent that lie in `area`."""
    height, width, top, left = area or (*latent, 0, 0)
    down, across = size[0] / latent[0], size[1] / latent[1]
    return (
        slice(round(top * down), round((top + height) * down)),
        slice(round(left * across), round((left + width) * across)),
    )
