"""What else is done with runs: notes, exports, and several of them at once; parts of the tab Runs."""

import hashlib
import os
import shutil
import tempfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from equipoise import registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.runs.run import Run
from equipoise.ui import draw, runs_notes, runs_several
from equipoise.ui.guard import EXPORTS
from equipoise.ui.launch import UPLOADED
from equipoise.ui.runs import open_run
from equipoise.ui.safety import Site
from equipoise.ui.widgets import HIDDEN, PRIVATE, SHOWN, Updates, bound

ROOM_FOR_EXPORTS = 10_000_000_000  # bytes of exports that wait to be downloaded, whatever waits of uploads


@dataclass(frozen=True, eq=False)
class Export:
    """A run's result as a file for other programs."""

    row: gr.Row
    format: gr.Dropdown
    make: gr.Button
    file: gr.DownloadButton


@dataclass(frozen=True, eq=False)
class Written:
    """What is written to a run."""

    name: gr.Textbox
    note: gr.Textbox
    tags: gr.Textbox
    archived: gr.Checkbox
    save: gr.Button
    read: gr.State  # the run's id, and what was written to it when it was shown

    @property
    def edited(self) -> list[Any]:
        return [self.note, self.tags, self.archived, self.name]


@dataclass(frozen=True, eq=False)
class Several:
    """Several runs, and what is done with them."""

    chosen: gr.Dropdown
    differ: gr.Button
    archive: gr.Button
    delete: gr.Button
    sure: gr.Checkbox
    shown: gr.HTML


@dataclass(frozen=True, eq=False)
class More:
    """The parts that change with the run that is shown."""

    export: Export
    written: Written

    @property
    def outputs(self) -> list[Any]:
        export, written = self.export, self.written
        return [export.row, export.format, export.file, *written.edited, written.read]


@dataclass(frozen=True, eq=False)
class _Tab:
    site: Site
    several: Several
    more: More
    message: gr.HTML


def export() -> Export:
    with gr.Row(elem_classes=["actions"], visible=False) as row:
        format = gr.Dropdown([], label="Format", interactive=True, allow_custom_value=True, elem_id="export-format")
        make = gr.Button("Export", size="md", elem_id="export-make")
        file = gr.DownloadButton("Download", size="md", visible=False, elem_id="export-file")
    return Export(row, format, make, file)


def notes() -> Written:
    info = "Shown in place of the id, which stays."
    name = gr.Textbox(label="Name", info=info, max_lines=1, elem_id="display-name")
    note = gr.Textbox(label="Note", lines=3, max_lines=12, elem_id="note")
    with gr.Row(elem_classes=["actions"]):
        tags = gr.Textbox(label="Tags", info="With commas between.", max_lines=1, elem_id="tags")
        archived = gr.Checkbox(label="Put away", info="Out of the table; the state “archived” shows it.")
        save = gr.Button("Save", size="md", elem_id="save-notes")
    return Written(name, note, tags, archived, save, gr.State([]))


def several(site: Site) -> Several:
    with gr.Accordion("Several runs: differences, put away, delete", open=False):
        chosen = gr.Dropdown(
            runs_several.offered(site), value=[], multiselect=True, label="Runs", interactive=True, elem_id="several"
        )
        with gr.Row(elem_classes=["actions"]):
            differ = gr.Button("Show what differs", size="md", elem_id="several-differ")
            archive = gr.Button("Put away, or back", size="md", elem_id="several-archive")
            delete = gr.Button("Delete for good", size="md", variant="stop", elem_id="several-delete")
            sure = gr.Checkbox(label="I am sure", min_width=120, elem_id="several-sure")
        shown = gr.HTML(elem_id="several-shown")
    return Several(chosen, differ, archive, delete, sure, shown)


def connect(
    several: Several, more: More, site: Site, message: gr.HTML, page_tab: gr.Tab, refreshed: dict[str, Any]
) -> None:
    """`refreshed`: an event that shows how the runs stand now."""
    tab, written, export = _Tab(site, several, more, message), more.written, more.export
    page_tab.select(bound(offer, tab), None, several.chosen, **HIDDEN)
    shown = gr.Textbox(visible=False)  # the id of the run that is shown
    given = [shown, *written.edited, written.read]
    written.save.click(bound(save_notes, tab), given, [message, written.read], js=SHOWN, **HIDDEN).then(**refreshed)
    outputs = [message, export.file]
    export.make.click(bound(make_export, tab), [shown, export.format], outputs, js=SHOWN, **HIDDEN)
    several.differ.click(bound(differ, tab), several.chosen, several.shown, **HIDDEN)
    outputs = [several.shown, several.chosen, several.sure]
    several.archive.click(bound(put_away, tab), several.chosen, outputs, **HIDDEN).then(**refreshed)
    several.chosen.change(None, None, several.sure, js="() => false", **PRIVATE)  # it was said of others
    deleted = several.delete.click(bound(delete_several, tab), [several.chosen, several.sure], outputs, **HIDDEN)
    deleted.then(**refreshed)


