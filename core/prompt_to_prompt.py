"""Prompt-to-Prompt (Hertz et al. 2022): the edit's cross-attention is taken from the source, token by token.

With P_s and P_e the attention probabilities of source and edit, all its controls (replacement, refinement and
reweighting, alone or together) give the edit rows the probabilities

    P = P_s · M · diag(taken) + P_e · diag(own)

where M [source tokens, edit tokens] says which source tokens stand for an edit token. `taken` and `own` depend on the
step alone, so that P · V is the sum of two ordinary attentions and no probability is ever written out.
"""

from __future__ import annotations

from collections.abc import Hashable, Sequence
from dataclasses import dataclass

import torch

MODES = ("replace", "refine", "reweight")

SELF_REPLACE_SIDE = 32
"""Self-attention is replaced in layers of up to this side, on a picture of the model's own size, as the authors do."""


@dataclass(frozen=True)
class Word:
    """A word of a prompt as the tokenizer splits it: its text, its tokens, and their places in the context."""

    text: str
    tokens: tuple[Hashable, ...]
    places: tuple[int, ...]

    @property
    def name(self) -> Hashable:
        """What it is told by: its text, or the vectors of a textual inversion, which has none."""
        return self.text or self.tokens


@dataclass(frozen=True)
class Prompt:
    """A tokenized prompt. length: columns of its context; specials: per chunk of 77, the places of start, end and
    padding tokens, in this order; text: as it was written.
    """

    words: tuple[Word, ...]
    specials: tuple[tuple[int, ...], ...]
    length: int
    text: str = ""

    def find(self, phrase: Prompt) -> list[int]:
        """Places of the tokens of every occurrence of a phrase; empty if it does not occur."""
        wanted = [word.name for word in phrase.words]
        texts = [word.name for word in self.words]
        starts = [i for i in range(len(texts) - len(wanted) + 1) if texts[i : i + len(wanted)] == wanted]
        found = (word.places for i in starts for word in self.words[i : i + len(wanted)])
        return [place for places in found for place in places] if wanted else []


@dataclass(frozen=True)
class PromptControl:
    """What an edit takes from its source's attention, and when.

    mapping: [source tokens, edit tokens], M above. mapped: [edit tokens], 1 where a token has its attention from the
    source, 0 where it keeps its own. until: [edit tokens], fraction of the steps in which it does. weights: [edit
    tokens], by how much its attention is multiplied during these steps. self_replace: fraction of the steps in which
    the edit takes the source's self-attention. source_contexts, edit_contexts: the encoded prompts it was made with.
    source_words, edit_words: places of the words that limit the change (local blend), none for no limit.
    """

    mapping: torch.Tensor
    mapped: torch.Tensor
    until: torch.Tensor
    weights: torch.Tensor
    self_replace: float
    source_contexts: tuple[torch.Tensor, ...] = ()
    edit_contexts: tuple[torch.Tensor, ...] = ()
    source_words: tuple[int, ...] = ()
    edit_words: tuple[int, ...] = ()

    def taken_and_own(self, step: int, steps: int) -> tuple[torch.Tensor, torch.Tensor]:
        """(`taken`, `own`) [edit tokens] of a step (from 0) of `steps`; step i counts as within a fraction f of them
        iff i < ⌊f · (steps + 1)⌋, as in the authors' code.
        """
        active = (step < torch.floor(self.until.double() * (steps + 1) + 1e-6)).to(self.weights)
        taken = active * self.mapped * self.weights
        return taken, active * (1 - self.mapped) * self.weights + (1 - active)

    def replaces_self_attention(self, step: int, steps: int, side: float) -> bool:
        """Whether a layer takes the source's self-attention in a step. side: its side on a picture of native size."""
        return step < int(steps * self.self_replace + 1e-6) and side <= SELF_REPLACE_SIDE


