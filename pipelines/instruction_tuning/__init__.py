"""Instruction tuning of multimodal language models: config → check → train → an adapter that PEFT loads."""

import os
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.pipeline import MemoryEstimate, Outcome, Pipeline, Predictions
from equipoise.pipelines.runs import environment
from equipoise.pipelines.runs.run import Run
from equipoise.quick import no_garbage_collection

# Read when transformers is first imported: its notes on parts that are not used here would break up the progress bars.
os.environ.setdefault("TRANSFORMERS_VERBOSITY", "error")


class InstructionTuning(Pipeline):
    """Instruction tuning of multimodal language models on conversations about pictures or sounds."""

    name = "instruction_tuning"
    title = "Instruction tuning (pictures or sounds, and language)"
    Config = InstructionTuningConfig
    comparing = "asks it what it asks the untouched base"
    loading = "PeftModel.from_pretrained(model, {folder!r})  # after encoder.safetensors: docs/instruction_tuning.md"
    formats = ("adapter", "merged")
    exports_folders = True
    asks = ("prompts", "server")

    @classmethod
    def check(cls, config: InstructionTuningConfig) -> list[str]:
        from equipoise.pipelines.instruction_tuning.check import problems

        return problems(config)

    @classmethod
    def doubts(cls, config: InstructionTuningConfig) -> list[str]:
        from equipoise.pipelines.instruction_tuning.check import doubts

        return doubts(config)

    @classmethod
    def examples(cls, config: InstructionTuningConfig) -> int | None:
        from equipoise.pipelines.instruction_tuning.check import examples

        return examples(config)

    @classmethod
    def notes(cls, config: InstructionTuningConfig) -> list[str]:
        from equipoise.pipelines.instruction_tuning.check import notes

        return notes(config)

    @classmethod
    def estimate_memory(cls, config: InstructionTuningConfig) -> MemoryEstimate | None:
        from equipoise.pipelines.instruction_tuning.memory import estimate_memory

        return estimate_memory(config)

    @classmethod
    def run(cls, config: InstructionTuningConfig, run: Run) -> Outcome:
        with no_garbage_collection():
            from equipoise.pipelines.instruction_tuning.train import train

        return train(config, run)

    @classmethod
    def compare(cls, name, folder, runs, configs, asked) -> Comparison:
        with no_garbage_collection():
            from equipoise.pipelines.instruction_tuning.compare import compare

        return compare(name, folder, runs, configs, asked.samples)

    @classmethod
    def predict(cls, run, config, sources, asked) -> Predictions:
        if len(sources) != 1:
            raise InputError(f"FILE_OR_FOLDER: give one, got {len(sources)}.")
        with no_garbage_collection():
            from equipoise.pipelines.instruction_tuning.predict import predict

        return predict(run, config, sources[0], asked.prompts, asked.server)

    @classmethod
    def evaluate(cls, run, config, file, server=None) -> Predictions:
        with no_garbage_collection():
            from equipoise.pipelines.instruction_tuning.predict import evaluate

        return evaluate(run, config, file, server)

    @classmethod
    def export(cls, result: Path, format: str, output: Path) -> None:
        with no_garbage_collection():
            from equipoise.pipelines.instruction_tuning.export import export

        run = Run(result.parent)
        with environment.there(run.folder / "environment.json"):  # a base's relative path starts there
            export(result, run.config(), format, output)
