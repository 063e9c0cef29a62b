"""CPAM beside all else that a graph may hold: LoRA, ControlNet, other packs' patches, guidance, areas, samplers."""

from __future__ import annotations

import comfy.samplers
import comfy.sd
import pytest
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_pag import PerturbedAttentionGuidance

from scalpel.core.unet.attention import attention
from scalpel.core.unet.layers import layer_table
from scalpel.core.unet.replay import start_latent
from scalpel.nodes.trajectories import RecordTrajectory
from scalpel.tests import tiny
from scalpel.tests.test_cpam import (
    MASK,
    ByHand,
    H,
    W,
    batch,
    by_hand,
    cross,
    halves,
    inverted,
    own,
    region,
    sampled,
    spec,
)
from scalpel.tests.test_rider import Control

KIND = tiny.SD15
pytestmark = [
    pytest.mark.usefixtures("inference"),
    pytest.mark.filterwarnings("ignore:Should have"),  # torchsde's remark on its last step
]


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
def alone(model, trajectory):
    """The run with both patches and nothing else in the graph."""
    with torch.inference_mode():
        return sampled(both(model, trajectory), trajectory)


def both(patcher, trajectory, **changes):
    """CPAM's two patches and a region, the mask refined."""
    patched, _ = cross(own(patcher, trajectory)[0], refine=True, **changes)
    return region(patched, halves()[0])


def with_self(patcher, trajectory, hand_on, **settings):
    """(CPAM Self-Attention on `patcher`, the same written out on `hand_on`), sampled."""
    patched, _ = own(patcher, trajectory)
    made = sampled(patched, trajectory, **settings)
    return made, by_hand(hand_on, trajectory, MASK, spec(patched).target_mask, **settings)


# ---------------------------------------------------------------- runs and clones


def test_the_model_gives_the_same_bits_before_and_after_and_so_do_two_runs(model, trajectory, ordinary, alone):
    patched = both(model, trajectory)
    assert torch.equal(sampled(patched, trajectory), alone)
    assert torch.equal(sampled(patched, trajectory), alone)
    assert torch.equal(sampled(patched.clone(), trajectory), alone)
    assert torch.equal(sampled(model, trajectory), ordinary)
    assert tiny.relative(alone, ordinary) > 1e-2


def test_a_clone_made_before_a_patch_does_not_have_it(model, trajectory, ordinary):
    one = region(model, halves()[0])
    expected = sampled(one, trajectory)
    two = region(one, halves()[1], seed=6)
    assert tiny.relative(sampled(two, trajectory), expected) > 1e-3
    assert torch.equal(sampled(one, trajectory), expected)
    assert torch.equal(sampled(model, trajectory), ordinary)


# ---------------------------------------------------------------- LoRA


def lora(model, which="attn", seed=20):
    found = {}
    for key, weight in model.model_state_dict("diffusion_model.").items():
        if which in key and key.endswith(".weight"):
            name, inputs = key.removesuffix(".weight"), weight[0].numel()
            found[f"{name}.lora_up.weight"] = tiny.randn(weight.shape[0], 2, seed=seed) / 2
            found[f"{name}.lora_down.weight"] = tiny.randn(2, inputs, seed=seed + 1) / inputs**0.5
    assert found
    return found


def with_lora(patcher, model):
    return comfy.sd.load_lora_for_models(patcher, None, lora(model), 1.0, 0.0)[0]


def test_a_lora_before_and_after_the_patches_is_the_same(model, trajectory, alone):
    before = sampled(both(with_lora(model, model), trajectory), trajectory)
    after = sampled(with_lora(both(model, trajectory), model), trajectory)
    assert torch.equal(before, after)
    assert tiny.relative(after, alone) > 1e-2
    assert torch.equal(sampled(both(model, trajectory), trajectory), alone)  # its weights are the model's own again


