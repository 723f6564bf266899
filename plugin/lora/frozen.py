"""Finds the frozen weight under each LoRA pair: how large it is, and how the adapter is scaled onto it."""

import math
from collections.abc import Iterator, Sequence
from typing import Any, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.errors import PairingError
from equipoise.lora.blocks import Block
from equipoise.lora.pairs import Pair, is_dtensor, live_roots, some

_LEVELS = 3  # peft: the layer, its ModuleDict lora_A, and in that one nn.Linear per adapter


class Frozen(NamedTuple):
    """The frozen weight under a pair."""

    norm: float  # ‖W‖_F / s, for an adapted weight W + s·BA
    layer: int  # the same number for pairs on the same layer, whose products add up


def weight_norms(
    pairs: Sequence[Pair],
    model: nn.Module | None = None,
    asker: str = "A bound",
    instead: str = "leave it out",
) -> list[Frozen]:
    """How large the frozen weight under each pair is, in the order of the pairs.

    Args:
        pairs: The pairs; see `find_pairs`.
        model: Where they live. Without it every live module is searched.
        asker: What needs the norms, for messages.
        instead: What else to do, likewise.

    Raises:
        PairingError: No module has both the pair and a frozen weight, or that weight is zero, absent or unreadable.
    """
    wanted = {id(pair.A): pair for pair in pairs}
    found: dict[int, tuple[nn.Module, nn.Module, Tensor, float]] = {}
    layers: dict[tuple[int, Block | None], int] = {}
    for root in [model] if model is not None else live_roots():
        for path, chain, A in _owners(root, wanted):
            if id(A) not in found and (frozen := _frozen(path, chain, wanted[id(A)])) is not None:
                found[id(A)] = frozen
    lost = [pair.name for pair in pairs if id(pair.A) not in found]
    if lost:
        raise PairingError(
            f"{asker} needs the frozen weight under every LoRA pair, and none could be found under {len(lost)} of "
            f"{len(pairs)} ({some(lost)}). It is looked for as `weight` or "
            "`base_layer.weight` of the module that has the factors. Name it so, give the optimizer the model that "
            f"holds both, or {instead}."
        )
    values = []
    for pair in pairs:
        module, layer, weight, scale = found[id(pair.A)]
        value = _norm(module, weight, pair, instead).item() / scale
        values.append(Frozen(value, layers.setdefault((id(layer), pair.block), len(layers))))
        if not (math.isfinite(value) and value > 0):
            raise PairingError(
                f"{pair.name}: a bound is a share of the size of the frozen weight, which is {value:g} here. Take the "
                f"adapter off this layer, or {instead}."
            )
    return values


def _owners(root: nn.Module, wanted: dict[int, Pair]) -> Iterator[tuple[list[str], list[nn.Module], Tensor]]:
    """(the tokens of its name, the modules from the root to the one that holds it, the tensor) of every wanted A."""
    modules = dict(root.named_modules(remove_duplicate=False))
    for name, module in modules.items():
        for leaf, param in module.named_parameters(recurse=False, remove_duplicate=False):
            if id(param) in wanted:
                tokens = [token for token in name.split(".") if token]
                chain = [modules[".".join(tokens[:depth])] for depth in range(len(tokens) + 1)]
                yield [*tokens, leaf], chain, param


def _frozen(path: list[str], chain: list[nn.Module], pair: Pair) -> tuple[nn.Module, nn.Module, Tensor, float] | None:
    """The innermost module with a frozen weight besides the factors; its layer, itself, the adapter's scale."""
    for depth in reversed(range(max(0, len(chain) - _LEVELS), len(chain))):
        layer = _adapted(chain[depth])
        weight = getattr(layer, getattr(chain[depth], "parameter_name", "weight"), None)  # peft's target_parameters
        if isinstance(weight, Tensor) and weight is not pair.A and weight is not pair.B:
            return chain[depth], layer, weight, _scale(chain[depth], path[depth:], pair)
    return None


