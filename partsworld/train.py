"""Trains the demo model and writes its checkpoint::

    python dev.py python -m scalpel.partsworld.train all

or one stage at a time: `data` (scenes as latents and captions), `vae` (the decoder), `unet` (UNet and text encoder),
`export` (partsworld/weights/partsworld.safetensors). What is done is not done again, and a training that was stopped
goes on where it was; `export` may be run while `unet` is under way. On a CPU the UNet is trained by two processes of
one thread each, on a CUDA GPU by one.
"""

from __future__ import annotations

import argparse
import json
import logging
import os
import socket
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from . import architecture, autoencoder, dataset, diffusion

log = logging.getLogger(__name__)

STAGES = ("data", "vae", "unet", "export")
WEIGHTS = Path(__file__).parent / "weights" / "partsworld.safetensors"
LOGIT_SCALE = 4.6055  # CLIP's initial value; part of every CLIP checkpoint, used by none of ComfyUI's nodes


@dataclass(frozen=True)
class Folders:
    """Where each stage keeps what it makes."""

    data: Path
    vae: Path
    unet: Path


def main(argv: Sequence[str] | None = None) -> None:
    """Parse the command line and run the stages."""
    arguments = build_parser().parse_args(argv)
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    work: Path = arguments.work.expanduser()
    folders = Folders(arguments.data or work / "data", arguments.vae or work / "vae", arguments.unet or work / "unet")
    _choose_device()
    stages = STAGES if arguments.stage == "all" else (arguments.stage,)
    if "data" in stages:
        dataset.build(folders.data, arguments.scenes, arguments.processes)
    if "vae" in stages:
        autoencoder.train_decoder(folders.data, folders.vae, arguments.vae_steps)
    if "unet" in stages:
        recipe = diffusion.Recipe(arguments.steps, arguments.cooldown, shares=_shares(arguments.shares))
        _train_unet(folders, recipe, arguments.processes)
    if "export" in stages:
        export(folders, arguments.output)


def build_parser() -> argparse.ArgumentParser:
    """`train STAGE [options]`."""
    parser = argparse.ArgumentParser(prog="python -m scalpel.partsworld.train", description=__doc__)
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.add_argument("stage", choices=(*STAGES, "all"))
    parser.add_argument("--work", type=Path, default=Path("partsworld-training"), help="folder for all that is kept")
    for name in ("data", "vae", "unet"):
        parser.add_argument(f"--{name}", type=Path, metavar="DIR", help=f"default: {name}/ in the --work folder")
    parser.add_argument("--output", type=Path, default=WEIGHTS, help="the checkpoint (default: %(default)s)")
    parser.add_argument("--scenes", type=int, default=80_000, help="scenes in the data (default: %(default)s)")
    parser.add_argument("--vae-steps", type=int, default=4000, help="steps of the decoder (default: %(default)s)")
    parser.add_argument("--steps", type=int, default=6000, help="steps of the UNet, in all (default: %(default)s)")
    parser.add_argument("--cooldown", type=int, default=1200, help="how many of them cool down (default: %(default)s)")
    parser.add_argument("--processes", type=int, default=2, help="on a CPU (default: %(default)s)")
    parser.add_argument("--shares", metavar="N,N", help="rows of each process in a batch of 64 (default: equal)")
    return parser


def _shares(text: str | None) -> tuple[int, ...]:
    return tuple(int(number) for number in text.split(",")) if text else ()


def _choose_device() -> None:
    """Tell ComfyUI's modules, before they look, to do without a GPU where there is none."""
    from comfy.cli_args import args

    args.cpu = not torch.cuda.is_available()


def _train_unet(folders: Folders, recipe: diffusion.Recipe, processes: int) -> None:
    if torch.cuda.is_available() or processes == 1:
        diffusion.train(folders.data, folders.unet, recipe)
        return
    from torch import multiprocessing

    os.environ.setdefault("MASTER_PORT", str(_free_port()))
    os.environ.setdefault("OMP_NUM_THREADS", "1")
    multiprocessing.spawn(_train_rank, args=(processes, folders, recipe), nprocs=processes)


