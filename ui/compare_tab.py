"""The tab Compare: what runs draw or answer, side by side, from the same prompts and the same noise."""

import hashlib
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import gradio as gr

from equipoise.errors import EquipoiseError
from equipoise.pipelines.comparing.comparison import RATE, Comparison
from equipoise.pipelines.jobs import background
from equipoise.ui import compare, compare_numbers, compare_vote, draw, runs_live
from equipoise.ui.compare_cell import cell_detail
from equipoise.ui.compare_grid import COLUMN, ROW, axes, grid
from equipoise.ui.compare_pictures import noises
from equipoise.ui.launch_tab import Launch, filled
from equipoise.ui.safety import Site
from equipoise.ui.widgets import (
    HIDDEN,
    ON_CLICK,
    PRIVATE,
    Confirm,
    Slider,
    Updates,
    asked_of,
    bound,
    clicked_id,
    confirm,
    root,
)

POLL = 2.0  # seconds
OWN_COUNT = "0 keeps the runs' own setting."
ON_PICTURE = ON_CLICK.replace(
    "{id: chosen.dataset.id}",
    "{id: chosen.dataset.id, picture: event.target.closest('[data-picture]')?.dataset.picture || ''}",
)


@dataclass(frozen=True, eq=False)
class View:
    """What is looked at, and how."""

    refs: gr.Dropdown  # a sweep, or runs
    which: gr.Dropdown  # the comparison
    delete: gr.Button  # it
    rows: gr.Dropdown
    columns: gr.Dropdown
    prompt: Slider
    noise: Slider
    step: Slider
    scale: Slider


@dataclass(frozen=True, eq=False)
class Shown:
    """What is shown of the comparison."""

    answer: gr.HTML
    use: gr.Button  # the rate that the answer names
    curve: gr.HTML
    title: gr.HTML  # the prompts
    grid: gr.HTML
    detail: gr.HTML  # the chosen cells
    table: gr.HTML
    export: gr.HTML


@dataclass(frozen=True, eq=False)
class Asks:
    """What is asked of another comparison."""

    prompt: gr.Textbox
    count: gr.Number
    generate: gr.Button
    around_files: gr.Accordion
    strengths: gr.Textbox
    checkpoints: gr.Checkbox
    files: gr.Dropdown
    at_hub: gr.Textbox
    from_files: gr.Button


@dataclass(frozen=True, eq=False)
class CompareTab:
    """The parts of the tab, and what it remembers of one browser."""

    site: Site
    launch: Launch
    view: View
    shown: Shown
    asks: Asks
    message: gr.HTML
    confirm: Confirm  # before the comparison that is shown is deleted
    end: gr.Button  # of the job that the message is about
    chosen: gr.State  # the marked cells, by run id ("base" is the base), the one chosen last at the end
    picture: gr.State  # which of its pictures, by key; "" is the first
    opened: gr.State  # the comparison that is shown, by id
    known: gr.State  # the comparisons that were offered, by id
    job: gr.State  # how the job stood when the timer last asked
    live: gr.State  # what the timer last found of runs without a comparison, and of which: (refs, HTML)


def build(site: Site, launch: Launch, tab: gr.Tab) -> None:
    """Draws the tab."""
    gr.HTML(
        draw.head("Compare", "The same prompts, noise, questions or clips for every cell, beside the untouched base.")
    )
    refs, which, delete = _choice(site)
    asked = confirm("comparison")
    message = gr.HTML(elem_id="compare-message")
    end = gr.Button("End it, or take it away", size="sm", visible=False, elem_id="end-job")
    answer, use, curve, title = _answer()
    view = View(refs, which, delete, *_view())
    cells, detail = _grid()
    vote = gr.Column()
    asks = _asks(site)
    shown = Shown(answer, use, curve, title, cells, detail, gr.HTML(), gr.HTML(elem_id="export"))
    states = gr.State([]), gr.State(""), gr.State(""), gr.State([]), gr.State(""), gr.State(([], ""))
    made = CompareTab(site, launch, view, shown, asks, message, asked, end, *states)
    _connect_choice(made, tab)
    _connect_view(made)
    _connect_cells(made)
    _connect_job(made)
    with vote:
        for voted in compare_vote.build(site, which):
            outputs = [shown.grid, shown.title, shown.detail]
            drawn = voted.then(bound(draw_grid, made), _looked_at(made), outputs, **HIDDEN)
            drawn.then(bound(show_tally, made), which, [shown.table, shown.export], **HIDDEN)


