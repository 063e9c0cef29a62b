"""Feature blending beside all else that a graph may hold: LoRA, ControlNet, other packs' patches, areas, masks."""

from __future__ import annotations

import comfy.controlnet
import comfy.hooks
import comfy.model_management
import comfy.samplers
import comfy.sd
import pytest
import torch
from comfy.cldm.cldm import ControlNet
from comfy.ldm.modules.attention import optimized_attention

from scalpel.tests import tiny

pytestmark = [
    pytest.mark.usefixtures("inference"),
    pytest.mark.filterwarnings("ignore:Should have"),  # torchsde's remark on its last step
]
KIND = tiny.SD15
SMALL = tiny.latent(16, 8)


@pytest.fixture(scope="module")
def alone(model):
    """The edit with nothing else in the graph."""
    with torch.inference_mode():
        return tiny.edit(model, KIND, latent_image=SMALL)


# ---------------------------------------------------------------- LoRA


def _lora(model, which, seed=20):
    lora = {}
    for key, weight in model.model_state_dict("diffusion_model.").items():
        if which in key and key.endswith(".weight"):
            name, inputs = key.removesuffix(".weight"), weight[0].numel()
            lora[f"{name}.lora_up.weight"] = tiny.randn(weight.shape[0], 2, seed=seed) / 2
            lora[f"{name}.lora_down.weight"] = tiny.randn(2, inputs, seed=seed + 1) / inputs**0.5
    assert lora
    return lora


def _with_lora(model, which):
    return comfy.sd.load_lora_for_models(model, None, _lora(model, which), 1.0, 0.0)[0]


def test_a_lora_before_the_node_changes_source_and_edit(model, alone):
    with_lora = _with_lora(model, "attn")
    output = tiny.edit(with_lora, KIND, latent_image=SMALL)
    assert tiny.relative(output.source, alone.source) > 1e-2
    assert tiny.relative(output.source, tiny.plain(with_lora, KIND, latent_image=SMALL)) < 1e-5
    assert torch.equal(tiny.edit(model, KIND, latent_image=SMALL).edited, alone.edited)


@pytest.mark.parametrize("which", ["attn2.to_q", "attn2.to_k"])
def test_the_map_is_made_by_the_weights_with_the_lora(which, model):
    """One evaluation, no step before it: source features differ only by the weights that make the map."""
    settings = {"latent_image": SMALL, "steps": 1, "cfg": 1.0, "layers": "input.1"}
    patched = _with_lora(model, f"input_blocks.1.1.transformer_blocks.0.{which}")
    assert not torch.equal(tiny.edit(patched, KIND, **settings).mask, tiny.edit(model, KIND, **settings).mask)


def test_a_lora_on_a_branch_after_the_node_gives_what_it_gives_without_it(model):
    expected = tiny.plain(_with_lora(model, "attn"), KIND, latent_image=SMALL)
    tiny.edit(model, KIND, latent_image=SMALL)
    assert torch.equal(tiny.plain(_with_lora(model, "attn"), KIND, latent_image=SMALL), expected)


def _standing_still(model, x, sigmas, extra_args=None, callback=None, disable=None, noise_sampler=None):
    """Evaluates every sigma at the same x."""
    for sigma in sigmas[:-1]:
        model(x, sigma * x.new_ones(len(x)), **extra_args)
    return x


def test_keys_of_the_token_follow_a_lora_whose_strength_is_scheduled(model):
    lora = _lora(model, "attn2.to_k")
    hooks = comfy.hooks.create_hook_lora(lora, 1.0, 0.0)
    keyframes = comfy.hooks.HookKeyframeGroup()
    for strength, start in ((0.0, 0.0), (1.0, 0.5)):
        keyframes.add(comfy.hooks.HookKeyframe(strength=strength, start_percent=start))
    hooks.set_keyframes_on_hooks(keyframes)
    prompts = {
        name: comfy.hooks.set_hooks_for_conditioning(tiny.prompt(KIND, seed), hooks)
        for name, seed in (("source", 1), ("edit", 2), ("negative", 3))
    }
    settings = {"latent_image": SMALL, "blend_until": 0.0, "steps": 4, "cfg": 1.0}
    settings["sampler"] = comfy.samplers.KSAMPLER(_standing_still)
    without = tiny.edit(model, KIND, **settings).step_masks
    static = tiny.edit(_with_lora(model, "attn2.to_k"), KIND, **settings).step_masks
    scheduled = tiny.edit(model, KIND, **prompts, **settings).step_masks
    sampling = model.get_model_object("model_sampling")
    late = tiny.sigmas(model, 4)[:-1] <= sampling.percent_to_sigma(0.5)
    assert late.tolist() not in ([True] * 4, [False] * 4)
    for step, is_late in enumerate(late):
        expected, other = (static, without) if is_late else (without, static)
        assert (scheduled[step] - expected[step]).abs().mean() < 1e-4
        assert (scheduled[step] - other[step]).abs().mean() > 1e-2


