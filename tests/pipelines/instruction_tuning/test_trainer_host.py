"""Coordination in transformers' own Trainer, on a small BLIP-2: groups by component, rates, a log, and resuming."""

import json
import runpy
import socket
import sys
import warnings

import pytest
import torch
from peft import LoraConfig, get_peft_model
from transformers import Trainer, TrainingArguments

from equipoise import ScaledAdamW
from equipoise.coordination.commit import CommitCLR
from equipoise.coordination.descent import FeatureDescent
from equipoise.errors import InputError
from equipoise.hosts.coordination import _load, _save, coordinated, whole_labels
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import read_examples
from equipoise.pipelines.instruction_tuning.model import load_processor
from equipoise.pipelines.instruction_tuning.talk import Talk


@pytest.fixture
def make(checkpoints, pictures, tmp_path, hosted):
    from transformers import AutoModelForMultimodalLM

    examples, _ = read_examples(pictures, None)

    def get(
        coordinator="commit_clr",
        steps=6,
        rank=0,
        optimizer_cls_and_kwargs=None,
        optimizers=None,
        host=Trainer,
        kind="blip-2",
        **arguments,
    ):
        torch.manual_seed(0)
        folder = checkpoints(kind)
        talk = Talk(load_processor(InstructionTuningModel(path=str(folder))), kind)
        model = AutoModelForMultimodalLM.from_pretrained(folder)
        getattr(model, "vision_model", model).requires_grad_(kind != "blip-2")
        if rank:
            lora = LoraConfig(r=rank, target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["qformer"])
            model = get_peft_model(model, lora)
        settings = TrainingArguments(
            str(tmp_path / "out"),
            max_steps=steps,
            save_steps=3,
            remove_unused_columns=False,
            **({"per_device_train_batch_size": 2} | hosted | arguments),
        )
        host, own = (coordinated(host), {"coordinator": coordinator}) if coordinator else (host, {})
        if optimizers is not None:
            own["optimizers"] = optimizers(model)
        return host(
            model=model,
            args=settings,
            train_dataset=examples,
            data_collator=talk.training_batch,
            optimizer_cls_and_kwargs=optimizer_cls_and_kwargs,
            **own,
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


class Cutting(Trainer):
    """What ms-swift 4 does between a batch and its model (`SwiftMixin.prepare_logits_to_keep` and `Template`)."""

    def _prepare_inputs(self, inputs):
        inputs = super()._prepare_inputs(inputs)
        labels = inputs["labels"]
        if len(labels) == 1:
            mask = (labels != -100)[0]
            inputs["labels"] = torch.nn.functional.pad(labels[:, mask], (1, 0), value=-100)
            inputs["logits_to_keep"] = torch.nn.functional.pad(mask[1:], (0, 1), value=True)
        else:
            inputs["logits_to_keep"] = labels.shape[-1] - ((labels != -100).int().argmax(-1).min().item()) + 1
            inputs["labels"] = labels[:, -inputs["logits_to_keep"] :]
        inputs["compute_loss_func"] = None
        return inputs

    def compute_loss(self, model, inputs, *args, **kwargs):
        inputs.pop("compute_loss_func")
        return super().compute_loss(model, inputs, *args, **kwargs)

    def train(self, *args, **kwargs):
        self.model.register_forward_pre_hook(self.encode, with_kwargs=True)
        return super().train(*args, **kwargs)

    @staticmethod
    def encode(model, args, kwargs):  # the pictures, before the model: κ must ask for it anew
        ids = kwargs.pop("input_ids")
        embeddings = model.get_input_embeddings()(ids)
        features = model.get_image_features(kwargs.pop("pixel_values")).pooler_output
        features = torch.cat(list(features)).to(embeddings)
        mask = (ids == model.config.image_token_id)[..., None].expand_as(embeddings)
        return args, kwargs | {"inputs_embeds": embeddings.masked_scatter(mask, features)}


@pytest.mark.parametrize("batch", [1, 2])
def test_a_trainer_that_cuts_the_labels_down_measures_the_same(make, batch):
    """ms-swift asks for the logits of the answers alone, by a mask or a count from the end: κ is as without."""
    found = []
    for host in (Trainer, Cutting):
        trainer = make(CommitCLR(measure_every=1, every=1), host=host, kind="llava", per_device_train_batch_size=batch)
        trainer.train()
        found.append([record for record in trainer.state.log_history if "kappa" in record])
        assert len(found[-1]) == 6
    plain, cut = found
    assert [r["kappa"] for r in cut] == pytest.approx([r["kappa"] for r in plain], rel=1e-3)
    assert [r["moved_encoder"] for r in cut] == pytest.approx([r["moved_encoder"] for r in plain], rel=1e-3)
    assert all(r["gradient_encoder"] > 0 and r["gradient_language"] > 0 for r in cut)
    assert all(r["h_encoder"] > 0 and r["h_language"] > 0 for r in plain)


def test_labels_that_fit_nothing_are_refused():
    labels, ids = torch.tensor([[-100, 4]]), torch.zeros(1, 5, dtype=torch.long)
    with pytest.raises(InputError, match="labels of 2 tokens where the model is given 5, with no logits_to_keep"):
        whole_labels({"input_ids": ids, "labels": labels})
    with pytest.raises(InputError, match="with another logits_to_keep"):
        whole_labels({"input_ids": ids, "labels": labels, "logits_to_keep": 3})
    kept = torch.tensor([False, True, False, False, True])
    found = whole_labels({"input_ids": ids, "labels": labels, "logits_to_keep": kept})["labels"]
    assert found.tolist() == [[-100, -100, 4, -100, -100]]


def test_the_resting_side_has_no_gradient(make):
    """Coordinate descent: it is not in the clipped norm, and the optimizer keeps nothing for it."""
    for name, still in (("feature_cd", "language"), ("language_cd", "encoder")):
        norms = {}
        for coordinator in (name, "constant"):
            trainer = make(coordinator, steps=1)
            trainer.train()
            norms[coordinator] = trainer.state.log_history[0]["grad_norm"]
            kept = [
                any(trainer.optimizer.state[p] for p in group["params"])
                for group in trainer.optimizer.param_groups
                if group["component"] == still
            ]
            assert any(kept) == (coordinator == "constant")
        assert norms[name] < norms["constant"] and all(
            p.requires_grad for inside in trainer.coordination.components.values() for p in inside
        )


def test_a_side_that_cannot_learn_is_reported(make, capsys):
    trainer = make(CommitCLR(measure_every=1), steps=7)
    for tensor in trainer.coordination.components["encoder"]:
        tensor.register_hook(torch.zeros_like)
    trainer.args.weight_decay = 0.0
    trainer.train()
    assert capsys.readouterr().err.count("equipoise: coordinator: κ has had no finite value in 5 measurements") == 1
    assert [record["skipped"] for record in trainer.state.log_history if "skipped" in record] == [*range(1, 8)]


def test_an_optimizer_of_ones_own_is_taken_and_a_scheduler_refused(make):
    def both(model):
        optimizer = torch.optim.SGD([p for p in model.parameters() if p.requires_grad], lr=1e-3)
        return optimizer, torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 1.0)

    with pytest.raises(InputError, match=r"a scheduler of your own does not fit .* Give \(optimizer, None\)"):
        make(optimizers=both)
    trainer = make(CommitCLR(measure_every=1, every=1), steps=2, optimizers=lambda model: (both(model)[0], None))
    trainer.train()
    assert {g["component"] for g in trainer.optimizer.param_groups} == {"encoder", "language"}


