"""Several parts at once: tokens combine as the authors stack them, and the maps are theirs, layer by layer."""

from __future__ import annotations

import itertools

import pytest
import torch
import torch.nn.functional as F

from scalpel.core.part_token import PADDINGS, PartToken, combine, from_tensor
from scalpel.core.threshold import partedit_mask
from scalpel.core.unet.layers import address_of, layer_table
from scalpel.nodes.masks import AttentionMaskExtractor
from scalpel.nodes.token_making import PartTokenCombine
from scalpel.tests import tiny
from scalpel.tests.tiny import randn

KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}


def part(name, seed, **info):
    token = from_tensor(randn(2, tiny.WIDTH, seed=seed), name)
    token.info.update(info)
    return token


HEAD, TORSO, LEGS = part("head", 50), part("torso", 51), part("legs", 52)
WORDS = PartToken(randn(77, tiny.WIDTH, seed=53), (1, 2), (1,) * 77, ("car hood", "car hood"))
"""What PartTokenFromText makes of a word of two text tokens."""
BOTH = combine(HEAD, TORSO)
MIXED = combine(HEAD, WORDS)


def same(one, other):
    return (
        torch.equal(one.embedding, other.embedding)
        and one.parts == other.parts
        and (one.counts, one.groups, one.info) == (other.counts, other.groups, other.info)
    )


# ---------------------------------------------------------------- the token


def test_two_tokens_are_stacked_as_the_authors_do_and_every_row_keeps_its_count():
    assert torch.equal(BOTH.embedding, torch.cat([HEAD.embedding, TORSO.embedding]))
    assert BOTH.counts == (76, 1, 76, 1)
    assert BOTH.softmaxes == [([0, 1], [[1]]), ([2, 3], [[1]])]
    assert BOTH.parts == {"head": (1,), "torso": (3,)}


def test_the_node_combines():
    assert same(PartTokenCombine.execute(HEAD, TORSO).args[0], BOTH)


@pytest.mark.parametrize("tokens", list(itertools.permutations([HEAD, TORSO, LEGS, WORDS], 3)))
def test_how_a_chain_is_grouped_does_not_matter(tokens):
    a, b, c = tokens
    left, right = combine(combine(a, b), c), combine(a, combine(b, c))
    assert same(left, right)
    if not any(token is WORDS for token in tokens):
        assert left.counts == (76, 1) * 3


def test_forty_parts_keep_all_rows_and_counts():
    token = HEAD
    for seed in range(39):
        token = combine(token, part("part", seed))
    assert token.counts == (76, 1) * 40
    assert len(token.parts) == 40
    assert token.padded("zero", randn(77, tiny.WIDTH, seed=1)).counts == (*(1,) * 80, *(75,) * 40)


def test_words_keep_their_whole_context_beside_a_learned_part():
    assert MIXED.counts == (76, *(1,) * 78)
    assert MIXED.parts == {"head": (1,), "car hood": (3, 4)}
    assert combine(WORDS, HEAD).counts == (*(1,) * 77, 76, 1)
    assert combine(WORDS, HEAD).parts == {"car hood": (1, 2), "head": (78,)}


def test_a_part_whose_row_comes_first_stays_a_part():
    turned = PartToken(HEAD.embedding.flip(0), (0,), (1, 76), ("head",))
    assert combine(turned, TORSO).counts == (1, 76, 76, 1)
    assert combine(turned, TORSO).parts == {"head": (0,), "torso": (3,)}


def test_parts_of_one_name_stay_apart():
    twice = combine(HEAD, part("head", 60))
    assert twice.parts == {"head": (1,), "head 2": (3,)}
    assert list(combine(twice, twice).parts) == ["head", "head 2", "head 3", "head 4"]
    assert list(combine(HEAD, twice).parts) == ["head", "head 2", "head 3"]
    assert combine(WORDS, WORDS).parts == {"car hood": (1, 2), "car hood 2": (78, 79)}
    assert list(combine(part("head 2", 1), part("head 2", 2)).parts) == ["head 2", "head 3"]


