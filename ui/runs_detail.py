"""One run as HTML: how it stands, its samples, log, configuration and files; and what can be done to it."""

from collections.abc import Sequence
from functools import lru_cache
from pathlib import Path
from typing import Any, NamedTuple

import gradio as gr
import psutil

from equipoise import registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.config import yamlio
from equipoise.pipelines.config.keys import section_at
from equipoise.pipelines.files import version
from equipoise.pipelines.jobs import background
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.jobs.making import being_made
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.status import Status
from equipoise.ui import draw, runs_live, runs_notes
from equipoise.ui.draw import esc, url
from equipoise.ui.runs import LOSS, badge, bar, left, open_run, rate, recent_loss, sample_steps, together
from equipoise.ui.runs_curves import MEASURED, Wanted, cell_names, charts
from equipoise.ui.safety import SUFFIXES, Site, refuse_commands

LOG_LINES = 60
MOST_STEPS = 20  # whose samples lie folded up below those of the step that is looked at
MOST_FILES = 400  # of the samples of one step
_PICTURES = (".png", ".jpg", ".jpeg", ".webp")


class Detail(NamedTuple):
    """A run's parts of the page."""

    heading: str
    charts: str
    samples: str
    log: str
    config: str
    files: str


class Possible(NamedTuple):
    """Updates of the buttons, by what a run allows now."""

    stop: dict[str, Any]
    sample: dict[str, Any]
    resume: dict[str, Any]


def heading(site: Site, id: str) -> str:
    """What a run is and how it stands, with its cells where it is a sweep."""
    if not id:
        return draw.empty("Choose a run", "Its curves, samples, log and files appear here.")
    run = open_run(site, id)
    now = together(run, run.status())
    back = f"<button class='link' data-id='{esc(run.sweep)}'>← {esc(run.sweep)}</button>" if run.sweep else ""
    name = runs_notes.read(run.folder).name
    ended = bool(run.sweep) and _ended(open_run(site, run.sweep).status())
    facts = {
        "pipeline": now.pipeline,
        "step": f"{now.step} of {now.total}" if now.total else now.step,
        "left": left(site, now),
        LOSS: draw.number(recent_loss(run.folder, now)),
        "rate": rate(now.shown_rate),
        "rate of the last step": rate(now.rate),
        "took": draw.span(now.duration) if now.started else "",
        "memory": _memory(now),
        "process": f"{now.pid} on {now.host}" if now.state == "running" else "",
    }
    parts = [
        back,
        f"<h3 data-shown='{esc(run.id)}'>{draw.breakable(name or run.id)} {badge(now, ended)}</h3>",
        f"<p class='hint'>{draw.breakable(run.id)}</p>" if name else "",
        bar(now),
        draw.notice(now.message, "bad" if now.state in ("failed", "dead", "diverged") else "info"),
        draw.facts({key: value for key, value in facts.items() if value != ""}),
    ]
    if now.over and (count := being_made(run.folder / "comparison")) is not None:
        parts.append(draw.notice(f"Trained; being compared now: {count} files so far."))
    if now.state == "dead":
        parts.append(f"<pre class='log'>{esc(background.tail(run.log_file, 8))}</pre>")
    if now.kind == "sweep":
        parts.append(_cells(run, _ended(now)))
    return "".join(parts)


def _ended(sweep: Status) -> bool:
    """Whether no cell of it begins any more: the workers of a sweep that was killed may well live."""
    return sweep.over and sweep.state != "dead"


def _cells(sweep: Run, ended: bool) -> str:
    rows, cells = [], sweeps.cells(sweep)
    called = cell_names(cell.folder.name for cell in cells)
    for cell in cells:
        now = cell.status()
        about = f"class='link' data-id='{esc(cell.id)}' title='{esc(cell.id)}'"
        name = draw.breakable(called[cell.folder.name])
        rows.append(
            f"<tr><td><button {about}>{name}</button></td><td>{badge(now, ended)}</td>"
            f"<td>{bar(now)}</td><td data-name='{LOSS}'>{draw.number(recent_loss(cell.folder, now))}</td></tr>"
        )
    head = f"<thead><tr><th>cell</th><th>state</th><th>progress</th><th>{LOSS}</th></tr></thead>"
    return f"<div class='scroll'><table class='runs cells'>{head}<tbody>{''.join(rows)}</tbody></table></div>"