@pytest.mark.parametrize("scaled", [False, True])
def test_constant_is_the_plain_trainer_and_clr_is_not(make, scaled):
    """With LoRA pairs too, which splitting the parameter groups leaves together."""

    def trained(coordinator):
        arguments = {"optimizer_cls_and_kwargs": (ScaledAdamW, {"lr": 1e-2}), "rank": 2} if scaled else {}
        trainer = make(coordinator, **arguments)
        trainer.train()
        assert not scaled or len(trainer.optimizer.optimizer.pairs) == 4
        return weights(trainer)

    left, same = trained(None), trained("constant")
    other = trained(CommitCLR(measure_every=1, every=1))
    assert all(torch.equal(left[name], same[name]) for name in left)
    assert any(not torch.equal(left[name], other[name]) for name in left)


def test_a_resumed_trainer_goes_on_as_if_nothing_had_been(make, tmp_path):
    whole = make(CommitCLR(measure_every=1, every=1))
    whole.train()
    again = make(CommitCLR(measure_every=1, every=1))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    assert list(again.coordination.coordinator.recent) == pytest.approx(list(whole.coordination.coordinator.recent))
    left, right = weights(whole), weights(again)
    assert all(torch.allclose(left[name], right[name], atol=1e-7) for name in left)


def test_coordinate_descent_resumes_within_its_window(make, tmp_path):
    """The encoder side's weights at the window's begin are in the checkpoint, else it would be at rest later."""

    def begun():
        descent = FeatureDescent(window=2, rest=1.0, latest=1.0)
        return make(descent, lr_scheduler_type="polynomial", lr_scheduler_kwargs={"power": 4, "lr_end": 0}), descent

    whole, first = begun()
    whole.train()
    assert first.changed_at == 3, "the steps shorten quickly"
    (tmp_path / "out" / "checkpoint-3").rename(tmp_path / "elsewhere")
    again, second = begun()
    again.train(resume_from_checkpoint=str(tmp_path / "elsewhere"))
    assert second.state_dict() == first.state_dict() | {"changed_at": 3, "then": []}
    left, right = weights(whole), weights(again)
    assert all(torch.equal(left[name], right[name]) for name in left)
    fresh, third = begun()
    fresh.train()
    assert third.changed_at == 3, "what is not resumed begins from the start"


