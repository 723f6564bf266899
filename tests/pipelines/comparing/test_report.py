"""The report of a comparison that is made by hand, so that what it must say is known."""

import html
import json
import math
import re
import subprocess

import numpy as np
import pytest
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.answer import answer
from equipoise.pipelines.comparing.comparison import (
    Cell,
    Comparison,
    Picture,
    column_of,
    folder_names,
    is_rate,
    lay_out,
)
from equipoise.pipelines.comparing.curve import curve_words, draw_curve
from equipoise.pipelines.comparing.report import (
    CELL,
    draw_grid,
    explanations,
    not_judged,
    render_html,
    usable_words,
    write_anew,
    write_report,
)

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


def test_what_pictures_are_made_of_stands_before_the_base(comparison):
    plain, old = draw_grid(comparison), render_html(comparison)
    (comparison.folder / "cells" / "made").mkdir()
    for end in (".png", ".thumb.png"):
        Image.new("RGB", (16, 16), "blue").save(comparison.folder / f"cells/made/00{end}")
    comparison.sources = [Picture(0, None, "cells/made/00.png", "cells/made/00.thumb.png")]
    grid, new = draw_grid(comparison), render_html(comparison)
    assert grid.width - plain.width > CELL
    pixels = np.asarray(grid)
    blue, gray = (np.argwhere((pixels == colour).all(axis=2))[:, 1].min() for colour in ((0, 0, 255), (128, 128, 128)))
    assert blue < gray
    shown, before = (json.loads(re.search(r'id="?data"?[^>]*>(.*?)</script>', text)[1]) for text in (new, old))
    assert shown["columns"] == ["source", *before["columns"]]
    source, base = shown["places"][0][:2]
    assert source["base"] and not source["said"] and not source["verdict"]
    assert [cell["run"] for cell in source["cells"]] == ["the picture to start from"]
    assert shown["places"][0][1:] == before["places"][0] and base == before["places"][0][0]
    assert "source: the pictures to start from." in explanations(comparison)
    comparison.write_tables()
    again = Comparison.read(comparison.folder)
    assert again.sources == comparison.sources and draw_grid(again).tobytes() == grid.tobytes()
    comparison.sources[0].file = "../other.png"
    comparison.write_tables()
    with pytest.raises(InputError, match=r"names the picture '\.\./other\.png'"):
        Comparison.read(comparison.folder)


SCALED = "scaled_adamw damping=<b>"
LEFT = {"adamw": (0.8, 0.0), SCALED: (0.8, 0.7, 0.1)}  # the third of adamw's failed


@pytest.fixture
def keeping(comparison):
    """The same, where the base has 0.8 of what is to be kept: 0.6 is enough, and adamw's best rate has nothing left."""
    comparison.kept, comparison.beside = "left", {"left": "what is <left>"}
    comparison.base.metrics["left"] = 0.8
    for row, values in LEFT.items():
        for rate, value in zip(RATES, values, strict=False):
            comparison.at(row, rate)[0].metrics["left"] = value
    return comparison


def verdicts(comparison, row):
    return [comparison.verdict(row, rate) for rate in RATES]


def test_a_rate_is_usable_where_it_learnt_and_kept_enough(keeping):
    """The highest score of all kept nothing; it sets the line for scores, and is not usable."""
    assert keeping.line == 0.75 and keeping.kept_line == pytest.approx(0.6)
    assert verdicts(keeping, "adamw") == ["learnt too little", "kept too little", "failed"]
    assert verdicts(keeping, SCALED) == ["learnt too little", "usable", "kept too little"]
    assert [keeping.usable(SCALED, rate) for rate in RATES] == [False, True, False]
    ranges = keeping.ranges()
    assert ranges["adamw"] is None
    assert ranges[SCALED].low == pytest.approx(10 ** (-4 - 1 / 6)), "0.9 to 0 meets 0.75"
    assert ranges[SCALED].high == pytest.approx(10 ** (-4 + 1 / 6)), "0.7 to 0.1 meets 0.6"
    said = f"Best: {SCALED} at 1e-4: 90% learnt, 70% left; usable from 6.8e-5 to 1.5e-4."
    assert answer(keeping) == said
    equal = keeping.at("adamw", 1e-5)[0]
    equal.metrics |= {"score": 0.9, "left": 0.65}
    assert keeping.usable("adamw", 1e-5)
    assert answer(keeping) == said, "of equal scores"


