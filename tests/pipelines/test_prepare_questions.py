"""`equipoise prepare` on small copies of published questions and captions, as the pipeline reads what it makes."""

import csv
import json
import shlex
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning.data import read_examples


def picture(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (8, 8), "red").save(file)


def sound(file: Path) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    soundfile.write(file, np.sin(np.arange(4000) / 9).astype("float32"), 8000)


def table(file: Path, rows: list[dict]) -> None:
    file.parent.mkdir(parents=True, exist_ok=True)
    with file.open("w", newline="") as opened:
        writer = csv.DictWriter(opened, list(rows[0]))
        writer.writeheader()
        writer.writerows(rows)


def lines(file: Path) -> list[dict]:
    return [json.loads(line) for line in file.read_text().splitlines()]


def prepared(name: str, folder: Path) -> dict[str, list[dict]]:
    """Its records by split, each of which the pipeline reads."""
    assert main(["prepare", name, str(folder)]) == 0
    found = {split: folder / f"{split}.jsonl" for split in ("train", "val", "test")}
    for file in filter(Path.is_file, found.values()):
        examples, problems = read_examples(file, None)
        assert problems == [] and len(examples) == len(lines(file))
    return {split: lines(file) for split, file in found.items() if file.is_file()}


def test_a_okvqa_has_ten_direct_answers_and_cocos_pictures(tmp_path, capsys):
    for split, number in (("train", 299207), ("val", 461751)):
        row = {
            "split": split, "image_id": number, "question_id": f"q{number}", "question": "What is it?",
            "choices": ["a", "b", "c", "d"], "correct_choice_idx": 1, "direct_answers": ["ramp"] * 6 + ["slope"] * 4,
            "difficult_direct_answer": False, "rationales": ["It is steep."] * 3,
        }  # fmt: skip
        more = {**row, "question_id": "lost", "image_id": 7}
        (tmp_path / f"aokvqa_v1p0_{split}.json").write_text(json.dumps([row, more]))
    picture(tmp_path / "train2017" / "000000299207.jpg")
    picture(tmp_path / "coco" / "val2017" / "000000461751.jpg")
    found = prepared("a-okvqa", tmp_path)
    asked = {"question": "What is it?", "answers": ["ramp"] * 6 + ["slope"] * 4}
    assert found == {
        "train": [{"image": "train2017/000000299207.jpg", **asked}],
        "val": [{"image": "coco/val2017/000000461751.jpg", **asked}],
    }
    said = capsys.readouterr().out
    assert "2 questions (1 train, 1 val)" in said and "samples.metric=vqa" in said
    assert "left out 2 of 4: lost has no train2017/000000000007.jpg" in said


def test_iconqa_lists_choices_and_leaves_those_among_pictures_out(tmp_path, capsys):
    problems = {
        "1": {"question": "How many?", "choices": ["3", "5"], "answer": 1, "ques_type": "choose_txt", "grade": "k"},
        "2": {"question": "There are _ stars.", "choices": None, "answer": "4", "ques_type": "fill_in_blank"},
        "3": {"question": "Which?", "choices": ["choice_0.png"], "answer": 0, "ques_type": "choose_img"},
    }
    root = tmp_path / "iconqa_data"
    root.mkdir()
    (root / "problems.json").write_text(json.dumps(problems))
    (root / "pid_splits.json").write_text(json.dumps({"train": ["1", "3"], "val": [], "test": ["2"], "minival": ["1"]}))
    picture(root / "iconqa" / "train" / "choose_txt" / "1" / "image.png")
    picture(root / "iconqa" / "test" / "fill_in_blank" / "2" / "image.png")
    assert prepared("iconqa", tmp_path) == {
        "train": [
            {
                "image": "iconqa_data/iconqa/train/choose_txt/1/image.png",
                "question": "How many?\nChoices: 3, 5",
                "answers": ["5"],
            }
        ],
        "test": [
            {
                "image": "iconqa_data/iconqa/test/fill_in_blank/2/image.png",
                "question": "There are _ stars.",
                "answers": ["4"],
            }
        ],
    }
    assert "3 is a choice among pictures" in capsys.readouterr().out


def test_textvqa_has_both_splits_pictures_in_one_folder(tmp_path):
    for split in ("train", "val"):
        row = {
            "image_id": f"00{split}", "question": "what does it say?", "question_id": 5, "set_name": split,
            "question_tokens": ["what"], "answers": ["stop"] * 9 + ["halt"],
        }  # fmt: skip
        (tmp_path / f"TextVQA_0.5.1_{split}.json").write_text(json.dumps({"dataset_type": split, "data": [row]}))
        picture(tmp_path / "train_images" / f"00{split}.jpg")
    found = prepared("textvqa", tmp_path)
    assert found["val"] == [
        {"image": "train_images/00val.jpg", "question": "what does it say?", "answers": ["stop"] * 9 + ["halt"]}
    ]


