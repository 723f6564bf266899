"""Frozen weights in 4 or 8 bits by bitsandbytes: what pipelines share."""

# pyright: reportMissingImports=false

from importlib.util import find_spec
from typing import Any

import torch

BLOCK = 64  # weights that share a scale in nf4
BYTES = {"nf4": 0.5 + 4 / BLOCK, "int8": 1.0}  # of a weight, with its share of the scales where that counts


def problems(how: str | None) -> list[str]:
    """Why this machine cannot hold weights so."""
    if how is None:
        return []
    if not find_spec("bitsandbytes"):
        return [f"model.quantize: {how} needs the package bitsandbytes. pip install 'equipoise[quantized]'."]
    import bitsandbytes
    from accelerate.state import PartialState

    device = str(PartialState().device).partition(":")[0]
    if device not in getattr(bitsandbytes, "supported_torch_devices", ("cuda", device)):
        return [f"model.quantize: bitsandbytes does not work on {device}. Leave it out."]
    return []


def keep_differentiable(model: torch.nn.Module) -> None:
    """Lets weights in 4 bits as they are: evaluated on some CPUs, bitsandbytes puts them into another form, through
    which no gradient goes, and training would go on with it."""
    layers: Any = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
