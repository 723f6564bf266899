"""Conversations about pictures, sounds and videos, out of files of any format; all that is wrong is found at once.

`formats` reads the files, and gives every record in LLaVA's format: `{"image": PATH or [PATHS], "conversations":
[{"from": "human", "value": "<image>\\nWhat is it?"}, {"from": "gpt", "value": "A star."}, …]}`, with `audio` and
`<audio>` in place of `image` and `<image>`. Of several people's answers the commonest is trained on.
"""

import json
import os
import re
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from itertools import chain, pairwise, zip_longest
from pathlib import Path
from typing import Any, Literal, NamedTuple

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.config import InstructionTuningData
from equipoise.pipelines.instruction_tuning.formats import sources, tables
from equipoise.pipelines.instruction_tuning.formats.dialects import (
    ASSISTANTS,
    MARKS,
    SYSTEMS,
    USERS,
    as_llava,
    by_url,
)
from equipoise.pipelines.instruction_tuning.formats.embedded import MediaFolder
from equipoise.pipelines.instruction_tuning.formats.rows import FileError, Row
from equipoise.pipelines.instruction_tuning.good_media import GoodMedia, line_of
from equipoise.pipelines.instruction_tuning.media import media_problem
from equipoise.pipelines.progress import progress

Kind = Literal["image", "audio", "video", "text"]
NAMES = {"image": "pictures", "audio": "sounds", "video": "videos"}  # of its media
HELD_OUT = 10  # every so many-th conversation is held out where no validation file is given
_HALF = re.compile("[\ud800-\udfff]")  # JSON can name halves of a UTF-16 pair, which are no text


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
    source: int = 0  # which of the data sets it is of, in the order that they are given in


Judge = Callable[[Conversation], list[str]]  # what is wrong with an example, a sentence each


def conversation(record: Any, folder: Path, where: str = "", unpacked: MediaFolder | None = None) -> Conversation:
    """A record in any of the formats.

    Raises:
        InputError: all that is wrong with it; its media are not opened.
    """
    record, problems = as_llava(record, unpacked or MediaFolder())
    found, problems = _example(record, folder, where, problems)
    if found is None or problems:
        raise InputError("\n".join(f"{where}: {problem}" for problem in problems))
    return found


def read_all(
    data: InstructionTuningData,
    decode: bool = True,
    judge: Judge | None = None,
    left_out: list[str] | None = None,
    unpacked: Path | None = None,
) -> tuple[list[Conversation], list[Conversation], list[str]]:
    """(training examples, held-out ones, everything that is wrong).

    Args:
        decode: whether media are opened, too.
        judge: says what else is wrong with an example, such as what its model cannot take.
        left_out: where given, gets what is wrong with single conversations, which are then no problems.
        unpacked: where media go that are inside of the files; by default to a folder that goes with the process.
    """

    def read(file: str, key: str, source: int) -> tuple[list[Conversation], list[str]]:
        options = {"asked": data.question, "unpacked": unpacked, "source": source}
        return read_examples(file, data.folder, decode, key, judge, left_out, **options)

    train, apart, problems = [], [], []
    for source, file in enumerate([data.file, *data.more]):
        found, more = read(file, "data.more" if source else "data.file", source)
        every = HELD_OUT if data.validation is None and len(found) >= HELD_OUT else len(found) + 1
        apart.append(found[every - 1 :: every])
        train += [example for index, example in enumerate(found, 1) if index % every]
        problems += more
    if data.validation is not None:
        held, more = read(data.validation, "data.validation", 0)
        return train, held, list(dict.fromkeys([*problems, *more, *_both_kinds([*train, *held])]))
    # one of each data set in turn, for often only the first are judged
    held = [example for example in chain(*zip_longest(*apart)) if example is not None]
    if not held:  # too few to judge anything by; one must be enough
        train, held = train[:-1] or train, train[-1:]
    return train, held, problems + _both_kinds([*train, *held])


