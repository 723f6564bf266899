"""`equipoise reproduce mimo` on a few small clips of its user's, with few steps."""

import importlib.util
import json
import math
from pathlib import Path

import pytest

from equipoise.errors import InputError
from equipoise.pipelines.cli import main
from equipoise.pipelines.reproduce import mimo

KINDS = ("visual", "audio")
PLACE = Path(__file__).parents[1] / "audio_visual" / "conftest.py"
spec = importlib.util.spec_from_file_location("clips", PLACE)
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


def write_clips(folder: Path, text: bool = False) -> Path:
    rows = []
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        for index in range(count):
            name = f"{split}{index}"
            made.write_sound(folder / f"{name}.wav", 1200 if index % 2 else 300)
            made.write_picture(folder / f"{name}.png", (200, 0, 0) if index % 2 else (0, 0, 200))
            row = {"text": "so they say"} if text else {}
            row |= {"audio": f"{name}.wav", "frames": f"{name}.png", "label": "ab"[index % 2], "split": split}
            rows.append(row)
    return made.write_manifest(folder / "m.csv", rows)


def test_a_training_that_diverges_is_marked_and_stops_nothing(tmp_path):
    cell = {"objective": "mimo", "options": {"lam": 1e8, "mu": 0.1}, "seed": 0, "steps": 20, "extra": "landscape"}
    found = mimo.train({**cell, "data": str(write_clips(tmp_path)), "runs": str(tmp_path / "runs")})
    assert found["diverged"] < 20 and 0 <= found["accuracy_joint"] <= 100
    assert len(found["curve_audio"]) == 10 and len(found["landscape"]) == mimo.SIDE**2
    picture = mimo._paint(found["landscape"], {"MIMO": found["landscape"]})
    assert picture.shape == (376, 376, 3)


def test_three_modalities_are_compared_where_the_manifest_has_text(tmp_path):
    manifest = write_clips(tmp_path, text=True)
    kinds = mimo._kinds(str(manifest))
    assert kinds == ("audio", "visual", "text") and mimo._kinds(None) == ("audio", "visual")
    rows = mimo.methods(kinds)
    assert "OGM-GE" not in rows and "OGM-GE" in mimo.methods(kinds[:2]), "it takes two"
    assert rows["MSLR, text"] == ("mslr", {"factors": {"audio": 0.3, "visual": 0.3, "text": 3.0}})
    cell = {"objective": "mimo", "options": {}, "seed": 0, "steps": 2, "extra": "", "kinds": list(kinds)}
    found = mimo.train({**cell, "data": str(manifest), "runs": str(tmp_path / "runs")})
    assert {"accuracy_text", "probe_text", "contribution_text", "curve_text"} <= found.keys()
    values = {"balancing": 0.1, "probe_joint": 99.0}
    lines = mimo._first_table(lambda name, key: [values.get(key, 50.0)], rows, kinds, "2 steps")
    assert "the paper's: UR-Funny" in lines[0] and "64.54 / 52.19 / 50.38 / 62.1 / 0.101" in lines[-1]
    assert lines[2] == (
        "MLA trains one modality in a step, its authors' code each of them on every batch: here each has had 1/3 of "
        "the steps. MLA, all turns: 3 times the steps."
    )
    assert lines[3] == "Left out, for they take two modalities: OGM-GE, OPM, PMR, InfoReg.\n"
    assert mimo._longest(str(manifest)) == len("so they say"), "no more is padded, however long the usual text"
    without = {name: row for name, row in rows.items() if not name.startswith("MLA")}
    assert not any("MLA" in line for line in mimo._first_table(lambda *_: [1.0], without, kinds, "2 steps"))
    (tmp_path / "lone.csv").write_text("audio,label,split\n")
    with pytest.raises(InputError, match=r"has columns for only audio of audio, visual, text. Balancing needs two"):
        mimo._kinds(str(tmp_path / "lone.csv"))


def test_the_test_losss_contours_are_drawn_too():
    """A training loss that rises to the right, and a test loss that rises downwards."""
    points = [[math.exp(x), math.exp(y), 0.0] for y in range(mimo.SIDE) for x in range(mimo.SIDE)]
    picture = mimo._paint(points, {"MIMO": points})
    black, yellow = ((picture == colour).all(-1) for colour in (mimo.BLACK, mimo.YELLOW))
    columns, rows = black.sum(0), yellow.sum(1)
    assert (columns > 200).sum() == 2 * mimo.LEVELS and black.sum(1).max() < 50, "lines of one training loss"
    assert (rows > 100).sum() == 2 * mimo.LEVELS and yellow.sum(0).max() < 50, "and of one test loss, dashed"


