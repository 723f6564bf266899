"""Runs that are started in turn begin one after another."""

import os
import threading
import time

import pytest

from equipoise.pipelines import config as configs
from equipoise.pipelines.jobs import background
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store


@pytest.fixture
def runs(tmp_path) -> list[Run]:
    """Three, each handed over to a process that lives."""
    config = configs.load("text_to_image/demo", [f"runs={tmp_path}", "sweep={}"])
    made = [Store(tmp_path).create(config, id=id) for id in ("first", "second", "third")]
    for run in made:
        run.hand_over(os.getpid)
    return made


class Waiting(threading.Thread):
    """What a detached process does before it trains."""

    def __init__(self, run: Run):
        super().__init__(daemon=True)
        self.run_, self.answer = run, None
        self.start()

    def run(self) -> None:
        self.answer = background.wait_for_turn(self.run_)


def until(true) -> None:
    end = time.monotonic() + 30
    while not true():
        assert time.monotonic() < end
        time.sleep(0.02)


def test_one_after_another(runs):
    first, second, third = runs
    assert background.ahead(first) is None and background.wait_for_turn(first)
    with first.session(signals=False):
        waiting = [Waiting(second), Waiting(third)]
        until(lambda: all(run.status().message == "waits for first to end." for run in (second, third)))
        first.finish("done")
    until(lambda: waiting[0].answer)
    with second.session(signals=False):
        until(lambda: third.status().message == "waits for second to end.")
        assert second.status().message == "" and waiting[1].answer is None
        second.finish("done")
    until(lambda: waiting[1].answer)


def test_out_of_the_queue(runs):
    first, second, third = runs
    with first.session(signals=False):
        waiting = Waiting(second)
        assert "out of the queue" in background.stop(second)
        until(lambda: waiting.answer is False)
        assert second.status().state == "stopped" and second.status().exit_code == 143
        found = background.ahead(third)
        assert found and found.id == "first"
        first.finish("done")
    assert background.ahead(third) is None, "who was cancelled is not waited for"


def test_nobody_waits_for_the_dead(runs):
    first, second, _ = runs
    first.update(pid=4194300)
    assert first.status().state == "dead" and background.ahead(second) is None


def test_a_turn_that_is_taken_holds_before_its_training_begins(runs):
    """Also against an older run that is resumed meanwhile."""
    first, second, third = runs
    first.update(state="stopped", pid=None)
    assert background.wait_for_turn(second)
    first.update(state="queued")
    first.hand_over(os.getpid)
    for other in (first, third):
        assert (found := background.ahead(other)) and found.id == second.id
    with second.session(signals=False):
        assert second.status().message == ""
        second.finish("done")
    assert background.wait_for_turn(first)
