"""Training a part token from a few pictures with painted masks (PartEdit, section 3.2)."""

from __future__ import annotations

import dataclasses
import json
import logging
import math
from typing import Any

import comfy.model_management
import comfy.utils
import torch
import torch.nn.functional as F
from comfy_api.latest import io

from ..core.charts import loss_curve, overlay
from ..core.part_token import family
from ..core.token_training import LOSSES, RECIPES, LayerQueries, Recipe, Trained, optimisation_bytes, optimise_token
from ..core.unet.layers import HELP, layer_table, native_latent_size
from ..core.unet.queries import collect_queries, for_training
from .common import CATEGORY, PartTokenType, check_conditioning, check_range, checked_mask, schema, seed_input

log = logging.getLogger(__name__)

OWN = "recipe"
"""What `loss` and `layers` say where the recipe's own are meant."""
SMALLEST = 64
"""Pixels a picture's shorter side has at least: below, the deepest layers see nothing."""


class PartTokenTrainer(io.ComfyNode):
    @classmethod
    def define_schema(cls) -> io.Schema:
        return schema(
            node_id="PartTokenTrainer",
            display_name="Train Part Token",
            category=f"{CATEGORY}/part token",
            description="Learns a part ('head', 'car hood') from 1 to 20 pictures on which it is painted. The model "
            "itself is not trained and not changed: it looks at each picture a few times, and a few rows of numbers "
            "are fitted to what it saw.",
            search_aliases=["partedit", "part embedding", "textual inversion", "train token"],
            inputs=[
                io.Model.Input("model", tooltip="An SD1.x, SD2.x or SDXL model (or the demo model). LoRAs count."),
                io.Vae.Input("vae", tooltip="The model's own VAE."),
                io.Image.Input(
                    "images",
                    tooltip="1 to 20 pictures that show the part, in one size, best near the model's own: 512 for "
                    "SD1.5, 1024 for SDXL, 256 for the demo model. Sides that the VAE cannot divide by 8 lose up to 7 "
                    "pixels, the masks the same ones.",
                ),
                io.Mask.Input(
                    "masks",
                    tooltip="One mask per picture, white (1) where the part is: from Load Image and its mask editor, "
                    "or from Load Part Pictures. Any resolution of the picture's aspect ratio.",
                ),
                io.String.Input("name", default="part", tooltip="What the part is called, for instance 'head'."),
                io.Combo.Input(
                    "recipe", options=list(RECIPES), default="fast",
                    tooltip="paper: the PartEdit authors' settings. fast: the better one on the demo model.",
                ),
                io.Int.Input("steps", default=0, min=0, max=100000, tooltip="Training steps; 0 = the recipe's."),
                io.Float.Input(
                    "learning_rate", default=0.0, min=0.0, max=1000.0, step=0.01, round=False,
                    tooltip="Of the first step; 0 = the recipe's.",
                ),
                io.Combo.Input(
                    "loss", options=[OWN, *LOSSES], default=OWN,
                    tooltip="What is made small: bce, the binary cross-entropy of heat map and mask, or l2, their mean "
                    "squared difference.",
                ),
                io.String.Input(
                    "layers", default=OWN,
                    tooltip=f"Attention layers that are trained on: 'recipe' for the recipe's, or {HELP}.",
                ),
                io.Float.Input(
                    "noise_start", default=0.25, min=0.01, max=1.0, step=0.01,
                    tooltip="The most noise at which the model sees the pictures, a fraction of its training steps.",
                ),
                io.Float.Input(
                    "noise_end", default=0.0, min=0.0, max=0.99, step=0.01,
                    tooltip="The least noise, below noise_start.",
                ),
                io.Int.Input(
                    "timesteps", default=12, min=1, max=100,
                    tooltip="At how many noise levels the model sees each picture. Memory and the time before the "
                    "first step grow with it.",
                ),
                seed_input(),
                io.Conditioning.Input(
                    "positive", optional=True,
                    tooltip="What the pictures show: one prompt for all, or a batch of one each. Without it the model "
                    "looks unconditionally, as the authors' does.",
                ),
            ],
            outputs=[
                PartTokenType.Output(display_name="part_token", tooltip="The learned part, for any Scalpel node."),
                io.Image.Output(display_name="loss_curve", tooltip="The loss at each step, as a chart."),
                io.Image.Output(
                    display_name="heatmaps",
                    tooltip="Each training picture with the token's heat map over it, the mask's outline in white.",
                ),
            ],
        )  # fmt: skip

    @classmethod
    def execute(
        cls, model: Any, vae: Any, images: torch.Tensor, masks: torch.Tensor, name: str, recipe: str, steps: int,
        learning_rate: float, loss: str, layers: str, noise_start: float, noise_end: float, timesteps: int, seed: int,
        positive: Any = None,
    ) -> io.NodeOutput:  # fmt: skip
        table = layer_table(model)  # refuses models without a U-Net before anything is computed
        name = " ".join(name.split())
        if not name:
            raise ValueError("name: it is empty; say what the part is called, for instance 'head'")
        chosen = _checked_recipe(recipe, steps, learning_rate, loss, layers)
        table.select(chosen.layers)
        _check_noise(noise_start, noise_end, timesteps)
        if positive is not None:
            check_conditioning("positive", positive, model)
        pictures, painted = _checked_pictures(vae, images, masks)
        _warn_of_size(pictures, 8 * native_latent_size(model))
        progress = _Progress(len(pictures) * timesteps + chosen.steps)
        samples = _encode(model, vae, pictures)
        queries = collect_queries(
            model, {"samples": samples}, chosen.layers, (noise_start, noise_end), timesteps, seed, positive,
            progress.advance,
        )  # fmt: skip
        needed = optimisation_bytes(queries, (painted.shape[-2], painted.shape[-1]), chosen)
        trained = _optimise(for_training(queries, needed, model.load_device), painted, chosen, seed, progress)
        token = trained.token(name, _info(trained, chosen, recipe, (noise_start, noise_end)))
        title = f"{name}: {chosen.loss} loss {trained.losses[-1]:.4g} after {chosen.steps} steps"
        return io.NodeOutput(token, loss_curve(trained.losses, title), overlay(pictures, trained.heatmaps, painted))


