"""MAG-Edit on parts-world: one of several like objects in another colour; beside what Prompt-to-Prompt does alone::

    python dev.py bench mag [--methods p2p mag-token …] [--curves] [--markdown BENCHMARKS.md]

Scenes of two or three objects of one kind and one colour are rendered, with seeds that nothing was trained on, and
inverted with their caption as the prompt. One of the objects is to get another colour: its exact mask is given, and the
same scene rendered with this object repainted is the truth. Settings were chosen with `--first 100`; the counted scenes
are 0 to 49. With `--json` the numbers are kept after every method, and `--merge FILE …` makes one report of several
such files. `--curves` measures constraint and edit over the number of iterations and over the share of guided steps
instead, on few scenes, and draws them (the paper's figures 6 and 7).
"""

from __future__ import annotations

import argparse
import itertools
import json
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy_extras.nodes_custom_sampler import SamplerCustom
from scipy.ndimage import distance_transform_edt, sobel
from skimage.metrics import structural_similarity

from ..core.mag import SPATIAL_RATIO, TOKEN_RATIO
from ..core.trajectory import Trajectory
from ..nodes.inversion import DDIMInversion, NullTextInversion
from ..nodes.mag import FAST, PAPER, MAGGuidance
from ..nodes.prompt_to_prompt import PromptToPrompt
from ..nodes.trajectories import ReplayTrajectory
from ..partsworld import loader, tokens
from ..partsworld.judge import nearest_colour
from ..partsworld.render import render
from ..partsworld.scene import BACKGROUNDS, COLOURS, PARTS, Scene, like_objects
from . import _report
from ._pictures import contact_sheet, encode, psnr
from .behaviour import CELL, core

SCENES = 45_000_000
"""Seed of scene number 0."""
OTHER_SEED = 10_000
"""Added to a seed until the object that is to change is well seen."""
SMALLEST = 0.015  # of the picture: an object that shows less is no task
VISIBLE = 1 / 255  # a pixel that an object changes by more belongs to it
CFG = 7.5
CEILING = "ceiling"
REWEIGHT = 10.0
NEVER: dict[str, Any] = {"until": 0.0, "iterations": 1}
"""With which MAG Guidance is Prompt-to-Prompt and a mask blend."""

CHOSEN: dict[str, Any] = {"preset": FAST, "iterations": 12, "until": 0.7}
"""Chosen on scenes from 100 on: two moves in each of 0.7 of the steps."""


@dataclass(frozen=True)
class Method:
    """A way to edit. guidance: inputs of MAG Guidance other than the paper's; weight: of the attention to the new
    colour's word; blend: whether what lies outside the object is the source's in the last steps.
    """

    label: str
    guidance: dict[str, Any]
    weight: float = 1.0
    blend: bool = True


METHODS = {
    "p2p": Method("P2P", NEVER, blend=False),
    "p2p-blend": Method("P2P, mask blend", NEVER),
    "reweight": Method(f"P2P, reweight ×{REWEIGHT:g}", NEVER, REWEIGHT, blend=False),
    "reweight-blend": Method(f"P2P, reweight ×{REWEIGHT:g}, mask blend", NEVER, REWEIGHT),
    "mag-token": Method("MAG, token ratio", {"constraint": TOKEN_RATIO}),
    "mag-spatial": Method("MAG, spatial ratio", {"constraint": SPATIAL_RATIO}),
    "mag-token-fast": Method("MAG, token ratio, fast", {"constraint": TOKEN_RATIO, **CHOSEN}),
    "mag-token-default": Method(
        "MAG, token ratio, fast, other inputs as they are", {"constraint": TOKEN_RATIO, "preset": FAST}
    ),
    "mag-spatial-fast": Method("MAG, spatial ratio, fast", {"constraint": SPATIAL_RATIO, **CHOSEN}),
}
BASELINES = [name for name in METHODS if not name.startswith("mag")]
PAPERS_INPUTS: dict[str, Any] = {
    "constraint": TOKEN_RATIO, "preset": PAPER, "iterations": 15, "until": 0.5, "scale": 2.5, "spatial_weight": 3.0,
    "negative_words": "", "negative_scale": 0.0,
}  # fmt: skip
CONTROL: dict[str, Any] = {"mode": "refine", "cross_replace": 0.8, "self_replace": 0.5, "word_cross_replace": "",
           "local_blend_words": ""}  # fmt: skip
