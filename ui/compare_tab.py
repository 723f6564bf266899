"""The tab Compare: what runs draw or answer, side by side, from the same prompts and the same noise."""

from dataclasses import dataclass
from typing import Any

import gradio as gr

from equipoise.errors import EquipoiseError
from equipoise.pipelines.comparing.comparison import RATE
from equipoise.ui import compare, draw
from equipoise.ui.compare_cell import cell_detail
from equipoise.ui.compare_grid import COLUMN, ROW, axes, grid
from equipoise.ui.compare_numbers import curve, export, table
from equipoise.ui.safety import Site
from equipoise.ui.widgets import HIDDEN, ON_CLICK, PRIVATE, Slider, Updates, bound, clicked_id, root

MOST_SCALE = 10  # of a LoRA: far beyond what still draws anything
POLL = 2.0  # seconds
OWN_COUNT = "0 keeps the runs' own setting."


@dataclass(frozen=True, eq=False)
class View:
    """What is looked at, and how."""

    refs: gr.Dropdown  # a sweep, or runs
    which: gr.Dropdown  # the comparison
    rows: gr.Dropdown
    columns: gr.Dropdown
    prompt: Slider
    step: Slider
    scale: Slider


@dataclass(frozen=True, eq=False)
class Shown:
    """What is shown of the comparison."""

    title: gr.HTML  # the prompts
    grid: gr.HTML
    detail: gr.HTML  # the chosen cells
    curve: gr.HTML
    table: gr.HTML
    export: gr.HTML


@dataclass(frozen=True, eq=False)
class Asks:
    """What is asked of another comparison."""

    prompt: gr.Textbox
    count: gr.Number
    generate: gr.Button


@dataclass(frozen=True, eq=False)
class CompareTab:
    """The parts of the tab, and what it remembers of one browser."""

    site: Site
    view: View
    shown: Shown
    asks: Asks
    message: gr.HTML
    chosen: gr.State  # the marked cells, by run id ("base" is the base), the one chosen last at the end
    opened: gr.State  # the comparison that is shown, by id
    known: gr.State  # the comparisons that were offered, by id
    job: gr.State  # how the job stood when the timer last asked


def build(site: Site, tab: gr.Tab) -> None:
    """Draws the tab."""
    gr.HTML(
        draw.head("Compare", "The same prompts, noise, questions or clips for every cell, beside the untouched base.")
    )
    view = _view(site)
    title, shown, detail = _grid()
    asks = _asks()
    message = gr.HTML(elem_id="compare-message")
    with gr.Row():
        robust = gr.HTML()
    parts = Shown(title, shown, detail, robust, gr.HTML(), gr.HTML(elem_id="export"))
    made = CompareTab(site, view, parts, asks, message, gr.State([]), gr.State(""), gr.State([]), gr.State(""))
    _connect_choice(made, tab)
    _connect_view(made)
    _connect_job(made)


def _view(site: Site) -> View:
    refs = gr.Dropdown(
        compare.choices(site),
        value=[],
        multiselect=True,
        label="Sweep, or runs",
        info="Choose one sweep, or several runs.",
        elem_id="compare-refs",
    )
    wide: dict[str, Any] = {"interactive": True, "min_width": 220}
    with gr.Row():
        which = gr.Dropdown([], label="Comparison", elem_id="compare-which", scale=2, **wide)
        rows = gr.Dropdown([("optimizer and what else differs", ROW)], value=ROW, label="Rows", **wide)
        columns = gr.Dropdown([("learning rate", COLUMN)], value=COLUMN, label="Columns", **wide)
    with gr.Row():
        prompt = _slider("Prompt", "0 shows the first picture of each prompt.", "compare-prompt", value=0)
        samples = "Shows the samples that were drawn at this step of the training; the last step shows the end result."
        step = _slider("Step", samples, "compare-step", value=1, visible=False)
        made = "Shows the comparison that was made at this scale, if there is one."
        scale = _slider("LoRA scale", made, "compare-scale", maximum=MOST_SCALE, value=1, step=0.05)
    return View(refs, which, rows, columns, prompt, step, scale)


