"""The collator, in a Trainer of one's own."""

import json

import pytest
import torch
from transformers import AutoModelForMultimodalLM, Trainer, TrainingArguments

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.collator import AnswerCollator
from equipoise.pipelines.instruction_tuning.talk import IGNORED


def test_a_trainer_learns_the_answers(checkpoints, pictures, tmp_path, hosted):
    records = [json.loads(line) for line in pictures.read_text().splitlines()]
    collator = AnswerCollator(str(checkpoints("llava")), folder=pictures.parent)
    batch = collator(records[2:4])
    said = [collator.talk.tokenizer.decode(row[row != IGNORED]) for row in batch["labels"]]
    assert said == ["blue<|im_end|>\n", "red<|im_end|>\nYes, quite sure.<|im_end|>\n"]
    model = AutoModelForMultimodalLM.from_pretrained(checkpoints("llava"))
    assert "labels of 2 rows" in collator.verify(model, records, batch=4)
    torch.manual_seed(0)
    arguments = TrainingArguments(
        str(tmp_path / "out"), max_steps=6, per_device_train_batch_size=4, remove_unused_columns=False, **hosted
    )
    trainer = Trainer(model=model, args=arguments, train_dataset=records, data_collator=collator)
    trainer.train()
    losses = [line["loss"] for line in trainer.state.log_history if "loss" in line]
    assert losses[-1] < losses[0] - 0.5


def test_rows_of_a_data_set_are_taken_as_they_are(checkpoints, pictures):
    """TRL's columns, their pictures decoded by `datasets`."""
    from datasets import Dataset, Image, List

    names = [str(pictures.parent / f"{number}.png") for number in range(2)]
    asked = [{"role": "user", "content": [{"type": "image"}, {"type": "text", "text": "What colour?"}]}]
    rows = {"images": [[name] for name in names], "prompt": [asked] * 2, "completion": ["red", "green"]}
    collator = AnswerCollator(str(checkpoints("llava")), folder=pictures.parent)
    ours = [json.loads(line) for line in pictures.read_text().splitlines()[:2]]
    batch = collator(list(Dataset.from_dict(rows).cast_column("images", List(Image()))))
    for name, tensor in collator(ours).items():
        assert torch.equal(batch[name], tensor), name


def test_what_is_wrong_with_a_record_is_a_sentence(checkpoints, pictures):
    collator = AnswerCollator(str(checkpoints("llava")), folder=pictures.parent)
    said = [{"from": "human", "value": "<image>\nWhat?"}, {"from": "gpt", "value": "red"}]
    for record, message in (
        ({"conversations": said}, "conversation 1: mentions <image>, but no image is given."),
        ({"image": "no.png", "conversations": said}, "conversation 1: image .*no.png does not exist."),
        (
            {"audio": "0.wav", "conversations": [{**said[0], "value": "?"}, said[1]]},
            "conversation 1: has an audio, but",
        ),
        ([], "conversation 1: must be an object with conversations, got list."),
    ):
        with pytest.raises(InputError, match=message):
            collator([record])
