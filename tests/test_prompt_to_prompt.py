"""Prompt-to-Prompt's alignment and tables, against small cases that can be read, and the tokenizers that feed it."""

from __future__ import annotations

import comfy.sd1_clip
import comfy.sdxl_clip
import pytest
import torch

from scalpel.core.prompt_to_prompt import Prompt, PromptControl, Word, align_refinement, align_replacement
from scalpel.core.unet.prompt_tokens import read_prompt
from scalpel.nodes.prompt_to_prompt import PromptToPrompt

LENGTH = 12


def prompt(text: str, length: int = LENGTH) -> Prompt:
    """Words apart by spaces; each letter group between dashes is a token: "ro-bot" is a word of two."""
    words, place = [], 1
    for word in text.split():
        tokens = tuple(word.split("-"))
        words.append(Word(word.replace("-", ""), tokens, tuple(range(place, place + len(tokens)))))
        place += len(tokens)
    return Prompt(tuple(words), ((0, *range(place, length)),), length)


def taken_from(mapping: torch.Tensor, edit: int) -> dict[int, float]:
    """Which source tokens stand for an edit token, and with what share."""
    column = mapping[:, edit]
    return {int(i): round(column[i].item(), 4) for i in column.nonzero()[:, 0]}


# ---------------------------------------------------------------- alignment


@pytest.mark.parametrize("align", [align_replacement, align_refinement])
def test_the_same_prompt_twice_is_the_identity(align):
    mapping, mapped = align(prompt("a fluf-fy cat"), prompt("a fluf-fy cat"))
    assert torch.equal(mapping, torch.eye(LENGTH))
    assert torch.equal(mapped, torch.ones(LENGTH))


def test_a_swapped_word_of_as_many_tokens_is_the_identity_as_with_the_authors():
    mapping, mapped = align_replacement(prompt("photo of a man in rain"), prompt("photo of a cat in rain"))
    assert torch.equal(mapping, torch.eye(LENGTH))
    assert torch.equal(mapped, torch.ones(LENGTH))


def test_tokens_after_a_swapped_word_of_more_tokens_still_stand_for_themselves():
    """The authors map column j to column j there, which is the word before."""
    mapping, _ = align_replacement(prompt("a man in rain"), prompt("a ro-bot in rain"))
    # source: start a man in rain end pad …; edit: start a ro bot in rain end pad …
    assert [taken_from(mapping, j) for j in range(7)] == [
        {0: 1.0}, {1: 1.0}, {2: 0.5}, {2: 0.5}, {3: 1.0}, {4: 1.0}, {5: 1.0},
    ]  # fmt: skip


def test_tokens_after_a_swapped_word_of_fewer_tokens_still_stand_for_themselves():
    mapping, _ = align_replacement(prompt("a ro-bot in rain"), prompt("a man in rain"))
    assert [taken_from(mapping, j) for j in range(6)] == [{0: 1.0}, {1: 1.0}, {2: 1.0, 3: 1.0}, {4: 1.0}, {5: 1.0},
                                                         {6: 1.0}]  # fmt: skip


@pytest.mark.parametrize(
    ("source", "edit"),
    [
        ("a man", "a ro-bot"),
        ("a ro-bot", "a man"),
        ("a man", "a big red dog"),
        ("a big red dog", "a man"),
        ("", "a man"),
    ],
)
def test_every_source_token_that_has_a_counterpart_gives_all_its_attention(source, edit):
    mapping, _ = align_replacement(prompt(source), prompt(edit))
    given = mapping.sum(1)
    assert torch.allclose(given, torch.ones(LENGTH))


def test_other_word_counts_are_aligned_between_the_words_that_both_share():
    mapping, mapped = align_replacement(prompt("a man in the rain"), prompt("a big ro-bot in rain"))
    # source: 1 a, 2 man, 3 in, 4 the, 5 rain; edit: 1 a, 2 big, 3-4 ro bot, 5 in, 6 rain
    assert taken_from(mapping, 1) == {1: 1.0}
    assert [taken_from(mapping, j) for j in (2, 3, 4)] == [{2: 0.3333}] * 3
    assert taken_from(mapping, 5) == {3: 1.0}
    assert taken_from(mapping, 6) == {5: 1.0}
    assert mapping[4].sum() == 0  # "the" has no counterpart
    assert torch.equal(mapped, torch.ones(LENGTH))


