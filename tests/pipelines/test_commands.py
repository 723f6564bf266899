"""train, resume, runs, logs and stop, driven as a user drives them, on a third party's pipeline that counts."""

import json
import os
import resource
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store

PATIENCE = 120.0  # seconds, for machines that are busy with other things


pytestmark = pytest.mark.usefixtures("place")


@pytest.fixture
def call(capsys):
    """Runs a command in this process: (exit code, standard output, standard error)."""

    def run(*words: str) -> tuple[int, str, str]:
        capsys.readouterr()
        code = main(words)
        return code, *capsys.readouterr()

    return run


def start(*words: str, **options) -> subprocess.Popen:
    """Starts a command in a process of its own."""
    command = [sys.executable, "-m", "equipoise.pipelines.cli", *words]
    return subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE, text=True, **options)


def until(condition, what: str) -> None:
    end = time.monotonic() + PATIENCE
    while not condition():
        assert time.monotonic() < end, f"{what} did not happen in {PATIENCE} s"
        time.sleep(0.05)


def counting(id: str, step: int = 2) -> Run:
    """The run of that id, once it has counted to `step`."""
    folder = Path("runs", id)
    until(lambda: (folder / "status.json").exists() and len(Run(folder).metrics()) >= step, f"step {step}")
    return Run(folder)


def steps(run: Run) -> list[int]:
    return [record["step"] for record in run.metrics()]


def test_a_run_from_start_to_end(call):
    code, out, err = call("train", "vase.yaml", "steps=4", "seed=9")
    assert (code, err) == (0, "")
    run = Store().get("latest")
    assert f"{run.id}: training in {run.folder}" in out
    assert f"{run.id}: done. counted to 4." in out
    assert f"  result:  {run.result}\n" in out and "equipoise compare" not in out, "this pipeline has no comparison"
    assert (run.result / "count.txt").read_text() == "4"
    assert steps(run) == [1, 2, 3, 4]
    assert (run.config().seed, run.config().train.steps) == (9, 4)

    code, out, _ = call("runs")
    header, row = out.splitlines()
    assert header.split() == ["RUN", "STATE", "STEP", "%", "LOSS", "RATE", "STARTED", "TIME", "NOTE"]
    assert row.split()[:6] == [run.id, "done", "4/4", "100", "0.25", "0.001"]
    (record,) = json.loads(call("runs", "--json")[1])
    assert (record["id"], record["state"], record["exit_code"]) == (run.id, "done", 0)
    assert "from 0" in call("logs", "latest")[1]
    assert "is not running; done at step 4 of 4. counted to 4." in call("stop", run.id)[1]
    code, _, err = call("resume", str(run.folder))
    assert code == 2 and "is done (4 steps); there is nothing to resume" in err


def test_a_finished_run_replays_from_its_own_configuration(call):
    assert call("train", "vase.yaml", "steps=2", "--id", "one")[0] == 0
    assert call("train", "runs/one/config.yaml", "--id", "two")[0] == 0
    assert Path("runs/one/config.yaml").read_text() == Path("runs/two/config.yaml").read_text()


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (
            ["steps=0", "nmae=x", "checkpoint.every=no"],
            ["train.steps: must be > 0", "Did you mean 'name'", "checkpoint.every"],
        ),
        (["data=nowhere"], ["nowhere: no such folder. Set data=FOLDER."]),
        (["--id", "../x"], ["the id '../x' must be one word"]),
        (["--id", "latest"], ["the id 'latest'"]),
        (["runs=vase.yaml"], ["vase.yaml: cannot be written"]),
        (["--runs", "/proc/nowhere"], ["/proc/nowhere: cannot be written"]),
    ],
)
def test_bad_input_is_explained_and_leaves_nothing(call, place, words, said):
    before = sorted(place.rglob("*"))
    code, out, err = call("train", "vase.yaml", *words)
    assert (code, out) == (2, "")
    assert [text for text in said if text not in err] == []
    assert "Traceback" not in err
    assert len(err.splitlines()) == len(said)
    assert sorted(place.rglob("*")) == before


def test_what_cannot_begin_leaves_no_run(call):
    code, _, err = call("train", "vase.yaml", "note=cannot begin", "--id", "bad")
    assert (code, err) == (2, "picture 3: cannot be read.\n")
    assert not Path("runs/bad").exists() and "No runs in" in call("runs")[1]


def test_a_start_that_is_interrupted_waits_for_nobody():
    """Ctrl-C as soon as there is a run: it is stopped, or it never was."""
    process = start("train", "vase.yaml", "train.pause=0.05", "steps=2000", "--id", "vase")
    until(Path("runs/vase/status.json").exists, "a run")
    process.send_signal(signal.SIGINT)
    process.communicate(timeout=PATIENCE)
    assert process.returncode == 130
    assert not Path("runs/vase").exists() or Run("runs/vase").status().state == "stopped"


