"""InstDiffEdit inside ComfyUI's samplers: after each step a mask from that step's cross-attention, and a blend with it.

One OUTER_SAMPLE wrapper. The maps are computed beside the attention, from its own queries and keys: the rows of the
positive prompt, its columns, and the layers that count, once a step.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..heatmap import probabilities
from ..instdiffedit import MaskHead, MaskSettings
from ..trajectory import Conditioning, same_level
from .attention import Replacement, attention, check_places, replace_attention
from .capture import spatial_size
from .evaluation import Evaluation
from .guided_sampler import guided_sampler
from .inputs import checked_latent
from .layers import Address, address_of, layer_table, map_layers
from .partly import Enough

KEY = "scalpel.instdiffedit"
NEXT, CURRENT = BACKGROUNDS = ("next", "current")
"""How noisy the picture is made that is put around the mask after a step: as the latent is by then, or as it was before
the step (the authors' program).
"""
SMALLEST_MAP = 4
"""Cells on a side; of fewer no shape can be told."""


@dataclass(frozen=True)
class InstantSpec:
    """start: place of the prompt's start token; words: the places of each word; length: tokens of the prompt's context;
    rounds: rows of each picture, each with noise of its own; background: one of BACKGROUNDS; mask_only: leave the last
    step when its maps are there.
    """

    start: int
    words: tuple[tuple[int, ...], ...]
    length: int
    rounds: int
    settings: MaskSettings
    background: str = NEXT
    mask_only: bool = False


@dataclass(frozen=True)
class Found:
    """latent: [images, C, h, w], blended, of the first round; masks: [images, steps, h, w] of 0 and 1; index, position:
    the index word [images] and the position vector [images, words] of the first step.
    """

    latent: torch.Tensor
    masks: torch.Tensor
    index: torch.Tensor
    position: torch.Tensor


def independent_noise(latent: dict[str, Any], samples: torch.Tensor, rounds: int, seed: int) -> torch.Tensor:
    """Noise for `rounds` rows of each picture, [rounds × images, C, h, w], a round after the other.

    A picture's noise depends on the seed, its place (`batch_index`, if the LATENT has one) and `rounds` alone.
    """
    places = latent.get("batch_index") or range(len(samples))
    indices = [place * rounds + number for number in range(rounds) for place in places]
    return comfy.sample.prepare_noise(samples.repeat(rounds, 1, 1, 1), seed, indices)


def partial_sigmas(sigmas: torch.Tensor, strength: float) -> torch.Tensor:
    """The end of a schedule: this fraction of its steps, at least one, as the authors count them."""
    steps = max(1, int(strength * (len(sigmas) - 1) + 1e-6))
    return sigmas[-(steps + 1) :]


def sample_instant(
    model: Any, positive: Conditioning, negative: Conditioning, spec: InstantSpec, noise: torch.Tensor, seed: int,
    sampler: Any, sigmas: torch.Tensor, latent: dict[str, Any], cfg: float,
) -> Found:  # fmt: skip
    """Denoise every picture of a LATENT `rounds` times under masks that are found on the way.

    noise: [rounds × images, C, h, w], a round after the other. The MODEL is left as it was: everything happens on a
    clone that is dropped. ValueError if the picture is too small, or the sampler goes on with a copy of its latent.
    """
    samples = checked_latent(model, latent)
    _check_size(model, samples)
    noise_mask = latent.get("noise_mask")
    if noise_mask is not None and len(noise_mask) > 1:
        noise_mask = comfy.utils.repeat_to_batch_size(noise_mask, len(samples))
        noise_mask = noise_mask.repeat(spec.rounds, *[1] * (noise_mask.ndim - 1))
    runs: list[InstantRun] = []
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, InstantMask(spec, runs.append))
    denoised = comfy.sample.sample_custom(
        patched, noise, cfg, sampler, sigmas, positive, negative, samples.repeat(spec.rounds, 1, 1, 1),
        noise_mask=noise_mask, callback=latent_preview.prepare_callback(patched, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED, seed=seed,
    )  # fmt: skip
    (run,) = runs
    assert run.head.index is not None
    assert run.head.position is not None
    return Found(denoised[: len(samples)], torch.stack(run.masks, 1), run.head.index, run.head.position)


def _check_size(model: Any, samples: torch.Tensor) -> None:
    table = layer_table(model)
    scale = max(table[address].downsample for address in map_layers(table))
    h, w = (-(-side // scale) for side in samples.shape[-2:])
    if min(h, w) < SMALLEST_MAP:
        raise ValueError(
            f"latent_image: the picture is {8 * samples.shape[-1]} × {8 * samples.shape[-2]} pixels, of which this "
            f"model's attention sees {w} × {h} places; the shorter side must have {8 * scale * SMALLEST_MAP} at least"
        )


class InstantMask:
    """OUTER_SAMPLE wrapper: makes one run's state, which `keep` gets, and lets the sampler run on a watched model."""

    def __init__(self, spec: InstantSpec, keep: Callable[[InstantRun], None]) -> None:
        self.spec = spec
        self.keep = keep

    def __call__(self, executor: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        run = InstantRun(self.spec, executor.class_obj, noise, latent, sigmas)
        result = executor(noise, latent, run.watched(sampler), sigmas, *args, **kwargs)
        run.evaluation.finish()
        self.keep(run)
        return result


class InstantRun:
    """State of one sampling run. masks: [images, h, w] after each step, on the CPU."""

    def __init__(
        self, spec: InstantSpec, guider: Any, noise: torch.Tensor, latent: torch.Tensor, sigmas: torch.Tensor
    ) -> None:
        table = layer_table(guider.model_patcher)
        chosen = map_layers(table)
        self.spec = spec
        self.guider = guider
        self.layers = [address for address in table.layers if address in chosen]
        self.evaluation = Evaluation(guider, sigmas, KEY)
        self.masks: list[torch.Tensor] = []
        self.columns = [spec.start, *(place for word in spec.words for place in word)]
        starts = [1 + sum(map(len, spec.words[:i])) for i in range(len(spec.words))]
        words = [range(start, start + len(word)) for start, word in zip(starts, spec.words, strict=True)]
        self.head = MaskHead(words, (latent.shape[-2], latent.shape[-1]), spec.settings)
        self._noise = noise
        self._clean = guider.model_patcher.model.process_latent_in(latent)
        self._step = -1  # the running one
        self._maps: dict[Address, torch.Tensor] = {}  # of the running step
        self._shape: torch.Size | None = None  # of a map
        options = guider.model_options.setdefault("transformer_options", {})
        self.evaluation.install(options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self._needed, options)
        replace_attention(options, "attn2", table, self._attend)

    @property
    def leaving(self) -> bool:
        """Whether the running step is only begun."""
        return self.spec.mask_only and self._step == self.evaluation.steps - 1

    # ------------------------------------------------------------------ the maps

    def _needed(
        self, executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any
    ) -> Any:
        """CALC_COND_BATCH: the last maps are all of the positive prompt."""
        if self.leaving:
            positive = self.guider.conds.get("positive")
            conds = [entries if entries is positive else None for entries in conds]
        return executor(model, conds, x, timestep, model_options)

    def _attend(self, inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
        address, now = address_of(options), self.evaluation
        if address in self.layers and address not in self._maps:
            for key, rows in now.chunks(len(q), options):
                if key in now.whole:
                    self._maps[address] = self._map(q[rows], k[rows], options)
            if self.leaving and len(self._maps) == len(self.layers):
                raise Enough
        return (inner or attention)(q, k, v, options)

    def _map(self, q: torch.Tensor, k: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
        """Attention on the prompt's columns, mean over heads and rounds: [images, columns, h, w]."""
        check_places(options, q)
        copies = max(1, k.shape[1] // self.spec.length)  # ComfyUI repeats a context beside a longer one
        columns = copies * probabilities(q, k, options["n_heads"])[..., self.columns].mean(1)
        return columns.unflatten(0, (self.spec.rounds, -1)).mean(0).mT.unflatten(-1, spatial_size(options))

    # ------------------------------------------------------------------ between the steps

    def watched(self, sampler: Any) -> Any:
        """The same SAMPLER, whose latent is blended after each step. ValueError names one that would not notice."""
        watched = guided_sampler(sampler, self._before, self._blended, "sampler_name")
        function = watched.sampler_function

        def until_enough(model: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
            try:
                return function(model, x, *args, **kwargs)  # type: ignore[no-any-return]
            except Enough:
                self._find()
                return x

        until_enough.__name__ = function.__name__
        return comfy.samplers.KSAMPLER(until_enough, watched.extra_options, watched.inpaint_options)

    def _before(self, x: torch.Tensor, sigma: float, _: dict[str, Any]) -> None:
        """Before an evaluation: if it is the next step's first, end the step before it."""
        if self._step + 1 < self.evaluation.steps and same_level(self.evaluation.sigmas[self._step + 1], sigma):
            if self._step >= 0:
                x.copy_(self._blended(x))
            self._step += 1

    def _blended(self, x: torch.Tensor) -> torch.Tensor:
        """x after the running step: outside the mask it is the picture, as noisy."""
        mask = self._find().repeat(self.spec.rounds, 1, 1)[:, None].to(x.device)
        level = self.evaluation.sigmas[self._step + (self.spec.background == NEXT)]
        sampling = self.guider.model_patcher.get_model_object("model_sampling")
        around = sampling.noise_scaling(x.new_tensor(level), self._noise.to(x), self._clean.to(x), False)
        return torch.where(mask > 0, x, around)

    def _find(self) -> torch.Tensor:
        """The mask after the running step, [images, h, w], on the CPU: it is small, and needs float64."""
        if len(self._maps) < len(self.layers):
            raise ValueError(
                "model: its cross-attention was not called as usual (torch.compile, a cache of steps, or a node that "
                "replaces it); take that off the model"
            )
        maps = [self._maps.pop(address) for address in self.layers]
        self._shape = self._shape or maps[0].shape
        if any(own.shape != self._shape for own in maps):
            raise ValueError(
                "model: another node changes the size of what the U-Net works on during the run (Deep Shrink, say); "
                "take it off the model"
            )
        self.masks.append(self.head.mask(torch.stack(maps).mean(0).float().cpu()))
        return self.masks[-1]
