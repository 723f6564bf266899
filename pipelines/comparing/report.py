"""A comparison as something to look at: the grid picture, one per prompt, and an HTML report that opens from disk."""

import base64
import html
import json
import math
import textwrap
from collections import Counter
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from equipoise.pipelines.comparing.comparison import Cell, Comparison, Picture, means
from equipoise.pipelines.comparing.robustness import GAIN, shown_rate
from equipoise.pipelines.files import write_atomic

CELL = 168  # pixels, the side of a cell of the grid picture
_GAP, _LEFT, _HEAD, _FOOT = 10, 150, 64, 22
_MOST = 6  # pictures in a cell: the demo's prompts, those for what was known before among them
_INK, _MUTED, _PAPER, _GOOD, _BAD = "#1b1f24", "#6a737d", "#ffffff", "#1a7f37", "#cf222e"
NOT_JUDGED = "Nothing is judged here: there is no score to tell by which learning rates worked."
_APART, _ROW = 44, 14  # units of the curve that a rate's number takes across, and a word down
_LINES = ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a"]


def write_report(comparison: Comparison) -> dict[str, Path]:
    """Writes grid.png, one grid per prompt, report.html, table.csv and table.json; returns their paths."""
    folder = comparison.folder
    folder.mkdir(parents=True, exist_ok=True)
    draw_grid(comparison).save(folder / "grid.png")
    for prompt in range(len(comparison.prompts)):
        draw_grid(comparison, prompt).save(folder / f"grid-{prompt:02d}.png")
    table, document = comparison.write_tables()
    write_atomic(folder / "report.html", render_html(comparison))
    return {"grid": folder / "grid.png", "report": folder / "report.html", "table": table, "json": document}


