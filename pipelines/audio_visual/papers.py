"""A configuration for each data set that `equipoise prepare` knows, with what MIMO's paper trained it with.

Paper: Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization, Appendix
F and Table 9: SGD for 100 epochs at 1e-3 (CMU-MOSEI: 1e-4), late fusion by sum, λ and μ by data set. Sizes of sound and
pictures are those of the code of OGM-GE, which the paper trains with; what neither says is ours, and marked so.
"""

import math
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from equipoise.pipelines.config import yamlio
from equipoise.pipelines.config.builtin import shipped

EPOCHS, BATCH = 100, 64
FALL = 70  # epochs, from which the rate is a tenth, in the code of OGM-GE


@dataclass(frozen=True)
class Recipe:
    """What one data set is trained with."""

    base: str  # a configuration that is shipped
    classes: int  # in the paper
    keys: dict[str, Any] = field(default_factory=dict)  # that differ from the base, by dotted path
    ours: str = ""  # what of them the paper leaves open
    epochs: bool = True  # whether the paper's 100


_TEXT = {"length": 128}
_SPECTRUM = {"sample_rate": 16000, "seconds": 1, "scale": "log_mel"}  # with a hop of 144, 112 windows
_LONG = {"data.audio.seconds": 10, "data.visual.frames": 3, "data.stretch": "random"}
_OURS = "three frames of a clip"
RECIPES = {
    "crema-d": Recipe("audio_visual/crema_d", 6),
    "ave": Recipe("audio_visual/crema_d", 28, {**_LONG, "objective.options.preset": "ave"}, _OURS),
    "kinetics-sounds": Recipe(
        "audio_visual/crema_d", 31, {**_LONG, "objective.options.preset": "kinetics_sounds"}, _OURS
    ),
    "vggsound": Recipe("audio_visual/crema_d", 309, {**_LONG, "objective.options.preset": "vggsound"}, _OURS),
    "ur-funny": Recipe(
        "audio_visual/crema_d",
        2,
        {
            "data.modalities": ["audio", "visual", "text"],
            "data.audio.seconds": 5,
            "data.stretch": "random",
            "data.text": _TEXT,
            "objective.options.preset": "ur_funny",
        },
        "5 seconds of a clip, its text as bytes from a small transformer",
    ),
    "cmu-mosei": Recipe(
        "audio_visual/crema_d",
        3,
        {
            "data.modalities": ["audio", "text"],
            "data.audio.seconds": 8,
            "data.stretch": "random",
            "data.text": _TEXT,
            "optimizer.learning_rate": 1e-4,
            "objective.options.preset": "cmu_mosei",
        },
        "8 seconds of a clip, its text as bytes from a small transformer",
    ),
    "av-mnist": Recipe(
        "audio_visual/crema_d",
        10,
        {
            "data.audio": {**_SPECTRUM, "window": 512, "hop": 144, "mels": 112},
            "data.visual.size": 28,
            "data.flip": False,
            "data.shift": 0.0,
            **{f"model.{kind}": {"widths": [32, 64, 128], "depths": [1, 1, 1]} for kind in ("audio", "visual")},
            "objective.options.preset": "av_mnist",
        },
        "the small ResNets",
    ),
    "spoken-digits": Recipe("audio_visual/demo", 10, {"name": "spoken-digits"}, "all of it", epochs=False),
    "spoken-written-digits": Recipe(
        "audio_visual/demo",
        10,
        {
            "data.modalities": ["audio", "visual", "text"],
            "data.text.length": 16,
            "model.text": {"width": 32, "layers": 2},
        },
        "all of it",
        epochs=False,
    ),
}


def configuration(name: str, manifest: Path, training: int, lists: str) -> str:
    """The YAML that trains on a data set as the paper has it.

    Args:
        name: Of the data set.
        manifest: Its manifest, whose path is written as it is.
        training: The clips that an epoch goes through: of its split train, less those held out to validate on.
        lists: What its splits come from.
    """
    recipe = RECIPES[name]
    data = yamlio.parse(shipped()[recipe.base].read_text(encoding="utf-8"))
    steps = max(1, math.ceil(training / BATCH))  # of an epoch
    keys = {"name": name, "data.manifest": str(manifest), **recipe.keys}
    head = [f"{name}: {recipe.classes} classes, splits by {lists}."]
    if recipe.epochs:
        keys |= {"model.fusion": "sum", "train.batch": BATCH, "train.epochs": EPOCHS, "train.steps": None}
        keys |= {"train.validate_every": steps, "checkpoint.every": 10 * steps}
        keys["schedule.rules"] = f"1:{FALL * steps},0.1"
        head.append(
            f"{EPOCHS} epochs of SGD, late fusion by sum, lam and mu: the paper's, Fernando et al., Appendix F."
        )
        head.append("Batch, sound, pictures, and a tenth of the rate after 70 epochs: those of OGM-GE's code.")
    if recipe.ours:
        head.append(f"Ours, for the paper does not say: {recipe.ours}.")
    for key, value in keys.items():
        _put(data, key.split("."), value)
    return "".join(f"# {line}\n" for line in head) + "#\n" + yamlio.render(data)


def _put(data: dict[str, Any], path: list[str], value: Any) -> None:
    for name in path[:-1]:
        data = data.setdefault(name, {})
    if value is None:
        data.pop(path[-1], None)
    else:
        data[path[-1]] = value
