"""Another program's training as runs of a sweep: real processes, their files, and how they are judged."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import psutil
import pytest
from safetensors.torch import load_file

from equipoise.errors import InputError
from equipoise.pipelines.cli import main
from equipoise.pipelines.text_to_image.foreign import FOLDER, LOG, lora_file
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAME = "text_to_image/dreambooth"
TRAINER = Path(__file__).with_name("trainer.py")
COMMAND = f"{sys.executable} {TRAINER} --base {{model}} --images {{data}} --lr {{learning_rate}} --out {{output}}"
PROMPTS = "samples.prompts=[a photo of sks object]"


@pytest.fixture
def words(short):
    return [NAME, *short, PROMPTS, "data.instance_prompt=a photo of sks object"]


def deltas(folder: Path, scale: float) -> dict:
    """ΔW by layer of a LoRA file in diffusers' names, the old ones or the new."""
    file, found = load_file(folder / LORA_FILE), {}
    for down, up in ((".lora_A.weight", ".lora_B.weight"), (".lora.down.weight", ".lora.up.weight")):
        for name in file:
            if name.endswith(down):
                layer = name.removesuffix(down)
                found[layer] = scale * file[layer + up] @ file[name]
    return found


def test_a_sweep_of_another_trainer_is_judged_and_compared_like_ones_own(words, tmp_path):
    rates = "learning_rate=1e-6,1e-3"
    assert main(["sweep", *words, "--axis", rates, "--script", f"{COMMAND} --seed {{seed}}", "--id", "theirs"]) == 0
    table = json.loads((tmp_path / "runs/theirs/comparison/table.json").read_text())
    cells = {cell["learning_rate"]: cell for cell in table["cells"]}
    assert {cell["row"] for cell in table["cells"]} == {"base", "trainer"} and set(cells) == {None, 1e-6, 1e-3}
    before = cells[None]["metrics"]["loss_before"]
    after = {rate: cells[rate]["metrics"]["loss_after"] for rate in (1e-6, 1e-3)}
    assert after[1e-3] < 0.999 * after[1e-6] and after[1e-6] == pytest.approx(before, rel=1e-4), (
        "what each rate learnt, by one measure"
    )
    assert all(cells[rate]["pictures"] for rate in cells)
    run = tmp_path / "runs/theirs/learning_rate=0.001"
    ours, theirs = deltas(run / "result", 1.0), deltas(run / FOLDER, 6 / 3)
    assert ours.keys() == theirs.keys() and len(ours) > 4
    assert all((ours[name] - theirs[name]).abs().max() < 1e-6 for name in ours), "the same update, alpha within it"
    described = json.loads((run / "result/result.json").read_text())
    assert described["learning_rate"] == 0.001 and described["rank"] == 3 and "trainer.py" in described["script"]
    assert json.loads((run / "status.json").read_text())["step"] == 6, "it is through, as the list of runs shows it"
    assert described["optimizer"] is None and described["schedule"] is None, "nothing is claimed that nobody knows"
    assert "step 12 of 12" in (run / LOG).read_text()

    own = ["learning_rate=1e-2", "optimizer=adamw", "--id", "ours"]
    assert main(["train", *words, *own]) == 0
    mine = json.loads((tmp_path / "runs/ours/result/result.json").read_text())
    assert mine["loss_before"] == pytest.approx(before, rel=1e-5), "one's own runs are judged by the same draws"
    file, runs = str(tmp_path / "k.safetensors"), str(tmp_path / "runs")
    words = ["export", "theirs/learning_rate=0.001", "--format", "kohya", "--output", file, "--runs", runs]
    assert main(words) == 0 and Path(file).is_file()


