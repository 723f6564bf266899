"""Sweeps whose workers are lost, on this machine; what each worker gets; and copies of runs in a storage."""

import itertools
import json
import shutil
import sys
import time
from collections.abc import Callable
from pathlib import Path

import psutil
import pytest

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.jobs import executors, storage
from equipoise.pipelines.jobs.executors import Local, Where
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store

pytestmark = pytest.mark.usefixtures("place")


def cell_at_work(sweep: str, cell: str, until, step: int = 6) -> tuple[Run, psutil.Process]:
    """A cell that has taken some steps, and its process."""
    folder = Path("runs", sweep, cell)
    until(lambda: (folder / "status.json").exists() and len(Run(folder).metrics()) >= step, f"{step} steps of {cell}")
    return Run(folder), psutil.Process(Run(folder).status().pid)


def test_a_cell_whose_worker_is_killed_goes_on_from_its_checkpoint(command, until):
    axis = ["--axis", "seed=0,1", "--no-compare", "--id", "k"]
    process = command("sweep", "vase.yaml", "train.pause=0.1", "steps=30", *axis)
    cell, worker = cell_at_work("k", "seed=0", until)
    worker.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "k: done. 2 cells: 2 done." in out, err
    assert [record["step"] for record in cell.metrics()] == list(range(1, 31))
    log = cell.log_file.read_text()
    assert f"process {worker.pid} on" in log and "is gone; tried again, 2 times at most" in log
    assert "from 0" in log and ("from 5" in log or "from 10" in log)


def test_a_cell_without_retries_left_fails_and_the_rest_goes_on(command, until):
    axis = ["--axis", "seed=0,1", "--no-compare", "--id", "k", "--retries", "0", "--max-parallel", "2"]
    process = command("sweep", "vase.yaml", "train.pause=0.1", "steps=30", *axis)
    cell, worker = cell_at_work("k", "seed=0", until, step=1)
    worker.kill()
    out, err = process.communicate(timeout=120)
    assert process.returncode == 0 and "k: done. 2 cells: 1 done, 1 failed." in out
    assert f"1 failed: process {worker.pid} on" in err and "is gone, and no retry is left." in err
    assert cell.status().exit_code == 1
    assert main(["sweep", "k", "--no-compare"]) == 0, "continued, it is tried again"
    assert cell.status().state == "done"


def test_a_worker_that_takes_the_place_of_a_dead_one_gets_its_device(command, until, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    axis = ["--axis", "seed=0,1,2", "--no-compare", "--id", "k", "--cpus", "3"]
    process = command("sweep", "vase.yaml", "train.pause=0.1", "steps=60", *axis)
    devices = {}
    for name in ("seed=0", "seed=1"):
        cell, worker = cell_at_work("k", name, until, step=1)
        assert worker.environ()["OMP_NUM_THREADS"] == "3"
        devices[worker.environ()["CUDA_VISIBLE_DEVICES"]] = cell, worker
    assert sorted(devices) == ["3", "5"], "all devices are used"
    cell, worker = devices["5"]
    worker.kill()

    def others() -> list[str]:
        """Devices of workers that came later."""
        found = [Run(path.parent).status() for path in Path("runs/k").glob("*/status.json")]
        pids = {it.pid for it in found if it.state == "running"} - {known.pid for _, known in devices.values()}
        return [psutil.Process(pid).environ()["CUDA_VISIBLE_DEVICES"] for pid in pids]

    until(others, "another worker")
    assert others() == ["5"]
    assert main(["stop", "k", "--now"]) == 0
    process.communicate(timeout=120)


@pytest.mark.parametrize(
    ("visible", "gpus", "each"),
    [
        ("3,5", None, ["3", "5"]),
        ("3,5", 0.5, ["3", "5", "3", "5"]),
        ("3,5,7", 2.0, ["3,5"]),
        ("3,5", 0.0, [""]),
        ("", None, []),
        ("", 0.0, []),
    ],
)
def test_devices_are_dealt_out(visible, gpus, each, monkeypatch):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", visible)
    local = Local(Where(gpus=gpus))
    assert local.devices == each and local.at_once == max(1, len(each))
    assert Local(Where(gpus=gpus, max_parallel=7)).at_once == 7


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (["--gpus", "3"], "--gpus 3: there are 2 CUDA devices on this machine."),
        (["--gpus", "1.5"], "--gpus: a cell has a share of one GPU, or whole ones, got 1.5."),
        (["--gpus", "nan"], "--gpus: must be a number from 0 to 1000000, got nan."),
        (["--retries", "-1"], "--retries: must be a number from 0 to 1000000, got -1."),
        (["--max-parallel", "0"], "--max-parallel: must be a number from 1 to 10000, got 0."),
        (["--workers", "2", "--max-parallel", "2"], "--workers and --max-parallel are the same. Give one."),
        (["--address", "a:1", "--storage", "b"], "--address, --storage: only --executor ray has a use for it."),
    ],
)
def test_what_cannot_be_asked_for_is_refused_before_anything_is_made(words, said, monkeypatch, capfd):
    monkeypatch.setenv("CUDA_VISIBLE_DEVICES", "3,5")
    assert main(["sweep", "vase.yaml", "--axis", "seed=0,1", *words]) == 2
    assert capfd.readouterr().err == f"{said}\n"
    assert not Path("runs").exists()


