"""Small models of random weights with the true layer structure of SD1.5 and SDXL, and what a run on them needs.

They are ComfyUI's own classes in ComfyUI's own ModelPatcher; only the widths are small.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import comfy.model_base
import comfy.model_management
import comfy.model_patcher
import comfy.sample
import comfy.samplers
import comfy.sd
import comfy.sdxl_clip
import comfy.supported_models
import comfy.supported_models_base
import torch
from safetensors.torch import load_file

from scalpel.core.part_token import PartToken, from_tensor
from scalpel.nodes.feature_blend import FeatureBlendSamplerAdvanced

GOLDEN = Path(__file__).resolve().parent / "golden"
WIDTH = 32
"""Width of the text context of all models here."""
POOLED = 32
SIZE = {"width": 256, "height": 256, "crop_w": 0, "crop_h": 0, "target_width": 256, "target_height": 256}

_SD15 = {
    "image_size": 32, "in_channels": 4, "out_channels": 4, "model_channels": 32, "num_res_blocks": [2, 2, 2, 2],
    "channel_mult": [1, 2, 4, 4], "transformer_depth": [1, 1, 1, 1, 1, 1, 0, 0], "transformer_depth_middle": 1,
    "transformer_depth_output": [1, 1, 1, 1, 1, 1, 1, 1, 1, 0, 0, 0], "use_linear_in_transformer": False,
    "context_dim": WIDTH, "adm_in_channels": None, "use_spatial_transformer": True, "legacy": False,
}  # fmt: skip


@dataclass(frozen=True)
class Kind:
    """A model family in small: its ComfyUI class, UNet and head settings, and how a prompt looks."""

    base: type
    unet: dict[str, Any]
    heads: dict[str, int]
    pooled: bool


def golden_case(name: str) -> tuple[dict[str, Any], dict[str, torch.Tensor]]:
    """Settings and tensors of a golden case."""
    tensors = load_file(GOLDEN / name / "trace.safetensors")
    return json.loads((GOLDEN / name / "case.json").read_text()), {k: v.float() for k, v in tensors.items()}


def golden_kind(name: str, base: type) -> Kind:
    """The model that a golden case was computed with, of a ComfyUI class."""
    config = dict(golden_case(name)[0]["unet_config"])
    heads = {key: config.pop(key) for key in ("num_heads", "num_head_channels")}
    return Kind(base, config, heads, pooled=config["adm_in_channels"] is not None)


SD15 = Kind(comfy.supported_models.SD15, _SD15, {"num_heads": 2, "num_head_channels": -1}, pooled=False)
V_PREDICTION = Kind(
    type("SD15", (comfy.supported_models.SD15,), {"model_type": lambda *_: comfy.model_base.ModelType.V_PREDICTION}),
    _SD15, {"num_heads": 2, "num_head_channels": -1}, pooled=False,
)  # fmt: skip
SDXL = golden_kind("partedit_a", comfy.supported_models.SDXL)


def model(
    kind: Kind, dtype: torch.dtype = torch.float32, weights: dict[str, torch.Tensor] | None = None,
    inference: bool = False, manual_cast: torch.dtype | None = None,
) -> Any:  # fmt: skip
    """A MODEL of this kind, with the given weights or random ones (always the same).

    inference: its weights are inference tensors, as those of a model that ComfyUI's server has loaded.
    """
    config_class = type(kind.base.__name__, (kind.base,), {"unet_extra_config": kind.heads})
    config = config_class(dict(kind.unet))
    config.set_inference_dtype(dtype, manual_cast)
    device = comfy.model_management.get_torch_device()
    with torch.inference_mode(inference):
        base = config.get_model({}, "", device=torch.device("cpu"))
        base.diffusion_model.load_state_dict(weights or random_weights(base.diffusion_model), strict=True)
    return comfy.model_patcher.ModelPatcher(base, device, torch.device("cpu"))


def random_weights(module: torch.nn.Module, seed: int = 0) -> dict[str, torch.Tensor]:
    """Weights that keep activations near unit size, rounding errors small and cross-attention far from flat."""
    generator = torch.Generator().manual_seed(seed)
    weights = {}
    for name, tensor in module.state_dict().items():
        if tensor.ndim < 2:
            base = torch.ones if name.endswith("weight") else torch.zeros
            weights[name] = base(tensor.shape) + 0.05 * torch.randn(tensor.shape, generator=generator)
        else:
            sharp, added = ("attn2.to_q", "attn2.to_k"), ("to_out", "ff.net.2", "proj_out", "out_layers", "out.2")
            gain = 2.0 if any(s in name for s in sharp) else 0.4 if any(a in name for a in added) else 1.0
            weights[name] = torch.randn(tensor.shape, generator=generator) * gain / tensor[0].numel() ** 0.5
    return weights


def golden_model(name: str, base: type = comfy.supported_models.SDXL) -> Any:
    """The MODEL whose weights a golden case was computed with."""
    weights = {k: v.float() for k, v in load_file(GOLDEN / name / "unet.safetensors").items()}
    return model(golden_kind(name, base), weights=weights)


def clip(tokenizer: type, encoder: type, widths: Mapping[str, int], folder: Path | None = None) -> Any:
    """A CLIP of ComfyUI's own classes with random weights and small widths, {encoder: width}; folder: of embeddings."""
    options = {
        f"{name}_model_config": {
            "num_hidden_layers": 3, "num_attention_heads": 2, "intermediate_size": 32, "hidden_size": width,
            "projection_dim": width,
        }
        for name, width in widths.items()
    }  # fmt: skip
    target = comfy.supported_models_base.ClipTarget(tokenizer, encoder)
    with torch.inference_mode(False):
        made = comfy.sd.CLIP(target, embedding_directory=folder and [str(folder)], model_options=options)
        made.cond_stage_model.load_state_dict(random_weights(made.cond_stage_model))
    return made


