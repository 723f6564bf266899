"""LoRA tuning of text-to-image models: config → check → train → a LoRA file that diffusers loads."""

import os
from pathlib import Path

from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.pipeline import MemoryEstimate, Outcome, Pipeline, Predictions
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.formats.names import FORMATS
from equipoise.quick import no_garbage_collection

# Read when transformers is first imported: its notes on parts that are not used here would break up the progress bars.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class TextToImage(Pipeline):
    """LoRA tuning of Stable Diffusion, FLUX, Z-Image, Qwen-Image and other families on captioned pictures."""

    name = "text_to_image"
    title = "Text to image (LoRA)"
    Config = TextToImageConfig
    comparing = "draws it beside the untouched base"
    loading = "pipeline.load_lora_weights({folder!r})"
    formats = tuple(FORMATS)
    asks = ("prompts", "count", "scale")
    draws = True

    @classmethod
    def check(cls, config: TextToImageConfig) -> list[str]:
        from equipoise.pipelines.text_to_image.check import problems

        return problems(config)

    @classmethod
    def doubts(cls, config: TextToImageConfig) -> list[str]:
        from equipoise.pipelines.text_to_image.check import doubts

        return doubts(config)

    @classmethod
    def examples(cls, config: TextToImageConfig) -> int:
        from equipoise.pipelines.text_to_image.check import examples

        return examples(config)

    @classmethod
    def notes(cls, config: TextToImageConfig) -> list[str]:
        from equipoise.pipelines.text_to_image.check import notes

        return notes(config)

    @classmethod
    def estimate_memory(cls, config: TextToImageConfig) -> MemoryEstimate | None:
        from equipoise.pipelines.text_to_image.memory import estimate_memory

        return estimate_memory(config)

    @classmethod
    def run(cls, config: TextToImageConfig, run: Run) -> Outcome:
        with no_garbage_collection():
            from equipoise.pipelines.text_to_image.train import train

        return train(config, run)

    @classmethod
    def compare(cls, name, folder, runs, configs, asked) -> Comparison:
        with no_garbage_collection():
            from equipoise.pipelines.text_to_image.compare import compare

        return compare(name, folder, runs, configs, asked.samples, asked.judges)

    @classmethod
    def compare_files(cls, name, folder, given, config, strengths) -> Comparison:
        with no_garbage_collection():
            from equipoise.pipelines.text_to_image.compare_files import compare_files

        return compare_files(name, folder, given, config, strengths)

    @classmethod
    def result_file(cls, run: Run) -> Path:
        from equipoise.pipelines.text_to_image.result import LORA_FILE

        return run.result / LORA_FILE

    @classmethod
    def predict(cls, run, config, sources, asked) -> Predictions:
        with no_garbage_collection():
            from equipoise.pipelines.text_to_image.predict import predict

        return predict(run, config, sources, asked)

    @classmethod
    def evaluate(cls, run, config, file) -> Predictions:
        with no_garbage_collection():
            from equipoise.pipelines.text_to_image.predict import evaluate

        return evaluate(run, config, file)

    @classmethod
    def export(cls, result: Path, format: str, output: Path) -> None:
        from equipoise.pipelines.text_to_image.result import export

        export(result, format, output)

    @classmethod
    def publish(cls, run: Path, config: TextToImageConfig, folder: Path) -> None:
        from equipoise.pipelines.text_to_image.card import publish

        publish(run, config, folder)
