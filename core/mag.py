"""MAG-Edit's constraints: how much of the attention inside a mask goes to the words of an edit (equations 1 to 3)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch

TOKEN_RATIO, SPATIAL_RATIO = CONSTRAINTS = ("token ratio", "spatial ratio")


@dataclass(frozen=True)
class Push:
    """Words that shall get their way, or, with a negative weight, shall not (equations 3 and 5).

    tokens: the places of one word or phrase in the prompt's context; weight: of its constraint.
    """

    tokens: tuple[int, ...]
    weight: float = 1.0


def token_ratio(attention: torch.Tensor, tokens: Sequence[int], inside: torch.Tensor) -> torch.Tensor:
    """(1 − share)², mean over heads: the share of a place's attention that goes to the words, averaged inside the mask.

    Equation 1, as the authors' code has it: the words' tokens count by their mean, and the share is of all columns.
    attention: [rows, heads, places, tokens], not negative; inside: [rows or 1, places], not all 0. Returns [rows].
    """
    share = attention[..., list(tokens)].mean(-1) / attention.sum(-1)
    weight = inside[:, None]
    return (1 - (share * weight).sum(-1) / weight.sum(-1)).square().mean(-1)


def spatial_ratio(
    attention: torch.Tensor, tokens: Sequence[int], inside: torch.Tensor, outside_weight: float
) -> torch.Tensor:
    """λ · (share outside) − (share inside), mean over heads: where in the picture the words' attention lies.

    Equation 2, with the edit's attention in both terms; λ: `outside_weight`. Shapes as in `token_ratio`.
    """
    words = attention[..., list(tokens)].sum(-1)
    share = (words * inside[:, None]).sum(-1) / words.sum(-1)
    return (outside_weight * (1 - share) - share).mean(-1)


def constraint(
    kind: str, pushes: Sequence[Push], maps: Sequence[Sequence[torch.Tensor]], insides: Sequence[torch.Tensor],
    outside_weight: float,
) -> torch.Tensor:  # fmt: skip
    """The weighted sum of a constraint over all words, each the mean over the layers' maps; [rows].

    Words of positive weight share it evenly, and so do those of negative weight (equation 3). maps: for each word
    those it is measured on, [rows, heads, places, tokens] of each layer; insides: the mask at each layer, [rows or 1,
    places]. ValueError on an unknown kind.
    """
    if kind not in CONSTRAINTS:
        raise ValueError(f"constraint: {kind!r} is unknown; accepted are {', '.join(CONSTRAINTS)}")
    total = maps[0][0].new_zeros(len(maps[0][0]))
    for push, layers in zip(pushes, maps, strict=True):
        same_sign = sum((other.weight > 0) == (push.weight > 0) for other in pushes)
        for attention, inside in zip(layers, insides, strict=True):
            if kind == TOKEN_RATIO:
                value = token_ratio(attention, push.tokens, inside)
            else:
                value = spatial_ratio(attention, push.tokens, inside, outside_weight)
            total = total + push.weight * value / (len(layers) * same_sign)
    return total


def normalised(gradient: torch.Tensor, inside: torch.Tensor) -> torch.Tensor:
    """The gradient [rows, C, h, w] of a root mean square of 1 over a mask [rows, 1, h, w] of zeros and ones, by rows.

    The authors' moves become shorter as noise falls, and what the first steps have reached is lost in later ones; moves
    of one length hold it. A gradient of zeros becomes 0.
    """
    dims = (1, 2, 3)
    largest = (gradient.abs() * inside).amax(dims, keepdim=True)
    gradient = gradient / torch.where(largest > 0, largest, 1)  # or the squares of small ones would be 0
    numbers = inside.sum(dims, keepdim=True) * gradient.shape[1]
    mean_square = (gradient.square() * inside).sum(dims, keepdim=True) / numbers
    return torch.where(largest > 0, gradient / mean_square.sqrt(), 0)


def injected_attention(
    own: torch.Tensor, source: torch.Tensor, mapping: torch.Tensor, own_share: torch.Tensor
) -> torch.Tensor:
    """Prompt-to-Prompt's attention: what the edit takes from the source, and its own. Rows need not sum to one.

    own: [rows, heads, places, tokens]; source: [rows, heads, places, source tokens]; mapping: [source tokens, tokens],
    how much of each is taken; own_share: [tokens].
    """
    return source @ mapping + own * own_share
