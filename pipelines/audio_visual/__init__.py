"""Audio-visual classification in balance: manifest → features → late fusion → accuracy, joint and per modality."""

import os
from pathlib import Path

from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.pipeline import MemoryEstimate, Outcome, Pipeline, Predictions
from equipoise.pipelines.runs.run import Run
from equipoise.quick import no_garbage_collection

# Read when transformers is first imported: its notes on parts that are not used here would break up the progress bars.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class AudioVisual(Pipeline):
    """Classification of clips by sound, pictures and text, where no modality starves."""

    name = "audio_visual"
    title = "Audio-visual classification"
    Config = AudioVisualConfig
    loading = "from equipoise.pipelines.audio_visual.model import load; model, classes = load({folder!r})"
    asks = ("features",)
    formats = ("weights", "onnx")
    exports_folders = True

    @classmethod
    def check(cls, config: AudioVisualConfig) -> list[str]:
        from equipoise.pipelines.audio_visual.check import problems

        return problems(config)

    @classmethod
    def doubts(cls, config: AudioVisualConfig) -> list[str]:
        from equipoise.pipelines.audio_visual.check import doubts

        return doubts(config)

    @classmethod
    def examples(cls, config: AudioVisualConfig) -> int:
        from equipoise.pipelines.audio_visual.prepared import prepare

        return len(prepare(config).splits(config)["train"])

    @classmethod
    def estimate_memory(cls, config: AudioVisualConfig) -> MemoryEstimate | None:
        from equipoise.pipelines.audio_visual.memory import estimate_memory

        return estimate_memory(config)

    @classmethod
    def run(cls, config: AudioVisualConfig, run: Run) -> Outcome:
        with no_garbage_collection():
            from equipoise.pipelines.audio_visual.train import train

        return train(config, run)

    @classmethod
    def compare(cls, name, folder, runs, configs, asked) -> Comparison:
        with no_garbage_collection():
            from equipoise.pipelines.audio_visual.compare import compare

        return compare(name, folder, runs, configs)

    @classmethod
    def export(cls, result: Path, format: str, output: Path) -> None:
        with no_garbage_collection():
            from equipoise.pipelines.audio_visual.export import export

        export(result, format, output)

    @classmethod
    def predict(cls, run, config, sources, asked) -> Predictions:
        with no_garbage_collection():
            from equipoise.pipelines.audio_visual.predict import predict

        return predict(run, sources)

    @classmethod
    def evaluate(cls, run, config, file) -> Predictions:
        with no_garbage_collection():
            from equipoise.pipelines.audio_visual.predict import evaluate

        return evaluate(run, file)
