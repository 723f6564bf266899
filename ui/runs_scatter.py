"""A sweep, or several runs, as a scatter or as parallel coordinates: any key against any figure.

Drawn by plotly.js, which gradio brings and serves itself: nothing is fetched from elsewhere, and the Python package is
not needed.
"""

import json
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from typing import Any

import gradio as gr
from gradio.components.plot import PlotData

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.runs.run import Run
from equipoise.ui import compare, draw, runs_keys
from equipoise.ui.runs import open_run
from equipoise.ui.runs_curves import together_with
from equipoise.ui.safety import Site
from equipoise.ui.widgets import HIDDEN, Updates, bound, no_stubs

COMPARED = "compared "  # before the figures of the sweep's own comparison
KINDS = ("scatter", "parallel coordinates")
MOST_AXES = 12  # of parallel coordinates
_DECADES = 30  # beyond such a ratio an axis is logarithmic
_INK = "#7b8794"  # read on white and on black
_COLOURS = ("#0f9488", "#e07a2f", "#5b8dc9", "#b06fcf", "#c99a1d", "#8a97a6")
_FIRST = ("compared score", "result score", "result loss_after", "last loss")  # what is looked at first, if it is there
_AXIS = {"gridcolor": "rgba(128,128,128,.25)", "zerolinecolor": "rgba(128,128,128,.4)"}

Rows = Mapping[str, Mapping[str, Any]]  # a run's name → key → value


with no_stubs():

    class Figure(gr.Plot):
        """Gradio's plot, given a figure of plotly.js as plain data."""

        is_template = True

        def postprocess(self, value: Any) -> PlotData | None:
            return None if value is None else PlotData(type="plotly", plot=json.dumps(value))


@dataclass(frozen=True, eq=False)
class ScatterPart:
    """The parts, of which all follow when another run is shown."""

    site: Site
    kind: gr.Radio
    across: gr.Dropdown
    up: gr.Dropdown
    figure: Figure
    said: gr.HTML


def draw_parts(site: Site) -> ScatterPart:
    with gr.Row(elem_classes=["filters"]):
        more: Any = {"interactive": True, "allow_custom_value": True, "min_width": 200}
        kind = gr.Radio(list(KINDS), value=KINDS[0], label="View", interactive=True, elem_id="scatter-kind")
        across = gr.Dropdown([], label="Across", info="A key of the configuration.", elem_id="scatter-across", **more)
        up = gr.Dropdown([], label="Up, or colour", info="A figure.", elem_id="scatter-up", **more)
    return ScatterPart(site, kind, across, up, Figure(show_label=False, elem_id="scatter"), gr.HTML())


def connect(part: ScatterPart, tab: gr.Tab, chosen: gr.State, beside: gr.Dropdown) -> None:
    """`tab`: the one that holds the parts; `chosen`: the run that is shown, by id; `beside`: others."""
    outputs = [part.across, part.up, part.figure, part.said]
    inputs = [chosen, beside, part.kind, part.across, part.up]
    moved = [tab.select, beside.input, chosen.change, part.kind.input, part.across.input, part.up.input]
    gr.on(moved, bound(draw_scatter, part), inputs, outputs, trigger_mode="always_last", **HIDDEN)


def rows(site: Site, id: str, beside: Sequence[str]) -> dict[str, dict[str, Any]]:
    """What is known of a sweep's cells, or of a run and those beside it, by a name for each.

    Raises:
        InputError: there is no such run, or only one.
    """
    run = open_run(site, id)
    found = together_with(site, run, beside)
    if len(found) < 2:
        raise InputError("Choose a sweep, or other runs beside this one under Curves.")
    judged = _judged(site, run)
    return {name: {**runs_keys.known(one.folder), **judged.get(one.id, {})} for name, one in found.items()}


def _judged(site: Site, sweep: Run) -> dict[str, dict[str, Any]]:
    """The figures of a sweep's own comparison, by its cells' ids."""
    with suppress(EquipoiseError):
        made = compare.read(site, f"{sweep.id}/comparison")
        return {cell.run: {COMPARED + key: value for key, value in cell.metrics.items()} for cell in made.cells}
    return {}


def differing(found: Rows) -> list[str]:
    """The keys of the configurations in which the runs differ."""
    keys = dict.fromkeys(key for one in found.values() for key in one if not _is_figure(key))
    some = [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in found.values()}) > 1]
    return [key for key in some if key not in ("name", "runs")]


def figures(found: Rows) -> list[str]:
    """The figures that any of them has: those in which they differ first, of these those that one looks at first."""
    keys = dict.fromkeys(key for one in found.values() for key in one if _is_figure(key))
    same = {key: len({one.get(key) for one in found.values()}) == 1 for key in keys}
    return sorted(keys, key=lambda key: (same[key], _FIRST.index(key) if key in _FIRST else len(_FIRST), key))


def _is_figure(key: str) -> bool:
    return key.startswith((runs_keys.LAST, runs_keys.RESULT, COMPARED))


