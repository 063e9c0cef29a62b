"""InstDiffEdit: say what should be there, and where it goes is found while the picture is denoised."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any

import comfy.samplers
import torch
from comfy_api.latest import io

from ..core.instdiffedit import MaskSettings, at_pixels
from ..core.unet import instdiffedit as core
from ..core.unet.guided_sampler import SAMPLERS
from ..core.unet.inputs import checked_latent, model_sigmas
from ..core.unet.layers import context_width, layer_table
from ..core.unet.prompt_tokens import read_prompt
from ..core.written_words import written_words
from .common import CATEGORY, check_conditioning, check_range, schema, seed_input

log = logging.getLogger(__name__)

MOST_ROUNDS = 16
SAMPLER_STEPS, MASK_STEPS = 20, 6
"""Defaults. A mask comes of few steps, a picture does not."""
BUILT_ON = {"ddim": "euler"}
"""Samplers that ComfyUI lists by another name than that of their function."""


def _inputs(steps: int) -> list[Any]:
    """steps: their default."""
    names = [name for name in comfy.samplers.KSampler.SAMPLERS if BUILT_ON.get(name, name) in SAMPLERS]
    return [
        io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model, with or without LoRA."),
        io.Clip.Input("clip", tooltip="Its text encoder, to encode edit_text and to find its words."),
        io.String.Input(
            "edit_text", multiline=True,
            tooltip="What should be there, in few words: 'a Shiba Inu dog', 'on a beach'. A word in it that fits what "
            "is there now helps.",
        ),
        io.Conditioning.Input("negative", tooltip="The negative prompt, from CLIP Text Encode; an empty one is good."),
        io.Latent.Input("latent_image", tooltip="The picture to edit, from VAE Encode; or several."),
        seed_input("Seed of the noise. Each picture and each round has noise of its own."),
        io.Int.Input(
            "steps", default=steps, min=1, max=1000,
            tooltip="Steps of the whole schedule. Of them the last are taken: that fraction which strength says.",
        ),
        io.Float.Input(
            "cfg", default=7.5, min=1.0, max=100.0, step=0.1, round=0.01,
            tooltip="Classifier-free guidance. At 1 the negative prompt is not computed.",
        ),
        io.Combo.Input(
            "sampler_name", options=names, default="euler",
            tooltip="Those that go on with a latent that is changed between the steps.",
        ),
        io.Combo.Input(
            "scheduler", options=comfy.samplers.KSampler.SCHEDULERS, default="ddim_uniform",
            tooltip="How the noise levels are spread.",
        ),
        io.Float.Input(
            "strength", default=0.5, min=0.01, max=1.0, step=0.01,
            tooltip="How much noise the picture gets, as a fraction of the steps. More finds what is farther from the "
            "picture, less precisely.",
        ),
        io.Int.Input(
            "rounds", default=1, min=1, max=MOST_ROUNDS,
            tooltip="How many times each picture is denoised, side by side, with noise of its own each time; their "
            "attention is averaged. The cost grows with it.",
        ),
        io.Float.Input(
            "related", default=0.9, min=0.0, max=1.0, step=0.01,
            tooltip="Words whose attention is at least this like the index word's belong to the object (γ₁).",
        ),
        io.Float.Input(
            "unrelated", default=0.6, min=0.0, max=1.0, step=0.01,
            tooltip="Words whose attention is at most this like the index word's are background, and taken off (γ₂).",
        ),
        io.Float.Input(
            "threshold", default=0.35, min=0.0, max=0.99, step=0.01,
            tooltip="From which value on a place belongs to the mask (φ). Less makes it larger.",
        ),
    ]  # fmt: skip


class InstDiffEditSampler(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InstDiffEditSampler",
            display_name="InstDiffEdit Sampler",
            category=f"{CATEGORY}/edit",
            description="Finds the place that an edit is about while it denoises: no mask, no inversion, nothing "
            "trained. At every step a mask is made from the attention to the prompt's words, and around it the picture "
            "is put back. The last mask is for inpainting.",
            search_aliases=["instdiffedit", "automatic mask", "diffedit", "text to mask", "auto inpaint"],
            inputs=_inputs(SAMPLER_STEPS),
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="Where the edit goes, after the last step; in pixels."),
                io.Latent.Output(
                    display_name="latent",
                    tooltip="Edited inside the mask, the picture outside; of the first round.",
                ),
                io.Mask.Output(
                    display_name="step_masks", tooltip="The mask after each step, first to last; picture after picture."
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, clip: Any, edit_text: str, negative: Any, latent_image: dict[str, Any], seed: int, steps: int,
        cfg: float, sampler_name: str, scheduler: str, strength: float, rounds: int, related: float, unrelated: float,
        threshold: float,
    ) -> io.NodeOutput:  # fmt: skip
        sampling = Sampling(seed, steps, cfg, sampler_name, scheduler, strength, rounds)
        found = find(
            model, clip, edit_text, negative, latent_image, sampling, MaskSettings(related, unrelated, threshold)
        )
        return io.NodeOutput(
            _pixels(found.masks[:, -1]), {**latent_image, "samples": found.latent}, _pixels(found.masks.flatten(0, 1))
        )


class InstDiffEditMask(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="InstDiffEditMask",
            display_name="InstDiffEdit Mask",
            category=f"{CATEGORY}/mask",
            description="The mask of InstDiffEdit Sampler alone: where in a picture the words of an edit belong. For "
            "inpainting, or any other node that takes a mask. Few steps are enough.",
            search_aliases=["instdiffedit", "automatic mask", "text to mask", "diffedit"],
            inputs=_inputs(MASK_STEPS),
            outputs=[
                io.Mask.Output(display_name="mask", tooltip="Where the edit goes, after the last step; in pixels.")
            ],
        )

    @classmethod
    def execute(
        cls, model: Any, clip: Any, edit_text: str, negative: Any, latent_image: dict[str, Any], seed: int, steps: int,
        cfg: float, sampler_name: str, scheduler: str, strength: float, rounds: int, related: float, unrelated: float,
        threshold: float,
    ) -> io.NodeOutput:  # fmt: skip
        sampling = Sampling(seed, steps, cfg, sampler_name, scheduler, strength, rounds)
        found = find(
            model, clip, edit_text, negative, latent_image, sampling, MaskSettings(related, unrelated, threshold),
            mask_only=True,
        )  # fmt: skip
        return io.NodeOutput(_pixels(found.masks[:, -1]))


@dataclass(frozen=True)
class Sampling:
    """The nodes' inputs about sampling."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    strength: float
    rounds: int