def _choice(site: Site) -> tuple[gr.Dropdown, gr.Dropdown, gr.Button]:
    with gr.Row(equal_height=True):
        refs = gr.Dropdown(
            compare.choices(site),
            value=[],
            multiselect=True,
            label="Sweep, or runs",
            elem_id="compare-refs",
            min_width=260,
            scale=3,
        )
        which = gr.Dropdown([], label="Comparison", elem_id="compare-which", scale=3, interactive=True, min_width=220)
        delete = gr.Button(
            "Delete comparison …", size="sm", scale=0, min_width=150, visible=False, elem_id="delete-comparison"
        )
    return refs, which, delete


def _answer() -> tuple[gr.HTML, gr.Button, gr.HTML, gr.HTML]:
    with gr.Row(elem_classes=["actions"]):
        answer = gr.HTML(elem_id="answer")
        use = gr.Button("Use this rate", variant="primary", size="md", visible=False, elem_id="use-rate")
    return answer, use, gr.HTML(), gr.HTML(elem_id="compare-prompt-text", js_on_load=ON_CLICK)


def _view() -> tuple[gr.Dropdown, gr.Dropdown, Slider, Slider, Slider, Slider]:
    wide: dict[str, Any] = {"interactive": True, "min_width": 160}
    with gr.Row(elem_classes=["sliders"]):
        prompt = _slider("Prompt", "0: one picture of each.", "compare-prompt", value=0)
        noise = _slider("Noise", "Which picture of each.", "compare-noise", value=1, visible=False)
        samples = "Drawn while training; the last is the end."
        step = _slider("Step", samples, "compare-step", value=1, visible=False)
        made = "Opens what was made at this strength."
        scale = _slider("LoRA scale", made, "compare-scale", maximum=compare.MOST_SCALE, value=1, step=0.05)
        rows = gr.Dropdown([("all else that differs", ROW)], value=ROW, label="Rows", **wide)
        columns = gr.Dropdown([("learning rate", COLUMN)], value=COLUMN, label="Columns", **wide)
    return rows, columns, prompt, noise, step, scale


def _slider(label: str, info: str, id: str, maximum: float = 1, step: float = 1, **more: Any) -> Slider:
    return Slider(0, maximum, step=step, label=label, info=info, interactive=True, min_width=220, elem_id=id, **more)


def _grid() -> tuple[gr.HTML, gr.HTML]:
    nothing = draw.empty("Nothing chosen", "Choose a sweep above. One that is done has its comparison already.")
    cells = gr.HTML(nothing, js_on_load=ON_PICTURE, elem_id="grid")
    return cells, gr.HTML(js_on_load=ON_PICTURE, elem_id="cell-detail", elem_classes=["viewed"])


def _asks(site: Site) -> Asks:
    with gr.Accordion("Compare again, or with a new prompt", open=True):
        with gr.Row(equal_height=False):
            prompt = gr.Textbox(
                label="Prompt",
                info="A line each; leave it empty to use the runs' own prompts.",
                max_lines=6,
                scale=4,
                min_width=260,
                elem_id="new-prompt",
            )
            count = gr.Number(0, label="Count", info=OWN_COUNT, step=1, min_width=200, elem_id="new-count")
        with gr.Row(elem_classes=["actions"]):
            generate = gr.Button("Generate", variant="primary", size="md", elem_id="generate")
        with gr.Accordion("LoRA files, checkpoints, several strengths", open=False) as around:
            with gr.Row(equal_height=False):
                strengths = gr.Textbox(
                    "1", label="Strengths", info="They become the columns, such as 0.5, 1.", elem_id="new-strengths"
                )
                checkpoints = gr.Checkbox(
                    label="Each checkpoint, too", info="All that the runs have kept.", elem_id="new-checkpoints"
                )
                files = gr.Dropdown(
                    compare.lora_files(site),
                    value=[],
                    multiselect=True,
                    label="LoRA files beside the runs",
                    info="Of the runs folder, and of the folders that --data named.",
                    elem_id="new-files",
                    scale=2,
                )
            info = "OWNER/NAME or OWNER/NAME/FILE.safetensors, a line each; downloaded when the button is pressed."
            at_hub = gr.Textbox(label="LoRA files of the hub", info=info, max_lines=6, elem_id="new-at-hub")
            from_files = gr.Button("Generate from files", size="md", elem_id="generate-files")
    return Asks(prompt, count, generate, around, strengths, checkpoints, files, at_hub, from_files)