def test_a_lora_acts_on_the_source_and_on_null_too(model, trajectory):
    changed = with_lora(model, model)
    patched, _ = cross(own(changed, trajectory)[0])
    expected = by_hand(changed, trajectory, MASK, spec(patched).target_mask, null=tiny.prompt(KIND, 9), crossed=MASK)
    assert tiny.relative(sampled(patched, trajectory), expected) < 2e-5


# ---------------------------------------------------------------- ControlNet


@pytest.mark.parametrize("to_all", [False, True])
def test_a_controlnet_of_the_edit_does_not_reach_the_source(to_all, model, trajectory):
    control, counted = Control(1.0), tiny.CountedCalls()
    prompt = tiny.with_options(tiny.prompt(KIND, 2), control=control, control_apply_to_uncond=to_all)
    patched, _ = own(counted.attach(model), trajectory)
    made = sampled(patched, trajectory, positive=prompt)
    assert sum(control.rows) == (6 if to_all else 3)
    assert counted.rows_per_sigma() == dict.fromkeys(trajectory.sigmas[:-1].tolist(), 3)
    expected = by_hand(model, trajectory, MASK, spec(patched).target_mask, positive=prompt)
    assert tiny.relative(made, expected) < 2e-5
    assert tiny.relative(made, sampled(own(model, trajectory)[0], trajectory)) > 1e-3


# ---------------------------------------------------------------- patches of other packs


def softer(q, k, v, options):
    """Needs whole chunks, as IPAdapter does; called for every row, the source's too."""
    assert len(q) % len(options["cond_or_uncond"]) == 0
    softer.rows.append(len(q))
    return 0.7 * attention(q, k, v, options)


def test_another_node_s_attn1_replacement_makes_the_ordinary_part(model, trajectory):
    """Within the mask it is asked, outside it the source's background still holds."""
    softer.rows = []
    replaced, addresses = model.clone(), list(layer_table(model).layers)[3:9]
    for block, number, _ in addresses:
        replaced.set_model_attn1_replace(softer, block, number)
    patched, _ = own(replaced, trajectory)
    made = sampled(patched, trajectory)
    assert softer.rows == [3] * len(addresses) * 3

    class Chained(ByHand):
        def _keep_source(self, patcher):
            super()._keep_source(replaced)

        def _with(self, patcher, **functions):
            clone = super()._with(patcher, **functions)
            if functions.get("attn1") == self._attend:
                return clone
            for block, number, index in addresses:  # the source's keys are those of the run with the replacement
                mine = clone.model_options["transformer_options"]["patches_replace"]["attn1"][block, number, index]
                clone.set_model_attn1_replace(lambda *a, mine=mine: 0.7 * mine(*a), block, number, index)
            return clone

        def _attend(self, place, q, k, v, options):
            out = super()._attend(place, q, k, v, options)
            if list(layer_table(model).layers)[place] not in addresses:
                return out
            share = F.interpolate(self.target[None], tuple(options["activations_shape"][-2:]), mode="nearest")
            return out - 0.3 * share.flatten()[:, None] * attention(q, k, v, options)

    hand = Chained(model, trajectory, MASK, spec(patched).target_mask)
    assert tiny.relative(made, sampled(hand.model, trajectory)) < 2e-5
    assert tiny.relative(made, sampled(own(model, trajectory)[0], trajectory)) > 1e-3


def test_another_node_s_attn2_replacement_speaks_within_the_mask(model, trajectory):
    softer.rows = []
    replaced = model.clone()
    for block, number, _ in layer_table(model).layers:
        replaced.set_model_attn2_replace(softer, block, number)
    made = sampled(cross(replaced)[0], trajectory)
    assert softer.rows == [2] * 16 * 3
    assert tiny.relative(made, sampled(cross(model)[0], trajectory)) > 1e-3
    everywhere = cross(replaced, target_mask=torch.ones(1, H, W))[0]
    assert torch.equal(sampled(everywhere, trajectory), sampled(replaced, trajectory))


