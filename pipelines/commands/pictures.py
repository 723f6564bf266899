"""`equipoise prepare pictures SOURCE`: pictures inside of a data set's files as a folder to train on."""

import argparse
import io
import json
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.files import explained
from equipoise.pipelines.instruction_tuning.formats import sources, tables
from equipoise.pipelines.instruction_tuning.formats.rows import FileError, Row
from equipoise.pipelines.jobs.making import swapped_in
from equipoise.pipelines.progress import progress

NAME = "pictures"
IMAGES = ("image", "img", "picture", "images", "jpg", "png")  # what the column is mostly called
CAPTIONS = ("text", "caption", "captions", "prompt", "description", "txt")
LISTED = 5  # of what is left out


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
        lines, count = [], 0
        with progress("pictures", "picture") as bar:
            for count, row in enumerate(_rows(source), 1):
                try:
                    lines.append(_written(row, args, staging, count))
                except FileError:
                    raise
                except InputError as error:
                    left.append(f"{row.where}: {error}")
                bar.update()
        if not lines:
            why = f" {left[0]}" if left else ""
            raise InputError(f"prepare: {source} holds no picture that can be used.{why}")
        with explained(staging):
            (staging / "metadata.jsonl").write_text("".join(lines), encoding="utf-8")
    print(f"{len(lines):,} pictures in {output}, with their captions in metadata.jsonl")
    if left:
        more = f" and {len(left) - LISTED:,} more" if len(left) > LISTED else ""
        print(f"  left out {len(left):,} of {count:,}: {'; '.join(left[:LISTED])}{more}")
    print(f"  next: equipoise train text_to_image/dreambooth data={output} data.instance_prompt=null")
    return 0


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


def _written(row: Row, args: argparse.Namespace, folder: Path, number: int) -> str:
    """Writes a row's picture; its line in metadata.jsonl.

    Raises:
        FileError: the file cannot be read on, or has no such column.
        InputError: why this row cannot be used.
    """
    if isinstance(row.record, FileError):
        raise FileError(f"prepare: {row.where} {row.record}")
    if isinstance(row.record, InputError):
        raise row.record
    if not isinstance(row.record, dict):
        raise InputError("is no record.")
    shown = row.record.get(_column(row, args.image, IMAGES, "--image"))
    caption = ""
    if args.caption != "":
        caption = row.record.get(_column(row, args.caption, CAPTIONS, "--caption"))
    if isinstance(shown, list):
        if len(shown) != 1:
            raise InputError(f"has {len(shown)} pictures.")
        shown = shown[0]
    if isinstance(caption, list):  # several people's words: the first, as in other tools
        caption = caption[0] if caption else ""
    if not isinstance(caption, str):
        raise InputError(f"its caption is {type(caption).__name__}, not text.")
    data = _bytes(shown, row)
    name = f"{number:07d}{_suffix(data)}"
    with explained(folder / name):
        (folder / name).write_bytes(data)
    return json.dumps({"file_name": name, "text": caption}, ensure_ascii=False) + "\n"


def _column(row: Row, given: str | None, usual: Sequence[str], option: str) -> str:
    """
    Raises:
        FileError: there is none.
    """
    wanted = [given] if given else usual
    if (found := next((name for name in wanted if name in row.record), None)) is not None:
        return found
    there = ", ".join(f"{name} ({kind})" for name, kind in _kinds(row.record).items())
    raise FileError(f"{option}: {row.where} has no column {' or '.join(wanted)}. There are {there}. Give one of them.")


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
        InputError: it cannot be decoded.
    """
    from PIL import Image

    try:
        with Image.open(io.BytesIO(data)) as opened:
            opened.load()
            kind = str(opened.format)
    except Exception as error:  # whatever a damaged one makes of its decoder
        raise InputError(f"its picture cannot be decoded ({' '.join(str(error).split())[:80]}).") from None
    return {"JPEG": ".jpg", "MPO": ".jpg"}.get(kind) or f".{kind.lower()}"
