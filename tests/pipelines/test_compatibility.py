"""What every version has written is listed, loaded, compared and resumed; what a later one wrote is left alone.

The folders in tests/fixtures/formats were written by the versions that wrote those formats, and are never made anew.
"""

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.config.format import FORMAT
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.runs.run import FOLDERS
from equipoise.pipelines.runs.store import Store

FORMATS = Path(__file__).parents[1] / "fixtures" / "formats"
STATES = {"done": "done", "stopped": "stopped", "pictures": "stopped", "answers": "stopped", "grid": "done"}
CELLS = {"grid/seed=0": "done", "grid/seed=1": "done"}


def bare(runs: Path) -> None:
    """As they were before anything bore a version."""
    for file in [*runs.rglob("config.yaml")]:
        file.write_text(file.read_text().replace("format: 1\n", "", 1))
    for file in runs.rglob("status.json"):
        found = json.loads(file.read_text())
        del found["format"], found["token"]
        file.write_text(json.dumps(found))
    for file in runs.rglob("state.json"):
        found = json.loads(file.read_text())
        del found["format"], found["run"], found["seal"]
        file.write_text(json.dumps(found))


@pytest.fixture(params=["bare", *(f"v{number}" for number in range(1, FORMAT + 1))])
def runs(request, tmp_path, monkeypatch) -> Path:
    """A copy of the runs of a format, in a working folder with the clips that they were trained on."""
    made = "v1" if request.param == "bare" else request.param
    shutil.copytree(FORMATS / made, tmp_path / "runs")
    shutil.copytree(FORMATS / "clips", tmp_path / "clips")
    if request.param == "bare":
        bare(tmp_path / "runs")
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)
    return tmp_path / "runs"


def test_old_runs_are_listed_and_read(runs, capsys):
    store = Store(runs)
    assert {item.id: item.state for item in store.list(kinds=("run", "sweep", "cell"))} == STATES | CELLS
    for id in STATES | CELLS:
        run = store.get(id, kinds=("run", "sweep", "cell"))
        assert run.config().seed == (1 if id.endswith("1") else 0)
        configs.load(run.folder / "config.yaml")
        total = 0 if id == "grid" else 3 if (STATES | CELLS)[id] == "stopped" else 6
        assert [record["step"] for record in run.metrics()] == list(range(1, total + 1))
        assert run.status().token or run.status().format == 1
    assert [cell.id for cell in sweeps.cells(store.get("grid"))] == list(CELLS)
    assert main(["runs", "--all"]) == 0 and capsys.readouterr().out.count("done") >= 4
    assert main(["logs", "stopped"]) == 0 and "saved step 3" in capsys.readouterr().out


def test_old_runs_are_resumed(runs):
    assert not all((runs / "stopped" / name).is_dir() for name in FOLDERS), "git keeps none that is empty"
    assert main(["resume", "stopped"]) == 0
    run = Store(runs).get("stopped")
    assert "resumed from step-00000003" in run.log_file.read_text() and run.status().state == "done"
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4, 5, 6]
    whole, resumed = (load_file(runs / id / "result" / "model.safetensors") for id in ("done", "stopped"))
    assert whole.keys() == resumed.keys()
    first = "encoders.visual.net.embedder.embedder."
    # Adding to the first filters changes only the mean that normalization takes away: so rounding alone moves them.
    free = (f"{first}convolution.weight", f"{first}normalization.running_mean")
    for name in whole.keys() - set(free):
        assert torch.allclose(whole[name], resumed[name], atol=1e-4), "to how torch's versions and processors round"


def test_old_runs_are_compared(runs):
    assert main(["compare", "grid", "done", "--out", "compared"]) == 0
    table = json.loads(Path("compared", "table.json").read_text())
    assert len([cell for cell in table["cells"] if cell["state"] == "done"]) == 3


@pytest.mark.parametrize("id", ["pictures", "answers"])
def test_old_runs_of_the_embedded_models_are_resumed(id, runs, capfd):
    (checkpoint,) = checkpoints.complete(runs / id / "checkpoints")
    step, weights, state = checkpoints.load(checkpoint)
    assert step == 3 and weights and state["optimizer"]["state"]
    code, err = main(["resume", id]), capfd.readouterr().err
    if code:  # the embedded model was made anew since
        assert code == 2 and "its frozen weights are not those" in err
        pytest.skip("the embedded model was made anew since; its checkpoint is read")
    assert [record["step"] for record in Store(runs).get(id).metrics()][:4] == [1, 2, 3, 4]
    if id == "pictures":
        assert main(["export", id, "--format", "kohya", "--output", "kohya.safetensors"]) == 0
    else:
        assert json.loads((runs / id / "result" / "result.json").read_text())


@pytest.mark.parametrize("of", ["config.yaml", "status.json", "state.json"])
def test_what_a_later_version_wrote_is_left_alone(runs, of, capfd):
    (file,) = (runs / "stopped").rglob(of)
    if of == "config.yaml":
        text = file.read_text()
        file.write_text(f"format: {FORMAT + 1}\n" + text[text.startswith("format: ") and text.index("\n") + 1 :])
    else:
        found = {**json.loads(file.read_text()), "format": FORMAT + 1}
        found.pop("seal", None)
        file.write_text(json.dumps(found | ({"seal": checkpoints._seal(found)} if of == "state.json" else {})))
    before = file.read_bytes()
    assert main(["resume", "stopped"]) == 2
    said = capfd.readouterr().err.strip().splitlines()[-1]
    assert "was written by a later version of Equipoise" in said and said.endswith("pip install --upgrade equipoise.")
    assert file.read_bytes() == before
    assert {item.id for item in Store(runs).list()} == set(STATES), "the others are there as ever"


@pytest.mark.parametrize("number", ["0", "x", "1.5", "true", "null"])
def test_what_is_no_version(number, tmp_path):
    file = tmp_path / "a.yaml"
    file.write_text(f"format: {number}\npipeline: text_to_image\nname: a\n")
    with pytest.raises(InputError, match="format must be a whole number from 1 on"):
        configs.load(file)
