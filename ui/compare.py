"""The tab Compare: what runs draw or answer, side by side, from the same prompts and the same noise."""

import math
import re
import unicodedata
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from datetime import datetime
from pathlib import Path
from typing import Any

import gradio as gr
from gradio.context import Context

from equipoise import registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.comparing import report
from equipoise.pipelines.comparing.comparison import RATE, Cell, Comparison, Picture
from equipoise.pipelines.comparing.robustness import shown_rate
from equipoise.pipelines.config import flat
from equipoise.pipelines.config.keys import section_at
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.making import being_made
from equipoise.ui import draw
from equipoise.ui.draw import esc
from equipoise.ui.runs import ON_CLICK, open_run, sample_steps, url
from equipoise.ui.safety import Site
from equipoise.ui.widgets import Slider

OWN = "as the runs are set"  # what the comparison of a run's or sweep's own settings is called
ANSWERS = "answers.jsonl"  # where a pipeline that answers writes what it said
ROW, COLUMN = "row", RATE  # the axes that are shown first: all that differs but the rate, and the rate
END = "the end"
COUNT_OF_RUNS = "0: as the runs are set"
MOST_SCALE = 10  # of a LoRA: far beyond what still draws anything
CLOSE = 1e-6  # two scales that mean the same
MOST_PROMPT, MOST_COUNT = 1000, 1000  # characters of a prompt, pictures of each or questions
POLL = 2.0  # seconds
_BAR = re.compile(r"(\S[^|%]*?):? +\d+%\|[^|]*\| *(\d+)/(\d+) \[[^<]*<([^,\]]+)")  # as tqdm draws it


def choices(site: Site) -> list[tuple[str, str]]:
    """Sweeps and runs with something to compare, youngest first."""
    found = site.store.list()
    return [
        (f"{item.id}  ·  {item.kind}, {item.state}", item.id) for item in found if item.kind == "sweep" or item.over
    ]


@dataclass(frozen=True)
class Made:
    """A comparison that exists."""

    id: str  # its folder below the runs folder
    label: str
    scale: float | None  # the LoRA's strength it was generated with, where that was asked for
    prompts: tuple[str, ...] = ()


def made(site: Site, refs: Sequence[str]) -> list[Made]:
    """The comparisons of exactly these runs, the one of their own prompts first, then the youngest."""
    found = []
    if len(refs) == 1 and (site.store.root / refs[0] / "comparison" / "table.json").is_file():
        found.append(Made(f"{refs[0]}/comparison", OWN, None))
    for job in background.jobs(site.store.root):
        if set(job.runs) == set(refs) and job.state == "done":
            prompts = tuple(job.asked.get("prompts", ()))
            words = [f"“{prompts[0][:50]}”" if prompts else OWN]
            words += [f"scale {job.asked['scale']:g}"] if "scale" in job.asked else []
            words.append(f"{datetime.fromtimestamp(job.created):%d %b %H:%M}")
            found.append(
                Made(f"{background.COMPARISONS}/{job.name}", " · ".join(words), job.asked.get("scale"), prompts)
            )
    return found


def read(site: Site, id: str) -> Comparison:
    """The comparison in that folder of the runs folder.

    Raises:
        InputError: there is none.
    """
    try:
        return Comparison.read(site.file(f"{id}/table.json").parent)
    except InputError as error:
        raise InputError(site.told(error)) from None


def asked(site: Site, refs: Sequence[str]) -> dict[str, str]:
    """What a comparison of these runs can be told besides, of prompts, count and scale: key → help."""
    try:
        cls = registry.load("pipelines", open_run(site, refs[0]).status().pipeline).Config if refs else None
    except EquipoiseError:
        cls = None
    fields = getattr(section_at(cls, "samples"), "model_fields", {}) if cls else {}
    return {name: fields[name].description or "" for name in ("prompts", "count", "scale", "seed") if name in fields}


def pictured(site: Site, comparison: Comparison) -> dict[str, Any]:
    """What the slider over a comparison's pictures is called, and what its numbers mean."""
    if "prompts" in asked(site, [cell.run for cell in comparison.cells[:1]]):
        return {"label": "Prompt", "info": "0: the first of each"}
    words = [f"{index}: {text}" for index, text in enumerate(comparison.prompts[:6], 1)]
    return {"label": "Picture", "info": "; ".join(["0: the first of each", *words])}


