"""Conversations about pictures and sounds: LLaVA's JSON or JSONL, and CSV; all that is wrong is found at once.

JSON: a list of `{"image": PATH or [PATHS], "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
{"from": "gpt", "value": "A star."}, …]}`; JSONL: one of these a line; `audio` and `<audio>` in place of `image` and
`<image>`. CSV: the columns image (or audio; several separated by `;`), question and answer; several acceptable
answers, for VQA accuracy, are separated by `|`, and the commonest is trained on.
"""

import csv
import json
import os
import re
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from equipoise.errors import InputError
from equipoise.pipelines.files import first_line
from equipoise.pipelines.instruction_tuning.config import InstructionTuningData
from equipoise.pipelines.instruction_tuning.media import media_problem
from equipoise.pipelines.progress import progress

Kind = Literal["image", "audio", "text"]
MARKS = {"image": "<image>", "audio": "<audio>"}
ENCODING = "utf-8-sig"  # with or without the mark that Excel and Notepad put first
HELD_OUT = 10  # every so many-th conversation is held out where no validation file is given
COLUMNS = ("id", *MARKS, "question", "answer")  # of a CSV file; ids are for people
_MISNAMED = ("images", "audios", "picture", "pictures", "sound", "sounds", "video", "videos")
_SPACE = re.compile(r"\s*")
_HALF = re.compile("[\ud800-\udfff]")  # JSON can name halves of a UTF-16 pair, which are no text
_USERS, _ASSISTANTS = ("human", "user"), ("gpt", "assistant")


def without_marks(text: str) -> str:
    """A question as people read it."""
    for mark in MARKS.values():
        text = text.replace(mark, "")
    return text.strip()


@dataclass(frozen=True)
class Turn:
    question: str  # with marks where the media stand
    answer: str  # what is trained on
    others: tuple[str, ...] = ()  # of several people's answers, all the rest

    @property
    def accepted(self) -> tuple[str, ...]:
        return (self.answer, *self.others)


@dataclass(frozen=True)
class Conversation:
    kind: Kind
    media: tuple[Path, ...]
    turns: tuple[Turn, ...]
    system: str = ""
    where: str = ""  # file:line


class FileError(InputError):
    """What is wrong with a file as a whole, so that none of its lines can be left out in place of it."""


Judge = Callable[[Conversation], list[str]]  # what is wrong with an example, a sentence each


def conversation(record: Any, folder: Path, where: str = "") -> Conversation:
    """A record in LLaVA's format.

    Raises:
        InputError: all that is wrong with it; its media are not opened.
    """
    found, problems = _example(record, folder, where)
    if found is None or problems:
        raise InputError("\n".join(f"{where}: {problem}" for problem in problems))
    return found


def read_all(
    data: InstructionTuningData,
    decode: bool = True,
    judge: Judge | None = None,
    left_out: list[str] | None = None,
) -> tuple[list[Conversation], list[Conversation], list[str]]:
    """(training examples, held-out ones, everything that is wrong).

    Args:
        decode: whether media are opened, too.
        judge: says what else is wrong with an example, such as what its model cannot take.
        left_out: where given, gets what is wrong with single conversations, which are then no problems.
    """
    train, problems = read_examples(Path(data.file), data.folder, decode, judge=judge, left_out=left_out)
    if data.validation is not None:
        held, more = read_examples(Path(data.validation), data.folder, decode, "data.validation", judge, left_out)
        return train, held, list(dict.fromkeys(problems + more))
    if len(train) < HELD_OUT:  # too few to judge anything by; one must be enough
        return train[:-1] or train, train[-1:], problems
    held = train[HELD_OUT - 1 :: HELD_OUT]
    kept = [example for index, example in enumerate(train) if index % HELD_OUT != HELD_OUT - 1]
    return kept, held, problems


