"""DiffEdit as diffusers has it, on the weights of a ComfyUI model: what the mask methods are compared with."""

from __future__ import annotations

from collections.abc import Sequence
from types import SimpleNamespace
from typing import Any

import comfy.model_base
import comfy.utils
import torch
from diffusers import DDIMInverseScheduler, DDIMScheduler, StableDiffusionDiffEditPipeline, UNet2DConditionModel


class DiffEdit:
    """diffusers' pipeline, its settings as it has them; texts are embeddings [1, tokens, width], latents ComfyUI's.

    For SD1.x and SD2.x models, see `diffusers_unet`.
    """

    def __init__(self, model: Any) -> None:
        self._model = model
        self._rows: list[int] = []
        unet = diffusers_unet(model)
        unet.register_forward_pre_hook(lambda _, given: self._rows.append(len(given[0])))
        scheduler = DDIMScheduler(
            beta_start=0.00085, beta_end=0.012, beta_schedule="scaled_linear", clip_sample=False,
            set_alpha_to_one=False, steps_offset=1,
        )  # fmt: skip
        self._pipeline = StableDiffusionDiffEditPipeline(
            vae=_LatentsOnly(), text_encoder=None, tokenizer=None, unet=unet, scheduler=scheduler, safety_checker=None,
            feature_extractor=None, inverse_scheduler=DDIMInverseScheduler.from_config(scheduler.config),
            requires_safety_checker=False,
        )  # fmt: skip
        self._pipeline.set_progress_bar_config(disable=True)

    def taken(self) -> int:
        """Rows of the UNet since it was last asked."""
        rows = sum(self._rows)
        self._rows.clear()
        return rows

    def mask(
        self, latent: torch.Tensor, texts: Sequence[torch.Tensor], steps: int, cfg: float, seed: int
    ) -> torch.Tensor:
        """[1, h, w] of 0 and 1. texts: what is there, what shall be, the negative prompt."""
        source, target, nothing = texts
        mask = self._pipeline.generate_mask(
            self._model.model.process_latent_in(latent), source_prompt_embeds=source, target_prompt_embeds=target,
            source_negative_prompt_embeds=nothing, target_negative_prompt_embeds=nothing, num_inference_steps=steps,
            guidance_scale=cfg, generator=torch.Generator().manual_seed(seed), output_type="np",
        )  # fmt: skip
        return torch.from_numpy(mask).float()

    def edit(self, latent: torch.Tensor, mask: torch.Tensor, texts: Sequence[torch.Tensor], steps: int, cfg: float
             ) -> torch.Tensor:  # fmt: skip
        """The latent inverted with the text of what is there, and denoised with the other inside the mask."""
        source, target, nothing = texts
        both = {"negative_prompt_embeds": nothing, "num_inference_steps": steps, "guidance_scale": cfg}
        clean = self._model.model.process_latent_in(latent)
        noisy = self._pipeline.invert(prompt_embeds=source, image=clean, **both).latents
        edited = self._pipeline(
            prompt_embeds=target, mask_image=mask[:, None], image_latents=noisy, output_type="latent", **both
        )
        return self._model.model.process_latent_out(edited.images)  # type: ignore[no-any-return]


class _LatentsOnly:
    """What the pipeline asks of a VAE where it is given latents."""

    dtype = torch.float32
    config = SimpleNamespace(block_out_channels=(1, 1, 1, 1), scaling_factor=1.0, latent_channels=4)


def diffusers_unet(model: Any) -> UNet2DConditionModel:
    """A MODEL's UNet as diffusers', of the same weights, in float32. ValueError if it is not of SD1.x or SD2.x, or
    predicts no noise.
    """
    base, shape = model.model, model.model.model_config.unet_config
    if shape.get("adm_in_channels") is not None or base.model_type != comfy.model_base.ModelType.EPS:
        raise ValueError("DiffEdit: diffusers has it for SD1.x and SD2.x models that predict noise; leave it out")
    residuals, widths = shape["num_res_blocks"], [shape["model_channels"] * by for by in shape["channel_mult"]]
    attends = [shape["transformer_depth"][sum(residuals[:level])] > 0 for level in range(len(widths))]
    one_head = shape["num_head_channels"]
    unet = UNet2DConditionModel(
        sample_size=64, block_out_channels=widths, layers_per_block=residuals[0],
        down_block_types=["CrossAttnDownBlock2D" if own else "DownBlock2D" for own in attends],
        up_block_types=["CrossAttnUpBlock2D" if own else "UpBlock2D" for own in reversed(attends)],
        attention_head_dim=[shape["num_heads"] if one_head < 0 else width // one_head for width in widths],
        cross_attention_dim=shape["context_dim"], use_linear_projection=shape["use_linear_in_transformer"],
    )  # fmt: skip
    weights = base.diffusion_model.state_dict()
    names = comfy.utils.unet_to_diffusers(shape)
    unet.load_state_dict({name: weights[own] for name, own in names.items() if own in weights})
    return unet.eval()  # type: ignore[no-any-return]
