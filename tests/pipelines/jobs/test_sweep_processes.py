"""Sweeps whose processes are killed, interrupted, or moved; on a third party's pipeline that counts."""

import itertools
import json
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest

from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs import store as stores
from equipoise.pipelines.runs.run import Run

PATIENCE = 120.0  # seconds, for machines that are busy with other things


pytestmark = pytest.mark.usefixtures("place")


def created(**axes) -> Run:
    return sweeps.create(configs.set_keys(configs.load("vase.yaml"), {"sweep": axes}), id="k")


def start(*words: str) -> subprocess.Popen:
    command = [sys.executable, "-m", "equipoise.pipelines.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True)


def until(condition, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {PATIENCE} s"
        time.sleep(0.05)


def at_work(*words: str) -> tuple[subprocess.Popen, Run, psutil.Process]:
    """A sweep `k` of two cells in a process of its own, with its first cell's worker."""
    axis = ["--axis", "seed=0,1", "--no-compare", "--id", "k"]
    process = start("sweep", "vase.yaml", *words, *axis)
    cell = Path("runs/k/seed=0")
    until(lambda: (cell / "status.json").exists() and Run(cell).status().state == "running", "the first cell")
    until(lambda: "from 0" in Run(cell).log_file.read_text(), "counting")
    return process, Run("runs/k"), psutil.Process(Run(cell).status().pid)


def states(sweep: Run) -> list[str]:
    return [cell.status().state for cell in sweeps.cells(sweep)]


def test_a_sweep_waits_for_cells_that_a_killed_one_left_at_work(capfd):
    process, sweep, worker = at_work("train.pause=0.1", "steps=30")
    process.kill()
    process.communicate()
    assert main(["sweep", "k", "--no-compare"]) == 0
    assert "k: done. 2 cells: 2 done." in capfd.readouterr().out
    assert states(sweep) == ["done", "done"]
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end")
    for cell in sweeps.cells(sweep):
        assert [record["step"] for record in cell.metrics()] == list(range(1, 31)), "nobody else trained it"


@pytest.mark.parametrize("now", [False, True])
def test_stop_reaches_the_cells_of_a_sweep_that_was_killed(now, capfd):
    process, sweep, worker = at_work(f"train.pause={50 if now else 0.05}", "steps=2000")
    process.kill()
    process.communicate()
    assert main(["stop", "k", *["--now"][:now]]) == 0
    assert states(sweep) == ["stopped", "stopped"]
    until(lambda: not worker.is_running() or worker.status() == psutil.STATUS_ZOMBIE, "the worker's end")
    capfd.readouterr()
    assert main(["stop", "k"]) == 0
    assert "is not running" in capfd.readouterr().out


@pytest.mark.parametrize("by", ["keys", "command"])
def test_interrupting_a_sweep_leaves_nobody_training(by):
    process, sweep, worker = at_work("train.pause=50")
    if by == "keys":
        process.send_signal(signal.SIGINT)
        until(lambda: (sweep.folder / "seed=0/requests/stop").exists(), "the request")
        process.send_signal(signal.SIGINT)
    else:
        assert main(["stop", "k", "--now"]) == 0
    _, err = process.communicate(timeout=PATIENCE)
    assert not worker.is_running()
    assert process.returncode == (130 if by == "keys" else 143)
    assert "Traceback" not in err and "`equipoise resume k` continues it" in err
    assert sweep.status().state == "stopped" and states(sweep) == ["stopped", "stopped"]


def test_a_sweep_in_which_nothing_works_fails_and_says_why_once(capfd):
    assert main(["sweep", "vase.yaml", "end=error", "--axis", "seed=0,1,2", "--id", "k"]) == 1
    err = capfd.readouterr().err
    assert err.count("KeyError: 'the third'") == 1 and "3 failed: KeyError" in err and "Traceback" not in err
    now = Run("runs/k").status()
    assert (now.state, now.exit_code) == ("failed", 1)


def test_a_sweep_in_which_something_works_says_what_did_not(capfd):
    assert main(["sweep", "vase.yaml", "--axis", "end=good,error,nan", "--id", "k", "--no-compare"]) == 0
    out, err = capfd.readouterr()
    assert "k: done. 3 cells: 1 diverged, 1 done, 1 failed." in out
    assert "1 failed: KeyError: 'the third'" in err


def test_a_sweep_in_which_everything_diverges_is_no_success():
    assert main(["sweep", "vase.yaml", "end=nan", "--axis", "seed=0,1", "--id", "k", "--no-compare"]) == 1
    assert Run("runs/k").status().state == "diverged"


def test_a_sweep_goes_on_from_any_folder(place, monkeypatch):
    sweep = created(note=["open the data"], seed=[0, 1])
    before = json.loads((sweep.folder / "environment.json").read_text())
    elsewhere = place.parent / "elsewhere"
    elsewhere.mkdir()
    monkeypatch.chdir(elsewhere)
    assert main(["sweep", str(sweep.folder), "--no-compare"]) == 0
    assert states(sweep) == ["done", "done"]
    assert Path.cwd() == elsewhere
    for run in (sweep, *sweeps.cells(sweep)):
        after = json.loads((run.folder / "environment.json").read_text())
        assert after["working_folder"] == before["working_folder"] == str(place)


def test_many_axes_make_names_that_are_no_longer_than_a_name_may_be():
    axes = {
        "note": ["x" * 30 + end for end in "ab"],
        "prompts": [["y" * 60], ["y" * 61]],
        "steps": [1, 2],
        "seed": [1, 2],
        "train.pause": [0.0, 0.1],
    }
    sweep = created(**axes)
    found = sweeps.cells(sweep)
    assert len(found) == len({run.folder.name for run in found}) == 2**5
    assert max(len(run.folder.name) for run in found) == stores.LONGEST
    assert [run.config().note for run in found[::16]] == ["x" * 30 + "a", "x" * 30 + "b"]


def test_values_that_read_alike_in_a_name_are_told_apart():
    sweep = created(note=["a b", "a_b", "a?b"])
    assert [run.config().note for run in sweeps.cells(sweep)] == ["a b", "a_b", "a?b"]


def test_a_sweep_is_made_whole_or_not_at_all(monkeypatch):
    fill, calls = stores._fill, itertools.count()

    def interrupted(*args):
        if next(calls) == 2:
            raise KeyboardInterrupt
        fill(*args)

    monkeypatch.setattr(stores, "_fill", interrupted)
    with pytest.raises(KeyboardInterrupt):
        created(seed=[0, 1, 2])
    assert not Path("runs").exists()


def test_a_cell_that_was_deleted_is_trained_anew():
    sweep = created(seed=[0, 1, 2])
    shutil.rmtree(sweep.folder / "seed=1")
    assert main(["sweep", "k", "--no-compare"]) == 0
    assert states(sweep) == ["done"] * 3


def test_the_logs_of_a_sweep_are_its_cells(capfd):
    sweep = created(seed=[0, 1])
    for cell in sweeps.cells(sweep):
        cell.log("\n".join(f"{cell.id} says {number}" for number in range(9)))
    assert main(["logs", "k"]) == 0
    out = capfd.readouterr().out
    assert "k/seed=0: queued at step 0" in out and "k/seed=1 says 8" in out and "says 5" not in out
    assert "equipoise logs k/seed=0" in out and str(sweep.folder / "workers.txt") in out
    assert main(["logs", "k", "--follow"]) == 2
    assert "`equipoise logs k/seed=0 --follow` follows one" in capfd.readouterr().err


@pytest.mark.parametrize("words", [["sweep", "vase.yaml"], ["demo"]])
def test_no_workers_are_refused(words, capfd):
    assert main([*words, "--workers", "0"]) == 2
    assert capfd.readouterr().err == "--workers: must be at least 1, got 0.\n"
    assert not Path("runs").exists()
