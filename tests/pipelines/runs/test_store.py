"""The runs folder: whole or not at all, one process per run, and an index that is only a copy of the truth."""

import json
import os
import random
import resource
import signal
import sqlite3
import subprocess
import sys
import time
from contextlib import contextmanager
from pathlib import Path

import psutil
import pytest

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.files import append, write_atomic
from equipoise.pipelines.pipeline import Outcome, Pipeline, execute
from equipoise.pipelines.runs import environment as environments
from equipoise.pipelines.runs import status
from equipoise.pipelines.runs.index import Index
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store, find

SOURCE = (Path(__file__).parents[1] / "counting.py").read_text()
CONFIG = configs.RunConfig(pipeline="counting", name="vase", seed=7)


@pytest.fixture
def store(tmp_path) -> Store:
    return Store(tmp_path / "runs")


@pytest.fixture
def sweep(store) -> Run:
    return store.create(CONFIG, kind="sweep")


@contextmanager
def room_for(size: int):
    """While it lasts, this process cannot write more than `size` bytes into any file, pytest included."""
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, before[1]))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)


def python(code: str, *args: object) -> subprocess.Popen:
    words = [sys.executable, "-c", code, *map(str, args)]
    return subprocess.Popen(words, stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True)


def test_a_new_run_is_complete(store, distribution):
    distribution("counting", {"equipoise.pipelines": {"counting": "counting:Counting"}}, counting=SOURCE)
    config = configs.config_class(write(store, "pipeline: counting"))(
        pipeline="counting", name="vase", data={"folder": "x"}, seed=3
    )
    run = store.create(config)
    assert run.config() == config
    assert sorted(item.name for item in run.folder.iterdir() if item.is_dir()) == [
        "checkpoints",
        "requests",
        "result",
        "samples",
    ]
    environment = json.loads((run.folder / "environment.json").read_text())
    assert environment["seed"] == 3
    assert environment["versions"]["python"] == sys.version.split()[0]
    assert environment["versions"]["torch"]
    assert environment["host"]["memory"] == psutil.virtual_memory().total
    assert environment["working_folder"] == os.getcwd()
    now = run.status()
    assert (now.id, now.state, now.pipeline, now.kind) == (run.id, "queued", "counting", "run")
    assert time.time() - now.created < 60
    assert run.id.endswith(run.id[-4:]) and "-vase-" in run.id


def write(store: Store, text: str) -> Path:
    file = store.root.parent / "config.yaml"
    file.write_text(text)
    return file


def test_the_first_environment_stands_and_later_ones_are_added(store, tmp_path, monkeypatch):
    run = store.create(CONFIG)
    first = json.loads((run.folder / "environment.json").read_text())
    with run.session():
        pass
    monkeypatch.chdir(tmp_path)
    with run.session():
        pass
    assert json.loads((run.folder / "environment.json").read_text()) == first
    monkeypatch.setattr("platform.node", lambda: "elsewhere")
    with run.session():
        pass
    later = json.loads((run.folder / "environment.json").read_text()).pop("later")
    assert [it["host"]["name"] for it in later] == ["elsewhere"]
    assert later[0]["working_folder"] == first["working_folder"] != str(tmp_path)


def test_the_commit_is_that_of_equipoise_or_none(tmp_path, monkeypatch):
    """Not that of a repository which merely contains the working folder, or the installation."""
    monkeypatch.chdir(tmp_path)
    package = tmp_path / "site-packages" / "equipoise"
    package.mkdir(parents=True)
    (package / "__init__.py").touch()
    git = ["git", "-c", "user.name=a", "-c", "user.email=a@b"]
    subprocess.run([*git, "init", "-q"], check=True)
    subprocess.run([*git, "commit", "-q", "--allow-empty", "-m", "theirs"], check=True)
    monkeypatch.setattr(environments, "files", lambda name: package)
    environments._commit.cache_clear()
    assert environments.describe(0)["commit"] is None
    subprocess.run([*git, "add", "."], check=True)
    subprocess.run([*git, "commit", "-q", "-m", "ours"], check=True)
    environments._commit.cache_clear()
    assert len(environments.describe(0)["commit"]) == 40
    environments._commit.cache_clear()


