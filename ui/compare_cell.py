"""One cell of a comparison as HTML, in full size, or two under a slider, and in what their configurations differ."""

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.pipelines.comparing.comparison import Cell, Comparison
from equipoise.pipelines.comparing.meanings import meaning
from equipoise.pipelines.comparing.robustness import shown_rate
from equipoise.pipelines.config import flat
from equipoise.ui import draw
from equipoise.ui.answers import all_answers
from equipoise.ui.compare import read
from equipoise.ui.compare_pictures import Shot, chosen, nearest, shots
from equipoise.ui.draw import esc, url
from equipoise.ui.runs import open_run
from equipoise.ui.safety import Site

_NAMES = {"noise": "pictures of noise"}  # the other figure of that name is the seed


def cell_detail(
    site: Site,
    id: str,
    marked: Sequence[str],
    prompt: int,
    picture: str = "",
    step: int | None = None,
    noise: int = 1,
) -> str:
    """The cell marked last in full size with its facts, and under a slider with the one marked before.

    Args:
        site: whose.
        id: the comparison's folder below the runs folder.
        marked: cells by run id ("base" is the base).
        prompt: as for the grid.
        picture: which of the cell's pictures, by its key; "" is the first that the grid shows.
        step: as for the grid.
        noise: as for the grid.
    """
    if not marked:
        return draw.empty("Choose a cell", "It is shown in full size; a second one lies under a slider with the first.")
    comparison = read(site, id)
    cells = {cell.run: cell for cell in comparison.cells} | {"base": comparison.base}
    pair = [cells[run] for run in marked if run in cells][-2:]
    if not pair:
        return draw.notice("That cell is not in this comparison; choose another one.", "bad")
    all_shots = [shots(site, comparison, id, cell, step) for cell in pair]
    last = pair[-1]
    shown = _first(all_shots[-1], prompt, picture, noise)
    parts = [_large(comparison, pair, [_first(some, prompt, shown.key, noise) for some in all_shots])] if shown else []
    words = all_answers(site, _answered(site, comparison, pair, step))
    without = [cell.who for cell, some in zip(pair, all_shots, strict=True) if not _first(some, prompt, "", noise)]
    if without and not words:
        parts.append(f"<p class='hint'>There is no picture of {esc(' and '.join(without))}.</p>")
    if shown:
        parts.append(_strip(comparison, last, all_shots[-1], shown))
    before = pair[0] if len(pair) > 1 else None
    differs = _differences(site, last, before, comparison.cells)
    rows = "".join(
        f"<tr><td>{esc(key)}</td><td>{esc(_value(key, a))}</td><td>{esc(_value(key, b))}</td></tr>"
        for key, a, b in differs
    )
    names = f"<tr><th>configuration</th><th>this</th><th>{'the one before' if before else 'others have'}</th></tr>"
    lists = f"<div class='scroll'><table>{names}{rows}</table></div>" if rows else ""
    facts = draw.facts(_facts(comparison, last, shown, step))
    meant = "" if step is not None and last.run else _meanings(comparison, last)
    return f"<div class='pair'><div>{''.join(parts)}</div><div>{facts}{meant}{lists}</div></div>{words}"


def _answered(site: Site, comparison: Comparison, pair: Sequence[Cell], step: int | None) -> dict[str, Path]:
    """Cells in words → where their answers lie: those of the comparison, or those of a step while training."""
    labels = [_label(comparison, cell) for cell in pair]
    folders = {}
    for cell, label in zip(pair, labels, strict=True):
        if folder := comparison.place_of(cell) if step is None or not cell.run else nearest(site, cell.run, step):
            folders[label if labels.count(label) == 1 else cell.who] = folder  # seeds are labelled alike
    return folders


def _label(comparison: Comparison, cell: Cell) -> str:
    return f"{cell.row} {comparison.shown(cell.rate)}".strip()


def _meanings(comparison: Comparison, cell: Cell) -> str:
    """What the cell's figures are, to be opened."""
    known = {name: words for name in cell.metrics if (words := meaning(comparison, name))}
    items = "".join(f"<li><b>{esc(_NAMES.get(name, name))}</b>: {esc(words)}.</li>" for name, words in known.items())
    return f"<details class='card'><summary>What these figures are</summary><ul>{items}</ul></details>" if items else ""


def _first(found: Sequence[Shot], prompt: int, key: str, noise: int) -> Shot | None:
    """The picture of that key; where there is none, the first that the grid shows."""
    same = (shot for shot in found if shot.key == key)
    return next(same, None) or next(iter(chosen(found, prompt, noise)), None)


