"""CPAM on small models: against attention over all keys written out here, what it costs, what it logs, bad input."""

from __future__ import annotations

import functools
import math
from types import SimpleNamespace

import comfy.sample
import comfy.samplers
import comfy.sd1_clip
import pytest
import torch
import torch.nn.functional as F

from scalpel.core.cpam import FollowingMask, Share, divided, keys_at, softened
from scalpel.core.unet import cpam
from scalpel.core.unet.attention import attention
from scalpel.core.unet.layers import layer_table
from scalpel.core.unet.replay import start_latent
from scalpel.nodes.cpam import CPAMCrossAttnPatch, CPAMSelfAttnPatch, RegionPrompts
from scalpel.nodes.feature_blend import EditBatch
from scalpel.nodes.inversion import DDIMInversion
from scalpel.nodes.run_log import RunLogShow
from scalpel.tests import tiny

KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
KIND = tiny.SD15
pytestmark = pytest.mark.usefixtures("inference")
H, W = 24, 16
"""Of the latents: every test is of a picture that is no square."""
TASKS = ("replace object", "keep object", "change background", "remove object")


# ---------------------------------------------------------------- what a graph holds


def inverted(patcher, kind=KIND, batch=1, steps=3, scheduler="normal", seed=90):
    """Pictures of noise, inverted."""
    image = {"samples": 0.8 * tiny.randn(batch, 4, H, W, seed=seed) / 0.18215}
    return DDIMInversion.execute(patcher, tiny.prompt(kind, 1), image, steps, scheduler, 0).args[0]


@pytest.fixture(scope="module")
def trajectory(model):
    with torch.inference_mode():
        return inverted(model)


@pytest.fixture(scope="module")
def ordinary(model, trajectory):
    """The run without any patch."""
    with torch.inference_mode():
        return sampled(model, trajectory)


@pytest.fixture(scope="module")
def replaced(model, trajectory):
    """The run with CPAM Self-Attention as it is by default."""
    with torch.inference_mode():
        return sampled(own(model, trajectory)[0], trajectory)


def rectangle(top=64, bottom=160, left=32, right=96):
    """A mask of 128 × 192 pixels."""
    mask = torch.zeros(1, 8 * H, 8 * W)
    mask[:, top:bottom, left:right] = 1
    return mask


MASK = rectangle()


def own(patcher, trajectory, **changes):
    """The MODEL with CPAM Self-Attention, and its log."""
    settings = {
        "source_mask": MASK, "task": "replace object", "start_step": -1, "start_layer": -1, "dilation": 0.1,
        "softness": 0.0, "background_keys": "source", "plain_fraction": 0.0, "seed": 0, **changes,
    }  # fmt: skip
    return CPAMSelfAttnPatch.execute(patcher, trajectory, **settings).args


def cross(patcher, kind=KIND, **changes):
    """The MODEL with CPAM Cross-Attention, without refinement unless asked, and its log."""
    settings = {
        "null": tiny.prompt(kind, 9), "target_mask": MASK, "refine": False, "refine_from_step": 1,
        "refine_threshold": 0.45, **changes,
    }  # fmt: skip
    return CPAMCrossAttnPatch.execute(patcher, **settings).args


def region(patcher, mask=MASK, kind=KIND, seed=5):
    return RegionPrompts.execute(patcher, mask, tiny.prompt(kind, seed)).args[0]


def sampled(patcher, trajectory, kind=KIND, edits=1, sampler="euler", **changes):
    """An ordinary run from the trajectory's noisiest latent."""
    start = start_latent(trajectory)["samples"].repeat(edits, 1, 1, 1)
    settings = {
        "cfg": 4.0, "sampler": sampler, "sigmas": trajectory.sigmas,
        "positive": tiny.prompt(kind, 2), "negative": tiny.prompt(kind, 3), "latent_image": start, **changes,
    }  # fmt: skip
    noise = torch.zeros_like(settings["latent_image"])
    if isinstance(settings["sampler"], str):
        settings["sampler"] = comfy.samplers.sampler_object(settings["sampler"])
    return comfy.sample.sample_custom(patcher, noise, seed=7, disable_pbar=True, **settings)


def batch(*seeds):
    return functools.reduce(lambda a, b: EditBatch.execute(a, b).args[0], (tiny.prompt(KIND, s) for s in seeds))


# ---------------------------------------------------------------- the same, written out


def dense(q, k, v, heads, allowed):
    """Attention [rows, n, C] over the keys that are allowed [m]: all scores, −inf for the others."""
    if not allowed.any():
        return v.mean(1, keepdim=True).expand_as(q)
    q, k, v = (t.unflatten(-1, (heads, -1)).transpose(1, 2) for t in (q, k, v))
    scores = (q @ k.transpose(-1, -2) / math.sqrt(q.shape[-1])).masked_fill(~allowed, float("-inf"))
    return (scores.softmax(-1) @ v).transpose(1, 2).flatten(2)


