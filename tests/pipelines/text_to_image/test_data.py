"""Image folders: every way of giving captions, and every way of getting them wrong."""

import os
import unicodedata

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.config import TextToImageData
from equipoise.pipelines.text_to_image.cuts import to_tensor, variants
from equipoise.pipelines.text_to_image.data import open_picture, read_examples, read_folder
from equipoise.pipelines.text_to_image.latents import cache_key


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)
    return tmp_path


def read(folder, **settings):
    return read_examples(TextToImageData(folder=str(folder), resolution=16, **settings))


def found(folder, **settings):
    return read_folder(TextToImageData(folder=str(folder), resolution=16, **settings))


def picture(path, colour="red"):
    path.parent.mkdir(parents=True, exist_ok=True)
    Image.new("RGB", (20, 10), colour).save(path)


def test_captions_that_a_prompt_for_all_leaves_unread_are_reported(folder):
    assert found(folder, instance_prompt="x").doubts == []
    (folder / "a.txt").write_text("a red square")
    (folder / "metadata.csv").write_text("file_name,text")
    assert "the 2 caption files of" in found(folder, instance_prompt="x").doubts[0]
    assert found(folder).doubts == []


@pytest.mark.parametrize(
    ("name", "text"), [("b.caption", "bee"), ("inner/metadata.jsonl", '{"file_name": "c.png", "text": "sea"}')]
)
def test_captions_of_other_tools_that_stay_unread_are_reported(folder, name, text):
    picture(folder / "inner" / "c.png")
    (folder / name).write_text(text)
    (doubt,) = found(folder, instance_prompt="x").doubts
    assert name in doubt and "data.instance_prompt=null reads them" in doubt


def test_the_words_of_folders_that_stay_unread_are_reported(folder):
    picture(folder / "10_sks vase" / "c.png")
    (doubt,) = found(folder, instance_prompt="x").doubts
    assert "the words of its folders (sks vase)" in doubt


def test_one_prompt_serves_all_pictures(folder):
    examples, problems = read(folder, instance_prompt="a photo of sks vase")
    assert not problems
    assert [(e.path.name, e.caption) for e in examples] == [
        ("a.jpg", "a photo of sks vase"),
        ("b.png", "a photo of sks vase"),
    ]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "b.png", "text": "bee"}\n\n{"file_name": "a.jpg", "text": "ay"}\n'),
        ("metadata.csv", 'file_name,text\nb.png,bee\na.jpg,"ay"\n'),
    ],
)
def test_captions_are_read_from_metadata(folder, name, text):
    (folder / name).write_text(text)
    examples, problems = read(folder)
    assert not problems
    assert [(e.path.name, e.caption) for e in examples] == [("b.png", "bee"), ("a.jpg", "ay")]


def test_captions_are_read_from_text_files(folder):
    (folder / "a.txt").write_text("ay\n")
    (folder / "b.txt").write_text("bee")
    examples, problems = read(folder)
    assert not problems and [e.caption for e in examples] == ["ay", "bee"]


@pytest.mark.parametrize(
    ("name", "text"),
    [
        ("metadata.jsonl", '{"file_name": "a.jpg", "text": "ay"}\n{"file_name": "b.png", "text": "bee"}'),
        ("metadata.csv", "file_name,text\na.jpg,ay\nb.png,bee\n"),
        ("a.txt", "ay"),
    ],
)
def test_the_mark_that_excel_puts_first_is_not_read(folder, name, text):
    (folder / "b.txt").write_text("bee")
    (folder / name).write_text(text, encoding="utf-8-sig")
    examples, problems = read(folder)
    assert not problems and [e.caption for e in examples] == ["ay", "bee"]


def test_pictures_in_subfolders_are_found(folder):
    (folder / "inner").mkdir()
    Image.new("RGB", (9, 9)).save(folder / "inner" / "c.webp")
    examples, _ = read(folder, instance_prompt="x")
    assert len(examples) == 3


