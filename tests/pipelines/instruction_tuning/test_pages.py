"""The Python code in docs/coordination.md and docs/instruction_tuning.md, as it stands."""

import re
import warnings
from pathlib import Path
from typing import Any

import pytest

from equipoise.pipelines import demo
from equipoise.pipelines.cli import main

DOCS = Path(__file__).parents[3] / "docs"


@pytest.fixture
def ran(tmp_path, monkeypatch):
    """Runs a page's block, by its number, in an empty folder, and gives the names that it leaves."""
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "QUESTIONS", 60)

    def run(page: str, number: int, of: int) -> dict[str, Any]:
        blocks = re.findall(r"```python\n(.*?)```", (DOCS / page).read_text(encoding="utf-8"), re.DOTALL)
        assert len(blocks) == of
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            exec(compile(blocks[number], page, "exec"), left := {})
        return left

    return run


def test_a_coordinated_trainer(ran, capsys):
    ran("coordination.md", 0, of=1)
    measured = eval(capsys.readouterr().out.splitlines()[-1])
    assert len(measured) == 4 and all(kappa > 0 for kappa, _ in measured)


def test_the_batches_in_a_trainer(ran, capsys):
    left = ran("instruction_tuning.md", 0, of=2)
    assert "labels of" in capsys.readouterr().out and len(left["records"]) == 60


def test_a_result_is_loaded(ran):
    words = ["steps=1", "batch=2", "samples.count=1", "coordinator=constant", "--id", "RUN", "--runs", "runs"]
    assert main(["train", "instruction_tuning/demo", *words]) == 0
    left = ran("instruction_tuning.md", 1, of=2)
    assert not [name for name, _ in left["model"].named_parameters() if "lora" in name]