class _Progress:
    """One progress bar over all of a training; every advance is a point at which it can be cancelled."""

    def __init__(self, total: int) -> None:
        self.bar = comfy.utils.ProgressBar(total)

    def advance(self, count: int = 1) -> None:
        comfy.model_management.throw_exception_if_processing_interrupted()
        self.bar.update(count)


def _checked_recipe(recipe: str, steps: int, learning_rate: float, loss: str, layers: str) -> Recipe:
    """The recipe with what the user set in the place of its own settings."""
    if recipe not in RECIPES:
        raise ValueError(f"recipe: {recipe!r} is unknown; accepted are {' and '.join(RECIPES)}")
    if loss not in (OWN, *LOSSES):
        raise ValueError(f"loss: {loss!r} is unknown; accepted are {', '.join((OWN, *LOSSES))}")
    check_range("steps", steps, 0, 100000)
    check_range("learning_rate", learning_rate, 0.0, 1000.0)
    own = RECIPES[recipe]
    return dataclasses.replace(
        own,
        steps=steps or own.steps,
        learning_rate=learning_rate or own.learning_rate,
        loss=own.loss if loss == OWN else loss,
        layers=own.layers if layers.strip() == OWN else layers,
    )


def _check_noise(start: float, end: float, timesteps: int) -> None:
    check_range("noise_start", start, 0.01, 1.0)
    check_range("noise_end", end, 0.0, 0.99)
    check_range("timesteps", timesteps, 1, 100)
    if start <= end:
        raise ValueError(f"noise_start: {start} is not above noise_end ({end}); accepted is a start above the end")


def _checked_pictures(vae: Any, images: torch.Tensor, masks: torch.Tensor) -> tuple[torch.Tensor, torch.Tensor]:
    """Pictures [n, H, W, 3] and their masks [n, H, W], both cropped as the VAE crops. ValueError says what is wrong."""
    if images.ndim != 4 or images.shape[-1] not in (3, 4) or len(images) == 0:
        raise ValueError(f"images: the shape is {list(images.shape)}; accepted is [batch, height, width, 3]")
    if min(images.shape[1:3]) < SMALLEST:
        raise ValueError(
            f"images: they are {images.shape[2]} × {images.shape[1]}; accepted are pictures whose sides have "
            f"{SMALLEST} pixels or more"
        )
    if not torch.isfinite(images).all():
        raise ValueError("images: they hold NaN or infinite values; a picture's values are 0 to 1")
    if vae is None:
        raise ValueError("vae: there is none; this checkpoint comes without a VAE, load one with Load VAE")
    painted = _checked_masks(masks, len(images), (images.shape[1], images.shape[2]))
    pictures = vae.vae_encode_crop_pixels(images[..., :3])
    cropped = vae.vae_encode_crop_pixels(painted[..., None])[..., 0]
    if pictures.shape != images[..., :3].shape:
        h, w = pictures.shape[1:3]
        log.info("Scalpel: training on the middle %d × %d of the pictures, which the VAE can encode", w, h)
    return pictures, cropped


