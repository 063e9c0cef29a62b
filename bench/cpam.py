"""CPAM on parts-world: does the object change as asked, and does the rest stay; beside other ways to edit::

    python dev.py bench cpam [--only replace remove …] [--methods cpam sdedit-0.6 …] [--markdown BENCHMARKS.md]

Pictures are rendered, with seeds that nothing was trained on and exact masks, and inverted by DDIM with an empty
prompt. The judge (`partsworld/judge.py`) says what an edit shows. Tasks: `replace` (another kind, another colour, or
both, in turn), `keep` (the prompt names kind and main colour only, and sampling starts from fresh noise, so that the
pose is new and colours of other parts can come from the source alone), `background` and `remove`. Options of CPAM are
the node's defaults unless given; choose them with `--first 100`, as the counted scenes are 0 to 49. With `--json` the
numbers are kept after every method, and `--merge FILE …` makes one report of several such files: of other tasks,
methods, options or scenes. `--speed` measures masked attention by itself.
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.ldm.modules.attention
import comfy.sample
import comfy.utils
import numpy as np
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP
from comfy_extras.nodes_custom_sampler import KSamplerSelect, SamplerCustom

from ..core import cpam as arithmetic
from ..core.trajectory import Trajectory
from ..core.unet.attention import Replacement, attention, replace_attention
from ..core.unet.evaluation import Evaluation
from ..core.unet.layers import Address, address_of, layer_table
from ..core.unet.rider import Rider
from ..devtools.demo import ssim
from ..nodes import cpam as nodes
from ..nodes.inversion import DDIMInversion
from ..partsworld import loader, tokens
from ..partsworld.judge import SIDE, Judge, Network, Verdict
from ..partsworld.render import render
from ..partsworld.scene import BACKGROUNDS, COLOURS, MAIN_PART, PARTS, Scene, Thing, sample_scene
from . import _report
from ._pictures import contact_sheet, encode, psnr
from .behaviour import core, overlap
from .feature_blend import clock
from .inversion import Counted

SCENES = 44_000_000
"""Seed of scene number 0."""
OTHER_SEED = 10_000
"""Added to a seed until the scene has what its task needs."""
TASKS = {
    "replace": nodes.REPLACE,
    "keep": nodes.KEEP,
    "background": nodes.BACKGROUND,
    "remove": nodes.REMOVE,
}
"""And what the node calls them."""
CEILING = "ceiling"
LABELS = {
    CEILING: "VAE round trip alone",
    "cpam": "CPAM",
    "cpam-self": "CPAM, self-attention only",
    "cpam-blend": "CPAM with latent blending",
    "masactrl": "mutual self-attention",
    "sdedit-0.6": "SDEdit, 0.6",
    "sdedit-0.8": "SDEdit, 0.8",
    "blending": "latent blending",
}
LABELS_OF_REMOVE = {
    CEILING: "VAE round trip of the empty scene",
    "cpam": "CPAM, prompt of the empty scene",
    "cpam-self": "CPAM, empty prompt",
    "cpam-blend": "CPAM with latent blending, empty prompt",
}
METHODS = {
    task: [name for name in LABELS if name != CEILING and not (task == "keep" and "blend" in name)] for task in TASKS
}
SELF_OPTIONS = {
    "dilation": ("replace", "keep", "remove"),
    "background_keys": tuple(TASKS),
    "plain_fraction": tuple(TASKS),
    "softness": tuple(TASKS),
    "start_step": ("keep",),
    "start_layer": ("keep",),
}
"""Options of CPAM Self-Attention, and the tasks that they matter to."""
CROSS_OPTIONS = {"refine": tuple(TASKS), "refine_threshold": tuple(TASKS)}
MUTUAL_OPTIONS = {"mutual_step": tuple(TASKS), "mutual_layer": tuple(TASKS)}
OPTIONS_OF = {
    "cpam": SELF_OPTIONS | CROSS_OPTIONS,
    "cpam-self": SELF_OPTIONS,
    "cpam-blend": SELF_OPTIONS | CROSS_OPTIONS,
    "masactrl": MUTUAL_OPTIONS,
    "blending": {"dilation": SELF_OPTIONS["dilation"]},
}
AROUND = 0.1
"""How far from an object the background begins, told as CPAM's dilation is, whatever the methods are given."""
REMOVED = 25.0  # dB against the empty scene, from which on an object counts as removed without a trace
VISIBLE = 1 / 255  # a pixel that an object changes by more belongs to it
EXACT = 90.0  # dB; above it a mean says nothing
CFG = 7.5
KEY = "scalpel.bench.mutual"
SHOWN = 4  # scenes on a sheet


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Wish:
    """What an edited picture should show. `kind` is None if it is to be empty."""

    prompt: str
    kind: str | None
    colour: str | None
    background: str


