"""Real pictures: how exactly each inversion gives them back, what that costs, and how well PartEdit edits them::

    python dev.py bench inversion [--only ddim null-text …] [--scenes 50] [--markdown BENCHMARKS.md]

The pictures are rendered, with seeds that nothing was trained on and exact masks; the model has never sampled them.
Reconstruction: inverted with their caption, played back with the same prompt, without guidance and with 7.5. Half of
the scenes have parts of other colours, which the caption does not mention, as captions never say everything. Edits: one
part recoloured as in `behaviour`, the edit prompt naming the whole object's colour. Errors are taken against the
picture and against its VAE round trip, which is all that an inversion sees. With `--json` the numbers are kept (after
every inversion, so that nothing is lost with a run that is ended), and `--merge FILE …` makes one report of several
such files.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import comfy.utils
import numpy as np
import torch
from comfy_extras.nodes_custom_sampler import KSamplerSelect, Noise_EmptyNoise, SamplerCustom

from ..core.trajectory import Trajectory
from ..nodes.feature_blend import FeatureBlendSamplerAdvanced
from ..nodes.inversion import DDIMInversion, EditFriendlyInversion, LEDITSInversion, NullTextInversion
from ..nodes.trajectories import ReplayTrajectory
from ..partsworld import loader, tokens
from ..partsworld.render import render
from ..partsworld.scene import PARTS, Scene, sample_scene
from . import _edits, _report
from ._edits import Editor, Settings, Wish
from ._pictures import encode, psnr
from .behaviour import AIM_PSNR, Measured, measure

RECONSTRUCTED = 42_000_000
"""Seed of the first scene that is reconstructed."""
EDITED = 43_000_000
"""Seed of the first scene that is edited."""
NULL_TEXT = "null-text"
LABELS = {
    "ddim": "DDIM", "ddim-1": "DDIM, 1 refinement", "ddim-3": "DDIM, 3 refinements", NULL_TEXT: "Null-text",
    "edit-friendly": "Edit-friendly", "ledits++": "LEDITS++",
}  # fmt: skip
OF_ONE_CFG = (NULL_TEXT, "edit-friendly")
"""These are made for the guidance that they are played back with; the others know none."""
CFGS = (1.0, 7.5)
HIGHEST = 60.0  # dB in the plot
EXACT = 100.0  # dB; above it a mean says nothing
NAMED = 3  # inversions in the sentences on which is best
BACKWARD = 3  # UNet rows that a forward and a backward pass of one row count for
SECTIONS = ("ceiling", "reconstruction", "edits")


@dataclass(frozen=True)
class Pictures:
    """n renders [n, 256, 256, 3] in 0…1, their VAE round trips, latents [n, 4, 32, 32], captions, and numbers, to which
    the noise of each belongs, whatever it is batched with.
    """

    images: torch.Tensor
    round_trips: torch.Tensor
    latents: torch.Tensor
    captions: list[str]
    numbers: list[int]

    def some(self, places: Sequence[int]) -> Pictures:
        """Those at these places."""
        few = list(places)
        captions, numbers = [self.captions[i] for i in few], [self.numbers[i] for i in few]
        return Pictures(self.images[few], self.round_trips[few], self.latents[few], captions, numbers)

    @property
    def latent(self) -> dict[str, Any]:
        """As a LATENT."""
        return {"samples": self.latents, "batch_index": self.numbers}


@dataclass(frozen=True)
class Inverted:
    """What an inversion node gives out, and how many UNet rows it took."""

    trajectory: Trajectory
    latent: dict[str, Any]
    sigmas: torch.Tensor
    rows: int


class Counted:
    """A clone of a MODEL that counts the rows its UNet is given; those that gradients go back through, three times."""

    def __init__(self, model: Any) -> None:
        calls: list[int] = []

        def call(apply: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
            result = apply(arguments["input"], arguments["timestep"], **arguments["c"])
            calls.append(len(arguments["input"]) * (BACKWARD if result.requires_grad else 1))
            return result

        self.model = model.clone()
        self.model.set_model_unet_function_wrapper(call)  # no method: clones of the clone would copy its object
        self._calls = calls

    def taken(self) -> int:
        """Rows since it was last asked."""
        rows = sum(self._calls)
        self._calls.clear()
        return rows


class Bench:
    """The demo model, and what is asked of it. Everything runs under `torch.inference_mode()`, as in the server."""

    def __init__(self, editor: Editor, batch: int, null_text_images: int) -> None:
        self.editor = editor
        self.batch = batch
        self.null_text_images = null_text_images
        model, self.clip, self.vae = editor.models
        self.unet = Counted(model)
        self.negative = encode(self.clip, [""])

    def pictures(self, scenes: Sequence[Scene]) -> tuple[Pictures, list[dict[str, np.ndarray]]]:
        """Scenes of one object each as pictures, with the masks [256, 256] of their parts."""
        drawn = [render(scene) for scene in scenes]
        images = torch.from_numpy(np.stack([r.image for r in drawn]))
        latents = torch.cat([tokens.encode(self.vae, few) for few in images.split(self.batch)])
        captions = [scene.caption() for scene in scenes]
        pictures = Pictures(images, self.decode(latents), latents, captions, list(range(len(scenes))))
        return pictures, [r.masks[0] for r in drawn]

    def decode(self, latents: torch.Tensor) -> torch.Tensor:
        """[n, 256, 256, 3] in 0…1."""
        return torch.cat([self.vae.decode(few).cpu() for few in latents.split(self.batch)])

    def batches(self, name: str, places: Sequence[int]) -> Iterator[list[int]]:
        """Places of pictures that are inverted together. Null-text takes its few one by one: those in a batch end
        their optimisation together.
        """
        size = 1 if name == NULL_TEXT else self.batch
        few = [i for i in places if name != NULL_TEXT or i < self.null_text_images]
        yield from (few[first : first + size] for first in range(0, len(few), size))

    def invert(self, name: str, pictures: Pictures, steps: int, cfg: float) -> Inverted:
        """With the pictures' captions and the nodes' defaults."""
        guided: dict[str, Any] = {"negative": self.negative, "cfg": cfg}
        seed = self.editor.how.seed
        nodes: dict[str, tuple[Any, dict[str, Any]]] = {
            "ddim": (DDIMInversion, {"refine_steps": 0}),
            "ddim-1": (DDIMInversion, {"refine_steps": 1}),
            "ddim-3": (DDIMInversion, {"refine_steps": 3}),
            NULL_TEXT: (NullTextInversion, {**guided, "inner_steps": 10, "learning_rate": 0.01}),
            "edit-friendly": (EditFriendlyInversion, {**guided, "skip": 0.36, "eta": 1.0, "seed": seed}),
            "ledits++": (LEDITSInversion, {"skip": 0.15, "seed": seed}),
        }
        node, own = nodes[name]
        trajectory, latent, sigmas = node.execute(
            model=self.unet.model, positive=encode(self.clip, pictures.captions), latent=pictures.latent, steps=steps,
            scheduler=self.editor.how.scheduler, **own,
        ).args  # fmt: skip
        return Inverted(trajectory, latent, sigmas, self.unet.taken())

    # ------------------------------------------------------------ there and back

    def replay(self, trajectory: Trajectory, captions: list[str], cfg: float) -> tuple[torch.Tensor, int]:
        """The latents [n, 4, 32, 32] that a trajectory plays back to, and the UNet rows of that."""
        model, sampler, sigmas, start = ReplayTrajectory.execute(self.unet.model, trajectory).args
        positive, seed = encode(self.clip, captions), self.editor.how.seed
        done = SamplerCustom.execute(model, False, seed, cfg, positive, self.negative, sampler, sigmas, start)
        return done.args[0]["samples"], self.unet.taken()

    def reconstruct(self, name: str, pictures: Pictures, steps: int) -> dict[str, dict[str, Any]]:
        """What was measured of one inversion with each guidance that it is for; rows are of UNet, of all pictures."""
        cfgs = [cfg for cfg in CFGS if cfg > 1 or name != NULL_TEXT]
        found: dict[float, dict[str, Any]] = {
            cfg: {"inversion": name, "steps": steps, "cfg": cfg, "image": [], "round_trip": [], "rows": [0, 0]}
            for cfg in cfgs
        }
        for places in self.batches(name, range(len(pictures.captions))):
            few, made = pictures.some(places), None
            for cfg, record in found.items():
                if made is None or name in OF_ONE_CFG:
                    made = self.invert(name, few, steps, cfg)
                latents, rows = self.replay(made.trajectory, few.captions, cfg)
                again = self.decode(latents)
                record["image"] += map(psnr, again, few.images)
                record["round_trip"] += map(psnr, again, few.round_trips)
                record["rows"] = [record["rows"][0] + made.rows, record["rows"][1] + rows]
            print(f"  {LABELS[name]}, {steps} steps: {len(found[cfgs[-1]]['image'])} reconstructed", flush=True)
        return {f"{name}, {steps} steps, cfg {cfg:g}": record for cfg, record in found.items()}

    # ------------------------------------------------------------ edits

    def edit(self, made: Inverted, asked: Sequence[Wish], control: bool) -> tuple[torch.Tensor, torch.Tensor, int]:
        """PartEdit on inverted pictures: edited pictures [n, 256, 256, 3], masks [n, 256, 256], UNet rows.

        control: with Prompt-to-Prompt, for which the words of all must stand in the same places.
        """
        how, prompts = self.editor.how, [[w.source for w in asked], [w.edit("object") for w in asked]]
        if control:
            words, source, edit = _edits._one_control([self.editor._control(wish, {}) for wish in asked])
        else:
            words, (source, edit) = None, (encode(self.clip, texts) for texts in prompts)
        sampler = KSamplerSelect.execute(how.sampler_name).args[0]
        edited, _, masks, _ = FeatureBlendSamplerAdvanced.execute(
            self.unet.model, source, edit, self.negative, Noise_EmptyNoise(), sampler, made.sigmas, made.latent,
            how.cfg, how.omega, how.blend_until, how.layers, "background", part_token=self.editor.token(asked[0]),
            prompt_control=words, trajectory=made.trajectory,
        ).args  # fmt: skip
        return self.decode(edited["samples"]), masks.cpu(), self.unet.taken()

    def edits(self, name: str, part: str, job: Job, controls: Sequence[bool]) -> dict[str, dict[str, Any]]:
        """What was measured of the edits of one part after one inversion, without and with Prompt-to-Prompt."""
        how = self.editor.how
        records: dict[bool, dict[str, Any]] = {
            control: {"part": part, "inversion": name, "control": control, "rows": [0, 0], "scenes": []}
            for control in controls
        }
        for places in (few for alike in job.alike for few in self.batches(name, alike)):
            pictures, asked = job.pictures.some(places), [job.asked[i] for i in places]
            made = self.invert(name, pictures, how.steps, how.cfg)
            for control, record in records.items():
                edited, masks, rows = self.edit(made, asked, control)
                record["rows"] = [record["rows"][0] + made.rows, record["rows"][1] + rows]
                record["scenes"] += [
                    _scene(job, i, picture, mask)
                    for i, picture, mask in zip(places, edited.numpy(), masks.numpy(), strict=True)
                ]
            print(f"  {part}, {LABELS[name]}: {len(records[controls[0]]['scenes'])} edited", flush=True)
        for record in records.values():
            record["scenes"].sort(key=lambda scene: scene["number"])
        return {f"{part}, {_method(record)}": record for record in records.values()}


@dataclass(frozen=True)
class Job:
    """Edits of one part: what is asked, the pictures, where the part is in each [256, 256], and the places of those
    whose prompts have their words in the same places.
    """

    asked: list[Wish]
    pictures: Pictures
    parts: list[np.ndarray]
    alike: list[list[int]]


def job(bench: Bench, part: str, scenes: int) -> Job:
    """Rendered pictures of objects in one colour each, and the colours that their part shall get."""
    asked = _edits.wishes(part, 0, scenes)
    pictures, masks = bench.pictures(
        [sample_scene(EDITED + w.number, w.kind, background=w.background, colour=w.colour) for w in asked]
    )
    alike: dict[bytes, list[int]] = {}
    for i, wish in enumerate(asked):
        control = bench.editor._control(wish, {})[0]
        alike.setdefault(control.until.numpy().tobytes() + control.mapping.numpy().tobytes(), []).append(i)
    parts = [mask[wish.part] > 0.5 for mask, wish in zip(masks, asked, strict=True)]
    return Job(asked, pictures, parts, list(alike.values()))


def _scene(job: Job, place: int, edited: np.ndarray, mask: np.ndarray) -> dict[str, Any]:
    """An edit [256, 256, 3] against the picture and its round trip, outside the part; its colour inside."""
    wish, part = job.asked[place], job.parts[place]
    image, round_trip = (seen[place].numpy() for seen in (job.pictures.images, job.pictures.round_trips))
    found: Measured = measure(wish, part, round_trip, edited, mask)
    return {
        "number": wish.number,
        "image": measure(wish, part, image, edited).psnr,
        "round_trip": found.psnr,
        "colour": found.colour,
        "right": found.right,
        "aim": found.aim,
        "iou": found.iou,
    }


def reconstructed(scenes: int) -> list[Scene]:
    """The scenes to reconstruct: kinds in turn, parts of other colours in every second round."""
    kinds = list(PARTS)
    return [
        sample_scene(RECONSTRUCTED + i, kinds[i % len(kinds)], mixed=i // len(kinds) % 2 == 1) for i in range(scenes)
    ]


# ---------------------------------------------------------------- report


def _mean(values: Any) -> float:
    known = list(values)
    return float(np.mean(known)) if known else float("nan")


def _decibels(values: Sequence[float], worst: bool = False) -> str:
    value = float(np.quantile(values, 0.1)) if worst else _mean(values)
    return f"{value:.1f} dB" if value < EXACT else "exact"


def _method(record: dict[str, Any]) -> str:
    return LABELS[record["inversion"]] + (" + Prompt-to-Prompt" if record["control"] else "")


def _ordered(records: dict[str, dict[str, Any]], *keys: str) -> list[dict[str, Any]]:
    """Records in the order of `LABELS`, and of these keys within it, whatever the order in which they were measured."""
    names = list(LABELS)
    return sorted(records.values(), key=lambda r: (names.index(r["inversion"]), *(r[key] for key in keys)))


RECONSTRUCTION_HEAD = ("inversion", "steps", "guidance", "images", "PSNR against the round trip", "worst tenth",
                       "PSNR against the image", "UNet rows an image: inversion", "replay")  # fmt: skip


def reconstruction_report(numbers: dict[str, Any], plot: str) -> str:
    """Markdown: how exactly the pictures come back, and what it costs."""
    rows = []
    for record in _ordered(numbers["reconstruction"], "steps", "cfg"):
        count = len(record["image"])
        rows.append([
            LABELS[record["inversion"]], str(record["steps"]), f"{record['cfg']:g}", str(count),
            _decibels(record["round_trip"]), _decibels(record["round_trip"], worst=True), _decibels(record["image"]),
            *(f"{number / count:.0f}" for number in record["rows"]),
        ])  # fmt: skip
    ceiling = numbers["ceiling"]["reconstruction"]
    return f"""### Reconstruction

