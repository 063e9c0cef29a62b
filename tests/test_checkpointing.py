"""Gradients with checkpoints are those without, in less memory; what they take is counted, estimated, asked for."""

from __future__ import annotations

from contextlib import nullcontext

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.sample
import comfy.samplers
import pytest
import torch

from scalpel.core.heatmap import probabilities
from scalpel.core.unet import inverting
from scalpel.core.unet.attention import attention, replace_attention
from scalpel.core.unet.checkpointing import blocks, checkpoints, counted_bytes
from scalpel.core.unet.gradient_memory import estimate, reserve
from scalpel.core.unet.gradients import gradients, ordinary
from scalpel.core.unet.layers import address_of, layer_table
from scalpel.tests import tiny
from scalpel.tests.test_gradients import CASES, KINDS, lora
from scalpel.tests.test_inversion import picture

KIND = tiny.SD15


class Enough(Exception):
    pass


def unet_of(patcher):
    return patcher.model.diffusion_model


def hooks_of(unet):
    return [hook for m in unet.modules() for kind in (m._forward_hooks, m._forward_pre_hooks) for hook in kind.values()]


def maps_gradient(unet, table, last, size=(24, 16), checkpointed=True, seen=None, function=None):
    """(gradient by the latent of a sum over cross-attention in `last`, where the pass ends; bytes, maps' bytes)."""
    options, maps = {}, []

    def cross_attention(inner, q, k, v, extra):
        if seen is not None:
            seen.append((address_of(extra), tuple(extra["activations_shape"]), state.recomputing))
        if function is not None:
            function(state)
        if address_of(extra) != last:
            return attention(q, k, v, extra)
        maps.append(probabilities(q, k, extra["n_heads"]))
        raise Enough

    replace_attention(options, "attn2", table, cross_attention)
    with gradients():
        x = tiny.randn(1, 4, *size, seed=1).requires_grad_()
    y = None if unet.num_classes is None else tiny.randn(1, unet.label_emb[0][0].in_features, seed=5)
    with gradients(), counted_bytes(unet.parameters()) as count:
        with checkpoints(unet, count) if checkpointed else nullcontext() as state:
            with pytest.raises(Enough):
                unet(x, torch.full((1,), 500.0), tiny.randn(1, 77, 32, seed=2), y=y, transformer_options=options)
            (gradient,) = torch.autograd.grad(maps[0].square().sum(), x)
        assert count.now == 0
    return gradient, count.bytes, sum(m.nbytes for m in maps[:1])


# ---------------------------------------------------------------- the same gradient


def gradient_of_the_prediction(patcher, kind, checkpointed):
    """(value, its gradient by the latent, by the context, bytes) through the whole UNet, where samplers run."""

    def body(run):
        unet = unet_of(patcher)
        with (
            gradients(),
            counted_bytes(unet.parameters()) as count,
            checkpoints(unet, count) if checkpointed else nullcontext(),
        ):
            x = ordinary(run.clean).clone().requires_grad_()
            context = ordinary(run.guider.conds["positive"][0]["model_conds"]["c_crossattn"].cond).float().clone()
            context.requires_grad_()
            value = run.predict(x, 3.0, "positive", context).square().sum()
            value.backward()
        return value.detach(), x.grad.clone(), context.grad.clone(), count.bytes

    return inverting._run(patcher, tiny.prompt(kind, 1), [], 1.0, picture(), torch.tensor([1.0, 0.0]), body)


@pytest.mark.parametrize("with_lora", [False, True], ids=["no LoRA", "LoRA"])
@pytest.mark.parametrize("case", CASES)
@pytest.mark.parametrize("name", KINDS)
def test_values_and_gradients_are_the_same_bits_and_take_less_memory(name, case, with_lora):
    kind = KINDS[name]
    patcher = tiny.model(kind, inference=True, **CASES[case])
    patcher = lora(patcher) if with_lora else patcher
    with torch.inference_mode():
        before = tiny.plain(patcher, kind, steps=1)
        *plain, all_bytes = gradient_of_the_prediction(patcher, kind, False)
        *made, kept_bytes = gradient_of_the_prediction(patcher, kind, True)
        assert torch.equal(tiny.plain(patcher, kind, steps=1), before)
    for found, wanted in zip(made, plain, strict=True):
        assert wanted.abs().max() > 0
        assert torch.equal(found, wanted)
    assert kept_bytes < 0.4 * all_bytes
    assert not hooks_of(unet_of(patcher))


