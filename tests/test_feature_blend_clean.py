"""A run leaves nothing behind: not on the MODEL, not after an error, not after an interrupt in the middle of a step."""

from __future__ import annotations

import gc
import weakref

import comfy.model_management
import latent_preview
import pytest
import torch
from comfy.patcher_extension import copy_nested_dicts

from scalpel.tests import tiny

KIND = tiny.SD15
pytestmark = pytest.mark.usefixtures("inference")
SMALL = tiny.latent(16, 8)


@pytest.fixture(scope="module")
def plain_before(model):
    with torch.inference_mode():
        return tiny.plain(model, KIND, latent_image=SMALL)


def _state(model):
    """What a MODEL carries, and which hooks hang on its modules."""
    hooks = sum(len(m._forward_hooks) + len(m._forward_pre_hooks) for m in model.model.modules())
    return copy_nested_dicts(model.model_options), dict(model.object_patches), dict(model.patches), hooks


def test_a_plain_run_gives_the_same_bits_before_and_after_an_edit(model, plain_before):
    before = _state(model)
    tiny.edit(model, KIND, latent_image=SMALL)
    assert _state(model) == before
    assert torch.equal(tiny.plain(model, KIND, latent_image=SMALL), plain_before)


def test_the_same_edit_twice_gives_the_same_bits(model):
    first, second = (tiny.edit(model, KIND, latent_image=SMALL) for _ in range(2))
    for name in ("edited", "source", "mask", "step_masks"):
        assert torch.equal(getattr(first, name), getattr(second, name)), name


def test_another_edit_in_between_changes_nothing(model):
    first = tiny.edit(model, KIND, latent_image=SMALL)
    tiny.edit(model, KIND, latent_image=tiny.latent(8, 16, 2), part_token=tiny.token(51), layers="middle", cfg=1.0)
    again = tiny.edit(model, KIND, latent_image=SMALL)
    assert torch.equal(first.edited, again.edited)


def test_what_was_given_is_not_changed(model):
    inputs = {"source": tiny.prompt(KIND, 1), "edit": tiny.prompt(KIND, 2), "negative": tiny.prompt(KIND, 3)}
    image = {"samples": tiny.randn(1, 4, 16, 8, seed=9), "noise_mask": torch.ones(1, 1, 16, 8), "batch_index": [2]}
    mask, token = torch.rand(1, 128, 64), tiny.token()
    tiny.edit(model, KIND, **inputs, latent_image=image, mask=mask.clone(), part_token=token, mask_mode="multiply")
    for seed, conditioning in enumerate(inputs.values(), 1):
        assert torch.equal(conditioning[0][0], tiny.prompt(KIND, seed)[0][0])
        assert conditioning[0][1] == {}
    assert list(image) == ["samples", "noise_mask", "batch_index"]
    assert torch.equal(image["samples"], tiny.randn(1, 4, 16, 8, seed=9))
    assert torch.equal(token.embedding, tiny.token().embedding)


class _Accident(Exception):
    pass


def _failing_in_the_middle_of_a_step(model, what):
    """A clone whose ninth layer of the second step does `what`."""
    calls = []

    def patch(n, context, value, options):
        calls.append(1)
        if len(calls) == 16 + 9:
            what()
        return n, context, value

    failing = model.clone()
    failing.set_model_attn2_patch(patch)
    return failing, calls


def _accident():
    raise _Accident


def test_after_an_error_in_the_middle_of_a_step_all_is_as_before(model, plain_before):
    expected = tiny.edit(model, KIND, latent_image=SMALL).edited
    before = _state(model)
    failing, calls = _failing_in_the_middle_of_a_step(model, _accident)
    with pytest.raises(_Accident):
        tiny.edit(failing, KIND, latent_image=SMALL)
    assert len(calls) == 16 + 9
    assert _state(model) == before
    assert torch.equal(tiny.plain(model, KIND, latent_image=SMALL), plain_before)
    assert torch.equal(tiny.edit(model, KIND, latent_image=SMALL).edited, expected)
    assert torch.equal(tiny.edit(failing, KIND, latent_image=SMALL).edited, expected)


def test_after_an_interrupt_in_the_middle_of_a_step_all_is_as_before(model, plain_before):
    expected = tiny.edit(model, KIND, latent_image=SMALL).edited
    failing, calls = _failing_in_the_middle_of_a_step(model, comfy.model_management.interrupt_current_processing)

    def notice(n, context, value, options):
        comfy.model_management.throw_exception_if_processing_interrupted()
        return n, context, value

    failing.set_model_attn2_patch(notice)
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.edit(failing, KIND, latent_image=SMALL)
    assert len(calls) == 16 + 9
    assert not comfy.model_management.processing_interrupted()
    assert torch.equal(tiny.plain(model, KIND, latent_image=SMALL), plain_before)
    assert torch.equal(tiny.edit(model, KIND, latent_image=SMALL).edited, expected)


@pytest.mark.parametrize("step", [0, 1, 2])
def test_an_interrupt_is_heard_at_any_step(step, model, monkeypatch):
    monkeypatch.setattr(latent_preview, "prepare_callback", lambda *_: _interrupt_at(step))
    with pytest.raises(comfy.model_management.InterruptProcessingException):
        tiny.edit(model, KIND, latent_image=SMALL)
    monkeypatch.undo()
    assert torch.isfinite(tiny.edit(model, KIND, latent_image=SMALL).edited).all()


def _interrupt_at(step):
    def callback(i, *_):
        if i == step:
            comfy.model_management.interrupt_current_processing()
        comfy.model_management.throw_exception_if_processing_interrupted()

    return callback


def test_a_run_s_clone_of_the_model_is_let_go(model, monkeypatch):
    clones = []
    clone = type(model).clone
    monkeypatch.setattr(type(model), "clone", lambda self: clones.append(weakref.ref(made := clone(self))) or made)
    tiny.edit(model, KIND, latent_image=SMALL)
    monkeypatch.undo()
    tiny.plain(model, KIND, latent_image=SMALL, steps=1)  # ComfyUI remembers the last model it ran
    gc.collect()
    assert clones
    assert all(reference() is None for reference in clones)


def test_preview_and_progress_come_once_a_step_with_the_edit_first(model, monkeypatch):
    seen = []

    def prepare(patcher, steps):
        return lambda step, x0, x, total: seen.append((step, total, steps, x0.clone()))

    monkeypatch.setattr(latent_preview, "prepare_callback", prepare)
    output = tiny.edit(model, KIND, latent_image=SMALL)
    assert [entry[:3] for entry in seen] == [(0, 3, 3), (1, 3, 3), (2, 3, 3)]
    edited, source = model.get_model_object("latent_format").process_out(seen[-1][3])
    assert torch.equal(edited, output.edited[0])
    assert torch.equal(source, output.source[0])
