"""Two cells are seen without their names, and what is preferred is kept, counted and reported."""

import json
import re
import shutil
import threading
import time
from collections import Counter
from copy import deepcopy
from dataclasses import replace

import pytest
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.comparing import report, votes
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.jobs import making
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.ui import compare_cell, compare_grid, compare_numbers, compare_vote

ID = "grid/comparison"


@pytest.fixture
def vote(ask, monkeypatch):
    """Clicks on one of the three buttons below the pair that a page shows, as if it had been looked at."""

    def click(handler, shown):
        monkeypatch.setattr(compare_vote, "GLANCE", 0)
        return ask(handler, token(shown), None)

    return click


def token(shown):
    return re.search("data-shown='([^']*)'", str(shown))[1]


def cast_lines(folder):
    return [json.loads(line) for line in (folder / votes.FILE).read_text().splitlines()]


def test_a_pair_does_not_say_whose_it_is(site, swept):
    duel = compare_vote.draw_duel(site, ID)
    shown = compare_vote.duel_shown(site, duel)
    assert shown.count("<img src='data:image/png;base64,") == 2 and shown.count("class='zooms'") == 2
    words = re.sub("base64,[^']*", "", shown)
    assert not any(name in words for name in ("adamw", "base", "learning_rate", "grid", "1e-")), words
    assert duel.cells[0] != duel.cells[1] and {compare_vote.draw_duel(site, ID).cells for _ in range(40)} != {
        duel.cells
    }


def test_everybody_meets_everybody_before_anybody_meets_again(site, swept):
    folder, met = swept.folder / "comparison", Counter()
    for _ in range(10):  # of five cells
        duel = compare_vote.draw_duel(site, ID)
        votes.cast(folder, duel.cells, duel.key, None)
        met[frozenset(duel.cells)] += 1
    assert len({cell for pair in met for cell in pair}) == 5 and max(met.values()) <= 2 and len(met) >= 8


def test_votes_are_counted_in_the_grid_the_table_and_the_report(site, swept, ask, vote):
    ask("pick", ["grid"])
    first = sweeps.cells(swept)[0].id
    folder = swept.folder / "comparison"
    assert "Show a pair" not in str(ask("prefer_a", "", None)) and "pair first" in str(ask("prefer_a", "", None))
    said = str(shown := vote("prefer_a", ask("show_pair", ID)))
    assert "A is better" not in said and "A was better: A was " in said and "1 vote so far" in said
    (line,) = cast_lines(folder)
    assert line["preferred"] == line["cells"][0]
    assert "neither was better" in str(vote("prefer_neither", shown))
    (folder / votes.FILE).unlink()
    for preferred in (first, first, None, ""):
        votes.cast(folder, ("", first), "0-0", preferred)
    assert votes.tally(folder)[first] == {"preferred": 0.625, "votes": 4.0}
    shown = compare_grid.grid(site, ID)
    assert "preferred 62%" in shown and votes.MEANING in shown and ">votes</th>" in compare_numbers.table(site, ID)
    assert "votes.jsonl?download=1" in compare_numbers.export(site, ID)
    vote("prefer_b", ask("show_pair", ID))
    assert "preferred" in (folder / "report.html").read_text() and "votes" in (folder / "table.csv").read_text()
    (folder / votes.FILE).unlink()
    assert "preferred" not in compare_grid.grid(site, ID), "a tally is of the votes that there are"


def test_what_is_no_vote_is_not_counted(swept):
    folder = swept.folder / "comparison"
    lines = [
        *("[]", '{"cells": 5}', '{"cells": ["a"]}', '{"cells": ["a", 5], "preferred": "a"}', "{cut"),
        *('{"cells": ["a", "b"], "preferred": "c"}', '{"cells": ["a", "b"], "preferred": "b"}'),
    ]
    (folder / votes.FILE).write_text("\n".join(lines))
    assert votes.pairs(folder) == [("a", "b", "b")]
    assert Comparison.read(folder).cells


def test_answers_are_voted_on_too(site, swept, answered):
    made = Comparison.read(swept.folder / "comparison")
    for cell in (made.base, *made.cells):
        cell.pictures = []
    made.write_tables()
    duel = compare_vote.draw_duel(site, ID)
    shown = compare_vote.duel_shown(site, duel)
    assert duel.key in ("answer 1", "answer 2") and ("which colour?" in shown or "&lt;two&gt;" in shown)