@pytest.mark.parametrize("name", KINDS)
def test_a_pass_that_ends_within_a_block_has_the_same_gradient(name):
    patcher = tiny.model(KINDS[name], inference=True)
    table = layer_table(patcher)
    for last in (("input", 5, 0), ("middle", 0, 0), list(table.layers)[-1]):
        with torch.inference_mode():
            plain, all_bytes, _ = maps_gradient(unet_of(patcher), table, last, checkpointed=False)
            made, kept_bytes, _ = maps_gradient(unet_of(patcher), table, last)
        assert torch.equal(made, plain)
        assert kept_bytes < 0.5 * all_bytes


def test_a_second_backward_pass_over_the_same_graph_is_the_first():
    unet = unet_of(tiny.model(KIND))
    x = tiny.randn(1, 4, 24, 16, seed=1).requires_grad_()
    with gradients(), checkpoints(unet) as state:
        made = unet(x, torch.full((1,), 500.0), tiny.randn(1, 77, 32, seed=2)).sum()
        first, second = (torch.autograd.grad(made, x, retain_graph=True)[0] for _ in range(2))
    assert torch.equal(first, second)
    assert state.recomputed == 2 * len(list(blocks(unet)))


def test_skipped_blocks_are_not_run_again():
    unet = unet_of(tiny.model(KIND))
    every = list(blocks(unet))
    x = tiny.randn(1, 4, 24, 16, seed=1).requires_grad_()
    with gradients(), checkpoints(unet, skip=every[:10]) as state:
        made = unet(x, torch.full((1,), 500.0), tiny.randn(1, 77, 32, seed=2)).sum()
        torch.autograd.grad(made, x)
    assert state.recomputed == len(every) - 10


@pytest.mark.parametrize("name", KINDS)
def test_patches_are_called_again_with_the_options_of_the_first_time_and_can_tell(name):
    patcher, seen = tiny.model(KINDS[name]), []
    table = layer_table(patcher)
    last = list(table.layers)[-1]
    maps_gradient(unet_of(patcher), table, last, seen=seen)
    first = [(address, shape) for address, shape, again in seen if not again]
    second = [(address, shape) for address, shape, again in seen if again]
    assert [address for address, _ in first] == list(table.layers)
    assert second == first[::-1]


# ---------------------------------------------------------------- what goes wrong is left cleanly, or said


@pytest.mark.parametrize("error", [ValueError, KeyboardInterrupt])
def test_after_an_exception_in_a_block_no_hook_is_left(error):
    unet = unet_of(tiny.model(KIND))
    x = tiny.randn(1, 4, 24, 16, seed=1)
    arguments = x, torch.full((1,), 500.0), tiny.randn(1, 77, 32, seed=2)
    with torch.no_grad():
        before = unet(*arguments)

    def fail(*_):
        raise error

    options = {"patches_replace": {"attn1": {("input", 4, 0): fail}}}
    with counted_bytes() as count:
        with pytest.raises(error), checkpoints(unet, count):
            unet(x.clone().requires_grad_(), *arguments[1:], transformer_options=options)
        assert count.now == 0
        number = torch.ones(1000, requires_grad=True)
        squared = number * number
        assert count.now == number.nbytes  # our counter's hooks, not a block's
        del squared
    assert not hooks_of(unet)
    with torch.no_grad():
        assert torch.equal(unet(*arguments), before)


def test_a_patch_that_does_something_else_the_second_time_is_refused():
    patcher = tiny.model(KIND)

    def turn(state):
        if state.recomputing:
            raise Enough

    table = layer_table(patcher)
    with pytest.raises(Enough):
        maps_gradient(unet_of(patcher), table, ("output", 5, 0), function=turn)
    assert not hooks_of(unet_of(patcher))
    unet, x = unet_of(patcher), tiny.randn(1, 4, 24, 16, seed=1).requires_grad_()
    with gradients(), checkpoints(unet) as state:
        replaced = lambda q, k, v, _: v.detach() if state.recomputing else attention(q, k, v, {"n_heads": 2})  # noqa: E731
        options = {"patches_replace": {"attn1": {("output", 11, 0): replaced}}}
        made = unet(x, torch.full((1,), 500.0), tiny.randn(1, 77, 32, seed=2), transformer_options=options)
        with pytest.raises(RuntimeError, match=r"BasicTransformerBlock kept \d+ tensors .* something else"):
            made.sum().backward()


