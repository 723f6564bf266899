"""`equipoise prepare pictures`: data sets with pictures inside become folders that text to image trains on."""

import errno
import io
import json
import tarfile
from pathlib import Path

import pyarrow
import pytest
from PIL import Image, ImageColor, features
from pyarrow import parquet

from equipoise.pipelines.cli import main
from equipoise.pipelines.config import load
from equipoise.pipelines.text_to_image.data import read_folder

COLOURS = ("red", "green", "blue")


def encoded(colour: str, kind: str = "PNG") -> bytes:
    Image.new("RGB", (16, 12), colour).save(made := io.BytesIO(), kind)
    return made.getvalue()


@pytest.fixture(autouse=True)
def here(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)


def write_parquet(path, caption="text", image="image", bad=False):
    images = [{"bytes": encoded(colour, "JPEG"), "path": f"{colour}.jpg"} for colour in COLOURS]
    if bad:
        images[1]["bytes"] = images[1]["bytes"][:40]
    parquet.write_table(pyarrow.table({image: images, caption: [f"a {colour} \u2028wall" for colour in COLOURS]}), path)


def check(folder="out", colours=COLOURS):
    data = load("text_to_image/dreambooth", [f"data={folder}", "data.instance_prompt=null"]).data
    found = read_folder(data)
    assert not found.problems
    assert [example.caption for example in found.examples] == [f"a {colour} \u2028wall" for colour in colours]
    for example, colour in zip(found.examples, colours, strict=True):
        with Image.open(example.path) as picture:
            apart = zip(picture.convert("RGB").getpixel((3, 3)), ImageColor.getrgb(colour), strict=True)
            assert max(abs(a - b) for a, b in apart) < 6


def test_parquet(capsys):
    write_parquet("train.parquet")
    assert main(["prepare", "pictures", "train.parquet", "--output", "out"]) == 0
    assert capsys.readouterr().out.startswith(
        "3 pictures in out, with their captions in metadata.jsonl\n  next: equipoise"
    )
    check()


def test_a_folder_that_datasets_saved(capsys):
    datasets = pytest.importorskip("datasets")
    made = datasets.Dataset.from_dict(
        {
            "image": [Image.new("RGB", (16, 12), c) for c in COLOURS],
            "text": [[f"a {c} \u2028wall", "else"] for c in COLOURS],
        }
    ).cast_column("image", datasets.Image())
    made.save_to_disk("saved")
    assert main(["prepare", "pictures", "saved", "--output", "out"]) == 0
    check()


def test_a_webdataset_tar():
    with tarfile.open("shard.tar", "w") as file:
        for index, colour in enumerate(COLOURS):
            for ending, data in (("png", encoded(colour)), ("txt", f"a {colour} \u2028wall".encode())):
                member = tarfile.TarInfo(f"../{index:04d}.{ending}")
                member.size = len(data)
                file.addfile(member, io.BytesIO(data))
    assert main(["prepare", "pictures", "shard.tar", "--output", "out"]) == 0
    check()


def test_columns_are_named_where_they_have_other_names(capsys):
    write_parquet("train.parquet", caption="words", image="scan")
    assert main(["prepare", "pictures", "train.parquet", "--output", "out"]) == 2
    said = capsys.readouterr().err
    assert "--image: train.parquet:row 1 has no column image or img" in said
    assert "There are scan (record), words (text)." in said
    words = ["prepare", "pictures", "train.parquet", "--output", "out", "--image", "scan"]
    assert main(words) == 2 and "--caption: train.parquet:row 1 has no column text or" in capsys.readouterr().err
    assert main([*words, "--caption", "words"]) == 0
    check()
    assert main([*words[:-3], "bare", "--image", "scan", "--caption", ""]) == 0
    assert sorted(path.suffix for path in Path("bare").iterdir()) == [".jpg"] * 3, "no captions"
    said = capsys.readouterr().out
    assert "3 pictures in bare\n" in said and said.endswith("data=bare data.instance_prompt='…'\n")


