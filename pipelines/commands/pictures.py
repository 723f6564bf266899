"""`equipoise prepare pictures SOURCE`: pictures inside of a data set's files as a folder to train on."""

import argparse
import io
import json
import shlex
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.files import explained
from equipoise.pipelines.instruction_tuning.formats import sources, tables
from equipoise.pipelines.instruction_tuning.formats.rows import FileError, Row
from equipoise.pipelines.jobs.making import swapped_in
from equipoise.pipelines.media.pictures import suffixes
from equipoise.pipelines.progress import progress

NAME = "pictures"
IMAGES = ("image", "img", "picture", "images", "jpg", "png")  # what the column is mostly called
CAPTIONS = ("text", "caption", "captions", "prompt", "description", "txt")
LISTED = 5  # of what is left out
LOOKED = 1000  # rows, after which a column that none has is missing
Columns = dict[tuple[Path | str, str], str]  # (file, option) → the column


def add_arguments(parser: argparse.ArgumentParser) -> None:
    options = parser.add_argument_group(f"for {NAME}")
    options.add_argument("--image", metavar="COLUMN", help="The column of pictures (default: found by its name).")
    options.add_argument(
        "--caption", metavar="COLUMN", help="The column of captions (default: found by its name); '' for none."
    )


def show(args: argparse.Namespace) -> int:
    """Parquet, Arrow, a folder that `datasets` saved, WebDataset tars, or hub:OWNER/NAME, with pictures inside.

    Raises:
        InputError: it cannot be read, has no such column, or none of its pictures can be used.
    """
    source, output = str(args.folder), args.output
    if output is None:
        raise InputError("prepare: pictures need a folder to be written to. Give --output FOLDER.")
    if output.exists() and (not output.is_dir() or any(output.iterdir())):
        raise InputError(f"--output: {output} exists and is not an empty folder; give a new one.")
    left: list[str] = []
    with swapped_in(output.absolute()) as staging:
        lines, count = _write(args, source, staging, left)
        if args.caption != "":
            with explained(staging):
                (staging / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    with_captions = ", with their captions in metadata.jsonl" if args.caption != "" else ""
    print(f"{len(lines):,} pictures in {output}{with_captions}")
    if left:
        more = f" and {len(left) - LISTED:,} more" if len(left) > LISTED else ""
        print(f"  left out {len(left):,} of {count:,}: {'; '.join(left[:LISTED])}{more}")
    prompt = "data.instance_prompt=" + ("null" if args.caption != "" else "'…'")
    print(f"  next: equipoise train text_to_image/dreambooth {shlex.quote(f'data={output}')} {prompt}")
    return 0


def _write(args: argparse.Namespace, source: str, folder: Path, left: list[str]) -> tuple[list[str], int]:
    """Writes the pictures; (the lines of metadata.jsonl, how many rows there are). `left` gets what is left out."""
    lines: list[str] = []
    columns: Columns = {}
    missing: _NoColumn | None = None
    count = 0
    with progress("pictures", "picture") as bar:
        for count, row in enumerate(_rows(source), 1):
            bar.update()
            try:
                data, suffix, caption = _read(row, args, columns)
            except FileError:
                raise
            except InputError as error:
                missing = missing or (error if isinstance(error, _NoColumn) else None)
                if missing and not lines and count >= LOOKED:
                    break
                left.append(f"{row.where}: {str(error).rstrip('.')}")
                continue
            name = f"{count:07d}{suffix}"
            with explained(folder / name):
                (folder / name).write_bytes(data)
            lines.append(json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n")
    if missing and not lines:
        raise InputError(missing.advice)
    if not lines:
        why = f" {left[0]}." if left else ""
        raise InputError(f"prepare: {source} holds no picture that can be used.{why}")
    return lines, count


def _rows(source: str) -> Iterator[Row]:
    try:
        if sources.is_hub(source):
            yield from tables.hub(source)
            return
        for file in sources.files(source):
            yield from sources.rows(file)
    except InputError as error:
        reason = str(error).replace("the file of conversations in it", "a file")
        raise InputError(f"prepare: {source} {reason}") from None
    except (OSError, UnicodeDecodeError) as error:
        raise InputError(f"prepare: {source} cannot be read ({error}).") from None


def _read(row: Row, args: argparse.Namespace, columns: Columns) -> tuple[bytes, str, str]:
    """(a row's picture, what its name is to end in, its caption).

    Raises:
        FileError: the file cannot be read on.
        InputError: why this row cannot be used.
    """
    if isinstance(row.record, FileError):
        raise FileError(f"prepare: {row.where} {row.record}")
    if isinstance(row.record, InputError):
        raise row.record
    if not isinstance(row.record, dict):
        raise InputError("is no record.")
    shown = row.record[_column(row, args.image, IMAGES, "--image", columns)]
    caption = ""
    if args.caption != "":
        caption = row.record[_column(row, args.caption, CAPTIONS, "--caption", columns)]
    if isinstance(shown, list):
        if len(shown) != 1:
            raise InputError(f"has {len(shown)} pictures.")
        shown = shown[0]
    if isinstance(caption, list):  # several people's words: the first, as in other tools
        caption = caption[0] if caption else ""
    if not isinstance(caption, str):
        raise InputError(f"its caption is {type(caption).__name__}, not text.")
    data = _bytes(shown, row)
    return data, _suffix(data), caption


class _NoColumn(InputError):
    """No row of a file so far has a column of a usual or the given name."""

    def __init__(self, row: Row, wanted: Sequence[str], option: str):
        super().__init__(f"has no column {' or '.join(wanted)}.")
        there = ", ".join(f"{name} ({kind})" for name, kind in _kinds(row.record).items())
        self.advice = f"{option}: {row.where} {self} There are {there}. Give one of them."


def _column(row: Row, given: str | None, usual: Sequence[str], option: str, columns: Columns) -> str:
    """The column that the first row of the file with one has.

    Raises:
        InputError: this row does not have it.
    """
    wanted = [given] if given else usual
    key = (row.file, option)
    if key not in columns:
        if (found := next((name for name in wanted if name in row.record), None)) is None:
            raise _NoColumn(row, wanted, option)
        columns[key] = found
    if columns[key] not in row.record:
        raise InputError(f"has no {columns[key]}.")
    return columns[key]


def _kinds(record: dict[str, Any]) -> dict[str, str]:
    named = {dict: "record", str: "text", list: "list", bytes: "bytes"}
    return {name: named.get(type(value), type(value).__name__) for name, value in record.items()}


def _bytes(shown: Any, row: Row) -> bytes:
    """
    Raises:
        InputError: there is no picture.
    """
    if isinstance(shown, dict) and isinstance(shown.get("bytes"), bytes):
        return shown["bytes"]
    if isinstance(shown, bytes):
        return shown
    path = shown.get("path") if isinstance(shown, dict) else shown
    if isinstance(path, str) and "://" in path:
        raise InputError(f"names its picture by URL, and nothing is downloaded ({path[:60]}).")
    if isinstance(path, str) and path and isinstance(row.file, Path):
        try:
            return (row.file.parent / path).read_bytes()
        except OSError as error:
            raise InputError(f"its picture {path[:60]} cannot be read ({error.strerror or error}).") from None
    raise InputError("has no picture.")


def _suffix(data: bytes) -> str:
    """What a picture's name is to end in; it is decoded, so that a damaged one is found now.

    Raises:
        InputError: it cannot be decoded, or is of a format that training does not read.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            kind = str(opened.format)
    except Exception as error:  # whatever a damaged one makes of its decoder
        raise InputError(f"its picture cannot be decoded ({' '.join(str(error).split())[:80]}).") from None
    usual = {"JPEG": ".jpg", "MPO": ".jpg"}.get(kind, f".{kind.lower()}")
    others = [suffix for suffix, other in Image.registered_extensions().items() if other == kind]
    if (found := next((suffix for suffix in [usual, *others] if suffix in suffixes()), None)) is None:
        raise InputError(f"its picture is {kind}, which is not trained on.")
    return found
