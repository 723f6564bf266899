"""What a run leaves: a PEFT adapter, what was trained in full of either side, and what is known of it.

A few lines load it, here with `folder` for the run's result/ and `base` for the model that was tuned:

    model = AutoModelForMultimodalLM.from_pretrained(base)
    model.load_state_dict(load_file(f"{folder}/encoder.safetensors"), strict=False)  # none with encoder.method=lora
    model.load_state_dict(load_file(f"{folder}/language.safetensors"), strict=False)  # where there is one
    model = PeftModel.from_pretrained(model, folder)  # where there is an adapter
    processor = AutoProcessor.from_pretrained(base)
    model = model.merge_and_unload()  # if wanted: plain weights again, to be saved with save_pretrained
"""

# peft annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportIndexIssue=false

import json
from pathlib import Path
from typing import Any

from peft import PeftModel, get_peft_model_state_dict
from safetensors import SafetensorError
from safetensors.torch import load_file
from torch import nn

from equipoise.errors import InputError
from equipoise.pipelines.files import explained, write_atomic
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.instruction_tuning.model import Tuned, old_names
from equipoise.pipelines.runs.checkpoints import save_tensors

ADAPTER, ADAPTER_CONFIG = "adapter_model.safetensors", "adapter_config.json"
IN_FULL = ENCODER, LANGUAGE = "encoder.safetensors", "language.safetensors"


def write_result(folder: Path, tuned: Tuned, described: dict[str, Any]) -> None:
    """Writes the adapter with its configuration, what was trained in full, and result.json.

    Raises:
        InputError: they cannot be written (a full disk, say).
    """
    metadata = {"format": "pt", "equipoise": json.dumps(described)}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        if tuned.has_factors:
            factors = get_peft_model_state_dict(tuned.model, save_embedding_layers=False)
            save_tensors(folder / ADAPTER, factors, metadata)
        for file, weights in zip(IN_FULL, (tuned.encoder_weights, tuned.language_weights), strict=True):
            if weights:
                save_tensors(folder / file, weights, metadata)
    if tuned.has_factors:
        settings = tuned.model.peft_config["default"].to_dict() | {"inference_mode": True}
        adapter = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
        write_atomic(folder / ADAPTER_CONFIG, json.dumps(adapter, indent=1, default=str) + "\n")
    describe(folder, described)


def describe(folder: Path, described: dict[str, Any]) -> None:
    """Writes result.json alone."""
    write_atomic(folder / "result.json", json.dumps(described, indent=1) + "\n")


def missing(folder: Path, config: InstructionTuningConfig) -> Path | None:
    """A file of a result that is not there, and without which it would be loaded in part; None where all are."""
    with_factors = (folder / ADAPTER_CONFIG).is_file() or config.encoder.method == "lora"
    wanted = [
        (ADAPTER, with_factors),
        (ENCODER, config.encoder.method == "full"),
        (LANGUAGE, config.language.method == "full" or bool(config.lora.modules_to_save)),
    ]
    return next((folder / name for name, there in wanted if there and not (folder / name).is_file()), None)


def load_result(model: nn.Module, folder: Path) -> Any:
    """A base with a result on it: of peft where the result has factors, else of transformers.

    Raises:
        InputError: a file is missing or does not fit.
    """
    try:
        for name in IN_FULL:
            if (folder / name).is_file():
                found = model.load_state_dict(load_file(folder / name), strict=False)
                if found.unexpected_keys:
                    raise ValueError(f"it has weights that the base lacks, such as {found.unexpected_keys[0]}")
        if not any((folder / name).is_file() for name in (ADAPTER, ADAPTER_CONFIG)):
            return model
        with old_names():
            return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: cannot be loaded on this base: {reason}") from error