def test_cells_live_in_their_sweep(store, sweep):
    cell = store.create(CONFIG, kind="cell", sweep=sweep.id, id="adamw-1e-3")
    assert cell.folder == sweep.folder / "adamw-1e-3"
    assert (cell.id, cell.sweep, cell.root, sweep.sweep) == (f"{sweep.id}/adamw-1e-3", sweep.id, store.root, None)
    assert [item.id for item in store.list()] == [sweep.id]
    assert [item.id for item in store.list(kinds=("cell",), sweep=sweep.id)] == [cell.id]
    assert store.get(cell.id).folder == store.get(f"{sweep.id}/adamw").folder == find(str(cell.folder)).folder


def test_runs_are_found_by_id_prefix_folder_and_latest(store, monkeypatch):
    first, second = store.create(CONFIG, id="alpha-1"), store.create(CONFIG, id="beta-1")
    assert store.get("alpha-1").folder == store.get("al").folder == find(str(first.folder)).folder == first.folder
    assert store.get("latest").folder == second.folder
    monkeypatch.setenv("EQUIPOISE_RUNS", str(store.root))
    assert find("latest").folder == second.folder
    store.create(CONFIG, id="alpha-2")
    for ref, said in [
        ("alpha", "may be alpha-2 or alpha-1; give more"),
        ("alhpa-1", "Did you mean alpha-1"),
        ("zzz", "no run 'zzz'"),
        ("", "is not the id of a run"),
    ]:
        with pytest.raises(InputError, match=said):
            store.get(ref)


@pytest.mark.parametrize(
    "ref", ["../x", "/etc", "a/../../x", "a/b/c", ".", "..", ".index.lock", "a\0b", "-x", "a\nb", "link"]
)
def test_ids_never_lead_out_of_the_store(store, tmp_path, ref):
    Store(tmp_path).create(CONFIG, id="x")
    store.create(CONFIG, id="a")
    (store.root / "link").symlink_to(tmp_path / "x")
    with pytest.raises(InputError):
        store.get(ref)
    with pytest.raises(InputError):
        store.create(CONFIG, id=ref)
    assert set(os.listdir(tmp_path)) == {"index.sqlite", ".index.lock", "runs", "x"}


def test_a_second_run_of_one_id_changes_nothing(store):
    run = store.create(CONFIG, id="vase")
    run.update(state="done", message="kept")
    with pytest.raises(InputError, match="exists already"):
        store.create(CONFIG, id="vase")
    assert (run.status().message, [item.state for item in store.list()]) == ("kept", ["done"])
    assert [name for name in os.listdir(store.root) if name.startswith(".new")] == []


def test_a_full_disk_leaves_nothing_half_written(store, tmp_path):
    file = tmp_path / "file"
    with room_for(20):
        with pytest.raises(InputError, match=r"disk is full.*nothing half-written"):
            store.create(CONFIG)
        assert not store.root.exists()
        with pytest.raises(InputError, match="disk is full"):
            write_atomic(file, "x" * 100)
        append(file, "ten bytes\n")
        with pytest.raises(InputError, match="disk is full"):
            append(file, "more than there is room for\n")
    assert file.read_text() == "ten bytes\n"
    assert os.listdir(tmp_path) == ["file"]


def test_a_disk_that_fills_up_in_a_session_is_said_in_a_sentence(store):
    class Big(Pipeline):
        @classmethod
        def run(cls, config, run):
            with (
                room_for(5000),
                open(run.result / "weights", "wb", buffering=0) as file,
            ):  # as a library would, without our help
                while True:
                    file.write(b"0" * 4000)

    run = store.create(CONFIG)
    with pytest.raises(InputError, match=r"the disk is full\. Free some space"):
        execute(Big, CONFIG, run)
    assert (run.status().state, run.status().exit_code) == ("failed", 2)


