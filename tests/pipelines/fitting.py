"""A third party's pipeline, for tests: real steps of AdamW, in the loop that all pipelines share."""

import time

import torch
from pydantic import Field

from equipoise.pipelines.config import TrainConfig
from equipoise.pipelines.config.sections import CheckpointSection, Steps, TrainSection
from equipoise.pipelines.pipeline import Pipeline
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.training.loop import train_loop


class Train(TrainSection):
    steps: Steps = 20
    pause: float = Field(0.0, ge=0, description="Seconds per step.")


class FittingConfig(TrainConfig):
    train: Train = Train()
    checkpoint: CheckpointSection = CheckpointSection(every=5)


class Work:
    def __init__(self, config: FittingConfig):
        self.config = config
        torch.manual_seed(config.seed)
        self.weight = torch.nn.Parameter(torch.randn(8, 8))
        self.optimizer = torch.optim.AdamW([self.weight], lr=0.1)

    def step(self, step: int) -> dict[str, float]:
        time.sleep(self.config.train.pause)
        torch.manual_seed(self.config.seed * 1000 + step)
        given = torch.randn(16, 8)
        loss = (given @ self.weight - given.sin()).square().mean()
        loss.backward()
        self.optimizer.step()
        self.optimizer.zero_grad()
        return {"loss": loss.item()}

    def weights(self) -> dict[str, torch.Tensor]:
        return {"weight": self.weight}

    def state(self) -> dict:
        return {"optimizer": self.optimizer.state_dict()}

    @torch.no_grad()
    def restore(self, weights: dict, state: dict) -> None:
        self.weight.copy_(weights["weight"])
        self.optimizer.load_state_dict(state["optimizer"])

    def sound(self) -> bool:
        return True


class Fitting(Pipeline):
    name = "fitting"
    title = "Fitting"
    Config = FittingConfig

    @classmethod
    def run(cls, config, run):
        work = Work(config)
        outcome = train_loop(run, work, config)
        if outcome.state == "done":
            checkpoints.save_tensors(run.result / "fitted.safetensors", work.weights())
        return outcome
