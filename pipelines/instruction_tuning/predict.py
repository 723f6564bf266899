"""A run's answers: to questions about media that nobody has labelled, and, judged, to labelled conversations."""

# peft annotates too narrowly.
# pyright: reportArgumentType=false

import csv
import sys
from collections.abc import Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch

from equipoise.coordination.components import architecture
from equipoise.errors import InputError
from equipoise.pipelines.files import first_line
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig, InstructionTuningData
from equipoise.pipelines.instruction_tuning.data import (
    MARKS,
    Conversation,
    Turn,
    conversation,
    read_examples,
    without_marks,
)
from equipoise.pipelines.instruction_tuning.evaluate import METRICS, Answer, answer, answer_loss, mean
from equipoise.pipelines.instruction_tuning.examples import summarized, unanswerable, unusable
from equipoise.pipelines.instruction_tuning.formats.dialects import as_llava
from equipoise.pipelines.instruction_tuning.formats.embedded import MediaFolder, is_passing
from equipoise.pipelines.instruction_tuning.formats.rows import FileError
from equipoise.pipelines.instruction_tuning.formats.sources import rows
from equipoise.pipelines.instruction_tuning.formats.texts import COLUMNS, ENCODING
from equipoise.pipelines.instruction_tuning.media import Frames, media_problem
from equipoise.pipelines.instruction_tuning.model import load_model, load_processor, model_type, positions
from equipoise.pipelines.instruction_tuning.result import load_result, missing
from equipoise.pipelines.instruction_tuning.served import Server
from equipoise.pipelines.instruction_tuning.talk import IGNORED, Talk
from equipoise.pipelines.media import pictures, sounds, videos
from equipoise.pipelines.pipeline import Predictions, refuse
from equipoise.pipelines.progress import progress

_TABLES = (".csv", ".json", ".jsonl")
_ANSWERED = {"prompt": "completion", "instruction": "output", "query": "response"}  # what is asked → its answer


def predict(
    run: Path, config: InstructionTuningConfig, source: Path, prompts: Sequence[str], server: str | None = None
) -> Predictions:
    """Answers to every question about every medium, in their order.

    Args:
        source: a picture or sound, a folder of them, or a table of questions: CSV with the columns image or audio and
            question, or JSON as for training, where the last answer may be missing and is not read.
        prompts: asked in place of a table's questions; empty: those, or else samples.prompts.
        server: the URL of one that has what the run exports, and answers in place of this process: see `Server`.

    Raises:
        InputError: there is no result, or all that is wrong with what is asked.
    """
    tuned = _Tuned(run, config, server)
    examples = _to_ask(source, prompts or ([] if source.suffix in _TABLES else config.samples.prompts), tuned.talk)
    return Predictions([_row(found) for found in tuned.answers(examples)])


def evaluate(run: Path, config: InstructionTuningConfig, file: Path, server: str | None = None) -> Predictions:
    """Answers to the last question of every labelled conversation, judged by samples.metric, and the mean loss, which a
    server does not tell.

    The conversations are read as the run's own were: with its data.folder, data.question and data.max_tokens, and
    with data.skip_bad without those that cannot be used.

    Raises:
        InputError: there is no result, or all that is wrong with the conversations.
    """
    tuned = _Tuned(run, config, server)
    examples = _labelled(file, config.data, tuned.talk)
    answers = tuned.answers(examples)
    rows = [_row(found) | {"wanted": "|".join(found.wanted), "score": found.score} for found in answers]
    metric = config.samples.metric
    meaning = f"Score: {METRICS[metric]} ({len(answers)} question{'s' * (len(answers) != 1)})."
    loss = {} if server else {"loss": tuned.loss(examples)}
    return Predictions(rows, {"score": mean(answers), **loss}, meaning)


