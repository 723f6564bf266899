"""The tab Runs: how every run stands, and of one of them its curves, samples, log, configuration and files."""

import hashlib
import json
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import gradio as gr

from equipoise.errors import EquipoiseError
from equipoise.pipelines.runs.status import STATES
from equipoise.ui import draw, runs_log, runs_more, runs_scatter, runs_several
from equipoise.ui.launch_tab import Launch, filled
from equipoise.ui.runs import ARCHIVED, COLUMNS, SORTS, offered_columns, open_run, table
from equipoise.ui.runs_curves import MEASURED, Wanted, metrics
from equipoise.ui.runs_detail import act, detail, heading, possible, sample_steps
from equipoise.ui.runs_log import LogPart
from equipoise.ui.runs_more import More
from equipoise.ui.runs_scatter import ScatterPart
from equipoise.ui.safety import Site
from equipoise.ui.widgets import (
    HIDDEN,
    ON_CLICK,
    PRIVATE,
    SHOWN,
    Confirm,
    Slider,
    Updates,
    asked_of,
    bound,
    clicked_id,
    confirm,
    root,
)

REFRESH = 2.0  # seconds
MOST_COLUMNS = 40
# What is chosen in a part that is folded up does not reach the browser's own requests: it is taken from its memory.
FILTERED = "(a, b, c, columns, ...rest) => [a, b, c, equipoise.remembered('columns', columns), ...rest]"
CHART_HINT = (
    "Point at a chart, tap it, or go along it with the arrow keys to read it. Fewer steps: + or a drag of the mouse "
    "over them; all: a double click or 0. A name hides its line."
)
ON_RUN = ON_CLICK.replace("trigger(", "equipoise.at({run: chosen.dataset.id}), trigger(")


@dataclass(frozen=True, eq=False)
class Filters:
    """Which runs the table shows, and in what order."""

    words: gr.Textbox
    state: gr.Dropdown
    sort: gr.Dropdown
    columns: gr.Dropdown


@dataclass(frozen=True)
class Listed:
    """What the filters say."""

    words: str = ""
    state: str = "all"
    sort: str = SORTS[0]
    columns: Sequence[str] = COLUMNS


@dataclass(frozen=True, eq=False)
class Actions:
    """What can be done to the chosen run."""

    row: gr.Row
    stop: gr.Button
    sample: gr.Button
    resume: gr.Button
    duplicate: gr.Button
    delete: gr.Button


@dataclass(frozen=True, eq=False)
class Curving:
    """How curves are drawn."""

    smooth: Slider
    log: gr.Checkbox
    metric: gr.Dropdown
    beside: gr.Dropdown


@dataclass(frozen=True, eq=False)
class Parts:
    """What is shown of the chosen run, below its heading."""

    tabs: gr.Tabs
    curving: Curving
    curves: gr.HTML
    step: Slider
    samples: gr.HTML
    log: gr.HTML
    config: gr.Code
    files: gr.HTML
    more: More  # notes and exports, which another file connects
    scatter: ScatterPart
    scatter_tab: gr.Tab
    searched: LogPart


@dataclass(frozen=True, eq=False)
class RunsTab:
    """The parts of the tab, and what it remembers of one browser."""

    site: Site
    workers: int
    launch: Launch
    filters: Filters
    listing: gr.HTML
    head: gr.HTML
    message: gr.HTML
    actions: Actions
    confirm: Confirm
    parts: Parts
    chosen: gr.State  # the run's id, or ""
    digests: gr.State  # of what the browser has already, in the order of `redrawn`
    end: gr.State  # the slider's last step

    @property
    def redrawn(self) -> list[Any]:
        """What shows how the runs stand."""
        parts, actions = self.parts, self.actions
        shown = [self.head, parts.curves, parts.samples, parts.log, parts.config, parts.files]
        return [self.listing, *shown, actions.stop, actions.sample, actions.resume]


