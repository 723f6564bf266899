"""What a run leaves: a PEFT adapter of the language side, the encoder side's changed weights, and what is known of it.

Five lines load it, here with `folder` for the run's result/ and `base` for the model that was tuned:

    model = AutoModelForMultimodalLM.from_pretrained(base)
    model.load_state_dict(load_file(f"{folder}/encoder.safetensors"), strict=False)  # none with encoder.method=lora
    model = PeftModel.from_pretrained(model, folder)
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
from equipoise.pipelines.instruction_tuning.model import Tuned, old_names
from equipoise.pipelines.runs.checkpoints import save_tensors

ADAPTER, ENCODER = "adapter_model.safetensors", "encoder.safetensors"


def write_result(folder: Path, tuned: Tuned, described: dict[str, Any]) -> None:
    """Writes the adapter with its configuration, encoder.safetensors where weights changed, and result.json.

    Raises:
        InputError: they cannot be written (a full disk, say).
    """
    settings = tuned.model.peft_config["default"].to_dict() | {"inference_mode": True}
    adapter = {k: sorted(v) if isinstance(v, set) else v for k, v in settings.items()}
    metadata = {"format": "pt", "equipoise": json.dumps(described)}
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
        factors = get_peft_model_state_dict(tuned.model, save_embedding_layers=False)
        save_tensors(folder / ADAPTER, factors, metadata)
        if weights := tuned.encoder_weights:
            save_tensors(folder / ENCODER, weights, metadata)
    write_atomic(folder / "adapter_config.json", json.dumps(adapter, indent=1, default=str) + "\n")
    describe(folder, described)


def describe(folder: Path, described: dict[str, Any]) -> None:
    """Writes result.json alone."""
    write_atomic(folder / "result.json", json.dumps(described, indent=1) + "\n")


def load_result(model: nn.Module, folder: Path) -> PeftModel:
    """A base with a result on it.

    Raises:
        InputError: a file is missing or does not fit.
    """
    try:
        if (folder / ENCODER).is_file():
            found = model.load_state_dict(load_file(folder / ENCODER), strict=False)
            if found.unexpected_keys:
                raise ValueError(f"it has weights that the base lacks, such as {found.unexpected_keys[0]}")
        with old_names():
            return PeftModel.from_pretrained(model, folder)
    except (OSError, ValueError, RuntimeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"{folder}: cannot be loaded on this base: {reason}") from error