def _connect_choice(tab: CompareTab, page_tab: gr.Tab) -> None:
    view, asks = tab.view, tab.asks
    page_tab.select(bound(offer, tab), None, [view.refs, asks.files], **HIDDEN)
    root().load(bound(restore, tab), None, view.refs, **HIDDEN)
    view.refs.change(None, view.refs, None, js="chosen => equipoise.at({compare: chosen.join(',')})", **PRIVATE)
    outputs = [view.scale, asks.prompt, asks.count, asks.around_files]
    view.refs.change(bound(pick, tab), view.refs, [view.which, tab.known, *_of_comparison(tab), *outputs], **HIDDEN)
    view.which.change(bound(open_another, tab), [view.which, view.refs, tab.opened], _of_comparison(tab), **HIDDEN)
    view.which.change(None, view.which, None, js="id => { if (id) equipoise.at({made: id}, true) }", **PRIVATE)
    question, outputs = gr.Textbox(visible=False), [view.which, tab.known, *_of_comparison(tab)]
    view.delete.click(bound(ask_delete, tab), view.which, [tab.confirm.row, tab.confirm.question], **HIDDEN)
    tab.confirm.no.click(bound(keep, tab), None, tab.confirm.row, **HIDDEN)
    tab.confirm.yes.click(
        bound(delete_comparison, tab), [question, view.refs], outputs, js=asked_of("comparison"), **HIDDEN
    )
    launch = tab.launch
    outputs = [tab.message, *launch.outputs]
    copied = tab.shown.use.click(bound(use_rate, tab), view.which, outputs, **HIDDEN)
    copied.then(None, None, None, js="() => equipoise.at({tab: 'Launch'})", **PRIVATE)


def _of_comparison(tab: CompareTab) -> list[Any]:
    """What follows when another comparison is opened."""
    view, shown = tab.view, tab.shown
    sliders = [view.delete, view.rows, view.columns, view.prompt, view.noise, view.step]
    parts = [shown.answer, shown.use, shown.curve, shown.title, shown.grid, shown.detail, shown.table, shown.export]
    return [*sliders, *parts, tab.chosen, tab.picture, tab.message, tab.end, tab.opened, tab.confirm.row]


def _looked_at(tab: CompareTab) -> list[Any]:
    view = tab.view
    looked_at = [view.which, view.rows, view.columns, view.prompt, view.step, tab.chosen]
    return [*looked_at, view.noise, tab.picture]


def _connect_view(tab: CompareTab) -> None:
    view, shown = tab.view, tab.shown
    moved = [view.rows.input, view.columns.input, view.prompt.change, view.step.change, view.noise.change]
    # While one grid is drawn, others may be asked for: the last counts.
    outputs = [shown.grid, shown.title, shown.detail]
    gr.on(moved, bound(draw_grid, tab), _looked_at(tab), outputs, trigger_mode="always_last", **HIDDEN)
    view.scale.change(bound(by_scale, tab), [view.refs, view.which, view.scale], [view.which, tab.message], **HIDDEN)
    shown.title.select(bound(choose_prompt, tab), view.prompt, view.prompt, **HIDDEN)


def _connect_cells(tab: CompareTab) -> None:
    shown = tab.shown
    marked = [tab.chosen, tab.picture, shown.detail, shown.grid]
    shown.grid.select(bound(choose_cell, tab), _looked_at(tab), marked, trigger_mode="multiple", **HIDDEN)
    shown.detail.select(
        bound(choose_picture, tab), _looked_at(tab), [tab.picture, shown.detail], trigger_mode="multiple", **HIDDEN
    )


def _connect_job(tab: CompareTab) -> None:
    view, asks = tab.view, tab.asks
    said = [tab.message, tab.end]
    asks.generate.click(bound(start, tab), [view.refs, asks.prompt, asks.count, view.scale], said, **HIDDEN)
    given = [view.refs, asks.prompt, asks.count, asks.strengths, asks.checkpoints, asks.files, asks.at_hub]
    asks.from_files.click(bound(start_from_files, tab), given, said, **HIDDEN)
    tab.end.click(bound(end_job, tab), view.refs, said, **HIDDEN)
    timer = gr.Timer(POLL)
    outputs = [*said, tab.job, tab.live]
    timer.tick(bound(follow_job, tab), [view.refs, tab.job], outputs, trigger_mode="once", **HIDDEN)
    tab.live.change(bound(show_live, tab), [view.refs, tab.live], tab.shown.grid, **HIDDEN)
    tab.job.change(bound(offer_new, tab), [view.refs, tab.known], [view.which, tab.known], **HIDDEN)


