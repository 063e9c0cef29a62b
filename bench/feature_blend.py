"""What PartEdit costs beside plain sampling of the same number of rows::

    python dev.py bench feature_blend [--models demo sd15 sdxl] [--rounds 9] [--markdown BENCHMARKS.md]

Both ways run in one process on the same model, taking turns; the ratio is taken within each turn and its median is
reported. Plain sampling is ComfyUI's own of a batch of two with guidance: 4 UNet rows a step, as many as PartEdit
needs for one edit. `sd15` and `sdxl` have those models' full width and layers and random weights; on a CPU at a small
latent, on a GPU at 512² and 1024² pixels. On a CPU, processor time is counted, which other programs disturb less.
"""

from __future__ import annotations

import argparse
import ctypes
import multiprocessing
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy.utils
import numpy as np
import torch

from ..core import part_token
from ..core.unet.inputs import model_sigmas
from ..core.unet.rows import PairedRows, stack
from ..nodes.feature_blend import FeatureBlendSampler
from ..partsworld import loader, tokens
from . import _report
from ._pictures import encode

TARGET = 1.10
CFG, SEED, SAMPLER, SCHEDULER = 7.5, 1, "euler", "normal"

_UNET: dict[str, Any] = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 320, "use_spatial_transformer": True,
    "legacy": False,
}  # fmt: skip
SD15: dict[str, Any] = _UNET | {
    "num_res_blocks": [2, 2, 2, 2], "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0],
    "transformer_depth_middle": 1, "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0],
    "use_linear_in_transformer": False, "context_dim": 768, "adm_in_channels": None,
}  # fmt: skip
SDXL: dict[str, Any] = _UNET | {
    "num_res_blocks": [2, 2, 2], "channel_mult": [1, 2, 4], "transformer_depth": [0, 0, 2, 2, 10, 10],
    "transformer_depth_middle": 10, "transformer_depth_output": [0, 0, 0, 2, 2, 2, 10, 10, 10],
    "use_linear_in_transformer": True, "context_dim": 2048, "adm_in_channels": 2816, "num_classes": "sequential",
}  # fmt: skip


@dataclass(frozen=True)
class Subject:
    """A model and all that a run on it needs. edits: CONDITIONING of as many rows as there are edits."""

    name: str
    model: Any
    source: Any
    edits: Any
    negative: Any
    token: part_token.PartToken
    size: tuple[int, int]
    steps: int

    @property
    def rows(self) -> PairedRows:
        return PairedRows.pair(len(self.edits[0][0]), 1)

    @property
    def latent(self) -> torch.Tensor:
        return torch.zeros(1, 4, *self.size)


def partedit(subject: Subject) -> torch.Tensor:
    """One run of FeatureBlendSampler."""
    edited, *_ = FeatureBlendSampler.execute(
        subject.model, subject.source, subject.edits, subject.negative, {"samples": subject.latent}, SEED,
        subject.steps, CFG, SAMPLER, SCHEDULER, 1.0, 1.5, 1.0, "official", "background", subject.token,
    ).args  # fmt: skip
    return edited["samples"]


def plain(subject: Subject) -> torch.Tensor:
    """ComfyUI's own sampling of the same prompts from the same noise."""
    rows = subject.rows
    positive = stack([subject.edits, subject.source], [rows.edits, rows.sources], ["edit", "source"])
    return comfy.sample.sample_custom(
        subject.model, rows.join(comfy.sample.prepare_noise(subject.latent, SEED)), CFG,
        comfy.samplers.sampler_object(SAMPLER), model_sigmas(subject.model, SAMPLER, SCHEDULER, subject.steps, 1.0),
        positive, subject.negative, rows.join(subject.latent), disable_pbar=True, seed=SEED,
    )  # fmt: skip


# ---------------------------------------------------------------- models


def demo(arguments: argparse.Namespace) -> Subject:
    """The demo model, with real prompts and its own token."""
    model, clip, _ = loader.load(arguments.weights)
    token = part_token.load(arguments.tokens / "partsworld_figure_head.safetensors")
    source, edit, negative = (
        encode(clip, [words]) for words in ("a red figure on a green field", "a blue figure on a green field", "")
    )
    return Subject(
        "demo model, 32×32 latent, float32", model, source, edit, negative, token, (32, 32), arguments.steps + 2
    )


def sd15(arguments: argparse.Namespace) -> Subject:
    """SD1.5's shape with random weights."""
    return _random("SD1.5 shape", comfy.supported_models.SD15, SD15, 64, arguments)


def sdxl(arguments: argparse.Namespace) -> Subject:
    """SDXL's shape with random weights."""
    return _random("SDXL shape", comfy.supported_models.SDXL, SDXL, 128, arguments)


MODELS: dict[str, Callable[[argparse.Namespace], Subject]] = {"demo": demo, "sd15": sd15, "sdxl": sdxl}


