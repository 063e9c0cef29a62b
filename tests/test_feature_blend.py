"""Feature blending on SD1.5- and SDXL-shaped models: the source is untouched, the edit goes where the mask lets it."""

from __future__ import annotations

import comfy.sample
import pytest
import torch
import torch.nn.functional as F

from scalpel.nodes.feature_blend import EditBatch, FeatureBlendSampler
from scalpel.tests import tiny

KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
KIND = tiny.SD15
pytestmark = pytest.mark.usefixtures("inference")
SMALL = tiny.latent(16, 8)


# ---------------------------------------------------------------- models, sizes, batches, precisions


@pytest.mark.parametrize("name", KINDS)
def test_a_latent_that_is_not_square_is_edited(name):
    kind = KINDS[name]
    patcher = tiny.model(kind)
    output = tiny.edit(patcher, kind, latent_image=tiny.latent(40, 24), steps=2)
    alone = tiny.plain(patcher, kind, latent_image=tiny.latent(40, 24), steps=2)
    assert output.edited.shape == output.source.shape == (1, 4, 40, 24)
    assert tiny.relative(output.source, alone) < 1e-5
    assert tiny.relative(output.edited, output.source) > 1e-2
    size = (320, 192) if kind is tiny.SD15 else (1322, 793)  # SDXL: the area of 1024 × 1024
    assert output.step_masks.shape == (2, *size)
    assert output.mask.shape == (1, *size)
    assert output.step_masks.min() >= 0
    assert output.step_masks.max() <= 1


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("name", KINDS)
def test_half_precision_models_are_edited(name, dtype):
    kind = KINDS[name]
    patcher = tiny.model(kind, dtype)
    settings = {"latent_image": SMALL, "steps": 2, "cfg": 1.5}
    output = tiny.edit(patcher, kind, **settings)
    assert torch.isfinite(output.edited).all()
    assert torch.isfinite(output.step_masks).all()
    assert tiny.relative(output.source, tiny.plain(patcher, kind, **settings)) < 0.02
    same = tiny.prompt(kind, 1)
    output = tiny.edit(patcher, kind, **settings, source=same, edit=same)
    assert torch.equal(output.edited, output.source)


def _repeated(noise, times):
    class Repeated(tiny.SeededNoise):
        def generate_noise(self, image):
            return noise.generate_noise({"samples": image["samples"][:1]}).repeat(times, 1, 1, 1)

    return Repeated(noise.seed)


def test_the_source_is_bit_for_bit_an_ordinary_run_of_as_many_rows(model):
    output = tiny.edit(model, KIND)
    twice = tiny.plain(model, KIND, latent_image=tiny.latent(batch=2), noise=_repeated(tiny.SeededNoise(), 2))
    assert torch.equal(output.source, twice[:1])


def test_cond_and_uncond_in_two_calls_give_the_same_as_in_one(model):
    together, apart = tiny.edit(model, KIND), tiny.edit(tiny.short_of_memory(model), KIND)
    assert tiny.relative(apart.edited, together.edited) < 1e-4
    assert tiny.relative(apart.source, together.source) < 1e-4
    assert (apart.step_masks - together.step_masks).abs().mean() < 1e-3


def _batch(*seeds):
    edits = tiny.prompt(KIND, seeds[0])
    for seed in seeds[1:]:
        (edits,) = EditBatch.execute(edits, tiny.prompt(KIND, seed)).args
    return edits


def test_three_edits_of_one_source_are_each_what_they_are_alone(model):
    together = tiny.edit(model, KIND, edit=_batch(2, 4, 5))
    assert together.edited.shape == (3, 4, 24, 16)
    assert together.source.shape == (1, 4, 24, 16)
    for edited, seed in zip(together.edited, (2, 4, 5), strict=True):
        alone = tiny.edit(model, KIND, edit=tiny.prompt(KIND, seed))
        assert tiny.relative(edited, alone.edited[0]) < 1e-4


