"""Sweeps on a real Ray: a cluster of this machine alone."""

import os
import signal
import socket
import subprocess
import sys
import tempfile
import time
from importlib.util import find_spec
from pathlib import Path

import psutil
import pytest
import torch
from safetensors.torch import load_file

from equipoise.pipelines.cli import main
from equipoise.pipelines.jobs import on_ray
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.run import Run

# Under `make soak`, which installs it: a cluster is a dozen processes, too many for a small machine beside other tests.
pytestmark = [pytest.mark.soak, pytest.mark.skipif(not find_spec("ray"), reason="Ray is not installed")]
COMMAND = """
import sys
from equipoise.pipelines.jobs import storage
from equipoise.pipelines.cli import main
storage.EVERY = 0.3
sys.exit(main(sys.argv[1:]))
"""


CLUSTER = """
import sys
import ray
ray.init(num_cpus=2, include_dashboard=False)
print(ray.get_runtime_context().gcs_address, flush=True)
sys.stdin.read()
"""
PIPES = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}


@pytest.fixture(scope="module")
def environment(tmp_path_factory):
    """What Ray's processes are started with; they find the pipelines that count and fit."""
    site = tmp_path_factory.mktemp("site")
    for name in ("counting", "fitting"):
        (site / f"{name}.py").write_text((Path(__file__).parents[1] / f"{name}.py").read_text())
        info = site / f"{name}-1.0.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: 1.0\n")
        (info / "entry_points.txt").write_text(f"[equipoise.pipelines]\n{name} = {name}:{name.title()}\n")
    # Names of sockets may have a hundred letters: pytest's folders are too deep.
    with tempfile.TemporaryDirectory(prefix="ray-", dir="/tmp", ignore_cleanup_errors=True) as place:
        mine = {"RAY_TMPDIR": place, "HOME": place, "XDG_CACHE_HOME": place, "PYTHONPATH": str(site)}
        others = {name: value for name, value in os.environ.items() if name != "RAY_ADDRESS"}
        yield others | mine | {"OMP_NUM_THREADS": "1", "RAY_AUTH_MODE": "disabled"}


@pytest.fixture(scope="module")
def address(environment):
    """Of a cluster of one node with two CPUs."""
    process = subprocess.Popen([sys.executable, "-c", CLUSTER], env=environment, **PIPES)
    found = process.stdout.readline().strip()
    yield found
    _, err = process.communicate()
    assert found, err


@pytest.fixture
def start(environment, tmp_path, monkeypatch):
    """Starts a command line, in a folder with a configuration of each of the pipelines, and nothing else."""
    monkeypatch.syspath_prepend(environment["PYTHONPATH"])
    monkeypatch.setenv("XDG_CACHE_HOME", environment["XDG_CACHE_HOME"])
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    Path("pictures").mkdir()
    Path("vase.yaml").write_text("pipeline: counting\nname: vase\ndata: pictures\n")
    Path("fit.yaml").write_text("pipeline: fitting\nname: fit\n")
    begun: list[subprocess.Popen] = []

    def started(*words: str) -> subprocess.Popen:
        begun.append(subprocess.Popen([sys.executable, "-P", "-c", COMMAND, *words], env=environment, **PIPES))
        return begun[-1]

    yield started
    for process in begun:
        process.kill()
        process.communicate()