def sdxl_clip(first: int, second: int, folder: Path | None = None) -> Any:
    """SDXL's two text encoders, of these widths."""
    classes = comfy.sdxl_clip
    return clip(classes.SDXLTokenizer, classes.SDXLClipModel, {"clip_l": first, "clip_g": second}, folder)


def sdxl_with_its_clip() -> tuple[Any, Any]:
    """An SDXL-shaped MODEL and a CLIP whose texts fit it."""
    half = WIDTH // 2  # the second encoder gives the pooled text too
    unet = {**SDXL.unet, "adm_in_channels": half + len(SIZE) * 256}
    return model(replace(SDXL, unet=unet), inference=torch.is_inference_mode_enabled()), sdxl_clip(half, half)


def randn(*shape: int, seed: int) -> torch.Tensor:
    """The same normal numbers for the same seed."""
    return torch.randn(shape, generator=torch.Generator().manual_seed(seed))


def prompt(kind: Kind, seed: int, length: int = 77, batch: int = 1) -> Any:
    """A random CONDITIONING."""
    options: dict[str, Any] = dict(SIZE) if kind.pooled else {}
    if kind.pooled:
        options["pooled_output"] = randn(batch, POOLED, seed=seed + 1000)
    return [[randn(batch, length, WIDTH, seed=seed), options]]


def with_options(conditioning: Any, **options: Any) -> Any:
    """The same CONDITIONING with more in each entry's dict."""
    return [[context, {**old, **options}] for context, old in conditioning]


def token(seed: int = 50) -> PartToken:
    """A part token of random numbers."""
    return from_tensor(randn(2, WIDTH, seed=seed), "head")


def latent(height: int = 24, width: int = 16, batch: int = 1) -> dict[str, Any]:
    """An empty LATENT."""
    return {"samples": torch.zeros(batch, 4, height, width)}


class SeededNoise:
    """ComfyUI's RandomNoise."""

    def __init__(self, seed: int = 7) -> None:
        self.seed = seed

    def generate_noise(self, image: dict[str, Any]) -> torch.Tensor:
        return comfy.sample.prepare_noise(image["samples"], self.seed, image.get("batch_index"))


