"""Sweeps through the real command: real worker processes, real pictures, and what becomes of cells that go wrong."""

import csv
import json
import os
import re
import signal
import subprocess
import sys
import time
from importlib.metadata import distributions

import pytest
from PIL import Image

from equipoise import registry
from equipoise.errors import ConfigError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.jobs import axes, background, sweep
from equipoise.pipelines.runs.store import Store

AXES = ["--axis", "optimizer=adamw,scaled_adamw", "--axis", "learning_rate=1e-3,1e30"]


@pytest.fixture
def small(short):
    return ["text_to_image/demo", *short, "prior.prompt=null"]


def cells(runs):
    (found,) = Store(runs).list(kinds=("sweep",))
    return {run.folder.name: run for run in sweep.cells(Store(runs).get(found.id))}


def test_axes_are_expanded_in_order_and_named():
    settings = config.load("text_to_image/demo", ["sweep={}"])
    values = {
        "optimizer": ["adamw", {"name": "scaled_adamw", "options": {"damping": 0.01}}],
        "learning_rate": [1e-4, 1e-3],
    }
    found = axes.expand(config.set_keys(settings, {"sweep": values}))
    assert list(found) == [
        "optimizer=adamw,learning_rate=0.0001",
        "optimizer=adamw,learning_rate=0.001",
        "optimizer=scaled_adamw+damping=0.01,learning_rate=0.0001",
        "optimizer=scaled_adamw+damping=0.01,learning_rate=0.001",
    ]
    last = found["optimizer=scaled_adamw+damping=0.01,learning_rate=0.001"]
    assert (last.optimizer.name, last.optimizer.options, last.optimizer.learning_rate) == (
        "scaled_adamw",
        {"damping": 0.01},
        1e-3,
    )
    assert last.sweep == {}


def test_what_is_installed_is_read_once_for_all_cells(monkeypatch):
    settings, readings = config.load("text_to_image/demo", ["sweep={seed: [0, 1, 2]}"]), []
    monkeypatch.setattr(registry, "distributions", lambda: readings.append(1) or distributions())
    assert len(axes.expand(settings)) == 3 and len(readings) == 1
    config.set_keys(settings, {"seed": 3})
    assert len(readings) == 2


def test_cells_stand_in_the_order_of_the_sweep_that_is_there_now(tmp_path):
    store = Store(tmp_path / "runs")
    for seeds in ([1, 0], [0, 1]):
        made = store.create(config.load("text_to_image/demo", [f"sweep={{seed: {seeds}}}"]), kind="sweep", id="grid")
        for name, cell in axes.expand(made.config()).items():
            store.create(cell, kind="cell", sweep="grid", id=name).update(state="done")
        assert [cell.folder.name for cell in sweep.cells(made)] == [f"seed={seed}" for seed in seeds]
        made.update(state="done")
        background.delete(made)


def test_every_cell_is_checked_before_anything_is_written(small, tmp_path, capfd):
    assert main(["sweep", *small, "--axis", "optimizer=adamwx,adamw", "--axis", "rank=0,4"]) == 2
    error = capfd.readouterr().err
    assert "adamwx" in error and "lora.rank" in error
    assert not (tmp_path / "runs").exists()


@pytest.mark.parametrize("word", ["learning_rate", "=1,2", "learning_rate="])
def test_axes_that_are_none(word):
    with pytest.raises(ConfigError, match="is not of the form"):
        axes.parse_axes([word])


def test_an_axis_that_is_given_twice_is_refused():
    with pytest.raises(ConfigError, match="there is an axis seed already"):
        axes.parse_axes(["seed=0", "seed=1"])


def test_axis_values_are_read_as_yaml():
    assert axes.parse_axes(["learning_rate=1e-4,2", "data.flip=true,false", "model=[a b, 'c,d']"]) == {
        "learning_rate": [1e-4, 2],
        "data.flip": [True, False],
        "model": ["a b", "c,d"],
    }


