"""Compare Pictures: its PSNR is scikit-image's, and everything that is given is in the grid."""

from __future__ import annotations

import pytest
import torch
from skimage.metrics import peak_signal_noise_ratio

from scalpel.core.comparison import psnr, side_by_side
from scalpel.nodes.comparison import PictureComparison


def picture(seed, h=40, w=60):
    return torch.rand(1, h, w, 3, generator=torch.Generator().manual_seed(seed))


def test_psnr_is_scikit_image_s():
    a, b = picture(1)[0], picture(2)[0]
    assert psnr(a, b) == pytest.approx(peak_signal_noise_ratio(b.numpy(), a.numpy(), data_range=1.0), abs=1e-4)
    assert psnr(a, a) == float("inf")


def test_the_grid_holds_every_picture_between_a_label_and_a_number():
    pictures = [picture(seed)[0] for seed in range(3)]
    grid = side_by_side(pictures[0], pictures[1:], ["photo", "one", "two"])[0]
    margin = (grid.shape[0] - 40) // 2
    for i, own in enumerate(pictures):
        shown = grid[margin : margin + 40, 68 * i : 68 * i + 60]
        assert (shown - own).abs().max() < 1 / 255
        above = grid[:margin, 68 * i : 68 * i + 60]
        below = grid[margin + 40 :, 68 * i : 68 * i + 60]
        assert above.min() < 0.5
        assert (below.min() < 0.5) == (i > 0)  # the reference has no number


def test_the_node_names_each_number():
    grid, text = PictureComparison.execute(
        picture(1), picture(2), "photo, DDIM", image_b=picture(1), image_d=picture(3)
    ).args
    first, second, third = text.splitlines()
    assert first.startswith("DDIM: ")
    assert second == "image_b: inf dB"
    assert third.startswith("image_d: ")
    assert grid.shape[2] == 4 * 60 + 3 * 8


def test_pictures_of_another_size_are_refused_by_name():
    with pytest.raises(ValueError, match="image_b: it is 50 × 40 where the reference is 60 × 40"):
        PictureComparison.execute(picture(1), picture(2), "", image_b=picture(3, 40, 50))
