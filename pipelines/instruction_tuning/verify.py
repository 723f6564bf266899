"""The self-check before every run, on real rows: what is learnt is the answers and their ends, each picture is seen,
and a row in a batch is the row alone. What fails is refused, for each of these would train wrongly in silence."""

import re
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, nullcontext
from itertools import takewhile
from typing import Any

import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor, nn

from equipoise.coordination.norms import media_ids
from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.data import Conversation, Turn
from equipoise.pipelines.instruction_tuning.media import Video, open_picture, open_sound, open_video
from equipoise.pipelines.instruction_tuning.packing import leaks, pack
from equipoise.pipelines.instruction_tuning.quantized import is_rounded
from equipoise.pipelines.instruction_tuning.talk import IGNORED, Talk
from equipoise.pipelines.runs.run import memory_full

_EXACT, _ROUGH = 1e-3, 5e-2  # how far a loss may be from itself, as a share of it: in float32, and in 16 bits
_SHOWN = 40  # characters of an answer
_MEDIA = 3  # of a conversation that are tried

Precision = Callable[[], AbstractContextManager[Any]]


def typical(examples: Sequence[Conversation]) -> list[Conversation]:
    """The longest of some conversations, the shortest, the one with most media, and one without, each once."""

    def size(example: Conversation) -> int:  # characters
        return sum(len(turn.question) + len(turn.answer) for turn in example.turns)

    plain = [example for example in examples if not example.media]
    chosen = [max(examples, key=size), min(examples, key=size), max(examples, key=lambda e: len(e.media)), *plain[:1]]
    return [example for index, example in enumerate(chosen) if all(example is not other for other in chosen[:index])]


def token_problems(talk: Talk, examples: Sequence[Conversation], placeholders: Sequence[int] = ()) -> list[str]:
    """What is wrong with the tokens of some conversations, a sentence each. No model is needed.

    Args:
        placeholders: see `media_ids`; without any they are not looked for.
    """
    found = []
    for example in map(talk.within, examples):
        batch = talk.training_batch([example])
        ids, labels = batch["input_ids"][0], batch["labels"][0]
        learnt, wanted = (talk.tokenizer.decode(some) for some in (labels[labels != IGNORED], _wanted(talk, example)))
        cut = talk.max_tokens is not None and len(ids) >= talk.max_tokens
        opening = talk.frame(example).opening.strip()  # as an empty reasoning
        if not _alike(learnt.replace(opening, ""), wanted, cut):
            found.append(
                f"{example.where}: the loss would be on {_short(learnt)} and not on {_short(wanted)}. The processor of "
                f"{talk.model_type} writes this conversation otherwise than its text says."
            )
        if talk.end(example) is None:
            found.append(
                f"{example.where}: answers have no end, for the tokenizer of {talk.model_type} has no eos_token."
            )
        bos = talk.tokenizer.bos_token_id
        if bos is not None and ((ids[1:] == bos) & (ids[:-1] == bos)).any():
            found.append(f"{example.where}: begins with two BOS tokens ({talk.tokenizer.bos_token}).")
        if example.media and placeholders and not torch.isin(ids, torch.tensor(placeholders)).any():
            found.append(
                f"{example.where}: has {'a' if example.kind == 'video' else 'an'} {example.kind}, but the processor of "
                f"{talk.model_type} writes no token for it that the model would put it in place of. Compare "
                "processor_config.json with config.json."
            )
    return found


def model_problems(
    talk: Talk, model: nn.Module, examples: Sequence[Conversation], batch: int, precision: Precision = nullcontext
) -> list[str]:
    """What is wrong with what a model makes of some conversations, a sentence each. Leaves the model in evaluation
    mode, and random numbers as they were.

    Args:
        batch: how many conversations are trained on at a time.
        precision: what a forward pass is made in, such as autocast.
    """

    def seen(some: Sequence[Conversation], media: Sequence[Sequence[Any]] | None = None) -> tuple[Tensor, Tensor]:
        return _seen(talk, model, some, media, precision)

    found: list[str] = []
    with torch.no_grad(), torch.random.fork_rng():
        model.eval()
        alone = []
        for example in examples:
            logits, labels = seen([example])
            alone.append(_losses(logits, labels)[0])
            for number, media in enumerate(_otherwise(talk, example)):
                if torch.equal(_answers(*seen([example], [media])), _answers(logits, labels)):
                    found.append(
                        f"{example.where}: the model does not see its {example.kind} {example.media[number].name}: "
                        "noise in place of it changes nothing."
                    )
        together = list(examples[:batch])
        mixed = _losses(*seen(together)) if len(together) > 1 else []
        error = _allowed(model, precision)
        for example, loss, own in zip(together, mixed, alone, strict=False):
            if not torch.allclose(loss, own, rtol=error, atol=error, equal_nan=True):
                found.append(
                    f"{example.where}: its loss is {own:.4g} alone and {loss:.4g} in a batch of {len(together)}: "
                    f"{talk.model_type} does not take these conversations together. Use train.batch=1."
                )
    return found


