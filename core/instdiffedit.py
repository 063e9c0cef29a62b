"""InstDiffEdit's mask out of cross-attention, nothing trained: the start token points at a word, that word at others.

Zou et al. 2024, equations 6 to 9, in the order of the authors' program: word maps as pictures in the latent's size, the
start token's inverted (it attends to what the words do not), a position vector made once, objects minus background,
smoothed twice, scaled and thresholded. Their program rounds to 8 bit on the way; here all is float.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
import torch.nn.functional as F

MEAN, CURRENT = OVER_STEPS = ("mean", "current")
"""Which maps a step's mask is made of: the mean over the steps so far (the authors' program), or that step's own."""
BINOMIAL = (1 / 16, 4 / 16, 6 / 16, 4 / 16, 1 / 16)
"""OpenCV's fixed Gaussian of 5 pixels."""


@dataclass(frozen=True)
class MaskSettings:
    """related, unrelated: from which cosine on a word belongs to the object, and up to which it is background (γ₁, γ₂);
    threshold: φ. All in 0…1. over_steps: one of OVER_STEPS; eight_bit: see `word_images`.
    """

    related: float = 0.9
    unrelated: float = 0.6
    threshold: float = 0.35
    over_steps: str = MEAN
    eight_bit: bool = False


def word_images(
    maps: torch.Tensor, words: Sequence[Sequence[int]], size: tuple[int, int], eight_bit: bool = False
) -> torch.Tensor:
    """Start token and words as pictures in 0…1 of `size`, the start token's inverted: [images, 1 + words, H, W].

    maps: attention on the prompt's columns, [images, columns, h, w], not negative, column 0 the start token; words: the
    columns of each word, of which it gets the mean. A constant map becomes 0. eight_bit: round where the authors'
    program does, which keeps its pictures as Pillow's, to compare numbers with it.
    """
    means = torch.stack([maps[:, 0], *(maps[:, list(word)].mean(1) for word in words)], 1)
    most = means.amax((-2, -1), keepdim=True).clamp(min=torch.finfo(means.dtype).tiny)
    top, floor, nearest = (255, torch.floor, torch.round) if eight_bit else (1, _as_is, _as_is)
    pictures = floor(top * means / most)
    for between in ((maps.shape[-2], size[1]), size):  # Pillow's filter, which clips after each of its passes
        pictures = nearest(F.interpolate(pictures, between, mode="bicubic", antialias=True).clamp(0, top))
    return floor(scaled(torch.cat([top - pictures[:, :1], pictures[:, 1:]], 1)) * top) / top


def _as_is(pictures: torch.Tensor) -> torch.Tensor:
    return pictures


def scaled(pictures: torch.Tensor) -> torch.Tensor:
    """Each of [..., H, W] from its own minimum and maximum to 0…1; a constant one becomes 0, never NaN."""
    low, high = pictures.amin((-2, -1), keepdim=True), pictures.amax((-2, -1), keepdim=True)
    span = high - low
    flat = span <= 1e-6 * high.abs()  # rounding only
    return torch.where(
        flat, torch.zeros_like(pictures), (pictures - low) / torch.where(flat, torch.ones_like(span), span)
    )


def position_vector(images: torch.Tensor, settings: MaskSettings) -> tuple[torch.Tensor, torch.Tensor]:
    """(index word [images], position [images, words]): +1 for words of the object, −1 of the background, 0 neither.

    Equations 6 to 8. images: from `word_images`. The index word, that most like the start token, belongs to the object
    always. Bounds count as reached (≥ and ≤), as in the authors' program.
    """
    flat = images.flatten(2).double()
    start, words = flat[:, :1], flat[:, 1:]
    index = F.cosine_similarity(words, start, dim=-1, eps=1e-12).argmax(1)
    chosen = words[torch.arange(len(words)), index][:, None]
    likeness = F.cosine_similarity(words, chosen, dim=-1, eps=1e-12)
    likeness[torch.arange(len(words)), index] = 1.0
    one = torch.ones_like(likeness)
    position = torch.where(likeness >= settings.related, one, -one * (likeness <= settings.unrelated))
    return index, position.to(torch.int8)


def refined(images: torch.Tensor, position: torch.Tensor) -> torch.Tensor:
    """What speaks for the object minus what speaks for the background, not below 0: [images, H, W] in 0…1.

    images: from `word_images`; position: from `position_vector`. A prompt's only word is taken as it is.
    """
    words = images[:, 1:]
    if words.shape[1] == 1:
        return words[:, 0]
    objects, background = (_mean_of(words, position == sign) for sign in (1, -1))
    return (scaled(objects) - scaled(background)).clamp(min=0)


def _mean_of(words: torch.Tensor, chosen: torch.Tensor) -> torch.Tensor:
    """[images, H, W]: the mean of the chosen words' pictures, 0 where none is chosen."""
    weights = chosen.to(words)
    total = (words * weights[..., None, None]).sum(1)
    return total / weights.sum(1).clamp(min=1)[:, None, None]


def smoothed(pictures: torch.Tensor) -> torch.Tensor:
    """[images, H, W] under the authors' blur, twice 5 × 5, reflected at the border; then scaled to 0…1."""
    kernel = torch.tensor(BINOMIAL, dtype=pictures.dtype, device=pictures.device)
    blurred = pictures[:, None]
    for _ in range(2):
        padded = F.pad(blurred, (2, 2, 2, 2), mode="reflect")
        blurred = F.conv2d(F.conv2d(padded, kernel[None, None, None]), kernel[None, None, :, None])
    return scaled(blurred[:, 0])


class MaskHead:
    """The masks of one run, step after step: the position vectors are those of its first step.

    words: the columns of each word in the maps; size: (H, W) of the masks.
    """

    def __init__(self, words: Sequence[Sequence[int]], size: tuple[int, int], settings: MaskSettings) -> None:
        self.words = words
        self.size = size
        self.settings = settings
        self.position: torch.Tensor | None = None
        self.index: torch.Tensor | None = None
        self._sum: torch.Tensor | None = None

    def mask(self, maps: torch.Tensor) -> torch.Tensor:
        """The mask after a step, [images, H, W] of 0 and 1. maps: the step's, as `word_images` takes them.

        Where no map tells one place from another there is no object: the mask is 0.
        """
        earlier = self._sum if self.settings.over_steps == MEAN else None
        self._sum = maps if earlier is None else earlier + maps  # a mean but for a factor, which is scaled away
        images = word_images(self._sum, self.words, self.size, self.settings.eight_bit)
        if self.position is None:
            self.index, self.position = position_vector(images, self.settings)
        return (smoothed(refined(images, self.position)) > self.settings.threshold).to(maps.dtype)


def at_pixels(masks: torch.Tensor, size: tuple[int, int]) -> torch.Tensor:
    """Masks [n, h, w] of 0 and 1 at another size: enlarged as the authors' program does it, and cut at one half."""
    return (F.interpolate(masks[:, None], size, mode="bicubic", antialias=True)[:, 0] > 0.5).to(masks.dtype)
