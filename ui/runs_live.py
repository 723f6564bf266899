"""A sweep while it trains: what each cell drew or answered last, laid out by learning rate."""

import re
from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path

from equipoise.errors import EquipoiseError
from equipoise.pipelines.comparing.comparison import lay_out
from equipoise.pipelines.comparing.robustness import shown_rate
from equipoise.pipelines.files import version
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.run import Run
from equipoise.ui import draw
from equipoise.ui.answers import answers
from equipoise.ui.draw import esc, url
from equipoise.ui.runs import badge, open_run, sample_steps, together
from equipoise.ui.safety import Site

MOST = 4  # pictures of a cell, the first of each prompt
_NAME = re.compile(r"(\d+)-\w+")  # PROMPT-NOISE, as samples are called


def of_refs(site: Site, refs: Sequence[str]) -> str:
    """What to see of a sweep that trains still, in place of its comparison; nothing of other runs."""
    try:
        sweep = open_run(site, refs[0]) if len(refs) == 1 else None
    except EquipoiseError:
        return ""
    if sweep is None or sweep.status().kind != "sweep" or sweep.status().over:
        return ""
    ended, now = [cell.status().over for cell in sweeps.cells(sweep)], together(sweep, sweep.status())
    steps = f"step {now.step}{f' of {now.total}' if now.total else ''} in all"
    words = f"{sum(ended)} of {len(ended)} cells are trained, {steps}."
    waits = draw.empty("It trains still", "samples.every sets how often its cells draw meanwhile.")
    return draw.notice(f"{words} Their comparison appears here by itself.") + (grid(site, sweep) or waits)


def grid(site: Site, sweep: Run) -> str:
    """The cells as a table, each with its newest samples; nothing where none has drawn or answered yet."""
    cells = sweeps.cells(sweep)
    newest = {cell.id: max(sample_steps(cell), default=None) for cell in cells}
    if all(step is None for step in newest.values()):
        return ""
    files = [cell.folder / "config.yaml" for cell in cells]
    places = _places(tuple(files), tuple(version(file) for file in files))
    columns = sorted({rate for _, rate in places})
    rows: dict[str, dict[float, list[str]]] = {}
    for cell, (row, rate) in zip(cells, places, strict=True):
        rows.setdefault(row, {}).setdefault(rate, []).append(_cell(site, cell, newest[cell.id]))
    head = "".join(f"<th scope='col'>{esc(word)}</th>" for word in ["", *map(shown_rate, columns)])
    body = "".join(
        f"<tr><th scope='row'>{draw.breakable(row)}</th>"
        + "".join(f"<td>{''.join(some.get(rate, ()))}</td>" for rate in columns)
        + "</tr>"
        for row, some in rows.items()
    )
    inside = f"<thead><tr>{head}</tr></thead><tbody>{body}</tbody>"
    return f"<div class='grid' style='--columns: {len(columns) + 1}'><table>{inside}</table></div>"


@lru_cache(100)
def _places(files: Sequence[Path], versions: Sequence[tuple[int, ...]]) -> list[tuple[str, float]]:
    """Each cell's row and learning rate, as comparisons lay them out; without those, a row for each."""
    try:
        return [(row, rate) for row, rate, _ in lay_out([Run(file.parent).config() for file in files])]
    except (EquipoiseError, OSError):
        return [(file.parent.name, 1.0) for file in files]


def _cell(site: Site, cell: Run, step: int | None) -> str:
    now = cell.status()
    words = f"step {step} of {now.total}" if now.total else f"step {step}"
    drawn = _drawn(site, cell.samples / f"step-{step:08d}") if step is not None else ""
    inside = drawn or f"<div class='none'>{'none yet' if not now.over else 'no samples'}</div>"
    about = f"class='cell' data-id='{esc(cell.id)}' title='{esc(cell.folder.name)}'"
    return f"<button {about}>{inside}<div>{words if drawn else ''} {badge(now)}</div></button>"


def _drawn(site: Site, folder: Path) -> str:
    first: dict[int, Path] = {}  # of each prompt
    for file in sorted(folder.glob("*.png")):
        if found := _NAME.fullmatch(file.stem):
            first.setdefault(int(found[1]), file)
    files = [first[prompt].relative_to(site.store.root).as_posix() for prompt in sorted(first)[:MOST]]
    images = "".join(f"<img loading='lazy' src='{url(file)}' alt=''>" for file in files)
    many = " class='many'" if len(files) > 1 else ""
    return (f"<div{many}>{images}</div>" if images else "") + answers(site, folder, 0)
