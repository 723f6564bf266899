"""Asks every run of a comparison, and the untouched base, the same held-out questions, and marks their answers."""

import json
import math
import sys
import textwrap
from collections.abc import Sequence
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from equipoise.coordination.components import architecture
from equipoise.errors import ConfigError, InputError
from equipoise.pipelines.comparing.comparison import (
    Cell,
    Comparison,
    Picture,
    column_of,
    folder_names,
    lay_out,
    measured,
)
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig, InstructionTuningSamples
from equipoise.pipelines.instruction_tuning.data import without_marks
from equipoise.pipelines.instruction_tuning.evaluate import METRICS, Answer, answer, mean
from equipoise.pipelines.instruction_tuning.examples import asked_of, load_examples
from equipoise.pipelines.instruction_tuning.media import Frames, open_picture, open_video
from equipoise.pipelines.instruction_tuning.model import load_model, load_processor, positions
from equipoise.pipelines.instruction_tuning.result import load_result, missing
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.progress import progress
from equipoise.pipelines.runs.run import Run

SHOWN = 6  # questions with a card in the grid
CARD = 168  # pixels, width and height of the picture on a card
_INK, _PAPER, _GOOD, _BAD, _MUTED = "#1b1f24", "#ffffff", "#1a7f37", "#cf222e", "#6a737d"


def compare(
    name: str,
    folder: Path,
    runs: Sequence[Run],
    configs: Sequence[InstructionTuningConfig],
    samples: InstructionTuningSamples | None = None,
) -> Comparison:
    """Generates and judges answers, and writes a card for each of the first questions into `folder`.

    Raises:
        InputError: the runs tuned different models or data, or a result is missing or does not load.
    """
    first = configs[0]
    samples = samples or first.samples
    for config in configs:
        for key, mine, theirs in (
            ("model.path", first.model.path, config.model.path),
            ("data.file", first.data.file, config.data.file),
            ("data.more", first.data.more, config.data.more),
            ("data.validation", first.data.validation, config.data.validation),
        ):
            if mine != theirs:
                raise InputError(f"comparison: {key} differs between the runs ({mine} and {theirs}); compare others.")
    base = load_model(first.model, first.train.precision, first.components)
    talk = _talk(first, base.config.model_type)
    parts = architecture(talk.model_type, [name for name, _ in base.named_parameters()], first.components, base)
    limit = positions(base, parts)  # what was left out for it is not asked either
    _, held, problems = load_examples(first, talk, lambda text: print(text, file=sys.stderr), limit)
    if problems:
        raise ConfigError(problems)
    asked = asked_of(held, samples, SHOWN)
    results = [_result(run, config) for run, config in zip(runs, configs, strict=True)]
    layout = lay_out(configs)
    names = folder_names([run.id for run in runs])
    total = len(asked) * (1 + sum(result is not None for result in results))
    with progress("answers", "answer", total=total) as bar:
        untouched = Cell("", "base", math.nan, first.seed, "untouched")
        _fill(folder, "base", untouched, answer(base, talk, asked, samples, bar.update))
        cells = []
        for run, config, result, position in zip(runs, configs, results, layout, strict=True):
            cell = Cell.of(run, config, position)
            cells.append(cell)
            if result is None:
                continue
            cell.metrics = measured(result)
            # anew: a result changes encoder weights in place
            base = load_model(config.model, config.train.precision, config.components)
            tuned = load_result(base, run.folder / "result")
            talks = _talk(config, talk.model_type)
            _fill(folder, names[run.id], cell, answer(tuned, talks, asked, samples, bar.update))
    shown = [(without_marks(it.turns[-1].question), [path.name for path in it.media]) for it in asked[:SHOWN]]
    # of one's own, each is asked of several media
    prompts = [f"{text} ({', '.join(names)})" if samples.prompts and names else text for text, names in shown]
    meaning = f"{METRICS[samples.metric]} ({len(asked)} held-out question{'' if len(asked) == 1 else 's'})"
    alike, column = "Every cell answers the same questions.", column_of(configs)
    return Comparison(name, folder, prompts, meaning, untouched, cells, alike=alike, column=column)


def _talk(config: InstructionTuningConfig, model_type: str) -> Talk:
    """A run's own: its size of pictures and its prompt."""
    data = config.data
    processor = load_processor(config.model)
    return Talk(processor, model_type, data.prompt, data.max_tokens, Frames(data.fps, data.frames))


def _result(run: Run, config: InstructionTuningConfig) -> dict | None:
    folder = run.folder / "result"
    if not (folder / "result.json").is_file():
        return None
    if file := missing(folder, config):
        raise InputError(f"{file}: is missing. Put it back, or compare the other runs without {run.id}.")
    return json.loads((folder / "result.json").read_text())


def _fill(folder: Path, name: str, cell: Cell, answers: Sequence[Answer]) -> None:
    score = mean(answers)
    if math.isfinite(score):
        cell.metrics["score"] = score
    target = folder / "cells" / name
    target.mkdir(parents=True, exist_ok=True)
    table = "".join(json.dumps(answered.record(), ensure_ascii=False) + "\n" for answered in answers)
    (target / "answers.jsonl").write_text(table)
    for index, answered in enumerate(answers[:SHOWN]):
        file = target / f"{index:02d}.png"
        draw_card(answered).save(file)
        path = file.relative_to(folder).as_posix()
        wanted = f", wanted {' or '.join(answered.wanted)}" if any(answered.wanted) else ""
        note = f"{answered.text or '(nothing)'}{wanted}"
        cell.pictures.append(Picture(index, None, path, path, answered.right, note))


def draw_card(answered: Answer) -> Image.Image:
    """The picture, its question, and the answer: green when right, red with what was wanted when wrong."""
    font, lines = ImageFont.load_default(13), []
    question = without_marks(answered.question)
    lines += [(line, _INK) for line in textwrap.wrap(question, 26)[:2]]
    colour = _MUTED if answered.right is None else _GOOD if answered.right else _BAD
    mark = "" if answered.right is None else "right: " if answered.right else "wrong: "
    lines += [(line, colour) for line in textwrap.wrap(mark + (answered.text or "(nothing)"), 26)[:2]]
    if answered.right is False:
        lines.append((f"wanted: {' or '.join(answered.wanted)}"[:28], _MUTED))
    card = Image.new("RGB", (CARD, CARD), _PAPER)
    pen = ImageDraw.Draw(card)
    height = CARD - 15 * len(lines) - 10
    if answered.example.kind in ("image", "video"):
        medium = answered.example.media[0]
        still = answered.example.kind == "image"
        picture = open_picture(medium) if still else open_video(medium, Frames(None, 1)).frames[0]
        share = min(CARD / picture.width, height / picture.height)
        size = (max(1, int(picture.width * share)), max(1, int(picture.height * share)))
        card.paste(picture.resize(size), ((CARD - size[0]) // 2, 0))
    elif answered.example.media:
        pen.text((CARD / 2, height / 2), f"♪ {answered.example.media[0].name}"[:24], _MUTED, font, anchor="mm")
    for number, (text, ink) in enumerate(lines):
        pen.text((8, height + 2 + 15 * number), text, ink, font)
    pen.rectangle((0, 0, CARD - 1, CARD - 1), outline=colour, width=5)  # visible where the words are too small to read
    return card
