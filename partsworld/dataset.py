"""Training data: scenes drawn once, kept as latents and captions in a cache folder.

The latent is linear: each 8×8 patch of the picture is projected on the four directions that carry most of what
parts-world's patches differ in (their principal components: three of colour, one of edge). It can be written into
ComfyUI's TAESD encoder exactly (see `autoencoder.py`), and encoding a hundred thousand pictures costs nothing.
"""

from __future__ import annotations

import json
import logging
import multiprocessing
from pathlib import Path

import numpy as np

from .render import render
from .scene import Scene, sample_scene

log = logging.getLogger(__name__)

PATCH = 8
EDGE_SCALE = 0.6  # standard deviation of the fourth channel, which is mostly zero with sharp peaks
CAPTIONS_PER_SCENE = 4


def training_scene(seed: int) -> tuple[Scene, list[str]]:
    """Scene number `seed` of the training world and `CAPTIONS_PER_SCENE` captions for it."""
    rng = np.random.default_rng((seed, 3))
    things = int(rng.choice([1, 2, 3], p=[0.82, 0.13, 0.05]))
    mixed = bool(rng.random() < (0.6 if things == 1 else 0.25))
    scene = sample_scene(seed, things=things, mixed=mixed)
    parts = 3 if rng.random() < 0.75 else 0
    captions = []
    for style in rng.random(CAPTIONS_PER_SCENE):
        colour, background = style >= 0.08, style < 0.8
        captions.append(scene.caption(parts, colour, background))
    return scene, captions


def patches(image: np.ndarray) -> np.ndarray:
    """[H, W, 3] → [H/8, W/8, 192]: each cell's patch, flattened row, column, channel."""
    h, w, c = image.shape
    cells = image.reshape(h // PATCH, PATCH, w // PATCH, PATCH, c).transpose(0, 2, 1, 3, 4)
    return cells.reshape(h // PATCH, w // PATCH, PATCH * PATCH * c)


def fit_projection(scenes: int = 1500) -> tuple[np.ndarray, np.ndarray]:
    """(weight [4, 192], bias [4]) of the linear latent: unit variance per channel, `EDGE_SCALE` for the last."""
    cells = np.concatenate([patches(render(training_scene(i)[0]).image).reshape(-1, 192)[::3] for i in range(scenes)])
    mean = cells.mean(0, dtype=np.float64)
    covariance = np.cov(cells.T.astype(np.float64))
    values, vectors = np.linalg.eigh(covariance)
    values, vectors = values[::-1][:4], vectors[:, ::-1][:, :4].T
    vectors *= np.sign(vectors[np.arange(4), np.abs(vectors).argmax(1)])[:, None]
    weight = vectors / np.sqrt(values)[:, None] * np.array([1, 1, 1, EDGE_SCALE])[:, None]
    return weight.astype(np.float32), (-weight @ mean).astype(np.float32)


def encode(image: np.ndarray, weight: np.ndarray, bias: np.ndarray) -> np.ndarray:
    """[H, W, 3] picture → [4, H/8, W/8] latent in the UNet's scale."""
    return (patches(image) @ weight.T + bias).transpose(2, 0, 1)


def build(folder: Path, scenes: int, processes: int = 2) -> None:
    """Fill `folder` with `projection.npz`, `latents.npy` [scenes, 4, 32, 32] float16 and `captions.json`.

    Deterministic; does nothing if the folder already holds that many scenes.
    """
    done = folder / "captions.json"
    if done.exists() and len(json.loads(done.read_text())) == scenes:
        return
    folder.mkdir(parents=True, exist_ok=True)
    projection = folder / "projection.npz"
    if not projection.exists():
        weight, bias = fit_projection()
        np.savez(projection, weight=weight, bias=bias)
    latents = np.lib.format.open_memmap(folder / "latents.npy", "w+", np.float16, (scenes, 4, 32, 32))
    captions: list[list[str]] = []
    chunk = 500
    jobs = [(str(projection), start, min(start + chunk, scenes)) for start in range(0, scenes, chunk)]
    with multiprocessing.get_context("spawn").Pool(processes) as pool:
        for start, (block, words) in zip(range(0, scenes, chunk), pool.imap(_build_chunk, jobs), strict=True):
            latents[start : start + len(block)] = block
            captions += words
            if start % 5000 == 0:
                log.info("drew %d of %d scenes", start + len(block), scenes)
    latents.flush()
    done.write_text(json.dumps(captions))


def _build_chunk(job: tuple[str, int, int]) -> tuple[np.ndarray, list[list[str]]]:
    path, start, stop = job
    projection = np.load(path)
    block = np.empty((stop - start, 4, 32, 32), np.float16)
    words = []
    for i in range(start, stop):
        scene, captions = training_scene(i)
        block[i - start] = encode(render(scene).image, projection["weight"], projection["bias"])
        words.append(captions)
    return block, words
