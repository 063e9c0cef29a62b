"""InstDiffEdit on parts-world, as the paper's Editing-Mask benchmark asks it: is the mask where the edit belongs, does
the picture change there and nowhere else::

    python dev.py bench instdiffedit [--methods instdiffedit diffedit …] [--speed] [--markdown BENCHMARKS.md]
    python dev.py bench instdiffedit --sweep --first 1000 --scenes 30
    python dev.py bench instdiffedit --folder Editing-Mask --checkpoint FILE   # one's own weights

Scenes are rendered, with seeds that nothing was trained on and exact masks. In turn the edit is of the main object, of
the second of two objects, and of the background; its text is a short phrase, as in Editing-Mask: "a green dog", "on
white snow". `--change` says how the object changes: its kind, its colour, or both. Every method's mask goes to the same
inpainting. Counted scenes are 0 to 99; choose settings with `--first 1000`.

`--folder` takes what the authors published: `image/NAME.jpg`, `mask/NAME.png` and a list of lines `NAME <> … <> old
phrase <> new phrase`.
"""

from __future__ import annotations

import argparse
import functools
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.sd
import numpy as np
import torch
from PIL import Image

from ..core.instdiffedit import CURRENT, MEAN, MaskSettings, at_pixels, smoothed
from ..core.unet import instdiffedit as core
from ..core.unet.inputs import model_sigmas
from ..nodes import instdiffedit as nodes
from ..partsworld import loader, tokens
from ..partsworld.render import render
from ..partsworld.scene import BACKGROUNDS, COLOURS, PARTS, Scene, sample_scene
from . import _report
from ._diffedit import DiffEdit
from ._pictures import contact_sheet, encode
from .behaviour import overlap
from .feature_blend import clock
from .inversion import Counted

SCENES = 66_000_000
"""Seed of scene number 0."""
OTHER_SEED = 10_000
MAIN, SECOND, BACKGROUND = EDITS = ("main object", "second object", "background")
CHANGES = ("kind", "colour", "both")
VISIBLE = 1 / 255
IOU, RATIO, FASTER, COST = 0.56, 3.7, 5.0, 1.05
"""What is aimed at: the paper's table 1, and the cost beside img2img of the same rows."""
MAPS = 10
"""DiffEdit's number of noises."""
LABELS = {
    "vae": "VAE round trip alone",
    "sdedit-0.5": "SDEdit, 0.5",
    "sdedit-0.7": "SDEdit, 0.7",
    "diffedit": "DiffEdit's mask",
    "diffedit-whole": "DiffEdit, its own edit",
    "diffedit-full": "DiffEdit's mask, denoised to the end",
    "instdiffedit": "InstDiffEdit",
    "all-steps": "InstDiffEdit, as many steps as inpainting",
    "previous": "InstDiffEdit, background of the step before",
    "current": "InstDiffEdit, maps of the step alone",
}
SHOWN = 9


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Job:
    """One edit: the picture [H, W, 3] in 0…1, where it belongs [H, W] bool, what is there and what shall be."""

    name: str
    edit: str
    picture: np.ndarray
    mask: np.ndarray
    source: str
    text: str


def scene_job(number: int, change: str) -> Job:
    """The edit of scene `number`: of EDITS in turn."""
    edit = EDITS[number % len(EDITS)]
    things = 2 if edit == SECOND else 1 + number % 2
    for seed in itertools.count(SCENES + number, OTHER_SEED):
        scene = sample_scene(seed, things=things)
        if len({t.kind for t in scene.things}) == len({t.colour for t in scene.things}) == things:
            break
    drawn = render(scene)
    rng = np.random.default_rng((SCENES + number, 13))
    if edit == BACKGROUND:
        ground = _other(rng, list(BACKGROUNDS), [scene.background])
        objects = np.logical_or.reduce([_seen(scene, drawn.image, i) for i in range(things)])
        return Job(str(number), edit, drawn.image, ~objects, BACKGROUNDS[scene.background], BACKGROUNDS[ground])
    index = things - 1 if edit == SECOND else 0
    kinds, colours = [t.kind for t in scene.things], [t.colour for t in scene.things]
    kind = _other(rng, list(PARTS), kinds) if change in ("kind", "both") else kinds[index]
    colour = _other(rng, list(COLOURS), colours) if change in ("colour", "both") else colours[index]
    source, text = phrase(kinds[index], colours[index]), phrase(kind, colour)
    return Job(str(number), edit, drawn.image, _seen(scene, drawn.image, index), source, text)


