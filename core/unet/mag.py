"""MAG-Edit on a running UNet: before each step the sampler's latent is moved until the edit's words rule inside a mask.

One OUTER_SAMPLE wrapper. The source, if there is one, is shown to the UNet once per evaluation; its queries and keys
serve Prompt-to-Prompt in the sampler's own evaluations and in all inner iterations of a step. An inner iteration leaves
the UNet after the last layer whose map the constraint reads, and the gradient goes back from there.
"""

from __future__ import annotations

from collections.abc import Callable
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..charts import loss_curve
from ..mag import Push, constraint, normalised
from ..null_text import scaled_gradient
from ..run_log import RunLog
from ..trajectory import same_level
from .attention import Replacement, check_places, replace_attention
from .capture import spatial_size
from .checkpointing import Checkpoints, checkpoints, counted_bytes
from .evaluation import Evaluation, applies, latent_area
from .gradient_memory import estimate, reserve
from .gradients import gradients, ordinary
from .guided_sampler import guided_sampler
from .inputs import check_aspect
from .layers import LayerTable, address_of, layer_table, map_layers
from .partly import CROSS, SELF, Enough, call_partly
from .replay import check_latent_size
from .taken_attention import Source, Taken, TakenAttention

KEY = "scalpel.mag"
BLEND_FROM = 0.7
"""From this fraction of the steps on what lies outside the mask is the source's again, as in the authors' code."""
LARGEST_SIGMA = 14.7
"""SD's and SDXL's; models of zero terminal SNR begin at 4500, by which no latent should be moved."""


@dataclass(frozen=True)
class Region:
    """What one MAG Guidance asks for. pushes: the words; mask: [1 or rows, H, W], binary; kind: of the constraint;
    until: fraction of the steps, each of which moves the latent `iterations` times: by scale · σ · (1 + σ²) · gradient,
    or, if `even`, by the gradient of root mean square scale · σ in the mask. edit_text: where the words are from; log:
    gets the constraint's values; tell: shows a text while the run goes on.
    """

    pushes: tuple[Push, ...]
    mask: torch.Tensor
    kind: str
    iterations: int
    until: float
    scale: float
    outside_weight: float
    even: bool = False
    edit_text: str = ""
    log: RunLog = field(default_factory=lambda: RunLog("MAG Guidance"), compare=False)
    tell: Callable[[str], None] = field(default=lambda _: None, compare=False)

    def asks(self, step: int, steps: int, iteration: int) -> bool:
        """Whether it moves the latent in this iteration of this step."""
        return step < round(self.until * steps) and iteration < self.iterations

    def move(self, gradient: torch.Tensor, inside: torch.Tensor, sigma: float) -> torch.Tensor:
        """How the latent [rows, C, h, w] follows a gradient that `scale` is in."""
        if self.even:
            return self.scale * sigma * normalised(gradient, inside)
        return sigma * (1 + sigma**2) * gradient


@dataclass(frozen=True)
class GuidanceSpec:
    """Regions whose words are pushed together, and the source of all. checkpointing: the gradient takes less memory,
    and the UNet's blocks run twice.
    """

    regions: tuple[Region, ...]
    source: Source | None = None
    checkpointing: bool = False


class MAGGuidance:
    """OUTER_SAMPLE wrapper: makes one run's state and lets the sampler run on a guided model."""

    def __init__(self, spec: GuidanceSpec) -> None:
        self.spec = spec

    def __call__(self, executor: Any, noise: torch.Tensor, latent: torch.Tensor, sampler: Any, sigmas: torch.Tensor,
                 *args: Any, **kwargs: Any) -> Any:  # fmt: skip
        run = GuidedRun(self.spec, executor.class_obj, sigmas, (len(noise), *noise.shape[-2:]))
        result = executor(noise, latent, guided_sampler(sampler, run.before, run.after), sigmas, *args, **kwargs)
        run.finish()
        return result


def spec_of(model: Any) -> GuidanceSpec | None:
    """What the MAG Guidances on a MODEL ask for."""
    installed = model.wrappers.get(WrappersMP.OUTER_SAMPLE, {}).get(KEY)
    return installed[0].spec if installed else None


def guide(model: Any, spec: GuidanceSpec) -> Any:
    """A clone of the MODEL that is guided so, and no longer as it was before."""
    patched = model.clone()
    patched.remove_wrappers_with_key(WrappersMP.OUTER_SAMPLE, KEY)
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, MAGGuidance(spec))
    return patched