def build(site: Site, workers: int, launch: Launch, page_tab: gr.Tab) -> None:
    """Draws the tab."""
    gr.HTML(draw.head("Runs"))
    filters = _filters()
    several = runs_more.several(site)
    listing = gr.HTML(table(site), js_on_load=ON_RUN, elem_id="runs-table")
    head = gr.HTML(heading(site, ""), js_on_load=ON_RUN, elem_id="run-head")
    message = gr.HTML(elem_id="run-message")
    above = launch, filters, listing, head, message
    parts = _actions(), confirm("delete"), _parts(site)
    tab = RunsTab(site, workers, *above, *parts, gr.State(""), gr.State([]), gr.State(1))
    _connect_refresh(tab, page_tab)
    _connect_choice(tab)
    _connect_actions(tab)
    runs_log.connect(tab.parts.searched, tab.chosen)
    runs_scatter.connect(tab.parts.scatter, tab.parts.scatter_tab, tab.chosen, tab.parts.curving.beside)
    runs_more.connect(several, tab.parts.more, site, tab.message, page_tab, _refreshed(tab))


def _filters() -> Filters:
    with gr.Row(elem_classes=["filters"]):
        hint = "words of the id, pipeline, message, notes or configuration"
        words = gr.Textbox(label="Filter", placeholder=hint, max_lines=1, scale=3)
        state = gr.Dropdown(["all", *STATES, ARCHIVED], value="all", label="State", interactive=True)
        more: Any = {"interactive": True, "allow_custom_value": True}
        sort = gr.Dropdown(list(SORTS), value=SORTS[0], label="Sort by", elem_id="sort", **more)
    with gr.Accordion("Columns", open=False):
        info = "Keys of the configuration, and figures: `last` measured, and of the `result`. This browser remembers."
        chosen: Any = {"value": list(COLUMNS), "multiselect": True, "elem_id": "columns"}
        columns = gr.Dropdown(list(COLUMNS), show_label=False, info=info, **chosen, **more)
    return Filters(words, state, sort, columns)


def _actions() -> Actions:
    with gr.Row(elem_classes=["actions"], visible=False) as row:
        return Actions(
            row,
            gr.Button("Stop (saves first)", size="md", elem_id="stop"),
            gr.Button("Sample now", size="md", elem_id="sample"),
            gr.Button("Resume", size="md", elem_id="resume"),
            gr.Button("Duplicate into Launch", size="md", elem_id="duplicate"),
            gr.Button("Delete …", size="md", variant="stop", elem_id="delete"),
        )


def _parts(site: Site) -> Parts:
    with gr.Tabs(visible=False) as tabs:
        with gr.Tab("Curves"):
            curving = _curving()
            gr.HTML(f"<p class='hint'>{CHART_HINT}</p>")
            curves = gr.HTML(js_on_load="equipoise.charts(element)", elem_id="curves")
        with gr.Tab("Samples"):
            step = Slider(0, 1, value=1, step=1, label="Step", interactive=True, visible=False)
            samples = gr.HTML(js_on_load=ON_RUN, elem_id="samples")
        with gr.Tab("Log"):
            searched = runs_log.draw_parts(site)
            log = gr.HTML()
        with gr.Tab("Configuration"):
            config = gr.Code(language="yaml", interactive=False, max_lines=30, show_label=False)
        with gr.Tab("Files"):
            files = gr.HTML()
            export = runs_more.export()
        with gr.Tab("Notes"):
            notes = runs_more.notes()
        with gr.Tab("Scatter") as scatter_tab:
            scatter = runs_scatter.draw_parts(site)
    shown = tabs, curving, curves, step, samples, log, config, files
    return Parts(*shown, More(export, notes), scatter, scatter_tab, searched)