# ---------------------------------------------------------------- ControlNet


@pytest.fixture(scope="module")
def controlnet():
    config = {key: value for key, value in KIND.unet.items() if key not in ("out_channels", "transformer_depth_output")}
    network = ControlNet(hint_channels=3, num_heads=2, device=torch.device("cpu"), **config)
    weights = tiny.random_weights(network, seed=5)
    outputs = ("zero_convs", "middle_block_out")
    network.load_state_dict({k: v * (3.0 if k.startswith(outputs) else 1.0) for k, v in weights.items()})
    device = comfy.model_management.get_torch_device()
    return comfy.controlnet.ControlNet(network, load_device=device)


def _controlled(conditioning, controlnet, seed=30, uncond=True):
    """As ControlNetApplyAdvanced does it."""
    hint = tiny.randn(1, 3, 128, 64, seed=seed).sigmoid()
    return tiny.with_options(
        conditioning, control=controlnet.copy().set_cond_hint(hint, 1.0, (0.0, 1.0)), control_apply_to_uncond=uncond
    )


@pytest.mark.parametrize("uncond", [True, False])
def test_a_controlnet_on_both_prompts_acts_on_the_source_as_in_an_ordinary_run(uncond, model, controlnet, alone):
    source = _controlled(tiny.prompt(KIND, 1), controlnet, uncond=uncond)
    edit = _controlled(tiny.prompt(KIND, 2), controlnet, uncond=uncond)
    output = tiny.edit(model, KIND, source=source, edit=edit, latent_image=SMALL)
    assert tiny.relative(output.source, tiny.plain(model, KIND, positive=source, latent_image=SMALL)) < 1e-4
    assert tiny.relative(output.source, alone.source) > 1e-2
    assert tiny.relative(output.edited, alone.edited) > 1e-2


def test_a_controlnet_on_the_edit_alone_leaves_the_source_bit_for_bit(model, controlnet, alone):
    output = tiny.edit(model, KIND, edit=_controlled(tiny.prompt(KIND, 2), controlnet), latent_image=SMALL)
    assert torch.equal(output.source, alone.source)
    assert tiny.relative(output.edited, alone.edited) > 1e-2


def test_different_controlnets_on_source_and_edit_each_act_on_their_own(model, controlnet):
    source = _controlled(tiny.prompt(KIND, 1), controlnet, seed=31)
    edit = _controlled(tiny.prompt(KIND, 2), controlnet, seed=32)
    output = tiny.edit(model, KIND, source=source, edit=edit, latent_image=SMALL, blend_until=0.0)
    assert tiny.relative(output.source, tiny.plain(model, KIND, positive=source, latent_image=SMALL)) < 1e-4
    assert tiny.relative(output.edited, tiny.plain(model, KIND, positive=edit, latent_image=SMALL)) < 1e-4


def test_three_edits_with_a_controlnet_are_each_what_they_are_alone(model, controlnet):
    edits = [[tiny.prompt(KIND, 2)[0][0].repeat(3, 1, 1), {}]]
    output = tiny.edit(model, KIND, edit=_controlled(edits, controlnet), latent_image=SMALL)
    one = tiny.edit(model, KIND, edit=_controlled(tiny.prompt(KIND, 2), controlnet), latent_image=SMALL)
    assert tiny.relative(output.edited, one.edited.expand_as(output.edited)) < 1e-4


# ---------------------------------------------------------------- patches and guidance of other packs


def _halved_keys(q, k, v, options):
    """Needs whole chunks, as IPAdapter does."""
    chunks = len(options["cond_or_uncond"])
    assert len(q) % chunks == 0
    return optimized_attention(q, k * 0.5, v, options["n_heads"])


