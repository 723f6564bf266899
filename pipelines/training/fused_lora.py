"""peft's LoRA layer on a linear one with fewer, larger operations: y = Wx + b + s·B(Ax).

peft makes the update by itself, scales it and adds it, each into new memory, and autograd goes the same way back. Here
the second product adds into the first one's result, forwards and backwards. Sums are the same but for rounding.
"""

from typing import Any

import torch
from peft.tuners.lora import Linear
from torch import Tensor, nn

_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_backward_hooks", "_backward_pre_hooks")


def fuse(model: nn.Module) -> None:
    """Lets every LoRA layer on a plain linear one work so, whenever what it is asked for allows it."""
    for module in model.modules():
        if type(module) is Linear:
            module.__class__ = FusedLinear


class FusedLinear(Linear):
    """peft's layer, which does itself whatever is not one adapter without dropout on a frozen weight in one dtype.

    It is differentiated backwards, also twice; not by `torch.func`.
    """

    def forward(self, x: Tensor, *args: Any, **kwargs: Any) -> Tensor:
        names = self.active_adapters
        if args or kwargs or len(names) != 1 or (tensors := self._plain(x, names[0])) is None:
            return super().forward(x, *args, **kwargs)
        y = _Update.apply(x.reshape(-1, x.shape[-1]), *tensors, self.scaling[names[0]])
        return y.view(*x.shape[:-1], y.shape[-1])

    def _plain(self, x: Tensor, name: str) -> tuple[Tensor | None, ...] | None:
        """W, b, A and B, if nothing but they is asked for. Looked up in the modules' own tables, at each call: through
        attributes it takes as long as a small layer's product."""
        parts: dict[str, Any] = self._modules
        base, down, up = (
            _own(layer)
            for layer in (parts["base_layer"], parts["lora_A"]._modules.get(name), parts["lora_B"]._modules.get(name))
        )
        if base is None or down is None or up is None:
            return None
        if name in self.lora_variant or self.disable_adapters or self.merged:
            return None
        if x.is_meta or torch.compiler.is_compiling() or torch.is_autocast_enabled(x.device.type):
            return None
        if self.training and type(parts["lora_dropout"]._modules[name]) is not nn.Identity:
            return None
        W, b, A, B = base["weight"], base["bias"], down["weight"], up["weight"]
        fits = (
            up["bias"] is None
            and type(W) is nn.Parameter  # torchao puts a kind of its own there
            and not (W.requires_grad or (b is not None and b.requires_grad))
            and x.dtype == W.dtype == A.dtype == B.dtype
        )
        return (W, b, A, B) if fits else None


def _own(layer: nn.Module | None) -> dict[str, Any] | None:
    """The parameters of torch's own layer, if nobody has put anything around its forward pass, as offloading does."""
    if type(layer) is not nn.Linear:
        return None
    known = layer.__dict__
    if "forward" in known or any(known[kind] for kind in _HOOKS):
        return None
    return known["_parameters"]


class _Update(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        rows: Tensor,  # (k, n)
        W: Tensor,  # (m, n), frozen
        b: Tensor | None,  # (m,)
        A: Tensor,  # (r, n)
        B: Tensor,  # (m, r)
        s: float,
    ) -> Tensor:  # (k, m)
        inner = rows @ A.mT
        if s != 1:
            inner *= s
        y = rows @ W.mT if b is None else torch.addmm(b, rows, W.mT)
        y.addmm_(inner, B.mT)
        ctx.save_for_backward(rows, inner, W, A, B)
        ctx.s = s
        return y

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        rows, inner, W, A, B = ctx.saved_tensors
        (grad,) = grads
        if torch.is_grad_enabled():  # a second derivative is to come, and the kept one leads nowhere
            inner = rows @ A.mT * ctx.s
        # products of few rows: those of few columns take MKL three times as long
        back = B.mT @ grad.mT  # (r, k)
        if ctx.s != 1:
            back *= ctx.s
        wants_x, _, _, wants_A, wants_B, _ = ctx.needs_input_grad
        dx = (grad @ W).addmm_(back.mT, A) if wants_x else None
        dA = back @ rows if wants_A else None
        dB = (inner.mT @ grad).mT if wants_B else None
        return dx, None, None, dA, dB, None
