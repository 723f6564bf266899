"""The part of the tab Launch that shows the pictures of a folder with their captions, and writes captions back."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import gradio as gr

from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines import demo
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.media.reading import MediaError
from equipoise.pipelines.tables import listed
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.data import Folder, read_folder
from equipoise.ui import draw
from equipoise.ui.draw import esc
from equipoise.ui.launch import PROMPT, error_notice
from equipoise.ui.safety import Site
from equipoise.ui.thumbnails import thumbnail
from equipoise.ui.widgets import HIDDEN, LATEST, PRIVATE, Slider, Table, Updates, bound, caption_table, table_rows

PAGE = 48  # pictures that are shown at a time
MOST = 5_000  # characters of a caption
MODEL = "model.path"
SHAPES = ("data.buckets", "data.resolution", "data.bucket_step", "data.bucket_limit", MODEL)
STRIDE = 8  # pixels, of most models: of which sides of pictures are multiples where a model's is not known
MOST_SIZED = 2_000  # pictures whose sizes are looked up
_TABLE = "metadata.jsonl"  # in which this page keeps the captions of uploads


@dataclass(frozen=True, eq=False)
class DataPanel:
    """The parts that show a folder."""

    site: Site
    data: gr.Dropdown  # the form's field that names the folder
    prompt: gr.Textbox  # the form's field that goes before the captions
    shapes: Mapping[str, Any]  # the form's fields that say how pictures are cut, by key
    page: Slider
    shown: gr.HTML
    captions: Table
    read: gr.State  # the rows of that table as they were on the disk
    seen: gr.State  # the folder that is shown, as it was chosen, and the page of it
    save: gr.Button
    message: gr.HTML


def build(site: Site, widgets: Mapping[str, Any]) -> None:
    """Draws the panel. `widgets`: of the form, by key."""
    data, prompt = widgets["data.folder"], widgets[PROMPT]
    shapes = {key: widgets[key] for key in SHAPES if key in widgets}
    with gr.Accordion("Look at the data: pictures and captions", open=False) as around:
        page = Slider(1, 2, value=1, step=1, label="Page", interactive=True, visible=False, elem_id="data-page")
        shown = gr.HTML(elem_id="data-view")
        captions = caption_table("data-captions")
        save = gr.Button("Write the captions beside the pictures", visible=False, elem_id="save-captions")
        message = gr.HTML(elem_id="data-message")
    panel = DataPanel(site, data, prompt, shapes, page, shown, captions, gr.State([]), gr.State(("", 1)), save, message)
    outputs = [shown, captions, panel.read, panel.seen, save, page, message]
    inputs = [data, prompt, *shapes.values()]
    gr.on([around.expand, data.change], bound(on_look, panel), inputs, outputs, **HIDDEN)
    page.input(bound(on_page, panel), [data, prompt, page, *shapes.values()], outputs, **LATEST)
    inputs = [data, prompt, panel.seen, *shapes.values()]
    gr.on([field.change for field in shapes.values()], bound(on_shape, panel), inputs, shown, **LATEST)
    save.click(bound(on_save, panel), [data, prompt, captions, panel.read], [message, panel.read], **PRIVATE)


def folder_of(site: Site, choice: str, prompt: str) -> tuple[Folder, bool]:
    """What a folder that this page may read holds, and whether captions may be written there.

    Raises:
        ConfigError: it may not be read.
        InputError: it is the demo's, which this page would have to draw although it only shows.
    """
    path = site.path(choice.strip())
    config = configs.set_keys(TextToImageConfig(name="data"), {"data.folder": path})  # pyright: ignore[reportCallIssue]
    if problems := site.problems(config):
        raise ConfigError(problems)
    embedded = path == demo.NAME
    if embedded and site.read_only and not demo.has_pictures(site.store.root):
        raise InputError("The demo's pictures are not there yet, and this page only shows. Its first run draws them.")
    folder = str(demo.pictures_folder(site.store.root)) if embedded else path
    given = {"folder": folder, "instance_prompt": prompt.strip() or None}
    found = read_folder(config.data.model_copy(update=given))
    if not prompt.strip():  # then a picture without a caption is a problem, and should be seen all the same
        every = read_folder(config.data.model_copy(update={"folder": folder, "instance_prompt": ""})).examples
        known = {example.path: example for example in found.examples}
        found.examples = [known.get(example.path) or replace(example, caption="") for example in every]
    return found, not embedded


def buckets(site: Site, found: Folder, given: Mapping[str, Any]) -> str:
    """To which sizes a form's pictures are cut, and how many to each; "" where all are cut to the same square, or the
    form cannot be read.

    Args:
        site: whose.
        found: the folder.
        given: what the form's fields of SHAPES hold, by key.
    """
    from equipoise.pipelines.text_to_image import overview  # which needs torch

    if not given.get("data.buckets"):
        return ""
    try:
        shape = {key: configs.parse_value(str(value)) for key, value in given.items() if str(value or "").strip()}
        shape |= {MODEL: site.path(str(given[MODEL]).strip())} if given.get(MODEL) else {}
        config = configs.set_keys(TextToImageConfig(name="data"), shape)  # pyright: ignore[reportCallIssue]
    except EquipoiseError:
        return ""
    cells = None if site.problems(config) else overview.known_stride(config)
    counts = overview.shapes(config.data, found.examples[:MOST_SIZED], cells or STRIDE)
    words = ", ".join(f"{width} × {height}: {count}" for (width, height), count in counts.most_common())
    of = f" of the first {MOST_SIZED:,}" if len(found.examples) > MOST_SIZED else ""
    return f"Buckets, in pixels, and how many pictures{of} each has in an epoch: {words}."


def view(site: Site, found: Folder, page: int, sizes: str = "") -> str:
    """A page of pictures, each with its caption, and what is left out and why. `sizes`: what `buckets` says."""
    some = found.examples[(page - 1) * PAGE : page * PAGE]
    figures, unread = [], []
    for example in some:
        name = example.path.relative_to(found.path).as_posix()
        try:
            source = thumbnail(example.path)
        except MediaError as error:
            unread.append(f"{name}: {error.problem}")
            continue
        words = f"{example.caption}{f' ({example.repeats} times in an epoch)' if example.repeats > 1 else ''}"
        figures.append(
            f"<figure><img src='{source}' alt='{esc(example.caption)}' title='{esc(name)}'>"
            f"<figcaption>{esc(words) or '<i>no caption</i>'}</figcaption></figure>"
        )
    wrong = [*(f"cannot be read: {line}" for line in unread), *found.problems]
    summary = found.summary.replace(f"{found.path}: ", "", 1)
    said = draw.notice("\n".join(_without(site, line) for line in wrong), "bad")
    said += draw.notice("\n".join(_without(site, line) for line in [summary, sizes, *found.doubts]))
    return f"{said}<div class='data'>{''.join(figures)}</div>"


def _without(site: Site, line: str) -> str:
    """A line without where on this machine the folders lie."""
    for name, root in {"runs": site.store.root, **site.data}.items():
        line = line.replace(str(root), name)
    return line


def save_captions(
    site: Site,
    choice: str,
    prompt: str,
    rows: Sequence[Sequence[Any]],
    before: Sequence[Sequence[Any]] | None = None,
) -> int:
    """Writes the captions that were edited as .txt files beside their pictures; returns how many.

    Of uploads the table, which counts before such files, gives way to them.

    Args:
        site: whose.
        choice: the folder, as it was chosen.
        prompt: what goes before the captions.
        rows: (picture, caption).
        before: the same as they were shown before they were edited; None: as they are on the disk now.

    Raises:
        ConfigError: the folder may not be read.
        InputError: captions of this folder are kept elsewhere, one is too long, or one that was edited is another on
            the disk than the one that was shown.
    """
    found, writable = folder_of(site, choice, "")
    table = found.path / _TABLE
    uploaded = found.path.parent == site.store.root / "uploads" and table.is_file()
    if not writable or prompt.strip():
        reason = "the demo's pictures stay as they are" if not writable else "the instance prompt is the caption of all"
        raise InputError(f"Nothing was written: {reason}.")
    if not uploaded and any(source not in (".txt files", ".caption files") for source in _tables(found)):
        raise InputError("Nothing was written: a table in this folder holds its captions; change them there.")
    known = {example.path: example.caption for example in found.examples}
    there = {path: _in_one_line(text) for path, text in known.items()}
    shown = there if before is None else _wanted(found, before)
    changed = {path: text for path, text in _wanted(found, rows).items() if text not in (there[path], shown.get(path))}
    if stale := [path.name for path in changed if shown.get(path) != there[path]]:
        raise InputError(
            f"Nothing was written: {listed(stale)} got another caption since it was shown. Choose the folder again."
        )
    if uploaded and changed:  # all of them, before the table goes
        changed = known | changed
    for path, text in changed.items():
        write_atomic(path.with_suffix(".txt"), text + "\n")
    if uploaded and changed:
        table.unlink()
    return len(changed)


def _tables(found: Folder) -> list[str]:
    """The tables among the sources of captions."""
    return [source for source in found.sources if source.endswith((".csv", ".tsv", ".json", ".jsonl", ".parquet"))]


def _wanted(found: Folder, rows: Sequence[Sequence[Any]]) -> dict[Path, str]:
    """The captions of the table by picture; a name that the folder does not have is left out."""
    paths = {example.path.relative_to(found.path).as_posix(): example.path for example in found.examples}
    wanted = {}
    for name, caption, *_ in (row for row in rows if len(row) > 1):
        text = _in_one_line(caption)
        if len(text) > MOST:
            raise InputError(f"{name}: its caption has {len(text)} characters; {MOST} are the most.")
        if str(name) in paths:
            wanted[paths[str(name)]] = text
    return wanted


def _in_one_line(caption: Any) -> str:
    return " ".join(str(caption or "").split())


# Handlers: what they are given stands in the order of the inputs above


def on_look(panel: DataPanel, choice: str | None, prompt: str | None, *shapes: Any) -> Updates:
    return _looked(panel, choice, prompt, 1, shapes)


def on_page(panel: DataPanel, choice: str | None, prompt: str | None, page: float, *shapes: Any) -> Updates:
    return _looked(panel, choice, prompt, int(page), shapes)


def on_shape(panel: DataPanel, choice: str | None, prompt: str | None, seen: tuple[str, int], *shapes: Any) -> Updates:
    """Shows how pictures are cut now; captions that are edited meanwhile stay.

    A preset may change the folder at the same time, and the slider still has the page of the one before.
    """
    folder, page = seen
    page = page if folder == (choice or "") else 1
    return {panel.shown: _looked(panel, choice, prompt, page, shapes)[panel.shown]}


def _looked(panel: DataPanel, choice: str | None, prompt: str | None, page: int, shapes: Sequence[Any]) -> Updates:
    try:
        found, writable = folder_of(panel.site, choice or "", prompt or "")
        cut = buckets(panel.site, found, dict(zip(panel.shapes, shapes, strict=True)))
    except (EquipoiseError, OSError) as error:
        hidden = gr.update(visible=False)
        words = error_notice(error) if isinstance(error, EquipoiseError) else draw.notice(str(error.strerror), "bad")
        return {panel.shown: words, panel.captions: hidden, panel.save: hidden, panel.page: hidden, panel.message: ""}
    pages = max(1, -(-len(found.examples) // PAGE))
    page = min(page, pages)
    some = found.examples[(page - 1) * PAGE : page * PAGE]
    rows = [[example.path.relative_to(found.path).as_posix(), example.caption] for example in some]
    editable = writable and bool(rows) and not (prompt or "").strip()
    return {
        panel.shown: view(panel.site, found, page, cut),
        panel.captions: gr.update(value=rows, visible=editable),
        panel.read: rows,
        panel.seen: (choice or "", page),
        panel.save: gr.update(visible=editable),
        panel.page: gr.update(visible=pages > 1, maximum=max(pages, 2), value=page),
        panel.message: "",
    }


def on_save(panel: DataPanel, choice: str | None, prompt: str | None, rows: Any, before: list[Any]) -> Updates:
    given = table_rows(rows)
    try:
        count = save_captions(panel.site, choice or "", prompt or "", given, before)
    except EquipoiseError as error:
        return {panel.message: error_notice(error)}
    words = f"{count} caption{'s' * (count != 1)} written." if count else "Nothing has changed."
    return {panel.message: draw.notice(words, "good"), panel.read: given}
