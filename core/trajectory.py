"""Trajectories: how a source image looks at every evaluation of a sampling schedule, and their files.

A trajectory is made by recording a generation or by inverting a picture, and is what every method takes as its source.
Latents are in the sampler's variance-exploding space, x = z · √(1 + σ²), in the model's own scaling (after ComfyUI's
`process_latent_in`), in single precision on the CPU.
"""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors import SafetensorError, safe_open
from safetensors.torch import save_file

VERSION = 1
SAME_LEVEL = 1e-5
"""Relative difference up to which two sigmas are the same noise level."""

Conditioning = list[list[Any]]


@dataclass(frozen=True)
class ModelMark:
    """What a trajectory knows of its model. family: those of one family can share trajectories; fingerprint: of the
    weights; latent_format: how its latents are scaled.
    """

    family: str
    fingerprint: str
    latent_format: str


@dataclass(frozen=True)
class Trajectory:
    """kind: "recorded", "ddim", "null-text", "edit-friendly" or "ledits++"; model: what it was made with.

    sigmas: [steps + 1], the schedule, falling. levels: [evaluations + 1], the sigma of each recorded latent, in the
    order in which a sampler evaluates them, `sigmas[-1]` last; a second-order sampler has more than `steps`. latents:
    [evaluations + 1, images, C, h, w]; the last is the clean picture. sampler, seed: which of ComfyUI's samplers
    evaluates them so, and with which seed of its noise. scheduler, skipped: what the schedule is called, and how many
    of its first steps were left out.

    positive, negative, cfg: the conditioning that it holds for. uncond: [steps, images, tokens, width], the negative
    prompt's embedding of each step, if it was optimised (null-text). noise_maps: [steps, images, C, h, w], what is
    added to the mean of each step of a solver ("ddpm" or "sde-dpm++") with this eta, if there are any.
    """

    kind: str
    model: ModelMark
    sigmas: torch.Tensor
    levels: torch.Tensor
    latents: torch.Tensor
    positive: Conditioning
    negative: Conditioning | None = None
    cfg: float = 1.0
    sampler: str = "euler"
    scheduler: str = ""
    skipped: int = 0
    seed: int = 0
    uncond: torch.Tensor | None = None
    noise_maps: torch.Tensor | None = None
    solver: str = ""
    eta: float = 0.0

    def __post_init__(self) -> None:
        problem = self._problem()
        if problem:
            raise ValueError(f"the trajectory is broken: {problem}")

    def _problem(self) -> str:
        steps = len(self.sigmas) - 1
        if self.sigmas.ndim != 1 or steps < 1 or (self.sigmas.diff() >= 0).any():
            return f"its sigmas do not fall ({self.sigmas.tolist()})"
        if self.latents.ndim != 5 or len(self.latents) != len(self.levels) or len(self.levels) < 2:
            return f"it holds latents {list(self.latents.shape)} for {len(self.levels)} noise levels"
        if not same_level(float(self.levels[-1]), float(self.sigmas[-1])):
            return "its last latent is not that of the last sigma"
        if not torch.isfinite(self.latents).all():
            return "its latents hold NaN or infinite values"
        for name, maps in (("embeddings", self.uncond), ("noise maps", self.noise_maps)):
            if maps is not None and tuple(maps.shape[:2]) != (steps, self.images):
                return f"it holds {name} {list(maps.shape)} for {steps} steps of {self.images} images"
        return ""

    @property
    def steps(self) -> int:
        return len(self.sigmas) - 1

    @property
    def images(self) -> int:
        return self.latents.shape[1]

    @property
    def size(self) -> tuple[int, int]:
        """(height, width) of the latents."""
        return self.latents.shape[-2], self.latents.shape[-1]

    @property
    def start(self) -> torch.Tensor:
        """x_T, [images, C, h, w]."""
        return self.latents[0]

    @property
    def clean(self) -> torch.Tensor:
        """The source picture, [images, C, h, w], without the scale of a schedule that does not end at 0."""
        return self.latents[-1] / clean_scale(self.sigmas)

    def get_ram_usage(self) -> int:
        """Bytes, as ComfyUI's cache asks for them."""
        tensors = [self.sigmas, self.levels, self.latents, self.uncond, self.noise_maps]
        for context, options in [*self.positive, *(self.negative or [])]:
            tensors += [context, *(value for value in options.values() if isinstance(value, torch.Tensor))]
        return sum(tensor.nbytes for tensor in tensors if tensor is not None)

    @cached_property
    def _by_level(self) -> tuple[list[float], list[int]]:
        """The noise levels, falling, each once, and the latent of each: where there are several, the last, which is
        where the sampler goes on from.
        """
        levels: list[float] = []
        places: list[int] = []
        for level, place in sorted(((float(level), place) for place, level in enumerate(self.levels)), reverse=True):
            if levels and same_level(levels[-1], level):  # a trial point of an ancestral sampler is off by rounding
                places[-1] = max(places[-1], place)
            else:
                levels.append(level)
                places.append(place)
        return levels, places

    def at(self, sigma: float) -> torch.Tensor:
        """The source at a noise level, [images, C, h, w].

        Between two recorded levels picture and noise are taken as the straight line through both has them:
        x = x₀ + σ · n. ValueError outside the recorded levels.
        """
        levels, places = self._by_level
        for level, place in zip(levels, places, strict=True):
            if same_level(level, sigma):
                return self.latents[place]
        if not levels[-1] < sigma < levels[0]:
            raise ValueError(
                f"sigma {sigma:.4g} lies outside the trajectory, which holds the noise levels from {levels[0]:.4g} to "
                f"{levels[-1]:.4g}; sample on the trajectory's own sigmas, or on others between these"
            )
        below = next(i for i, level in enumerate(levels) if level < sigma)
        noisy, clear = self.latents[places[below - 1]], self.latents[places[below]]
        share = (sigma - levels[below]) / (levels[below - 1] - levels[below])
        return torch.lerp(clear, noisy, share)

    def step_of(self, sigma: float) -> int:
        """The step whose start is at this noise level or the next above it, from 0."""
        return step_at(self.sigmas.tolist(), sigma)

    def image_of(self, rows: int) -> list[int]:
        """For each of a batch's `rows`, which image it comes from. ValueError if the batch is no multiple of them."""
        if rows % self.images:
            raise ValueError(
                f"latent_image: its batch of {rows} does not fit the trajectory's {self.images} images; give as many, "
                "or a multiple"
            )
        return [row % self.images for row in range(rows)]