def test_a_sweep_is_continued_with_what_it_began_with():
    assert main(["sweep", "vase.yaml", "--axis", "seed=0,1", "--id", "k", "--no-compare", "--retries", "5"]) == 0
    sweep = Run("runs/k")
    assert executors.remembered(sweep) == Where(retries=5, compare=False)
    assert main(["sweep", "k", "--no-compare", "--workers", "2"]) == 0
    assert executors.remembered(sweep) == Where(retries=5, max_parallel=2, compare=False)
    (sweep.folder / "executor.json").write_text("[")
    assert executors.remembered(sweep) == Where()


@pytest.mark.parametrize(
    "said",
    [
        {"max_parallel": "x"},
        {"max_parallel": 10**12},
        {"max_parallel": -5},
        {"cpus": "a"},
        {"gpus": [1]},
        {"retries": None},
        {"executor": 5},
        {"storage": {}},
    ],
)
def test_what_nobody_can_have_asked_for_is_a_sentence(said, capfd):
    assert main(["sweep", "vase.yaml", "--axis", "seed=0,1", "--id", "s", "--no-compare"]) == 0
    Path("runs/s/executor.json").write_text(json.dumps(said))
    capfd.readouterr()
    assert main(["resume", "s"]) == 2
    error = capfd.readouterr().err
    assert f"executor.json: --{next(iter(said)).replace('_', '-')}: must be" in error and "Remove that file" in error


def test_passwords_are_not_written_down(capfd):
    words = ["--executor", "ray", "--storage", "ftp://me:secret@host/x"]
    assert main(["sweep", "vase.yaml", "--axis", "seed=0,1", *words]) == 2
    error = capfd.readouterr().err
    assert "--storage: has a password in it" in error and "secret" not in error and not Path("runs").exists()


def test_ray_that_is_not_there_is_said_in_a_sentence(monkeypatch, capfd):
    monkeypatch.setitem(sys.modules, "ray", None)
    assert main(["sweep", "vase.yaml", "--axis", "seed=0,1", "--executor", "ray"]) == 2
    err = capfd.readouterr().err
    assert err.count("\n") == 1 and "`pip install 'equipoise[ray]'` brings it." in err
    assert not Path("runs").exists()


def a_run(steps: int = 7) -> Run:
    """One that was stopped half-way."""
    config = configs.load("vase.yaml", ["steps=9"])
    made = Store(config.runs).create(config, id="a")
    made.metric(1, loss=1.0)
    (made.checkpoints / "count.json").write_text(json.dumps({"count": steps}))
    return made


