"""CPAM's nodes reproduce what the authors' own program computed, at one reference row a step (golden/cpam_a).

Their program has three entries of one row: the source, the edit without and with its prompt; so has ours.
"""

from __future__ import annotations

from types import SimpleNamespace

import comfy.ldm.modules.attention
import comfy.sample
import comfy.samplers
import comfy.sd1_clip
import comfy.supported_models
import pytest
import torch

from scalpel.core.cpam import dilated
from scalpel.core.run_log import RunLog
from scalpel.core.trajectory import Trajectory
from scalpel.core.unet import cpam
from scalpel.core.unet.attention import attention
from scalpel.core.unet.inverting import model_mark
from scalpel.core.unet.layer_masks import LayerMask
from scalpel.core.unet.layers import layer_table
from scalpel.nodes.cpam import CPAMCrossAttnPatch, CPAMSelfAttnPatch
from scalpel.nodes.run_log import RunLogShow
from scalpel.tests import tiny

CASE, GOLDEN = tiny.golden_case("cpam_a")
STEPS = range(CASE["steps"])
NULL = [[GOLDEN["context_null"], {}]]
SCALE = (1 + GOLDEN["sigmas"][1:, None, None, None] ** 2) ** 0.5
"""From the authors' latents to ComfyUI's, after each step."""
SOURCE, UNCOND, COND = "source", "uncond", "cond"
HEADS = CASE["layer_sample"]["heads"]


@pytest.fixture(scope="module")
def patcher():
    return tiny.golden_model("cpam_a", comfy.supported_models.SD15)


def trajectory_of(patcher):
    """The authors' inversion, from the noisiest latent to the picture."""
    last = GOLDEN["clean_latent"] * (1 + GOLDEN["sigmas"][-1] ** 2) ** 0.5
    latents = torch.cat([GOLDEN["ref_ve"], last])[:, None]
    return Trajectory("ddim", model_mark(patcher), GOLDEN["sigmas"], GOLDEN["sigmas"], latents, NULL)


# ---------------------------------------------------------------- a layer


def joined(tensor):
    """[entries·heads, places, d] → [entries, places, heads·d]."""
    return tensor.unflatten(0, (-1, HEADS)).transpose(1, 2).flatten(2)


def side(mask):
    return round(mask.numel() ** 0.5)


def square(name):
    """A mask of the sampled layer as a picture."""
    return GOLDEN[name].unflatten(0, (side(GOLDEN[name]), -1))[None]


def layer_run(patcher, **changes):
    """What a run knows in step 1, as far as attention asks."""
    evaluation = SimpleNamespace(
        step=CASE["layer_sample"]["step"], steps=CASE["steps"], again=False, areas={(UNCOND, 1): None, (COND, 0): None},
        positive=[(COND, 0)], whole=[(COND, 0)], listeners=[],
        chunks=lambda rows, options: zip(options["keys"], [slice(i, i + 1) for i in range(rows)], strict=True),
    )  # fmt: skip
    table = layer_table(patcher)
    run = SimpleNamespace(
        table=table, order={address: place for place, address in enumerate(table.layers)},
        following=None, followed=None, evaluation=evaluation, latent=(64, 64), spec=cpam.Spec(**changes),
    )  # fmt: skip
    size = side(GOLDEN["layer_self_mask_source"])
    options = {
        "block": tuple(CASE["layer_sample"]["block"]), "block_index": 0, "n_heads": HEADS,
        "activations_shape": [3, 64, size, size], "keys": [(SOURCE, 2), (UNCOND, 1), (COND, 0)],
    }  # fmt: skip
    return run, options


def self_attention(patcher, source, target, **changes):
    """The sampled layer's self-attention, [source, uncond, cond], in our arithmetic."""
    settings = {
        "remove": False, "keep_from": None, "plain_fraction": 0.0, "seed": 0,
        "log": RunLog("test"), **changes,
    }  # fmt: skip
    spec = cpam.SelfAttentionSpec(trajectory_of(patcher), source, target, **settings)
    run, options = layer_run(patcher, self_attention=spec)
    own = cpam._SelfAttention(run, spec)
    own.rider.is_source = lambda uuid: uuid == SOURCE
    q, k, v = (joined(GOLDEN[f"layer_self_{name}"]) for name in "qkv")
    return own(None, q, k, v, options)


def test_a_layer_s_self_attention_is_the_authors(patcher):
    source, target = square("layer_self_mask_source"), square("layer_self_mask_target")
    made = self_attention(patcher, source, target)
    assert tiny.relative(made, GOLDEN["layer_self_out"]) < 1e-5
    assert tiny.relative(made[1:], GOLDEN["layer_self_plain"][1:]) > 1e-2
    inside = target.flatten().bool()
    assert tiny.relative(made[:, inside], GOLDEN["layer_self_plain"][:, inside]) < 1e-5


def test_a_layer_s_background_is_the_authors(patcher):
    made = self_attention(patcher, square("layer_self_mask_source"), square("layer_self_mask_target"), remove=True)
    assert tiny.relative(made[1:], GOLDEN["layer_bg"]) < 1e-5
    assert tiny.relative(made[0], GOLDEN["layer_self_plain"][0]) < 1e-5


def test_a_layer_s_retained_object_is_the_authors(patcher):
    source, target = square("layer_self_mask_source"), square("layer_self_mask_target")
    made = self_attention(patcher, source, target, keep_from=(1, 4))
    inside = target.flatten().bool()
    assert tiny.relative(made[1:, inside], GOLDEN["layer_fg"][:, inside]) < 1e-5
    assert tiny.relative(made[1:, ~inside], GOLDEN["layer_bg"][:, ~inside]) < 1e-5
    for later in ((2, 4), (1, 5)):
        assert torch.equal(
            self_attention(patcher, source, target, keep_from=later), self_attention(patcher, source, target)
        )


