"""What ComfyUI's inputs mean for a model: a LATENT's samples, KSampler's settings as sigmas."""

from __future__ import annotations

from typing import Any

import comfy.sample
import comfy.samplers
import torch


def model_sigmas(model: Any, sampler_name: str, scheduler: str, steps: int, denoise: float) -> torch.Tensor:
    """The sigmas that KSampler would use for these settings."""
    sampler = comfy.samplers.KSampler(
        model, steps, model.load_device, sampler_name, scheduler, denoise, model.model_options
    )
    return sampler.sigmas.cpu()


def checked_latent(model: Any, latent: dict[str, Any], name: str = "latent_image") -> torch.Tensor:
    """The samples of a LATENT as this model takes them. ValueError if they have another number of channels."""
    samples = comfy.sample.fix_empty_latent_channels(model, latent["samples"])
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"{name}: its shape is {list(samples.shape)}; this model takes [batch, {channels}, height, width]"
        )
    return samples


def check_aspect(mask: torch.Tensor, size: tuple[int, int], name: str) -> None:
    """ValueError unless a mask [n, H, W] has the aspect ratio of an image of (height, width) pixels."""
    h, w = mask.shape[-2:]
    if abs(h * size[1] - w * size[0]) > 8 * max(h, w):
        raise ValueError(
            f"{name}: it is {w} × {h} where the image is {size[1]} × {size[0]}; give a mask of the image's shape "
            "(any resolution of the same aspect ratio)"
        )
