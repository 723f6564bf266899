"""A language model's frozen weights in 4 or 8 bits, by bitsandbytes: QLoRA (Dettmers et al. 2023)."""

# transformers annotates too narrowly.
# pyright: reportAttributeAccessIssue=false, reportMissingImports=false, reportOptionalMemberAccess=false

import logging
import re
from importlib.util import find_spec
from typing import Any

import torch
from accelerate.state import PartialState
from torch import nn

from equipoise.coordination.components import Architecture
from equipoise.errors import InputError
from equipoise.pipelines.training.quantized import BLOCK

_HEAD = re.compile(r"(^|\.)(lm_head|embed_out)(\.base_layer)?$")


def is_router(name: str, modules: dict[str, nn.Module]) -> bool:
    """Whether a layer chooses among experts: an update of it would send tokens to experts that were never trained on
    their kind, and some such layers give more than one tensor."""
    above, _, own = name.rpartition(".")
    return "router" in name.split(".") or own == "gate" or f"{above}.experts" in modules


def layers(model: nn.Module, parts: Architecture, how: str) -> list[str]:
    """The layers whose weights are held in fewer bits: the language model's linear ones, but for the head and for those
    that choose among experts, as every token depends on them; in nf4 those whose rows are whole blocks of it, for
    bitsandbytes 0.50 reads others wrongly on a CPU."""
    modules = dict(model.named_modules())
    return [
        name
        for name, module in modules.items()
        if isinstance(module, nn.Linear) and parts.part(name) == "language" and ".lora_" not in name
        if how != "nf4" or module.in_features % BLOCK == 0
        if not _HEAD.search(name) and not is_router(name, modules)
    ]


def options(how: str, chosen: list[str], dtype: torch.dtype) -> dict[str, Any]:
    """Those of from_pretrained.

    Raises:
        InputError: bitsandbytes is not installed, or there is no such layer.
    """
    if not find_spec("bitsandbytes"):
        raise InputError(f"model.quantize: {how} needs the package bitsandbytes. pip install 'equipoise[quantized]'.")
    if not chosen:
        raise InputError(f"model.quantize: the language model has no linear layer to hold in {how}. Leave it out.")
    from transformers import BitsAndBytesConfig

    # at every product in 8 bits it writes that its input is rounded
    logging.getLogger("bitsandbytes.autograd._functions").setLevel(logging.ERROR)
    others = rf"(?!(?:{'|'.join(map(re.escape, chosen))})$).*"  # names are matched from their beginning
    given: dict[str, Any] = {"llm_int8_skip_modules": [others]}
    if how == "nf4":
        given |= {"load_in_4bit": True, "bnb_4bit_quant_type": "nf4", "bnb_4bit_compute_dtype": dtype}
    else:
        given |= {"load_in_8bit": True}
    return {"quantization_config": BitsAndBytesConfig(**given), "device_map": {"": PartialState().device}}


def is_rounded(model: nn.Module) -> bool:
    """Whether a model rounds what its layers are given, to 8 bits: a row then depends on those beside it."""
    return any(hasattr(parameter, "SCB") for parameter in model.parameters())
