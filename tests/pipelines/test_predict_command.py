"""`equipoise predict` and `equipoise evaluate` with runs that cannot, whatever their pipeline."""

import pytest

from equipoise.pipelines.cli import main


@pytest.mark.parametrize("command", ["predict", "evaluate"])
def test_a_pipeline_that_cannot_says_so(command, place, capsys):
    assert main(["train", "vase.yaml", "--id", "counted"]) == 0
    capsys.readouterr()
    assert main([command, "counted", "pictures"]) == 2
    what = {"predict": "predicts", "evaluate": "evaluates"}[command]
    assert capsys.readouterr().err == f"the pipeline counting {what} nothing from the command line.\n"
    assert main([command, "counted", "nowhere"]) == 2
    assert "nowhere does not exist. Give a file or folder that is there." in capsys.readouterr().err
    assert main([command, "unknown", "pictures"]) == 2
