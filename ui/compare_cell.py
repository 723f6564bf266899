"""One cell of a comparison as HTML, in full size, or two under a slider, and in what their configurations differ."""

from collections.abc import Sequence
from typing import Any

from equipoise.errors import EquipoiseError
from equipoise.pipelines.comparing.comparison import Cell, Picture
from equipoise.pipelines.comparing.robustness import shown_rate
from equipoise.pipelines.config import flat
from equipoise.ui import draw
from equipoise.ui.compare import read
from equipoise.ui.compare_grid import pictures_of
from equipoise.ui.draw import esc, url
from equipoise.ui.runs import open_run
from equipoise.ui.safety import Site


def cell_detail(site: Site, id: str, chosen: Sequence[str], prompt: int) -> str:
    """The cell chosen last in full size with its facts, and under a slider with the one chosen before."""
    if not chosen:
        return draw.empty("Choose a cell", "It is shown in full size; a second one lies under a slider with the first.")
    comparison = read(site, id)
    cells = {cell.run: cell for cell in comparison.cells} | {"base": comparison.base}
    found = [cells[run] for run in chosen if run in cells]
    if not found:
        return draw.notice("That cell is not in this comparison; choose another one.", "bad")
    last = found[-1]
    picture = next(iter(pictures_of(last, prompt)), None)
    shown = ""
    if picture:
        if len(found) > 1 and (other := next(iter(pictures_of(found[-2], prompt)), None)):
            shown = _before_after(id, (found[-2], other), (last, picture))
        else:
            shown = f"<img src='{url(f'{id}/{picture.file}')}' alt='{esc(comparison.prompts[picture.prompt])}'>"
    without = [cell.who for cell in found[-2:] if not pictures_of(cell, prompt)]
    if without:
        shown += f"<p class='hint'>There is no picture of {esc(' and '.join(without))}.</p>"
    facts: dict[str, object] = {"run": last.who, "state": last.state}
    if verdict := comparison.verdict(last.row, last.rate):
        facts["verdict"] = verdict
    if last.message:
        facts["how it ended"] = last.message
    if picture:
        facts["prompt"] = comparison.prompts[picture.prompt]
        facts |= {"noise": picture.seed} if picture.seed is not None else {}
        facts |= {"judge's note": picture.note} if picture.note else {}
    facts |= {name: draw.number(number) for name, number in last.metrics.items()}
    before = found[-2] if len(found) > 1 else None
    differs = _differences(site, last, before, comparison.cells)
    rows = "".join(f"<tr><td>{esc(key)}</td><td>{esc(a)}</td><td>{esc(b)}</td></tr>" for key, a, b in differs)
    names = f"<tr><th>configuration</th><th>this</th><th>{'the one before' if before else 'others have'}</th></tr>"
    lists = f"<div class='scroll'><table>{names}{rows}</table></div>" if rows else ""
    return f"<div class='pair'><div>{shown}</div><div>{draw.facts(facts)}{lists}</div></div>"


def _before_after(id: str, before: tuple[Cell, Picture], after: tuple[Cell, Picture]) -> str:
    labels = [f"{cell.row} {'' if not cell.run else shown_rate(cell.rate)}" for cell, _ in (before, after)]
    files = [url(f"{id}/{picture.file}") for _, picture in (before, after)]
    return (
        f"<div class='before-after'><img src='{files[0]}' alt='{esc(labels[0])}'>"
        f"<img class='over' src='{files[1]}' alt='{esc(labels[1])}'>"
        "<input type='range' min='0' max='100' value='50' aria-label='before and after' "
        "oninput=\"this.parentElement.style.setProperty('--at', this.value + '%')\">"
        f"<p><span>{esc(labels[0])}</span><span>{esc(labels[1])}</span></p></div>"
    )


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
