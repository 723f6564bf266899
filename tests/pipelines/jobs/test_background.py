"""A comparison in the background is ended without touching any process but its own."""

import json
import subprocess
import sys
import time

import psutil
import pytest

from equipoise.pipelines.jobs import background
from equipoise.pipelines.runs import status


@pytest.fixture
def process():
    """One that has nothing to do with any comparison, unless a record says so."""
    started = subprocess.Popen([sys.executable, "-c", "import time; time.sleep(60)"])
    yield started
    started.kill()
    started.wait()


def recorded(root, **who) -> str:
    place = root / background.COMPARISONS
    place.mkdir(parents=True)
    record = {"runs": ["one"], "asked": {}, "created": time.time(), **who}
    (place / "made.json").write_text(json.dumps(record))
    return "made"


def test_a_job_of_another_machine_is_taken_away_without_a_signal_to_a_process_of_this_one(tmp_path, process):
    name = recorded(tmp_path, **{**status.process(process.pid), "host": "elsewhere"})
    assert [job.state for job in background.jobs(tmp_path)] == ["running"]
    background.discard(tmp_path, name)
    with pytest.raises(subprocess.TimeoutExpired):
        process.wait(0.5)
    assert background.jobs(tmp_path) == []


def test_a_job_of_this_machine_is_ended(tmp_path, process):
    background.discard(tmp_path, recorded(tmp_path, **status.process(process.pid)))
    assert not psutil.pid_exists(process.pid) and background.jobs(tmp_path) == []


def test_a_process_that_may_not_be_signalled_does_not_keep_a_job(tmp_path, process, monkeypatch):
    def refuse(self):
        raise psutil.AccessDenied(self.pid)

    monkeypatch.setattr(psutil.Process, "terminate", refuse)
    background.discard(tmp_path, recorded(tmp_path, **status.process(process.pid)))
    assert background.jobs(tmp_path) == [] and process.poll() is None
