"""Frozen weights in 4 or 8 bits: what pipelines share."""

# pyright: reportMissingImports=false

from importlib.util import find_spec
from typing import Any

import torch

BLOCK = 64  # weights that share a scale in nf4
BYTES = {"nf4": 0.5 + 4 / BLOCK, "int8": 1.0, "fp8": 1.0}  # of a weight, with its share of the scales where that counts


def problems(how: str | None) -> list[str]:
    """Why this machine cannot hold weights so."""
    if how is None:
        return []
    if how == "fp8":
        return _fp8_problems()
    if not find_spec("bitsandbytes"):
        return [f"model.quantize: {how} needs the package bitsandbytes. pip install 'equipoise[quantized]'."]
    import bitsandbytes

    device = _device()
    if device not in getattr(bitsandbytes, "supported_torch_devices", ("cuda", device)):
        return [f"model.quantize: bitsandbytes does not work on {device}. Leave it out."]
    return []


def _fp8_problems() -> list[str]:
    """Why this machine's device cannot hold numbers in fp8."""
    device = _device()
    if device in ("cpu", "cuda"):  # both can; trying would take memory of a GPU for as long as the page is served
        return []
    try:
        torch.ones(1, device=device).to(torch.float8_e4m3fn).float()
    except (RuntimeError, TypeError):
        return [f"model.quantize: fp8 does not work on {device}. Leave it out."]
    return []


def _device() -> str:
    """The kind that a run will use, asked without joining its other processes: the first makes a dry run alone."""
    found = torch.accelerator.current_accelerator() if torch.accelerator.is_available() else None
    return found.type if found else "cpu"


def keep_differentiable(model: torch.nn.Module) -> None:
    """Lets weights in 4 bits as they are: evaluated on some CPUs, bitsandbytes puts them into another form, through
    which no gradient goes, and training would go on with it."""
    layers: Any = model.modules()
    for layer in layers:
        if hasattr(layer, "support_avx512bf16_for_cpu"):
            layer.support_avx512bf16_for_cpu = False