def at_layer(mask, options):
    """One mask [H, W] at the layer that is being computed; an entry of the right half has a narrower layer."""
    h, w = options["activations_shape"][-2:]
    full = round((mask.shape[-2] * w / mask.shape[-1]) / h)  # 1: the whole picture, 0: the right half
    mask = mask if full == 1 else mask[:, mask.shape[1] // 2 :]
    return F.interpolate(mask[None, None], (h, w), mode="nearest").flatten()


def cells(mask, options):
    """One mask [H, W] of the whole picture at a layer: the largest value in each of its cells."""
    h, w = options["activations_shape"][-2:]
    return mask.reshape(h, mask.shape[0] // h, w, mask.shape[1] // w).amax((1, 3)).flatten()


class ByHand:
    """CPAM as two ordinary runs: one of the source alone, whose keys and values are kept by noise level and layer, and
    one of the edit, whose layers attend to them.

    source: [images, H, W], where the source's keys are not background; target: the same, 0…1. at_source: what `source`
    is at a layer.
    """

    at_source = staticmethod(at_layer)

    def __init__(self, patcher, trajectory, source, target, task="replace object", keep=None, null=None, crossed=None):
        self.trajectory, self.source, self.target = trajectory, source, target
        self.task, self.keep, self.null, self.crossed = task, keep, null, crossed
        self.table = layer_table(patcher)
        self.kept = {}
        self.sigmas = trajectory.sigmas.tolist()
        self._keep_source(patcher)
        self.model = self._with(patcher, attn1=self._attend, **({"attn2": self._cross} if crossed is not None else {}))

    def _with(self, patcher, **functions):
        clone = patcher.clone()
        for name, function in functions.items():
            for place, (block, number, index) in enumerate(self.table.layers):
                bound = functools.partial(function, place)
                setter = clone.set_model_attn1_replace if name == "attn1" else clone.set_model_attn2_replace
                setter(bound, block, number, index)
        return clone

    def _keep_source(self, patcher):
        def keep(place, q, k, v, options):
            self.kept[place, float(options["sigmas"][0])] = k.clone(), v.clone()
            return attention(q, k, v, options)

        def visit(model, x, sigmas, extra_args=None, callback=None, disable=None):
            for i, sigma in enumerate(sigmas[:-1]):
                model(self.trajectory.latents[i].to(x), sigma * x.new_ones(len(x)), **extra_args)
            return x

        prompt = self.trajectory.positive
        sampled(
            self._with(patcher, attn1=keep), self.trajectory, cfg=1.0, positive=prompt, negative=prompt,
            sampler=comfy.samplers.KSAMPLER(visit),
        )  # fmt: skip

    def _attend(self, place, q, k, v, options):
        heads, sigma = options["n_heads"], float(options["sigmas"][0])
        images, step = self.trajectory.images, self.sigmas.index(sigma)
        ks, vs = self.kept[place, sigma]
        out = torch.empty_like(q)
        chunk = len(q) // len(options["cond_or_uncond"])
        whole = dict(options, activations_shape=[*self._whole(ks)])
        for row in range(len(q)):
            image = row % chunk % images
            masks = [m[image % len(m)] for m in (self.source, self.target)]
            background = self.at_source(masks[0], whole) == 0
            share = at_layer(masks[1], options)[:, None]
            one, key, value = (slice(row, row + 1), ks[image : image + 1], vs[image : image + 1])
            outside = dense(q[one], key, value, heads, background)
            everything = torch.ones(k.shape[1], dtype=torch.bool)
            inside = dense(q[one], k[one], v[one], heads, everything)
            if self.keep is not None and step >= self.keep[0] and place >= self.keep[1]:
                inside = dense(q[one], key, value, heads, at_layer(masks[1], whole) > 0.5)
            out[one] = outside if self.task == "remove object" else share * inside + (1 - share) * outside
        return out

    @staticmethod
    def _whole(keys):
        """(h, w) of the whole picture at the layer of these keys."""
        scale = round((H * W / keys.shape[1]) ** 0.5)
        return H // scale, W // scale

    def _cross(self, place, q, k, v, options):
        block = list(self.table.layers.values())[place].block.attn2
        out = attention(q, k, v, options)
        null = self.null[0][0].to(q)
        everything = torch.ones(null.shape[1], dtype=torch.bool)
        size = len(q) // len(options["cond_or_uncond"])
        for chunk, which in enumerate(options["cond_or_uncond"]):
            for row in range(chunk * size, chunk * size + size) if which == 0 else ():
                mask = self.crossed[row % size % len(self.crossed)]
                share = at_layer(mask, options)[:, None]
                local = dense(q[row : row + 1], block.to_k(null), block.to_v(null), options["n_heads"], everything)
                out[row] = share * out[row] + (1 - share) * local[0]
        return out


def by_hand(patcher, trajectory, source, target, task="replace object", keep=None, null=None, crossed=None, **settings):
    hand = ByHand(patcher, trajectory, source, target, task, keep, null, crossed)
    return sampled(hand.model, trajectory, **settings)


def clear_by_hand(*args, **settings):
    """The same, with no background in a cell that has any pixel of something else."""
    clear = type("Clear", (ByHand,), {"at_source": staticmethod(cells)})
    hand = clear(*args)
    return sampled(hand.model, args[1], **settings)


# ---------------------------------------------------------------- arithmetic


def shares(weight):
    return Share.of(weight), Share.of(1 - weight)


@pytest.mark.parametrize("what", ["binary", "soft", "all", "nothing"])
def test_attention_that_a_mask_divides_is_dense_masked_attention(what):
    generator = torch.Generator().manual_seed(1)
    weight = torch.rand(30, generator=generator)
    weight = {"binary": weight.round(), "soft": weight, "all": torch.ones(30), "nothing": torch.zeros(30)}[what]
    background = torch.rand(30, generator=generator) > 0.4
    q, k, v, ks, vs = (tiny.randn(2, 30, 8, seed=seed) for seed in range(5))
    options = {"n_heads": 2}
    inside, outside = shares(weight)
    keys = keys_at(ks, vs, background.nonzero()[:, 0])
    made = divided(
        q,
        (inside, lambda queries, _: attention(queries, k, v, options)),
        (outside, lambda queries, _: attention(queries, *keys, options)),
    )
    everything = torch.ones(30, dtype=torch.bool)
    expected = torch.lerp(dense(q, ks, vs, 2, background), dense(q, k, v, 2, everything), weight[:, None])
    assert tiny.relative(made, expected) < 1e-6


def test_each_part_sees_only_the_queries_that_it_counts_for():
    weight, asked = torch.tensor([0.0, 0.3, 0.7, 1.0]), {}

    def asking(name):
        def attend(queries, places):
            asked[name] = places.tolist()
            return torch.full_like(queries, {"inside": 1.0, "outside": 10.0}[name])

        return attend

    inside, outside = shares(weight)
    made = divided(torch.zeros(1, 4, 2), (inside, asking("inside")), (outside, asking("outside")))
    assert asked == {"inside": [1, 2, 3], "outside": [0, 1, 2]}
    torch.testing.assert_close(made[0, :, 0], torch.tensor([10.0, 7.3, 3.7, 1.0]))


@pytest.mark.parametrize("softness", [0.05, 0.5, 1.0])
def test_a_softened_mask_is_never_empty(softness):
    soft = softened(torch.nn.functional.pad(torch.ones(1, 40, 40), (20, 60, 30, 10)), softness)
    assert soft.max() == pytest.approx(1.0, abs=1e-5)
    assert (soft > 0.5).any()
    assert ((soft > 0.01) & (soft < 0.99)).any()


def test_no_keys_at_all_give_the_mean_of_all_values():
    q, k, v = (tiny.randn(2, 6, 8, seed=seed) for seed in range(3))
    made = attention(q, *keys_at(k, v, torch.tensor([], dtype=torch.long)), {"n_heads": 2})
    torch.testing.assert_close(made, v.mean(1, keepdim=True).expand_as(q))


def test_a_following_mask_sums_maps_that_are_each_scaled_by_their_largest_attention():
    following = FollowingMask(0.5)
    assert following.mask() is None
    coarse, fine = tiny.randn(1, 2, 2, seed=1).abs(), tiny.randn(1, 4, 4, seed=2).abs()
    following.add(coarse, torch.tensor([2.0]), (4, 4))
    following.next_level(again=False)
    following.add(fine, torch.tensor([5.0]), (4, 4))
    total = coarse.repeat_interleave(2, 1).repeat_interleave(2, 2) / 2 + fine / 5
    expected = (total - total.min()) / (total.max() - total.min())
    torch.testing.assert_close(following.raw(), expected)
    assert torch.equal(following.mask(), (expected >= 0.5).float())
    following.next_level(again=True)  # the same noise level once more: its maps take the place of what there was
    following.add(fine, torch.tensor([5.0]), (4, 4))
    torch.testing.assert_close(following.raw(), expected)


def test_a_constant_following_mask_is_empty_and_no_nan():
    following = FollowingMask(0.5)
    following.add(torch.full((1, 2, 2), 0.3), torch.tensor([0.3]), (4, 4))
    assert torch.equal(following.mask(), torch.zeros(1, 4, 4))


# ---------------------------------------------------------------- self-attention


RAMP = torch.linspace(0, 1, 8 * W).expand(8 * H, -1)
CASES = {
    "replace object": {},
    "replace object, soft edge": {"softness": 0.2},
    "replace object, background outside the target": {"background_keys": "target", "dilation": 0.5},
    "replace object, soft target mask": {"softness": 0.05, "target_mask": RAMP},
    "keep object": {"task": "keep object", "start_step": 1, "start_layer": 5},
    "keep object from the beginning": {"task": "keep object", "start_step": 0, "start_layer": 0},
    "change background": {"task": "change background"},
    "remove object": {"task": "remove object"},
}  # fmt: skip


def spec(patched):
    return cpam.spec_of(patched).self_attention


@pytest.fixture(scope="module")
def made_so_far():
    """The pictures of the cases."""
    return {}


@pytest.mark.parametrize("name", CASES)
def test_a_run_is_the_one_with_dense_masked_attention(name, model, trajectory, ordinary, made_so_far):
    patched, _ = own(model, trajectory, **CASES[name])
    ours, task = spec(patched), CASES[name].get("task", "replace object")
    source = 1 - MASK if task == "change background" else MASK
    run = by_hand
    if "background_keys" in CASES[name] or task == "remove object":
        source, run = torch.maximum(source, ours.target_mask.gt(0.5).float()), clear_by_hand
        assert source.sum() > MASK.sum()
    expected = run(model, trajectory, source, ours.target_mask, task, ours.keep_from)
    made = sampled(patched, trajectory)
    assert tiny.relative(made, expected) < 2e-5
    assert tiny.relative(made, ordinary) > 1e-2
    assert all(tiny.relative(made, other) > 1e-3 for other in made_so_far.values())
    made_so_far[name] = made


def test_sdxl_is_the_run_with_dense_masked_attention():
    kind, patcher = tiny.SDXL, tiny.model(tiny.SDXL)
    record, counted = inverted(patcher, kind, steps=2), tiny.CountedCalls()
    assert spec(own(patcher, record, task="keep object")[0]).keep_from == (3, 54)
    patched, _ = own(counted.attach(patcher), record, task="keep object", start_step=0, start_layer=20)
    made = sampled(patched, record, kind)
    assert counted.rows == [3, 3]
    expected = by_hand(patcher, record, MASK, spec(patched).target_mask, keep=(0, 20), kind=kind)
    assert tiny.relative(made, expected) < 2e-5
    never = by_hand(patcher, record, MASK, spec(patched).target_mask, kind=kind)
    assert tiny.relative(made, never) > 1e-4


def test_two_pictures_have_a_mask_each(model):
    record = inverted(model, batch=2, steps=2)
    both = torch.cat([MASK, rectangle(0, 64, 0, 64)])
    patched, log = own(model, record, source_mask=both)
    made = sampled(patched, record)
    ours = spec(patched)
    assert tiny.relative(made, by_hand(model, record, ours.source_mask, ours.target_mask)) < 2e-5
    same = sampled(own(model, record, source_mask=MASK)[0], record)
    assert tiny.relative(made[0], same[0]) < 1e-5
    assert tiny.relative(made[1], same[1]) > 1e-2
    assert log.masks.shape == (2, 2, H, W)


def test_two_edits_of_each_of_two_pictures_have_their_picture_s_mask(model):
    record = inverted(model, batch=2, steps=2)
    both = torch.cat([MASK, rectangle(0, 64, 0, 64)])
    patched, _ = own(model, record, source_mask=both)
    made = sampled(patched, record, edits=2, positive=batch(2, 2, 4, 4))
    ours = spec(patched)
    expected = by_hand(model, record, ours.source_mask, ours.target_mask, edits=2, positive=batch(2, 2, 4, 4))
    assert tiny.relative(made, expected) < 2e-5
    assert tiny.relative(made[:2], sampled(patched, record)) < 1e-5


def test_a_mask_of_any_resolution_is_the_same_mask(model, trajectory):
    large = MASK.repeat_interleave(2, 1).repeat_interleave(2, 2)
    small = MASK[:, ::8, ::8]
    runs = [sampled(own(model, trajectory, source_mask=m, dilation=0.0)[0], trajectory) for m in (MASK, large, small)]
    assert torch.equal(runs[0], runs[1])
    assert torch.equal(runs[0], runs[2])


def test_what_keeps_the_object_is_the_same_as_replacing_it_before_its_step_and_layer(model, trajectory, replaced):
    layers = len(layer_table(model))
    for late in ({"start_step": 3, "start_layer": 0}, {"start_step": 0, "start_layer": layers}, {}):
        kept = sampled(own(model, trajectory, task="keep object", **late)[0], trajectory)
        assert torch.equal(kept, replaced)  # by default from step 3 on, of which this run has none
    for early in ({"start_step": 2, "start_layer": layers - 1}, {"start_step": 0}):
        kept = sampled(own(model, trajectory, task="keep object", **early)[0], trajectory)
        assert tiny.relative(kept, replaced) > 1e-5


def test_keeping_begins_at_the_authors_layer(model, trajectory):
    settings = {"task": "keep object", "start_step": 0}
    default = sampled(own(model, trajectory, **settings)[0], trajectory)
    assert torch.equal(default, sampled(own(model, trajectory, start_layer=7, **settings)[0], trajectory))
    assert not torch.equal(default, sampled(own(model, trajectory, start_layer=8, **settings)[0], trajectory))


def test_keeping_begins_within_the_layers_of_a_smaller_sdxl():
    """As SSD-1B and Vega are: fewer layers than 54."""
    config = {**tiny.SDXL.unet, "transformer_depth": [0, 0, 1, 1, 2, 2], "transformer_depth_middle": 2}
    config["transformer_depth_output"] = [0, 0, 0, 1, 1, 1, 2, 2, 2]
    kind = tiny.Kind(tiny.SDXL.base, config, tiny.SDXL.heads, pooled=True)
    patcher = tiny.model(kind)
    layers = len(layer_table(patcher))
    assert layers < 54
    patched, _ = own(patcher, inverted(patcher, kind, steps=2), task="keep object")
    assert spec(patched).keep_from[1] < layers


def test_all_layers_plain_is_the_run_without_the_patch(model, trajectory, ordinary):
    assert tiny.relative(sampled(own(model, trajectory, plain_fraction=1.0)[0], trajectory), ordinary) < 1e-5


def test_plain_layers_are_drawn_by_the_seed(model, trajectory, replaced):
    def made(fraction, seed):
        return sampled(own(model, trajectory, plain_fraction=fraction, seed=seed)[0], trajectory)

    half = made(0.5, 1)
    assert torch.equal(made(0.5, 1), half)
    assert tiny.relative(made(0.5, 2), half) > 1e-3
    assert torch.equal(made(0.0, 1), replaced)
    assert tiny.relative(half, replaced) > 1e-3


def test_plain_layers_are_drawn_anew_each_step_about_as_many_as_asked(model, trajectory):
    run = SimpleNamespace(latent=(H, W), evaluation=SimpleNamespace(steps=100), table=layer_table(model))
    plain = cpam._SelfAttention(run, spec(own(model, trajectory, plain_fraction=0.1)[0])).plain
    assert plain.shape == (100, 16)
    assert 0.05 < plain.float().mean() < 0.15
    assert len({tuple(step) for step in plain.tolist()}) > 20


def test_the_source_is_read_at_the_levels_of_another_schedule(model):
    fine = inverted(model, steps=6, scheduler="karras")
    coarse = torch.cat([fine.sigmas[:1], tiny.sigmas(model, 3)[1:]])
    made = sampled(own(model, fine)[0], fine, sigmas=coarse)
    assert torch.isfinite(made).all()
    assert tiny.relative(made, sampled(model, fine, sigmas=coarse)) > 1e-2


# ---------------------------------------------------------------- cross-attention


def halves():
    left = rectangle(0, 8 * H, 0, 4 * W)
    return left, 1 - left


def test_outside_the_mask_the_null_prompt_speaks(model, trajectory, ordinary):
    patched, _ = cross(model)
    made = sampled(patched, trajectory)
    nothing = torch.ones(1, 8, 8)  # self-attention as usual everywhere
    hand = ByHand(model, trajectory, 1 - nothing, nothing, null=tiny.prompt(KIND, 9), crossed=MASK)
    assert tiny.relative(made, sampled(hand.model, trajectory)) < 2e-5
    assert tiny.relative(made, ordinary) > 1e-2


def test_both_patches_together_and_a_soft_mask(model, trajectory):
    soft = F.avg_pool2d(MASK[None], 33, 1, 16)[0]
    patched, _ = cross(own(model, trajectory)[0], target_mask=soft)
    expected = by_hand(
        model, trajectory, spec(patched).source_mask, spec(patched).target_mask, null=tiny.prompt(KIND, 9), crossed=soft
    )
    assert tiny.relative(sampled(patched, trajectory), expected) < 2e-5
    other_order, _ = own(cross(model, target_mask=soft)[0], trajectory)
    assert torch.equal(sampled(other_order, trajectory), sampled(patched, trajectory))


def test_a_mask_of_the_whole_picture_and_the_prompt_itself_change_nothing(model, trajectory, ordinary):
    assert torch.equal(sampled(cross(model, target_mask=torch.ones(1, 24, 16))[0], trajectory), ordinary)
    same = sampled(cross(model, null=tiny.prompt(KIND, 2))[0], trajectory)
    assert tiny.relative(same, ordinary) < 1e-5


def test_cross_attention_alone_costs_no_row(model, trajectory):
    counted = tiny.CountedCalls()
    sampled(region(cross(counted.attach(model), refine=True)[0]), trajectory)
    assert counted.rows == [2, 2, 2]


def attended(model, trajectory, words, threshold=0.45):
    """The mask that each step ends with, by an ordinary run whose maps of cond are summed here, layer by layer.

    Of a run whose target mask is the whole picture, up to the end of its first step.
    """
    last = list(layer_table(model).layers)[-1]
    table, total = layer_table(model), torch.zeros(H, W)
    patched = model.clone()

    def replace(address, q, k, v, options):
        if address == last and float(options["sigmas"][0]) == float(trajectory.sigmas[0]):
            place, heads = options["cond_or_uncond"].index(0), table[address].heads
            queries, keys = (t[place].unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k))
            probabilities = (queries @ keys.transpose(-1, -2) / math.sqrt(queries.shape[-1])).softmax(-1)[..., words]
            found = probabilities.mean((0, 2)).unflatten(0, tuple(options["activations_shape"][-2:]))
            total.add_(F.interpolate(found[None, None] / probabilities.max(), (H, W), mode="nearest")[0, 0])
        return attention(q, k, v, options)

    for address in table.layers:
        patched.set_model_attn2_replace(functools.partial(replace, address), *address)
    sampled(patched, trajectory, sigmas=trajectory.sigmas[:2])
    scaled = (total - total.min()) / (total.max() - total.min())
    return (scaled >= threshold).float()


def text_encoder():
    tokenizer = comfy.sd1_clip.SD1Tokenizer()
    return SimpleNamespace(tokenizer=tokenizer, tokenize=tokenizer.tokenize_with_weights)


def test_the_refined_mask_is_where_the_words_are_attended_to(model, trajectory):
    everywhere = torch.ones(1, 8 * H, 8 * W)
    found = {}
    for name, more, words in (
        ("all", {}, list(range(1, 77))),
        ("text", {"clip": text_encoder(), "text": "a red fox"}, [1, 2, 3]),
        ("words in brackets", {"clip": text_encoder(), "text": "a (red:1.3) fox"}, [1, 2, 3]),
    ):
        patched, log = cross(model, target_mask=everywhere, refine=True, **more)
        sampled(patched, trajectory)
        found[name] = log.masks[0, 0]
        expected = attended(model, trajectory, words)
        assert (found[name] != expected).sum() <= 1
        assert 0 < expected.mean() < 1
    assert not torch.equal(found["all"], found["text"])
    assert torch.equal(found["words in brackets"], found["text"])


def test_the_refined_mask_serves_self_attention_too(model, trajectory, replaced):
    """From the last layer of the first step on: the first step's picture knows it only there."""
    patched, own_log = own(model, trajectory)
    refined, cross_log = cross(patched, refine=True)
    fixed, _ = cross(patched)
    made = sampled(refined, trajectory)
    assert torch.equal(own_log.masks, cross_log.masks)
    assert len({mask.numpy().tobytes() for mask in own_log.masks[0]}) == 3
    assert tiny.relative(made, sampled(fixed, trajectory)) > 1e-3
    # with a null prompt that is the prompt, only self-attention's mask can tell
    same = {"null": tiny.prompt(KIND, 2)}
    assert tiny.relative(sampled(cross(patched, refine=True, **same)[0], trajectory), replaced) > 1e-3
    assert tiny.relative(sampled(cross(patched, **same)[0], trajectory), replaced) < 1e-5


def test_a_high_threshold_makes_a_smaller_mask_and_a_later_step_leaves_the_given_one(model, trajectory):
    def masks(**changes):
        patched, log = cross(own(model, trajectory)[0], refine=True, **changes)
        sampled(patched, trajectory)
        return log.masks[0]

    small, large = masks(refine_threshold=0.95), masks()
    assert (small[0] <= large[0]).all()
    assert small[0].sum() < large[0].sum()
    given = F.interpolate(MASK[None], (H, W), mode="nearest")[0, 0]
    late = masks(refine_from_step=2)
    assert torch.equal(late[0], given)
    assert not torch.equal(late[1], given)
    assert torch.equal(masks(refine_from_step=100), given.expand(3, -1, -1))
    assert not torch.equal(masks(refine_from_step=0)[0], large[0])  # all layers of the first step, not the last alone


def test_each_edit_has_a_refined_mask_of_its_own(model, trajectory):
    patched, log = cross(own(model, trajectory)[0], refine=True)
    made = sampled(patched, trajectory, edits=2, positive=batch(2, 4))
    assert log.masks.shape == (2, 3, H, W)
    both = log.masks.clone()
    assert not torch.equal(both[0], both[1])
    for place, seed in enumerate((2, 4)):
        alone = sampled(patched, trajectory, positive=tiny.prompt(KIND, seed))
        assert torch.equal(log.masks[0], both[place])
        assert tiny.relative(made[place : place + 1], alone) < 1e-4


def test_two_edits_of_each_of_two_pictures_have_refined_masks(model):
    record = inverted(model, batch=2, steps=2)
    both = torch.cat([MASK, rectangle(0, 64, 0, 64)])
    for late in (1, 2):
        patched, log = cross(
            own(model, record, source_mask=both)[0], target_mask=both, refine=True, refine_from_step=late
        )
        made = sampled(patched, record, edits=2, positive=batch(2, 2, 4, 4))
        assert torch.isfinite(made).all()
        assert log.masks.shape == (4, 2, H, W)
    given = F.interpolate(both[None], (H, W), mode="nearest")[0]
    assert torch.equal(log.masks[:, 0], torch.cat([given, given]))  # the second mask is the second picture's


def test_the_refined_mask_does_not_ask_how_comfyui_calls_the_unet(model, trajectory):
    """A negative prompt of another length, here the same one said five times, makes two calls: cond, then uncond."""
    context = tiny.prompt(KIND, 3)[0][0]
    patched, log = cross(own(model, trajectory)[0], refine=True)
    one_call = sampled(patched, trajectory)
    masks, counted = log.masks.clone(), tiny.CountedCalls()
    patched, log = cross(own(counted.attach(model), trajectory)[0], refine=True)
    apart = sampled(patched, trajectory, negative=[[context.repeat(1, 5, 1), {}]])
    assert counted.rows == [1, 1, 1] * 3
    assert torch.equal(log.masks, masks)
    assert tiny.relative(apart, one_call) < 1e-4


def test_a_longer_negative_prompt_leaves_the_refined_mask_as_it_was(model, trajectory):
    """ComfyUI says the shorter one twice then: the first token is not to count there either."""
    context = tiny.prompt(KIND, 3)[0][0]
    positive = tiny.prompt(KIND, 2)
    positive[0][0][:, 0] *= 3  # as a start token, which draws most of the attention
    patched, log = cross(model, refine=True)
    expected = sampled(patched, trajectory, positive=positive)
    masks = log.masks.clone()
    made = sampled(patched, trajectory, positive=positive, negative=[[context.repeat(1, 2, 1), {}]])
    assert torch.equal(log.masks, masks)
    assert tiny.relative(made, expected) < 1e-4


# ---------------------------------------------------------------- regions


def test_a_region_of_the_whole_picture_is_sampling_with_its_prompt(model, trajectory, ordinary):
    made = sampled(region(model, torch.ones(1, 8 * H, 8 * W)), trajectory)
    expected = sampled(model, trajectory, positive=tiny.prompt(KIND, 5))
    assert tiny.relative(made, expected) < 1e-5
    assert tiny.relative(made, ordinary) > 1e-2


@pytest.mark.parametrize("length", [77, 154])
def test_two_regions_are_as_one_region_and_the_prompt(length, model, trajectory):
    left, right = halves()
    two = sampled(region(region(model, left, seed=2), right), trajectory, positive=tiny.prompt(KIND, 4, length))
    assert tiny.relative(two, sampled(region(model, right), trajectory)) < 1e-5


def test_where_regions_overlap_the_last_one_holds(model, trajectory):
    left, _ = halves()
    everywhere = torch.ones(1, 8 * H, 8 * W)
    covered = sampled(region(region(model, left, seed=4), everywhere), trajectory)
    assert tiny.relative(covered, sampled(region(model, everywhere), trajectory)) < 1e-5
    partly = sampled(region(region(model, everywhere, seed=4), left), trajectory)
    assert tiny.relative(partly, covered) > 1e-2


def test_half_regions_are_not_comfyui_s_and_cost_fewer_rows(model, trajectory):
    from nodes import ConditioningSetMask

    left, right = halves()
    masked = [
        entry
        for seed, mask in ((2, left), (5, right))
        for entry in ConditioningSetMask().append(tiny.prompt(KIND, seed), mask, "default", 1.0)[0]
    ]
    theirs, ours = tiny.CountedCalls(), tiny.CountedCalls()
    made = sampled(theirs.attach(model), trajectory, positive=masked)
    regional = sampled(region(ours.attach(model), right), trajectory)
    assert theirs.rows == [3, 3, 3]
    assert ours.rows == [2, 2, 2]
    assert tiny.relative(regional, made) > 1e-3


def test_a_soft_region_is_between(model, trajectory, ordinary):
    """At one layer of one evaluation it would be the straight line between; here it differs from both ends."""
    ends = [sampled(region(model, torch.full((1, 24, 16), value)), trajectory) for value in (0.01, 0.5, 1.0)]
    distances = [tiny.relative(made, ordinary) for made in ends]
    assert distances == sorted(distances)
    assert distances[0] < 0.1 * distances[2]


def test_cpam_s_mask_holds_over_regions(model, trajectory):
    """A region outside the target mask says nothing: there the null prompt speaks."""
    without = sampled(cross(model)[0], trajectory)
    assert tiny.relative(sampled(region(cross(model)[0], 1 - MASK), trajectory), without) < 1e-5
    assert tiny.relative(sampled(region(cross(model)[0], MASK), trajectory), without) > 1e-3


# ---------------------------------------------------------------- what it costs


def test_the_reference_is_one_row_a_step_and_has_no_guidance(model, trajectory):
    counted = tiny.CountedCalls()
    sampled(own(counted.attach(model), trajectory)[0], trajectory)
    assert counted.rows == [3, 3, 3]
    assert len(counted.rows_per_sigma()) == 3


def test_without_guidance_a_step_costs_two_rows(model, trajectory):
    counted = tiny.CountedCalls()
    made = sampled(own(counted.attach(model), trajectory)[0], trajectory, cfg=1.0)
    assert counted.rows == [2, 2, 2]
    ours = spec(own(model, trajectory)[0])
    assert tiny.relative(made, by_hand(model, trajectory, ours.source_mask, ours.target_mask, cfg=1.0)) < 2e-5


def test_cond_and_uncond_apart_cost_as_much_and_are_the_same(model, trajectory):
    counted = tiny.CountedCalls()
    apart = own(counted.attach(tiny.short_of_memory(model)), trajectory)[0]
    made = sampled(cross(apart, refine=True)[0], trajectory)
    assert counted.rows == [1] * 9
    assert tiny.relative(made, sampled(cross(own(model, trajectory)[0], refine=True)[0], trajectory)) < 1e-4


def test_prompts_of_another_length_make_calls_of_their_own_at_the_same_cost(model, trajectory, replaced):
    counted, context = tiny.CountedCalls(), tiny.prompt(KIND, 2)[0][0]
    long = [[context.repeat(1, 5, 1), {}]]  # too long for ComfyUI to stretch the others
    patched, _ = own(counted.attach(model), trajectory)
    made = sampled(patched, trajectory, positive=long)
    assert counted.rows == [1, 1, 1] * 3
    assert tiny.relative(made, replaced) < 1e-4


def test_n_edits_of_one_source_cost_1_plus_2n_rows_a_step(model, trajectory):
    counted, seeds = tiny.CountedCalls(), (2, 4, 5)
    made = sampled(own(counted.attach(model), trajectory)[0], trajectory, edits=3, positive=batch(*seeds))
    assert counted.rows == [1, 6] * 3
    patched, _ = own(model, trajectory)
    for place, seed in enumerate(seeds):
        alone = sampled(patched, trajectory, positive=tiny.prompt(KIND, seed))
        assert tiny.relative(made[place : place + 1], alone) < 1e-5


# ---------------------------------------------------------------- the log


def test_the_log_shows_every_step_s_mask_and_again_when_it_is_asked_twice(model, trajectory):
    patched, log = own(model, trajectory)
    refined, cross_log = cross(patched, refine=True)
    made = {"samples": sampled(refined, trajectory)}
    for one in (log, cross_log):
        images, masks, values = RunLogShow.execute(one, made).args
        assert images.shape == (3, 8 * H, 8 * W, 3)
        assert masks.shape == (3, H, W)
        assert torch.equal(images[:, ::8, ::8, 0], masks)
        assert set(masks.unique().tolist()) == {0.0, 1.0}
        assert [line.split(":")[0] for line in values.splitlines()] == ["step 1", "step 2", "step 3"]
        again = RunLogShow.execute(one, made).args
        assert torch.equal(again[0], images)
        assert torch.equal(again[1], masks)
        assert again[2] == values


def test_without_refinement_the_log_is_the_widened_mask(model, trajectory):
    patched, log = own(model, trajectory, dilation=0.3)
    sampled(patched, trajectory)
    given = F.interpolate(spec(patched).target_mask[None], (H, W), mode="nearest")[0]
    assert torch.equal(log.masks[0], given.expand(3, -1, -1))
    assert given.sum() > F.interpolate(MASK[None], (H, W), mode="nearest").sum()
    assert log.get_ram_usage() == log.masks.nbytes > 0


def test_the_log_is_of_the_latest_run(model, trajectory):
    patched, log = cross(model, refine=True)
    sampled(patched, trajectory, edits=2, positive=batch(2, 4))
    sampled(patched, trajectory, sigmas=trajectory.sigmas[1:])
    assert log.masks.shape == (1, 2, H, W)
    assert len(log.lines) == 2


def test_a_log_of_no_run_says_so(model, trajectory):
    _, log = own(model, trajectory)
    with pytest.raises(ValueError, match="run_log: CPAM Self-Attention has recorded nothing; give the latent of"):
        RunLogShow.execute(log, tiny.latent())


# ---------------------------------------------------------------- bad input


NAN = MASK.clone()
NAN[0, 5, 5] = float("nan")
DOT = torch.zeros(1, 8 * H, 8 * W)
DOT[0, 3, 3] = 1
FULL = torch.ones(1, 8 * H, 8 * W)
BAD = {
    "another task": ({"task": "add object"}, ["task", "'add object'", *TASKS]),
    "other background keys": ({"background_keys": "both"}, ["background_keys", "'both'", "source, target"]),
    "dilation below zero": ({"dilation": -0.1}, ["dilation", "-0.1", "0.0 to 1.0"]),
    "dilation NaN": ({"dilation": float("nan")}, ["dilation", "nan", "0.0 to 1.0"]),
    "softness above one": ({"softness": 1.5}, ["softness", "1.5", "0.0 to 1.0"]),
    "plain_fraction above one": ({"plain_fraction": 1.1}, ["plain_fraction", "1.1", "0.0 to 1.0"]),
    "an empty mask": ({"source_mask": 0 * MASK}, ["source_mask", "empty", "white"]),
    "a mask below one half": ({"source_mask": 0.4 * MASK}, ["source_mask", "empty", "white"]),
    "a full mask": ({"source_mask": FULL}, ["source_mask", "covers the whole picture", "white"]),
    "a mask with NaN": ({"source_mask": NAN}, ["source_mask", "NaN", "0 to 1"]),
    "a mask of another shape": ({"source_mask": torch.ones(1, 64, 64)}, ["source_mask", "64 × 64", "128 × 192"]),
    "a mask with too many sides": ({"source_mask": torch.ones(1, 2, 192, 128)}, ["source_mask", "[1, 2, 192, 128]"]),
    "two masks for one picture": ({"source_mask": torch.cat([MASK, MASK])}, ["source_mask", "2 masks for 1 images"]),
    "a mask too small for the finest layer": (
        {"source_mask": DOT},
        ["source_mask", "nothing of the object", "16 × 24", "at least 8 pixels"],
    ),
    "a background too small for the finest layer": (
        {"source_mask": 1 - DOT},
        ["source_mask", "nothing of the background", "16 × 24"],
    ),
    "an empty target": ({"target_mask": 0 * MASK}, ["target_mask", "empty"]),
    "a target mask of all": ({"target_mask": FULL}, ["target_mask", "100 % of the picture", "not all"]),
    "a target mask with NaN": ({"target_mask": NAN}, ["target_mask", "NaN"]),
    "a target mask of another shape": ({"target_mask": torch.ones(1, 64, 64)}, ["target_mask", "64 × 64"]),
    "a target that widening makes all": (
        {"source_mask": rectangle(8, 184, 8, 120), "dilation": 1.0},
        ["dilation", "100 % of the picture"],
    ),
    "a full mask and the background": (
        {"source_mask": FULL, "task": "change background"},
        ["source_mask", "covers the whole picture"],
    ),
    "an empty mask and the background": (
        {"source_mask": 0.4 * MASK, "task": "change background"},
        ["source_mask", "it is empty"],
    ),
}  # fmt: skip


@pytest.mark.parametrize("what", BAD)
def test_a_bad_input_of_self_attention_is_said_in_one_sentence(what, model, trajectory):
    changes, words = BAD[what]
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        own(model, trajectory, **changes)
    message = str(error.value)
    assert message.startswith(f"{words[0]}: ")
    assert all(word in message for word in words), message
    assert "\n" not in message


BAD_CROSS = {
    "refine_from_step below zero": ({"refine_from_step": -1}, ["refine_from_step", "-1", "0 to 10000"]),
    "refine_threshold above one": ({"refine_threshold": 1.5}, ["refine_threshold", "1.5", "0.0 to 1.0"]),
    "refine_threshold NaN": ({"refine_threshold": float("nan")}, ["refine_threshold", "nan"]),
    "an empty null": ({"null": []}, ["null", "empty", "CLIP Text Encode"]),
    "a null of another width": ({"null": [[torch.zeros(1, 77, 2048), {}]]}, ["null", "2048 wide", "32 wide"]),
    "an empty mask": ({"target_mask": 0 * MASK}, ["target_mask", "empty"]),
    "a mask with NaN": ({"target_mask": NAN}, ["target_mask", "NaN"]),
    "text without clip": ({"text": "a fox"}, ["clip", "'text'", "connect the CLIP"]),
    "text without words": ({"clip": text_encoder, "text": "()"}, ["text", "no word", "'()'"]),
}


@pytest.mark.parametrize("what", BAD_CROSS)
def test_a_bad_input_of_cross_attention_is_said_in_one_sentence(what, model):
    changes, words = BAD_CROSS[what]
    changes = {name: value() if callable(value) else value for name, value in changes.items()}
    with pytest.raises(ValueError) as error:  # noqa: PT011 - the words are compared below
        cross(model, **changes)
    message = str(error.value)
    assert message.startswith(f"{words[0]}: ")
    assert all(word in message for word in words), message


@pytest.mark.parametrize(
    ("mask", "prompt", "words"),
    [
        (0 * MASK, tiny.prompt(KIND, 1), r"region: it is empty \(all 0\)"),
        (NAN, tiny.prompt(KIND, 1), "region: it holds NaN"),
        (MASK, [], "prompt: the conditioning is empty"),
        (MASK, [[torch.zeros(1, 77, 768), {}]], "prompt: it is 768 wide"),
    ],
)
def test_a_bad_input_of_a_region_is_said_in_one_sentence(mask, prompt, words, model):
    with pytest.raises(ValueError, match=f"^{words}"):
        RegionPrompts.execute(model, mask, prompt)


def test_sdxl_wants_a_pooled_output_of_null_and_regions():
    patcher, bare = tiny.model(tiny.SDXL), tiny.prompt(KIND, 9)
    with pytest.raises(ValueError, match=r"^null: it has no pooled output"):
        cross(patcher, null=bare)
    with pytest.raises(ValueError, match=r"^prompt: it has no pooled output"):
        RegionPrompts.execute(patcher, MASK, bare)


def test_a_trajectory_of_another_family_is_refused(model, trajectory):
    patcher = tiny.model(tiny.SDXL)
    with pytest.raises(ValueError, match=r"^trajectory: it was made with a model of another model family"):
        own(patcher, trajectory)


def test_each_patch_can_be_there_once(model, trajectory):
    with pytest.raises(ValueError, match=r"^model: it has a CPAM Self-Attention already.*leave one out"):
        own(own(model, trajectory)[0], trajectory)
    with pytest.raises(ValueError, match=r"^model: it has a CPAM Cross-Attention already.*Region Prompt$"):
        cross(cross(model)[0])
    both = cross(own(model, trajectory)[0])[0]
    with pytest.raises(ValueError, match=r"^model: it has a CPAM Self-Attention already"):
        own(both, trajectory)


def test_a_model_without_a_unet_is_refused(trajectory):
    other = SimpleNamespace(
        get_model_object=lambda name: torch.nn.Linear(1, 1), model=SimpleNamespace(), wrappers={}, model_options={}
    )
    for make in (lambda: own(other, trajectory), lambda: cross(other), lambda: region(other)):
        with pytest.raises(ValueError, match=r"^model: SimpleNamespace has no U-Net"):
            make()


def wide(rows=1):
    """A mask of 192 × 128."""
    return torch.cat([torch.ones(rows, 8 * W, 4 * H), torch.zeros(rows, 8 * W, 4 * H)], -1)


RUNS = {
    "a latent of another size": (lambda m, t: own(m, t)[0], {"latent_image": torch.zeros(1, 4, W, H)}, "latent_image"),
    "a latent of another size, same aspect": (
        lambda m, t: own(m, t)[0],
        {"latent_image": torch.zeros(1, 4, 2 * H, 2 * W)},
        "latent_image",
    ),
    "a target of another shape": (lambda m, t: cross(m, target_mask=wide())[0], {}, "target_mask"),
    "a region of another shape": (lambda m, t: region(m, wide()), {}, "region"),
    "noise levels outside the record": (
        lambda m, t: own(m, t)[0],
        {"sigmas": torch.tensor([20.0, 5.0, 0.0])},
        "sigma 20 lies outside the trajectory",
    ),
}


@pytest.mark.parametrize("what", RUNS)
def test_what_only_the_run_can_tell_is_said_too(what, model, trajectory):
    make, settings, words = RUNS[what]
    with pytest.raises(ValueError, match=f"^{words}"):
        sampled(make(model, trajectory), trajectory, **settings)


def test_after_a_run_that_failed_the_next_ones_give_the_same_bits(model, trajectory, ordinary, replaced):
    for make, settings, _ in RUNS.values():
        with pytest.raises(ValueError):  # noqa: PT011 - see the test above
            sampled(make(model, trajectory), trajectory, **settings)
    patched, _ = cross(own(model, trajectory)[0], refine=True)

    def broken(step, denoised, x, steps):
        if step == 1:
            raise KeyboardInterrupt

    with pytest.raises(KeyboardInterrupt):
        sampled(patched, trajectory, callback=broken)
    assert torch.equal(sampled(model, trajectory), ordinary)
    assert torch.equal(sampled(own(model, trajectory)[0], trajectory), replaced)


def test_batches_that_do_not_pair_are_refused(model):
    two = inverted(model, batch=2)
    patched, _ = own(model, two)
    with pytest.raises(ValueError, match="its batch of 3 does not fit the trajectory's 2 images"):
        sampled(patched, two, latent_image=torch.zeros(3, 4, H, W))


def test_text_that_is_not_the_sampler_s_prompt_is_said(model, trajectory):
    patched, _ = cross(model, refine=True, clip=text_encoder(), text="a fox, " * 60)
    with pytest.raises(ValueError, match=r"text: it has a word at place .* 77 places; give CPAM Cross"):
        sampled(patched, trajectory)


def test_masks_that_a_coarse_layer_does_not_see_make_a_mean_and_no_nan(model, trajectory):
    """A thin object is gone at 2 × 3, and a thin background too: no key is left there."""
    for mask in (rectangle(8, 24, 8, 24), 1 - rectangle(8, 24, 8, 24)):
        patched, _ = own(
            model, trajectory, source_mask=mask, task="keep object", start_step=0, start_layer=0, dilation=0.0
        )
        ours = spec(patched)
        expected = by_hand(model, trajectory, ours.source_mask, ours.target_mask, keep=(0, 0))
        made = sampled(patched, trajectory)
        assert torch.isfinite(made).all()
        assert tiny.relative(made, expected) < 2e-5


def test_an_empty_refined_mask_makes_no_nan(model, trajectory):
    patched, log = cross(own(model, trajectory)[0], refine=True, refine_threshold=1.0)
    made = sampled(patched, trajectory)
    assert torch.isfinite(made).all()
    assert log.masks[0, 0].sum() <= 4


def test_inputs_are_left_as_they_were(model, trajectory):
    masks = (MASK.clone(), MASK.clone())
    latents, prompt = trajectory.latents.clone(), tiny.prompt(KIND, 9)
    patched, _ = cross(own(model, trajectory, source_mask=masks[0], softness=0.1)[0], null=prompt, target_mask=masks[1])
    sampled(patched, trajectory)
    assert all(torch.equal(mask, MASK) for mask in masks)
    assert torch.equal(trajectory.latents, latents)
    assert torch.equal(prompt[0][0], tiny.prompt(KIND, 9)[0][0])
