"""Two processes, each with half of every batch, train as one does with the whole: every method, and the pipelines."""

import json
import os
import shutil
import signal
import socket
import time
from pathlib import Path
from types import SimpleNamespace

import psutil
import pytest
import torch
from safetensors.torch import load_file

from equipoise import registry
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.runs.run import Following
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.training import processes

STEPS, BATCH = 4, 8
METHODS = [
    *((name, "joint") for name in ("sgd", "adamw", "scaled_gd", "scaled_adamw", "bounded_adamw", "alpha_adam")),
    *((name, "joint") for name in ("ada_sam", "sam")),
    *(("sgd", e.name) for e in registry.entries("objectives") if e.distribution == "equipoise"),
]
NOISY = ("sgd", "noisy")  # draws random numbers in its step
OPTIONS = {
    "mslr": {"factors": {"audio": 0.5, "visual": 2.0}},
    "ogm_ge": {"tensors": "all", "noise": False},
    "noisy": {"tensors": "all"},
    "gradient_blending": {"weights": {"joint": 0.5, "audio": 0.2, "visual": 0.3}},
    "recon_boost": {"epochs_each": 0.5, "epochs_all": 0.25},
}


def port() -> str:
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        return str(free.getsockname()[1])


def trained(optimizer: str, objective: str) -> dict[str, torch.Tensor]:
    """The weights after some steps of two small encoders with LoRA-like factors in each, in float64."""
    from torch import nn
    from torch.nn import functional as F

    from equipoise.balancing.objective import Losses
    from equipoise.pipelines.training.state import OptimizedWork, make_accelerator

    class Factors(nn.Module):
        def __init__(self):
            super().__init__()
            self.lora_A, self.lora_B = nn.Linear(6, 2, bias=False), nn.Linear(2, 5, bias=False)
            self.register_buffer("weight", torch.randn(5, 6))

        def forward(self, given):
            return torch.tanh(given @ self.weight.T + self.lora_B(self.lora_A(given)))

    class Toy(OptimizedWork):
        def __init__(self, config):
            torch.manual_seed(0)
            self.nets = nn.ModuleDict({name: Factors() for name in ("audio", "visual")}).double()
            one = nn.Linear(5, 3)  # for all of them, where the objective wants that
            self.heads = nn.ModuleDict({n: one if objective == "mla" else nn.Linear(5, 3) for n in self.nets}).double()
            self.data = torch.randn(STEPS * 2 * BATCH, 2, 6, dtype=torch.float64)
            self.labels = torch.randint(0, 3, (len(self.data),))
            self.weights = torch.tensor([0.25, 1.0, 4.0], dtype=torch.float64)  # of the classes, for Losses.of
            nets = [(f"{n}.{k}", p) for n, net in self.nets.items() for k, p in net.named_parameters()]
            heads = list(self.heads.named_parameters())
            groups = [{"params": some, "lr": 0.05, "component": c} for some, c in ((nets, "nets"), (heads, "heads"))]
            encoders = {name: list(net.parameters()) for name, net in self.nets.items()}
            super().__init__(config, None, make_accelerator("no"), dict([*nets, *heads]), groups, encoders)
            self.objective.steps_per_epoch = len(self.data) / (2 * BATCH)
            self.objective.joint_head = [p for _, p in heads]

        def encoded(self, chosen):
            return {n: net(self.data[chosen, i]) for i, (n, net) in enumerate(self.nets.items())}

        def step(self, step):
            if self.objective.wants_features():
                given = {n: made.detach() for n, made in self.encoded(range(len(self.data))).items()}, self.labels
                self.objective.take_features(*given, *given)
            return super().step(step)

        def evaluate(self, step, micro):
            chosen = list(self.share(step * self.config.train.accumulate + micro))
            labels = self.labels[chosen]
            features = self.encoded(chosen)
            live = self.objective.uses_unimodal
            said = {name: self.heads[name](made if live else made.detach()) for name, made in features.items()}
            joint = F.cross_entropy(sum(self.heads[name](made) for name, made in features.items()), labels)
            parted = self.objective.needs_head != "any"
            responses = {n: self.heads[n](made) if parted else said[n].detach() for n, made in features.items()}
            own = {n: F.cross_entropy(s, labels) for n, s in said.items()}
            made = features if self.objective.uses_features else None
            return Losses(joint, own, labels, responses, made, self.weights[labels])

    def section(name, **options):
        return SimpleNamespace(name=name, learning_rate=0.05, outside_learning_rate=None, options=options)

    config = SimpleNamespace(
        seed=0,
        optimizer=section(optimizer),
        objective=section(objective.replace("noisy", "ogm_ge"), **OPTIONS.get(objective, {})),
        coordinator=section("constant"),
        schedule=SimpleNamespace(name="constant", warmup=0, rules="", cycles=1.0, power=1.0),
        train=SimpleNamespace(steps=STEPS, batch=BATCH // processes.count(), accumulate=2, clip=1.0),
    )
    work = Toy(config)
    for step in range(STEPS):
        work.step(step)
    return {name: tensor.detach().clone() for name, tensor in work.named.items()}


def take_part(rank: int, where: str) -> dict:
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": where, "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    processes.join()
    found = {}
    for optimizer, objective in [*METHODS, NOISY]:
        found[optimizer, objective] = {k: v.tolist() for k, v in trained(optimizer, objective).items()}
    torch.distributed.destroy_process_group()
    return found


def test_every_method_takes_the_step_of_one_process(two_processes):
    """To 1e-6 in float64, with accumulation and clipping."""
    both = two_processes(take_part, port())
    for method in METHODS:
        alone = trained(*method)
        for name, tensor in alone.items():
            ours = [torch.tensor(found[method][name], dtype=torch.float64) for found in both]
            assert torch.equal(*ours), (method, name)
            assert torch.allclose(ours[0], tensor, rtol=0, atol=1e-6), (method, name)
    assert both[0][NOISY] == both[1][NOISY] != both[0]["sgd", "ogm_ge"]


def test_a_run_in_two_processes_is_written_once_equals_one_and_survives_a_worker(
    short, launch, launched, tmp_path, capfd
):
    words = ["text_to_image/dreambooth", *short, "steps=10", "checkpoint_every=2"]
    words += ["samples.prompts=[a vase]", "samples.every=5", "optimizer=scaled_adamw", "learning_rate=1e-3"]
    out = launched("train", *words, "batch=2", "--id", "two")
    assert out.count("two: training in") == 1 and ", in 2 processes" in out and out.count("two: done.") == 1
    config = configs.load(words[0], [*words[1:], "batch=4"])
    store = Store(config.runs)
    one = store.create(config, id="one")
    assert execute(registry.load("pipelines", "text_to_image"), config, one).state == "done"
    two = store.get("two")
    left, right = (load_file(run.result / "pytorch_lora_weights.safetensors") for run in (two, one))
    assert left.keys() == right.keys() and all(torch.allclose(left[k], right[k], atol=1e-5) for k in left)
    assert [m["step"] for m in two.metrics()] == [m["step"] for m in one.metrics()]
    assert [m["loss"] for m in two.metrics()] == pytest.approx([m["loss"] for m in one.metrics()], rel=1e-4)
    assert two.status().state == "done" and len(list(two.samples.glob("step-*"))) == 2

    process = launch("train", *words, "batch=2", "--id", "killed", start_new_session=True)
    run = tmp_path / "runs" / "killed"
    deadline = time.monotonic() + 120
    while not (run / "checkpoints" / "step-00000002").exists() and time.monotonic() < deadline:
        time.sleep(0.01)
    pids = [child.pid for child in psutil.Process(process.pid).children() if "equipoise" in " ".join(child.cmdline())]
    leader = json.loads((run / "status.json").read_text())["pid"]
    os.kill(next(pid for pid in pids if pid != leader), signal.SIGKILL)
    process.communicate(timeout=120)
    assert process.returncode != 0
    ended = store.get("killed").status()  # who notices first, the launcher or the leader, is a matter of luck
    assert ended.state in ("failed", "stopped", "dead")
    assert ended.state != "failed" or ended.message == (
        "another process of this run has ended. Resume it; the last checkpoint stays."
    )
    assert checkpoints.complete(run / "checkpoints")
    shutil.copytree(run, run.with_name("alone"))
    capfd.readouterr()
    assert main(["resume", str(run)]) == 2
    err = capfd.readouterr().err
    assert "each of its steps so far was of 2 processes and other examples than 1 would take." in err
    assert f"torchrun --nproc-per-node 2 -m equipoise.pipelines.cli resume {run} goes on as it was" in err
    assert main(["resume", str(run.with_name("alone")), "train.batch=4"]) == 0, "which are as many examples"
    alone = load_file(run.with_name("alone") / "result" / "pytorch_lora_weights.safetensors")
    assert all(torch.allclose(left[key], alone[key], atol=1e-5) for key in left)
    launched("resume", str(run))
    assert store.get("killed").status().state == "done"
    resumed = load_file(run / "result" / "pytorch_lora_weights.safetensors")
    assert all(torch.equal(left[key], resumed[key]) for key in left)


def test_what_cannot_be_launched_is_refused(short, tmp_path, monkeypatch, capfd):
    from equipoise.pipelines.cli import main

    monkeypatch.setenv("ACCELERATE_USE_DEEPSPEED", "true")
    for command in ("train", "sweep"):  # alone, too
        assert main([command, "text_to_image/dreambooth", *short]) == 2
        assert "DeepSpeed takes models apart" in capfd.readouterr().err and not (tmp_path / "runs").exists()
    monkeypatch.delenv("ACCELERATE_USE_DEEPSPEED")
    monkeypatch.setenv("WORLD_SIZE", "2")
    monkeypatch.setenv("RANK", "0")
    for name, word in (("ACCELERATE_USE_FSDP", "FSDP"), ("ACCELERATE_USE_DEEPSPEED", "DeepSpeed")):
        with monkeypatch.context() as context:
            context.setenv(name, "true")
            assert main(["train", "text_to_image/dreambooth", *short]) == 2
        assert f"{word} takes models apart" in capfd.readouterr().err
    assert main(["train", "text_to_image/dreambooth", *short, "--detach"]) == 2
    assert "--detach: starts one process" in capfd.readouterr().err
    for words in (["sweep", "text_to_image/dreambooth", "--axis", "seed=0,1", *short], ["demo"]):
        assert main(words) == 2
        assert "starts processes of its own. Run it without accelerate launch" in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()


def test_who_follows_writes_nothing(short, tmp_path):
    from equipoise.pipelines import config

    settings = config.load("text_to_image/dreambooth", short)
    made = Store(settings.runs).create(settings)
    before = {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
    run = Following(Path(made.folder))
    run.log("a word")
    run.metric(1, loss=0.5)
    run.update(step=3)
    run.rewind_metrics(0)
    made.request("stop")
    assert run.requested() == set() and made.requested() == {"stop"}
    assert before == {path: path.read_bytes() for path in made.folder.rglob("*") if path.is_file()}
