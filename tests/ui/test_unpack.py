"""A zip file of pictures: what is taken out of it, and what never is."""

import io
import os
import stat
import zipfile
from pathlib import Path

import pytest
from PIL import Image

from equipoise.ui import launch, launch_pictures, unpack
from equipoise.ui.unpack import Unpacked


def picture(ink: str = "red") -> bytes:
    file = io.BytesIO()
    Image.new("RGB", (8, 8), ink).save(file, "PNG")
    return file.getvalue()


@pytest.fixture
def uploads(tmp_path: Path, monkeypatch) -> Path:
    folder = tmp_path / "uploaded"
    folder.mkdir()
    monkeypatch.setenv(launch.UPLOADED, str(folder))
    return folder


@pytest.fixture
def opened(uploads: Path):
    """Unpacks a zip file with these entries: names, or records with more about them → bytes."""

    def make(entries: dict[str | zipfile.ZipInfo, bytes], kind: int = zipfile.ZIP_DEFLATED) -> Unpacked:
        path = uploads / "photos.zip"
        with zipfile.ZipFile(path, "w", kind) as archive:
            for name, data in entries.items():
                archive.writestr(name, data)
        return unpack.unpack([str(path)], uploads)

    return make


def taken(found: Unpacked) -> list[str]:
    return [Path(path).name for path in found.pictures]


def test_pictures_and_the_captions_beside_them_are_taken_and_nothing_else(opened, uploads):
    found = opened(
        {
            "cats/a.png": picture(),
            "cats/a.txt": "a  red\ncat".encode("utf-8-sig"),
            "dogs/a.png": picture("blue"),
            "notes.txt": b"no picture's",
            "run.sh": b"rm",
            "__MACOSX/cats/._a.png": b"x",
            ".hidden.png": b"x",
        }
    )
    assert taken(found) == ["a.png", "a.png"] and len(set(found.pictures)) == 2 and not found.left_out
    assert list(found.captions.items()) == [(found.pictures[0], "a red cat")]
    there = [file for file in uploads.rglob("*") if file.is_file() and file.suffix != ".zip"]
    assert sorted(map(str, there)) == sorted(found.pictures)


def test_nothing_is_written_where_a_name_leads_out(opened, uploads, tmp_path):
    link = zipfile.ZipInfo("link.png")
    link.external_attr = (stat.S_IFLNK | 0o777) << 16
    names = ["../out.png", "a/../../out.png", "/etc/out.png", "..\\out.png", "C:\\out.png", "C:/out.png"]
    found = opened({**{name: picture() for name in names}, link: b"/etc/passwd", "good.png": picture()})
    assert taken(found) == ["good.png"] and len(found.left_out) == 7 and "is a link" in "".join(found.left_out)
    assert [file.name for file in tmp_path.rglob("*.png")] == ["good.png"] and not Path("/etc/out.png").exists()
    assert not [file for file in uploads.rglob("*") if file.is_symlink()]
    odd = opened({"a\n<b>;.png": picture()})
    (path,) = map(Path, odd.pictures)
    assert path.name.startswith("a_") and path.is_relative_to(uploads) and "<" not in path.name


def test_bombs_are_not_unpacked(opened, monkeypatch):
    monkeypatch.setattr(unpack, "UPLOAD", 1_000_000)
    monkeypatch.setattr(unpack, "MOST_BYTES", 3_000_000)
    large = opened({"a.png": bytes(1_000_001), "b.png": picture()})
    assert taken(large) == ["b.png"] and "larger than 1 MB" in large.left_out[0]
    many = opened({f"{index}.png": bytes(900_000) for index in range(5)})
    assert len(many.pictures) == 3 and "more than 3 MB in all" in many.left_out[0]
    monkeypatch.setattr(unpack, "PICTURES", 2)
    assert len(opened({f"{index}.png": picture() for index in range(5)}).pictures) == 2
    monkeypatch.setattr(unpack, "MOST_FILES", 3)
    assert "more than 3 files" in opened({f"{index}.md": b"" for index in range(4)}).left_out[0]


def test_a_file_that_lies_about_its_size_is_read_no_farther_than_it_may(opened, uploads, monkeypatch):
    """Its record says 10 bytes of what unpacks to a hundred thousand."""
    monkeypatch.setattr(unpack, "UPLOAD", 1000)
    path = uploads / "lies.zip"
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr("a.png", bytes(100_000))
    data = path.read_bytes()
    path.write_bytes(data.replace((100_000).to_bytes(4, "little"), (10).to_bytes(4, "little")))
    found = unpack.unpack([str(path)], uploads)
    assert not found.pictures and "cannot be read" in found.left_out[0]


def test_what_is_no_zip_file_and_what_is_broken_or_encrypted_is_named(opened, uploads):
    (uploads / "no.zip").write_bytes(b"PK\x03\x04 and no more")
    found = unpack.unpack([str(uploads / "no.zip")], uploads)
    assert found == Unpacked(left_out=["no.zip: is no zip file that can be read."])
    opened({"a.png": picture()}, zipfile.ZIP_STORED)
    path = uploads / "photos.zip"
    data = bytearray(path.read_bytes())
    where = data.index(b"\x89PNG")
    data[where + 20] ^= 255
    path.write_bytes(data)
    assert "cannot be read" in unpack.unpack([str(path)], uploads).left_out[0]
    data[data.index(b"PK\x01\x02") + 8] |= 1
    path.write_bytes(data)
    assert "is encrypted" in unpack.unpack([str(path)], uploads).left_out[0]


def test_pictures_of_a_zip_file_stand_in_the_table_with_their_captions(site, uploads, ask):
    with zipfile.ZipFile(uploads / "photos.zip", "w") as archive:
        for name, data in {"a.png": picture(), "a.txt": b"a cat", "b.png": b"no picture"}.items():
            archive.writestr(name, data)
    (uploads / "c.png").write_bytes(picture())
    (uploads / "c.txt").write_text("loose")
    sent = [uploads / name for name in ("photos.zip", "c.png", "c.txt")]
    files = [{"path": str(path), "meta": {"_type": "gradio.FileData"}} for path in sent]
    said = str(ask("on_upload", files, None))
    assert "b.png: is not a picture" in said and "['a.png', 'a cat']" in said and "['c.png', 'loose']" in said
    left = {file.name for file in uploads.rglob("*") if file.is_file()}
    assert "a.png" in left and "c.png" in left and not left & {"photos.zip", "c.txt", "b.png"}
    rows = [["a.png", "a cat"], ["c.png", "loose"]]
    good = [str(next(uploads.rglob(name))) for name in ("a.png", "c.png")]
    made = launch_pictures.save_pictures(site, "mine", good, rows)
    assert sorted(os.listdir(made)) == ["000.png", "001.png", "metadata.jsonl"]
