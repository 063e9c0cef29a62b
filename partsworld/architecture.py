"""The demo model's shape: an SD1.x-style latent diffusion model in ComfyUI's own classes, very small.

Used by the trainer (plain modules) and by the loader (ComfyUI's wrappers), so that both build the same network.
"""

from __future__ import annotations

from typing import Any

import torch

UNET_CONFIG: dict[str, Any] = {
    "image_size": 32,
    "in_channels": 4,
    "out_channels": 4,
    "model_channels": 32,
    "num_res_blocks": [1, 1, 1],
    "channel_mult": [1, 3, 6],
    "transformer_depth": [0, 1, 1],
    "transformer_depth_output": [0, 0, 1, 1, 1, 1],
    "transformer_depth_middle": 1,
    "use_linear_in_transformer": False,
    "context_dim": 128,
    "adm_in_channels": None,
    "use_temporal_attention": False,
    "use_spatial_transformer": True,
    "legacy": False,
}
"""32×32 latents; cross- and self-attention at 16×16, 8×8 and in the middle."""

UNET_HEADS = {"num_heads": -1, "num_head_channels": 32}

TEXT_CONFIG: dict[str, Any] = {
    "num_hidden_layers": 2,
    "hidden_size": 128,
    "num_attention_heads": 4,
    "intermediate_size": 512,
    "hidden_act": "quick_gelu",
    "max_position_embeddings": 77,
    "eos_token_id": 49407,
    "vocab_size": 49408,
}

LATENT_SCALE = 0.18215
"""SD1.x's latent scale factor: the VAE's latents times this are what the UNet sees."""


def unet(operations: Any, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """ComfyUI's UNetModel with this config; weights are uninitialised."""
    from comfy.ldm.modules.diffusionmodules.openaimodel import UNetModel

    return UNetModel(**_unet_arguments(), operations=operations, dtype=dtype)


def _unet_arguments() -> dict[str, Any]:
    config = {**UNET_CONFIG, **UNET_HEADS}
    config.pop("use_temporal_attention")
    return config


def text_model(operations: Any, dtype: torch.dtype = torch.float32) -> torch.nn.Module:
    """ComfyUI's CLIPTextModel with this config; weights are uninitialised."""
    from comfy.clip_model import CLIPTextModel

    return CLIPTextModel(dict(TEXT_CONFIG), dtype, "cpu", operations)