def test_words_that_the_source_lacks_keep_their_own_attention():
    for align in (align_replacement, align_refinement):
        mapping, mapped = align(prompt("a cat in rain"), prompt("a fluf-fy cat in rain"))
        assert mapped.tolist() == [1, 1, 0, 0, *[1] * 8]
        assert [taken_from(mapping, j) for j in (1, 4, 5, 6)] == [{1: 1.0}, {2: 1.0}, {3: 1.0}, {4: 1.0}]


def test_refinement_gives_an_exchanged_word_its_own_attention():
    mapping, mapped = align_refinement(prompt("a red cat"), prompt("a blue cat"))
    assert mapped.tolist() == [1, 1, 0, 1, *[1] * 8]
    assert taken_from(mapping, 2) == {}


def test_padding_stands_for_padding_whatever_the_lengths():
    source, edit = prompt("a cat", 12), prompt("a very big dog", 12)
    for align in (align_replacement, align_refinement):
        mapping, _ = align(source, edit)
        assert taken_from(mapping, edit.specials[0][1]) == {source.specials[0][1]: 1.0}  # end to end
        assert taken_from(mapping, 11) == {9: 1.0, 10: 1.0, 11: 1.0}  # what is left over goes to the last


def test_contexts_of_different_lengths_are_aligned():
    mapping, mapped = align_replacement(prompt("a man", 12), prompt("a cat", 24))
    assert mapping.shape == (12, 24)
    assert torch.equal(mapping.sum(1), torch.ones(12))
    assert len(mapped) == 24


# ---------------------------------------------------------------- what is taken, and when


def control(**changes):
    settings = {
        "mapping": torch.eye(3), "mapped": torch.tensor([1.0, 0.0, 1.0]), "until": torch.tensor([1.0, 1.0, 0.4]),
        "weights": torch.tensor([1.0, 3.0, 2.0]), "self_replace": 0.4,
    }  # fmt: skip
    return PromptControl(**{**settings, **changes})


@pytest.mark.parametrize(
    ("fraction", "steps", "last"), [(0.4, 50, 19), (0.4, 8, 2), (1.0, 8, 7), (0.8, 50, 39), (0.7, 49, 34), (0.9, 9, 8)]
)
def test_a_fraction_of_the_steps_ends_where_the_authors_end_it(fraction, steps, last):
    """Their table has a row more than there are steps: ⌊fraction · (steps + 1)⌋."""
    rule = control(until=torch.full((3,), fraction), mapped=torch.ones(3), weights=torch.ones(3))
    active = [step for step in range(steps) if rule.taken_and_own(step, steps)[0].all()]
    assert active == list(range(last + 1))


def test_taken_and_own_are_the_authors_formula_written_out():
    """alpha · ((P_s M) mapped + P_e (1 − mapped)) · weights + (1 − alpha) · P_e."""
    rule = control()
    source, edit = torch.rand(5, 3), torch.rand(5, 3)
    for step in range(10):
        alpha = torch.tensor([float(step < int(f * 11)) for f in (1.0, 1.0, 0.4)])
        replaced = (source * rule.mapped + edit * (1 - rule.mapped)) * rule.weights
        expected = alpha * replaced + (1 - alpha) * edit
        taken, own = rule.taken_and_own(step, 10)
        assert torch.allclose(source @ rule.mapping * taken + edit * own, expected)


def test_self_attention_is_taken_in_small_layers_and_early_steps():
    rule = control(self_replace=0.4)
    assert [step for step in range(10) if rule.replaces_self_attention(step, 10, 32)] == [0, 1, 2, 3]
    assert not rule.replaces_self_attention(0, 10, 64)


# ---------------------------------------------------------------- the tokenizers


