"""Adapter layers that keep several pairs side by side in one A and one B: experts, groups, blocks on a diagonal.

What such a layer adds to its weight is not the product of the two parameters, and one Gram matrix of them mixes pairs
that have nothing to do with each other. Each block is a pair of its own, of views.
"""

from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn


@dataclass(frozen=True)
class Block:
    """Which one of the pairs in two parameters. Those in A lie below each other.

    Kinds:
        experts: B's columns take turns, expert by expert, and W is (experts, …): peft's target_parameters.
        rows: B's rows lie below each other, and W's: loralib's MergedLinear, grouped convolutions, a block-diagonal B.
        columns: B's columns lie beside each other, and W's: a block-diagonal A.
    """

    kind: str
    index: int
    count: int

    def of_A(self, A: Tensor) -> Tensor:  # (r, n…) of (count·r, n…)
        return self._slice(A, 0)

    def of_B(self, B: Tensor) -> Tensor:  # (m, r…), a view
        if self.kind == "experts":
            return B[:, self.index :: self.count]
        return self._slice(B, 0 if self.kind == "rows" else 1)

    def of_weight(self, weight: Tensor) -> Tensor | None:
        """Its part of a frozen weight (m, n…), or None if that is not made of so many."""
        dim = 1 if self.kind == "columns" else 0
        if weight.shape[dim] % self.count or (self.kind == "experts" and weight.shape[0] != self.count):
            return None
        return self._slice(weight, dim)

    def _slice(self, tensor: Tensor, dim: int) -> Tensor:
        size = tensor.shape[dim] // self.count
        return tensor.narrow(dim, self.index * size, size)


def declared(root: nn.Module) -> dict[int, tuple[str, int]]:
    """(kind, count) by the id of A, where a layer says so of itself; rows are seen from the shapes of A and B."""
    found: dict[int, tuple[str, int]] = {}
    for module in root.modules():
        count: Any = getattr(module, "nblocks", getattr(module, "groups", 1))
        if isinstance(count, int) and count > 1:  # this module is A's, if it is any factor's
            found[id(getattr(module, "weight", None))] = ("columns", count)
        experts: Any = getattr(module, "num_experts", 1)
        adapters = getattr(module, "lora_A", None)  # a layer of the model's own may count its experts too
        if hasattr(module, "parameter_name") and isinstance(adapters, nn.ModuleDict) and experts > 1:
            found |= {id(layer.weight): ("experts", experts) for layer in adapters.values()}
    return found


def split(A: Tensor, B: Tensor, known: tuple[str, int] | None) -> list[Block] | None:
    """The blocks of two factors, none of which is the pair itself; None if they do not fit together."""
    rank_a, rank_b = A.shape[0], B.flatten(1).shape[1]
    kind, count = known or ("", 1)
    if rank_a != rank_b:
        kind, count = "rows", rank_a // rank_b
        if not count or rank_a % rank_b or B.shape[0] % count:
            return None
    if rank_a % count:
        return None
    return [Block(kind, index, count) for index in range(count)] if count > 1 else []
