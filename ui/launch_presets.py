"""The part of the tab Launch where a filled-in form is saved under a name, loaded again and deleted."""

import re
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.config import RunConfig
from equipoise.pipelines.files import write_atomic
from equipoise.ui import draw
from equipoise.ui.launch import Plan, error_notice, read_yaml
from equipoise.ui.safety import Site
from equipoise.ui.widgets import HIDDEN, PRIVATE, Confirm, Updates, asked_of, bound, confirm, root

FOLDER = "presets"  # in the runs folder; in it one of each pipeline
MOST = 200  # presets of a pipeline
_NAME = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_ -]{0,59}")


def folder_of(site: Site, pipeline: str) -> Path:
    """Where a pipeline's presets are. Raises InputError where that leads out of the runs folder."""
    folder = site.store.root / FOLDER / pipeline
    if not folder.resolve().is_relative_to(site.store.root.resolve()):
        raise InputError(f"{FOLDER}: is a link that leads out of the runs folder; remove it.")
    return folder


def names(site: Site, pipeline: str) -> list[str]:
    try:
        found = sorted(file.stem for file in folder_of(site, pipeline).glob("*.yaml") if not file.is_symlink())
    except InputError:
        return []
    return [name for name in found if _NAME.fullmatch(name)]


def file_of(site: Site, pipeline: str, name: str | None) -> Path:
    """The file of the preset of that name, whether there is one or not.

    Raises:
        InputError: that can be no name of one.
    """
    if not _NAME.fullmatch(name or ""):
        raise InputError("A preset is called by letters, digits, spaces, _ and -, at most 60 of them.")
    return folder_of(site, pipeline) / f"{name}.yaml"


def save(site: Site, pipeline: str, name: str | None, made: Plan) -> None:
    """Keeps a plan under a name, in place of what had that name.

    Raises:
        InputError: the name can be none, there are too many, or the file cannot be written.
    """
    file, there = file_of(site, pipeline, name), names(site, pipeline)
    if len(there) >= MOST and name not in there:
        raise InputError(f"There are {MOST} presets already; delete one first.")
    file.parent.mkdir(parents=True, exist_ok=True)
    write_atomic(file, made.yaml)


def load(site: Site, pipeline: str, name: str | None) -> RunConfig:
    """Raises InputError where there is none of that name, or ConfigError what is wrong with it."""
    file = file_of(site, pipeline, name)
    if file.is_symlink() or not file.is_file():
        raise InputError(f"There is no preset {name!r} any more.")
    return read_yaml(str(file), pipeline)


def delete(site: Site, pipeline: str, name: str | None) -> None:
    """Raises InputError where there is none of that name."""
    try:
        file_of(site, pipeline, name).unlink()
    except OSError as error:
        raise InputError(f"The preset {name!r} cannot be deleted: {error.strerror}.") from None


@dataclass(frozen=True, eq=False)
class PresetPanel:
    """The parts."""

    site: Site
    pipeline: str
    own: gr.Dropdown
    name: gr.Textbox
    save: gr.Button
    delete: gr.Button
    asked: Confirm  # before one is deleted
    message: gr.HTML


def draw_panel(site: Site, pipeline: str) -> PresetPanel:
    with gr.Accordion("Presets of your own: save this form, load, delete", open=False, elem_id=f"presets-{pipeline}"):
        with gr.Row(equal_height=False):
            label = "Load a preset"
            own = gr.Dropdown(names(site, pipeline), value=None, label=label, elem_id=f"own-{pipeline}", min_width=200)
            name = gr.Textbox(label="Name", max_lines=1, elem_id=f"preset-name-{pipeline}", min_width=200)
        with gr.Row(elem_classes=["actions"]):
            keep = gr.Button("Save this form", size="md", elem_id=f"save-preset-{pipeline}")
            away = gr.Button("Delete preset …", size="md", elem_id=f"delete-preset-{pipeline}")
        asked = confirm(f"preset-{pipeline}")
        message = gr.HTML(elem_id=f"preset-message-{pipeline}")
    return PresetPanel(site, pipeline, own, name, keep, away, asked, message)


def connect(
    panel: PresetPanel,
    planned: Callable[..., Plan],
    filled: Callable[[RunConfig], Updates],
    inputs: list[Any],
    outputs: list[Any],
) -> None:
    """Connects the parts to a form.

    Args:
        planned: the form's values → what they would start.
        filled: a configuration → updates of the form.
        inputs: the form's values.
        outputs: what `filled` updates.
    """
    tab = _Tab(panel, planned, filled)
    root().load(bound(offer_presets, panel), None, panel.own, **HIDDEN)
    panel.save.click(bound(save_preset, tab), [panel.name, *inputs], [panel.own, panel.message], **PRIVATE)
    panel.own.input(bound(load_preset, tab), panel.own, [panel.message, panel.name, *outputs], **PRIVATE)
    asked, question = panel.asked, gr.Textbox(visible=False)
    panel.delete.click(bound(ask_delete_preset, panel), panel.own, [asked.row, asked.question], **HIDDEN)
    asked.no.click(bound(keep_preset, panel), None, asked.row, **HIDDEN)
    deleted = [panel.own, panel.message, asked.row]
    asked.yes.click(bound(delete_preset, panel), question, deleted, js=asked_of(f"preset-{panel.pipeline}"), **PRIVATE)


@dataclass(frozen=True, eq=False)
class _Tab:
    panel: PresetPanel
    planned: Callable[..., Plan]
    filled: Callable[[RunConfig], Updates]


# Handlers: what they are given stands in the order of the inputs above


def offer_presets(panel: PresetPanel) -> Updates:
    return {panel.own: gr.update(choices=names(panel.site, panel.pipeline))}


def save_preset(tab: _Tab, name: str | None, *values: Any) -> Updates:
    panel = tab.panel
    try:
        save(panel.site, panel.pipeline, (name or "").strip(), tab.planned(*values))
    except EquipoiseError as error:
        return {panel.message: error_notice(error)}
    chosen = gr.update(choices=names(panel.site, panel.pipeline), value=(name or "").strip())
    return {panel.own: chosen, panel.message: draw.notice("Saved.", "good")}


def load_preset(tab: _Tab, name: str | None) -> Updates:
    panel = tab.panel
    try:
        filled = tab.filled(load(panel.site, panel.pipeline, name))
    except EquipoiseError as error:
        return {panel.message: error_notice(error)}
    return {panel.message: "", panel.name: name, **filled}


def ask_delete_preset(panel: PresetPanel, name: str | None) -> Updates:
    about = draw.esc(name or "")
    question = f"<p data-shown='{about}'>Delete the preset <b>{about}</b>? It cannot be undone.</p>"
    return {panel.asked.row: gr.update(visible=bool(name)), panel.asked.question: question}


def keep_preset(panel: PresetPanel) -> Updates:
    return {panel.asked.row: gr.update(visible=False)}


def delete_preset(panel: PresetPanel, name: str | None) -> Updates:
    hidden = gr.update(visible=False)
    try:
        delete(panel.site, panel.pipeline, name)
    except EquipoiseError as error:
        return {panel.message: error_notice(error), panel.asked.row: hidden}
    left = gr.update(choices=names(panel.site, panel.pipeline), value=None)
    return {panel.own: left, panel.message: draw.notice("Deleted.", "good"), panel.asked.row: hidden}