"""Prompt-to-Prompt as in MAG-Edit's program."""
ITERATIONS = (1, 2, 5, 10, 15, 20)
FRACTIONS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7, 1.0)
SHOWN = 5  # scenes on a sheet


# ---------------------------------------------------------------- what is asked for


@dataclass(frozen=True)
class Task:
    """A scene of like objects, one of which (`index`) is to get the colour `wanted`. seen: [256, 256] bool, where that
    object is seen; painted: where its parts that change are.
    """

    number: int
    scene: Scene
    index: int
    wanted: str
    seen: np.ndarray = field(repr=False)
    painted: np.ndarray = field(repr=False)

    @property
    def truth(self) -> Scene:
        return self.scene.repaint(self.wanted, self.index)

    @property
    def others(self) -> list[int]:
        return [i for i in range(len(self.scene.things)) if i != self.index]


def objects_of(number: int) -> int:
    """How many objects the scene of this number has: two in four scenes, three in the next four."""
    return 2 + number // len(PARTS) % 2


def task_of(number: int) -> Task:
    """Task of this number: kinds in turn. The wanted colour is no word of the background."""
    kind, count = list(PARTS)[number % len(PARTS)], objects_of(number)
    for seed in itertools.count(SCENES + number, OTHER_SEED):
        scene = like_objects(seed, count, kind)
        rng = np.random.default_rng((seed, 11))
        taken = {scene.things[0].colour, *BACKGROUNDS[scene.background].split()}
        index, wanted = int(rng.integers(count)), str(rng.choice([name for name in COLOURS if name not in taken]))
        drawn = render(scene)
        seen = np.abs(drawn.image - render(scene.without(index)).image).max(-1) > VISIBLE
        painted = np.sum([drawn.masks[index][part] for part in scene.things[index].coloured_parts], axis=0) > 0.5
        if painted.mean() >= SMALLEST:
            return Task(number, scene, index, wanted, seen, painted)
    raise AssertionError


# ---------------------------------------------------------------- the methods


@dataclass(frozen=True)
class Job:
    """A task, inverted. picture, round_trip, truth: [256, 256, 3]."""

    task: Task
    picture: np.ndarray
    round_trip: np.ndarray
    truth: np.ndarray
    trajectory: Trajectory

    @property
    def mask(self) -> torch.Tensor:
        """Of the object that is to change, as a MASK."""
        return torch.from_numpy(self.task.seen).float()[None]


@dataclass(frozen=True)
class Edit:
    """A picture [256, 256, 3]; iterations: moves of the latent; value: of the constraint before the last of them."""

    picture: np.ndarray
    iterations: int = 0
    value: float | None = None
    seconds: float = 0.0


class Bench:
    """The demo model. Everything runs under `torch.inference_mode()`, as in the server."""

    def __init__(self, weights: Path, steps: int, inversion: str, cfg: float = CFG) -> None:
        self.model, self.clip, self.vae = loader.load(weights)
        self.steps = steps
        self.inversion = inversion
        self.cfg = cfg
        self.nothing = encode(self.clip, [""])

    def decode(self, latent: torch.Tensor) -> np.ndarray:
        """[256, 256, 3] in 0…1."""
        return self.vae.decode(latent).cpu()[0].numpy()

    def round_trip(self, picture: np.ndarray) -> np.ndarray:
        return self.decode(tokens.encode(self.vae, torch.from_numpy(picture)[None]))

    def job(self, number: int) -> Job:
        """The task of this number, encoded and inverted."""
        task = task_of(number)
        picture, truth = (render(scene).image for scene in (task.scene, task.truth))
        latent = {"samples": tokens.encode(self.vae, torch.from_numpy(picture)[None])}
        source = encode(self.clip, [task.scene.caption()])
        if self.inversion == "null-text":
            made = NullTextInversion.execute(
                self.model, source, self.nothing, latent, self.steps, "ddim_uniform", self.cfg, 10, 0.01
            )
        else:
            made = DDIMInversion.execute(self.model, source, latent, self.steps, "ddim_uniform", 0)
        return Job(task, picture, self.decode(latent["samples"]), truth, made.args[0])

    def edit(self, job: Job, method: Method) -> Edit:
        """The picture that a method makes of a job."""
        task, text = job.task, job.task.truth.caption()
        weights = f"{task.wanted}: {method.weight:g}" if method.weight != 1 else ""
        control, _, edit = PromptToPrompt.execute(
            self.clip, task.scene.caption(), text, word_weights=weights, **CONTROL
        ).args
        began = time.time()
        replayed, sampler, sigmas, start = ReplayTrajectory.execute(self.model, job.trajectory).args
        guided, log = MAGGuidance.execute(
            replayed, self.clip, text, task.wanted, job.mask if method.blend else torch.ones_like(job.mask),
            prompt_control=control, trajectory=job.trajectory, **PAPERS_INPUTS | method.guidance,
        ).args  # fmt: skip
        edited = SamplerCustom.execute(guided, False, 0, self.cfg, edit, self.nothing, sampler, sigmas, start).args[0]
        guided_steps = [line for line in log.lines if line.startswith("step ")]
        values = [line.rpartition(" ")[2] for line in guided_steps]
        return Edit(
            self.decode(edited["samples"]), sum(1 + line.count("→") for line in guided_steps),
            float(values[-1]) if values else None, time.time() - began,
        )  # fmt: skip


