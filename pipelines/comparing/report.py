"""A comparison as something to look at: the grid picture, one per prompt, and an HTML report that opens from disk."""

import base64
import html
import json
import math
import textwrap
from collections import Counter
from functools import lru_cache
from importlib.resources import files
from pathlib import Path

from PIL import Image, ImageDraw, ImageFont

from equipoise.pipelines.comparing import votes
from equipoise.pipelines.comparing.answer import answer
from equipoise.pipelines.comparing.comparison import WORKS, Cell, Comparison, Picture, means, short
from equipoise.pipelines.comparing.curve import curve_words, draw_curve, line_colour
from equipoise.pipelines.comparing.robustness import KEPT, USABLE
from equipoise.pipelines.files import version, write_atomic

REWRITTEN = (votes.FILE, "table.csv", "prompts.csv", "table.json", "report.html")  # by every vote
CELL = 168  # pixels, the side of a cell of the grid picture
_GAP, _LEFT, _HEAD, _FOOT = 10, 150, 64, 22
_MOST = 8  # pictures in a cell: the demo's prompts, those for what was known before among them
_INK, _MUTED, _PAPER, _GOOD, _BAD = "#1b1f24", "#6a737d", "#ffffff", "#1a7f37", "#cf222e"


def not_judged(comparison: Comparison) -> str:
    """What to say where there is no score."""
    return f"Nothing is judged here: there is no score to tell by which {comparison.column}s worked."


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


def write_anew(folder: Path) -> None:
    """Writes the tables and report.html of a comparison again, with the votes that there are now.

    One at a time, from reading votes to writing what they come to: else the slower of two would write the older tally.

    Raises:
        InputError: there is none in the folder, or it cannot be written.
    """
    with votes.locked(folder):
        comparison = Comparison.read(folder)
        comparison.write_tables()
        write_atomic(folder / "report.html", render_html(comparison))


