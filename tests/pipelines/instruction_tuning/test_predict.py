"""`equipoise predict` and `equipoise evaluate`: answers of a trained run to new media, and how right they are."""

import base64
import csv
import json
import math
import shutil
from pathlib import Path

import pytest

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store

NAME = "instruction_tuning/demo"


@pytest.fixture
def trained(short, sounds):
    """A finished run of a kind of model."""

    def get(kind: str = "llava", *words: str) -> Run:
        given = short(kind, sounds if kind == "qwen2_audio" else None)
        settings = config.load(NAME, [*given, "learning_rate=1e-2", "schedule=constant", *words])
        run = Store(settings.runs).create(settings)
        assert execute(InstructionTuning, settings, run).state == "done"
        return run

    return get


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_pictures_of_a_folder_are_asked_every_prompt(trained, pictures, tmp_path, capsys):
    run, folder = trained(), tmp_path / "new" / "deep"
    folder.mkdir(parents=True)
    for name in ("a.png", "b.png"):
        shutil.copy(pictures.parent / "0.png", folder / name)
    (folder / "notes.txt").write_text("no picture")
    capsys.readouterr()
    assert (
        main(["predict", str(run.folder), str(tmp_path / "new"), "--prompt", "What colour?", "--prompt", "Why?"]) == 0
    )
    found = rows(capsys.readouterr().out)
    assert [(row["image"], row["question"]) for row in found] == [
        (str(folder / name), question) for name in ("a.png", "b.png") for question in ("What colour?", "Why?")
    ]
    assert all(isinstance(row["answer"], str) for row in found)
    assert found[0]["answer"] == found[2]["answer"], "the same picture and question"
    assert main(["predict", str(run.folder), str(folder / "a.png"), "--prompt", "Why?"]) == 0
    assert rows(capsys.readouterr().out) == [found[1]]


def test_the_answers_are_those_that_the_run_itself_gave(trained, pictures, capsys):
    run = trained("llava", "samples.max_new_tokens=6")
    (file,) = (run.folder / "samples").glob("*/answers.jsonl")
    wanted = rows(file.read_text())
    capsys.readouterr()
    assert main(["predict", str(run.folder), wanted[0]["media"][0], "--prompt", wanted[0]["question"]]) == 0
    assert rows(capsys.readouterr().out)[0]["answer"] == wanted[0]["answer"]


def test_tables_without_labels_and_the_table_that_comes_out(trained, pictures, tmp_path, capsys):
    run, folder = trained(), pictures.parent
    (folder / "ask.csv").write_text("image,question\n0.png,What colour?\n1.png;2.png,Which of them?\n,Is it day?\n")
    output = tmp_path / "said.csv"
    assert main(["predict", str(run.folder), str(folder / "ask.csv"), "--output", str(output)]) == 0
    with output.open(newline="") as opened:
        found = list(csv.DictReader(opened))
    assert [row["question"] for row in found] == ["What colour?", "Which of them?", "Is it day?"]
    assert found[1]["image"] == f"{folder / '1.png'};{folder / '2.png'}" and found[2]["image"] == ""
    assert set(found[0]) == {"image", "question", "answer"}, "columns that training reads"
    open_ended = [
        {"from": "human", "value": "<image>\nWhat colour?"},
        {"from": "gpt", "value": "red"},
        {"from": "human", "value": "Sure?"},
    ]
    records = [{"image": "0.png", "conversations": open_ended}, {"image": "1.png", "question": "What?"}]
    (folder / "ask.json").write_text(json.dumps(records))
    (folder / "ask.jsonl").write_text("\n".join(map(json.dumps, records)))
    capsys.readouterr()
    for name in ("ask.json", "ask.jsonl"):
        assert main(["predict", str(run.folder), str(folder / name)]) == 0
        assert [row["question"] for row in rows(capsys.readouterr().out)] == ["Sure?", "What?"]