def _both_kinds(examples: Sequence[Conversation]) -> list[str]:
    """A sentence where one data set has pictures and another one sounds, say; a single one says so itself."""
    kinds = {example.source: example.kind for example in examples if example.media}
    return sets_of_kinds([kind for kind in NAMES if kind in kinds.values()])


def sets_of_kinds(kinds: Sequence[str]) -> list[str]:
    """A sentence where several data sets have media of several kinds."""
    if len(kinds) < 2:
        return []
    one, other = (NAMES[kind] for kind in kinds[:2])
    return [f"data.more: there are data sets with {one} and others with {other}; one model takes one of them."]


def read_examples(
    file: Path | str,
    folder: str | None,
    decode: bool = True,
    key: str = "data.file",
    judge: Judge | None = None,
    left_out: list[str] | None = None,
    **options: Any,
) -> tuple[list[Conversation], list[str]]:
    """The examples of a data set, and all that is wrong with it and its media, line by line; `options` as in
    `read_data_set`."""
    found = read_data_set(file, folder, decode, key, judge, tolerant=left_out is not None, **options)
    if left_out is None:
        return found.examples, found.problems + found.wrong
    left_out += found.wrong
    return found.examples, found.problems


class DataSet(NamedTuple):
    examples: list[Conversation]
    problems: list[str]  # with all of it
    wrong: list[str]  # with single conversations, line by line
    rows: int  # conversations that were looked at, the wrong ones too


def read_data_set(
    file: Path | str,
    folder: str | None,
    decode: bool = True,
    key: str = "data.file",
    judge: Judge | None = None,
    tolerant: bool = True,
    asked: str | None = None,
    unpacked: Path | None = None,
    source: int = 0,
) -> DataSet:
    """All of a data set.

    Args:
        key: what it was given as, for messages.
        tolerant: whether one damaged file of several is no problem with all of it.
        asked: the question of captions.
        unpacked: where media go that are inside of it.
        source: its number.
    """
    name, files = str(file), None
    try:
        files = None if sources.is_hub(name) else sources.files(name)
    except InputError as error:
        return DataSet([], [f"{key}: {file} {error}"], [], 0)
    root = Path(folder) if folder else beside(Path(name)) if files else Path()
    seen = GoodMedia(unpacked.with_name("good-media") if unpacked and decode else None)
    reading = Reading(root, MediaFolder(unpacked), asked, source, judge, tolerant and len(files or ()) > 1, seen)
    if not os.path.isdir(root):
        reading.general.append(f"data.folder: {root} does not exist. Give the folder that the media's paths start in.")
        decode = False
    for row in rows_of(name, files):
        reading.take(row)
    reading.check(name)
    examples = reading.usable() if decode else reading.good
    return DataSet(examples, reading.general, reading.lines(), reading.count)


def beside(source: Path) -> Path:
    """Where the paths in a data set start."""
    return source if os.path.isdir(source) else source.parent


def rows_of(name: str, files: Sequence[Path] | None, streaming: bool = False) -> Iterator[Row]:
    """All rows of a data set; in place of what cannot be read, why.

    Args:
        files: of it; None for one of the hub.
        streaming: whether the hub's is read as it comes, and not downloaded first.
    """
    for file in [name] if files is None else files:
        try:
            yield from tables.hub(name, streaming) if files is None else sources.rows(Path(file))
        except UnicodeDecodeError as error:
            yield Row(file, "", FileError(f"is not UTF-8 text ({error.reason} at byte {error.start})."))
        except OSError as error:
            yield Row(file, "", FileError(f"cannot be read: {error.strerror or error}."))
        except InputError as error:
            yield Row(file, "", FileError(str(error)))


