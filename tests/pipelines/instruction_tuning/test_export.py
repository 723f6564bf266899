"""A result for others: the adapter or merged weights in a folder, with processor and card, or on the hub."""

import json
from pathlib import Path

import pytest
import torch
from huggingface_hub import ModelCard
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoModelForMultimodalLM, AutoProcessor

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.model import load_model, old_names
from equipoise.pipelines.instruction_tuning.result import load_result
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store

NAME = "instruction_tuning/demo"
RATE = ["learning_rate=1e-2", "schedule=constant", "coordinator=constant"]


@pytest.fixture
def trained(short, sounds):
    def get(kind: str = "llava", *words: str) -> Run:
        given = short(kind, sounds if kind == "qwen2_audio" else None)
        settings = config.load(NAME, [*given, *RATE, *words])
        run = Store(settings.runs).create(settings)
        assert execute(InstructionTuning, settings, run).state == "done"
        return run

    return get


@torch.no_grad()
def logits(model, width: int = 12) -> torch.Tensor:
    """Of text alone, which passes through all of the language model."""
    inner = next(m for name, m in model.named_modules() if name.split(".")[-1] in ("language_model", "text_model"))
    hidden = inner.eval()(input_ids=torch.arange(20, 20 + width)[None])[0]
    if hidden.shape[-1] == inner.get_input_embeddings().num_embeddings:
        return hidden
    return model.get_output_embeddings()(hidden)


def plain_weights(model) -> dict[str, torch.Tensor]:
    return dict(model.state_dict())


@pytest.mark.parametrize(
    ("kind", "words"),
    [
        ("llava", []),
        ("llava", ["lora.dora=true", "lora.modules_to_save=[lm_head]"]),
        ("llava", ["language.method=full"]),
        ("qwen2_vl", ["encoder.method=lora", "model.max_pixels=64"]),
        ("qwen2_audio", []),
        ("paligemma", ["language.method=frozen"]),
        ("blip-2", []),
    ],
)
def test_merged_weights_load_as_any_model_and_are_what_was_learnt(kind, words, trained, tmp_path, checkpoints, capsys):
    run, folder = trained(kind, *words), tmp_path / "merged"
    assert main(["export", str(run.folder), "--format", "merged", "--output", str(folder)]) == 0
    assert capsys.readouterr().out.splitlines()[-1] == str(folder)
    assert not list(folder.glob("*.bin")) and not (folder / "adapter_config.json").exists()
    model = AutoModelForMultimodalLM.from_pretrained(folder)
    tuned = load_result(load_model(run.config().model, "no"), run.result)
    wanted = logits(tuned.base_model.model if isinstance(tuned, PeftModel) else tuned)
    torch.testing.assert_close(logits(model), wanted, rtol=1e-4, atol=1e-4)
    base = plain_weights(AutoModelForMultimodalLM.from_pretrained(checkpoints(kind)))
    now = plain_weights(model)
    assert now.keys() == base.keys() and {name for name in base if not torch.equal(base[name], now[name])}
    processor = AutoProcessor.from_pretrained(folder) if kind not in ("qwen2_vl",) else None
    assert processor is None or processor.tokenizer.encode("red")
    if "model.max_pixels=64" in words:
        size = json.loads((folder / "processor_config.json").read_text())["image_processor"]["size"]
        assert size["longest_edge"] == 64
    card = ModelCard.load(folder / "README.md")
    assert card.data.library_name == "transformers" and str(checkpoints(kind)) not in card.content


def test_answers_of_merged_weights_end_where_those_end_that_were_learnt(trained, tmp_path):
    """By the template's mark, which the base's own settings do not know."""
    run, folder = trained(), tmp_path / "merged"
    assert main(["export", str(run.folder), "--format", "merged", "--output", str(folder)]) == 0
    model, words = AutoModelForMultimodalLM.from_pretrained(folder), AutoProcessor.from_pretrained(folder).tokenizer
    assert words.convert_tokens_to_ids("<|im_end|>") in model.generation_config.eos_token_id


