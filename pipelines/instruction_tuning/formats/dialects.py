"""The records of other tools as LLaVA's: `{"image": [PATH, …], "conversations": [{"from": …, "value": …}, …]}`.

OpenAI's and TRL's messages, with contents of parts; ShareGPT's conversations; TRL's prompt and completion; Alpaca's
instruction, input, output; ms-swift's query and response; question and answer; the_cauldron's texts; captions. Media
stand in parts, or under image(s), audio(s) and video(s), to which `<image>`, … in the text refer in order.
"""

import re
from collections import Counter
from collections.abc import Callable, Iterable, Mapping
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.formats.embedded import BY_URL, MediaFolder

MARKS = {"image": "<image>", "audio": "<audio>", "video": "<video>"}
USERS = ("human", "user")
ASSISTANTS = ("gpt", "assistant", "chatgpt", "model", "bot", "bard", "bing")
SYSTEMS = ("system", "developer")
_MARK = re.compile("|".join(MARKS.values()))
_KINDS = {  # of a content's part → what it shows
    "image": "image",
    "image_url": "image",
    "input_image": "image",
    "audio": "audio",
    "audio_url": "audio",
    "input_audio": "audio",
    "video": "video",
    "video_url": "video",
    "input_video": "video",
}
_WRITTEN = ("text", "input_text", "output_text")
_HOLDERS = (
    *("source", "image_url", "input_audio", "audio_url", "video_url", "input_video"),
    *("image", "audio", "video", "url", "path", "base64"),
)
_PREFERRED = ("chosen", "rejected", "rejected_response", "rejected_messages")
_TOOLS = ("tools", "functions", "tool_calls", "function_call")
_MISNAMED = ("picture", "pictures", "sound", "sounds", "clip", "clips")
_UNUSED = frozenset((*_PREFERRED, *_TOOLS, *_MISNAMED))
Record = dict[str, Any]
Turns = list[Any]  # of {"from": …, "value": …}, and whatever else stood in their place


class Answers(str):
    """The answer that most of several people gave, with those of all others."""

    others: tuple[str, ...] = ()


def as_llava(given: Any, media: MediaFolder, asked: str | None = None) -> tuple[Any, list[str]]:
    """(the record in LLaVA's format, what is wrong with it, a sentence each).

    Args:
        given: what a reader gave; what is no record at all is given back.
        media: where media go that are inside of it.
        asked: the question of a caption.
    """
    if not isinstance(given, dict):
        return given, []
    problems = _unused(given)
    found = _Media(given, media, problems)
    turns = _turns(given, asked, bool(found.listed), problems)
    if turns is None and any(_holds(given, name) for name in _PREFERRED):
        turns = _pairs([("?", "?")])  # for which there is a sentence already
    if isinstance(turns, list):
        turns = [_turn(turn, number, found, problems) for number, turn in enumerate(turns, 1)]
    record: Record = {} if turns is None else {"conversations": turns}
    return record | found.ordered(), list(dict.fromkeys(problems))


def _unused(given: Record) -> list[str]:
    """What would change what is learnt, and is not used here."""
    if _UNUSED.isdisjoint(given):
        return []
    found = []
    if names := [name for name in _PREFERRED if _holds(given, name)]:
        found.append(f"has {names[0]}: preferences are not trained on here. Give the answer to be learnt alone.")
    if names := [name for name in _TOOLS if _holds(given, name) and given[name] != "[]"]:
        found.append(f"has {names[0]}, which no prompt here has. Leave it out.")
    if names := [name for name in _MISNAMED if _holds(given, name)]:
        found.append(f"has {names[0]}; media are named under image or audio (or video), a path or a list of paths.")
    return found


def _holds(given: Mapping[str, Any], name: str) -> bool:
    value = given.get(name)
    if isinstance(value, dict):
        return any(item is not None for item in value.values())  # a table has all fields in every row
    return value is not None and (not isinstance(value, str | list) or bool(value))


class _Media:
    """A record's media, in the order of their marks in its text."""

    def __init__(self, given: Record, folder: MediaFolder, problems: list[str]):
        self.folder, self.problems = folder, problems
        self.listed: dict[str, list[Any]] = {}  # under the record's own keys, which marks refer to
        self.placed: dict[str, list[Any]] = {}
        for kind in MARKS:
            names = [name for name in (kind, f"{kind}s") if _holds(given, name)]
            if len(names) > 1:
                problems.append(f"has {names[1]}; so are media under {kind}. Name them once.")
            if names:
                value = given[names[0]]
                values = value if isinstance(value, list) else [value]
                self.listed[kind] = [path for one in values if (path := self._path(one)) is not None]

    def _path(self, given: Any) -> Any:
        try:
            return self.folder.path(given)
        except InputError as error:
            self.problems.append(str(error))
            return None

    def next(self, kind: str) -> None:
        """A mark in the text: the next of the record's own."""
        if waiting := self.listed.get(kind):
            self.placed.setdefault(kind, []).append(waiting.pop(0))

    def here(self, kind: str, part: Record) -> None:
        """A part: with its medium, or in place of the next of the record's own."""
        held = next((part[name] for name in _HOLDERS if _holds(part, name)), None)
        if held is None:
            self.next(kind)
        elif (path := self._path(held)) is not None:
            self.placed.setdefault(kind, []).append(path)

    def ordered(self) -> Record:
        kinds = [kind for kind in MARKS if kind in self.listed or kind in self.placed]
        return {kind: self.placed.get(kind, []) + self.listed.get(kind, []) for kind in kinds}


