"""How well a step is directed: its gradient correlation and its directional sharpness.

Paper: Chang, Li & Yuan, AlphaAdam, 2025, eq. 2 and 3, after Pan, 2023: with Δθ = θ − θ₊, GC = Δθᵀ∇L(θ) and
DS = Δθᵀ∇²L(θ)Δθ, so that by eq. 1 the step lowers the loss by GC − DS/2, but for terms of third order.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable
from torch.nn.attention import SDPBackend, sdpa_kernel
from torch.optim import Optimizer

from equipoise.errors import InputError

_ONCE = once_differentiable(lambda ctx: None).__code__  # of every backward pass that it decorates


class Direction(NamedTuple):
    """Of one step, over all parameters that moved."""

    correlation: float  # GC
    sharpness: float  # DS

    @property
    def gain(self) -> float:
        """By how much the step lowers the loss, to second order."""
        return self.correlation - self.sharpness / 2


def measure_step(
    optimizer: Optimizer, loss: Callable[[], Tensor], closure: Callable[[], Any] | None = None
) -> Direction:
    """Take a step of any optimizer, and measure it by the exact Hessian where it began.

    Gradients that are there are what the optimizer steps with, as ever. Then the parameters go back for one more
    evaluation of the loss and two backward passes, whose gradients touch no `.grad`, and forth again, to the bit.

    Args:
        optimizer: Its step is taken; weight decay and compensation belong to Δθ.
        loss: Evaluates the loss that the step is measured by, without calling backward. It is called once. The batch
            that the gradients are of is the paper's reading; a held-out one tells of more.
        closure: For `optimizer.step`, where that takes one.

    Returns:
        GC and DS.

    Raises:
        InputError: the loss depends on no parameter that the step moved, or goes through an autograd function that is
            differentiated only once.

    Example:
        >>> weight = torch.nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64))
        >>> loss = lambda: (torch.tensor([1.0, 3.0]) * weight.square()).sum() / 2
        >>> loss().backward()
        >>> found = measure_step(torch.optim.SGD([weight], lr=0.5), loss)  # Δθ = (0.5, 3)
        >>> print(found.correlation, found.sharpness, found.gain, 6.5 - loss().item())
        18.5 27.25 4.875 4.875
    """
    params = [param for group in optimizer.param_groups for param in group["params"]]
    before = [param.detach().clone() for param in params]
    optimizer.step(closure)  # type: ignore[arg-type]
    after = [param.detach().clone() for param in params]
    moved = [i for i, (old, new) in enumerate(zip(before, after, strict=True)) if not torch.equal(old, new)]
    _put(params, before)
    try:
        return _direction([params[i] for i in moved], [before[i] - after[i] for i in moved], loss)
    finally:
        _put(params, after)


def _direction(params: list[Tensor], changes: list[Tensor], loss: Callable[[], Tensor]) -> Direction:
    with torch.enable_grad(), sdpa_kernel(SDPBackend.MATH):  # the fused kernels have no second derivative
        value = loss()
        _refuse_once_differentiable(value)
        grads = torch.autograd.grad(value, params, create_graph=True, allow_unused=True) if params else ()
        pairs = [(g, change) for g, change in zip(grads, changes, strict=True) if g is not None]
        if not pairs:
            raise InputError(
                "measure_step: the loss depends on no parameter that the step moved. Give the loss of the trained "
                "model, and call backward before."
            )
        along = torch.stack([(g * change).sum().double() for g, change in pairs]).sum()
        if not along.requires_grad:  # the loss is linear in them
            return Direction(along.item(), 0.0)
        curved = torch.autograd.grad(along, params, allow_unused=True)
    products = [(h.double() * d).sum() for h, d in zip(curved, changes, strict=True) if h is not None]
    return Direction(along.item(), float(sum(products)))


def _refuse_once_differentiable(value: Tensor) -> None:
    """Autograd loses second derivatives through such functions without an error."""
    waiting, seen = [value.grad_fn], set()
    while waiting:
        node = waiting.pop()
        if node is None or node in seen:
            continue
        seen.add(node)
        own = getattr(node, "_forward_cls", None)  # of functions written in Python
        if own and getattr(own.backward, "__code__", None) is _ONCE:
            raise InputError(
                f"measure_step: the loss goes through {own.__name__}, which is differentiated only once, so that its "
                "sharpness would be wrong. Use the layer without that function, or give it a backward pass without "
                "@once_differentiable."
            )
        waiting += [before for before, _ in node.next_functions]


@torch.no_grad()
def _put(params: list[Tensor], values: list[Tensor]) -> None:
    for param, value in zip(params, values, strict=True):
        param.copy_(value)
