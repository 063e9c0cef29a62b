"""MAG Guidance beside Algorithm 1 of MAG-Edit as the authors' program runs it, and the memory that its gradient takes::

    python dev.py bench mag_speed [--width 64] [--rounds 3] [--markdown BENCHMARKS.md]

Both ways run in one process on the same model (SD1.5's layers, fewer channels, random weights, float32), taking turns,
with the paper's settings but for the number of steps, and have to give the same latents. The authors' way is written
out below: an inner iteration shows the UNet the reconstruction and the edit in full and goes back from the five maps; a
step of the sampler shows it both, with and without prompt. Attention is written out where probabilities are exchanged,
and is PyTorch's everywhere else; the reconstruction builds no graph. (Theirs writes out all attention, and builds it.)

The second table counts on PyTorch's meta device, with the real widths: every tensor that autograd keeps, none of them
computed.
"""

from __future__ import annotations

import argparse
import time
from collections.abc import Callable, Sequence
from contextlib import nullcontext, suppress
from dataclasses import dataclass, replace
from functools import partial
from itertools import pairwise
from typing import Any

import comfy.ldm.modules.attention
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.supported_models
import comfy.utils
import numpy as np
import torch
import torch.nn.functional as F

from ..core.heatmap import probabilities
from ..core.mag import TOKEN_RATIO, Push
from ..core.prompt_to_prompt import PromptControl
from ..core.run_log import RunLog
from ..core.trajectory import Trajectory
from ..core.unet import inverting, mag
from ..core.unet.attention import Replacement, attention, replace_attention
from ..core.unet.checkpointing import checkpoints, counted_bytes
from ..core.unet.gradient_memory import estimate
from ..core.unet.gradients import gradients
from ..core.unet.layers import LayerTable, address_of, layer_table, map_layers
from ..core.unet.taken_attention import Source
from . import _report
from .feature_blend import SD15, SDXL, clock, fill

TARGET = 0.50
SAME = 5e-4
"""Largest difference of the two ways' latents, over the largest value."""
WORD = 5
"""Place of the word that the edit has and the source has not."""
CFG, ITERATIONS, BLEND_FROM = 7.5, 15, 0.7
FIRST_MOVE = 0.001
"""How far the first iteration moves the latent, of its largest value; the scale (paper: 2.5) is chosen so, for random
weights."""


@dataclass(frozen=True)
class Subject:
    """A model, a recorded source, and an edit of one word of its prompt. until: fraction of the steps guided; scale: of
    the guidance.
    """

    model: Any
    trajectory: Trajectory
    source: torch.Tensor
    edit: torch.Tensor
    negative: torch.Tensor
    control: PromptControl
    mask: torch.Tensor
    until: float = 0.5
    scale: float = 1.0

    @property
    def guided_steps(self) -> int:
        return round(self.until * self.trajectory.steps)


def subject(width: int, side: int, steps: int) -> Subject:
    """SD1.5's layers with so many channels; a source of so many steps on a latent of side × side."""
    device = comfy.model_management.get_torch_device()
    heads = {"num_heads": heads_of(width), "num_head_channels": -1}
    family = type("SD15", (comfy.supported_models.SD15,), {"unet_extra_config": heads})
    config = family(SD15 | {"model_channels": width})
    config.set_inference_dtype(torch.float32, None)
    base = config.get_model({}, "", device=device)
    fill(base.diffusion_model)
    for name, weight in base.diffusion_model.named_parameters():  # so that a latent that moves moves the maps
        if weight.ndim > 1:
            sharp, added = ("attn2.to_q", "attn2.to_k"), ("to_out", "ff.net.2", "proj_out", "out_layers", "out.2")
            weight.detach().mul_(4 if any(s in name for s in sharp) else 0.8 if any(a in name for a in added) else 2)
    model = comfy.model_patcher.ModelPatcher(base, device, device)
    words = [torch.randn(1, 77, SD15["context_dim"], generator=torch.Generator().manual_seed(i)) for i in range(3)]
    source, edit, negative = words[0], words[0].clone(), words[2]
    edit[:, WORD] = words[1][:, WORD]
    mapped = torch.ones(77)
    mapped[WORD] = 0
    control = PromptControl(torch.diag(mapped), mapped, torch.full((77,), 0.8), torch.ones(77), 0.5)
    mask = torch.zeros(1, 8 * side, 8 * side)
    mask[:, 2 * side : 6 * side, 2 * side : 5 * side] = 1
    _, trajectory = inverting.record(
        model, 1, steps, CFG, "euler", "normal", [[source, {}]], [[negative, {}]],
        {"samples": torch.zeros(1, 4, side, side)}, 1.0,
    )  # fmt: skip
    made = Subject(model, trajectory, source, edit, negative, control, mask)
    comfy.model_management.load_models_gpu([model])
    start, sigma = trajectory.start.to(device), float(trajectory.sigmas[0])
    with gradients():
        slope = Algorithm1(made).gradient(start, start, sigma, 0)
    return replace(made, scale=float(FIRST_MOVE * start.abs().max() / slope.abs().max() / sigma / (1 + sigma**2)))