def test_where_none_is_usable_the_nearest_is_named(keeping):
    keeping.at(SCALED, 1e-4)[0].metrics["left"] = 0.5
    assert set(keeping.ranges().values()) == {None}
    said = f"No rate is usable. Nearest: {SCALED} at 1e-4: 90% learnt, 50% left, kept too little; try 3.2e-5."
    assert answer(keeping) == said
    assert html.escape(said) in render_html(keeping)


def test_why_a_rate_is_not_usable(keeping):
    cell = keeping.at(SCALED, 1e-4)[0]
    cell.metrics |= {"score": 0.5, "left": 0.1}
    assert keeping.verdict(SCALED, 1e-4) == "learnt & kept too little"
    cell.metrics["broken"] = 0.6
    assert keeping.verdict(SCALED, 1e-4) == "mostly broken pictures"
    cell.state = "diverged"
    assert keeping.verdict(SCALED, 1e-4) == "diverged"
    cell.state, cell.metrics = "done", {"score": 0.9}
    assert keeping.verdict(SCALED, 1e-4) == "kept is not measured"
    cell.metrics = {}
    assert keeping.verdict(SCALED, 1e-4) == "no score"
    assert keeping.verdict("adamw", 3e-4) == keeping.verdict("base", math.nan) == "", "nothing was tried there"


def test_what_was_kept_is_averaged_over_the_seeds(keeping):
    """0 alone, 0 and 1, and 0, 1 and 1; a seed that failed says nothing of what was kept, and learnt nothing."""
    for seed, verdict in ((1, "kept too little"), (2, "usable")):
        metrics = {"score": 1.0, "left": 1.0}
        keeping.cells.append(Cell(f"sweep/again-{seed}", "adamw", 1e-4, seed, "done", metrics=metrics))
        assert keeping.verdict("adamw", 1e-4) == verdict
    assert keeping.points("adamw")[1].kept == pytest.approx(2 / 3)
    keeping.cells.append(Cell("sweep/again-3", "adamw", 1e-4, 3, "failed"))
    assert keeping.points("adamw")[1].kept == pytest.approx(2 / 3) and keeping.points("adamw")[1].score == 0.75
    keeping.cells[-1].state, keeping.cells[-1].metrics = "diverged", {"score": 1.0, "left": 0.0}
    assert keeping.verdict("adamw", 1e-4) == "kept too little", "one of four diverged, and the others learnt enough"


def test_without_what_was_kept_the_score_judges_alone(comparison):
    """Where none is declared, and where the base has nothing to lose; and the words say so."""
    before = verdicts(comparison, "adamw"), verdicts(comparison, SCALED), comparison.ranges(), draw_curve(comparison)
    assert before[:2] == (["learnt too little", "usable", "failed"], ["learnt too little", "usable", "usable"])
    for kept, left in (("", 1.0), ("left", 0.0), ("left", math.nan)):
        comparison.kept, comparison.base.metrics["left"] = kept, left
        for cell in comparison.cells:
            cell.metrics["left"] = 0.0
        after = verdicts(comparison, "adamw"), verdicts(comparison, SCALED), comparison.ranges(), draw_curve(comparison)
        assert after == before and curve_words(comparison) == ""
        assert "by what was learnt alone" in usable_words(comparison)
        assert answer(comparison).startswith("Best: adamw at 1e-4: score 100%; usable from ")
        assert usable_words(comparison) in explanations(comparison)[-1]