def test_a_comparison_of_nothing_alike_has_no_pair(site, swept, ask):
    made = Comparison.read(swept.folder / "comparison")
    for cell in (made.base, *made.cells):
        cell.pictures = []
    made.write_tables()
    with pytest.raises(InputError, match="no two cells"):
        compare_vote.draw_duel(site, ID)
    ask("pick", ["grid"])
    assert "no two cells" in str(ask("show_pair", ID)) and "Choose a comparison" in str(ask("show_pair", None))


def test_pictures_are_zoomed_together(site, swept):
    first, second = (cell.id for cell in sweeps.cells(swept)[:2])
    both = compare_cell.cell_detail(site, ID, [first, second], 0)
    assert both.count("class='zooms'") == 1 and both.count("data-zoom=") == 3
    assert compare_cell.cell_detail(site, ID, [first], 0).count("class='zooms'") == 1


def test_no_answers_are_shown_from_behind_a_link_that_leads_out(site, swept, answered, tmp_path):
    (tmp_path / "private.jsonl").write_text(json.dumps({"question": "the secret", "answer": "the secret"}))
    made = Comparison.read(swept.folder / "comparison")
    for cell in (made.base, *made.cells):
        cell.pictures = []
    made.write_tables()
    for place in (made.folder / "cells").iterdir():
        (place / "answers.jsonl").unlink()
        (place / "answers.jsonl").symlink_to(tmp_path / "private.jsonl")
    assert "the secret" not in compare_grid.grid(site, ID)
    with pytest.raises(InputError, match="no two cells"):
        compare_vote.draw_duel(site, ID)


def test_a_vote_is_of_who_saw_the_pair(site, swept, ask, vote, monkeypatch):
    """A second click of a double click, or one that was sent before another pair came, is none on that pair."""
    folder = swept.folder / "comparison"
    ask("pick", ["grid"])
    first = ask("show_pair", ID)
    for unseen in ("", "x", None, [1]):
        ask("prefer_a", unseen, None)
    assert not (folder / votes.FILE).exists()
    second = vote("prefer_a", first)
    vote("prefer_a", first)
    monkeypatch.setattr(compare_vote, "GLANCE", 600)
    ask("prefer_b", token(second), None)
    assert len(cast_lines(folder)) == 1 and token(second) != token(first)
    vote("prefer_b", second)
    assert len(cast_lines(folder)) == 2


def test_no_vote_is_kept_on_a_pair_that_a_comparison_made_anew_has_not_got(site, swept, ask, vote):
    """Neither where a cell is gone, nor where its picture, or what is on it, is another one."""
    folder = swept.folder / "comparison"
    kept = (folder / "table.json").read_text()

    def without_cells(made):
        made.cells.clear()

    def without_pictures(made):
        for cell in made.cells:
            cell.pictures.clear()

    def with_other_pictures(made):
        for cell in (made.base, *made.cells):
            for picture in cell.pictures:
                Image.new("RGB", (64, 64), (1, 2, 3)).save(folder / picture.file)

    ask("pick", ["grid"])
    for change in (without_cells, without_pictures, with_other_pictures):
        shown = ask("show_pair", ID)
        made = Comparison.read(folder)
        change(made)
        made.write_tables()
        assert "made anew" in str(vote("prefer_a", shown)), change
        assert not (folder / votes.FILE).exists()
        (folder / "table.json").write_text(kept)


def test_a_pair_that_is_gone_before_it_is_shown_is_reported(site, swept):
    duel = compare_vote.draw_duel(site, ID)
    made = Comparison.read(swept.folder / "comparison")
    made.cells.clear()
    made.write_tables()
    with pytest.raises(InputError, match="made anew, without one of these two"):
        compare_vote.duel_shown(site, duel)


def test_pictures_without_a_prompt_are_zoomed_by_buttons_and_answers_are_not(site, swept):
    made = Comparison.read(swept.folder / "comparison")
    made.prompts = ["", ""]
    made.write_tables()
    assert compare_vote.duel_shown(site, compare_vote.draw_duel(site, ID)).count("data-zoom=") == 3


def test_a_line_that_cannot_be_read_hides_no_votes_and_is_reported(site, swept):
    folder = swept.folder / "comparison"
    first = sweeps.cells(swept)[0].id
    votes.cast(folder, ("", first), "0-0", first)
    with (folder / votes.FILE).open("ab") as file:
        file.write(b"\xff\n\n{}\n" + b"[" * 100_000 + b"\n{cut")
    votes.cast(folder, ("", first), "0-0", None)
    assert votes.tally(folder)[first] == {"preferred": 0.75, "votes": 2.0}
    assert "4 lines of votes.jsonl that are no votes, left out" in compare_grid.grid(site, ID)
    (folder / votes.FILE).write_bytes(b"\xff\n")
    assert "1 line of votes.jsonl that are no votes, left out" in compare_grid.grid(site, ID)


