"""The model card beside an exported result: what it is, how to use it, what it is given, and how good it is."""

import json
from pathlib import Path
from typing import Any

from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.audio_visual.features import bins
from equipoise.pipelines.config.loading import flat

_SETTINGS = (
    "objective.name",
    "objective.options",
    "model.fusion",
    "optimizer.name",
    "optimizer.learning_rate",
    "schedule.name",
    "train.steps",
    "train.batch",
    "seed",
)


def card(config: AudioVisualConfig, classes: list[str], figures: dict[str, Any], format: str) -> str:
    """The text of README.md, with the header that the hub reads.

    Args:
        config: The run's.
        classes: In the order of the logits.
        figures: What result.json says.
        format: `weights` or `onnx`.
    """
    from huggingface_hub import ModelCardData

    header = ModelCardData(
        library_name="onnx" if format == "onnx" else "equipoise", tags=["equipoise", *config.data.modalities]
    ).to_yaml()
    settings = flat(config)
    names = ["joint", *config.data.modalities]
    rows = [[name, *(_percent(figures.get(f"{key}_{name}")) for key in _MEASURED)] for name in names]
    lines = [
        f"---\n{header}\n---\n",
        f"# {config.name}\n",
        f"Tells {len(classes)} classes of clips apart by {' and '.join(config.data.modalities)}: "
        f"{', '.join(classes[:_LISTED])}{' and others' * (len(classes) > _LISTED)}.\n",
        "## Use\n",
        *(_onnx_use(config) if format == "onnx" else _use()),
        "## What it is given\n",
        *_features(config),
        "\n## How good it is\n",
        f"On its test clips; guessing gets {_percent(figures.get('chance'))}. The probe is a logistic regression on "
        "the frozen features, and the contribution each modality's Shapley share of it.\n",
        "| | accuracy | macro-F1 | probe | contribution |\n| --- | --- | --- | --- | --- |",
        *(f"| {' | '.join(row)} |" for row in rows),
        "\n## Training\n",
        "| | |\n| --- | --- |",
        *(f"| {key} | {_cell(settings.get(key))} |" for key in _SETTINGS if settings.get(key) not in (None, {})),
    ]
    return "\n".join(lines) + "\n"


_LISTED = 20  # classes
_MEASURED = ("accuracy", "f1", "probe", "contribution")


def _use() -> list[str]:
    return [
        "```python",
        "from equipoise.pipelines.audio_visual.model import load\n",
        'model, classes = load("FOLDER")  # huggingface_hub.snapshot_download("REPOSITORY") gives one',
        'for row in model.predict(["a.mp4", "b.mp4"]):',
        '    print(row["clip"], row["label"], row["probability"])',
        "```\n",
    ]


def _onnx_use(config: AudioVisualConfig) -> list[str]:
    given = ", ".join(f'"{name}": {name}' for name in config.data.modalities)
    return [
        "```python",
        "import onnxruntime\n",
        'session = onnxruntime.InferenceSession("model.onnx")',
        f'(logits,) = session.run(["logits_joint"], {{{given}}})',
        "```\n",
        "Outputs: `logits_joint` of shape (clips, classes), `logits_NAME` by each modality's own head, and "
        "`features_NAME`, which the heads are given. Classes are in the order of `classes` in features.json, which "
        "also holds the settings below.\n",
        *([f"Unlike in training, {complete(config)}\n"] if config.data.missing == "mask" else []),
    ]


def complete(config: AudioVisualConfig) -> str:
    """What an ONNX model cannot do where the run's clips may lack a modality."""
    wanted = " and ".join(config.data.modalities)
    return f"the ONNX model takes clips that have all of {wanted}; `equipoise predict` takes others too."


def _features(config: AudioVisualConfig) -> list[str]:
    """The inputs, precisely enough to be made by another program."""
    data, made = config.data, []
    length = f"{data.audio.seconds:g} s"
    cut, seen = (
        (f"longer sound cut to its first {length}", "of the clip")
        if data.stretch == "start"
        else (f"of longer sound the middle {length}", f"of the middle {length} of the clip, or all of a shorter one")
    )
    if "audio" in data.modalities:
        audio = data.audio
        height, windows = bins(audio)
        spectrum = (
            f"{audio.mels} mel bands of its power (HTK's scale, 2595·log10(1 + f/700), triangles of height 1 from 0 Hz "
            f"to {audio.sample_rate / 2:g} Hz), then log(x + 1e-6)"
            if audio.scale == "log_mel"
            else "its magnitude, then log(x + 1e-7)"
        )
        made.append(
            f"- `audio`, float32 of shape (clips, 1, {height}, {windows}): mono at {audio.sample_rate} Hz in -1 to 1, "
            f"shorter sound repeated to {length}, {cut}; a short-time Fourier transform with Hann windows of "
            f"{audio.window} samples every {audio.hop}, centred, the ends reflected; {spectrum}. The model "
            "standardizes it."
        )
    if "visual" in data.modalities:
        visual = data.visual
        made.append(
            f"- `visual`, uint8 of shape (clips, {visual.frames}, 3, {visual.size}, {visual.size}): RGB frames from "
            f"the middles of {visual.frames} equal stretches {seen}, scaled (bilinear) and cut about the centre to a "
            "square. The model normalizes them."
        )
    if "text" in data.modalities:
        how = (
            f"the tokens of {Path(config.model.text.path).name}"
            if config.model.text.path
            else "UTF-8's bytes + 1, then 0"
        )
        made.append(f"- `text`, int64 of shape (clips, {data.text.length}): {how}.")
    if data.stretch == "random" and data.modalities != ["text"]:
        made.append(
            f"\nIt was trained on one of five stretches of {length}, from a longer clip's start to its end, drawn anew "
            "each time."
        )
    if data.missing == "mask":
        made.append("\nIt was trained on clips of which some may lack a modality.")
    return made


def described(config: AudioVisualConfig, classes: list[str]) -> str:
    """features.json: the classes and what the inputs are made by."""
    sections = {name: getattr(config.data, name).model_dump(mode="json") for name in config.data.modalities}
    facts = {"classes": classes, "inputs": sections, "stretch": config.data.stretch}
    return json.dumps(facts, indent=1, ensure_ascii=False) + "\n"


def _percent(value: Any) -> str:
    return f"{value:.1%}" if isinstance(value, int | float) else "-"


def _cell(value: Any) -> str:
    text = ", ".join(f"{key} {item}" for key, item in value.items()) if isinstance(value, dict) else f"{value}"
    return text.replace("|", "\\|").replace("\n", " ")