def _curving() -> Curving:
    with gr.Row(elem_classes=["filters"]):
        smooth = Slider(
            0, 0.99, value=0, step=0.01, label="Smoothing", interactive=True, elem_id="smooth", min_width=220
        )
        log = gr.Checkbox(label="Logarithmic", elem_id="log-scale", min_width=120)
        more: Any = {"interactive": True, "min_width": 160}
        metric = gr.Dropdown(
            ["loss"], value="loss", label="Metric of several", allow_custom_value=True, elem_id="metric", **more
        )
        beside = gr.Dropdown([], value=[], multiselect=True, label="Other runs beside it", elem_id="beside", **more)
    return Curving(smooth, log, metric, beside)


def _refreshed(tab: RunsTab) -> dict[str, Any]:
    """An event's handler, inputs and outputs that show how the runs stand now."""
    inputs = [*_filled(tab), tab.chosen, tab.parts.step, tab.end, tab.digests]
    outputs = [*tab.redrawn, tab.digests, tab.parts.step, tab.end]
    return {"fn": bound(refresh, tab), "inputs": inputs, "outputs": outputs, "js": FILTERED, **HIDDEN}


def _filled(tab: RunsTab) -> list[Any]:
    curving = tab.parts.curving
    curves = [curving.smooth, curving.log, curving.metric, curving.beside]
    filters = tab.filters
    return [filters.words, filters.state, filters.sort, filters.columns, *curves]


def _connect_refresh(tab: RunsTab, page_tab: gr.Tab) -> None:
    gr.Timer(REFRESH).tick(**_refreshed(tab), trigger_mode="once")
    page_tab.select(**_refreshed(tab))  # what it shows until then is of when the server started
    filters = tab.filters
    columns = filters.columns
    page_tab.select(bound(offer_columns, tab), None, [columns, filters.sort], **HIDDEN)
    columns.input(None, columns, None, js="chosen => equipoise.remember('columns', chosen)", **PRIVATE)
    remembered = f"() => [equipoise.remembered('columns', {json.dumps(COLUMNS)})]"
    root().load(None, None, columns, js=remembered, **PRIVATE)
    moved = [filters.words.change, filters.state.input, filters.sort.input, columns.change, tab.parts.step.input]
    curving = tab.parts.curving
    moved += [curving.smooth.change, curving.log.input, curving.metric.input, curving.beside.input]
    curving.beside.input(bound(offer_metrics, tab), [tab.chosen, curving.beside], curving.metric, **HIDDEN)
    gr.on(moved, **_refreshed(tab), trigger_mode="always_last")


def _connect_choice(tab: RunsTab) -> None:
    all_of_it = [*tab.redrawn, tab.digests, tab.parts.step, tab.end, *_of_run(tab)]
    root().load(bound(restore, tab), None, all_of_it, **HIDDEN)
    for source in (tab.listing, tab.head, tab.parts.samples):
        source.select(bound(select, tab), _filled(tab), all_of_it, trigger_mode="multiple", js=FILTERED, **HIDDEN)


def _of_run(tab: RunsTab) -> list[Any]:
    """What appears and goes with a chosen run."""
    more, curving = tab.parts.more, tab.parts.curving
    with_it = [curving.metric, curving.beside, *more.outputs]
    return [tab.message, tab.chosen, tab.actions.row, tab.parts.tabs, tab.confirm.row, *with_it]


def _connect_actions(tab: RunsTab) -> None:
    actions, confirm = tab.actions, tab.confirm
    # What is acted on is the run whose heading the browser shows, whatever was clicked since and is not answered yet.
    shown, question = (gr.Textbox(visible=False) for _ in range(2))
    events = ((actions.stop, stop), (actions.resume, resume), (actions.sample, sample))
    for button, handler in events:
        button.click(bound(handler, tab), shown, _of_run(tab), js=SHOWN, **HIDDEN).then(**_refreshed(tab))
    deleted = confirm.yes.click(bound(delete, tab), question, _of_run(tab), js=asked_of("delete"), **HIDDEN)
    deleted.then(**_refreshed(tab))
    confirm.yes.click(None, None, None, js="() => equipoise.at({run: ''})", **PRIVATE)
    actions.delete.click(bound(ask_delete, tab), shown, [confirm.row, confirm.question], js=SHOWN, **HIDDEN)
    confirm.no.click(bound(keep, tab), None, confirm.row, **HIDDEN)
    outputs = [tab.message, *tab.launch.outputs]
    copied = actions.duplicate.click(bound(duplicate, tab), shown, outputs, js=SHOWN, **HIDDEN)
    copied.then(None, None, None, js="() => equipoise.at({tab: 'Launch'})", **PRIVATE)


