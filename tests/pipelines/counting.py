"""A third party's pipeline, for tests: it counts to `train.steps`, and does all that a real one does around that."""

import json
import time
from pathlib import Path
from typing import ClassVar, Literal

from pydantic import Field

from equipoise.pipelines.config import PluginSection, RunConfig, Section
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.pipeline import Outcome, Pipeline


class Train(Section):
    steps: int = Field(20, gt=0, description="How far to count.")
    pause: float = Field(0.0, ge=0, lt=60, description="Seconds per step.")


class Data(Section):
    folder: str = Field(description="A folder that must exist.")


class Optimizer(PluginSection):
    KIND = "optimizers"
    OWN: ClassVar[dict[str, str]] = {"lr": "optimizer.learning_rate"}

    name: str = Field("adamw", description="Which.")
    learning_rate: float | None = Field(1e-3, gt=0, description="Per step.")


class Checkpoint(Section):
    every: int = Field(5, gt=0, description="Steps between checkpoints.")


class CountingConfig(RunConfig):
    SHORT: ClassVar[dict[str, str]] = {
        "data": "data.folder",
        "steps": "train.steps",
    }
    RESUMABLE: ClassVar[tuple[str, ...]] = ("train.steps", "checkpoint")

    data: Data
    train: Train = Train()
    checkpoint: Checkpoint = Checkpoint()
    prompts: list[str] = Field([], description="Texts.")
    end: Literal["good", "error", "nan", "bad input", "full disk"] = Field("good", description="How it goes.")
    note: str | None = Field(None, description="A text; `open the data` does that, and `cannot begin` fails.")

    @property
    def total_steps(self) -> int:
        return self.train.steps


class TunedConfig(CountingConfig):
    SHORT: ClassVar[dict[str, str]] = CountingConfig.SHORT | {
        "optimizer": "optimizer.name",
        "learning_rate": "optimizer.learning_rate",
    }

    optimizer: Optimizer = Field(default_factory=Optimizer)


class Counting(Pipeline):
    name = "counting"
    title = "Counting"
    Config = CountingConfig

    @classmethod
    def check(cls, config):
        return [] if Path(config.data.folder).is_dir() else [f"{config.data.folder}: no such folder. Set data=FOLDER."]

    @classmethod
    def run(cls, config, run):
        if config.note == "open the data":
            list(Path(config.data.folder).iterdir())
        saved = run.checkpoints / "count.json"
        count = json.loads(saved.read_bytes())["count"] if saved.exists() else 0
        run.log(f"from {count}")
        if config.note == "cannot begin":
            raise cls._unusable()
        run.rewind_metrics(count)
        run.update(step=count, total=config.train.steps)
        while count < config.train.steps:
            asked = run.requested()
            if asked:
                run.log(f"asked to {' and '.join(sorted(asked))}")
            if asked & {"stop", "save"}:
                write_atomic(saved, json.dumps({"count": count}))
            if "stop" in asked:
                return Outcome("stopped", f"stopped on request; {count} is saved.", count)
            if config.train.pause > 1:
                run.log("a long step begins")
            time.sleep(config.train.pause)
            count += 1
            run.metric(count, loss=float("nan") if config.end == "nan" else 1 / count, rate=1e-3)
            if config.end == "nan":
                return Outcome("diverged", "the loss is not finite.", count)
            if count == 3 and config.end == "error":
                raise KeyError("the third")
            if count == 3 and config.end == "bad input":
                raise cls._unusable()
            if config.end == "full disk":
                write_atomic(run.result / "big", b"0" * 1_000_000)
            if count % config.checkpoint.every == 0:
                write_atomic(saved, json.dumps({"count": count}))
        write_atomic(run.result / "count.txt", str(count))
        return Outcome("done", f"counted to {count}.", count)

    @staticmethod
    def _unusable():
        from equipoise.errors import InputError

        return InputError("picture 3: cannot be read.")


class Tuned(Counting):
    """The same with an optimizer to choose, for which torch is needed."""

    name = "tuned"
    Config = TunedConfig