def _memory(now: Status) -> str:
    """What the process that trains holds in main memory."""
    if now.state != "running" or not now.pid:
        return ""
    try:
        return f"{psutil.Process(now.pid).memory_info().rss / 1e9:.2f} GB"
    except psutil.Error:
        return ""


def samples(site: Site, id: str, step: int | None = None) -> str:
    """What a run drew at the step nearest to the given one, or at its last."""
    if not id:
        return ""
    run = open_run(site, id)
    if run.status().kind == "sweep" and (grid := runs_live.grid(site, run)):
        return f"<p class='hint'>The newest of each cell; choose one of its cells for all of them.</p>{grid}"
    steps = sample_steps(run)
    if not steps:
        return draw.empty(*_none_drawn(run.status()))
    near = steps[-1] if step is None else min(steps, key=lambda one: abs(one - step))
    prompts = _prompts(run)
    shown = [f"<h4>step {near}</h4>", _at_step(run, near, prompts)]
    others = [one for one in reversed(steps) if one != near][:MOST_STEPS]
    if others:
        earlier = "".join(f"<h4>step {one}</h4>{_at_step(run, one, prompts)}" for one in others)
        shown.append(f"<details class='card'><summary>{len(others)} other steps</summary>{earlier}</details>")
    return "".join(shown)


def _at_step(run: Run, step: int, prompts: Sequence[str]) -> str:
    """What was drawn or written at a step, the pictures of a prompt beside each other under it."""
    folder = run.samples / f"step-{step:08d}"
    groups: dict[str, list[str]] = {}
    for file in sorted(folder.iterdir())[:MOST_FILES]:
        name = f"{run.id}/samples/{folder.name}/{file.name}"
        if file.suffix in _PICTURES:
            number = file.stem.partition("-")[0]
            known = number.isdecimal() and int(number) < len(prompts)
            prompt = prompts[int(number)] if known else ""
            image = f"<img loading='lazy' src='{url(name)}' alt='{esc(prompt or file.stem)}'>"
            groups.setdefault(prompt, []).append(f"<a href='{url(name)}' target='_blank'>{image}</a>")
        elif file.suffix == ".jsonl":
            groups.setdefault("", []).append(draw.table(file.read_text(errors="replace")))
        elif file.suffix in (".txt", ".json", ".md"):
            groups.setdefault("", []).append(f"<pre>{esc(file.read_text(errors='replace')[:20_000])}</pre>")
    return "".join(
        (f"<p class='hint'>{esc(prompt)}</p>" if prompt else "") + f"<div class='samples'>{''.join(parts)}</div>"
        for prompt, parts in groups.items()
    )


def _prompts(run: Run) -> Sequence[str]:
    """What a run draws its samples from, by the configuration as it is written."""
    file = run.folder / "config.yaml"
    return _prompts_in(file, *version(file))


@lru_cache(1000)
def _prompts_in(file: Path, *version: int) -> Sequence[str]:
    try:
        samples = yamlio.parse(file.read_text(encoding="utf-8")).get("samples") or {}
        found = samples.get("prompts") or ()
        return tuple(map(str, found)) if isinstance(found, list) else ()
    except (OSError, ValueError, AttributeError):  # gone, or none
        return ()


def _none_drawn(now: Status) -> tuple[str, str]:
    """Why there are no samples, and what to do."""
    if now.kind == "sweep":
        return "A sweep draws none itself", "Choose one of its cells above, or see them side by side in Compare."
    if not draws(now.pipeline):
        return "No samples", "This pipeline draws none; its results are among the files, and in Compare."
    if now.over:
        return (
            "No samples",
            "samples.every would have had some drawn while it was trained; Compare draws from its result.",
        )
    return "No samples yet", "samples.every sets how often they are drawn; Sample now asks for some."


def draws(pipeline: str) -> bool:
    """Whether a pipeline draws or writes samples while it trains."""
    try:
        return section_at(registry.load("pipelines", pipeline).Config, "samples") is not None
    except EquipoiseError:  # not installed here
        return False


