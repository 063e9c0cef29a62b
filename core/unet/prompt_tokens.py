"""Where the words of a prompt stand in the text encoder's context, read from ComfyUI's own tokenizers."""

from __future__ import annotations

import dataclasses
from typing import Any

import torch

from ..prompt_to_prompt import Prompt, Word

END_OF_WORD = "</w>"

Chunk = list[tuple[Any, float, int]]
"""One run of a text encoder (77 places): (token id or embedding vectors, weight, word id or 0) of each place."""


def read_prompt(clip: Any, text: str, name: str = "text") -> Prompt:
    """The words of `text` as the CLIP's tokenizer splits it, with their places in the encoded context.

    Weights such as "(robot:1.2)" count for nothing here. ValueError names the input if the CLIP is not one of SD1.x,
    SD2.x or SDXL, or if SDXL's two encoders disagree.
    """
    first, *others = readings(clip, text)
    if any([w.places for w in other.words] != [w.places for w in first.words] for other in others):
        raise ValueError(f"{name}: the two text encoders split it differently (an embedding for one of them only?)")
    return first


def readings(clip: Any, text: str) -> list[Prompt]:
    """What each of the CLIP's text encoders makes of `text`. ValueError if it is not one of SD1.x, SD2.x or SDXL."""
    try:
        empty = clip.tokenize("")
        found = []
        for encoder, chunks in clip.tokenize(text, return_word_ids=True).items():
            start, end = (place[0] for place in empty[encoder][0][:2])
            read = _read(clip.tokenizer, chunks, {start, end}, _input_width(clip, encoder))
            found.append(dataclasses.replace(read, text=text))
        return found
    except (AttributeError, KeyError, TypeError, IndexError, ValueError) as error:
        raise ValueError(
            f"clip: {type(clip.tokenizer).__name__} does not split text as CLIP does; accepted are the text encoders "
            "of SD1.x, SD2.x and SDXL"
        ) from error


def _read(tokenizer: Any, chunks: list[Chunk], ends: set[int], width: int | None) -> Prompt:
    words: list[Word] = []
    open_word: list[tuple[str, Any, int]] = []  # text, token and place of its pieces so far
    specials: list[tuple[int, ...]] = []
    place = 0

    def close() -> None:
        if open_word:
            texts, tokens, places = zip(*open_word, strict=True)
            words.append(Word("".join(texts), tokens, places))
            open_word.clear()

    for chunk in chunks:
        special: list[int] = []
        first = place
        for token, _, word_id in chunk:
            if isinstance(token, torch.Tensor):  # a textual inversion
                close()
                if width not in (None, token.shape[-1]):  # left out by ComfyUI, and what follows moves up
                    continue
                for vector in token.reshape(-1, token.shape[-1]):
                    words.append(Word("", (vector.float().cpu().numpy().tobytes(),), (place,)))
                    place += 1
                continue
            if word_id == 0 or token in ends:
                close()
                special.append(place)
            else:
                text = tokenizer.untokenize([(token, 1.0)])[0][1]
                open_word.append((text.removesuffix(END_OF_WORD), token, place))
                if text.endswith(END_OF_WORD):
                    close()
            place += 1
        missing = first + len(chunk) - place  # ComfyUI pads in the place of what it leaves out
        special += range(place, place + missing)
        place += max(missing, 0)
        specials.append(tuple(special))
    close()
    return Prompt(tuple(words), tuple(specials), place)


def _input_width(clip: Any, encoder: str) -> int | None:
    """Width of a text encoder's token embeddings, or None where its model is not built as ComfyUI's CLIP models are."""
    models = getattr(clip, "cond_stage_model", None)
    model: Any = getattr(models, f"clip_{encoder}", None) or getattr(models, encoder, None)
    try:
        return int(model.transformer.get_input_embeddings().weight.shape[-1])
    except AttributeError:
        return None