def test_a_session_records_its_life(store):
    run = store.create(CONFIG)
    with run.session():
        during = Run(run.folder).status()
        assert (during.state, during.pid) == ("running", os.getpid())
        run.update(step=3, total=9)
        run.metric(4, loss=float("nan"), rate=0.5)
        run.metric(5, loss=0.25, extra=1)
        run.finish("stopped", "on request.", step=5)
    now = Run(run.folder).status()
    assert (now.state, now.step, now.total, now.loss, now.rate) == ("stopped", 5, 9, 0.25, 0.5)
    assert (now.exit_code, now.message) == (143, "on request.")
    assert 0 <= now.duration < 60 and now.ended
    held = psutil.Process().memory_info()
    assert now.memory and held.rss / 2 < now.memory < psutil.virtual_memory().total
    nan, last = run.metrics()
    assert nan["loss"] != nan["loss"] and last["extra"] == 1
    for line in (run.folder / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)  # NaN is no JSON
    with run.session():
        time.sleep(0.05)
    again = Run(run.folder).status()
    assert again.state == "done"
    assert again.duration == again.seconds >= now.seconds + 0.05 and now.seconds > 0


def test_the_heartbeat_carries_progress(store, monkeypatch):
    monkeypatch.setattr("equipoise.pipelines.runs.run.HEARTBEAT", 0.05)
    run = store.create(CONFIG)
    with run.session():
        run.update(step=7)
        until = time.monotonic() + 30
        while Run(run.folder).status().step != 7 and time.monotonic() < until:
            time.sleep(0.02)
        assert Run(run.folder).status().step == 7


@pytest.mark.parametrize(
    ("error", "message", "code"),
    [
        (KeyError("a\nb"), "KeyError: 'a\\\\nb'", 1),
        (EquipoiseError("The base is gone."), "The base is gone.", 1),
        (InputError("No picture."), "No picture.", 2),
    ],
)
def test_a_failure_is_one_sentence_in_the_status_and_whole_in_the_log(store, error, message, code):
    class Failing(Pipeline):
        @classmethod
        def run(cls, config, run):
            raise error

    run = store.create(CONFIG)
    with pytest.raises(
        EquipoiseError, match="KeyError.*traceback is in" if code == 1 and "Key" in message else message
    ):
        execute(Failing, CONFIG, run)
    now = Run(run.folder).status()
    assert (now.state, now.message.replace("\\n", "\\\\n"), now.exit_code) == ("failed", message, code)
    assert ("Traceback" in run.log_file.read_text()) == isinstance(error, KeyError)


def test_execute_returns_the_outcome_and_restores_signal_handlers(store):
    class Stopping(Pipeline):
        @classmethod
        def run(cls, config, run):
            os.kill(os.getpid(), signal.SIGINT)
            assert run.requested() == run.requested() == {"stop"}
            return Outcome("stopped", "saved.", 4)

    before = signal.getsignal(signal.SIGINT)
    run = store.create(CONFIG)
    assert execute(Stopping, CONFIG, run) == Outcome("stopped", "saved.", 4)
    assert run.status().exit_code == 130
    assert signal.getsignal(signal.SIGINT) is before


def test_a_second_signal_interrupts(store):
    run = store.create(CONFIG)
    with pytest.raises(KeyboardInterrupt), run.session():
        os.kill(os.getpid(), signal.SIGTERM)
        os.kill(os.getpid(), signal.SIGTERM)
    assert (run.status().state, run.status().exit_code) == ("stopped", 143)


