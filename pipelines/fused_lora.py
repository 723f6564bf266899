"""peft's LoRA layer on a linear one with fewer, larger operations: y = Wx + b + s·B(Ax).

peft makes the update by itself, scales it and adds it, each into new memory, and autograd goes the same way back. Here
the second product adds into the first one's result, forwards and backwards. Sums are the same but for rounding.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn


def fuse(model: nn.Module) -> None:
    """Lets every LoRA layer on a plain linear one work so, whenever what it is asked for allows it."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear


class FusedLinear(Linear):
    """peft's layer, which does itself whatever is not one adapter without dropout on a frozen weight in one dtype."""

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        if args or kwargs or len(names) != 1 or not self._plain(x, names[0]):
            return super().forward(x, *args, **kwargs)
        base, (name,) = self.base_layer, names
        factors = self.lora_A[name].weight, self.lora_B[name].weight
        return _Update.apply(x, base.weight, base.bias, *factors, self.scaling[name])

    def _plain(self, x: Tensor, name: str) -> bool:
        if name not in self.lora_A or name in self.lora_variant or self.disable_adapters or self.merged:
            return False
        base, down, up = self.base_layer, self.lora_A[name], self.lora_B[name]
        if x.is_meta or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return False
        if up.bias is not None or (self.training and type(self.lora_dropout[name]) is not nn.Identity):
            return False
        weight, bias = base.weight, base.bias
        return (
            _bare(base)
            and _bare(down)
            and _bare(up)
            and type(weight) is nn.Parameter  # torchao puts a kind of its own there
            and not (weight.requires_grad or (bias is not None and bias.requires_grad))
            and x.dtype == weight.dtype == down.weight.dtype == up.weight.dtype
        )


def _bare(layer: nn.Module) -> bool:
    """Whether it is torch's, and nobody has put anything around its forward pass, as offloading does."""
    known = layer.__dict__
    return (
        type(layer) is nn.Linear
        and "forward" not in known
        and not (known["_forward_hooks"] or known["_forward_pre_hooks"])
    )


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        x: Tensor,  # (…, n)
        W: Tensor,  # (m, n), frozen
        b: Tensor | None,  # (m,)
        A: Tensor,  # (r, n)
        B: Tensor,  # (m, r)
        s: float,
    ) -> Tensor:  # (…, m)
        rows = x.reshape(-1, x.shape[-1])
        inner = rows @ A.mT
        y = rows @ W.mT if b is None else torch.addmm(b, rows, W.mT)
        y.addmm_(inner, B.mT, alpha=s)
        ctx.save_for_backward(rows, inner, W, A, B)
        ctx.s = s
        return y.view(*x.shape[:-1], W.shape[0])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, W, A, B = ctx.saved_tensors
        grad = grads[0].reshape(-1, W.shape[0])
        back = grad @ B  # (k, r)
        wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        dx = (grad @ W).addmm_(back, A, alpha=ctx.s).view(*grads[0].shape[:-1], W.shape[1]) if wants_x else None
        dA = (back.mT @ rows).mul_(ctx.s) if wants_A else None
        dB = (grad.mT @ inner).mul_(ctx.s) if wants_B else None
        return dx, None, None, dA, dB, None