def test_a_tied_head_is_untied_where_factors_are_on_it(tmp_path, pictures):
    words = [
        f"data={pictures}",
        "steps=3",
        "batch=2",
        "samples.count=1",
        "samples.max_new_tokens=1",
        "train.precision=no",
    ]
    run, folder = tmp_path / "runs" / "tied", tmp_path / "merged"
    given = [NAME, "lora.targets=[lm_head]", *RATE, *words, f"runs={tmp_path / 'runs'}", "--id", "tied"]
    assert main(["train", *given]) == 0
    assert main(["export", str(run), "--format", "merged", "--output", str(folder)]) == 0
    model = AutoModelForMultimodalLM.from_pretrained(folder, dtype=torch.float32)
    tuned = load_result(load_model(Run(run).config().model, "no"), run / "result")
    torch.testing.assert_close(logits(model), logits(tuned.base_model.model), rtol=1e-2, atol=1e-2)
    assert model.get_input_embeddings().weight is not model.get_output_embeddings().weight
    assert not torch.equal(model.get_input_embeddings().weight, model.get_output_embeddings().weight)


def test_the_adapter_is_a_folder_that_peft_loads(trained, tmp_path, checkpoints):
    run, folder = trained("llava", "lora.modules_to_save=[lm_head]"), tmp_path / "adapter"
    assert main(["export", str(run.folder), "--output", str(folder)]) == 0  # the usual format
    model = AutoModelForMultimodalLM.from_pretrained(checkpoints("llava"))
    for name in ("encoder", "language"):
        model.load_state_dict(load_file(folder / f"{name}.safetensors"), strict=False)
    with old_names():
        model = PeftModel.from_pretrained(model, folder)
    tuned = load_result(load_model(run.config().model, "no"), run.result)
    assert torch.equal(logits(model.base_model.model), logits(tuned.base_model.model))
    assert AutoProcessor.from_pretrained(folder).tokenizer.encode("red")
    text = (folder / "README.md").read_text()
    assert 'load_file(f"{folder}/encoder.safetensors")' in text and "| lora.rank | 2 |" in text
    for file in folder.glob("*.*"):
        assert str(checkpoints("llava")).encode() not in file.read_bytes(), f"{file.name}: this machine's paths"


def test_what_cannot_be_exported_is_a_sentence_and_leaves_nothing(trained, tmp_path, capsys):
    run = trained()
    (tmp_path / "there").mkdir()
    for words, message in (
        (["--output", str(tmp_path / "there")], "is there already"),
        (["--output", str(tmp_path / "no" / "parent")], "cannot be written"),
        (["--output", str(tmp_path / "x"), "--format", "kohya"], "--format: 'kohya' is none of adapter, merged."),
        ([], "--output: give a new folder, or --push-to-hub REPO."),
    ):
        capsys.readouterr()
        assert main(["export", str(run.folder), *words]) == 2
        assert message in capsys.readouterr().err
    (run.result / "encoder.safetensors").unlink()
    assert main(["export", str(run.folder), "--output", str(tmp_path / "x")]) == 2
    assert "encoder.safetensors: is missing. Put it back" in capsys.readouterr().err
    assert sorted(path.name for path in tmp_path.iterdir()) == ["pictures", "runs", "sounds", "there"]


@pytest.mark.parametrize("format", ["adapter", "merged"])
def test_it_goes_to_the_hub(format, trained, hub):
    run = trained()
    done = hub.push(run.folder, "--private", "--format", format)
    assert done.returncode == 0, done.stderr
    weights = {Path(name).name for name in hub.files if name.endswith(".safetensors")}
    if format == "adapter":
        assert weights == {"adapter_model.safetensors", "encoder.safetensors"}
        assert hub.files["encoder.safetensors"] == (run.result / "encoder.safetensors").read_bytes()
        assert "config.json" not in hub.files
    else:
        assert weights == {"model.safetensors"} and "adapter_config.json" not in hub.files
    assert b"multimodal language model" in hub.files["README.md"] and "processor_config.json" in hub.files
