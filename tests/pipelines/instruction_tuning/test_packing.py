"""Conversations in one row: nothing changes but the number of rows, or the run is refused."""

from dataclasses import replace

import pytest
import torch

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.collator import AnswerCollator
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import read_examples
from equipoise.pipelines.instruction_tuning.model import load_model
from equipoise.pipelines.instruction_tuning.packing import leaks, pack, width
from equipoise.pipelines.instruction_tuning.talk import IGNORED
from equipoise.pipelines.instruction_tuning.verify import packing_problems, verify
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store

NAME = "instruction_tuning/demo"
APART = ["llava", "qwen2_vl", "qwen2_5_vl", "smolvlm", "internvl", "qwen3_vl", "gemma4", "glm46v", "llava_onevision"]
MIXED = {"qwen3_5": "is another", "gemma3": "is another", "paligemma": "depends on the conversation before it"}


def read(checkpoints, kind: str, data):
    folder = checkpoints(kind)
    collator = AnswerCollator(str(folder))
    examples, problems = read_examples(data, None)
    assert problems == []
    return collator.talk, load_model(InstructionTuningModel(path=str(folder)), "no"), examples[:5]


@torch.no_grad()
def logits(model, batch):
    return model(**{name: value for name, value in batch.items() if name != "labels"}, use_cache=False).logits


@pytest.mark.parametrize("kind", [*APART, "qwen2_audio"])
def test_a_packed_rows_answers_are_those_of_separate_rows(kind, checkpoints, pictures, sounds):
    talk, model, examples = read(checkpoints, kind, sounds if kind == "qwen2_audio" else pictures)
    batch = talk.training_batch(examples)
    packed = pack(batch, 10_000, model)
    assert packed.batch["input_ids"].shape == (1, int(batch["attention_mask"].sum()))
    assert torch.equal(
        packed.padded(packed.batch["labels"] + 1) - 1, batch["labels"].masked_fill(batch["attention_mask"] == 0, -1)
    )
    answers = batch["labels"] != IGNORED
    apart, together = logits(model, batch)[answers], packed.padded(logits(model, packed.batch))[answers]
    torch.testing.assert_close(together, apart, rtol=1e-5, atol=1e-5 * apart.std().item())
    assert not leaks(model, packed) and packing_problems(talk, model, examples) == []
    seen = dict(packed.batch) | {"position_ids": torch.arange(packed.index.shape[1])[None]}
    assert leaks(model, replace(packed, batch=seen)), "positions that go on would mix them"


@pytest.mark.parametrize("kind", MIXED)
def test_models_that_mix_a_rows_conversations_are_refused(kind, checkpoints, pictures):
    talk, model, examples = read(checkpoints, kind, pictures)
    with pytest.raises(InputError, match=rf"train.packing: .*{MIXED[kind]}.*Use train.packing=false"):
        verify(talk, model, examples, 4, packing=True)
    verify(talk, model, examples, 4)


def test_models_without_positions_are_refused_by_the_check(short):
    assert InstructionTuning.check(config.load(NAME, [*short("blip-2"), "train.packing=true"])) == [
        "train.packing: blip-2 takes no positions, and would read conversations in one row as one. Leave it out."
    ]


def test_rows_are_filled_in_order_and_no_longer_than_wanted(checkpoints, pictures):
    talk, model, examples = read(checkpoints, "llava", pictures)
    batch = talk.training_batch(examples)
    lengths = batch["attention_mask"].sum(1).tolist()
    assert width(batch, None) == max(lengths) and width(batch, 200) == 200
    packed = pack(batch, lengths[0] + lengths[1], model)
    assert packed.index.shape[1] <= max(*lengths, lengths[0] + lengths[1]) and len(packed.index) < len(lengths)
    order = packed.sample[packed.sample >= 0]
    assert torch.equal(order, order.sort().values), "so do media, which models take in the order of their tokens"
    one = pack(batch, 1, model)
    assert one.index.shape == (len(lengths), max(lengths)), "each has a row of its own"


def run(words: list[str]) -> Run:
    settings = config.load(NAME, words)
    made = Store(settings.runs).create(settings)
    assert execute(InstructionTuning, settings, made).state == "done"
    return made


@pytest.mark.parametrize("kind", ["llava", "qwen2_5_vl"])
def test_a_packed_run_is_the_run(kind, short):
    words = [*short(kind), "batch=4", "learning_rate=1e-3", "coordinator=commit_clr", "data.max_tokens=400"]
    words += ["coordinator.options={measure_every: 1}"]
    plain, packed = run(words), run([*words, "train.packing=true"])
    assert "do not see each other" in (packed.folder / "log.txt").read_text()
    for mine, theirs in zip(plain.metrics(), packed.metrics(), strict=True):
        for name in ("loss", "kappa", "h_language", "h_encoder"):
            assert mine.get(name) == pytest.approx(theirs.get(name), rel=1e-3), name