class NoNoise:
    """ComfyUI's DisableNoise."""

    seed = 0

    def generate_noise(self, image: dict[str, Any]) -> torch.Tensor:
        return torch.zeros_like(image["samples"])


def sigmas(patcher: Any, steps: int) -> torch.Tensor:
    """KSampler's "normal" schedule."""
    return comfy.samplers.calculate_sigmas(patcher.get_model_object("model_sampling"), "normal", steps)


@dataclass
class Edited:
    """Outputs of a feature-blending node, as tensors."""

    edited: torch.Tensor
    source: torch.Tensor
    mask: torch.Tensor
    step_masks: torch.Tensor


def edit(patcher: Any, kind: Kind, **changes: Any) -> Edited:
    """Run FeatureBlendSamplerAdvanced: two prompts, a token, three euler steps at 24 × 16, unless changed."""
    steps = changes.pop("steps", 3)
    settings: dict[str, Any] = {
        "source": prompt(kind, 1), "edit": prompt(kind, 2), "negative": prompt(kind, 3), "noise": SeededNoise(),
        "sampler": comfy.samplers.sampler_object(changes.pop("sampler_name", "euler")),
        "sigmas": sigmas(patcher, steps), "latent_image": latent(), "cfg": 4.0, "omega": 1.0, "blend_until": 1.0,
        "layers": "official", "padding": "background", "part_token": token(),
    }  # fmt: skip
    output = FeatureBlendSamplerAdvanced.execute(patcher, **{**settings, **changes})
    edited, source, mask, step_masks = output.args
    return Edited(edited["samples"], source["samples"], mask, step_masks)


def plain(patcher: Any, kind: Kind, **changes: Any) -> torch.Tensor:
    """An ordinary run of ComfyUI's sampler with the same settings as `edit`, of the source prompt."""
    steps = changes.pop("steps", 3)
    image = changes.pop("latent_image", latent())
    noise = changes.pop("noise", SeededNoise())
    settings: dict[str, Any] = {
        "positive": prompt(kind, 1), "negative": prompt(kind, 3), "cfg": 4.0, "sigmas": sigmas(patcher, steps),
        "sampler": comfy.samplers.sampler_object(changes.pop("sampler_name", "euler")),
    }  # fmt: skip
    settings.update(changes)
    return comfy.sample.sample_custom(
        patcher, noise.generate_noise(image), latent_image=image["samples"], noise_mask=image.get("noise_mask"),
        seed=noise.seed, disable_pbar=True, **settings,
    )  # fmt: skip


@dataclass
class CountedCalls:
    """Wraps the UNet of a clone and counts: rows of each call, and how often each sigma was evaluated."""

    rows: list[int] = field(default_factory=list)
    sigmas: list[float] = field(default_factory=list)

    def attach(self, patcher: Any) -> Any:
        def call(apply: Callable[..., torch.Tensor], arguments: dict[str, Any]) -> torch.Tensor:
            self.rows.append(len(arguments["input"]))
            self.sigmas.append(float(arguments["timestep"][0]))
            return apply(arguments["input"], arguments["timestep"], **arguments["c"])

        counted = patcher.clone()
        counted.set_model_unet_function_wrapper(call)
        return counted

    def rows_per_sigma(self) -> dict[float, int]:
        total: dict[float, int] = {}
        for sigma, rows in zip(self.sigmas, self.rows, strict=True):
            total[sigma] = total.get(sigma, 0) + rows
        return total


def short_of_memory(patcher: Any) -> Any:
    """A clone for which ComfyUI finds no room, so that it calls the UNet for cond and uncond apart."""
    tight = patcher.clone()
    tight.add_object_patch("memory_required", lambda *_, **__: 1e30)
    return tight


def relative(a: torch.Tensor, b: torch.Tensor) -> float:
    """Largest difference over the largest value."""
    return ((a - b).abs().max() / b.abs().max()).item()
