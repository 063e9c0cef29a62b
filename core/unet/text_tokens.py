"""A text's own words as a part token: what a text encoder makes of "head", in place of a learned embedding.

The baseline of PartEdit's figure 2. The context is the text encoder's real output, so the softmax is over all of it:
beginning, words, end and padding.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch

from ..part_token import PartToken

Chunk = Sequence[tuple[Any, ...]]
"""One run of a text encoder (77 places): (token id or embedding vector, weight) of each place."""


def token_from_text(clip: Any, text: str) -> PartToken:
    """A part token whose rows are the context of `text`, each once, and whose one part are the rows of its words.

    clip: a CLIP. Weights as in "(head:1.2)", texts of several chunks and textual-inversion embeddings count as they do
    in a prompt. ValueError if there is no word in the text.
    """
    name = " ".join(text.split())
    if not name:
        raise ValueError("text: it is empty; name the part in one or a few words, such as 'head'")
    tokens = clip.tokenize(text)
    context = clip.encode_from_tokens(tokens)[0].detach().float().cpu()
    words = [place for place in word_places(clip, tokens) if place < len(context)]
    if not words:
        raise ValueError(f"text: the text encoder finds no word in {name!r}; name the part, such as 'head'")
    return PartToken(context.clone(), tuple(words), (1,) * len(context), (name,) * len(words))


def word_places(clip: Any, tokens: dict[str, list[Chunk]]) -> list[int]:
    """The rows of the encoded context that are words: neither beginning, end nor padding.

    tokens: what `clip.tokenize` gives, chunks of (token, weight) per text encoder. Encoders that are used side by side
    (SDXL's two) have the same places; where an embedding file fits only one of them, a row is a word if either says so.
    """
    empty = clip.tokenize("")
    places: set[int] = set()
    for encoder, chunks in tokens.items():
        start, end = (place[0] for place in empty[encoder][0][:2])
        width = _input_width(clip, encoder)
        offset = 0
        for chunk in chunks:
            places |= {offset + place for place in _words_of(chunk, start, end, width)}
            offset += len(chunk)
    return sorted(places)


def _words_of(chunk: Chunk, start: int, end: int, width: int | None) -> list[int]:
    """Places of the words of one chunk: what stands between its start and its end token.

    Embedding vectors of another width than the encoder's are left out by ComfyUI, and what follows moves up.
    """
    words: list[int] = []
    place = 0
    for token, *_ in chunk:
        if isinstance(token, torch.Tensor):
            if width is not None and token.shape[-1] != width:
                continue
            vectors = math.prod(token.shape[:-1])
            words += range(place, place + vectors)
            place += vectors
            continue
        if token == end:
            break
        if token != start:
            words.append(place)
        place += 1
    return words


def _input_width(clip: Any, encoder: str) -> int | None:
    """Width of a text encoder's token embeddings, or None where its model is not built as ComfyUI's CLIP models are."""
    models = clip.cond_stage_model
    model: Any = getattr(models, f"clip_{encoder}", None) or getattr(models, encoder, None)
    try:
        return int(model.transformer.get_input_embeddings().weight.shape[-1])
    except AttributeError:
        return None