def _turns(given: Record, asked: str | None, shown: bool, problems: list[str]) -> Turns | None:
    """Who said what, or None where no format's keys are there; a system's words under a key of their own come first."""
    for names, read in _FORMATS.items():
        if all(given.get(name) is not None for name in names):
            turns = read(given)
            break
    else:
        caption = next((given[name] for name in ("caption", "text") if isinstance(given.get(name), str)), None)
        if caption is None or not shown:
            return None
        if not asked:
            problems.append(
                "has a caption and no question. Give the question that they all answer, such as "
                "data.question='Describe the picture.'."
            )
        turns = _pairs([(asked or "?", caption)])
    if not isinstance(turns, list):
        return turns
    system = given.get("system") or given.get("system_prompt")
    return [{"from": "system", "value": system}, *turns] if system else turns


def _pairs(pairs: Iterable[Any]) -> Turns:
    turns: Turns = []
    for pair in pairs:
        if isinstance(pair, list | tuple) and len(pair) == 2:
            turns += [{"from": "human", "value": pair[0]}, {"from": "gpt", "value": pair[1]}]
        else:
            turns.append(pair)
    return turns


def _prompted(given: Record) -> Turns:
    prompt, completion = given["prompt"], given["completion"]
    asked = prompt if isinstance(prompt, list) else [{"from": "human", "value": prompt}]
    return asked + (completion if isinstance(completion, list) else [{"from": "gpt", "value": completion}])


def _instructed(given: Record) -> Turns:
    question, more = given["instruction"], given.get("input")
    if isinstance(question, str) and isinstance(more, str) and more:
        question = f"{question}\n{more}"
    return _pairs([*_history(given), (question, given["output"])])


def _queried(given: Record) -> Turns:
    return _pairs([*_history(given), (given["query"], given["response"])])


def _history(given: Record) -> list[Any]:
    history = given.get("history") or []
    return history if isinstance(history, list) else [history]


def _texts(given: Record) -> Any:
    texts = given["texts"]
    if not isinstance(texts, list):
        return texts
    return _pairs((one["user"], one["assistant"]) if _is_pair(one) else one for one in texts)


def _is_pair(one: Any) -> bool:
    return isinstance(one, dict) and "user" in one and "assistant" in one


def _answered(given: Record) -> Turns:
    answers = given["answer"] if given.get("answer") is not None else given["answers"]
    if isinstance(answers, list):
        answers = _commonest([one.get("answer") if isinstance(one, dict) else one for one in answers])
    return _pairs([(given["question"], answers)])


def _commonest(answers: list[Any]) -> Any:
    """Of several people's answers, the one that most gave, or the first of those."""
    given = [text for one in answers if isinstance(one, str) and (text := one.strip())]
    if not given:
        return ""
    chosen = Answers(Counter(given).most_common(1)[0][0])
    given.remove(str(chosen))
    chosen.others = tuple(given)
    return chosen


_FORMATS: dict[tuple[str, ...], Callable[[Record], Any]] = {
    ("conversations",): lambda given: given["conversations"],
    ("messages",): lambda given: given["messages"],
    ("texts",): _texts,
    ("prompt", "completion"): _prompted,
    ("instruction", "output"): _instructed,
    ("query", "response"): _queried,
    ("question", "answer"): _answered,
    ("question", "answers"): _answered,
}


def _turn(turn: Any, number: int, found: _Media, problems: list[str]) -> Any:
    """A turn with its content as one text, in which marks stand for media."""
    if not isinstance(turn, dict):
        return turn
    who, value = _first(turn, "from", "role"), _first(turn, "value", "content")
    if turn.get("weight") == 0 and who in ASSISTANTS:
        problems.append(f"turn {number} has the weight 0, but every answer is trained on. Leave the conversation out.")
    if not _UNUSED.isdisjoint(turn) and (names := [name for name in _TOOLS if _holds(turn, name)]):
        problems.append(f"turn {number} has {names[0]}, which no prompt here has.")
        value = value or "?"
    if isinstance(value, list):
        value = _joined(value, number, found, problems)
    elif isinstance(value, str):
        for mark in _MARK.findall(value):
            found.next(mark.strip("<>"))
    return {"from": who, "value": value}


def _first(turn: Record, *names: str) -> Any:
    return next((turn[name] for name in names if turn.get(name) is not None), None)


def _joined(parts: list[Any], number: int, found: _Media, problems: list[str]) -> str:
    """Media on lines of their own, as LLaVA has it."""
    text, shown = "", False  # whether the last one was a medium
    for part in parts:
        kind = part.get("type") if isinstance(part, dict) else None
        medium = _KINDS.get(kind) if isinstance(kind, str) else None
        if medium:
            found.here(medium, part)
            piece = MARKS[medium]
        elif isinstance(part, str) or (kind in _WRITTEN and isinstance(part.get("text"), str)):
            piece = part if isinstance(part, str) else part["text"]
            for mark in _MARK.findall(piece):
                found.next(mark.strip("<>"))
        else:
            what = repr(kind)[:40] if isinstance(part, dict) else type(part).__name__
            problems.append(f"turn {number} has a part of the type {what}; there are text, image, audio and video.")
            continue
        apart = text and (medium or shown) and not text.endswith("\n") and not piece.startswith("\n")
        text, shown = text + "\n" * bool(apart) + piece, bool(medium)
    return text


def by_url(problem: str) -> bool:
    """Whether that is of a medium at an address of the network, of which a file has as many as rows."""
    return problem.startswith(BY_URL)
