"""How much memory training will take, reasoned from shapes: models are built of tensors that hold nothing.

What the backward pass needs is counted by running one forward pass on torch's meta device and adding up the tensors
that autograd keeps. What cannot be counted so is a share of it that was measured on a CPU: docs/ui.md has the figures.
"""

# torch and peft annotate too narrowly.
# pyright: reportArgumentType=false

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.overrides import TorchFunctionMode

from equipoise import registry
from equipoise.errors import EquipoiseError

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}
PROGRAM = 500_000_000  # bytes: Python with torch, transformers and the rest, before a model is loaded; measured
PEAK = 1.5  # times what autograd keeps: with gradients on their way and kernels' working space; measured, 1.3 to 1.7
CHECKPOINTED = 4  # gradient checkpointing keeps about one part in that many: blocks' inputs, and one block at work
_SIDE = 1024  # of the small matrix on which an optimizer shows what it remembers


def size(tensors: Iterable[Tensor]) -> int:
    """Bytes."""
    return sum(tensor.numel() * tensor.element_size() for tensor in tensors)


def kept_for_backward(call: Callable[[], Any], weights: Iterable[Tensor]) -> int:
    """Bytes that autograd keeps of a forward pass on the meta device, `weights` not counted."""
    known, kept = {tensor.untyped_storage()._cdata for tensor in weights}, {}

    def keep(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in known:
            kept[storage._cdata] = storage  # held, so that its address is not given away again
        return tensor

    with torch.device("meta"), _FusedAttention(), torch.autograd.graph.saved_tensors_hooks(keep, lambda tensor: tensor):
        call()
    return sum(storage.nbytes() for storage in kept.values())


def activations(call: Callable[[], Any], weights: Iterable[Tensor], checkpointing: bool = False) -> int:
    """Bytes that a step takes beside weights and optimizer at its peak, about."""
    return round(PEAK * kept_for_backward(call, weights) / (CHECKPOINTED if checkpointing else 1))


def training(trained: Iterable[Tensor], optimizer: Any) -> int:
    """Bytes that training adds to the trained weights: gradients, the last good weights, the optimizer's state."""
    return round(size(trained) * (2 + _state_share(optimizer)))


def _state_share(optimizer: Any) -> float:
    """Bytes of an optimizer's state per byte of trained weights, seen on one pair of small LoRA factors."""
    shapes = {"layer.lora_A.weight": (4, _SIDE), "layer.lora_B.weight": (_SIDE, 4)}
    source = torch.Generator().manual_seed(0)
    factors = {name: torch.randn(shape, generator=source) for name, shape in shapes.items()}
    pair = [(name, nn.Parameter(tensor)) for name, tensor in factors.items()]
    try:
        made = registry.load("optimizers", optimizer.name)([{"params": pair}], lr=1e-6, **optimizer.options)
        for _, parameter in pair:
            parameter.grad = torch.ones_like(parameter)
        made.step()
        state = [value for one in made.state.values() for value in one.values() if isinstance(value, Tensor)]
    except (EquipoiseError, ArithmeticError, RuntimeError, TypeError, ValueError):
        return 2.0  # as Adam
    return size(state) / size(parameter for _, parameter in pair)


class _FusedAttention(TorchFunctionMode):
    """Attention as devices do it, which keeps no matrix of scores; the meta device would."""

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        kwargs = kwargs or {}
        if func is F.scaled_dot_product_attention:
            given = [*args, *(kwargs[name] for name in ("query", "key", "value")[len(args) :])]
            return _Attention.apply(*given[:3])
        return func(*args, **kwargs)


class _Attention(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, query: Tensor, key: Tensor, value: Tensor) -> Tensor:
        made = query.new_empty((*query.shape[:-1], value.shape[-1]))
        ctx.save_for_backward(query, key, value, made)
        return made
