"""Coordination in trl's own SFTTrainer, on a small LLaVA with LoRA on its language model and its projector in full."""

import warnings
from types import SimpleNamespace

import pytest
import torch
from datasets import Dataset
from peft import LoraConfig
from PIL import Image
from transformers import AutoModelForImageTextToText
from trl import SFTConfig, SFTTrainer

from equipoise.coordination.commit import CommitCLR
from equipoise.hosts.coordination import coordinated
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.model import load_processor

COLOURS = ("red", "green", "blue", "white")


@pytest.fixture
def make(checkpoints, tmp_path, hosted):
    folder = checkpoints("llava")
    asked = {"role": "user", "content": "What colour?"}
    rows = [
        {
            "images": [Image.new("RGB", (16, 16), colour)],
            "prompt": [asked],
            "completion": [{"role": "assistant", "content": colour}],
        }
        for colour in COLOURS
    ]

    def get(coordinator):
        torch.manual_seed(0)
        settings = SFTConfig(
            str(tmp_path / "out"),
            max_steps=6,
            per_device_train_batch_size=2,
            save_steps=3,
            max_length=None,
            bf16=False,
            **hosted,
        )
        host, own = (coordinated(SFTTrainer), {"coordinator": coordinator}) if coordinator else (SFTTrainer, {})
        return host(
            model=AutoModelForImageTextToText.from_pretrained(folder),
            args=settings,
            train_dataset=Dataset.from_list(rows),
            processing_class=load_processor(InstructionTuningModel(path=str(folder))),
            peft_config=LoraConfig(
                r=2, target_modules=r".*language_model.*\.(q|v)_proj", modules_to_save=["multi_modal_projector"]
            ),
            **own,
        )

    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        warnings.simplefilter("ignore", DeprecationWarning)
        yield get


def weights(trainer):
    return {n: p.detach().clone() for n, p in trainer.model.named_parameters() if p.requires_grad}


def test_the_sides_of_a_model_that_trl_adapts(make, tmp_path, monkeypatch):
    trainer = make(CommitCLR(measure_every=1, every=1))
    names = {id(p): name for name, p in trainer.model.named_parameters()}
    sides = {side: {names[id(p)] for p in inside} for side, inside in trainer.coordination.components.items()}
    assert all("multi_modal_projector.modules_to_save" in name for name in sides["encoder"])
    assert all("lora_" in name for name in sides["language"]) and sides["language"]
    shapes = []
    trainer.model.get_output_embeddings().register_forward_hook(
        lambda module, given, made: trainer.model.training or shapes.append(made.shape[1])
    )
    trainer.train()
    longest = max(len(colour) for colour in COLOURS) + len("<|im_end|>.")
    assert len(shapes) == 18 and max(shapes) <= longest, "three passes a step, with the answers' logits alone"
    logs = [record for record in trainer.state.log_history if "kappa" in record]
    assert len(logs) == 6 and all(record["kappa"] > 0 and record["mean_token_accuracy"] >= 0 for record in logs)
    for record in logs[1:]:
        assert record["rate_encoder"] + record["rate_language"] == pytest.approx(2e-2 * (7 - record["step"]) / 6)
        assert record["rate_encoder"] != pytest.approx(record["rate_language"])

    again = make(CommitCLR(measure_every=1, every=1))
    again.train(resume_from_checkpoint=str(tmp_path / "out" / "checkpoint-3"))
    left, right = weights(trainer), weights(again)
    assert all(torch.equal(left[name], right[name]) for name in left)

    full = make(CommitCLR(measure_every=1, every=1))
    monkeypatch.setattr("equipoise.hosts.coordination.signature", lambda _: SimpleNamespace(parameters=()))
    full.train()
    kappas = [record["kappa"] for record in full.state.log_history if "kappa" in record]
    assert kappas == pytest.approx([record["kappa"] for record in logs], rel=1e-4), "as with the logits of all tokens"


def test_constant_is_the_plain_sft_trainer(make):
    def trained(coordinator):
        trainer = make(coordinator)
        trainer.train()
        return weights(trainer)

    left, same = trained(None), trained("constant")
    other = trained(CommitCLR(measure_every=1, every=1))
    assert all(torch.equal(left[name], same[name]) for name in left)
    assert any(not torch.equal(left[name], other[name]) for name in left)