def log(site: Site, id: str) -> str:
    """The end of a run's log, of a sweep its own and its workers'."""
    if not id:
        return ""
    run = open_run(site, id)
    text = background.tail(run.log_file, LOG_LINES)
    workers = background.tail(run.folder / "workers.txt", 20)
    more = f"<h4>workers</h4><pre class='log'>{esc(workers)}</pre>" if workers else ""
    return f"<pre class='log'>{esc(text) or 'nothing yet'}</pre>{more}"


def config_text(site: Site, id: str) -> str:
    if not id:
        return ""
    try:
        return (open_run(site, id).folder / "config.yaml").read_text(errors="replace")
    except OSError as error:
        return f"# {id}/config.yaml cannot be read: {error.strerror}. Without it the run can be shown, but not resumed."


def files(site: Site, id: str) -> str:
    """A run's files, to be downloaded."""
    if not id:
        return ""
    run = open_run(site, id)
    found = [run.folder / name for name in ("config.yaml", "environment.json", "metrics.jsonl", "log.txt")]
    found += sorted(file for file in run.result.rglob("*") if file.is_file())
    found += sorted(file for file in run.checkpoints.rglob("*") if file.is_file())
    if (run.folder / "comparison").is_dir():
        found += sorted(file for file in (run.folder / "comparison").iterdir() if file.is_file())
    rows = []
    for file in found:
        if file.is_file() and file.suffix in SUFFIXES:
            name = f"{run.id}/{file.relative_to(run.folder).as_posix()}"
            size = file.stat().st_size
            shown = f"{size / 1e6:.1f} MB" if size > 1e6 else f"{size / 1e3:.1f} kB"
            words = esc(file.relative_to(run.folder))
            rows.append(f"<li><a href='{url(name)}?download=1'>{words}</a> <small>{shown}</small></li>")
    return f"<ul class='files'>{''.join(rows)}</ul>"


def possible(site: Site, id: str) -> Possible:
    """Whether a run can be stopped, sampled and resumed now."""
    try:
        run = open_run(site, id) if id else None
        now = run.status() if run else None
    except EquipoiseError:
        run = now = None
    if run is None or now is None:
        return Possible(*[gr.update(interactive=False)] * 3)
    stops = not now.over
    resumes = now.over and now.kind != "cell" and now.state != "done"
    if now.over and now.kind == "sweep":  # whose cells may have failed although it is done
        cells = [cell.status() for cell in sweeps.cells(run)]
        resumes = now.state == "dead" or any(cell.state not in ("done", "diverged") for cell in cells)
        stops = any(not cell.over for cell in cells)  # by workers that outlive it
    samples = now.state == "running" and now.kind != "sweep"
    stop, sample, resume = (gr.update(interactive=can) for can in (stops, samples, resumes))
    return Possible(stop, {**sample, "visible": now.kind != "sweep" and draws(now.pipeline)}, resume)


def detail(site: Site, id: str, step: int | None, wanted: Wanted = MEASURED) -> Detail:
    """Heading, charts, samples, log, configuration and files of a run; a sentence instead if it is gone."""
    try:
        return Detail(
            heading(site, id),
            charts(site, id, wanted),
            samples(site, id, step),
            log(site, id),
            config_text(site, id),
            files(site, id),
        )
    except (EquipoiseError, OSError) as error:
        if isinstance(error, OSError):
            file = Path(str(error.filename or "a file")).name
            error = f"{id}: {file} cannot be read ({error.strerror}). If the run is being changed, wait a moment."
        words = str(error)
        return Detail(draw.notice(words, "bad"), "", "", "", "", "")


def act(site: Site, id: str, what: str, workers: int) -> str:
    """Stops, resumes, samples or deletes a run; returns a message.

    Raises:
        InputError: it cannot be done.
    """
    if not id:
        raise InputError("Choose a run first.")
    run = open_run(site, id)
    if what == "stop":
        return background.stop(run)
    if what == "resume":
        refuse_commands(run.config())
        if not run.status().over:
            return f"{id}: is at work."
        first = background.ahead(run)
        background.resume(run, workers, in_turn=True)
        return f"{id}: continues {f'when {first.id} has ended' if first else 'in the background'}."
    if what == "sample":
        if run.status().state != "running":
            raise InputError(f"{id}: is not running, so it cannot draw samples now.")
        run.request("sample")
        return f"{id}: draws samples after the current step."
    background.delete(run)
    return f"{id}: deleted."
