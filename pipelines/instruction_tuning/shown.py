"""A conversation as a model reads it: the text of its tokens, those that are learnt marked."""

from collections.abc import Iterator
from itertools import groupby

from equipoise.pipelines.instruction_tuning.data import Conversation
from equipoise.pipelines.instruction_tuning.talk import IGNORED, Talk

MARKED = "⟦{}⟧"  # what is learnt
_REPEATED = 4  # times that a token follows itself, from which on it is counted: a picture is hundreds


def as_read(example: Conversation, talk: Talk) -> str:
    """Where a conversation is from, how much it is, and its text.

    Raises:
        InputError: the processor does not take it.
    """
    batch = talk.training_batch([example])
    ids, learnt = batch["input_ids"][0].tolist(), (batch["labels"][0] != IGNORED).tolist()
    text = ""
    for marked, group in groupby(zip(ids, learnt, strict=True), key=lambda item: item[1]):
        piece = "".join(_pieces([token for token, _ in group], talk))
        text += MARKED.format(piece) if marked else piece
    kind = {"image": "picture", "audio": "sound", "video": "video", "text": "picture"}[example.kind]
    media = f"{len(example.media)} {kind}{'' if len(example.media) == 1 else 's'}"
    return f"{example.where}: {media}, {len(ids)} tokens, {sum(learnt)} of them learnt\n{text}"


def _pieces(ids: list[int], talk: Talk) -> Iterator[str]:
    """The text of some tokens; of one that is repeated, how often."""
    waiting: list[int] = []
    for token, group in groupby(ids):
        count = len(list(group))
        if count < _REPEATED:
            waiting += [token] * count
            continue
        yield talk.tokenizer.decode(waiting)
        yield f"{talk.tokenizer.decode([token])}×{count}"
        waiting = []
    yield talk.tokenizer.decode(waiting)