def step_at(sigmas: Sequence[float], sigma: float) -> int:
    """The step of a falling schedule to which a noise level belongs, from 0: the last that does not start below it."""
    reached = [i for i, level in enumerate(sigmas[:-1]) if level >= sigma * (1 - SAME_LEVEL)]
    return reached[-1] if reached else 0


def same_schedule(first: torch.Tensor, second: torch.Tensor) -> bool:
    """Whether two schedules have the same noise levels."""
    return len(first) == len(second) and all(map(same_level, first.tolist(), second.tolist()))


def same_level(a: float, b: float) -> bool:
    """Whether two sigmas are the same noise level, up to rounding."""
    return abs(a - b) <= SAME_LEVEL * max(abs(a), abs(b))


def clean_scale(sigmas: torch.Tensor) -> float:
    """By how much x at the end of a schedule is larger than the clean latent, which is taken to live there."""
    return (1 + float(sigmas[-1]) ** 2) ** 0.5


class Playback:
    """What a run reads from a trajectory, evaluation by evaluation.

    in_order: the run has the recorded schedule and sampler, so that the recorded evaluations come back in their order,
    and a second-order sampler gets those it makes between steps. Otherwise they are found by their sigma.
    """

    def __init__(self, trajectory: Trajectory, in_order: bool) -> None:
        self.trajectory = trajectory
        self.in_order = in_order
        self._evaluation = -1

    def next(self, sigma: float, again: bool = False) -> torch.Tensor:
        """The source at the evaluation that begins now, [images, C, h, w]. again: the same evaluation once more."""
        self._evaluation += not again
        levels = self.trajectory.levels
        if self.in_order and self._evaluation < len(levels) and same_level(float(levels[self._evaluation]), sigma):
            return self.trajectory.latents[self._evaluation]
        return self.trajectory.at(sigma)


# ---------------------------------------------------------------- files

_TENSORS = ("sigmas", "levels", "latents", "uncond", "noise_maps")
_TEXTS = ("kind", "sampler", "scheduler", "solver")
_NUMBERS = ("cfg", "skipped", "seed", "eta")


