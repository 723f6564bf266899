"""A layer's LoRA factors, and several layers' as one, for apps that have one layer where diffusers has several."""

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.errors import InputError


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's update of its weight: alpha / r · up @ down."""

    down: Tensor  # A (r, n…)
    up: Tensor  # B (m, r…)
    alpha: float
    magnitude: Tensor | None = None  # of DoRA: (m,)

    @property
    def rank(self) -> int:
        return self.down.shape[0]


def join(layers: Sequence[Factors | None], rows: Sequence[int]) -> Factors:
    """The update of a layer that has the given ones below each other; None leaves its rows as they are.

    Exact: each keeps its own columns of the joint rank, up is block-diagonal, and alpha grows as the rank does. Layers
    of different ranks or alphas are scaled to the first one's alpha / rank.
    """
    given = [layer for layer in layers if layer is not None]
    first, rank = given[0], max(layer.rank for layer in given)
    scale = first.alpha / first.rank
    down = first.down.new_zeros(rank * len(layers), *first.down.shape[1:])
    up = first.up.new_zeros(sum(rows), rank * len(layers))
    top = 0
    for place, (layer, height) in enumerate(zip(layers, rows, strict=True)):
        if layer is not None:
            start = place * rank
            own = layer.alpha / layer.rank
            down[start : start + layer.rank] = layer.down
            up[top : top + height, start : start + layer.rank] = layer.up if own == scale else layer.up * (own / scale)
        top += height
    magnitudes = [layer.magnitude.flatten() for layer in given if layer.magnitude is not None]
    if magnitudes and len(magnitudes) < len(layers):
        raise InputError(
            "--format: DoRA's sizes of only some of the layers that are one for kohya's scripts are there. Export to "
            "comfyui or diffusers, or train with all of them in lora.targets."
        )
    return Factors(down, up, scale * rank * len(layers), torch.cat(magnitudes) if magnitudes else None)


def split(whole: Factors, rows: Sequence[int]) -> list[Factors]:
    """The layers that a joint one stands for: their own columns where `join` made it, else all share its `down`."""
    ups, count = whole.up.split(list(rows)), len(rows)
    sizes = [None] * count if whole.magnitude is None else whole.magnitude.flatten().split(list(rows))
    if whole.rank % count == 0:
        rank = whole.rank // count
        blocks = [up.split(rank, dim=1) for up in ups]
        if not any(block.any() for row, up in enumerate(blocks) for column, block in enumerate(up) if row != column):
            downs = whole.down.split(rank)
            return [
                Factors(downs[row].contiguous(), blocks[row][row].contiguous(), whole.alpha / count, sizes[row])
                for row in range(count)
            ]
    return [Factors(whole.down, up.contiguous(), whole.alpha, size) for up, size in zip(ups, sizes, strict=True)]


def halves_exchanged(layer: Factors) -> Factors:
    """The update of a layer whose rows' first half is the other app's second."""
    size = None if layer.magnitude is None else exchanged(layer.magnitude)
    return Factors(layer.down, exchanged(layer.up), layer.alpha, size)


def exchanged(rows: Tensor) -> Tensor:
    """The second half of the rows before the first."""
    return torch.cat(rows.chunk(2)[::-1])