def halved(model, which):
    """The model with half the weights of a projection in every layer."""
    weights = model.model.diffusion_model.state_dict()
    return tiny.model(KIND, weights={k: v / 2 if which in k else v for k, v in weights.items()})


def halving(n, context, value, options):
    """A patch that gives attention half its keys."""
    return n, context / 2, value


def test_another_pack_s_attn1_patch_acts_on_the_edit_and_the_source(model, trajectory):
    patched = model.clone()
    patched.set_model_attn1_patch(halving)
    expected = sampled(both(halved(model, "attn1.to_k"), trajectory), trajectory)
    assert tiny.relative(sampled(both(patched, trajectory), trajectory), expected) < 1e-4


def test_another_pack_s_attn2_patch_acts_on_the_prompt(model, trajectory):
    """As a hypernetwork does; null is another prompt, which it does not see (said in the help page)."""
    patched = model.clone()
    patched.set_model_attn2_patch(halving)
    everywhere = {"target_mask": torch.ones(1, H, W)}
    expected = sampled(cross(halved(model, "attn2.to_k"), **everywhere)[0], trajectory)
    assert tiny.relative(sampled(cross(patched, **everywhere)[0], trajectory), expected) < 1e-5


def test_a_node_that_merges_places_is_named(model, trajectory, alone):
    """As Token Merging does; a mask would point at places that are not there."""
    patched = both(model, trajectory)
    patched.set_model_attn1_patch(lambda n, context, value, options: (n[:, ::2], context, value))
    with pytest.raises(ValueError, match=r"model: attention has \d+ places where the layer has .*Token Merging"):
        sampled(patched, trajectory)
    assert torch.equal(sampled(both(model, trajectory), trajectory), alone)


def test_output_patches_see_what_ours_have_made_of_every_row(model, trajectory, alone):
    seen = {"attn1": [], "attn2": []}

    def keep(name):
        def patch(n, options):
            seen[name].append(len(n))
            return n

        return patch

    patched = model.clone()
    patched.set_model_attn1_output_patch(keep("attn1"))
    patched.set_model_attn2_output_patch(keep("attn2"))
    assert torch.equal(sampled(both(patched, trajectory), trajectory), alone)
    assert seen == {"attn1": [3] * 48, "attn2": [3] * 48}


def test_another_wrapper_of_the_run_stays(model, trajectory, alone):
    asked = []

    def wrapper(executor, *args, **kwargs):
        asked.append(1)
        return executor(*args, **kwargs)

    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, "another", wrapper)
    assert torch.equal(sampled(both(patched, trajectory), trajectory), alone)
    assert asked == [1]


# ---------------------------------------------------------------- guidance


def perturbed(patcher, scale):
    return PerturbedAttentionGuidance.execute(patcher, scale).args[0]


def test_pag_before_and_after_the_patches_is_the_same_and_costs_one_row(model, trajectory):
    counted = tiny.CountedCalls()
    after = sampled(perturbed(both(counted.attach(model), trajectory), 2.0), trajectory)
    assert counted.rows == [3, 1] * 3
    assert torch.equal(sampled(both(perturbed(model, 2.0), trajectory), trajectory), after)


def test_pag_of_no_strength_changes_nothing_and_of_some_leaves_the_first_mask_as_it_was(model, trajectory, alone):
    assert torch.equal(sampled(perturbed(both(model, trajectory), 0.0), trajectory), alone)
    patched, log = cross(own(model, trajectory)[0], refine=True)
    without = sampled(patched, trajectory)
    masks = log.masks.clone()
    guided = sampled(perturbed(patched, 2.0), trajectory)
    assert tiny.relative(guided, without) > 1e-4
    assert torch.equal(log.masks[:, 0], masks[:, 0])


