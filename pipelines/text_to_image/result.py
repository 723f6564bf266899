"""What a run leaves: a LoRA file that diffusers loads, what is known about it, and the same file for other apps."""

# peft annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import InputError
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.formats import (
    ADAPTER,
    Factors,
    factors_of,
    layer_names,
    read_lora,
    read_metadata,
    write_lora,
)

LORA_FILE = "pytorch_lora_weights.safetensors"


def write_result(
    folder: Path,  # the run's result/
    parts: dict[str, torch.nn.Module],  # the tuned parts by name, with their adapters
    shape: Mapping[str, Any],  # the base's, from `families.shape_of`
    described: dict[str, Any],  # goes into both files
    more: dict[str, Any],  # goes into result.json alone
) -> None:
    """Writes pytorch_lora_weights.safetensors with its metadata, and result.json.

    Raises:
        InputError: they cannot be written (a full disk, say); an earlier result is untouched.
    """
    layers: dict[str, Factors] = {}
    adapters: dict[str, Any] = {}
    for name, part in parts.items():
        layers |= factors_of(name, part)
        settings = part.peft_config[ADAPTER].to_dict()
        adapters |= {f"{name}.{key}": sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapters, default=str, sort_keys=True),  # read by diffusers
        "equipoise": json.dumps(described | {"shape": shape}),
    }
    write_lora(folder / LORA_FILE, "diffusers", layers, shape, metadata)
    write_atomic(folder / "result.json", json.dumps(described | more, indent=1) + "\n")


def export(result: Path, format: str, output: Path) -> None:
    """Writes a run's LoRA file anew under another app's names: the same factors to the bit, the true α.

    Args:
        result: the run's result/.
        format: one of `formats.FORMATS`.
        output: the file to write.

    Raises:
        InputError: there is no result, or it cannot be written.
    """
    source = result / LORA_FILE
    if not source.is_file():
        raise InputError(f"{source} is not there: the run has no result yet.")
    metadata = read_metadata(source)
    described = json.loads(metadata["equipoise"])
    shape = described["shape"]
    layers = read_lora(source, layer_names(source), shape)
    if format != "diffusers":
        metadata = _elsewhere(described) | {"equipoise": metadata["equipoise"]}
    write_lora(output, format, layers, shape, metadata)


def _elsewhere(described: Mapping[str, Any]) -> dict[str, str]:
    """What kohya's scripts and Stability's ModelSpec call the same facts; ComfyUI's and other apps' menus show them."""
    kohya, stability = family(described["shape"]["family"]).versions(described["shape"])
    facts = {
        "ss_network_module": "networks.lora",
        "ss_network_dim": described["rank"],
        "ss_network_alpha": described["alpha"],
        "ss_base_model_version": kohya,
        "ss_sd_model_name": described["base"],
        "ss_optimizer": described["optimizer"],
        "ss_learning_rate": described["learning_rate"],
        "ss_steps": described["step"],
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{stability}/lora",
        "modelspec.title": Path(described["base"]).name,
        "modelspec.trigger_phrase": described["trigger"],
    }
    return {"format": "pt"} | {key: str(value) for key, value in facts.items() if value is not None}
