"""AMSGrad as AdaSAM's Algorithm 1 has it: the base of `AdaSAM`.

Method: AMSGrad. Papers: Reddi et al., On the Convergence of Adam and Beyond, 2018, Algorithm 2, and Sun et al., AdaSAM,
arXiv 2303.00565, 2023, Algorithm 1, lines 6 to 10.
torch.optim.Adam(amsgrad=True) differs: it corrects m and v for their start at zero, adds eps to √v̂, and starts v̂ at 0.
"""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor
from torch.optim import Optimizer

from equipoise.errors import InputError
from equipoise.optimizers.parts.arithmetic import batches, narrow, rate, real, widen_all
from equipoise.optimizers.parts.checks import (
    check_adam,
    check_dense,
    check_not_negative,
    fill_options,
    group_label,
    is_number,
    loss_of,
)

_MOMENTS = ("exp_avg", "exp_avg_sq", "max_exp_avg_sq")  # m, v and v̂, by torch's names


class AMSGrad(Optimizer):
    """AMSGrad without bias correction, v̂ starting at ε².

    The update: m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g², v̂ ← max(v̂, v), x ← x − lr·m/√v̂.

    Args:
        params: Parameters, named parameters or parameter groups.
        lr: Learning rate, a number or a tensor without dimensions. (>= 0)
        betas: Decay of the running means of the gradient and of its square. A second one of 1 leaves √v̂ at eps: SGD
            with a rate of lr/eps. (0 <= x <= 1)
        eps: Where √v̂ starts, and so its least value. (> 0)
        weight_decay: Decoupled weight decay. (>= 0)
        penalty: λ of AdaSAM's eq. 3: the objective gets λ‖x‖², whose gradient 2λx at x enters the moments. (>= 0)
        maximize: Maximise the objective instead of minimising it.

    For float16 and bfloat16 the arithmetic is float32, but what is stored between steps has the parameter's dtype, and
    rounds: the parameter; m; v, which in bfloat16 stops at a quarter of a constant g² at the default β₂, for what a
    step adds is then less than half its last digit, so that x moves twice as far; and v̂, whose least value in float16
    is 6·10⁻⁵, so that gradients much below √v̂ = 0.008 hardly move anything. Adam's checkpoints load; v̂ then starts at
    the greater of v and ε², or where amsgrad=True had it.

    Raises:
        InputError: An option is out of bounds.
    """

    def __init__(
        self,
        params: Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        maximize: bool = False,
    ) -> None:
        super().__init__(params, {
            "lr": lr, "betas": betas, "eps": eps, "weight_decay": weight_decay, "penalty": penalty,
            "maximize": maximize,
        })  # fmt: skip

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)
        try:
            self._check(len(self.param_groups) - 1)
        except InputError:
            del self.param_groups[-1]
            raise

    def _check(self, index: int) -> None:
        group, where = self.param_groups[index], group_label(self, index)
        check_adam(where, group, closed=True)
        check_not_negative(where, "penalty", group["penalty"])
        if not (is_number(group["eps"]) and group["eps"] > 0):  # 0/0 where there was no gradient yet
            raise InputError(f"{where}: eps must be a finite number above 0; got {group['eps']!r}. Try 1e-8.")

    def __setstate__(self, state: dict[str, Any]) -> None:
        before = self.__dict__.get("param_groups", [])
        super().__setstate__(state)
        fill_options(self, before, self.defaults)
        for group in self.param_groups:  # a state saved by Adam lacks v̂, or has it from 0
            for param in group["params"]:
                if self.state.get(param):
                    self._begin(param, group)

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        loss = loss_of(self, closure)
        for index in range(len(self.param_groups)):  # before anything moves
            self._check(index)
        check_dense(self)
        for group in self.param_groups:
            params = [param for param in group["params"] if param.grad is not None]
            for batch in batches(params, [0] * len(params)):
                self._update([params[i] for i in batch], group)
        return loss

    def _begin(self, param: Tensor, group: dict[str, Any]) -> None:
        """Make the moments that are missing."""
        state = self.state[param]
        for name in _MOMENTS:
            if name not in state:
                state[name] = torch.zeros_like(param, memory_format=torch.preserve_format)
        # where the dtype cannot hold ε² (float16), its smallest normal number
        real(state["max_exp_avg_sq"]).clamp_min_(max(group["eps"] ** 2, torch.finfo(param.dtype).tiny))

    def _update(self, params: list[Tensor], group: dict[str, Any]) -> None:
        for param in params:
            if not self.state[param]:
                self._begin(param, group)
        (beta1, beta2), lr = group["betas"], rate(group)
        stored = [[real(param) for param in params]]
        stored += [[real(self.state[param][name]) for param in params] for name in _MOMENTS]
        x, m, v, v_hat = wide = [widen_all(tensors) for tensors in stored]
        g = widen_all([real(param.grad) for param in params])
        if group["penalty"]:
            g = torch._foreach_add(g, x, alpha=2 * group["penalty"] * (-1 if group["maximize"] else 1))
        torch._foreach_mul_(x, 1 - lr * group["weight_decay"])
        torch._foreach_lerp_(m, g, 1 - beta1)
        torch._foreach_mul_(v, beta2)
        torch._foreach_addcmul_(v, g, g, 1 - beta2)
        torch._foreach_maximum_(v_hat, v)
        step = torch._foreach_div(m, torch._foreach_sqrt(v_hat))
        torch._foreach_mul_(step, lr if group["maximize"] else -lr)  # apart, for lr may be a tensor on the device
        torch._foreach_add_(x, step)
        for values, kept in zip(wide, stored, strict=True):
            narrow(values, kept)