def heads_of(width: int) -> int:
    """As many as make heads about as wide as SD1.5's, which has 8 on 320 channels."""
    return max(1, round(8 * width / 320))


# ---------------------------------------------------------------- two ways


def ours(subject: Subject) -> torch.Tensor:
    """MAG Guidance on ComfyUI's sampler."""
    region = mag.Region(
        (Push((WORD,)),), subject.mask, TOKEN_RATIO, ITERATIONS, subject.until, subject.scale, 3.0, log=RunLog("bench")
    )
    source = Source(subject.trajectory, [[subject.source, {}]], subject.control)
    model = mag.guide(subject.model, mag.GuidanceSpec((region,), source))
    start = subject.model.get_model_object("latent_format").process_out(subject.trajectory.start)
    made = comfy.sample.sample_custom(
        model, torch.zeros_like(start), CFG, comfy.samplers.sampler_object("euler"), subject.trajectory.sigmas,
        [[subject.edit, {}]], [[subject.negative, {}]], start, disable_pbar=True,
    )  # fmt: skip
    return subject.model.get_model_object("latent_format").process_in(made)


def authors(subject: Subject) -> torch.Tensor:
    """Algorithm 1, as their program runs it."""
    run, sigmas = Algorithm1(subject), subject.trajectory.sigmas
    comfy.model_management.load_models_gpu([subject.model])
    device = subject.model.load_device
    with gradients():
        mask = F.interpolate(subject.mask[:, None].to(device), subject.trajectory.size, mode="nearest")
        wide = F.max_pool2d(mask, 3, 1, 1)
        source, edit = (subject.trajectory.start.clone().to(device) for _ in range(2))
        for step, (sigma, following) in enumerate(pairwise(sigmas.tolist())):
            for _ in range(ITERATIONS if step < subject.guided_steps else 0):
                edit = edit - subject.scale * sigma * (1 + sigma**2) * run.gradient(source, edit, sigma, step) * mask
            source, edit = run.cfg_step(source, edit, sigma, following, step)
            if step + 1 > round(BLEND_FROM * subject.trajectory.steps):
                edit = edit * wide + source * (1 - wide)
    return edit.cpu()


