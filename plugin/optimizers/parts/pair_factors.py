"""Pairs' factors as the r×r arithmetic takes them: whole where they are sharded, a view where a pair is a block."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.lora.pairs import Pair
from equipoise.optimizers.parts.sharded import FullFactors


class PairFactors:
    """What stands for each factor of `pairs`, kept in step with the parameters and with their gradients."""

    def __init__(self, pairs: Sequence[Pair]):
        self._full = FullFactors(factor for pair in pairs for factor in (pair.A, pair.B))
        self._views: list[tuple[Pair, int, Tensor, Tensor]] = []  # pair, side, what it is a view of, the view
        self._of: dict[int, list[Tensor]] = {id(pair): [] for pair in pairs}
        self._origins: list[tuple[int, torch.dtype]] = []  # where the parameters of the views lay, when last looked
        self._owner: dict[int, tuple[Pair, int]] = {}  # pair and side by the id of what stands for the factor
        for pair in pairs:
            for side, factor in enumerate((pair.A, pair.B)):
                part = whole = self._full.full(factor)
                if pair.block is not None:
                    part = pair.part(side, whole.detach())
                    self._views.append((pair, side, whole, part))
                self._of[id(pair)].append(part)
                self._owner[id(part)] = (pair, side)

    @property
    def sharded(self) -> bool:
        """Whether any is sharded over processes."""
        return bool(self._full)

    def of(self, pair: Pair) -> tuple[Tensor, Tensor]:
        A, B = self._of[id(pair)]
        return A, B

    def parameter(self, factor: Tensor) -> Tensor:
        """The parameter that `factor` stands for, or for a part of which."""
        pair, side = self._owner[id(factor)]
        return pair.B if side else pair.A

    def part(self, factor: Tensor, tensor: Tensor) -> Tensor:
        """What `factor` is of its parameter, of another tensor of the parameter's shape."""
        pair, side = self._owner[id(factor)]
        return pair.part(side, tensor)

    @torch.no_grad()
    def gather(self) -> None:
        """Bring them up to date: sharded ones change, and other programs put new storage behind a parameter."""
        self._full.gather()
        origins = [(whole.data_ptr(), whole.dtype) for _, _, whole, _ in self._views]
        if origins != self._origins:
            for pair, side, whole, part in self._views:
                part.data = pair.part(side, whole.detach())
            self._origins = origins

    @torch.no_grad()
    def gather_grads(self) -> None:
        self._full.gather_grads()
        for pair, side, whole, part in self._views:
            part.grad = None if whole.grad is None else pair.part(side, whole.grad)

    @torch.no_grad()
    def scatter(self) -> None:
        """Write the full copies into the shards; views are the parameters' own."""
        self._full.scatter()

    @torch.no_grad()
    def scatter_grads(self) -> None:
        for pair, side, whole, part in self._views:
            if whole.grad is not None and part.grad is not None:
                grad = pair.part(side, whole.grad)
                if grad.data_ptr() != part.grad.data_ptr():  # the scaled one may be a new tensor
                    grad.copy_(part.grad)
            part.grad = None
        self._full.scatter_grads()