def axes(comparison: Comparison) -> list[tuple[str, str]]:
    """What rows and columns can be: (words, key)."""
    keys = list(dict.fromkeys(key for cell in comparison.cells for key in cell.config))
    rest = [(key, key) for key in keys if key != RATE]
    return [("optimizer and what else differs", ROW), ("learning rate", RATE), *rest]


def value(cell: Cell, axis: str) -> str:
    """A cell's place on an axis."""
    if axis == ROW:
        return cell.row
    return shown_rate(cell.rate) if axis == RATE else str(cell.config.get(axis, "as the others"))


def steps(site: Site, comparison: Comparison) -> list[int]:
    """The steps at which any of the runs drew samples while training; none for prompts that they did not draw then."""
    job = next((job for job in background.jobs(site.store.root) if job.name == comparison.folder.name), None)
    if job and "prompts" in job.asked:
        return []
    found = set()
    for cell in comparison.cells:
        try:
            found |= set(sample_steps(open_run(site, cell.run)))
        except EquipoiseError:  # deleted since
            continue
    return sorted(found)


def end(site: Site, comparison: Comparison) -> int:
    """The step at which the longest of the runs ends, whose pictures the comparison has itself."""
    totals = [0]
    for cell in comparison.cells:
        with suppress(EquipoiseError):  # deleted since
            totals.append(open_run(site, cell.run).status().total or 0)
    return max(totals)


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
    shown = _pictures(cell, prompt)
    images = [
        _image(f"{id}/{picture.thumbnail}", picture.note or comparison.prompts[picture.prompt]) for picture in shown
    ]
    place, drawn = comparison.folder / "cells" / (cell.run.rpartition("/")[2] or "base"), ""
    if step is not None:
        place = _nearest(site, cell.run, step)
        drawn = f"step {int(place.name.removeprefix('step-'))}" if place else ""  # perhaps not the one asked for
        images = [_image(name, drawn) for name in _samples(site, place, prompt)] if place else []
    said = _answers(place, prompt) if place else ""
    if said and not prompt:  # cards with so many words cannot be read that small
        images = []
    many = " class='many'" if len(images) > 1 else ""
    inside = f"<div{many}>{''.join(images)}</div>" if images else ""
    inside += said
    if not inside:
        none = "no samples" if step is not None else cell.state if cell.run else "the base has none"
        inside = f"<div class='none'>{esc(none)}</div>"
    kind = comparison.verdict(cell.row, cell.rate)
    scores = [comparison.counted(one) for one in cells]
    words = f"{sum(scores) / len(scores):.0%}" if math.isfinite(cell.score) and step is None else drawn
    if len(cells) > 1:
        words += f" of {len(cells)}"
    if cell.state not in ("done", "untouched"):
        words = f"{words} {cell.state}".strip()
    marks = [picture.right for picture in shown if picture.right is not None and step is None]
    right = (
        f"<small class='{'right' if all(marks) else 'wrong'}'>{sum(marks)}/{len(marks)} right</small>" if marks else ""
    )
    title = " ".join(filter(None, [cell.who, cell.message]))
    pressed = "true" if cell.run in chosen else "false"
    rate = shown_rate(cell.rate) if cell.run else ""
    label = ", ".join(
        filter(None, [cell.row, rate, words, kind, f"{sum(marks)} of {len(marks)} right" if marks else ""])
    )
    marked = (
        f"data-id='{esc(cell.run or 'base')}' aria-pressed='{pressed}' aria-label='{esc(label)}' title='{esc(title)}'"
    )
    return f"<button class='cell {kind}' {marked}>{inside}<div>{esc(words)}</div>{right}</button>"


def _image(name: str, alt: str) -> str:
    return f"<img loading='lazy' src='{url(name)}' alt='{esc(alt)}' title='{esc(alt)}'>"


def _pictures(cell: Cell, prompt: int) -> list[Picture]:
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
    said, score = str(record.get("answer") or "(nothing)"), record.get("score")
    kind, mark = ("right", "✓ ") if isinstance(score, int | float) and score >= 1 else ("wrong", "✗ ")
    if not isinstance(score, int | float):
        kind, mark = "", ""
    wanted = record.get("wanted") or ()
    wanted = " or ".join(map(str, wanted if isinstance(wanted, list) else [wanted])) if kind == "wrong" else ""
    more = f" <s>{esc(wanted)}</s>" if wanted else ""
    return f"<span class='{kind}' title='{esc(record.get('question', ''))}'>{mark}{esc(said)}{more}</span>"