@dataclass
class Reading:
    """What was found in a data set so far, and what is wrong with it."""

    root: Path
    media: MediaFolder
    asked: str | None
    source: int
    judge: Judge | None
    tolerant: bool  # whether one file of several may be left out
    seen: GoodMedia | None = None  # media that need not be looked at; None: all are
    general: list[str] = field(default_factory=list)
    read: list[tuple[int, Row, Conversation]] = field(default_factory=list)
    good: list[Conversation] = field(default_factory=list)
    wrong: list[tuple[int, str, str]] = field(default_factory=list)  # (number of the row, where, what)
    count: int = 0

    def take(self, row: Row) -> None:
        self.count += 1
        if isinstance(row.record, FileError) and not self.tolerant:
            self.general.append(f"{row.where}: {row.record}")
            return
        if isinstance(row.record, InputError):
            self.wrong.append((self.count, row.where, str(row.record)))
            return
        record, problems = as_llava(row.record, self.media, self.asked)
        example, problems = _example(record, self.root, row.where, problems, self.source)
        if example:
            self.read.append((self.count, row._replace(record=None), example))
            problems += self.judge(example) if self.judge else []
            self.good += [] if problems else [example]
        self.wrong += [(self.count, row.where, sentence) for sentence in problems]

    def check(self, name: str) -> None:
        """What is wrong with all of it."""
        self.general += mixed_kinds(name, self.first)
        if not self.read and not self.wrong and not self.general:
            self.general.append(f"{name}: holds no conversations.")

    @property
    def first(self) -> dict[Kind, Row]:
        """The first row of each kind."""
        return {example.kind: row for _, row, example in reversed(self.read)}

    def usable(self, shown: bool = True) -> list[Conversation]:
        """The conversations with nothing wrong, after a look at their media, with a progress bar if that is shown."""
        broken = _media_problems(self.read, shown, self.seen)
        self.wrong += broken.values()
        return [example for example in self.good if not broken.keys() & set(example.media)]

    def lines(self) -> list[str]:
        """What is wrong with single conversations, in their order; that media are named by URL only once."""
        self.wrong.sort(key=lambda some: some[0])
        far = {number: index for index, (number, _, text) in reversed([*enumerate(self.wrong)]) if by_url(text)}
        first = min(far.values(), default=None)
        more = f" {len(far) - 1} more do so." if len(far) > 1 else ""
        return [
            f"{where}: {text}" + (more if index == first else "")
            for index, (_, where, text) in enumerate(self.wrong)
            if index == first or not by_url(text)
        ]


def mixed_kinds(name: str, first: dict[Kind, Row]) -> list[str]:
    """A sentence where a data set has pictures and also sounds, say, of each of which the first row is given."""
    both = [kind for kind in NAMES if kind in first][:2]
    if len(both) < 2:
        return []
    at = {kind: row.at if str(row.file) == name else f"{row.file}:{row.at}" for kind, row in first.items()}
    lines = {kind: f"line {text}" if text.isdecimal() else text for kind, text in at.items()}
    return [
        f"{name}: has {' and '.join(f'{NAMES[kind]} (first in {lines[kind]})' for kind in both)}; one model "
        "takes one of them. Split the file."
    ]


def _media_problems(
    examples: Sequence[tuple[int, Row, Conversation]], shown: bool = True, seen: GoodMedia | None = None
) -> dict[Path, tuple[int, str, str]]:
    """What is wrong with the media, and the row that each is first named in. Every file is looked at once, those
    `seen` not again; by threads, for decoding leaves Python's lock."""
    kinds: dict[Path, Kind] = {}
    rows: dict[Path, list[tuple[int, Row]]] = {}
    for number, row, example in examples:
        for path in dict.fromkeys(example.media):
            kinds.setdefault(path, example.kind)
            rows.setdefault(path, []).append((number, row))
    lines = {path: line_of(path, kind) for path, kind in kinds.items()} if seen else {}
    new = {path: kind for path, kind in kinds.items() if not (seen and seen.has(lines[path]))}
    with ThreadPoolExecutor(8) as pool:
        found = pool.map(media_problem, new, new.values())
        each = progress("reading", "file", found, len(new)) if shown else found
        wrong = {path: problem for path, problem in zip(new, each, strict=True) if problem}
    if seen:
        seen.add(line for path, line in lines.items() if line and path not in wrong)
    firsts = {path: rows[path][0] for path in wrong}
    also = {path: _also(first, [row for _, row in rows[path][1:]]) for path, (_, first) in firsts.items()}
    return {path: (firsts[path][0], firsts[path][1].where, problem + also[path]) for path, problem in wrong.items()}