# ---------------------------------------------------------------- what came out


def measure(job: Job, edit: Edit) -> dict[str, Any]:
    """`right`: the object's colour is as asked; `others`: all other objects have theirs still; `share`: of the object's
    pixels whose nearest named colour is the one asked for; `inside`: PSNR against the truth; `outside`, `far`: PSNR
    against the round trip outside the object, and farther than a latent cell from it; `edges`: `edge_ssim`.
    """
    task, picture = job.task, edit.picture
    inner = core(task.painted)
    away = distance_transform_edt(~task.seen)
    drawn = render(task.scene)
    others = [nearest_colour(picture[core(drawn.object_mask(i) > 0.5)]) for i in task.others]
    found = nearest_colour(picture[inner])
    return {
        "number": task.number,
        "colour": found,
        "right": found == task.wanted,
        "others": all(colour == task.scene.things[task.index].colour for colour in others),
        "share": share_of(picture[inner], task.wanted),
        "inside": psnr(picture[inner], job.truth[inner]),
        "outside": psnr(picture[~task.seen], job.round_trip[~task.seen]),
        "far": psnr(picture[away > CELL], job.round_trip[away > CELL]),
        "edges": edge_ssim(job.truth, picture, task.seen),
        "iterations": edit.iterations,
        "value": edit.value,
        "seconds": edit.seconds,
    }


def share_of(pixels: np.ndarray, name: str) -> float:
    """The share of [n, 3] pixels to which this named colour is the nearest."""
    palette = np.array(list(COLOURS.values()))
    nearest = np.square(pixels[:, None] - palette).sum(-1).argmin(1)
    return float((nearest == list(COLOURS).index(name)).mean())


def edge_ssim(truth: np.ndarray, edited: np.ndarray, where: np.ndarray) -> float:
    """SSIM of the edges of two pictures [H, W, 3] in the box around `where` [H, W] and one latent cell more.

    Edges: the length of Sobel's gradient of the luminance, 1 for a step from black to white.
    """
    rows, columns = (
        slice(max(0, at.min() - CELL), at.max() + CELL + 1) for at in (np.flatnonzero(where.any(i)) for i in (1, 0))
    )
    one, other = (edges(picture)[rows, columns] for picture in (truth, edited))
    return float(structural_similarity(one, other, data_range=1.0))


def edges(picture: np.ndarray) -> np.ndarray:
    """[H, W] of a picture [H, W, 3]."""
    luminance = np.asarray(picture, np.float64) @ (0.299, 0.587, 0.114)
    return np.asarray(np.hypot(sobel(luminance, 0), sobel(luminance, 1)) / 4)


# ---------------------------------------------------------------- report

HEAD = ("method", "colour as asked", "of two objects", "of three", "other objects keep theirs", "pixels of that colour",
        "PSNR inside, against the truth", "edge SSIM", "PSNR outside", "worst tenth", "farther than 8 pixels",
        "moves")  # fmt: skip