def _samples(site: Site, folder: Path, prompt: int) -> list[str]:
    """The pictures in a folder of samples, as `_pictures` chooses them; names below the runs folder."""
    files = sorted(folder.glob("*.png"))
    if prompt:
        files = [file for file in files if file.name.startswith(f"{prompt - 1:02d}-")]
    else:
        files = list({file.name.partition("-")[0]: file for file in reversed(files)}.values())[::-1]
    return [file.relative_to(site.store.root).as_posix() for file in files[:4]]


def curve(site: Site, id: str) -> str:
    """Score against learning rate, and the usable range of every row."""
    comparison = read(site, id)
    if not comparison.judged:
        return draw.notice(report.NOT_JUDGED)
    ranges = "".join(
        f"<tr><td><i style='background:{report.line_colour(index)}'></i>{esc(row)}</td>"
        f"<td>{esc(found) if found else 'none of the rates tried'}</td></tr>"
        for index, (row, found) in enumerate(comparison.ranges().items())
    )
    head = "<thead><tr><th></th><th>learning rates that worked</th></tr></thead>"
    drawn = report.draw_curve(comparison) if comparison.rates else ""
    return f"<div class='curve'>{drawn}<div class='scroll'><table>{head}<tbody>{ranges}</tbody></table></div></div>"


def table(site: Site, id: str) -> str:
    """Every cell's numbers."""
    comparison = read(site, id)
    cells = [comparison.base, *comparison.cells]
    names = list(dict.fromkeys(name for cell in cells for name in cell.metrics))
    head = "".join(f"<th>{esc(name)}</th>" for name in ["", "rate", "seed", "state", *names])
    rows = "".join(
        f"<tr><td>{esc(cell.row)}</td><td>{'' if not cell.run else shown_rate(cell.rate)}</td><td>{cell.seed}</td>"
        f"<td>{esc(cell.state)}</td>"
        + "".join(f"<td>{draw.number(cell.metrics.get(name))}</td>" for name in names)
        + "</tr>"
        for cell in cells
    )
    return f"<div class='scroll'><table><thead><tr>{head}</tr></thead><tbody>{rows}</tbody></table></div>"


def export(site: Site, id: str) -> str:
    """Links to the comparison's files."""
    comparison = read(site, id)
    folder, names = comparison.folder, {"grid.png": "Grid (PNG)"}
    names |= {f"grid-{index:02d}.png": f"Grid {index + 1} (PNG)" for index in range(len(comparison.prompts))}
    names |= {"report.html": "Report (HTML)", "table.csv": "Table (CSV)", "prompts.csv": "Prompts (CSV)"}
    names |= {"table.json": "JSON"}
    links = [
        f"<li><a href='{url(f'{id}/{file}')}?download=1' download>{label}</a></li>"
        for file, label in names.items()
        if (folder / file).is_file()
    ]
    return f"<ul class='files'>{''.join(links)}</ul>"


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
    picture = next(iter(_pictures(last, prompt)), None)
    shown = ""
    if picture:
        if len(found) > 1 and (other := next(iter(_pictures(found[-2], prompt)), None)):
            shown = _before_after(id, (found[-2], other), (last, picture))
        else:
            shown = f"<img src='{url(f'{id}/{picture.file}')}' alt='{esc(comparison.prompts[picture.prompt])}'>"
    without = [cell.who for cell in found[-2:] if not _pictures(cell, prompt)]
    if without:
        shown += f"<p class='hint'>There is no picture of {esc(' and '.join(without))}.</p>"
    told: dict[str, object] = {"run": last.who, "state": last.state}
    if last.message:
        told["how it ended"] = last.message
    if picture:
        told["prompt"] = comparison.prompts[picture.prompt]
        told |= {"noise": picture.seed} if picture.seed is not None else {}
        told |= {"seen": picture.note} if picture.note else {}
    told |= {name: draw.number(number) for name, number in last.metrics.items()}
    before = found[-2] if len(found) > 1 else None
    differs = _differences(site, last, before, comparison.cells)
    rows = "".join(f"<tr><td>{esc(key)}</td><td>{esc(a)}</td><td>{esc(b)}</td></tr>" for key, a, b in differs)
    names = f"<tr><th>configuration</th><th>this</th><th>{'the one before' if before else 'others have'}</th></tr>"
    lists = f"<div class='scroll'><table>{names}{rows}</table></div>" if rows else ""
    return f"<div class='pair'><div>{shown}</div><div>{draw.facts(told)}{lists}</div></div>"


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