class GuidedRun:
    """State of one sampling run. values: of each region's constraint, by step, before each of its inner iterations."""

    def __init__(self, spec: GuidanceSpec, guider: Any, sigmas: torch.Tensor, shape: tuple[int, int, int]) -> None:
        """shape: (rows, h, w) of the latent."""
        rows, latent = shape[0], shape[1:]
        if spec.source is not None:
            check_latent_size(spec.source.trajectory, latent)
            spec.source.trajectory.image_of(rows)
            for sigma in sigmas.tolist():
                spec.source.trajectory.at(sigma)
        self.spec = spec
        self.guider = guider
        self.table: LayerTable = layer_table(guider.model_patcher)
        self.map_layers = map_layers(self.table)
        self.last_map_layer = [address for address in self.table.layers if address in self.map_layers][-1]
        self.evaluation = Evaluation(guider, sigmas, KEY)
        self.taken = TakenAttention(spec.source, guider, self.table, self.evaluation.steps, KEY)
        self.values: list[dict[int, list[float]]] = [{} for _ in spec.regions]
        self.masks = [_of_rows(region.mask, rows, latent) for region in spec.regions]  # [rows, H, W] each
        small = [F.interpolate(mask[:, None], latent, mode="nearest") for mask in self.masks]
        self.mask = torch.stack(small).amax(0)  # [rows, 1, h, w], of all regions
        self.small_masks = small
        self.most = max(region.iterations for region in spec.regions)
        self.bar = comfy.utils.ProgressBar(self.evaluation.steps * (self.most + 1))
        self._done = -1
        self._kept_bytes = 0  # by autograd, in the first gradient
        self._insides: dict[tuple[int, tuple[int, int]], torch.Tensor] = {}
        options = guider.model_options.setdefault("transformer_options", {})
        self.evaluation.install(options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self._install, options)
        if any(region.asks(0, self.evaluation.steps, 0) for region in spec.regions):
            reserve(options, f"{KEY}.memory", self._gradient_bytes)

    def _gradient_bytes(self, shape: tuple[int, ...]) -> int:
        """What a gradient will keep, for a latent of this shape."""
        model = self.guider.model_patcher.model
        itemsize = (model.manual_cast_dtype or model.get_dtype()).itemsize
        return estimate(
            model.diffusion_model, shape[0], (shape[-2], shape[-1]), itemsize, self.last_map_layer,
            self.spec.checkpointing, self.map_layers,
        )  # fmt: skip

    # ------------------------------------------------------------------ the sampler's own evaluations

    def _install(
        self, executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any
    ) -> Any:
        """CALC_COND_BATCH: Prompt-to-Prompt on the rows of the positive prompt."""
        now = self.evaluation
        taken = self.taken.at(now.sigma, now.step, model_options)
        if not taken.features:
            return executor(model, conds, x, timestep, model_options)
        options = dict(model_options.get("transformer_options", {}))
        for name, function in taken.replacements(self._positive_rows).items():
            replace_attention(options, name, self.table, function)
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": options})

    def _positive_rows(self, count: int, options: dict[str, Any]) -> list[slice]:
        now = self.evaluation
        return [rows for key, rows in now.chunks(count, options) if key in now.positive and now.areas[key] is None]

    # ------------------------------------------------------------------ the inner iterations

    def before(self, x: torch.Tensor, sigma: float, arguments: dict[str, Any]) -> None:
        """Before an evaluation of the sampler's: at the start of a step, move its latent."""
        sigmas = self.evaluation.sigmas
        step = next((i for i, level in enumerate(sigmas[:-1]) if same_level(level, sigma)), None)
        if step is None or step <= self._done:  # between two steps, or the same once more
            return
        self._done = step
        x.copy_(self.blended(x, step))
        self._guide(x, sigma, step, arguments)

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """What becomes of the sampler's result."""
        return self.blended(x, self.evaluation.steps)

    def blended(self, x: torch.Tensor, done: int) -> torch.Tensor:
        """x after `done` steps: late in the run it is the source's outside the masks, widened by one latent cell."""
        source, now = self.spec.source, self.evaluation
        if source is None or done <= round(BLEND_FROM * now.steps):
            return x
        wide = F.max_pool2d(self.mask, 3, 1, 1).to(x)
        own = source.trajectory.at(now.sigmas[done])[source.trajectory.image_of(len(x))].to(x)
        return torch.lerp(own, x, wide)

    def _guide(self, x: torch.Tensor, sigma: float, step: int, arguments: dict[str, Any]) -> None:
        """Move x, all regions that still ask for it at once."""
        steps, model_options = self.evaluation.steps, arguments["model_options"]
        if not self._asking(step, 0):
            return
        taken = self.taken.at(sigma, step, model_options)
        allowed = arguments.get("denoise_mask")
        conds = self._whole_prompt(x, sigma)
        with gradients():
            z = ordinary(x).clone()
            for iteration in range(self.most):
                comfy.model_management.throw_exception_if_processing_interrupted()
                asking = self._asking(step, iteration)
                if not asking:
                    break
                gradient = self._gradient(z, sigma, step, asking, taken, conds, model_options)
                move = self._move(gradient, min(sigma, LARGEST_SIGMA), asking)
                z = z - (move if allowed is None else move * ordinary(allowed))
                self.bar.update_absolute(step * (self.most + 1) + iteration + 1, steps * (self.most + 1))
        x.copy_(z)

    def _move(self, gradient: torch.Tensor, sigma: float, asking: list[int]) -> torch.Tensor:
        """Each region moves what lies in its mask."""
        move = torch.zeros_like(gradient)
        for i in asking:
            inside = self.small_masks[i].to(gradient)
            move = torch.where(inside > 0, self.spec.regions[i].move(gradient, inside, sigma), move)
        return move

    def _asking(self, step: int, iteration: int) -> list[int]:
        """The regions that move the latent in this iteration."""
        steps = self.evaluation.steps
        return [i for i, region in enumerate(self.spec.regions) if region.asks(step, steps, iteration)]

    def _whole_prompt(self, x: torch.Tensor, sigma: float) -> list[dict[str, Any]]:
        """The entry of the positive prompt that tells the whole picture now."""
        for entry in self.guider.conds["positive"]:
            if latent_area(entry.get("area"), x) is None and applies(entry, sigma):
                return [entry]
        raise ValueError(
            f"positive: at noise level {sigma:.3g} no prompt holds for the whole picture; MAG Guidance needs one there"
        )

    def _gradient(
        self, z: torch.Tensor, sigma: float, step: int, asking: list[int], taken: Taken, conds: list[dict[str, Any]],
        model_options: dict[str, Any],
    ) -> torch.Tensor:  # fmt: skip
        """Gradient by the latent of the sum of scale · constraint of the regions that ask for it."""
        z = z.detach().requires_grad_()
        with ExitStack() as memory:
            unet = self.guider.model_patcher.get_model_object("diffusion_model")
            first = not self._kept_bytes
            count = memory.enter_context(counted_bytes(unet.parameters())) if first else None
            passes = memory.enter_context(checkpoints(unet, count)) if self.spec.checkpointing else Checkpoints()
            total = self._objective(z, sigma, step, asking, taken, conds, model_options, passes)
            gradient = scaled_gradient(total, z, 2.0**12)
            if count is not None:
                self._kept_bytes = count.bytes
        if not torch.isfinite(gradient).all():
            raise ValueError(
                "model: the gradient through it is not finite; start ComfyUI with --force-fp32, or --bf16-unet"
            )
        return gradient

    def _objective(
        self, z: torch.Tensor, sigma: float, step: int, asking: list[int], taken: Taken, conds: list[dict[str, Any]],
        model_options: dict[str, Any], passes: Checkpoints,
    ) -> torch.Tensor:  # fmt: skip
        """The sum of scale · constraint of the regions that ask for it."""
        maps, own, sizes = self.maps(z, sigma, taken, conds, model_options, passes)
        total = z.new_zeros(())
        for i in asking:
            region = self.spec.regions[i]
            insides = [self._inside(i, size, z.device) for size in sizes]
            places = [place for push in region.pushes for place in push.tokens]
            if max(places) >= maps[0].shape[-1]:
                raise ValueError(
                    f"edit_text: it has a word at place {max(places)}, but the sampler's positive prompt has "
                    f"{maps[0].shape[-1]} places; give MAG Guidance the text of that prompt"
                )
            # the latent has no say in attention that is the source's
            measured = [own if taken.replaces(push.tokens) else maps for push in region.pushes]
            value = constraint(region.kind, region.pushes, measured, insides, region.outside_weight)
            self.values[i].setdefault(step, []).append(float(value.detach().mean()))
            self._tell(i, step)
            total = total + region.scale * value.sum()
        return total

    def _tell(self, region: int, step: int) -> None:
        """Show how far a region is."""
        asked, values = self.spec.regions[region], self.values[region][step]
        asked.tell(
            f"step {step + 1} of {self.evaluation.steps}, iteration {len(values)} of {asked.iterations}\n"
            f"{asked.kind}: {values[0]:.4f} → {values[-1]:.4f}"
        )

    def maps(
        self, z: torch.Tensor, sigma: float, taken: Taken, conds: list[dict[str, Any]], model_options: dict[str, Any],
        passes: Checkpoints,
    ) -> tuple[list[torch.Tensor], list[torch.Tensor], list[tuple[int, int]]]:  # fmt: skip
        """The positive prompt's cross-attention in the map layers, [rows, heads, places, tokens]: with what is taken in
        it, and its own; and the layers' (h, w); in execution order.
        """
        maps: list[torch.Tensor] = []
        unmixed: list[torch.Tensor] = []
        sizes: list[tuple[int, int]] = []
        replaced = taken.replacements(lambda count, _: [slice(0, count)])

        def cross_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                            options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            address = address_of(options)
            if address not in self.map_layers:
                return replaced[CROSS](inner, q, k, v, options)
            check_places(options, q)
            heads = options["n_heads"]
            attended, own = taken.probabilities(address, q, k, heads)
            if not passes.recomputing:
                maps.append(attended)
                unmixed.append(own)
                sizes.append(spatial_size(options))
            if address == self.last_map_layer:
                raise Enough
            if inner is not None:  # another node adds to the output (IPAdapter)
                return replaced[CROSS](inner, q, k, v, options)
            values = v[:, : attended.shape[-1]].unflatten(-1, (heads, -1)).transpose(1, 2)
            return (attended.to(v) @ values).transpose(1, 2).flatten(2)

        def self_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                           options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            out = replaced[SELF](inner, q, k, v, options)
            if v.requires_grad and not out.requires_grad:
                raise ValueError(
                    "model: its attention has no backward pass (sage attention has none); start ComfyUI with another "
                    "(--use-pytorch-cross-attention)"
                )
            return out

        if any(entry.get("control") is not None for entry in conds):
            model_options = _with_skips_of_their_own(model_options)
        patches = {SELF: self_attention, CROSS: cross_attention}
        call_partly(self.guider.inner_model, conds, z, sigma, model_options, self.table, patches)
        return maps, unmixed, sizes

    def _inside(self, region: int, size: tuple[int, int], device: torch.device) -> torch.Tensor:
        """A region's mask at a layer's (h, w): [rows, h·w]. ValueError if nothing is left of it."""
        if (region, size) not in self._insides:
            mask = self.masks[region]
            small = F.interpolate(mask[:, None], size, mode="nearest").flatten(1)
            if not small.any(1).all():
                h, w = size
                least = -(-mask.shape[-1] // w), -(-mask.shape[-2] // h)
                raise ValueError(
                    f"mask: nothing is left of it at {w} × {h}, where the constraint is measured; a square of "
                    f"{least[0]} × {least[1]} of its pixels is the smallest that always works"
                )
            self._insides[region, size] = small.to(device)
        return self._insides[region, size]

    def finish(self) -> None:
        """Fill the logs with the constraints' values."""
        self.evaluation.finish()
        for region, values, mask in zip(self.spec.regions, self.values, self.small_masks, strict=True):
            log = region.log
            log.lines = [
                f"step {step + 1}: " + " → ".join(f"{value:.4f}" for value in found) for step, found in values.items()
            ]
            if self._kept_bytes:
                how = "with checkpoints" if self.spec.checkpointing else "without checkpoints"
                log.lines.append(f"memory: {self._kept_bytes / 2**20:.0f} MB kept for a gradient, {how}")
            log.masks = mask[:, 0].cpu()[:, None]
            in_a_row = [value for step in sorted(values) for value in values[step]]
            log.pictures = loss_curve(in_a_row, f"{region.kind}, every inner iteration") if in_a_row else None


def _of_rows(mask: torch.Tensor, rows: int, latent: tuple[int, int]) -> torch.Tensor:
    """A mask [1 or rows, H, W] for each row of a latent of (h, w)."""
    check_aspect(mask, (8 * latent[0], 8 * latent[1]), "mask")
    if rows % len(mask):
        raise ValueError(f"mask: {len(mask)} masks for {rows} pictures; give 1, or one for each")
    return mask[[row % len(mask) for row in range(rows)]].float()


def _with_skips_of_their_own(model_options: dict[str, Any]) -> dict[str, Any]:
    """Options with which a ControlNet is not added, in place, to what the backward pass needs of the encoder."""
    options = dict(model_options.get("transformer_options", {}))
    patches, name = dict(options.get("patches", {})), "input_block_patch_after_skip"
    patches[name] = [*patches.get(name, []), lambda h, _: h.clone()]
    return {**model_options, "transformer_options": {**options, "patches": patches}}