def test_dry_run_and_keys_write_nothing(call, place):
    code, out, _ = call("train", "vase.yaml", "steps=3", "--dry-run")
    assert code == 0 and "  steps: 3\n" in out and "seed: 0\n" in out
    code, out, err = call("train", "vase.yaml", "data=nowhere", "--dry-run")
    assert (code, out) == (2, "") and "no such folder" in err
    code, out, err = call("sweep", "vase.yaml", "data=nowhere", "--axis", "seed=0,1", "--dry-run")
    assert (code, out) == (2, "") and "no such folder" in err
    code, out, _ = call("train", "vase.yaml", "--keys")
    assert code == 0
    assert "train.steps (steps for short): a whole number > 0; default 20\n    How far to count.\n" in out
    assert "data.folder (data for short): text; required\n" in out
    assert not (place / "runs").exists()


def test_a_second_run_into_the_same_folder(call):
    assert call("train", "vase.yaml", "--id", "vase")[0] == 0
    before = Path("runs/vase/status.json").read_bytes()
    code, _, err = call("train", "vase.yaml", "--id", "vase")
    assert code == 2 and "exists already. `equipoise resume vase` continues it" in err
    assert Path("runs/vase/status.json").read_bytes() == before


@pytest.mark.parametrize(
    ("end", "code", "state", "said"),
    [
        ("error", 1, "failed", "KeyError: 'the third' The traceback is in"),
        ("nan", 1, "diverged", "diverged. the loss is not finite."),
        ("bad input", 2, "failed", "picture 3: cannot be read."),
    ],
)
def test_runs_that_end_badly(call, end, code, state, said):
    got, out, err = call("train", "vase.yaml", f"end={end}", "--id", "bad")
    now = Run("runs/bad").status()
    assert (got, now.state, now.exit_code) == (code, state, code)
    assert said in out + err
    assert "Traceback" not in out + err
    assert ("Traceback" in Path("runs/bad/log.txt").read_text()) == (end == "error")
    assert json.loads(call("runs", "--json")[1])[0]["message"] == now.message != ""


def test_a_disk_that_fills_up(call):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (500_000, before[1]))
    try:
        code, _, err = call("train", "vase.yaml", "end=full disk", "--id", "big")
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    assert code == 2 and "disk is full" in err and len(err.splitlines()) == 1
    assert Run("runs/big").status().state == "failed"
    assert list(Path("runs/big/result").iterdir()) == []


@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 143)])
def test_a_signal_stops_after_the_step_with_the_state_saved(call, number, code):
    process = start("train", "vase.yaml", "train.pause=0.05", "steps=2000", "--id", "vase")
    run = counting("vase")
    process.send_signal(number)
    out, err = process.communicate(timeout=PATIENCE)
    now = run.status()
    assert (process.returncode, now.state, now.exit_code) == (code, "stopped", code)
    assert f"{now.step} is saved" in out and "`equipoise resume" in out
    assert "Traceback" not in err
    assert json.loads((run.checkpoints / "count.json").read_text())["count"] == now.step

    # and goes on where it was
    code, _, err = call("resume", "vase", f"steps={now.step + 3}", "checkpoint.every=1")
    assert (code, err) == (0, "")
    assert run.status().state == "done"
    assert steps(run) == list(range(1, now.step + 4))
    assert run.config().train.steps == now.step + 3


def test_detached_killed_and_resumed(call, place):
    process = start(
        "train", "vase.yaml", "train.pause=0.05", "steps=2000", "checkpoint.every=2", "--detach", "--id", "bg"
    )
    out, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")
    for hint in ("equipoise logs bg --follow", "equipoise stop bg", "equipoise runs"):
        assert hint in out
    run = counting("bg", 3)
    now = run.status()
    assert now.state == "running" and now.pid
    assert os.getsid(now.pid) == now.pid  # the terminal's end is not its end
    code, _, err = call("resume", "bg")
    assert code == 2 and f"is being trained by process {now.pid}" in err

    os.kill(now.pid, signal.SIGKILL)
    until(lambda: run.status().state == "dead", "death")
    assert "dead" in call("runs")[1]
    code, out, _ = call("stop", "bg")
    assert code == 0 and f"is not running; dead at step {run.status().step}" in out

    saved = json.loads((run.checkpoints / "count.json").read_text())["count"]
    code, _, err = call("resume", "bg", "seed=5")
    assert code == 2 and "command line: seed: cannot change when a run is resumed" in err
    elsewhere = place.parent / "elsewhere"
    elsewhere.mkdir()
    process = start("resume", str(run.folder), f"steps={saved + 2000}", "--detach", cwd=elsewhere)
    _, err = process.communicate(timeout=PATIENCE)
    assert (process.returncode, err) == (0, "")  # although the data folder is given by a relative path
    follow = start("logs", "bg", "--follow")
    until(lambda: run.status().step > saved, "going on")
    code, out, _ = call("stop", "bg")
    now = run.status()
    assert code == 0 and out == f"bg: stopped on request; {now.step} is saved.\n"
    assert (now.state, now.exit_code) == ("stopped", 143)
    code, _, err = call("resume", "bg", "steps=1")
    assert code == 2 and f"bg has taken {now.step} steps already; 1 cannot be its total." in err
    assert f"from {saved}" in follow.communicate(timeout=PATIENCE)[0]
    assert steps(run) == list(range(1, now.step + 1))


