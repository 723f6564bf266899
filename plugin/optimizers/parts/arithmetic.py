"""Tensors of AlphaAdam, AMSGrad and the sharpness-aware classes: float32 in between, rates, batches."""

from collections.abc import Iterable
from typing import Any

import torch
from torch import Tensor

from equipoise.optimizers.parts.preconditioner import chunk_entries

Tensors = list[Tensor] | tuple[Tensor, ...]


def real(tensor: Any) -> Tensor:
    """A complex tensor as pairs of real numbers, as torch's optimizers treat it."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor


def widen(tensor: Tensor) -> Tensor:
    return tensor.float() if tensor.element_size() < 4 else tensor


def widen_all(tensors: Tensors) -> Tensors:  # of one dtype
    if tensors[0].element_size() >= 4:
        return tensors
    wide = [torch.empty_like(tensor, dtype=torch.float32) for tensor in tensors]
    torch._foreach_copy_(wide, tensors)
    return wide


def narrow(wide: Tensors, stored: Tensors) -> None:
    if wide is not stored:
        torch._foreach_copy_(stored, wide)


def rate(group: dict[str, Any]) -> Any:
    """The learning rate: a number, unless it is on a device, where reading it would wait."""
    lr = group["lr"]
    return float(lr) if isinstance(lr, Tensor) and lr.device.type == "cpu" else lr


def batches(params: Tensors, counts: Iterable[float], rows: int = 1) -> list[list[int]]:
    """Indices of the tensors that share device, dtype and step count, as many as `rows` work buffers hold at a time."""
    found: list[list[int]] = []
    current: dict[Any, tuple[list[int], int]] = {}
    for index, (param, count) in enumerate(zip(params, counts, strict=True)):
        kind = (param.device, param.dtype, count)
        batch, filled = current.get(kind, ([], 0))
        if not batch or filled + param.numel() > rows * chunk_entries(param.device):
            batch, filled = [], 0
            found.append(batch)
        batch.append(index)
        current[kind] = batch, filled + param.numel()
    return found