def scene_of(task: str, number: int) -> Scene:
    """A scene of one object: kinds in turn; to `keep`, one of whose parts some have a colour of their own."""
    kind = list(PARTS)[number % len(PARTS)]
    for seed in itertools.count(SCENES + number, OTHER_SEED):
        scene = sample_scene(seed, kind, mixed=task == "keep")
        if task != "keep" or own_colours(scene.things[0]):
            return scene
    raise AssertionError


def own_colours(thing: Thing) -> dict[str, str]:
    """Parts whose colour does not follow from the object's."""
    return {
        part: colour
        for part, colour in thing.colours
        if colour != thing.colour and not (part == "wheels" and colour == "black")
    }


def wish_of(task: str, scene: Scene, number: int) -> Wish:
    """The edit that scene `number` gets."""
    thing, background = scene.things[0], scene.background
    rng = np.random.default_rng((SCENES + number, 11))

    def another(names: Sequence[str], than: str) -> str:
        return str(rng.choice([name for name in names if name != than]))

    if task == "remove":
        return Wish(scene.without().caption(), None, None, background)
    kind: str = thing.kind
    colour: str = thing.colour
    if task == "background":
        background = another(list(BACKGROUNDS), background)
    if task == "replace":
        turn = number % 3
        kind = kind if turn == 1 else another(list(PARTS), kind)
        colour = colour if turn == 2 else another(list(COLOURS), colour)
    if task == "keep":
        return Wish(f"a {kind} {BACKGROUNDS[background]}", kind, colour, background)
    article = "an" if colour[0] in "aeiou" else "a"
    return Wish(f"{article} {colour} {kind} {BACKGROUNDS[background]}", kind, colour, background)


@dataclass(frozen=True)
class Options:
    """Of CPAM's two nodes, named as their inputs, and of mutual self-attention. refine None: but in `background`."""

    dilation: float
    softness: float
    background_keys: str
    plain_fraction: float
    start_step: int
    start_layer: int
    refine: bool | None
    refine_threshold: float
    mutual_step: int
    mutual_layer: int

    def told(self, task: str, method: str, default: Options) -> str:
        """The method's label, with the options of it that differ from the default ones."""
        label = (LABELS_OF_REMOVE if task == "remove" else {}).get(method, LABELS[method])
        own = [
            f"{name} {_plain(getattr(self, name))}"
            for name, tasks in OPTIONS_OF.get(method, {}).items()
            if task in tasks and getattr(self, name) != getattr(default, name)
        ]
        return f"{label} ({', '.join(own)})" if own else label


def _plain(value: Any) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def defaults(steps: int) -> Options:
    """The nodes'. Mutual self-attention: its authors' step 4 of 50 and layer 10 of 16, at the same depth."""
    given = {
        entry.id: entry.default
        for node in (nodes.CPAMSelfAttnPatch, nodes.CPAMCrossAttnPatch)
        for entry in node.define_schema().inputs
        if getattr(entry, "default", None) is not None
    }
    names = [name for name in (*SELF_OPTIONS, *CROSS_OPTIONS) if name != "refine"]
    return Options(**{name: given[name] for name in names}, refine=None, mutual_step=round(4 * steps / 50),
                   mutual_layer=4)  # fmt: skip


# ---------------------------------------------------------------- how near two pictures are


class Distance:
    """LPIPS without learned weights, on the judge's features: no pretrained network comes with this repository.

    Features of the judge's three scales, of length 1 at every place; the squared difference, averaged over the places
    that count and summed over the scales.
    """

    def __init__(self, network: Network) -> None:
        self.network = network

    def features(self, picture: np.ndarray) -> Iterator[torch.Tensor]:
        """[C, h, w] at 32, 16 and 8, of a picture [H, W, 3]."""
        small = F.interpolate(torch.as_tensor(picture).float().movedim(-1, 0)[None], (SIDE, SIDE), mode="area")
        x = F.pixel_unshuffle(small - 0.5, 2)
        for stage in (self.network.first, self.network.down1, self.network.down2):
            x = stage(x)
            yield F.normalize(x[0], dim=0)

    @torch.no_grad()
    def __call__(self, reference: np.ndarray, edited: np.ndarray, where: np.ndarray) -> float:
        """Where [H, W] is True; elsewhere `edited` is taken to be as the reference, as the features see far."""
        joined = np.where(where[..., None], edited, reference)
        counts, total = torch.from_numpy(where)[None, None].float(), 0.0
        for one, other in zip(self.features(reference), self.features(joined), strict=True):
            weight = F.interpolate(counts, one.shape[1:], mode="area")[0, 0]
            total += float(((one - other).square().sum(0) * weight).sum() / weight.sum())
        return total