def test_a_state_comes_back_as_it_was(tmp_path):
    state = {"one": torch.arange(3), "some": [torch.ones(2), torch.zeros(1)], "none": [], "number": 1.5, "word": "a"}
    _save(state, tmp_path / "state.safetensors")
    found = _load(tmp_path / "state.safetensors")
    assert found.keys() == state.keys() and [item.name for item in tmp_path.iterdir()] == ["state.safetensors"]
    assert torch.equal(found["one"], state["one"]) and (found["none"], found["number"], found["word"]) == ([], 1.5, "a")
    assert all(torch.equal(left, right) for left, right in zip(found["some"], state["some"], strict=True))


@pytest.mark.parametrize(
    "arguments",
    [
        {"bf16": True},
        {"gradient_checkpointing": True, "gradient_accumulation_steps": 2},
        {"label_smoothing_factor": 0.1},  # for which the Trainer takes the labels out of the batch
    ],
)
def test_mixed_precision_checkpointing_and_accumulation(make, arguments):
    trainer = make(CommitCLR(measure_every=1, every=1), **arguments)
    trainer.train()
    logs = [record for record in trainer.state.log_history if "kappa" in record]
    assert len(logs) == 6 and all(record["kappa"] > 0 for record in logs)
    assert len({record["kappa"] for record in logs}) == 6 and all(p.grad is None for p in trainer.model.parameters())


_PROCESS = """
import json, sys, warnings
warnings.simplefilter("ignore")
from transformers import AutoModelForMultimodalLM, Trainer, TrainingArguments
from equipoise.coordination.commit import CommitCLR
from equipoise.hosts.coordination import coordinated
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import read_examples
from equipoise.pipelines.instruction_tuning.model import load_processor
from equipoise.pipelines.instruction_tuning.talk import Talk
from pathlib import Path

folder, data, out, size = *sys.argv[1:4], int(sys.argv[4])
model = AutoModelForMultimodalLM.from_pretrained(folder)
model.model.vision_tower.requires_grad_(False)
settings = TrainingArguments(
    out, max_steps=4, per_device_train_batch_size=size, learning_rate=1e-2, logging_steps=1, save_strategy="no",
    report_to=[], use_cpu=True, remove_unused_columns=False, disable_tqdm=True, dataloader_pin_memory=False,
)
trainer = coordinated(Trainer)(
    model=model, args=settings, train_dataset=read_examples(Path(data), None)[0],
    data_collator=Talk(load_processor(InstructionTuningModel(path=folder)), "llava").training_batch,
    coordinator=CommitCLR(measure_every=1, every=1),
)
trainer.train()
seen = [[r["kappa"], r["rate_encoder"], r["rate_language"]] for r in trainer.state.log_history if "kappa" in r]
Path(out).mkdir(exist_ok=True)
Path(out, f"{settings.world_size}-{settings.process_index}.json").write_text(json.dumps(seen))
"""


@pytest.mark.slow
def test_two_processes_are_one_on_the_joined_batch(checkpoints, pictures, tmp_path, monkeypatch, forked):
    """DistributedDataParallel, as torchrun starts it: κ and rates are the same in both, and those of one process."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "train.py"
    script.write_text(_PROCESS)
    words = [str(checkpoints("llava")), str(pictures), str(tmp_path / "out")]
    together = {"WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    started = [
        forked.start(tmp_path, str(script), *words, "1", **together, RANK=str(rank), LOCAL_RANK=str(rank))
        for rank in (0, 1)
    ]
    monkeypatch.setattr(sys, "argv", ["train.py", *words, "2"])
    with warnings.catch_warnings():
        runpy.run_path(str(script))
    for ended in [end() for end in started]:
        assert ended.returncode == 0, ended.stderr
    alone, first, second = (
        json.loads((tmp_path / "out" / f"{name}.json").read_text()) for name in ("1-0", "2-0", "2-1")
    )
    assert len(alone) == 4 and first == second
    for mine, other in zip(first, alone, strict=True):
        assert mine == pytest.approx(other, rel=1e-3), "sums of float32 in another order"
    assert alone[0][1] == alone[0][2] and alone[-1][1] != pytest.approx(alone[-1][2], rel=1e-2)


def test_what_a_trainer_cannot_do_is_refused(make):
    with pytest.raises(InputError, match="which a Trainer does not make"):
        make("commit")
    trainer = make("commit_clr")
    with pytest.raises(InputError, match="the batches have no labels, by which the answers' tokens are known"):
        trainer.coordination._measure(trainer.model)


def test_a_checkpoint_of_another_trainer_is_refused(make, tmp_path):
    make(None, steps=3).train()
    with pytest.raises(InputError, match=r"checkpoint-3 has no coordination\.safetensors, so that no coordinated"):
        make("commit_clr").train(resume_from_checkpoint=True)
