"""Latents of every class of autoencoders, as denoisers are trained on them: (batch, channels, height, width), scaled.

Most have a scaling and a shift. Qwen-Image's takes pictures as videos of one frame, and has a mean and a deviation of
each channel; FLUX.2's latents go in fours and through a batch norm; Sana's (DC-AE) gives no distribution.
"""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F


def encode(vae: Any, picture: Tensor) -> tuple[Tensor, Tensor]:
    """The mean and deviation of pictures' latents, of pixels (batch, 3, height, width) in −1 … 1."""
    frames = _reads_frames(vae)
    made = vae.encode(picture.unsqueeze(2) if frames else picture)
    if hasattr(made, "latent_dist"):
        mean, deviation = made.latent_dist.mean, made.latent_dist.std
    else:
        mean, deviation = made.latent, torch.zeros_like(made.latent)
    if frames:
        mean, deviation = mean.squeeze(2), deviation.squeeze(2)
    elif hasattr(vae, "bn"):
        mean, deviation = F.pixel_unshuffle(mean, 2), F.pixel_unshuffle(deviation, 2)
    shift, scale = _scaling(vae)
    return (mean - shift) * scale, deviation * scale


def decode(vae: Any, latents: Tensor) -> Tensor:
    """Pixels (batch, 3, height, width), −1 … 1 but for rounding."""
    shift, scale = _scaling(vae)
    latents = latents.to(vae.dtype) / scale + shift
    if _reads_frames(vae):
        return vae.decode(latents.unsqueeze(2)).sample.squeeze(2)
    return vae.decode(F.pixel_shuffle(latents, 2) if hasattr(vae, "bn") else latents).sample


def shape(vae: Any, height: int, width: int) -> tuple[int, int, int]:
    """(channels, height, width) of the latents of a picture of so many pixels."""
    config, cells = vae.config, cell(vae)
    channels = config.get("latent_channels") or config["z_dim"]
    return (4 * channels if hasattr(vae, "bn") else channels), height // cells, width // cells


def cell(vae: Any) -> int:
    """Pixels to a side of a latent."""
    return factor(vae.config) * (2 if hasattr(vae, "bn") else 1)


def factor(config: Mapping[str, Any]) -> int:
    """Pixels to a side of what the autoencoder itself gives."""
    if "temperal_downsample" in config:
        return 2 ** len(config["temperal_downsample"])
    return 2 ** (len(config.get("encoder_block_out_channels") or config["block_out_channels"]) - 1)


def _reads_frames(vae: Any) -> bool:
    return "temperal_downsample" in vae.config


def _scaling(vae: Any) -> tuple[Any, Any]:
    """Shift and scale, numbers or (1, channels, 1, 1)."""
    config = vae.config
    if hasattr(vae, "bn"):
        mean, variance = (tensor.view(1, -1, 1, 1) for tensor in (vae.bn.running_mean, vae.bn.running_var))
        return mean, 1 / torch.sqrt(variance + config.batch_norm_eps)
    if _reads_frames(vae):
        mean, deviation = (
            torch.tensor(config[key], device=vae.device).view(1, -1, 1, 1) for key in ("latents_mean", "latents_std")
        )
        return mean, 1 / deviation
    return config.get("shift_factor") or 0.0, config.scaling_factor
