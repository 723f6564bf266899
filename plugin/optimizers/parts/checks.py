"""Options in parameter groups: what they must be, and what a state that another class saved lacks."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from equipoise.errors import InputError


def group_label(optimizer: Optimizer, index: int) -> str:
    return f"{type(optimizer).__name__}: parameter group {index}"


def loss_of(optimizer: Optimizer, closure: Any) -> Any:
    """What the closure of `step(closure)` returns, evaluated with gradients; None without one.

    Raises:
        InputError: it is no function, or returns no loss.
    """
    if closure is None:
        return None
    if not callable(closure):
        raise InputError(
            f"{type(optimizer).__name__}: step() takes a function that clears the gradients, calls backward() and "
            f"returns the loss; got {type(closure).__name__}."
        )
    with torch.enable_grad():
        loss = closure()
    if loss is None:
        raise InputError(f"{type(optimizer).__name__}: the closure returned None. Let it return the loss.")
    return loss


def check_dense(optimizer: Optimizer) -> None:
    """Raises InputError if a gradient is sparse."""
    for group in optimizer.param_groups:
        if any(param.grad is not None and param.grad.layout is not torch.strided for param in group["params"]):
            raise InputError(
                f"{type(optimizer).__name__}: a gradient is sparse. Make it dense (sparse=False of nn.Embedding)."
            )


def is_number(value: Any) -> bool:
    """Whether it is a finite plain number: others load saved options with `weights_only=True`."""
    return isinstance(value, int | float) and not isinstance(value, bool) and math.isfinite(value)


def check_adam(where: str, group: Mapping[str, Any], closed: bool = False) -> None:
    """Check the options that every Adam has, apart from eps; `closed`: the second beta may be 1.

    Raises:
        InputError: The first that is out of bounds: where, what was got.
    """
    rate = group["lr"]
    if isinstance(rate, Tensor):
        if rate.dim() or rate.is_complex():
            raise InputError(
                f"{where}: lr must be a finite number, or a real tensor without dimensions; got one of shape "
                f"{tuple(rate.shape)} and {rate.dtype}. Give lr.item()."
            )
        rate = rate.item() if rate.device.type == "cpu" else 0.0  # reading it would wait for the device
    for name, value in (("lr", rate), ("weight_decay", group["weight_decay"])):
        check_not_negative(where, name, value)
    betas = group["betas"]
    if not (isinstance(betas, tuple | list) and len(betas) == 2 and all(is_number(b) and 0 <= b <= 1 for b in betas)):
        raise InputError(f"{where}: betas must be two numbers, each 0 or more and below 1; got {betas!r}.")
    if betas[0] == 1 or (betas[1] == 1 and not closed):
        alone = "; the second alone may be 1" if closed else ""
        raise InputError(f"{where}: betas must be two numbers, each 0 or more and below 1{alone}; got {betas!r}.")
    check_switches(where, group, "maximize")


def check_not_negative(where: str, name: str, value: Any, advice: str = "") -> None:
    if not (is_number(value) and value >= 0):
        raise InputError(f"{where}: {name} must be a finite number, 0 or more; got {value!r}.{advice}")


def check_switches(where: str, group: Mapping[str, Any], *names: str) -> None:
    for name in names:
        if not isinstance(group[name], bool):
            raise InputError(f"{where}: {name} must be True or False; got {group[name]!r}.")


def fill_options(
    optimizer: Optimizer,
    before: Sequence[Mapping[str, Any]],  # the groups until a state was loaded; none in a copy
    names: Mapping[str, Any],  # with the values where neither group nor defaults have one
) -> None:
    """Give groups from a state that another class saved what they lack: each its own value from before."""
    for index, group in enumerate(optimizer.param_groups):
        own = before[index] if index < len(before) else {}
        for name, value in names.items():
            group.setdefault(name, own.get(name, optimizer.defaults.get(name, value)))
