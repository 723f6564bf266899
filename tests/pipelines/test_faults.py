"""Faults: those of docs/reliability.md once, by the program that causes them many times, and each by itself."""

import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.pipeline import Pipeline, execute
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.train import TextToImageWork

NAME = "text_to_image/dreambooth"
PATIENCE = 120.0  # seconds, for machines that are busy with other things
SOAK = Path(__file__).parents[1] / "soak.py"


@pytest.mark.slow
def test_every_fault_is_recovered_from():
    """One trial of each that needs no program to be started; the others have tests of their own."""
    words = [sys.executable, SOAK, "--quick", "--trials=1", "--workers=1"]
    done = subprocess.run(words, capture_output=True, text=True, timeout=500)
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    rows = [line.split("|") for line in done.stdout.splitlines() if line.startswith("| ")][2:]
    assert len(rows) >= 15, "all but that of the disk, which takes root"
    for _, fault, trials, lost, recovered, _ in rows:
        assert (trials.strip(), lost.strip(), recovered.strip()) == ("1", "0", "1"), fault


WRITER = """
import os, signal, sys
from pathlib import Path
import torch
from equipoise.pipelines.runs import checkpoints
folder, fatal, left = Path(sys.argv[1]), None, 0
def audit(event, arguments):
    global left
    if fatal and event.split(".")[0] in ("open", "os", "shutil") and str(folder) in str(arguments):
        left -= 1
        if left == 0:
            os.kill(os.getpid(), signal.SIGKILL)
sys.addaudithook(audit)
def save(step):
    checkpoints.save(folder, step, {"a": torch.full((4,), float(step))}, {"b": torch.full((2,), -float(step))}, 1)
save(1)
for number in range(1, 200):
    if pid := os.fork():
        died = os.waitstatus_to_exitcode(os.waitpid(pid, 0)[1])
        found = []
        path, (step, weights, state) = checkpoints.load_newest(folder, found.append)
        assert not found and step in (1, 2), (number, step, found)
        assert weights["a"].tolist() == [step] * 4 and state["b"].tolist() == [-step] * 2
        if died == 0:
            print(number)
            break
        assert died == -signal.SIGKILL, died
        checkpoints.shutil.rmtree(folder / "step-00000002", ignore_errors=True)
        if not (folder / "step-00000001").exists():
            save(1)
    else:
        fatal, left = True, number
        save(2)
        os._exit(0)
"""


def test_a_kill_at_every_touch_of_a_file_leaves_a_whole_checkpoint(tmp_path):
    """SIGKILL as the first, the second, … file or folder is opened, made, renamed or deleted while one is written."""
    words = [sys.executable, "-c", WRITER, str(tmp_path / "checkpoints")]
    done = subprocess.run(words, capture_output=True, text=True, env={**os.environ, "OMP_NUM_THREADS": "1"})
    assert done.returncode == 0, done.stderr
    assert int(done.stdout) > 15


def fails(run: Run, error: Exception) -> EquipoiseError:
    class Failing(Pipeline):
        @classmethod
        def run(cls, config, run):
            raise error

    with pytest.raises(EquipoiseError) as caught:
        execute(Failing, run.config(), run)
    return caught.value


@pytest.mark.parametrize(
    "error",
    [
        torch.OutOfMemoryError("CUDA out of memory. Tried to allocate 2.00 GiB. GPU 0 has a total capacity of 1 GiB"),
        MemoryError(),
        RuntimeError("[enforce fail at alloc_cpu.cpp:117] DefaultCPUAllocator: can't allocate memory: you tried to"),
        RuntimeError("CUDA error: CUBLAS_STATUS_ALLOC_FAILED when calling `cublasCreate(handle)`"),
    ],
)
def test_a_full_memory_is_said_with_what_helps(tmp_path, error):
    run = Store(tmp_path).create(configs.load("text_to_image/demo"))
    said = str(fails(run, error))
    assert "the memory is full (" in said and "train.batch" in said and "\n" not in said and "traceback" not in said
    assert (run.status().state, run.status().exit_code) == ("failed", 1) and run.status().message in said
    assert "Traceback" in run.log_file.read_text()


def test_another_error_is_no_full_memory(tmp_path):
    run = Store(tmp_path).create(configs.load("text_to_image/demo"))
    assert "memory" not in str(fails(run, RuntimeError("shapes do not match")))


def test_what_goes_wrong_while_sampling_loses_no_step(short, monkeypatch):
    settings = configs.load(NAME, [*short, "samples.every=3", "checkpoint_every=0"])
    run = Store(settings.runs).create(settings)
    with monkeypatch.context() as context:
        context.setattr(TextToImageWork, "sample", lambda *_: (_ for _ in ()).throw(torch.OutOfMemoryError("CUDA")))
        with pytest.raises(EquipoiseError, match="the memory is full"):
            execute(TextToImage, settings, run)
    assert [path.name for path in run.checkpoints.iterdir()] == ["step-00000003"]
    assert execute(TextToImage, settings, run).state == "done"
    assert "resumed from step-00000003" in run.log_file.read_text()


