"""torch's AdamW without what its fused step on the CPU does besides the update."""

from typing import Any

import torch
from torch import Tensor
from torch.optim import AdamW


class FusedAdamW(AdamW):
    """torch's AdamW, to the bit; its fused step on the CPU makes two calls for a parameter group.

    torch asks every tensor again what it is, sorts them by device and dtype, and adds the number 1 to each step count
    by itself. With the small tensors of LoRA that takes longer than the fused kernel.

    Where neither `fused` nor `foreach` is given, the fused kernel is used if it takes all parameters.
    """

    def __init__(self, params: Any, lr: float | Tensor = 1e-3, **options: Any):
        super().__init__(params, lr, **options)
        tensors = [param for group in self.param_groups for param in group["params"]]
        left_open = all(group["fused"] is None and group["foreach"] is None for group in self.param_groups)
        if left_open and not self.defaults["differentiable"] and _can_fuse(tensors):
            self._step_supports_amp_scaling = True  # these are what torch does where it is asked to fuse
            for group in (self.defaults, *self.param_groups):
                group["fused"] = True

    def _init_group(self, group: dict[str, Any], *lists: list[Tensor]) -> bool:
        """Fill the lists that torch's step then works on, or make the update here and leave them empty."""
        if group["fused"]:
            match_layout(group["params"])
        params = [param for param in group["params"] if param.grad is not None]
        grads = [param.grad for param in params]
        states = [self.state[param] for param in params]
        if not (all(states) and self._takes(group, params, grads)):  # torch makes the states, at the first step
            return super()._init_group(group, *lists)  # type: ignore[misc]
        steps = [state["step"] for state in states]
        torch._foreach_add_(steps, [torch.ones(())] * len(steps))  # of a number torch makes a tensor for each count
        beta1, beta2 = map(float, group["betas"])
        torch._fused_adamw_(
            params, grads, [state["exp_avg"] for state in states], [state["exp_avg_sq"] for state in states], [], steps,
            amsgrad=False, lr=group["lr"], beta1=beta1, beta2=beta2, weight_decay=group["weight_decay"],
            eps=group["eps"], maximize=group["maximize"],
        )  # type: ignore[call-overload]  # fmt: skip
        return False

    def _takes(self, group: dict[str, Any], params: list[Tensor], grads: list[Any]) -> bool:
        """Whether one call of torch's kernel makes the whole update."""
        if not group["fused"] or group["amsgrad"] or group["differentiable"] or not params:
            return False
        if getattr(self, "grad_scale", None) is not None or getattr(self, "found_inf", None) is not None:
            return False  # a GradScaler has its say inside the step
        return all(tensor.is_cpu and not tensor.is_sparse for tensor in grads) and len({p.dtype for p in params}) == 1


def match_layout(params: list[Tensor]) -> None:
    """Give gradients their parameter's strides: torch's fused CPU kernels assume them without looking.

    Autograd keeps to them by itself; gradients that were assigned by hand may not.
    """
    grads = [param.grad for param in params]
    if all(grad is None or grad.is_contiguous() for grad in grads):
        return
    for param, grad in zip(params, grads, strict=True):
        if grad is not None and grad.stride() != param.stride():
            param.grad = torch.empty_like(param, dtype=grad.dtype).copy_(grad)


def _can_fuse(params: list[Tensor]) -> bool:
    """Whether torch's fused kernel takes all of them. On the CPU it walks memory linearly and would overwrite gaps."""
    return all(p.is_floating_point() and p.device.type in ("cpu", "cuda") and p.is_contiguous() for p in params)
