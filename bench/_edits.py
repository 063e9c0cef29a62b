"""What the benches on edited parts share: the edits that are asked for, and the ways to make them."""

from __future__ import annotations

import argparse
from collections.abc import Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.sample
import torch

from ..core import part_token
from ..nodes.feature_blend import FeatureBlendSampler
from ..nodes.prompt_to_prompt import PromptToPrompt
from ..partsworld import loader, tokens
from ..partsworld.scene import BACKGROUNDS, COLOURS, MAIN_PART, PARTS, part_phrase
from ._pictures import encode

STYLES = ("object", "part")
"""How the edit is worded. object: "a blue figure"; part: "a red figure with a blue head"."""

LATENT = (4, 32, 32)


@dataclass(frozen=True)
class Wish:
    """One edit: a source prompt, the noise it starts from (`number`), and the colour that one part should get."""

    kind: str
    part: str
    colour: str
    wanted: str
    background: str
    number: int

    @property
    def source(self) -> str:
        return self._words(self.colour)

    def edit(self, style: str) -> str:
        """The edit prompt. ValueError on an unknown style, or where this style cannot name the part."""
        if style not in STYLES:
            raise ValueError(f"unknown edit style {style!r}; known: {', '.join(STYLES)}")
        if style == "object":
            return self._words(self.wanted)
        if self.part == MAIN_PART[self.kind]:
            raise ValueError(f"the {self.part} gives a {self.kind} its colour: its edit style is 'object'")
        return self._words(self.colour, f" with {part_phrase(self.part, self.wanted)}")

    def _words(self, colour: str, rest: str = "") -> str:
        article = "an" if colour[0] in "aeiou" else "a"
        return f"{article} {colour} {self.kind}{rest} {BACKGROUNDS[self.background]}"