def test_one_edit_of_three_sources_and_three_edits_of_three_sources_pair_row_by_row(model):
    image, noise = tiny.latent(16, 8, 3), tiny.SeededNoise()
    one = tiny.edit(model, KIND, latent_image=image, noise=noise)
    three = tiny.edit(model, KIND, latent_image=image, noise=noise, edit=_batch(2, 4, 2))
    assert one.edited.shape == three.edited.shape == three.source.shape == (3, 4, 16, 8)
    assert one.mask.shape[0] == 3
    assert one.step_masks.shape[0] == 9
    assert tiny.relative(three.edited[[0, 2]], one.edited[[0, 2]]) < 1e-4
    assert tiny.relative(three.edited[1], one.edited[1]) > 1e-2
    assert tiny.relative(three.source, tiny.plain(model, KIND, latent_image=image, noise=noise)) < 1e-4


def test_batch_sizes_that_do_not_pair_are_refused_with_both_numbers(model):
    with pytest.raises(ValueError, match="batch sizes do not pair: 3 edits and 2 latents; accepted are"):
        tiny.edit(model, KIND, edit=_batch(2, 4, 5), latent_image=tiny.latent(16, 8, 2))


# ---------------------------------------------------------------- the mask decides


def test_without_blending_the_edit_is_an_ordinary_run_of_its_prompt(model):
    output = tiny.edit(model, KIND, blend_until=0.0)
    alone = tiny.plain(model, KIND, positive=tiny.prompt(KIND, 2))
    assert tiny.relative(output.edited, alone) < 1e-5


def test_a_mask_that_is_one_everywhere_is_no_blending(model):
    everywhere = tiny.edit(model, KIND, mask=torch.ones(1, 192, 128))
    unblended = tiny.edit(model, KIND, blend_until=0.0)
    assert torch.equal(everywhere.edited, unblended.edited)
    assert torch.equal(everywhere.mask, torch.ones(1, 192, 128))


def test_the_first_step_never_blends_so_one_step_is_no_blending(model):
    output = tiny.edit(model, KIND, steps=1)
    assert tiny.relative(output.edited, tiny.plain(model, KIND, positive=tiny.prompt(KIND, 2), steps=1)) < 1e-5
    assert output.step_masks.shape == (1, 192, 128)


def _box():
    mask = torch.zeros(1, 192, 128)
    mask[:, :64, :64] = 1
    return mask


def test_outside_a_small_mask_the_edit_stays_near_the_source(model):
    # the first step is never blended, so a run is started from a latent with little noise
    image = {"samples": tiny.randn(1, 4, 24, 16, seed=11)}
    settings = {"latent_image": image, "sigmas": tiny.sigmas(model, 12)[-6:]}
    boxed = tiny.edit(model, KIND, mask=_box(), **settings)
    free = tiny.edit(model, KIND, blend_until=0.0, **settings)
    outside = F.max_pool2d(_box()[None], 8)[0, 0] == 0

    def change(output):
        return (output.edited - output.source)[0, :, outside].square().mean().sqrt()

    assert change(boxed) < 0.5 * change(free)
    inside = (boxed.edited - boxed.source)[0, :, ~outside].square().mean().sqrt()
    assert inside > 1.5 * change(boxed)


@pytest.mark.parametrize(("until", "blended"), [(0.0, 0), (0.4, 1), (0.6, 2), (0.8, 3), (1.0, 4)])
def test_steps_from_1_to_before_t_e_blend(until, blended, model):
    """With a mask of (almost) nothing, a blended attention output of the edit is that of the source."""
    seen = {}

    def look(n, options):
        edited, source = n.chunk(2)
        seen.setdefault(float(options["sigmas"][0]), []).append(torch.equal(edited, source))
        return n

    nothing = torch.full((1, 128, 64), 1e-30)
    watched = model.clone()
    watched.add_wrapper_with_key("predict_noise", "look", _installing(look))
    tiny.edit(watched, KIND, steps=5, cfg=1.0, latent_image=SMALL, mask=nothing, blend_until=until)
    steps = [all(seen[sigma]) for sigma in sorted(seen, reverse=True)]
    assert steps == [False, *[True] * blended, *[False] * (4 - blended)]


def _installing(patch):
    """A wrapper that puts a patch behind all others, so that it sees what they made."""

    def wrapper(executor, x, timestep, model_options, seed):
        patches = model_options["transformer_options"]["patches"]
        patches["attn2_output_patch"] = [p for p in patches["attn2_output_patch"] if p is not patch] + [patch]
        return executor(x, timestep, model_options, seed)

    return wrapper


