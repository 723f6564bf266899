"""Frozen weights that are spread over two processes: what is learnt is what two copies learn."""

import json
import os
import socket
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from equipoise import registry
from equipoise.errors import ConfigError
from equipoise.lora.pairs import is_dtensor
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.memory import estimate_memory
from equipoise.pipelines.instruction_tuning.model import adapt, load_model
from equipoise.pipelines.instruction_tuning.sharding import shard
from equipoise.pipelines.pipeline import execute, follow
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.state import _fingerprint

NAME = "instruction_tuning/demo"
LEARNS = ["steps=4", "learning_rate=1e-2", "schedule=constant", "batch=1"]
BOUNDED = ["optimizer=bounded_adamw", "samples.every=2", "train.validate_every=2"]
RUNS = {  # each with copies in both processes, and spread
    "bounded": [*BOUNDED, "coordinator=commit", "coordinator.options={measure_every: 1}"],
    "embedded": ["model=demo", "coordinator=feature_cd", "train.gradient_checkpointing=true"],
    "connector": ["language.method=frozen", "coordinator=constant"],  # to which a batch of text alone has no way back
    "dora": ["lora.dora=true", "coordinator=commit_clr", "lora.targets=[q_proj, lm_head]"],
}


class Stopping(Run):
    """Is asked to stop after two steps."""

    asked = 0

    def requested(self) -> set[str]:
        self.asked += 1
        return {"stop"} if self.asked == 3 else super().requested()


def take_part(rank: int, where: str, runs: list[tuple[str, type[Run]]]) -> tuple[int, int, bool]:
    """Trains the runs; gives how many numbers a process holds of the first one's frozen weights, of how many, and
    whether a run would resume on them as on whole ones."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": where, "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    processes.join()
    pipeline = registry.load("pipelines", "instruction_tuning")
    for folder, kind in runs:
        run = kind(Path(folder))
        if rank == 0:
            execute(pipeline, run.config(), run)
        else:
            follow(pipeline, run.config(), run.folder)
    config = Run(Path(runs[0][0])).config()
    tuned = adapt(load_model(config.model, "no"), config)
    known = _fingerprint(p for p in tuned.plain.parameters() if not p.requires_grad)
    shard(tuned, torch.device("cpu"))
    same = known == _fingerprint(p for p in tuned.plain.parameters() if not p.requires_grad)
    frozen = [p for name, p in tuned.plain.named_parameters() if tuned.parts.part(name) == "language"]
    frozen = [p for p in frozen if not p.requires_grad]
    held = sum((p.to_local() if is_dtensor(p) else p).numel() for p in frozen)
    return held, sum(p.numel() for p in frozen), same


@pytest.fixture
def mixed(pictures) -> Path:
    """Conversations about pictures, and as many of text alone."""
    words = [{"messages": [{"role": "user", "content": "what is it?"}, {"role": "assistant", "content": "red"}]}]
    records = [json.loads(line) for line in pictures.read_text().splitlines()]
    both = [record for one in records for record in (one, *words)]
    pictures.with_name("mixed.jsonl").write_text("".join(json.dumps(record) + "\n" for record in both))
    return pictures.with_name("mixed.jsonl")


def test_spread_weights_train_as_copies_do_and_resume_exactly(short, pictures, mixed, two_processes):
    def begin(name: str, shard: str, id: str) -> Run:
        data = pictures if name == "embedded" else mixed  # BLIP-2 reads no text alone
        words = [*short("llava", data), *LEARNS, *RUNS[name], f"model.shard={shard}"]
        return Store((config := configs.load(NAME, words)).runs).create(config, id=id)

    made = {(name, shard): begin(name, shard, f"{name}-{shard}") for name in RUNS for shard in ("true", "false")}
    stopped = begin("bounded", "true", "stopped")
    runs = [(str(run.folder), Run) for run in made.values()]
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    again = [(str(stopped.folder), Stopping), (str(stopped.folder), Run)]
    both = two_processes(take_part, port, [*runs, *again])
    assert all(held < 0.6 * whole for held, whole, _ in both), "of the frozen weights a process holds about half"
    assert all(same for *_, same in both)
    for name in RUNS:
        copies, sharded = made[name, "false"], made[name, "true"]
        assert alike(copies, sharded, rtol=1e-3, atol=1e-4), name
        assert losses(sharded) == pytest.approx(losses(copies), rel=1e-3), name
        scores = [json.loads((run.result / "result.json").read_text())["loss_after"] for run in (copies, sharded)]
        assert scores[0] == pytest.approx(scores[1], rel=1e-3)
        assert len(list(sharded.samples.glob("step-*"))) == len(list(copies.samples.glob("step-*")))
    assert "resumed from step-00000002" in stopped.log_file.read_text()
    assert alike(stopped, made["bounded", "true"], rtol=0, atol=0) and losses(stopped) == losses(
        made["bounded", "true"]
    )


def test_a_run_is_resumed_with_the_other_value_of_the_key(short, capsys):
    run = Store((config := configs.load(NAME, short())).runs).create(config, id="whole")
    assert main(["resume", str(run.folder), "model.shard=true"]) == 0
    assert run.config().model.shard and run.status().state == "done"
    capsys.readouterr()


def alike(one: Run, other: Run, **error: float) -> bool:
    """Whether two runs have learnt the same."""
    files = [{f.name: load_file(f) for f in sorted(run.result.glob("*.safetensors"))} for run in (one, other)]
    left, right = ({(f, key): t for f, some in found.items() for key, t in some.items()} for found in files)
    return left.keys() == right.keys() and all(torch.allclose(left[key], right[key], **error) for key in left)


def losses(run: Run) -> list[float]:
    return [record["loss"] for record in run.metrics()]


def test_the_estimate_counts_the_share(short, monkeypatch):
    """Of what is spread half, and two layers that are put together."""
    words = [*short(), "model.shard=true"]
    alone = estimate_memory(configs.load(NAME, words))
    monkeypatch.setenv("RANK", "0")
    monkeypatch.setenv("WORLD_SIZE", "2")
    whole, share = (estimate_memory(configs.load(NAME, some)) for some in (short(), words))
    assert alone.model == whole.model, "one process has all of it"
    tuned = adapt(load_model(configs.load(NAME, short()).model, "no"), configs.load(NAME, short()))
    layers = [
        n for n, _ in tuned.plain.named_modules() if n.endswith(("embed_tokens", "layers.0", "layers.1", "lm_head"))
    ]
    sizes = []
    for name in layers:
        if tuned.parts.part(name) == "language":
            some = tuned.plain.get_submodule(name).parameters()
            sizes.append(sum(4 * p.numel() for p in some if not p.requires_grad))
    assert whole.model - share.model == round((sum(sizes) - sum(sorted(sizes)[-2:])) / 2) > 0


def test_what_cannot_be_spread_is_said(short):
    assert InstructionTuning.doubts(configs.load(NAME, [*short(), "model.shard=true"])) == [
        "model.shard: one process trains this run, and holds all weights. Start several, with torchrun or accelerate "
        "launch: docs/distributed.md."
    ]
    for word, reason in (("model.quantize=nf4", "quantize is nf4"), ("language.method=full", "leaves none")):
        with pytest.raises(ConfigError, match=reason):
            configs.load(NAME, [*short(), "model.shard=true", word])