def test_the_papers_starved_modality_is_compared_with_the_one_here():
    figures = {"MIMO": 90.0, "MML": 40.0}
    lines = mimo._findings(lambda name, key: [figures[name]] if name in figures else [], mimo.KINDS[:2], "audio")
    assert "- MIMO over MML, audio: paper +37.1, here +50.0. Same direction, of one seed." in lines, "visual, there"
    assert [mimo._starved(paper, len(kinds)) for kinds, (_, paper) in mimo.PAPER.items()] == [1, 0]


def test_what_the_seeds_cannot_tell_from_the_first_is_told_by_intervals():
    joint = {"MIMO": [98.0, 99.0], "MML": [96.0, 97.5], "unimodal": [None, None]}
    lines = mimo._ranking(lambda name, key: joint[name], joint)
    first, second = lines[-1].splitlines()[1:]
    assert first.split() == ["MIMO", "98.5", "±", "6.4"] and second.split() == [
        "MML",
        "96.8",
        "±",
        "9.5",
        "+1.8",
        "±",
        "3.2",
    ]


def test_a_curves_points_are_where_validations_are():
    for steps in (1, 7, 12, 25, 300):
        every = mimo._validate_every(steps)
        validated = [step for step in range(1, steps + 1) if step % every == 0 or step == steps]
        assert mimo._points(steps) == len(validated) <= 10
        assert [min(steps, (i + 1) * every) for i in range(len(validated))] == validated


def test_a_landscape_is_of_clips_from_everywhere():
    chosen = mimo._some(1200)
    assert len(chosen) == len(set(chosen.tolist())) == 120 and chosen.tolist() == mimo._some(1200).tolist()
    assert all((chosen // 120 == tenth).any() for tenth in range(10)), "a manifest may be sorted by class"
    assert sorted(mimo._some(5).tolist()) == [0, 1, 2, 3, 4]


@pytest.mark.slow
def test_the_command_reproduces_mimo_on_given_clips(tmp_path, capsys):
    manifest = write_clips(tmp_path)
    words = ["reproduce", "mimo", "--data", str(manifest), "--seeds", "1", "--steps", "2", "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(number in out for number in ("75.96", "60.26", "68.67")), "the paper's own numbers stand beside"
    assert "- MIMO over MML, joint: paper +15.7, here " in out and "λ = 100" in out
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["chart.png", "landscape.png", "results.json"]
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert len(cells) == 20 + 12 + 2 and {cell["method"] for cell in cells} >= {"AGM", "OGM-GE", "MSES", "unimodal"}
    assert all(
        cell["balancing"] > 0 and len(cell[f"curve_{kind}"]) == cell["steps"] for cell in cells for kind in KINDS
    )
    assert {cell["method"]: cell["steps"] for cell in cells if cell["steps"] != 2} == {mimo.TURNS: 4}
    gaps = {kind: cells[0][f"probe_{kind}"] - cells[1][f"probe_{kind}"] for kind in KINDS}
    assert (cells[0]["method"], cells[1]["method"]) == ("unimodal", "MML")
    starved = max(KINDS, key=lambda kind: gaps[kind])
    assert f"Furthest behind under MML, by the probe: {starved}, {gaps[starved]:.1f} points" in out
    lead = cells[10][f"probe_{starved}"] - cells[1][f"probe_{starved}"]
    assert cells[10]["method"] == "MIMO" and f"probe_{starved}, seed by seed" in out
    assert f"- MIMO over MML: {lead:+.1f}." in out
    assert all(
        sum(cell[f"contribution_{kind}"] for kind in KINDS) == pytest.approx(cell["probe_joint"] - 50) for cell in cells
    ), "of two classes alike, chance is a half"
    assert f"- MIMO over MML, {starved}: paper +37.1, here " in out
    assert main([*words, "--output", str(tmp_path / "out"), "--add"]) == 0
    again = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert again == cells and "Figure 3" in capsys.readouterr().out, "nothing is trained a second time"