def test_a_user_s_mask_replaces_the_token_s_at_any_size(model):
    replaced = tiny.edit(model, KIND, mask=_box())
    assert torch.equal(replaced.mask, _box())
    without_token = tiny.edit(model, KIND, mask=_box(), part_token=None)
    assert torch.equal(without_token.edited, replaced.edited)
    larger = F.interpolate(_box()[None], scale_factor=2)[0]
    assert tiny.relative(tiny.edit(model, KIND, mask=larger).edited, replaced.edited) < 1e-2
    assert torch.equal(tiny.edit(model, KIND, mask=_box()[0]).edited, replaced.edited)


def test_a_user_s_mask_multiplied_limits_the_token_s(model):
    token_alone = tiny.edit(model, KIND)
    ones = tiny.edit(model, KIND, mask=torch.ones(1, 192, 128), mask_mode="multiply")
    boxed = tiny.edit(model, KIND, mask=_box(), mask_mode="multiply")
    assert torch.equal(ones.edited, token_alone.edited)
    assert torch.equal(boxed.step_masks[0], token_alone.step_masks[0] * _box()[0])
    assert tiny.relative(boxed.edited, token_alone.edited) > 1e-3


def test_each_source_of_a_batch_may_have_its_own_mask(model):
    image, noise = tiny.latent(batch=2), tiny.SeededNoise()
    masks = torch.cat([_box(), _box().flip(-1)])
    both = tiny.edit(model, KIND, latent_image=image, noise=noise, mask=masks)
    first = tiny.edit(model, KIND, latent_image=image, noise=noise, mask=masks[:1])
    assert torch.equal(both.mask, masks)
    assert torch.equal(both.edited[0], first.edited[0])
    assert tiny.relative(both.edited[1], first.edited[1]) > 1e-3


@pytest.mark.parametrize(
    "setting", [{"omega": 0.5}, {"layers": "middle"}, {"padding": "none"}, {"part_token": tiny.token(51)}]
)
def test_every_setting_of_the_token_changes_its_mask(setting, model):
    base = tiny.edit(model, KIND, latent_image=SMALL, steps=1, cfg=1.0)
    other = tiny.edit(model, KIND, latent_image=SMALL, steps=1, cfg=1.0, **setting)
    assert not torch.equal(other.mask, base.mask)


# ---------------------------------------------------------------- the simple node


def test_the_simple_node_is_the_advanced_one_with_ksampler_s_noise_and_schedule(model):
    prompts = {"source": tiny.prompt(KIND, 1), "edit": tiny.prompt(KIND, 2), "negative": tiny.prompt(KIND, 3)}
    image = {"samples": tiny.randn(1, 4, 16, 8, seed=12)}
    edited, source, mask, step_masks = FeatureBlendSampler.execute(
        model, **prompts, latent_image=image, seed=5, steps=4, cfg=3.0, sampler_name="euler", scheduler="karras",
        denoise=0.7, omega=1.0, blend_until=1.0, layers="official", padding="background", part_token=tiny.token(),
    ).args  # fmt: skip
    alone = comfy.sample.sample(
        model, comfy.sample.prepare_noise(image["samples"], 5), 4, 3.0, "euler", "karras", prompts["source"],
        prompts["negative"], image["samples"], denoise=0.7, seed=5, disable_pbar=True,
    )  # fmt: skip
    assert tiny.relative(source["samples"], alone) < 1e-5
    assert tiny.relative(edited["samples"], alone) > 1e-2
    assert mask.shape == (1, 128, 64)
    assert step_masks.shape == (4, 128, 64)


def test_the_outputs_are_latents_that_keep_what_the_input_said_of_their_rows(model):
    image = {**SMALL, "type": "whatever", "batch_index": [4], "noise_mask": torch.ones(1, 1, 16, 8)}
    edited, source, _, _ = FeatureBlendSampler.execute(
        model, tiny.prompt(KIND, 1), _batch(2, 4), tiny.prompt(KIND, 3), image, 5, 1, 1.0, "euler", "normal", 1.0, 1.0,
        1.0, "all", "zero", part_token=tiny.token(),
    ).args  # fmt: skip
    assert edited["samples"].shape[0] == 2
    assert edited["batch_index"] == [4, 4]
    assert source["batch_index"] == [4]
    assert edited["type"] == source["type"] == "whatever"