def test_a_command_that_fails_is_a_failed_cell_with_its_last_words(words, tmp_path, capsys):
    assert main(["train", *words, "learning_rate=1e-3", f"script={COMMAND} --fail", "--id", "one"]) == 1
    said = capsys.readouterr().err
    assert "script: python" in said and "ended with exit code 1" in said and "trainer.py: out of luck" in said
    assert "Traceback" not in said
    assert json.loads((tmp_path / "runs/one/status.json").read_text())["state"] == "failed"
    silent = f"{sys.executable} -c pass {{learning_rate}} {{output}}"
    assert main(["train", *words, "learning_rate=1e-3", f"script={silent}", "--id", "two"]) == 1
    assert "has left no .safetensors file in" in capsys.readouterr().err
    (tmp_path / "runs/two" / FOLDER / "other.safetensors").write_bytes(b"no tensors")
    assert main(["resume", str(tmp_path / "runs/two")]) == 1, "what was trained stays, whatever is wrong with it"
    assert "other.safetensors" in capsys.readouterr().err


@pytest.mark.parametrize(
    ("command", "message"),
    [
        (f"{sys.executable} a.py --lr {{learning_rate}}", "script: has no {output}. Write it where the command takes"),
        (f"{sys.executable} a.py {{output}}", "script: has no {learning_rate}."),
        (f"{sys.executable} {{output}} {{learning_rate}} {{rnk}}", "script: {rnk}: is no key of the configuration."),
        (f"{sys.executable} {{output}} {{learning_rate}} {{model.revision}}", "{model.revision}: is empty here."),
        ("nothing-of-that-name {output} {learning_rate}", "script: there is no program nothing-of-that-name here."),
        ("python 'a {output} {learning_rate}", "script: cannot be read as a command"),
    ],
)
def test_a_command_that_cannot_work_is_refused_before_anything_runs(command, message, words, tmp_path, capsys):
    assert main(["train", *words, "learning_rate=1e-3", f"script={json.dumps(command)}", "--dry-run"]) == 2
    assert message in capsys.readouterr().err
    assert not (tmp_path / "runs").exists() or not list((tmp_path / "runs").glob("2*"))


def test_a_file_of_an_earlier_start_is_not_taken_for_a_later_ones(tmp_path):
    (tmp_path / "old.safetensors").write_bytes(b"")
    os.utime(tmp_path / "old.safetensors", (1000, 1000))
    with pytest.raises(InputError, match=r"has left no \.safetensors"):
        lora_file(tmp_path, 2000.0)
    assert lora_file(tmp_path, 1000.0).name == "old.safetensors"


def waiting(words, id: str) -> tuple[subprocess.Popen, psutil.Process]:
    """A run in a process of its own, and its trainer, which a launcher has started and which waits."""
    launched = f"sh -c '{COMMAND} --wait & wait'"
    command = f"script={json.dumps(launched)}"
    started = [sys.executable, "-m", "equipoise.pipelines.cli", "train", *words, "learning_rate=1e-3", command]
    process = subprocess.Popen([*started, "--id", id], stderr=subprocess.PIPE, text=True)
    assert process.stderr
    while "waiting" not in (line := process.stderr.readline()):
        assert line, "the run ended"
    (trainer,) = (child for child in psutil.Process(process.pid).children(recursive=True) if "python" in child.name())
    return process, trainer


def gone(process: psutil.Process) -> bool:
    for _ in range(200):
        if not process.is_running() or process.status() == psutil.STATUS_ZOMBIE:
            return True
        time.sleep(0.05)
    return False


def test_a_stop_reaches_the_command_and_resume_runs_it_anew(words, tmp_path):
    process, trainer = waiting(words, "one")
    process.send_signal(signal.SIGTERM)
    process.communicate(timeout=60)
    assert gone(trainer)
    run = tmp_path / "runs" / "one"
    assert json.loads((run / "status.json").read_text())["state"] == "stopped"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(" --wait", ""))
    assert main(["resume", str(run)]) == 0
    assert json.loads((run / "status.json").read_text())["state"] == "done" and (run / "result" / LORA_FILE).is_file()


def test_a_killed_runs_trainer_is_ended_before_another_writes_into_its_folder(words, tmp_path):
    process, trainer = waiting(words, "one")
    os.kill(process.pid, signal.SIGKILL)
    process.communicate(timeout=60)
    run = tmp_path / "runs" / "one"
    config = run / "config.yaml"
    config.write_text(config.read_text().replace(" --wait & wait", ""))
    assert main(["resume", str(run)]) == 0
    assert gone(trainer) and (run / "result" / LORA_FILE).is_file()
