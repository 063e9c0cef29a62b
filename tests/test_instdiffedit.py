"""InstDiffEdit: against the authors' numbers (golden/inst_a), inside ComfyUI's samplers, and on bad input."""

from __future__ import annotations

import dataclasses
import math

import comfy.samplers
import comfy.supported_models
import pytest
import torch
import torch.nn.functional as F

from scalpel.core.heatmap import probabilities
from scalpel.core.instdiffedit import (
    CURRENT,
    MaskHead,
    MaskSettings,
    at_pixels,
    position_vector,
    refined,
    scaled,
    smoothed,
    word_images,
)
from scalpel.core.prompt_to_prompt import Prompt, Word
from scalpel.core.unet import instdiffedit as core
from scalpel.core.unet.layers import layer_table, map_layers
from scalpel.core.unet.prompt_tokens import read_prompt
from scalpel.core.written_words import written_words
from scalpel.nodes.instdiffedit import InstDiffEditMask, InstDiffEditSampler
from scalpel.partsworld import loader
from scalpel.tests import tiny

pytestmark = pytest.mark.usefixtures("inference")
KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
H, W = 24, 16


@pytest.fixture(scope="module")
def demo():
    return loader.load()


# ---------------------------------------------------------------- the authors' mask head

CASE, GOLDEN = tiny.golden_case("inst_a")
SETTINGS = [(round(10 * s["phi"]), round(10 * s["th2"])) for s in CASE["head_settings"]]


def as_prompt(head):
    """A golden prompt as the tokenizer reads it."""
    pieces = head["pieces"][1:-1]
    words = tuple(Word(piece, (piece,), (place,)) for place, piece in enumerate(pieces, 1))
    return Prompt(words, ((0,),), 77, head["prompt"])


def head_maps(number):
    """[1, columns, h, w], and the words' columns."""
    words = [places for _, places in written_words(as_prompt(CASE["head"][number]))]
    return GOLDEN[f"head{number}_maps"].movedim(-1, 0)[None], words


@pytest.mark.parametrize("number", range(4))
def test_words_are_the_authors(number):
    head = CASE["head"][number]
    assert [word for word, _ in written_words(as_prompt(head))] == [word.lower() for word in head["words"]]


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("phi", "unrelated"), SETTINGS)
def test_with_their_rounding_the_mask_head_is_the_authors_to_the_pixel(number, phi, unrelated):
    name = f"head{number}_phi{phi}_th{unrelated}"
    settings = MaskSettings(0.9, unrelated / 10, phi / 10, eight_bit=True)
    maps, words = head_maps(number)
    images = word_images(maps, words, (64, 64), eight_bit=True)
    difference = (255 * images[0] - GOLDEN[f"head{number}_images"][:-1]).abs()
    assert difference.max() < 1.001
    assert (difference > 0.5).float().mean() < 0.005  # where a level is all but reached
    index, position = position_vector(images, settings)
    if len(words) > 1:
        assert index.item() == CASE["head"][number]["index_word"]
        assert position[0].tolist() == GOLDEN[f"{name}_position"][1:-1].tolist()
    assert (refined(images, position)[0] - GOLDEN[f"{name}_refined"]).abs().max() < 0.01
    assert torch.equal(MaskHead(words, (64, 64), settings).mask(maps)[0], GOLDEN[f"{name}_mask"])


@pytest.mark.parametrize("number", range(4))
@pytest.mark.parametrize(("phi", "unrelated"), SETTINGS)
def test_without_rounding_the_position_vector_is_theirs_and_the_mask_nearly(number, phi, unrelated):
    """Low contrast is where 8 bit are few: one word of the third prompt has 240 levels, and its masks differ most."""
    name = f"head{number}_phi{phi}_th{unrelated}"
    maps, words = head_maps(number)
    head = MaskHead(words, (64, 64), MaskSettings(0.9, unrelated / 10, phi / 10))
    different = (head.mask(maps)[0] != GOLDEN[f"{name}_mask"]).float().mean()
    if len(words) > 1:
        assert head.position[0].tolist() == GOLDEN[f"{name}_position"][1:-1].tolist()
    assert different <= (0.008 if number == 2 else 0.0025)


