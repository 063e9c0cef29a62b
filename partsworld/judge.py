"""Says what is in a parts-world picture: which object, which of its parts where and in which colour, on what ground.

A small network, trained on renders, labels every pixel of the picture at 64×64; everything else follows from these
labels and the picture. It is the measure of generated and edited pictures, so it says how good it is itself:
`python -m scalpel.partsworld.judge accuracy`. `… train` trains it again.
"""

from __future__ import annotations

import argparse
import logging
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from .render import render
from .scene import BACKGROUNDS, COLOURS, MAIN_PART, PARTS, Scene, sample_scene

log = logging.getLogger(__name__)

WEIGHTS = Path(__file__).parent / "weights" / "judge.safetensors"
LABELS: tuple[tuple[str, str], ...] = tuple((kind, part) for kind, parts in PARTS.items() for part in parts)
"""(kind, part) of each label from 1 on; label 0 is what belongs to no part."""

SIDE = 64
SMALLEST_OBJECT = 0.005  # of the frame; less is no object
SMALLEST_PART = 0.0008  # of the frame (52 pixels of 256×256); of less, no colour is told


@dataclass(frozen=True)
class Verdict:
    """What a picture shows. `kind` is None where no object is found, and then there are no parts.

    `masks`: part → [H, W] bool, disjoint; `colours`: part → colour name, None for a part that is (nearly) absent.
    """

    kind: str | None
    background: str
    masks: dict[str, np.ndarray]
    colours: dict[str, str | None]

    @property
    def colour(self) -> str | None:
        """Colour of the main part: the object's."""
        return self.colours[MAIN_PART[self.kind]] if self.kind else None


