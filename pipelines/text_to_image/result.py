"""What a run leaves: a LoRA file that diffusers loads, and what is known about it."""

# peft annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import json
from pathlib import Path
from typing import Any

import torch
from peft import get_peft_model_state_dict
from torch import Tensor

from equipoise.pipelines.checkpoints import save_tensors
from equipoise.pipelines.files import explained, write_atomic

LORA_FILE = "pytorch_lora_weights.safetensors"


def write_result(
    folder: Path,  # the run's result/
    parts: dict[str, torch.nn.Module],  # the tuned parts by name, with their adapters
    described: dict[str, Any],  # goes into both files
    more: dict[str, Any],  # goes into result.json alone
) -> None:
    """Writes pytorch_lora_weights.safetensors with its metadata, and result.json.

    Raises:
        InputError: they cannot be written (a full disk, say); an earlier result is untouched.
    """
    tensors: dict[str, Tensor] = {}
    adapters: dict[str, Any] = {}
    for name, part in parts.items():
        # PEFT's own names: diffusers' converter renames attention alone, and its loader then drops half
        layers = get_peft_model_state_dict(part, save_embedding_layers=False)
        tensors |= {f"{name}.{key}": value.float() for key, value in layers.items()}
        settings = part.peft_config["default"].to_dict()
        adapters |= {f"{name}.{key}": sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapters, default=str, sort_keys=True),  # read by diffusers
        "equipoise": json.dumps(described),
    }
    with explained(folder / LORA_FILE):
        folder.mkdir(parents=True, exist_ok=True)
        save_tensors(folder / LORA_FILE, tensors, metadata)
    write_atomic(folder / "result.json", json.dumps(described | more, indent=1) + "\n")