def test_another_pack_s_attn2_replacement_keeps_working(model, alone):
    patched = model.clone()
    for block, number in (("input", 4), ("middle", 0), ("output", 5), ("output", 11)):
        patched.set_model_attn2_replace(_halved_keys, block, number)
    output = tiny.edit(patched, KIND, latent_image=SMALL)
    assert tiny.relative(output.source, alone.source) > 1e-3
    assert tiny.relative(output.source, tiny.plain(patched, KIND, latent_image=SMALL)) < 1e-5
    same = tiny.prompt(KIND, 1)
    output = tiny.edit(patched, KIND, source=same, edit=same, latent_image=SMALL)
    assert torch.equal(output.edited, output.source)


def test_other_packs_patches_run_before_ours_and_stay(model, alone):
    calls = []

    def doubled(n, options):
        calls.append(1)
        return n * 1.5

    patched = model.clone()
    patched.set_model_attn2_output_patch(doubled)
    output = tiny.edit(patched, KIND, latent_image=SMALL)
    assert len(calls) == 16 * 3
    assert tiny.relative(output.source, tiny.plain(patched, KIND, latent_image=SMALL)) < 1e-5
    assert tiny.relative(output.edited, alone.edited) > 1e-3


def test_a_guidance_that_calls_the_model_again_leaves_the_map_as_it_was(model, alone):
    """As Perturbed-Attention Guidance does: the prompt again, with a patched copy of the options, at the same sigma."""

    def identity(q, k, v, options):
        return v

    def perturbed(args):
        options = comfy.model_patcher.set_model_options_patch_replace(
            args["model_options"].copy(), identity, "attn1", "middle", 0
        )
        (again,) = comfy.samplers.calc_cond_batch(args["model"], [args["cond"]], args["input"], args["sigma"], options)
        return args["denoised"] + (args["cond_denoised"] - again)

    patched = model.clone()
    patched.set_model_sampler_post_cfg_function(perturbed)
    output = tiny.edit(patched, KIND, latent_image=SMALL)
    assert torch.equal(output.step_masks[0], alone.step_masks[0])
    assert tiny.relative(output.source, tiny.plain(patched, KIND, latent_image=SMALL)) < 1e-5
    assert tiny.relative(output.source, alone.source) > 1e-4


# ---------------------------------------------------------------- prompts: lengths, areas, schedules


def test_prompts_of_different_lengths_give_what_the_repeated_ones_give(model):
    long = tiny.prompt(KIND, 2, length=154)
    repeated = [[tiny.prompt(KIND, 1)[0][0].repeat(1, 2, 1), {}]]
    ours = tiny.edit(model, KIND, edit=long, latent_image=SMALL)
    explicit = tiny.edit(model, KIND, source=repeated, edit=long, latent_image=SMALL)
    assert torch.equal(ours.edited, explicit.edited)
    assert tiny.relative(ours.source, tiny.plain(model, KIND, latent_image=SMALL)) < 1e-4


def test_an_edit_limited_to_an_area_is_found_and_blended_there(model, alone):
    area = (8, 8, 4, 0)
    output = tiny.edit(model, KIND, edit=tiny.with_options(tiny.prompt(KIND, 2), area=area), latent_image=SMALL)
    assert torch.isfinite(output.edited).all()
    assert output.step_masks[:, 32:96].max() > 0.5
    assert output.step_masks[:, :32].count_nonzero() == output.step_masks[:, 96:].count_nonzero() == 0


def test_two_areas_that_cover_the_picture_have_one_map(model):
    halves = [tiny.with_options(tiny.prompt(KIND, 2), area=(8, 8, top, 0))[0] for top in (0, 8)]
    output = tiny.edit(model, KIND, edit=halves, latent_image=SMALL)
    assert torch.isfinite(output.edited).all()
    assert output.step_masks[0, :64].max() > 0.5
    assert output.step_masks[0, 64:].max() > 0.5


def test_an_area_beside_the_whole_prompt_leaves_the_map_to_the_whole(model, alone):
    edits = [tiny.prompt(KIND, 2)[0], tiny.with_options(tiny.prompt(KIND, 4), area=(8, 8, 4, 0))[0]]
    output = tiny.edit(model, KIND, edit=edits, latent_image=SMALL)
    assert (output.step_masks[0] - alone.step_masks[0]).abs().mean() < 1e-4
    assert tiny.relative(output.edited, alone.edited) > 1e-3