class Network(nn.Module):
    """[n, 3, 64, 64] pictures → logits of the labels [n, 15, 64, 64] and of the backgrounds [n, 5]."""

    def __init__(self) -> None:
        super().__init__()
        widths = (32, 48, 80)
        self.first = _convolutions(12, widths[0])
        self.down1 = _convolutions(widths[0], widths[1], 2)
        self.down2 = _convolutions(widths[1], widths[2], 2)
        self.around = nn.Linear(widths[2], widths[2])
        self.up1 = _convolutions(widths[2] + widths[1], widths[1])
        self.up2 = _convolutions(widths[1] + widths[0], widths[0])
        self.labels = nn.Conv2d(widths[0], 4 * (1 + len(LABELS)), 3, padding=1)
        self.background = nn.Linear(widths[0] + widths[2], len(BACKGROUNDS))

    def forward(self, pictures: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
        fine = self.first(F.pixel_unshuffle(pictures - 0.5, 2))
        middle = self.down1(fine)
        coarse = self.down2(middle)
        whole = coarse.mean((2, 3))
        coarse = coarse + self.around(whole)[..., None, None]
        x = self.up1(torch.cat([_double(coarse), middle], 1))
        x = self.up2(torch.cat([_double(x), fine], 1))
        background = self.background(torch.cat([fine.mean((2, 3)), whole], 1))
        return F.pixel_shuffle(self.labels(x), 2), background


def _convolutions(inputs: int, outputs: int, stride: int = 1) -> nn.Sequential:
    return nn.Sequential(
        nn.Conv2d(inputs, outputs, 3, stride, 1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
        nn.Conv2d(outputs, outputs, 3, padding=1),
        nn.GroupNorm(8, outputs),
        nn.SiLU(),
    )


def _double(x: torch.Tensor) -> torch.Tensor:
    return F.interpolate(x, scale_factor=2.0, mode="nearest")


class Judge:
    """The trained network, ready to look at pictures. FileNotFoundError if there are no weights at `path`."""

    def __init__(self, path: Path = WEIGHTS) -> None:
        from safetensors.torch import load_file

        if not path.is_file():
            raise FileNotFoundError(f"no weights of the judge at {path}: python -m scalpel.partsworld.judge train")
        self.network = Network()
        self.network.load_state_dict({name: tensor.float() for name, tensor in load_file(path).items()})
        self.network.eval()

    def __call__(self, image: np.ndarray | torch.Tensor) -> Verdict:
        """The verdict on one square picture [H, W, 3] in 0…1."""
        return self.all([image])[0]

    @torch.no_grad()
    def all(self, images: Sequence[np.ndarray | torch.Tensor]) -> list[Verdict]:
        """The verdicts on pictures of one size."""
        pictures = torch.stack([torch.as_tensor(image).float() for image in images]).movedim(-1, 1)
        small = F.interpolate(pictures, (SIDE, SIDE), mode="area")
        logits, backgrounds = (torch.cat(parts) for parts in zip(*map(self.network, small.split(16)), strict=True))
        shares = logits.softmax(1)
        names = list(BACKGROUNDS)
        return [
            _verdict(picture, share, names[int(background.argmax())])
            for picture, share, background in zip(pictures, shares, backgrounds, strict=True)
        ]


def _verdict(picture: torch.Tensor, shares: torch.Tensor, background: str) -> Verdict:
    """picture [3, H, W], shares of the labels [15, 64, 64]."""
    areas = {kind: sum(float(shares[1 + i].mean()) for i in _labels_of(kind)) for kind in PARTS}
    kind = max(areas, key=lambda name: areas[name])
    if areas[kind] < SMALLEST_OBJECT:
        return Verdict(None, background, {}, {})
    rows = _labels_of(kind)
    full = F.interpolate(shares[None], picture.shape[1:], mode="bilinear")[0]
    own = full[[1 + i for i in rows]]
    top, winner = own.max(0)
    winner[top < 1 - own.sum(0)] = -1  # rather the ground, or another object
    masks, colours = {}, {}
    for number, row in enumerate(rows):
        part = LABELS[row][1]
        masks[part] = (winner == number).numpy()
        sure = full[1 + row] > 0.8
        colours[part] = nearest_colour(
            picture[:, sure if sure.any() else winner == number].T.numpy(), picture[0].numel()
        )
    return Verdict(kind, background, masks, colours)


def _labels_of(kind: str) -> list[int]:
    return [i for i, (owner, _) in enumerate(LABELS) if owner == kind]


def nearest_colour(pixels: np.ndarray, frame: int = 0) -> str | None:
    """Name of the colour nearest to the median of [n, 3] pixels.

    None if they are less than `SMALLEST_PART` of the `frame`'s pixels.
    """
    if len(pixels) < max(1, SMALLEST_PART * frame):
        return None
    names = list(COLOURS)
    palette = np.array([COLOURS[name] for name in names])
    return names[int(np.square(palette - np.median(pixels, 0)).sum(1).argmin())]


# ---------------------------------------------------------------- training


def train(path: Path = WEIGHTS, steps: int = 1500, batch: int = 32, rate: float = 3e-3) -> None:
    """Train the network on renders of seeds from 20 000 000 on and write its weights, float16, to `path`."""
    from safetensors.torch import save_file

    torch.manual_seed(0)
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    network = Network().to(device)
    optimiser = torch.optim.AdamW(network.parameters(), lr=rate, weight_decay=1e-3)
    for step in range(steps):
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / 50, 1 - step / steps)
        scenes = [_training_scene(20_000_000 + step * batch + i) for i in range(batch)]
        pictures, targets = (torch.from_numpy(np.stack(arrays)) for arrays in zip(*map(_example, scenes), strict=True))
        pictures = disturb(pictures, torch.Generator().manual_seed(step))
        grounds = torch.tensor([list(BACKGROUNDS).index(scene.background) for scene in scenes])
        labels, background = network(pictures.to(device))
        loss = F.cross_entropy(labels, targets.to(device)) + 0.3 * F.cross_entropy(background, grounds.to(device))
        optimiser.zero_grad()
        loss.backward()
        optimiser.step()
        if (step + 1) % 100 == 0:
            log.info("judge step %d: loss %.4f", step + 1, float(loss.detach()))
        if (step + 1) % 500 == 0 or step + 1 == steps:
            path.parent.mkdir(parents=True, exist_ok=True)
            save_file({name: tensor.half().cpu().contiguous() for name, tensor in network.state_dict().items()}, path)


def _training_scene(seed: int) -> Scene:
    """Mostly one object with parts of independent colours; some parts displaced, some scenes empty."""
    rng = np.random.default_rng((seed, 13))
    scene = sample_scene(seed, things=int(rng.choice([1, 2, 3], p=[0.85, 0.1, 0.05])), mixed=bool(rng.random() < 0.75))
    chance = rng.random()
    if chance < 0.03:
        return scene.without()
    if chance < 0.15:
        part = str(rng.choice(PARTS[scene.things[0].kind]))
        dx, dy = (float(v) for v in rng.uniform(-0.08, 0.08, 2))
        return scene.move(dx, dy, part)
    return scene


def _example(scene: Scene) -> tuple[np.ndarray, np.ndarray]:
    """([3, 64, 64] picture, [15, 64, 64] shares of the labels in each pixel)."""
    drawn = render(scene, SIDE)
    shares = np.zeros((1 + len(LABELS), SIDE, SIDE), np.float32)
    for thing, masks in zip(scene.things, drawn.masks, strict=True):
        for part, mask in masks.items():
            shares[1 + LABELS.index((thing.kind, part))] += mask
    shares[0] = (1 - shares[1:].sum(0)).clip(0, 1)
    return drawn.image.transpose(2, 0, 1).clip(0, 1), shares


def disturb(pictures: torch.Tensor, generator: torch.Generator) -> torch.Tensor:
    """[n, 3, h, w] pictures with noise, blots, blur and tints as in generated pictures, of various strengths."""
    n, _, h, w = pictures.shape

    def uniform(high: float) -> torch.Tensor:
        return high * torch.rand(n, 1, 1, 1, generator=generator)

    def normal(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, generator=generator)

    blurred = F.avg_pool2d(F.pad(pictures, (1, 1, 1, 1), mode="replicate"), 3, 1)
    pictures = pictures.lerp(blurred, uniform(1.0))
    mixing = torch.eye(3) + 0.05 * normal(n, 3, 3)
    pictures = torch.einsum("nij,njhw->nihw", mixing, pictures - 0.5) + 0.5 + 0.03 * normal(n, 3, 1, 1)
    blots = F.interpolate(normal(n, 3, h // 8, w // 8), (h, w), mode="bilinear")
    return (pictures + uniform(0.10) * blots + uniform(0.08) * normal(n, 3, h, w)).clamp(0, 1)


# ---------------------------------------------------------------- its own accuracy


def accuracy(judge: Judge, scenes: int = 400, disturbed: bool = False, size: int = 256) -> dict[str, float]:
    """How often the judge is right on renders of unseen scenes (one object, parts of independent colours).

    `kind`, `background`, `colour` (of the object), `part colour` and `part found` (of parts with a colour to tell):
    shares of right answers; `mask IoU`: mean over such parts.
    """
    wanted = [sample_scene(30_000_000 + i, mixed=True) for i in range(scenes)]
    right: dict[str, list[float]] = {}

    def note(name: str, value: float) -> None:
        right.setdefault(name, []).append(value)

    for number, scene in enumerate(wanted):
        drawn = render(scene, size)
        picture = torch.from_numpy(drawn.image)
        if disturbed:
            generator = torch.Generator().manual_seed(number)
            picture = disturb(picture.movedim(-1, 0)[None], generator)[0].movedim(0, -1)
        verdict = judge(picture)
        thing = scene.things[0]
        note("kind", verdict.kind == thing.kind)
        note("background", verdict.background == scene.background)
        note("colour", verdict.colour == thing.colour)
        for part, colour in thing.colours:
            true = drawn.masks[0][part] > 0.5
            if true.mean() < 2 * SMALLEST_PART:
                continue
            found = verdict.masks[part] if verdict.kind == thing.kind else np.zeros_like(true)
            note("part found", bool(found.any()))
            note("part colour", verdict.colours.get(part) == colour)
            note("mask IoU", (found & true).sum() / (found | true).sum())
    return {name: float(np.mean(values)) for name, values in right.items()}


def main(argv: Sequence[str] | None = None) -> None:
    """`judge train` or `judge accuracy`."""
    parser = argparse.ArgumentParser(prog="python -m scalpel.partsworld.judge")
    parser.add_argument("command", choices=("train", "accuracy"))
    parser.add_argument("--steps", type=int, default=1500)
    parser.add_argument("--weights", type=Path, default=WEIGHTS)
    arguments = parser.parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s")
    if arguments.command == "train":
        train(arguments.weights, arguments.steps)
    for disturbed in (False, True):
        numbers = accuracy(Judge(arguments.weights), disturbed=disturbed)
        what = "disturbed" if disturbed else "clean"
        print(f"{what} renders: " + ", ".join(f"{name} {value:.4f}" for name, value in numbers.items()))


if __name__ == "__main__":
    main()