def _random(name: str, family: Any, unet: dict[str, Any], native: int, arguments: argparse.Namespace) -> Subject:
    device = comfy.model_management.get_torch_device()
    dtype = getattr(torch, arguments.dtype or ("float16" if device.type == "cuda" else "bfloat16"))
    side = arguments.latent or (native if device.type == "cuda" else 32)
    config = family(unet | {"model_channels": arguments.width})
    config.set_inference_dtype(dtype, None)
    with torch.inference_mode(False):
        base = config.get_model({}, "", device=device)
        fill(base.diffusion_model)
    parameters = sum(p.numel() for p in base.diffusion_model.parameters())
    model = comfy.model_patcher.ModelPatcher(base, device, device)
    width, pooled = unet["context_dim"], unet["adm_in_channels"] is not None
    token = part_token.from_tensor(_randn(2, width, seed=9), "part")
    title = f"{name}, width {arguments.width}, {parameters / 1e9:.2f} B parameters, {side}×{side} latent"
    source, edit, negative = (_prompt(width, pooled, seed) for seed in (1, 2, 3))
    title += f", {str(dtype).removeprefix('torch.')}"
    return Subject(title, model, source, edit, negative, token, (side, side), arguments.steps)


def _prompt(width: int, pooled: bool, seed: int) -> Any:
    return [[_randn(1, 77, width, seed=seed), {"pooled_output": _randn(1, 1280, seed=seed)} if pooled else {}]]


def _randn(*shape: int, seed: int) -> torch.Tensor:
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