@pytest.mark.parametrize("number", range(1, 4))
def test_words_are_as_like_the_index_word_as_with_the_authors(number):
    maps, words = head_maps(number)
    images = word_images(maps, words, (64, 64), eight_bit=True).flatten(2).double()
    chosen = images[:, 1 + CASE["head"][number]["index_word"]]
    found = F.cosine_similarity(images[0, 1:], chosen, dim=-1)
    torch.testing.assert_close(found.float(), GOLDEN[f"head{number}_similarity"], rtol=0, atol=2e-4)


def test_the_blur_is_opencv_s_fixed_kernel_reflected_at_the_border():
    point = torch.zeros(1, 9, 9)
    point[0, 0, 4] = 1
    row = torch.tensor([1.0, 4, 6, 4, 1]) / 16
    kernel = torch.zeros(9, 9)
    kernel[2:7, 2:7] = row[:, None] * row
    once = F.conv2d(F.pad(point[:, None], (4, 4, 4, 4), mode="reflect"), kernel[None, None])
    twice = F.conv2d(F.pad(once, (4, 4, 4, 4), mode="reflect"), kernel[None, None])[:, 0]
    torch.testing.assert_close(smoothed(point), scaled(twice))


def test_images_of_a_batch_and_their_shape_are_independent():
    maps = torch.rand(3, 6, 8, 12, generator=torch.Generator().manual_seed(0))
    words = [(1,), (2, 3), (4,), (5,)]
    head = MaskHead(words, (32, 48), MaskSettings(0.8, 0.7))
    masks = head.mask(maps)
    assert masks.shape == (3, 32, 48)
    for i in range(3):
        alone = MaskHead(words, (32, 48), MaskSettings(0.8, 0.7))
        assert torch.equal(alone.mask(maps[i : i + 1])[0], masks[i])
        assert torch.equal(alone.position[0], head.position[i])
    turned = MaskHead(words, (48, 32), MaskSettings(0.8, 0.7)).mask(maps.mT)
    assert (turned.mT != masks).float().mean() < 0.01  # resized in the other order


@pytest.mark.parametrize("eight_bit", [False, True])
@pytest.mark.parametrize("value", [0.0, 0.013, 1.0])
@pytest.mark.parametrize("words", [[(1,)], [(1,), (2,), (3,)]])
def test_constant_maps_find_nothing(value, words, eight_bit):
    head = MaskHead(words, (32, 32), MaskSettings(eight_bit=eight_bit))
    for _ in range(3):
        assert not head.mask(torch.full((2, 4, 16, 16), value)).any()


def test_a_constant_word_among_others_is_no_nan():
    maps = torch.rand(1, 4, 16, 16, generator=torch.Generator().manual_seed(1))
    maps[:, 2] = 0.3
    images = word_images(maps, [(1,), (2,), (3,)], (32, 32))
    assert torch.isfinite(images).all()
    assert not images[:, 2].any()
    assert 0 < MaskHead([(1,), (2,), (3,)], (32, 32), MaskSettings()).mask(maps).mean() < 1


def test_the_position_vector_is_that_of_the_first_step_and_the_maps_a_running_mean():
    first, second = torch.rand(2, 1, 4, 16, 16, generator=torch.Generator().manual_seed(2))
    words = [(1,), (2,), (3,)]
    ways = (MaskSettings(threshold=0.3, over_steps=over) for over in ("mean", CURRENT, "mean"))
    mean, current, fresh = (MaskHead(words, (32, 32), way) for way in ways)
    assert torch.equal(mean.mask(first), current.mask(first))
    position = mean.position
    images = word_images((first + second) / 2, words, (32, 32))
    assert torch.equal(mean.mask(second), (smoothed(refined(images, position)) > 0.3).float())
    images = word_images(second, words, (32, 32))
    assert torch.equal(current.mask(second), (smoothed(refined(images, position)) > 0.3).float())
    assert fresh.position is None
    assert torch.equal(mean.position, position)


