"""Paired rows: edits and the sources they come from, as rows of one batch.

Every chunk of a UNet call (one conditioning entry) holds the same rows in the same order: the edits first, because
ComfyUI previews row 0, then the sources.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class PairedRows:
    """edits, sources: how many rows of each; source_of: for each edit, which source it comes from."""

    edits: int
    sources: int

    @staticmethod
    def pair(edits: int, latents: int) -> PairedRows:
        """Rows for `edits` edit prompts on `latents` source latents. ValueError if the two do not pair."""
        if edits != 1 and latents not in (1, edits):
            raise ValueError(
                f"batch sizes do not pair: {edits} edits and {latents} latents; accepted are one edit for any number "
                "of latents, any number of edits for one latent, or as many edits as latents"
            )
        return PairedRows(max(edits, latents), latents)

    @property
    def source_of(self) -> list[int]:
        return [0] * self.edits if self.sources == 1 else list(range(self.edits))

    @property
    def total(self) -> int:
        return self.edits + self.sources

    def join(self, sources: torch.Tensor) -> torch.Tensor:
        """[sources, …] → [total, …]: every edit starts as a copy of its source."""
        return torch.cat([sources[self.source_of], sources])

    def chunks(self, rows: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """A view [chunks, total, …] of all rows of a UNet call. RuntimeError if another node added rows of its own."""
        chunks = len(options["cond_or_uncond"])
        if rows.shape[0] != chunks * self.total:
            raise RuntimeError(
                f"the UNet call has {rows.shape[0]} rows where {chunks} × {self.total} were expected: another node on "
                "this model changes the batch inside the UNet; take it off the model"
            )
        return rows.unflatten(0, (chunks, self.total))


Conditioning = list[list[Any]]


def batch_of(conditioning: Conditioning) -> int:
    """Batch size of a CONDITIONING: the largest of its entries."""
    return max((entry[0].shape[0] for entry in conditioning), default=0)


def stack(conditionings: list[Conditioning], counts: list[int], names: list[str]) -> Conditioning:
    """One CONDITIONING whose rows are the given ones one after the other, `counts` rows each.

    Entries are joined pairwise; a CONDITIONING with a single entry is joined to every entry of the others. What else
    an entry carries (areas, masks, ranges, ControlNets) must be the same in all, or be carried by one of them.
    Prompts of different lengths are repeated to a common length, as ComfyUI does, which leaves attention unchanged.
    ValueError names the inputs that do not fit.
    """
    for conditioning, name in zip(conditionings, names, strict=True):
        if not conditioning:
            raise ValueError(f"{name}: the conditioning is empty; connect a CLIP Text Encode")
    entries = max(len(c) for c in conditionings)
    for conditioning, name in zip(conditionings, names, strict=True):
        if len(conditioning) not in (1, entries):
            raise ValueError(
                f"{name}: it has {len(conditioning)} entries where another prompt has {entries}; combined prompts are "
                "joined entry by entry, so give all the same number or a single one"
            )
    return [_stack_entry([c[i] if len(c) > 1 else c[0] for c in conditionings], counts, names) for i in range(entries)]


def _stack_entry(entries: list[list[Any]], counts: list[int], names: list[str]) -> list[Any]:
    widths = {entry[0].shape[-1] for entry in entries}
    if len(widths) > 1:
        found = ", ".join(f"{name}: {entry[0].shape[-1]}" for name, entry in zip(names, entries, strict=True))
        raise ValueError(f"the prompts come from different text encoders: their widths differ ({found})")
    length = math.lcm(*(entry[0].shape[1] for entry in entries))
    context = torch.cat(
        [
            _repeat_rows(entry[0], count, name).repeat(1, length // entry[0].shape[1], 1)
            for entry, count, name in zip(entries, counts, names, strict=True)
        ]
    )
    pooled = [entry[1].get("pooled_output") for entry in entries]
    options: dict[str, Any] = {}
    for entry in entries:
        options |= {k: v for k, v in entry[1].items() if k not in ("pooled_output", "control")}
    _check_same_options(entries, names)
    if any(p is not None for p in pooled):
        width = next(p.shape[-1] for p in pooled if p is not None)
        options["pooled_output"] = torch.cat(
            [
                _repeat_rows(p if p is not None else torch.zeros(1, width).to(context), count, name)
                for p, count, name in zip(pooled, counts, names, strict=True)
            ]
        )
    control = _joint_control([entry[1].get("control") for entry in entries], counts)
    if control is not None:
        options["control"] = control
    return [context, options]


_PER_CALL = (
    "area", "mask", "mask_strength", "set_area_to_bounds", "strength", "start_percent", "end_percent", "hooks",
    "timestep_start", "timestep_end", "gligen", "concat_latent_image", "concat_mask", "control_apply_to_uncond",
    "width", "height", "crop_w", "crop_h", "target_width", "target_height",
)  # fmt: skip


def _check_same_options(entries: list[list[Any]], names: list[str]) -> None:
    """What applies to a whole UNet call cannot differ between rows of that call."""
    for key in _PER_CALL:
        values = [entry[1].get(key) for entry in entries]
        given = [v for v in values if v is not None]
        if any(not _same(given[0], v) for v in given[1:]):
            raise ValueError(
                f"{', '.join(names)}: they carry different '{key}' settings, but are denoised as one batch; "
                "set it on one of them, or the same on all"
            )


def _same(a: Any, b: Any) -> bool:
    if isinstance(a, torch.Tensor) and isinstance(b, torch.Tensor):
        return a.shape == b.shape and bool((a == b).all())
    if isinstance(a, list | tuple) and isinstance(b, list | tuple):
        return len(a) == len(b) and all(_same(x, y) for x, y in zip(a, b, strict=True))
    return a is b or bool(a == b)


def _repeat_rows(tensor: torch.Tensor, count: int, name: str) -> torch.Tensor:
    if tensor.shape[0] == count:
        return tensor
    if tensor.shape[0] == 1:
        return tensor.expand(count, *tensor.shape[1:])
    raise ValueError(f"{name}: a batch of {tensor.shape[0]} prompts does not fit {count} rows; give 1 or {count}")


def _joint_control(controls: list[Any], counts: list[int]) -> Any:
    if all(control is None for control in controls):
        return None
    from .control import RowControl

    return RowControl(controls, counts)
