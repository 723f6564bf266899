"""The grid of a comparison as HTML: a table of cells, each with what its run drew or answered."""

import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.pipelines.comparing import report
from equipoise.pipelines.comparing.comparison import RATE, WORKS, Cell, Comparison, Picture
from equipoise.pipelines.comparing.robustness import shown_rate
from equipoise.ui import draw
from equipoise.ui.compare import read
from equipoise.ui.draw import esc, url
from equipoise.ui.runs import open_run
from equipoise.ui.runs_detail import sample_steps
from equipoise.ui.safety import Site

ANSWERS = "answers.jsonl"  # where a pipeline that answers questions writes its answers
ROW, COLUMN = "row", RATE  # the axes that are shown first: all that differs but the rate, and the rate


def axes(comparison: Comparison) -> list[tuple[str, str]]:
    """What rows and columns can be: (words, key)."""
    keys = list(dict.fromkeys(key for cell in comparison.cells for key in cell.config))
    rest = [(key, key) for key in keys if key != RATE]
    return [("optimizer and what else differs", ROW), (comparison.column, RATE), *rest]


def value(cell: Cell, axis: str) -> str:
    """A cell's coordinate on an axis."""
    if axis == ROW:
        return cell.row
    return shown_rate(cell.rate) if axis == RATE else str(cell.config.get(axis, "as the others"))


def grid(
    site: Site,
    id: str,
    rows: str = ROW,
    columns: str = COLUMN,
    prompt: int = 0,
    step: int | None = None,
    chosen: Sequence[str] = (),
) -> str:
    """The cells as an HTML table, the untouched base in a column of its own.

    Args:
        site: whose.
        id: the comparison's folder below the runs folder.
        rows: an axis.
        columns: another.
        prompt: 0 for the first picture of each prompt, or which prompt's, counted from 1.
        step: the samples drawn at this step while training, in place of the end's.
        chosen: the cells that are marked, by run id ("" is the base).
    """
    comparison = read(site, id)
    down = list(dict.fromkeys(value(cell, rows) for cell in comparison.cells))
    across = list(dict.fromkeys(value(cell, columns) for cell in sorted(comparison.cells, key=lambda c: c.rate)))
    head = "".join(f"<th scope='col'>{esc(label)}</th>" for label in ["", comparison.base.row, *across])
    body = []
    for label in down:
        line = [
            f"<th scope='row'>{draw.breakable(label)}</th>",
            f"<td>{_cell(site, comparison, id, [comparison.base], prompt, None, chosen)}</td>",
        ]
        for other in across:
            cells = [cell for cell in comparison.cells if value(cell, rows) == label and value(cell, columns) == other]
            line.append(f"<td>{_cell(site, comparison, id, cells, prompt, step, chosen) if cells else ''}</td>")
        body.append(f"<tr>{''.join(line)}</tr>")
    first, *rest = (f"<p class='hint'>{esc(line)}</p>" for line in report.explanations(comparison))
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f"{first}<div class='grid'><table>{inside}</table></div>{''.join(rest)}"