def test_pag_perturbs_within_the_mask_and_keeps_the_background_outside(model, trajectory):
    """Its pass once more, written out: the middle's self-attention is the values, where the mask says so."""
    patched, _ = own(model, trajectory)
    target, middle = spec(patched).target_mask, list(layer_table(model).layers).index(("middle", 0, 0))
    hand = ByHand(model, trajectory, MASK, target)
    guiding = []

    def guide(arguments):
        guiding.append(1)
        (again,) = comfy.samplers.calc_cond_batch(
            arguments["model"], [arguments["cond"]], arguments["input"], arguments["sigma"], arguments["model_options"]
        )
        guiding.clear()
        return arguments["denoised"] + 2.0 * (arguments["cond_denoised"] - again)

    def attend(q, k, v, options):
        out = hand._attend(middle, q, k, v, options)
        if not guiding:
            return out
        share = F.interpolate(target[None], tuple(options["activations_shape"][-2:]), mode="nearest").flatten()
        return out + share[:, None] * (v - attention(q, k, v, options))

    written = hand.model.clone()
    written.set_model_attn1_replace(attend, "middle", 0, 0)
    written.set_model_sampler_post_cfg_function(guide)
    assert tiny.relative(sampled(perturbed(patched, 2.0), trajectory), sampled(written, trajectory)) < 2e-5


def turned(patcher):
    """A clone that asks for uncond before cond, as other guiders do."""
    other = patcher.clone()
    other.add_wrapper_with_key(
        WrappersMP.CALC_COND_BATCH, "turned", lambda run, model, conds, *args: run(model, conds[::-1], *args)[::-1]
    )
    return other


def test_uncond_before_cond_is_the_same(model, trajectory, alone):
    assert tiny.relative(sampled(both(turned(model), trajectory), trajectory), alone) < 1e-4


def test_uncond_before_cond_in_calls_of_their_own_is_the_same(model, trajectory, alone):
    apart = tiny.short_of_memory(turned(model))
    assert tiny.relative(sampled(both(apart, trajectory), trajectory), alone) < 1e-4


# ---------------------------------------------------------------- prompts with areas and masks


