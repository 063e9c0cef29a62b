"""A text's own words as a part token: what a text encoder makes of "head", in place of a learned embedding.

The baseline of PartEdit's figure 2. The context is the text encoder's real output, so the softmax is over all of it:
beginning, words, end and padding.
"""

from __future__ import annotations

from typing import Any

from ..part_token import PartToken
from .prompt_tokens import readings


def token_from_text(clip: Any, text: str) -> PartToken:
    """A part token whose rows are the context of `text`, each once, and whose one part are the rows of its words.

    clip: a CLIP. Weights as in "(head:1.2)", texts of several chunks and textual-inversion embeddings count as they do
    in a prompt; where an embedding fits only one of SDXL's encoders, a row is a word if either says so. ValueError if
    there is no word in the text.
    """
    name = " ".join(text.split())
    if not name:
        raise ValueError("text: it is empty; name the part in one or a few words, such as 'head'")
    context = clip.encode_from_tokens(clip.tokenize(text))[0].detach().float().cpu()
    words = {p for prompt in readings(clip, text) for word in prompt.words for p in word.places if p < len(context)}
    if not words:
        raise ValueError(f"text: the text encoder finds no word in {name!r}; name the part, such as 'head'")
    return PartToken(context.clone(), tuple(sorted(words)), (1,) * len(context), (name,) * len(words))