def test_questions_in_the_formats_of_other_tools(trained, pictures, capsys):
    run, folder = trained(), pictures.parent
    part = {"type": "image", "path": "0.png"}
    asked = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": [part, {"type": "text", "text": "What colour?"}]},
    ]
    answered = [*asked, {"role": "assistant", "content": "red"}, {"role": "user", "content": "Sure?"}]
    records = [
        {"messages": asked},
        {"messages": answered},
        {"image": "1.png", "query": "Which?"},
        {"instruction": "Say", "input": "yes."},
        {"image": "1.png", "prompt": [{"role": "user", "content": "<image>Now?"}]},
    ]
    (folder / "ask.jsonl").write_text("\n".join(map(json.dumps, records)))
    capsys.readouterr()
    assert main(["predict", str(run.folder), str(folder / "ask.jsonl")]) == 0
    found = rows(capsys.readouterr().out)
    assert [row["question"] for row in found] == ["What colour?", "Sure?", "Which?", "Say\nyes.", "Now?"]
    assert [Path(row.get("image", "none")).name for row in found] == ["0.png", "0.png", "1.png", "none", "1.png"]
    (folder / "ask.jsonl").write_text(json.dumps(records[0]))
    assert main(["predict", str(run.folder), str(folder / "ask.jsonl"), "--prompt", "Why?"]) == 0
    (row,) = rows(capsys.readouterr().out)
    assert (row["image"], row["question"]) == (str(folder / "0.png"), "Why?")
    (folder / "ask.jsonl").write_text(json.dumps({"messages": [{"role": "user", "content": [{"type": "file"}]}]}))
    assert main(["predict", str(run.folder), str(folder / "ask.jsonl")]) == 2
    assert "ask.jsonl:1: turn 1 has a part of the type 'file'" in capsys.readouterr().err


def test_sounds(trained, sounds, capsys):
    run = trained("qwen2_audio")
    capsys.readouterr()
    assert main(["predict", "latest", "--runs", str(run.root), str(sounds.parent), "--prompt", "High or low?"]) == 0
    found = rows(capsys.readouterr().out)
    assert len(found) == 12 and all(row["audio"].endswith((".wav", ".flac")) for row in found)


def test_labelled_conversations_are_judged_as_the_run_judged_its_own(trained, pictures, tmp_path, capsys):
    held = pictures.with_name("held.jsonl")
    held.write_text("\n".join(pictures.read_text().splitlines()[:3]))
    run = trained("llava", f"data.validation={held}", "samples.count=3")
    facts = json.loads((run.result / "result.json").read_text())
    capsys.readouterr()
    output = tmp_path / "judged.jsonl"
    assert main(["evaluate", str(run.folder), str(held), "--output", str(output)]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[1:3])
    assert float(printed["loss"]) == pytest.approx(facts["loss_after"], rel=1e-3)
    assert float(printed["score"]) == pytest.approx(facts["score_after"], rel=1e-3)
    found = rows(output.read_text())
    assert [row["wanted"] for row in found] == ["red", "green", "blue"]
    assert sum(row["score"] for row in found) / 3 == pytest.approx(facts["score_after"])


def test_labelled_conversations_are_read_as_the_runs_own_were(trained, pictures, tmp_path, capsys):
    """Captions get its question and media its folder; what data.max_tokens cuts away has no loss."""
    folder = pictures.parent
    captions = "".join(json.dumps({"image": f"{n}.png", "caption": "red"}) + "\n" for n in range(3))
    (elsewhere := tmp_path / "elsewhere").mkdir()
    (elsewhere / "captions.jsonl").write_text(captions)
    words = [f"data.folder={folder}", "data.question='What colour?'", "data.max_tokens=60"]
    run = trained("llava", *words)
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), str(elsewhere / "captions.jsonl")]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[1:3])
    assert math.isfinite(float(printed["loss"]))
    long = json.dumps({"image": "0.png", "question": "What colour? " * 60, "answer": "red"})
    (elsewhere / "long.jsonl").write_text(captions + long + "\n")
    assert main(["evaluate", str(run.folder), str(elsewhere / "long.jsonl")]) == 2
    told = capsys.readouterr().err
    assert "long.jsonl:4: has" in told and "data.max_tokens=60 cuts its answers away entirely" in told
    run = trained("llava", *words, "data.skip_bad=true")
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), str(elsewhere / "long.jsonl")]) == 0
    found = capsys.readouterr()
    assert "left out, for it cannot be used:" in found.err and "long.jsonl:4" in found.err
    assert f"loss: {printed['loss']}" in found.out