def test_of_what_the_files_say_the_combination_says_what_both_say():
    first = part("a", 1, model_family="SDXL", loss="0.1", images="10")
    second = part("b", 2, model_family="SDXL", loss="0.2")
    assert combine(first, second).info == {"model_family": "SDXL"}
    assert first.info["loss"] == "0.1"


def test_tokens_of_two_model_families_are_refused_with_both_widths():
    sdxl, sd15 = from_tensor(torch.zeros(2, 2048), "a"), from_tensor(torch.zeros(2, 768), "b")
    words = (
        r"part_token_b: it is 768 wide \(SD1.x\), but part_token_a is 2048 wide \(SDXL\); combine tokens of one model "
        "family"
    )
    with pytest.raises(ValueError, match=words):
        PartTokenCombine.execute(sdxl, sd15)


# ---------------------------------------------------------------- its maps, against the authors' way to compute them


def written_out(token):
    """Of each softmax: the context, every row as often as it counts, and the places of each part."""
    contexts, groups = [], token.groups or (0,) * len(token.counts)
    for group in dict.fromkeys(groups):
        own = torch.tensor([row for row, g in enumerate(groups) if g == group])
        owner = own.repeat_interleave(torch.tensor(token.counts)[own])
        places = [
            [int(place) for row in rows for place in (owner == row).nonzero()]
            for rows in token.parts.values()
            if groups[rows[0]] == group
        ]
        contexts.append((token.embedding[owner], places))
    return contexts


def dense_maps(model, layers, seen, token, size):
    """[parts, H, W]: the joint maps of one evaluation, in the authors' order: every layer at full size, then the mean.

    seen: {layer: (hidden states [h·w, channels], h, w)} of one source row.
    """
    table, total = layer_table(model), 0
    for address in layers:
        hidden, h, w = seen[address]
        layer = table[address]
        q, maps = layer.block.attn2.to_q(hidden), []
        d = q.shape[-1] // layer.heads
        for context, places in written_out(token):
            k = layer.block.attn2.to_k(context)
            probabilities = sum(
                (qi @ ki.T * d**-0.5).softmax(-1) for qi, ki in zip(q.split(d, -1), k.split(d, -1), strict=True)
            )
            maps += [probabilities[:, at].sum(-1) for at in places]
        if len(maps) > 1:
            highest = max(part.max() for part in maps)
            maps = [(part - part.min()) / (highest - part.min() + 1e-6) for part in maps]
        maps = torch.stack(maps).unflatten(-1, (h, w))
        total = total + F.interpolate(maps[None], size, mode="bilinear", align_corners=False)[0]
    return total / len(layers)


def spread(heatmap):
    return (heatmap - heatmap.min()) / (heatmap.max() - heatmap.min() + 1e-6)


class Spy:
    """Keeps what every cross-attention gets of the positive prompt's rows: sigma → layer → (hidden states, h, w)."""

    def __init__(self):
        self.sigmas = {}

    def attach(self, model):
        def look(n, context, value, options):  # a function: ComfyUI copies patches, and would copy an object whole
            of_prompt = n.chunk(len(options["cond_or_uncond"]))[options["cond_or_uncond"].index(0)]
            seen = self.sigmas.setdefault(float(options["sigmas"][0]), {})
            seen[address_of(options)] = (of_prompt.clone(), *options["activations_shape"][-2:])
            return n, context, value

        spied = model.clone()
        spied.set_model_attn2_patch(look)
        return spied

    def row(self, sigma, row):
        return {address: (hidden[row], h, w) for address, (hidden, h, w) in self.sigmas[sigma].items()}