def wishes(name: str, first: int, count: int) -> list[Wish]:
    """Edits number `first` and following of a part such as "figure-head".

    Colours and backgrounds go round, and so does the colour that is wanted. ValueError on an unknown part.
    """
    kind, _, part = name.partition("-")
    if part not in PARTS.get(kind, ()):
        raise ValueError(f"unknown part {name!r}; known: {', '.join(f'{k}-{p}' for k in PARTS for p in PARTS[k])}")
    names, backgrounds = list(COLOURS), list(BACKGROUNDS)
    return [
        Wish(kind, part, names[i % 8], names[(i + 1 + (i // 8) % 7) % 8], backgrounds[i % len(backgrounds)], i)
        for i in range(first, first + count)
    ]


@dataclass(frozen=True)
class Settings:
    """Of every sampling here; names as in FeatureBlendSampler."""

    seed: int
    steps: int
    cfg: float
    sampler_name: str
    scheduler: str
    omega: float
    blend_until: float
    layers: str


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """The settings, and which parts and weights."""
    parser.add_argument("--parts", nargs="+", default=["figure-head", "car-hood"], metavar="KIND-PART")
    parser.add_argument("--batch", type=int, default=10, help="scenes at a time (no influence on the results)")
    parser.add_argument("--weights", type=Path, default=loader.WEIGHTS, help="another checkpoint")
    parser.add_argument("--tokens", type=Path, default=tokens.FOLDER, help="another folder of part tokens")
    parser.add_argument("--seed", type=int, default=2024)
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=7.5)
    parser.add_argument("--sampler", default="euler")
    parser.add_argument("--scheduler", default="ddim_uniform")
    parser.add_argument("--omega", type=float, default=1.5)
    parser.add_argument("--blend-until", type=float, default=1.0)
    parser.add_argument("--layers", default="official")


def settings(arguments: argparse.Namespace) -> Settings:
    """The settings that the command line asks for."""
    return Settings(
        arguments.seed, arguments.steps, arguments.cfg, arguments.sampler, arguments.scheduler, arguments.omega,
        arguments.blend_until, arguments.layers,
    )  # fmt: skip


@dataclass(frozen=True)
class Edited:
    """Pictures [n, 256, 256, 3] in 0…1, the sources' latents, and the masks [n, 256, 256] (mean over the steps)."""

    source: torch.Tensor
    edited: torch.Tensor
    latents: torch.Tensor
    masks: torch.Tensor


class Editor:
    """The demo model and its ways to edit. Picture i depends on wish i alone, not on what it is batched with."""

    def __init__(self, weights: Path, folder: Path, how: Settings) -> None:
        self.models = loader.load(weights)
        self.folder = folder
        self.how = how

    def token(self, wish: Wish) -> Any:
        return part_token.load(self.folder / f"partsworld_{wish.kind}_{wish.part}.safetensors")

    def partedit(self, asked: Sequence[Wish], style: str, mask: torch.Tensor | None = None, **changes: Any) -> Edited:
        """FeatureBlendSampler with the part's token, or with `mask` [n, 256, 256] instead of it.

        changes: settings other than the editor's own.
        """
        how = replace(self.how, **changes)
        model, clip, vae = self.models
        region: dict[str, Any] = {"part_token": self.token(asked[0])} if mask is None else {"mask": mask}
        with torch.inference_mode():
            edited, source, masks, _ = FeatureBlendSampler.execute(
                model, encode(clip, [w.source for w in asked]), encode(clip, [w.edit(style) for w in asked]),
                encode(clip, [""]), _latent(asked), how.seed, how.steps, how.cfg, how.sampler_name, how.scheduler,
                1.0, how.omega, how.blend_until, how.layers, "background", **region,
            ).args  # fmt: skip
            before, after = (vae.decode(latent["samples"]).cpu() for latent in (source, edited))
        return Edited(before, after, source["samples"], masks.cpu())

    def with_prompt_to_prompt(self, asked: Sequence[Wish], **words: Any) -> torch.Tensor:
        """PartEdit with Prompt-to-Prompt as in its authors' demo: all words take the source's attention in all steps,
        the word that differs in 0.4 of them. words: other inputs of the PromptToPrompt node.

        Pictures [n, 256, 256, 3]; edits in style "object", which differ from the source in one word.
        """
        return torch.cat([self._controlled([wish], self.token(wish), words).edited for wish in asked])

    def partedit_controlled(self, asked: Sequence[Wish]) -> Edited:
        """The same for several scenes, with their sources; scenes whose words stand in the same places share a run."""
        places: dict[bytes, list[int]] = {}
        for i, wish in enumerate(asked):
            places.setdefault(self._control(wish, {})[0].until.numpy().tobytes(), []).append(i)
        runs = [self._controlled([asked[i] for i in group], self.token(asked[0]), {}) for group in places.values()]
        order = torch.tensor([i for group in places.values() for i in group]).argsort()
        source, edited, latents, masks = (
            torch.cat([getattr(run, name) for run in runs])[order] for name in ("source", "edited", "latents", "masks")
        )
        return Edited(source, edited, latents, masks)

    def prompt_to_prompt(self, asked: Sequence[Wish], **words: Any) -> torch.Tensor:
        """The same without blending."""
        return torch.cat([self._controlled([wish], None, words).edited for wish in asked])

    def _controlled(self, asked: Sequence[Wish], token: Any, words: dict[str, Any]) -> Edited:
        how = self.how
        model, clip, vae = self.models
        with torch.inference_mode():
            control, source, edit = _one_control([self._control(wish, words) for wish in asked])
            edited, unedited, masks, _ = FeatureBlendSampler.execute(
                model, source, edit, encode(clip, [""]), _latent(asked), how.seed, how.steps, how.cfg,
                how.sampler_name, how.scheduler, 1.0, how.omega, how.blend_until, how.layers, "background",
                part_token=token, prompt_control=control,
            ).args  # fmt: skip
            before, after = (vae.decode(latent["samples"]).cpu() for latent in (unedited, edited))
        return Edited(before, after, unedited["samples"], masks.cpu())

    def _control(self, wish: Wish, words: dict[str, Any]) -> Any:
        """PromptToPrompt's outputs for an edit."""
        settings = {
            "source_text": wish.source, "edit_text": wish.edit("object"), "mode": "replace", "cross_replace": 1.0,
            "self_replace": 0.0, "word_cross_replace": f"{wish.wanted}: 0.4", "word_weights": "",
            "local_blend_words": "",
        }  # fmt: skip
        return PromptToPrompt.execute(self.models[1], **{**settings, **words}).args

    def generate(self, asked: Sequence[Wish]) -> torch.Tensor:
        """The sources [n, 256, 256, 3] alone: KSampler."""
        return self._sample(asked, [wish.source for wish in asked], None, 1.0)

    def prompt_alone(self, asked: Sequence[Wish], style: str) -> torch.Tensor:
        """The edit prompt from the source's noise, without blending: KSampler."""
        return self._sample(asked, [wish.edit(style) for wish in asked], None, 1.0)

    def image_to_image(self, asked: Sequence[Wish], style: str, latents: torch.Tensor, denoise: float) -> torch.Tensor:
        """KSampler with the edit prompt from the source's latent, with other noise than the source came from."""
        return self._sample(asked, [wish.edit(style) for wish in asked], latents, denoise)

    def _sample(
        self, asked: Sequence[Wish], prompts: list[str], latents: torch.Tensor | None, denoise: float
    ) -> torch.Tensor:
        model, clip, vae = self.models
        how, start = self.how, _latent(asked)
        seed = how.seed if latents is None else how.seed + 1
        with torch.inference_mode():
            noise = comfy.sample.prepare_noise(start["samples"], seed, start["batch_index"])
            done = comfy.sample.sample(
                model, noise, how.steps, how.cfg, how.sampler_name, how.scheduler,
                encode(clip, prompts), encode(clip, [""]),
                start["samples"] if latents is None else latents, denoise=denoise, disable_pbar=True, seed=seed,
            )  # fmt: skip
            return vae.decode(done).cpu()


def _one_control(outputs: list[Any]) -> tuple[Any, Any, Any]:
    """PromptToPrompt's outputs for a batch of edits whose words stand in the same places. ValueError if they do not."""
    first = outputs[0][0]
    for control, _, _ in outputs[1:]:
        if not all(
            torch.equal(getattr(control, f), getattr(first, f)) for f in ("mapping", "mapped", "until", "weights")
        ):
            raise ValueError("these prompts have words in different places and cannot be edited in one batch")
    source, edit = (torch.cat([output[i][0][0] for output in outputs]) for i in (1, 2))
    control = replace(first, source_contexts=(source,), edit_contexts=(edit,))
    return control, [[source, outputs[0][1][0][1]]], [[edit, outputs[0][2][0][1]]]


def _latent(asked: Sequence[Wish]) -> dict[str, Any]:
    """Empty latents; ComfyUI gives each the noise that belongs to its number in the batch index."""
    return {"samples": torch.zeros(len(asked), *LATENT), "batch_index": [wish.number for wish in asked]}