def scatter(found: Rows, across: str, up: str) -> dict[str, Any]:
    """A figure of plotly.js: a point for each run, a colour for each of the other things in which they differ."""
    groups: dict[str, list[tuple[str, Any, Any]]] = {}
    rest = [key for key in differing(found) if key not in (across, up, "seed")]
    for name, one in found.items():
        x, y = one.get(across), runs_keys.number(one.get(up))
        if x is not None and y is not None:
            words = ", ".join(_said(key, one.get(key)) for key in rest[:3])
            groups.setdefault(draw.esc(words or "runs"), []).append((draw.esc(name), _plain(x), y))
    traces = [
        {
            "type": "scatter",
            "mode": "markers",
            "name": words,
            "x": [x for _, x, _ in points],
            "y": [y for _, _, y in points],
            "text": [name for name, _, _ in points],
            "hovertemplate": "%{text}<br>%{x}: %{y:.5g}<extra></extra>",
            "marker": {"size": 11, "color": _COLOURS[index % len(_COLOURS)]},
        }
        for index, (words, points) in enumerate(groups.items())
    ]
    axes = {
        axis: {"title": {"text": draw.esc(key)}, **_AXIS, **_scale([one.get(key) for one in found.values()])}
        for axis, key in (("xaxis", across), ("yaxis", up))
    }
    return {"data": traces, "layout": {**_layout(), **axes, "showlegend": len(traces) > 1}}


def _said(key: str, value: Any) -> str:
    """A value in a legend, with what it is of where it does not say so itself."""
    last = key.rpartition(".")[2]
    return f"{'' if last == 'name' else f'{last} '}{runs_keys.shown(value)}"


def parallel(found: Rows, up: str) -> dict[str, Any]:
    """A figure of plotly.js: a line for each run over all in which they differ, coloured by one figure."""
    some = {name: one for name, one in found.items() if runs_keys.number(one.get(up)) is not None}
    keys = [*differing(some)[: MOST_AXES - 1], up]
    colours = [runs_keys.number(one[up]) for one in some.values()]
    line = {"color": colours, "colorscale": "Viridis", "showscale": True}
    trace = {"type": "parcoords", "dimensions": [_dimension(some, key) for key in keys], "line": line}
    return {"data": [trace] if some else [], "layout": _layout() | {"margin": {"l": 140, "r": 60, "t": 60, "b": 30}}}


def _dimension(found: Rows, key: str) -> dict[str, Any]:
    """One axis: numbers as they are, or their logarithms where they are decades apart; words in an order."""
    values, label = [one.get(key) for one in found.values()], draw.esc(key.rpartition(".")[2])
    numbers = [runs_keys.number(value) for value in values]
    if all(number is not None for number in numbers) and not _scale(values):
        return {"label": label, "values": numbers}
    plain = [_plain(value) for value in values]
    order = sorted(set(plain), key=lambda value: (isinstance(value, str), value))
    words = [draw.esc(runs_keys.shown(value)) for value in order]
    return {
        "label": label,
        "values": [order.index(value) for value in plain],
        "tickvals": list(range(len(order))),
        "ticktext": words,
    }


def _plain(value: Any) -> float | str:
    number = runs_keys.number(value)
    return draw.esc(runs_keys.shown(value)) if number is None else number


def _scale(values: Sequence[Any]) -> dict[str, Any]:
    """A logarithmic axis where all values are positive and decades apart; one of words where any is none."""
    known = [value for value in values if value is not None]
    numbers = [number for value in known if (number := runs_keys.number(value)) is not None]
    if len(numbers) < len(known):
        return {"type": "category"}
    return (
        {"type": "log", "dtick": 1} if numbers and min(numbers) > 0 and max(numbers) > _DECADES * min(numbers) else {}
    )


def _layout() -> dict[str, Any]:
    clear = "rgba(0,0,0,0)"
    return {
        "paper_bgcolor": clear,
        "plot_bgcolor": clear,
        "font": {"color": _INK, "family": "system-ui, sans-serif", "size": 12},
        "margin": {"l": 60, "r": 20, "t": 20, "b": 50},
        "height": 420,
        "legend": {"orientation": "h", "y": 1.1},
        "modebar": {"bgcolor": clear, "color": _INK, "remove": ["lasso2d", "select2d"]},
        "uirevision": "same",  # what was zoomed stays so
    }


# Handlers: what they are given stands in the order of the inputs above


def draw_scatter(
    part: ScatterPart,
    id: str | None,
    beside: list[str] | None,
    kind: str | None,
    across: str | None,
    up: str | None,
) -> Updates:
    """The runs that are shown, by what they differ in and have been measured by."""
    if not id:  # none is shown
        return gr.skip()
    try:
        found = rows(part.site, id, beside or [])
        keys, known = differing(found), figures(found)
        if not keys or not known:
            raise InputError("They differ in nothing, or nothing has been measured yet.")
    except EquipoiseError as error:
        words = draw.notice(part.site.without_paths(error))
        return {part.figure: gr.update(visible=False, value=None), part.said: words}
    rate = "optimizer.learning_rate"
    across = across if across in keys else rate if rate in keys else keys[0]
    up = up if up in known else known[0]
    made = parallel(found, up) if kind == KINDS[1] else scatter(found, across, up)
    return {
        part.across: gr.update(choices=keys, value=across, visible=kind != KINDS[1]),
        part.up: gr.update(choices=known, value=up),
        part.figure: gr.update(value=made, visible=True),
        part.said: "",
    }