def _other(rng: np.random.Generator, names: Sequence[str], than: Sequence[str]) -> str:
    return str(rng.choice([name for name in names if name not in than]))


def phrase(kind: str, colour: str) -> str:
    """ "an orange dog" """
    return f"{'an' if colour[0] in 'aeiou' else 'a'} {colour} {kind}"


def _seen(scene: Scene, picture: np.ndarray, index: int) -> np.ndarray:
    """Where an object is, a car's window with it."""
    return np.abs(picture - render(scene.without(index)).image).max(-1) > VISIBLE


def folder_jobs(folder: Path, size: int) -> Iterator[Job]:
    """The edits of a folder laid out as Editing-Mask is, its pictures stretched to size × size as its authors do.

    ValueError if the list is missing, or names a picture or a mask that is.
    """
    lists = sorted(folder.glob("*.txt"))
    if len(lists) != 1:
        raise ValueError(f"{folder}: it holds {len(lists)} lists (*.txt); one is needed, of lines 'NAME <> … <> TEXT'")
    for line in filter(None, map(str.strip, lists[0].read_text(encoding="utf-8").splitlines())):
        fields = line.split(" <> ")
        if len(fields) < 3:
            raise ValueError(f"{lists[0].name}: {line!r} is not of the form 'NAME <> … <> old phrase <> new phrase'")
        name = Path(fields[0]).stem if fields[0].upper().endswith((".JPEG", ".JPG", ".PNG")) else fields[0]
        picture, mask = (_one_of(folder / part, name, line) for part in ("image", "mask"))
        pixels = Image.open(picture).convert("RGB").resize((size, size), Image.Resampling.BICUBIC)
        drawn = Image.open(mask).convert("L").resize((size, size), Image.Resampling.NEAREST)
        text = fields[-1] if len(fields) > 3 else f"a {fields[-1]}"  # ImageNet's classes, as their program words them
        yield Job(
            name, "all", np.asarray(pixels, np.float32) / 255, np.asarray(drawn) > 127, fields[-2], text
        )  # fmt: skip


def _one_of(folder: Path, name: str, line: str) -> Path:
    """The file of this name, whatever kind of picture it is; Imagen's have a number behind it ("1_2.jpg")."""
    for pattern in (f"{name}.*", f"{name}_*.*", f"*_{name}.*", f"{name}-*.*"):
        found = sorted(folder.glob(pattern))
        if found:
            return found[0]
    raise ValueError(f"{folder}: there is no picture of {name!r}, which the list has in {line!r}")


# ---------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Result:
    """mask: [H, W] bool, None for a method without one; edited: [H, W, 3]; rows, seconds: of the mask, out of latents,
    and of all.
    """

    mask: np.ndarray | None
    edited: np.ndarray
    rows: tuple[int, int]
    seconds: tuple[float, float]