@pytest.mark.slow
def test_a_cell_whose_worker_is_killed_ends_as_if_it_had_not_been(start, address, until):
    words = ["fit.yaml", "steps=30", "train.pause=0.1"]
    axis = ["--axis", "seed=0,1", "--id", "k", "--no-compare"]
    process = start("sweep", *words, *axis, "--executor", "ray", "--address", address)
    cell = Path("runs/k/seed=0")
    until(lambda: (cell / "checkpoints/step-00000010").exists(), "a checkpoint")
    os.kill(Run(cell).status().pid, signal.SIGKILL)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "k: done. 2 cells: 2 done." in out, err
    assert "Ray: 1 nodes, 2 CPUs, 0 GPUs; each cell asks for 1 CPUs and 0 GPUs." in out
    log = (cell / "log.txt").read_text()
    assert "the process of its task is gone (WorkerCrashedError); tried again" in log and "resumed from step-" in log
    assert [record["step"] for record in Run(cell).metrics()] == list(range(1, 31))
    assert main(["train", *words, "seed=0", "train.pause=0", "--id", "unharmed"]) == 0
    results = [
        Path("runs", id, "result/fitted.safetensors").read_bytes() for id in ("k/seed=0", "k/seed=1", "unharmed")
    ]
    assert results[0] == results[2] != results[1]


@pytest.mark.slow
def test_a_cell_has_no_modules_of_the_folder_that_its_sweep_is_started_in(start, address):
    Path("torch.py").write_text("raise SystemExit('a module of the current folder was imported')")
    axis = ["--axis", "seed=0", "--id", "k", "--no-compare"]
    process = start("sweep", "fit.yaml", "steps=1", *axis, "--executor", "ray", "--address", address)
    out, err = process.communicate(timeout=240)
    assert process.returncode == 0 and "k: done. 1 cells: 1 done." in out, out + err


@pytest.mark.slow
def test_cells_travel_through_a_storage_and_the_sweep_stops_and_goes_on(start, address, until, tmp_path):
    axis = ["--axis", "seed=0,1", "--id", "k", "--no-compare", "--max-parallel", "1"]
    where = ["--executor", "ray", "--address", address, "--storage", f"file://{tmp_path}/storage"]
    process = start("sweep", "vase.yaml", "train.pause=0.1", "steps=30", *axis, *where)
    until(lambda: Path("runs/k/seed=0/metrics.jsonl").exists(), "steps that are brought back")
    first, second = mine = sweeps.cells(Run("runs/k"))
    until(lambda: len(first.metrics()) > 5, "more of them")
    assert [cell.status().state for cell in mine] == ["running", "queued"], "one at a time"
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 130 and "`equipoise resume k` continues it" in out and "Traceback" not in err, err
    assert [cell.status().state for cell in mine] == ["stopped"] * 2
    saved = first.status().step
    assert 5 < saved < 30 and "is saved" in first.status().message

    process = start("sweep", "k", "--no-compare", "--max-parallel", "2")  # the rest is as before
    until(lambda: second.status().state == "running" and len(second.metrics()) > 5, "the second cell")
    os.kill(second.status().pid, signal.SIGKILL)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "k: done. 2 cells: 2 done." in out, err
    assert f"from {saved}\n" in first.log_file.read_text(), "what was saved elsewhere is gone on from"
    assert "tried again" in second.log_file.read_text()
    for cell in mine:
        assert [record["step"] for record in cell.metrics()] == list(range(1, 31))
        assert (cell.result / "count.txt").read_text() == "30"


@pytest.mark.slow
def test_what_a_storage_could_not_give_when_a_task_ended_is_fetched_later(start, address, until, tmp_path):
    axis = ["--axis", "seed=0,1", "--id", "k", "--no-compare", "--max-parallel", "1"]
    where = ["--executor", "ray", "--address", address, "--storage", f"file://{tmp_path}/storage"]
    process = start("sweep", "vase.yaml", "train.pause=0.1", "steps=20", *axis, *where)
    storage, away = tmp_path / "storage", tmp_path / "away"
    until(lambda: Path("runs/k/seed=0/metrics.jsonl").exists(), "steps that are brought back")
    first, second = sweeps.cells(Run("runs/k"))
    storage.rename(away)
    storage.write_text("no folder")
    until(lambda: "NotADirectoryError" in first.log_file.read_text(), "the outage to be told")
    time.sleep(6)  # twice as long as its steps take
    assert not first.status().over and second.status().state == "queued"
    storage.unlink()
    away.rename(storage)
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "k: done. 2 cells: 2 done." in out, err
    assert first.log_file.read_text().count("from 0\n") == 1, "it is not trained twice"
    assert [record["step"] for record in first.metrics()] == list(range(1, 21))