SAID = """Prompts are the scenes' captions, "{source}" → "{edit}"; the mask is the whole of the object that is to \
change, to the pixel. All methods begin with the inverted noise and take of the source what MAG-Edit's program takes \
(refine, cross 0.8, self 0.5), cfg {cfg:g}.

- Colour: the named one nearest to the median of the object's pixels, without the rim; black wheels and windows do not \
count. *Pixels of that colour*: those to which it is the nearest.
- Truth: the scene rendered with this object repainted. Edge SSIM: of the gradients of luminance, in the box around \
the object. The first line is the most that can be had: the truth, encoded and decoded.
- PSNR outside the mask: against the source, encoded and decoded.
- All four P2P are MAG Guidance that never moves the latent: what is left is Prompt-to-Prompt, with *mask blend* and \
the source's latent outside the mask in the last 30 % of the steps, as MAG has it; without it, with a mask of \
everything."""


def _mean(values: Any) -> float:
    known = [float(value) for value in values if value is not None]
    return float(np.mean(known)) if known else float("nan")


def row(record: dict[str, Any]) -> list[str]:
    """A record's line of the table."""
    scenes = record["scenes"]

    def mean(name: str, form: str) -> str:
        return format(_mean(scene[name] for scene in scenes), form)

    def right(count: int) -> str:
        some = [scene["right"] for scene in scenes if objects_of(scene["number"]) == count]
        return f"{_mean(some):.0%}" if some else "–"

    worst = float(np.quantile([scene["outside"] for scene in scenes], 0.1))
    moves = mean("iterations", ".0f")
    return [
        record["label"], mean("right", ".0%"), right(2), right(3), mean("others", ".0%"), mean("share", ".0%"),
        f"{mean('inside', '.1f')} dB", mean("edges", ".3f"), f"{mean('outside', '.1f')} dB", f"{worst:.1f} dB",
        f"{mean('far', '.1f')} dB", moves if moves != "0" else "–",
    ]  # fmt: skip


def beaten(records: dict[str, dict[str, Any]]) -> str:
    """Markdown: MAG beside each baseline, on the scenes that both have: colour right, and PSNR outside."""
    ours = [name for name in records if name.startswith("mag")]
    others = [name for name in records if name in BASELINES]
    if not ours or not others:
        return ""
    lines = [[records[o]["label"], *(beside(records[own], records[o]) for own in ours)] for o in others]
    head = ("beside", *(records[own]["label"] for own in ours))
    return (
        "What MAG has more of, on the scenes that both have: colour as asked in percentage points, PSNR outside, edge "
        f"SSIM.\n\n{_report.table(head, lines)}"
    )


def beside(own: dict[str, Any], other: dict[str, Any]) -> str:
    """By how much one record is ahead of another: colour, PSNR outside, edges."""
    theirs = {scene["number"]: scene for scene in other["scenes"]}
    pairs = [(scene, theirs[scene["number"]]) for scene in own["scenes"] if scene["number"] in theirs]
    if not pairs:
        return "–"
    colour, outside, edge = (_mean(a[name] - b[name] for a, b in pairs) for name in ("right", "outside", "edges"))
    return f"{100 * colour:+.0f}, {outside:+.1f} dB, {edge:+.3f}"


def report(numbers: dict[str, Any]) -> str:
    """The section of BENCHMARKS.md."""
    texts = []
    names = [CEILING, *METHODS]
    records = {name: numbers["results"][name] for name in names if name in numbers["results"]}
    if records:
        counted = max(len(r["scenes"]) for r in records.values())
        lines = []
        for record in records.values():
            label, *cells = row(record)
            few = len(record["scenes"])
            lines.append([label if few == counted else f"{label}, {few} scenes", *cells])
        task = task_of(records[next(iter(records))]["scenes"][0]["number"])
        said = SAID.format(
            source=task.scene.caption(), edit=task.truth.caption(), cfg=numbers["settings"].get("cfg", CFG)
        )
        texts += [f"### MAG: one of like objects, {counted} scenes", said, _report.table(HEAD, lines), beaten(records)]
    for axis in numbers["curves"].values():
        texts.append(curve_table(axis))
    return "\n\n".join(text for text in texts if text)


# ---------------------------------------------------------------- curves

AXES: dict[str, tuple[str, tuple[float, ...]]] = {
    "iterations": ("moves a guided step", ITERATIONS),
    "until": ("guided share of the steps", FRACTIONS),
}
"""Input of MAG Guidance → what the axis says, and its values."""
PLOTS = {"iterations": "mag_iterations.png", "until": "mag_steps.png"}