class Bench:
    """A model and its settings. Everything runs under `torch.inference_mode()`, as in the server."""

    def __init__(
        self, models: tuple[Any, Any, Any], sampling: nodes.Sampling, settings: MaskSettings, mask_steps: int
    ) -> None:
        model, self.clip, self.vae = models
        self.unet = Counted(model)
        self.sampling = sampling
        self.mask_steps = mask_steps
        self.settings = settings
        self.nothing = encode(self.clip, [""])

    @functools.cached_property
    def diffedit(self) -> DiffEdit:
        """diffusers' pipeline on the same weights."""
        return DiffEdit(self.unet.model)

    def _taken(self, method: str) -> int:
        """UNet rows since it was last asked."""
        return self.unet.taken() + (self.diffedit.taken() if method.startswith("diffedit") else 0)

    def run(self, method: str, job: Job) -> Result:
        """What a method makes of a picture."""
        self._taken(method)
        start = clock()
        latent = tokens.encode(self.vae, torch.from_numpy(job.picture)[None])
        if method == "vae":
            return Result(None, self._decode(latent), (0, 0), (0.0, 0.0))
        if method.startswith("sdedit"):
            drawn = self._decode(self._sample(job, latent, float(method.partition("-")[2])))
            return Result(None, drawn, (0, self._taken(method)), (0.0, clock() - start))
        encoded = clock()
        found = self.found(method, job, latent)
        mask = at_pixels(found, (8 * latent.shape[-2], 8 * latent.shape[-1]))
        rows, seconds = self._taken(method), clock() - encoded
        if method == "diffedit-whole":
            latent = self.diffedit.edit(latent, found, self._texts(job), self.sampling.steps, self.sampling.cfg)
        else:
            latent = self._sample(job, latent, 1.0, mask)
        edited = self._decode(latent)
        return Result(mask[0].numpy() > 0.5, edited, (rows, rows + self._taken(method)), (seconds, clock() - start))

    def found(self, method: str, job: Job, latent: torch.Tensor) -> torch.Tensor:
        """A method's mask in the latent's size, [1, h, w] of 0 and 1."""
        own = self._seeded(job)
        if method == "diffedit-full":
            return self._denoised_apart(job, latent)
        if method.startswith("diffedit"):
            return self.diffedit.mask(latent, self._texts(job), own.steps, own.cfg, own.seed)
        return self.find(method, job, latent).masks[:, -1]

    def _texts(self, job: Job) -> list[torch.Tensor]:
        return [*(encode(self.clip, [text])[0][0] for text in (job.source, job.text)), self.nothing[0][0]]

    def find(self, method: str, job: Job, latent: torch.Tensor) -> core.Found:
        """The node's work, or a variant of it."""
        settings = replace(self.settings, over_steps=CURRENT if method == "current" else MEAN)
        background = core.CURRENT if method == "previous" else core.NEXT
        own = self._seeded(job)
        sampling = own if method == "all-steps" else replace(own, steps=self.mask_steps)
        return nodes.find(
            self.unet.model, self.clip, job.text, self.nothing, {"samples": latent}, sampling, settings, background,
            mask_only=True,
        )  # fmt: skip

    def _seeded(self, job: Job) -> nodes.Sampling:
        return replace(self.sampling, seed=int(job.name) if job.name.isdigit() else 0)

    def _decode(self, latent: torch.Tensor) -> np.ndarray:
        return self.vae.decode(latent).cpu()[0].numpy()

    def _sample(self, job: Job, latent: torch.Tensor, denoise: float, mask: torch.Tensor | None = None) -> torch.Tensor:
        """Img2img by ComfyUI's sampler, or, with a mask, its inpainting: the picture is put back around it."""
        own = self._seeded(job)
        noise = comfy.sample.prepare_noise(latent, own.seed)
        sigmas = core.partial_sigmas(
            model_sigmas(self.unet.model, own.sampler_name, own.scheduler, own.steps, 1.0), denoise
        )
        return comfy.sample.sample_custom(
            self.unet.model, noise, own.cfg, comfy.samplers.sampler_object(own.sampler_name), sigmas,
            encode(self.clip, [job.text]), self.nothing, latent, noise_mask=mask, disable_pbar=True, seed=own.seed,
        )  # fmt: skip

    def _denoised_apart(self, job: Job, latent: torch.Tensor) -> torch.Tensor:
        """DiffEdit's mask as the program has it that InstDiffEdit's authors timed, in our own few lines.

        Where the noise that two texts predict differs at the end of ten whole denoisings each, blurred, above 0.3.
        """
        own = replace(self._seeded(job), rounds=MAPS)
        noise = core.independent_noise({}, latent, MAPS, own.seed)
        sigmas = model_sigmas(self.unet.model, own.sampler_name, own.scheduler, own.steps, 1.0)
        predictions = []
        for text in (job.source, job.text):
            seen: list[torch.Tensor] = []
            comfy.sample.sample_custom(
                self.unet.model, noise, own.cfg, comfy.samplers.sampler_object("euler"),
                core.partial_sigmas(sigmas, 0.5), encode(self.clip, [text]), self.nothing,
                latent.repeat(MAPS, 1, 1, 1), disable_pbar=True, seed=own.seed,
                callback=lambda _, denoised, x, __, seen=seen: seen.append(x - denoised),
            )  # fmt: skip
            predictions.append(seen[-1])
        difference = (predictions[0] - predictions[1]).square().sum(1).sqrt().mean(0)[None].cpu()
        return (smoothed(difference) > 0.3).float()


# ---------------------------------------------------------------- what came out


def measured(job: Job, result: Result) -> dict[str, Any]:
    """IoU of the mask, and by how much pixels changed in the true mask and outside (the paper's I to III)."""
    change = np.abs(result.edited - job.picture).mean(-1)
    return {
        "name": job.name, "edit": job.edit, "text": job.text,
        "iou": None if result.mask is None else overlap(result.mask, job.mask),
        "inside": float(change[job.mask].mean()), "outside": float(change[~job.mask].mean()),
        "rows": result.rows, "seconds": result.seconds,
    }  # fmt: skip


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values)) if values else float("nan")


