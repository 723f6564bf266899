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
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, replace
from itertools import pairwise
from pathlib import Path
from typing import Any, Literal

from equipoise.pipelines.instruction_tuning.config import DataSection
from equipoise.pipelines.instruction_tuning.media import media_problem
from equipoise.pipelines.progress import progress

Kind = Literal["image", "audio", "text"]
MARKS = {"image": "<image>", "audio": "<audio>"}
ENCODING = "utf-8-sig"  # with or without the mark that Excel and Notepad put first
HELD_OUT = 10  # every so many-th conversation is held out where no validation file is given
_COLUMNS = ("id", *MARKS, "question", "answer")  # of a CSV file; ids are for people
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
class Example:
    kind: Kind
    media: tuple[Path, ...]
    turns: tuple[Turn, ...]
    system: str = ""
    where: str = ""  # file:line


def read_all(data: DataSection, decode: bool = True) -> tuple[list[Example], list[Example], list[str]]:
    """(training examples, held-out ones, everything that is wrong). `decode`: whether media are opened, too."""
    train, problems = read_examples(Path(data.file), data.folder, decode)
    if data.validation is not None:
        held, more = read_examples(Path(data.validation), data.folder, decode, "data.validation")
        return train, held, problems + more
    if len(train) < HELD_OUT:  # too few to judge anything by; one must be enough
        return train[:-1] or train, train[-1:], problems
    held = train[HELD_OUT - 1 :: HELD_OUT]
    kept = [example for index, example in enumerate(train) if index % HELD_OUT != HELD_OUT - 1]
    return kept, held, problems


def read_examples(
    file: Path, folder: str | None, decode: bool = True, key: str = "data.file"
) -> tuple[list[Example], list[str]]:
    """The examples of a file, and all that is wrong with it and its media, line by line."""
    if not os.path.isfile(file):  # unlike pathlib's, False also where no path can be so long
        what = "is a folder; give the file of conversations in it" if os.path.isdir(file) else "does not exist"
        return [], [f"{key}: {file} {what}."]
    root = Path(folder) if folder else file.parent
    general: list[str] = []
    if not os.path.isdir(root):
        general.append(f"data.folder: {root} does not exist. Give the folder that the media's paths start in.")
        decode = False
    read: dict[int, Example] = {}  # by line
    wrong: list[tuple[int, str]] = []
    try:
        reader = {".csv": _read_csv, ".jsonl": _read_jsonl, ".json": _read_json}.get(file.suffix.lower())
        if reader is None:
            return [], [f"{key}: {file} is not .json, .jsonl or .csv."]
        for line, record in reader(file):
            if isinstance(record, str):
                wrong.append((line, record))
                continue
            example, found = _example(record, root, f"{file}:{line}")
            wrong += [(line, sentence) for sentence in found]
            if example and file.suffix.lower() == ".csv":
                example = replace(example, turns=tuple(map(_commonest, example.turns)))
            if example:
                read[line] = example
    except UnicodeDecodeError as error:
        return [], [f"{file}: is not UTF-8 text ({error.reason} at byte {error.start})."]
    except OSError as error:
        return [], [f"{file}: cannot be read: {error.strerror or error}."]
    first = {example.kind: line for line, example in reversed(read.items())}
    if "image" in first and "audio" in first:
        general.append(
            f"{file}: has pictures (first in line {first['image']}) and sounds (first in line {first['audio']}); one "
            "model takes one of them. Split the file."
        )
    if not read and not wrong:
        general.append(f"{file}: holds no conversations.")
    broken = _media_problems(read) if decode else {}
    wrong += broken.values()
    lost = {line for line, _ in wrong}
    examples = [e for line, e in read.items() if line not in lost and not broken.keys() & set(e.media)]
    return examples, general + [f"{file}:{line}: {sentence}" for line, sentence in sorted(wrong, key=lambda w: w[0])]


def _media_problems(examples: Mapping[int, Example]) -> dict[Path, tuple[int, str]]:
    """What is wrong with the media and the line that each is first named in. Every file is looked at once; by threads,
    for decoding leaves Python's lock."""
    first: dict[Path, tuple[int, Kind]] = {}
    for line, example in examples.items():
        for path in example.media:
            first.setdefault(path, (line, example.kind))
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(lambda item: media_problem(item[0], item[1][1]), first.items())
        shown = progress("reading", "file", found, len(first))
        named = zip(first.items(), shown, strict=True)
        return {path: (line, problem) for (path, (line, _)), problem in named if problem}


def _example(record: Any, root: Path, where: str) -> tuple[Example | None, list[str]]:
    """(the example, or None where its media cannot be told, all that is wrong with it)."""
    if not isinstance(record, dict):
        return None, [f"must be an object with conversations, got {type(record).__name__}."]
    if wrong := [name for name in _MISNAMED if record.get(name) not in (None, "", [])]:
        return None, [f"has {wrong[0]}; media are named under {' or '.join(MARKS)}, a path or a list of paths."]
    given = [kind for kind in MARKS if record.get(kind) not in (None, "", [])]
    if len(given) > 1:
        return None, ["has both an image and an audio; one model takes one of them."]
    kind: Kind = given[0] if given else "text"  # type: ignore[assignment]
    names = record[kind] if given else []
    names = [names] if isinstance(names, str) else names
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        return None, [f"{kind} must be a path or a list of paths, got {json.dumps(names)[:60]}."]
    problems = []
    media = tuple(root / name for name in names)
    turns, system, wrong = _turns(record.get("conversations"))
    problems += wrong
    marks = {mark: sum(turn.question.count(mark) for turn in turns) for mark in MARKS.values()}
    for other, mark in MARKS.items():
        if any(mark in text for text in (system, *(turn.answer for turn in turns))):
            problems.append(f"mentions {mark} in an answer or the system's words; media stand in questions.")
        if other != kind and marks[mark]:
            problems.append(f"mentions {mark}, but no {other} is given.")
    if kind != "text" and not problems:
        count, mark = marks[MARKS[kind]], MARKS[kind]
        if count == 0:  # as many data sets have it: the media come first
            first = Turn("\n".join([mark] * len(media) + [turns[0].question]), turns[0].answer)
            turns = (first, *turns[1:])
        elif count != len(media):
            problems.append(f"mentions {count} {mark}, but {len(media)} {'are' if len(media) > 1 else 'is'} given.")
    if not problems and not all(turn.question.strip() for turn in turns):
        problems.append("has an empty question.")
    return Example(kind, media, turns, system, where), problems


