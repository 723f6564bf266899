"""Frozen weights of a denoiser that take little memory on a device: in 8 or 4 bits, or in the computer's memory.

A linear layer that is kept away has its weight brought to the device for its product, and once more for the gradient of
what it was given; in between nothing of it stays there. The numbers are those of a layer that stays, but for rounding.
diffusers' own hooks are made for drawing: group offloading takes a block's weights away after its forward pass, LoRA
factors among them, where the backward pass still needs them; layerwise casting leaves the backward pass a copy of every
weight in the dtype of the work.
"""

# pyright: reportMissingImports=false, reportAttributeAccessIssue=false, reportIncompatibleVariableOverride=false

import re
from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.autograd.graph import save_on_cpu
from torch.nn import functional as F

from equipoise.errors import InputError
from equipoise.pipelines.training.quantized import BLOCK, keep_differentiable

FP8 = torch.float8_e4m3fn


def in_blocks(denoiser: nn.Module) -> list[nn.Linear]:
    """The linear layers of its numbered blocks, which hold nearly all of its weights."""
    return [
        layer
        for name, layer in denoiser.named_modules()
        if type(layer) is nn.Linear and any(part.isdigit() for part in name.split("."))
    ]


def some(layers: list[nn.Linear], share: float) -> list[nn.Linear]:
    """So many of them, evenly from all."""
    return [layer for index, layer in enumerate(layers) if int((index + 1) * share) > int(index * share)]


def offload(denoiser: nn.Module, share: float, device: torch.device, fp8: bool = False) -> None:
    """Leaves the weights of a share of the layers where they are; they work on a device all the same.

    Args:
        fp8: All layers' weights are kept in 8 bits; those of the other layers on the device.
    """
    layers = in_blocks(denoiser)
    away = some(layers, share)
    waiting = {id(layer) for layer in away}
    for layer in layers if fp8 else away:
        weight: Any = layer._parameters.pop("weight")
        held = Offloaded.in_fp8(weight) if fp8 else Offloaded(weight)
        if id(layer) not in waiting:
            held.weight = held.weight.to(device)
        elif device.type == "cuda":
            held.weight = held.weight.data.pin_memory()  # which is copied from while the device works
        layer.__class__ = VisitingLinear
        layer.offloaded, layer.works_on = held, device  # pyright: ignore[reportArgumentType]


def frozen_weights(denoiser: nn.Module) -> list[Tensor]:
    """All that is not tuned, in the order in which a module without weights elsewhere has its parameters."""
    found: dict[int, Tensor] = {}  # one that two layers share counts once
    for layer in denoiser.modules():
        away = [layer.offloaded.weight] if isinstance(layer, VisitingLinear) else []
        found |= {id(weight): weight for weight in (*away, *layer.parameters(recurse=False)) if id(weight) not in found}
    return [weight for weight in found.values() if not weight.requires_grad]


class Offloaded:
    """Around a weight, so that `Module.to` moves it nowhere and casts it to nothing.

    Args:
        weight: (m, n).
        scale: (m, 1), what its rows are multiplied with for use, in the dtype of use; None: as they are.
    """

    def __init__(self, weight: Tensor, scale: Tensor | None = None):
        self.weight, self.scale = weight, scale

    @classmethod
    def in_fp8(cls, weight: Tensor) -> "Offloaded":
        """Each row in units that use all of e4m3, which has few bits left for numbers as small as weights are."""
        most = torch.finfo(FP8).max
        scale = weight.detach().abs().amax(dim=1, keepdim=True) / most
        scale = scale.clamp_min(torch.finfo(weight.dtype).tiny)  # of a row of zeros
        return cls((weight.detach().float() / scale.float()).clamp(-most, most).to(FP8), scale)

    def on(self, device: torch.device) -> Tensor:
        weight = self.weight.to(device, non_blocking=True)
        return weight if self.scale is None else weight.to(self.scale.dtype) * self.scale.to(device)


class VisitingLinear(nn.Linear):
    """A frozen linear layer whose weight waits in the computer's memory, or in fewer bits."""

    offloaded: Offloaded
    works_on: torch.device

    @property
    def weight(self) -> Tensor:  # pyright: ignore[reportIncompatibleMethodOverride]
        """(m, n), on the device: for whoever asks for more than the layer's product."""
        return self.offloaded.on(self.works_on)

    def forward(self, input: Tensor) -> Tensor:
        return _Visit.apply(input, self.offloaded, self.bias)


class _Visit(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, offloaded: Offloaded, bias: Tensor | None) -> Tensor:
        ctx.offloaded = offloaded
        return F.linear(x, offloaded.on(x.device), bias)

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        (grad,) = grads
        return grad @ ctx.offloaded.on(grad.device).to(grad.dtype), None, None


class ActivationsAway(save_on_cpu):
    """In the block, what autograd keeps for the backward pass waits in the computer's memory, but for weights, which
    are on the device in any case. With gradient checkpointing these are the inputs of blocks."""

    def __init__(self, weights: Iterable[Tensor], device: torch.device):
        super().__init__(pin_memory=device.type == "cuda")
        own = {weight.untyped_storage()._cdata for weight in weights}
        away, back = self.pack_hook, self.unpack_hook
        self.pack_hook = lambda tensor: tensor if tensor.untyped_storage()._cdata in own else away(tensor)
        self.unpack_hook = lambda kept: kept if isinstance(kept, Tensor) else back(kept)


def blocks(denoiser: nn.Module) -> int:
    """How many numbered blocks with linear layers it has, those within others not counted."""
    names = {name for name, layer in denoiser.named_modules() if isinstance(layer, nn.Linear)}
    return len({found[0] for name in names if (found := re.match(r"(?:.*?\.)?\d+\.", name))})


def hold_in_nf4(denoiser: Any, dtype: torch.dtype, device: torch.device) -> None:
    """Puts a denoiser's linear layers into 4 bits by bitsandbytes, where diffusers does not for want of a GPU. Those
    whose rows are no whole blocks stay, for bitsandbytes 0.50 reads them wrongly on a CPU.

    Raises:
        InputError: There is no such layer.
    """
    from bitsandbytes.nn import Linear4bit, Params4bit

    chosen = [
        (name, layer)
        for name, layer in denoiser.named_modules()
        if type(layer) is nn.Linear and layer.in_features % BLOCK == 0
    ]
    if not chosen:
        raise InputError("model.quantize: the denoiser has no linear layer to hold in nf4 on a CPU. Leave it out.")
    for name, layer in chosen:
        with torch.device("meta"):
            made = Linear4bit(
                layer.in_features, layer.out_features, layer.bias is not None, compute_dtype=dtype, quant_type="nf4"
            )
        made.weight = Params4bit(layer.weight.data, requires_grad=False, quant_type="nf4", compress_statistics=False)
        made.bias = layer.bias
        above, _, own = name.rpartition(".")
        setattr(denoiser.get_submodule(above), own, made.to(device))
    denoiser.is_loaded_in_4bit = True  # by which peft knows what to put around a layer
    keep_differentiable(denoiser)
