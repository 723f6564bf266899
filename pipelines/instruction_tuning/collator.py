"""The batches of this pipeline for a Trainer of one's own."""

from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path
from typing import Any

from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.data import Conversation, conversation
from equipoise.pipelines.instruction_tuning.media import Frames
from equipoise.pipelines.instruction_tuning.model import load_processor, model_type, no_videos
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.instruction_tuning.verify import Precision, verify


class AnswerCollator:
    """Makes batches of conversations in which the loss is on the answers and their ends, and on nothing else.

    A batch has what the model's processor makes of texts and media, padded on the right, and `labels` with −100 for all
    that is no answer's. Conversations are records in any of the pipeline's formats, TRL's columns among them, such as
    `{"image": "a.png", "conversations": [{"from": "human", "value": "<image>\\nWhat is it?"},
    {"from": "gpt", "value": "A star."}]}`, or what `read_examples` gives:

        collator = AnswerCollator("llava-hf/llava-1.5-7b-hf", folder="pictures")
        print(collator.verify(model, records, batch=8))
        arguments = TrainingArguments("out", remove_unused_columns=False)  # else it takes the media away
        Trainer(model, arguments, train_dataset=records, data_collator=collator).train()

    A Trainer's own loss is averaged over a batch's tokens; the pipeline's is averaged over each conversation first.

    Args:
        model: a folder of transformers, or a hub id.
        folder: where the media's paths start.
        prompt: for models without a chat template: the text before an answer, with {question} in it.
        max_tokens: the longest sequence, media included; a longer one is cut at its end.
        revision: on the hub: a branch, tag or commit.
        min_pixels: the least pixels that a picture is enlarged to, for processors that count them.
        max_pixels: the most pixels that a picture is reduced to, likewise.
        fps: the frames that are taken of a second of video; None: as many of each.
        frames: the most frames of a video.

    Raises:
        InputError: there is no processor for media.
    """

    def __init__(
        self,
        model: str,
        folder: str | Path = ".",
        prompt: str | None = None,
        max_tokens: int | None = None,
        revision: str | None = None,
        min_pixels: int | None = None,
        max_pixels: int | None = None,
        fps: float | None = 1.0,
        frames: int = 16,
    ):
        section = InstructionTuningModel(
            path=str(model), revision=revision, quantize=None, shard=False, min_pixels=min_pixels, max_pixels=max_pixels
        )
        self.folder = Path(folder)
        processor = load_processor(section)
        no = no_videos(processor, section)
        self.talk = Talk(processor, model_type(section), prompt, max_tokens, Frames(fps, frames), no)

    def __call__(self, examples: Sequence[Any]) -> dict[str, Tensor]:
        """A batch.

        Raises:
            InputError: what is wrong with a record or its media, or that the model cannot take it.
        """
        return self.talk.training_batch(self._conversations(examples))

    def verify(self, model: Any, examples: Sequence[Any], batch: int, precision: Precision = nullcontext) -> str:
        """The self-check of a run, on a few of some conversations: what it found, in a sentence.

        Args:
            batch: how many conversations are trained on at a time.
            precision: what a forward pass is made in, such as autocast.

        Raises:
            InputError: one would be trained on wrongly.
        """
        return verify(self.talk, model, self._conversations(examples), batch, precision)

    def _conversations(self, examples: Sequence[Any]) -> list[Conversation]:
        return [self._conversation(example, number) for number, example in enumerate(examples, 1)]

    def _conversation(self, example: Any, number: int) -> Conversation:
        if not isinstance(example, Conversation):
            example = conversation(example, self.folder, f"conversation {number}")
        if problems := self.talk.problems(example):
            raise InputError("\n".join(f"{example.where}: {problem}" for problem in problems))
        return example
