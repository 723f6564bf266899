"""The tab Plugins: what is installed, who provides it, what failed and why, and the options of each."""

import re
from itertools import groupby

import gradio as gr

from equipoise import registry
from equipoise.errors import EquipoiseError
from equipoise.options import references, summary
from equipoise.pipelines.config.option_rows import option_rows
from equipoise.plugin_cache import load_errors
from equipoise.registry import Entry
from equipoise.ui import draw
from equipoise.ui.draw import esc


def page() -> str:
    """All plugins as HTML, by kind. Built-in ones are loaded, others only after they have been tried elsewhere."""
    found = registry.entries()
    errors = dict(zip(found, load_errors(found), strict=True))
    parts = []
    for kind, some in groupby(found, key=lambda entry: entry.kind):
        parts.append(f"<h3>{kind.capitalize()}</h3>" + "".join(_card(entry, errors[entry]) for entry in some))
    return f"<div class='plugins'>{''.join(parts)}</div>"


def _card(entry: Entry, error: str) -> str:
    origin = f"{entry.distribution} {entry.version}"
    head = f"<b>{esc(entry.name)}</b>"
    try:
        if error:
            raise EquipoiseError(error)
        cls = registry.load(entry.kind, entry.name)
        head += f"<span class='purpose'>{_marked(summary(cls) or 'It has no description.')}</span>"
        body = ""
        rows = "".join(
            f"<tr><td>{esc(row['name'])}</td><td>{esc(row['type'])} {esc(row['bounds'])}</td>"
            f"<td>{esc(row['default'])}</td><td>{esc(row['help'])}</td></tr>"
            for row in option_rows(entry.kind, cls)
        )
        if rows:
            names = "<tr><th>option</th><th>must be</th><th>default</th><th>what it does</th></tr>"
            body += f"<div class='scroll'><table>{names}{rows}</table></div>"
        if papers := references(cls):
            body += "<p class='hint'>" + "<br>".join(map(_linked, papers)) + "</p>"
    except EquipoiseError as problem:
        head += "<span class='badge failed'>cannot be used</span>"
        body = draw.notice(str(problem), "bad")
    return f"<details class='card'><summary>{head}<small>{esc(origin)}</small></summary>{body}</details>"


@registry.looked_up_once()
def purposes(kind: str) -> dict[str, str]:
    """What the plugins of a kind are for, by name; of those alone that can be loaded and say it."""
    found = registry.entries(kind)
    usable = [entry for entry, error in zip(found, load_errors(found), strict=True) if not error]
    words = {entry.name: summary(registry.load(kind, entry.name)) for entry in usable}
    return {name: text.replace("`", "") for name, text in words.items() if text}


def _marked(words: str) -> str:
    return re.sub(r"`([^`]+)`", r"<code>\1</code>", esc(words))


def _linked(paper: str) -> str:
    """A reference, with a link to the paper where it says which one of arXiv's it is."""
    link = r"<a href='https://arxiv.org/abs/\1' target='_blank' rel='noreferrer'>arXiv \1</a>"
    return re.sub(r"arXiv[ :](\d{4}\.\d{4,5})", link, esc(paper))


def build(tab: gr.Tab) -> None:
    """Draws the tab; loading every plugin takes seconds, so it is done when the tab is first looked at."""
    gr.HTML(
        draw.head(
            "Plugins",
            "Found by their packages' entry points; yours enter by the same door. <code>pip install</code> one and "
            "start the page again.",
        )
    )
    shown = gr.HTML(draw.empty("Looking …", "Every plugin is loaded once."))
    tab.select(page, None, shown, show_progress="hidden", api_name="plugins")
