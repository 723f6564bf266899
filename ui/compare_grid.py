"""The grid of a comparison as HTML: a table of cells, each with what its run drew or answered."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.pipelines.comparing import report
from equipoise.pipelines.comparing.comparison import RATE, WORKS, Cell, Comparison
from equipoise.ui import draw
from equipoise.ui.answers import answers
from equipoise.ui.compare import read
from equipoise.ui.compare_pictures import Shot, nearest, shots, step_of
from equipoise.ui.compare_pictures import chosen as chosen_shots
from equipoise.ui.draw import esc, url
from equipoise.ui.safety import Site

ROW, COLUMN = "row", RATE  # the axes that are shown first: all that differs but the rate, and the rate


def axes(comparison: Comparison) -> list[tuple[str, str]]:
    """What rows and columns can be: (words, key)."""
    keys = list(dict.fromkeys(key for cell in comparison.cells for key in cell.config))
    rest = [(key, key) for key in keys if key != RATE]
    return [("all else that differs", ROW), (comparison.column, RATE), *rest]


def value(comparison: Comparison, cell: Cell, axis: str) -> str:
    """A cell's coordinate on an axis."""
    if axis == ROW:
        return cell.row
    return comparison.shown(cell.rate) if axis == RATE else str(cell.config.get(axis, "as the others"))


@dataclass(frozen=True)
class _Look:
    """What is looked at, and how."""

    site: Site
    comparison: Comparison
    id: str  # the comparison's folder below the runs folder
    prompt: int
    noise: int
    step: int | None
    chosen: Sequence[str]

    def best(self, cells: Sequence[Cell]) -> bool:
        found = self.comparison.best if self.step is None else None
        return found is not None and all((cell.row, cell.rate) == (found[0], found[1].rate) for cell in cells)


def grid(
    site: Site,
    id: str,
    rows: str = ROW,
    columns: str = COLUMN,
    prompt: int = 0,
    step: int | None = None,
    chosen: Sequence[str] = (),
    noise: int = 1,
) -> str:
    """The cells as an HTML table, the untouched base in a column of its own.

    Args:
        site: whose.
        id: the comparison's folder below the runs folder.
        rows: an axis.
        columns: another.
        prompt: 0 for one picture of each prompt, or which prompt's, counted from 1.
        step: the samples drawn at this step while training, in place of the end's; these are not judged.
        chosen: the cells that are marked, by run id ("" is the base).
        noise: which picture of each prompt, counted from 1.
    """
    comparison = read(site, id)
    look = _Look(site, comparison, id, prompt, noise, step, chosen)
    by_rate = sorted(comparison.cells, key=lambda cell: cell.rate)
    down = list(dict.fromkeys(value(comparison, cell, rows) for cell in comparison.cells))
    across = list(dict.fromkeys(value(comparison, cell, columns) for cell in by_rate))
    places: dict[tuple[str, str], list[Cell]] = {}
    for cell in comparison.cells:
        places.setdefault((value(comparison, cell, rows), value(comparison, cell, columns)), []).append(cell)
    labels = [*(cell.row for cell in comparison.untouched), *across]
    head = "".join(f"<th scope='col'>{esc(label)}</th>" for label in ["", *labels])
    body = []
    for label in down:
        line = [f"<th scope='row'>{draw.breakable(label)}</th>"]
        line += [f"<td>{_source(look, cell)}</td>" for cell in comparison.untouched[:-1]]
        line.append(f"<td>{_cell(look, [comparison.base])}</td>")
        for other in across:
            cells = places.get((label, other))
            line.append(f"<td>{_cell(look, cells) if cells else ''}</td>")
        body.append(f"<tr>{''.join(line)}</tr>")
    hints = "".join(f"<p class='hint'>{esc(line)}</p>" for line in report.explanations(comparison))
    inside = f"<thead><tr>{head}</tr></thead><tbody>{''.join(body)}</tbody>"
    return f"<div class='grid' style='--columns: {len(labels) + 1}'><table>{inside}</table></div>{hints}"


def _source(look: _Look, cell: Cell) -> str:
    """What pictures are made of: nothing that could be chosen."""
    found = chosen_shots(shots(look.site, look.comparison, look.id, cell), look.prompt)
    return f"<div class='cell' title='{esc(cell.who)}'>{_inside(look, cell, found, None)}</div>"


