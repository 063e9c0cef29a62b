"""What a run tells of itself after it is over."""

from __future__ import annotations

from dataclasses import dataclass, field

import torch


@dataclass
class RunLog:
    """Filled by the latest run of the model that came with it.

    title: what it is of; masks: [rows, steps, h, w] in 0…1, the mask of each step; pictures: [n, H, W, 3] in 0…1;
    lines: in words, a line each.
    """

    title: str
    masks: torch.Tensor | None = None
    pictures: torch.Tensor | None = None
    lines: list[str] = field(default_factory=list)

    def get_ram_usage(self) -> int:
        """Bytes, as ComfyUI's cache asks for them."""
        return sum(tensor.nbytes for tensor in (self.masks, self.pictures) if tensor is not None)
