"""`equipoise reproduce mimo` on a few small clips of its user's, with few steps."""

import importlib.util
import json
from pathlib import Path

import pytest

from equipoise.pipelines.cli import main
from equipoise.pipelines.reproduce import mimo

KINDS = ("visual", "audio")
PLACE = Path(__file__).parents[1] / "audio_visual" / "conftest.py"
spec = importlib.util.spec_from_file_location("clips", PLACE)
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


def write_clips(folder: Path) -> Path:
    rows = []
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        for index in range(count):
            name = f"{split}{index}"
            made.write_sound(folder / f"{name}.wav", 1200 if index % 2 else 300)
            made.write_picture(folder / f"{name}.png", (200, 0, 0) if index % 2 else (0, 0, 200))
            rows.append({"audio": f"{name}.wav", "frames": f"{name}.png", "label": "ab"[index % 2], "split": split})
    return made.write_manifest(folder / "m.csv", rows)


def test_a_training_that_diverges_is_marked_and_stops_nothing(tmp_path):
    cell = {"objective": "mimo", "options": {"lam": 1e8, "mu": 0.1}, "seed": 0, "steps": 20, "extra": "landscape"}
    found = mimo.train({**cell, "data": str(write_clips(tmp_path)), "runs": str(tmp_path / "runs")})
    assert found["diverged"] < 20 and 0 <= found["accuracy_joint"] <= 100
    assert len(found["curve_audio"]) == 10 and len(found["landscape"]) == mimo.SIDE**2
    picture = mimo._paint(found["landscape"], {"MIMO": found["landscape"]})
    assert picture.shape == (376, 376, 3)


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
    assert len(cells) == 11 + 12 + 2 and {cell["method"] for cell in cells} >= {"AGM", "OGM-GE", "MSES", "unimodal"}
    assert all(cell["balancing"] > 0 and len(cell[f"curve_{kind}"]) == 2 for cell in cells for kind in KINDS)
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