def files(folder: Path) -> dict[str, bytes]:
    found = {path.relative_to(folder).as_posix(): path.read_bytes() for path in folder.rglob("*") if path.is_file()}
    return {name: data for name, data in found.items() if name != "lock"}


@pytest.fixture(params=["file", "memory"])
def url(request, tmp_path) -> str:
    return f"file://{tmp_path}/storage" if request.param == "file" else f"memory://{tmp_path}"


def test_a_copy_is_the_run_and_what_is_new_follows(url, tmp_path):
    run, there = a_run(), tmp_path / "there" / "a"
    (run.folder / ".half").write_text("written")
    here, other = storage.Copy(run.folder, f"{url}/a"), storage.Copy(there, f"{url}/a")
    assert not other.pull(), "nothing is there yet"
    here.push()
    assert other.pull()
    assert files(there) == {name: data for name, data in files(run.folder).items() if name != ".half"}
    twin = Run(there)
    twin.metric(2, loss=0.5)
    (twin.checkpoints / "step-00000009").mkdir()
    (twin.checkpoints / "step-00000009" / "state.json").write_text("{}")
    (twin.checkpoints / "count.json").unlink()
    other.push()
    run.request("save")
    here.ask()
    assert here.pull() and not list((run.folder / "requests").iterdir())
    assert [record["step"] for record in run.metrics()] == [1, 2]
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000009"], "old checkpoints go here, too"
    other.fetch_requests()
    assert twin.requested() == {"save"}
    other.fetch_requests()
    assert twin.requested() == set()


def test_half_a_copy_is_none(url, tmp_path):
    run, there = a_run(), tmp_path / "there" / "a"
    here, other = storage.Copy(run.folder, f"{url}/a"), storage.Copy(there, f"{url}/a")
    here.push()
    assert other.pull()
    before = files(there)
    run.metric(2, loss=0.5)
    (run.checkpoints / "count.json").write_text(json.dumps({"count": 9}))
    here.push()
    here.files.pipe_file(f"{here.place}/checkpoints/count.json", b'{"cou')  # its process was killed
    assert not other.pull() and files(there) == before
    here.files.rm_file(f"{here.place}/checkpoints/count.json")
    assert not other.pull() and files(there) == before
    here.files.pipe_file(f"{here.place}/files.json", b'{"made"')
    assert not other.pull() and files(there) == before
    storage.Copy(run.folder, f"{url}/a").push()
    assert other.pull() and files(there) == files(run.folder)


def test_a_copy_of_another_run_or_of_before_another_session_is_left_alone(url, tmp_path):
    run = a_run()
    copy = storage.send(run.folder, f"{url}/a")
    assert copy.pull()
    run.update(started=run.status().created + 5.0)  # it was resumed here meanwhile
    before = files(run.folder)
    assert not copy.pull() and files(run.folder) == before
    shutil.rmtree(run.folder)
    other = a_run(steps=3)
    before = files(other.folder)
    assert not storage.Copy(other.folder, copy.url).pull() and files(other.folder) == before


def trained_elsewhere(copy: storage.Copy, there: Path, **changes) -> None:
    """What a task leaves in the storage, on a node with a clock of its own."""
    other = storage.Copy(there, copy.url)
    assert other.pull()
    Run(there).metric(2, loss=0.5)
    Run(there).update(**changes)
    other.push()


def test_no_clock_decides_what_is_newer(url, tmp_path):
    run = a_run()
    run.update(started=2e9, state="dead", pid=7)  # an earlier try, on a node whose clock was ahead
    trained_elsewhere(storage.send(run.folder, f"{url}/a"), tmp_path / "there" / "a", state="done", started=1e9)
    assert storage.newest(run.folder, f"{url}/a").pull()
    assert run.status().state == "done" and run.status().started == 1e9 and len(run.metrics()) == 2
    assert storage.newest(run.folder, f"{url}/a").pull(), "and once more"