@pytest.mark.slow
def test_the_embedded_sweep_loses_a_worker_and_nothing_else(start, address, until):
    words = ["text_to_image/demo", "steps=12", "checkpoint_every=2", "samples.steps=2"]
    axes = ["--axis", "optimizer=adamw,scaled_adamw", "--axis", "seed=0", "--id", "k"]
    process = start("sweep", *words, *axes, "--executor", "ray", "--address", address)
    cell = Path("runs/k/optimizer=scaled_adamw,seed=0")
    until(lambda: (cell / "checkpoints/step-00000004").exists(), "a checkpoint")
    os.kill(Run(cell).status().pid, signal.SIGKILL)
    out, err = process.communicate(timeout=400)
    assert process.returncode == 0 and "k: done. 2 cells: 2 done." in out, err
    log = (cell / "log.txt").read_text()
    assert "tried again" in log and "resumed from step-" in log
    assert main(["train", *words, "optimizer=scaled_adamw", "--id", "unharmed"]) == 0
    name = "result/pytorch_lora_weights.safetensors"
    lost, unharmed = load_file(cell / name), load_file(Path("runs/unharmed", name))
    assert lost.keys() == unharmed.keys() and all(torch.equal(lost[key], unharmed[key]) for key in lost)
    assert "grid.png" in out and "report.html" in out


def test_interrupted_twice_nothing_goes_on(start, address, until):
    axis = ["--axis", "seed=0,1,2", "--id", "k", "--no-compare", "--executor", "ray", "--address", address]
    process = start("sweep", "vase.yaml", "train.pause=50", *axis)
    cell = Path("runs/k/seed=0")
    until(lambda: cell.is_dir() and "a long step" in Run(cell).log_file.read_text(), "a long step")
    worker = psutil.Process(Run(cell).status().pid)
    process.send_signal(signal.SIGINT)
    until(lambda: (cell / "requests/stop").exists(), "the request")
    process.send_signal(signal.SIGINT)
    _, err = process.communicate(timeout=60)
    assert process.returncode == 130 and "Traceback" not in err, err
    assert [cell.status().state for cell in sweeps.cells(Run("runs/k"))] == ["stopped"] * 3
    until(lambda: not worker.is_running(), "the worker's end")


def test_addresses_that_do_not_answer_are_refused(place, capfd):
    with socket.socket() as taken:
        taken.bind(("127.0.0.1", 0))  # and does not listen
        port = taken.getsockname()[1]
        for address, said in {
            f"127.0.0.1:{port}": "nobody answers there (Connection refused)",
            f"ray://127.0.0.1:{port}": "nobody answers there (Connection refused)",
            "cluster": "must be HOST:PORT, ray://HOST:PORT, auto or local.",
        }.items():
            words = ["sweep", "vase.yaml", "--axis", "seed=0,1", "--executor", "ray", "--address", address]
            assert main(words) == 2
            err = capfd.readouterr().err
            assert err.startswith(f"--address {address}: {said}") and err.count("\n") == 1
    assert not Path("runs").exists()


def test_a_node_that_lacks_something_says_so_in_a_sentence(place, tmp_path):
    from equipoise import __version__

    said = on_ray.train_cell("/nowhere/runs/k/seed=0", None, 1.0, __version__, "here")
    assert "does not see /nowhere/runs/k/seed=0. Keep runs where all nodes see them" in said
    said = on_ray.train_cell("/nowhere/runs/k/seed=0", f"file://{tmp_path}/none", 1.0, __version__, "here")
    assert f"finds no cell at file://{tmp_path}/none." in said
    said = on_ray.train_cell("/nowhere/runs/k/seed=0", None, 1.0, "0.0.1", "here")
    assert f"has Equipoise {__version__}, and the sweep is one of 0.0.1. Install the same one." in said