HEAD = ("method", "IoU", *EDITS, "C_m", "C_non", "C_m / C_non", "UNet rows: mask", "all", "seconds: mask", "all")


def row(label: str, scenes: Sequence[dict[str, Any]]) -> list[str]:
    """A method's line of the table. The ratio is of the means, as in the paper."""
    ious = [s for s in scenes if s["iou"] is not None]
    by_edit = [[s["iou"] for s in ious if s["edit"] == edit] for edit in EDITS]
    inside, outside = (_mean([s[name] for s in scenes]) for name in ("inside", "outside"))
    cells = [_mean([s["iou"] for s in ious]), *map(_mean, by_edit)]
    told = [f"{cell:.2f}" if cell == cell else "–" for cell in cells]
    rows, seconds = (np.mean([s[name] for s in scenes], 0) for name in ("rows", "seconds"))
    return [
        label, *told, f"{inside:.1%}", f"{outside:.1%}", f"{inside / max(outside, 1e-9):.2f}",
        *(f"{count:.0f}" for count in rows), *(f"{count:.1f}" for count in seconds),
    ]  # fmt: skip


SAID = """{count} {what}. Text: {text}. {steps} steps, {sampler}, {scheduler}, cfg {cfg:g}; InstDiffEdit with \
{mask_steps} steps, strength {strength:g}, rounds {rounds}, γ₁ {related:g}, γ₂ {unrelated:g}, φ {threshold:g}."""
NOTES = f"""- IoU: of the mask with the exact one, in pixels; by edit beside it. C_m, C_non: mean change of a pixel \
inside and outside the exact mask, against the picture that was given, as in the paper; the VAE's own loss is in both.
- All masks go to the same inpainting: ComfyUI's noise mask, full denoise, no inpainting checkpoint.
- DiffEdit: diffusers' pipeline with the same weights in diffusers' UNet, its own settings but for steps and cfg, and \
the phrase for what is there as reference text. "DiffEdit's mask": one guided prediction for each of {MAPS} noises and \
two texts. (As both texts have the same negative prompt, guidance cancels out of that mask: half the rows would do.) \
"Its own edit": the same mask, then its inversion and denoising in place of our inpainting. "Denoised to the end": our \
own few lines, {MAPS} whole guided denoisings for each text, as in the program that InstDiffEdit's authors compare with.
- Rows of InstDiffEdit are without the last step's, which is left half-way. Seconds: of the processor, one thread; of \
the mask without the VAE, of all with it."""


def report(numbers: dict[str, Any]) -> str:
    """The section of BENCHMARKS.md."""
    texts = []
    for change, found in numbers["results"].items():
        count = max(len(scenes) for scenes in found.values())
        what = f"scenes: {', '.join(EDITS)} in turn" if change in CHANGES else "pictures"
        about = {
            "kind": "another kind of object in the same colour", "colour": "the same kind in another colour",
            "both": "another kind in another colour",
        }.get(change, "the list's")  # fmt: skip
        told = SAID.format(count=count, what=what, text=about, **numbers["settings"])
        lines = [
            row(LABELS[method] + (f", first {len(scenes)}" if len(scenes) < count else ""), scenes)
            for method, scenes in found.items()
        ]
        texts.append(f"### InstDiffEdit: {change}\n\n{told}\n\n{_report.table(HEAD, lines)}\n\n{aims(found)}".strip())
    if numbers["sweep"]:
        texts.append(sweep_report(numbers["sweep"]))
    if texts:
        texts.append(NOTES)
    if numbers["speed"]:
        texts.append(speed_report(numbers["speed"]))
    return "\n\n".join(texts)