@pytest.mark.parametrize(
    ("files", "message"),
    [
        ({}, "has no captions for a.jpg, b.png. Set data.instance_prompt"),
        ({"a.txt": "ay"}, "has no captions for b.png"),
        ({"metadata.jsonl": '{"file_name": "c.png", "text": "x"}'}, "a caption for c.png, which is not in"),
        ({"metadata.jsonl": '{"file": "a.jpg"}'}, "needs file_name and text, got file"),
        ({"metadata.jsonl": "[1, 2]"}, "needs file_name and text, got nothing"),
        ({"metadata.csv": "file_name,text\na.jpg,x\n"}, "metadata.csv: has no captions for b.png. Add"),
        ({"metadata.jsonl": "{"}, "cannot be read (line 1:"),
        ({"metadata.jsonl": ""}, "holds no captions"),
        ({"metadata.csv": "picture,words\na.jpg,x\n"}, "needs file_name and text, got picture, words"),
        ({"metadata.jsonl": b"\xff\xfe\x00"}, "cannot be read"),
    ],
)
def test_what_is_wrong_with_captions_is_said(folder, files, message):
    for name, content in files.items():
        (folder / name).write_bytes(content if isinstance(content, bytes) else content.encode())
    _, problems = read(folder)
    assert any(message in problem for problem in problems), problems


def test_every_line_that_cannot_be_read_is_named(folder):
    lines = ['{"file_name": "a.jpg", "text": "one\u2028line"}', "{", '{"file_name": "b.png", "text": "bee"}', "nothing"]
    (folder / "metadata.jsonl").write_text("\n".join(lines), encoding="utf-8")
    _, problems = read(folder)
    assert [problem.split("cannot be read ")[1].split(":")[0] for problem in problems] == ["(line 2", "(line 4"]


def test_missing_and_empty_folders(tmp_path):
    assert "does not exist" in read(tmp_path / "nowhere")[1][0]
    assert "holds no pictures" in read(tmp_path)[1][0]
    (tmp_path / "file").write_text("x")
    assert "is a file" in read(tmp_path / "file")[1][0]


def test_an_unreadable_picture(tmp_path):
    whole = tmp_path / "whole.jpg"
    Image.fromarray(np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)).save(whole)
    for name, data in {"text.png": b"not a picture", "cut.jpg": whole.read_bytes()[:700], "empty.png": b""}.items():
        (tmp_path / name).write_bytes(data)
        with pytest.raises(InputError, match=rf"{name}: cannot be read as a picture"):
            open_picture(tmp_path / name)


def test_transparency_is_laid_over_white_and_exif_is_obeyed(tmp_path):
    Image.new("RGBA", (4, 4), (255, 0, 0, 0)).save(tmp_path / "clear.png")
    assert open_picture(tmp_path / "clear.png").getpixel((0, 0)) == (255, 255, 255)
    exif = Image.Exif()
    exif[0x0112] = 6  # turned by a quarter
    Image.new("RGB", (8, 4)).save(tmp_path / "turned.jpg", exif=exif)
    assert open_picture(tmp_path / "turned.jpg").size == (4, 8)