@pytest.mark.parametrize(
    "words",
    [
        ["language.method=frozen", "coordinator=constant"],
        ["language.method=full", "train.precision=bf16"],
        ["lora.dora=true", "train.precision=bf16"],
    ],
)
def test_every_kind_of_result_answers(words, trained, pictures, capsys):
    run = trained("llava", *words)
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), str(pictures)]) == 0
    assert "score: " in capsys.readouterr().out


def test_refusals_are_sentences(trained, pictures, tmp_path, capsys):
    run, folder = trained(), pictures.parent
    (folder / "broken.png").write_bytes(b"no picture")
    (folder / "ask.csv").write_text("image,question\nbroken.png,What?\nmissing.png,What?\n0.png,\n0.png\n")
    (folder / "odd.csv").write_text("picture,question\n0.png,What?\n")
    (folder / "ask.jsonl").write_text('{"picture": "0.png", "question": "What?"}\nnothing\n[]\n{"image": "0.png"}\n')
    (tmp_path / "empty").mkdir()
    wanted = {
        (str(folder / "nowhere"),): "nowhere does not exist.",
        (str(tmp_path / "empty"), "--prompt", "What?"): "empty: has no picture in it or in its folders.",
        (str(folder / "0.png"),): "0.png: has no question. Give one by --prompt.",
        (str(folder / "ask.csv"),): "broken.png cannot be read as a picture",
        (str(folder / "odd.csv"),): "odd.csv:1: has the column 'picture', which is unknown",
        (str(folder / "ask.jsonl"),): "ask.jsonl:1: has picture; media are named under image or audio",
        (str(folder / "0.png"), "--prompt", "What?", "--output", "x.txt"): "x.txt must end in .csv or .jsonl.",
        (str(folder / "0.png"), "--prompt", "<image> and <image>"): "mentions 2 <image>, but 1 is given.",
    }
    for words, message in wanted.items():
        capsys.readouterr()
        assert main(["predict", str(run.folder), *words]) == 2, words
        error = capsys.readouterr().err
        assert message in error and "Traceback" not in error, (words, error)
    for text in ("missing.png does not exist", "ask.csv:4: has no question", "ask.csv:5: has more or fewer cells"):
        main(["predict", str(run.folder), str(folder / "ask.csv")])
        assert text in capsys.readouterr().err
    main(["predict", str(run.folder), str(folder / "ask.jsonl")])
    error = capsys.readouterr().err
    assert (
        "ask.jsonl:2: is not JSON" in error
        and "ask.jsonl:3: must be an object" in error
        and "ask.jsonl:4: has no" in error
    )
    (folder / "none").mkdir()
    assert main(["evaluate", str(run.folder), str(folder / "none")]) == 2
    assert "is a folder" in capsys.readouterr().err
    (run.result / "adapter_model.safetensors").unlink()
    assert main(["evaluate", str(run.folder), str(pictures)]) == 2
    assert "adapter_model.safetensors: is missing." in capsys.readouterr().err
    (run.result / "result.json").unlink()
    assert main(["evaluate", str(run.folder), str(pictures)]) == 2
    assert "has no result yet" in capsys.readouterr().err


def test_media_from_within_a_file_are_named_by_where_they_stand_in_it(trained, pictures, tmp_path, capsys):
    run = trained()
    inside = "data:image/png;base64," + base64.b64encode((pictures.parent / "0.png").read_bytes()).decode()
    lines = [
        {"image": path, "question": "What?", "answer": "Red."} for path in (inside, str(pictures.parent / "0.png"))
    ]
    (tmp_path / "ask.jsonl").write_text("".join(json.dumps(line) + "\n" for line in lines))
    capsys.readouterr()
    for command in (["predict"], ["evaluate"]):
        output = tmp_path / f"{command[0]}.jsonl"
        assert main([*command, str(run.folder), str(tmp_path / "ask.jsonl"), "--output", str(output)]) == 0
        found = rows(output.read_text())
        assert [row["image"] for row in found] == [f"{tmp_path / 'ask.jsonl'}:1", str(pictures.parent / "0.png")]
        assert found[0]["answer"] == found[1]["answer"], "it is the same picture"