def aims(found: dict[str, list[dict[str, Any]]]) -> str:
    """Which of the paper's numbers were reached."""
    own = found.get("instdiffedit")
    if not own:
        return ""
    iou = _mean([s["iou"] for s in own])
    ratio = _mean([s["inside"] for s in own]) / _mean([s["outside"] for s in own])
    lines = [_aim("IoU", iou, "", IOU), _aim("C_m / C_non", ratio, "", RATIO)]
    for name, part, what in (
        ("diffedit", 0, "the mask is found faster than DiffEdit's mask is made"),
        ("diffedit-full", 0, "than that of whole denoisings"),
        ("diffedit-full", 1, "the whole edit, as the paper times it, is faster than with whole denoisings"),
        ("diffedit-whole", 1, "than DiffEdit's own edit"),
    ):
        if name in found:
            same = {s["name"] for s in found[name]}
            ours = _mean([s["seconds"][part] for s in own if s["name"] in same])
            lines.append(_aim(what, _mean([s["seconds"][part] for s in found[name]]) / ours, " times", FASTER))
    return "; ".join(lines) + "."


def _aim(what: str, value: float, unit: str, least: float) -> str:
    return f"{what}: {value:.2f}{unit} (aim: {least:g}{'' if value >= least else ', missed'})"


# ---------------------------------------------------------------- choosing settings


def sweep(bench: Bench, jobs: Sequence[Job], steps: Sequence[int], rounds: Sequence[int], strengths: Sequence[float],
          thresholds: Sequence[float]) -> list[dict[str, Any]]:  # fmt: skip
    """Mean IoU for every combination."""
    results = []
    for number, count, strength, threshold in itertools.product(steps, rounds, strengths, thresholds):
        bench.mask_steps = number
        bench.sampling = replace(bench.sampling, rounds=count, strength=strength)
        bench.settings = replace(bench.settings, threshold=threshold)
        began = time.time()
        scenes: list[dict[str, Any]] = []
        for job in jobs:
            bench.unet.taken()
            latent = tokens.encode(bench.vae, torch.from_numpy(job.picture)[None])
            mask = at_pixels(bench.found("instdiffedit", job, latent), job.mask.shape)[0].numpy() > 0.5
            scenes.append({"edit": job.edit, "iou": overlap(mask, job.mask), "rows": bench.unet.taken()})
        results.append({
            "steps": number, "rounds": count, "strength": strength, "threshold": threshold, "count": len(scenes),
            "iou": _mean([s["iou"] for s in scenes]), "rows": _mean([s["rows"] for s in scenes]),
            **{edit: _mean([s["iou"] for s in scenes if s["edit"] == edit]) for edit in EDITS},
        })  # fmt: skip
        print(f"  {time.time() - began:.0f} s: {results[-1]}", flush=True)
    return results


def sweep_report(found: Sequence[dict[str, Any]]) -> str:
    """Markdown: the settings as lines."""
    names = ("steps", "rounds", "strength", "threshold")
    lines = [
        [*(f"{f[name]:g}" for name in names), f"{f['iou']:.3f}", *(f"{f[edit]:.2f}" for edit in EDITS),
         f"{f['rows']:.0f}"]
        for f in found
    ]  # fmt: skip
    best = max(found, key=lambda f: float(f["iou"]))
    told = ", ".join(f"{name} {best[name]:g}" for name in names)
    return (
        f"### InstDiffEdit: settings\n\nIoU on {found[0]['count']} other scenes, for choosing. Best: {told}.\n\n"
        + _report.table((*names, "IoU", *EDITS, "UNet rows"), lines)
    )


# ---------------------------------------------------------------- speed


def speed(bench: Bench, job: Job, turns: int) -> dict[str, Any]:
    """The nodes beside ComfyUI's img2img of as many rows, taking turns; ratios within a turn."""
    own = bench.sampling
    model = bench.unet.model
    latent = {"samples": tokens.encode(bench.vae, torch.from_numpy(job.picture)[None])}
    samples = latent["samples"].repeat(own.rounds, 1, 1, 1)
    sigmas = core.partial_sigmas(model_sigmas(model, own.sampler_name, own.scheduler, own.steps, 1.0), own.strength)

    def plain() -> None:
        comfy.sample.sample_custom(
            model, comfy.sample.prepare_noise(samples, 0), own.cfg, comfy.samplers.sampler_object(own.sampler_name),
            sigmas, bench.clip.encode_from_tokens_scheduled(bench.clip.tokenize(job.text)), bench.nothing, samples,
            disable_pbar=True, seed=0,
        )  # fmt: skip

    def node(mask_only: bool) -> Callable[[], Any]:
        return lambda: nodes.find(
            model, bench.clip, job.text, bench.nothing, latent, own, bench.settings, mask_only=mask_only
        )

    ways = {"plain": plain, "sampler": node(False), "mask": node(True)}
    rows = {}
    for name, way in ways.items():  # also warms up
        bench.unet.taken()
        way()
        rows[name] = bench.unet.taken()
    seconds = []
    for _ in range(turns):
        seconds.append({name: _seconds(way) for name, way in ways.items()})
    ratios = {name: float(np.median([s[name] / s["plain"] for s in seconds])) for name in ("sampler", "mask")}
    return {
        "turns": turns,
        "steps": own.steps,
        "rounds": own.rounds,
        "rows": rows,
        "plain": float(np.median([s["plain"] for s in seconds])),
        "ratios": ratios,
    }


