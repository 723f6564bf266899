"""The third-party plugin in the documentation, built, installed and used as its reader would."""

import json
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

from equipoise.pipelines import demo

DOCS = Path(__file__).parent.parent / "docs"
TRAIN = """
import json
import torch
from equipoise import registry
from equipoise.balancing.objective import Losses
from equipoise.options import read_options

torch.set_num_threads(1)
torch.manual_seed(0)
Signum, WorstModality = registry.load("optimizers", "signum"), registry.load("objectives", "worst_modality")
inputs = {"audio": torch.randn(64, 4), "video": torch.randn(64, 4)}
truth = sum(x.sum(1) for x in inputs.values())
heads = torch.nn.ModuleDict({name: torch.nn.Linear(4, 1) for name in inputs})
optimizer, objective = Signum(heads.named_parameters(), lr=1e-2), WorstModality(weight=0.5)

history = []
for _ in range(150):
    outputs = {name: heads[name](x)[:, 0] for name, x in inputs.items()}
    unimodal = {name: torch.nn.functional.mse_loss(out, truth / 2) for name, out in outputs.items()}
    losses = Losses(torch.nn.functional.mse_loss(sum(outputs.values()), truth), unimodal)
    optimizer.zero_grad()
    objective.backward(losses)
    optimizer.step()
    history.append(losses.joint.item())
import equipoise_example
problems = read_options(Signum, {"momentum": 1.5})[1] + read_options(WorstModality, {"wieght": 1})[1]
print(json.dumps({"file": equipoise_example.__file__, "first": history[0], "last": history[-1], "problems": problems}))
"""


@pytest.mark.parametrize("name", sorted(file.name for file in (DOCS / "example_plugin").glob("*.*")))
def test_the_page_quotes_the_files(name):
    text = (DOCS / "example_plugin" / name).read_text()
    kind = {"toml": "toml", "py": "python"}[name.rpartition(".")[2]]
    assert f"```{kind}\n{text}```\n" in (DOCS / "plugins.md").read_text()


@pytest.mark.slow
def test_it_is_built_installed_found_and_trains(tmp_path, environment):
    shutil.copytree(DOCS / "example_plugin", tmp_path / "source", ignore=shutil.ignore_patterns("__pycache__"))
    build = [sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "--no-index", "--no-build-isolation"]
    subprocess.run([*build, "-w", tmp_path, tmp_path / "source"], check=True)
    (wheel,) = tmp_path.glob("*.whl")
    python = environment(wheel, editable=True)

    def run(*words):
        done = subprocess.run([python, *words], capture_output=True, text=True, cwd=tmp_path)
        assert done.returncode == 0, done.stderr
        return done.stdout

    listed = {r["name"]: r for r in json.loads(run("-m", "equipoise.pipelines.cli", "list", "--json"))}
    assert "scaled_adamw" in listed
    for name, kind in {
        "signum": "optimizers",
        "worst_modality": "objectives",
        "loss": "commands",
        "StableDiffusionPAGPipeline": "families",
    }.items():
        record = listed[name]
        assert (record["kind"], record["distribution"], record["version"]) == (kind, "equipoise-example", "1.0.0")
        assert record["error"] == ""
    shown = run("-m", "equipoise.pipelines.cli", "show", "signum")
    assert "0 <= x < 1" in shown and "arXiv:1802.04434" in shown

    result = json.loads(run("-c", TRAIN))
    assert Path(result["file"]).is_relative_to(tmp_path / "environment")
    assert result["last"] < 0.05 * result["first"]
    assert result["problems"][0] == "momentum: must be a number with 0 <= x < 1, got 1.5."
    assert result["problems"][1].startswith("wieght: no such option. Did you mean 'weight'?")

    words = [
        "model=demo",
        "data=demo",
        "steps=3",
        "optimizer=signum",
        "objective=worst_modality",
        "objective.options={weight: 2}",
        "prior.prompt=null",
    ]
    trained = run(
        "-m", "equipoise.pipelines.cli", "train", "text_to_image/demo", *words, "samples.prompts=[]", "--id", "plugged"
    )
    assert "plugged: done" in trained
    (metrics,) = (tmp_path / "runs" / "plugged").glob("metrics.jsonl")
    assert len(metrics.read_text().splitlines()) == 3

    assert "the last loss that a run has written down (equipoise-example 1.0.0)" in run(
        "-m", "equipoise.pipelines.cli", "--help"
    )
    last = json.loads(metrics.read_text().splitlines()[-1])["loss"]
    assert run("-m", "equipoise.pipelines.cli", "loss", "plugged") == f"{last:.4g}\n"

    base = shutil.copytree(demo.base_folder(), tmp_path / "base")
    index = json.loads((base / "model_index.json").read_text())
    (base / "model_index.json").write_text(json.dumps(index | {"_class_name": "StableDiffusionPAGPipeline"}))
    words = [
        "model=base",
        "data=demo",
        "steps=1",
        "samples.prompts=[a vase]",
        "samples.steps=2",
        "prior.prompt=null",
        "--id",
        "perturbed",
    ]
    assert "perturbed: done" in run("-m", "equipoise.pipelines.cli", "train", "text_to_image/demo", *words)