def test_a_table_says_which_metric_was_kept_and_an_old_one_is_judged_as_it_was(keeping, tmp_path):
    keeping.write_tables()
    document = json.loads((tmp_path / "table.json").read_text())
    assert (document["kept"], document["usable_from"]) == ("left", 0.75)
    assert document["kept_from"] == pytest.approx(0.6) and document["usable_ranges"]["adamw"] is None
    assert [cell["verdict"] for cell in document["cells"]] == [
        "",
        *verdicts(keeping, "adamw"),
        *verdicts(keeping, SCALED),
    ]
    assert Comparison.read(tmp_path).verdict("adamw", 1e-4) == "kept too little"
    del document["kept"], document["kept_from"]
    for cell in document["cells"]:
        del cell["verdict"]
    (tmp_path / "table.json").write_text(json.dumps(document))
    old = Comparison.read(tmp_path)
    assert old.verdict("adamw", 1e-4) == "usable" and old.ranges()["adamw"].decades == pytest.approx(0.5)
    assert "by what was learnt alone" in usable_words(old)


def test_what_was_kept_is_a_second_line_of_the_curve(keeping):
    """With a level of its own, which is where the points at that height are."""
    drawn = draw_curve(keeping)
    assert drawn.count('<polyline points="') == 2 == drawn.count('<polyline class="kept"')
    assert drawn.count("<circle") == 6 + 5, "what failed kept nothing that is known"
    keeping.at(SCALED, 1e-4)[0].metrics["left"] = keeping.kept_line
    level = re.search(r'<line class="kept" [^>]*y1="([\d.]+)"', drawn)[1]
    assert f'cy="{level}" r="2.5"' in draw_curve(keeping) and f'cy="{level}"' not in drawn
    assert "damping=&lt;b&gt; at 1e-4: left 0.700" in drawn and 'aria-label="score and left against' in drawn
    assert curve_words(keeping) in render_html(keeping) and "Thin dashed lines: left." in curve_words(keeping)


