"""Conversations as one model's text: by its chat template or a plain prompt, and which characters are learnt."""

import re
from collections.abc import Iterable
from dataclasses import dataclass
from functools import cached_property
from itertools import takewhile
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.data import MARKS, Conversation

_PROMPTS = {  # model types without chat templates, as their authors prompt them
    "blip-2": "Question: {question} Answer:",
    "instructblip": "{question}",
    "paligemma": "{question}\n",
}
_PROMPT = "USER: {question} ASSISTANT:"  # LLaVA's
_QUESTION, _ANSWER = "\ue000", "\ue001"  # what no text has and no template cuts off
REASONED = "</think>"  # the end of reasoning
_LISTED = re.compile("['\"]type['\"]")  # of a list that a template wrote as Python or as JSON has it


@dataclass(frozen=True)
class Frame:
    """What a model's answers stand between, and how they end."""

    mark: str  # the token at which they do
    written: str  # what has to be added to each answer for that
    closing: str  # all that is learnt after an answer
    opening: str = ""  # what is learnt before the last: it stands there, but not in the generation prompt


@dataclass(frozen=True)
class Written:
    """A conversation as text."""

    text: str
    answers: tuple[tuple[int, int], ...]  # (first, one past the last) character that is learnt of each


def any_of(marks: Iterable[str]) -> re.Pattern[str]:
    """What finds any of some marks, the longest first; white space is none."""
    chosen = sorted({mark for mark in marks if mark.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, chosen)) or "(?!)")


class Prompt:
    """Writes conversations for a model without a chat template: each question in a prompt, each answer behind it."""

    def __init__(self, processor: Any, model_type: str, prompt: str | None):
        self.processor = processor
        # PaliGemma's processor ends every text in a line break by itself
        self.lined = model_type == "paligemma"
        self.prompt = prompt or _PROMPTS.get(model_type, _PROMPT)
        if self.lined:
            self.prompt = self.prompt.rstrip("\n") + "\n"
        own = processor.tokenizer.eos_token or ""
        self.known, self.marks = Frame(own, "", own), any_of([own])

    def frame(self, where: str) -> Frame:
        return self.known

    def problems(self, example: Conversation) -> list[str]:
        return []

    def write(self, example: Conversation, asked: bool = False) -> Written:
        """All of a conversation, or what is `asked`: all up to the last answer."""
        text, found = f"{example.system} " if example.system else "", []
        for number, turn in enumerate(example.turns):
            question = turn.question
            for kind, mark in MARKS.items():
                token = media_token(self.processor, kind)
                question = question.replace(f"{mark}\n" if self.lined else mark, token).replace(mark, token)
            text += self.prompt.replace("{question}", question.strip())
            if asked and number == len(example.turns) - 1:
                break
            start = len(text)
            text += f"{'' if text.endswith(chr(10)) else ' '}{turn.answer}{self.known.closing}"
            found.append((start, len(text)))
        return Written(text, tuple(found))


