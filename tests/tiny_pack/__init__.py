"""A custom node pack for tests: small models of random weights inside a real server (see `tests/tiny.py`), and the demo
model as an inpainting checkpoint.
"""

from __future__ import annotations

import hashlib
import sys
from pathlib import Path
from types import ModuleType
from typing import Any

import comfy.model_patcher
import comfy.sd
import torch

if "scalpel" not in sys.modules:  # a server knows the pack by its path alone
    sys.modules["scalpel"] = ModuleType("scalpel")
    sys.modules["scalpel"].__path__ = [str(Path(__file__).resolve().parent.parent.parent)]

from scalpel.partsworld import architecture, loader
from scalpel.tests import tiny

KINDS = {"SD1.5": tiny.SD15, "SDXL": tiny.SDXL}
KIND = (list(KINDS),)


class TinyModel:
    """A MODEL whose weights are made, as ComfyUI's are, while a node runs; with or without a LoRA."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"kind": KIND, "half": ("BOOLEAN", {}), "lora": ("BOOLEAN", {})}}

    def make(self, kind: str, half: bool, lora: bool) -> tuple[Any]:
        dtype, cast = (torch.float16, torch.float32) if half else (torch.float32, None)
        model = tiny.model(KINDS[kind], dtype=dtype, inference=True, manual_cast=cast)
        if lora:
            name = "diffusion_model.output_blocks.1.1.transformer_blocks.0.attn2.to_k"
            name = name if kind == "SDXL" else name.replace("output_blocks.1.1", "output_blocks.3.1")
            rows, columns = model.model.state_dict()[f"{name}.weight"].shape
            key = "lora_unet_" + name.removeprefix("diffusion_model.").replace(".", "_")
            weights = {
                f"{key}.lora_up.weight": tiny.randn(rows, 4, seed=1),
                f"{key}.lora_down.weight": tiny.randn(4, columns, seed=2),
            }
            loaded, _ = comfy.sd.load_lora_for_models(model, None, weights, 0.5, 0.0)
            assert loaded.patches
            model = loaded
        return (model,)


class TinySDXL:
    """An SDXL-shaped MODEL and its CLIP of two encoders."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL", "CLIP"), "make", "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {}}

    def make(self) -> tuple[Any, Any]:
        return tiny.sdxl_with_its_clip()


class TinyPrompt:
    """A random CONDITIONING of 77 tokens."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("CONDITIONING",), "make", "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"kind": KIND, "seed": ("INT", {"default": 0})}}

    def make(self, kind: str, seed: int) -> tuple[Any]:
        return (tiny.prompt(KINDS[kind], seed),)


class DemoForInpainting:
    """The demo model with an inpainting checkpoint's five channels more, heeded by random weights of this size."""

    RETURN_TYPES, FUNCTION, CATEGORY = ("MODEL",), "make", "testing"

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"size": ("FLOAT", {"default": 0.0})}}

    def make(self, size: float) -> tuple[Any]:
        demo = loader.load()[0]
        config = loader.PartsWorld({**architecture.UNET_CONFIG, "in_channels": 9})
        config.set_inference_dtype(torch.float32, None)
        model = config.get_model({}, device=torch.device("cpu"))
        weights = dict(demo.model.diffusion_model.state_dict())
        first = weights["input_blocks.0.0.weight"]
        more = size * tiny.randn(len(first), 5, *first.shape[2:], seed=4)
        weights["input_blocks.0.0.weight"] = torch.cat([first, more], 1)
        model.diffusion_model.load_state_dict(weights)
        return (comfy.model_patcher.ModelPatcher(model, demo.load_device, demo.offload_device),)


class TinyFingerprint:
    """What the bits of a LATENT are, and of a model's weights after it was sampled with."""

    RETURN_TYPES, FUNCTION, CATEGORY, OUTPUT_NODE = (), "tell", "testing", True

    @classmethod
    def INPUT_TYPES(cls) -> dict[str, Any]:  # noqa: N802
        return {"required": {"latent": ("LATENT",), "model": ("MODEL",)}}

    def tell(self, latent: dict[str, torch.Tensor], model: Any) -> dict[str, Any]:
        weights = [value for _, value in sorted(model.model.diffusion_model.state_dict().items())]
        assert all(weight.is_inference() for weight in model.model.diffusion_model.parameters())
        marks = [hashlib.sha256(b"".join(t.cpu().contiguous().numpy().tobytes() for t in tensors)).hexdigest()
                 for tensors in ([latent["samples"]], weights)]  # fmt: skip
        return {"ui": {"text": marks}}


NODE_CLASS_MAPPINGS = {
    kind.__name__: kind for kind in (TinyModel, TinySDXL, TinyPrompt, DemoForInpainting, TinyFingerprint)
}
