"""Runs of ComfyUI's sampler that the nodes ask for: source and edit together, or a probe of a given latent."""

from __future__ import annotations

import logging
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import comfy.sample
import comfy.samplers
import comfy.utils
import latent_preview
import torch
from comfy.patcher_extension import WrappersMP

from ..heatmap import HeatmapSum, normalise
from ..part_token import PartToken
from ..trajectory import Trajectory
from .blend import BlendRun, BlendSpec, FeatureBlend
from .capture import PartCapture, spatial_size
from .inputs import checked_latent
from .layers import Address, address_of, context_width, layer_table, pooled_width
from .replay import ride_along, start_latent
from .rows import Conditioning, stack
from .samplers import paired_sampler

log = logging.getLogger(__name__)

KEY = "scalpel"
Look = Callable[[Address, torch.Tensor, int, int], None]


@dataclass(frozen=True)
class EditResult:
    """edited: [edits, C, h, w]; source: [sources, C, h, w]; masks: [sources, steps, H, W] in 0…1."""

    edited: torch.Tensor
    source: torch.Tensor
    masks: torch.Tensor


def sample_edit(
    model: Any, source: Conditioning, edit: Conditioning, negative: Conditioning, noise: Any, sampler: Any,
    sigmas: torch.Tensor, latent: dict[str, Any], cfg: float, spec: BlendSpec, trajectory: Trajectory | None = None,
) -> EditResult:  # fmt: skip
    """Denoise source and edits together, blending the edits into the source (see `blend.py`).

    noise: a NOISE object. With a trajectory the source is what it recorded, and the edits start from its x_T: `latent`
    tells their number alone. The MODEL is left as it was: everything happens on a clone that is dropped.
    """
    rows = spec.rows
    samples = checked_latent(model, latent)
    positive = stack([edit, source], [rows.edits, rows.sources], ["edit", "source"])
    if trajectory is None:
        noises = rows.join(noise.generate_noise({**latent, "samples": samples}))
    else:
        samples = start_latent(trajectory)["samples"]
        noises = rows.join(torch.zeros_like(samples))
    noise_mask = latent.get("noise_mask")
    if noise_mask is not None and len(noise_mask) > 1:
        noise_mask = rows.join(comfy.utils.repeat_to_batch_size(noise_mask, rows.sources))
    _warn_of_frozen_models(model)
    runs: list[BlendRun] = []
    patched = model.clone()
    patched.add_wrapper_with_key(WrappersMP.OUTER_SAMPLE, KEY, FeatureBlend(spec, runs.append))
    if trajectory is not None:
        ride_along(patched, trajectory, rows)
    denoised = comfy.sample.sample_custom(
        patched,
        noises,
        cfg,
        paired_sampler(sampler, rows, noises, sigmas, noise.seed, model.load_device),
        sigmas,
        positive,
        negative,
        rows.join(samples),
        noise_mask=noise_mask,
        callback=latent_preview.prepare_callback(patched, len(sigmas) - 1),
        disable_pbar=not comfy.utils.PROGRESS_BAR_ENABLED,
        seed=noise.seed,
    )
    edited, made = denoised[: rows.edits], denoised[rows.edits :]
    if trajectory is not None:
        recorded = model.get_model_object("latent_format").process_out(trajectory.clean).to(made)
        edited, made = recorded[rows.source_of] + (edited - made[rows.source_of]), recorded
    return EditResult(edited, made, runs[0].step_masks())


def _warn_of_frozen_models(model: Any) -> None:
    options = model.model_options.get("transformer_options", {})
    wrappers = [key for kind in options.get("wrappers", {}).values() for key in kind]
    for key in ("torch.compile", "easycache", "lazycache"):
        if key in wrappers or key in options:
            log.warning("Scalpel: %s on this model may skip the attention patches; the edit may not appear", key)


# ---------------------------------------------------------------- probing


