"""`equipoise reproduce commit` with few steps: every method trains on both tasks, and each does something."""

import pytest

from equipoise.pipelines.cli import main
from equipoise.pipelines.reproduce import commit


@pytest.mark.slow
def test_commit_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    monkeypatch.setattr(commit, "METHODS", {k: commit.METHODS[k] for k in ("Constant LR", "CoMMIT-CLR", "CoMMIT")})
    monkeypatch.setattr(commit.demo, "QUESTIONS", 60)
    cells = []
    for task in commit.RATES:
        place = tmp_path / task
        place.mkdir()
        commit.demo.questions_file(place)
        commit.prepare_sounds(place, 2)
        for method in commit.METHODS:
            cell = {"task": task, "method": method, "seed": 0, "steps": 12, "evaluations": 12, "place": str(place)}
            cells.append(cell | commit.train(cell))
    assert {cell["state"] for cell in cells} == {"done"}
    for task in commit.RATES:
        mine = [cell for cell in cells if cell["task"] == task]
        assert len({cell["losses"][-1] for cell in mine}) == 3, "every method does something"
        assert all(len(cell["kappas"]) == commit.TENTHS and cell["kappa_mean"] > 0 for cell in mine)
        assert mine[0]["losses"][0] == mine[1]["losses"][0], "all start from the same weights and batches"


def test_it_is_listed(capsys):
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    assert "CoMMIT's Table 1 and Figures 2, 3 and 6" in " ".join(capsys.readouterr().out.split())


def test_the_papers_numbers_are_table_1s():
    blip = {"Constant LR": (54.06, 37.16, 26.48), "CoMMIT": (64.37, 38.65, 28.12), "CoMMIT-CLR": (60.44, 39.09, 27.66)}
    for method, three in blip.items():
        assert commit.PAPER[method]["pictures"] == pytest.approx(sum(three) / 3, abs=0.006)
