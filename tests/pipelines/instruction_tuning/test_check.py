"""What is found before a run: positions, tied heads, conversations that are left out, and what a dry run shows."""

import json
import os
import shutil

import pytest
import torch
from peft import PeftModel
from PIL import Image
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM

from equipoise.pipelines import config, demo
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning, examples
from equipoise.pipelines.instruction_tuning.model import old_names

NAME = "instruction_tuning/demo"


def said(question: str, answer: str, **more) -> dict:
    return {**more, "conversations": [{"from": "human", "value": question}, {"from": "gpt", "value": answer}]}


@pytest.fixture
def written(tmp_path):
    Image.new("RGB", (16, 16), "red").save(tmp_path / "red.png")

    def get(*rows: dict | str):
        file = tmp_path / "talk.jsonl"
        file.write_text("".join((row if isinstance(row, str) else json.dumps(row)) + "\n" for row in rows))
        return f"data={file}"

    return get


ASKED = said("<image>\nIs it?", "Yes", image="red.png")


def test_what_is_longer_than_the_position_table_is_found(short, written, capfd):
    long = said("<image>\nIs it? " + "very " * 60, "Yes", image="red.png")
    data = written(ASKED, ASKED, long, *[ASKED] * 7)
    assert main(["train", NAME, *short("blip-2"), data, "--dry-run"]) == 2
    assert (
        "talk.jsonl:3: has 333 tokens, and blip-2 has positions for 256. Set data.max_tokens=256"
        in capfd.readouterr().err
    )
    assert main(["train", NAME, *short("blip-2"), data, "--dry-run", "data.max_tokens=256"]) == 2, "no answer is left"
    assert main(["train", NAME, *short("blip-2"), data, "--dry-run", "--skip-bad"]) == 0
    assert "# left out, for it cannot be used:" in capfd.readouterr().out
    assert main(["train", NAME, *short("llava"), data, "--dry-run"]) == 0, "rotary positions have no table"
    assert main(["train", NAME, *short("blip-2"), written(ASKED), "samples.max_new_tokens=300"]) == 2
    assert (
        "samples.max_new_tokens: 300 tokens after a question of up to 28 are more than the 256"
        in capfd.readouterr().err
    )


def test_bad_conversations_are_left_out_and_named(short, written, tmp_path, capfd):
    bad = [said("<image>\nIs it?", "No", image="gone.png"), "{", said("</s>?", "No"), said("Is it?", "")]
    data = written(*[ASKED] * 5, *bad, *[ASKED] * 6)
    assert main(["train", NAME, *short(), data]) == 2
    capfd.readouterr()
    assert main(["train", NAME, *short(), data, "--skip-bad", "--id", "rest"]) == 0
    error = capfd.readouterr().err
    assert [f"talk.jsonl:{line}: " in error for line in (5, 6, 7, 8, 9, 10)] == [False, True, True, True, True, False]
    assert "left out, for it cannot be used:" in (tmp_path / "runs" / "rest" / "log.txt").read_text()
    assert main(["train", NAME, *short(), written(*bad), "--skip-bad"]) == 2
    assert "no conversation is left to train on." in capfd.readouterr().err


def test_a_file_that_is_wrong_as_a_whole_is_not_skipped(short, tmp_path, capfd):
    for name, text, message in (
        ("a.csv", "question,reply\na,b\n", "lacks the column answer"),
        ("a.json", json.dumps([said("Is it?", "Yes")])[:-1], "is not JSON from here on"),
    ):
        (tmp_path / name).write_text(text)
        assert main(["train", NAME, *short(), f"data={tmp_path / name}", "--skip-bad"]) == 2
        assert message in capfd.readouterr().err


def test_a_dry_run_shows_what_will_be_learnt(short, written, capfd):
    assert main(["train", NAME, *short(), written(ASKED, said("Is it red?", "Very"), ASKED), "--dry-run"]) == 0
    assert r"# labels of 2 rows: 'Yes<|im_end|>\n', 'Very<|im_end|>\n'." in capfd.readouterr().out


def test_a_tied_head_is_said_and_merges_once_it_is_untied(written, tmp_path, capfd):
    words = [
        written(*[ASKED] * 12),
        "model=demo",
        'lora.targets=["lm_head"]',
        "steps=3",
        "batch=2",
        "coordinator=constant",
    ]
    words += ["samples.count=1", "samples.max_new_tokens=1", "learning_rate=1e-2", f"runs={tmp_path / 'runs'}"]
    assert main(["train", NAME, *words, "--id", "tied"]) == 0
    assert "lm_head is tied: the head and the embedding are one weight" in capfd.readouterr().err
    result = tmp_path / "runs" / "tied" / "result"
    batch = {"input_ids": torch.arange(5, 15)[None]}

    def merged(untied: bool):
        model = AutoModelForMultimodalLM.from_pretrained(demo.multimodal_folder(), dtype=torch.float32)
        model.load_state_dict(load_file(result / "encoder.safetensors"), strict=False)
        if untied:
            head = model.get_output_embeddings()
            head.weight = torch.nn.Parameter(head.weight.detach().clone())
        with old_names():
            model = PeftModel.from_pretrained(model, result).eval()
        before = model.language_model(**batch).logits
        return (model.merge_and_unload().language_model(**batch).logits - before).abs().max()

    with torch.no_grad():
        assert merged(untied=True) < 1e-4 < 1e-2 < merged(untied=False)
    assert main(["train", NAME, *words[:2], "lora.targets=[q_proj]", "--dry-run", f"runs={tmp_path / 'runs'}"]) == 0
    assert "tied" not in capfd.readouterr().err


def test_that_all_conversations_are_good_is_kept_until_something_changes(short, pictures, tmp_path, monkeypatch):
    measured = []
    unusable = examples.unusable
    monkeypatch.setattr(
        examples, "unusable", lambda some, *rest: (measured.append(len(some)), unusable(some, *rest))[1]
    )

    def check(*words: str) -> list[str]:
        measured.clear()
        return InstructionTuning.check(config.load(NAME, [*short(), *words]))

    assert check() == [] and check() == [] and measured == [12], "a check makes no folder of runs"
    (tmp_path / "runs").mkdir()
    assert check() == [] and measured == [12]
    assert check() == [] and measured == []
    for words in (["model.path=" + str(tmp_path / "other")], ["data.max_tokens=100"]):
        if "path" in words[0]:
            shutil.copytree(config.load(NAME, short()).model.path, tmp_path / "other")
        assert check(*words) == [] and measured == [12]
        assert check(*words) == [] and measured == []
    os.utime(pictures.parent / "3.png", (1, 1))
    assert check() == [] and measured == [12]
    lines = pictures.read_text().splitlines()
    pictures.write_text("\n".join([*lines[:-1], lines[-1].replace("What colour?", "What colour? " * 200)]))
    assert check("data.max_tokens=100") != [] and check("data.max_tokens=100") != [] and measured == [12]


def test_what_the_check_found_before_there_was_a_folder_of_runs_is_kept_by_the_run(short, tmp_path):
    assert main(["train", NAME, *short(), "--id", "first"]) == 0
    cache = tmp_path / "runs" / ".cache"
    assert len(list((cache / "measured").iterdir())) == 1
    assert len((cache / "good-media").read_text().splitlines()) == 12