def _warn_of_size(pictures: torch.Tensor, native: int) -> None:
    """Say so if the pictures have less than half or more than twice the pixels that the model is made for."""
    h, w = pictures.shape[1:3]
    if not 0.5 <= h * w / native**2 <= 2:
        log.warning("Scalpel: the pictures are %d × %d, and the model was made for %d × %d", w, h, native, native)


def _checked_masks(masks: torch.Tensor, pictures: int, size: tuple[int, int]) -> torch.Tensor:
    """One mask per picture, [n, H, W] in 0…1 at the pictures' size."""
    each = masks[None] if masks.ndim == 2 else masks
    if each.ndim == 4 and each.shape[1] == 1:
        each = each[:, 0]
    if each.ndim == 3:
        _check_painted(each, pictures)
    checked = checked_mask(each, pictures, size, "masks")
    if checked.shape[-2:] != size:
        checked = F.interpolate(checked[:, None], size, mode="bilinear", antialias=True)[:, 0].clamp(0, 1)
    return checked


def _check_painted(masks: torch.Tensor, pictures: int) -> None:
    """ValueError unless there is a mask for each picture, with something painted and something not."""
    if len(masks) != pictures:
        raise ValueError(f"masks: {len(masks)} masks for {pictures} images; give one mask per image")
    for i, mask in enumerate(masks, 1):
        if mask.max() < 0.5:
            raise ValueError(
                f"masks: the mask of image {i} is empty (its largest value is {float(mask.max()):.3g}); paint the part "
                "in white. Load Image gives an empty mask for a picture on which nothing was painted"
            )
        if mask.min() > 0.5:
            raise ValueError(f"masks: the mask of image {i} covers the whole picture; paint the part alone")


def _encode(model: Any, vae: Any, pictures: torch.Tensor) -> torch.Tensor:
    """The pictures' latents, one picture at a time so that it can be cancelled."""
    latents = []
    for i in range(len(pictures)):
        comfy.model_management.throw_exception_if_processing_interrupted()
        latents.append(vae.encode(pictures[i : i + 1]))
    samples = torch.cat(latents)
    channels = model.get_model_object("latent_format").latent_channels
    if samples.ndim != 4 or samples.shape[1] != channels:
        raise ValueError(
            f"vae: it makes latents of the shape {list(samples.shape)}, and this model takes [batch, {channels}, "
            "height, width]; connect the VAE of this model"
        )
    if not torch.isfinite(samples).all():
        broken = [str(i) for i, sample in enumerate(samples, 1) if not torch.isfinite(sample).all()]
        raise ValueError(
            f"vae: its latent of image {', '.join(broken)} holds NaN; start ComfyUI with --fp32-vae, or use a VAE that "
            "is made for half precision"
        )
    return samples


def _optimise(
    queries: list[LayerQueries], masks: torch.Tensor, recipe: Recipe, seed: int, progress: _Progress
) -> Trained:
    """`optimise_token` on ordinary tensors, with gradients: ComfyUI runs nodes in inference mode."""

    def on_step(step: int, loss: float) -> None:
        if not math.isfinite(loss):
            raise ValueError(
                f"learning_rate: the loss became {loss} at step {step + 1} with a learning rate of "
                f"{recipe.learning_rate:g}; give a smaller one"
            )
        progress.advance()

    log.info("Scalpel: training for %d steps, %s loss", recipe.steps, recipe.loss)
    with torch.inference_mode(False), torch.enable_grad():
        return optimise_token(
            queries, masks.clone().to(queries[0].to_k.device), recipe, seed, on_step,
            comfy.model_management.throw_exception_if_processing_interrupted,
        )  # fmt: skip


def _info(trained: Trained, recipe: Recipe, recipe_name: str, noise: tuple[float, float]) -> dict[str, str]:
    return {
        "model_family": family(trained.embedding.shape[1]),
        "layers": recipe.layers,
        "noise_range": json.dumps(noise),
        "images": str(len(trained.heatmaps)),
        "loss": f"{trained.losses[-1]:.6g}",
        "loss_function": recipe.loss,
        "recipe": recipe_name,
        "steps": str(recipe.steps),
        "learning_rate": f"{recipe.learning_rate:g}",
    }