class Algorithm1:
    """Their attention controller, and what they compute with it."""

    def __init__(self, subject: Subject) -> None:
        self.subject = subject
        self.table: LayerTable = layer_table(subject.model)
        self.maps_of = map_layers(self.table)
        self.stored: dict[Any, torch.Tensor] = {}
        self.maps: list[torch.Tensor] = []

    def gradient(self, source: torch.Tensor, edit: torch.Tensor, sigma: float, step: int) -> torch.Tensor:
        """Of the constraint (equation 1) by the edit's latent."""
        edit = edit.detach().requires_grad_()
        with torch.no_grad():
            self.predict(source, sigma, [self.subject.source], self.keep, step)
        self.predict(edit, sigma, [self.subject.edit], self.inject, step)
        losses = []
        for attention_map in self.maps:
            side = (attention_map.shape[2]) ** 0.5
            inside = F.interpolate(self.subject.mask[:, None], (int(side), int(side)), mode="nearest").flatten()
            share = attention_map[..., WORD] / attention_map.sum(-1)
            losses.append((1 - (share * inside.to(share)).sum(-1) / inside.sum()).square().mean())
        return torch.autograd.grad(torch.stack(losses).mean(), edit)[0]

    @torch.no_grad()
    def cfg_step(
        self, source: torch.Tensor, edit: torch.Tensor, sigma: float, following: float, step: int
    ) -> tuple[torch.Tensor, torch.Tensor]:
        """Both latents after a step of the sampler."""
        moved = []
        for x, words, patch in ((source, self.subject.source, self.keep), (edit, self.subject.edit, self.inject)):
            without, with_words = self.predict(x, sigma, [self.subject.negative, words], patch, step).chunk(2)
            denoised = without + CFG * (with_words - without)
            moved.append(x + (x - denoised) / sigma * (following - sigma))
        return moved[0], moved[1]

    def predict(
        self, x: torch.Tensor, sigma: float, contexts: list[torch.Tensor], patch: Callable[..., torch.Tensor], step: int
    ) -> torch.Tensor:
        """x₀ for each of the contexts; the prompt's is the last."""
        options: dict[str, Any] = {}
        for name in ("attn1", "attn2"):
            replace_attention(options, name, self.table, partial(patch, name, step))
        rows = x.expand(len(contexts), -1, -1, -1)
        words = torch.cat(contexts).to(x)
        self.maps = []
        made: torch.Tensor = self.subject.model.model.apply_model(
            rows, x.new_full((len(rows),), sigma), c_crossattn=words, transformer_options=options
        )
        return made

    def exchanged(self, name: str, step: int, options: dict[str, Any]) -> bool:
        """Whether a layer's probabilities are the source's, or (in the maps' layers) looked at."""
        control, steps = self.subject.control, self.subject.trajectory.steps
        if name == "attn2":
            return bool(control.taken_and_own(step, steps)[0].any()) or address_of(options) in self.maps_of
        side = self.table.native / self.table[address_of(options)].downsample
        return control.replaces_self_attention(step, steps, side)

    def keep(self, name: str, step: int, _: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
             options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
        """The reconstruction's attention; its probabilities are stored where the edit takes them."""
        if not self.exchanged(name, step, options):
            return attention(q, k, v, options)
        own = probabilities(q, k, options["n_heads"])
        self.stored[name, address_of(options)] = own[-1:]
        return _attended(own, v, options)

    def inject(self, name: str, step: int, _: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
               options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
        """The edit's: the last row takes the stored probabilities."""
        if not self.exchanged(name, step, options):
            return attention(q, k, v, options)
        source = self.stored[name, address_of(options)]
        own = probabilities(q, k, options["n_heads"])
        if name == "attn1":
            own = torch.cat([own[:-1], source])
        else:
            taken, share = (t.to(q) for t in self.subject.control.taken_and_own(step, self.subject.trajectory.steps))
            own = torch.cat([own[:-1], source @ (self.subject.control.mapping.to(q) * taken) + own[-1:] * share])
            if address_of(options) in self.maps_of:
                self.maps.append(own[-1:])
        return _attended(own, v, options)


def _attended(weights: torch.Tensor, v: torch.Tensor, options: dict[str, Any]) -> torch.Tensor:
    values = v.unflatten(-1, (options["n_heads"], -1)).transpose(1, 2)
    return (weights @ values).transpose(1, 2).flatten(2)


# ---------------------------------------------------------------- measurements


@dataclass
class Counted:
    """Calls of a UNet, their rows, and the transformer blocks' calls times their rows."""

    calls: int = 0
    rows: int = 0
    block_rows: int = 0


def counted(run: Callable[[Subject], torch.Tensor], subject: Subject) -> tuple[torch.Tensor, Counted]:
    """The result of a run, and what it asked of the UNet."""
    found, unet = Counted(), subject.model.model.diffusion_model

    def call(_: Any, args: tuple[Any, ...]) -> None:
        found.calls += 1
        found.rows += len(args[0])

    def block(_: Any, args: tuple[Any, ...]) -> None:
        found.block_rows += len(args[0])

    handles = [unet.register_forward_pre_hook(call)]
    handles += [layer.block.register_forward_pre_hook(block) for layer in layer_table(subject.model).layers.values()]
    try:
        return run(subject), found
    finally:
        for handle in handles:
            handle.remove()


WAYS = (ours, authors)


@dataclass(frozen=True)
class Found:
    """seconds: [rounds, 2 ways, guided or not at all]; asked: of the UNet by each way's guided run; apart: how far the
    ways' latents are from each other, moved: how far the guidance has moved them, both over the largest value.
    """

    seconds: np.ndarray
    asked: list[Counted]
    apart: float
    moved: float


def alternate(subject: Subject, rounds: int) -> Found:
    """Run both ways in turns; who goes first changes every round. AssertionError if their latents are not the same."""
    seconds = np.zeros((rounds, 2, 2))
    made: dict[tuple[int, int], torch.Tensor] = {}
    asked = [Counted(), Counted()]
    for number in range(rounds):
        for place in (0, 1) if number % 2 else (1, 0):
            for kind, until in enumerate((subject.until, 0.0)):
                began = clock()
                latent, calls = counted(WAYS[place], replace(subject, until=until))
                seconds[number, place, kind] = clock() - began
                print(f"  {WAYS[place].__name__}, until {until}: {seconds[number, place, kind]:.1f} s", flush=True)
                made[place, kind] = latent
                if kind == 0:
                    asked[place] = calls
    largest = float(made[1, 0].abs().max())
    apart = max(float((made[0, kind] - made[1, kind]).abs().max()) for kind in (0, 1)) / largest
    moved = float((made[0, 0] - made[0, 1]).abs().max()) / largest
    assert apart < SAME, f"the two ways' latents are {apart:.1e} apart"
    assert moved > 10 * SAME, f"the guidance moves the latents by {moved:.1e} only: nothing is compared"
    return Found(seconds, asked, apart, moved)


def speed(subject: Subject, width: int, rounds: int) -> tuple[str, Any]:
    """The first table and its numbers."""
    found = alternate(subject, rounds)
    seconds, asked = found.seconds, found.asked
    steps, guided = subject.trajectory.steps, subject.guided_steps
    whole, idle = seconds[..., 0], seconds[..., 1]
    per_idle = idle / steps
    per_guided = (whole - idle) / guided + per_idle
    ratios = whole[:, 0] / whole[:, 1]
    blocks = len(layer_table(subject.model))
    rows = [
        ["UNet calls of the run", *(str(a.calls) for a in asked), f"{asked[0].calls / asked[1].calls:.2f}"],
        ["UNet rows of the run", *(str(a.rows) for a in asked), f"{asked[0].rows / asked[1].rows:.2f}"],
        ["of them as whole passes (transformer blocks run / all)", *(f"{a.block_rows / blocks:.1f}" for a in asked),
         f"{asked[0].block_rows / asked[1].block_rows:.2f}"],
    ]  # fmt: skip
    for name, values in (("s a guided step", per_guided), ("s an unguided step", per_idle), ("s the run", whole)):
        middle = np.median(values, 0)
        rows.append([name, *(f"{value:.2f}" for value in middle), f"{np.median(values[:, 0] / values[:, 1]):.3f}"])
    met = "met" if np.median(ratios) <= TARGET else "missed"
    text = _report.table(("", "MAG Guidance", "Algorithm 1 as theirs", "ratio"), rows)
    height, across = subject.trajectory.size
    text += (
        f"\n\nWanted, a ratio of at most {TARGET:.2f}: {met} ({ratios.min():.3f} … {ratios.max():.3f}, "
        f"rounds: {rounds}). SD1.5's layers, {width} channels and {heads_of(width)} heads (really 320 and 8), "
        f"latent {height} × {across}, {steps} steps, {guided} of them guided with {ITERATIONS} iterations, "
        f"Prompt-to-Prompt (cross 0.8, self 0.5), guidance {CFG}. The latents of the two ways differ by "
        f"{found.apart:.1e} of the largest value "
        f"({SAME:.0e} allowed); the guidance moves them by {found.moved:.2g}. A call that leaves the UNet early counts "
        "as a call with all its rows in the first two lines."
    )
    return text, {
        "seconds": seconds.tolist(),
        "asked": [vars(a) for a in asked],
        "apart": found.apart,
        "moved": found.moved,
    }


# ---------------------------------------------------------------- memory


class Enough(Exception):
    """The last map is there."""


class _Fused(torch.autograd.Function):
    """What a fused attention keeps: its inputs and output, and a number for each place and head."""

    @staticmethod
    def forward(context: Any, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int) -> torch.Tensor:
        out = torch.empty_like(q)
        context.save_for_backward(q, k, v, out, q.new_empty(len(q), heads, q.shape[1], dtype=torch.float32))
        return out

    @staticmethod
    def backward(context: Any, *_: torch.Tensor) -> Any:
        q, k, v, *_ = context.saved_tensors
        return torch.empty_like(q), torch.empty_like(k), torch.empty_like(v), None


def _fused(_: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
           options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
    made: torch.Tensor = _Fused.apply(q, k, v, options["n_heads"])
    return made


@dataclass(frozen=True)
class Kept:
    """Bytes of a gradient from the map layers. most: at one time, by autograd; maps: of all; weights: stored."""

    most: int
    maps: int
    weights: int
    estimated: int


def kept_bytes(
    family: Any, settings: dict[str, Any], side: int, dtype: torch.dtype, cast: torch.dtype | None, checkpointed: bool
) -> Kept:
    """One iteration's pass to the last map and back, one row, on the meta device."""
    config = family(dict(settings))
    config.set_inference_dtype(dtype, cast)
    base = config.get_model({}, "", device=torch.device("meta"))
    unet, cpu = base.diffusion_model, torch.device("cpu")
    table = layer_table(comfy.model_patcher.ModelPatcher(base, cpu, cpu))
    where = map_layers(table)
    last = [address for address in table.layers if address in where][-1]
    computed = cast or dtype
    maps: list[torch.Tensor] = []
    with (
        gradients(),
        counted_bytes(unet.parameters()) as count,
        checkpoints(unet, count) if checkpointed else nullcontext() as state,
    ):

        def cross_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                            options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            if address_of(options) not in where:
                return _fused(inner, q, k, v, options)
            found = probabilities(q, k, options["n_heads"]) * q.new_ones(77, dtype=torch.float32)
            if state is None or not state.recomputing:
                maps.append(found)
            if address_of(options) == last:
                raise Enough
            return _attended(found.to(v), v, options)

        options: dict[str, Any] = {}
        replace_attention(options, "attn1", table, _fused)
        replace_attention(options, "attn2", table, cross_attention)
        x = torch.empty(1, 4, side, side, device="meta", dtype=computed, requires_grad=True)
        pooled = settings["adm_in_channels"]
        y = torch.empty(1, pooled, device="meta", dtype=computed) if pooled else None
        words = torch.empty(1, 77, settings["context_dim"], device="meta", dtype=computed)
        with suppress(Enough):
            unet(x, torch.empty(1, device="meta"), words, y=y, transformer_options=options)
        torch.autograd.grad(torch.stack([found.float().mean() for found in maps]).sum(), x)
    weights = sum(parameter.nbytes for parameter in unet.parameters())
    estimated = estimate(unet, 1, (side, side), computed.itemsize, last, checkpointed, where)
    return Kept(count.bytes, sum(found.nbytes for found in maps), weights, estimated)


def memory() -> tuple[str, Any]:
    """The second table and its numbers."""
    rows, numbers = [], {}
    fused = comfy.ldm.modules.attention.attention_pytorch
    original, comfy.ldm.modules.attention.optimized_attention = (
        comfy.ldm.modules.attention.optimized_attention, fused,
    )  # fmt: skip
    try:
        for name, family, settings, side in (
            ("SD1.5 at 512²", comfy.supported_models.SD15, SD15, 64),
            ("SDXL at 1024²", comfy.supported_models.SDXL, SDXL, 128),
        ):
            for how, dtype, cast in (
                ("float16", torch.float16, None),
                ("float16 weights, float32 arithmetic", torch.float16, torch.float32),
            ):
                for checkpointed in (False, True):
                    kept = kept_bytes(family, settings, side, dtype, cast, checkpointed)
                    label = f"{name}, {how}{', checkpoints' if checkpointed else ''}"
                    held = kept.most + 2 * kept.maps
                    cells = (kept.most, 2 * kept.maps, kept.weights, held + kept.weights, kept.estimated)
                    rows.append([label, *(f"{cell / 1e9:.2f}" for cell in cells)])
                    numbers[label] = vars(kept)
    finally:
        comfy.ldm.modules.attention.optimized_attention = original
    head = ("one row, GB", "autograd keeps at most", "maps and their gradients", "weights", "together",
            "`estimate` (without weights)")  # fmt: skip
    return _report.table(head, rows), numbers


def main(argv: Sequence[str] | None = None) -> None:
    """Measure and print."""
    parser = argparse.ArgumentParser(prog="python dev.py bench mag_speed", description=__doc__)
    _report.add_arguments(parser, "mag_speed")
    parser.add_argument("--width", type=int, default=64, help="channels of the first level (a multiple of 32)")
    parser.add_argument("--latent", type=int, default=64, help="side of the latent")
    parser.add_argument("--steps", type=int, default=4, help="half of them are guided")
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--only-memory", action="store_true", help="skip the first table")
    arguments = parser.parse_args(argv)
    comfy.utils.set_progress_bar_enabled(False)
    comfy.ldm.modules.attention.optimized_attention = comfy.ldm.modules.attention.attention_pytorch
    began, texts, numbers = time.time(), [], {}
    if not arguments.only_memory:
        asked = subject(arguments.width, arguments.latent, arguments.steps)
        text, numbers["speed"] = speed(asked, arguments.width, arguments.rounds)
        texts.append(text)
    text, numbers["memory"] = memory()
    texts += [text, f"{_report.where_it_ran()}. {time.time() - began:.0f} s."]
    _report.publish(arguments, "\n\n".join(texts), numbers)


if __name__ == "__main__":
    main()