def draw_grid(comparison: Comparison, prompt: int | None = None) -> Image.Image:
    """Rows × learning rates, the untouched base first; each cell a mosaic of its pictures (or of one prompt's).

    A green frame marks a usable rate, a red one a rate that is not, and below it stands why. The number is the score, a
    smaller one what else is known of the cell; the last lines say what they are. Of several training seeds the first
    one's pictures are shown, with the mean of all scores, by which the frame goes, and their span.
    """
    rows, rates = comparison.rows, comparison.rates
    width = _LEFT + (CELL + _GAP) * (len(rates) + len(comparison.untouched)) + _GAP
    columns, tall = _tiles(comparison, prompt)
    foot = _FOOT + 16 * comparison.judged + 16 * len(_in_pairs([*comparison.beside, *comparison.scored]))
    pitch = tall + foot + _GAP
    said = explanations(comparison)
    if prompt is None:
        said.insert(0, f"Pictures, row by row: {'; '.join(comparison.prompts[:_MOST])}.")
    legend = [line for text in said for line in _wrapped(text, (width - 2 * _GAP) // 7)]
    sheet = Image.new("RGB", (width, _HEAD + pitch * len(rows) + 18 * len(legend) + _GAP), _PAPER)
    pen = ImageDraw.Draw(sheet)
    title = "the first of each" if prompt is None else comparison.prompts[prompt]
    pen.text((_GAP, 8), f"{comparison.name} · {title}"[: width // 8], _INK, font=_font(16))
    pen.text((_GAP, _HEAD - 18), comparison.column, _MUTED, font=_font(15), anchor="lm")
    for column, label in enumerate(_labels(comparison)):
        x = _LEFT + (CELL + _GAP) * column
        pen.text((x + CELL / 2, _HEAD - 18), label, _INK, font=_font(16), anchor="mm")
    for index, row in enumerate(rows):
        y = _HEAD + pitch * index
        for number, words in enumerate(_wrapped(row, 17)):
            pen.text((_GAP, y + tall / 2 - 12 + 18 * number), words, _INK, font=_font(15))
        for column, cells in enumerate(_places(comparison, row)):
            x = _LEFT + (CELL + _GAP) * column
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
            verdict = comparison.verdict(row, cells[0].rate)
            frame = _GOOD if verdict == WORKS else _BAD if verdict else _MUTED
            pen.rectangle((x - 2, y - 2, x + CELL + 1, y + tall + 1), outline=frame, width=2)
            below = [(place_words(comparison, cells, verdict), frame, (14, 11))]
            below += [(verdict, frame, (12, 9))] if comparison.judged else []
            beside = _in_pairs(beside_words(comparison, cells).split(" · "))
            below += [(words, _MUTED, (12, 9)) for words in beside]
            for number, (text, ink, (large, small)) in enumerate(below):
                size = large if pen.textlength(text, _font(large)) <= CELL else small
                pen.text((x + CELL / 2, y + tall + 12 + 16 * number), text, ink, _font(size), anchor="mm")
    for number, words in enumerate(legend):
        pen.text((_GAP, _HEAD + pitch * len(rows) + 18 * number), words, _MUTED, font=_font(13))
    return sheet


def explanations(comparison: Comparison) -> list[str]:
    """What the numbers and the frames of a grid mean, for somebody who sees it for the first time."""
    beside = [f"{short(name)}: {words}." for name, words in (comparison.beside | comparison.scored).items()]
    base = ["source: the pictures to start from."] if comparison.sources else []
    base += ["base: before training."] if comparison.base.row == "base" else []
    same = [*([comparison.alike] if comparison.alike else []), *comparison.doubts]
    if not comparison.judged:
        return [not_judged(comparison), *beside, *base, *same]
    return [
        f"Score: {comparison.score}.",
        *beside,
        *base,
        *same,
        f"{usable_words(comparison)} Green frame: usable. Red: not, for the reason that stands below.",
    ]


def usable_words(comparison: Comparison) -> str:
    """What a rate of this comparison has to reach to be usable."""
    learnt = f"a {comparison.noun} that gains at least {USABLE:.0%} of the best gain over the base"
    if (bar := comparison.kept_line) is None:
        return f"Usable, by what was learnt alone: {learnt}."
    kept = f"{short(comparison.kept)} {bar:.0%} or more"
    return f"Usable: {learnt} and keeps at least {KEPT:.0%} of what the base knew ({kept})."


def _labels(comparison: Comparison) -> list[str]:
    """The columns' heads."""
    return [*(cell.row for cell in comparison.untouched), *map(comparison.shown, comparison.rates)]


def _places(comparison: Comparison, row: str) -> list[list[Cell]]:
    """Of each column, a row's cells, one per training seed."""
    return [*([cell] for cell in comparison.untouched), *(comparison.at(row, rate) for rate in comparison.rates)]


def place_words(comparison: Comparison, cells: list[Cell], verdict: str) -> str:
    """A place's score, over several seeds their mean and span, and how its cells ended where they are not done and its
    verdict does not say so."""
    ended = [cell.state for cell in cells if cell.state not in ("done", "untouched", verdict)]
    states = [state if len(cells) == 1 else f"{count} {state}" for state, count in Counter(ended).items()]
    scores = [comparison.counted(cell) for cell in cells]
    text = ""
    if any(math.isfinite(cell.score) for cell in cells):
        text = f"{sum(scores) / len(scores):.0%}"
        text += f" ({min(scores):.0%} to {max(scores):.0%})" if len(scores) > 1 else ""
    return " · ".join(filter(None, [text, *states]))


def beside_words(comparison: Comparison, cells: list[Cell]) -> str:
    """What is reported of a cell beside its score: means over the seeds."""
    found = means([cell.metrics for cell in cells])
    shares = [f"{short(name)} {found[name]:.0%}" for name in comparison.beside if name in found]
    return " · ".join([*shares, *(f"{name} {found[name]:.3g}" for name in comparison.scored if name in found)])


def _in_pairs(words: list[str]) -> list[str]:
    """Lines short enough to stand below a cell."""
    return [" · ".join(words[index : index + 2]) for index in range(0, len(words), 2)]


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


def render_html(comparison: Comparison) -> str:
    """The report: one file, thumbnails within it, full-size pictures linked beside it."""
    ranges = "".join(
        f'<tr><td><i style="background:{line_colour(index)}"></i>{html.escape(row)}</td>'
        f"<td>{html.escape(str(found or f'none of the {comparison.noun}s tried'))}</td></tr>"
        for index, (row, found) in enumerate(comparison.ranges().items())
        if comparison.judged
    )
    document = {
        "prompts": comparison.prompts,
        "rows": comparison.rows,
        "columns": _labels(comparison),
        "seeds": sorted({cell.seed for cell in comparison.cells}),
        "places": [[_as_json(comparison, row, cells) for cells in _places(comparison, row)] for row in comparison.rows],
    }
    names = list(dict.fromkeys(name for cell in [comparison.base, *comparison.cells] for name in cell.metrics))
    titles = ["row", comparison.column, "seed", "state", "verdict", *names]
    head = "".join(f"<th>{html.escape(title)}</th>" for title in titles)
    rows = "".join(
        f"<tr><td>{html.escape(c.row)}</td><td>{comparison.shown(c.rate)}</td><td>{html.escape(str(c.seed))}</td>"
        f"<td title={_attribute(c.message)}>{html.escape(c.state)}</td>"
        f"<td class=why>{html.escape(comparison.verdict(c.row, c.rate))}</td>"
        + "".join(f"<td>{c.metrics[name]:.4g}</td>" if name in c.metrics else "<td></td>" for name in names)
        + "</tr>"
        for c in [comparison.base, *comparison.cells]
    )
    page = files("equipoise.pipelines.comparing").joinpath("report.html").read_text(encoding="utf-8")
    parts = {
        "TITLE": html.escape(comparison.name),
        "WORKED": html.escape(f"{comparison.column.capitalize()}s that worked"),
        "LEGEND": "".join(f"<p>{html.escape(line)}</p>" for line in explanations(comparison)),
        "RANGES": ranges or f"<tr><td>{html.escape(not_judged(comparison))}</td></tr>",
        "BEST": f"<p>{html.escape(answer(comparison))}</p>",
        "CURVE": f"{draw_curve(comparison)}<p>{html.escape(curve_words(comparison))}</p>" if comparison.rates else "",
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
    head = "".join(f"<th>{html.escape(name)}</th>" for name in ["prompt", "row", comparison.column, "seed", *names])
    rows = [
        f"<tr><td>{html.escape(prompt)}</td><td>{html.escape(c.row)}</td>"
        f"<td>{comparison.shown(c.rate)}</td><td>{html.escape(str(c.seed))}</td>"
        + "".join(f"<td>{found[name]:.4g}</td>" if name in found else "<td></td>" for name in names)
        + "</tr>"
        for index, prompt in enumerate(comparison.prompts)
        for c in [comparison.base, *comparison.cells]
        if (found := c.of_prompt(index))
    ]
    table = f"<table><thead><tr>{head}</tr></thead><tbody>{''.join(rows)}</tbody></table>"
    return f'<details><summary>Prompt by prompt</summary><div style="overflow-x:auto">{table}</div></details>'


def _as_json(comparison: Comparison, row: str, cells: list[Cell]) -> dict:
    """A place of the grid: what is said of it, and its cells, one per training seed."""
    verdict = comparison.verdict(row, cells[0].rate) if cells else ""
    return {
        "said": place_words(comparison, cells, verdict),
        "verdict": verdict,
        "beside": beside_words(comparison, cells),
        "base": bool(cells) and not cells[0].run,
        "usable": verdict == WORKS,
        "cells": [
            {
                "run": cell.who,
                "seed": cell.seed,
                "state": cell.state,
                "message": cell.message,
                "score": "" if math.isnan(cell.score) else f"score {comparison.counted(cell):.0%}",
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
    return _encoded(path, version(path))


@lru_cache(300)  # thumbnails, a photograph's 80 kilobytes: every vote writes the report anew
def _encoded(path: Path, version: tuple[int, ...]) -> str:
    return "data:image/png;base64," + base64.b64encode(path.read_bytes()).decode()


def _attribute(text: str) -> str:
    return f'"{html.escape(text, quote=True)}"'


def _wrapped(text: str, width: int) -> list[str]:
    return textwrap.wrap(text, width) or [""]


def _font(size: int):
    return ImageFont.load_default(size)