class Template:
    """Writes conversations by a model's chat template.

    Each is the generation prompt of its last question with the answer behind it, so that what is trained is what will
    be asked, whatever else the template would write there. Answers are found by writing stand-ins for them.
    """

    def __init__(self, processor: Any, model_type: str):
        self.processor, self.model_type = processor, model_type
        self.texts = False  # whether it takes each message as a text, and not as a list of texts and media
        self._frame: Frame | None = None
        self._system_texts: bool | None = None  # whether it takes the system's words as a text, whatever of the rest

    def problems(self, example: Conversation) -> list[str]:
        if REASONED in str(template_of(self.processor)) and any(REASONED in turn.answer for turn in example.turns):
            return [f"has reasoning ({REASONED}) in an answer, which the chat template would write otherwise. Cut it."]
        return []

    def write(self, example: Conversation, asked: bool = False) -> Written:
        """All of a conversation, or what is `asked`: all up to the last answer."""
        frame = self.frame(example.where)
        pieces = self._pieces(example)
        text, found = "", []
        for number, (piece, turn) in enumerate(zip(pieces, example.turns, strict=True)):
            text += piece
            if number == len(example.turns) - 1:
                if not asked:
                    start, text = len(text), f"{text}{frame.opening}{turn.answer}{frame.closing}"
                    found.append((start, len(text)))
                break
            start = len(text) - (len(frame.opening) if text.endswith(frame.opening) else 0)
            text += turn.answer + frame.written
            after = 0 if frame.written else _shared(frame.closing, pieces[number + 1], self.marks)
            found.append((start, len(text) + after))
        return Written(text, tuple(found))

    def _pieces(self, example: Conversation) -> list[str]:
        """The text before each answer, the last with the generation prompt.

        Raises:
            InputError: the template fails, or does not write what it is given.
        """
        messages: list[dict[str, Any]] = []
        if example.system:
            messages.append({"role": "system", "content": self._system(example.system, example.where)})
        for number, turn in enumerate(example.turns):
            messages.append({"role": "user", "content": self._content(turn.question)})
            if number < len(example.turns) - 1:
                messages.append({"role": "assistant", "content": self._content(_ANSWER)})
        pieces = self._render(messages, True, example.where).split(_ANSWER)
        if len(pieces) != len(example.turns):
            raise self._lost(example.where)
        return pieces

    def frame(self, where: str) -> Frame:
        """How answers begin and end. A template that writes no mark after an answer, as LLaVA 1.5's, gets the
        tokenizer's own: without one no end would be learnt.

        Raises:
            InputError: the template fails, or does not write what it is given.
        """
        if self._frame is None:
            whole = self._tried(where)
            before, _, after = whole.partition(_ANSWER)
            asked = self._render([{"role": "user", "content": self._content(_QUESTION)}], True, where)
            opening = before.removeprefix(asked) if before.startswith(asked) else ""
            own = self.processor.tokenizer.eos_token or ""
            found = self.marks.search(after)
            self._frame = Frame(found.group(), "", after, opening) if found else Frame(own, own, own, opening)
        return self._frame

    @cached_property
    def marks(self) -> re.Pattern[str]:  # the tokenizer's
        words = self.processor.tokenizer
        added = getattr(words, "added_tokens_decoder", {}).values()
        return any_of([*(token.content for token in added), words.eos_token or ""])

    def _tried(self, where: str) -> str:
        """A question and an answer, written with messages in the form that the template takes."""
        error = self._lost(where)
        for self.texts in (False, True):
            messages = [
                {"role": role, "content": self._content(text)}
                for role, text in (("user", _QUESTION), ("assistant", _ANSWER))
            ]
            try:
                whole = self._render(messages, False, where)
            except InputError as failed:
                error = failed
                continue
            if whole.count(_QUESTION) == whole.count(_ANSWER) == 1 and not _LISTED.search(whole):
                return whole
        raise error

    def _system(self, text: str, where: str) -> Any:
        """The system's words in the form that the template takes: some list the parts of questions alone."""
        if self._system_texts is None:
            listed = self._writes_system(self._content(_ANSWER), where)
            self._system_texts = not listed and self._writes_system(_ANSWER, where)
        return text.strip() if self._system_texts else self._content(text)

    def _writes_system(self, given: Any, where: str) -> bool:
        messages = [{"role": "system", "content": given}, {"role": "user", "content": self._content(_QUESTION)}]
        try:
            whole = self._render(messages, True, where)
        except InputError:  # told where it is written
            return False
        return whole.count(_ANSWER) == 1 and not _LISTED.search(whole)

    def _lost(self, where: str) -> InputError:
        return InputError(
            f"{where}: the chat template of {self.model_type} does not write questions and answers as they are, so "
            "that answers cannot be told apart. Give the model another chat_template."
        )

    def _render(self, messages: list[dict[str, Any]], ask: bool, where: str) -> str:
        template = template_of(self.processor)
        # answers are given without reasoning
        options = {"enable_thinking": False} if "enable_thinking" in str(template) else {}
        try:
            text = self.processor.apply_chat_template(
                messages, chat_template=template, tokenize=False, add_generation_prompt=ask, **options
            )
        except Exception as error:  # a template is a program
            raise InputError(f"{where}: the chat template of {self.model_type} fails: {error}") from None
        if not isinstance(text, str):
            raise InputError(
                f"{where}: the processor of {self.model_type} makes tokens of a conversation by itself and takes no "
                "media beside a text, so that answers cannot be told apart. Use another model."
            )
        return text

    def _content(self, text: str) -> Any:
        if not self.texts:
            return content(text)
        for kind, mark in MARKS.items():
            text = text.replace(mark, media_token(self.processor, kind))
        return text.strip()


def _shared(one: str, other: str, marks: re.Pattern[str]) -> int:
    """How many characters two texts begin with alike, of marks all or none."""
    alike = sum(1 for _ in takewhile(lambda pair: pair[0] == pair[1], zip(one, other, strict=False)))
    found = [mark.span() for text in (one, other) for mark in marks.finditer(text)]
    return min([alike, *(start for start, stop in found if start < alike < stop)])


def writer(processor: Any, model_type: str, prompt: str | None) -> Prompt | Template:
    """What writes conversations for a model: a chat template if there is one, else a prompt."""
    return Template(processor, model_type) if template_of(processor) else Prompt(processor, model_type, prompt)


def template_of(processor: Any) -> str | None:
    """The chat template of a processor, or else of its tokenizer."""
    found = getattr(processor, "chat_template", None) or getattr(processor.tokenizer, "chat_template", None)
    return found.get("default") if isinstance(found, dict) else found


def media_token(processor: Any, kind: str) -> str:
    """What stands for a picture or sound in a text; nothing where a Q-Former's processor puts it there by itself."""
    return "" if hasattr(processor, "num_query_tokens") else str(getattr(processor, f"{kind}_token", MARKS[kind]))


def content(question: str) -> list[dict[str, str]]:
    """A question's text and marks as a chat template's content."""
    found: list[dict[str, str]] = []
    rest = question
    while rest:
        at, kind = min(((rest.find(mark), kind) for kind, mark in MARKS.items() if mark in rest), default=(-1, ""))
        text, rest = (rest, "") if at < 0 else (rest[:at], rest[at + len(MARKS[kind]) :])
        if text.strip():
            found.append({"type": "text", "text": text.strip()})
        if kind:
            found.append({"type": kind})
    return found
