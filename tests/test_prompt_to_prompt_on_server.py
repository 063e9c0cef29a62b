"""Prompt-to-Prompt through a real server: alone, with a part token, and what is said when something does not fit."""

from __future__ import annotations

import pytest
import torch

from scalpel.devtools.server import ComfyError
from scalpel.tests.test_partedit_on_server import edit_graph, latents, scene, text


def p2p_graph(token=True, sampler=None, **control):
    """The edit of test_partedit_on_server with its prompts from PromptToPrompt."""
    graph = edit_graph(**(sampler or {}))
    graph["p2p"] = {
        "class_type": "PromptToPrompt",
        "inputs": {
            "clip": ["model", 1], "source_text": "a red figure on a green field",
            "edit_text": "a blue figure on a green field", "mode": "replace", "cross_replace": 1.0,
            "self_replace": 0.0, "word_cross_replace": "blue: 0.4", "word_weights": "", "local_blend_words": "",
            **control,
        },
    }  # fmt: skip
    blend = graph["blend"]["inputs"]
    blend.update(prompt_control=["p2p", 0], source=["p2p", 1], edit=["p2p", 2])
    if not token:
        del blend["part_token"], graph["token"]
    del graph["source"], graph["edit"]
    return graph


@pytest.mark.parametrize("which", ["server", "old_server"])
@pytest.mark.parametrize("token", [True, False])
def test_the_edit_differs_from_the_source_and_the_source_is_ksampler_s(which, token, request):
    server = request.getfixturevalue(which)
    found = latents(server, p2p_graph(token))
    plain = latents(server, edit_graph())
    assert not torch.equal(found["edited"], found["unedited"])
    assert torch.equal(found["unedited"], plain["unedited"])
    assert not torch.equal(found["edited"], plain["edited"])


def test_the_same_text_twice_changes_nothing(server):
    settings = {"edit_text": "", "self_replace": 1.0, "word_cross_replace": ""}
    found = latents(server, p2p_graph(token=False, **settings))
    assert (found["edited"] - found["unedited"]).abs().max() < 1e-4 * found["unedited"].abs().max()


def test_a_weight_makes_a_difference(server):
    settings = {"edit_text": "", "mode": "reweight", "word_weights": "red: 4", "word_cross_replace": ""}
    found = latents(server, p2p_graph(token=False, **settings))
    assert (found["edited"] - found["unedited"]).abs().mean() > 0.01


def test_a_local_blend_leaves_a_part_of_the_picture_to_the_bit(server):
    found = latents(server, p2p_graph(token=False, local_blend_words="red"))
    same = (found["edited"] == found["unedited"]).all(1)
    assert 0 < same.float().mean() < 1


@pytest.mark.parametrize(
    ("control", "words"),
    [
        ({"word_weights": "bleu: 2"}, "word_weights: 'bleu' is not a word of 'a blue figure on a green field'"),
        ({"word_cross_replace": "blue 2"}, "word_cross_replace: 'blue 2' is not understood"),
        ({"source_text": ""}, "source_text: it has no words"),
    ],
)
def test_a_bad_input_gets_a_sentence_and_the_next_run_works(server, control, words):
    with pytest.raises(ComfyError, match=words):
        server.run(p2p_graph(**control))
    assert server.run(p2p_graph())["outputs"]


def test_a_prompt_from_elsewhere_is_refused(server):
    graph = p2p_graph() | {"source": scene()["source"], "edit": text("a yellow figure on a green field")}
    graph["blend"]["inputs"]["edit"] = ["edit", 0]
    with pytest.raises(ComfyError, match="prompt_control: the prompt at 'edit' is not the one it was made with"):
        server.run(graph)