def _slider(label: str, info: str, id: str, maximum: float = 1, step: float = 1, **more: Any) -> Slider:
    return Slider(0, maximum, step=step, label=label, info=info, interactive=True, min_width=260, elem_id=id, **more)


def _grid() -> tuple[gr.HTML, gr.HTML, gr.HTML]:
    title = gr.HTML(elem_id="compare-prompt-text")
    nothing = draw.empty("Nothing chosen", "Choose a sweep above. One that is done has its comparison already.")
    return title, gr.HTML(nothing, js_on_load=ON_CLICK, elem_id="grid"), gr.HTML(elem_id="cell-detail")


def _asks() -> Asks:
    with gr.Accordion("Compare again, or with a new prompt", open=True):
        with gr.Row(equal_height=False):
            prompt = gr.Textbox(
                label="Prompt",
                info="Leave it empty to use the runs' own prompts.",
                max_lines=3,
                scale=4,
                min_width=260,
                elem_id="new-prompt",
            )
            count = gr.Number(0, label="Count", info=OWN_COUNT, step=1, min_width=200, elem_id="new-count")
        with gr.Row(elem_classes=["actions"]):
            generate = gr.Button("Generate", variant="primary", size="md", elem_id="generate")
    return Asks(prompt, count, generate)


def _connect_choice(tab: CompareTab, page_tab: gr.Tab) -> None:
    view = tab.view
    page_tab.select(bound(offer, tab), None, view.refs, **HIDDEN)
    root().load(bound(restore, tab), None, view.refs, **HIDDEN)
    view.refs.change(None, view.refs, None, js="chosen => equipoise.at({compare: chosen.join(',')})", **PRIVATE)
    asks = [view.scale, tab.asks.prompt, tab.asks.count]
    view.refs.change(bound(pick, tab), view.refs, [view.which, tab.known, *_of_comparison(tab), *asks], **HIDDEN)
    view.which.change(bound(open_another, tab), [view.which, view.refs, tab.opened], _of_comparison(tab), **HIDDEN)
    view.which.change(None, view.which, None, js="id => { if (id) equipoise.at({made: id}) }", **PRIVATE)


def _of_comparison(tab: CompareTab) -> list[Any]:
    """What follows when another comparison is opened."""
    view, shown = tab.view, tab.shown
    sliders = [view.rows, view.columns, view.prompt, view.step]
    parts = [shown.grid, shown.title, shown.detail, shown.curve, shown.table, shown.export]
    return [*sliders, *parts, tab.chosen, tab.message, tab.opened]


def _connect_view(tab: CompareTab) -> None:
    view, shown = tab.view, tab.shown
    looked_at = [view.which, view.rows, view.columns, view.prompt, view.step, tab.chosen]
    moved = [view.rows.input, view.columns.input, view.prompt.change, view.step.change]
    # While one grid is drawn, others may be asked for: the last counts.
    gr.on(moved, bound(draw_grid, tab), looked_at, [shown.grid, shown.title], trigger_mode="always_last", **HIDDEN)
    view.prompt.change(bound(draw_detail, tab), [view.which, tab.chosen, view.prompt], shown.detail, **HIDDEN)
    marked = [tab.chosen, shown.detail, shown.grid]
    shown.grid.select(bound(choose_cell, tab), looked_at, marked, trigger_mode="multiple", **HIDDEN)
    view.scale.change(bound(by_scale, tab), [view.refs, view.which, view.scale], [view.which, tab.message], **HIDDEN)


def _connect_job(tab: CompareTab) -> None:
    view, asks = tab.view, tab.asks
    asks.generate.click(bound(start, tab), [view.refs, asks.prompt, asks.count, view.scale], tab.message, **HIDDEN)
    timer = gr.Timer(POLL)
    timer.tick(bound(follow_job, tab), [view.refs, tab.job], [tab.message, tab.job], trigger_mode="once", **HIDDEN)
    tab.job.change(bound(offer_new, tab), [view.refs, tab.known], [view.which, tab.known], **HIDDEN)


