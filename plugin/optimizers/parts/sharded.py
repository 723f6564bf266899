"""LoRA factors that FSDP2 shards over processes (DTensors): gathered for the r×r arithmetic, and sharded again.

A Gram matrix mixes all rows of a factor, and a shard has some of them. So every process gathers the factors, and works
out the same; what it writes back are its own rows. That takes an all-gather of each factor and of each gradient
in a step, and two more of each factor for the bound.
"""

from collections.abc import Iterable

import torch
from torch import Tensor

from equipoise.lora.pairs import is_dtensor


class FullFactors:
    """Full copies of those of `factors` that are sharded over processes; the others are their own."""

    def __init__(self, factors: Iterable[Tensor]):
        sharded = {id(factor): factor for factor in factors if is_dtensor(factor)}
        self._copies = [(f, torch.empty(f.shape, dtype=f.dtype, device=f.device)) for f in sharded.values()]
        self._full = {id(factor): copy for factor, copy in self._copies}

    def __bool__(self) -> bool:
        return bool(self._copies)

    def full(self, factor: Tensor) -> Tensor:
        return self._full.get(id(factor), factor)

    @torch.no_grad()
    def gather(self) -> None:
        """Brings the copies up to date."""
        for factor, copy in self._copies:
            copy.copy_(factor.detach().full_tensor())  # type: ignore[attr-defined]

    @torch.no_grad()
    def gather_grads(self) -> None:
        for factor, copy in self._copies:
            copy.grad = None if factor.grad is None else factor.grad.full_tensor()  # type: ignore[attr-defined]

    @torch.no_grad()
    def scatter(self) -> None:
        """Writes the copies into the factors."""
        for factor, copy in self._copies:
            factor.copy_(shard(copy, factor))

    @torch.no_grad()
    def scatter_grads(self) -> None:
        for factor, copy in self._copies:
            if factor.grad is not None and copy.grad is not None:
                factor.grad = shard(copy.grad, factor.grad)
            copy.grad = None


def full(tensor: Tensor) -> Tensor:
    """A tensor put together, where it is sharded."""
    return tensor.full_tensor() if is_dtensor(tensor) else tensor  # type: ignore[attr-defined]


def shard(copy: Tensor, like: Tensor) -> Tensor:
    """A tensor that all processes have, sharded as another is: each keeps its part, and none is sent."""
    from torch.distributed.tensor import DTensor, Replicate

    mesh = like.device_mesh  # type: ignore[attr-defined]
    everywhere = DTensor.from_local(copy, mesh, [Replicate()] * mesh.ndim, run_check=False)
    return everywhere.redistribute(mesh, like.placements)  # type: ignore[attr-defined]