def draw_grid(comparison: Comparison, prompt: int | None = None) -> Image.Image:
    """Rows × learning rates, the untouched base first; each cell a mosaic of its pictures (or of one prompt's).

    A green frame marks a usable rate, a red one a rate that is not; the number is the score, and a smaller one below it
    what else is known of the cell; the last lines say what both are. Of several training seeds the first one's pictures
    are shown, with the mean of all scores, by which the frame goes, and their span.
    """
    rows, rates = comparison.rows, comparison.rates
    width = _LEFT + (CELL + _GAP) * (len(rates) + 1) + _GAP
    columns, tall = _tiles(comparison, prompt)
    foot = _FOOT + 16 * bool(comparison.beside or comparison.scored)
    pitch = tall + foot + _GAP
    said = explanations(comparison)
    if prompt is None:
        said.insert(0, f"Pictures, row by row: {'; '.join(comparison.prompts[:_MOST])}.")
    legend = [line for text in said for line in _wrapped(text, (width - 2 * _GAP) // 7)]
    sheet = Image.new("RGB", (width, _HEAD + pitch * len(rows) + 18 * len(legend) + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    title = "the first of each" if prompt is None else comparison.prompts[prompt]
    pen.text((_GAP, 8), f"{comparison.name} · {title}"[: width // 8], _INK, font=_font(16))
    pen.text((_GAP, _HEAD - 18), "learning rate", _MUTED, font=_font(15), anchor="lm")
    for column, label in enumerate([comparison.base.row, *(shown_rate(rate) for rate in rates)]):
        x = _LEFT + (CELL + _GAP) * column
        pen.text((x + CELL / 2, _HEAD - 18), label, _INK, font=_font(16), anchor="mm")
    for index, row in enumerate(rows):
        y = _HEAD + pitch * index
        for number, words in enumerate(_wrapped(row, 17)):
            pen.text((_GAP, y + tall / 2 - 12 + 18 * number), words, _INK, font=_font(15))
        for column, rate in enumerate([math.nan, *rates]):
            x = _LEFT + (CELL + _GAP) * column
            cells = _cells(comparison, row, rate)
            if not cells:
                continue
            chosen = _chosen(next((cell for cell in cells if cell.pictures), cells[0]), prompt)
            side = CELL // columns
            for number, picture in enumerate(chosen):
                with Image.open(comparison.folder / picture.thumbnail) as image:
                    small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
                sheet.paste(small, (x + number % columns * side, y + number // columns * side))
            if not chosen:
                pen.text((x + CELL / 2, y + tall / 2), cells[0].state, _MUTED, font=_font(15), anchor="mm")
            frame = {"usable": _GOOD, "unusable": _BAD}.get(comparison.verdict(row, rate), _MUTED)
            pen.rectangle((x - 2, y - 2, x + CELL + 1, y + tall + 1), outline=frame, width=2)
            text = _said(comparison, cells)
            size = 14 if pen.textlength(text, _font(14)) <= CELL else 11
            pen.text((x + CELL / 2, y + tall + 12), text, frame, font=_font(size), anchor="mm")
            text = _said_beside(comparison, cells)
            size = 12 if pen.textlength(text, _font(12)) <= CELL else 9
            pen.text((x + CELL / 2, y + tall + 28), text, _MUTED, _font(size), anchor="mm")
    for number, words in enumerate(legend):
        pen.text((_GAP, _HEAD + pitch * len(rows) + 18 * number), words, _MUTED, font=_font(13))
    return sheet


def explanations(comparison: Comparison) -> list[str]:
    """What the numbers and the frames of a grid mean, for somebody who sees it for the first time."""
    beside = [f"{short(name)}: {words}." for name, words in (comparison.beside | comparison.scored).items()]
    base = ["base: before training."] if comparison.base.row == "base" else []
    same = [*([comparison.alike] if comparison.alike else []), *comparison.doubts]
    if not comparison.judged:
        return [NOT_JUDGED, *beside, *base, *same]
    return [
        f"Score: {comparison.score}.",
        *beside,
        *base,
        *same,
        "Green frame: a learning rate that worked (at least three quarters of the best gain over the base). Red: not.",
    ]


def short(name: str) -> str:
    """A metric's name in a cell, where there is little room."""
    return name.removeprefix("accuracy_")


def _cells(comparison: Comparison, row: str, rate: float) -> list[Cell]:
    """The cells of one place, one per training seed; the column of no rate is the base's."""
    return [comparison.base] if math.isnan(rate) else comparison.at(row, rate)


def _said(comparison: Comparison, cells: list[Cell]) -> str:
    """A place's score, over several seeds their mean and span, and how its cells ended where they are not done."""
    ended = [cell.state for cell in cells if cell.state not in ("done", "untouched")]
    states = [state if len(cells) == 1 else f"{count} {state}" for state, count in Counter(ended).items()]
    scores = [comparison.counted(cell) for cell in cells]
    text = ""
    if any(math.isfinite(cell.score) for cell in cells):
        text = f"{sum(scores) / len(scores):.0%}"
        text += f" ({min(scores):.0%} to {max(scores):.0%})" if len(scores) > 1 else ""
    return " · ".join(filter(None, [text, *states]))


def _said_beside(comparison: Comparison, cells: list[Cell]) -> str:
    """What is reported of a cell beside its score: means over the seeds."""
    found = means([cell.metrics for cell in cells])
    shares = [f"{short(name)} {found[name]:.0%}" for name in comparison.beside if name in found]
    return " · ".join([*shares, *(f"{name} {found[name]:.3g}" for name in comparison.scored if name in found)])


def _chosen(cell: Cell, prompt: int | None) -> list[Picture]:
    """What the grid shows of a cell: the first picture of each prompt, or one prompt's by seed."""
    if prompt is None:
        return list({picture.prompt: picture for picture in reversed(cell.pictures)}.values())[::-1][:_MOST]
    return [picture for picture in cell.pictures if picture.prompt == prompt][:_MOST]


def _tiles(comparison: Comparison, prompt: int | None) -> tuple[int, int]:
    """How many pictures stand side by side in a cell of the grid, and how high it is, in pixels."""
    most = max(len(_chosen(cell, prompt)) for cell in (comparison.base, *comparison.cells))
    columns = 1 if most < 2 else 2
    return columns, CELL // columns * max(1, math.ceil(most / columns))


def draw_curve(comparison: Comparison) -> str:
    """The robustness curve as SVG: score against learning rate, a line per row; the bar to clear is dashed."""
    width, height, left, right, top, bottom = 720, 300, 60, 58, 16, 44
    points = {row: [p for p in comparison.points(row) if math.isfinite(p.score)] for row in comparison.rows}
    scores = [p.score for some in points.values() for p in some]
    scores += [comparison.base.score] if math.isfinite(comparison.base.score) else []
    if not scores:  # nothing was judged, as with questions of one's own
        return ""
    low, high = min([*scores, 0.0]), max([*scores, 0.01])
    first, last = math.log10(comparison.rates[0]), math.log10(comparison.rates[-1])

    def x(rate: float) -> float:
        share = (math.log10(rate) - first) / (last - first) if last > first else 0.5
        return left + share * (width - left - right)

    def y(score: float) -> float:
        return height - bottom - (score - low) / (high - low) * (height - top - bottom)

    drawn = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="score against learning rate">']
    written = -math.inf
    for rate in comparison.rates:
        if x(rate) - written >= _APART:  # where rates are many, some go without their number
            written = x(rate)
            drawn.append(f'<text x="{written:.1f}" y="{height - 24}" text-anchor="middle">{shown_rate(rate)}</text>')
    for value in ticks(low, high):
        drawn.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:g}</text>')
        drawn.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
    drawn.append(f'<text x="{(left + width) / 2}" y="{height - 4}" text-anchor="middle">learning rate</text>')
    above = math.inf  # where the words below are: two may be near each other
    for label, score in (("base", comparison.base.score), ("usable", comparison.line)):
        if score is not None and math.isfinite(score):
            at, above = y(score), min(y(score), above - _ROW)
            drawn.append(f'<line class="{label}" x1="{left}" x2="{width - right}" y1="{at:.1f}" y2="{at:.1f}"/>')
            drawn.append(f'<text x="{width - right + 8}" y="{above + 4:.1f}">{label}</text>')
    for index, (row, some) in enumerate(points.items()):
        colour = line_colour(index)
        path = " ".join(f"{x(p.rate):.1f},{y(p.score):.1f}" for p in some)
        drawn.append(f'<polyline points="{path}" stroke="{colour}"/>')
        for p in some:
            title = f"<title>{html.escape(row)} at {shown_rate(p.rate)}: {p.score:.3f}</title>"
            drawn.append(f'<circle cx="{x(p.rate):.1f}" cy="{y(p.score):.1f}" r="4" fill="{colour}">{title}</circle>')
    return "".join([*drawn, "</svg>"])


def ticks(low: float, high: float, about: int = 4) -> list[float]:
    """Round numbers from `low` to `high`, at equal distances, not many more or fewer than `about`."""
    rough = (high - low) / about
    unit = 10.0 ** math.floor(math.log10(rough))
    step = unit * next(some for some in (1, 2, 5, 10) if some * unit >= rough * 0.99)
    return [float(f"{index * step:.12g}") for index in range(math.ceil(low / step), math.floor(high / step) + 1)]


def line_colour(index: int) -> str:
    """The colour of a row's line in the curve."""
    return _LINES[index % len(_LINES)]


def render_html(comparison: Comparison) -> str:
    """The report: one file, thumbnails within it, full-size pictures linked beside it."""
    ranges = "".join(
        f'<tr><td><i style="background:{line_colour(index)}"></i>{html.escape(row)}</td>'
        f"<td>{html.escape(str(found)) if found else 'none of the rates tried'}</td></tr>"
        for index, (row, found) in enumerate(comparison.ranges().items())
        if comparison.judged
    )
    document = {
        "prompts": comparison.prompts,
        "rows": comparison.rows,
        "columns": [comparison.base.row, *map(shown_rate, comparison.rates)],
        "seeds": sorted({cell.seed for cell in comparison.cells}),
        "places": [
            [_as_json(comparison, row, rate) for rate in (math.nan, *comparison.rates)] for row in comparison.rows
        ],
    }
    names = list(dict.fromkeys(name for cell in [comparison.base, *comparison.cells] for name in cell.metrics))
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["row", "learning rate", "seed", "state", *names])
    rows = "".join(
        f"<tr><td>{html.escape(c.row)}</td><td>{'' if math.isnan(c.rate) else shown_rate(c.rate)}</td><td>{c.seed}</td>"
        f"<td title={_attribute(c.message)}>{html.escape(c.state)}</td>"
        + "".join(f"<td>{c.metrics[name]:.4g}</td>" if name in c.metrics else "<td></td>" for name in names)
        + "</tr>"
        for c in [comparison.base, *comparison.cells]
    )
    page = files("equipoise.pipelines.comparing").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(comparison.name),
        "LEGEND": "".join(f"<p>{html.escape(line)}</p>" for line in explanations(comparison)),
        "RANGES": ranges or f"<tr><td>{NOT_JUDGED}</td></tr>",
        "NOISE": f"<p>No score is {GAIN:g} or more above the base's; smaller gains are noise.</p>"
        if comparison.judged and comparison.line is None
        else "",
        "CURVE": draw_curve(comparison) if comparison.rates else "",
        "TABLE": f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>",
        "PROMPTS": _prompt_table(comparison),
        "DATA": json.dumps(document).replace("<", "\\u003c"),  # no tag can end the script early
    }
    for name, value in parts.items():
        page = page.replace(f"{{{{{name}}}}}", value)
    return page


def _prompt_table(comparison: Comparison) -> str:
    """The pictures' scores, prompt by prompt, to be opened; nothing where they have none."""
    if not (names := comparison.picture_scores):
        return ""
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["prompt", "row", "learning rate", "seed", *names])
    rows = [
        f"<tr><td>{html.escape(prompt)}</td><td>{html.escape(c.row)}</td>"
        f"<td>{'' if math.isnan(c.rate) else shown_rate(c.rate)}</td><td>{c.seed}</td>"
        + "".join(f"<td>{found[name]:.4g}</td>" if name in found else "<td></td>" for name in names)
        + "</tr>"
        for index, prompt in enumerate(comparison.prompts)
        for c in [comparison.base, *comparison.cells]
        if (found := c.of_prompt(index))
    ]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<details><summary>Prompt by prompt</summary><div style="overflow-x:auto">{table}</div></details>'


def _as_json(comparison: Comparison, row: str, rate: float) -> dict:
    """A place of the grid: what is said of it, and its cells, one per training seed."""
    cells = _cells(comparison, row, rate)
    return {
        "said": _said(comparison, cells),
        "beside": _said_beside(comparison, cells),
        "base": math.isnan(rate),
        "usable": comparison.usable(row, rate),
        "cells": [
            {
                "run": cell.who,
                "seed": cell.seed,
                "state": cell.state,
                "message": cell.message,
                "score": "" if math.isnan(cell.score) else f"score {cell.score:.0%}",
                "config": {key: str(value) for key, value in cell.config.items()},
                "pictures": [
                    {
                        "prompt": p.prompt,
                        "seed": p.seed,
                        "file": p.file,
                        "note": p.note,
                        "right": p.right,
                        "scores": " · ".join(f"{name} {value:.3g}" for name, value in p.scores.items()),
                        "data": _data_uri(comparison.folder / p.thumbnail),
                    }
                    for p in cell.pictures
                ],
            }
            for cell in cells
        ],
    }


def _data_uri(path: Path) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _attribute(text: str) -> str:
    return f'"{html.escape(text, quote=True)}"'


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def _font(size: int):
    return ImageFont.load_default(size)