class _Tuned:
    """A run's model as it was trained, in this process or at a server."""

    def __init__(self, run: Path, config: InstructionTuningConfig, server: str | None = None):
        folder = run / "result"
        if not (folder / "result.json").is_file():
            raise InputError(f"{run.name}: has no result yet. `equipoise resume` goes on with it.")
        if file := missing(folder, config):
            raise InputError(f"{file}: is missing. Put it back, or train anew.")
        self.config = config
        data, processor = config.data, load_processor(config.model)
        frames = Frames(data.fps, data.frames)
        self.talk = Talk(processor, model_type(config.model), data.prompt, data.max_tokens, frames)
        self.server, self.limit = Server(server) if server else None, None
        if self.server:
            return
        base = load_model(config.model, config.train.precision, config.components)
        parts = architecture(
            self.talk.model_type, [name for name, _ in base.named_parameters()], config.components, base
        )
        self.limit = positions(base, parts)
        self.model = load_result(base, folder).eval()

    def answers(self, examples: list[Conversation]) -> list[Answer]:
        samples = self.config.samples.model_copy(update={"count": len(examples)})
        if self.limit is not None:
            refuse(unanswerable(examples, self.talk, samples, self.limit))
        with progress("answers", "answer", total=len(examples)) as bar:
            if self.server:
                return self.server.answers(self.talk, examples, samples, bar.update)
            return answer(self.model, self.talk, examples, samples, bar.update)

    @torch.no_grad()
    def loss(self, examples: list[Conversation]) -> float:
        """The mean over the conversations, each over its answers' tokens."""
        device, size, total = next(self.model.parameters()).device, self.config.train.batch, 0.0
        with progress("loss", "conversation", total=len(examples)) as bar:
            for start in range(0, len(examples), size):
                part = examples[start : start + size]
                batch = {name: value.to(device) for name, value in self.talk.training_batch(part).items()}
                labels = batch.pop("labels")[:, 1:]
                mask = labels != IGNORED
                logits = self.model(**batch, use_cache=False).logits[:, :-1]
                total += answer_loss(logits[mask], labels[mask], mask.nonzero()[:, 0]).item() * len(part)
                bar.update(len(part))
        return total / len(examples)


def _labelled(file: Path, data: InstructionTuningData, talk: Talk) -> list[Conversation]:
    """The conversations of a file that can be judged; as in training, all others are refused or left out."""

    def tell(text: str) -> None:
        print(text, file=sys.stderr)

    left_out: list[str] = []
    lenient = left_out if data.skip_bad else None
    examples, problems = read_examples(file, data.folder, True, "FILE", talk.problems, lenient, asked=data.question)
    if talk.max_tokens and not problems:
        bad = unusable(examples, talk, tell)
        (left_out if data.skip_bad else problems).extend(dict.fromkeys(bad.values()))
        examples = [example for example in examples if example not in bad]
    refuse(summarized(problems))
    if left_out:
        tell("\n".join(["left out, for it cannot be used:", *summarized(left_out)]))
    if not examples:
        raise InputError(f"{file}: no conversation is left to judge by.")
    return examples


def _row(found: Answer) -> dict[str, Any]:
    """As a line of data, so that answers can be corrected and trained on. Media from within a file are named by where
    they stand in it: what they were unpacked to goes with this process."""
    paths = [found.example.where if is_passing(path) else str(path) for path in found.example.media]
    media = {found.example.kind: paths[0] if len(paths) == 1 else paths} if paths else {}
    return {**media, "question": without_marks(found.question), "answer": found.text}


def _to_ask(source: Path, prompts: Sequence[str], talk: Talk) -> list[Conversation]:
    """Conversations whose last answer is wanted."""
    examples, problems = [], []
    for where, record in _records(source, talk.kinds):
        for asked in _asked(record, prompts):
            try:
                if isinstance(asked, InputError):
                    raise asked
                found = conversation(asked, source if source.is_dir() else source.parent, where)
            except InputError as error:
                text = str(error)
                problems.append(text if text.startswith(where) else f"{where}: {text}")
                continue
            found = replace(found, turns=(*found.turns[:-1], Turn(found.turns[-1].question, "")))
            problems += [f"{where}: {problem}" for problem in talk.problems(found)]
            examples.append(found)
    kinds = {path: example.kind for example in examples for path in example.media}
    with ThreadPoolExecutor(8) as pool:  # decoding leaves Python's lock
        wrong = pool.map(media_problem, kinds, kinds.values())
        problems += filter(None, progress("reading", "file", wrong, len(kinds)))
    refuse(list(dict.fromkeys(problems)))
    if not examples:
        raise InputError(f"{source}: holds nothing to ask about.")
    return examples


