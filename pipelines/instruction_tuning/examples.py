"""The conversations of a configuration, the drawn ones too, as a model can take them."""

import hashlib
import json
import re
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path

import transformers

from equipoise import __version__
from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig, InstructionTuningSamples
from equipoise.pipelines.instruction_tuning.data import MARKS, Conversation, Turn, read_all
from equipoise.pipelines.instruction_tuning.model import source
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.progress import progress

_NAMED = 20  # problems that are listed one by one, and kinds of the others
_measured: dict[Path, list[str]] = {}  # of what is to be kept, where → what was said of it
_NEAR = 16  # tokens from a limit, for each medium, within which a length has to be exact
_VARYING = re.compile(r"'[^']*'|\"[^\"]*\"|\S*[/\\]\S*|\d[\d.,]*")  # what differs between two problems of a kind


def load_examples(
    config: InstructionTuningConfig,
    talk: Talk,
    tell: Callable[[str], object] = print,
    limit: int | None = None,
    measured: bool = False,
) -> tuple[list[Conversation], list[Conversation], list[str]]:
    """(training examples, held-out ones, everything that is wrong, with file and line).

    Args:
        tell: takes warnings, and with data.skip_bad what is left out.
        limit: the most tokens that the model has positions for; None where there is no most.
        measured: whether every conversation is processed once, also where nothing would be cut or left out.
    """
    data = config.data
    if data.file == demo.NAME:
        data = data.model_copy(update={"file": str(demo.questions_file(Path(config.runs)))})
    left_out: list[str] = []
    drawn, skip = config.data.file == demo.NAME, data.skip_bad
    if data.streaming:
        from equipoise.pipelines.instruction_tuning.streaming import read_beginning

        kept, held, problems, wrong = read_beginning(config, talk, unpacked(config.runs))
        (left_out if skip else problems).extend(wrong)
    else:
        lenient = left_out if skip else None
        kept, held, problems = read_all(data, not drawn, talk.problems, lenient, unpacked(config.runs))
    if measured or (not problems and (talk.max_tokens or skip)):
        bad = _known_or_measured(config, [*kept, *held], talk, tell, limit)
        wrong = list(dict.fromkeys(bad.values()))
        if skip:
            left_out += wrong
            kept, held = ([example for example in some if example not in bad] for some in (kept, held))
        else:
            problems += wrong
    if left_out:
        tell("\n".join(["left out, for it cannot be used:", *summarized(left_out)]))
    files, there = [data.file, *data.more], {example.source for example in kept}
    for number, file in enumerate(files if data.weights and not problems else []):
        if number not in there:
            problems.append(f"data.weights: {file} has no conversation to train on. Leave it out.")
    if skip and not problems and not (kept and held):
        problems.append(f"{data.file}: no conversation is left to {'train on' if not kept else 'judge by'}.")
    return kept, held, summarized(problems)


def _known_or_measured(
    config: InstructionTuningConfig,
    examples: list[Conversation],
    talk: Talk,
    tell: Callable[[str], object],
    limit: int | None,
) -> dict[Conversation, str]:
    """`unusable`; that all are good is kept beside the runs, so that the next run on the same need not look again."""
    kept = Path(config.runs) / ".cache" / "measured" / _digest(config, examples, talk, limit)
    told: list[str] = []
    with suppress(OSError, ValueError):
        told = json.loads(kept.read_text())
        for text in told:
            tell(text)
        return {}
    bad = unusable(examples, talk, lambda text: (told.append(text), tell(text)), limit)
    if not bad:
        _measured[kept] = told
        keep_measured()
    return bad


def keep_measured() -> None:
    """Writes down which conversations were found to be good, where there is a folder of runs: a check makes none."""
    for kept in [kept for kept in _measured if kept.parents[2].is_dir()]:
        told = _measured.pop(kept)
        with suppress(InputError, OSError):
            kept.parent.mkdir(parents=True, exist_ok=True)
            write_atomic(kept, json.dumps(told))


