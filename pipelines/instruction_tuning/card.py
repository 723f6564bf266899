"""The model card beside an exported result: what it is, how to load it, how it was made, and how it answers."""

import os
from pathlib import Path
from typing import Any

from equipoise.pipelines.config.records import HUB_ID
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.instruction_tuning.result import ADAPTER_CONFIG, IN_FULL

_SETTINGS = (
    "model.quantize",
    "language.method",
    "encoder.parts",
    "encoder.method",
    "lora.rank",
    "lora.alpha",
    "lora.dora",
    "lora.rslora",
    "optimizer.name",
    "optimizer.learning_rate",
    "coordinator.name",
    "schedule.name",
    "train.batch",
    "train.steps",
    "train.precision",
    "seed",
)


def public_base(config: InstructionTuningConfig) -> str:
    """What others call the base: its hub id; of a folder on this machine the name alone."""
    path = config.model.path
    return path if HUB_ID.fullmatch(path) and not os.path.exists(path) else Path(path).name


def card(described: dict[str, Any], config: InstructionTuningConfig, result: Path, format: str) -> str:
    """The text of README.md, with the header that the hub reads.

    Args:
        described: what result.json says.
        config: the run's.
        result: the run's result/, whose files the code loads.
        format: `adapter` or `merged`.
    """
    from huggingface_hub import ModelCardData

    base, plain = public_base(config), format == "merged"
    header = ModelCardData(
        base_model=base if "/" in base else None,  # the hub takes its own ids alone
        library_name="transformers" if plain else "peft",
        tags=["equipoise", *([] if plain else ["lora"] if (result / ADAPTER_CONFIG).is_file() else [])],
    ).to_yaml()
    what = "A fine-tuned" if plain else "What a fine-tuning has changed of a"
    rows = [(key, _at(config, key)) for key in _SETTINGS]
    rows += [(key.replace("_", " "), value) for key, value in described.items() if key in _MEASURED]
    lines = [
        f"---\n{header}\n---\n",
        f"# {config.name}\n",
        f"{what} multimodal language model, `{base}`, tuned on conversations.\n",
        "## Use\n",
        "```python",
        *(_plain_use() if plain else _adapter_use(base, result)),
        "```\n",
        "## Training\n",
        "| | |\n| --- | --- |",
        *(f"| {key} | {_cell(value)} |" for key, value in rows if value is not None),
    ]
    return "\n".join(lines) + "\n"


_MEASURED = ("step", "loss_before", "loss_after", "best_step", "metric", "score_before", "score_after", "questions")


def _plain_use() -> list[str]:
    return [
        "from transformers import AutoModelForMultimodalLM, AutoProcessor\n",
        'model = AutoModelForMultimodalLM.from_pretrained("FOLDER OR REPOSITORY")',
        'processor = AutoProcessor.from_pretrained("FOLDER OR REPOSITORY")',
    ]


def _adapter_use(base: str, result: Path) -> list[str]:
    full = [name for name in IN_FULL if (result / name).is_file()]
    factors = (result / ADAPTER_CONFIG).is_file()
    return [
        *(["from peft import PeftModel"] if factors else []),
        *(["from safetensors.torch import load_file"] if full else []),
        "from transformers import AutoModelForMultimodalLM, AutoProcessor\n",
        'folder = "FOLDER"  # huggingface_hub.snapshot_download("REPOSITORY") gives one',
        f'model = AutoModelForMultimodalLM.from_pretrained("{base}")',
        *(f'model.load_state_dict(load_file(f"{{folder}}/{name}"), strict=False)' for name in full),
        *(["model = PeftModel.from_pretrained(model, folder)"] if factors else []),
        "processor = AutoProcessor.from_pretrained(folder)",
    ]


def _at(config: Any, key: str) -> Any:
    for name in key.split("."):
        config = getattr(config, name)
    return config


def _cell(value: Any) -> str:
    words = ", ".join(map(str, value)) if isinstance(value, list) else value
    text = f"{words:.6g}" if isinstance(words, float) else str(words)
    return text.replace("|", "\\|").replace("\n", " ")