def _train_rank(rank: int, world: int, folders: Folders, recipe: diffusion.Recipe) -> None:
    logging.basicConfig(level=logging.INFO, format="%(asctime)s %(message)s", force=True)
    _choose_device()
    diffusion.train(folders.data, folders.unet, recipe, rank, world)


def _free_port() -> int:
    with socket.socket() as listener:
        listener.bind(("127.0.0.1", 0))
        return int(listener.getsockname()[1])


# ---------------------------------------------------------------- export


def export(folders: Folders, output: Path) -> None:
    """Write the trained parts as one float16 checkpoint in SD1.x's key layout.

    FileNotFoundError if a stage has not left anything yet.
    """
    from safetensors.torch import save_file

    state = torch.load(folders.unet / "state.pt", map_location="cpu", weights_only=True)
    weights = {f"model.diffusion_model.{name}": tensor for name, tensor in _averaged(state, "unet").items()}
    weights |= {f"cond_stage_model.{name}": tensor for name, tensor in _text_encoder(state).items()}
    weights = {name: tensor.half().contiguous() for name, tensor in weights.items()}
    for name, tensor in autoencoder.export(folders.data, folders.vae).items():
        scalar = tensor.ndim == 0  # the latent's scale: kept exact
        weights[f"first_stage_model.{name}"] = (tensor if scalar else tensor.half()).contiguous()
    projection = np.load(folders.data / "projection.npz")
    factors, bias = preview_factors(projection["weight"], projection["bias"])
    decoder = torch.load(folders.vae / "decoder.pt", map_location="cpu", weights_only=True)
    facts = {
        "unet_steps": state["step"],
        "vae_steps": decoder["step"],
        "vocabulary": len(state["vocabulary"]),
        "latent_rgb_factors": factors.tolist(),
        "latent_rgb_bias": bias.tolist(),
    }
    output.parent.mkdir(parents=True, exist_ok=True)
    new = output.with_suffix(".new")
    save_file(weights, new, {"partsworld": json.dumps(facts)})  # one key: safetensors keeps no order of several
    new.replace(output)
    log.info("wrote %s: %.1f MB, UNet after %d steps", output, output.stat().st_size / 1e6, state["step"])


def _averaged(state: dict, part: str) -> dict[str, torch.Tensor]:
    """The moving average of the weights of `unet` or `text`, by their names within it."""
    with torch.device("meta"):
        model = diffusion.Denoiser(len(state["vocabulary"]))
    names = [name for name, _ in model.named_parameters()]
    average = dict(zip(names, state["average"], strict=True))
    return {name.removeprefix(f"{part}."): value for name, value in average.items() if name.startswith(f"{part}.")}


def _text_encoder(state: dict) -> dict[str, torch.Tensor]:
    """The text encoder as an SD1.x checkpoint holds it: every CLIP token has a row, the untrained ones are zero."""
    weights = {f"transformer.{name}": value for name, value in _averaged(state, "text").items()}
    table = "transformer.text_model.embeddings.token_embedding.weight"
    width = architecture.TEXT_CONFIG["hidden_size"]
    full = torch.zeros(architecture.TEXT_CONFIG["vocab_size"], width)
    full[state["vocabulary"]] = weights[table]
    weights[table] = full
    weights["transformer.text_projection.weight"] = torch.eye(width)
    weights["logit_scale"] = torch.tensor(LOGIT_SCALE)
    return weights


def preview_factors(weight: np.ndarray, bias: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    """([4, 3], [3]): the linear map from a latent to its patch's mean colour in −1…1, as ComfyUI's previews use it.

    The rows of the projection are orthogonal, so its pseudo-inverse is its transpose over the squared norms.
    """
    inverse = weight / np.square(weight).sum(1, keepdims=True)
    colours = inverse.reshape(len(weight), -1, 3).mean(1)
    return (2 * colours).round(4), (-2 * bias @ colours - 1).round(4)


if __name__ == "__main__":
    main()