{_report.table(RECONSTRUCTION_HEAD, rows)}

- The VAE round trip itself has {_decibels(ceiling)} against the image ({len(ceiling)} images): the ceiling of that \
column. Exact: {EXACT:.0f} dB or more against the round trip.
- DDIM and LEDITS++ are inverted without guidance, whatever they are played back with: their nodes have none. \
Edit-friendly is inverted with the guidance that it is played back with. Null-text without guidance is DDIM.
- Edit-friendly leaves out 0.36 of the steps at the noisy end (its authors' value), LEDITS++ 0.15 (the default of both \
nodes). With one skip and seed both give Feature Blend Sampler the same latents, and so the same edit.
- Null-text: at most 10 updates a step. Each is a forward and a backward pass and counts as {BACKWARD} rows. In \
the edits it has fewer images because it takes long.

![PSNR by cost]({plot})"""


EDIT_HEAD = ("inversion", "images", "PSNR outside, against the round trip", "worst tenth", "against the image",
             "colour right", f"both (≥ {AIM_PSNR} dB, colour right)", "IoU of the found mask",
             "UNet rows an image: inversion", "edit")  # fmt: skip


def edit_report(numbers: dict[str, Any]) -> str:
    """Markdown: a table for each part, and which inversion is best."""
    records, texts = _ordered(numbers["edits"], "control"), []
    parts = list(dict.fromkeys(record["part"] for record in records))
    for part in parts:
        own = [record for record in records if record["part"] == part]
        rows = [_edit_row(record) for record in own]
        rows.append(["generated pictures", "see `shipped_tokens`", *[""] * (len(EDIT_HEAD) - 2)])
        ceiling = numbers["ceiling"][part]
        said = f"The round trip itself has {_decibels(ceiling)} outside the part, against the image."
        texts.append(f"### Edits of {part}\n\n{_report.table(EDIT_HEAD, rows)}\n\n{said} {best(own)}")
    if len(parts) > 1:
        texts.append(f"All parts together: {best(records)}")
    return "\n\n".join(texts)


def _edit_row(record: dict[str, Any]) -> list[str]:
    scenes = record["scenes"]
    against = [scene["round_trip"] for scene in scenes]
    return [
        _method(record),
        str(len(scenes)),
        _decibels(against),
        _decibels(against, worst=True),
        _decibels([scene["image"] for scene in scenes]),
        f"{_mean(scene['right'] for scene in scenes):.0%}",
        f"{_mean(scene['aim'] for scene in scenes):.0%}",
        f"{_mean(scene['iou'] for scene in scenes):.2f}",
        *(f"{number / len(scenes):.0f}" for number in record["rows"]),
    ]


def best(records: Sequence[dict[str, Any]]) -> str:
    """A sentence for each number of images that some inversion has: which is best of those that have as many."""
    said = []
    for count in sorted({len(record["scenes"]) for record in records}, reverse=True):
        scenes: dict[str, list[dict[str, Any]]] = {}
        for record in records:
            if len(record["scenes"]) >= count:
                scenes.setdefault(_method(record), []).extend(record["scenes"][:count])
        most = max(map(len, scenes.values()))
        scores = {
            method: (_mean(s["aim"] for s in found), _mean(s["round_trip"] for s in found))
            for method, found in scenes.items()
            if len(found) == most  # of all the parts
        }
        ranked = sorted(scores, key=lambda method: scores[method], reverse=True)[:NAMED]
        first, *others = (f"{method} ({scores[method][0]:.0%}, {scores[method][1]:.1f} dB)" for method in ranked)
        behind = f", before {', '.join(others)}" if others else ""
        said.append(f"Best on the first {count} images (both, then PSNR): {first}{behind}.")
    return " ".join(said)


def draw(file: Path, numbers: dict[str, Any]) -> None:
    """Write the plot: PSNR against the round trip over the UNet rows of inversion and replay together."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    _, axis = plt.subplots(figsize=(7, 4.5))
    looks: dict[str, dict[str, Any]] = {
        name: {"marker": marker, "color": f"C{i}", "ls": "", "ms": 8}
        for i, (name, marker) in enumerate(zip(LABELS, "ovsDP*", strict=True))
    }
    records = _ordered(numbers["reconstruction"], "steps", "cfg")
    for name in dict.fromkeys(record["inversion"] for record in records):
        axis.plot([], [], label=LABELS[name], **looks[name])
    for record in records:
        x = sum(record["rows"]) / len(record["image"])
        y = _mean(min(HIGHEST, value) for value in record["round_trip"])
        axis.plot(x, y, fillstyle="full" if record["cfg"] > 1 else "none", **looks[record["inversion"]])
        axis.annotate(str(record["steps"]), (x, y), (5, 4), textcoords="offset points", fontsize=7)
    axis.set(
        xscale="log", xlabel="UNet rows an image, inversion and replay",
        ylabel=f"PSNR against the VAE round trip, dB (≤ {HIGHEST:.0f})",
        title="filled: guidance 7.5, hollow: none; numbers: steps",
    )  # fmt: skip
    axis.legend(fontsize=8)
    plt.tight_layout()
    plt.savefig(file, dpi=90)
    plt.close()


def report(numbers: dict[str, Any], folder: Path) -> str:
    """The section of BENCHMARKS.md; draws the plot into the folder."""
    texts = []
    if numbers["reconstruction"]:
        draw(folder / "inversion_cost.png", numbers)
        texts.append(reconstruction_report(numbers, f"{folder.name}/inversion_cost.png"))
    if numbers["edits"]:
        texts.append(edit_report(numbers))
    return "\n\n".join(texts)


# ---------------------------------------------------------------- what is run


def run(arguments: argparse.Namespace, how: Settings, keep: Callable[[dict[str, Any]], None]) -> dict[str, Any]:
    """Measure what the command line asks for; `keep` gets the numbers after every inversion."""
    bench = Bench(Editor(arguments.weights, arguments.tokens, how), arguments.batch, arguments.null_text_images)
    numbers: dict[str, Any] = {section: {} for section in SECTIONS} | {"seconds": 0.0}
    began = time.time()

    def add(section: str, records: dict[str, Any]) -> None:
        numbers[section] |= records
        numbers["seconds"] = time.time() - began
        keep(numbers)

    if not arguments.skip_reconstruction:
        pictures, _ = bench.pictures(reconstructed(arguments.scenes))
        add("ceiling", {"reconstruction": list(map(psnr, pictures.round_trips, pictures.images))})
        for name, steps in ((name, steps) for name in arguments.only for steps in arguments.steps):
            add("reconstruction", bench.reconstruct(name, pictures, steps))
    for part in () if arguments.skip_edits else arguments.parts:
        asked = job(bench, part, arguments.scenes)
        pairs = asked.pictures.images.numpy(), asked.pictures.round_trips.numpy()
        add("ceiling", {part: [m.psnr for m in map(measure, asked.asked, asked.parts, *pairs)]})
        for name in arguments.only:
            add("edits", bench.edits(name, part, asked, (False, True) if arguments.p2p else (False,)))
    return numbers


def merged(files: Sequence[Path]) -> dict[str, Any]:
    """The numbers of several runs as one's; what two of them have is taken from the later."""
    numbers: dict[str, Any] = {section: {} for section in SECTIONS} | {"seconds": 0.0}
    for file in files:
        more = json.loads(file.read_text(encoding="utf-8"))
        for section in SECTIONS:
            numbers[section] |= more[section]
        numbers["seconds"] += more["seconds"]
        numbers["settings"] = more["settings"]
    return numbers


def main(argv: Sequence[str] | None = None) -> None:
    """Measure, draw and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench inversion", description=__doc__)
    _report.add_arguments(parser, "inversion")
    parser.add_argument("--only", nargs="+", choices=LABELS, default=list(LABELS), help="these inversions")
    parser.add_argument("--scenes", type=int, default=50, help="to reconstruct, and to edit per part")
    parser.add_argument("--null-text-images", type=int, default=8, help="null-text takes only the first few of them")
    parser.add_argument("--steps", type=int, nargs="+", default=[20, 50], help="of the reconstructions")
    parser.add_argument("--edit-steps", type=int, default=50)
    parser.add_argument("--parts", nargs="+", default=["figure-head", "car-hood"], metavar="KIND-PART")
    parser.add_argument("--p2p", action=argparse.BooleanOptionalAction, default=True, help="with Prompt-to-Prompt too")
    parser.add_argument("--skip-reconstruction", action="store_true")
    parser.add_argument("--skip-edits", action="store_true")
    parser.add_argument("--batch", type=int, default=10, help="pictures at a time (no influence on the results)")
    parser.add_argument("--weights", type=Path, default=loader.WEIGHTS, help="another checkpoint")
    parser.add_argument("--tokens", type=Path, default=tokens.FOLDER, help="another folder of part tokens")
    parser.add_argument("--folder", type=Path, default=Path(__file__).resolve().parent.parent / "docs",
                        help="where the plot goes")  # fmt: skip
    parser.add_argument("--merge", type=Path, nargs="+", help="measure nothing, make one report of these JSON files")
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    how = Settings(2024, arguments.edit_steps, CFGS[-1], "euler", "ddim_uniform", 1.5, 1.0, "official")

    def keep(numbers: dict[str, Any]) -> None:
        numbers["settings"] = str(how)
        if arguments.json:
            arguments.json.write_text(json.dumps(numbers, indent=1) + "\n", encoding="utf-8")

    if arguments.merge:
        numbers = merged(arguments.merge)
    else:
        with torch.inference_mode():
            numbers = run(arguments, how, keep)
    said = f"{_report.where_it_ran()}. Settings of the edits: {numbers['settings']}. {numbers['seconds']:.0f} s."
    _report.publish(arguments, f"{report(numbers, arguments.folder)}\n\n{said}", numbers)


if __name__ == "__main__":
    main()
