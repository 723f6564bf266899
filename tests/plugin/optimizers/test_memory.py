"""What a step holds in memory beyond the base optimizer's state, counted by watching every tensor that torch makes."""

import weakref

import pytest
import torch
from torch import Tensor, nn
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise import BoundedAdamW, ScaledAdamW
from equipoise.optimizers.parts import preconditioner
from equipoise.optimizers.parts.step_hook import START


class Memory(TorchDispatchMode):
    """Bytes of the tensors that are made inside it: those alive now, and the most at any time."""

    def __init__(self):
        super().__init__()
        self.now = self.peak = 0
        self._known: dict[int, int] = {}

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        result = func(*args, **(kwargs or {}))
        given = {t.untyped_storage()._cdata for t in tree_leaves((args, kwargs)) if isinstance(t, Tensor)}
        for tensor in tree_leaves(result):
            if (
                isinstance(tensor, Tensor)
                and (key := tensor.untyped_storage()._cdata) not in given | self._known.keys()
            ):
                self._known[key] = tensor.untyped_storage().nbytes()
                self.now += self._known[key]
                self.peak = max(self.peak, self.now)
                weakref.finalize(tensor.untyped_storage(), self._free, key)
        return result

    def _free(self, key: int) -> None:
        self.now -= self._known.pop(key)


def test_the_count_counts():
    with Memory() as memory:
        kept = torch.zeros(1000)
        kept + 1
        kept.add_(1)
        del kept
    assert (memory.peak, memory.now) == (8000, 0)


def adapted(layers: int, rank: int) -> nn.ModuleDict:
    """Frozen layers with LoRA factors on them, and gradients."""
    torch.manual_seed(0)
    net = nn.ModuleDict()
    for index in range(layers):
        layer = nn.Linear(320, 320, bias=False).requires_grad_(False)
        layer.lora_A, layer.lora_B = nn.Linear(320, rank, bias=False), nn.Linear(rank, 320, bias=False)
        net[str(index)] = layer
    give_gradients(net)
    return net


def give_gradients(net: nn.Module) -> None:
    for param in net.parameters():
        if param.requires_grad:
            param.grad = torch.randn_like(param)


@pytest.mark.parametrize("rank", [4, 64])
@pytest.mark.parametrize(
    "cls, options, most", [(ScaledAdamW, {}, 0.9), (BoundedAdamW, {"trust": 0.01}, 1.9), (BoundedAdamW, {}, 2.9)]
)
def test_extra_memory_is_small_beside_the_gradients(cls, options, most, rank: int):
    """Each bound keeps a copy of the factors; beyond these, and for scaling, less than one copy of the gradients."""
    net = adapted(160, rank)
    optimizer = cls(net, lr=1e-3, **options)
    optimizer.zero_grad()
    with Memory() as memory:  # gradients are made inside it: those that a step replaces are to count as freed
        for _ in range(2):
            give_gradients(net)
            optimizer.step()
    state = [value for values in optimizer.state.values() for value in values.values()]
    names = {key for values in optimizer.state.values() for key in values}
    assert names - {START} == {"step", "exp_avg", "exp_avg_sq"}
    gradients = sum(param.grad.nbytes for param in net.parameters() if param.grad is not None)
    extra = memory.peak - gradients - sum(tensor.nbytes for tensor in state)
    assert 0 < extra < most * gradients


@pytest.mark.parametrize("rank", [4, 64])
def test_work_in_portions_changes_nothing(monkeypatch, rank: int):
    results = []
    for entries in (2**20, 3 * rank**2):  # all at once, and three matrices at a time
        monkeypatch.setattr(preconditioner, "_GRAM_ENTRIES", entries)
        net = adapted(10, rank)
        optimizer = ScaledAdamW(net, lr=10.0, trust=0.01)
        optimizer.step()
        results.append((optimizer.shares, [param.detach() for param in net.parameters()]))
    (shares, whole), (other_shares, portions) = results
    assert max(shares.values()) < 1 and shares == pytest.approx(other_shares, rel=1e-4)
    torch.testing.assert_close(whole, portions)
