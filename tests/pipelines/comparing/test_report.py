"""The report of a comparison that is made by hand, so that what it must say is known."""

import json
import math
import re
import subprocess

import pytest
from PIL import Image

from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import Cell, Comparison, Picture, lay_out
from equipoise.pipelines.comparing.report import CELL, NOT_JUDGED, draw_grid, render_html, write_report

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


def test_nothing_is_said_to_have_failed_where_nothing_is_judged(comparison):
    for cell in [comparison.base, *comparison.cells]:
        cell.metrics = {}
    assert not comparison.judged and comparison.verdict("adamw", 1e-4) == ""
    assert draw_grid(comparison).getpixel((150 + (CELL + 10) * 2 - 1, 64 + CELL // 2)) == (0x6A, 0x73, 0x7D)
    page = render_html(comparison)
    assert NOT_JUDGED in page and "none of the rates tried" not in page and "are noise" not in page


def test_seeds_are_averaged(comparison):
    comparison.cells.append(Cell("sweep/again", "adamw", 1e-4, 1, "done", metrics={"score": 0.5}))
    assert [point.score for point in comparison.points("adamw")] == [0.0, 0.75, 0.0]


def test_what_is_said_of_a_place_is_what_its_curve_says(comparison, tmp_path):
    """Of three seeds, the first one alone would be usable, and the mean is not."""
    for seed in (1, 2):
        again = Cell(f"sweep/again-{seed}", "adamw", 1e-4, seed, "done", metrics={"score": 0.5})
        again.pictures = [Picture(0, 0, f"cells/{seed}.png", f"cells/{seed}.png")]
        Image.new("RGB", (16, 16)).save(tmp_path / f"cells/{seed}.png")
        comparison.cells.append(again)
    assert comparison.points("adamw")[1].score == pytest.approx(2 / 3)
    assert comparison.line == pytest.approx(0.75 * 0.9) and not comparison.usable("adamw", 1e-4)
    assert draw_grid(comparison).getpixel((150 + (CELL + 10) * 2 - 1, 64 + CELL // 2)) == (0xCF, 0x22, 0x2E)
    data = json.loads(re.search(r'id="data">(.*?)</script>', render_html(comparison), re.S)[1])
    place = data["places"][0][2]
    assert (place["said"], place["usable"]) == ("67% (50% to 100%)", False)
    assert [(cell["seed"], cell["score"], len(cell["pictures"])) for cell in place["cells"]] == [
        (0, "score 100%", 2),
        (1, "score 50%", 1),
        (2, "score 50%", 1),
    ]
    assert data["seeds"] == [0, 1, 2]


def test_a_cell_that_diverged_is_never_usable(comparison):
    for cell in comparison.cells[1:2]:
        cell.state = "diverged"
    assert not comparison.usable("adamw", 1e-4)
    assert comparison.line == pytest.approx(0.75 * 0.9), "the best is another cell"
    assert comparison.ranges()["adamw"] is None


def test_a_cell_whose_pictures_are_mostly_broken_is_never_usable(comparison):
    comparison.cells[1].metrics["broken"] = 0.5
    assert comparison.usable("adamw", 1e-4), "half is not most"
    comparison.cells[1].metrics["broken"] = 0.6
    assert not comparison.usable("adamw", 1e-4) and comparison.usable("scaled_adamw damping=<b>", 1e-4)


def test_what_is_told_beside_the_score(comparison):
    """Every number says what it is, in the picture and on the page; over the seeds it is a mean."""
    plain = draw_grid(comparison)
    comparison.beside = {"kept": "share that is <still> right"}
    comparison.base.metrics["kept"], comparison.cells[1].metrics["kept"] = 1.0, 0.25
    again = Cell("sweep/again", "adamw", 1e-4, 1, "done", metrics={"score": 1.0, "kept": 0.75})
    comparison.cells.append(again)
    page = render_html(comparison)
    assert "Score: how right it is." in page and "kept: share that is &lt;still&gt; right." in page
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    assert [place["beside"] for place in data["places"][0]] == ["kept 100%", "", "kept 50%", ""]
    grid = draw_grid(comparison)
    assert grid.height == plain.height + 18 + 2 * 16, "a line of explanation, and one below each row of cells"


def test_the_grid_shows_every_prompt_of_the_demo(comparison, tmp_path):
    """Six: the last two ask for what the base knew before."""
    comparison.prompts = list("abcdef")
    for number in range(2, 6):
        name = f"cells/{number}.png"
        Image.new("RGB", (16, 16), (0, 0, 40 * number)).save(tmp_path / name)
        comparison.cells[1].pictures.append(Picture(number, 0, name, name))
    x, y = 150 + (CELL + 10) * 2, 64
    grid = draw_grid(comparison)
    side = CELL // 2
    centres = [grid.getpixel((x + side // 2 + side * (n % 2), y + side // 2 + side * (n // 2))) for n in range(2, 6)]
    assert centres == [(0, 0, 80), (0, 0, 120), (0, 0, 160), (0, 0, 200)]


def test_a_gain_that_may_be_noise_is_none(comparison):
    for cell in comparison.cells:
        cell.metrics = {"score": 0.002}
    assert set(comparison.ranges().values()) == {None}
    assert "smaller gains are noise" in render_html(comparison)


def test_rates_that_are_close_are_told_apart(comparison):
    comparison.cells[0].rate, comparison.cells[1].rate = 1.5e-4, 2e-4
    page = render_html(comparison)
    assert "<td>1.5e-4</td>" in page and "<td>2e-4</td>" in page and ">1.5e-4</text>" in page
    comparison.write_tables()
    assert "adamw,0.00015,0" in (comparison.folder / "table.csv").read_text()


@pytest.mark.parametrize(
    ("key", "values", "labels"),
    [
        ("samples.scale", (0.5, 1.0), ("scale=0.5", "scale=1.0")),
        ("checkpoint.every", (0, 5), ("every=0", "every=5")),
        ("optimizer.text_encoder_learning_rate", (1e-5, 1.5e-5), ("learning_rate=1e-05", "learning_rate=1.5e-05")),
        ("train.clip", (0.12345678, 0.12345679), ("clip=0.12345678", "clip=0.12345679")),
        ("samples.prompts", (["x" * 60 + "a"], ["x" * 60 + "b"]), ("prompts=", "prompts=")),
        ("optimizer.options", ({"damping": 0.1}, {}), ("damping=0.1", "scaled_adamw")),
    ],
)
def test_a_row_names_everything_that_differs_but_rate_and_seed(key, values, labels):
    config = configs.load("text_to_image/demo", ["sweep={}", "optimizer.options={}"])
    cells = [
        configs.set_keys(config, {key: value, "seed": seed, "learning_rate": rate})
        for value in values
        for seed in (0, 1)
        for rate in (1e-3, 1e-2)
    ]
    rows = [label for label, _, _ in lay_out(cells)]
    assert len(set(rows)) == 2 and rows[0] == rows[3] != rows[4] == rows[7]
    assert labels[0] in rows[0] and labels[1] in rows[4] and max(map(len, rows)) < 80


def test_keys_that_end_alike_are_named_in_full():
    config = configs.load("text_to_image/demo", ["sweep={}"])
    cells = [configs.set_keys(config, {"checkpoint.every": n, "samples.every": 2 * n}) for n in (1, 2)]
    assert "samples.every=2 checkpoint.every=1" in lay_out(cells)[0][0]


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
    assert data["places"][0][2]["usable"] is True
    assert data["places"][0][3]["cells"][0]["pictures"] == []


def test_the_page_in_a_real_browser(comparison, tmp_path, chromium):
    """The script draws the table from the data: one place per cell, and a cell without pictures says why."""
    again = Cell("sweep/again", "adamw", 1e-4, 1, "done", metrics={"score": 0.9})
    again.pictures = comparison.cells[1].pictures[:1]
    comparison.cells.append(again)
    page = write_report(comparison)["report"]
    command = [chromium, "--headless", "--no-sandbox", "--disable-gpu", f"--user-data-dir={tmp_path / 'profile'}"]
    flags = ["--disable-background-networking", "--disable-component-update", "--disable-sync", "--no-first-run"]

    def drawn(page) -> str:
        words = [*command, *flags, "--dump-dom", page.as_uri()]
        shown = subprocess.run(words, capture_output=True, text=True, timeout=120).stdout
        return shown.partition('<div id="grid">')[2].partition("<h2>")[0]

    grid = drawn(page)
    assert grid.count('class="cell usable"') == 3 and "<b>seen" not in grid
    assert grid.count('class="cell base"') == 2
    assert grid.count("<img") == 2 * (2 + 5)  # two prompts; the base in both rows, and five cells with pictures
    assert "failed" in grid and "95% (90% to 100%)" in grid
    chosen = page.with_name("chosen.html")
    chosen.write_text(page.read_text() + '<script>seed.value = "1"; seed.onchange();</script>')
    assert drawn(chosen).count("<img") == 2 * (2 + 5) - 1, "the second training seed has one picture"
