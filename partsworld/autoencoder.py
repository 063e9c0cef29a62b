"""The demo model's VAE: a linear encoder and a trained decoder, both in the shape of ComfyUI's TAESD.

The decoder is trained narrow (`WIDTHS` channels per resolution) and then written into TAESD's 64-channel layers with
zeros elsewhere: the same function at a quarter of the training cost. ReLU of a non-negative number is that number, so
the encoder's linear patch projection fits into TAESD's layers exactly.
"""

from __future__ import annotations

import itertools
import logging
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from . import architecture, dataset
from .render import render

log = logging.getLogger(__name__)

WIDTHS = (64, 48, 32, 16)
"""Channels at 1/8, 1/4, 1/2 and full resolution."""

_FULL = 64
_CELLS = 32  # latent cells a side of a picture
_CROP = 12  # … and of a training crop
_MARGIN = 16  # pixels


class _Block(nn.Module):
    def __init__(self, width: int) -> None:
        super().__init__()
        convs = [nn.Conv2d(width, width, 3, padding=1) for _ in range(3)]
        self.conv = nn.Sequential(convs[0], nn.ReLU(), convs[1], nn.ReLU(), convs[2])
        for parameter in convs[2].parameters():
            nn.init.zeros_(parameter)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return F.relu(self.conv(x) + x)


class _Clamp(nn.Module):
    def forward(self, x: torch.Tensor) -> torch.Tensor:
        return torch.tanh(x / 3) * 3


def decoder() -> nn.Sequential:
    """TAESD's decoder with `WIDTHS` channels; the same layers under the same names."""
    layers: list[nn.Module] = [_Clamp(), nn.Conv2d(4, WIDTHS[0], 3, padding=1), nn.ReLU()]
    for coarse, fine in itertools.pairwise(WIDTHS):
        layers += [_Block(coarse) for _ in range(3)]
        layers += [nn.Upsample(scale_factor=2), nn.Conv2d(coarse, fine, 3, padding=1, bias=False)]
    return nn.Sequential(*layers, _Block(WIDTHS[-1]), nn.Conv2d(WIDTHS[-1], 3, 3, padding=1))


def train_decoder(data: Path, out: Path, steps: int, batch: int = 16, rate: float = 2e-3, seed: int = 0) -> None:
    """Train on crops of scenes drawn as it goes; writes `out`/decoder.pt. Resumable every 500 steps."""
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    torch.manual_seed(seed)
    model = decoder().to(device)
    optimiser = torch.optim.AdamW(model.parameters(), lr=rate, betas=(0.9, 0.99), weight_decay=1e-4)
    step, file = 0, out / "decoder.pt"
    if file.exists():
        state = torch.load(file, map_location=device, weights_only=True)
        model.load_state_dict(state["model"])
        optimiser.load_state_dict(state["optimiser"])
        step = state["step"]
    projection = np.load(data / "projection.npz")
    crops = _crops(projection["weight"], projection["bias"], step, batch)
    losses = []
    while step < steps:
        for group in optimiser.param_groups:
            group["lr"] = rate * min((step + 1) / 100, 1, 0.02 + 0.98 * (1 - step / steps))
        latent, image, counted = (array.to(device) for array in next(crops))
        generator = torch.Generator().manual_seed(step)
        level = 0.12 * torch.rand(len(latent), 1, 1, 1, generator=generator)
        noisy = latent + (level * torch.randn(latent.shape, generator=generator)).to(device)
        with torch.autocast(device.type, torch.bfloat16):
            decoded = model(noisy).float()
        error = (decoded - image).movedim(1, -1)[counted]
        loss = error.square().mean() + 0.1 * error.abs().mean()
        optimiser.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 1.0)
        optimiser.step()
        step += 1
        losses.append(float(error.detach().square().mean()))
        if step % 100 == 0:
            log.info("decoder step %d: %.2f dB", step, -10 * np.log10(np.mean(losses)))
            losses = []
        if step % 500 == 0 or step == steps:
            out.mkdir(parents=True, exist_ok=True)
            torch.save({"model": model.state_dict(), "optimiser": optimiser.state_dict(), "step": step}, file)


