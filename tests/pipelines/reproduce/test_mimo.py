"""`equipoise reproduce mimo` on a few small clips of its user's, with few steps."""

import importlib.util
import json
from pathlib import Path

import pytest

from equipoise.pipelines.cli import main

KINDS = ("visual", "audio")
PLACE = Path(__file__).parents[1] / "audio_visual" / "conftest.py"
spec = importlib.util.spec_from_file_location("clips", PLACE)
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


@pytest.mark.slow
def test_mimo_in_small(tmp_path, capsys):
    rows = []
    for split, count in (("train", 6), ("val", 2), ("test", 4)):
        for index in range(count):
            name = f"{split}{index}"
            made.write_sound(tmp_path / f"{name}.wav", 1200 if index % 2 else 300)
            made.write_picture(tmp_path / f"{name}.png", (200, 0, 0) if index % 2 else (0, 0, 200))
            rows.append({"audio": f"{name}.wav", "frames": f"{name}.png", "label": "ab"[index % 2], "split": split})
    manifest = made.write_manifest(tmp_path / "m.csv", rows)
    words = ["reproduce", "mimo", "--data", str(manifest), "--seeds", "1", "--steps", "2", "--workers", "1"]
    assert main([*words, "--output", str(tmp_path / "out")]) == 0
    out = capsys.readouterr().out
    assert all(number in out for number in ("75.96", "60.26", "68.67")), "the paper's own numbers stand beside"
    assert "- MIMO over MML, joint: paper +15.7, here " in out and "λ = 100" in out
    assert sorted(f.name for f in (tmp_path / "out").iterdir()) == ["chart.png", "landscape.png", "results.json"]
    cells = json.loads((tmp_path / "out" / "results.json").read_text())["runs"]
    assert len(cells) == 11 + 12 + 2 and {cell["method"] for cell in cells} >= {"AGM", "OGM-GE", "MSES", "unimodal"}
    assert all(cell["balancing"] > 0 and len(cell[f"curve_{kind}"]) == 2 for cell in cells for kind in KINDS)
    gaps = {kind: cells[0][f"accuracy_{kind}"] - cells[1][f"accuracy_{kind}"] for kind in KINDS}
    assert (cells[0]["method"], cells[1]["method"]) == ("unimodal", "MML")
    starved = max(KINDS, key=lambda kind: gaps[kind])
    assert f"Furthest behind under MML: {starved}, {gaps[starved]:.1f} points" in out
    assert f"- MIMO over MML, {starved}: paper +37.1, here " in out