def _digest(config: InstructionTuningConfig, examples: list[Conversation], talk: Talk, limit: int | None) -> str:
    """What tells these conversations, this processor and these lengths from others."""
    media = {path for example in examples for path in example.media}
    files = [*media, *(path for path in Path(source(config.model.path)).glob("*") if path.suffix != ".safetensors")]
    found = {str(path): path.stat() for path in files if path.is_file()}
    stats = sorted((name, stat.st_size, stat.st_mtime_ns) for name, stat in found.items())
    words = [(e.kind, [str(path) for path in e.media], e.turns, e.system, e.where) for e in examples]
    model = config.model.model_dump(), repr(talk.processor), talk.frames, talk.max_tokens, config.data.prompt, limit
    known = repr((__version__, transformers.__version__, model, stats, words))
    return hashlib.blake2b(known.encode(), digest_size=16).hexdigest()


def unpacked(runs: str) -> Path:
    """Where media go that are inside of a file of conversations: to those of other runs, each once."""
    return Path(runs) / ".cache" / "media"


def summarized(problems: Sequence[str]) -> list[str]:
    """The first of many problems, and how many of each kind there are besides."""
    if len(problems) <= 2 * _NAMED:
        return list(problems)
    kinds: dict[str, list[str]] = {}
    for problem in problems[_NAMED:]:
        kinds.setdefault(_VARYING.sub("…", problem), []).append(problem)
    most = sorted(kinds.values(), key=len, reverse=True)
    lines = [f"and {len(some):,} more like this one: {some[0]}" for some in most[:_NAMED]]
    rest = sum(map(len, most[_NAMED:]))
    return [*problems[:_NAMED], *lines, *([f"and {rest:,} more of other kinds."] if rest else [])]


def unusable(
    examples: list[Conversation], talk: Talk, tell: Callable[[str], object], limit: int | None = None
) -> dict[Conversation, str]:
    """Which conversations the processor refuses, lose all their answers to data.max_tokens, or are longer than the
    model's positions, each with a sentence; `tell` is called with other losses. Processes each of them, but
    not pictures of sizes that were met before."""
    problems, cut = {}, 0
    for example in progress("measuring", "conversation", examples):
        problem, is_cut = too_long(example, talk, limit)
        cut += is_cut
        if problem:
            problems[example] = problem
    if cut and not problems:
        tell(
            f"{cut} of {len(examples)} conversations are longer than {talk.max_tokens} tokens and are cut at their "
            "ends, before a picture or sound that does not fit."
        )
    return problems


def too_long(example: Conversation, talk: Talk, limit: int | None) -> tuple[str, bool]:
    """(why the processor or the lengths let a conversation not be trained on, or nothing; whether it is cut)."""
    most = talk.max_tokens
    try:
        length, near = talk.measured_length(example), _NEAR * max(1, len(example.media))
        # whatever is said of a length is exact
        if any(length + near >= some for some in (most, limit) if some is not None):
            length = talk.full_length(example)
        if limit is not None and min(length, most or length) > limit:
            return (
                f"{example.where}: has {length} tokens, and {talk.model_type} has positions for {limit}. Set "
                f"data.max_tokens={limit}, or shorten it."
            ), False
        if most is None or length <= most:
            return "", False
        if length - talk.spans(example)[0][0] >= most:
            return (
                f"{example.where}: has {length} tokens, and data.max_tokens={most} cuts its answers away entirely. "
                "Raise it, or shorten what comes before."
            ), True
        return "", True
    except InputError as error:
        return str(error), False


def unanswerable(held: list[Conversation], talk: Talk, samples: InstructionTuningSamples, limit: int) -> list[str]:
    """Whether the positions end before an answer may, a sentence."""
    longest = max((talk.asked_length(example) for example in held[: samples.count]), default=0)
    if longest + samples.max_new_tokens <= limit:
        return []
    return [
        f"samples.max_new_tokens: {samples.max_new_tokens} tokens after a question of up to {longest} are more than "
        f"the {limit} that {talk.model_type} has positions for. Set at most {max(1, limit - longest)}."
    ]


def asked_of(held: list[Conversation], samples: InstructionTuningSamples, most: int) -> list[Conversation]:
    """Held-out conversations; or prompts of one's own asked of the first held-out media, about `most` in all, to be
    judged by eye."""
    if not samples.prompts:
        return held[: samples.count]
    few = ([e for e in held if e.media] or held)[: max(1, most // len(samples.prompts))]
    return [
        Conversation(
            e.kind, e.media, (Turn("\n".join([*(MARKS[e.kind] for _ in e.media), prompt]), ""),), e.system, e.where
        )
        for prompt in samples.prompts
        for e in few
    ]
