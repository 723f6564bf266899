"""`equipoise reproduce commit` with few steps: every method trains on both tasks, and each does something."""

import json
from contextlib import contextmanager

import pytest
import torch

from equipoise.errors import InputError
from equipoise.pipelines.cli import main
from equipoise.pipelines.reproduce import commit


def test_what_has_no_kappa_says_so():
    assert (commit.kappa(0.0, 0.0), commit.kappa(1.5, 0.0)) == ("none", "0.00")


@pytest.mark.slow
def test_commit_in_small(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    monkeypatch.setattr(commit, "METHODS", {name: commit.METHODS[name] for name in BOTH})
    monkeypatch.setattr(commit, "RATES", {name: commit.RATES[name] for name in ("pictures", "captions")})
    monkeypatch.setattr(commit.demo, "QUESTIONS", 60)
    monkeypatch.setattr(commit, "SOUNDS", 60)
    cells, place = [], tmp_path
    commit.demo.questions_file(place)
    commit.prepare_sounds(place, 2)
    for task in commit.RATES:
        for method in commit.METHODS:
            cell = {"task": task, "method": method, "seed": 0, "steps": 12, "evaluations": 12, "folder": str(place)}
            cells.append(cell | commit.train(cell))
    assert {cell["state"] for cell in cells} == {"done"}
    for task in commit.RATES:
        mine = [cell for cell in cells if cell["task"] == task]
        assert len({cell["losses"][-1] for cell in mine}) == 3, "every method does something"
        assert all(cell["processor_seconds"] > 0 for cell in mine)
        assert all(len(cell["kappas"]) == commit.TENTHS and cell["kappa_mean"] > 0 for cell in mine)
        assert mine[0]["losses"][0] == mine[1]["losses"][0], "all start from the same weights and batches"

    # --add: what is there already is not trained again. Copies stand for the baselines, and one run is taken out.
    monkeypatch.undo()
    monkeypatch.setattr(commit, "RATES", {name: commit.RATES[name] for name in ("pictures", "captions")})
    every = [
        next(c for c in cells if (c["task"], c["method"]) == (task, method if method in BOTH else "Constant LR"))
        | {"method": method}
        for task in commit.RATES
        for method in commit.METHODS
    ]
    out = ("pictures", "CoMMIT-CLR")
    earlier = [cell for cell in every if (cell["task"], cell["method"]) != out]
    asked, fails = [], []

    @contextmanager
    def workers(count, name, evaluations, keep):  # what they would train is known
        def measure(train, settings):
            asked[:] = [(cell["task"], cell["method"]) for cell in settings]
            found = []
            for pair in asked:
                found.append(next(c for c in every if (c["task"], c["method"]) == pair) | {"folder": "somewhere"})
                keep(found[-1])
                if len(found) in fails:
                    raise KeyboardInterrupt
            return found

        yield measure

    monkeypatch.setattr(commit, "workers", workers)
    monkeypatch.setattr(commit, "prepare_sounds", lambda *_: None)
    monkeypatch.setattr(commit.demo, "questions_file", lambda *_: None)
    about = {"paper": "commit", "torch": str(torch.__version__), "seconds": 1000.0, "processor_seconds": 900.0}
    file = tmp_path / "results.json"
    file.write_text(json.dumps({**about, "runs": earlier}))
    words = ["reproduce", "commit", "--seeds", "1", "--steps", "12", "--workers", "1", "--add", "--output"]
    assert main([*words, str(tmp_path)]) == 0
    assert "earlier calls included" in capsys.readouterr().out
    found = json.loads(file.read_text())
    assert asked == [out] and found["seconds"] >= 1000 and found["processor_seconds"] >= 900
    assert [(c["task"], c["method"], c["accuracy"]) for c in found["runs"]] == [
        (c["task"], c["method"], c["accuracy"]) for c in every
    ]

    # what an interrupted call has finished is not trained again either
    again = tmp_path / "again"
    fails.append(3)
    assert main([*words[:-2], "--output", str(again)]) == 130
    assert len(asked) == 14 and [item.name for item in again.iterdir()] == ["cells.jsonl"]
    fails.clear()
    assert main([*words, str(again)]) == 0
    assert len(asked) == 11 and sorted(item.name for item in again.iterdir()) == ["chart.png", "results.json"]
    left, right = (
        [(run["task"], run["method"], run["losses"]) for run in runs]
        for runs in (json.loads((again / "results.json").read_text())["runs"], found["runs"])
    )
    assert left == right
    capsys.readouterr()
    assert main([*words[:-1], "--task", "captions", "--output", str(tmp_path)]) == 0
    assert "Pictures" not in capsys.readouterr().out
    assert len(json.loads(file.read_text())["runs"]) == 14, "those of the other task stay"
    with pytest.raises(InputError, match="--task: 'smells' is none of pictures, captions"):
        commit.reproduce(1, 1, tasks=["smells"])

    for wrong, message in (
        ({"torch": "0.1"}, f"results.json is of torch 0.1, not {torch.__version__}. Give another --output, or"),
        ({"paper": "mimo"}, "is of paper mimo, not commit."),
        ({"runs": None}, "cannot be added to: "),
    ):
        file.write_text(json.dumps({**about, "runs": earlier, **wrong}))
        kept = file.read_bytes()
        assert main([*words, str(tmp_path)]) == 2
        assert message in capsys.readouterr().err and file.read_bytes() == kept


BOTH = ("Constant LR", "CoMMIT-CLR", "CoMMIT")


def test_contours_of_kappa(tmp_path, monkeypatch):
    """d is in proportion to a short step's length, so that κ goes with the ratio of the rates; --steps shortens it."""
    monkeypatch.setattr(commit.demo, "QUESTIONS", 60)
    commit.demo.questions_file(tmp_path)
    asked = []

    @contextmanager
    def workers(count, name, evaluations, keep):
        def measure(train, settings):
            asked.extend(settings)
            return [cell | train(cell | {"folder": str(tmp_path)}) for cell in settings]

        yield measure

    monkeypatch.setattr(commit, "workers", workers)
    found = commit.reproduce(3, 1, 20, tasks=["contours"])
    assert [(cell["steps"], cell["task"]) for cell in asked] == [(2, "contours")]
    (cell,) = found.cells
    for side in ("language", "encoder"):
        short = cell[side][:3]
        assert [short[1] / short[0], short[2] / short[1]] == pytest.approx([10**0.5] * 2, rel=0.1)
        assert max(cell[side]) < 0.84, "the root of ln 2 is the most that two distributions can be apart"
    assert found.pictures["kappa.png"].size == (560, 560) and "1e-05" in found.text and len(found.panels) == 1
    found.write(tmp_path, {})
    assert {"kappa.png", "chart.png", "results.json"} <= {file.name for file in tmp_path.iterdir()}


def test_commit_is_listed_in_the_help_of_reproduce(capsys):
    with pytest.raises(SystemExit):
        main(["reproduce", "--help"])
    assert "CoMMIT's Table 1 and Figures 2, 3, 5 and 6" in " ".join(capsys.readouterr().out.split())


def test_the_papers_numbers_are_table_1s():
    blip = {"Constant LR": (54.06, 37.16, 26.48), "CoMMIT": (64.37, 38.65, 28.12), "CoMMIT-CLR": (60.44, 39.09, 27.66)}
    for method, three in blip.items():
        assert commit.PAPER[method]["pictures"] == pytest.approx(sum(three) / 3, abs=0.006)