def save(trajectory: Trajectory, path: Path) -> None:
    """Write a trajectory to a `.safetensors` file. FileExistsError if there is one; ValueError if its conditioning
    carries what a file cannot hold (a ControlNet, hooks).
    """
    if path.exists():
        raise FileExistsError(f"{path.name} already exists; trajectories are never overwritten")
    tensors = {name: getattr(trajectory, name) for name in _TENSORS}
    description: dict[str, Any] = {name: getattr(trajectory, name) for name in (*_TEXTS, *_NUMBERS)}
    for name in ("positive", "negative"):
        conditioning: Conditioning | None = getattr(trajectory, name)
        description[name] = None if conditioning is None else []
        for i, (context, options) in enumerate(conditioning or []):
            tensors[f"{name}.{i}"] = context
            plain = {}
            for key, value in options.items():
                if isinstance(value, torch.Tensor):
                    tensors[f"{name}.{i}.{key}"] = value
                elif _is_plain(value):
                    plain[key] = value
                else:
                    raise ValueError(
                        f"trajectory: its {name} prompt carries {key!r} ({type(value).__name__}), which a file cannot "
                        "hold; make the trajectory with a prompt that has neither ControlNet nor hooks"
                    )
            description[name].append(plain)
    metadata = {
        "format": "scalpel trajectory",
        "schema_version": str(VERSION),
        "model_family": trajectory.model.family,
        "model_fingerprint": trajectory.model.fingerprint,
        "latent_format": trajectory.model.latent_format,
        "description": json.dumps(description),
    }
    kept = {name: tensor.detach().cpu().contiguous().clone() for name, tensor in tensors.items() if tensor is not None}
    save_file(kept, str(path), metadata)


def _is_plain(value: Any) -> bool:
    """Whether JSON gives the value back as it was, lists for tuples apart."""
    if isinstance(value, list | tuple):
        return all(map(_is_plain, value))
    return value is None or isinstance(value, bool | int | float | str)


def load(path: Path) -> Trajectory:
    """Read a trajectory. ValueError, with the file's name, if it is none, is damaged, or of a newer version."""
    try:
        with safe_open(str(path), "pt") as file:
            metadata = file.metadata() or {}
            if metadata.get("format") != "scalpel trajectory":
                raise ValueError("it is not a trajectory; accepted are files that Save Trajectory wrote")
            if int(metadata["schema_version"]) > VERSION:
                raise ValueError(
                    f"its format is version {metadata['schema_version']}, and this Scalpel reads up to version "
                    f"{VERSION}; update Scalpel"
                )
            tensors = {name: file.get_tensor(name).clone() for name in file.keys()}  # noqa: SIM118 - not a dict
        return _from_file(tensors, metadata)
    except SafetensorError as error:
        raise ValueError(f"trajectory file {path.name!r}: it is not a whole safetensors file ({error})") from error
    except KeyError as error:
        raise ValueError(f"trajectory file {path.name!r}: it lacks {error}") from error
    except (ValueError, TypeError, AttributeError) as error:
        raise ValueError(f"trajectory file {path.name!r}: {error}") from error


def _from_file(tensors: Mapping[str, torch.Tensor], metadata: Mapping[str, str]) -> Trajectory:
    description = json.loads(metadata["description"])

    def conditioning(name: str) -> Conditioning | None:
        entries: Sequence[dict[str, Any]] | None = description[name]
        if entries is None:
            return None
        return [
            [tensors[f"{name}.{i}"], plain | _tensors_of(tensors, f"{name}.{i}.")] for i, plain in enumerate(entries)
        ]

    return Trajectory(
        model=ModelMark(metadata["model_family"], metadata["model_fingerprint"], metadata["latent_format"]),
        positive=conditioning("positive") or [],
        negative=conditioning("negative"),
        **{name: tensors.get(name) for name in _TENSORS},  # type: ignore[arg-type]
        **{name: str(description[name]) for name in _TEXTS},  # type: ignore[arg-type]
        cfg=float(description["cfg"]),
        skipped=int(description["skipped"]),
        seed=int(description["seed"]),
        eta=float(description["eta"]),
    )


def _tensors_of(tensors: Mapping[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    return {name.removeprefix(prefix): tensor for name, tensor in tensors.items() if name.startswith(prefix)}