def _cell(
    site: Site, comparison: Comparison, id: str, cells: list[Cell], prompt: int, step: int | None, chosen: Sequence[str]
) -> str:
    cell = cells[0]
    shown = pictures_of(cell, prompt)
    images = [
        _image(f"{id}/{picture.thumbnail}", picture.note or comparison.prompts[picture.prompt]) for picture in shown
    ]
    folder, drawn = comparison.folder / "cells" / (cell.run.rpartition("/")[2] or "base"), ""
    if step is not None:
        folder = _nearest(site, cell.run, step)
        drawn = f"step {int(folder.name.removeprefix('step-'))}" if folder else ""  # perhaps not the one asked for
        images = [_image(name, drawn) for name in _samples(site, folder, prompt)] if folder else []
    answers = _answers(folder, prompt) if folder else ""
    if answers and not prompt:  # cards with so many words cannot be read that small
        images = []
    many = " class='many'" if len(images) > 1 else ""
    inside = f"<div{many}>{''.join(images)}</div>" if images else ""
    inside += answers
    if not inside:
        none = "no samples" if step is not None else cell.state if cell.run else "the base has none"
        inside = f"<div class='none'>{esc(none)}</div>"
    verdict = comparison.verdict(cell.row, cell.rate)
    kind = verdict and ("usable" if verdict == WORKS else "unusable")
    scores = [comparison.counted(one) for one in cells]
    words = f"{sum(scores) / len(scores):.0%}" if math.isfinite(cell.score) and step is None else drawn
    if len(cells) > 1:
        words += f" of {len(cells)}"
    if cell.state not in ("done", "untouched", verdict):
        words = f"{words} {cell.state}".strip()
    marks = [picture.right for picture in shown if picture.right is not None and step is None]
    right = (
        f"<small class='{'right' if all(marks) else 'wrong'}'>{sum(marks)}/{len(marks)} right</small>" if marks else ""
    )
    title = " ".join(filter(None, [cell.who, cell.message]))
    pressed = "true" if cell.run in chosen else "false"
    rate = shown_rate(cell.rate) if cell.run else ""
    label = ", ".join(
        filter(None, [cell.row, rate, words, verdict, f"{sum(marks)} of {len(marks)} right" if marks else ""])
    )
    marked = (
        f"data-id='{esc(cell.run or 'base')}' aria-pressed='{pressed}' aria-label='{esc(label)}' title='{esc(title)}'"
    )
    why = f"<small class='verdict'>{esc(verdict)}</small>" if verdict else ""
    return f"<button class='cell {kind}' {marked}>{inside}<div>{esc(words)}</div>{why}{right}</button>"


def _image(name: str, alt: str) -> str:
    return f"<img loading='lazy' src='{url(name)}' alt='{esc(alt)}' title='{esc(alt)}'>"


def pictures_of(cell: Cell, prompt: int) -> list[Picture]:
    """One picture of each of the first four prompts, or the first four of one prompt."""
    if prompt:
        return [picture for picture in cell.pictures if picture.prompt == prompt - 1][:4]
    return list({picture.prompt: picture for picture in reversed(cell.pictures)}.values())[::-1][:4]


def _nearest(site: Site, run: str, step: int) -> Path | None:
    """The folder of what a run drew while training at the step nearest to this one."""
    try:
        it = open_run(site, run)
        near = min(sample_steps(it), key=lambda one: abs(one - step))
    except (EquipoiseError, ValueError):  # gone, or no samples at all
        return None
    return it.samples / f"step-{near:08d}"


def _answers(folder: Path, prompt: int) -> str:
    """The first four answers, or one prompt's, ticked or crossed; nothing of a pipeline that draws."""
    try:
        found = draw.records((folder / ANSWERS).read_text(encoding="utf-8", errors="replace"))
    except OSError:
        return ""
    marked = list(map(_answer, found[prompt - 1 : prompt] if prompt else found[:4]))
    return f"<div class='answers'>{''.join(marked)}</div>" if marked else ""


def _answer(record: dict[str, Any]) -> str:
    """One answer, and what was wanted in its place."""
    answer, score = str(record.get("answer") or "(nothing)"), record.get("score")
    kind, mark = ("right", "✓ ") if isinstance(score, int | float) and score >= 1 else ("wrong", "✗ ")
    if not isinstance(score, int | float):
        kind, mark = "", ""
    wanted = record.get("wanted") or ()
    wanted = " or ".join(map(str, wanted if isinstance(wanted, list) else [wanted])) if kind == "wrong" else ""
    more = f" <s>{esc(wanted)}</s>" if wanted else ""
    return f"<span class='{kind}' title='{esc(record.get('question', ''))}'>{mark}{esc(answer)}{more}</span>"


def _samples(site: Site, folder: Path, prompt: int) -> list[str]:
    """The pictures in a folder of samples, as `pictures_of` chooses them; names below the runs folder."""
    files = sorted(folder.glob("*.png"))
    if prompt:
        files = [file for file in files if file.name.startswith(f"{prompt - 1:02d}-")]
    else:
        files = list({file.name.partition("-")[0]: file for file in reversed(files)}.values())[::-1]
    return [file.relative_to(site.store.root).as_posix() for file in files[:4]]
