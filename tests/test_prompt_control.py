"""Prompt-to-Prompt inside a run: against attention written out, and beside all else that a graph may hold."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch

from scalpel.core.prompt_to_prompt import PromptControl
from scalpel.core.unet.attention import attention
from scalpel.core.unet.layers import layer_table
from scalpel.core.unet.prompt_control import PromptControlRun
from scalpel.core.unet.rows import PairedRows
from scalpel.tests import tiny

KIND = tiny.SD15
pytestmark = pytest.mark.usefixtures("inference")
SMALL = tiny.latent(16, 8)


def context(seed, length=77):
    return tiny.prompt(KIND, seed, length)


def control(source=None, edit=None, **changes):
    """Identity alignment of two prompts of equal length, everything taken, unless changed."""
    source, edit = source or context(1), edit or context(2)
    lengths = source[0][0].shape[1], edit[0][0].shape[1]
    settings = {
        "mapping": torch.eye(*lengths), "mapped": torch.ones(lengths[1]), "until": torch.ones(lengths[1]),
        "weights": torch.ones(lengths[1]), "self_replace": 0.0,
        "source_contexts": (source[0][0],), "edit_contexts": (edit[0][0],),
    }  # fmt: skip
    return PromptControl(**{**settings, **changes})


def edit(model, rule, **changes):
    """Prompt-to-Prompt alone: no token, no mask."""
    return tiny.edit(model, KIND, **{"part_token": None, "prompt_control": rule, "latent_image": SMALL, **changes})


# ---------------------------------------------------------------- the formula


def written_out(q, k, v, heads, rule, step, steps, source, row):
    """The probabilities of P2P for an edit row, as the authors compute them, on folded columns."""
    lengths = rule.mapping.shape

    def probabilities(index, length):
        queries, keys = (t[index].unflatten(-1, (heads, -1)).transpose(0, 1) for t in (q, k[:, :length]))
        return (queries @ keys.transpose(1, 2) * queries.shape[-1] ** -0.5).softmax(-1)

    taken, own = rule.taken_and_own(step, steps)
    p = probabilities(source, lengths[0]) @ rule.mapping * taken + probabilities(row, lengths[1]) * own
    values = v[row, : lengths[1]].unflatten(-1, (heads, -1)).transpose(0, 1)
    return (p @ values).transpose(0, 1).flatten(1)


@pytest.mark.parametrize(("lengths", "columns"), [((6, 6), 6), ((6, 4), 12), ((4, 6), 24)])
@pytest.mark.parametrize(("edits", "sources"), [(1, 1), (2, 2), (2, 1)])
def test_the_edit_rows_of_the_positive_prompt_get_the_authors_probabilities(model, lengths, columns, edits, sources):
    """Columns are the common multiple that ComfyUI repeats contexts to."""
    generator = torch.Generator().manual_seed(1)
    rows, heads, step, steps = PairedRows(edits, sources), 2, 4, 10

    def random(*shape):
        return torch.randn(shape, generator=generator)

    rule = PromptControl(
        mapping=random(*lengths).softmax(1), mapped=(random(lengths[1]) > -0.5).float(),
        until=random(lengths[1]).sigmoid(), weights=random(lengths[1]), self_replace=0.0,
    )  # fmt: skip
    now = SimpleNamespace(
        step=step, steps=steps, positive=[("b", 0)], areas={("b", 0): None}, listeners=[],
        keys=lambda options: list(zip(options["uuids"], options["cond_or_uncond"], strict=True)),
    )  # fmt: skip
    run = PromptControlRun(rule, rows, now, layer_table(model))
    run._begin(torch.empty(0))
    q, k, v = random(2 * rows.total, 9, 8), random(2 * rows.total, columns, 8), random(2 * rows.total, columns, 8)
    for first in range(0, len(k), rows.total):  # repeat what ComfyUI repeats
        for row in range(rows.total):
            length = lengths[1] if row < edits else lengths[0]
            for t in (k, v):
                t[first + row] = t[first + row, :length].repeat(columns // length, 1)
    options = {"cond_or_uncond": [1, 0], "uuids": ["a", "b"], "n_heads": heads}
    got = run._take_cross_attention(attention, q, k, v, options)
    ordinary = attention(q, k, v, options)
    changed = range(rows.total, rows.total + edits)
    for row in range(2 * rows.total):
        if row in changed:
            source = rows.total + edits + rows.source_of[row - rows.total]
            assert torch.allclose(got[row], written_out(q, k, v, heads, rule, step, steps, source, row), atol=1e-5)
        else:
            assert torch.equal(got[row], ordinary[row])


# ---------------------------------------------------------------- runs


def test_the_same_prompt_twice_changes_nothing(model):
    rule = control(context(1), context(1), self_replace=1.0)
    output = edit(model, rule, edit=context(1))
    assert tiny.relative(output.edited, output.source) < 1e-5
    assert tiny.relative(output.source, tiny.plain(model, KIND, latent_image=SMALL)) < 1e-5


def test_nothing_taken_is_an_ordinary_run_of_the_edit_prompt(model):
    output = edit(model, control(until=torch.zeros(77)))
    alone = tiny.plain(model, KIND, latent_image=SMALL, positive=context(2))
    assert tiny.relative(output.edited, alone) < 1e-5


def test_each_control_changes_the_edit_and_never_the_source(model):
    plain = edit(model, control(until=torch.zeros(77)))
    weights = torch.ones(77)
    weights[3] = 8.0
    for rule in (control(), control(self_replace=1.0, until=torch.zeros(77)), control(weights=weights)):
        output = edit(model, rule)
        assert tiny.relative(output.edited, plain.edited) > 1e-2
        assert torch.equal(output.source, plain.source)


def test_cond_and_uncond_in_one_call_or_in_two_give_the_same(model):
    rule = control(self_replace=0.5)
    together, apart = edit(model, rule), edit(tiny.short_of_memory(model), rule)
    assert tiny.relative(together.edited, apart.edited) < 1e-5


def test_it_costs_no_unet_rows(model):
    counted = tiny.CountedCalls()
    edit(counted.attach(model), control(), steps=2)
    assert counted.rows == [4, 4]


@pytest.mark.parametrize(("source", "edited", "negative"), [(154, 77, 77), (77, 154, 77), (77, 77, 154)])
def test_prompts_of_different_lengths_give_what_prompts_of_equal_length_give(model, source, edited, negative):
    """A prompt that is repeated attends as it does alone, and its tokens are the first copy."""

    def repeated(seed, length):
        short = context(seed)
        return [[short[0][0].repeat(1, length // 77, 1), short[0][1]]]

    rule = control(until=torch.linspace(0, 1, 77))
    expected = edit(model, rule)
    output = edit(model, rule, negative=repeated(3, negative))
    assert tiny.relative(output.edited, expected.edited) < 1e-4
    prompts = repeated(1, source), repeated(2, edited)
    mapping = torch.zeros(source, edited)
    for copy in range(max(source, edited) // 77):  # each copy of the tokens has its share of the attention
        rows, columns = (slice(77 * (copy % (n // 77)), 77 * (copy % (n // 77)) + 77) for n in (source, edited))
        mapping[rows, columns] = torch.eye(77) * (77 / edited if source < edited else 1)
    long = control(*prompts, mapping=mapping, until=torch.linspace(0, 1, 77).repeat(edited // 77))
    output = edit(model, long, source=prompts[0], edit=prompts[1])
    assert tiny.relative(output.edited, expected.edited) < 1e-4


def test_what_replaces_the_cross_attention_already_stays(model):
    """As IPAdapter does: it adds to the attention of each layer."""
    calls = []

    def adapter(q, k, v, options):
        calls.append(len(q))
        return attention(q, k, v, options) + 0.1 * q

    adapted = model.clone()
    for address in layer_table(model).layers:
        adapted.set_model_attn2_replace(adapter, *address)
    rule = control(context(1), context(1))
    output = edit(adapted, rule, edit=context(1))
    assert calls
    assert tiny.relative(output.edited, output.source) < 1e-5
    assert tiny.relative(output.source, tiny.plain(adapted, KIND, latent_image=SMALL)) < 1e-5
    assert tiny.relative(output.source, tiny.plain(model, KIND, latent_image=SMALL)) > 1e-2


def test_one_control_serves_several_latents(model):
    two = {**tiny.latent(16, 8, batch=2), "batch_index": [0, 1]}
    batch = edit(model, control(self_replace=0.5), latent_image=two)
    first = edit(model, control(self_replace=0.5), latent_image={**SMALL, "batch_index": [0]})
    second = edit(model, control(self_replace=0.5), latent_image={**SMALL, "batch_index": [1]})
    assert tiny.relative(batch.edited, torch.cat([first.edited, second.edited])) < 1e-5


def test_prompts_over_areas_are_controlled_in_their_areas(model):
    def parts(seed):
        return tiny.with_options(context(seed), area=(16, 4, 0, 0)) + tiny.with_options(
            context(seed), area=(16, 4, 0, 4)
        )

    rule = control(context(1), context(1), self_replace=1.0)
    output = edit(model, rule, source=parts(1), edit=parts(1))
    assert tiny.relative(output.edited, output.source) < 1e-5


def test_the_whole_picture_may_change_without_token_and_mask(model):
    output = edit(model, control())
    assert output.mask.shape == (1, 128, 64)
    assert (output.step_masks == 1).all()
    assert len(output.step_masks) == 3


def test_blending_and_control_work_together(model):
    blended = tiny.edit(model, KIND, latent_image=SMALL)
    both = tiny.edit(model, KIND, latent_image=SMALL, prompt_control=control())
    assert tiny.relative(both.edited, blended.edited) > 1e-3
    assert torch.equal(both.step_masks, blended.step_masks)


# ---------------------------------------------------------------- local blend


def test_a_local_blend_leaves_the_rest_as_the_source_has_it(model):
    rule = control(until=torch.zeros(77), source_words=(3,), edit_words=(3, 4))
    limited = edit(model, rule, steps=5, latent_image=tiny.latent(32, 32))
    same = (limited.edited == limited.source).all(1)
    assert 0 < same.float().mean() < 1
    free = edit(model, control(until=torch.zeros(77)), steps=5, latent_image=tiny.latent(32, 32))
    assert not (free.edited == free.source).all(1).any()


def test_the_mask_says_where_a_local_blend_let_the_picture_change(model):
    rule = control(until=torch.zeros(77), source_words=(3,), edit_words=(3, 4))
    output = edit(model, rule, steps=5, latent_image=tiny.latent(32, 32))
    assert (output.step_masks[0] == 1).all()  # the first fifth of the steps is free
    same = (output.edited - output.source).abs().amax(1)[0] < 1e-4
    last = output.step_masks[-1][4::8, 4::8]
    assert torch.equal(last > 0.5, ~same)


def test_a_local_blend_of_prompts_that_all_hold_for_areas_limits_nothing(model):
    def parts(seed):
        return [tiny.with_options(context(seed), area=(16, 4, 0, left))[0] for left in (0, 4)]

    prompts = {"source": parts(1), "edit": parts(2)}
    free = edit(model, control(until=torch.zeros(77)), **prompts)
    limited = edit(model, control(until=torch.zeros(77), source_words=(3,), edit_words=(3,)), **prompts)
    assert torch.equal(limited.edited, free.edited)


def test_tokens_that_another_node_adds_get_a_sentence(model):
    def longer(n, context, value, options):
        return n, *(torch.cat([t, t[:, :4]], 1) for t in (context, value))

    patched = model.clone()
    patched.set_model_attn2_patch(longer)
    with pytest.raises(RuntimeError, match="another node on this model adds tokens to the prompt"):
        edit(patched, control())


def test_self_attention_is_taken_in_layers_of_up_to_32_on_a_native_picture(model):
    table = layer_table(model)
    sides = {table.native / layer.downsample for layer in table.layers.values()}
    assert {side for side in sides if control(self_replace=1.0).replaces_self_attention(0, 3, side)} == {8, 16, 32}


def test_a_local_blend_of_no_word_in_one_text_uses_the_other_s(model):
    rule = control(until=torch.zeros(77), edit_words=(3,))
    limited = edit(model, rule, steps=5, latent_image=tiny.latent(32, 32))
    assert (limited.edited == limited.source).all(1).any()


# ---------------------------------------------------------------- what does not fit


@pytest.mark.parametrize("name", ["source", "edit"])
def test_prompts_of_another_node_are_refused_by_name(model, name):
    with pytest.raises(ValueError, match=f"prompt_control: the prompt at '{name}' is not the one it was made with"):
        edit(model, control(), **{name: context(9)})


def test_several_edits_are_refused(model):
    with pytest.raises(ValueError, match="it tells of one edit prompt, but 'edit' holds 2"):
        edit(model, control(), edit=tiny.prompt(KIND, 2, batch=2))