def test_cuts_are_square_scaled_and_mirrored():
    wide = Image.new("RGB", (40, 20), "black")
    wide.paste("white", (0, 0, 20, 20))
    data = TextToImageData(folder="x", resolution=16, flip=True)
    (left, where), (mirrored, same) = variants(wide, data, torch.Generator())
    assert where == same == (0, 8), "the middle of 32 x 16"
    assert left.size == mirrored.size == (16, 16)
    assert left.getpixel((0, 8)) == (255, 255, 255) and mirrored.getpixel((15, 8)) == (255, 255, 255)
    random = variants(wide, TextToImageData(folder="x", resolution=16, crop="random"), torch.Generator().manual_seed(0))
    assert len({picture.tobytes() for picture, _ in random}) > 1
    assert all(top == 0 and 0 <= left <= 16 for _, (top, left) in random)
    both = variants(wide, TextToImageData(folder="x", resolution=16, crop="random", flip=True), torch.Generator())
    for (_, (_, left)), (_, (_, other)) in zip(both[: len(both) // 2], both[len(both) // 2 :], strict=True):
        assert left + other == 16, "where the cut is in the mirrored picture"
    for picture, (_, left) in random:  # white up to 16 of 32
        assert (picture.getpixel((0, 8)) == (255, 255, 255)) is (left < 15)


def test_tensors_span_minus_one_to_one():
    tensor = to_tensor(Image.new("RGB", (2, 2), (0, 255, 255)))
    assert tensor.shape == (3, 2, 2)
    assert tensor[0].eq(-1).all() and tensor[1].eq(1).all()


def test_latents_are_for_this_content_and_this_cut_alone(folder):
    data, path = TextToImageData(folder=str(folder), resolution=16), folder / "a.jpg"
    key = cache_key(path, data, "base")
    renamed = path.rename(folder / "c.jpg")
    assert cache_key(renamed, data, "base") == key
    others = [
        cache_key(renamed, data.model_copy(update={"resolution": 32}), "base"),
        cache_key(renamed, data, "another"),
    ]
    Image.new("RGB", (30, 10), "blue").save(renamed)
    others.append(cache_key(renamed, data, "base"))
    assert len({key, *others}) == 4


def test_a_caption_ends_at_no_comma_unnoticed(folder):
    (folder / "metadata.csv").write_text("file_name,text\na.jpg,sks dog, on grass\nb.png,bee\n")
    _, problems = read(folder)
    assert problems == [
        f"{folder / 'metadata.csv'}:2: has more cells than columns. Put double quotes around a caption with commas."
    ]


@pytest.mark.parametrize("character", ["\u2028", "\u2029", "\x85"])
def test_a_line_of_json_ends_at_newlines_alone(folder, character):
    lines = [f'{{"file_name": "{name}", "text": "one{character}two"}}' for name in ("a.jpg", "b.png")]
    (folder / "metadata.jsonl").write_text("\r\n".join(lines), encoding="utf-8", newline="")
    examples, problems = read(folder)
    assert not problems and {example.caption for example in examples} == {f"one{character}two"}


def test_a_table_may_name_files_composed_or_with_backslashes(tmp_path):
    picture(tmp_path / "in" / unicodedata.normalize("NFD", "café.png"))
    name = unicodedata.normalize("NFC", "in\\\\café.png")
    (tmp_path / "metadata.jsonl").write_text(f'{{"file_name": "{name}", "text": "x"}}')
    examples, problems = read(tmp_path)
    assert not problems and [example.caption for example in examples] == ["x"]


def test_the_nearest_table_is_a_pictures_own(folder):
    """As datasets' image folders have it: train/metadata.jsonl names the files beside it."""
    picture(folder / "train" / "c.png")
    (folder / "train" / "metadata.jsonl").write_text('{"file_name": "c.png", "text": "sea"}')
    (folder / "metadata.csv").write_text("file_name,text\na.jpg,ay\nb.png,bee\n")
    examples, problems = read(folder)
    assert not problems
    assert {example.path.name: example.caption for example in examples} == {
        "a.jpg": "ay",
        "b.png": "bee",
        "c.png": "sea",
    }


def test_a_table_in_parquet(folder):
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    table = pyarrow.table({"file_name": ["a.jpg", "b.png"], "text": ["ay", "bee"], "size": [1, 2]})
    parquet.write_table(table, folder / "metadata.parquet")
    examples, problems = read(folder)
    assert not problems and [example.caption for example in examples] == ["ay", "bee"]
    (folder / "metadata.parquet").write_bytes(b"PAR1 and no more")
    assert "metadata.parquet: cannot be read" in read(folder)[1][0]


def test_caption_files_of_kohyas_scripts(folder):
    (folder / "a.caption").write_text("ay")
    (folder / "b.txt").write_text("bee")
    (folder / "b.caption").write_text("other")
    made = found(folder)
    assert [example.caption for example in made.examples] == ["ay", "bee"]
    assert made.doubts == ["data.folder: b.txt has a .caption file beside it, which is not read."]


def test_folders_as_kohyas_scripts_have_them(tmp_path):
    for name in ("5_sks vase/a.png", "5_sks vase/deep/er/b.png", "0_old/c.png"):
        picture(tmp_path / name)
    made = found(tmp_path)
    assert [(e.path.name, e.caption, e.repeats) for e in made.examples] == [
        ("a.png", "sks vase", 5),
        ("b.png", "sks vase", 5),
    ]
    assert made.doubts == ["data.folder: 1 picture of 0_old is left out: the folder's name asks for 0 repeats."]
    assert found(tmp_path, repeats={"0_old": 2}).examples[0].repeats == 2, "unless it is asked for"


@pytest.mark.parametrize(
    "name",
    [
        "._a.png",
        ".ipynb_checkpoints/a-checkpoint.png",
        ".thumbnails/a.png",
        "__MACOSX/a.png",
        "in/.cache/a.png",
        "@eaDir/a.png",
    ],
)
def test_what_systems_hide_is_no_picture(folder, name):
    (folder / name).parent.mkdir(parents=True, exist_ok=True)
    (folder / name).write_bytes(b"not even a picture")
    assert len(read(folder, instance_prompt="x")[0]) == 2


def test_a_runs_own_samples_are_no_pictures(folder):
    picture(folder / "runs" / "one" / "samples" / "step-1" / "00-0.png")
    for name in ("config.yaml", "status.json", "environment.json"):
        (folder / "runs" / "one" / name).write_text("")
    made = found(folder, instance_prompt="x")
    assert len(made.examples) == 2 and "is the folder of a run" in made.doubts[0]


def test_links_are_followed_once_and_reported_where_they_lead_nowhere(folder, tmp_path_factory):
    elsewhere = tmp_path_factory.mktemp("elsewhere")
    picture(elsewhere / "c.png")
    (folder / "more").symlink_to(elsewhere)
    (folder / "around").symlink_to(folder)
    (folder / "d.png").symlink_to("/nowhere/d.png")
    made = found(folder, instance_prompt="x")
    assert [example.path.name for example in made.examples] == ["a.jpg", "b.png", "c.png"]
    assert any("around is a link to a folder that is read already" in doubt for doubt in made.doubts)
    assert any("d.png is a link that leads nowhere" in doubt for doubt in made.doubts)


def test_what_may_not_be_meant_is_reported(folder):
    picture(folder / "a.png")
    (folder / "a.txt").write_text("ay")
    (folder / "b.txt").write_text(" ")
    empty, shared = found(folder).doubts
    assert empty == "data.folder: the caption of b.png is empty, and trained on as it is."
    assert shared.startswith("data.folder: several pictures are called a, but for their endings")


def test_a_picture_that_a_table_names_twice_is_reported(folder):
    lines = ["a.jpg,one", "a.jpg,two", "b.png,bee"]
    (folder / "metadata.csv").write_text("\n".join(["file_name,text", *lines]))
    made = found(folder)
    assert len(made.examples) == 3
    assert made.doubts == [
        f"{folder / 'metadata.csv'}: names a.jpg more than once; each line counts as a picture of its own."
    ]


def test_a_test_split_among_the_pictures_is_reported(tmp_path):
    for name in ("train/a.png", "test/b.png"):
        picture(tmp_path / name)
    (doubt,) = found(tmp_path, instance_prompt="x").doubts
    assert "has the folders test and train, and the pictures of all are trained on" in doubt


def test_the_summary_counts_pictures_captions_and_what_is_left_out(folder):
    picture(folder / "3_a vase" / "c.png")
    (folder / "a.txt").write_text("ay")
    (folder / "b.txt").write_text("bee")
    for name in ("clip.mp4", "raw.dng", "other.dng"):
        (folder / name).write_bytes(b"")
    assert found(folder).summary == (
        f"{folder}: 3 pictures, 5 in an epoch; captions: 1 from the folders' names, 2 from .txt files; "
        "no pictures: 2 .dng, 1 .mp4."
    )


def test_a_table_may_name_what_is_left_out(tmp_path):
    for name in ("a.png", "0_old/b.png", "0_older/c.png"):
        picture(tmp_path / name)
    (tmp_path / "metadata.csv").write_text("file_name,text\na.png,ay\n0_old/b.png,bee\n")
    (tmp_path / "0_older" / "metadata.csv").write_text("file_name,text\nc.png,sea\n")
    made = found(tmp_path)
    assert made.problems == [] and [example.caption for example in made.examples] == ["ay"]


def test_the_name_of_a_folder_that_is_a_date_gives_no_repeats(tmp_path):
    picture(tmp_path / "20240101_party" / "a.png")
    (example,) = found(tmp_path, instance_prompt="x").examples
    assert example.repeats == 1


def test_names_that_are_no_text_are_refused_before_a_run(tmp_path):
    picture(tmp_path / os.fsdecode(b"Blumenstrau\xdf.png"))
    (problem,) = found(tmp_path, instance_prompt="x").problems
    assert "1 names in" in problem and "are not UTF-8" in problem and "Rename them." in problem
    problem.encode()
