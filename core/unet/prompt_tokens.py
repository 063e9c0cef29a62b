"""Where the words of a prompt stand in the text encoder's context, read from ComfyUI's own tokenizers."""

from __future__ import annotations

from collections.abc import Hashable
from typing import Any

import torch

from ..prompt_to_prompt import Prompt, Word

END_OF_WORD = "</w>"


def read_prompt(clip: Any, text: str, name: str = "text") -> Prompt:
    """The words of `text` as the CLIP's tokenizer splits it, with their places in the encoded context.

    Weights such as "(robot:1.2)" count for nothing here. Both encoders of SDXL split alike. ValueError names the input
    if the CLIP is not one of SD1.x, SD2.x or SDXL, or if its encoders disagree.
    """
    try:
        readings = [
            _read(clip.tokenizer, chunks) for chunks in clip.tokenize(text, return_word_ids=True).values()
        ]  # one per encoder
    except (AttributeError, KeyError, TypeError) as error:
        raise ValueError(
            f"clip: {type(clip.tokenizer).__name__} does not split text as CLIP does; accepted are the text encoders "
            "of SD1.x, SD2.x and SDXL"
        ) from error
    first, *others = readings
    if any(other.words != first.words for other in others):
        raise ValueError(f"{name}: the two text encoders split it differently (an embedding for one of them only?)")
    return first


def _read(tokenizer: Any, chunks: list[list[tuple[Any, float, int]]]) -> Prompt:
    words: list[Word] = []
    pieces: list[tuple[str, Hashable, int]] = []  # of the word that is being put together
    specials: list[tuple[int, ...]] = []
    length = 0

    def close() -> None:
        if pieces:
            words.append(Word("".join(p[0] for p in pieces), tuple(p[1] for p in pieces), tuple(p[2] for p in pieces)))
            pieces.clear()

    for chunk in chunks:
        specials.append(tuple(length + i for i, (_, _, word_id) in enumerate(chunk) if word_id == 0))
        for place, (token, _, word_id) in enumerate(chunk, length):
            if word_id == 0:
                continue
            if isinstance(token, torch.Tensor):  # a textual inversion embedding
                close()
                pieces.append(("embedding", token.float().cpu().numpy().tobytes(), place))
                close()
                continue
            text = tokenizer.untokenize([(token, 1.0)])[0][1]
            pieces.append((text.removesuffix(END_OF_WORD), token, place))
            if text.endswith(END_OF_WORD):
                close()
        length += len(chunk)
    close()
    return Prompt(tuple(words), tuple(specials), length)
