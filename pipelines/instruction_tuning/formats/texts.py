"""Text files of conversations: a list in JSON, an object a line in JSONL, and CSV."""

import csv
import json
import re
from collections.abc import Iterator
from pathlib import Path
from typing import Any, TextIO

from equipoise.errors import InputError
from equipoise.pipelines.files import first_line, json_lines
from equipoise.pipelines.instruction_tuning.formats.rows import FileError, Row

ENCODING = "utf-8-sig"  # with or without the mark that Excel and Notepad put first
COLUMNS = ("id", "image", "audio", "video", "question", "answer")  # of a CSV file; ids are for people
_SPACE = re.compile(r"\s*")
_DECODER = json.JSONDecoder()
_READ, _LONGEST = 1 << 20, 20  # characters that are read at a time, and of a literal, whose end may not be there yet


def jsonl(file: Path) -> Iterator[Row]:
    for number, value in json_lines(file):
        wrong = isinstance(value, ValueError | RecursionError)
        yield Row(file, str(number), InputError(f"is not JSON ({value}).") if wrong else value)


def json_list(file: Path) -> Iterator[Row]:
    """The items of a list, each with the line that it begins in; item by item, for a file may be larger than
    the memory."""
    with file.open(encoding=ENCODING) as opened:
        text = _Window(opened)
        if text.next() != "[":
            sentence = "must be a list of conversations, in square brackets; one object a line is .jsonl."
            yield Row(file, "1", FileError(sentence))
            return
        text.at += 1
        while text.next() != "]":
            line = str(text.line)
            try:
                record = text.value()
            except (ValueError, RecursionError) as error:
                if isinstance(error, UnicodeDecodeError):
                    raise
                reason = getattr(error, "msg", error)  # without the position, which is the window's
                yield Row(file, line, FileError(f"is not JSON from here on ({reason})."))
                return
            yield Row(file, line, record)
            if text.next() == ",":
                text.at += 1
            elif text.next() != "]":
                sentence = "is not JSON from here on (a comma or ] is missing)."
                yield Row(file, str(text.line), FileError(sentence))
                return
        text.at += 1
        if text.next():
            sentence = "goes on behind the list's end. Put all conversations into one list."
            yield Row(file, str(text.line), FileError(sentence))


class _Window:
    """A part of a text, which moves on as its values are taken."""

    def __init__(self, opened: TextIO):
        self.opened, self.text, self.at, self.line = opened, "", 0, 1

    def next(self) -> str:
        """The next character that is no space; empty at the end of the text."""
        while True:
            end = _SPACE.match(self.text, self.at).end()  # type: ignore[union-attr]  # it always matches
            self._pass(end)
            if end < len(self.text) or not self._more():
                return self.text[end : end + 1]

    def value(self) -> Any:
        """The value that begins here.

        Raises:
            ValueError, RecursionError: there is none.
        """
        while True:
            try:
                value, end = _DECODER.raw_decode(self.text, self.at)
                if end == len(self.text):  # a number may go on
                    if self._more():
                        continue
                    end = len(self.text)
                self._pass(end)
                return value
            except json.JSONDecodeError as error:
                cut = error.msg.startswith("Unterminated") or error.pos > len(self.text) - _LONGEST
                if not cut or not self._more():
                    raise

    def _pass(self, end: int) -> None:
        self.line += self.text.count("\n", self.at, end)
        self.at = end

    def _more(self) -> bool:
        """Reads on, as much again as is waiting, so that a long value is tried few times; whether there was more."""
        self.text, self.at = self.text[self.at :], 0
        read = self.opened.read(max(_READ, len(self.text)))
        self.text += read
        return bool(read)


def table(file: Path) -> Iterator[Row]:
    """CSV: media separated by `;`, several people's answers by `|`."""
    with file.open(newline="", encoding=ENCODING) as opened:
        reader = csv.DictReader(opened)
        try:
            columns = list(reader.fieldnames or [])
        except csv.Error as error:
            yield Row(file, "1", FileError(f"cannot be read as CSV ({error})."))
            return
        found = _column_problems(columns)
        yield from (Row(file, "1", FileError(sentence)) for sentence in found)
        if any(sentence.startswith("lacks") for sentence in found):
            return
        try:
            for row in reader:
                yield Row(file, str(first_line(reader, row.values())), _cells(row, len(columns)))
        except csv.Error as error:
            yield Row(file, str(reader.line_num), FileError(f"cannot be read as CSV ({error})."))


def _column_problems(columns: list[str]) -> list[str]:
    found = []
    if missing := [name for name in ("question", "answer") if name not in columns]:
        return [f"lacks the column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}."]
    if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
        found.append(f"has the column {' and '.join(map(repr, twice))} twice.")
    if strange := [name for name in columns if name not in COLUMNS]:
        known = ", ".join(COLUMNS)
        found.append(f"has the column {' and '.join(map(repr, strange))}, which is unknown; there are {known}.")
    return found


def _cells(row: dict[Any, Any], count: int) -> Any:
    """A row's record, with lists of media and of answers."""
    if None in row or row["question"] is None or row["answer"] is None:
        how = "more" if None in row else "fewer"
        return InputError(f"has {how} cells than the {count} columns. Put text with commas in quotes.")
    record: dict[str, Any] = {
        kind: [part.strip() for part in row[kind].split(";") if part.strip()]
        for kind in ("image", "audio", "video")
        if row.get(kind)
    }
    return record | {"question": row["question"], "answer": row["answer"].split("|")}
