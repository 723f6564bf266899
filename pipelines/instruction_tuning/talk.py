"""Conversations as a processor's text and a model's tokens: chat templates, media, and which tokens are answers."""

import re
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.data import MARKS, Conversation, Turn
from equipoise.pipelines.instruction_tuning.media import open_picture, open_sound
from equipoise.pipelines.media.sounds import seconds as sound_seconds

IGNORED = -100  # the label of a token that is no answer's, as everywhere in transformers
_PROMPTS = {  # model types without chat templates, as their authors prompt them
    "blip-2": "Question: {question} Answer:",
    "instructblip": "{question}",
    "paligemma": "{question}\n",
}
_PROMPT = "USER: {question} ASSISTANT:"  # LLaVA's
_TEXT = (  # what a batch has one of for each token, and data.max_tokens cuts, by name: media can be as wide by chance
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "cross_attention_mask",
    "labels",
)
_NESTED = ("gemma3", "idefics2", "idefics3", "smolvlm")  # want the pictures of each conversation in a list of its own


@dataclass(frozen=True)
class Ending:
    """How a model's answers end."""

    mark: str  # the token at which they do
    written: str  # what has to be added to each answer for that
    closing: str  # all that is learnt after an answer


class Talk:
    """Turns conversations into batches for one model."""

    def __init__(
        self,
        processor: Any,
        model_type: str,
        prompt: str | None = None,  # replaces the model type's own where there is no chat template
        max_tokens: int | None = None,
    ):
        self.processor, self.model_type, self.max_tokens = processor, model_type, max_tokens
        self.tokenizer = processor.tokenizer
        self.prompt = prompt or _PROMPTS.get(model_type, _PROMPT)
        if getattr(self.tokenizer, "pad_token", None) is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        listener = getattr(processor, "feature_extractor", None)
        self.rate: int = getattr(listener, "sampling_rate", 16_000)  # samples per second
        # a Q-Former's processor puts the one picture before the text by itself
        self.leads = hasattr(processor, "num_query_tokens")
        # PaliGemma's ends every text in a line break by itself, and the model reads a question both ways
        self.prefixed = model_type == "paligemma"
        if self.prefixed:
            self.prompt = self.prompt.rstrip("\n") + "\n"
        # the longest sound, where the extractor cuts longer ones off without a word
        samples: int | None = getattr(listener, "n_samples", None)
        self.window = samples / self.rate if samples else None  # seconds
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        self._marks = _any(token.content for token in added if token.special)
        self._added = _any([*(token.content for token in added), self.tokenizer.eos_token or ""])
        self._end: Ending | None = None
        self._spans: dict[Conversation, list[tuple[int, int]]] = {}

    def problems(self, example: Conversation) -> list[str]:
        """Why this model cannot take a conversation, all of it."""
        found = []
        takes = self.kinds
        if example.kind != "text" and example.kind not in takes:
            found.append(f"has an {example.kind}, but {self.model_type} takes {' or '.join(takes)}.")
        elif self.leads and len(example.media) != 1:
            found.append(f"has {len(example.media)} pictures, but {self.model_type} takes exactly one.")
        if self.prefixed and not example.media:
            found.append(f"has no picture, but {self.model_type} takes no text alone.")
        texts = [example.system, *(_unmarked(t.question, example.kind) for t in example.turns)]
        texts += [turn.answer for turn in example.turns]
        if marks := list(dict.fromkeys(mark for text in texts for mark in self._marks.findall(text))):
            found.append(
                f"has {', '.join(marks)} in its text, which {self.model_type} reads as a mark of its own. Write it "
                "otherwise."
            )
        if example.kind == "audio" and self.window is not None:
            for path in example.media:
                if (seconds := sound_seconds(path)) > self.window:
                    found.append(
                        f"audio {path} lasts {seconds:.1f} s, and {self.model_type} takes only the first "
                        f"{self.window:g}. Cut it into pieces."
                    )
        return found

    @property
    def kinds(self) -> list[str]:
        """What this model takes beside text."""
        return [
            kind for kind, part in (("image", "image_processor"), ("audio", "feature_extractor")) if self._has(part)
        ]

    def _has(self, part: str) -> bool:
        return getattr(self.processor, part, None) is not None

    def text(self, example: Conversation, turns: int | None = None, ask: bool = False) -> str:
        """The first `turns` turns (all by default), and with `ask` the question of the next, up to its answer."""
        turns = len(example.turns) if turns is None else turns
        if self.processor.chat_template is None:
            return self._plain(example, turns, ask)
        return self._templated(example, turns, ask, self._ending(example).written)

    def _templated(self, example: Conversation, turns: int, ask: bool, end: str) -> str:
        messages: list[dict[str, Any]] = []
        if example.system:
            messages.append({"role": "system", "content": [{"type": "text", "text": example.system}]})
        for index, turn in enumerate(example.turns[: turns + ask]):
            messages.append({"role": "user", "content": _content(turn.question)})
            if index < turns:
                messages.append({"role": "assistant", "content": [{"type": "text", "text": turn.answer + end}]})
        try:
            return self.processor.apply_chat_template(messages, tokenize=False, add_generation_prompt=ask)
        except Exception as error:  # a template is a program
            raise InputError(f"{example.where}: the chat template of {self.model_type} fails: {error}") from None

    def _ending(self, example: Conversation) -> "Ending":
        """How answers end. A template that writes no mark after an answer, as LLaVA 1.5's, gets the tokenizer's own:
        without one no end would be learnt."""
        if self._end is None:
            own = self.tokenizer.eos_token or ""
            if self.processor.chat_template is None:
                self._end = Ending(own, "", own)  # which the plain prompts have
            else:
                opened, closed = (self._templated(example, 1 - ask, ask, "") for ask in (True, False))
                closing = closed.removeprefix(opened).lstrip().removeprefix(example.turns[0].answer)
                found = self._added.search(closing)
                self._end = Ending(found.group(), "", closing) if found else Ending(own, own, own)
        return self._end

    def closing(self, example: Conversation) -> str:
        """What is learnt after each answer."""
        return self._ending(example).closing

    def end(self, example: Conversation) -> int | None:
        """The token that ends an answer, at which generation has to end: a right answer runs on where it does not."""
        mark = self._ending(example).mark
        return self.tokenizer.convert_tokens_to_ids(mark) if mark else None

    def _plain(self, example: Conversation, turns: int, ask: bool) -> str:
        text = f"{example.system} " if example.system else ""
        for index, turn in enumerate(example.turns[: turns + ask]):
            question = turn.question
            for kind, mark in MARKS.items():
                token = "" if self.leads else str(getattr(self.processor, f"{kind}_token", mark))
                question = question.replace(f"{mark}\n" if self.prefixed else mark, token).replace(mark, token)
            text += self.prompt.replace("{question}", question.strip())
            if index < turns:
                text += f"{'' if text.endswith(chr(10)) else ' '}{turn.answer}{self.tokenizer.eos_token or ''}"
        return text

    def spans(self, example: Conversation) -> list[tuple[int, int]]:
        """Where the answers are: (first token, one past the last), both counted from the end of the conversation.

        From the end, for how many tokens a picture before them takes only the processor knows.
        """
        if (known := self._spans.get(example)) is not None:
            return known
        full, found = self.text(example), []
        tokens = self.tokens(full)
        for turn in range(len(example.turns)):
            opened, closed = self.text(example, turn, ask=True), self.text(example, turn + 1)
            if not (full.startswith(opened) and full.startswith(closed)):
                raise InputError(
                    f"{example.where}: the chat template of {self.model_type} writes earlier turns differently when "
                    "more follow, so that the answers cannot be told apart. Give each conversation one question."
                )
            if end := self._ending(example).written:  # what the template writes behind it is no answer's
                closed = closed[: closed.rindex(end) + len(end)]
            if _marked(example.turns[turn + 1 :]):
                length = self._length(example, full)
                before, after = (self._before(example, text, turn + 1) for text in (opened, closed))
                found.append((length - before, length - after))
                continue
            begin = self.tokens(opened)
            shared = next((i for i, (a, b) in enumerate(zip(begin, tokens, strict=False)) if a != b), len(begin))
            found.append((len(tokens) - shared, len(tokens) - len(self.tokens(closed))))
        self._spans[example] = found
        return found

    def tokens(self, text: str) -> list[int]:
        return self.tokenizer(text, add_special_tokens=False).input_ids

    def length(self, example: Conversation) -> int:
        """Tokens of the text alone: what conversations are sorted by, so that little is padded."""
        return len(self.tokens(self.text(example)))

    def full_length(self, example: Conversation) -> int:
        """Tokens with the media's: opens and processes them."""
        return self._length(example, self.text(example))

    def asked_length(self, example: Conversation) -> int:
        """Tokens up to the last answer, with the media's."""
        return self.full_length(example) - self.spans(example)[-1][0]

    def _length(self, example: Conversation, text: str, turns: int | None = None) -> int:
        count = _marked(example.turns[:turns])
        media = example.media if self.leads or turns is None else example.media[:count]
        return self._process([text], [example], [media])["input_ids"].shape[1]

    def _before(self, example: Conversation, text: str, turns: int) -> int:
        """Tokens of the first turns where they are the beginning of the whole conversation, with media behind them."""
        if not self.prefixed:
            return self._length(example, text, turns)
        if not _marked(example.turns[:turns]):  # which PaliGemma's processor refuses
            return len(self.tokens(text))
        return self._length(example, text, turns) - 1  # its BOS stands behind the last picture of all

    def training_batch(
        self,
        examples: Sequence[Conversation],
        media: Sequence[Sequence[Any]] | None = None,  # opened, in place of the conversations' own
    ) -> dict[str, Tensor]:
        """Tokens, media and labels; every token that is no answer's has the label −100."""
        examples = [self.within(example) for example in examples]
        batch = self._process([self.text(example) for example in examples], examples, media, "right")
        labels = torch.full_like(batch["input_ids"], IGNORED)
        for row, example in enumerate(examples):
            real = batch["attention_mask"][row].nonzero()[:, 0]
            for begin, end in self.spans(example):
                inside = real[len(real) - begin : len(real) - end]
                labels[row, inside] = batch["input_ids"][row, inside]
        self._read_forwards(batch, [self.spans(example)[0][0] for example in examples])
        batch["labels"] = labels
        if self.max_tokens is not None:
            batch |= {name: batch[name][:, : self.max_tokens] for name in _TEXT if name in batch}
        return batch

    def within(self, example: Conversation) -> Conversation:
        """Without the turns whose media data.max_tokens would cut, and what follows them: half a picture is none."""
        for number, turn in enumerate(example.turns):
            if self.max_tokens is None or number == 0 or not _marked([turn]):
                continue
            if self.full_length(example) - self.spans(example)[number][0] >= self.max_tokens:
                turns = example.turns[:number]
                return replace(example, turns=turns, media=example.media[: _marked(turns)])
        return example

    def question_batch(self, examples: Sequence[Conversation]) -> dict[str, Tensor]:
        """Each conversation up to its last answer, padded on the left, for generation."""
        texts = [self.text(example, len(example.turns) - 1, ask=True) for example in examples]
        batch = self._process(texts, examples, side="left")
        spans = [self.spans(example) if len(example.turns) > 1 else [(0, 0)] for example in examples]
        self._read_forwards(batch, [some[0][0] - some[-1][0] for some in spans])
        return batch

    def _read_forwards(self, batch: dict[str, Tensor], last: list[int]) -> None:
        """Where a model reads both ways, only what comes before the first answer: all else would tell it the answers.
        `last` counts each row's tokens from there on."""
        if self.prefixed:
            order = batch["attention_mask"].cumsum(dim=1)
            batch["token_type_ids"] = (order > order[:, -1:] - torch.tensor(last)[:, None]).long()

    def _process(
        self,
        texts: list[str],
        examples: Sequence[Conversation],
        media: Sequence[Sequence[Any]] | None = None,
        side: str = "right",
    ) -> dict[str, Tensor]:
        media = [example.media for example in examples] if media is None else media
        kind = next((example.kind for example in examples if example.media), "text")
        given: dict[str, Any] = {}
        if kind == "image":
            pictures = [[_opened(open_picture, e, p) for p in some] for e, some in zip(examples, media, strict=True)]
            nested = self.model_type in _NESTED
            given["images"] = pictures if nested else [picture for some in pictures for picture in some]
        elif kind == "audio":
            opener = partial(open_sound, rate=self.rate)
            given["audio"] = [_opened(opener, e, p) for e, some in zip(examples, media, strict=True) for p in some]
            given["sampling_rate"] = self.rate
        if not any(media):
            given = {}
        first = getattr(self.tokenizer, "bos_token", None)
        if first and texts[0].startswith(first):  # the template's own; the tokenizer would put another before it
            given["add_special_tokens"] = False
        self.tokenizer.padding_side = side  # and in the call, for some processors have a side of their own
        closed = self.prefixed and not texts[0].endswith("\n")  # else the line break is the question's own
        texts = [text.removesuffix("\n") for text in texts] if self.prefixed else texts
        try:
            batch = dict(self.processor(text=texts, return_tensors="pt", padding=True, padding_side=side, **given))
        except (ArithmeticError, IndexError, KeyError, RuntimeError, TypeError, ValueError) as error:
            where = ", ".join(example.where for example in examples)
            reason = " ".join(str(error).split())[:300].rstrip(".")
            raise InputError(f"{where}: the processor of {self.model_type} does not take this ({reason}).") from error
        if not batch["attention_mask"][:, -1 if side == "left" else 0].all():
            raise InputError(
                f"model.path: the processor of {self.model_type} does not pad on the {side} when asked to, so that "
                "answers cannot be told from questions. Use train.batch=1 and samples.batch=1."
            )
        if self.prefixed:
            del batch["labels"]
        if closed:
            self._take_off(batch, len(self.tokens("\n")))
        if "qformer_input_ids" in batch:  # it reads the text too, and must not read the answers
            asked = [example.turns[-1].question.replace(MARKS["image"], "").strip() for example in examples]
            read = self.processor.qformer_tokenizer(asked, return_tensors="pt", padding=True)
            batch["qformer_input_ids"], batch["qformer_attention_mask"] = read["input_ids"], read["attention_mask"]
        return batch

    def _take_off(self, batch: dict[str, Tensor], count: int) -> None:
        """Takes each row's last tokens away."""
        mask = batch["attention_mask"]
        order = mask.cumsum(dim=1)
        kept = mask.bool() & (order <= order[:, -1:] - count)
        batch["input_ids"] = batch["input_ids"].where(kept, self.tokenizer.pad_token_id)[:, :-count]
        batch["attention_mask"] = kept.to(mask)[:, :-count]
        batch["token_type_ids"] = batch["token_type_ids"][:, :-count]


