"""A part's heat map is the plain attention on its key in a context of 77, however it is computed."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F

from scalpel.core.heatmap import HeatmapSum, normalise, part_attention
from scalpel.tests.tiny import randn


def _dense(queries, keys, counts, heads):
    """Softmax over every place of the written-out context, [rows, tokens, pixels], summed over heads."""
    context = keys.repeat_interleave(torch.tensor(counts), 0)
    d = queries.shape[-1] // heads
    owner = torch.arange(len(counts)).repeat_interleave(torch.tensor(counts))
    maps = torch.zeros(queries.shape[0], len(counts), queries.shape[1])
    for head in range(heads):
        part = slice(head * d, (head + 1) * d)
        probabilities = (queries[..., part] @ context[:, part].T * d**-0.5).softmax(-1)
        maps += torch.stack([probabilities[..., owner == token].sum(-1) for token in range(len(counts))], 1)
    return maps


@pytest.mark.parametrize(
    ("counts", "parts"),
    [
        ((76, 1), [(1,)]),
        ((1, 1), [(1,)]),
        ((1, 76), [(0,)]),
        ((74, 1, 1, 1), [(1,), (3,)]),
        ((70, 1, 5, 1), [(3,)]),
        ((1, 1, 75), [(1,)]),
        ((1, 1, 1, 74), [(1, 2)]),
        ((1, 1, 1, 1, 73), [(3,), (1, 2)]),
    ],
)
@pytest.mark.parametrize("heads", [1, 4])
def test_part_attention_is_the_softmax_over_all_places_of_the_context_summed_over_the_parts_keys(counts, parts, heads):
    queries, keys = randn(2, 15, 32, seed=1) * 2, randn(len(counts), 32, seed=2) * 2
    dense = _dense(queries, keys, counts, heads)
    expected = torch.stack([sum(dense[:, token] for token in tokens) for tokens in parts], 1)
    ours = part_attention(queries, keys, torch.tensor(counts), parts, heads)
    assert ours.shape == (2, len(parts), 15)
    torch.testing.assert_close(ours, expected, atol=2e-6, rtol=1e-5)


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_part_attention_is_computed_in_float32_from_half_precision(dtype):
    queries, keys = randn(1, 15, 32, seed=1).to(dtype), randn(2, 32, seed=2).to(dtype)
    ours = part_attention(queries, keys, torch.tensor((76, 1)), [(1,)], 4)
    assert ours.dtype == torch.float32
    torch.testing.assert_close(ours, _dense(queries.float(), keys.float(), (76, 1), 4)[:, 1:], atol=2e-6, rtol=1e-5)


def test_very_large_logits_give_zero_or_one_per_head_and_no_nan():
    queries, keys = randn(1, 50, 32, seed=3) * 1e4, randn(2, 32, seed=4)
    ours = part_attention(queries, keys, torch.tensor((76, 1)), [(1,)], 4)
    assert torch.isfinite(ours).all()
    assert set(ours.unique().tolist()) <= {0.0, 1.0, 2.0, 3.0, 4.0}


def _sum_of(layers):
    total = HeatmapSum()
    for attention, h, w in layers:
        total.add(attention, h, w)
    return total


def test_summing_before_resizing_is_resizing_before_summing():
    layers = [
        (randn(2, 1, h * w, seed=i).exp(), h, w) for i, (h, w) in enumerate([(5, 3), (5, 3), (10, 6), (10, 6), (5, 3)])
    ]
    resized = [F.interpolate(a.unflatten(-1, (h, w)), (40, 24), mode="bilinear") for a, h, w in layers]
    ours = _sum_of(layers).mean((40, 24))
    assert ours.shape == (2, 1, 40, 24)
    torch.testing.assert_close(ours, torch.stack(resized).mean(0), atol=1e-6, rtol=1e-5)


def test_a_map_that_is_not_square_keeps_its_orientation():
    attention = torch.zeros(1, 1, 3, 7)
    attention[..., 0, 6] = 1  # the upper right corner
    ours = _sum_of([(attention.flatten(-2), 3, 7)]).mean((30, 70))[0, 0]
    assert divmod(int(ours.argmax()), 70)[0] < 10
    assert divmod(int(ours.argmax()), 70)[1] >= 60


def test_parts_are_brought_to_one_scale_in_every_layer():
    strong, weak = randn(1, 2, 12, seed=5).exp(), 0.01 * randn(1, 2, 12, seed=6).exp()
    expected = torch.zeros(1, 2, 12)
    for attention in (strong, weak):
        for part in range(2):
            low = attention[0, part].min()
            expected[0, part] += (attention[0, part] - low) / (attention.max() - low + 1e-6) / 2
    ours = _sum_of([(strong, 3, 4), (weak, 3, 4)]).mean((3, 4))
    torch.testing.assert_close(ours.flatten(-2), expected, atol=1e-5, rtol=1e-4)


def test_the_scale_of_one_picture_does_not_depend_on_the_others_in_its_batch():
    first, second = randn(1, 2, 12, seed=5).exp(), 100 * randn(1, 2, 12, seed=6).exp()
    together = _sum_of([(torch.cat([first, second]), 3, 4)]).mean((3, 4))
    assert torch.equal(together[:1], _sum_of([(first, 3, 4)]).mean((3, 4)))


def test_a_single_part_is_not_rescaled_per_layer():
    layers = [(torch.full((1, 1, 4), 3.0), 2, 2), (torch.full((1, 1, 4), 1.0), 2, 2)]
    assert torch.equal(_sum_of(layers).mean((2, 2)), torch.full((1, 1, 2, 2), 2.0))


def test_the_mean_of_nothing_is_an_error():
    assert HeatmapSum().empty
    with pytest.raises(ValueError, match="no attention map was recorded"):
        HeatmapSum().mean((8, 8))


def test_normalising_spreads_each_map_over_zero_to_one_and_makes_a_constant_zero():
    maps = torch.stack([randn(6, 5, seed=7) * 1000, torch.full((6, 5), 0.7)])
    spread, constant = normalise(maps)
    assert spread.min() == 0
    assert spread.max() == pytest.approx(1, abs=1e-6)
    assert constant.count_nonzero() == 0
