"""The pipeline in docs/plugins.md, built from what the page shows and nothing else, and used as its reader would."""

import json
import os
import re
import signal
import subprocess
import sys
import time
import tomllib
from pathlib import Path

import pytest
from safetensors.torch import load_file

from equipoise.pipelines.cli import main

PAGE = (Path(__file__).parent.parent / "docs" / "plugins.md").read_text()


def documented() -> dict[str, str]:
    """The files that the page's part on pipelines shows, by name."""
    (part,) = re.findall(r"^## A pipeline\n(.*?)^## ", PAGE, re.DOTALL | re.MULTILINE)
    return dict(re.findall(r"`([\w.]+)`[^`\n]*\n\n```\w+\n(.*?)^```$", part, re.DOTALL | re.MULTILINE))


@pytest.fixture
def python(tmp_path, environment, monkeypatch):
    """That of an environment in which the documented package is installed, in a folder of its own."""
    files = documented()
    assert set(files) == {"pyproject.toml", "equipoise_curve.py", "curve.yaml"}
    (tmp_path / "equipoise-curve").mkdir()
    for name, text in files.items():
        (tmp_path / "equipoise-curve" / name).write_text(text)
    (tmp_path / "curve.yaml").write_text(files["curve.yaml"])
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, tmp_path / "equipoise-curve"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    monkeypatch.chdir(tmp_path)
    return environment(wheel, editable=True)


@pytest.fixture
def forked(tmp_path, python, forked_type):
    """Starts programs of that environment which need not import torch."""
    (tmp_path / "printed").mkdir()
    forked = forked_type(tmp_path / "printed", python=python)
    yield forked
    forked.end()


@pytest.mark.slow
def test_the_documented_pipeline_trains_sweeps_resumes_and_compares(python, forked, tmp_path):
    command = ["-m", "equipoise.pipelines.cli"]

    def run(*words: str) -> str:
        done = forked(tmp_path, *command, *words)
        assert done.returncode == 0 and "Traceback" not in done.stderr, done.stderr
        return done.stdout + done.stderr

    shown = [python, *command, "train", "curve.yaml", "--keys"]
    keys = subprocess.run(shown, check=True, capture_output=True, text=True).stdout
    assert "model.width (width for short): a whole number >= 1" in keys and "train.steps (steps for short)" in keys

    assert "straight: done" in run("train", "curve.yaml", "steps=1500", "--id", "straight")
    process = forked.start(tmp_path, *command, "train", "curve.yaml", "steps=1500", "--id", "halted")
    metrics = Path("runs/halted/metrics.jsonl")
    deadline = time.monotonic() + 120
    while not (metrics.is_file() and metrics.read_bytes()):
        assert time.monotonic() < deadline, process.err.read_text()
        time.sleep(0.02)
    os.kill(process.pid, signal.SIGINT)
    assert process().returncode == 130
    assert 0 < json.loads(Path("runs/halted/status.json").read_text())["step"] < 1500
    assert "halted: done. 1500 steps." in run("resume", "halted")
    straight, halted = (load_file(f"runs/{id}/result/curve.safetensors") for id in ("straight", "halted"))
    assert straight.keys() == halted.keys() and all((straight[name] == halted[name]).all() for name in straight)

    swept = run("sweep", "curve.yaml", "steps=300", "--id", "swept")
    assert "swept: done. 3 cells: 3 done." in swept and "Learning rates that worked:\n  adamw: " in swept
    table = json.loads(Path("runs/swept/comparison/table.json").read_text())
    assert [cell["learning_rate"] for cell in table["cells"]] == [None, 1e-4, 1e-3, 1e-2]
    assert table["cells"][-1]["metrics"]["score"] > 0.9

    compared = run("compare", "straight", "halted", "--out", "beside")
    assert "LOSS_AFTER" in compared and (tmp_path / "beside" / "report.html").is_file()


def test_the_documented_pipeline_refuses_what_does_not_fit_in_sentences(distribution, tmp_path, monkeypatch, capfd):
    files = documented()
    points = tomllib.loads(files["pyproject.toml"])["project"]["entry-points"]
    distribution("equipoise-curve", points, equipoise_curve=files["equipoise_curve.py"])
    monkeypatch.chdir(tmp_path)
    Path("curve.yaml").write_text(files["curve.yaml"])
    assert main(["train", "curve.yaml", "width=0", "train.precision=fp8"]) == 2
    assert capfd.readouterr().err.splitlines() == [
        "command line: model.width: must be >= 1, got 0.",
        "command line: train.precision: must be 'no', 'fp16' or 'bf16', got 'fp8'.",
    ]


OWN_LOOP = """
from pathlib import Path
from equipoise.pipelines.config import RunConfig
from equipoise.pipelines.pipeline import Outcome, Pipeline

class Config(RunConfig):
    rounds: int = 3
    rate: float = 0.5

class Own(Pipeline):
    name = "own"
    Config = Config

    @classmethod
    def run(cls, config, run):
        (run.result / "seen").touch()
        return Outcome("stopped" if config.rounds == 1 else "done", step=config.rounds)
"""


def test_a_pipeline_with_a_loop_of_its_own_trains_and_is_refused_the_rest_in_sentences(
    distribution, tmp_path, monkeypatch, capfd
):
    distribution("own", {"equipoise.pipelines": {"own": "own:Own"}}, own=OWN_LOOP)
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    Path("own.yaml").write_text("pipeline: own\nname: own\n")

    def refused(*words: str) -> str:
        capfd.readouterr()
        assert main([*words]) == 2
        return capfd.readouterr().err

    assert main(["train", "own.yaml", "--id", "one"]) == 0 and Path("runs/one/result/seen").exists()
    assert main(["train", "own.yaml", "rounds=1", "--id", "two"]) == 143
    assert main(["resume", "two"]) == 143
    assert refused("resume", "two", "rounds=2") == "command line: rounds: cannot change when a run is resumed.\n"
    assert refused("sweep", "own.yaml", "--axis", "rate=1,2") == (
        "sweep: the pipeline own does not say how many steps a run takes, so that no sweep could show how far it is. "
        "Its Config must be a TrainConfig, or have a property total_steps: see docs/plugins.md.\n"
    )
    assert refused("compare", "one", "two") == "the pipeline own has no comparison.\n"
    assert {file.parent.name for file in Path("runs").glob("*/status.json")} == {"one", "two"}, "no sweep was made"