def align_replacement(source: Prompt, edit: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """(mapping, mapped) for prompts of which words were exchanged (Prompt-to-Prompt, word swap).

    With equally many words the i-th stands for the i-th, as with the authors; where counts differ, or more words agree
    that way, the words between those that both share stand for each other. A word of as many tokens as its counterpart
    is mapped token by token, any other spreads each token evenly. Words that the source lacks keep their own attention.
    """
    pairs = _pair_words([w.tokens for w in source.words], [w.tokens for w in edit.words])
    mapping = torch.zeros(source.length, edit.length)
    for from_words, to_words in pairs:
        sources = [place for i in from_words for place in source.words[i].places]
        edits = [place for j in to_words for place in edit.words[j].places]
        _connect(mapping, sources, edits)
    _connect_specials(mapping, source, edit)
    mapped = torch.ones(edit.length)
    paired = {j for from_words, to_words in pairs if from_words for j in to_words}
    for j, word in enumerate(edit.words):
        if j not in paired:
            mapped[list(word.places)] = 0
    return mapping, mapped


def align_refinement(source: Prompt, edit: Prompt) -> tuple[torch.Tensor, torch.Tensor]:
    """(mapping, mapped) for a prompt to which words were added (Prompt-to-Prompt, refinement).

    Tokens that both share, in order, are mapped one to one; all others keep their own attention.
    """
    sources = [(token, place) for w in source.words for token, place in zip(w.tokens, w.places, strict=True)]
    edits = [(token, place) for w in edit.words for token, place in zip(w.tokens, w.places, strict=True)]
    common = _common_subsequence([token for token, _ in sources], [token for token, _ in edits])
    mapping = torch.zeros(source.length, edit.length)
    mapped = torch.ones(edit.length)
    mapped[[place for _, place in edits]] = 0
    for i, j in common:
        mapping[sources[i][1], edits[j][1]] = 1
        mapped[edits[j][1]] = 1
    _connect_specials(mapping, source, edit)
    return mapping, mapped


def _connect(mapping: torch.Tensor, sources: Sequence[int], edits: Sequence[int]) -> None:
    """Let source places stand for edit places: one to one if equally many, else each source for all edits evenly."""
    if len(sources) == len(edits):
        mapping[list(sources), list(edits)] = 1
    elif sources and edits:
        mapping[torch.tensor(sources)[:, None], torch.tensor(edits)] = 1 / len(edits)


def _connect_specials(mapping: torch.Tensor, source: Prompt, edit: Prompt) -> None:
    """Start to start, end to end, padding to padding; what is left over of the source's goes to the edit's last."""
    for i, places in enumerate(source.specials):
        others = edit.specials[min(i, len(edit.specials) - 1)]
        for k, place in enumerate(places):
            mapping[place, others[min(k, len(others) - 1)]] = 1


Pair = tuple[range, range]


def _pair_words(source: list[tuple[Hashable, ...]], edit: list[tuple[Hashable, ...]]) -> list[Pair]:
    """Which words of the source stand for which of the edit, as ranges; one of the two may be empty."""
    common = _common_subsequence(source, edit)
    if len(source) == len(edit) and sum(a == b for a, b in zip(source, edit, strict=True)) == len(common):
        return [(range(i, i + 1), range(i, i + 1)) for i in range(len(source))]
    pairs: list[Pair] = []
    i = j = 0
    for same_i, same_j in [*common, (len(source), len(edit))]:
        if same_i - i == same_j - j:
            pairs += [(range(i + k, i + k + 1), range(j + k, j + k + 1)) for k in range(same_i - i)]
        else:
            pairs.append((range(i, same_i), range(j, same_j)))
        if same_i < len(source):
            pairs.append((range(same_i, same_i + 1), range(same_j, same_j + 1)))
        i, j = same_i + 1, same_j + 1
    return pairs


def _common_subsequence(a: Sequence[Hashable], b: Sequence[Hashable]) -> list[tuple[int, int]]:
    """Index pairs of a longest common subsequence, in order; of several, the one that matches earliest."""
    longest = [[0] * (len(b) + 1) for _ in range(len(a) + 1)]
    for i in reversed(range(len(a))):
        for j in reversed(range(len(b))):
            longest[i][j] = longest[i + 1][j + 1] + 1 if a[i] == b[j] else max(longest[i + 1][j], longest[i][j + 1])
    pairs = []
    i = j = 0
    while i < len(a) and j < len(b):
        if a[i] == b[j]:
            pairs.append((i, j))
            i, j = i + 1, j + 1
        elif longest[i + 1][j] >= longest[i][j + 1]:
            i += 1
        else:
            j += 1
    return pairs