def _seconds(way: Callable[[], Any]) -> float:
    start = clock()
    way()
    return clock() - start


def speed_report(found: dict[str, Any]) -> str:
    """Markdown."""
    told = "" if found["ratios"]["sampler"] <= COST else ", missed"
    return (
        "### InstDiffEdit: speed\n\n"
        f"Beside ComfyUI's img2img of as many rows ({found['steps']} steps, rounds {found['rounds']}; median of "
        f"{found['turns']} turns of all, processor time): "
        f"InstDiffEdit Sampler {found['ratios']['sampler']:.3f} times as long (aim: {COST:g}{told}), InstDiffEdit Mask "
        f"{found['ratios']['mask']:.3f} times. Img2img: {found['plain']:.2f} s."
    )


# ---------------------------------------------------------------- what is run


def empty_numbers() -> dict[str, Any]:
    """Before anything is measured."""
    return {"results": {}, "sweep": [], "speed": {}, "settings": {}}


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The numbers of several runs as one's: of other methods, changes or scenes. ValueError if settings differ."""
    numbers = empty_numbers()
    for file in files:
        more = json.loads(file.read_text(encoding="utf-8"))
        if more["results"] and numbers["settings"] not in ({}, more["settings"]):
            raise ValueError(f"{file}: its settings are {more['settings']}, those before {numbers['settings']}")
        for group, found in more["results"].items():
            methods = numbers["results"].setdefault(group, {})
            for method, scenes in found.items():
                by_name = {scene["name"]: scene for scene in (*methods.get(method, []), *scenes)}
                methods[method] = list(by_name.values())
            numbers["results"][group] = {name: methods[name] for name in LABELS if name in methods}
        numbers["sweep"] += more["sweep"]
        numbers["speed"] = more["speed"] or numbers["speed"]
        numbers["settings"] = more["settings"] if more["results"] else numbers["settings"]
    return numbers