# Handlers: what they are given stands in the order of the inputs above


def offer(tab: CompareTab) -> Updates:
    """The sweeps, runs and files that there are now."""
    files = gr.update(choices=compare.lora_files(tab.site))
    return {tab.view.refs: gr.update(choices=compare.choices(tab.site)), tab.asks.files: files}


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
        tab.asks.around_files: gr.update(visible=not refs or compare.takes_files(tab.site, refs)),
    }


def open_another(tab: CompareTab, id: str, refs: list[str], opened: str) -> Updates:
    return open_comparison(tab, id, refs) if id and id != opened else gr.skip()


def open_comparison(tab: CompareTab, id: str, refs: list[str]) -> Updates:
    """Shows a comparison of these runs; where there is none, what to do."""
    if not refs:
        return _cleared(tab, draw.empty("Nothing chosen", "Choose a sweep above."))
    if not id:
        said = _job_words(tab, refs)
        return _cleared(tab, runs_live.of_refs(tab.site, refs) or _not_compared(said[tab.message])) | said
    try:
        return _filled(tab, id) | _job_words(tab, refs)
    except (EquipoiseError, OSError) as error:
        return _cleared(tab, draw.notice(str(error), "bad"))


def _not_compared(job: str) -> str:
    """What stands in place of a comparison. `job`: what there is to say of one that is made."""
    hint = "Generate compares them all in one job, by their own settings or a new prompt."
    return draw.empty("Not compared yet", "" if job else hint)


def _job_words(tab: CompareTab, refs: list[str]) -> Updates:
    """What there is to say of the job for these runs, and whether it can be ended."""
    pending = bool(refs) and bool(compare.pending(tab.site, refs))
    return {tab.message: compare.working(tab.site, refs), tab.end: gr.update(visible=pending)}


def _cleared(tab: CompareTab, words: str) -> Updates:
    shown = tab.shown
    parts = (shown.answer, shown.title, shown.detail, shown.curve, shown.table, shown.export, tab.opened, tab.picture)
    hidden = gr.update(visible=False)
    empty = {tab.message: "", **dict.fromkeys((shown.use, tab.end, tab.view.delete, tab.confirm.row), hidden)}
    return {shown.grid: words, **dict.fromkeys(parts, ""), tab.chosen: [], **empty}


def _filled(tab: CompareTab, id: str) -> Updates:
    site, view, shown = tab.site, tab.view, tab.shown
    comparison = compare.read(site, id)
    steps = compare.steps(site, comparison)
    last = max(*steps, compare.end(site, comparison)) if steps else 1
    first = steps[0] if len(steps) > 1 else 0  # a slider has two ends, hidden or not
    many, options, each = max(len(comparison.prompts), 1), axes(comparison), noises(comparison)
    return {
        tab.confirm.row: gr.update(visible=False),
        view.delete: gr.update(visible=id.startswith(f"{background.COMPARISONS}/")),
        view.rows: gr.update(choices=options, value=ROW),
        view.columns: gr.update(choices=options, value=RATE),
        view.prompt: gr.update(minimum=0, maximum=many, value=0, **compare.pictured(site, comparison)),
        view.noise: gr.update(visible=each > 1, minimum=1, maximum=max(each, 2), value=1),
        view.step: gr.update(visible=len(steps) > 1, minimum=first, maximum=max(last, 1), value=last),
        **draw_grid(tab, id, ROW, RATE, 0, last, [], 1, ""),
        shown.answer: compare_numbers.answer(site, id),
        shown.use: gr.update(visible=bool(compare_numbers.best_run(site, id))),
        shown.curve: compare_numbers.curve(site, id),
        shown.table: compare_numbers.table(site, id),
        shown.export: compare_numbers.export(site, id),
        tab.chosen: [],
        tab.picture: "",
        tab.opened: id,
    }


def use_rate(tab: CompareTab, id: str) -> Updates:
    """Puts the configuration of the cell that the answer names into Launch."""
    try:
        run = compare_numbers.best_run(tab.site, id) if id else ""
    except (EquipoiseError, OSError) as error:
        return {tab.message: draw.notice(str(error), "bad")}
    return filled(tab.launch, tab.site, run, tab.message)


