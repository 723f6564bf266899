"""Families that their pipelines' own code trains: a checkpoint in its real layout, a result that diffusers loads."""

import inspect
import json
import subprocess
import sys
from pathlib import Path

import diffusers
import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.config import TextToImageModel
from equipoise.pipelines.text_to_image.families import autoencoders, family, trained
from equipoise.pipelines.text_to_image.families.flows import FLOWS
from equipoise.pipelines.text_to_image.formats.layout import model_problems
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAMES = list(FLOWS)
PROMPT = "a sks object"
OPTIMIZERS = ("scaled_adamw", "bounded_adamw", "alpha_adam")
DRAW = """
import json, runpy, sys
from safetensors.torch import save_file
draw = runpy.run_path(sys.argv[1])["draw"]
save_file({name: draw(*given) for name, given in json.loads(sys.argv[2]).items()}, sys.argv[3])
"""
FILE = Path(__file__).with_name("flows.py")
pytestmark = [
    pytest.mark.usefixtures("few_draws"),
    pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning"),  # of diffusers, by it
]


@pytest.fixture(scope="module")
def tuned(built, tmp_path_factory, words, few_draws):
    """A run of each family by the command line, with one of our optimizers in turn."""
    runs = tmp_path_factory.mktemp("runs")
    for index, name in enumerate(NAMES):
        method = OPTIMIZERS[index % len(OPTIMIZERS)]
        rate = {"bounded_adamw": 1.0}.get(method, 0.02)
        more = [f"optimizer={method}", f"learning_rate={rate}", "steps=4", f"samples.prompts=[{PROMPT}]"]
        assert main(["train", *words(built(name), runs, *more), "--id", name]) == 0
    return {name: Store(runs).get(name) for name in NAMES}


@pytest.mark.parametrize("name", NAMES)
def test_a_family_has_a_lora_loader_and_a_schedule_of_flow_matching(name):
    theirs, kind = getattr(diffusers, name), family(name)
    assert kind.pipeline == name and kind.noise == "flow" and kind.denoiser in theirs._lora_loadable_modules
    if kind.modular:
        assert {*kind.parts, *kind.text_encoders.values(), "scheduler"} <= set(theirs().pretrained_component_names)
        return
    parts = inspect.signature(theirs.__init__).parameters
    assert {*kind.parts, *kind.text_encoders.values(), *kind.left_out, "scheduler"} <= parts.keys()
    call = inspect.signature(theirs.__call__).parameters
    assert {*kind.captions, *kind.options, kind.strength, "latents", "callback_on_step_end"} <= call.keys()
    assert kind.negative == ("negative_prompt" in call)
    assert call[kind.strength].default == kind.guidance


def test_every_family_learns_and_diffusers_draws_the_very_same_picture_in_another_process(tuned, built, tmp_path):
    wanted = {}
    for name, run in tuned.items():
        kind, result = family(name), json.loads((run.result / "result.json").read_text())
        assert result["state"] == "done" and result["loss_after"] < result["loss_before"], name
        factors = load_file(run.result / LORA_FILE)
        layers = {key.rsplit(".lora_", 1)[0] for key in factors}
        assert all(layer.startswith("transformer.") and layer.endswith(kind.targets) for layer in layers)
        assert all(any(layer.endswith(target) for layer in layers) for target in kind.targets), name
        assert all(tensor.count_nonzero() for tensor in factors.values()), name
        vae = load_base(TextToImageModel(path=str(built(name))), "no").vae
        more = {kind.strength: kind.guidance} | ({"negative_prompt": ""} if kind.negative else {}) | kind.options
        wanted[name] = [str(built(name)), str(run.result), autoencoders.shape(vae, 32, 32), more]
    done = subprocess.run(
        [sys.executable, "-c", DRAW, str(FILE), json.dumps(wanted), str(tmp_path / "drawn.safetensors")],
        capture_output=True,
        text=True,
    )
    assert done.returncode == 0, done.stderr
    drawn = load_file(tmp_path / "drawn.safetensors")
    assert drawn.keys() == tuned.keys()
    for name, theirs in drawn.items():
        with Image.open(tuned[name].folder / "samples" / "step-00000004" / "00-0.png") as sample:
            ours = torch.tensor(list(sample.convert("RGB").tobytes())).int()
        assert (ours - theirs.int()).abs().max() <= 1, name  # two ways of rounding to 8 bits
        assert ours.unique().numel() > 10, name


@pytest.mark.parametrize("name", NAMES)
def test_a_comparison_draws_it_beside_the_untouched_base(name, tuned, tmp_path):
    asked = ["--out", str(tmp_path / "seen"), "--prompt", PROMPT, "--runs", str(tuned[name].root)]
    assert main(["compare", str(tuned[name].folder), *asked]) == 0
    pictures = [picture.read_bytes() for picture in (tmp_path / "seen").rglob("00-0.png")]
    assert len(pictures) == 2 and pictures[0] != pictures[1]


def test_a_card_says_how_a_modular_pipeline_is_called(tuned):
    modular, other = (
        (tuned[name].result / "README.md").read_text() for name in ("AnimaModularPipeline", "SanaPipeline")
    )
    assert "pipe.load_components()\n" in modular and 'output="images")[0].save("picture.png")' in modular
    assert "load_components" not in other and ').images[0].save("picture.png")' in other


def test_what_is_not_known_is_refused_in_a_sentence(built, tuned, tmp_path, capsys):
    folder = tmp_path / "other"
    folder.mkdir()
    (folder / "model_index.json").write_text(json.dumps({"_class_name": "WanPipeline"}))
    (problem,) = model_problems(str(folder))
    assert problem.startswith(f"model.path: {folder} is a WanPipeline; this pipeline tunes Stable Diffusion 1.x")
    assert all(name in problem for name in trained())
    capsys.readouterr()
    out = ["--output", str(tmp_path / "file.safetensors")]
    assert main(["export", str(tuned["SanaPipeline"].folder), "--format", "kohya", *out]) == 2
    said = "--format: what kohya's scripts call the layers of Sana is not known here. Give --format diffusers."
    assert said in capsys.readouterr().err


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_and_resumed_runs_end_alike(name, tuned, tmp_path, stopped_run):
    given = config.set_keys(tuned[name].config(), {"runs": str(tmp_path), "samples.prompts": []}, source="test")
    checkpointed = config.set_keys(given, {"train.gradient_checkpointing": True}, source="test")
    runs = [stopped_run(TextToImage, given, 2), Store(tmp_path).create(checkpointed)]
    assert all(execute(TextToImage, run.config(), run).state == "done" for run in runs)
    plain, gone_on, recomputed = (load_file(run.result / LORA_FILE) for run in (tuned[name], *runs))
    assert all(torch.equal(plain[key], gone_on[key]) for key in plain)
    assert all(torch.allclose(plain[key], recomputed[key], atol=1e-5) for key in plain)


@pytest.mark.soak  # two minutes
def test_the_tables_of_the_docs_are_what_the_command_prints():
    root = Path(__file__).parents[3]
    command = [sys.executable, str(root / "benchmarks" / "picture_families.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    docs = (root / "docs" / "text_to_image.md").read_text()
    first, second = done.stdout.strip().split("\n\n")
    assert first in docs and second in docs
