"""Training of the demo model's UNet and text encoder: ε-prediction on SD's schedule, data-parallel, resumable.

Every step's batch, timesteps and noise come from a generator seeded by (step, rank): a resumed run is the same run.
The loss is weighted by min(SNR, 5)/SNR (Hang et al. 2023) and half of the timesteps come from the noisier 60 %,
where colours and places are decided. The rate is constant after warm-up and falls to zero over a final cool-down.
"""

from __future__ import annotations

import json
import logging
import os
import time
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.distributed as dist
from torch import nn

from . import architecture

log = logging.getLogger(__name__)

TEXT_LENGTH = 77
UNCONDITIONAL = 0.1
LOW_FREQUENCIES = {1: 0.1, 2: 0.08, 4: 0.06}
"""Cells a side → strength of the training noise's coarse parts."""


@dataclass(frozen=True)
class Recipe:
    """One training run. `cooldown`: over how many of the last steps the rate falls linearly to zero.

    `shares`: rows of the batch per process where the cores are not equally free; equal parts if empty.
    """

    steps: int
    cooldown: int
    batch: int = 64
    shares: tuple[int, ...] = ()
    rate: float = 1.0e-3
    warmup: int = 150
    ema: float = 0.9985
    snr_cap: float = 5.0


def tokenize(captions: list[str]) -> tuple[np.ndarray, np.ndarray]:
    """CLIP token ids [n, 77] as indices into the vocabulary that occurs, and that vocabulary's CLIP ids."""
    from comfy.sd1_clip import SDTokenizer

    tokenizer = SDTokenizer()
    ids = np.array([[t for t, _ in tokenizer.tokenize_with_weights(c)[0]] for c in captions], np.int64)
    vocabulary, index = np.unique(ids, return_inverse=True)
    return index.reshape(ids.shape), vocabulary


def noise_schedule() -> torch.Tensor:
    """ᾱ of the 1000 training steps of SD (scaled linear, 0.00085…0.012)."""
    betas = torch.linspace(0.00085**0.5, 0.012**0.5, 1000, dtype=torch.float64) ** 2
    return torch.cumprod(1 - betas, 0).float()


class Denoiser(nn.Module):
    """UNet and text encoder together; the vocabulary holds only the tokens that occur in the captions."""

    unet: nn.Module
    text: Any  # ComfyUI's CLIPTextModel

    def __init__(self, vocabulary: int) -> None:
        super().__init__()
        import comfy.ops

        self.unet = architecture.unet(comfy.ops.disable_weight_init)
        self.text = architecture.text_model(comfy.ops.disable_weight_init)
        width = architecture.TEXT_CONFIG["hidden_size"]
        self.text.text_model.embeddings.token_embedding = nn.Embedding(vocabulary, width)
        _initialise(self)

    def encode(self, tokens: torch.Tensor) -> torch.Tensor:
        """[n, 77] vocabulary indices → [n, 77, width], as CLIPTextModel computes it (which works in place)."""
        model = self.text.text_model
        x = model.embeddings.token_embedding(tokens) + model.embeddings.position_embedding.weight
        mask = torch.full((TEXT_LENGTH, TEXT_LENGTH), -1e9, dtype=x.dtype, device=x.device).triu_(1)
        for layer in model.encoder.layers:
            x = x + layer.self_attn(layer.layer_norm1(x), mask, _masked_attention)
            x = x + layer.mlp(layer.layer_norm2(x))
        return model.final_layer_norm(x)

    def forward(self, x: torch.Tensor, timesteps: torch.Tensor, tokens: torch.Tensor) -> torch.Tensor:
        return self.unet(x, timesteps, self.encode(tokens))


def _initialise(model: nn.Module) -> None:
    """PyTorch's own initialisation, which ComfyUI's layers skip; zero for each residual branch's last layer."""
    for module in model.modules():
        if isinstance(module, nn.Linear):
            nn.Linear.reset_parameters(module)
        elif isinstance(module, nn.Conv2d):
            nn.Conv2d.reset_parameters(module)
        elif isinstance(module, (nn.LayerNorm, nn.GroupNorm)):
            nn.init.ones_(module.weight)
            nn.init.zeros_(module.bias)
        elif isinstance(module, nn.Embedding):
            nn.init.normal_(module.weight, std=0.3)
    for name, parameter in model.named_parameters():
        if ".out_layers.3." in name or name.startswith("unet.out.2."):
            nn.init.zeros_(parameter)


def _attention(q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, *_: Any, **__: Any) -> torch.Tensor:
    """Plain attention: on a CPU its backward pass is three times as fast as the fused kernel's at these sizes."""
    b, n, d = q.shape
    m, e = k.shape[1], d // heads
    q = q.view(b, n, heads, e).transpose(1, 2).reshape(b * heads, n, e)
    k = k.view(b, m, heads, e).permute(0, 2, 3, 1).reshape(b * heads, e, m)
    v = v.view(b, m, heads, e).transpose(1, 2).reshape(b * heads, m, e)
    weights = torch.softmax(torch.bmm(q * e**-0.5, k), -1, dtype=torch.float32).to(v.dtype)
    return torch.bmm(weights, v).view(b, heads, n, e).transpose(1, 2).reshape(b, n, d)