def _asked(record: Any, prompts: Sequence[str]) -> Iterator[Any]:
    """A record as training reads it, with some last answer: once for each question."""
    if not isinstance(record, dict):
        yield record if isinstance(record, InputError) else InputError(f"must be an object, got {record!r:.40}.")
        return
    if not record.get("conversations") and not record.get("question"):
        record, problems = _other_format(record)
        if problems:
            yield InputError(" ".join(problems))
            return
    rest = {key: value for key, value in record.items() if key not in ("conversations", "question", "answer")}
    said, own = record.get("conversations"), [record["question"]] if record.get("question") else []
    if prompts or own:
        for question in prompts or own:
            turns = [{"from": "human", "value": question}, {"from": "gpt", "value": "?"}]
            yield {**rest, "conversations": turns}
    elif isinstance(said, list) and said:
        last = said[-1].get("from", said[-1].get("role")) if isinstance(said[-1], dict) else None
        open_ended = [{"from": "gpt", "value": "?"}] if last in ("human", "user") else []
        yield {**rest, "conversations": [*said, *open_ended]}
    else:
        yield InputError("has no question. Give one by --prompt.")


def _other_format(record: dict[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(a record of another tool in LLaVA's format, what is wrong with it); one that says nothing stays as it is."""
    found = next((name for name in ("messages", "texts", *_ANSWERED) if record.get(name)), None)
    if found is None:
        return record, []
    if found in _ANSWERED and not record.get(_ANSWERED[found]):
        record = {**record, _ANSWERED[found]: "?"}
    return as_llava(record, MediaFolder())


def _records(source: Path, kinds: Sequence[str]) -> Iterator[tuple[str, Any]]:
    """(where it is from, what asks about media) of a folder, a medium or a table."""
    if source.suffix.lower() in _TABLES and source.is_file():
        yield from _rows(source)
        return
    ends = {"image": pictures.suffixes(), "audio": sounds.suffixes(), "video": videos.suffixes()}
    files = [source] if source.is_file() else sorted(path for path in source.rglob("*") if path.is_file())
    found = False
    for file in files:
        named = [kind for kind in reversed(kinds) if file.suffix.lower() in ends[kind]]  # a video also has a sound
        if named or source.is_file():
            found = True
            yield str(file), {(named or list(kinds))[0]: str(file)}
    if not found:
        what = " or ".join({"image": "picture", "audio": "sound", "video": "video"}[kind] for kind in kinds)
        raise InputError(f"{source}: has no {what} in it or in its folders.")


def _rows(file: Path) -> Iterator[tuple[str, Any]]:
    read = {".csv": _of_csv, ".json": _of_text, ".jsonl": _of_text}[file.suffix.lower()]
    try:
        yield from read(file)
    except (OSError, ValueError, RecursionError, csv.Error) as error:
        raise InputError(f"{file}: cannot be read: {error}.") from None


def _of_text(file: Path) -> Iterator[tuple[str, Any]]:
    for row in rows(file):
        if isinstance(row.record, FileError):
            raise InputError(f"{row.where}: {row.record}")
        yield row.where, row.record


def _of_csv(file: Path) -> Iterator[tuple[str, Any]]:
    with file.open(newline="", encoding=ENCODING) as opened:
        reader = csv.DictReader(opened)
        if strange := [name for name in reader.fieldnames or () if name not in COLUMNS]:
            raise InputError(
                f"{file}:1: has the column {strange[0]!r}, which is unknown; there are {', '.join(COLUMNS)}."
            )
        for row in reader:
            where = f"{file}:{first_line(reader, row.values())}"
            if None in row or None in row.values():
                yield (
                    where,
                    InputError("has more or fewer cells than columns. Put text with commas in quotes."),
                )
                continue
            media = {kind: [part.strip() for part in row.get(kind, "").split(";") if part.strip()] for kind in MARKS}
            yield where, {**media, "question": row.get("question", "")}