def run(arguments: argparse.Namespace, numbers: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fill in what the command line asks for; `keep` is called after every picture."""
    sampling = nodes.Sampling(
        0, arguments.steps, arguments.cfg, arguments.sampler, arguments.scheduler, arguments.strength, arguments.rounds
    )
    settings = MaskSettings(arguments.related, arguments.unrelated, arguments.threshold)
    numbers["settings"] = {
        "steps": sampling.steps, "mask_steps": arguments.mask_steps, "sampler": sampling.sampler_name,
        "scheduler": sampling.scheduler,
        "cfg": sampling.cfg, "strength": sampling.strength, "rounds": sampling.rounds, "related": settings.related,
        "unrelated": settings.unrelated, "threshold": settings.threshold,
    }  # fmt: skip
    if arguments.checkpoint:
        models = comfy.sd.load_checkpoint_guess_config(str(arguments.checkpoint))[:3]
    else:
        models = loader.load(arguments.weights)
    bench = Bench(models, sampling, settings, arguments.mask_steps)
    if arguments.folder:
        groups = {arguments.folder.name: list(folder_jobs(arguments.folder, arguments.size))}
    else:
        numbers_of = range(arguments.first, arguments.first + arguments.scenes)
        groups = {change: [scene_job(number, change) for number in numbers_of] for change in arguments.change}
    if arguments.sweep:
        jobs = next(iter(groups.values()))
        numbers["sweep"] = sweep(bench, jobs, arguments.sweep_steps, arguments.sweep_rounds,
                                 arguments.sweep_strengths, arguments.sweep_thresholds)  # fmt: skip
        keep()
        return
    if arguments.speed:
        numbers["speed"] = speed(bench, next(iter(groups.values()))[0], arguments.turns)
        keep()
    for group, jobs in groups.items():
        shown: list[tuple[str, list[Result]]] = []
        for method in arguments.methods:
            began = time.time()
            results: list[Result] = []
            scenes: list[dict[str, Any]] = []
            for job in jobs[: arguments.full_scenes] if method == "diffedit-full" else jobs:
                result = bench.run(method, job)
                scenes.append(measured(job, result))
                results += [result] if len(results) < SHOWN else []
                numbers["results"].setdefault(group, {})[method] = scenes
                keep()
            shown += [(LABELS[method], results)] if method != "vae" else []
            print(f"  {time.time() - began:.0f} s: {group}, {' | '.join(row(LABELS[method], scenes))}", flush=True)
        if arguments.sheet:
            sheet(arguments.sheet.with_stem(f"{arguments.sheet.stem}-{group}"), jobs, shown)


def sheet(path: Path, jobs: Sequence[Job], shown: Sequence[tuple[str, list[Result]]]) -> None:
    """A line for each picture: it, its exact mask, and each method's mask and edit."""
    cells: list[tuple[np.ndarray, str]] = []
    for place in range(min(len(results) for _, results in shown)):
        job = jobs[place]
        cells += [(job.picture, f'{job.name}: "{job.text}"'), (np.repeat(job.mask[..., None], 3, -1), "exact mask")]
        for label, results in shown:
            mask = results[place].mask
            if mask is not None:
                cells.append((np.repeat(mask[..., None], 3, -1), f"{label}: {overlap(mask, job.mask):.2f}"))
            cells.append((results[place].edited, label))
    columns = 2 + sum(2 if results[0].mask is not None else 1 for _, results in shown)
    contact_sheet(path, [p for p, _ in cells], [c for _, c in cells], [False] * len(cells), columns)


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench instdiffedit", description=__doc__)
    _report.add_arguments(parser, "instdiffedit")
    parser.add_argument("--methods", nargs="*", choices=LABELS, default=list(LABELS))
    parser.add_argument("--change", nargs="+", choices=CHANGES, default=list(CHANGES))
    parser.add_argument("--scenes", type=int, default=100)
    parser.add_argument("--full-scenes", type=int, default=100, help="of DiffEdit, denoised to the end")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene; validation: from 1000 on")
    given = {i.id: i.default for i in nodes.InstDiffEditMask.define_schema().inputs if hasattr(i, "default")}
    parser.add_argument("--steps", type=int, default=20, help="of inpainting, SDEdit and DiffEdit")
    parser.add_argument("--mask-steps", type=int, default=given["steps"], help="of InstDiffEdit")
    for name in ("cfg", "strength", "related", "unrelated", "threshold"):
        parser.add_argument(f"--{name}", type=float, default=given[name])
    parser.add_argument("--rounds", type=int, default=given["rounds"])
    parser.add_argument("--sampler", default=given["sampler_name"])
    parser.add_argument("--scheduler", default=given["scheduler"])
    parser.add_argument("--sweep", action="store_true", help="settings against each other, and nothing else")
    parser.add_argument("--sweep-steps", type=int, nargs="+", default=[4, 8, 20])
    parser.add_argument("--sweep-rounds", type=int, nargs="+", default=[1, 2, 3, 5])
    parser.add_argument("--sweep-strengths", type=float, nargs="+", default=[0.4, 0.5, 0.6])
    parser.add_argument("--sweep-thresholds", type=float, nargs="+", default=[0.1, 0.2, 0.3])
    parser.add_argument("--speed", action="store_true", help="beside img2img of as many rows")
    parser.add_argument("--turns", type=int, default=9)
    parser.add_argument("--folder", type=Path, help="pictures, masks and a list, as in Editing-Mask")
    parser.add_argument("--size", type=int, default=512, help="side that --folder's pictures are stretched to")
    parser.add_argument("--checkpoint", type=Path, help="an SD checkpoint instead of the demo model")
    parser.add_argument("--weights", type=Path, default=loader.WEIGHTS, help="another demo model")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="pictures, FILE-CHANGE.png")
    parser.add_argument("--merge", nargs="+", type=Path, metavar="FILE.json", help="report these runs, measure nothing")
    arguments = parser.parse_args(argv)

    def keep() -> None:
        if arguments.json:
            arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")

    numbers = merged(arguments.merge) if arguments.merge else empty_numbers()
    if not arguments.merge:
        with torch.inference_mode():
            run(arguments, numbers, keep)
    _report.publish(arguments, f"{report(numbers)}\n\n{_report.where_it_ran()}", numbers)


if __name__ == "__main__":
    main()
