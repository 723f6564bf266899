"""LoRA files of any origin and checkpoints, compared by strength: what is drawn is what each app's names mean."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from equipoise.pipelines.cli import main
from equipoise.pipelines.text_to_image.result import LORA_FILE, export

NAME = "text_to_image/dreambooth"
PROMPT = "a photo of sks object"


@pytest.fixture
def run(short, tmp_path):
    """A finished run with a checkpoint of step 4, a sample of which was drawn then."""
    words = ["learning_rate=0.05", f"samples.prompts=[{PROMPT}]", "samples.every=4", "checkpoint.every=4"]
    assert main(["train", NAME, *short, *words, "lora.text_encoder=true", "--id", "one"]) == 0
    return tmp_path / "runs" / "one"


@pytest.fixture
def compared(tmp_path, capsys):
    """Compares, and gives table.json's cells by (row, strength)."""

    def done(*words):
        out = tmp_path / f"out{len(list(tmp_path.glob('out*')))}"
        code = main(["compare", *map(str, words), "--runs", str(tmp_path / "runs"), "--out", str(out)])
        assert code == 0, capsys.readouterr().err
        document = json.loads((out / "table.json").read_text())
        assert document["column"] == "strength"
        return {(cell["row"], cell["learning_rate"]): pixels(out, cell) for cell in document["cells"]}

    return done


def pixels(folder, cell):
    with Image.open(folder / cell["pictures"][0]["file"]) as picture:
        return np.asarray(picture.convert("RGB"), dtype=int)


def alike(one, other):
    return np.abs(one - other).max() <= 1  # two orders of summing


def test_a_runs_file_draws_the_same_under_every_apps_names(run, compared, tmp_path, checkpoint):
    files = [tmp_path / f"{format}.safetensors" for format in ("diffusers", "kohya", "comfyui")]
    for file in files:
        export(run / "result", file.stem, file)
    cells = compared(*files, run, "--model", checkpoint, "--scale", "0.5,1")
    base = cells["base", None]
    for strength in (0.5, 1.0):
        own = cells["one", strength]
        assert not alike(base, own)
        for file in files:
            assert alike(cells[file.stem, strength], own), (file.stem, strength)
    assert not alike(cells["one", 0.5], cells["one", 1.0])


def test_a_checkpoint_draws_what_the_run_drew_at_its_step(run, compared):
    cells = compared(run, "--checkpoints")
    with Image.open(run / "samples" / "step-00000004" / "00-0.png") as sample:
        drawn = np.asarray(sample.convert("RGB"), dtype=int)
    assert alike(cells["one step-00000004", 1.0], drawn)
    assert not alike(cells["one step-00000004", 1.0], cells["one", 1.0])


def test_the_words_say_strength_where_the_columns_are(run, tmp_path, capsys):
    words = ["compare", str(run), "--scale", "0.5,1", "--runs", str(tmp_path / "runs"), "--out", str(tmp_path / "out")]
    assert main(words) == 0
    said = capsys.readouterr().out
    assert "STRENGTH" in said and "learning rate" not in said and "Strengths that worked:" in said
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Strengths that worked</h2>" in report and "learning rate" not in report.lower()


@pytest.mark.parametrize(
    ("change", "words", "message"),
    [
        (None, ["--scale", "0,1", "--model", "BASE"], "--scale: must be above 0, got 0"),
        (None, [], "--model: LoRA files need their base"),
        ("other", ["--model", "BASE"], "are no LoRA factors of layers"),
        ("text", ["--model", "BASE"], "cannot be"),
        ("gone", ["--model", "BASE"], "is no file"),
    ],
)
def test_what_cannot_be_compared_is_refused_in_a_sentence(run, tmp_path, capsys, checkpoint, change, words, message):
    file = tmp_path / "given.safetensors"
    tensors = load_file(run / "result" / LORA_FILE)
    if change == "other":
        tensors = {
            "unet.nowhere.to_q.lora_A.weight": torch.ones(2, 3),
            "unet.nowhere.to_q.lora_B.weight": torch.ones(3, 2),
        }
    save_file(tensors, file)
    if change == "text":
        file.write_text("no safetensors")
    if change == "gone":
        file.unlink()
    given = [str(checkpoint) if word == "BASE" else word for word in words]
    assert main(["compare", str(file), *given, "--prompt", PROMPT, "--runs", str(tmp_path / "runs")]) == 2
    error = capsys.readouterr().err
    assert message in error and "Traceback" not in error
    assert not list((tmp_path / "runs").glob("comparisons/*"))


def test_a_file_that_the_loader_takes_a_part_of_is_not_shown_as_a_whole(run, tmp_path, capsys, checkpoint):
    tensors = load_file(run / "result" / LORA_FILE)
    pair = {f"strange.layer.lora_{side}.weight": torch.ones(2, 2) for side in "AB"}
    save_file(tensors | pair, tmp_path / "given.safetensors")
    words = ["--model", str(checkpoint), "--prompt", PROMPT, "--runs", str(tmp_path / "runs")]
    assert main(["compare", str(tmp_path / "given.safetensors"), *words]) == 2
    assert "strange.layer" in capsys.readouterr().err
