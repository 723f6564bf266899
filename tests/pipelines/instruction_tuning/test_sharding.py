"""Frozen weights that are spread over two processes: what is learnt is what two copies learn."""

import json
import os
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from equipoise import registry
from equipoise.pipelines import config as configs
from equipoise.pipelines.pipeline import execute, follow
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.training import processes

NAME = "instruction_tuning/demo"
LEARNS = ["learning_rate=1e-2", "schedule=constant", "samples.every=2", "train.validate_every=2", "batch=1"]
RUNS = {  # each with copies in both processes, and spread
    "bounded": ["optimizer=bounded_adamw", "coordinator=commit", "coordinator.options={measure_every: 1}"],
    "embedded": ["model=demo", "coordinator=feature_cd", "train.gradient_checkpointing=true"],
    "connector": ["language.method=frozen", "coordinator=constant"],
    "dora": ["lora.dora=true", "coordinator=commit_clr", "lora.targets=[q_proj, lm_head]"],
}


class Stopping(Run):
    """Is asked to stop after some steps."""

    asked = 0

    def requested(self) -> set[str]:
        self.asked += 1
        return {"stop"} if self.asked == 4 else super().requested()


def take_part(rank: int, where: str, folders: list[tuple[str, bool]]) -> dict[str, int]:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": where, "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    processes.join()
    pipeline = registry.load("pipelines", "instruction_tuning")
    for folder, stops in folders:
        run = (Stopping if stops else Run)(Path(folder))
        if rank == 0:
            execute(pipeline, run.config(), run)
        else:
            follow(pipeline, run.config(), run.folder)
    return {}


def port() -> str:
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


@pytest.fixture
def mixed(pictures) -> Path:
    """Conversations about pictures, and as many of text alone."""
    records = [json.loads(line) for line in pictures.read_text().splitlines()]
    words = [{"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "red"}]}]
    both = [record for one in records for record in (one, *words)]
    pictures.with_name("mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in both))
    return pictures.with_name("mixed.jsonl")


def test_spread_weights_train_as_copies_do_and_resume_exactly(short, pictures, mixed, two_processes):
    made = {}
    for name, words in RUNS.items():
        for shard in ("false", "true"):
            data = pictures if name == "embedded" else mixed
            config = configs.load(NAME, [*short("llava", data), *LEARNS, *words, f"model.shard={shard}"])
            made[name, shard] = Store(config.runs).create(config, id=f"{name}-{shard}")
    config = configs.load(NAME, [*short("llava", mixed), *LEARNS, *RUNS["bounded"], "model.shard=true"])
    stopped = Store(config.runs).create(config, id="stopped")
    folders = [(str(run.folder), False) for run in made.values()]
    two_processes(take_part, port(), [*folders, (str(stopped.folder), True), (str(stopped.folder), False)])
    for name in RUNS:
        copies, spread = made[name, "false"], made[name, "true"]
        assert spread.status().state == "done", spread.status().message
        for file in copies.result.glob("*.safetensors"):
            left, right = load_file(file), load_file(spread.result / file.name)
            assert left.keys() == right.keys()
            for key in left:
                torch.testing.assert_close(left[key], right[key], rtol=1e-3, atol=1e-4)
        assert [m["loss"] for m in spread.metrics()] == pytest.approx([m["loss"] for m in copies.metrics()], rel=1e-3)
