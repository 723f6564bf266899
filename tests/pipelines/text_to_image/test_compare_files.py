"""LoRA files of any origin and checkpoints, compared by strength: what is drawn is what each app's names mean."""

import json

import numpy as np
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file, save_file

from equipoise.errors import InputError
from equipoise.pipelines.cli import main
from equipoise.pipelines.comparing.comparison import folder_names
from equipoise.pipelines.jobs.making import columns
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
    assert "STRENGTH" in said and "learning rate" not in said and "by which strengths worked" in said
    report = (tmp_path / "out" / "report.html").read_text()
    assert "<h2>Strengths that worked</h2>" in report and "learning rate" not in report.lower()


def test_equal_strengths_are_one_column_and_there_are_at_most_twelve():
    assert columns([0.5, 1, 0.50000001, 1.0]) == pytest.approx([0.5, 1])
    assert columns(range(1, 13)) == list(range(1, 13))
    with pytest.raises(InputError, match="there are 13 strengths; give at most 12"):
        columns(range(1, 14))


def test_pictures_go_where_the_page_serves_them():
    names = ["runs/one", "lr=1e-3,seed=2", "my-lora at 0.5", "my-lora at 1", "Bäume", ".hidden"]
    places = folder_names(names)
    assert list(places.values()) == ["base", "one", "lr=1e-3,seed=2", "002", "003", "004", "005"]


def test_no_two_cells_share_a_folder_whatever_they_are_called():
    for names in (["001", "a/x", "b/x"], ["a/lr=1", "b/lr=1", "base"], ["000", "2", "c", "a/c"]):
        assert len(set(folder_names(names).values())) == 1 + len(names)


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


def test_files_of_one_name_have_pictures_of_their_own(run, compared, tmp_path, checkpoint):
    """As diffusers names them all."""
    for name, scale in (("a", 1.0), ("b", -1.0)):
        (tmp_path / name).mkdir()
        tensors = load_file(run / "result" / LORA_FILE)
        save_file({k: t * (scale if "lora_B" in k else 1) for k, t in tensors.items()}, tmp_path / name / LORA_FILE)
    files = [tmp_path / name / LORA_FILE for name in "ab"]
    cells = compared(*files, "--model", checkpoint, "--prompt", PROMPT)
    assert not alike(*(cells[f"{file.parent.name}/{file.name}", 1.0] for file in files))
    named = tmp_path / "one.safetensors"  # as the run
    save_file(load_file(files[1]), named)
    cells = compared(run, named)
    assert not alike(cells["one", 1.0], cells[named.name, 1.0])


def test_each_run_is_drawn_by_its_own_schedule_and_the_base_by_its(run, short, compared, tmp_path, checkpoint):
    words = ["noise.prediction=v_prediction", "noise.zero_terminal_snr=true", f"samples.prompts=[{PROMPT}]"]
    assert main(["train", NAME, *short, *words, "--id", "other"]) == 0
    alone = compared(run, "--scale", "1,0.5")
    both = compared(tmp_path / "runs" / "other", run, "--scale", "1,0.5", "--prompt", PROMPT)
    for cell in (("base", None), ("one", 1.0)):
        assert np.array_equal(alone[cell], both[cell]), cell
    with Image.open(next((tmp_path / "runs" / "other" / "samples").glob("step-00000006/*.png"))) as sample:
        assert alike(both["other", 1.0], np.asarray(sample.convert("RGB"), dtype=int))


def test_a_word_that_was_learnt_is_drawn_with(short, compared, tmp_path):
    words = ["token.name=<vase>", "token.learning_rate=0.5", "samples.prompts=[a photo of <vase>]", "samples.every=4"]
    table = tmp_path / "pictures" / "metadata.jsonl"
    table.write_text(table.read_text().replace("sks", "<vase>"))
    assert main(["train", NAME, *short, *words, "checkpoint.every=4", "--id", "word"]) == 0
    cells = compared(tmp_path / "runs" / "word", "--checkpoints")
    for row, step in (("word", 6), ("word step-00000004", 4)):
        with Image.open(tmp_path / "runs" / "word" / "samples" / f"step-{step:08d}" / "00-0.png") as sample:
            assert alike(cells[row, 1.0], np.asarray(sample.convert("RGB"), dtype=int)), row


def test_runs_of_other_sizes_are_refused(run, short, tmp_path, capsys):
    assert main(["train", NAME, *short, "data.resolution=48", "steps=1", "samples.prompts=[]", "--id", "large"]) == 0
    runs = [str(tmp_path / "runs" / name) for name in ("one", "large")]
    assert main(["compare", *runs, "--scale", "0.5,1", "--runs", str(tmp_path / "runs")]) == 2
    assert "data.resolution differs between the runs (32 and 48)" in capsys.readouterr().err


@pytest.mark.parametrize("damage", ["half", "empty", "scalar"])
def test_a_damaged_file_is_refused_in_a_sentence(run, tmp_path, capsys, checkpoint, damage):
    tensors = load_file(run / "result" / LORA_FILE)
    first = next(name for name in tensors if "lora_B" in name)
    if damage == "half":
        del tensors[first]
    save_file(
        {} if damage == "empty" else tensors if damage == "half" else {first: torch.tensor(1.0)},
        tmp_path / "x.safetensors",
    )
    words = [str(tmp_path / "x.safetensors"), "--model", str(checkpoint), "--prompt", PROMPT]
    assert main(["compare", *words, "--runs", str(tmp_path / "runs")]) == 2
    assert "fault" not in capsys.readouterr().err