def _also(first: Row, rows: Sequence[Row]) -> str:
    """Where else a file is named."""
    if not rows:
        return ""
    names = [row.at if row.file == first.file else row.where for row in rows[:3]]
    word = "" if not names[0].isdecimal() else "line " if len(rows) == 1 else "lines "
    more = f" and {len(rows) - 3} more" if len(rows) > 3 else ""
    return f" (Also named in {word}{', '.join(names)}{more}.)"


def _example(
    record: Any, root: Path, where: str, problems: list[str], source: int = 0
) -> tuple[Conversation | None, list[str]]:
    """(the example, or None where it is nothing like one, all that is wrong with it). Of one with problems, what could
    be told: its media as far as they are, and all that was said as questions and answers, whether or not in turns."""
    if not isinstance(record, dict):
        return None, [f"must be an object with conversations, got {type(record).__name__}."]
    given = [kind for kind in MARKS if record.get(kind) not in (None, "", [])]
    if len(given) > 1:
        one, other = (f"{'a' if kind == 'video' else 'an'} {kind}" for kind in given[:2])
        problems.append(f"has both {one} and {other}; one model takes one of them.")
    kind: Kind = given[0] if given else "text"  # type: ignore[assignment]
    names = record[kind] if given else []
    if not all(isinstance(name, str) for name in names):
        shown = json.dumps(names[0] if len(names) == 1 else names, default=str)[:60]
        problems.append(f"{kind} must be a path or a list of paths, got {shown}.")
        names = [name for name in names if isinstance(name, str)]
    media = tuple(root / name for name in names)
    faulty = bool(problems)  # the media
    said, system, wrong = _said(record.get("conversations"))
    problems += wrong
    questions = [text for who, text in said if who == "user"]
    answers = [text for who, text in said if who == "assistant"]
    turns = tuple(Turn(text, "") for text in questions) + tuple(Turn("", text) for text in answers)
    if not wrong:
        pairs = zip(questions, answers, strict=True)
        turns = tuple(Turn(question, answer.strip(), getattr(answer, "others", ())) for question, answer in pairs)
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
        first = "\n".join([MARKS[kind]] * len(media) + [turns[0].question])
        turns = (replace(turns[0], question=first), *turns[1:])
    if not problems and not all(turn.question.strip() for turn in turns):
        problems.append("has an empty question.")
    return Conversation(kind, media, turns, system, where, source), problems


def _said(given: Any) -> tuple[list[tuple[str, str]], str, list[str]]:
    """(who said what, the system's words, all that is wrong with it)."""
    if not isinstance(given, list) or not given:
        return [], "", ["has no conversations: a list of turns, from human and gpt, is needed."]
    said: list[tuple[str, str]] = []
    problems: list[str] = []
    system = ""
    for number, turn in enumerate(given, 1):
        who, text = (turn["from"], turn["value"]) if isinstance(turn, dict) else (None, None)
        if not isinstance(who, str) or not isinstance(text, str):
            problems.append(
                f"turn {number} needs `from` and `value`, both text. `role` and `content` are good as well."
            )
            continue
        if _HALF.search(text):
            problems.append(f"turn {number} has half a character (a lone surrogate, such as \\ud83d). Write it whole.")
            text = _HALF.sub("", text)
        if who in SYSTEMS and number == 1:
            system = text
        elif who in USERS or who in ASSISTANTS:
            said.append(("user" if who in USERS else "assistant", text))
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