def test_one_session_at_a_time(store):
    run = store.create(CONFIG)
    with run.session(), pytest.raises(InputError, match="by this process already"):
        Run(run.folder).update(message="other")
    holder = python(
        "import sys; from equipoise.pipelines.runs.run import Run\n"
        "with Run(sys.argv[1]).session(): print('in', flush=True); sys.stdin.read()",
        run.folder,
    )
    assert holder.stdout and holder.stdout.readline() == "in\n"
    with pytest.raises(InputError, match=f"is being trained by process {holder.pid};"), run.session():
        pytest.fail("two sessions")
    assert run.status().state == "running"
    holder.kill()
    until = time.monotonic() + 60
    while run.status().state != "dead" and time.monotonic() < until:  # although nobody has waited for it yet
        time.sleep(0.02)
    assert run.status().state == "dead"
    holder.communicate()
    now = run.status()
    assert now.state == "dead" and str(holder.pid) in now.message
    with run.session():
        pass
    assert run.status().state == "done"


def test_a_reused_process_number_is_no_sign_of_life(store):
    run = store.create(CONFIG)
    alive = {"state": "running", **status.process(), "heartbeat": time.time() - 60}
    run.update(**alive)
    assert run.status().state == "running"
    run.update(pid_started=alive["pid_started"] - 100)
    assert run.status().state == "dead"
    run.update(heartbeat=time.time())  # the clock was set
    assert run.status().state == "running"
    run.update(host="elsewhere")
    assert run.status().state == "running"
    run.update(heartbeat=time.time() - 600)
    assert run.status().state == "dead"


@pytest.mark.parametrize(
    "field, value",
    [
        *(("started", value) for value in ("yesterday", 1e300, -5.0, float("nan"), True)),
        *(("step", value) for value in ("5", None, 1.5, 2**60)),
        *(("total", "x"), ("message", None), ("seconds", None), ("state", 3), ("pid", 2**40), ("loss", "much")),
    ],
)
def test_a_status_with_a_field_of_another_kind_is_damaged(store, capsys, field, value):
    """It is listed as one that is cut off is: with what is wrong with it."""
    good, bad = (store.create(CONFIG, id=id) for id in ("good", "bad"))
    data = json.loads((bad.folder / "status.json").read_text())
    (bad.folder / "status.json").write_text(json.dumps({**data, field: value}))
    with pytest.raises(InputError, match=r"its status\.json cannot be read"):
        bad.status()
    assert {item.id: item.state for item in store.list()} == {good.id: "queued", bad.id: "failed"}
    assert main(["runs", f"--runs={store.root}"]) == 0 and "good" in capsys.readouterr().out


def test_requests_are_met_once_and_stop_stays(store):
    run = store.create(CONFIG)
    assert run.requested() == set()
    other = Run(run.folder)
    other.request("save")
    other.request("sample")
    assert run.requested() == {"save", "sample"}
    assert run.requested() == set()
    other.request("stop")
    assert run.requested() == run.requested() == {"stop"}
    with pytest.raises(InputError, match=r"no request '\.\./x'"):
        run.request("../x")
    run.forget_requests()
    assert run.requested() == set()


def test_looking_for_requests_costs_microseconds(store):
    run = store.create(CONFIG)

    def batch() -> float:
        started = time.perf_counter()
        for _ in range(200):
            run.requested()
        return (time.perf_counter() - started) / 200

    assert min(batch() for _ in range(20)) < 50e-6


def test_rewinding_forgets_later_and_torn_records(store):
    run = store.create(CONFIG)
    for step in range(1, 6):
        run.metric(step, loss=step)
    with open(run.folder / "metrics.jsonl", "a") as file:
        file.write('{"step": 6, "lo')  # the process was killed here
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4, 5]
    run.rewind_metrics(3)
    run.metric(4, loss=40)
    assert [record["loss"] for record in run.metrics()] == [1, 2, 3, 40]


