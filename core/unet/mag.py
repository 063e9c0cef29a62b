"""MAG-Edit on a running UNet: before each step the sampler's latent is moved until the edit's words rule inside a mask.

One OUTER_SAMPLE wrapper. The source, if there is one, is shown to the UNet once per evaluation; its queries and keys
serve Prompt-to-Prompt in the sampler's own evaluations and in all inner iterations of a step. An inner iteration leaves
the UNet after the last layer whose map the constraint reads, and the gradient goes back from there.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Any

import comfy.model_management
import comfy.sampler_helpers
import comfy.samplers
import comfy.utils
import torch
import torch.nn.functional as F
from comfy.patcher_extension import WrappersMP, add_wrapper_with_key

from ..charts import loss_curve
from ..heatmap import probabilities
from ..mag import Push, constraint, injected_attention
from ..null_text import scaled_gradient
from ..prompt_to_prompt import PromptControl
from ..run_log import RunLog
from ..trajectory import Conditioning, Trajectory, same_level
from .attention import Replacement, attention, check_places, replace_attention
from .capture import spatial_size
from .evaluation import Evaluation
from .gradients import gradients, ordinary
from .inputs import check_aspect
from .layers import Address, LayerTable, address_of, layer_table
from .replay import check_latent_size, function_of
from .rider import NOT_OF_THE_RECORD

KEY = "scalpel.mag"
MAP_LEVEL = "level:16"
BLEND_FROM = 0.7
"""From this fraction of the steps on what lies outside the mask is the source's again, as in the authors' code."""

SAMPLERS = frozenset({
    "ddpm", "deis", "dpm_2", "dpm_2_ancestral", "dpmpp_2m", "dpmpp_2m_cfg_pp", "dpmpp_2m_sde", "dpmpp_2m_sde_gpu",
    "dpmpp_2s_ancestral", "dpmpp_2s_ancestral_cfg_pp", "dpmpp_3m_sde", "dpmpp_3m_sde_gpu", "dpmpp_sde", "dpmpp_sde_gpu",
    "euler", "euler_ancestral", "euler_ancestral_cfg_pp", "euler_cfg_pp", "gradient_estimation", "ipndm", "ipndm_v",
    "lcm", "lms", "res_multistep", "res_multistep_cfg_pp",
})  # fmt: skip
"""Those that show the model their own latent at the start of each step, and go on with it: moved, it stays moved. (heun
shows it a trial point at the next step's noise level first.)
"""
LARGEST_SIGMA = 14.7
"""SD's and SDXL's; models of zero terminal SNR begin at 4500, by which no latent should be moved."""


@dataclass(frozen=True)
class Source:
    """Prompt-to-Prompt's source: a trajectory, its prompt, and what the edit takes of its attention (None: nothing)."""

    trajectory: Trajectory
    prompt: Conditioning
    control: PromptControl | None


@dataclass(frozen=True)
class GuidanceSpec:
    """pushes: the words; mask: [1 or rows, H, W], binary; kind: of the constraint; until: fraction of the steps; a step
    moves the latent `iterations` times by scale · σ · (1 + σ²) · gradient.
    """

    pushes: tuple[Push, ...]
    mask: torch.Tensor
    kind: str
    iterations: int
    until: float
    scale: float
    outside_weight: float
    source: Source | None
    log: RunLog = field(compare=False)


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


def guided_sampler(sampler: Any, before: Callable[..., None], after: Callable[[torch.Tensor], torch.Tensor]) -> Any:
    """The same SAMPLER, whose every evaluation of the model is preceded by `before(x, sigma, arguments)`, which may
    change x in place, and whose result is what `after` makes of it. ValueError names a sampler that would not notice.
    """
    function = getattr(sampler, "sampler_function", None)
    name = sampler_name(sampler)
    if function is None or name not in SAMPLERS:
        raise ValueError(
            f"sampler: MAG Guidance moves the latent that a sampler goes on with, and {name} works on copies of its "
            f"own; accepted are {', '.join(sorted(SAMPLERS))}"
        )

    def sample(model: Any, x: torch.Tensor, *args: Any, **kwargs: Any) -> torch.Tensor:
        return after(function(_Guided(model, before), x, *args, **kwargs))

    sample.__name__ = function.__name__
    return comfy.samplers.KSAMPLER(sample, dict(sampler.extra_options), dict(sampler.inpaint_options))


def sampler_name(sampler: Any) -> str:
    """What a SAMPLER's function is called, as ComfyUI lists it."""
    return function_of(sampler).removeprefix("sample_") or type(sampler).__name__


class _Guided:
    """A sampler's model that lets its latent be changed before it is evaluated."""

    def __init__(self, model: Any, before: Callable[..., None]) -> None:
        self._model = model
        self._before = before

    def __call__(self, x: torch.Tensor, sigma: torch.Tensor, **kwargs: Any) -> torch.Tensor:
        self._before(x, float(sigma.flatten()[0]), kwargs)
        return self._model(x, sigma, **kwargs)  # type: ignore[no-any-return]

    def __getattr__(self, name: str) -> Any:
        return getattr(self._model, name)


class _Enough(Exception):
    """All maps are there: the rest of the UNet need not run."""


Features = dict[tuple[str, Address], tuple[torch.Tensor, torch.Tensor]]
"""Queries and keys by ("attn1" or "attn2", layer)."""


class GuidedRun:
    """State of one sampling run. values: of the constraint, by step, before each of its inner iterations."""

    def __init__(self, spec: GuidanceSpec, guider: Any, sigmas: torch.Tensor, shape: tuple[int, int, int]) -> None:
        """shape: (rows, h, w) of the latent."""
        rows, latent = shape[0], shape[1:]
        if spec.source is not None:
            check_latent_size(spec.source.trajectory, latent)
            spec.source.trajectory.image_of(rows)
            for sigma in sigmas.tolist():
                spec.source.trajectory.at(sigma)
        check_aspect(spec.mask, (8 * latent[0], 8 * latent[1]), "mask")
        if rows % len(spec.mask):
            raise ValueError(f"mask: {len(spec.mask)} masks for {rows} pictures; give 1, or one for each")
        self.spec = spec
        self.guider = guider
        self.table: LayerTable = layer_table(guider.model_patcher)
        self.map_layers = map_layers(self.table)
        self.evaluation = Evaluation(guider, sigmas, KEY)
        self.values: dict[int, list[float]] = {}
        self.whole_mask = spec.mask[[row % len(spec.mask) for row in range(rows)]].float()  # [rows, H, W]
        self.mask = F.interpolate(self.whole_mask[:, None], latent, mode="nearest")
        self.bar = comfy.utils.ProgressBar(self.evaluation.steps * (spec.iterations + 1))
        self._source_sigma = float("nan")
        self._source: Features = {}
        self._taken_maps: dict[Address, torch.Tensor] = {}
        self._done = -1
        self.insides: dict[tuple[int, int], torch.Tensor] = {}
        options = guider.model_options.setdefault("transformer_options", {})
        self.evaluation.install(options)
        add_wrapper_with_key(WrappersMP.CALC_COND_BATCH, KEY, self._install, options)
        if spec.source is not None:
            guider.conds[KEY] = comfy.sampler_helpers.convert_cond(spec.source.prompt[:1])

    # ------------------------------------------------------------------ what Prompt-to-Prompt takes in a step

    def _control(self, step: int) -> tuple[torch.Tensor, torch.Tensor] | None:
        """(M · diag(taken) [source tokens, tokens], own [tokens]) of a step; None: all attention is the edit's own."""
        source = self.spec.source
        if source is None or source.control is None:
            return None
        taken, own = source.control.taken_and_own(step, self.evaluation.steps)
        return (source.control.mapping * taken, own) if taken.any() or (own != 1).any() else None

    def _takes_self_attention(self, step: int, layer: Address) -> bool:
        source = self.spec.source
        if source is None or source.control is None:
            return False
        side = self.table.native / self.table[layer].downsample
        return source.control.replaces_self_attention(step, self.evaluation.steps, side)

    def _source_at(self, sigma: float, step: int, model_options: dict[str, Any]) -> Features:
        """The source's queries and keys at a noise level; empty if nothing is taken of them. One UNet row an image."""
        takes = self._control(step) is not None or any(self._takes_self_attention(step, a) for a in self.table.layers)
        if not takes:
            self._source, self._taken_maps, self._source_sigma = {}, {}, float("nan")
            return {}
        if sigma != self._source_sigma:
            assert self.spec.source is not None
            x = self.spec.source.trajectory.at(sigma).to(self.guider.model_patcher.load_device)
            self._source, self._taken_maps = {}, {}  # not beside the new ones
            found: Features = {}
            wanted = {"attn1": self._takes_self_attention, "attn2": lambda step, _: self._control(step) is not None}

            def keep(name: str, last: Address | None) -> Callable[..., torch.Tensor]:
                def kept(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                         options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
                    address = address_of(options)
                    if wanted[name](step, address):
                        found[name, address] = (q, k)
                    if address == last:
                        raise _Enough
                    return (inner or attention)(q, k, v, options)

                return kept

            with torch.no_grad():
                patches = {"attn1": keep("attn1", None), "attn2": keep("attn2", list(self.table.layers)[-1])}
                own = self.spec.source.prompt[0][1]
                entry = {k: v for k, v in self.guider.conds[KEY][0].items() if k not in NOT_OF_THE_RECORD or k in own}
                self._run([entry], x, sigma, model_options, patches)
            self._source_sigma, self._source, self._taken_maps = sigma, found, {}
        return self._source

    def _run(
        self, conds: list[dict[str, Any]], x: torch.Tensor, sigma: float, model_options: dict[str, Any],
        patches: dict[str, Callable[..., torch.Tensor]],
    ) -> None:  # fmt: skip
        """One call of the model with these replacements, as far as they let it come."""
        options = dict(model_options.get("transformer_options", {}))
        wrappers = dict(options.get("wrappers", {}))
        wrappers.pop(WrappersMP.CALC_COND_BATCH, None)  # neither our own evaluation nor another node's
        options["wrappers"] = wrappers
        for name, function in patches.items():
            replace_attention(options, name, self.table, function)
        try:
            comfy.samplers.calc_cond_batch(
                self.guider.inner_model, [conds], x, x.new_full((len(x),), sigma),
                {**model_options, "transformer_options": options},
            )  # fmt: skip
        except _Enough:
            return
        raise RuntimeError("MAG Guidance: the model's cross-attention was never called; another node replaces it whole")

    # ------------------------------------------------------------------ the sampler's own evaluations

    def _install(
        self, executor: Any, model: Any, conds: Any, x: torch.Tensor, timestep: torch.Tensor, model_options: Any
    ) -> Any:
        """CALC_COND_BATCH: Prompt-to-Prompt on the rows of the positive prompt."""
        now = self.evaluation
        features = self._source_at(now.sigma, now.step, model_options)
        if not features:
            return executor(model, conds, x, timestep, model_options)
        options = dict(model_options.get("transformer_options", {}))
        for name, function in self._injections(features, now.step, self._positive_rows).items():
            replace_attention(options, name, self.table, function)
        return executor(model, conds, x, timestep, {**model_options, "transformer_options": options})

    def _positive_rows(self, count: int, options: dict[str, Any]) -> list[slice]:
        now = self.evaluation
        return [rows for key, rows in now.chunks(count, options) if key in now.positive and now.areas[key] is None]

    def _injections(
        self, features: Features, step: int, positive: Callable[[int, dict[str, Any]], list[slice]]
    ) -> dict[str, Callable[..., torch.Tensor]]:
        """Replacements that give the positive rows what they take of the source's attention."""
        control = self._control(step)

        def own_rows(name: str, address: Address, rows: slice) -> tuple[torch.Tensor, torch.Tensor]:
            q, k = features[name, address]
            places = [row % len(q) for row in range(rows.stop - rows.start)]
            return q[places], k[places]

        def self_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                           options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            address = address_of(options)
            if self._takes_self_attention(step, address):
                check_places(options, q, k)
                q, k = q.clone(), k.clone()
                for rows in positive(len(q), options):
                    q[rows], k[rows] = own_rows("attn1", address, rows)
            return (inner or attention)(q, k, v, options)

        def cross_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                            options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            if control is None:
                return (inner or attention)(q, k, v, options)
            taken, own = (t.to(v) for t in control)
            sources, tokens = taken.shape
            values, added = v.clone(), {}
            for rows in positive(len(q), options):
                # contexts of different lengths are repeated to a common one: the first copy of the columns is enough
                source_q, source_k = own_rows("attn2", address_of(options), rows)
                added[rows.start] = attention(source_q, source_k[:, :sources], taken @ v[rows, :tokens], options)
                values[rows] = v[rows] * own.repeat(v.shape[1] // tokens)[:, None]
            out = (inner or attention)(q, k, values, options)
            for rows in positive(len(q), options):
                out[rows] = out[rows] + added[rows.start]
            return out

        return {"attn1": self_attention, "attn2": cross_attention}

    # ------------------------------------------------------------------ the inner iterations

    def before(self, x: torch.Tensor, sigma: float, arguments: dict[str, Any]) -> None:
        """Before an evaluation of the sampler's: at the start of a step, move its latent."""
        sigmas = self.evaluation.sigmas
        step = next((i for i, level in enumerate(sigmas[:-1]) if same_level(level, sigma)), None)
        if step is None or step <= self._done:  # between two steps, or the same once more
            return
        self._done = step
        x.copy_(self.blended(x, step))
        if step < round(self.spec.until * self.evaluation.steps):
            self._guide(x, sigma, step, arguments)

    def after(self, x: torch.Tensor) -> torch.Tensor:
        """What becomes of the sampler's result."""
        return self.blended(x, self.evaluation.steps)

    def blended(self, x: torch.Tensor, done: int) -> torch.Tensor:
        """x after `done` steps: late in the run it is the source's outside the mask, widened by one latent cell."""
        source, now = self.spec.source, self.evaluation
        if source is None or done <= round(BLEND_FROM * now.steps):
            return x
        wide = F.max_pool2d(self.mask, 3, 1, 1).to(x)
        own = source.trajectory.at(now.sigmas[done])[source.trajectory.image_of(len(x))].to(x)
        return torch.lerp(own, x, wide)

    def _guide(self, x: torch.Tensor, sigma: float, step: int, arguments: dict[str, Any]) -> None:
        spec, model_options = self.spec, arguments["model_options"]
        features = self._source_at(sigma, step, model_options)
        region = self.mask.to(x)
        if arguments.get("denoise_mask") is not None:
            region = region * arguments["denoise_mask"]
        factor = spec.scale * min(sigma, LARGEST_SIGMA) * (1 + sigma**2)
        conds = self._whole_prompt(sigma)
        with gradients():
            z = ordinary(x).clone()
            for iteration in range(spec.iterations):
                comfy.model_management.throw_exception_if_processing_interrupted()
                value, gradient = self._gradient(z, sigma, step, features, conds, model_options)
                self.values.setdefault(step, []).append(float(value.mean()))
                z = z - factor * gradient * ordinary(region)
                self.bar.update_absolute(step * (spec.iterations + 1) + iteration + 1)
        x.copy_(z)

    def _whole_prompt(self, sigma: float) -> list[dict[str, Any]]:
        """The entry of the positive prompt that tells the whole picture now."""
        for entry in self.guider.conds["positive"]:
            start, end = entry.get("timestep_start", float("inf")), entry.get("timestep_end", -float("inf"))
            if entry.get("area") is None and end <= sigma <= start and "default" not in entry:
                return [entry]
        raise ValueError("positive: every prompt holds for an area only; MAG Guidance needs one for the whole picture")

    def _gradient(
        self, z: torch.Tensor, sigma: float, step: int, features: Features, conds: list[dict[str, Any]],
        model_options: dict[str, Any],
    ) -> tuple[torch.Tensor, torch.Tensor]:  # fmt: skip
        """(constraint [rows], its gradient by the latent)."""
        z = z.detach().requires_grad_()
        maps, sizes = self.maps(z, sigma, step, features, conds, model_options)
        insides = [self._inside(size, z.device) for size in sizes]
        places = [place for push in self.spec.pushes for place in push.tokens]
        if max(places) >= maps[0].shape[-1]:
            raise ValueError(
                f"edit_text: it has a word at place {max(places)}, but the sampler's positive prompt has "
                f"{maps[0].shape[-1]} places; give MAG Guidance the text of that prompt"
            )
        value = constraint(self.spec.kind, maps, insides, self.spec.pushes, self.spec.outside_weight)
        gradient = scaled_gradient(value.sum(), z, 2.0**12)
        if not torch.isfinite(gradient).all():
            raise ValueError(
                "model: the gradient through it is not finite; start ComfyUI with --force-fp32, or --bf16-unet"
            )
        return value.detach(), gradient

    def maps(
        self, z: torch.Tensor, sigma: float, step: int, features: Features, conds: list[dict[str, Any]],
        model_options: dict[str, Any],
    ) -> tuple[list[torch.Tensor], list[tuple[int, int]]]:  # fmt: skip
        """The positive prompt's cross-attention in the map layers, [rows, heads, places, tokens], as injected, and the
        layers' (h, w); in execution order.
        """
        maps: list[torch.Tensor] = []
        sizes: list[tuple[int, int]] = []
        injections = self._injections(features, step, lambda count, _: [slice(0, count)])

        def cross_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                            options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            address = address_of(options)
            if address not in self.map_layers:
                return injections["attn2"](inner, q, k, v, options)
            check_places(options, q)
            heads = options["n_heads"]
            attended = self._injected(address, q, k, heads, step, features)
            maps.append(attended)
            sizes.append(spatial_size(options))
            if len(maps) == len(self.map_layers):
                raise _Enough
            if inner is not None:  # another node adds to the output (IPAdapter)
                return injections["attn2"](inner, q, k, v, options)
            values = v[:, : attended.shape[-1]].unflatten(-1, (heads, -1)).transpose(1, 2)
            return (attended.to(v) @ values).transpose(1, 2).flatten(2)

        def self_attention(inner: Replacement | None, q: torch.Tensor, k: torch.Tensor, v: torch.Tensor,
                           options: dict[str, Any]) -> torch.Tensor:  # fmt: skip
            out = injections["attn1"](inner, q, k, v, options)
            if v.requires_grad and not out.requires_grad:
                raise ValueError(
                    "model: its attention has no backward pass (sage attention has none); start ComfyUI with another "
                    "(--use-pytorch-cross-attention)"
                )
            return out

        self._run(conds, z, sigma, model_options, {"attn1": self_attention, "attn2": cross_attention})
        return maps, sizes

    def _injected(
        self, address: Address, q: torch.Tensor, k: torch.Tensor, heads: int, step: int, features: Features
    ) -> torch.Tensor:
        control = self._control(step)
        own = probabilities(q, k, heads)
        if control is None or not features:
            return own
        taken, share = (t.to(own) for t in control)
        if address not in self._taken_maps:
            source_q, source_k = features["attn2", address]
            source = probabilities(source_q, source_k, heads)[..., : len(taken)]
            self._taken_maps[address] = source
        source = self._taken_maps[address]
        places = [row % len(source) for row in range(len(q))]
        return injected_attention(own[..., : len(share)], source[places], taken, share)

    def _inside(self, size: tuple[int, int], device: torch.device) -> torch.Tensor:
        if size not in self.insides:
            small = F.interpolate(self.whole_mask[:, None], size, mode="nearest").flatten(1)
            if not small.any(1).all():
                h, w = size
                least = -(-self.spec.mask.shape[-1] // w), -(-self.spec.mask.shape[-2] // h)
                raise ValueError(
                    f"mask: nothing is left of it at {w} × {h}, where the constraint is measured; a square of "
                    f"{least[0]} × {least[1]} of its pixels is the smallest that always works"
                )
            self.insides[size] = small.to(device)
        return self.insides[size]

    def finish(self) -> None:
        """Fill the log with the constraint's values."""
        self.evaluation.finish()
        values = [value for step in sorted(self.values) for value in self.values[step]]
        self.spec.log.lines = [
            f"step {step + 1}: " + " → ".join(f"{value:.4f}" for value in self.values[step]) for step in self.values
        ]
        self.spec.log.masks = self.mask[:, 0].cpu()[:, None]
        if values:
            self.spec.log.pictures = loss_curve(values, f"{self.spec.kind}, every inner iteration")


def map_layers(table: LayerTable) -> frozenset[Address]:
    """Where the constraint is measured: the level nearest 16 × 16, without the middle block (SD1.5: their five)."""
    return frozenset(address for address in table.select(MAP_LEVEL) if address[0] != "middle")