def test_a_vote_is_not_written_behind_a_link(swept, tmp_path):
    folder = swept.folder / "comparison"
    (folder / votes.FILE).symlink_to(tmp_path / "mine.txt")
    with pytest.raises(InputError, match="cannot be written"):
        votes.cast(folder, ("", "a"), "0-0", None)
    assert not (tmp_path / "mine.txt").exists()


def test_a_report_waits_for_the_one_that_is_being_written_and_has_all_votes(swept):
    """Else the slower of two would write the tally that it read first."""
    folder = swept.folder / "comparison"
    first = sweeps.cells(swept)[0].id
    votes.cast(folder, ("", first), "0-0", first)
    before = (folder / "report.html").read_text()
    writing = threading.Thread(target=report.write_anew, args=(folder,))
    with votes.locked(folder):
        writing.start()
        time.sleep(0.5)
        assert (folder / "report.html").read_text() == before
        with (folder / votes.FILE).open("a") as file:
            file.write(json.dumps({"cells": ["", first], "picture": "0-0", "preferred": ""}) + "\n")
    writing.join()
    counted = {cell["run"]: cell["metrics"] for cell in json.loads((folder / "table.json").read_text())["cells"]}
    assert counted[first]["votes"] == 2 and counted[first]["preferred"] == 0.5


@pytest.fixture
def remake(swept, monkeypatch):
    """Makes the comparison anew as `equipoise compare` does, but for the drawing: what is drawn is copied."""
    before = Comparison.read(swept.folder / "comparison")

    def make(change):
        def compare(name, folder, runs, configs, asked):
            shutil.copytree(before.folder / "cells", folder / "cells")
            made = replace(deepcopy(before), folder=folder)
            change(made)
            return made

        monkeypatch.setattr(TextToImage, "compare", compare)
        return making.make([swept])[0]

    return make


def test_votes_outlive_that_a_comparison_is_made_anew_where_nothing_looks_different(swept, remake, capsys):
    first, second = (cell.id for cell in sweeps.cells(swept)[:2])
    folder = swept.folder / "comparison"
    for cells in (("", first), (first, second)):
        votes.cast(folder, cells, "1-0", first)
    report.write_anew(folder)

    def draw_second_differently(made):
        cell = next(cell for cell in made.cells if cell.run == second)
        Image.new("RGB", (64, 64), (1, 2, 3)).save(made.folder / cell.pictures[1].file)

    remake(lambda made: None)
    assert len(votes.pairs(folder)) == 2 and "preferred" in (folder / "report.html").read_text()
    assert "no longer count" not in capsys.readouterr().err
    remake(draw_second_differently)
    assert votes.pairs(folder) == [("", first, first)] and len(cast_lines(folder)) == 2
    assert "1 of the votes are on what looked different, and no longer count" in capsys.readouterr().err
    assert "1 line of votes.jsonl with votes on what was drawn" in (folder / "report.html").read_text()
    table = json.loads((folder / "table.json").read_text())
    assert {cell["run"]: cell["metrics"].get("votes") for cell in table["cells"]}[second] is None
    remake(lambda made: None)
    assert votes.pairs(folder) == [("", first, first)], "what is outdated once stays so"


def test_a_vote_while_a_comparison_is_made_anew_is_kept_and_in_nobodys_way(swept, remake):
    first = sweeps.cells(swept)[0].id
    folder = swept.folder / "comparison"

    def vote_meanwhile(made):
        votes.cast(folder, ("", first), "0-0", first)
        report.write_anew(folder)

    made = remake(vote_meanwhile)
    assert made.folder == folder and len(votes.pairs(folder)) == 1
    assert [path.name for path in swept.folder.iterdir() if "comparison" in path.name] == ["comparison"]
    counted = json.loads((folder / "table.json").read_text())["beside"]
    assert "preferred" in counted


def test_votes_on_answers_outlive_it_too(swept, answered, remake):
    first = sweeps.cells(swept)[0].id
    folder = swept.folder / "comparison"
    for key in ("answer 1", "answer 2", "answer 3", "x"):
        votes.cast(folder, ("", first), key, first)

    def answer_differently(made):
        file = made.folder / "cells" / first.rpartition("/")[2] / "answers.jsonl"
        file.write_text(file.read_text().replace("<two>", "three"))

    remake(answer_differently)
    assert [line["picture"] for line in cast_lines(folder) if "outdated" not in line] == ["answer 1"]
