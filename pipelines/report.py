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

from equipoise.pipelines.comparison import Cell, Comparison
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.robustness import GAIN, shown_rate

CELL = 168  # pixels, the side of a cell of the grid picture
_GAP, _LEFT, _HEAD, _FOOT = 10, 150, 64, 22
_INK, _MUTED, _PAPER, _GOOD, _BAD = "#1b1f24", "#6a737d", "#ffffff", "#1a7f37", "#cf222e"
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

    A green frame marks a usable rate, a red one a rate that is not; the number is the score. Of several training seeds
    the first one's pictures are shown, with the mean of all scores, by which the frame goes, and their span.
    """
    rows, rates = comparison.rows, comparison.rates
    width = _LEFT + (CELL + _GAP) * (len(rates) + 1) + _GAP
    height = _HEAD + (CELL + _FOOT + _GAP) * len(rows) + _GAP
    sheet = Image.new("RGB", (width, height), _PAPER)
    pen = ImageDraw.Draw(sheet)
    title = "first picture of each prompt" if prompt is None else comparison.prompts[prompt]
    pen.text((_GAP, 8), f"{comparison.name} · {title}"[: width // 8], _INK, font=_font(16))
    for column, label in enumerate(["base", *(shown_rate(rate) for rate in rates)]):
        x = _LEFT + (CELL + _GAP) * column
        pen.text((x + CELL / 2, _HEAD - 18), label, _INK, font=_font(16), anchor="mm")
    for index, row in enumerate(rows):
        y = _HEAD + (CELL + _FOOT + _GAP) * index
        for number, words in enumerate(_wrapped(row, 17)):
            pen.text((_GAP, y + CELL / 2 - 12 + 18 * number), words, _INK, font=_font(15))
        for column, rate in enumerate([math.nan, *rates]):
            x = _LEFT + (CELL + _GAP) * column
            cells = _cells(comparison, row, rate)
            if not cells:
                continue
            mosaic = _mosaic(comparison, next((cell for cell in cells if cell.pictures), cells[0]), prompt)
            if mosaic:
                sheet.paste(mosaic, (x, y))
            else:
                pen.text((x + CELL / 2, y + CELL / 2), cells[0].state, _MUTED, font=_font(15), anchor="mm")
            frame = _MUTED if math.isnan(rate) else _GOOD if comparison.usable(row, rate) else _BAD
            pen.rectangle((x - 2, y - 2, x + CELL + 1, y + CELL + 1), outline=frame, width=2)
            text = _said(comparison, cells)
            size = 14 if pen.textlength(text, _font(14)) <= CELL else 11
            pen.text((x + CELL / 2, y + CELL + 12), text, frame, font=_font(size), anchor="mm")
    return sheet


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


def _mosaic(comparison: Comparison, cell: Cell, prompt: int | None) -> Image.Image | None:
    """Up to four pictures of a cell: the first of each prompt, or one prompt's by seed."""
    if prompt is None:
        chosen = list({picture.prompt: picture for picture in reversed(cell.pictures)}.values())[::-1][:4]
    else:
        chosen = [picture for picture in cell.pictures if picture.prompt == prompt][:4]
    if not chosen:
        return None
    across = 1 if len(chosen) == 1 else 2
    side = CELL // across
    sheet = Image.new("RGB", (CELL, CELL), "#d0d7de")
    for index, picture in enumerate(chosen):
        with Image.open(comparison.folder / picture.thumbnail) as image:
            small = image.convert("RGB").resize((side, side), Image.Resampling.BICUBIC)
        sheet.paste(small, (index % across * side, index // across * side))
    return sheet


def draw_curve(comparison: Comparison) -> str:
    """The robustness curve as SVG: score against learning rate, a line per row; the bar to clear is dashed."""
    width, height, left, right, top, bottom = 720, 300, 60, 20, 16, 44
    points = {row: [p for p in comparison.points(row) if math.isfinite(p.score)] for row in comparison.rows}
    scores = [p.score for some in points.values() for p in some] + [comparison.base.score]
    low, high = min([*scores, 0.0]), max([*scores, 0.01])
    first, last = math.log10(comparison.rates[0]), math.log10(comparison.rates[-1])

    def x(rate: float) -> float:
        share = (math.log10(rate) - first) / (last - first) if last > first else 0.5
        return left + share * (width - left - right)

    def y(score: float) -> float:
        return height - bottom - (score - low) / (high - low) * (height - top - bottom)

    drawn = [f'<svg viewBox="0 0 {width} {height}" role="img" aria-label="score against learning rate">']
    for rate in comparison.rates:
        drawn.append(f'<text x="{x(rate):.1f}" y="{height - 24}" text-anchor="middle">{shown_rate(rate)}</text>')
    for share in (0, 0.5, 1):
        value = low + share * (high - low)
        drawn.append(f'<text x="{left - 8}" y="{y(value) + 4:.1f}" text-anchor="end">{value:.2f}</text>')
        drawn.append(f'<line class="axis" x1="{left}" x2="{width - right}" y1="{y(value):.1f}" y2="{y(value):.1f}"/>')
    drawn.append(f'<text x="{(left + width) / 2}" y="{height - 4}" text-anchor="middle">learning rate</text>')
    for label, score in (("base", comparison.base.score), ("usable", comparison.line)):
        if score is not None:
            drawn.append(
                f'<line class="{label}" x1="{left}" x2="{width - right}" y1="{y(score):.1f}" y2="{y(score):.1f}"/>'
            )
            drawn.append(f'<text x="{width - right}" y="{y(score) - 4:.1f}" text-anchor="end">{label}</text>')
    for index, (row, some) in enumerate(points.items()):
        colour = _LINES[index % len(_LINES)]
        path = " ".join(f"{x(p.rate):.1f},{y(p.score):.1f}" for p in some)
        drawn.append(f'<polyline points="{path}" stroke="{colour}"/>')
        for p in some:
            title = f"<title>{html.escape(row)} at {shown_rate(p.rate)}: {p.score:.3f}</title>"
            drawn.append(f'<circle cx="{x(p.rate):.1f}" cy="{y(p.score):.1f}" r="4" fill="{colour}">{title}</circle>')
    return "".join([*drawn, "</svg>"])


def render_html(comparison: Comparison) -> str:
    """The report: one file, thumbnails within it, full-size pictures linked beside it."""
    ranges = "".join(
        f'<tr><td><i style="background:{_LINES[index % len(_LINES)]}"></i>{html.escape(row)}</td>'
        f"<td>{html.escape(str(found)) if found else 'none of the rates tried'}</td></tr>"
        for index, (row, found) in enumerate(comparison.ranges().items())
    )
    document = {
        "prompts": comparison.prompts,
        "rows": comparison.rows,
        "columns": ["base", *map(shown_rate, comparison.rates)],
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
    page = files("equipoise.pipelines").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(comparison.name),
        "SCORE": html.escape(comparison.score),
        "RANGES": ranges,
        "NOISE": f"<p>No score is {GAIN:g} or more above the base's; smaller gains are noise.</p>"
        if comparison.line is None
        else "",
        "CURVE": draw_curve(comparison) if comparison.rates else "",
        "TABLE": f"<thead><tr>{head}</tr></thead><tbody>{rows}</tbody>",
        "DATA": json.dumps(document).replace("<", "\\u003c"),  # no tag can end the script early
    }
    for name, value in parts.items():
        page = page.replace(f"{{{{{name}}}}}", value)
    return page


def _as_json(comparison: Comparison, row: str, rate: float) -> dict:
    """A place of the grid: what is said of it, and its cells, one per training seed."""
    cells = _cells(comparison, row, rate)
    return {
        "said": _said(comparison, cells),
        "base": math.isnan(rate),
        "usable": comparison.usable(row, rate),
        "cells": [
            {
                "run": cell.run or "the untouched base",
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
