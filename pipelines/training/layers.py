"""Which of a model's layers get factors: those that a configuration's targets name by the end of their names."""

import re
from collections.abc import Iterable, Sequence


def named_by(targets: Iterable[str], layer: str) -> bool:
    """Whether a layer gets factors: a target is its name or the end of it, as in PEFT."""
    return any(layer == target or layer.endswith(f".{target}") for target in targets)


def unmatched(targets: Sequence[str], layers: Iterable[str], key: str, model: str = "") -> list[str]:
    """A sentence for each target that names no layer of the model, which may be given a name."""
    known = list(layers)
    ends = sorted({re.sub(r"^.*\.(?=[^.\d][^.]*(\.\d+)?$)", "", name) for name in known})
    return [
        f"{key}: {target}: no layer {model and f'of the {model} '}has a name that ends so. There are {', '.join(ends)}."
        for target in targets
        if not any(named_by([target], name) for name in known)
    ]
