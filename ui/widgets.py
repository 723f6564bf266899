"""Gradio's parts, made to bear what a browser may send, and how a tab's handlers are connected to them."""

from collections.abc import Callable
from dataclasses import dataclass
from types import MethodType
from typing import Any

import gradio as gr
from gradio.context import Context

from equipoise.ui.quick import no_stubs

Updates = dict[Any, Any]  # what a handler returns: component → its value or update; all others stay as they are
PRIVATE: Any = {"api_visibility": "private"}  # of an event: programs cannot ask for it by a name
HIDDEN: Any = {**PRIVATE, "show_progress": "hidden"}
LATEST: Any = {**HIDDEN, "trigger_mode": "always_last"}  # of an event that may come again while it is at work

# A click on anything that carries an id becomes an event with that id; the listener stays when the content changes.
ON_CLICK = """
element.addEventListener('click', event => {
  const chosen = event.target.closest('[data-id]');
  if (chosen) trigger('select', {id: chosen.dataset.id});
});
"""

# What an event is about: the run whose heading the browser shows.
SHOWN = "(id, ...rest) => [document.querySelector('#run-head [data-shown]')?.dataset.shown ?? '', ...rest]"


def bound(handler: Callable[..., Any], tab: Any) -> Callable[..., Any]:
    """A handler with the tab that it serves as its first argument.

    A method, for gradio reads what `gr.Request` and `gr.EventData` are for from a method's annotations, and not from
    those of a `functools.partial`.
    """
    return MethodType(handler, tab)


@dataclass(frozen=True, eq=False)
class Confirm:
    """The question before something is deleted."""

    row: gr.Row
    question: gr.HTML  # with the id in it that it is about
    yes: gr.Button
    no: gr.Button


def confirm(name: str) -> Confirm:
    """Draws it, out of sight. `name`: the beginning of its parts' ids in the page."""
    with gr.Row(elem_classes=["actions"], visible=False) as row:
        question = gr.HTML(elem_id=f"{name}-question")
        yes = gr.Button("Delete for good", size="md", variant="stop", elem_id=f"{name}-yes")
        return Confirm(row, question, yes, gr.Button("Keep it", size="md"))


def asked_of(name: str) -> str:
    """What fills an event's first input with the id that such a question is about."""
    return shown_in(f"{name}-question")


def shown_in(part: str) -> str:
    """What fills an event's first input with what the part of that id shows."""
    found = f"document.querySelector('#{part} [data-shown]')?.dataset.shown ?? ''"
    return f"(id, ...rest) => [{found}, ...rest]"


def clicked_id(event: gr.EventData) -> str:
    """The id of what was clicked, from an event of ON_CLICK."""
    return str(getattr(event, "id", ""))


def root() -> gr.Blocks:
    """The page that is being built."""
    page = Context.root_block
    assert page is not None
    return page


def table_rows(table: Any) -> list[list[Any]]:
    """The rows of gradio's table, whichever form it comes in."""
    if table is None:
        return []
    return table.values.tolist() if hasattr(table, "values") else [list(row) for row in table]


with no_stubs():

    class Slider(gr.Slider):
        """A slider that takes the nearest number it has: an event may still be of bounds that have changed since.

        What is no number, such as an emptied box, is taken for the value that the page gave it last.
        """

        is_template = True  # for the browser it is gradio's own

        def preprocess(self, payload: Any) -> float:
            for number in (payload, self.value, self.minimum):
                if isinstance(number, int | float) and number == number:  # NaN is not
                    return super().preprocess(min(max(number, self.minimum), self.maximum))
            raise AssertionError("a slider's minimum is a number")

    class Table(gr.DataFrame):
        """A table that may also come as nothing."""

        is_template = True

        def preprocess(self, payload: Any) -> Any:
            return None if payload is None else super().preprocess(payload)


def caption_table(id: str) -> Table:
    """Pictures' names with captions that can be edited, out of sight until there are some. `id`: in the page."""
    return Table(
        headers=["picture", "caption"],
        datatype="str",
        interactive=True,
        static_columns=[0],
        label="Captions: edit them here",
        buttons=[],
        visible=False,
        wrap=True,
        max_height=420,
        elem_id=id,
    )
