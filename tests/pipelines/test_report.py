"""The report of a comparison that is made by hand, so that what it must say is known."""

import json
import math
import re
import subprocess

import pytest
from PIL import Image

from equipoise.pipelines.comparison import Cell, Comparison, Picture
from equipoise.pipelines.report import CELL, draw_grid, render_html, write_report

RATES = (1e-5, 1e-4, 1e-3)
SCORES = {"adamw": (0.0, 1.0, 0.0), "scaled_adamw damping=<b>": (0.0, 0.9, 0.8)}


@pytest.fixture
def comparison(tmp_path):
    def pictures(place, colour):
        made = []
        for prompt in range(2):
            name = f"cells/{place}/{prompt:02d}-0"
            (tmp_path / "cells" / place).mkdir(parents=True, exist_ok=True)
            for file in (f"{name}.png", f"{name}.thumb.png"):
                Image.new("RGB", (16, 16), colour).save(tmp_path / file)
            made.append(Picture(prompt, 0, f"{name}.png", f"{name}.thumb.png", note="</script><b>seen"))
        return made

    base = Cell("", "base", math.nan, 0, "untouched", metrics={"score": 0.0}, pictures=pictures("base", "gray"))
    cells = []
    for row, (label, scores) in enumerate(SCORES.items()):
        for rate, score in zip(RATES, scores, strict=True):
            cell = Cell(f"sweep/{row}-{rate:g}", label, rate, 0, "done", metrics={"score": score, "broken": 0.0})
            cell.pictures = pictures(f"{row}-{rate:g}", "green")
            cells.append(cell)
    cells[2].state, cells[2].message, cells[2].metrics, cells[2].pictures = "failed", 'it "broke"', {}, []
    return Comparison("a <sweep>", tmp_path, ["one", "two & three"], "how right it is", base, cells)


def test_ranges(comparison):
    assert comparison.line == 0.75
    ranges = comparison.ranges()
    assert ranges["adamw"].decades == pytest.approx(0.5)
    assert ranges["scaled_adamw damping=<b>"].open_high


def test_nothing_is_usable_where_nothing_beats_the_base(comparison):
    for cell in comparison.cells:
        cell.metrics = {"score": 0.0}
    assert comparison.line is None
    assert set(comparison.ranges().values()) == {None}
    assert "none of the rates tried" in render_html(comparison)


def test_seeds_are_averaged(comparison):
    comparison.cells.append(Cell("sweep/again", "adamw", 1e-4, 1, "done", metrics={"score": 0.5}))
    assert [point.score for point in comparison.points("adamw")] == [0.0, 0.75, 0.0]


def test_the_grid_frames_usable_cells_in_green(comparison):
    grid = draw_grid(comparison)
    frame = {column: grid.getpixel((150 + (CELL + 10) * column - 1, 64 + CELL // 2)) for column in range(4)}
    assert frame[0] == (0x6A, 0x73, 0x7D)  # the base
    assert frame[2] == (0x1A, 0x7F, 0x37)  # 1e-4
    assert frame[1] == frame[3] == (0xCF, 0x22, 0x2E)


def test_files(comparison):
    paths = write_report(comparison)
    assert all(path.is_file() for path in paths.values())
    assert (comparison.folder / "grid-01.png").is_file()
    document = json.loads(paths["json"].read_text())
    assert document["usable_from"] == 0.75
    assert document["cells"][3]["metrics"] == {} and document["cells"][3]["message"] == 'it "broke"'


def test_the_page_escapes_what_it_shows_and_needs_no_network(comparison):
    page = render_html(comparison)
    assert "a &lt;sweep&gt;" in page and "damping=&lt;b&gt;" in page
    assert page.count("</script>") == 2, "data cannot end the script early"
    assert not re.search(r"https?://(?!www\.w3\.org)", page)
    assert "{{" not in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert data["cells"][0][2][0]["usable"] is True
    assert data["cells"][0][3][0]["pictures"] == []


def test_the_page_in_a_real_browser(comparison, tmp_path, chromium):
    """The script draws the table from the data: one place per cell, and a cell without pictures says why."""
    page = write_report(comparison)["report"]
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]
    shown = subprocess.run([*command, *flags, "--dump-dom", page.as_uri()], capture_output=True, text=True, timeout=120)
    grid = shown.stdout.partition('<div id="grid">')[2].partition("<h2>")[0]
    assert grid.count('class="cell usable"') == 3
    assert grid.count('class="cell base"') == 2
    assert grid.count("<img") == 2 * (2 + 5)  # two prompts; the base in both rows, and five cells with pictures
    assert "failed" in grid