def beyond(around: float, *objects: np.ndarray) -> np.ndarray:
    """The background: pixels outside all these masks [H, W], widened as CPAM's dilation does it."""
    mask = torch.from_numpy(np.logical_or.reduce(objects)).float()
    return (arithmetic.dilated(mask[None], around)[0] < 0.5).numpy()


# ---------------------------------------------------------------- the methods


class Mutual:
    """MasaCtrl's mutual self-attention as an OUTER_SAMPLE wrapper: from a step and a layer on the edit attends to the
    source's keys and values instead of its own.
    """

    def __init__(self, trajectory: Trajectory, step: int, layer: int) -> None:
        self.trajectory = trajectory
        self.step = step
        self.layer = layer

    def __call__(self, executor: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        guider = executor.class_obj
        table = layer_table(guider.model_patcher)
        order = {address: place for place, address in enumerate(table.layers)}
        evaluation, rider = Evaluation(guider, sigmas, KEY), Rider(self.trajectory, self.trajectory.positive, KEY)
        source: dict[Address, tuple[torch.Tensor, torch.Tensor]] = {}

        def attend(
            inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, options: dict[str, Any]
        ) -> torch.Tensor:
            assert inner is None
            address = address_of(options)
            own, others = rider.split(torch.arange(len(q)), options)
            out = attention(q, k, v, options)
            if own is not None:
                source[address] = k[own].clone(), v[own].clone()
            if evaluation.step >= self.step and order[address] >= self.layer:
                for _, rows in others:
                    out[rows] = attention(q[rows], *source[address], options)
            return out

        options = guider.model_options.setdefault("transformer_options", {})
        evaluation.install(options)
        rider.install(guider, sigmas, sampler)
        replace_attention(options, "attn1", table, attend)
        return executor(noise, latent, sampler, sigmas, *args, **kwargs)


@dataclass(frozen=True)
class Job:
    """One edit of one picture, inverted. object: [256, 256] bool; picture, round_trip, empty: [256, 256, 3]; verdict:
    on the picture.
    """

    task: str
    number: int
    scene: Scene
    wish: Wish
    object: np.ndarray
    picture: np.ndarray
    round_trip: np.ndarray
    empty: np.ndarray
    verdict: Verdict
    latent: torch.Tensor
    trajectory: Trajectory
    noise: dict[str, Any]
    sigmas: torch.Tensor
    rows: int

    @property
    def mask(self) -> torch.Tensor:
        """Of the object, as a MASK."""
        return torch.from_numpy(self.object).float()[None]

    def either(self, dilation: float) -> torch.Tensor:
        """Where the object is or its mirror image, widened, as a MASK."""
        return arithmetic.dilated(torch.maximum(self.mask, self.mask.flip(-1)), dilation)


class Bench:
    """The demo model and the judge. Everything runs under `torch.inference_mode()`, as in the server."""

    def __init__(self, weights: Path, steps: int, options: Options, around: float) -> None:
        model, self.clip, self.vae = loader.load(weights)
        self.unet = Counted(model)
        self.judge = Judge()
        self.distance = Distance(self.judge.network)
        self.steps = steps
        self.options = options
        self.around = around
        self.nothing = encode(self.clip, [""])
        self.sampler = KSamplerSelect.execute("euler").args[0]

    def job(self, task: str, number: int) -> Job:
        """The scene of this number: drawn, encoded and inverted."""
        scene = scene_of(task, number)
        drawn = render(scene)
        empty = render(scene.without()).image
        seen = (drawn.object_mask() > 0.5) | (np.abs(drawn.image - empty).max(-1) > VISIBLE)
        latent = tokens.encode(self.vae, torch.from_numpy(drawn.image)[None])
        trajectory, noise, sigmas = DDIMInversion.execute(
            self.unet.model, self.nothing, {"samples": latent}, self.steps, "ddim_uniform", 0
        ).args
        return Job(
            task, number, scene, wish_of(task, scene, number), seen, drawn.image, self.decode(latent), empty,
            self.judge(drawn.image), latent, trajectory, noise, sigmas, self.unet.taken(),
        )  # fmt: skip

    def decode(self, latent: torch.Tensor) -> np.ndarray:
        """[256, 256, 3] in 0…1."""
        return self.vae.decode(latent).cpu()[0].numpy()

    def edit(self, method: str, job: Job) -> np.ndarray:
        """The picture [256, 256, 3] that a method makes."""
        model, own = self.unet.model, self.options
        prompt, cfg = job.wish.prompt, CFG
        if method == CEILING:
            return self.decode(tokens.encode(self.vae, torch.from_numpy(job.empty)[None])) if job.task == "remove" \
                else job.round_trip  # fmt: skip
        if method.startswith("sdedit"):
            return self._image_to_image(job, float(method.partition("-")[2]))
        start, fresh = job.noise, False
        if job.task == "keep":
            where = F.interpolate(job.either(own.dilation)[None], job.latent.shape[-2:])
            start = {"samples": torch.where(where > 0, start["samples"].flip(-1), start["samples"])}
        if "blend" in method:
            region = 1 - job.mask if job.task == "background" else arithmetic.dilated(job.mask, own.dilation)
            start, fresh = {"samples": job.latent, "noise_mask": region}, True
        if method.startswith("masactrl"):
            model = model.clone()
            model.add_wrapper_with_key(
                WrappersMP.OUTER_SAMPLE, KEY, Mutual(job.trajectory, own.mutual_step, own.mutual_layer)
            )
        elif method.startswith("cpam"):
            localised = method != "cpam-self" and not (job.task == "remove" and method == "cpam-blend")
            if job.task == "remove" and not localised:
                prompt, cfg = "", 1.0
            model = self._cpam(job, prompt, cross=localised)
        done = SamplerCustom.execute(
            model, fresh, job.number, cfg, encode(self.clip, [prompt]), self.nothing, self.sampler, job.sigmas, start
        )
        return self.decode(done.args[0]["samples"])

    def _cpam(self, job: Job, prompt: str, cross: bool) -> Any:
        own = self.options
        model, _ = nodes.CPAMSelfAttnPatch.execute(
            self.unet.model, job.trajectory, job.mask, TASKS[job.task], own.start_step, own.start_layer, own.dilation,
            own.softness, own.background_keys, own.plain_fraction, job.number,
            job.either(own.dilation) if job.task == "keep" else None,
        ).args  # fmt: skip
        if cross:
            where = arithmetic.dilated(job.mask, own.dilation)
            where = {"background": 1 - job.mask, "keep": job.either(own.dilation)}.get(job.task, where)
            refine = job.task != "background" if own.refine is None else own.refine
            model, _ = nodes.CPAMCrossAttnPatch.execute(
                model, self.nothing, where, refine, 1, own.refine_threshold, self.clip, prompt
            ).args
        return model

    def _image_to_image(self, job: Job, denoise: float) -> np.ndarray:
        """KSampler, with noise on the picture's latent."""
        noise = comfy.sample.prepare_noise(job.latent, job.number)
        done = comfy.sample.sample(
            self.unet.model, noise, self.steps, CFG, "euler", "ddim_uniform", encode(self.clip, [job.wish.prompt]),
            self.nothing, job.latent, denoise=denoise, disable_pbar=True, seed=job.number,
        )  # fmt: skip
        return self.decode(done)

    # ------------------------------------------------------------ what came out

    def measure(self, job: Job, edited: np.ndarray) -> dict[str, Any]:
        """`right`: done as asked; `kept`: how near what should stay is; the rest depends on the task."""
        found, wish, thing = self.judge(edited), job.wish, job.scene.things[0]
        asked = {"kind": found.kind == wish.kind, "colour": found.colour == wish.colour}
        result: dict[str, Any] = {"number": job.number}
        where = beyond(self.around, job.object)
        if job.task == "replace":
            result |= asked | {"right": all(asked.values())}
        elif job.task == "keep":
            new, old = (_union(verdict, job.object.shape) for verdict in (found, job.verdict))
            where = beyond(self.around, job.object, new)
            main = MAIN_PART[thing.kind]
            same = {p: asked["kind"] and found.colours.get(p) == c for p, c in thing.colours if p != main}
            result |= {
                "right": all(asked.values()),
                "own_colours": _mean(same[part] for part in own_colours(thing)),
                "colours": _mean(same.values()),
                "pose": overlap(new, old[:, ::-1]),
            }
        elif job.task == "background":
            where = core(job.object)
            result |= {"right": found.background == wish.background, "same": all(asked.values())}
        else:
            near = psnr(edited[job.object], job.empty[job.object])
            result |= {"right": found.kind is None, "empty": near, "removed": near >= REMOVED}
        return result | {"kept": self.kept(job, edited, where)}

    def kept(self, job: Job, edited: np.ndarray, where: np.ndarray) -> dict[str, float | None]:
        """PSNR against the round trip and the picture; SSIM and distance against the round trip."""
        return {
            "round_trip": min(psnr(edited[where], job.round_trip[where]), EXACT),
            "picture": psnr(edited[where], job.picture[where]),
            "ssim": ssim(job.round_trip, edited, where),
            "distance": self.distance(job.round_trip, edited, where),
        }


def _union(verdict: Verdict, shape: tuple[int, ...]) -> np.ndarray:
    """Where any part is."""
    return np.logical_or.reduce([np.zeros(shape, bool), *verdict.masks.values()])


def _mean(values: Any) -> float:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


# ---------------------------------------------------------------- report

KEPT_HEAD = ("PSNR, against the round trip", "worst tenth", "against the picture", "SSIM", "distance",
             "UNet rows: inversion", "edit")  # fmt: skip
HEADS = {
    "replace": ("kind and colour as asked", "kind", "colour"),
    "keep": ("kind and colour as asked", "own colours of parts kept", "all parts", "IoU with the mirrored object"),
    "background": ("new background as asked", "kind and colour of the object kept"),
    "remove": ("gone", "object's pixels against the empty scene", f"at least {REMOVED:.0f} dB"),
}
SAID = {
    "replace": "Replace the object: another kind, another colour, or both. The columns from PSNR on: background.",
    "keep": "Keep the object, seen from the other side: the inverted noise is mirrored where the object is or shall "
    "be. The prompt names the kind of object and the background, and no colour. SDEdit cannot turn anything. The "
    "columns from PSNR on: what is background in both pictures.",
    "background": "Change the background. The columns from PSNR on: the object, without a rim of 4 pixels (of thin "
    "parts, the inner half).",
    "remove": "Remove the object. The columns from PSNR on: background.",
}  # fmt: skip
NOTES = """- Background: what lies outside the object's exact mask, widened by a square whose side is {around:g} of \
the root of its area, for all methods alike. An object that outgrows this spoils the background.
- SSIM: scikit-image's map, the mean of the windows that lie in what is measured. SSIM and distance are against the \
VAE round trip, which is all that a method sees.
- Distance: as LPIPS, on the judge's features, as no pretrained network can be had here: three scales of 32, 16 and 8 \
places, each place's features scaled to length 1, squared differences averaged over places and summed over scales, all \
times 1000. What is not measured is pasted from the round trip first, as features see far.
- SDEdit: img2img with that denoise. Latent blending: ComfyUI's noise mask at full denoise, with CPAM's mask. Mutual \
self-attention: MasaCtrl's, from step {mutual_step} and layer {mutual_layer} of 7 on, counted from 0 (its authors' 4 \
of 50 and 10 of 16), unless said. All with the prompt of the edit and cfg {cfg:g}; CPAM with an empty prompt without.
- CPAM and mutual self-attention begin with the inverted noise; latent blending, also with CPAM, with fresh noise."""


def _share(scenes: Sequence[dict[str, Any]], name: str) -> str:
    return f"{_mean(scene[name] for scene in scenes):.0%}"


def _decibels(values: Sequence[float], worst: bool = False) -> str:
    value = float(np.quantile(values, 0.1)) if worst else _mean(values)
    return f"{value:.1f} dB" if value < EXACT else "exact"


def row(record: dict[str, Any]) -> list[str]:
    """A record's line of the table of its task."""
    task, scenes = record["task"], record["scenes"]
    kept = {name: [s["kept"][name] for s in scenes] for name in ("round_trip", "picture", "ssim", "distance")}
    own = {
        "replace": lambda: [_share(scenes, "kind"), _share(scenes, "colour")],
        "keep": lambda: [
            _share(scenes, "own_colours"), _share(scenes, "colours"), f"{_mean(s['pose'] for s in scenes):.2f}"
        ],
        "background": lambda: [_share(scenes, "same")],
        "remove": lambda: [_decibels([s["empty"] for s in scenes]), _share(scenes, "removed")],
    }  # fmt: skip
    inverted = sum(s["rows"][0] for s in scenes) / len(scenes)
    edit = sum(s["rows"][1] for s in scenes) / len(scenes)
    return [
        record["label"], _share(scenes, "right"), *own[task](),
        _decibels(kept["round_trip"]), _decibels(kept["round_trip"], worst=True), _decibels(kept["picture"]),
        f"{_mean(kept['ssim']):.3f}", f"{1000 * _mean(kept['distance']):.1f}", f"{inverted:.0f}", f"{edit:.0f}",
    ]  # fmt: skip


def _counting(cells: list[str], record: dict[str, Any], counted: int) -> list[str]:
    """A line of the table; its label says so if it has fewer scenes than there are."""
    fewer = len(record["scenes"]) < counted
    return [f"{cells[0]}, {len(record['scenes'])} scenes" if fewer else cells[0], *cells[1:]]


def beside(records: Sequence[dict[str, Any]]) -> str:
    """Markdown: by how much each CPAM keeps more than each other method, on the scenes that both did as asked."""
    ours = [r for r in records if r["method"].startswith("cpam")]
    others = [r for r in records if r["method"] not in (CEILING, *(o["method"] for o in ours))]
    if not ours or not others:
        return ""
    lines, lost, won = [], [], 0
    for other in others:
        cells = [other["label"]]
        for own in ours:
            more, both = advantage(own, other)
            cells.append(f"{more:+.1f} dB ({both})" if both else "– (0)")
            won += more > 0
            if both and more <= 0:
                lost.append(f"{own['label']} beside {other['label']}")
        lines.append(cells)
    head = ("what is kept, beside", *(own["label"] for own in ours))
    said = f"Not better: {'; '.join(lost)}." if lost else "Better in all pairs with such scenes." if won else ""
    return (
        "By how much CPAM keeps more, on the scenes that both did as asked (how many these are):\n\n"
        f"{_report.table(head, lines)}\n\n{said}"
    ).strip()


def advantage(own: dict[str, Any], other: dict[str, Any]) -> tuple[float, int]:
    """Mean difference in dB against the round trip over the scenes that both records did as asked, and how many."""
    theirs = {s["number"]: s["kept"]["round_trip"] for s in other["scenes"] if s["right"]}
    more = [
        s["kept"]["round_trip"] - theirs[s["number"]] for s in own["scenes"] if s["right"] and s["number"] in theirs
    ]
    return _mean(more), len(more)


def report(numbers: dict[str, Any]) -> str:
    """The section of BENCHMARKS.md."""
    texts = []
    names = list(LABELS)
    for task in TASKS:
        records = [r for r in numbers["results"].values() if r["task"] == task]
        records.sort(key=lambda r: names.index(r["method"]))
        if records:
            counted = len({s["number"] for r in records for s in r["scenes"]})
            table = _report.table(
                ("method", *HEADS[task], *KEPT_HEAD), [_counting(row(r), r, counted) for r in records]
            )
            texts.append(f"### CPAM: {task}, {counted} scenes\n\n{SAID[task]}\n\n{table}\n\n{beside(records)}".strip())
    if texts:
        texts.append(NOTES.format(**numbers["settings"]))
    if numbers["speed"]:
        texts.append(speed_report(numbers["speed"]))
    return "\n\n".join(texts)


# ---------------------------------------------------------------- speed

PLACES, HEADS_OF_SPEED, WIDTH = 64, 8, 320


def speed(shares: Sequence[float], rounds: int) -> list[dict[str, Any]]:
    """Masked attention by gathering against two dense ones with masks, for objects of these shares of the picture."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    generator = torch.Generator().manual_seed(0)
    qkv = [torch.randn(1, PLACES**2, WIDTH, generator=generator).to(device) for _ in range(5)]
    results = []
    for share, keep in itertools.product(shares, (False, True)):
        mask = disc(share).to(device)
        gathered, dense = ways(mask, keep, *qkv)
        difference = float((gathered() - dense()).abs().max())  # also warms both up
        seconds = np.array([[_seconds(way) for way in (gathered, dense)] for _ in range(rounds)])
        results.append({
            "task": nodes.KEEP if keep else nodes.REPLACE, "share": float(mask.mean()), "difference": difference,
            "gathered": float(np.median(seconds[:, 0])), "dense": float(np.median(seconds[:, 1])),
            "ratio": float(np.median(seconds[:, 1] / seconds[:, 0])), "rounds": rounds,
        })  # fmt: skip
        print(f"  speed: {results[-1]}", flush=True)
    return results


def _seconds(way: Callable[[], torch.Tensor]) -> float:
    start = clock()
    way()
    return clock() - start


def ways(
    mask: torch.Tensor, keep: bool, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, source_k: torch.Tensor,
    source_v: torch.Tensor,
) -> tuple[Callable[[], torch.Tensor], Callable[[], torch.Tensor]]:  # fmt: skip
    """The same masked attention, gathered and dense. keep: inside the mask, too, it is to the source."""
    options, function = {"n_heads": HEADS_OF_SPEED}, comfy.ldm.modules.attention.optimized_attention
    inside, outside = arithmetic.Share.of(mask), arithmetic.Share.of(1 - mask)
    background_only, object_only = additive(mask), additive(1 - mask)

    def to_source(places: torch.Tensor) -> Callable[[torch.Tensor, Any], torch.Tensor]:
        keys, values = arithmetic.keys_at(source_k, source_v, places)
        return lambda queries, _: attention(queries, keys, values, options)

    def gathered() -> torch.Tensor:
        own = to_source(inside.most) if keep else lambda queries, _: attention(queries, k, v, options)
        return arithmetic.divided(q, (inside, own), (outside, to_source(outside.most)))

    def dense() -> torch.Tensor:
        keys, values, bias = (source_k, source_v, object_only) if keep else (k, v, None)
        own = function(q, keys, values, HEADS_OF_SPEED, mask=bias)
        return function(q, source_k, source_v, HEADS_OF_SPEED, mask=background_only).lerp(own, mask[:, None])

    return gathered, dense


def additive(hidden: torch.Tensor) -> torch.Tensor:
    """[places, places]: what is added to attention so that these keys are hidden from all queries."""
    bias = torch.zeros(len(hidden), len(hidden), device=hidden.device)
    return bias.masked_fill_(hidden[None] > 0, -torch.finfo(bias.dtype).max)


def disc(share: float) -> torch.Tensor:
    """[places] of 0 and 1: a disc in the middle that covers this share of the picture."""
    axis = (torch.arange(PLACES) + 0.5) / PLACES - 0.5
    nearest = (axis[None].square() + axis[:, None].square()).flatten().argsort()
    return torch.zeros(PLACES**2).index_fill(0, nearest[: round(share * PLACES**2)], 1.0)


def speed_report(found: Sequence[dict[str, Any]]) -> str:
    """Markdown."""
    head = ("task", "object's share of the picture", "gathered", "dense", "dense / gathered", "largest difference")
    rows = [
        [f["task"], f"{f['share']:.0%}", f"{1000 * f['gathered']:.0f} ms", f"{1000 * f['dense']:.0f} ms",
         f"{f['ratio']:.2f}", f"{f['difference']:.1e}"]
        for f in found
    ]  # fmt: skip
    return (
        f"### CPAM: masked attention\n\nOne self-attention of {PLACES} × {PLACES} places, {HEADS_OF_SPEED} heads of "
        f"{WIDTH // HEADS_OF_SPEED}, float32, one row, object in the middle: keys and queries gathered by the mask, "
        f"against two attentions over all places, mixed by the mask: to the source with an additive mask (made before "
        f"the clock starts), and to the edit itself without one ({nodes.REPLACE}) or to the source with another "
        f"({nodes.KEEP}). Medians of {found[0]['rounds']} turns of both.\n\n{_report.table(head, rows)}"
    )


# ---------------------------------------------------------------- what is run


def run(arguments: argparse.Namespace, numbers: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fill in what the command line asks for; `keep` is called after every method."""
    default = defaults(arguments.steps)
    options = Options(**{
        name: getattr(default, name) if getattr(arguments, name) is None else getattr(arguments, name)
        for name in vars(default)
    })  # fmt: skip
    numbers["settings"] = {
        "steps": arguments.steps, "around": arguments.around, "cfg": CFG, "mutual_step": default.mutual_step,
        "mutual_layer": default.mutual_layer,
    }  # fmt: skip
    bench = Bench(arguments.weights, arguments.steps, options, arguments.around)
    for task in arguments.only:
        jobs = [bench.job(task, arguments.first + i) for i in range(arguments.scenes)]
        print(f"  {task}: {len(jobs)} pictures inverted", flush=True)
        shown: list[tuple[str, list[np.ndarray], list[bool]]] = []
        for method in (CEILING, *(m for m in METHODS[task] if m in arguments.methods)):
            began, label = time.time(), options.told(task, method, default)
            record: dict[str, Any] = {"task": task, "method": method, "label": label, "scenes": []}
            pictures: list[np.ndarray] = []
            for job in jobs:
                bench.unet.taken()
                edited = bench.edit(method, job)
                inverts = method.startswith(("cpam", "masactrl"))
                rows = [job.rows if inverts else 0, bench.unet.taken()]
                record["scenes"].append(bench.measure(job, edited) | {"rows": rows})
                pictures += [edited] if len(pictures) < SHOWN else []
            numbers["results"][f"{task}, {label}"] = record
            keep()
            shown.append((label, pictures, [not s["right"] for s in record["scenes"]]))
            print(f"  {time.time() - began:.0f} s: {task}, {' | '.join(row(record))}", flush=True)
        if arguments.sheet:
            sheet(arguments.sheet.with_stem(f"{arguments.sheet.stem}-{task}"), jobs[:SHOWN], shown[1:])


def sheet(path: Path, jobs: Sequence[Job], shown: Sequence[tuple[str, list[np.ndarray], list[bool]]]) -> None:
    """A line for each picture: it, what each method makes of it, and, of a removal, the empty scene."""
    cells: list[tuple[np.ndarray, str, bool]] = []
    for place, job in enumerate(jobs):
        cells.append((job.picture, f'{job.number}: "{job.wish.prompt}"', False))
        cells += [(pictures[place], label, wrong[place]) for label, pictures, wrong in shown]
        cells += [(job.empty, "the empty scene", False)] if job.task == "remove" else []
    pictures, captions, marked = (list(column) for column in zip(*cells, strict=True))
    contact_sheet(path, pictures, captions, marked, len(cells) // len(jobs))


def empty_numbers() -> dict[str, Any]:
    """Before anything is measured."""
    return {"results": {}, "speed": [], "seconds": 0.0, "settings": {}}


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The numbers of several runs as one's. Scenes of the same method are put together; what two runs have is taken
    from the later.
    """
    numbers = empty_numbers()
    for file in files:
        more = json.loads(file.read_text(encoding="utf-8"))
        for key, record in more["results"].items():
            before = numbers["results"].get(key, {"scenes": []})["scenes"]
            scenes = {scene["number"]: scene for scene in (*before, *record["scenes"])}
            numbers["results"][key] = record | {"scenes": [scenes[number] for number in sorted(scenes)]}
        numbers["speed"] = more["speed"] or numbers["speed"]
        numbers["settings"] |= more["settings"]
        numbers["seconds"] += more["seconds"]
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench cpam", description=__doc__)
    _report.add_arguments(parser, "cpam")
    every = [name for name in LABELS if name != CEILING]
    parser.add_argument("--only", nargs="+", choices=TASKS, default=list(TASKS), help="these tasks")
    parser.add_argument("--methods", nargs="+", choices=every, default=every)
    parser.add_argument("--scenes", type=int, default=50, help="per task (default: %(default)s)")
    parser.add_argument("--first", type=int, default=0, help="number of the first scene; validation: from 100 on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--around", type=float, default=AROUND, help="where the measured background begins")
    parser.add_argument("--weights", type=Path, default=loader.WEIGHTS, help="another checkpoint")
    for name in ("dilation", "softness", "plain-fraction", "refine-threshold"):
        parser.add_argument(f"--{name}", type=float, help="CPAM (dilation: latent blending too)")
    parser.add_argument("--background-keys", choices=("source", "target"), help="CPAM")
    for name in ("start-step", "start-layer"):
        parser.add_argument(f"--{name}", type=int, help="CPAM, keep")
    parser.add_argument("--refine", action=argparse.BooleanOptionalAction, help="CPAM; default: but for background")
    for name in ("mutual-step", "mutual-layer"):
        parser.add_argument(f"--{name}", type=int, help="mutual self-attention: from which on")
    parser.add_argument(
        "--sheet", type=Path, metavar="FILE.png", help="a sheet of pictures for each task, FILE-TASK.png"
    )
    parser.add_argument("--speed", action="store_true", help="measure masked attention by itself, and nothing else")
    parser.add_argument("--rounds", type=int, default=9, help="of --speed")
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, make one report of these JSON files")
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    began = time.time()
    numbers = merged(arguments.merge) if arguments.merge else empty_numbers()

    def keep() -> None:
        numbers["seconds"] = time.time() - began
        if arguments.json:
            arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")

    if not arguments.merge:
        with torch.inference_mode():
            if arguments.speed:
                numbers["speed"] = speed((0.10, 0.25, 0.50), arguments.rounds)
            else:
                run(arguments, numbers, keep)
        keep()
    steps = f" {numbers['settings']['steps']} steps of euler, ddim_uniform." if numbers["settings"] else ""
    said = f"{_report.where_it_ran()}.{steps} {numbers['seconds']:.0f} s."
    _report.publish(arguments, f"{report(numbers)}\n\n{said}", numbers)


if __name__ == "__main__":
    main()