def test_another_runs_checkpoint_is_set_aside(short, stopped_run, capfd):
    mine, other = (
        stopped_run(TextToImage, configs.load(NAME, [*short, f"seed={seed}", "checkpoint_every=1"]), at=3)
        for seed in (0, 1)
    )
    newest = mine.checkpoints / "step-00000003"
    shutil.rmtree(newest)
    shutil.copytree(other.checkpoints / newest.name, newest)
    assert execute(TextToImage, mine.config(), mine).state == "done"
    assert "resumed from step-00000002" in mine.log_file.read_text()
    assert "another run saved it" in mine.log_file.read_text() and "another run saved it" in capfd.readouterr().err
    assert (mine.checkpoints / "damaged-step-00000003").is_dir()


def test_a_run_that_was_copied_or_renamed_keeps_its_checkpoints(short, stopped_run):
    run = stopped_run(TextToImage, configs.load(NAME, short), at=3)
    copied = Run(shutil.copytree(run.folder, run.root / "copied"))
    assert execute(TextToImage, copied.config(), copied).state == "done"
    assert "resumed from step-00000003" in copied.log_file.read_text()


def test_a_checkpoint_that_fits_no_more_is_said(short, stopped_run):
    run = stopped_run(TextToImage, configs.load(NAME, short), at=3)
    file = run.folder / "config.yaml"
    file.write_text(file.read_text().replace("  rank: 4\n", "  rank: 2\n"))
    with pytest.raises(InputError, match=r"step-00000003: does not fit config\.yaml beside it"):
        execute(TextToImage, run.config(), run)
    assert (run.checkpoints / "step-00000003").is_dir()


def test_a_sweep_outlives_the_page_that_started_it(place):
    """The page's process, and all of its group, is killed."""
    sweep = sweeps.create(
        configs.set_keys(configs.load("vase.yaml", ["train.pause=0.05"]), {"sweep": {"seed": [0, 1]}}), id="k"
    )
    code = (
        "import sys, time; from equipoise.pipelines.jobs import background\n"
        "from equipoise.pipelines.runs.run import Run\n"
        "background.start(Run(sys.argv[1]), 1, in_turn=True); print('started', flush=True); time.sleep(600)"
    )
    page = subprocess.Popen(
        [sys.executable, "-c", code, str(sweep.folder)], stdout=subprocess.PIPE, text=True, start_new_session=True
    )
    assert page.stdout and page.stdout.readline() == "started\n"
    until(lambda: sweeps.cells(sweep)[0].metrics() != [])
    os.killpg(page.pid, signal.SIGKILL)
    page.communicate()
    assert not sweep.status().over
    until(lambda: sweep.status().over)
    assert sweep.status().state == "done"
    assert [len(cell.metrics()) for cell in sweeps.cells(sweep)] == [20, 20]


def until(condition) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end
        time.sleep(0.05)


def test_times_that_run_backwards(tmp_path, monkeypatch):
    """The clock is set back by an hour at every look at it."""
    run = Store(tmp_path).create(RunConfig(pipeline="counting", name="vase"))
    real, looks = time.time, iter(range(10_000))
    monkeypatch.setattr(time, "time", lambda: real() - 3600 * next(looks))
    with run.session():
        run.metric(1, loss=1.0)
        assert Run(run.folder).status().state == "running"
    now = Run(run.folder).status()
    assert (now.state, now.step) == ("done", 1) and now.duration >= 0
    assert [item.id for item in Store(tmp_path).list()] == [run.id]


def test_bytes_of_the_index_that_went_bad_unnoticed(tmp_path):
    """SQLite has no checksums: a name or a state that nobody wrote is the sign."""
    store = Store(tmp_path / "runs")
    ids = [store.create(RunConfig(pipeline="counting", name="vase"), id=f"r{number}").id for number in range(3)]
    store.enqueue(store.get("r1"))
    harms = (b"queued", b"quexed"), (b"queued", b"qu\xaeed"), (b"run", b"rvn"), (b'{"host', b"{'host")
    for before, after in harms:
        claimed = store.claim()
        assert claimed and claimed.id == "r1"
        store.index.offer("r1") if before != b'{"host' else None
        for file in (store.index.file, Path(f"{store.index.file}-wal")):
            if file.exists():
                file.write_bytes(file.read_bytes().replace(before, after))
        assert sorted(item.id for item in store.list()) == ids
    claimed = store.claim()
    assert claimed and claimed.id == "r1", "nobody can have claimed it whose name cannot be read"


def test_a_flipped_bit_of_the_state_is_noticed(tmp_path):
    """Also one that leaves good JSON with another number."""
    from equipoise.pipelines.runs import checkpoints

    saved = checkpoints.save(tmp_path, 10, {"a": torch.ones(1)}, {"rate": 0.001, "step": 4})
    text = (saved / "state.json").read_text()
    assert checkpoints.load(saved)[0] == 10
    for before, after in (("0.001", "0.003"), ('"step": 10', '"step": 11'), ('"format": 1', '"format": 3')):
        assert before in text
        (saved / "state.json").write_text(text.replace(before, after))
        json.loads((saved / "state.json").read_text())
        with pytest.raises(InputError, match=r"state\.json is not what was saved"):
            checkpoints.load(saved)