def test_masks_are_enlarged_to_pixels_as_they_are():
    mask = torch.zeros(1, 8, 12)
    mask[0, 2:6, 3:9] = 1
    large = at_pixels(mask, (64, 96))
    assert set(large.unique().tolist()) == {0.0, 1.0}
    assert torch.equal(F.avg_pool2d(large[:, None], 8)[:, 0] > 0.5, mask > 0)


# ---------------------------------------------------------------- words


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("A (Red CAR:1.3), parked", ["a", "red", "car,", "parked"]),
        ("the  old   man's boat...", ["the", "old", "man's", "boat..."]),
        ("(a (dog:1.2) on grass:0.8)", ["a", "dog", "on", "grass"]),
        ("Café mañana", ["café", "mañana"]),
        ("a 🐶 in the snow", ["a", "🐶", "in", "the", "snow"]),
        ("dog\nin snow", ["dog", "in", "snow"]),
        ("\\(dog\\)", ["(dog)"]),
        ("32 dogs", ["32", "dogs"]),
        ("日本 の 犬", ["日本", "の", "犬"]),
    ],
)
def test_no_word_is_dropped(demo, text, words):
    prompt = read_prompt(demo[1], text)
    found = written_words(prompt)
    assert [word for word, _ in found] == words
    assert sorted(p for _, places in found for p in places) == sorted(p for word in prompt.words for p in word.places)


def test_long_prompts_have_all_their_words_in_several_chunks(demo):
    text = " ".join(["a red figure and"] * 30) + " a blue car"
    found = written_words(read_prompt(demo[1], text))
    assert [word for word, _ in found] == text.split()
    assert max(place for _, places in found for place in places) > 77


# ---------------------------------------------------------------- the authors' loop