def generate(site: Site, refs: Sequence[str], prompt: str, count: float | None, scale: float | None) -> str:
    """Starts one job that draws a prompt (or the runs' own prompts) from all cells; returns its name.

    Raises:
        InputError: nothing is chosen, or something of it is still at work.
    """
    if not refs:
        raise InputError("Choose a sweep, or some runs, first.")
    if len(prompt) > MOST_PROMPT:
        raise InputError(f"The prompt has {len(prompt)} characters; {MOST_PROMPT} are the most.")
    if any(unicodedata.category(letter) in ("Cc", "Cs") and not letter.isspace() for letter in prompt):
        raise InputError("The prompt has characters that are no text; leave them out.")
    if count is not None and not (0 <= count <= MOST_COUNT and count == int(count)):
        raise InputError(f"Count must be a whole number from 0 to {MOST_COUNT}, got {count:g}.")
    for ref in refs:
        run = open_run(site, ref)
        parts = sweeps.cells(run) if run.status().kind == "sweep" else [run]
        if waiting := [one.id for one in parts if not one.status().over]:
            raise InputError(f"{waiting[0]}: is not finished yet; compare when it is.")
    takes = asked(site, refs)
    told: dict[str, Any] = {"prompts": [prompt.strip()]} if prompt.strip() and "prompts" in takes else {}
    if count and "count" in takes:
        told["count"] = int(count)
    if scale is not None and "scale" in takes and (told or abs(scale - own_scale(site, refs)) > CLOSE):
        told["scale"] = round(float(scale), 3)
    return background.compare(site.store.root, list(refs), told)


def own_scale(site: Site, refs: Sequence[str]) -> float:
    """The LoRA's strength that runs draw with by their own settings."""
    try:
        value = flat(open_run(site, refs[0]).config()).get("samples.scale") if refs else None
    except EquipoiseError:
        value = None
    return float(value) if isinstance(value, int | float) else 1.0


def newest(site: Site, refs: Sequence[str], known: Sequence[str]) -> str | None:
    """The youngest comparison of these runs that has come since those were known, or None."""
    found = [item.id for item in made(site, refs)]
    fresh = [id for id in found if id not in known]
    return max(fresh, key=lambda id: (id.startswith(background.COMPARISONS), id), default=None)


def working(site: Site, refs: Sequence[str]) -> str:
    """The comparison of these runs that is being made, or that failed last."""
    count = being_made(site.store.root / refs[0] / "comparison") if len(refs) == 1 else None
    if count is not None:
        return draw.notice(f"They are being compared: {count} files so far. Choose them again when that is done.")
    for job in background.jobs(site.store.root):
        if set(job.runs) == set(refs):
            if job.state == "running":
                return draw.notice(f"Generating … {_progress(job.log.splitlines()[-1]) if job.log else 'starting'}")
            if job.state == "dead":
                last = job.log.splitlines()[-1] if job.log else "it said nothing"
                return draw.notice(f"The last comparison came to nothing: {last}", "bad")
            return ""
    return ""


def _progress(line: str) -> str:
    """A terminal's progress bar in words; any other line as it is."""
    found = _BAR.search(line)
    return f"{found[1]} {found[2]} of {found[3]}, {found[4]} left" if found else line


# The page