def packing_problems(
    talk: Talk, model: Any, examples: Sequence[Conversation], precision: Precision = nullcontext
) -> list[str]:
    """A sentence where a model does not read conversations in one row as it reads them in rows of their own."""
    some = [*examples, *examples][: max(2, len(examples))]
    # first one of text, so that media stand elsewhere in the row than in their conversations: some models take the one
    # for the other
    mixed = [Conversation("text", (), (Turn("?", "."),), where=some[0].where), *some]
    some = some if any(talk.problems(example) for example in mixed) else mixed
    advice = f"{talk.model_type} does not read them apart. Use train.packing=false."
    with torch.random.fork_rng():
        model.eval()
        batch = _batch(talk, model, some, None)
        packed = pack(batch, batch["labels"].numel(), model)
        with torch.no_grad():
            apart = _logits(talk, model, some, batch, precision)
            together = packed.padded(_logits(talk, model, some, packed.batch, precision))
        answers = batch["labels"] != IGNORED
        error = (together - apart)[answers].float().abs().max() / apart[answers].float().std()
        if not error <= _allowed(model, precision):
            return [f"train.packing: what is answered is another in a row with other conversations: {advice}"]
        with precision():
            if leaks(model, packed):
                return [f"train.packing: an answer depends on the conversation before it in its row: {advice}"]
    return []


def summary(talk: Talk, examples: Sequence[Conversation], seen: bool) -> str:
    """What the self-check found, where all is well.

    Args:
        seen: whether a model was asked, too.
    """
    learnt = []
    for example in examples:
        labels = talk.training_batch([example])["labels"][0]
        learnt.append(_short(talk.tokenizer.decode(labels[labels != IGNORED])))
    rows = "1 row" if len(learnt) == 1 else f"{len(learnt)} rows"
    text = f"labels of {rows}: {', '.join(learnt)}"
    if seen and (count := sum(min(_MEDIA, len(talk.within(example).media)) for example in examples)):
        text += f"; {count} of {count} media change what is answered"
    return text + ("; each row's loss in a batch is its own." if seen and len(examples) > 1 else ".")


def verify(
    talk: Talk,
    model: Any,
    examples: Sequence[Conversation],
    batch: int,
    precision: Precision = nullcontext,
    packing: bool = False,
) -> str:
    """The whole self-check of some typical conversations; gives what it found in a sentence. With `packing` also that
    conversations in one row are read apart.

    Raises:
        InputError: one of them would be trained on wrongly, or the model does not take it.
    """
    rows = typical(examples)
    problems = token_problems(talk, rows, media_ids(model.config)) or model_problems(
        talk, model, rows, batch, precision
    )
    if packing and not problems:
        problems = packing_problems(talk, model, rows, precision)
    if problems:
        raise InputError("\n".join(problems))
    apart = "Conversations in one row do not see each other." if packing else ""
    return " ".join(filter(None, [summary(talk, rows, seen=True), apart, endless(talk, examples)]))


def endless(talk: Talk, examples: Sequence[Conversation]) -> str:
    """A sentence where answers before a last one are learnt without an end, for the template writes another there than
    after the last; empty where they have one."""
    for example in (example for example in examples if len(example.turns) > 1):
        if all(talk.writer.marks.search(end) for end in _ends(talk, example)):
            return ""
        return (
            f"Of {example.where} the answers before the last are learnt without an end: the chat template of "
            f"{talk.model_type} writes {_short(talk.frame(example).mark)} after the last answer alone."
        )
    return ""


def _wanted(talk: Talk, example: Conversation) -> list[int]:
    """The answers and what is written after each, as tokens."""
    ends = _ends(talk, example)
    return [token for turn, end in zip(example.turns, ends, strict=True) for token in talk.tokens(turn.answer + end)]