class TokenizerOnly:
    """A CLIP without weights."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.tokenize = tokenizer.tokenize_with_weights

    def encode_from_tokens_scheduled(self, tokens):
        chunks = next(iter(tokens.values()))
        return [[torch.zeros(1, sum(len(chunk) for chunk in chunks), 8), {}]]


@pytest.fixture(scope="module", params=[comfy.sd1_clip.SD1Tokenizer, comfy.sdxl_clip.SDXLTokenizer])
def clip(request):
    return TokenizerOnly(request.param())


def test_words_are_read_as_clip_splits_them(clip):
    found = read_prompt(clip, "A closeup of a (firefighter:1.3), smiling.")
    assert [word.text for word in found.words] == ["a", "closeup", "of", "a", "firefighter", ",", "smiling", "."]
    assert [word.places for word in found.words][:4] == [(1,), (2,), (3,), (4,)]
    assert found.length == 77
    assert [place for places in found.specials for place in places] == [0, *range(9, 77)]


def test_a_word_of_several_tokens_has_all_their_places(clip):
    found = read_prompt(clip, "a labradoodle sitting")
    (word,) = (w for w in found.words if w.text == "labradoodle")
    assert len(word.tokens) == len(word.places) > 1
    assert found.words[-1].places[0] == word.places[-1] + 1


def test_long_texts_have_several_chunks(clip):
    found = read_prompt(clip, "a red cat, " * 30)
    assert found.length == 154
    assert len(found.words) == 120
    assert [places[0] for places in found.specials] == [0, 77]


def test_a_phrase_is_found_wherever_it_stands(clip):
    found = read_prompt(clip, "a red cat and a Red cat, and a red dog")
    assert found.find(read_prompt(clip, "red cat")) == [2, 3, 6, 7]
    assert found.find(read_prompt(clip, "cat red")) == []
    assert found.find(read_prompt(clip, " ")) == []


# ---------------------------------------------------------------- the node


def node(clip, **changes):
    settings = {
        "source_text": "a closeup of a man", "edit_text": "a closeup of a robot", "mode": "replace",
        "cross_replace": 1.0, "self_replace": 0.0, "word_cross_replace": "", "word_weights": "",
        "local_blend_words": "",
    }  # fmt: skip
    return PromptToPrompt.execute(clip, **{**settings, **changes}).args


def test_fractions_and_weights_reach_the_tokens_of_their_words(clip):
    found, *_ = node(clip, word_cross_replace="robot: 0.4, closeup of: 0.5", word_weights="robot: 2.5\ncloseup: -1")
    assert found.until[[1, 2, 3, 4, 5, 6]].tolist() == pytest.approx([1.0, 0.5, 0.5, 1.0, 0.4, 1.0])
    assert found.weights[[1, 2, 3, 4, 5, 6]].tolist() == [1.0, -1.0, 1.0, 1.0, 2.5, 1.0]
    assert torch.equal(found.mapping, torch.eye(77))


def test_words_of_a_local_blend_are_looked_up_in_both_texts(clip):
    found, *_ = node(clip, local_blend_words="man, robot, closeup")
    assert found.source_words == (5, 2)
    assert found.edit_words == (5, 2)


def test_an_empty_edit_text_means_the_source_text(clip):
    found, *_ = node(clip, edit_text=" ", mode="reweight", word_weights="man: 2")
    assert torch.equal(found.mapping, torch.eye(77))
    assert found.weights[5] == 2


@pytest.mark.parametrize(
    ("changes", "words"),
    [
        ({"word_weights": "robt: 2"}, "word_weights: 'robt' is not a word of 'a closeup of a robot'"),
        ({"word_weights": "robot 2"}, "word_weights: 'robot 2' is not understood; write 'word: number'"),
        ({"word_weights": "robot: nan"}, "word_weights: 'robot: nan' is not understood"),
        ({"word_cross_replace": "robot: 1.4"}, "word_cross_replace: 'robot: 1.4' .* from 0 to 1"),
        ({"local_blend_words": "dog"}, "local_blend_words: 'dog' is not a word of"),
        ({"source_text": " "}, "source_text: it has no words"),
        ({"mode": "swap"}, "mode: 'swap' is unknown; accepted are replace, refine, reweight"),
        ({"mode": "reweight"}, "word_weights: it is empty"),
        (
            {"mode": "reweight", "word_weights": "robot: 2", "cross_replace": 0.0},
            "cross_replace: it is 0 for every word",
        ),
        ({"cross_replace": 1.5}, "cross_replace: 1.5 is out of range"),
        ({"self_replace": -0.5}, "self_replace: -0.5 is out of range"),
    ],
)
def test_a_bad_input_gets_a_sentence(clip, changes, words):
    with pytest.raises(ValueError, match=words):
        node(clip, **changes)


def test_a_text_encoder_that_is_not_clip_gets_a_sentence():
    class Other:
        def tokenize_with_weights(self, text, return_word_ids=False):
            return {"t5": [[(1, 1.0, 1)]]}

    with pytest.raises(ValueError, match="clip: Other does not split text as CLIP does"):
        node(TokenizerOnly(Other()))