def _adapted(module: Any) -> Any:
    """The layer that an adapter stands on."""
    if hasattr(module, "get_base_layer"):  # peft
        return module.get_base_layer()
    base = getattr(module, "base_layer", module)
    return getattr(getattr(module, "org_forward", None), "__self__", base)  # kohya took over this layer's forward


def _scale(module: Any, below: list[str], pair: Pair) -> float:
    """s of W + s·BA."""
    scaling = getattr(module, "scaling", None)
    if isinstance(scaling, dict):  # peft: by adapter, whose name follows lora_A
        scaling = scaling.get(below[1])
        group = getattr(module, "qalora_group_size", {}).get(below[1])
        if group and scaling is not None:  # W + s·BAP, where P sums groups of inputs
            scaling *= pair.A.shape[1] / math.sqrt(group)  # PPᵀ = (n²/g³)·I, and A has n/g columns
    if scaling is None:
        scaling = getattr(module, "scale", None)  # kohya
    if scaling is None and isinstance(alpha := getattr(module, "alpha", None), int | float):
        scaling = alpha / pair.rank  # torchtune
    scale = abs(float(scaling)) if isinstance(scaling, int | float | Tensor) else 1.0
    if scale == 0:
        raise PairingError(f"{pair.name}: the adapter is scaled by 0, so no step of it moves anything. Set its scale.")
    return scale


@torch.no_grad()
def _norm(module: Any, weight: Tensor, pair: Pair, instead: str) -> Tensor:
    if weight.is_meta:
        raise PairingError(
            f"{pair.name}: a bound is a share of the size of the frozen weight, which is not in memory (on the meta "
            f"device, offloaded). Load the layer in full, or {instead}."
        )
    if not weight.is_floating_point() or hasattr(weight, "quant_state"):
        weight = _dequantized(_adapted(module), weight, pair, instead)
    weight = _part(module, weight, pair, instead)
    dtype = torch.promote_types(weight.dtype, torch.float32)  # squares of fp16 weights overflow
    norm = torch.linalg.vector_norm(weight.detach(), dtype=dtype)
    return norm.full_tensor() if is_dtensor(norm) else norm  # type: ignore[attr-defined]


def _part(module: Any, weight: Tensor, pair: Pair, instead: str) -> Tensor:
    """What of a frozen weight the pair moves, where its layer has several pairs or adapts some of its rows."""
    enabled = getattr(module, "enable_lora", None)
    if pair.block is None and enabled is None:
        return weight
    if getattr(module, "fan_in_fan_out", False):
        weight = weight.mT
    part: Tensor | None = None
    if enabled is None:
        part = pair.block.of_weight(weight) if pair.block is not None else weight
    elif weight.shape[0] % len(enabled) == 0:  # loralib's MergedLinear: queries, keys and values, or some of them
        rows = weight.unflatten(0, (len(enabled), -1))[[bool(on) for on in enabled]]
        part = rows[pair.block.index if pair.block is not None else 0]
    if part is None:
        raise PairingError(
            f"{pair.name}: a bound is a share of the size of what the pair moves, and which part of the frozen weight "
            f"{tuple(weight.shape)} that is does not show. Take the adapter off this layer, or {instead}."
        )
    return part


def _dequantized(layer: Any, weight: Any, pair: Pair, instead: str) -> Tensor:
    if hasattr(weight, "quant_state"):  # bitsandbytes, 4 bits
        from bitsandbytes.functional import dequantize_4bit  # type: ignore[reportMissingImports]

        return dequantize_4bit(weight.data, weight.quant_state)
    if hasattr(weight, "SCB"):  # bitsandbytes, 8 bits: rows in units of their absolute maximum / 127
        scale = layer.state.SCB if weight.SCB is None else weight.SCB  # it moves there in the first forward pass
        return weight.data.float() * (scale.float() / 127)[:, None]
    if hasattr(weight, "dequantize"):
        return weight.dequantize()
    raise PairingError(
        f"{pair.name}: a bound is a share of the size of the frozen weight, whose dtype {weight.dtype} cannot be read. "
        f"{instead[0].upper()}{instead[1:]}."
    )