class Clock:
    """In place of `time`, where hours pass at once."""

    def __init__(self):
        self.passed, self.time = 0.0, time.time

    def monotonic(self) -> float:
        return time.monotonic() + self.passed

    def sleep(self, seconds: float) -> None:
        self.passed += seconds


@pytest.fixture
def clock(monkeypatch) -> Clock:
    monkeypatch.setattr(storage, "time", Clock())
    return storage.time


@pytest.fixture
def failing(monkeypatch) -> dict:
    """What storages are to fail in, by function, so many times each."""
    left: dict[str, int] = {}

    def often(name: str, work: Callable) -> Callable:
        def tried(*args):
            if left.get(name, 0):
                left[name] -= 1
                raise OSError("503 slow down")
            return work(*args)

        return tried

    for place, name in ((storage, "send"), (storage, "newest"), (storage.Copy, "pull")):
        monkeypatch.setattr(place, name, often(name, getattr(place, name)))
    return left


def two_cells() -> list[Run]:
    store = Store("runs")
    made = [store.create(configs.load("vase.yaml", ["steps=9"]), id=name) for name in ("a", "b")]
    for run in made:
        store.enqueue(run)
    return made


def test_one_failure_is_no_outage(url, clock, failing):
    first, second = mine = two_cells()
    copies, failing["send"] = storage.Copies(url), 1
    copies.fetch(mine, (), ())
    assert copies.send(first) is None and copies.send(second)
    for _ in range(20):  # eleven minutes in which the second one trains
        clock.passed += 33
        copies.fetch(mine, {second.id}, ())
    assert copies.send(first) and "OSError: 503 slow down; tried again" in first.log_file.read_text()


def test_an_outage_ends_the_sweep(url, clock, failing):
    first, second = mine = two_cells()
    copies, failing["send"], failing["newest"], failing["pull"] = storage.Copies(url), 999, 999, 999
    for _ in range(19):
        copies.fetch(mine, (), ())
        assert copies.send(first) is copies.send(second) is None
        clock.passed += 33
    with pytest.raises(EquipoiseError, match=r"has not answered for 600 s \(OSError: 503 slow down\)\."):
        copies.send(first)


def test_what_a_task_has_come_to_is_fetched_before_anything_else(url, clock, failing, tmp_path):
    run, other = mine = two_cells()
    copies = storage.Copies(url)
    copies.fetch(mine, (), ())
    trained_elsewhere(storage.Copy(run.folder, copies.send(run)), tmp_path / "there" / "a", state="done", started=5.0)
    failing["pull"] = 3
    for _ in range(3):
        copies.fetch([run], {run.id}, {run.id})
        assert copies.waits(run) and run.status().state == "queued"
        clock.passed += 6
    copies.fetch([run], {run.id}, {run.id})
    assert not copies.waits(run) and run.status().state == "done"
    failing["pull"] = 999
    copies.send(other)
    for _ in range(20):
        copies.fetch([other], {other.id}, {other.id})
        clock.passed += 33
    assert not copies.waits(other) and "`equipoise resume` goes on from what is there" in copies.given_up(other)


def test_a_sweep_that_is_continued_trains_what_it_could_not_look_at_first(url, clock, failing, tmp_path):
    run, other = mine = two_cells()
    before = storage.Copies(url)
    before.fetch(mine, (), ())
    trained_elsewhere(
        storage.Copy(run.folder, before.send(run)), tmp_path / "there" / "a", state="stopped", started=5.0, pid=7
    )
    copies, failing["newest"] = storage.Copies(url), 1
    copies.fetch(mine, (), ())
    assert copies.send(run) is None, "as long as what is there is not known"
    clock.passed += 6
    copies.fetch(mine, (), ())
    assert run.status().state == "queued" and len(run.metrics()) == 1 and run.status().started == 5.0
    assert copies.send(run) and copies.send(other)


def test_a_cell_that_is_stopped_before_it_begins_stays_so(url, clock):
    run, _ = mine = two_cells()
    copies = storage.Copies(url)
    copies.fetch(mine, (), ())
    assert copies.send(run)
    run.update(state="stopped", queued=None, message="the sweep was stopped before this cell began")
    clock.passed += 6
    copies.fetch(mine, {run.id}, ())
    assert run.status().taken_out


