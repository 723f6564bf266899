"""`--skip-bad` is there where a pipeline's record has the key, and nowhere else."""

import pytest

from equipoise.pipelines.cli import main

WITH_KEY = """
from typing import Literal
from pydantic import Field
from equipoise.pipelines.config import RunConfig, Section
from equipoise.pipelines.pipeline import Pipeline

class Data(Section):
    skip_bad: bool = Field(False, description="leave out broken sheets")

class Config(RunConfig):
    pipeline: Literal["scores"] = Field("scores", description="the pipeline")
    data: Data = Field(default_factory=Data)

class Scores(Pipeline):
    '''Sheets of music.'''
    name, title, Config = "scores", "Scores", Config
"""


def helped(command: str, capsys) -> str:
    with pytest.raises(SystemExit) as left:
        main([command, "--help"])
    assert left.value.code == 0
    return " ".join(capsys.readouterr().out.split())


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_help_names_the_pipelines_whose_record_has_the_key(command, distribution, capsys):
    assert "(data.skip_bad; pipelines that can: audio_visual, instruction_tuning)" in helped(command, capsys)
    distribution("sheets", {"equipoise.pipelines": {"scores": "sheets:Scores"}}, sheets=WITH_KEY)
    assert "(data.skip_bad; pipelines that can: audio_visual, instruction_tuning, scores)" in helped(command, capsys)


@pytest.mark.parametrize("words", [["train", "--dry-run"], ["train", "--keys"], ["sweep", "--dry-run"], ["sweep"]])
def test_a_pipeline_without_the_key_refuses_it(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    assert main([words[0], "text_to_image/demo", *words[1:], "--skip-bad"]) == 2
    assert capsys.readouterr().err == (
        "--skip-bad: the pipeline text_to_image leaves no data out; pipelines that can: audio_visual, "
        "instruction_tuning. Repair or remove what cannot be used.\n"
    )
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("command", ["train", "sweep"])
def test_where_the_key_is_it_is_set(command, capsys):
    for words, wanted in ((["--skip-bad"], "skip_bad: true"), ([], "skip_bad: false")):
        for pipeline in ("audio_visual", "instruction_tuning"):
            assert main([command, f"{pipeline}/demo", "--dry-run", *words]) == 0
            assert wanted in capsys.readouterr().out


def test_resume_has_no_such_option(capsys):
    with pytest.raises(SystemExit):
        main(["resume", "latest", "--skip-bad"])
    assert "unrecognized arguments: --skip-bad" in capsys.readouterr().err