# Handlers: what they are given stands in the order of the inputs above


def offer(tab: CompareTab) -> Updates:
    """The sweeps and runs that there are now."""
    return {tab.view.refs: gr.update(choices=compare.choices(tab.site))}


def restore(tab: CompareTab, request: gr.Request) -> Updates:
    """The runs that the page's address names, as far as they are there."""
    offered = compare.choices(tab.site)
    known = {id for _, id in offered}
    chosen = [id for id in request.query_params.get("compare", "").split(",") if id in known]
    return {tab.view.refs: gr.update(choices=offered, value=chosen) if chosen else gr.skip()}


def pick(tab: CompareTab, refs: list[str], request: gr.Request) -> Updates:
    """What there is of these runs; shown is the comparison that the page's address names, or the first."""
    found = compare.made(tab.site, refs or [])
    ids = [item.id for item in found]
    named = request.query_params.get("made", "") if request else ""  # none where no page asks
    first = named if named in ids else ids[0] if ids else ""
    takes = compare.accepted(tab.site, refs) if refs else {"prompts": "", "count": "", "scale": ""}
    count = " ".join(filter(None, [takes.get("count") and f"{takes['count'].rstrip('.')}.", OWN_COUNT]))
    return {
        tab.view.which: gr.update(choices=[(item.label, item.id) for item in found], value=first or None),
        tab.known: ids,
        **open_comparison(tab, first, refs or []),
        tab.view.scale: gr.update(visible="scale" in takes, value=compare.own_scale(tab.site, refs or [])),
        tab.asks.prompt: gr.update(visible="prompts" in takes),
        tab.asks.count: gr.update(visible="count" in takes, info=count),
    }


def open_another(tab: CompareTab, id: str, refs: list[str], opened: str) -> Updates:
    return open_comparison(tab, id, refs) if id and id != opened else gr.skip()


def open_comparison(tab: CompareTab, id: str, refs: list[str]) -> Updates:
    """Shows a comparison of these runs; where there is none, what to do."""
    if not refs:
        return _cleared(tab, draw.empty("Nothing chosen", "Choose a sweep above."))
    if not id:
        job = compare.working(tab.site, refs)
        hint = "Generate compares them all in one job, by their own settings or a new prompt."
        return _cleared(tab, draw.empty("Not compared yet", "" if job else hint), message=job)
    try:
        return _filled(tab, id) | {tab.message: compare.working(tab.site, refs)}
    except (EquipoiseError, OSError) as error:
        return _cleared(tab, draw.notice(str(error), "bad"))


def _cleared(tab: CompareTab, words: str, message: str = "") -> Updates:
    shown = tab.shown
    parts = (shown.title, shown.detail, shown.curve, shown.table, shown.export, tab.opened)
    return {shown.grid: words, **dict.fromkeys(parts, ""), tab.chosen: [], tab.message: message}


def _filled(tab: CompareTab, id: str) -> Updates:
    site, view, shown = tab.site, tab.view, tab.shown
    comparison = compare.read(site, id)
    steps = compare.steps(site, comparison)
    last = max(*steps, compare.end(site, comparison)) if steps else 1
    first = steps[0] if len(steps) > 1 else 0  # a slider has two ends, hidden or not
    many, options = max(len(comparison.prompts), 1), axes(comparison)
    return {
        view.rows: gr.update(choices=options, value=ROW),
        view.columns: gr.update(choices=options, value=RATE),
        view.prompt: gr.update(minimum=0, maximum=many, value=0, **compare.pictured(site, comparison)),
        view.step: gr.update(visible=len(steps) > 1, minimum=first, maximum=max(last, 1), value=last),
        **draw_grid(tab, id, ROW, RATE, 0, last, []),
        shown.detail: cell_detail(site, id, [], 0),
        shown.curve: curve(site, id),
        shown.table: table(site, id),
        shown.export: export(site, id),
        tab.chosen: [],
        tab.opened: id,
    }


