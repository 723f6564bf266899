"""`train.epochs` becomes steps before anything is made, in every pipeline; exactly one of both is given."""

import json
from pathlib import Path

import pytest
from PIL import Image

from equipoise.errors import ConfigError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.jobs.epochs import in_steps
from equipoise.pipelines.runs.store import Store

CLIPS = Path(__file__).parents[2] / "fixtures" / "formats" / "clips" / "manifest.csv"


@pytest.fixture
def folder(tmp_path, monkeypatch) -> Path:
    """Twenty-one conversations, of which two are held out, and two pictures, one of them repeated."""
    monkeypatch.chdir(tmp_path)
    (tmp_path / "pictures" / "3_red").mkdir(parents=True)
    said = [{"image": "pictures/b.png", "question": f"{number}?", "answer": "yes"} for number in range(21)]
    (tmp_path / "talk.jsonl").write_text("\n".join(map(json.dumps, said)))
    for name in ("3_red/a.png", "b.png"):
        Image.new("RGB", (8, 8), "red").save(tmp_path / "pictures" / name)
        (tmp_path / "pictures" / name).with_suffix(".txt").write_text("red")
    return tmp_path


@pytest.mark.parametrize(
    ("words", "steps", "sentence"),
    [
        (["instruction_tuning/demo", "data=talk.jsonl", "batch=4"], 15, "3 of 19 examples, 4 a step, are 15 steps."),
        (["text_to_image/demo", "data=pictures", "batch=4"], 3, "3 of 4 examples, 4 a step, are 3 steps."),
        (["audio_visual/demo", "data=CLIPS", "data.modalities=[visual]", "batch=2"], 9, "3 of 6 examples, 2 a step"),
        (["instruction_tuning/demo", "batch=4", "train.accumulate=2"], 1013, "3 of 2,700 examples, 8 a step"),
    ],
)
def test_epochs_are_counted(folder, words, steps, sentence):
    given = [word.replace("CLIPS", str(CLIPS)) for word in words[1:]]
    config = configs.load(words[0], [*given, "steps=", "train.epochs=3", f"runs={folder / 'runs'}"])
    made, (line,) = in_steps(config)
    assert line.startswith(f"train.epochs: {sentence}") and made.total_steps == steps
    assert made.train.epochs is None and in_steps(made) == (made, [])
    assert configs.flat(made) == configs.flat(config) | {"train.steps": steps, "train.epochs": None}


def test_one_of_both_is_given(folder):
    with pytest.raises(ConfigError) as error:
        configs.load("instruction_tuning/demo", ["train.epochs=2"])  # the file has steps
    assert "train: steps and epochs are both given. Leave one of them empty: steps= or epochs=." in str(error.value)
    with pytest.raises(ConfigError):
        configs.load("instruction_tuning/demo", ["steps=", "train.epochs=0"])


def test_a_run_says_its_steps_before_it_begins_and_can_be_repeated(folder, capsys):
    words = ["instruction_tuning/demo", "data=talk.jsonl", "steps=", "epochs=0.5", "batch=4", f"runs={folder / 'runs'}"]
    assert main(["train", *words, "--dry-run"]) == 0
    shown = capsys.readouterr()
    assert "train.epochs: 0.5 of 19 examples, 4 a step, are 3 steps." in shown.err
    (folder / "again.yaml").write_text(shown.out)
    assert configs.load(folder / "again.yaml").total_steps == 3


def test_cells_of_a_sweep_have_the_same_steps(folder, capsys):
    words = ["instruction_tuning/demo", "data=talk.jsonl", "steps=", "epochs=2", "batch=4", f"runs={folder / 'runs'}"]
    axes = ["--axis", "coordinator=constant", "--axis", "learning_rate=1e-4,1e-3"]
    assert main(["sweep", *words, *axes, "--dry-run"]) == 0
    assert "train.epochs: 2 of 19 examples, 4 a step, are 10 steps." in capsys.readouterr().err
    assert main(["sweep", *words, "--axis", "coordinator=constant", "--axis", "batch=2,4", "--dry-run"]) == 2
    assert "train.epochs: means other steps for each value of train.batch. Give steps" in capsys.readouterr().err
    assert Store(folder / "runs").list(kinds=("run", "sweep")) == []