def read_examples(
    file: Path,
    folder: str | None,
    decode: bool = True,
    key: str = "data.file",
    judge: Judge | None = None,
    left_out: list[str] | None = None,
) -> tuple[list[Conversation], list[str]]:
    """The examples of a file, and all that is wrong with it and its media, line by line."""
    if not os.path.isfile(file):  # unlike pathlib's, False also where no path can be so long
        what = "is a folder; give the file of conversations in it" if os.path.isdir(file) else "does not exist"
        return [], [f"{key}: {file} {what}."]
    root = Path(folder) if folder else file.parent
    general: list[str] = []
    if not os.path.isdir(root):
        general.append(f"data.folder: {root} does not exist. Give the folder that the media's paths start in.")
        decode = False
    read: list[tuple[int, Conversation]] = []  # the line of each: JSON may have all of them in one
    good: list[Conversation] = []
    wrong: list[tuple[int, str]] = []
    try:
        reader = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}.get(file.suffix.lower())
        if reader is None:
            return [], [f"{key}: {file} is not .json, .jsonl or .csv."]
        for line, record in reader(file):
            if isinstance(record, FileError):
                general.append(f"{file}:{line}: {record}")
                continue
            if isinstance(record, InputError):
                wrong.append((line, str(record)))
                continue
            example, found = _example(record, root, f"{file}:{line}")
            if example and not found and file.suffix.lower() == ".csv":
                example = replace(example, turns=tuple(map(_commonest, example.turns)))
            if example:
                read.append((line, example))
                found += judge(example) if judge else []
                good += [] if found else [example]
            wrong += [(line, sentence) for sentence in found]
    except UnicodeDecodeError as error:
        return [], [f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})."]
    except OSError as error:
        return [], [f"{file}: cannot be read: {error.strerror or error}."]
    first = {example.kind: line for line, example in reversed(read)}
    if "image" in first and "audio" in first:
        general.append(
            f"{file}: has pictures (first in line {first['image']}) and sounds (first in line {first['audio']}); one "
            "model takes one of them. Split the file."
        )
    if not read and not wrong and not general:
        general.append(f"{file}: holds no conversations.")
    broken = _media_problems(read) if decode else {}
    wrong += broken.values()
    wrong.sort(key=lambda some: some[0])
    examples = [example for example in good if not broken.keys() & set(example.media)]
    lines = [f"{file}:{line}: {sentence}" for line, sentence in wrong]
    if left_out is None:
        return examples, general + lines
    left_out += lines
    return examples, general


def _media_problems(examples: Sequence[tuple[int, Conversation]]) -> dict[Path, tuple[int, str]]:
    """What is wrong with the media and the line that each is first named in. Every file is looked at once; by threads,
    for decoding leaves Python's lock."""
    kinds: dict[Path, Kind] = {}
    lines: dict[Path, list[int]] = {}
    for line, example in examples:
        for path in dict.fromkeys(example.media):
            kinds.setdefault(path, example.kind)
            lines.setdefault(path, []).append(line)
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(media_problem, kinds, kinds.values())
        shown = zip(kinds, progress("reading", "file", found, len(kinds)), strict=True)
        return {path: (lines[path][0], problem + _also(lines[path][1:])) for path, problem in shown if problem}


def _also(lines: Sequence[int]) -> str:
    """Where else a file is named."""
    if not lines:
        return ""
    word = "line" if len(lines) == 1 else "lines"
    more = f" and {len(lines) - 3} more" if len(lines) > 3 else ""
    return f" (Also named in {word} {', '.join(map(str, lines[:3]))}{more}.)"


def _example(record: Any, root: Path, where: str) -> tuple[Conversation | None, list[str]]:
    """(the example, or None where it is nothing like one, all that is wrong with it). Of one with problems, what could
    be told: its media as far as they are, and all that was said as questions and answers, whether or not in turns."""
    if not isinstance(record, dict):
        return None, [f"must be an object with conversations, got {type(record).__name__}."]
    problems = []
    if misnamed := [name for name in _MISNAMED if record.get(name) not in (None, "", [])]:
        problems.append(f"has {misnamed[0]}; media are named under {' or '.join(MARKS)}, a path or a list of paths.")
    given = [kind for kind in MARKS if record.get(kind) not in (None, "", [])]
    if len(given) > 1:
        problems.append("has both an image and an audio; one model takes one of them.")
    kind: Kind = given[0] if given else "text"  # type: ignore[assignment]
    names = record[kind] if given else []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        problems.append(f"{kind} must be a path or a list of paths, got {json.dumps(names)[:60]}.")
        names = [name for name in names if isinstance(name, str)] if isinstance(names, list) else []
    media = tuple(root / name for name in names)
    faulty = bool(problems)  # the media
    said, system, wrong = _said(record.get("conversations"))
    problems += wrong
    questions = [text for who, text in said if who == "user"]
    answers = [text for who, text in said if who == "assistant"]
    turns = tuple(Turn(text, "") for text in questions) + tuple(Turn("", text) for text in answers)
    if not wrong:
        turns = tuple(Turn(question, answer.strip()) for question, answer in zip(questions, answers, strict=True))
    marks = {mark: sum(question.count(mark) for question in questions) for mark in MARKS.values()}
    for other, mark in MARKS.items():
        if any(mark in text for text in (system, *answers)):
            problems.append(f"mentions {mark} in an answer or the system's words; media stand in questions.")
        if other != kind and marks[mark] and not faulty:
            problems.append(f"mentions {mark}, but no {other} is given.")
    if kind != "text" and not faulty and marks[MARKS[kind]]:
        count, mark = marks[MARKS[kind]], MARKS[kind]
        if count != len(media):
            problems.append(f"mentions {count} {mark}, but {len(media)} {'are' if len(media) > 1 else 'is'} given.")
    elif kind != "text" and not problems:  # as many data sets have it: the media come first
        first = Turn("\n".join([MARKS[kind]] * len(media) + [turns[0].question]), turns[0].answer)
        turns = (first, *turns[1:])
    if not problems and not all(turn.question.strip() for turn in turns):
        problems.append("has an empty question.")
    return Conversation(kind, media, turns, system, where), problems