def test_two_sweeps_of_one_name_do_not_meet(url, tmp_path):
    run = a_run()
    other = Store(tmp_path / "elsewhere").create(configs.load("vase.yaml"), id="a")
    copies, others = storage.Copies(url), storage.Copies(url)
    for one, its in ((copies, run), (others, other)):
        one.fetch([its], (), ())
    assert copies.send(run) != others.send(other)
    assert storage.newest(run.folder, copies._place(run)).pull()


def test_who_trains_in_an_earlier_copy_spoils_nothing_and_stops(url, tmp_path, until):
    run, lost, again = a_run(), tmp_path / "lost" / "a", tmp_path / "again" / "a"
    assert storage.newest(run.folder, f"{url}/a") is None
    first = storage.Copy(lost, storage.send(run.folder, f"{url}/a").url)
    assert first.pull()
    with first.kept(0.05):
        Run(lost).metric(2, loss=0.5)
        second = storage.Copy(again, storage.send(run.folder, f"{url}/a").url)
        assert second.pull() and second.place != first.place
        Run(again).metric(2, loss=0.25)
        second.push()
        until(lambda: "stop" in Run(lost).requested(), "the request to stop")
        Run(lost).metric(3, loss=0.5)
    found = storage.newest(run.folder, f"{url}/a")
    assert found.place == second.place and found.pull()
    assert [record["loss"] for record in run.metrics()] == [1.0, 0.25]
    third = f"{second.place.rpartition('/')[0]}/3"
    second.files.makedirs(third)
    second.files.pipe_file(f"{third}/metrics.jsonl", b"")  # its sender died before the list of files was there
    assert storage.newest(run.folder, f"{url}/a").place == second.place
    assert storage.send(run.folder, f"{url}/a").place.endswith("/4")
    assert storage._places(f"{url}/a") == [4], "what was before is removed"


@pytest.mark.parametrize("name", ["../out", "/out", "a/../../out", ".hidden", "a/.git/config", "lock", ".", "a\\b"])
def test_names_that_lead_elsewhere_are_refused(name, url, tmp_path):
    run = a_run()
    copy = storage.Copy(run.folder, f"{url}/a")
    copy.push()
    said = json.loads(copy.files.cat_file(f"{copy.place}/files.json"))
    copy.files.pipe_file(f"{copy.place}/files.json", json.dumps(said | {"files": {name: "0"}}).encode())
    before = files(tmp_path)
    with pytest.raises(InputError, match="is no file of a run"):
        copy.pull()
    assert files(tmp_path) == before


@pytest.mark.parametrize("bad", ["nowhere://bucket/a", "file:///proc/nobody/can"])
def test_storages_that_cannot_be_used_are_refused(bad):
    with pytest.raises(InputError, match=f"^--storage {bad}: "):
        storage.check(bad)


@pytest.mark.parametrize("failures", [2, 99])
def test_a_storage_that_fails_for_a_while_loses_nothing(failures, url, tmp_path, monkeypatch):
    run, there, calls = a_run(), tmp_path / "there" / "a", itertools.count()
    write = storage.Copy._write

    def failing(self, name, data):
        if next(calls) < failures:
            raise OSError("the network is gone")
        write(self, name, data)

    monkeypatch.setattr(storage.Copy, "_write", failing)
    copy = storage.Copy(run.folder, f"{url}/a")
    if failures > 9:
        monkeypatch.setattr(storage, "OUTAGE", 0.5)
        with pytest.raises(EquipoiseError, match=r"could not be brought there: the network is gone\."), copy.kept(0.05):
            run.metric(2, loss=0.5)
        return
    with copy.kept(0.05):
        run.metric(2, loss=0.5)
    assert storage.Copy(there, f"{url}/a").pull() and files(there) == files(run.folder)