def test_same_prompts_with_an_area_and_a_mask_stay_the_same_picture(model):
    same = tiny.with_options(tiny.prompt(KIND, 1), area=(8, 8, 4, 0))
    masked = tiny.with_options(tiny.prompt(KIND, 4), mask=torch.rand(1, 16, 8), strength=1.0)
    prompts = [*same, *masked]
    output = tiny.edit(model, KIND, source=prompts, edit=prompts, latent_image=SMALL)
    assert tiny.relative(output.edited, output.source) < 1e-5  # not bit for bit: the crop ends in layers of 1 × 1


def test_prompts_that_take_turns_are_all_used_for_the_map(model):
    turns = [
        tiny.with_options(tiny.prompt(KIND, seed), start_percent=start, end_percent=end)[0]
        for seed, start, end in ((1, 0.0, 0.5), (4, 0.5, 1.0))
    ]
    output = tiny.edit(model, KIND, source=turns, latent_image=SMALL, steps=4)
    first_half = tiny.edit(model, KIND, latent_image=SMALL, steps=4)
    assert torch.equal(output.step_masks[0], first_half.step_masks[0])
    assert all(not torch.equal(a, b) for a, b in zip(output.step_masks, output.step_masks[1:], strict=False))
    assert tiny.relative(output.source, tiny.plain(model, KIND, positive=turns, latent_image=SMALL, steps=4)) < 1e-4


# ---------------------------------------------------------------- what a LATENT says besides


@pytest.mark.parametrize("sampler", ["euler", "ddim", "dpmpp_sde"])
def test_outside_a_noise_mask_source_and_edit_keep_the_latent(sampler, model):
    image = {"samples": tiny.randn(1, 4, 16, 8, seed=40), "noise_mask": torch.zeros(1, 1, 128, 64)}
    image["noise_mask"][..., :32] = 1
    output = tiny.edit(model, KIND, latent_image=image, sampler_name=sampler)
    for samples in (output.edited, output.source):
        assert torch.allclose(samples[..., 4:], image["samples"][..., 4:], atol=1e-5)
        assert (samples[..., :4] - image["samples"][..., :4]).abs().mean() > 0.5
    if sampler != "ddim":  # ComfyUI's ddim draws another noise for what lies outside; the pair shares the run's own
        assert tiny.relative(output.source, tiny.plain(model, KIND, latent_image=image, sampler_name=sampler)) < 1e-4
    same = tiny.prompt(KIND, 1)
    again = tiny.edit(model, KIND, latent_image=image, sampler_name=sampler, source=same, edit=same)
    assert torch.equal(again.edited, again.source)


def test_a_batch_has_one_noise_mask_per_picture(model):
    image = {"samples": tiny.randn(2, 4, 16, 8, seed=41), "noise_mask": torch.zeros(2, 1, 16, 8)}
    image["noise_mask"][0, ..., :4] = 1
    image["noise_mask"][1, ..., 4:] = 1
    output = tiny.edit(model, KIND, latent_image=image)
    for samples in (output.edited, output.source):
        assert torch.allclose(samples[0, ..., 4:], image["samples"][0, ..., 4:], atol=1e-5)
        assert torch.allclose(samples[1, ..., :4], image["samples"][1, ..., :4], atol=1e-5)


@pytest.mark.parametrize(("pictures", "masks"), [(1, 2), (3, 2)])
def test_other_numbers_of_noise_masks_go_round_the_same_for_source_and_edit(pictures, masks, model):
    few = torch.zeros(masks, 1, 16, 8)
    few[0, ..., :4], few[1, ..., 4:] = 1, 1
    image = {"samples": tiny.randn(pictures, 4, 16, 8, seed=41), "noise_mask": few}
    each = {**image, "noise_mask": few[[0, 1, 0][:pictures]]}
    output, expected = (tiny.edit(model, KIND, latent_image=latent) for latent in (image, each))
    assert torch.equal(output.edited, expected.edited)
    assert torch.equal(output.source, expected.source)


def test_a_batch_index_takes_the_noise_of_that_place(model, alone):
    image = {**SMALL, "batch_index": [3]}
    output = tiny.edit(model, KIND, latent_image=image)
    fourth = tiny.edit(model, KIND, latent_image=tiny.latent(16, 8, 4))
    assert tiny.relative(output.edited[0], fourth.edited[3]) < 1e-4
    assert tiny.relative(output.edited, alone.edited) > 0.1