# Handlers: what they are given stands in the order of the inputs above


def refresh(
    tab: RunsTab,
    words: str | None,
    state: str | None,
    sort: str | None,
    columns: list[str] | None,
    smooth: float,
    log: bool,
    metric: str | None,
    beside: list[str],
    id: str,
    at: float | None,
    end: int,
    digests: list[str],
) -> Updates:
    """How the runs stand now, as far as the browser does not show it already."""
    moved = slide(tab.site, id, at, end)
    wanted = Wanted(smooth, log, metric or "loss", tuple(beside or ()))
    listed = _listed(words, state, sort, columns)
    drawn = _drawn(tab, listed, id, moved.shown, digests, wanted)
    return {**drawn, tab.parts.step: moved.slider, tab.end: moved.end if moved.end != end else gr.skip()}


def select(
    tab: RunsTab,
    words: str | None,
    state: str | None,
    sort: str | None,
    columns: list[str] | None,
    smooth: float,
    log: bool,
    metric: str | None,
    beside: list[str],
    event: gr.EventData,
) -> Updates:
    listed = _listed(words, state, sort, columns)
    return opened(tab, listed, clicked_id(event), Wanted(smooth, log))


def _listed(words: str | None, state: str | None, sort: str | None, columns: list[str] | None) -> Listed:
    """What the filters say, whatever a browser remembered of them; a page that loads sends nothing of some."""
    chosen = [str(name) for name in columns[:MOST_COLUMNS]] if isinstance(columns, list) else COLUMNS
    return Listed(words or "", state or "all", str(sort or SORTS[0]), list(dict.fromkeys(chosen)))


def restore(tab: RunsTab, request: gr.Request) -> Updates:
    """The run that the page's address names, if it is there."""
    id = request.query_params.get("run", "")
    try:
        open_run(tab.site, id)
    except EquipoiseError:
        return gr.skip()
    return opened(tab, Listed(), id)  # as the filters are in a page that was just loaded


def opened(tab: RunsTab, listed: Listed, id: str, wanted: Wanted = MEASURED) -> Updates:
    """Shows a run, no other beside it."""
    try:
        run = open_run(tab.site, id)
    except EquipoiseError as error:
        return {tab.message: draw.notice(str(error), "bad")}
    moved, curving = slide(tab.site, id, None, 1), tab.parts.curving
    return {
        **_drawn(tab, listed, id, None, [], wanted),
        tab.parts.step: moved.slider,
        tab.end: moved.end,
        tab.message: "",
        tab.chosen: id,
        tab.actions.row: gr.update(visible=True),
        tab.parts.tabs: gr.update(visible=True),
        tab.confirm.row: gr.update(visible=False),
        curving.metric: gr.update(choices=metrics(tab.site, id), value="loss"),
        curving.beside: gr.update(choices=[one for one in runs_several.offered(tab.site) if one != id], value=[]),
        **runs_more.of_run(tab.parts.more, run),
    }


def offer_metrics(tab: RunsTab, id: str, beside: list[str]) -> Updates:
    """What any of the runs has measured."""
    try:
        return {tab.parts.curving.metric: gr.update(choices=metrics(tab.site, id, beside or []))}
    except EquipoiseError:  # deleted since
        return gr.skip()


def offer_columns(tab: RunsTab) -> Updates:
    """What can stand in a column, and be sorted by."""
    offered = offered_columns(tab.site)
    sorts = [*SORTS, *(key for key in offered if key not in COLUMNS)]
    return {tab.filters.columns: gr.update(choices=offered), tab.filters.sort: gr.update(choices=sorts)}


