"""Coordination in transformers' own Trainer, on a small BLIP-2: groups by component, rates, a log, and resuming."""

import warnings

import pytest
import torch
from transformers import Trainer, TrainingArguments

from equipoise.coordination.commit import CommitCLR
from equipoise.errors import InputError
from equipoise.hosts.coordination import coordinated
from equipoise.pipelines.instruction_tuning.config import ModelSection
from equipoise.pipelines.instruction_tuning.data import read_examples
from equipoise.pipelines.instruction_tuning.model import load_processor
from equipoise.pipelines.instruction_tuning.talk import Talk


@pytest.fixture
def make(checkpoints, pictures, tmp_path):
    from transformers import AutoModelForMultimodalLM

    folder = checkpoints("blip-2")
    talk = Talk(load_processor(ModelSection(path=str(folder))), "blip-2")
    examples, _ = read_examples(pictures, None)

    def get(coordinator="commit_clr", steps=6, **arguments):
        torch.manual_seed(0)
        model = AutoModelForMultimodalLM.from_pretrained(folder)
        model.vision_model.requires_grad_(False)
        settings = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            per_device_train_batch_size=2,
            learning_rate=1e-2,
            logging_steps=1,
            save_steps=3,
            report_to=[],
            use_cpu=True,
            remove_unused_columns=False,
            disable_tqdm=True,
            dataloader_pin_memory=False,
            **arguments,
        )
        return coordinated(Trainer)(
            model=model,
            args=settings,
            train_dataset=examples,
            data_collator=talk.training_batch,
            coordinator=coordinator,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield get


def weights(trainer):
    return {name: tensor.detach().clone() for name, tensor in trainer.model.named_parameters()}


def test_rates_by_component_in_a_trainer(make):
    trainer = make(CommitCLR(measure_every=1, every=1))
    trainer.train()
    groups = trainer.optimizer.param_groups
    assert {g["component"] for g in groups} == {"encoder", "language"} and len(groups) > 2, "by weight decay as well"
    logs = [record for record in trainer.state.log_history if "kappa" in record]
    assert len(logs) == 6 and all(record["kappa"] > 0 for record in logs)
    for record in logs[1:]:
        rates = record["rate_encoder"], record["rate_language"]
        assert sum(rates) == pytest.approx(2e-2 * (7 - record["step"]) / 6), "both together as the schedule has them"
        assert rates[0] != pytest.approx(rates[1])


def test_constant_is_the_plain_trainer_and_clr_is_not(make):
    def trained(coordinator, alone=False):
        trainer = make(coordinator)
        if alone:
            trainer.remove_callback(trainer.coordination)
        trainer.train()
        return weights(trainer)

    left, same = trained("constant", alone=True), trained("constant")
    other = trained(CommitCLR(measure_every=1, every=1))
    assert all(torch.equal(left[name], same[name]) for name in left)
    assert any(not torch.equal(left[name], other[name]) for name in left)


def test_a_resumed_trainer_goes_on_as_if_nothing_had_been(make, tmp_path):
    whole = make(CommitCLR(measure_every=1, every=1))
    whole.train()
    again = make(CommitCLR(measure_every=1, every=1))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert list(again.coordination.coordinator.seen) == pytest.approx(list(whole.coordination.coordinator.seen))
    left, right = weights(whole), weights(again)
    assert all(torch.allclose(left[name], right[name], atol=1e-7) for name in left)


def test_what_a_trainer_cannot_do_is_refused(make):
    with pytest.raises(InputError, match="which a Trainer has no place for"):
        make("commit")
