"""The words of a prompt as they are written, between blanks: "grass" and its "!", "man" and its "'s" are one."""

from __future__ import annotations

import functools
import re

from .prompt_to_prompt import Prompt

_WEIGHT = re.compile(r":\s*[-+]?\d*\.?\d+\s*\)")
"""The number of ComfyUI's "(word:1.3)"."""


def written_words(prompt: Prompt) -> list[tuple[str, tuple[int, ...]]]:
    """(word, its places in the context) for each word of a prompt, as the tokenizer spells it, in order.

    Pieces are looked for in the prompt's text, in any case and without weights. One that is not found, as the tokenizer
    has cleaned it, or a textual inversion is a word of its own: nothing is left out.
    """
    text = _WEIGHT.sub(")", prompt.text).lower()
    words: list[tuple[str, tuple[int, ...]]] = []
    end: int | None = None  # where in the text the piece before ended
    for word in prompt.words:
        piece = decoded(word.text)
        start = text.find(piece.lower(), end or 0) if piece else -1
        if start < 0:
            words.append((piece, word.places))
            continue
        if words and end is not None and not any(letter.isspace() for letter in text[end:start]):
            before, places = words.pop()
            words.append((before + piece, places + word.places))
        else:
            words.append((piece, word.places))
        end = start + len(piece)
    return words


def decoded(piece: str) -> str:
    """What a piece of CLIP's vocabulary stands for: its letters are bytes of UTF-8."""
    table = _letters()
    try:
        return bytes(table[letter] for letter in piece).decode(errors="replace")
    except KeyError:  # another kind of vocabulary
        return piece


@functools.cache
def _letters() -> dict[str, int]:
    """The byte that each letter stands for: printable Latin-1 for itself, the others for what is left, in order."""
    printable = [*range(ord("!"), ord("~") + 1), *range(ord("¡"), ord("¬") + 1), *range(ord("®"), ord("ÿ") + 1)]
    others = [byte for byte in range(256) if byte not in printable]
    return {chr(byte): byte for byte in printable} | {chr(256 + i): byte for i, byte in enumerate(others)}