def find(
    model: Any, clip: Any, edit_text: str, negative: Any, latent_image: dict[str, Any], sampling: Sampling,
    settings: MaskSettings, background: str = core.NEXT, mask_only: bool = False,
) -> core.Found:  # fmt: skip
    """What both nodes do. ValueError names an input that does not fit.

    background, and what `settings` holds beside the nodes' inputs: as the authors' program has it, for comparison.
    """
    _check(sampling, settings)
    layer_table(model)  # refuses models without a U-Net before anything is computed
    check_conditioning("negative", negative, model)
    prompt = read_prompt(clip, edit_text, "edit_text")
    words = written_words(prompt)
    if not words:
        raise ValueError(f"edit_text: there is no word in {edit_text!r}; say what should be there, such as 'a dog'")
    samples = checked_latent(model, latent_image)
    if not torch.isfinite(samples).all():
        raise ValueError("latent_image: it holds NaN or infinite values; encode the picture again, with --fp32-vae")
    positive = clip.encode_from_tokens_scheduled(clip.tokenize(edit_text))
    if positive[0][0].shape[-1] != context_width(model):
        raise ValueError(
            f"clip: its texts are {positive[0][0].shape[-1]} wide, but the model's are {context_width(model)}; use the "
            "CLIP of this model"
        )
    spec = core.InstantSpec(
        prompt.specials[0][0],
        tuple(places for _, places in words),
        prompt.length,
        sampling.rounds,
        settings,
        background,
        mask_only,
    )
    sigmas = model_sigmas(model, sampling.sampler_name, sampling.scheduler, sampling.steps, 1.0)
    found = core.sample_instant(
        model, positive, negative, spec,
        core.independent_noise(latent_image, samples, sampling.rounds, sampling.seed), sampling.seed,
        comfy.samplers.sampler_object(sampling.sampler_name), core.partial_sigmas(sigmas, sampling.strength),
        latent_image, sampling.cfg,
    )  # fmt: skip
    for index, position in zip(found.index.tolist(), found.position.tolist(), strict=True):
        told = {sign: [word for (word, _), own in zip(words, position, strict=True) if own == sign] for sign in (1, -1)}
        log.info(
            "InstDiffEdit: the start token points at %r; object: %s; background: %s",
            words[index][0], ", ".join(told[1]), ", ".join(told[-1]) or "none",
        )  # fmt: skip
    return found


def _check(sampling: Sampling, settings: MaskSettings) -> None:
    for name, value, low, high in (
        ("steps", sampling.steps, 1, 1000),
        ("cfg", sampling.cfg, 1.0, 100.0),
        ("strength", sampling.strength, 0.01, 1.0),
        ("rounds", sampling.rounds, 1, MOST_ROUNDS),
        ("related", settings.related, 0.0, 1.0),
        ("unrelated", settings.unrelated, 0.0, 1.0),
        ("threshold", settings.threshold, 0.0, 0.99),
    ):
        check_range(name, value, low, high)
    if settings.unrelated > settings.related:
        raise ValueError(
            f"unrelated: {settings.unrelated:g} is above related, {settings.related:g}; a word cannot be both"
        )
    for name, given, known in (
        ("sampler_name", sampling.sampler_name, comfy.samplers.KSampler.SAMPLERS),
        ("scheduler", sampling.scheduler, comfy.samplers.KSampler.SCHEDULERS),
    ):
        if given not in known:
            raise ValueError(f"{name}: {given!r} is unknown; accepted are {', '.join(known)}")


def _pixels(masks: torch.Tensor) -> torch.Tensor:
    return at_pixels(masks, (8 * masks.shape[-2], 8 * masks.shape[-1]))