# Handlers: what they are given stands in the order of the inputs above


def of_run(more: More, run: Run) -> Updates:
    """What is written to a run, and the formats that it can be exported in."""
    export, written, found = more.export, more.written, runs_notes.read(run.folder)
    formats = _formats(run)
    return {
        export.row: gr.update(visible=bool(formats)),
        export.format: gr.update(choices=formats, value=formats[0] if formats else None),
        export.file: gr.update(visible=False),
        **dict(zip(written.edited, _fields(found), strict=True)),
        written.read: [run.id, *_fields(found)],
    }


def _formats(run: Run) -> list[str]:
    """The formats of one file that a run's result can be exported in."""
    try:
        pipeline = registry.load("pipelines", run.status().pipeline)
    except EquipoiseError:
        return []
    there = run.status().kind != "sweep" and (run.result / "result.json").is_file()
    return list(pipeline.formats) if there and not pipeline.exports_folders else []


def make_export(tab: _Tab, id: str, format: str) -> Updates:
    """Writes a run's result in another program's format, to be downloaded."""
    try:
        run = open_run(tab.site, id)
        if format not in _formats(run):
            raise InputError(f"{id}: cannot be exported as {str(format)[:60]!r}.")
        name = f"{run.folder.name.replace(',', '_').replace('=', '-')}-{format}.safetensors"
        file = _empty_place(id) / name
        registry.load("pipelines", run.status().pipeline).export(run.result, format, file)
        _make_room(file.parent)
    except EquipoiseError as error:
        return {tab.message: draw.notice(tab.site.without_paths(error), "bad")}
    return {tab.message: "", tab.more.export.file: gr.update(value=str(file), visible=True, label=f"Download {name}")}


def _empty_place(id: str) -> Path:
    """The folder of a run's export, without the one before."""
    folder = Path(os.environ.get(UPLOADED) or tempfile.gettempdir(), EXPORTS, hashlib.sha256(id.encode()).hexdigest())
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    return folder


def _make_room(newest: Path) -> None:
    """Removes the oldest exports beside the newest one, until all together are not too large."""
    sizes = {one: sum(file.stat().st_size for file in one.iterdir()) for one in newest.parent.iterdir()}
    for one in sorted(sizes, key=lambda one: one.stat().st_mtime):
        if one != newest and sum(sizes.values()) > ROOM_FOR_EXPORTS:
            shutil.rmtree(one, ignore_errors=True)
            del sizes[one]


def _fields(found: runs_notes.Notes) -> list[Any]:
    return [found.note, ", ".join(found.tags), found.archived, found.name]


def save_notes(
    tab: _Tab, id: str, note: str, tags: str, archived: bool, name: str | None, before: list[Any]
) -> Updates:
    """Writes what was edited, unless somebody else has edited the same since it was shown."""
    try:
        run = open_run(tab.site, id)
        there = _fields(runs_notes.read(run.folder))
        given = [(note or "").strip(), tags or "", bool(archived), " ".join((name or "").split())]
        if before[:1] != [id]:
            raise InputError(f"{id}: choose it again; nothing was saved.")
        each = list(zip(given, before[1:], there, strict=True))
        if any(new != shown != old != new for new, shown, old in each):
            raise InputError(f"{id}: its notes were edited elsewhere meanwhile: choose it again. Nothing was saved.")
        runs_notes.write(run, *(old if new == shown else new for new, shown, old in each))
    except EquipoiseError as error:
        return {tab.message: draw.notice(tab.site.without_paths(error), "bad")}
    message = draw.notice(f"{id}: its notes are saved.", "good")
    return {tab.message: message, tab.more.written.read: [id, *_fields(runs_notes.read(run.folder))]}


def offer(tab: _Tab) -> Updates:
    return {tab.several.chosen: gr.update(choices=runs_several.offered(tab.site))}


def differ(tab: _Tab, ids: list[str]) -> Updates:
    try:
        return {tab.several.shown: runs_several.differences(tab.site, ids or [])}
    except EquipoiseError as error:
        return {tab.several.shown: draw.notice(str(error), "bad")}


def put_away(tab: _Tab, ids: list[str]) -> Updates:
    try:
        words = runs_several.archive(tab.site, ids or [])
    except EquipoiseError as error:
        return {tab.several.shown: draw.notice(tab.site.without_paths(error), "bad")}
    return {tab.several.shown: draw.notice(words, "good"), tab.several.chosen: gr.update(value=[])}


def delete_several(tab: _Tab, ids: list[str], sure: bool) -> Updates:
    several = tab.several
    if not sure:
        words = "They go with all their files, and cannot be brought back: tick “I am sure” first."
        return {several.shown: draw.notice(words, "bad")}
    try:
        words = runs_several.delete(tab.site, ids or [])
    except EquipoiseError as error:
        return {several.shown: draw.notice(str(error), "bad")}
    chosen = gr.update(choices=runs_several.offered(tab.site), value=[])
    return {several.shown: draw.notice(words, "good"), several.chosen: chosen, several.sure: False}