def _masked_attention(
    q: torch.Tensor, k: torch.Tensor, v: torch.Tensor, heads: int, mask: torch.Tensor
) -> torch.Tensor:
    split = [t.view(t.shape[0], -1, heads, t.shape[-1] // heads).transpose(1, 2) for t in (q, k, v)]
    scores = split[0] @ split[1].transpose(-1, -2) * split[0].shape[-1] ** -0.5 + mask
    out = torch.softmax(scores.float(), -1).to(v.dtype) @ split[2]
    return out.transpose(1, 2).flatten(2)


def train(data: Path, out: Path, recipe: Recipe, rank: int = 0, world: int = 1) -> None:
    """Train until `recipe.steps`; the state is kept in `out`/state.pt every 200 steps and taken up from there."""
    import comfy.ldm.modules.attention

    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    if device.type == "cpu":
        comfy.ldm.modules.attention.optimized_attention = _attention
        torch.set_num_threads(1)
    if world > 1:
        os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=os.environ.get("MASTER_PORT", "29541"))
        dist.init_process_group("gloo", rank=rank, world_size=world)

    words = json.loads((data / "captions.json").read_text())
    unique = ["", *sorted({c for variants in words for c in variants})]
    number = {caption: i for i, caption in enumerate(unique)}
    tokens, vocabulary = tokenize(unique)
    caption_of = np.array([[number[c] for c in variants] for variants in words])
    latents = np.load(data / "latents.npy", mmap_mode="r")

    torch.manual_seed(0)
    model = Denoiser(len(vocabulary)).to(device)
    average = [p.detach().clone() for p in model.parameters()]
    optimiser = torch.optim.AdamW(model.parameters(), lr=recipe.rate, betas=(0.9, 0.99), weight_decay=0.01)
    step = 0
    state_file = out / "state.pt"
    if state_file.exists():
        state = torch.load(state_file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        average, step = state["average"], state["step"]
    alphas = noise_schedule().to(device)
    share = recipe.shares[rank] if recipe.shares else recipe.batch // world
    began, losses = time.time(), []
    while step < recipe.steps:
        for group in optimiser.param_groups:
            group["lr"] = recipe.rate * _rate(step, recipe)
        generator = torch.Generator().manual_seed(step * 64 + rank)
        rows = torch.randint(len(latents), (share,), generator=generator).numpy()
        which = torch.randint(caption_of.shape[1], (share,), generator=generator).numpy()
        drop = (torch.rand(share, generator=generator) < UNCONDITIONAL).numpy()
        text = torch.from_numpy(tokens[np.where(drop, 0, caption_of[rows, which])]).to(device)
        x0 = torch.from_numpy(latents[np.sort(rows)][np.argsort(np.argsort(rows))].astype(np.float32)).to(device)
        t = torch.where(
            torch.rand(share, generator=generator) < 0.5,
            torch.randint(1000, (share,), generator=generator),
            torch.randint(400, 1000, (share,), generator=generator),
        ).to(device)
        noise = _noise(x0.shape, generator).to(device)
        a = alphas[t][:, None, None, None]
        with torch.autocast(device.type, torch.bfloat16):
            predicted = model(a.sqrt() * x0 + (1 - a).sqrt() * noise, t, text)
        snr = (a / (1 - a)).flatten()
        weight = snr.clamp(max=recipe.snr_cap) / snr
        loss = (weight * (predicted.float() - noise).square().mean((1, 2, 3))).mean()
        optimiser.zero_grad(set_to_none=False)
        loss.backward()
        _average_gradients(model, share / recipe.batch)
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        decay = min(recipe.ema, (1 + step) / (10 + step))
        torch._foreach_lerp_(average, [p.detach() for p in model.parameters()], 1 - decay)
        losses.append(float(loss.detach()))
        if rank == 0 and step % 50 == 0:
            log.info("step %d loss %.4f, %.2f s a step", step, np.mean(losses), (time.time() - began) / len(losses))
            began, losses = time.time(), []
        if rank == 0 and (step % 200 == 0 or step == recipe.steps):
            _save(state_file, model, optimiser, average, step, vocabulary)
    if world > 1:
        dist.barrier()
        dist.destroy_process_group()


def _noise(shape: torch.Size, generator: torch.Generator) -> torch.Tensor:
    """White noise and a little noise of the lowest frequencies (offset noise, Guttenberg 2023, at three scales).

    SD's schedule leaves some signal in its noisiest step: enough to read the mean colour of a picture, and of its
    halves, off pure noise. Without this a model obeys that chance colour rather than the prompt.
    """
    noise = torch.randn(shape, generator=generator)
    for side, strength in LOW_FREQUENCIES.items():
        coarse = torch.randn(*shape[:2], side, side, generator=generator)
        scale = (shape[-2] // side, shape[-1] // side)
        noise += strength * coarse.repeat_interleave(scale[0], 2).repeat_interleave(scale[1], 3)
    return noise


def _rate(step: int, recipe: Recipe) -> float:
    return min((step + 1) / recipe.warmup, 1.0, max(recipe.steps - step, 1) / max(recipe.cooldown, 1))


def _average_gradients(model: nn.Module, weight: float) -> None:
    """The mean over the whole batch; `weight` is this process's part of it."""
    if weight == 1:
        return
    gradients = [p.grad for p in model.parameters() if p.grad is not None]
    flat = torch.cat([g.flatten() for g in gradients]) * weight
    dist.all_reduce(flat)
    for gradient, piece in zip(gradients, flat.split([g.numel() for g in gradients]), strict=True):
        gradient.copy_(piece.view_as(gradient))


def _save(
    file: Path, model: Denoiser, optimiser: Any, average: list[torch.Tensor], step: int, vocabulary: np.ndarray
) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    state = {
        "model": model.state_dict(),
        "optimiser": optimiser.state_dict(),
        "average": average,
        "step": step,
        "vocabulary": torch.from_numpy(vocabulary),
    }
    torch.save(state, file.with_suffix(".new"))
    file.with_suffix(".new").replace(file)