def test_a_sweep_trains_compares_and_reports(small, tmp_path, capfd):
    """A diverging column is recorded, the rest is finished, and the report shows all of it."""
    runs = tmp_path / "runs"
    assert (
        main(
            [
                "sweep",
                *small,
                "optimizer.options={}",
                "train.clip=0",
                "--axis",
                "optimizer=sgd,scaled_adamw",
                "--axis",
                "learning_rate=1e-3,1e30",
                "--workers",
                "2",
            ]
        )
        == 0
    )
    printed = capfd.readouterr().out
    found = cells(runs)
    assert {name: run.status().state for name, run in found.items()} == {
        "optimizer=sgd,learning_rate=0.001": "done",
        "optimizer=sgd,learning_rate=1e+30": "diverged",
        "optimizer=scaled_adamw,learning_rate=0.001": "done",
        "optimizer=scaled_adamw,learning_rate=1e+30": "diverged",
    }
    (folder,) = runs.glob("*/comparison")
    document = json.loads((folder / "table.json").read_text())
    assert [cell["state"] for cell in document["cells"]] == ["untouched", "done", "diverged", "done", "diverged"]
    rows = list(csv.DictReader((folder / "table.csv").read_text().splitlines()))
    assert len(rows) == 5 and rows[1]["learning_rate"] == "0.001" and float(rows[1]["loss_after"]) > 0
    with Image.open(folder / "grid.png") as grid:
        assert grid.width > 500
    page = (folder / "report.html").read_text()
    assert not re.search(r"""(src|href)=["']?https?:""", page), "it opens from disk, without a network"
    assert page.count("data:image/png;base64,") >= 5 * 8
    assert str(folder / "report.html") in printed and str(folder / "grid.png") in printed
    assert "Learning rates that worked" in printed
    thumbs = list((folder / "cells").glob("*/*.thumb.png"))
    full = [path for path in (folder / "cells").glob("*/*.png") if path not in thumbs]
    assert len(thumbs) == len(full) == 5 * 8


def test_a_killed_sweep_goes_on_where_it_stopped(small, tmp_path):
    """Sweep and workers are killed; the cell in work is continued, finished cells are not trained again."""
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "equipoise.pipelines.cli"]
    words = [
        "sweep",
        *small,
        "steps=100",
        "checkpoint_every=10",
        "--axis",
        "learning_rate=1e-4,1e-3,1e-2",
        "--axis",
        "optimizer=adamw",
        "--no-compare",
    ]
    process = subprocess.Popen([*command, *words], stdout=subprocess.DEVNULL, stderr=subprocess.DEVNULL)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.05)
        found = list(Store(runs).list(kinds=("cell",))) if runs.is_dir() else []
        if any(cell.state == "done" for cell in found) and any(
            cell.state == "running" and cell.step > 10 for cell in found
        ):
            break
    process.send_signal(signal.SIGKILL)
    process.wait()
    running = [cell for cell in Store(runs).list(kinds=("cell",)) if cell.state == "running"]
    assert running, "the kill came while a cell was in work"
    for cell in running:
        os.kill(cell.pid, signal.SIGKILL)
    time.sleep(0.2)
    before = {cell.id: cell for cell in Store(runs).list(kinds=("cell",))}
    assert any(cell.state == "dead" for cell in before.values())
    finished = subprocess.run(
        [*command, "sweep", "latest", "--runs", str(runs), "--no-compare"], capture_output=True, text=True
    )
    assert finished.returncode == 0, finished.stderr
    after = {cell.id: cell for cell in Store(runs).list(kinds=("cell",))}
    assert {cell.state for cell in after.values()} == {"done"}
    for id, cell in before.items():
        if cell.state == "done":
            assert after[id].ended == cell.ended, "a finished cell is left alone"


def test_stopping_a_sweep_saves_its_cells(small, tmp_path):
    runs = tmp_path / "runs"
    command = [sys.executable, "-m", "equipoise.pipelines.cli"]
    words = [
        "sweep",
        *small,
        "steps=2000",
        "--axis",
        "learning_rate=1e-4,1e-3",
        "--axis",
        "optimizer=adamw",
        "--no-compare",
    ]
    process = subprocess.Popen([*command, *words], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True)
    deadline = time.monotonic() + 120
    while time.monotonic() < deadline:
        time.sleep(0.05)
        if runs.is_dir() and any(
            cell.state == "running" and cell.step > 2 for cell in Store(runs).list(kinds=("cell",))
        ):
            break
    process.send_signal(signal.SIGINT)
    printed, _ = process.communicate(timeout=60)
    assert process.returncode == 130
    assert "continues it" in printed
    states = {cell.state for cell in Store(runs).list(kinds=("cell",))}
    assert states == {"stopped"}
    assert any(runs.glob("*/*/checkpoints/step-*/state.json"))


def test_compare_takes_runs_too(short, tmp_path, capfd):
    for rate in ("1e-3", "1e-2"):
        assert main(["train", "text_to_image/dreambooth", *short, f"learning_rate={rate}", "--id", f"run-{rate}"]) == 0
    runs = str(tmp_path / "runs")
    out = tmp_path / "side-by-side"
    assert (
        main(
            [
                "compare",
                "run-1e-3",
                "run-1e-2",
                "--runs",
                runs,
                "--out",
                str(out),
                "--prompt",
                "a red circle",
                "--count",
                "2",
                "--scale",
                "0.7",
            ]
        )
        == 0
    )
    document = json.loads((out / "table.json").read_text())
    assert [cell["learning_rate"] for cell in document["cells"]] == [None, 1e-3, 1e-2]
    assert (out / "cells" / "base" / "00-1.png").is_file()
    assert main(["compare", "run-1e-3", "--runs", runs, "--out", str(out)]) == 2
    assert "give a new one" in capfd.readouterr().err
