"""AMSGrad as AdaSAM's Algorithm 1 has it: the base of `AdaSAM`.

Method: AMSGrad. Papers: Reddi et al., On the Convergence of Adam and Beyond, 2018, Algorithm 2, and Sun et al., AdaSAM,
arXiv 2303.00565, 2023, Algorithm 1, lines 6 to 10.
torch.optim.Adam(amsgrad=True) differs: it corrects m and v for their start at zero, adds eps to √v̂, and starts v̂ at 0.
"""

import math
from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from equipoise.errors import InputError


class AMSGrad(Optimizer):
    """AMSGrad without bias correction, v̂ starting at ε².

    The update: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², v̂ ← max(v̂, v), x ← x − lr·m/√v̂.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate. (>= 0)
        betas: Decay of the running means of the gradient and of its square. (0 <= x < 1)
        eps: Where √v̂ starts, and so its least value. (> 0)
        weight_decay: Decoupled weight decay. (>= 0)
        maximize: Maximise the objective instead of minimising it.

    Raises:
        InputError: An option is out of bounds.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        maximize: bool = False,
    ) -> None:
        defaults = {"lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "maximize": maximize}
        super().__init__(params, defaults)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        group, where = self.param_groups[-1], f"{type(self).__name__}: parameter group {len(self.param_groups) - 1}"
        for name in ("lr", "weight_decay"):
            if not 0 <= group[name] < math.inf:
                raise InputError(f"{where}: {name} must be a finite number, 0 or more; got {group[name]!r}.")
        if not 0 < group["eps"] < math.inf:  # 0/0 where there was no gradient yet
            raise InputError(f"{where}: eps must be a finite number above 0; got {group['eps']!r}. Try 1e-8.")
        if len(group["betas"]) != 2 or not all(0 <= beta < 1 for beta in group["betas"]):
            raise InputError(f"{where}: betas must be two numbers, each 0 <= beta < 1; got {group['betas']!r}.")

    def __setstate__(self, state: dict[str, Any]) -> None:
        super().__setstate__(state)
        for group in self.param_groups:  # a state saved by another optimizer lacks some
            for name in ("weight_decay", "maximize"):
                group.setdefault(name, self.defaults[name])

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            if params:
                self._update(params, group)
        return loss

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if not self.state[param]:
                # where the dtype cannot hold ε² (float16), its smallest normal number
                least = max(group["eps"] ** 2, torch.finfo(param.dtype).tiny)
                zeros = [torch.zeros_like(param, memory_format=torch.preserve_format) for _ in range(3)]
                zeros[2] += complex(least, least) if param.is_complex() else least
                self.state[param] = dict(zip(("exp_avg", "exp_avg_sq", "max_exp_avg_sq"), zeros, strict=True))
        (beta1, beta2), lr = group["betas"], float(group["lr"])
        x, g = [_real(param) for param in params], [_real(param.grad) for param in params]
        m, v, v_hat = (
            [_real(self.state[param][name]) for param in params] for name in ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")
        )
        torch._foreach_mul_(x, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        torch._foreach_maximum_(v_hat, v)
        torch._foreach_addcdiv_(x, m, torch._foreach_sqrt(v_hat), lr if group["maximize"] else -lr)


def _real(tensor: Any) -> Tensor:
    """A complex tensor as pairs of real numbers, as torch's optimizers treat it."""
    return torch.view_as_real(tensor) if tensor.is_complex() else tensor