def draw_grid(
    tab: CompareTab,
    id: str,
    rows: str,
    columns: str,
    prompt: float,
    step: float,
    picked: list[str],
    noise: float,
    picture: str,
) -> Updates:
    """The grid, the prompts and the chosen cell as they are looked at now."""
    site, shown = tab.site, tab.shown
    if not id:
        return {shown.title: ""}
    try:
        comparison = compare.read(site, id)
        at, number = _step(tab, comparison, step), min(int(prompt or 0), len(comparison.prompts))
        marked = ["" if run == "base" else run for run in picked]
        return {
            shown.grid: grid(site, id, rows, columns, number, at, marked, int(noise or 1)),
            shown.title: compare_numbers.prompts(site, id, number),
            shown.detail: cell_detail(site, id, picked, number, _of_prompt(picture, number), at, int(noise or 1)),
        }
    except (EquipoiseError, OSError) as error:
        return {shown.grid: draw.notice(str(error), "bad"), shown.title: "", shown.detail: ""}


def _of_prompt(picture: str, prompt: int) -> str:
    """The chosen picture's key, unless another prompt is looked at."""
    return picture if not prompt or picture.startswith(f"{prompt - 1}-") else ""


def _step(tab: CompareTab, comparison: Comparison, step: float) -> int | None:
    """The step whose samples are looked at; None where it is the end, whose pictures the comparison has itself."""
    steps = compare.steps(tab.site, comparison)
    return int(step) if steps and step < max(*steps, compare.end(tab.site, comparison)) else None


def show_tally(tab: CompareTab, id: str | None) -> Updates:
    """What blind votes come to, in the table and the files."""
    if not id:
        return gr.skip()
    return {
        tab.shown.table: compare_numbers.table(tab.site, id),
        tab.shown.export: compare_numbers.export(tab.site, id),
    }


def choose_prompt(tab: CompareTab, before: float, event: gr.EventData) -> Updates:
    number = clicked_id(event)
    return {tab.view.prompt: int(number) if number.isdecimal() and len(number) < 5 else gr.skip()}


def choose_cell(
    tab: CompareTab,
    id: str,
    rows: str,
    columns: str,
    prompt: float,
    step: float,
    picked: list[str],
    noise: float,
    picture: str,
    event: gr.EventData,
) -> Updates:
    """Marks the cell that was clicked, on the picture that was, and keeps the one before it marked."""
    run = clicked_id(event)
    picked = [*(one for one in picked if one != run), run][-2:]
    picture = str(getattr(event, "picture", "") or "")
    drawn = draw_grid(tab, id, rows, columns, prompt, step, picked, noise, picture)
    return {tab.chosen: picked, tab.picture: picture, **{key: drawn[key] for key in _cells(tab) if key in drawn}}


def _cells(tab: CompareTab) -> tuple[gr.HTML, gr.HTML]:
    return tab.shown.grid, tab.shown.detail


def choose_picture(
    tab: CompareTab,
    id: str,
    rows: str,
    columns: str,
    prompt: float,
    step: float,
    picked: list[str],
    noise: float,
    picture: str,
    event: gr.EventData,
) -> Updates:
    """Shows another picture of the cell that is marked already, whatever prompt the grid shows."""
    picture = str(getattr(event, "picture", "") or "")
    try:
        at = _step(tab, compare.read(tab.site, id), step)
        words = cell_detail(tab.site, id, picked, int(prompt or 0), picture, at, int(noise or 1))
    except (EquipoiseError, OSError) as error:
        words = draw.notice(str(error), "bad")
    return {tab.picture: picture, tab.shown.detail: words}


def by_scale(tab: CompareTab, refs: list[str], id: str, scale: float) -> Updates:
    """Opens the comparison like the one that is shown, but for the LoRA's scale."""
    found = compare.made(tab.site, refs or [])
    now = next((item for item in found if item.id == id), None)
    if now is None:
        return {tab.message: ""}
    own = compare.own_scale(tab.site, refs or [])
    for item in found:
        drawn = own if item.scale is None else item.scale
        if not item.by_strength and item.prompts == now.prompts and abs(drawn - scale) < compare.CLOSE:
            return {tab.view.which: item.id if item.id != id else gr.skip(), tab.message: ""}
    words = f"Nothing is drawn at scale {scale:g} yet: Generate does that, for the prompt above."
    return {tab.message: draw.notice(words)}


