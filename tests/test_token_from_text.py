"""A text's words as a part token: their places in the context are right for every encoder, and so is their map."""

from __future__ import annotations

import comfy.sd
import comfy.sd1_clip
import comfy.sdxl_clip
import comfy.supported_models_base
import comfy.text_encoders.sd2_clip
import pytest
import torch
from safetensors.torch import save_file

from scalpel.core.prompt_to_prompt import Prompt, Word
from scalpel.core.unet.prompt_tokens import read_prompt
from scalpel.core.unet.text_tokens import token_from_text
from scalpel.nodes.masks import AttentionMaskExtractor
from scalpel.nodes.token_making import PartTokenFromText
from scalpel.partsworld import loader
from scalpel.tests import tiny

pytestmark = pytest.mark.usefixtures("inference")

L_WIDTH, G_WIDTH = 16, 24


def sd2():
    classes = comfy.text_encoders.sd2_clip
    return tiny.clip(classes.SD2Tokenizer, classes.SD2ClipModel, {"clip_h": L_WIDTH})


def sdxl(folder=None):
    return tiny.sdxl_clip(L_WIDTH, G_WIDTH, folder)


@pytest.fixture(scope="module")
def demo():
    return loader.load()


CLIPS = {"SD1.x": lambda demo: demo[1], "SD2.x": lambda demo: sd2(), "SDXL": lambda demo: sdxl()}


@pytest.fixture(scope="module", params=CLIPS)
def clip(request, demo):
    return CLIPS[request.param](demo)


def places(clip, text):
    return list(token_from_text(clip, text).part_rows)


# ---------------------------------------------------------------- where the words are


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("head", [1]),
        ("car hood", [1, 2]),
        ("  car \n  hood ", [1, 2]),
        ("(head:1.2)", [1]),
        ("(car:1.2) hood, ((wheel))", [1, 2, 3, 4]),
        ("xylophonist", [1, 2, 3, 4]),
        ("!", [1]),  # its number is 0, which is also the padding's in SD2.x and one of SDXL's encoders
        ("head <|endoftext|>", [1]),
    ],
)
def test_the_words_are_found_and_beginning_end_and_padding_are_not(text, rows, clip):
    token = token_from_text(clip, text)
    assert list(token.part_rows) == rows
    assert token.counts == (1,) * 77
    assert list(token.parts) == [" ".join(text.split())]


def test_the_rows_are_the_context_that_a_prompt_has(clip):
    for text in ("head", "(head:1.4)"):
        token = token_from_text(clip, text)
        context = clip.encode_from_tokens_scheduled(clip.tokenize(text))[0][0]
        assert torch.equal(token.embedding, context[0])
    assert not torch.equal(token_from_text(clip, "head").embedding[1], token.embedding[1])


def test_a_text_of_several_chunks_has_a_beginning_an_end_and_padding_in_each(clip):
    token = token_from_text(clip, "head " * 80)
    assert token.counts == (1,) * 154
    assert list(token.part_rows) == [*range(1, 76), *range(78, 83)]
    assert len(token.parts) == 1


def test_sdxls_context_is_that_of_both_encoders():
    assert token_from_text(sdxl(), "head").width == L_WIDTH + G_WIDTH


@pytest.mark.parametrize("text", ["", " ", " \n\t "])
def test_a_text_without_anything_in_it_is_answered_with_a_sentence(text, clip):
    with pytest.raises(ValueError, match="text: it is empty; name the part in one or a few words, such as 'head'"):
        PartTokenFromText.execute(clip, text)


def test_a_text_without_a_word_is_answered_with_a_sentence(clip):
    with pytest.raises(ValueError, match=r"text: the text encoder finds no word in '<\|endoftext\|>'; name the part"):
        PartTokenFromText.execute(clip, "<|endoftext|>")


def test_a_checkpoint_without_a_text_encoder_is_answered_with_a_sentence():
    with pytest.raises(ValueError, match="clip: it is missing"):
        PartTokenFromText.execute(None, "head")


# ---------------------------------------------------------------- textual inversion


