"""The log of a run in the tab Runs: its end, which is followed, and a search through all of it."""

from dataclasses import dataclass

import gradio as gr

from equipoise.errors import EquipoiseError
from equipoise.ui import draw
from equipoise.ui.runs import open_run
from equipoise.ui.safety import Site
from equipoise.ui.widgets import HIDDEN, SHOWN, Updates, bound

MOST_FOUND = 200  # lines, the last ones
MOST_READ = 20_000_000  # bytes, the end of a longer log


@dataclass(frozen=True, eq=False)
class LogPart:
    """The parts that search."""

    site: Site
    words: gr.Textbox
    found: gr.HTML


def draw_parts(site: Site) -> LogPart:
    words = gr.Textbox(
        label="Search", placeholder="words of a line, in the whole log", max_lines=1, elem_id="log-words"
    )
    return LogPart(site, words, gr.HTML(elem_id="log-found"))


def connect(part: LogPart, chosen: gr.State) -> None:
    """`chosen`: the id of the run that is shown."""
    shown = gr.Textbox(visible=False)
    event: dict = {"js": SHOWN, "trigger_mode": "always_last", **HIDDEN}
    part.words.input(bound(search_log, part), [shown, part.words], part.found, **event)
    chosen.change(bound(forget_search, part), None, [part.words, part.found], **HIDDEN)


def found_lines(site: Site, id: str, words: str) -> str:
    """The last lines of a run's log that hold all of the words, with how many there are."""
    wanted = words.lower().split()
    with open(open_run(site, id).log_file, "rb") as file:
        file.seek(max(0, file.seek(0, 2) - MOST_READ))
        text = file.read().decode("utf-8", "replace")
    lines = [line.rpartition("\r")[2].rstrip() for line in text.replace("\r\n", "\n").split("\n")]
    found = [line for line in lines if line and all(word in line.lower() for word in wanted)]
    some = f", the last {MOST_FOUND} of them" if len(found) > MOST_FOUND else ""
    head = f"<p class='hint'>{len(found)} line{'s' * (len(found) != 1)}{some}</p>"
    return head + (f"<pre class='log'>{draw.esc(chr(10).join(found[-MOST_FOUND:]))}</pre>" if found else "")


# Handlers: what they are given stands in the order of the inputs above


def search_log(part: LogPart, id: str, words: str | None) -> Updates:
    try:
        return {part.found: found_lines(part.site, id, words) if id and words and words.strip() else ""}
    except (EquipoiseError, OSError):
        return {part.found: draw.notice("There is no log that can be read.", "bad")}


def forget_search(part: LogPart) -> Updates:
    """Another run is looked at."""
    return {part.words: "", part.found: ""}