def draw_grid(
    tab: CompareTab, id: str, rows: str, columns: str, prompt: float, step: float, picked: list[str]
) -> Updates:
    site, shown = tab.site, tab.shown
    if not id:
        return {shown.title: ""}
    try:
        comparison = compare.read(site, id)
        steps = compare.steps(site, comparison)
        at = int(step) if steps and step < max(*steps, compare.end(site, comparison)) else None
        number = min(int(prompt or 0), len(comparison.prompts))
        marked = ["" if run == "base" else run for run in picked]
        text = comparison.prompts[number - 1] if number else " · ".join(comparison.prompts[:4])
        cells = grid(site, id, rows, columns, number, at, marked)
        return {shown.grid: cells, shown.title: f"<p class='hint'>{draw.esc(text)}</p>"}
    except (EquipoiseError, OSError) as error:
        return {shown.grid: draw.notice(str(error), "bad"), shown.title: ""}


def draw_detail(tab: CompareTab, id: str, picked: list[str], prompt: float) -> Updates:
    return {tab.shown.detail: cell_detail(tab.site, id, picked, int(prompt or 0)) if id else ""}


def choose_cell(
    tab: CompareTab,
    id: str,
    rows: str,
    columns: str,
    prompt: float,
    step: float,
    picked: list[str],
    event: gr.EventData,
) -> Updates:
    """Marks the cell that was clicked, and keeps the one before it marked."""
    run = clicked_id(event)
    picked = [*(one for one in picked if one != run), run][-2:]
    try:
        words = cell_detail(tab.site, id, picked, int(prompt or 0))
    except (EquipoiseError, OSError) as error:
        words = draw.notice(str(error), "bad")
    drawn = draw_grid(tab, id, rows, columns, prompt, step, picked)
    return {tab.chosen: picked, tab.shown.detail: words, tab.shown.grid: drawn.get(tab.shown.grid, gr.skip())}


def by_scale(tab: CompareTab, refs: list[str], id: str, scale: float) -> Updates:
    """Opens the comparison like the one that is shown, but for the LoRA's scale."""
    found = compare.made(tab.site, refs or [])
    now = next((item for item in found if item.id == id), None)
    if now is None:
        return {tab.message: ""}
    own = compare.own_scale(tab.site, refs or [])
    for item in found:
        drawn = own if item.scale is None else item.scale
        if item.prompts == now.prompts and abs(drawn - scale) < compare.CLOSE:
            return {tab.view.which: item.id if item.id != id else gr.skip(), tab.message: ""}
    words = f"Nothing is drawn at scale {scale:g} yet: Generate does that, for the prompt above."
    return {tab.message: draw.notice(words)}


def start(tab: CompareTab, refs: list[str], prompt: str, count: float, scale: float) -> Updates:
    """Starts a job that makes another comparison."""
    try:
        compare.generate(tab.site, refs or [], prompt or "", count, scale)
        return {tab.message: compare.working(tab.site, refs) or draw.notice("Generating … starting")}
    except EquipoiseError as error:
        return {tab.message: draw.notice(str(error), "bad")}


def follow_job(tab: CompareTab, refs: list[str], before: str) -> Updates:
    """Whether a job has gone on or ended since the timer asked `before`."""
    if not refs:
        return gr.skip()
    words = compare.working(tab.site, refs)
    state = f"{words}|{','.join(item.id for item in compare.made(tab.site, refs))}"
    if state == before:
        return gr.skip()
    # Other messages stand in the same part: they stay until there is something else to say of the job.
    return {tab.job: state} | ({tab.message: words} if words != before.rpartition("|")[0] else {})


def offer_new(tab: CompareTab, refs: list[str], known: list[str]) -> Updates:
    """When another comparison has come, offers and shows it; nothing else changes what is looked at."""
    new = compare.newest(tab.site, refs or [], known)
    if new is None:
        return gr.skip()
    found = compare.made(tab.site, refs)
    options = [(item.label, item.id) for item in found]
    return {tab.view.which: gr.update(choices=options, value=new), tab.known: [item.id for item in found]}