def test_an_area_has_its_part_of_the_mask(model, trajectory):
    left = tiny.with_options(tiny.prompt(KIND, 4), area=(H, W // 2, 0, W // 2))
    prompts = [*tiny.prompt(KIND, 2), *left]
    made, expected = with_self(model, trajectory, model, positive=prompts)
    assert tiny.relative(made, expected) < 2e-5
    assert tiny.relative(made, sampled(own(model, trajectory)[0], trajectory)) > 1e-3


def test_null_and_regions_have_their_part_of_an_area_too(model, trajectory):
    """Of a region that covers everything: in every entry it is the region's prompt that speaks."""
    area = tiny.with_options(tiny.prompt(KIND, 4), area=(H, W // 2, 0, W // 2))
    prompts = [*tiny.prompt(KIND, 2), *area]
    patched, _ = cross(model)
    nothing = torch.ones(1, 8, 8)
    hand = ByHand(model, trajectory, 1 - nothing, nothing, null=tiny.prompt(KIND, 9), crossed=MASK)
    made = sampled(patched, trajectory, positive=prompts)
    assert tiny.relative(made, sampled(hand.model, trajectory, positive=prompts)) < 2e-5
    everything = region(model, torch.ones(1, H, W))
    expected = [*tiny.prompt(KIND, 5), *tiny.with_options(tiny.prompt(KIND, 5), area=area[0][1]["area"])]
    made = sampled(everything, trajectory, positive=prompts)
    assert tiny.relative(made, sampled(model, trajectory, positive=expected)) < 1e-5


def test_conditioning_set_mask_composes(model, trajectory):
    from nodes import ConditioningSetMask

    left, _ = halves()
    (masked,) = ConditioningSetMask().append(tiny.prompt(KIND, 4), left, "default", 0.7)
    prompts, counted = [*tiny.prompt(KIND, 2), *masked], tiny.CountedCalls()
    made, expected = with_self(counted.attach(model), trajectory, model, positive=prompts)
    assert counted.rows == [4, 4, 4]
    assert tiny.relative(made, expected) < 2e-5
    patched, log = cross(own(model, trajectory)[0], refine=True)
    sampled(patched, trajectory, positive=prompts)
    assert log.masks.shape == (1, 3, H, W)
    assert len({mask.numpy().tobytes() for mask in log.masks[0]}) == 3


def test_prompts_that_take_turns_are_both_refined_by(model, trajectory):
    turns = [
        tiny.with_options(tiny.prompt(KIND, seed), start_percent=start, end_percent=end)[0]
        for seed, start, end in ((2, 0.0, 0.5), (4, 0.5, 1.0))
    ]
    patched, log = cross(own(model, trajectory)[0], refine=True)
    made = sampled(patched, trajectory, positive=turns)
    assert torch.isfinite(made).all()
    assert len({mask.numpy().tobytes() for mask in log.masks[0]}) == 3


def test_a_noise_mask_holds(model, trajectory):
    start = start_latent(trajectory)["samples"]
    mask = torch.zeros(1, 1, H, W)
    mask[..., :8] = 1
    made = sampled(both(model, trajectory), trajectory, noise_mask=mask)
    torch.testing.assert_close(made[..., 8:], start[..., 8:], rtol=1e-4, atol=1e-4)
    assert (made[..., :8] - start[..., :8]).abs().mean() > 0.1


# ---------------------------------------------------------------- samplers


SAMPLERS = {"heun": 5, "dpmpp_2m": 3, "euler_ancestral": 3, "dpmpp_sde": 5, "uni_pc": 3}
"""And how often each evaluates the model in three steps."""


@pytest.mark.parametrize("sampler", SAMPLERS)
def test_any_sampler(sampler, model):
    """Their own record: every evaluation reads the source as it was there."""
    record = RecordTrajectory.execute(
        model, 7, 3, 1.0, sampler, "normal", tiny.prompt(KIND, 1), tiny.prompt(KIND, 3), tiny.latent(H, W), 1.0
    ).args[1]
    counted = tiny.CountedCalls()
    patched, log = cross(own(counted.attach(model), record)[0], refine=True)
    made = sampled(patched, record, sampler=sampler)
    assert counted.rows == [3] * SAMPLERS[sampler]
    assert torch.isfinite(made).all()
    assert tiny.relative(made, sampled(model, record, sampler=sampler)) > 1e-2
    assert log.masks.shape == (1, 3, H, W)


@pytest.mark.parametrize("sampler", ["dpmpp_2m", "euler_ancestral"])
def test_samplers_of_one_evaluation_a_step_are_the_runs_with_dense_attention(sampler, model, trajectory):
    made, expected = with_self(model, trajectory, model, sampler=sampler)
    assert tiny.relative(made, expected) < 2e-5


def test_guidance_of_one_and_several_edits_together_with_all_patches(model, trajectory):
    counted = tiny.CountedCalls()
    made = sampled(both(counted.attach(model), trajectory), trajectory, cfg=1.0, edits=2, positive=batch(2, 4))
    assert counted.rows == [1, 2] * 3
    assert torch.isfinite(made).all()


def test_sdxl_with_all_patches():
    kind, patcher = tiny.SDXL, tiny.model(tiny.SDXL)
    record, counted = inverted(patcher, kind, steps=2), tiny.CountedCalls()
    patched, log = cross(own(counted.attach(patcher), record)[0], kind, refine=True)
    made = sampled(region(patched, halves()[0], kind), record, kind)
    assert counted.rows == [3, 3]
    assert torch.isfinite(made).all()
    assert tiny.relative(made, sampled(patcher, record, kind)) > 1e-4
    assert 0 < log.masks.mean() < 1


def test_half_precision_weights(model, trajectory, alone):
    patcher = tiny.model(KIND, torch.bfloat16, manual_cast=torch.float32)
    made = sampled(both(patcher, trajectory), trajectory)
    assert torch.isfinite(made).all()
    assert 0 < tiny.relative(made, alone) < 0.2
