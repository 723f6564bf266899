"""`equipoise predict` and `equipoise evaluate` with a LoRA: pictures of any prompts, and the loss on any pictures."""

import csv
import json
import shutil
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.pipelines.cli import main
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAME = "text_to_image/dreambooth"
PROMPT = "a sks object on a red background"


@pytest.fixture
def trained(short, tmp_path):
    """The folder of a finished run."""

    def get(*words: str) -> Path:
        assert main(["train", NAME, *short, "learning_rate=0.05", *words, "--id", "one"]) == 0
        return tmp_path / "runs" / "one"

    return get


def table(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def pixels(file: Path) -> np.ndarray:
    with Image.open(file) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def test_pictures_are_those_that_the_run_drew_itself(trained, tmp_path, capsys):
    run = trained(f"samples.prompts=[{PROMPT}]", "samples.count=2", "lora.text_encoder=true", "lora.dropout=0.5")
    (tmp_path / "prompts.txt").write_text(f"a blue circle\n\n  {PROMPT}\n")
    words = ["predict", str(run), str(tmp_path / "prompts.txt"), "--output", str(tmp_path / "out")]
    capsys.readouterr()
    assert main(words) == 0
    assert capsys.readouterr().out == f"{tmp_path / 'out'}\n"
    found = table(tmp_path / "out" / "predictions.csv")
    assert [(row["prompt"], row["seed"], row["file"]) for row in found] == [
        (prompt, str(seed), f"{index:02d}-{seed}.png")
        for index, prompt in enumerate(["a blue circle", PROMPT])
        for seed in (0, 1)
    ]
    (samples,) = (run / "samples").glob("step-00000006")
    for seed in (0, 1):
        drawn, sample = pixels(tmp_path / "out" / f"01-{seed}.png"), pixels(samples / f"00-{seed}.png")
        assert np.abs(drawn - sample).max() <= 1, "two orders of summing"
    with Image.open(tmp_path / "out" / "01-1.png") as picture:
        facts = picture.text
    assert (facts["prompt"], facts["seed"], facts["run"], facts["scale"]) == (PROMPT, "1", "one", "1.0")
    assert {path.name for path in (tmp_path / "out").iterdir()} == {"predictions.csv", *(row["file"] for row in found)}


def test_strength_and_number_of_pictures(trained, tmp_path):
    run, made = trained(), {}
    for scale in ("0", "0.5", "1"):
        out = tmp_path / scale
        words = ["--prompt", PROMPT, "--count", "3", "--scale", scale, "--output", str(out)]
        assert main(["predict", str(run), *words]) == 0
        assert [row["seed"] for row in table(out / "predictions.csv")] == ["0", "1", "2"]
        made[scale] = pixels(out / "00-0.png")
    out = tmp_path / "compared"
    assert main(["compare", str(run), "--prompt", PROMPT, "--scale", "0.5", "--out", str(out)]) == 0
    cells = json.loads((out / "table.json").read_text())["cells"]
    base, half = (pixels(out / cell["pictures"][0]["file"]) for cell in cells)
    assert np.abs(made["0"] - base).max() <= 1 and np.abs(made["0.5"] - half).max() <= 1
    assert np.abs(made["1"] - made["0.5"]).max() > 1


@pytest.mark.parametrize(
    "words",
    [
        [],
        ["lora.text_encoder=true", "lora.dropout=0.5"],
        ["token.name=<vase>", "train.ema=0.9"],
        ["train.precision=bf16", "data.buckets=true", "data.bucket_step=8"],
    ],
)
def test_the_loss_on_what_a_run_was_trained_on_is_the_runs_own(words, trained, pictures, tmp_path, capsys):
    if new_word := "token.name=<vase>" in words:
        captions = pictures / "metadata.jsonl"
        captions.write_text(captions.read_text().replace("sks object", "<vase>"))
    run = trained(*words)
    facts = json.loads((run / "result" / "result.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(run), str(pictures), "--output", str(tmp_path / "losses.csv")]) == 0
    printed = dict(line.split(": ", 1) for line in capsys.readouterr().out.splitlines()[1:3])
    tolerance = 1e-2 if "train.precision=bf16" in words else 1e-3
    assert float(printed["loss"]) == pytest.approx(facts["loss_after"], rel=tolerance)
    if not new_word:  # the untouched base reads a new word as letters
        assert float(printed["loss_base"]) == pytest.approx(facts["loss_before"], rel=1e-3)
    found = table(tmp_path / "losses.csv")
    assert [Path(row["image"]).name for row in found] == [f"{index}.png" for index in range(4)]
    mean = sum(float(row["loss"]) for row in found) / 4  # 16 draws each
    assert mean == pytest.approx(float(printed["loss"]), rel=1e-3)


def test_captions_are_the_folders_own_or_else_the_runs(trained, pictures, tmp_path, capsys):
    run = trained("data.instance_prompt=a sks object")
    assert main(["evaluate", str(run), str(pictures)]) == 0
    assert "captions: 4 from metadata.jsonl." in capsys.readouterr().out
    bare = tmp_path / "bare"
    bare.mkdir()
    for index in range(70):  # more than a run's own draws
        shutil.copy(pictures / f"{index % 4}.png", bare / f"{index}.png")
    assert main(["evaluate", str(run), str(bare)]) == 0
    printed = capsys.readouterr().out
    assert "captions: 70 from data.instance_prompt." in printed and "the mean of 70 fixed draws" in printed


def test_refusals_are_sentences_and_leave_nothing(trained, pictures, tmp_path, capsys):
    run, out = trained(), str(tmp_path / "out")
    (tmp_path / "blank.txt").write_text("\n \n")
    (tmp_path / "latin.txt").write_bytes("caf\xe9".encode("latin-1"))
    wanted = {
        ("predict", "--output", out): ("there is nothing to draw. Give a text file with a prompt on each line",),
        ("predict", "--prompt", "a"): ("--output: give a new folder",),
        ("predict", "--prompt", "a", "--output", str(pictures)): ("pictures is there already.",),
        ("predict", "--prompt", "a", "--count", "0", "--scale", "-1", "--output", out): (
            "samples.count: ",
            "samples.scale: ",
        ),
        ("predict", "--prompt", "a", "--scale", "inf", "--output", out): ("samples.scale: ",),
        ("predict", "--prompt", "a", "--features", "x.npz", "--output", out): (
            "--features: the pipeline text_to_image",
        ),
        ("predict", *(str(tmp_path / name) for name in ("blank.txt", "latin.txt", "pictures")), "--output", out): (
            "blank.txt: holds no prompt.",
            "latin.txt: is not UTF-8 text.",
            "pictures: is a folder.",
        ),
        ("predict", str(tmp_path / "nowhere.txt"), "--output", out): ("nowhere.txt does not exist.",),
        ("evaluate", str(tmp_path / "latin.txt")): ("latin.txt is a file. Give a folder of pictures.",),
    }
    for (command, *words), messages in wanted.items():
        capsys.readouterr()
        assert main([command, str(run), *words]) == 2, words
        error = capsys.readouterr().err
        assert all(message in error for message in messages) and "Traceback" not in error, (words, error)
    for name in ("0.png", "1.png"):
        (pictures / name).write_bytes(b"no picture")
    assert main(["evaluate", str(run), str(pictures)]) == 2
    error = capsys.readouterr().err
    assert "0.png: cannot be read as a picture" in error and "1.png: cannot be read as a picture" in error
    (run / "result" / LORA_FILE).write_bytes(b"no tensors")
    assert main(["predict", str(run), "--prompt", "a", "--output", out]) == 2
    assert "cannot be loaded on this base" in capsys.readouterr().err
    (run / "result" / LORA_FILE).unlink()
    assert main(["predict", str(run), "--prompt", "a", "--output", out]) == 2
    assert f"{LORA_FILE}: is missing." in capsys.readouterr().err
    assert not [path for path in tmp_path.iterdir() if "out" in path.name]