def test_files_that_are_there_are_kept_and_paths_can_be_pasted(tmp_path, capsys):
    row = {"image_id": "a", "question": "what does it say?", "question_id": 5, "answers": ["stop"]}
    folder = tmp_path / "it's here"
    folder.mkdir()
    (folder / "TextVQA_0.5.1_train.json").write_text(json.dumps({"data": [row]}))
    picture(folder / "train_images" / "a.jpg")
    assert main(["prepare", "textvqa", str(folder)]) == 0
    (printed,) = [line for line in capsys.readouterr().out.splitlines() if "next:" in line]
    assert f"data={folder / 'train.jsonl'}" in shlex.split(printed)
    (folder / "train.jsonl").write_text("mine")
    assert main(["prepare", "textvqa", str(folder)]) == 2
    assert "has train.jsonl already, and nothing is overwritten" in capsys.readouterr().err
    assert (folder / "train.jsonl").read_text() == "mine"
    assert main(["prepare", "textvqa", str(folder), "--output", str(tmp_path / "new")]) == 0


def test_clothoaqa_puts_three_peoples_answers_together(tmp_path):
    for split in ("train", "val", "test"):
        rows = [
            {"file_name": f"{split} rain.wav", "QuestionText": question, "answer": answer, "confidence": "yes"}
            for answer in ("yes", "no", "yes")
            for question in ("Is it wet?", "Is it loud?")
        ]
        table(tmp_path / f"clotho_aqa_{split}.csv", rows)
        sound(tmp_path / "audio_files" / f"{split} rain.wav")
    found = prepared("clothoaqa", tmp_path)
    assert found["test"] == [
        {"audio": "audio_files/test rain.wav", "question": question, "answers": ["yes", "no", "yes"]}
        for question in ("Is it loud?", "Is it wet?")
    ]


def test_macs_trains_on_each_caption_and_is_judged_by_all(tmp_path):
    scenes = [f"{scene}-{city}" for scene in ("airport", "park", "tram") for city in ("paris", "oslo")]
    names = [f"{scene}-{place}-{cut}-a.wav" for scene in scenes for place in range(6) for cut in range(2)]
    text = "files:\n"
    for name in names:
        text += f"- filename: {name}\n  annotations:\n"
        text += "".join(f"  - annotator_id: {n}\n    sentence: birds {n}\n    tags: [birds]\n" for n in range(3))
        sound(tmp_path / "TAU-urban-acoustic-scenes-2019-development" / "audio" / name)
    (tmp_path / "MACS.yaml").write_text(text)
    found = prepared("macs", tmp_path)
    assert found.keys() == {"train", "val", "test"}
    assert all(len(row["answers"]) == 1 for row in found["train"])
    assert all(row["answers"] == ["birds 0", "birds 1", "birds 2"] for row in found["val"] + found["test"])
    assert len(found["train"]) / 3 + len(found["val"]) + len(found["test"]) == len(names)
    places = [{row["audio"].rsplit("/", 1)[-1].rsplit("-", 2)[0] for row in some} for some in found.values()]
    assert not places[0] & places[1] and not places[0] & places[2], "a place is in one split"


def test_sdd_splits_by_artist_and_takes_its_valid_captions(tmp_path):
    rows = []
    for artist in range(30):
        for track in range(2):
            name = f"{artist:02d}/{artist}{track}"
            sound(tmp_path / "audio" / f"{name}.wav")
            (tmp_path / "audio" / f"{name}.wav").rename(tmp_path / "audio" / f"{name}.2min.mp3")
            for valid in ("True", "False", "True"):
                caption = f"slow, with strings {len(rows)}"
                rows.append({"caption_id": len(rows), "track_id": name, "caption": caption, "is_valid_subset": valid,
                             "artist_id": artist, "path": f"{name}.mp3"})  # fmt: skip
    table(tmp_path / "song_describer.csv", rows)
    found = prepared("sdd", tmp_path)
    assert sum(len(row["answers"]) for some in found.values() for row in some) == 120
    artists = [{Path(row["audio"]).parent.name for row in some} for some in found.values()]
    assert len(artists) == 3 and sum(map(len, artists)) == 30, "an artist is in one split"


@pytest.mark.parametrize(
    ("name", "files", "message"),
    [
        ("textvqa", {}, "holds nothing of textvqa. Expected are TextVQA_0.5.1_train.json"),
        ("textvqa", {"TextVQA_0.5.1_train.json": "{"}, "TextVQA_0.5.1_train.json is not JSON"),
        ("textvqa", {"TextVQA_0.5.1_train.json": "[]"}, "is not textvqa as published"),
        ("macs", {"MACS.yaml": "files: [1]"}, "MACS.yaml is not as published"),
        ("clothoaqa", {"clotho_aqa_val.csv": "file_name,answer\na,b\n"}, "has no column QuestionText"),
        ("a-okvqa", {"aokvqa_v1p0_val.json": '[{"image_id": 1}]'}, "is not a-okvqa as published (KeyError"),
    ],
)
def test_other_files_are_refused_in_a_sentence(name, files, message, tmp_path, capfd):
    for file, text in files.items():
        (tmp_path / file).write_text(text)
    assert main(["prepare", name, str(tmp_path)]) == 2
    assert message in (error := capfd.readouterr().err) and "Traceback" not in error
    assert not list(tmp_path.glob("*.jsonl"))
