"""The demo checkpoint as the MODEL, CLIP and VAE that ComfyUI's own checkpoint loader would give.

ComfyUI recognises a checkpoint by its UNet's shape, and this shape is in no list of its; everything after that
recognition is done here as `comfy.sd.load_state_dict_guess_config` does it, with ComfyUI's own classes.
"""

from __future__ import annotations

import json
from collections.abc import Iterable
from pathlib import Path
from typing import Any, ClassVar

import comfy.latent_formats
import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sd
import comfy.sd1_clip
import comfy.supported_models
import comfy.supported_models_base
import comfy.utils
import folder_paths
import torch

from . import architecture

WEIGHTS = Path(__file__).parent / "weights" / "partsworld.safetensors"
"""The checkpoint that comes with the pack, in the key layout of an SD1.x checkpoint."""

UNET_PREFIX = "model.diffusion_model."
VAE_PREFIX = "first_stage_model."
TEXT_PREFIX = "cond_stage_model."


class LatentFormat(comfy.latent_formats.SD15):
    """SD1.x's scale; previews by the linear map from a latent to the mean colour of its 8×8 patch."""

    def __init__(self) -> None:
        super().__init__()
        self.taesd_decoder_name = None  # SD1.x's preview decoder would show noise


class PartsWorld(comfy.supported_models.SD15):
    """Model configuration as ComfyUI keeps one per supported model."""

    unet_config: ClassVar = {
        key: architecture.UNET_CONFIG[key] for key in ("context_dim", "model_channels", "adm_in_channels")
    }
    unet_extra_config: ClassVar = architecture.UNET_HEADS
    latent_format = LatentFormat
    native_latent_size = architecture.UNET_CONFIG["image_size"]

    def clip_target(self, state_dict: dict[str, torch.Tensor] | None = None) -> Any:  # noqa: ARG002 (ComfyUI's name)
        target = comfy.supported_models_base.ClipTarget(comfy.sd1_clip.SD1Tokenizer, comfy.sd1_clip.SD1ClipModel)
        target.params = {"clip_model": TextEncoder}
        return target


class TextEncoder(comfy.sd1_clip.SDClipModel):
    """CLIP's text model with the demo model's small configuration."""

    def __init__(
        self, device: Any = "cpu", dtype: torch.dtype | None = None, model_options: dict[str, Any] | None = None
    ) -> None:
        super().__init__(
            device=device,
            dtype=dtype,
            textmodel_json_config=dict(architecture.TEXT_CONFIG),
            return_projected_pooled=False,
            model_options=model_options or {},
        )


def load(path: str | Path = WEIGHTS) -> tuple[comfy.model_patcher.ModelPatcher, comfy.sd.CLIP, comfy.sd.VAE]:
    """MODEL, CLIP and VAE of the demo model.

    FileNotFoundError if `path` does not exist; ValueError if it is no complete parts-world checkpoint.
    """
    if not Path(path).is_file():
        raise FileNotFoundError(f"the demo model's weights are not at {path}: reinstall the pack, or train them again")
    weights, metadata = comfy.utils.load_torch_file(str(path), safe_load=True, return_metadata=True)
    facts = json.loads((metadata or {}).get("partsworld", "{}"))
    groups = {prefix: _without_prefix(weights, prefix) for prefix in (UNET_PREFIX, TEXT_PREFIX, VAE_PREFIX)}
    _expect((), weights.keys(), f"the checkpoint {path}")
    try:
        return (
            _load_unet(groups[UNET_PREFIX], facts),
            _load_text(groups[TEXT_PREFIX]),
            _load_vae(groups[VAE_PREFIX]),
        )
    except RuntimeError as error:
        if "size mismatch" not in str(error):
            raise
        raise ValueError(f"{path} is not a parts-world checkpoint of this version: {error}") from error


def _load_unet(weights: dict[str, torch.Tensor], facts: dict[str, Any]) -> comfy.model_patcher.ModelPatcher:
    manage = comfy.model_management
    config = PartsWorld(architecture.UNET_CONFIG)
    if "latent_rgb_factors" in facts:
        config.latent_format.latent_rgb_factors = facts["latent_rgb_factors"]
        config.latent_format.latent_rgb_factors_bias = facts["latent_rgb_bias"]
    parameters, supported = comfy.utils.calculate_parameters(weights), list(config.supported_inference_dtypes)
    dtype = manage.unet_dtype(
        model_params=parameters, supported_dtypes=supported, weight_dtype=comfy.utils.weight_dtype(weights)
    )
    device = manage.get_torch_device()
    config.set_inference_dtype(dtype, manage.unet_manual_cast(dtype, device, config.supported_inference_dtypes))
    first_device = manage.unet_inital_load_device(parameters, dtype)
    names = set(weights)
    model = config.get_model(weights, device=first_device)
    model.load_model_weights(weights)
    _expect(model.diffusion_model.state_dict(), names, "the UNet")
    patcher = comfy.model_patcher.ModelPatcher(model, load_device=device, offload_device=manage.unet_offload_device())
    if first_device != torch.device("cpu"):
        manage.load_models_gpu([patcher], force_full_load=True)
    return patcher


def _load_text(weights: dict[str, torch.Tensor]) -> comfy.sd.CLIP:
    weights = {f"clip_l.{name}": tensor for name, tensor in weights.items()}
    clip = comfy.sd.CLIP(
        PartsWorld(architecture.UNET_CONFIG).clip_target(),
        embedding_directory=folder_paths.get_folder_paths("embeddings"),
        tokenizer_data=weights,
        parameters=comfy.utils.calculate_parameters(weights),
    )
    missing, unexpected = clip.load_sd(weights, full_model=True)
    _expect(missing, unexpected, "the text encoder")
    return clip


def _load_vae(weights: dict[str, torch.Tensor]) -> comfy.sd.VAE:
    names = set(weights)
    if "taesd_decoder.1.weight" not in names:
        raise ValueError("the VAE's weights are incomplete: they lack taesd_decoder.1.weight")
    vae = comfy.sd.VAE(sd=weights)
    _expect(vae.first_stage_model.state_dict(), names, "the VAE")
    return vae


def _without_prefix(weights: dict[str, torch.Tensor], prefix: str) -> dict[str, torch.Tensor]:
    """Takes the tensors under `prefix` out of `weights`."""
    return {name[len(prefix) :]: weights.pop(name) for name in list(weights) if name.startswith(prefix)}


def _expect(wanted: Iterable[str], found: Iterable[str], what: str) -> None:
    """ValueError unless both hold the same names."""
    missing, unexpected = sorted(set(wanted) - set(found)), sorted(set(found) - set(wanted))
    if missing or unexpected:
        raise ValueError(
            f"{what} does not fit: {len(missing)} tensors missing {missing[:3]}, "
            f"{len(unexpected)} unexpected {unexpected[:3]}"
        )
