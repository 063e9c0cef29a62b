"""Otsu's threshold is scikit-image's, and PartEdit's mask has the three zones of the paper."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from skimage.filters import threshold_otsu

from scalpel.core.threshold import BINS, otsu, partedit_mask, threshold


def _bimodal(seed, shape=(64, 48)):
    generator = torch.Generator().manual_seed(seed)
    low, high = (
        torch.randn(shape, generator=generator) * 0.05 + 0.2,
        torch.randn(shape, generator=generator) * 0.1 + 0.8,
    )
    return torch.where(torch.rand(shape, generator=generator) < 0.7, low, high)


INPUTS = {
    "uniform": torch.rand(64, 48, generator=torch.Generator().manual_seed(0)),
    "normal": torch.randn(64, 48, generator=torch.Generator().manual_seed(1)) * 100,
    "bimodal": _bimodal(2),
    "bimodal, negative": _bimodal(3) - 1.5,
    "mostly zero": _bimodal(4).sub(0.5).clamp(min=0),
    "two values": torch.tensor([[0.0, 0.0, 0.0, 1.0]]),
    "three values": torch.tensor([[0.0, 0.4, 1.0]]),
    "a very small range": torch.tensor([[0.5, 0.5 + 2**-20, 0.5 + 2**-19, 0.5]]),
    "large values": _bimodal(5) * 1e20,
}


@pytest.mark.parametrize("name", INPUTS)
def test_otsu_is_scikit_image_s_to_a_thousandth_of_a_bin(name):
    values = INPUTS[name]
    expected = threshold_otsu(values.double().numpy(), nbins=BINS)
    bin_width = float(values.max().double() - values.min().double()) / BINS
    assert abs(otsu(values) - expected) <= 1e-3 * bin_width


def test_otsu_is_scikit_image_s_on_a_hundred_random_maps_of_all_kinds():
    generator = torch.Generator().manual_seed(6)
    for case in range(100):
        peak = torch.rand(1, generator=generator).item()
        values = torch.rand(8 + case, 9, generator=generator) ** (1 + 4 * peak)
        values[: case % 8] += peak
        expected = threshold_otsu(values.double().numpy(), nbins=BINS)
        assert abs(otsu(values) - expected) <= 1e-3 * float(values.max() - values.min()) / BINS, f"map {case}"


@pytest.mark.parametrize("value", [0.0, 0.25, 1.0, -3.0])
@pytest.mark.parametrize("shape", [(1,), (1, 1), (5, 7)])
def test_otsu_of_a_constant_is_that_constant(value, shape):
    values = torch.full(shape, value)
    assert otsu(values) == value == threshold_otsu(values.numpy())


def test_otsu_of_a_half_precision_map_is_that_of_its_values():
    values = INPUTS["bimodal"].half()
    assert otsu(values) == otsu(values.float())


@pytest.mark.parametrize("bad", [float("nan"), float("inf"), float("-inf")])
def test_a_map_that_is_not_finite_is_refused_in_words(bad):
    values = INPUTS["uniform"].clone()
    values[3, 4] = bad
    with pytest.raises(ValueError, match="NaN or infinite"):
        otsu(values)


def test_an_empty_map_is_refused_in_words():
    with pytest.raises(ValueError, match="empty map"):
        otsu(torch.empty(0))


def test_partedit_s_mask_is_nothing_below_half_of_k_all_from_omega_k_and_the_map_between():
    heatmap = INPUTS["bimodal"].clamp(0, 1)
    mask, k = partedit_mask(heatmap, 1.5)
    assert k == otsu(heatmap)
    outside, inside = heatmap < 0.5 * k, heatmap >= 1.5 * k
    between = ~outside & ~inside
    assert outside.any()
    assert inside.any()
    assert between.any()
    assert (mask[outside] == 0).all()
    assert (mask[inside] == 1).all()
    assert torch.equal(mask[between], heatmap[between])


def test_with_omega_k_above_one_nothing_becomes_fully_edited_and_the_map_stays():
    heatmap = INPUTS["uniform"] / INPUTS["uniform"].max()
    mask, k = partedit_mask(heatmap, 4.0)
    assert 4.0 * k > 1
    assert torch.equal(mask, torch.where(heatmap < 0.5 * k, 0.0, heatmap))


def test_an_omega_below_one_half_still_leaves_out_what_is_below_half_of_k():
    heatmap = INPUTS["uniform"]
    mask, k = partedit_mask(heatmap, 0.25)
    assert torch.equal(mask, (heatmap >= 0.5 * k).float())


def test_a_part_that_is_nowhere_gives_an_empty_mask():
    mask, k = partedit_mask(torch.zeros(6, 5), 1.5)
    assert k == 0
    assert mask.count_nonzero() == 0


@pytest.mark.parametrize("value", [0.0, 0.3, 1.0])
@pytest.mark.parametrize("mode", ["partedit", "otsu", "fixed"])
def test_a_constant_map_never_gives_a_nan(value, mode):
    mask, k = threshold(torch.full((4, 4), value), mode, 1.5, 0.5)
    assert torch.isfinite(mask).all()
    assert mask.unique().numel() == 1
    assert np.isfinite(k)


def test_the_other_modes_are_black_and_white():
    heatmap = INPUTS["bimodal"]
    mask, k = threshold(heatmap, "otsu")
    assert torch.equal(mask, (heatmap > k).float())
    mask, k = threshold(heatmap, "fixed", lower=0.4)
    assert k == 0.4
    assert torch.equal(mask, (heatmap >= 0.4).float())


def test_an_unknown_mode_is_answered_with_the_known_ones():
    with pytest.raises(ValueError, match="unknown threshold mode 'magic'; known: partedit, otsu, fixed"):
        threshold(INPUTS["uniform"], "magic")