def _any(marks: Iterable[str]) -> re.Pattern[str]:
    """What finds any of some marks, the longest first; white space is none."""
    chosen = sorted({mark for mark in marks if mark.strip()}, key=len, reverse=True)
    return re.compile("|".join(map(re.escape, chosen)) or "(?!)")


def _marked(turns: Sequence[Turn]) -> int:
    """How many media stand in some turns."""
    return sum(turn.question.count(mark) for turn in turns for mark in MARKS.values())


def _unmarked(question: str, kind: str) -> str:
    return question.replace(MARKS.get(kind, "\0"), "")


def _opened(opener: Callable[[Path], Any], example: Conversation, path: Any) -> Any:
    if not isinstance(path, Path):
        return path
    try:
        return opener(path)
    except InputError as error:
        raise InputError(f"{example.where}: {error}") from None


def _content(question: str) -> list[dict[str, str]]:
    """A question's text and marks as a chat template's content."""
    content: list[dict[str, str]] = []
    rest = question
    while rest:
        at, kind = min(((rest.find(mark), kind) for kind, mark in MARKS.items() if mark in rest), default=(-1, ""))
        text, rest = (rest, "") if at < 0 else (rest[:at], rest[at + len(MARKS[kind]) :])
        if text.strip():
            content.append({"type": "text", "text": text.strip()})
        if kind:
            content.append({"type": kind})
    return content