def _cell(look: _Look, cells: list[Cell]) -> str:
    comparison, cell = look.comparison, cells[0]
    step = look.step if cell.run else None  # the base is the same at every step
    found = chosen_shots(shots(look.site, comparison, look.id, cell, step), look.prompt, look.noise)
    folder, drawn = comparison.place_of(cell), ""
    if step is not None:
        folder = nearest(look.site, cell.run, step)
        drawn = f"step {step_of(folder)}" if folder else ""  # perhaps not the one asked for
    one = len({(other.row, other.rate) for other in cells}) == 1  # else a verdict is of one of them alone
    verdict = comparison.verdict(cell.row, cell.rate) if step is None and one else ""
    alike = cells if one else cells[:1]  # seeds, of which means are said
    words = report.place_words(comparison, alike, verdict) if step is None else drawn
    beside = report.beside_words(comparison, alike) if step is None else ""
    words += f" of {len(cells)}" if len(cells) > 1 and one and step is None else ""
    words += "" if one else f"{' · ' if words else ''}1 of {len(cells)}"
    marks = [shot.right for shot in found if shot.right is not None]
    right = f"{sum(marks)} of {len(marks)} right" if marks else ""
    best = cell.run and look.best(cells)
    label = [cell.row, comparison.shown(cell.rate), words, verdict, beside, right, "the best" if best else ""]
    attributes = {
        "class": f"cell {verdict and ('usable' if verdict == WORKS else 'unusable')}",
        "data-id": cell.run or "base",
        "aria-pressed": "true" if cell.run in look.chosen else "false",
        "aria-label": ", ".join(filter(None, label)),
        "title": " ".join(filter(None, [cell.who, cell.message])),
        **({"data-best": "true"} if best else {}),
    }
    marked = " ".join(f"{name}='{esc(value)}'" for name, value in attributes.items())
    small = {
        "verdict": verdict,
        "beside": beside,
        "right" if all(marks) else "wrong": f"{sum(marks)}/{len(marks)} right" if marks else "",
        "best": f"★ {'best' if verdict == WORKS else 'nearest'}" if best else "",
    }
    lines = "".join(f"<small class='{kind}'>{esc(text)}</small>" for kind, text in small.items() if text)
    shown = f"{_inside(look, cell, found, folder)}<div>{esc(words)}</div>{lines}"
    return f"<button {marked}>{shown}</button>{_others(look, cells)}"


def _others(look: _Look, cells: list[Cell]) -> str:
    """Small buttons for the cells of a place behind the one that is shown."""
    buttons = []
    for number, cell in enumerate(cells[1:], 2):
        pressed = "true" if cell.run in look.chosen else "false"
        title = esc(f"{cell.who} {look.comparison.shown(cell.rate)}")
        about = f"class='link' data-id='{esc(cell.run)}' aria-pressed='{pressed}' title='{title}'"
        buttons.append(f"<button {about}>{number}</button>")
    return f"<div class='others'>{' '.join(buttons)}</div>" if buttons else ""


def _inside(look: _Look, cell: Cell, found: list[Shot], folder: Path | None) -> str:
    """What a cell drew or answered, or that it did not."""
    written = answers(look.site, folder, look.prompt) if folder else ""
    images = [_image(shot, look.comparison) for shot in found]
    if written and not look.prompt:  # cards with so many words cannot be read that small
        images = []
    many = " class='many'" if len(images) > 1 else ""
    inside = (f"<div{many}>{''.join(images)}</div>" if images else "") + written
    none = "no samples" if look.step is not None else cell.state if cell.run else "the base has none"
    return inside or f"<div class='none'>{esc(none)}</div>"


def _image(shot: Shot, comparison: Comparison) -> str:
    prompt = comparison.prompts[shot.prompt] if shot.prompt < len(comparison.prompts) else ""
    words = esc(shot.note or prompt)
    return (
        f"<img loading='lazy' data-picture='{esc(shot.key)}' src='{url(shot.thumbnail)}' alt='{words}' "
        f"title='{esc(f'{shot.prompt + 1}: {prompt}')}'>"
    )