def test_a_verdict_is_read_and_not_only_seen(keeping):
    """Below its red frame in the picture, and in the page."""
    grid = draw_grid(keeping)
    assert grid.getpixel((150 + (CELL + 10) * 2 - 1, 64 + CELL // 2)) == (0xCF, 0x22, 0x2E)
    left, line = 150 + (CELL + 10) * 2, 64 + CELL // 2 + 28  # two pictures side by side, and the second line below
    words = grid.crop((left, line - 7, left + CELL, line + 8)).getcolors()
    assert {ink for _, ink in words} > {(0xFF, 0xFF, 0xFF), (0xCF, 0x22, 0x2E)}
    page = render_html(keeping)
    data = json.loads(re.search(r'id="data">(.*?)</script>', page, re.S)[1])
    places = [[(place["verdict"], place["usable"]) for place in row] for row in data["places"]]
    assert places[0] == [("", False), ("learnt too little", False), ("kept too little", False), ("failed", False)]
    assert places[1][2] == ("usable", True) and page.count("<td class=why>kept too little</td>") == 2


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
    assert not_judged(comparison) in page and "none of the rates tried" not in page and "are noise" not in page


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
    assert "smaller ones are noise" in render_html(comparison)


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
    config = configs.load("text_to_image/demo", ["sweep={}", "optimizer=scaled_adamw"])
    cells = [
        configs.set_keys(config, {key: value, "seed": seed, "learning_rate": rate})
        for value in values
        for seed in (0, 1)
        for rate in (1e-3, 1e-2)
    ]
    rows = [label for label, _, _ in lay_out(cells)]
    assert len(set(rows)) == 2 and rows[0] == rows[3] != rows[4] == rows[7]
    assert labels[0] in rows[0] and labels[1] in rows[4] and max(map(len, rows)) < 80


def test_a_sweep_along_the_rate_of_a_part_has_its_rates_in_columns(tmp_path):
    """Figure 1 of Riemannian preconditioned LoRA: the U-Net's rate fixed, the text encoder's swept."""
    config = configs.load("text_to_image/demo", ["sweep={}", "learning_rate=1e-4", "lora.text_encoder=true"])
    cells = [
        configs.set_keys(config, {"optimizer.name": name, "optimizer.text_encoder_learning_rate": rate})
        for name in ("adamw", "scaled_adamw")
        for rate in (1e-6, 1e-4, 1e-2)
    ]
    assert [place[:2] for place in lay_out(cells)] == [
        (name, rate) for name in ("adamw", "scaled_adamw") for rate in (1e-6, 1e-4, 1e-2)
    ]
    assert column_of(cells) == "text encoder learning rate"
    scores = (0.0, 0.8, 0.7, 0.0, 0.1, 0.8)
    made = [
        Cell("run", row, rate, 0, "done", metrics={"score": score})
        for (row, rate, _), score in zip(lay_out(cells), scores, strict=True)
    ]
    base = Cell("", "base", math.nan, 0, "untouched", metrics={"score": 0.0})
    found = Comparison("it", tmp_path, [], "score", base, made, column=column_of(cells))
    assert found.of_rates and found.shown(1e-4) == "1e-4" and found.noun == "rate"
    assert {row: str(usable) for row, usable in found.ranges().items()} == {
        "adamw": "3.16e-5 to 1e-2 (at least 2.5 decades)",
        "scaled_adamw": "2.68e-3 to 1e-2 (at least 0.6 decades)",
    }
    both = [*cells, configs.set_keys(cells[0], {"learning_rate": 1e-3})]
    assert column_of(both) == "learning rate" and "learning_rate=1e-06" in lay_out(both)[0][0]


@pytest.mark.parametrize(
    ("source", "name", "key", "part", "column"),
    [
        ("instruction_tuning/demo", "adamw", "rates", "encoder", "encoder learning rate"),
        ("text_to_image/demo", "adamw", "rates", "mid_block.attentions", "mid_block.attentions learning rate"),
        ("text_to_image/demo", "bounded_adamw", "outside_learning_rate", "", "outside learning rate"),
    ],
)
def test_so_has_one_along_a_rate_of_a_mapping_or_that_of_other_tensors(source, name, key, part, column):
    config = configs.load(source, ["sweep={}", f"optimizer={name}"])
    given = [{f"optimizer.{key}": {part: rate} if part else rate} for rate in (1e-6, 1e-4)]
    cells = [configs.set_keys(config, one) for one in given]
    assert lay_out(cells) == [(name, rate, one) for rate, one in zip((1e-6, 1e-4), given, strict=True)]
    assert column_of(cells) == column and is_rate(column)
    both = [*cells, configs.set_keys(cells[0], {"learning_rate": 0.3})]
    assert column_of(both) == "learning rate" and lay_out(both)[0][0].endswith("=1e-06")
    assert column_of([*cells, config]) == "learning rate", "a cell has none of its own"


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
    assert grid.count('<div class="verdict">learnt too little</div>') == 2
    assert grid.count('<div class="verdict usable">usable</div>') == 3
    assert grid.count('class="cell usable"') == 3 and "<b>seen" not in grid
    assert grid.count('class="cell base"') == 2
    assert grid.count("<img") == 2 * (2 + 5)  # two prompts; the base in both rows, and five cells with pictures
    assert "failed" in grid and "95% (90% to 100%)" in grid
    chosen = page.with_name("chosen.html")
    chosen.write_text(page.read_text() + '<script>seed.value = "1"; seed.onchange();</script>')
    assert drawn(chosen).count("<img") == 2 * (2 + 5) - 1, "the second training seed has one picture"


def test_curves_that_coincide_are_told_apart(comparison):
    """And those that only meet in a point stay where their values are."""

    def heights() -> list[list[float]]:
        lines = re.findall(r'<polyline points="([^"]+)"', draw_curve(comparison))
        return [[float(spot.split(",")[1]) for spot in line.split()] for line in lines]

    first, second = heights()
    assert first[0] == second[0], "they meet"
    for rate, score in zip(RATES[:2], SCORES["adamw"], strict=False):
        comparison.at(SCALED, rate)[0].metrics["score"] = score
    first, second = heights()
    assert [b - a for a, b in zip(first[:2], second[:2], strict=True)] == [3.0, 3.0]


@pytest.mark.parametrize(
    ("key", "value"),
    [
        ("column", 3),
        ("name", None),
        ("prompts", ["one", 2]),
        ("beside", {"kept": ["x"]}),
        ("cells.row", {"a": 1}),
        ("cells.seed", "<img src=x onerror=alert(1)>"),
        ("cells.metrics", {"score": "high"}),
        ("cells.learning_rate", "1e-3"),
        ("cells.learning_rate", 0),
        ("cells.pictures", [{"prompt": 0, "seed": None, "file": 1, "thumbnail": "a"}]),
        ("cells.config", []),
    ],
)
def test_a_file_with_values_of_other_types_is_refused_in_a_sentence(key, value, comparison):
    comparison.write_tables()
    file = comparison.folder / "table.json"
    data = json.loads(file.read_text())
    assert Comparison.read(comparison.folder).cells == comparison.cells
    (data["cells"][1] if key.startswith("cells.") else data)[key.removeprefix("cells.")] = value
    file.write_text(json.dumps(data))
    with pytest.raises(InputError, match="holds no comparison that can be read"):
        Comparison.read(comparison.folder)


def test_a_cell_that_drew_nothing_has_no_folder_of_another_ones(tmp_path):
    names = folder_names(runs := ["a/x", "b/x", "c/001"])
    cells = [Cell(run, run, 1e-4, 0, "done") for run in runs]
    for cell in cells[:2]:
        cell.pictures = [Picture(0, None, f"cells/{names[cell.run]}/00.png", "")]
    made = Comparison("x", tmp_path, [], "", Cell("", "base", math.nan, 0, "untouched"), cells)
    places = [made.place_of(cell) for cell in (made.base, *cells)]
    assert places == [tmp_path / "cells" / name for name in ("base", "000", "001", "002")]


@pytest.mark.parametrize("part", ["file", "thumbnail"])
@pytest.mark.parametrize(
    "name", ["{out}", "../secret.txt", "cells/../../secret.txt", "link.png", "linked/secret.txt", ".", "cells/."]
)
def test_a_table_that_names_files_elsewhere_is_refused_and_none_is_shown(part, name, comparison):
    """It may be anybody's, and whoever counts votes writes thumbnails into the report that is served."""
    folder = comparison.folder / "shared"
    folder.mkdir()
    secret = comparison.folder / "secret.txt"
    secret.write_text("the secret")
    (folder / "link.png").symlink_to(secret)
    (folder / "linked").symlink_to(comparison.folder)
    comparison.folder, name = folder, name.format(out=secret)
    for cell in (comparison.base, *comparison.cells):
        cell.pictures = []
    setattr(picture := Picture(0, 0, "a.png", "a.png"), part, name)
    comparison.cells[0].pictures = [picture]
    comparison.write_tables()
    (folder / "report.html").write_text("as it was")
    with pytest.raises(InputError, match=r"table\.json names the picture"):
        write_anew(folder)
    assert (folder / "report.html").read_text() == "as it was"


@pytest.mark.parametrize("name", ["", "https:example.org/a.png", "\\\\example.org/a.png", "a\0.png"])
def test_a_table_whose_pictures_a_browser_would_fetch_elsewhere_is_refused(name, comparison):
    comparison.cells[0].pictures[0].file = name
    comparison.write_tables()
    with pytest.raises(InputError, match=r"table\.json names the picture"):
        Comparison.read(comparison.folder)


def test_what_the_columns_are_called_is_text_and_no_markup(comparison):
    """In the report, in the curve, and in what is said where no rate worked."""
    comparison.column = "learning <script>x</script><i>rate</i>"
    page = render_html(comparison)
    for cell in comparison.cells:
        cell.metrics = {"score": 0.0}
    pages = page, render_html(comparison), draw_curve(comparison)
    comparison.forget_scores()
    assert not any(mark in page.lower() for page in (*pages, render_html(comparison)) for mark in ("<script>x", "<i>"))