def cross_attention(patcher, target):
    q, k, v = (joined(GOLDEN[f"layer_cross_{name}"]) for name in "qkv")
    run, options = layer_run(patcher, cross_attention=cpam.CrossAttentionSpec(NULL, target, None, RunLog("test")))
    return cpam._CrossAttention(run)(None, q, k, v, options), attention(q, k, v, options)


def test_a_layer_s_cross_attention_is_the_authors(patcher):
    made, ordinary = cross_attention(patcher, square("layer_cross_mask_target"))
    assert tiny.relative(made, GOLDEN["layer_cross_out"]) < 1e-5
    assert tiny.relative(made[2], ordinary[2]) > 1e-2
    assert torch.equal(made[:2], ordinary[:2])


@pytest.mark.parametrize("name", ["source", "target"])
def test_a_layer_s_masks_are_the_authors(name):
    given = GOLDEN["mask_source"] if name == "source" else GOLDEN["refined_mask"][0]
    size = side(GOLDEN["layer_self_mask_source"])
    ours, rest = LayerMask(given[None], (64, 64), name).at(0, None, (size, size), torch.device("cpu"))
    assert torch.equal(ours.weight, GOLDEN[f"layer_self_mask_{name}"])
    assert torch.equal(ours.some, ours.most)
    assert sorted([*ours.some.tolist(), *rest.some.tolist()]) == list(range(size * size))


def test_the_widened_mask_is_the_authors():
    assert torch.equal(dilated(GOLDEN["mask_source"][None], CASE["mask_scale"])[0], GOLDEN["mask_target"])


# ---------------------------------------------------------------- whole runs


class TokenizerOnly:
    """A CLIP of which only the tokenizer is asked."""

    tokenizer = comfy.sd1_clip.SD1Tokenizer()

    def tokenize(self, text, **options):
        return self.tokenizer.tokenize_with_weights(text, **options)


class Run:
    """Both nodes and ComfyUI's euler on the golden inputs, with every step's latents kept."""

    def __init__(self, patcher, refine):
        self.refine, self.counted, self.latents = refine, tiny.CountedCalls(), []
        trajectory, latent_format = trajectory_of(patcher), patcher.get_model_object("latent_format")
        patched, self.self_log = CPAMSelfAttnPatch.execute(
            self.counted.attach(patcher), trajectory, GOLDEN["mask_source"][None], "replace object", -1, -1,
            CASE["mask_scale"], 0.0, "source", 0.0, 0,
        ).args  # fmt: skip
        more = {"clip": TokenizerOnly(), "text": CASE["prompt"]} if refine else {}
        patched, self.log = CPAMCrossAttnPatch.execute(
            patched, NULL, GOLDEN["mask_target"][None], refine, 1, CASE["refine_threshold"], **more
        ).args
        start = latent_format.process_out(trajectory.start)
        self.output = comfy.sample.sample_custom(
            patched, torch.zeros_like(start), CASE["cfg"], comfy.samplers.sampler_object("euler"), GOLDEN["sigmas"],
            [[GOLDEN["context_target"], {}]], NULL, start, disable_pbar=True,
            callback=lambda step, denoised, x, steps: self.latents.append(x.clone()),
        )  # fmt: skip
        self.latents = [*self.latents[1:], latent_format.process_in(self.output)]


@pytest.fixture(scope="module", params=[False, True], ids=["the given mask", "the refined mask"])
def run(request, patcher):
    """With PyTorch's own attention, which takes a fifth of the memory."""
    with torch.inference_mode(), pytest.MonkeyPatch.context() as monkeypatch:
        pytorch = comfy.ldm.modules.attention.attention_pytorch
        monkeypatch.setattr(comfy.ldm.modules.attention, "optimized_attention", pytorch)
        return Run(patcher, request.param)


@pytest.mark.parametrize("step", STEPS)
def test_latents_are_the_authors_to_5e_5_after_each_step(run, step):
    wanted = GOLDEN["latents_ve"] if run.refine else GOLDEN["latents_fixed_mask_ddim"] * SCALE
    assert run.latents[step].shape == (1, 4, 64, 64)
    assert tiny.relative(run.latents[step][0], wanted[step]) < 5e-5


def test_the_two_runs_are_told_apart():
    fixed = GOLDEN["latents_fixed_mask_ddim"] * SCALE
    assert all(tiny.relative(fixed[step], GOLDEN["latents_ve"][step]) > 1e-3 for step in STEPS[1:])


@pytest.mark.parametrize("step", STEPS)
def test_masks_are_the_authors_after_each_step(run, step):
    masks = run.log.masks
    assert masks.shape == (1, 6, 64, 64)
    assert torch.equal(masks, run.self_log.masks)
    given = torch.nn.functional.interpolate(GOLDEN["mask_target"][None, None], (64, 64), mode="nearest")[0, 0]
    wanted = GOLDEN["refined_mask"][step] if run.refine else given
    assert (masks[0, step] != wanted).sum() == 0
    assert 0 < wanted.mean() < 1


def test_the_log_shows_a_mask_and_a_line_for_each_step(run):
    images, masks, values = RunLogShow.execute(run.log, {"samples": run.output}).args
    assert torch.equal(masks, run.log.masks[0])
    assert images.shape == (6, 512, 512, 3)
    assert torch.equal(images[:, 4::8, 4::8, 1], masks)
    assert len(values.splitlines()) == 6
    share = 100 * masks[5].mean().item()
    assert values.splitlines()[5] == f"step 6: target mask on {share:.1f} % of the picture"


def test_a_step_costs_three_unet_rows(run):
    assert run.counted.rows == [3] * CASE["steps"]