@pytest.fixture(scope="module")
def with_embeddings(tmp_path_factory):
    folder = tmp_path_factory.mktemp("embeddings")
    for_l, for_g = tiny.randn(3, L_WIDTH, seed=1), tiny.randn(3, G_WIDTH, seed=2)
    save_file({"clip_l": for_l, "clip_g": for_g}, folder / "both.safetensors")
    save_file({"emb_params": for_l}, folder / "old.safetensors")
    return sdxl(folder)


@pytest.mark.parametrize(
    ("text", "rows"),
    [
        ("embedding:both", [1, 2, 3]),
        ("robot embedding:both head", [1, 2, 3, 4, 5]),
        (
            "robot embedding:old head",
            [1, 2, 3, 4, 5],
        ),  # one encoder leaves it out: "head" is row 5 in one, 2 in the other
        ("robot embedding:missing head", [1, 2]),
    ],
)
def test_an_embedding_in_the_text_is_as_many_words_as_it_has_vectors(text, rows, with_embeddings):
    assert places(with_embeddings, text) == rows


def test_words_of_one_embedding_are_not_those_of_another(with_embeddings, tmp_path):
    prompt = read_prompt(with_embeddings, "robot embedding:both head")
    assert prompt.find(read_prompt(with_embeddings, "embedding:both")) == [2, 3, 4]
    other = Prompt((Word("", (b"other",), (1,)),), ((0,),), 2)
    assert prompt.find(other) == []


def test_an_embedding_that_the_encoder_leaves_out_is_no_word(tmp_path):
    save_file({"emb_params": tiny.randn(3, 50, seed=1)}, tmp_path / "foreign.safetensors")
    clip = sdxl(tmp_path)
    assert places(clip, "robot embedding:foreign head") == [1, 2]
    with pytest.raises(ValueError, match="finds no word in 'embedding:foreign'"):
        token_from_text(clip, "embedding:foreign")


# ---------------------------------------------------------------- what it is good for


def test_the_map_of_a_word_is_the_attention_that_the_prompts_own_tokens_get(demo):
    """Computed from the real context in a real call: softmax of its queries and keys, summed over words and heads."""
    model, clip, _ = demo
    image = {"samples": tiny.randn(1, 4, 32, 32, seed=3)}
    prompt = clip.encode_from_tokens_scheduled(clip.tokenize("a blue hood"))
    wanted = []

    def look(n, context, value, options):
        if (options["block"][0], options["block"][1]) == ("output", 3):
            block = model.model.diffusion_model.output_blocks[3][1].transformer_blocks[0].attn2
            q, k, heads = block.to_q(n), block.to_k(context), block.heads
            q, k = (t.unflatten(-1, (heads, -1)).transpose(1, 2).float() for t in (q, k))
            probabilities = (q @ k.mT * q.shape[-1] ** -0.5).softmax(-1)
            wanted.append(probabilities[..., 1:4].sum((1, 3)).unflatten(-1, options["activations_shape"][-2:]))
        return n, context, value

    spied = model.clone()
    spied.set_model_attn2_patch(look)
    settings = {"layers": "output.3", "noise_level": 0.25, "timesteps": 1, "seed": 3, "positive": prompt}
    (token,) = PartTokenFromText.execute(clip, "a blue hood").args
    (found,) = AttentionMaskExtractor.execute(spied, token, image, **settings).args
    (expected,) = wanted
    expected = torch.nn.functional.interpolate(expected[:, None], (256, 256), mode="bilinear")[:, 0]
    expected = (expected - expected.min()) / (expected.max() - expected.min())
    torch.testing.assert_close(found, expected, atol=1e-4, rtol=0)


def test_the_demo_model_is_edited_where_its_word_is(demo):
    model, clip, _ = demo
    prompts = {
        name: clip.encode_from_tokens_scheduled(clip.tokenize(text))
        for name, text in (("source", "a red figure on snow"), ("edit", "a blue figure on snow"), ("negative", ""))
    }
    done = tiny.edit(
        model, tiny.SD15, **prompts, latent_image=tiny.latent(32, 32), part_token=token_from_text(clip, "figure")
    )
    assert torch.isfinite(done.edited).all()
    assert 0 < done.mask.mean() < 1
    assert tiny.relative(done.edited, done.source) > 1e-2