def _ends(talk: Talk, example: Conversation) -> list[str]:
    """What ends each answer: after the last the whole end, and after others as much of it as the text goes on with, for
    some templates close a conversation otherwise than its turns. Where labels end is not asked: it is what is tried."""
    frame, written, found = talk.frame(example), talk.written(example), []
    units = re.compile(f"{talk.writer.marks.pattern}|.", re.DOTALL).finditer  # of marks all or none
    for turn, (start, _) in zip(example.turns, written.answers, strict=True):
        rest = written.text[start:].removeprefix(frame.opening).partition(turn.answer)[2]
        pairs = ((one.group(), other.group()) for one, other in zip(units(frame.closing), units(rest), strict=False))
        found.append("".join(one for one, _ in takewhile(lambda pair: pair[0] == pair[1], pairs)))
    return [*found[:-1], frame.closing]


def _alike(learnt: str, wanted: str, cut: bool) -> bool:
    """Whether two texts are the same, or one the beginning of the other, but for white space."""
    one, other = ("".join(text.split()) for text in (learnt, wanted))
    return other.startswith(one.rstrip("\ufffd")) if cut else one == other  # which half a character is decoded to


def _otherwise(talk: Talk, example: Conversation) -> Iterator[list[Any]]:
    """A conversation's media with noise in place of one of them, for each of the first."""
    noise = torch.Generator().manual_seed(0)
    example = talk.within(example)
    for number, path in enumerate(example.media[:_MEDIA]):
        if example.kind == "video":
            frames, seconds = open_video(path, talk.frames)
            other: Any = Video([_noise(frame.size, noise) for frame in frames], seconds)
        elif example.kind == "audio":
            count = len(open_sound(path, talk.rate))
            other = (torch.randn(count, generator=noise) / 4).clamp(-1, 1).numpy()
        else:
            other = _noise(open_picture(path).size, noise)
        yield [*example.media[:number], other, *example.media[number + 1 :]]


def _noise(size: tuple[int, int], source: torch.Generator) -> Image.Image:
    width, height = size
    return Image.fromarray(torch.randint(256, (height, width, 3), generator=source, dtype=torch.uint8).numpy())


def _seen(
    talk: Talk,
    model: Any,
    examples: Sequence[Conversation],
    media: Sequence[Sequence[Any]] | None,
    precision: Precision,
) -> tuple[Tensor, Tensor]:
    """(logits, labels) of a batch, each for the token after.

    Raises:
        InputError: the model refuses it.
    """
    batch = _batch(talk, model, examples, media)
    return _logits(talk, model, examples, batch, precision)[:, :-1], batch["labels"][:, 1:]


def _batch(
    talk: Talk, model: nn.Module, examples: Sequence[Conversation], media: Sequence[Sequence[Any]] | None
) -> dict[str, Tensor]:
    device = next(model.parameters()).device
    return {name: value.to(device) for name, value in talk.training_batch(examples, media).items()}


def _logits(
    talk: Talk, model: Any, examples: Sequence[Conversation], batch: dict[str, Tensor], precision: Precision
) -> Tensor:
    try:
        with precision():
            return model(**{k: v for k, v in batch.items() if k != "labels"}, use_cache=False).logits
    except Exception as error:  # whatever a model makes of what it does not expect
        if memory_full(error):
            raise
        where = ", ".join(example.where for example in examples)
        reason = " ".join(str(error).split())[:300].rstrip(".")
        raise InputError(
            f"{where}: the model does not take what its processor makes of this ({reason}). Compare "
            "processor_config.json with config.json: they have to be of one model."
        ) from error


def _answers(logits: Tensor, labels: Tensor) -> Tensor:
    return logits[labels != IGNORED]


def _losses(logits: Tensor, labels: Tensor) -> list[Tensor]:
    """The mean loss of each row's answers."""
    return [
        F.cross_entropy(row[wanted != IGNORED].float(), wanted[wanted != IGNORED])
        for row, wanted in zip(logits, labels, strict=True)
    ]


def _allowed(model: nn.Module, precision: Precision) -> float:
    """How far a loss may be from itself."""
    one = next(parameter for parameter in model.parameters() if parameter.is_floating_point())
    with precision():
        if is_rounded(model):
            return _ROUGH
        return _ROUGH if one.dtype != torch.float32 or torch.is_autocast_enabled(one.device.type) else _EXACT


def _short(text: str) -> str:
    return repr(text if len(text) <= _SHOWN else text[: _SHOWN // 2] + "…" + text[-_SHOWN // 2 :])
