"""Image folders: every way of giving captions, and every way of getting them wrong."""

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.config import TextToImageData
from equipoise.pipelines.text_to_image.data import (
    cache_key,
    open_picture,
    read_examples,
    to_tensor,
    unread_captions,
    variants,
)


@pytest.fixture
def folder(tmp_path):
    for name in ("b.png", "a.jpg"):
        Image.new("RGB", (20, 10), "red").save(tmp_path / name)
    return tmp_path


def read(folder, **settings):
    return read_examples(TextToImageData(folder=str(folder), resolution=16, **settings))


def test_captions_that_a_prompt_for_all_leaves_unread_are_reported(folder):
    data = TextToImageData(folder=str(folder), resolution=16, instance_prompt="x")
    pictures = sorted(folder.glob("*.*g"))
    assert unread_captions(data, pictures) == ""
    (folder / "a.txt").write_text("a red square")
    (folder / "metadata.csv").write_text("file_name,text")
    assert "the 2 caption files of" in unread_captions(data, pictures)
    assert unread_captions(data.model_copy(update={"instance_prompt": None}), pictures) == ""


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


def test_the_cache_is_for_these_files_and_this_cut_alone(folder):
    examples, _ = read(folder, instance_prompt="x")
    data = TextToImageData(folder=str(folder), resolution=16)
    key = cache_key(examples, data, "base")
    assert key == cache_key(examples, data, "base")
    others = [
        cache_key(examples, data.model_copy(update={"resolution": 32}), "base"),
        cache_key(examples, data, "another"),
        cache_key(examples[:1], data, "base"),
    ]
    Image.new("RGB", (30, 10), "blue").save(folder / "a.jpg")
    others.append(cache_key(examples, data, "base"))
    assert len({key, *others}) == 5