def curve_table(axis: dict[str, Any]) -> str:
    """Markdown: what was measured over one input."""
    head = (AXES[axis["axis"]][0], "constraint", "colour as asked", "pixels of that colour", "PSNR inside", "edge SSIM",
            "PSNR outside")  # fmt: skip
    lines = []
    for point in axis["points"]:
        scenes = point["scenes"]
        mean = {name: _mean(scene[name] for scene in scenes) for name in scenes[0] if name not in ("colour", "number")}
        value = mean["value"]
        lines.append([
            f"{point['at']:g}", "–" if np.isnan(value) else f"{value:.3f}", f"{mean['right']:.0%}",
            f"{mean['share']:.0%}", f"{mean['inside']:.1f} dB", f"{mean['edges']:.3f}", f"{mean['outside']:.1f} dB",
        ])  # fmt: skip
    count = len(axis["points"][0]["scenes"])
    title = f"### MAG: {axis['axis']}, {axis['label']}, {count} scenes"
    picture = f"![edits over {AXES[axis['axis']][0]}](web/docs/{PLOTS[axis['axis']]})"
    return "\n\n".join([title, picture, _report.table(head, lines)])


def plot(axis: dict[str, Any], strip: Sequence[np.ndarray], path: Path) -> None:
    """Pictures of one scene, as in the paper's figures 6 and 7, above the curves. strip: the source, each point's."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    points = axis["points"]
    names = ["source", *(f"{point['at']:g}" for point in points)]
    figure = plt.figure(figsize=(10, 5.2), layout="constrained")
    grid = figure.add_gridspec(2, len(names), height_ratios=(1, 2))
    for column, (name, picture) in enumerate(zip(names, strip, strict=True)):
        axes = figure.add_subplot(grid[0, column])
        axes.imshow(picture.clip(0, 1))
        axes.set_title(name, fontsize=9)
        axes.axis("off")
    at = [point["at"] for point in points]
    half = len(names) // 2
    shares, decibels = figure.add_subplot(grid[1, :half]), figure.add_subplot(grid[1, half:])
    for panel, lines in (
        (shares, {"right": "colour as asked", "share": "pixels of that colour", "edges": "edge SSIM"}),
        (decibels, {"inside": "PSNR inside, against the truth, dB", "outside": "PSNR outside, dB"}),
    ):
        for name, label in lines.items():
            panel.plot(at, [_mean(s[name] for s in point["scenes"]) for point in points], "o-", ms=3, label=label)
        panel.set_xlabel(AXES[axis["axis"]][0])
        panel.legend(fontsize=8)
        panel.grid(alpha=0.3)
    shares.set_ylim(0, 1.02)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path, dpi=110)
    plt.close(figure)


# ---------------------------------------------------------------- what is run


def run(arguments: argparse.Namespace, numbers: dict[str, Any], keep: Callable[[], None]) -> None:
    """Fill in what the command line asks for; `keep` is called after every method, or point of a curve."""
    bench = Bench(arguments.weights, arguments.steps, arguments.inversion, arguments.cfg)
    jobs = [bench.job(arguments.first + i) for i in range(arguments.scenes)]
    print(f"  {len(jobs)} pictures inverted", flush=True)
    if arguments.curves:
        for axis in arguments.axes:
            run_curve(bench, jobs, axis, METHODS[arguments.methods[0]], arguments.plots / PLOTS[axis], numbers, keep)
        return
    shown: list[tuple[str, list[np.ndarray], list[bool]]] = []
    for name in (CEILING, *arguments.methods):
        label = "VAE round trip of the truth" if name == CEILING else METHODS[name].label
        record: dict[str, Any] = {"method": name, "label": label, "scenes": []}
        pictures: list[np.ndarray] = []
        for job in jobs:
            if name == CEILING:
                edit = Edit(bench.round_trip(job.truth))
            else:
                edit = bench.edit(job, METHODS[name])
            record["scenes"].append(measure(job, edit))
            pictures += [edit.picture] if len(pictures) < SHOWN else []
        numbers["results"][name] = record
        keep()
        shown.append((label, pictures, [not scene["right"] for scene in record["scenes"]]))
        print(f"  {' | '.join(row(record))}", flush=True)
    if arguments.sheet:
        sheet(arguments.sheet, jobs[:SHOWN], shown[1:])


def run_curve(
    bench: Bench, jobs: Sequence[Job], axis: str, method: Method, path: Path, numbers: dict[str, Any],
    keep: Callable[[], None],
) -> None:  # fmt: skip
    """One input of MAG Guidance over its values, the others as the method has them; the plot, with pictures of the
    middle one of the jobs, goes to `path`.
    """
    found: dict[str, Any] = {"axis": axis, "label": method.label, "points": []}
    shown = len(jobs) // 2
    strip = [jobs[shown].picture]
    for at in AXES[axis][1]:
        here = replace(method, guidance={**method.guidance, axis: at})
        edits = [bench.edit(job, here) for job in jobs]
        scenes = [measure(job, edit) for job, edit in zip(jobs, edits, strict=True)]
        found["points"].append({"at": at, "scenes": scenes})
        strip.append(edits[shown].picture)
        print(f"  {axis} {at:g}: colour {_mean(scene['right'] for scene in scenes):.0%}", flush=True)
        numbers["curves"][axis] = found
        keep()
    plot(found, strip, path)


def sheet(path: Path, jobs: Sequence[Job], shown: Sequence[tuple[str, list[np.ndarray], list[bool]]]) -> None:
    """A line for each picture: it, what each method makes of it, and the truth. Red: not the colour asked for."""
    cells: list[tuple[np.ndarray, str, bool]] = []
    for place, job in enumerate(jobs):
        cells.append((job.picture, f'{job.task.number}: "{job.task.truth.caption()}"', False))
        cells += [(pictures[place], label, wrong[place]) for label, pictures, wrong in shown]
        cells.append((job.truth, "the truth", False))
    pictures, captions, marked = (list(column) for column in zip(*cells, strict=True))
    contact_sheet(path, pictures, captions, marked, len(cells) // len(jobs))


def empty_numbers() -> dict[str, Any]:
    """Before anything is measured."""
    return {"results": {}, "curves": {}, "seconds": 0.0, "settings": {}}


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The numbers of several runs as one's. Scenes of the same method are put together; what two runs have is taken
    from the later.
    """
    numbers = empty_numbers()
    for file in files:
        more = json.loads(file.read_text(encoding="utf-8"))
        for name, record in more["results"].items():
            before = numbers["results"].get(name, {"scenes": []})["scenes"]
            scenes = {scene["number"]: scene for scene in (*before, *record["scenes"])}
            numbers["results"][name] = record | {"scenes": [scenes[number] for number in sorted(scenes)]}
        numbers["curves"] |= more["curves"]
        numbers["settings"] |= more["settings"]
        numbers["seconds"] += more["seconds"]
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench mag", description=__doc__)
    _report.add_arguments(parser, "mag")
    parser.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    parser.add_argument("--scenes", type=int, default=50)
    parser.add_argument("--first", type=int, default=0, help="number of the first scene; validation: from 100 on")
    parser.add_argument("--steps", type=int, default=20)
    parser.add_argument("--cfg", type=float, default=CFG)
    parser.add_argument("--inversion", choices=("ddim", "null-text"), default="ddim")
    parser.add_argument("--weights", type=Path, default=loader.WEIGHTS, help="another checkpoint")
    parser.add_argument("--sheet", type=Path, metavar="FILE.png", help="a sheet of pictures")
    parser.add_argument("--curves", action="store_true", help="the first of --methods over --axes, and nothing else")
    parser.add_argument("--axes", nargs="+", choices=AXES, default=list(AXES))
    parser.add_argument("--plots", type=Path, default=Path("web/docs"), help="where plots go (default: %(default)s)")
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
        numbers["settings"] = {"steps": arguments.steps, "inversion": arguments.inversion, "cfg": arguments.cfg}
        with torch.inference_mode():
            run(arguments, numbers, keep)
        keep()
    settings = numbers["settings"]
    said = (
        f"{_report.where_it_ran()}. {settings['steps']} steps of euler, ddim_uniform, {settings['inversion']} "
        f"inversion. {numbers['seconds']:.0f} s."
    )
    _report.publish(arguments, f"{report(numbers)}\n\n{said}", numbers)


if __name__ == "__main__":
    main()