def _commonest(turn: Turn) -> Turn:
    """Of answers separated by `|`, the one that most people gave, or the first of those."""
    answers = [part.strip() for part in turn.answer.split("|") if part.strip()]
    chosen = Counter(answers).most_common(1)[0][0]
    answers.remove(chosen)
    return replace(turn, answer=chosen, others=tuple(answers))


def _said(given: Any) -> tuple[list[tuple[str, str]], str, list[str]]:
    """(who said what, the system's words, all that is wrong with it)."""
    if not isinstance(given, list) or not given:
        return [], "", ["has no conversations: a list of turns, from human and gpt, is needed."]
    said: list[tuple[str, str]] = []
    problems: list[str] = []
    system = ""
    for number, turn in enumerate(given, 1):
        who = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(who, str) or not isinstance(text, str):
            problems.append(f"turn {number} needs `from` and `value`, both text.")
            continue
        if _HALF.search(text):
            problems.append(f"turn {number} has half a character (a lone surrogate, such as \\ud83d). Write it whole.")
            text = _HALF.sub("", text)
        if who == "system" and number == 1:
            system = text
        elif who in _USERS or who in _ASSISTANTS:
            said.append(("user" if who in _USERS else "assistant", text))
        else:
            problems.append(f"turn {number} is from {who!r}, which is neither human nor gpt.")
    if problems:  # whose turn it was cannot be told
        return said, system, problems
    if said and said[0][0] != "user":
        problems.append("begins with the assistant; the user must begin.")
    elif any(a[0] == b[0] for a, b in pairwise(said)):
        problems.append("has two turns of the same speaker in a row; user and assistant must take turns.")
    elif len(said) < 2:
        problems.append("has no answer.")
    elif said[-1][0] == "user":
        said.pop()  # a last question without an answer teaches nothing
    if any(not text.strip() for who, text in said if who == "assistant"):
        problems.append("has an empty answer.")
    return said, system, problems


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file.read_text(encoding=ENCODING).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, InputError(f"is not JSON ({error}).")


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    """The items of a list, each with the line that it begins in."""
    text = file.read_text(encoding=ENCODING)
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        yield 1, FileError("must be a list of conversations, in square brackets; one object a line is .jsonl.")
        return
    decoder, at, line, counted = json.JSONDecoder(), start + 1, 1, 0
    while True:
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]  # it always matches
        line, counted = line + text.count("\n", counted, at), at
        if text[at : at + 1] == "]":
            return
        try:
            record, at = decoder.raw_decode(text, at)
        except (ValueError, RecursionError) as error:
            yield line, FileError(f"is not JSON from here on ({error}).")
            return
        yield line, record
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            line += text.count("\n", counted, at)
            yield line, FileError("is not JSON from here on (a comma or ] is missing).")
            return


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(newline="", encoding=ENCODING) as opened:
        reader = csv.DictReader(opened)
        try:
            columns = reader.fieldnames or []
        except csv.Error as error:
            yield 1, FileError(f"cannot be read as CSV ({error}).")
            return
        missing = [name for name in ("question", "answer") if name not in columns]
        if missing:
            yield 1, FileError(f"lacks the column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}.")
            return
        if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
            yield 1, FileError(f"has the column {' and '.join(map(repr, twice))} twice.")
        if strange := [name for name in columns if name not in COLUMNS]:
            known = ", ".join(COLUMNS)
            found = " and ".join(map(repr, strange))
            yield 1, FileError(f"has the column {found}, which is unknown; there are {known}.")
        try:
            for row in reader:
                line = first_line(reader, row.values())
                if None in row or row["question"] is None or row["answer"] is None:
                    how = "more" if None in row else "fewer"
                    yield (
                        line,
                        InputError(f"has {how} cells than the {len(columns)} columns. Put text with commas in quotes."),
                    )
                    continue
                record: dict[str, Any] = {
                    kind: [part.strip() for part in row[kind].split(";") if part.strip()]
                    for kind in MARKS
                    if row.get(kind)
                }
                record["conversations"] = [
                    {"from": "human", "value": row["question"]},
                    {"from": "gpt", "value": "|".join(filter(None, map(str.strip, row["answer"].split("|"))))},
                ]
                yield line, record
        except csv.Error as error:
            yield reader.line_num, FileError(f"cannot be read as CSV ({error}).")