def _facts(comparison: Comparison, cell: Cell, shown: Shot | None, step: int | None) -> dict[str, object]:
    """What is known of a cell and its picture; of one at a step while training, only what is so at any time."""
    facts: dict[str, object] = {"run": cell.who, "state": cell.state}
    if step is None and (verdict := comparison.verdict(cell.row, cell.rate)):
        facts["verdict"] = verdict
    if cell.message:
        facts["how it ended"] = cell.message
    if shown:
        facts["prompt"] = comparison.prompts[shown.prompt] if shown.prompt < len(comparison.prompts) else ""
        facts |= {"noise seed": shown.noise} if shown.noise else {}
        facts |= {"judge's note": shown.note} if shown.note else {}
    if step is not None and cell.run:
        return facts | {"figures": "of the end only: what is drawn while training is not judged"}
    return facts | {_NAMES.get(name, name): draw.number(number) for name, number in cell.metrics.items()}


def _strip(comparison: Comparison, cell: Cell, found: Sequence[Shot], shown: Shot) -> str:
    """All pictures of a cell as small buttons, of which the large one is marked."""
    buttons = []
    for index, shot in enumerate(found, 1):
        prompt = comparison.prompts[shot.prompt] if shot.prompt < len(comparison.prompts) else ""
        words = esc(f"{index} of {len(found)}: {prompt}{f', noise seed {shot.noise}' if shot.noise else ''}")
        buttons.append(
            f"<button data-id='{esc(cell.run or 'base')}' data-picture='{esc(shot.key)}' aria-label='{words}' "
            f"title='{words}' aria-pressed='{'true' if shot is shown else 'false'}'>"
            f"<img loading='lazy' src='{url(shot.thumbnail)}' alt=''></button>"
        )
    return f"<div class='strip'>{''.join(buttons)}</div>" if len(found) > 1 else ""


def _large(comparison: Comparison, pair: Sequence[Cell], found: Sequence[Shot | None]) -> str:
    """The picture, or with that of the cell before it under a slider; both are zoomed and moved together."""
    labels = [_label(comparison, cell) for cell in pair]
    images = [(label, url(shot.file)) for label, shot in zip(labels, found, strict=True) if shot]
    if len(images) < 2:
        shot = next(shot for shot in found[::-1] if shot)
        alt = comparison.prompts[shot.prompt] if shot.prompt < len(comparison.prompts) else ""
        return zooms(f"<img src='{url(shot.file)}' alt='{esc(alt)}'>") + zoom_buttons(
            [("Open the file", url(shot.file))]
        )
    (left, first), (right, second) = images
    over = f"<div class='over'><img src='{second}' alt='{esc(right)}'></div>"
    both = zooms(f"<img src='{first}' alt='{esc(left)}'>{over}")
    return (
        f"<div class='before-after'>{both}"
        "<input type='range' min='0' max='100' value='50' aria-label='before and after' "
        "oninput=\"this.parentElement.style.setProperty('--at', this.value + '%')\">"
        f"<p><span>{esc(left)}</span><span>{esc(right)}</span></p></div>{zoom_buttons()}"
    )


def zooms(pictures: str) -> str:
    """Pictures that lie over each other, to be zoomed: by wheel, pinch, double click, keys and buttons."""
    words = "Zoom: double click; click, then wheel or + and −; drag or arrow keys move; 0 shows all of it."
    return f"<div class='zooms' tabindex='0' role='group' aria-label='{words}' title='{words}'>{pictures}</div>"


def zoom_buttons(links: Sequence[tuple[str, str]] = ()) -> str:
    """What zooms the pictures around it, and links beside that: (words, address)."""
    shown = {"+": ("1.5", "closer"), "−": ("0.667", "farther"), "Whole": ("0", "the whole picture")}
    parts = [
        f"<button data-zoom='{factor}' aria-label='{words}' title='{words}'>{label}</button>"
        for label, (factor, words) in shown.items()
    ]
    parts += [f"<a href='{address}' target='_blank'>{esc(words)}</a>" for words, address in links]
    return f"<p class='zoom-buttons'>{' '.join(parts)}</p>"


def _value(key: str, value: Any) -> Any:
    """A value of a configuration; of a rate, as the grid has it."""
    return shown_rate(value) if key.endswith("learning_rate") and isinstance(value, float) else value


def _differences(site: Site, cell: Cell, other: Cell | None, cells: Sequence[Cell]) -> list[tuple[str, Any, Any]]:
    """Where a cell's configuration differs from another's; without one, from all others' in what they differ in."""
    if not cell.run or (other and not other.run):
        return []
    if other is None:
        theirs = [one.config for one in cells if one.run != cell.run]
        return [
            (key, mine, ", ".join(dict.fromkeys(str(one[key]) for one in theirs if one.get(key, mine) != mine)))
            for key, mine in cell.config.items()
        ]
    try:
        mine, theirs = (flat(open_run(site, one.run).config()) for one in (cell, other))
    except EquipoiseError:
        mine, theirs = cell.config, other.config
    return [(key, mine[key], theirs.get(key)) for key in mine if mine[key] != theirs.get(key) and key != "name"]
