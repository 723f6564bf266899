"""The part of the tab Launch where pictures are uploaded and captioned, and become a folder of data."""

import json
import os
import re
import secrets
import shutil
import tempfile
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gradio as gr

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.tables import listed
from equipoise.ui import draw
from equipoise.ui.launch import UPLOADED, error_notice
from equipoise.ui.safety import PICTURES, Site, check_picture
from equipoise.ui.unpack import unpack
from equipoise.ui.widgets import PRIVATE, Table, Updates, bound, caption_table, table_rows

MOST_SAID = 12  # lines on what was left out


def save_pictures(
    site: Site, name: str, files: Sequence[str], captions: Sequence[Sequence[Any]], shared: str = ""
) -> str:
    """Puts uploaded pictures and their captions into a new folder; returns its path.

    Args:
        name: what the folder is called, in one word.
        files: where the upload left them.
        captions: (file name, caption) rows in the same order.
        shared: the caption of those that have none of their own.

    Raises:
        InputError: no word, no pictures, too many, one that is none, or one that has no caption.
    """
    if not re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,40}", name or ""):
        raise InputError(f"the name must be one word of letters, digits, _ and -, got {(name or '')[:60]!r}.")
    if not 0 < len(files) <= PICTURES:
        raise InputError(f"choose 1 to {PICTURES} pictures, got {len(files)}.")
    suffixes = [check_picture(Path(file), Path(file).name) for file in files]
    own = [str(row[1] or "").strip() if len(row) > 1 else "" for row in captions]
    texts = [(own[index] if index < len(own) else "") or shared.strip() for index in range(len(files))]
    if bare := [Path(file).name for file, text in zip(files, texts, strict=True) if not text]:
        what = "has no caption" if len(bare) == 1 else "have no captions"
        raise InputError(f"{listed(bare)} {what}: write what is seen there, such as a photo of a sks dog.")
    folder = site.store.root / "uploads" / f"{name}-{secrets.token_hex(2)}"
    folder.mkdir(parents=True)
    lines = []
    for index, (file, suffix) in enumerate(zip(files, suffixes, strict=True)):
        kept = f"{index:03d}{suffix}"
        shutil.copyfile(file, folder / kept)
        lines.append(json.dumps({"file_name": kept, "text": texts[index]}, ensure_ascii=False))
    write_atomic(folder / "metadata.jsonl", "\n".join(lines) + "\n")
    return str(folder)


def forget(files: Sequence[str]) -> None:
    """Removes what an upload left in the server's own folder and is not needed any more."""
    own = os.environ.get(UPLOADED)
    for file in map(Path, files):
        if own and file.resolve().is_relative_to(Path(own).resolve()):
            file.unlink(missing_ok=True)


def caption_rows(paths: Sequence[str], before: Sequence[Sequence[Any]]) -> list[list[str]]:
    """A row for each picture, with the caption that it had already."""
    held = {str(row[0]): row[1] for row in before if len(row) > 1}
    return [[name, str(held.get(name) or "")] for name in (Path(path).name for path in paths)]


@dataclass(frozen=True, eq=False)
class PicturePanel:
    """The parts that take pictures."""

    site: Site
    files: gr.File
    captions: Table
    name: gr.Textbox  # of the folder
    use: gr.Button
    message: gr.HTML
    data: gr.Dropdown  # the form's field that names the folder
    prompt: gr.Textbox | None  # the form's field that goes before the captions, where it has one


def build(site: Site, data: gr.Dropdown, prompt: gr.Textbox | None = None) -> None:
    """Draws the panel; what it makes goes into the form's field `data`, and empties its field `prompt`."""
    with gr.Accordion("Pictures of your own", open=False):
        label = "Pictures (PNG, JPEG, WebP), a folder or a zip file of them, with captions in .txt files or without"
        kinds: Any = {"file_count": "multiple", "file_types": ["image", ".zip", ".txt"]}
        files = gr.File(label=label, height=260, elem_id="pictures", **kinds)
        captions = caption_table("captions")
        with gr.Row():
            name = gr.Textbox("pictures", label="Name of the folder", max_lines=1)
            use = gr.Button("Use these pictures", elem_id="use-pictures")
        message = gr.HTML(elem_id="pictures-message")
    panel = PicturePanel(site, files, captions, name, use, message, data, prompt)
    files.change(bound(on_upload, panel), [files, captions], [captions, files, message], **PRIVATE)
    asked = [prompt] if prompt is not None else []
    use.click(bound(on_use, panel), [name, files, captions, *asked], [message, data, files, *asked], **PRIVATE)


def on_upload(panel: PicturePanel, paths: list[str] | None, rows: Any) -> Updates:
    """What is no picture goes at once, and is named, so that the rest can be captioned and used; zip files give way to
    the pictures in them, and captions to the table."""
    found = unpack(paths or [], Path(os.environ.get(UPLOADED) or tempfile.gettempdir()))
    good, wrong = [], list(found.left_out)
    for path in found.pictures[:PICTURES]:
        try:
            check_picture(Path(path), Path(path).name)
            good.append(path)
        except InputError as error:
            wrong.append(f"{error} It was left out.")
    if (count := len(found.pictures)) > PICTURES:
        wrong.append(f"There are {count} pictures; the first {PICTURES} were taken.")
    forget([path for path in {*(paths or []), *found.pictures} if path not in good])
    captions = [[Path(path).name, text] for path, text in found.captions.items()]
    edited = [row for row in table_rows(rows) if len(row) > 1 and row[1]]
    table = gr.update(value=caption_rows(good, [*captions, *edited]), visible=bool(good))
    left = {panel.files: good, panel.message: draw.notice("\n".join(_few(wrong)), "bad")}
    return {panel.captions: table, **(left if good != (paths or []) else {})}


def _few(lines: list[str]) -> list[str]:
    """The first lines, and how many more there are."""
    more = len(lines) - MOST_SAID
    return [*lines[:MOST_SAID], f"… and {more} more."] if more > 0 else lines


def on_use(panel: PicturePanel, name: str, paths: list[str] | None, rows: Any, shared: str = "") -> Updates:
    """Makes the folder, and names it in the form."""
    try:
        folder = save_pictures(panel.site, name, paths or [], table_rows(rows), shared or "")
    except EquipoiseError as error:
        return {panel.message: error_notice(error)}
    forget(paths or [])
    words, emptied = f"{len(paths or [])} pictures are ready; “Data” names them.", {}
    if panel.prompt is not None:
        words += " “Instance prompt” is empty now, so that their captions are read."
        emptied = {panel.prompt: gr.update(value="")}
    return {panel.message: draw.notice(words, "good"), panel.data: folder, panel.files: None, **emptied}
