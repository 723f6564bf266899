"""Conversations as a model's tokens: text and media by its processor, and which tokens are answers."""

import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.data import MARKS, Conversation, Turn
from equipoise.pipelines.instruction_tuning.media import Frames, Video, open_picture, open_sound, open_video
from equipoise.pipelines.instruction_tuning.novideos import NoVideos
from equipoise.pipelines.instruction_tuning.writing import REASONED, Frame, Written, any_of, writer
from equipoise.pipelines.media.pictures import size_of
from equipoise.pipelines.media.reading import MediaError
from equipoise.pipelines.media.sounds import seconds as sound_seconds

IGNORED = -100  # the label of a token that is no answer's, as everywhere in transformers
_KNOWN = 1 << 17  # conversations whose answers' places are remembered
# what a batch has one of for each token, and data.max_tokens cuts, by name: media can be as wide by chance
PER_TOKEN = (
    "input_ids",
    "attention_mask",
    "token_type_ids",
    "mm_token_type_ids",
    "moe_mm_token_type_ids",
    "cross_attention_mask",
    "labels",
)


class Talk:
    """Turns conversations into batches for one model."""

    def __init__(
        self,
        processor: Any,
        model_type: str,
        prompt: str | None = None,  # replaces the model type's own where there is no chat template
        max_tokens: int | None = None,
        frames: Frames | None = None,  # of videos
        no_videos: str = "",  # why none can be taken, although the model takes them
    ):
        self.frames, self.no_videos = frames or Frames(), no_videos
        self.processor, self.model_type, self.max_tokens = processor, model_type, max_tokens
        self.tokenizer = processor.tokenizer
        if getattr(self.tokenizer, "pad_token", None) is None:
            self.tokenizer.pad_token = self.tokenizer.eos_token
        self.writer = writer(processor, model_type, prompt)
        listener = getattr(processor, "feature_extractor", None) or getattr(processor, "audio_processor", None)
        self.rate: int = getattr(listener, "sampling_rate", 16_000)  # samples per second
        # a Q-Former's processor puts the one picture before the text by itself
        self.leads = hasattr(processor, "num_query_tokens")
        # PaliGemma's ends every text in a line break by itself, and the model reads a question both ways
        self.prefixed = model_type == "paligemma"
        # some want the pictures of each conversation in a list of its own
        self.nested = any(
            hasattr(sys.modules[type(part).__module__], "make_nested_list_of_images")
            for part in (processor, getattr(processor, "image_processor", None))
        )
        # the longest sound, where the extractor cuts longer ones off without a word
        whole = getattr(processor, "audio_kwargs", {}).get("truncation") is False
        samples: int | None = None if whole else getattr(listener, "n_samples", None)
        self.window = samples / self.rate if samples else None  # seconds
        added = getattr(self.tokenizer, "added_tokens_decoder", {}).values()
        self._marks = any_of(token.content for token in added if token.special)
        self._spans: dict[Conversation, list[tuple[int, int]]] = {}
        # of pictures of these sizes, and so many in each turn: tokens beside the text's own
        self._of_sizes: dict[tuple[tuple[tuple[int, int], ...], tuple[int, ...]], int] = {}

    def problems(self, example: Conversation) -> list[str]:
        """Why this model cannot take a conversation, all of it."""
        found = []
        takes = self.kinds
        if example.kind != "text" and example.kind not in takes:
            found.append(self._not_taken(example.kind))
        elif example.kind == "video" and self.no_videos:
            found.append(self.no_videos)
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
        found += self.writer.problems(example)
        if example.kind == "audio" and self.window is not None:
            for path in example.media:
                if (seconds := sound_seconds(path)) > self.window:
                    found.append(
                        f"audio {path} lasts {seconds:.1f} s, and {self.model_type} takes only the first "
                        f"{self.window:g}. Cut it into pieces."
                    )
        return found

    def _not_taken(self, kind: str) -> str:
        if kind == "video" and getattr(self.processor, "video_processor", None) is not None:
            return (
                f"has a video, for which the processor of {self.model_type} needs the package torchvision. pip install "
                "torchvision."
            )
        one = "a video" if kind == "video" else f"an {kind}"
        return f"has {one}, but {self.model_type} takes {' or '.join(self.kinds)}."

    @property
    def kinds(self) -> list[str]:
        """What this model takes beside text."""
        parts = (
            *(("image", "image_processor"), ("audio", "feature_extractor"), ("audio", "audio_processor")),
            ("video", "video_processor"),
        )
        return list(dict.fromkeys(kind for kind, part in parts if self._has(part)))

    def _has(self, part: str) -> bool:
        found = getattr(self.processor, part, None)
        return found is not None and not isinstance(found, NoVideos)

    def text(self, example: Conversation, asked: bool = False) -> str:
        """All of a conversation, or what is `asked`: all up to the last answer."""
        return self.written(example, asked).text

    def written(self, example: Conversation, asked: bool = False) -> Written:
        """The text, and where in it the answers are that are learnt."""
        return self.writer.write(example, asked)

    def frame(self, example: Conversation) -> Frame:
        """What answers stand between."""
        return self.writer.frame(example.where)

    def end(self, example: Conversation) -> int | None:
        """The token that ends an answer, at which generation has to end: a right answer runs on where it does not."""
        mark = self.frame(example).mark
        return self.tokenizer.convert_tokens_to_ids(mark) if mark else None

    def answered(self, example: Conversation, ids: Sequence[int]) -> str:
        """Of the tokens that a model generated the answer: templates have some begin with more, such as a channel."""
        ids, opening = list(ids), self.tokens(self.frame(example).opening)
        rest = ids[len(opening) :] if ids[: len(opening)] == opening else ids
        return self.unreasoned(example, self.tokenizer.decode(rest, skip_special_tokens=True))

    def unreasoned(self, example: Conversation, text: str) -> str:
        """Of what was answered what stands behind the reasoning, where the template has answers begin with one."""
        return (text.rpartition(REASONED)[2] if REASONED in self.frame(example).opening else text).strip()

    def spans(self, example: Conversation) -> list[tuple[int, int]]:
        """Where the answers are: (first token, one past the last), both counted from the end of the conversation.

        From the end, for how many tokens a picture before them takes only the processor knows.
        """
        if (known := self._spans.get(example)) is not None:
            return known
        written, found = self.written(example), []
        full, tokens = written.text, self.tokens(written.text)
        for turn, (start, stop) in enumerate(written.answers):
            opened, closed = full[:start], full[:stop]
            if _marked(example.turns[turn + 1 :]):
                length = self._length(example, full)
                before, after = (self._before(example, text, turn + 1) for text in (opened, closed))
                found.append((length - before, length - after))
                continue
            begin = self.tokens(opened)
            shared = next((i for i, (a, b) in enumerate(zip(begin, tokens, strict=False)) if a != b), len(begin))
            found.append((len(tokens) - shared, len(tokens) - len(self.tokens(closed))))
        if len(self._spans) >= _KNOWN:  # a stream has no end
            self._spans.clear()
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

    def measured_length(self, example: Conversation) -> int:
        """`full_length`, where pictures of sizes that were met before are not processed again: how many tokens they
        are is known, and that the processor takes them. To a few tokens, for it may join text where it has put them.

        Raises:
            InputError: the processor refuses the conversation.
        """
        try:
            sizes = [size_of(path) for path in example.media] if example.kind == "image" else []
        except MediaError:  # which is reported where it is opened
            sizes = []
        if not sizes:
            return self.full_length(example)
        text = self.text(example)
        key, own = (tuple(sizes), tuple(_marked([turn]) for turn in example.turns)), len(self.tokens(text))
        if key not in self._of_sizes:
            if len(self._of_sizes) >= _KNOWN:
                self._of_sizes.clear()
            self._of_sizes[key] = self._length(example, text) - own
        return own + self._of_sizes[key]

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
            batch |= {name: batch[name][:, : self.max_tokens] for name in PER_TOKEN if name in batch}
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
        texts = [self.text(example, asked=True) for example in examples]
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
            given["images"] = pictures if self.nested else [picture for some in pictures for picture in some]
        elif kind == "audio":
            opener = partial(open_sound, rate=self.rate)
            given["audio"] = [_opened(opener, e, p) for e, some in zip(examples, media, strict=True) for p in some]
            given["sampling_rate"] = self.rate
        elif kind == "video":
            opener = partial(open_video, wanted=self.frames)
            some = [_opened(opener, e, p) for e, some in zip(examples, media, strict=True) for p in some]
            given |= _shown(some)
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
            lengths = kind == "video" and len(texts) > 1 and self.frames.rate is not None
            more = " Set data.fps= for data.frames frames of every video, whatever its length." * lengths
            what = f"the processor of {self.model_type} does not take this ({reason}).{more}"
            raise InputError(f"{where}: {what}") from error
        if not batch["attention_mask"][:, -1 if side == "left" else 0].all():
            raise InputError(
                f"model.path: the processor of {self.model_type} does not pad on the {side} when asked to, so that "
                "answers cannot be told from questions. Use train.batch=1 and samples.batch=1."
            )
        batch = {name: torch.as_tensor(value) for name, value in batch.items() if name != "video_metadata"}
        # Llama 4's gives pixels in 16 bits
        batch |= {name: value.float() for name, value in batch.items() if value.is_floating_point()}
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


def _marked(turns: Sequence[Turn]) -> int:
    """How many media stand in some turns."""
    return sum(turn.question.count(mark) for turn in turns for mark in MARKS.values())


def _unmarked(question: str, kind: str) -> str:
    return question.replace(MARKS.get(kind, "\0"), "")


def _shown(videos: Sequence[Video]) -> dict[str, Any]:
    """What processors take videos as, with when each frame is shown."""
    from transformers.video_utils import VideoMetadata

    about = []
    for video in videos:
        count = len(video.frames)
        # frames in the middles of parts: every second one of twice as many
        rate, places = 2 * count / video.seconds, [2 * index + 1 for index in range(count)]
        width, height = video.frames[0].size
        about.append(VideoMetadata(2 * count, rate, width, height, video.seconds, frames_indices=places))
    pixels = [np.stack([np.asarray(frame) for frame in video.frames]) for video in videos]
    return {"videos": pixels, "video_metadata": about, "do_sample_frames": False}


def _opened(opener: Callable[[Path], Any], example: Conversation, path: Any) -> Any:
    if not isinstance(path, Path):
        return path
    try:
        return opener(path)
    except InputError as error:
        raise InputError(f"{example.where}: {error}") from None
