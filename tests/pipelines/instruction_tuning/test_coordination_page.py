"""The code in docs/coordination.md, as it stands."""

import re
import warnings
from pathlib import Path

from equipoise.pipelines import demo

PAGE = Path(__file__).parents[3] / "docs" / "coordination.md"


def test_the_code_on_the_page_runs(tmp_path, monkeypatch, capsys):
    blocks = re.findall(r"```python\n(.*?)```", PAGE.read_text(encoding="utf-8"), re.DOTALL)
    assert len(blocks) == 1
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(demo, "QUESTIONS", 60)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        exec(compile(blocks[0], str(PAGE), "exec"), {})
    measured = eval(capsys.readouterr().out.splitlines()[-1])
    assert len(measured) == 4 and all(kappa > 0 for kappa, _ in measured)
