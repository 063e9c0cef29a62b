"""From heat map to mask: Otsu's threshold and PartEdit's adaptive one."""

from __future__ import annotations

import torch

BINS = 256


def otsu(values: torch.Tensor) -> float:
    """Otsu's threshold (1979) of all values together, from a histogram of 256 bins over [min, max].

    Returns the centre of the last bin of the lower class, as scikit-image's `threshold_otsu` does; a constant input's
    threshold is that constant. ValueError if `values` is empty or not finite.
    """
    flat = values.detach().flatten().cpu().double()  # not every device has float64
    if flat.numel() == 0:
        raise ValueError("Otsu's threshold of an empty map does not exist")
    low, high = flat.min().item(), flat.max().item()
    _check_finite(flat)
    if low == high:
        return low
    counts = torch.histc(flat, BINS, low, high)
    width = (high - low) / BINS
    centres = low + width * (torch.arange(BINS, dtype=torch.float64) + 0.5)
    below, above = counts.cumsum(0), counts.flip(0).cumsum(0).flip(0)
    mass = counts * centres
    mean_below = mass.cumsum(0) / below.clamp(min=1)
    mean_above = mass.flip(0).cumsum(0).flip(0) / above.clamp(min=1)
    between = below[:-1] * above[1:] * (mean_below[:-1] - mean_above[1:]) ** 2
    return centres[between.argmax()].item()


def _check_finite(values: torch.Tensor) -> None:
    if not torch.isfinite(values).all():
        raise ValueError("the map holds NaN or infinite values; every value must be a finite number")


def partedit_mask(heatmap: torch.Tensor, omega: float) -> tuple[torch.Tensor, float]:
    """PartEdit's adaptive threshold (section 3.3): 0 below k/2, else 1 from ω·k on, else the heat map itself.

    heatmap: [H, W] in 0…1. Returns the mask [H, W] in 0…1 and Otsu's k. With ω·k > 1 nothing is set to 1; a map of
    zeros, on which the part is nowhere, stays zero.
    """
    k = otsu(heatmap)
    mask = torch.where(heatmap < 0.5 * k, torch.zeros_like(heatmap), heatmap)
    return torch.where((mask >= omega * k) & (mask > 0), torch.ones_like(mask), mask), k


def threshold(heatmap: torch.Tensor, mode: str, omega: float = 1.5, lower: float = 0.5) -> tuple[torch.Tensor, float]:
    """A mask [H, W] from a heat map [H, W], and the threshold that was used.

    mode: "partedit" (`partedit_mask`), "otsu" (1 above Otsu's threshold), "fixed" (1 from `lower` on). ValueError if
    the map holds NaN or infinite values, or the mode is unknown.
    """
    _check_finite(heatmap)
    if mode == "partedit":
        return partedit_mask(heatmap, omega)
    if mode == "otsu":
        k = otsu(heatmap)
        return (heatmap > k).to(heatmap.dtype), k
    if mode == "fixed":
        return (heatmap >= lower).to(heatmap.dtype), lower
    raise ValueError(f"unknown threshold mode {mode!r}; known: partedit, otsu, fixed")