@pytest.mark.parametrize(
    ("name", "steps", "token"),
    [
        ("SD1.5", 2, BOTH),
        ("SD1.5", 2, combine(BOTH, LEGS)),
        ("SD1.5", 2, WORDS),
        ("SD1.5", 2, MIXED),
        ("SDXL", 1, BOTH),
        ("SDXL", 1, WORDS),
    ],
)
@torch.inference_mode()
def test_the_mask_of_every_step_is_the_authors_joint_map_thresholded(name, steps, token):
    kind = KINDS[name]
    model, spy = tiny.model(kind), Spy()
    done = tiny.edit(spy.attach(model), kind, part_token=token, latent_image=tiny.latent(16, 8, batch=2), steps=steps)
    layers = layer_table(model).select("official")
    size = done.step_masks.shape[-2:]
    assert done.step_masks.shape[0] == 2 * steps  # source by source
    assert len(spy.sigmas) == steps
    for step, sigma in enumerate(sorted(spy.sigmas, reverse=True)):
        for source in range(2):
            maps = dense_maps(model, layers, spy.row(sigma, 2 + source), token, size)
            expected, _ = partedit_mask(spread(maps.sum(0)), 1.0)
            ours = done.step_masks[steps * source + step]
            assert 0.01 < expected.mean() < 0.99
            assert (ours - expected).abs().mean() < 1e-3  # a pixel at the threshold may flip


@pytest.mark.parametrize("token", [BOTH, WORDS, MIXED], ids=["two", "words", "mixed"])
@pytest.mark.parametrize("name", KINDS)
@torch.inference_mode()
def test_the_finder_gives_one_map_per_picture_and_part_picture_by_picture(name, token):
    kind = KINDS[name]
    model, spy = tiny.model(kind), Spy()
    image = {"samples": randn(3, 4, 8, 16, seed=4)}
    maps = AttentionMaskExtractor.execute(spy.attach(model), token, image, "official", 0.25, 1, 3).args[0]
    parts = len(token.parts)
    assert maps.shape == (3 * parts, 64, 128)
    (sigma,) = spy.sigmas
    layers = layer_table(model).select("official")
    for picture in range(3):
        expected = dense_maps(model, layers, spy.row(sigma, picture), token, (64, 128))
        for i in range(parts):
            torch.testing.assert_close(maps[picture * parts + i], spread(expected[i]), atol=1e-4, rtol=0)


# ---------------------------------------------------------------- in a run


@pytest.fixture(scope="module")
def model():
    return tiny.model(tiny.SD15)


@pytest.mark.parametrize("padding", PADDINGS)
@torch.inference_mode()
def test_every_padding_of_several_parts_gives_a_mask_and_leaves_words_as_they_are(padding, model):
    done = tiny.edit(model, tiny.SD15, part_token=BOTH, latent_image=tiny.latent(16, 8), steps=2, padding=padding)
    assert torch.isfinite(done.edited).all()
    assert done.mask.max() > 0
    assert same(WORDS.padded(padding, randn(77, tiny.WIDTH, seed=1)), WORDS)


@torch.inference_mode()
def test_prompts_for_two_areas_give_one_mask_of_all_parts(model):
    left = tiny.with_options(tiny.prompt(tiny.SD15, 1), area=(24, 8, 0, 0))
    right = tiny.with_options(tiny.prompt(tiny.SD15, 4), area=(24, 8, 0, 8))
    done = tiny.edit(model, tiny.SD15, source=[*left, *right], part_token=BOTH)
    assert torch.isfinite(done.edited).all()
    assert done.step_masks.shape == (3, 192, 128)
    assert done.step_masks[..., :64].max() > 0
    assert done.step_masks[..., 64:].max() > 0


@torch.inference_mode()
def test_a_combined_token_limits_or_is_replaced_by_a_mask_as_a_single_one(model):
    mask = torch.zeros(1, 192, 128)
    mask[:, :96] = 1
    limited = tiny.edit(model, tiny.SD15, part_token=BOTH, mask=mask, mask_mode="multiply")
    assert limited.step_masks[:, 104:].max() == 0
    assert limited.step_masks[:, :88].max() > 0
