"""How much memory audio-visual training will take: see `equipoise.pipelines.memory`."""

import torch
from torch import Tensor

from equipoise.pipelines import demo
from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.audio_visual.features import MEMORY
from equipoise.pipelines.audio_visual.model import LateFusion
from equipoise.pipelines.memory import DTYPES, PROGRAM, activations, size, training
from equipoise.pipelines.pipeline import Memory

_CLASSES = 32  # their number changes next to nothing


def memory(config: AudioVisualConfig) -> Memory | None:
    """None where pretrained weights are not on this machine."""
    data, batch, dtype = config.data, config.train.batch, DTYPES[config.train.precision]
    sound = data.audio
    bins = sound.mels if sound.scale == "log_mel" else sound.window // 2 + 1
    windows = 1 + max(sound.window, round(sound.seconds * sound.sample_rate)) // sound.hop
    with torch.device("meta"):
        try:
            model = LateFusion(config, _CLASSES, (bins, windows), pretrained=False)
        except OSError:
            return None

        def clips(count: int, dtype: torch.dtype) -> dict[str, Tensor]:
            side = data.visual.size
            every = {
                "audio": torch.zeros(count, 1, bins, windows, dtype=dtype),
                "visual": torch.zeros(count, data.visual.frames, 3, side, side, dtype=torch.uint8),
                "text": torch.zeros(count, data.text.length, dtype=torch.long),
            }
            return {name: every[name] for name in data.modalities}

        held = min(MEMORY, _count(data.manifest) * size(clips(1, torch.float32).values()))
        weights = list(model.parameters())
        first, added = size(weights), training(weights, config.optimizer)
        given = clips(batch, dtype)
    # under autocast the weights stay float32 and what is computed from them does not
    kept = activations(lambda: model.to(dtype)(given), model.parameters())
    return Memory(first + held, added, kept, PROGRAM)


def _count(manifest: str) -> int:
    """Clips, about: the lines of the manifest."""
    try:
        with open(manifest, "rb") as file:
            return 0 if manifest == demo.NAME else sum(1 for _ in file)
    except OSError:
        return 0
