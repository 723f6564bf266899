"""What `equipoise compare` does to the folders around it, whatever the pipeline makes of the runs."""

import errno
import math
import sys
from pathlib import Path

import pytest
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.comparing.comparison import Cell, Comparison, Picture
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store, find

SOURCE = Path(__file__).with_name("counting.py").read_text() + (
    "\n\nfrom equipoise.pipelines.config.sections import SamplesSection\n\n\n"
    "class Config(TunedConfig):\n    samples: SamplesSection = SamplesSection()\n\n\n"
    "class Compared(Counting):\n    Config = Config\n"
)


@pytest.fixture(autouse=True)
def sweep(distribution, tmp_path, monkeypatch) -> Run:
    """A sweep whose cells are done, in a store whose pipeline draws one grey picture per cell."""
    distribution("counting", {"equipoise.pipelines": {"counting": "counting:Compared"}}, counting=SOURCE)
    (tmp_path / "work" / "pictures").mkdir(parents=True)
    monkeypatch.chdir(tmp_path / "work")
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    Path("vase.yaml").write_text("pipeline: counting\nname: vase\ndata: pictures\nsteps: 1\n")
    config = configs.set_keys(configs.load("vase.yaml"), {"sweep": {"optimizer.learning_rate": [1e-4, 1e-3]}})
    made = sweeps.create(config, id="k")
    for cell in (made, *sweeps.cells(made)):
        cell.update(state="done")
    monkeypatch.setattr(sys.modules["counting"].Compared, "compare", classmethod(draw))
    return made


def draw(cls, name, folder, runs, configs, asked):
    if asked.samples.count == 3:
        raise InputError("comparison: three are too many.")
    if asked.samples.count == 4:
        raise OSError(errno.ENOSPC, "No space left on device", str(folder / "x.png"))
    assert list(Path(configs[0].data.folder).iterdir()) == [], "relative paths lead on"
    Image.new("RGB", (8, 8), "gray").save(folder / "a.png")
    pictures = [Picture(0, 0, "a.png", "a.png")]
    base = Cell("", "base", math.nan, 0, "untouched", metrics={"score": 0.0}, pictures=pictures)
    cells = [
        Cell(run.id, "adamw", config.optimizer.learning_rate, 0, "done", metrics={"score": 0.5}, pictures=pictures)
        for run, config in zip(runs, configs, strict=True)
    ]
    return Comparison(name, folder, ["one"], "how grey it is", base, cells)


def everything() -> dict[str, bytes]:
    return {str(file): file.read_bytes() for file in sorted(Path("runs/k").rglob("*")) if file.is_file()}


@pytest.mark.parametrize(("count", "code"), [("0", 2), ("3", 2), ("4", 1)])
def test_a_comparison_that_fails_leaves_the_one_before(count, code, capfd):
    assert main(["compare", "k"]) == 0
    before = everything()
    assert "runs/k/comparison/report.html" in before
    assert main(["compare", "k", "--count", count]) == code
    err = capfd.readouterr().err
    assert everything() == before and "Traceback" not in err and len(err.splitlines()) == 1
    assert [item.name for item in Path("runs/k").iterdir() if item.name.startswith(".")] == []


def test_the_same_comparison_again_replaces_the_one_before(capfd):
    assert main(["compare", "k"]) == 0
    Path("runs/k/comparison/leftover").touch()
    capfd.readouterr()
    assert main(["compare", "k"]) == 0
    out = capfd.readouterr().out
    assert f"{Path('runs/k/comparison/report.html').resolve()}" in out
    assert not Path("runs/k/comparison/leftover").exists()


def test_a_comparison_of_other_things_has_a_folder_of_its_own(capfd):
    assert main(["compare", "k"]) == 0
    before = everything()
    for _ in range(2):
        assert main(["compare", "k", "--count", "2"]) == 0
    assert everything() == before
    assert len(list(Path("runs/comparisons").glob("*/report.html"))) == 2


def test_the_table_tells_seeds_apart_where_there_are_several(capfd, monkeypatch):
    assert main(["compare", "k"]) == 0
    assert "SEED" not in capfd.readouterr().out

    def seeded(*given):
        comparison = draw(*given)
        for seed, cell in enumerate(comparison.cells, start=5):
            cell.seed = seed
        return comparison

    monkeypatch.setattr(sys.modules["counting"].Compared, "compare", classmethod(seeded))
    assert main(["compare", "k"]) == 0
    header, base, *rows = capfd.readouterr().out.splitlines()[:4]
    assert header.split() == ["RATE", "SEED", "SCORE", "STATE", "VERDICT"]
    assert base.split() == ["base", "0", "untouched"]
    assert [row.split()[1:3] for row in rows] == [["1e-4", "5"], ["1e-3", "6"]]


def test_a_rate_that_kept_too_little_is_named_so(capfd, monkeypatch):
    """In the table, and where the best is said: the rate that learnt most kept nothing."""

    def forgetful(*given):
        comparison = draw(*given)
        comparison.kept, comparison.beside = "left", {"left": "what is left"}
        comparison.base.metrics["left"] = 1.0
        first, second = comparison.cells
        first.metrics |= {"score": 0.45, "left": 0.9}
        second.metrics |= {"left": 0.0}
        return comparison

    monkeypatch.setattr(sys.modules["counting"].Compared, "compare", classmethod(forgetful))
    assert main(["compare", "k"]) == 0
    out = capfd.readouterr().out
    _, base, first, second = out.splitlines()[:4]
    assert base.endswith("untouched") and first.endswith("usable") and second.endswith("kept too little")
    assert "keeps at least 75% of what the base knew (left 75% or more)." in out
    assert "\nBest: adamw at 1e-4: 45% learnt, 90% left; " in out


def test_runs_are_compared_from_any_folder(tmp_path, monkeypatch):
    (tmp_path / "elsewhere").mkdir()
    monkeypatch.chdir(tmp_path / "elsewhere")
    assert main(["compare", str(tmp_path / "work/runs/k"), "--out", "side"]) == 0
    assert Path("side/report.html").is_file() and Path.cwd() == tmp_path / "elsewhere"


def test_a_cell_of_the_newest_sweep_is_found_by_its_name(sweep, capfd):
    """A refusal lists those that have something to export."""
    first, second = sweeps.cells(sweep)
    assert [find(f"latest/{ref}").id for ref in (second.folder.name, "learning_rate=0.001")] == [second.id] * 2
    assert main(["logs", "latest/learning_rate=0.01"]) == 2 and f"Did you mean {second.id}" in capfd.readouterr().err
    assert main(["export", "latest", "--output", "a.safetensors"]) == 2
    assert capfd.readouterr().err == "k is a sweep, and one of its cells is wanted, and none has a result yet.\n"
    (first.result / "count.txt").touch()
    assert main(["export", "latest", "--output", "a.safetensors"]) == 2
    assert capfd.readouterr().err == f"k is a sweep, and one of its cells is wanted: {first.id}.\n"
    assert main(["export", f"latest/{first.folder.name}", "--output", "a.safetensors"]) == 2
    assert "exports nothing" in capfd.readouterr().err, "as far as the pipeline"


def test_a_refusal_counts_the_cells_that_it_does_not_name(sweep, capfd):
    config = sweeps.cells(sweep)[0].config()
    for index in range(5):
        Store(sweep.root).create(config, kind="cell", sweep="k", id=f"x{index}")
    assert main(["compare", "k"]) == 2
    assert " and 2 more are not finished yet." in capfd.readouterr().err