def _crops(weight: np.ndarray, bias: np.ndarray, start: int, batch: int) -> Iterator[tuple[torch.Tensor, ...]]:
    """Batches of (latent [b, 4, c, c], picture [b, 3, 8c, 8c], counted pixels [b, 8c, 8c]); four crops of each scene.

    A crop's own border lacks its neighbours and does not count, unless it is the picture's border, where the decoder
    will always lack them: one crop in five touches it, at each side.
    """
    step = start
    while True:
        rng = np.random.default_rng((step, 11))
        latents, images, counted = [], [], []
        for i in range(batch // 4):
            scene, _ = dataset.training_scene(step * (batch // 4) + i)
            picture = render(scene).image
            latent = dataset.encode(picture, weight, bias)
            for y, x in rng.integers(-5, _CELLS - _CROP + 6, (4, 2)).clip(0, _CELLS - _CROP):
                latents.append(latent[:, y : y + _CROP, x : x + _CROP])
                images.append(picture[8 * y : 8 * (y + _CROP), 8 * x : 8 * (x + _CROP)].transpose(2, 0, 1))
                counted.append(_counted(y, x))
        yield tuple(torch.from_numpy(np.stack(arrays)) for arrays in (latents, images, counted))
        step += 1


def _counted(y: int, x: int) -> np.ndarray:
    """[8c, 8c] bool: the pixels of the crop at cell (y, x) that are decoded as in the whole picture."""
    rows, columns = (_counted_along(at) for at in (y, x))
    return rows[:, None] & columns[None, :]


def _counted_along(at: int) -> np.ndarray:
    line = np.ones(8 * _CROP, bool)
    line[: 0 if at == 0 else _MARGIN] = False
    line[8 * _CROP if at == _CELLS - _CROP else -_MARGIN :] = False
    return line


def export(data: Path, trained: Path) -> dict[str, torch.Tensor]:
    """The VAE as ComfyUI loads it: TAESD's state dict, float32."""
    projection = np.load(data / "projection.npz")
    narrow = torch.load(trained / "decoder.pt", map_location="cpu", weights_only=True)["model"]
    weights = {f"taesd_decoder.{name}": tensor for name, tensor in _widen(narrow).items()}
    linear = linear_encoder(torch.from_numpy(projection["weight"]), torch.from_numpy(projection["bias"]))
    weights |= {f"taesd_encoder.{name}": tensor for name, tensor in linear.items()}
    weights["vae_scale"] = torch.tensor(architecture.LATENT_SCALE)
    weights["vae_shift"] = torch.tensor(0.0)
    return weights


def _widen(narrow: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Every layer padded with zeros to 64 channels, but for the latent's 4 and the picture's 3."""
    first, last = "1.", "19."
    wide = {}
    for name, tensor in narrow.items():
        out_channels = 3 if name.startswith(last) else _FULL
        shape: tuple[int, ...] = (out_channels,)
        if tensor.ndim == 4:
            shape = (out_channels, 4 if name.startswith(first) else _FULL, 3, 3)
        wide[name] = torch.zeros(shape)
        wide[name][tuple(slice(0, n) for n in tensor.shape)] = tensor
    return wide


def linear_encoder(weight: torch.Tensor, bias: torch.Tensor) -> dict[str, torch.Tensor]:
    """TAESD encoder weights that compute, per 8×8 patch of a picture in 0…1, `weight` [4, 192] · patch + `bias`.

    Three strided convolutions move the pixels of each 2×2 square into channels; the last one projects, keeping the
    positive and the negative part apart because a ReLU follows.
    """
    layers: dict[str, torch.Tensor] = {}
    for block in (1, 3, 4, 5, 7, 8, 9, 11, 12, 13):  # a residual block of zeros: x + 0
        for conv in (0, 2, 4):
            layers[f"{block}.conv.{conv}.weight"] = torch.zeros(_FULL, _FULL, 3, 3)
            layers[f"{block}.conv.{conv}.bias"] = torch.zeros(_FULL)
    layers["0.weight"] = torch.zeros(_FULL, 3, 3, 3)
    layers["0.weight"][torch.arange(3), torch.arange(3), 1, 1] = 1
    layers["0.bias"] = torch.zeros(_FULL)
    for name, channels in (("2.weight", 3), ("6.weight", 12)):
        layers[name] = torch.zeros(_FULL, _FULL, 3, 3)
        for dy in (0, 1):
            for dx in (0, 1):
                square = (dy * 2 + dx) * channels + torch.arange(channels)
                layers[name][square, torch.arange(channels), 1 + dy, 1 + dx] = 1
    # channel of a 4×4 square's pixel: ((dy2·2 + dx2)·12 + (dy1·2 + dx1)·3 + c), at y = 2·dy2 + dy1
    patch = weight.reshape(4, 2, 2, 2, 2, 2, 2, 3)  # [out, dy3, dy2, dy1, dx3, dx2, dx1, c]
    kernel = patch.permute(1, 4, 0, 2, 5, 3, 6, 7).reshape(2, 2, 4, 48)
    layers["10.weight"] = torch.zeros(_FULL, _FULL, 3, 3)
    for dy in (0, 1):
        for dx in (0, 1):
            layers["10.weight"][0:4, :48, 1 + dy, 1 + dx] = kernel[dy, dx]
            layers["10.weight"][4:8, :48, 1 + dy, 1 + dx] = -kernel[dy, dx]
    layers["14.weight"] = torch.zeros(4, _FULL, 3, 3)
    layers["14.weight"][torch.arange(4), torch.arange(4), 1, 1] = 1
    layers["14.weight"][torch.arange(4), torch.arange(4, 8), 1, 1] = -1
    layers["14.bias"] = bias
    return layers
