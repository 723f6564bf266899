"""Parameters in no LoRA pair, which a bound does not hold, in groups with a learning rate of their own."""

from collections.abc import Iterable, Mapping
from typing import Any

from torch import Tensor

from equipoise.lora.pairs import PairReport


def with_rate_outside(given: Iterable[Any], pairs: PairReport, rate: float) -> list[dict[str, Any]]:
    """Parameter groups in which all that is in no pair has the learning rate `rate`, unless its group has one itself.

    Args:
        given: Parameter groups, tensors or (name, tensor) pairs, as torch takes them.
        pairs: Those found among them.
    """
    factors, items = pairs.factors, list(given)
    groups = [item for item in items if isinstance(item, Mapping)]
    if alone := [item for item in items if not isinstance(item, Mapping)]:
        groups.insert(0, {"params": alone})
    split: list[dict[str, Any]] = []
    for group in groups:
        if "lr" in group:
            split.append(dict(group))
            continue
        entries = [group["params"]] if isinstance(group["params"], Tensor) else list(group["params"])
        if "param_names" in group:
            entries = list(zip(group["param_names"], entries, strict=True))
        parts: tuple[list[Any], list[Any]] = ([], [])
        for entry in entries:
            parts[id(entry[1] if isinstance(entry, tuple) else entry) not in factors].append(entry)
        rest = {name: value for name, value in group.items() if name not in ("params", "param_names")}
        split += [{**rest, **own, "params": part} for part, own in zip(parts, ({}, {"lr": rate}), strict=True) if part]
    return split