def start(tab: CompareTab, refs: list[str], prompt: str, count: float, scale: float) -> Updates:
    """Starts a job that makes another comparison."""
    return _started(tab, refs, lambda: compare.generate(tab.site, refs or [], prompt or "", count, scale))


def start_from_files(
    tab: CompareTab,
    refs: list[str],
    prompt: str,
    count: float,
    strengths: str,
    checkpoints: bool,
    files: list[str],
    at_hub: str | None,
) -> Updates:
    """Starts a job that lays LoRA files out by strength."""
    given = (prompt or "", count, strengths or "", checkpoints, files or [], at_hub or "")
    return _started(tab, refs, lambda: compare.generate_from_files(tab.site, refs or [], *given))


def _started(tab: CompareTab, refs: list[str], begin: Callable[[], str]) -> Updates:
    try:
        begin()
    except EquipoiseError as error:
        return {tab.message: draw.notice(tab.site.without_paths(error), "bad")}
    words = compare.working(tab.site, refs) or draw.notice("Generating … starting")
    return {tab.message: words, tab.end: gr.update(visible=True)}


def end_job(tab: CompareTab, refs: list[str]) -> Updates:
    """Ends the job that is at work for these runs, or takes the failed one away."""
    try:
        words = compare.discard(tab.site, compare.pending(tab.site, refs or []))
    except EquipoiseError as error:
        return {tab.message: draw.notice(str(error), "bad"), tab.end: gr.update(visible=False)}
    return {tab.message: draw.notice(words, "good"), tab.end: gr.update(visible=False)}


def ask_delete(tab: CompareTab, id: str | None) -> Updates:
    made = draw.esc(id or "")
    question = f"<p data-shown='{made}'>Delete <b>{made}</b> with all its pictures? It cannot be undone.</p>"
    return {tab.confirm.row: gr.update(visible=True), tab.confirm.question: question}


def keep(tab: CompareTab) -> Updates:
    return {tab.confirm.row: gr.update(visible=False)}


def delete_comparison(tab: CompareTab, id: str, refs: list[str]) -> Updates:
    """Deletes the comparison that was asked about, and opens the first of those that are left."""
    try:
        words = compare.discard(tab.site, id or "")
    except EquipoiseError as error:
        return {tab.message: draw.notice(str(error), "bad"), tab.confirm.row: gr.update(visible=False)}
    found = compare.made(tab.site, refs or [])
    ids = [item.id for item in found]
    which = gr.update(choices=[(item.label, item.id) for item in found], value=ids[0] if ids else None)
    shown = open_comparison(tab, ids[0] if ids else "", refs or [])
    return {**shown, tab.message: draw.notice(words, "good"), tab.view.which: which, tab.known: ids}


def follow_job(tab: CompareTab, refs: list[str], before: str) -> Updates:
    """Whether a job has gone on or ended since the timer asked `before`."""
    if not refs:
        return gr.skip()
    words = compare.working(tab.site, refs)
    found = ",".join(item.id for item in compare.made(tab.site, refs))
    live = "" if found else runs_live.of_refs(tab.site, refs)
    state = "|".join([words, found, hashlib.sha256(live.encode()).hexdigest() if live else ""])
    if state == before:
        return gr.skip()
    # Other messages stand in the same part: they stay until there is something else to say of the job.
    said = _job_words(tab, refs) if words != before.rsplit("|", 2)[0] else {}
    if not live and not found and before.rpartition("|")[2]:  # it has ended, and nothing came of it
        live = _not_compared(words)
    return {tab.job: state} | said | ({tab.live: (refs, live)} if live else {})


def show_live(tab: CompareTab, refs: list[str], live: tuple[list[str], str]) -> Updates:
    """Shows what the timer found, unless other runs have been chosen since it asked."""
    of, words = live
    return {tab.shown.grid: words} if words and of == refs else gr.skip()


def offer_new(tab: CompareTab, refs: list[str], known: list[str]) -> Updates:
    """When another comparison has come, offers and shows it; nothing else changes what is looked at."""
    new = compare.newest(tab.site, refs or [], known)
    if new is None:
        return gr.skip()
    found = compare.made(tab.site, refs)
    options = [(item.label, item.id) for item in found]
    return {tab.view.which: gr.update(choices=options, value=new), tab.known: [item.id for item in found]}