def test_a_damaged_picture_is_left_out_and_named(capsys):
    write_parquet("train.parquet", bad=True)
    assert main(["prepare", "pictures", "train.parquet", "--output", "out"]) == 0
    assert "left out 1 of 3: train.parquet:row 2: its picture cannot be decoded (" in capsys.readouterr().out
    check(colours=("red", "blue"))


def test_a_row_without_a_caption_or_picture_is_left_out_and_named(capsys):
    for colour in COLOURS:
        Path(f"{colour}.png").write_bytes(encoded(colour))
    records = [{"image": f"{colour}.png", "text": f"a {colour} \u2028wall"} for colour in COLOURS]
    records[1:1] = [{"image": "red.png"}, {"text": "a wall"}, {"image": "red.png", "caption": "a wall"}]
    Path("rows.jsonl").write_text("\n".join(map(json.dumps, [{"id": 1}, *records])))
    assert main(["prepare", "pictures", "rows.jsonl", "--output", "out"]) == 0
    said = capsys.readouterr().out
    assert "left out 4 of 7: rows.jsonl:1: has no column image or" in said
    assert "rows.jsonl:3: has no text; rows.jsonl:4: has no image; rows.jsonl:5: has no text\n" in said
    check()


def test_every_format_gets_a_suffix_that_training_reads(capsys):
    kinds = [kind for kind, there in (("TGA", True), ("JPEG2000", features.check("jpg_2000"))) if there]
    images = [{"bytes": encoded("red", kind), "path": None} for kind in [*kinds, "PDF"]]
    parquet.write_table(pyarrow.table({"image": images, "text": ["a red \u2028wall"] * len(images)}), "train.parquet")
    assert main(["prepare", "pictures", "train.parquet", "--output", "out"]) == 0
    check(colours=["red"] * len(kinds))


def test_a_full_disk_is_no_row_that_is_left_out(monkeypatch, capsys):
    write_parquet("train.parquet")
    written = []

    def write_bytes(path, data):
        written.append(path)
        if len(written) == 2:
            raise OSError(errno.ENOSPC, "No space left on device")
        path.write_text("")

    monkeypatch.setattr(Path, "write_bytes", write_bytes)
    assert main(["prepare", "pictures", "train.parquet", "--output", "out"]) != 0
    assert "left out" not in "".join(capsys.readouterr()) and not Path("out").exists()


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["train.parquet"], "Give --output FOLDER"),
        (["train.parquet", "--output", "full"], "exists and is not an empty folder"),
        (["gone.parquet", "--output", "out"], "prepare: gone.parquet does not exist."),
        (["empty", "--output", "out"], "prepare: empty is a folder; give a file."),
        (["cut.parquet", "--output", "out"], "cannot be read from here on"),
        (["urls.jsonl", "--output", "out"], "names its picture by URL, and nothing is downloaded"),
    ],
)
def test_what_cannot_be_read_is_one_sentence(words, message, tmp_path, capsys):
    write_parquet("train.parquet")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine.txt").write_text("mine")
    (tmp_path / "empty").mkdir()
    (tmp_path / "cut.parquet").write_bytes((tmp_path / "train.parquet").read_bytes()[:200])
    (tmp_path / "urls.jsonl").write_text('{"image": "https://example.org/a.png", "text": "a"}\n')
    assert main(["prepare", "pictures", *words]) == 2
    said = capsys.readouterr().err
    assert message in said and "Traceback" not in said
    assert not (tmp_path / "out").exists() and (tmp_path / "full" / "mine.txt").read_text() == "mine"
    assert not list(tmp_path.glob(".out*"))


def test_training_on_such_a_folder_says_how_to_take_them_out(tmp_path):
    (tmp_path / "data").mkdir()
    write_parquet(tmp_path / "data" / "train.parquet")
    problems = read_folder(load("text_to_image/dreambooth", ["data=data"]).data).problems
    assert any(
        "`equipoise prepare pictures data --output FOLDER` takes them out of its .parquet" in p for p in problems
    )