@torch.no_grad()
def fill(module: torch.nn.Module) -> None:
    """Random weights that keep activations finite. Large ones repeat the same few million numbers: quick to make."""
    pool = _randn((1 << 21) + 7, seed=0)
    for tensor in module.parameters():
        if tensor.ndim < 2:
            tensor.fill_(0.0)
            continue
        numbers = pool.repeat(-(-tensor.numel() // len(pool)))[: tensor.numel()].view(tensor.shape)
        tensor.copy_(numbers * 0.5 / tensor[0].numel() ** 0.5)
    for part in module.modules():
        if isinstance(part, (torch.nn.GroupNorm, torch.nn.LayerNorm)):
            part.weight.fill_(1.0)


# ---------------------------------------------------------------- measurements


def rows_per_step(subject: Subject, run: Callable[[Subject], torch.Tensor]) -> list[int]:
    """UNet rows of each step (evaluation at one noise level) of a run."""
    seen: dict[float, int] = {}

    def call(apply: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
        sigma = float(arguments["timestep"][0])
        seen[sigma] = seen.get(sigma, 0) + len(arguments["input"])
        return apply(arguments["input"], arguments["timestep"], **arguments["c"])

    counted = subject.model.clone()
    counted.set_model_unet_function_wrapper(call)
    run(replace(subject, model=counted))
    return list(seen.values())


def check_rows(subject: Subject) -> str:
    """Assert 2 + 2N rows a step for N edits (1 and 3), and as many for plain sampling of one; say so."""
    three = [[subject.edits[0][0].expand(3, -1, -1), dict(subject.edits[0][1])]]
    for edits, runs in ((subject.edits, (partedit, plain)), (three, (partedit,))):
        asked = replace(subject, edits=edits, steps=2)
        wanted = 2 + 2 * asked.rows.edits
        for run in runs:
            found = rows_per_step(asked, run)
            assert found == [wanted] * asked.steps, f"{run.__name__}: {found} rows a step instead of {wanted}"
    return "4 (8 for three edits)"


def clock() -> float:
    """Seconds: of this process on a CPU, of the wall on a GPU, whose work is waited for."""
    if torch.cuda.is_available():
        torch.cuda.synchronize()
        return time.perf_counter()
    return time.process_time()


def timed(run: Callable[[Subject], torch.Tensor], subject: Subject) -> tuple[float, float]:
    """Seconds by `clock` and by the wall."""
    wall, start = time.perf_counter(), clock()
    result = run(subject)
    seconds = clock() - start
    assert torch.isfinite(result).all(), f"{run.__name__} on {subject.name} gave NaN"
    return seconds, time.perf_counter() - wall


def alternate(subject: Subject, rounds: int) -> np.ndarray:
    """[rounds, 2 ways (PartEdit, plain), 2 clocks] seconds; who goes first changes every round."""
    found = np.zeros((rounds, 2, 2))
    for number in range(rounds):
        ways = [(0, partedit), (1, plain)]
        for place, run in ways if number % 2 else ways[::-1]:
            found[number, place] = timed(run, subject)
    return found


def peak_memory(subject: Subject) -> dict[str, tuple[float, float]] | None:
    """(above the loaded model, all) peak GB of each way; None where it cannot be told.

    On a GPU what PyTorch allocated; on Linux the resident memory of a forked process that does one run.
    """
    short = replace(subject, steps=3)
    if torch.cuda.is_available():
        return {run.__name__: _peak_on_gpu(run, short) for run in (partedit, plain)}
    if not sys.platform.startswith("linux") or torch.get_num_threads() > 1:  # forked threads would wait for ever
        return None
    return {run.__name__: _peak_in_fork(run, short) for run in (partedit, plain)}


def _peak_on_gpu(run: Callable[[Subject], torch.Tensor], subject: Subject) -> tuple[float, float]:
    run(subject)
    before = torch.cuda.memory_allocated()
    torch.cuda.reset_peak_memory_stats()
    run(subject)
    peak = torch.cuda.max_memory_allocated()
    return (peak - before) / 1e9, peak / 1e9


def _peak_in_fork(run: Callable[[Subject], torch.Tensor], subject: Subject) -> tuple[float, float]:
    context = multiprocessing.get_context("fork")
    receiver, sender = context.Pipe(duplex=False)
    process = context.Process(target=_report_peak, args=(run, subject, sender))
    process.start()
    sender.close()
    peak = receiver.recv()
    process.join()
    return peak


def _report_peak(run: Callable[[Subject], torch.Tensor], subject: Subject, sender: Any) -> None:
    with torch.inference_mode():
        run(replace(subject, steps=1))  # what is set up once, and the same for both
        ctypes.CDLL(None).malloc_trim(0)  # else the peak would hide in memory that the first run left behind
        Path("/proc/self/clear_refs").write_text("5", encoding="ascii")  # resets the peak
        before = _status("VmRSS")
        run(subject)
    sender.send(((_status("VmHWM") - before) / 1e6, _status("VmHWM") / 1e6))


def _status(name: str) -> int:
    """A line of this process's /proc status, kB."""
    lines = Path("/proc/self/status").read_text(encoding="ascii").splitlines()
    return next(int(line.split()[1]) for line in lines if line.startswith(name))


HEAD = ("model", "UNet rows a step", "time, PartEdit : plain", "middle half", "wall", "s a step, plain",
        "peak memory beyond the model, PartEdit : plain", "peak memory in all")  # fmt: skip


def row(subject: Subject, rows: str, seconds: np.ndarray, memory: dict[str, tuple[float, float]] | None) -> list[str]:
    """One line of the table."""
    ratios, walls = (seconds[:, 0, c] / seconds[:, 1, c] for c in (0, 1))
    low, middle, high = np.quantile(ratios, (0.25, 0.5, 0.75))
    peaks = ["not measured"] * 2
    if memory:
        (extra, whole), (plain_extra, plain_whole) = memory["partedit"], memory["plain"]
        peaks = [
            f"{extra / max(plain_extra, 1e-9):.2f} ({extra * 1000:.0f} : {plain_extra * 1000:.0f} MB)",
            f"{whole / plain_whole:.3f}",
        ]
    return [
        subject.name, rows, f"{middle:.3f}", f"{low:.3f} … {high:.3f}", f"{np.median(walls):.3f}",
        f"{np.median(seconds[:, 1, 0]) / subject.steps:.3g}", *peaks,
    ]  # fmt: skip


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench feature_blend", description=__doc__)
    _report.add_arguments(parser, "speed")
    parser.add_argument("--models", nargs="+", choices=list(MODELS), default=list(MODELS))
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--steps", type=int, default=4, help="of the large models; the demo model takes two more")
    parser.add_argument("--width", type=int, default=320, help="of the SD1.5 and SDXL shapes (a multiple of 64)")
    parser.add_argument("--latent", type=int, help="side of their latent (default: 32, on a GPU the native size)")
    parser.add_argument("--dtype", choices=("float32", "bfloat16", "float16"), help="of their weights")
    parser.add_argument("--weights", type=Path, default=loader.WEIGHTS, help="another demo checkpoint")
    parser.add_argument("--tokens", type=Path, default=tokens.FOLDER, help="another folder of part tokens")
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    section, numbers = arguments.section, {}
    with torch.inference_mode():
        for name in arguments.models:
            began = time.time()
            subject = MODELS[name](arguments)
            memory = peak_memory(subject)
            rows = check_rows(subject)
            seconds = alternate(subject, arguments.rounds)
            line = row(subject, rows, seconds, memory)
            met = "met" if float(line[2]) <= TARGET else "missed"
            text = (
                f"{_report.table(HEAD, [line])}\n\nWanted, a ratio of at most {TARGET:.2f}: {met}. {arguments.rounds} "
            )
            text += f"rounds of {subject.steps} steps. {_report.where_it_ran()}. {time.time() - began:.0f} s."
            arguments.section = f"{section} {name}"  # each model has its own: one can be measured again alone
            numbers[name] = {"seconds": seconds.tolist(), "memory_gb": memory, "steps": subject.steps}
            _report.publish(arguments, text, numbers)
            del subject
            comfy.model_management.unload_all_models()


if __name__ == "__main__":
    main()
