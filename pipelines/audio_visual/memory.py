"""How much memory audio-visual training will take: see `equipoise.pipelines.training.memory`."""

import torch

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.audio_visual.features import MEMORY, bins, blank
from equipoise.pipelines.audio_visual.model import LateFusion
from equipoise.pipelines.pipeline import MemoryEstimate
from equipoise.pipelines.training.memory import DTYPES, PROGRAM, activations, size, training

_CLASSES = 32  # their number changes next to nothing


def estimate_memory(config: AudioVisualConfig) -> MemoryEstimate | None:
    """None where pretrained weights are not on this machine."""
    data, batch, dtype = config.data, config.train.batch, DTYPES[config.train.precision]
    with torch.device("meta"):
        try:
            model = LateFusion(config, _CLASSES, bins(data.audio), pretrained=False)
        except InputError:
            return None
        held = min(MEMORY, _count(data.manifest) * size(blank(data, 1).values()))
        weights = list(model.parameters())
        first, added = size(weights), training([p for p in weights if p.requires_grad], config.optimizer)
        given = blank(data, batch, dtype)
    # under autocast the weights stay float32 and what is computed from them does not
    kept = activations(lambda: model.to(dtype)(given), model.parameters())
    return MemoryEstimate(first + held, added, kept, PROGRAM)


def _count(manifest: str) -> int:
    """Clips, about: the lines of the manifest."""
    try:
        with open(manifest, "rb") as file:
            return 0 if manifest == demo.NAME else sum(1 for _ in file)
    except OSError:
        return 0