def _drawn(tab: RunsTab, listed: Listed, id: str, step: int | None, digests: list[str], wanted: Wanted) -> Updates:
    listing = table(tab.site, listed.words, listed.state, listed.sort, id, listed.columns)
    shown = [listing, *detail(tab.site, id, step, wanted), *possible(tab.site, id)]
    outputs, new = unchanged(shown, digests)
    return {**dict(zip(tab.redrawn, outputs, strict=True)), tab.digests: new if new != digests else gr.skip()}


def unchanged(outputs: Sequence[Any], digests: Sequence[str]) -> tuple[list[Any], list[str]]:
    """The outputs without those that the page has already, by their digests; and the new digests, for the next time."""
    new = [hashlib.blake2s(json.dumps(one, default=str).encode(), digest_size=8).hexdigest() for one in outputs]
    before = [*digests, *[""] * (len(outputs) - len(digests))]
    return [gr.skip() if a == b else out for out, a, b in zip(outputs, new, before, strict=True)], new


class Slide(NamedTuple):
    """How the slider over a run's steps goes on."""

    shown: int | None  # the step to show, None for the last
    end: int  # the slider's last step
    slider: dict[str, Any]  # its update


def slide(site: Site, id: str, at: float | None, end: int) -> Slide:
    """The slider that stands at `at` of `end`, over the steps that there are now."""
    try:
        steps = sample_steps(open_run(site, id)) if id else []
        shown, first, last = followed(steps, at, end)
    except EquipoiseError:  # deleted since
        return Slide(None, end, gr.skip())
    if last == end and at is not None:
        return Slide(shown, end, gr.skip())
    value = last if shown is None else at
    update = gr.update(visible=len(steps) > 1, minimum=min(first, last - 1), maximum=last, value=value)
    return Slide(shown, last, update)


def followed(steps: Sequence[int], at: float | None, end: int) -> tuple[int | None, int, int]:
    """How a slider over steps goes on when there may be more of them.

    Args:
        steps: those that there are now.
        at: where it stands.
        end: where it ended until now.

    Returns:
        The step to show, None for the last; and the slider's first and last step.
    """
    shown = None if at is None or at >= end else round(at)
    return shown, min(steps, default=0), max(steps, default=0) or 1


def stop(tab: RunsTab, id: str) -> Updates:
    return _acted(tab, id, "stop")


def resume(tab: RunsTab, id: str) -> Updates:
    return _acted(tab, id, "resume")


def sample(tab: RunsTab, id: str) -> Updates:
    return _acted(tab, id, "sample")


def delete(tab: RunsTab, id: str) -> Updates:
    return _acted(tab, id, "delete")


def _acted(tab: RunsTab, id: str, what: str) -> Updates:
    hidden = gr.update(visible=False)
    try:
        message = draw.notice(act(tab.site, id, what, tab.workers), "good")
    except EquipoiseError as error:
        return {tab.message: draw.notice(str(error), "bad"), tab.confirm.row: hidden}
    gone = {tab.chosen: "", tab.actions.row: hidden, tab.parts.tabs: hidden} if what == "delete" else {}
    return {tab.message: message, tab.confirm.row: hidden, **gone}


def ask_delete(tab: RunsTab, id: str) -> Updates:
    question = (
        f"<p data-shown='{draw.esc(id)}'>Delete <b>{draw.esc(id)}</b> with all its files? It cannot be undone.</p>"
    )
    return {tab.confirm.row: gr.update(visible=True), tab.confirm.question: question}


def keep(tab: RunsTab) -> Updates:
    return {tab.confirm.row: gr.update(visible=False)}


def duplicate(tab: RunsTab, id: str) -> Updates:
    """Puts the run's configuration into the form of its pipeline."""
    return filled(tab.launch, tab.site, id, tab.message)