def _commonest(turn: Turn) -> Turn:
    """Of answers separated by `|`, the one that most people gave, or the first of those."""
    answers = [part.strip() for part in turn.answer.split("|") if part.strip()]
    chosen = Counter(answers).most_common(1)[0][0]
    answers.remove(chosen)
    return replace(turn, answer=chosen, others=tuple(answers))


def _turns(given: Any) -> tuple[tuple[Turn, ...], str, list[str]]:
    if not isinstance(given, list) or not given:
        return (), "", ["has no conversations: a list of turns, from human and gpt, is needed."]
    said: list[tuple[str, str]] = []
    system = ""
    for number, turn in enumerate(given, 1):
        who = turn.get("from", turn.get("role")) if isinstance(turn, dict) else None
        text = turn.get("value", turn.get("content")) if isinstance(turn, dict) else None
        if not isinstance(who, str) or not isinstance(text, str):
            return (), "", [f"turn {number} needs `from` and `value`, both text."]
        if _HALF.search(text):
            return (), "", [f"turn {number} has half a character (a lone surrogate, such as \\ud83d). Write it whole."]
        if who == "system" and number == 1:
            system = text
        elif who in _USERS or who in _ASSISTANTS:
            said.append(("user" if who in _USERS else "assistant", text))
        else:
            return (), "", [f"turn {number} is from {who!r}, which is neither human nor gpt."]
    problems = []
    if said and said[0][0] != "user":
        problems.append("begins with the assistant; the user must begin.")
    elif any(a[0] == b[0] for a, b in pairwise(said)):
        problems.append("has two turns of the same speaker in a row; user and assistant must take turns.")
    elif len(said) < 2:
        problems.append("has no answer.")
    elif said[-1][0] == "user":
        said.pop()  # a last question without an answer teaches nothing
    if not problems and any(not text.strip() for who, text in said if who == "assistant"):
        problems.append("has an empty answer.")
    if problems:
        return (), system, problems
    pairs = zip(said[::2], said[1::2], strict=True)
    return tuple(Turn(question, answer.strip()) for (_, question), (_, answer) in pairs), system, []


def _read_jsonl(file: Path) -> Iterator[tuple[int, Any]]:
    for number, line in enumerate(file.read_text(encoding=ENCODING).split("\n"), start=1):
        if line.strip():
            try:
                yield number, json.loads(line)
            except (ValueError, RecursionError) as error:
                yield number, f"is not JSON ({error})."


def _read_json(file: Path) -> Iterator[tuple[int, Any]]:
    """The items of a list, each with the line that it begins in."""
    text = file.read_text(encoding=ENCODING)
    start = len(text) - len(text.lstrip())
    if not text.startswith("[", start):
        yield 1, "must be a list of conversations, in square brackets; one object a line is .jsonl."
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
            yield line, f"is not JSON from here on ({error})."
            return
        yield line, record
        at = _SPACE.match(text, at).end()  # type: ignore[union-attr]
        if text[at : at + 1] == ",":
            at += 1
        elif text[at : at + 1] != "]":
            yield line + text.count("\n", counted, at), "is not JSON from here on (a comma or ] is missing)."
            return


def _read_csv(file: Path) -> Iterator[tuple[int, Any]]:
    with file.open(newline="", encoding=ENCODING) as opened:
        reader = csv.DictReader(opened)
        try:
            columns = reader.fieldnames or []
        except csv.Error as error:
            yield 1, f"cannot be read as CSV ({error})."
            return
        missing = [name for name in ("question", "answer") if name not in columns]
        if missing:
            yield 1, f"lacks the column {' and '.join(missing)}; it has {', '.join(columns) or 'none'}."
            return
        if twice := [name for name in dict.fromkeys(columns) if columns.count(name) > 1]:
            yield 1, f"has the column {' and '.join(map(repr, twice))} twice."
        if strange := [name for name in columns if name not in _COLUMNS]:
            known = ", ".join(_COLUMNS)
            yield 1, f"has the column {' and '.join(map(repr, strange))}, which is unknown; there are {known}."
        try:
            for row in reader:
                if None in row:
                    yield (
                        reader.line_num,
                        f"has more cells than the {len(columns)} columns. Put text with commas in quotes.",
                    )
                    continue
                record: dict[str, Any] = {
                    kind: [part.strip() for part in row[kind].split(";") if part.strip()]
                    for kind in MARKS
                    if row.get(kind)
                }
                record["conversations"] = [
                    {"from": "human", "value": row["question"]},
                    {"from": "gpt", "value": (row["answer"] or "").strip("| ")},
                ]
                yield reader.line_num, record
        except csv.Error as error:
            yield reader.line_num, f"cannot be read as CSV ({error})."