class _Probe(comfy.samplers.Sampler):
    """A "sampler" that takes no step: it shows the model the latent at each noise level once."""

    def sample(
        self, model_wrap: Any, sigmas: torch.Tensor, extra_args: dict[str, Any], callback: Any, noise: torch.Tensor,
        latent_image: torch.Tensor | None = None, *_: Any, **__: Any,
    ) -> torch.Tensor:  # fmt: skip
        sampling = model_wrap.inner_model.model_sampling
        latent = torch.zeros_like(noise) if latent_image is None else latent_image
        x = latent
        for i, sigma in enumerate(sigmas[:-1]):
            x = sampling.noise_scaling(sigma, noise, latent, False)
            denoised = model_wrap(x, sigma * x.new_ones(len(x)), **extra_args)
            if callback is not None:
                callback(i, denoised, x, len(sigmas) - 1)
        return latent


def noise_levels(model: Any, timesteps: int, start: float, end: float = 0.0) -> torch.Tensor:
    """`timesteps` sigmas between two noise levels (fractions of the training steps, start > end), noisiest first."""
    sampling = model.get_model_object("model_sampling")
    steps = len(sampling.sigmas) - 1
    places = (
        torch.linspace(start * steps, end * steps, timesteps + 2)[:-1]
        if timesteps > 1
        else torch.tensor([start * steps])
    )
    return sampling.sigma(places[:timesteps])


def probe(
    model: Any, latent: dict[str, Any], sigmas: torch.Tensor, seed: int, positive: Conditioning | None, look: Look,
    callback: Callable[..., None] | None = None,
) -> None:  # fmt: skip
    """Show the model a latent, noised to each of `sigmas` in turn; `look` sees every cross-attention's input.

    look: called with the layer's address, the hidden states [images, h·w, channels], h and w. Without `positive` the
    conditioning is zeros. callback: called after each noise level as a sampler's is, in the place of ComfyUI's progress
    and preview. No step is taken and the MODEL is left as it was.
    """
    samples = checked_latent(model, latent, "latent")
    if any(entry[1].get(key) is not None for entry in positive or () for key in ("area", "mask")):
        raise ValueError(
            "positive: it holds for an area or a mask of the picture only; give a prompt for the whole picture, or none"
        )

    def record(n: torch.Tensor, context: Any, value: Any, options: dict[str, Any]) -> Any:
        look(address_of(options), n[: len(samples)], *spatial_size(options))
        return n, context, value

    patched = model.clone()
    patched.set_model_attn2_patch(record)
    comfy.sample.sample_custom(
        patched,
        comfy.sample.prepare_noise(samples, seed, latent.get("batch_index")),
        1.0,
        _Probe(),
        torch.cat([sigmas, torch.zeros(1)]),
        positive or zero_conditioning(model),
        [],
        samples,
        callback=callback or latent_preview.prepare_callback(patched, len(sigmas)),
        disable_pbar=True,
        seed=seed,
    )


def part_heatmaps(
    model: Any, token: PartToken, latent: dict[str, Any], layers: str, noise_level: float, timesteps: int, seed: int,
    positive: Conditioning | None = None,
) -> torch.Tensor:  # fmt: skip
    """Heat maps of a token's parts over given latents: [images, parts, H, W] in pixels, each scaled to 0…1.

    The latent is noised to `timesteps` levels up to `noise_level` (fraction of the training steps), see `probe`.
    ValueError if the model's attention is not finite.
    """
    table = layer_table(model)
    capture = PartCapture(table, table.select(layers), token, keep_keys=False)
    total = HeatmapSum()
    sigmas = noise_levels(model, timesteps, noise_level)
    probe(model, latent, sigmas, seed, positive, lambda *seen: capture.record(total, *seen))
    h, w = latent["samples"].shape[-2:]
    maps = total.mean((8 * h, 8 * w)).cpu()
    if not torch.isfinite(maps).all():
        raise ValueError(
            "model: its attention holds NaN or infinite values; run it in another precision (ComfyUI's --bf16-unet, "
            "--fp32-unet or --force-upcast-attention)"
        )
    return normalise(maps)


def zero_conditioning(model: Any) -> Conditioning:
    """An unconditional CONDITIONING of zeros, as the authors' pipelines use for an empty prompt."""
    pooled = pooled_width(model)
    options = {"pooled_output": torch.zeros(1, pooled)} if pooled else {}
    return [[torch.zeros(1, 77, context_width(model)), options]]