def test_an_input_that_was_changed_in_place_is_refused():
    """As autograd does without checkpoints."""
    unet = unet_of(tiny.model(KIND))
    block = unet.input_blocks[1][0]
    for checkpointed in (True, False):
        x = tiny.randn(1, 32, 8, 8, seed=1).requires_grad_()
        with gradients(), checkpoints(unet) if checkpointed else nullcontext():
            hidden = x * 1
            made = block(hidden, tiny.randn(1, 128, seed=2))
            hidden += 1
            with pytest.raises(RuntimeError, match="modified by an inplace operation"):
                made.sum().backward()


# ---------------------------------------------------------------- counted


def test_bytes_are_counted_once_for_each_memory_and_without_weights():
    weight, x = torch.ones(50, 100), torch.ones(20, 50, requires_grad=True)
    with counted_bytes([weight]) as count:
        y = (x @ weight).exp()
        assert count.now == y.nbytes
        z = y * y.view(100, 20).view(20, 100)
        assert count.now == y.nbytes
        z.sum().backward()
        assert count.now == 0
        assert count.bytes == y.nbytes
        assert torch.equal(x.grad, (2 * y.detach() ** 2) @ weight.T)
        del y, z


# ---------------------------------------------------------------- estimated


@pytest.mark.parametrize("size", [(24, 16), (32, 40)])
@pytest.mark.parametrize("function", ["attention_sub_quad", "attention_pytorch"])
@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_estimate_is_what_is_counted(name, checkpointed, function, size, monkeypatch):
    monkeypatch.setattr(
        comfy.ldm.modules.attention, "optimized_attention", getattr(comfy.ldm.modules.attention, function)
    )
    patcher = tiny.model(KINDS[name])
    table = layer_table(patcher)
    for last in (("input", 5, 0), list(table.layers)[-1]):
        _, counted, map_bytes = maps_gradient(unet_of(patcher), table, last, size, checkpointed)
        estimated = estimate(unet_of(patcher), 1, size, 4, last, checkpointed, [last])
        # the map is held until the end, its gradient until its block is done
        assert 0.9 * (counted + map_bytes) < estimated < 1.1 * (counted + 2 * map_bytes)
        assert estimate(unet_of(patcher), 3, size, 4, last, checkpointed, [last]) == 3 * estimated


@pytest.mark.parametrize("checkpointed", [False, True])
@pytest.mark.parametrize("name", KINDS)
def test_the_estimate_knows_of_weights_that_are_cast(name, checkpointed):
    patcher = tiny.model(KINDS[name], **CASES["half precision"])
    with torch.inference_mode():
        *_, counted = gradient_of_the_prediction(patcher, KINDS[name], checkpointed)
        h, w = picture()["samples"].shape[-2:]
        estimated = estimate(unet_of(patcher), 1, (h, w), 4, None, checkpointed)
    assert 0.85 < estimated / counted < 1.15


# ---------------------------------------------------------------- asked for


def test_comfyui_is_asked_for_the_memory_and_gives_the_same_picture(monkeypatch):
    asked, shapes = [], []
    original = comfy.model_management.load_models_gpu

    def watch(models, memory_required=0, minimum_memory_required=None, **more):
        asked.append((memory_required, minimum_memory_required))
        return original(models, memory_required, minimum_memory_required=minimum_memory_required, **more)

    def needed(shape):
        shapes.append(shape)
        return 12345678

    monkeypatch.setattr(comfy.model_management, "load_models_gpu", watch)
    model = tiny.model(KIND)
    clone = model.clone()
    reserve(clone.model_options["transformer_options"], "test", needed)
    plain, made = tiny.plain(model, KIND), tiny.plain(clone, KIND)
    assert torch.equal(plain, made)
    assert shapes == [(1, 4, 24, 16)]
    assert [after - before for before, after in zip(*asked, strict=True)] == [12345678, 12345678]
    assert torch.equal(tiny.plain(model, KIND), plain)
    assert asked[2] == asked[0]
