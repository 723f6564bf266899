"""Equipoise: fine-tuning that forgives the learning rate.

Importing this module costs next to nothing; every name below is loaded when it is first used.
"""

from importlib import import_module
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from equipoise.lora.pairs import Pair, PairReport, find_pairs
    from equipoise.optimizers.alpha_adam import AlphaAdam
    from equipoise.optimizers.attach import attach
    from equipoise.optimizers.bounded import BoundedAdamW, bounded
    from equipoise.optimizers.scaled import ScaledAdamW, ScaledGD, scaled
    from equipoise.optimizers.sharpness import AdaSAM, SharpnessAware

__version__ = "0.1.0"
__all__ = [
    "AdaSAM",
    "AlphaAdam",
    "BoundedAdamW",
    "Pair",
    "PairReport",
    "ScaledAdamW",
    "ScaledGD",
    "SharpnessAware",
    "attach",
    "bounded",
    "find_pairs",
    "scaled",
]

_HOME = {
    "AdaSAM": "equipoise.optimizers.sharpness",
    "AlphaAdam": "equipoise.optimizers.alpha_adam",
    "BoundedAdamW": "equipoise.optimizers.bounded",
    "Pair": "equipoise.lora.pairs",
    "PairReport": "equipoise.lora.pairs",
    "ScaledAdamW": "equipoise.optimizers.scaled",
    "ScaledGD": "equipoise.optimizers.scaled",
    "SharpnessAware": "equipoise.optimizers.sharpness",
    "attach": "equipoise.optimizers.attach",
    "bounded": "equipoise.optimizers.bounded",
    "find_pairs": "equipoise.lora.pairs",
    "scaled": "equipoise.optimizers.scaled",
}


def __getattr__(name: str):
    if name not in _HOME:
        raise AttributeError(f"module 'equipoise' has no attribute {name!r}")
    value = getattr(import_module(_HOME[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    return sorted([*globals(), *__all__])
