"""The held-out loss while a run is training: its curve, the best weights, an early end, and all that after a resume."""

import json

import pytest
import torch
from safetensors.torch import load_file

from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.train import InstructionTuningWork
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store
from equipoise.pipelines.training.loop import EarlyStopError
from equipoise.pipelines.training.validation import Validation

NAME = "instruction_tuning/demo"
WORSE = ["learning_rate=0.1", "schedule=constant", "coordinator=constant", "train.clip=0"]  # after two steps


def train(*words: str) -> tuple[Run, str]:
    settings = config.load(NAME, words)
    run = Store(settings.runs).create(settings)
    return run, execute(InstructionTuning, settings, run).message


def weights(run: Run) -> dict[str, torch.Tensor]:
    return {k: v for file in run.result.glob("*.safetensors") for k, v in load_file(file).items()}


def curve(run: Run) -> dict[int, float]:
    return {record["step"]: record["val_loss"] for record in run.metrics() if "val_loss" in record}


def facts(run: Run) -> dict:
    return json.loads((run.result / "result.json").read_text())


def test_the_curve_is_of_the_same_examples_at_every_step_and_changes_nothing(short):
    plain, _ = train(*short("blip-2"))  # which has dropout
    seen, _ = train(*short("blip-2"), "train.validate_every=2")
    assert list(curve(seen)) == [2, 4, 6] and curve(plain) == {}
    assert all(torch.equal(weights(seen)[name], tensor) for name, tensor in weights(plain).items())
    assert curve(seen)[6] == facts(seen)["loss_after"] == facts(plain)["loss_after"]
    other, _ = train(*short("blip-2"), "train.validate_every=3", "batch=3")
    assert facts(other)["loss_before"] == pytest.approx(facts(seen)["loss_before"]), "comparable between runs"


def test_the_best_weights_are_the_result(short):
    last, _ = train(*short(), *WORSE, "train.validate_every=1")
    best, _ = train(*short(), *WORSE, "train.validate_every=1", "train.keep=best")
    assert curve(last) == curve(best)
    step = min(curve(best), key=curve(best).__getitem__)
    assert step < 6, "it got worse"
    assert facts(best)["loss_after"] == pytest.approx(curve(best)[step], rel=1e-6)
    assert (facts(best)["best_step"], facts(best)["kept"], facts(last)["kept"]) == (step, "best", "last")
    assert facts(last)["loss_after"] == curve(last)[6]
    there, _ = train(*short(), *WORSE, f"steps={step}")
    assert all(torch.equal(weights(there)[name], tensor) for name, tensor in weights(best).items())


def test_patience_ends_a_run(short):
    run, message = train(*short(), *WORSE, "steps=40", "train.validate_every=1", "train.patience=3", "train.keep=best")
    losses = list(curve(run).values())
    best = losses.index(min(losses[: len(losses) - 3]))
    assert len(losses) == best + 4 < 40 and "no better validation loss in 3 validations" in message
    assert facts(run)["loss_after"] == pytest.approx(min(losses))


def test_the_best_so_far_survives_a_resume(short, stopped_run):
    words = [*short(), *WORSE, "train.validate_every=1", "train.keep=best", "train.patience=9"]
    whole, _ = train(*words)
    settings = config.load(NAME, words)
    run = stopped_run(InstructionTuning, settings, at=4)
    assert execute(InstructionTuning, settings, run).state == "done"
    assert curve(run) == curve(whole) and facts(run)["best_step"] == facts(whole)["best_step"] < 4
    assert all(torch.equal(weights(run)[name], tensor) for name, tensor in weights(whole).items())


def test_two_processes_judge_alike(short, launched, tmp_path):
    words = [NAME, *short(), *WORSE, "steps=20", "train.validate_every=1", "train.patience=2", "train.keep=best"]
    out = launched("train", *words, "batch=1", "--id", "two")
    assert "no better validation loss in 2 validations" in out
    assert Store(tmp_path / "runs").get("two").status().step < 20


def test_a_loss_that_is_no_number_is_never_the_best():
    section = config.load(NAME, ["train.validate_every=1", "train.patience=2", "train.keep=best"]).train
    weight = torch.zeros(2)
    validation = Validation(section, {"weight": weight})
    validation.take(2.0, 1)
    weight.fill_(1)
    for taken in (2, 3):
        validation.begin_step()
        validation.take(float("nan"), taken)
    with pytest.raises(EarlyStopError):
        validation.begin_step()
    assert validation.settle() and weight.tolist() == [0, 0]
    assert (validation.best_loss, validation.best_step) == (2.0, 1)


def test_nothing_is_kept_twice_where_the_last_weights_are_wanted(short, monkeypatch):
    held = []
    save = InstructionTuningWork.save_result
    monkeypatch.setattr(
        InstructionTuningWork, "save_result", lambda work, facts: held.append(work.validation.best) or save(work, facts)
    )
    train(*short(), "train.validate_every=1")
    assert held == [{}]
