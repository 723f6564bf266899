"""One step of a pipeline's own sampling, stopped where its scheduler would be given the denoiser's answer."""

# diffusers annotates too narrowly.
# pyright: reportArgumentType=false

import copy
import inspect
from collections.abc import Mapping
from typing import Any

import torch
from diffusers import FlowMatchEulerDiscreteScheduler
from torch import Tensor
from torch.nn import functional as F


class _Answered(Exception):
    """The denoiser has answered; the rest of the call is not needed."""


class _OneStep(FlowMatchEulerDiscreteScheduler):
    """Has one step, at a time of its own for each picture, and ends the call with what it is given there."""

    def __init__(self, times: Tensor):  # (batch,)
        super().__init__()
        self.own = times

    def set_timesteps(
        self,
        num_inference_steps: Any = None,
        device: Any = None,
        sigmas: Any = None,
        mu: Any = None,
        timesteps: Any = None,
    ) -> None:
        self.timesteps, self.num_inference_steps = self.own[None], 1

    def step(self, model_output: Tensor, timestep: Any, sample: Tensor, **_: Any) -> None:
        self.answer = model_output
        raise _Answered


def answer(pipeline: Any, denoiser: str, model: Any, times: Tensor, words: Mapping[str, Any]) -> Tensor:
    """What the scheduler of a pipeline would be given, of the sign and scale that it wants.

    Args:
        denoiser: The name of the pipeline's part for which `model` is called.
        times: (batch,) 0 … 1000, one for each picture.
        words: Arguments of the pipeline's call.
    """
    own = copy.copy(pipeline)  # another scheduler for this call alone
    vars(own).update({"scheduler": (scheduler := _OneStep(times)), denoiser: model})
    try:
        inspect.unwrap(type(own).__call__)(own, num_inference_steps=1, output_type="latent", **words)
    except _Answered:
        return scheduler.answer
    raise AssertionError(f"{type(pipeline).__name__} takes no step")


def pack(latents: Tensor, patch: int) -> Tensor:
    """(batch, channels, height, width) as tokens (batch, height · width / patch², channels · patch²)."""
    return F.pixel_unshuffle(latents, patch).flatten(2).mT


def unpack(made: Tensor, size: torch.Size, patch: int) -> Tensor:
    """Tokens, or pictures as videos of one frame, as latents of `size`."""
    if made.ndim == 5:
        return made.squeeze(2)
    if made.ndim == 4:
        return made
    side = 1 if made.shape[-1] == size[1] else patch
    return F.pixel_shuffle(made.mT.unflatten(2, (size[2] // side, size[3] // side)), side)