def build(site: Site, tab: gr.Tab) -> None:
    """Draws the tab."""
    gr.HTML(
        "<h2>Compare</h2><p class='lead'>The same prompts, noise, questions or clips for every cell, beside the "
        "untouched base.</p>"
    )
    refs = gr.Dropdown(
        choices(site),
        value=[],
        multiselect=True,
        label="Sweep, or runs",
        info="one sweep, or several runs",
        elem_id="compare-refs",
    )
    with gr.Row():
        given: dict[str, Any] = {"interactive": True, "min_width": 220}
        which = gr.Dropdown([], label="Comparison", elem_id="compare-which", scale=2, **given)
        rows = gr.Dropdown([("optimizer and what else differs", ROW)], value=ROW, label="Rows", **given)
        columns = gr.Dropdown([("learning rate", RATE)], value=RATE, label="Columns", **given)
    with gr.Row():
        prompt = Slider(
            0,
            1,
            value=0,
            step=1,
            label="Prompt",
            info="0: the first of each",
            interactive=True,
            min_width=260,
            elem_id="compare-prompt",
        )
        step = Slider(
            0,
            1,
            value=1,
            step=1,
            label="Step",
            info="samples while training; the last is the end",
            interactive=True,
            visible=False,
            min_width=260,
            elem_id="compare-step",
        )
        scale = Slider(
            0,
            MOST_SCALE,
            value=1,
            step=0.05,
            label="LoRA scale",
            info="shows the comparison made at it, if there is one",
            interactive=True,
            min_width=260,
            elem_id="compare-scale",
        )
    title = gr.HTML(elem_id="compare-prompt-text")
    shown = gr.HTML(
        draw.empty("Nothing chosen", "Choose a sweep above. One that is done has its comparison already."),
        js_on_load=ON_CLICK,
        elem_id="grid",
    )
    detail = gr.HTML(elem_id="cell-detail")
    with gr.Accordion("Compare anew", open=True):
        with gr.Row(equal_height=False):
            words = gr.Textbox(
                label="Prompt",
                info="empty: the runs' own prompts",
                max_lines=3,
                scale=4,
                min_width=260,
                elem_id="new-prompt",
            )
            count = gr.Number(0, label="Count", info=COUNT_OF_RUNS, step=1, min_width=200, elem_id="new-count")
        with gr.Row(elem_classes=["actions"]):
            go = gr.Button("Generate", variant="primary", size="md", elem_id="generate")
    message = gr.HTML(elem_id="compare-message")
    with gr.Row():
        robust = gr.HTML()
    numbers = gr.HTML()
    links = gr.HTML(elem_id="export")
    chosen = gr.State([])
    seen = gr.State("")
    known = gr.State([])  # the comparisons that the page has offered
    private: dict[str, Any] = {"api_visibility": "private", "show_progress": "hidden"}

    def draw_grid(id: str, rows: str, columns: str, prompt: float, step: float, picked: list[str]) -> list[Any]:
        if not id:
            return [gr.skip(), ""]
        try:
            comparison = read(site, id)
            found = steps(site, comparison)
            at = int(step) if found and step < max(*found, end(site, comparison)) else None
            number = min(int(prompt or 0), len(comparison.prompts))
            marked = ["" if run == "base" else run for run in picked]
            text = comparison.prompts[number - 1] if number else " · ".join(comparison.prompts[:4])
            return [grid(site, id, rows, columns, number, at, marked), f"<p class='hint'>{esc(text)}</p>"]
        except (EquipoiseError, OSError) as error:
            return [draw.notice(str(error), "bad"), ""]

    def pick(refs: list[str], request: gr.Request) -> list[Any]:
        """What there is of these runs; shown is the comparison that the page's address names, or the first."""
        found = made(site, refs or [])
        ids = [item.id for item in found]
        named = request.query_params.get("made", "") if request else ""  # none where no page asks
        first = named if named in ids else ids[0] if ids else ""
        options = gr.update(choices=[(item.label, item.id) for item in found], value=first or None)
        takes = asked(site, refs or []) if refs else {"prompts": "", "count": "", "scale": ""}
        help = "; ".join(filter(None, (takes.get("count"), COUNT_OF_RUNS)))
        count = gr.update(visible="count" in takes, info=help)
        asks = [
            gr.update(visible="scale" in takes, value=own_scale(site, refs or [])),
            gr.update(visible="prompts" in takes),
            count,
        ]
        return [options, ids, *open_one(first, refs or []), *asks]

    def open_one(id: str, refs: list[str]) -> list[Any]:
        nothing: list[Any] = [gr.skip()] * 4
        if not refs:
            return [*nothing, draw.empty("Nothing chosen", "Choose a sweep above."), "", "", "", "", "", [], "", ""]
        if not id:
            now = working(site, refs)
            words = draw.empty(
                "Not compared yet",
                "Generate compares them all in one job, by their own settings or a new prompt." if not now else "",
            )
            return [*nothing, words, "", "", "", "", "", [], now, ""]
        try:
            comparison = read(site, id)
            found = steps(site, comparison)
            many = max(len(comparison.prompts), 1)
            slider = gr.update(minimum=0, maximum=many, value=0, **pictured(site, comparison))
            last = max(*found, end(site, comparison)) if found else 1
            first = found[0] if len(found) > 1 else 0  # a slider has two ends, hidden or not
            options = axes(comparison)
            return [
                gr.update(choices=options, value=ROW),
                gr.update(choices=options, value=RATE),
                slider,
                gr.update(visible=len(found) > 1, minimum=first, maximum=max(last, 1), value=last),
                *draw_grid(id, ROW, RATE, 0, last, []),
                cell_detail(site, id, [], 0),
                curve(site, id),
                table(site, id),
                export(site, id),
                [],
                working(site, refs),
                id,
            ]
        except (EquipoiseError, OSError) as error:
            return [*nothing, draw.notice(str(error), "bad"), "", "", "", "", "", [], "", ""]

    def click(
        id: str, rows: str, columns: str, prompt: float, step: float, picked: list[str], event: gr.EventData
    ) -> list[Any]:
        run = str(getattr(event, "id", ""))
        picked = [*(one for one in picked if one != run), run][-2:]
        try:
            words = cell_detail(site, id, picked, int(prompt or 0))
        except (EquipoiseError, OSError) as error:
            words = draw.notice(str(error), "bad")
        return [picked, words, draw_grid(id, rows, columns, prompt, step, picked)[0]]

    def start(refs: list[str], text: str, count: float, scale: float) -> str:
        try:
            generate(site, refs or [], text or "", count, scale)
            return working(site, refs) or draw.notice("Generating … starting")
        except EquipoiseError as error:
            return draw.notice(str(error), "bad")

    def look(refs: list[str], id: str, seen: str) -> list[Any]:
        """What the timer asks: whether a job has ended, and then its comparison."""
        if not refs:
            return [gr.skip(), gr.skip()]
        found = [item.id for item in made(site, refs)]
        words = working(site, refs)
        state = f"{words}|{','.join(found)}"
        if state == seen:
            return [gr.skip(), gr.skip()]
        # Other messages stand in the same place: they stay until there is something else to say of the job.
        return [words if words != seen.rpartition("|")[0] else gr.skip(), state]

    def renew(refs: list[str], known: list[str]) -> list[Any]:
        """When another comparison has come, offers and shows it; nothing else changes what is looked at."""
        fresh = newest(site, refs or [], known)
        if fresh is None:
            return [gr.skip(), gr.skip()]
        found = made(site, refs)
        options = [(item.label, item.id) for item in found]
        return [gr.update(choices=options, value=fresh), [item.id for item in found]]

    def by_scale(refs: list[str], id: str, scale: float) -> list[Any]:
        found = made(site, refs or [])
        now = next((item for item in found if item.id == id), None)
        own = own_scale(site, refs or [])
        for item in found:
            drawn = own if item.scale is None else item.scale
            if now and item.prompts == now.prompts and abs(drawn - scale) < CLOSE:
                return [item.id if item.id != id else gr.skip(), ""]
        if now is None:
            return [gr.skip(), ""]
        return [
            gr.skip(),
            draw.notice(f"Nothing is drawn at scale {scale:g} yet: Generate does that, for the prompt above."),
        ]

    opened = [rows, columns, prompt, step, shown, title, detail, robust, numbers, links, chosen, message]
    last = gr.State("")
    tab.select(lambda: gr.update(choices=choices(site)), None, refs, **private)
    page = Context.root_block
    assert page is not None

    def restore(request: gr.Request) -> Any:
        """The runs that the page's address names, as far as they are there."""
        offered = choices(site)
        known = {id for _, id in offered}
        chosen = [id for id in request.query_params.get("compare", "").split(",") if id in known]
        return gr.update(choices=offered, value=chosen) if chosen else gr.skip()

    page.load(restore, None, refs, **private)
    refs.change(None, refs, None, js="chosen => equipoise.at({compare: chosen.join(',')})", api_visibility="private")
    refs.change(pick, refs, [which, known, *opened, last, scale, words, count], **private)
    which.change(
        lambda id, refs, last: open_one(id, refs) if id and id != last else [gr.skip()] * (len(opened) + 1),
        [which, refs, last],
        [*opened, last],
        **private,
    )
    which.change(None, which, None, js="id => { if (id) equipoise.at({made: id}) }", api_visibility="private")
    view = [which, rows, columns, prompt, step, chosen]
    moved = [
        rows.input,
        columns.input,
        prompt.change,
        step.change,
    ]  # while one is drawn, others may come: the last counts
    gr.on(moved, draw_grid, view, [shown, title], trigger_mode="always_last", **private)
    prompt.change(
        lambda id, picked, number: cell_detail(site, id, picked, int(number or 0)) if id else "",
        [which, chosen, prompt],
        detail,
        **private,
    )
    shown.select(click, view, [chosen, detail, shown], trigger_mode="multiple", **private)
    go.click(start, [refs, words, count, scale], message, **private)
    scale.change(by_scale, [refs, which, scale], [which, message], **private)
    timer = gr.Timer(POLL)
    timer.tick(look, [refs, which, seen], [message, seen], trigger_mode="once", **private)
    seen.change(renew, [refs, known], [which, known], **private)
