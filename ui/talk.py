"""The tab Talk: a trained model and its base, asked the same, with the same noise, beside each other."""

from dataclasses import dataclass

import gradio as gr

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.comparing.comparison import Cell, Comparison
from equipoise.pipelines.jobs import background
from equipoise.ui import compare, draw
from equipoise.ui.answers import all_answers
from equipoise.ui.compare_pictures import MOST, shots, step_of
from equipoise.ui.draw import esc, url
from equipoise.ui.runs import open_run
from equipoise.ui.safety import Site
from equipoise.ui.widgets import HIDDEN, Slider, Updates, bound

POLL = 2.0  # seconds
OFFERED = 300  # runs
_END = ("the end of its training", "")


@dataclass(frozen=True, eq=False)
class TalkTab:
    """The parts of the tab, and what it remembers of one browser."""

    site: Site
    run: gr.Dropdown
    checkpoint: gr.Dropdown  # of the run, by the name of its folder; "" is the end
    prompt: gr.Textbox
    scale: Slider
    count: gr.Number
    message: gr.HTML
    shown: gr.HTML
    job: gr.State  # the comparison that is waited for, by id


def build(site: Site, tab: gr.Tab) -> None:
    """Draws the tab."""
    gr.HTML(draw.head("Talk", "A trained model beside its base: the same prompt, from the same noise."))
    with gr.Row(equal_height=False):
        run = gr.Dropdown(offered(site), label="Model", interactive=True, min_width=260, scale=2, elem_id="talk-run")
        of = gr.Dropdown(
            [_END], value="", label="As of", interactive=True, min_width=140, visible=False, elem_id="talk-checkpoint"
        )
        scale = Slider(
            0, 2, value=1, step=0.05, label="LoRA scale", interactive=True, min_width=200, elem_id="talk-scale"
        )
        count = gr.Number(1, label="Count", step=1, minimum=1, maximum=MOST, min_width=120, elem_id="talk-count")
    prompt = gr.Textbox(label="Prompt", max_lines=4, elem_id="talk-prompt")
    with gr.Row(elem_classes=["actions"]):
        go = gr.Button("Ask both", variant="primary", size="md", elem_id="talk")
    message = gr.HTML(elem_id="talk-message")
    shown = gr.HTML(draw.empty("Nothing asked yet", "Choose a run that is done, and write what to draw or to answer."))
    made = TalkTab(site, run, of, prompt, scale, count, message, shown, gr.State(""))
    tab.select(bound(offer_models, made), None, run, **HIDDEN)
    gr.on([run.change, tab.select], bound(choose_model, made), run, [of, scale, count], **HIDDEN)
    asked, outputs = [run, prompt, count, scale, of], [message, made.job, shown]
    gr.on([go.click, prompt.submit], bound(say, made), asked, outputs, **HIDDEN)
    gr.Timer(POLL).tick(bound(follow, made), [made.job, of], outputs, trigger_mode="once", **HIDDEN)


def offered(site: Site) -> list[str]:
    """Runs and cells that have a result and can be asked, newest first."""
    able: dict[str, bool] = {}  # by pipeline
    found = []
    for item in site.store.list(states=("done", "stopped"), kinds=("run", "cell")):
        if item.pipeline not in able:
            able[item.pipeline] = "prompts" in compare.accepted(site, [item.id])
        if able[item.pipeline] and (site.store.root / item.id / "result" / "result.json").is_file():
            found.append(item.id)
        if len(found) == OFFERED:
            break
    return found


def checkpoints_of(site: Site, id: str) -> list[tuple[str, str]]:
    """The checkpoints that a run has kept and that can be drawn from, newest first: (words, folder's name)."""
    from equipoise.pipelines.runs import checkpoints  # which needs torch

    if not compare.takes_files(site, [id]):
        return []
    found = checkpoints.complete(open_run(site, id).checkpoints)
    return [(f"step {step_of(folder)}", folder.name) for folder in reversed(found)]


def shown_beside(site: Site, id: str, checkpoint: str = "") -> str:
    """What the base and the trained model, or one of its checkpoints, drew or answered, beside each other."""
    made = compare.read(site, id)
    trained = [cell for cell in made.cells if not checkpoint or cell.row.endswith(f" {checkpoint}")]
    both = (made.base, *trained[:1])
    answered = all_answers(site, {_name(made, cell): made.place_of(cell) for cell in both})
    drawn = "" if answered else "".join(_side(site, made, id, cell) for cell in both)
    words = "; ".join(made.prompts[:4])
    return answered or f"<p class='hint'>{esc(words)}</p><div class='talk'>{drawn}</div>"


def _side(site: Site, made: Comparison, id: str, cell: Cell) -> str:
    found = shots(site, made, id, cell)[:MOST]
    images = [
        f"<a href='{url(shot.file)}' target='_blank'><img src='{url(shot.file)}' alt='{esc(cell.who)}'></a>"
        for shot in found
    ]
    return f"<section><h3>{esc(_name(made, cell))}</h3>{''.join(images)}</section>"


def _name(made: Comparison, cell: Cell) -> str:
    return f"{cell.row} {made.shown(cell.rate)}" if cell.run else "the untouched base"


# Handlers: what they are given stands in the order of the inputs above


def offer_models(tab: TalkTab) -> Updates:
    return {tab.run: gr.update(choices=offered(tab.site))}


def choose_model(tab: TalkTab, id: str | None) -> Updates:
    """Shows what can be said beside the prompt."""
    takes = compare.accepted(tab.site, [id]) if id else {"scale": "", "count": ""}
    found = checkpoints_of(tab.site, id) if id else []
    return {
        tab.checkpoint: gr.update(choices=[_END, *found], value="", visible=bool(found)),
        tab.scale: gr.update(visible="scale" in takes),
        tab.count: gr.update(visible="count" in takes),
    }


def say(
    tab: TalkTab, id: str | None, prompt: str, count: float | None, scale: float, checkpoint: str | None
) -> Updates:
    """Asks both in the background; what was asked before is shown at once."""
    try:
        if not id or not (prompt or "").strip():
            raise InputError("Choose a model, and write a prompt.")
        if checkpoint:  # all of them at once, so that the next one is there already
            name = compare.generate_from_files(tab.site, [id], prompt, count, f"{scale:g}", True, [])
        else:
            name = compare.generate(tab.site, [id], prompt, count, scale)
    except compare.SameJobError as same:
        name = same.name
    except EquipoiseError as error:
        return {tab.message: draw.notice(tab.site.without_paths(error), "bad")}
    return _followed(tab, f"{background.COMPARISONS}/{name}", checkpoint or "")


def follow(tab: TalkTab, job: str, checkpoint: str | None) -> Updates:
    """Shows what is waited for when it is there."""
    return _followed(tab, job, checkpoint or "") if job else gr.skip()


def _followed(tab: TalkTab, id: str, checkpoint: str) -> Updates:
    job = next((job for job in background.jobs(tab.site.store.root) if id.endswith(f"/{job.name}")), None)
    if job is None:  # deleted meanwhile
        return {tab.message: "", tab.job: ""}
    if job.state == "running":
        return {tab.message: draw.notice("Both are being asked …"), tab.job: id}
    try:
        if job.state == "dead":
            last = job.log.splitlines()[-1] if job.log else "its log is empty"
            raise InputError(f"It failed: {last}")
        return {tab.message: "", tab.job: "", tab.shown: shown_beside(tab.site, id, checkpoint)}
    except (EquipoiseError, OSError) as error:
        return {tab.message: draw.notice(tab.site.without_paths(error), "bad"), tab.job: ""}