def test_stop_now_does_not_wait_for_the_step(call):
    process = start("train", "vase.yaml", "train.pause=50", "--id", "slow")
    log = Path("runs/slow/log.txt")
    until(lambda: log.exists() and "a long step begins" in log.read_text(), "start")
    code, _, err = call("stop", "slow", "--timeout", "0.1")
    assert code == 1 and "is still at work after 0.1 s. The request stands" in err
    code, out, _ = call("stop", "slow", "--now")
    process.communicate(timeout=PATIENCE)
    assert code == 0 and "interrupted before its state was saved" in out
    assert process.returncode == 143
    assert Run("runs/slow").status().state == "stopped"


def test_a_run_cancelled_before_it_began_does_not_begin(call):
    run = Store().create(_config(), id="waits")
    code, out, _ = call("stop", "waits")
    assert code == 0 and "cancelled before it began" in out
    code, out, _ = call("resume", "waits", "--queued")  # what a process started for it does
    assert (code, run.status().state, run.metrics()) == (143, "stopped", [])
    assert call("resume", "waits", "steps=2")[0] == 0  # it may still be wanted


def test_a_detached_run_that_cannot_begin_says_so_in_its_folder(call):
    run = Store().create(_config(), id="waits")
    shutil.rmtree("pictures")
    assert call("resume", "waits", "--queued")[0] == 2
    assert (run.status().state, run.status().message) == ("failed", "pictures: no such folder. Set data=FOLDER.")


def _config():
    from equipoise.pipelines import config as configs

    return configs.load("vase.yaml")


def test_runs_of_another_folder(call, monkeypatch):
    assert call("train", "vase.yaml", "runs=there", "--id", "a")[0] == 0
    assert "No runs in" in call("runs")[1]
    assert "done" in call("runs", "--runs", "there")[1]
    monkeypatch.setenv("EQUIPOISE_RUNS", "there")
    assert call("logs", "a")[0] == call("logs", "there/a")[0] == 0


@pytest.mark.parametrize("ref", ["../x", "/etc/passwd", "..", "", "a\0b", "nothing", "vase.yaml", "pictures"])
@pytest.mark.parametrize("command", ["logs", "stop", "resume"])
def test_references_that_mean_no_run(call, command, ref):
    code, out, err = call(command, ref)
    assert (code, out) == (2, "")
    assert len(err.splitlines()) == 1


def test_a_log_shows_a_progress_bar_as_it_ended(call):
    run = Store().create(_config(), id="a")
    with open(run.log_file, "w") as file:
        file.write("first\n 0%|  |\r50%|# |\r100%|##|\nlast")
    assert call("logs", "a")[1] == "first\n100%|##|\nlast\n"


def test_listing_runs_imports_no_torch(call):
    assert call("train", "vase.yaml", "steps=1")[0] == 0
    code = "import sys; from equipoise.pipelines.cli import main; main(['runs']); print('torch' in sys.modules)"
    shown = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True).stdout
    assert "done" in shown and shown.endswith("False\n")


def test_runs_show_the_configured_rate_and_when_they_first_started(call):
    """And whose they are, where several pipelines have trained."""
    run = Store().create(configs.load("text_to_image/demo", ["sweep={}", "learning_rate=0.002"]), id="object")
    begun = []
    for rate in (2e-3, 1.5e-8):
        with run.session(signals=False):
            run.metric(1, loss=0.5, rate=rate)
        begun.append(run.status().begun)
    assert begun[0] == begun[1] != run.status().started and run.status().rate == 1.5e-8
    header, row = call("runs")[1].splitlines()
    assert "PIPELINE" not in header and row.split()[:4] == ["object", "done", "1", "0.5"] and row.split()[4] == "0.002"
    assert call("train", "vase.yaml", "steps=1", "--id", "vase")[0] == 0
    header, *rows = call("runs")[1].splitlines()
    assert header.split()[:3] == ["RUN", "PIPELINE", "STATE"]
    assert [row.split()[:2] for row in rows] == [["vase", "counting"], ["object", "text_to_image"]]