@pytest.mark.parametrize("damage", ["missing", "garbage", "torn", "empty", "other version", "no table"])
def test_the_index_is_made_anew(store, sweep, damage):
    store.create(CONFIG, kind="cell", sweep=sweep.id, id="one").update(state="done")
    store.enqueue(store.create(CONFIG, kind="cell", sweep=sweep.id, id="two"))
    store.create(CONFIG, id="plain")
    file = store.index.file
    if damage == "missing":
        file.unlink()
    elif damage == "garbage":
        file.write_bytes(random.randbytes(5000))
    elif damage == "torn":
        file.write_bytes(file.read_bytes()[:4500])
    elif damage == "empty":
        file.write_bytes(b"")
    else:
        with sqlite3.connect(file) as db:
            db.execute("PRAGMA user_version = 99" if damage == "other version" else "DROP TABLE runs")
        db.close()
    everything = {item.id: item.state for item in store.list(kinds=("run", "sweep", "cell"))}
    assert everything == {
        "plain": "queued",
        sweep.id: "queued",
        f"{sweep.id}/one": "done",
        f"{sweep.id}/two": "queued",
    }
    claimed = store.claim()
    assert claimed and claimed.id == f"{sweep.id}/two"
    assert store.claim() is None


def test_runs_that_come_and_go_by_other_hands_are_noticed(store, tmp_path):
    store.create(CONFIG, id="stays")
    gone = store.create(CONFIG, id="goes")
    gone.folder.rename(store.root / "renamed")
    assert sorted(item.id for item in store.list()) == ["renamed", "stays"]
    (store.root / "stays" / "status.json").write_text("{")
    assert {item.id: item.state for item in store.list()} == {"renamed": "queued", "stays": "failed"}
    with pytest.raises(InputError, match="is not a run"):
        store.get("stays")
    assert Store(tmp_path / "nothing").list() == []
    assert not (tmp_path / "nothing").exists()


def test_only_offered_runs_are_claimed_in_order_and_by_sweep(store, sweep):
    store.create(CONFIG, id="not-offered")
    single = store.create(CONFIG, id="single")
    cells = [store.create(CONFIG, kind="cell", sweep=sweep.id, id=f"c{n}") for n in range(3)]
    store.enqueue(single)
    for cell in reversed(cells):
        store.enqueue(cell)
    cells[1].update(state="stopped")  # cancelled meanwhile
    assert [run and run.id for run in (store.claim(sweep=sweep.id), store.claim(sweep=sweep.id))] == [
        cells[2].id,
        cells[0].id,
    ]
    assert store.claim(sweep=sweep.id) is None
    claimed = store.claim()
    assert claimed and claimed.id == "single"
    assert store.claim() is None
    store.enqueue(single)
    assert store.claim() is not None


def test_what_a_dead_worker_had_claimed_is_given_to_another(store):
    store.enqueue(store.create(CONFIG, id="a"))
    worker = python(
        "import sys; from equipoise.pipelines.runs.store import Store; print(Store(sys.argv[1]).claim().id)", store.root
    )
    assert worker.communicate()[0] == "a\n"
    claimed = store.claim()
    assert claimed and claimed.id == "a"
    assert store.claim() is None


def test_no_run_is_claimed_twice(store):
    for number in range(20):
        store.enqueue(store.create(CONFIG, id=f"r{number}"))
    code = (  # each lives until all have looked: what a dead one had claimed would be given again
        "import sys; from equipoise.pipelines.runs.store import Store\n"
        "store = Store(sys.argv[1]); print('ready', flush=True); sys.stdin.readline()\n"
        "while run := store.claim(): print(run.id)\n"
        "print('', flush=True); sys.stdin.read()"
    )
    workers = [python(code, store.root) for _ in range(3)]
    assert [worker.stdout.readline() for worker in workers] == ["ready\n"] * 3
    for worker in workers:
        worker.stdin.write("go\n")
        worker.stdin.flush()
    answers = [line.strip() for worker in workers for line in iter(worker.stdout.readline, "\n")]
    for worker in workers:
        worker.communicate()
    assert sorted(answers) == sorted(f"r{number}" for number in range(20))
    assert [worker.returncode for worker in workers] == [0, 0, 0]


def test_a_store_that_may_only_be_read_is_still_listed(store, monkeypatch):
    store.create(CONFIG, id="a")

    def refused(*args):
        raise EquipoiseError("read-only")

    monkeypatch.setattr(Index, "ids", refused)  # file modes do not stop root, which tests may run as
    assert [item.id for item in store.list()] == ["a"]