def quick(patcher):
    """A clone whose self-attention is torch's, as ComfyUI's own on a CPU takes seconds for 4096 places."""

    def attend(q, k, v, options):
        heads = [t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    clone = patcher.clone()
    for block, number, index in layer_table(patcher).layers:
        clone.set_model_attn1_replace(attend, block, number, index)
    return clone


BEFORE = [
    math.sqrt((1 - a) / a)
    for a in torch.cumprod(1 - torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2, 0)[
        [999, 888, 777, 666, 555, 444]
    ].tolist()
]
"""The noise levels of their ten steps that strength 0.4 leaves out."""


def their_lms():
    """diffusers' linear multistep, with coefficients as if it had a history."""

    def coefficient(order, sigmas, i, j):
        points = [sigmas[i - k] for k in range(order)]
        x = torch.linspace(0, 1, 2001, dtype=torch.float64) * (sigmas[i + 1] - sigmas[i]) + sigmas[i]
        value = torch.ones_like(x)
        for k in range(order):
            if k != j:
                value = value * (x - points[k]) / (points[j] - points[k])
        return torch.trapezoid(value, x).item()

    def sample_lms(model, x, sigmas, extra_args=None, callback=None, disable=None):
        """sigmas: the end of the schedule that BEFORE begins."""
        first = len(BEFORE)
        whole = [*BEFORE, *(float(s) for s in sigmas)]
        history = []
        for i in range(len(sigmas) - 1):
            denoised = model(x, sigmas[i] * x.new_ones(len(x)), **extra_args)
            history.insert(0, (x - denoised) / sigmas[i])
            order = min(first + i + 1, 4)
            x = x + sum(coefficient(order, whole, first + i, j) * history[j] for j in range(min(order, len(history))))
        return x

    return comfy.samplers.KSAMPLER(sample_lms)


VARIANTS = {
    "euler": (lambda: comfy.samplers.sampler_object("euler"), core.CURRENT, 4),
    "euler_next_bg": (lambda: comfy.samplers.sampler_object("euler"), core.NEXT, 4),
    "lms_correct": (lambda: comfy.samplers.sampler_object("lms"), core.CURRENT, 3),  # it ends with an Euler step
    "lms_official": (their_lms, core.CURRENT, 4),
}


@pytest.mark.parametrize("variant", VARIANTS)
def test_latents_of_all_rounds_are_the_authors_after_every_step(variant, monkeypatch):
    """Blended with the authors' masks, so that a pixel at the threshold does not count for more than itself."""
    make, background, steps = VARIANTS[variant]
    loop, seen, runs = CASE["loop"], [], []
    patcher = quick(tiny.golden_model("inst_a", comfy.supported_models.SD15))

    class Watched(core.InstantRun):
        def _find(self):
            found = super()._find()
            if variant == "euler":
                runs.append(self.head._sum[0].movedim(0, -1) / len(self.masks))
            return GOLDEN[f"{variant}_mask"][len(self.masks) - 1][None].to(found)

        def _blended(self, x):
            seen.append(super()._blended(x).clone())
            return seen[-1]

    monkeypatch.setattr(core, "InstantRun", Watched)
    settings = MaskSettings(loop["th1"], loop["th2"], loop["phi"], eight_bit=True)
    spec = core.InstantSpec(0, tuple((place,) for place in range(1, 6)), 77, loop["rounds"], settings, background)
    clean = patcher.get_model_object("latent_format").process_out(GOLDEN["loop_clean_latent"])
    found = core.sample_instant(
        patcher, [[GOLDEN["loop_context_cond"], {}]], [[GOLDEN["loop_context_uncond"], {}]], spec,
        GOLDEN["loop_noise"], 0, make(), GOLDEN["loop_sigmas"], {"samples": clean}, loop["cfg"],
    )  # fmt: skip
    assert found.position[0].tolist() == GOLDEN[f"{variant}_position"][1:-1].tolist()
    for step in range(steps):
        assert tiny.relative(seen[step], GOLDEN[f"{variant}_latents"][step]) < 1e-5, step
        assert (found.masks[0, step] != GOLDEN[f"{variant}_mask"][step]).sum() <= 4, step  # 0.1 %
    for step, maps in enumerate(runs):
        torch.testing.assert_close(maps, GOLDEN["euler_maps"][step][..., :6], rtol=0, atol=2e-5)


# ---------------------------------------------------------------- inside ComfyUI


def spec(rounds=2, words=((1,), (2, 3), (5,)), **changes):
    settings = MaskSettings(0.8, 0.5, changes.pop("threshold", 0.3))
    return core.InstantSpec(0, words, 77, rounds, settings, **changes)


def picture(images=1, height=H, width=W, seed=20):
    return {"samples": tiny.randn(images, 4, height, width, seed=seed)}


def run(patcher, kind, latent=None, sampler="euler", steps=3, own=None, **changes):
    """`sample_instant` with random prompts: the last three of six steps."""
    latent = latent or picture()
    own = own or spec(**changes)
    sigmas = core.partial_sigmas(tiny.sigmas(patcher, 2 * steps), 0.5)
    noise = core.independent_noise(latent, latent["samples"], own.rounds, 7)
    return core.sample_instant(
        patcher, tiny.prompt(kind, 2), tiny.prompt(kind, 3), own, noise, 7, comfy.samplers.sampler_object(sampler),
        sigmas, latent, 4.0,
    )  # fmt: skip


@pytest.fixture(scope="module", params=KINDS)
def family(request):
    kind = KINDS[request.param]
    return tiny.model(kind), kind


def test_both_families_find_a_mask_of_their_own_size_and_keep_the_picture_around_it(family):
    patcher, kind = family
    image = picture()
    found = run(patcher, kind, image)
    assert found.masks.shape == (1, 3, H, W)
    assert found.latent.shape == (1, 4, H, W)
    assert set(found.masks.unique().tolist()) == {0.0, 1.0}
    outside = (found.masks[:, -1] == 0)[:, None].expand(-1, 4, -1, -1)
    torch.testing.assert_close(found.latent[outside], image["samples"][outside], rtol=0, atol=1e-5)
    assert (found.latent - image["samples"])[~outside].abs().mean() > 0.1


def test_maps_are_the_attention_of_the_lowest_level_without_the_middle(family, monkeypatch):
    """Computed again from the queries and keys that the layers have."""
    patcher, kind = family
    kept, maps, rounds = {}, [], 2
    wanted = map_layers(layer_table(patcher))
    assert {layer_table(patcher)[address].downsample for address in wanted} == {4}
    assert {address[0] for address in wanted} == {"input", "output"}

    class Watched(core.InstantRun):
        def _find(self):
            maps.append(torch.stack(list(self._maps.values())).mean(0))
            return super()._find()

    def keep(q, k, v, options):
        address = (*options["block"], options.get("block_index", 0))
        chunk = len(q) // len(options["cond_or_uncond"])
        start = options["cond_or_uncond"].index(0) * chunk
        kept[address] = (q[start : start + chunk], k[start : start + chunk], options["n_heads"])
        heads = [t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v)]
        return F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    monkeypatch.setattr(core, "InstantRun", Watched)
    other = patcher.clone()
    for block, number, index in layer_table(patcher).layers:
        other.set_model_attn2_replace(keep, block, number, index)
    run(other, kind, steps=1, rounds=rounds)
    assert len(maps) == 1
    own = [probabilities(*kept[address]).mean((0, 1))[:, [0, 1, 2, 3, 5]] for address in wanted]
    expected = torch.stack(own).mean(0).mT.unflatten(-1, (H // 4, W // 4))
    torch.testing.assert_close(maps[0][0], expected, rtol=1e-4, atol=1e-6)


def test_the_model_gives_what_it_gave_before(family):
    patcher, kind = family
    before = tiny.plain(patcher, kind)
    first = run(patcher, kind)
    again = run(patcher, kind)
    assert torch.equal(first.latent, again.latent)
    assert torch.equal(first.masks, again.masks)
    assert torch.equal(tiny.plain(patcher, kind), before)


def test_with_a_mask_of_nothing_the_picture_comes_back_and_with_one_of_everything_img2img(model, monkeypatch):
    image = picture()
    nothing = run(model, tiny.SD15, image, threshold=1.0)
    torch.testing.assert_close(nothing.latent, image["samples"], rtol=0, atol=1e-5)
    monkeypatch.setattr(MaskHead, "mask", lambda self, maps: maps.new_ones(len(maps), *self.size))
    monkeypatch.setattr(core, "position_vector", None, raising=False)

    class Whole(core.InstantRun):
        def __init__(self, *arguments):
            super().__init__(*arguments)
            self.head.index, self.head.position = torch.zeros(1), torch.zeros(1, 3)

    monkeypatch.setattr(core, "InstantRun", Whole)
    everything = run(model, tiny.SD15, image, rounds=1)
    sigmas = core.partial_sigmas(tiny.sigmas(model, 6), 0.5)
    expected = tiny.plain(model, tiny.SD15, latent_image=image, sigmas=sigmas, positive=tiny.prompt(tiny.SD15, 2))
    assert torch.equal(everything.latent, expected)


def test_the_unet_sees_each_round_once_a_step_and_the_mask_alone_costs_less(family):
    """In the last step: the positive prompt's rows, as far as the last layer that counts."""
    patcher, kind = family
    counted = tiny.CountedCalls()
    whole = run(counted.attach(patcher), kind, rounds=3)
    assert counted.rows == [6, 6, 6]
    finished = []
    unet = patcher.get_model_object("diffusion_model")
    hooks = [
        unet.output_blocks[number][0].register_forward_hook(lambda *_, n=number: finished.append(n))
        for number in range(len(unet.output_blocks))
    ]
    started = []
    hooks.append(unet.input_blocks[0][0].register_forward_hook(lambda _, x, __: started.append(len(x[0]))))
    try:
        alone = run(patcher, kind, rounds=3, mask_only=True)
    finally:
        for hook in hooks:
            hook.remove()
    assert started == [6, 6, 3]
    last = max(number for block, number, _ in map_layers(layer_table(patcher)) if block == "output")
    assert finished[2 * len(unet.output_blocks) :] == list(range(last + 1))  # its residual block runs before it
    assert torch.equal(alone.masks, whole.masks)


def test_beside_a_longer_negative_prompt_maps_weigh_the_same_in_every_step(family, monkeypatch):
    """ComfyUI repeats the shorter context; in the last step of the mask alone there is no other."""
    patcher, kind = family
    sums = []

    class Kept(MaskHead):
        def mask(self, maps):
            sums.append(maps.sum((-2, -1)))
            return super().mask(torch.ones_like(maps))  # blends the same whatever was found

    monkeypatch.setattr(core, "MaskHead", Kept)
    prompts = tiny.prompt(kind, 2), tiny.prompt(kind, 3, length=154)
    sigmas = core.partial_sigmas(tiny.sigmas(patcher, 6), 0.5)
    image = picture()
    for mask_only in (False, True):
        core.sample_instant(
            patcher, *prompts, spec(1, mask_only=mask_only), core.independent_noise(image, image["samples"], 1, 7), 7,
            comfy.samplers.sampler_object("euler"), sigmas, image, 4.0,
        )  # fmt: skip
    torch.testing.assert_close(torch.stack(sums[3:]), torch.stack(sums[:3]), rtol=1e-4, atol=0)


def test_short_of_memory_cond_and_uncond_run_apart_to_the_same_end(family):
    patcher, kind = family
    counted = tiny.CountedCalls()
    apart = run(counted.attach(tiny.short_of_memory(patcher)), kind)
    assert counted.rows == [2] * 6
    together = run(patcher, kind)
    assert (apart.masks != together.masks).float().mean() < 0.01
    assert torch.equal(apart.masks[:, 0], together.masks[:, 0])


def test_pictures_of_a_batch_are_independent(model):
    image = picture(3)
    together = run(model, tiny.SD15, image, rounds=2)
    assert together.latent.shape[0] == together.masks.shape[0] == 3
    assert not torch.equal(together.masks[0], together.masks[1])
    for i in range(3):
        alone = run(model, tiny.SD15, {"samples": image["samples"][i : i + 1], "batch_index": [i]}, rounds=2)
        assert (alone.masks[0] != together.masks[i]).float().mean() < 0.01
        assert torch.equal(alone.position[0], together.position[i])


def test_each_round_has_noise_of_its_own_and_a_picture_s_depends_on_its_place():
    samples = torch.zeros(3, 4, 8, 8)
    noise = core.independent_noise({}, samples, 2, 5)
    assert len({tuple(row.flatten()[:4].tolist()) for row in noise}) == 6
    later = core.independent_noise({"batch_index": [2]}, samples[:1], 2, 5)
    assert torch.equal(later, noise[[2, 5]])


def test_a_noise_mask_limits_the_edit(model):
    image = picture(2)
    mask = torch.zeros(2, 8 * H, 8 * W)
    mask[0, :, : 4 * W], mask[1, :, 4 * W :] = 1, 1
    found = run(model, tiny.SD15, {**image, "noise_mask": mask}, threshold=0.0)
    changed = (found.latent - image["samples"]).abs().amax(1) > 1e-3
    assert changed[0, :, : W // 2 - 1].any()
    assert not changed[0, :, W // 2 + 1 :].any()
    assert not changed[1, :, : W // 2 - 1].any()


def test_fewer_noise_masks_than_pictures_go_round_the_same_in_every_round(model):
    image = picture(3)
    masks = torch.zeros(2, 8 * H, 8 * W)
    masks[0, :, : 4 * W], masks[1, :, 4 * W :] = 1, 1
    few = run(model, tiny.SD15, {**image, "noise_mask": masks}, rounds=2)
    each = run(model, tiny.SD15, {**image, "noise_mask": masks[[0, 1, 0]]}, rounds=2)
    assert torch.equal(few.masks, each.masks)
    assert torch.equal(few.latent, each.latent)


def test_a_node_that_changes_the_size_within_the_run_gets_a_sentence(model):
    """As Deep Shrink does in the first steps."""
    shrunk = model.clone()
    seen = []

    def shrink(h, options):
        if options["block"] == ("input", 3) and len(seen) < 1:
            seen.append(h)
            return F.interpolate(h, scale_factor=0.5)
        return h

    shrunk.set_model_input_block_patch(shrink)
    shrunk.set_model_output_block_patch(
        lambda h, hsp, _: (h if h.shape == hsp.shape else F.interpolate(h, hsp.shape[-2:]), hsp)
    )
    with pytest.raises(ValueError, match=r"^model: another node changes the size of what the U-Net works on"):
        run(shrunk, tiny.SD15, picture(1, 32, 32))
    run(model, tiny.SD15)


@pytest.mark.parametrize("sampler", ["lms", "dpmpp_2m", "dpm_2", "euler_ancestral", "dpmpp_sde", "res_multistep"])
def test_samplers_with_memory_or_noise_or_several_evaluations_a_step(model, sampler):
    image = picture()
    found = run(model, tiny.SD15, image, sampler)
    assert found.masks.shape == (1, 3, H, W)
    outside = (found.masks[:, -1] == 0)[:, None].expand(-1, 4, -1, -1)
    torch.testing.assert_close(found.latent[outside], image["samples"][outside], rtol=0, atol=1e-5)


@pytest.mark.parametrize("sampler", ["heun", "uni_pc", "dpm_fast"])
def test_a_sampler_that_would_not_notice_is_refused_by_name(model, sampler):
    with pytest.raises(ValueError, match=r"sampler_name: .* does not show its own latent at each step.*euler"):
        run(model, tiny.SD15, sampler=sampler)


def test_another_node_s_attention_replacement_is_called(model):
    calls = []

    def other(q, k, v, options):
        calls.append(options["block"])
        heads = [t.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2) for t in (q, k, v)]
        return 0.5 * F.scaled_dot_product_attention(*heads).transpose(1, 2).flatten(2)

    patched = model.clone()
    patched.set_model_attn2_replace(other, "input", 7)
    found = run(patched, tiny.SD15)
    assert calls == [("input", 7)] * 3
    assert not torch.equal(found.latent, run(model, tiny.SD15).latent)


def test_nan_of_the_model_never_reaches_the_picture_where_nothing_was_found(model):
    broken = model.clone()
    broken.set_model_unet_function_wrapper(lambda apply, a: apply(a["input"], a["timestep"], **a["c"]) * float("nan"))
    image = picture()
    found = run(broken, tiny.SD15, image, threshold=1.0)
    assert torch.isfinite(found.latent).all()


@pytest.mark.parametrize("strength", [0.01, 0.3, 0.5, 1.0])
def test_strength_is_a_fraction_of_the_steps(strength):
    sigmas = torch.arange(20, -1, -1).float()
    part = core.partial_sigmas(sigmas, strength)
    assert len(part) - 1 == max(1, round(20 * strength))
    assert part[-1] == 0


# ---------------------------------------------------------------- the nodes

DEFAULTS = {
    "edit_text": "a green dog", "seed": 3, "steps": 4, "cfg": 4.0, "sampler_name": "euler", "scheduler": "normal",
    "strength": 0.5, "rounds": 2, "related": 0.9, "unrelated": 0.6, "threshold": 0.2,
}  # fmt: skip


def node(demo, kind=InstDiffEditSampler, latent=None, **changes):
    model, clip, _ = demo
    negative = clip.encode_from_tokens_scheduled(clip.tokenize(""))
    given = {**DEFAULTS, "negative": negative, "latent_image": latent or picture(1, 32, 24), **changes}
    return kind.execute(model=model, clip=clip, **given).args


def test_the_inputs_are_those_of_the_contract():
    names = [
        "model", "clip", "edit_text", "negative", "latent_image", "seed", "steps", "cfg", "sampler_name", "scheduler",
        "strength", "rounds", "related", "unrelated", "threshold",
    ]  # fmt: skip
    for kind in (InstDiffEditSampler, InstDiffEditMask):
        assert [entry.id for entry in kind.define_schema().inputs] == names
    assert [output.display_name for output in InstDiffEditSampler.define_schema().outputs] == [
        "mask", "latent", "step_masks",
    ]  # fmt: skip


def test_masks_come_in_pixels_picture_after_picture_and_the_latent_keeps_what_it_says(demo):
    image = picture(2, 32, 24) | {"batch_index": [4, 7]}
    mask, latent, steps = node(demo, latent=image)
    assert mask.shape == (2, 256, 192)
    assert steps.shape == (4, 256, 192)
    assert torch.equal(steps[[1, 3]], mask)
    assert latent["samples"].shape == image["samples"].shape
    assert latent["batch_index"] == [4, 7]
    (alone,) = node(demo, InstDiffEditMask, latent=image)
    assert torch.equal(alone, mask)


def test_weights_condition_and_do_not_move_words(demo):
    plain, weighted = (node(demo, edit_text=text)[1]["samples"] for text in ("a green dog", "a (green:1.5) dog"))
    assert not torch.equal(plain, weighted)
    places = [written_words(read_prompt(demo[1], text)) for text in ("a green dog", "a (green:1.5) dog")]
    assert places[0] == places[1]


def test_a_prompt_of_several_chunks_works(demo):
    mask, latent, _ = node(demo, edit_text=" ".join(["a red figure and"] * 30) + " a blue car")
    assert mask.shape == (1, 256, 192)
    assert torch.isfinite(latent["samples"]).all()


@pytest.mark.parametrize("text", ["☃", "🐶", "x", "!", "�"])
def test_a_text_of_one_unknown_symbol_has_an_answer(demo, text):
    mask, latent, _ = node(demo, edit_text=text)
    assert torch.isfinite(mask).all()
    assert torch.isfinite(latent["samples"]).all()


@pytest.mark.parametrize("strength", [0.01, 1.0])
def test_the_least_and_the_most_strength_have_an_answer(demo, strength):
    _, latent, steps = node(demo, strength=strength)
    assert len(steps) == max(1, int(4 * strength))
    assert torch.isfinite(latent["samples"]).all()


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"edit_text": ""}, r"edit_text: there is no word in ''"),
        ({"edit_text": " \n"}, "edit_text: there is no word"),
        ({"edit_text": "()"}, "edit_text: there is no word"),
        ({"strength": 0.0}, "strength: 0.0 is out of range"),
        ({"strength": 1.1}, "strength: 1.1 is out of range"),
        ({"rounds": 0}, "rounds: 0 is out of range; accepted are numbers from 1"),
        ({"threshold": 1.0}, "threshold: 1.0 is out of range"),
        ({"related": 0.5, "unrelated": 0.6}, "unrelated: 0.6 is above related, 0.5"),
        ({"sampler_name": "heun"}, "sampler_name: heun does not show its own latent"),
        ({"sampler_name": "best"}, "sampler_name: 'best' is unknown"),
        ({"scheduler": "best"}, "scheduler: 'best' is unknown"),
        ({"negative": []}, "negative: the conditioning is empty"),
        ({"latent": picture(1, 4, 4)}, r"latent_image: the picture is 32 × 32 pixels, of which .* 2 × 2 places.* 64"),
        ({"latent": {"samples": torch.full((1, 4, 32, 24), math.nan)}}, "latent_image: it holds NaN"),
        ({"latent": {"samples": torch.zeros(1, 3, 32, 24) + 1}}, "latent_image: its shape"),
    ],
)
def test_what_does_not_fit_gets_a_sentence(demo, changes, words):
    with pytest.raises(ValueError, match=words):
        node(demo, **changes)


def test_a_clip_of_another_model_gets_a_sentence(demo, model):
    negative = [[torch.zeros(1, 77, tiny.WIDTH), {}]]
    with pytest.raises(ValueError, match="clip: its texts are 128 wide"):
        node((model, demo[1], None), negative=negative)


def test_the_spec_is_immutable():
    with pytest.raises(dataclasses.FrozenInstanceError):
        spec().rounds = 4
