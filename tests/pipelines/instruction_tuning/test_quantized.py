"""A language model in 4 or 8 bits (QLoRA), really trained on the CPU; where bitsandbytes is absent, what is refused."""

import copy
import importlib.util
import json
import shutil
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from peft import PeftModel
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMultimodalLM

from equipoise.errors import ConfigError
from equipoise.lora.frozen import weight_norms
from equipoise.lora.pairs import find_pairs
from equipoise.optimizers.bounded import bounded
from equipoise.optimizers.scaled import scaled
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning import quantized as quantized_layers
from equipoise.pipelines.instruction_tuning.memory import estimate_memory
from equipoise.pipelines.instruction_tuning.model import adapt, load_model, old_names, outline
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.training.quantized import BYTES

NAME = "instruction_tuning/demo"
THERE = importlib.util.find_spec("bitsandbytes") is not None
needed = pytest.mark.skipif(not THERE, reason="needs bitsandbytes")


@pytest.fixture
def wide(checkpoints, tmp_path) -> Path:
    """A LLaVA whose language model's layers are whole blocks of nf4."""
    folder = tmp_path / "wide"
    shutil.copytree(checkpoints("llava"), folder)
    described = AutoConfig.from_pretrained(folder)
    described.text_config.hidden_size, described.text_config.intermediate_size = 64, 128
    described.text_config.head_dim = 16
    torch.manual_seed(0)
    AutoModelForMultimodalLM.from_config(described).save_pretrained(folder)
    return folder


@pytest.fixture
def short(short, wide) -> Callable[[], list[str]]:
    def words() -> list[str]:
        return [word for word in short() if not word.startswith("model=")] + [f"model={wide}"]

    return words


def test_absent_bitsandbytes_is_refused_in_a_sentence(short, monkeypatch):
    real = importlib.util.find_spec
    absent = "equipoise.pipelines.training.quantized.find_spec"
    monkeypatch.setattr(absent, lambda name: None if name == "bitsandbytes" else real(name))
    assert InstructionTuning.check(config.load(NAME, [*short(), "model.quantize=nf4"])) == [
        "model.quantize: nf4 needs the package bitsandbytes. pip install 'equipoise[quantized]'."
    ]


def test_what_is_trained_in_full_is_not_in_fewer_bits(short):
    with pytest.raises(ConfigError, match=r"model.quantize is for frozen weights: nf4 cannot be trained in full"):
        config.load(NAME, [*short(), "model.quantize=nf4", "language.method=full"])
    words = [*short(), "model.quantize=int8", "lora.modules_to_save=[layers.1]"]
    found = InstructionTuning.check(config.load(NAME, words))
    assert any("layers.1" in text and "is held in int8, and cannot be trained in full" in text for text in found)
    head = config.load(NAME, [*short(), "model.quantize=int8", "lora.modules_to_save=[lm_head]"])
    assert outline(head).language_weights, "the head is not held in fewer bits, and may be"


@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_the_estimate_of_memory_follows(how, short):
    whole, fewer = (estimate_memory(config.load(NAME, [*short(), *words])) for words in ([], [f"model.quantize={how}"]))
    tuned = outline(config.load(NAME, short()))
    modules = dict(tuned.plain.named_modules())
    numbers = sum(modules[name].weight.numel() for name in quantized_layers.layers(tuned.plain, tuned.parts, how))
    assert whole is not None and fewer is not None and numbers
    assert whole.model - fewer.model == round(numbers * (4 - BYTES[how]))
    assert whole.training == fewer.training


def test_layers_in_fewer_bits_are_the_language_models_alone(checkpoints):
    for kind in ("llava", "qwen2_vl", "blip-2", "qwen3_vl_moe"):
        tuned = outline(config.load(NAME, [f"model={checkpoints(kind)}"]))
        held = quantized_layers.layers(tuned.plain, tuned.parts, "int8")
        assert held and all(tuned.parts.part(name) == "language" for name in held)
        assert not any("lm_head" in name or name.endswith(".gate") or "lora_" in name for name in held)


@needed
@pytest.mark.parametrize("how", ["nf4", "int8"])
@pytest.mark.parametrize("optimizer", ["adamw", "bounded_adamw", "scaled_adamw"])
def test_a_run_in_fewer_bits_learns_and_its_adapter_loads_on_the_whole_base(how, optimizer, short, wide, tmp_path):
    rate = "learning_rate=" if optimizer == "bounded_adamw" else "learning_rate=1e-2"
    words = [*short(), f"model.quantize={how}", f"optimizer={optimizer}", rate, "steps=12", "schedule=constant"]
    assert main(["train", NAME, *words, "--id", "few"]) == 0
    run = Store(tmp_path / "runs").get("few")
    said = json.loads((run.result / "result.json").read_text())
    assert said["loss_after"] < said["loss_before"] - 0.05
    base = AutoModelForMultimodalLM.from_pretrained(wide)
    base.load_state_dict(load_file(run.result / "encoder.safetensors"), strict=False)
    with old_names():
        model = PeftModel.from_pretrained(base, run.result)
    assert any(tensor.any() for name, tensor in model.named_parameters() if "lora_B" in name)
    assert main(["export", str(run.folder), "--format", "merged", "--output", str(tmp_path / "merged")]) == 0
    merged = AutoModelForMultimodalLM.from_pretrained(tmp_path / "merged")
    assert not getattr(merged.config, "quantization_config", None)
    assert {p.dtype for p in merged.parameters()} == {torch.float32}


@needed
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_only_the_language_models_layers_are_held_so_and_gradients_go_through_them(how, short):
    import bitsandbytes

    settings = config.load(NAME, [*short(), f"model.quantize={how}"])
    tuned = adapt(load_model(settings.model, "no"), settings)
    kind = {"nf4": bitsandbytes.nn.Linear4bit, "int8": bitsandbytes.nn.Linear8bitLt}[how]
    held = {n for n, m in tuned.plain.named_modules() if isinstance(m, kind)}
    assert held == set(quantized_layers.layers(tuned.plain, tuned.parts, how))
    assert tuned.encoder_weights and all(p.dtype == torch.float32 for p in tuned.named.values())
    decoder, width = tuned.plain.get_decoder(), tuned.plain.config.get_text_config().hidden_size
    with torch.no_grad():  # bitsandbytes would here put the weights into a form without gradients
        decoder.eval()(inputs_embeds=torch.randn(1, 3, width))
    given = torch.randn(2, 5, width, requires_grad=True)
    made = decoder.train()(inputs_embeds=given, use_cache=False).last_hidden_state
    made[..., 0].square().sum().backward()
    assert given.grad is not None and given.grad.abs().sum() > 0
    step = 1e-2 * given.grad / given.grad.norm()
    ahead, behind = (
        decoder(inputs_embeds=given + sign * step, use_cache=False).last_hidden_state[..., 0].square().sum()
        for sign in (1, -1)
    )
    if how == "nf4":  # a layer's input is not rounded, so that differences are those of the gradient
        assert ((ahead - behind) / 2).item() == pytest.approx((given.grad * step).sum().item(), rel=0.05)


@needed
@pytest.mark.parametrize("how", ["nf4", "int8"])
def test_a_bound_has_the_norm_of_the_weights_as_they_were_rounded(how, short):
    settings = config.load(NAME, [*short(), f"model.quantize={how}"])
    plain = config.load(NAME, short())
    norms = []
    for chosen in (settings, plain):
        tuned = adapt(load_model(chosen.model, "no"), chosen)
        pairs = list(find_pairs(tuned.model))
        norms.append([under.norm for under in weight_norms(pairs, tuned.model)])
        width = tuned.plain.config.get_text_config().hidden_size
        tuned.plain.get_decoder()(inputs_embeds=torch.randn(1, 2, width))  # after which the scales lie elsewhere
        assert [under.norm for under in weight_norms(pairs, tuned.model)] == norms[-1]
    assert norms[0] == pytest.approx(norms[1], rel=0.05) and norms[0] != norms[1]


@needed
@pytest.mark.parametrize("wrap", [bounded, scaled])
def test_optimizers_in_eight_bits_are_bases_and_resume_exactly(wrap):
    import bitsandbytes
    from peft import LoraConfig, get_peft_model

    torch.manual_seed(0)
    model = get_peft_model(torch.nn.Sequential(torch.nn.Linear(1024, 512)), LoraConfig(r=8, target_modules=["0"]))
    named = [(name, p) for name, p in model.named_parameters() if p.requires_grad]
    rows, wanted = torch.randn(16, 1024), torch.randn(16, 512)

    def steps(optimizer, count: int) -> list[float]:
        losses = []
        for _ in range(count):
            loss = (model(rows) - wanted).square().mean()
            loss.backward()
            optimizer.step()
            optimizer.zero_grad()
            losses.append(loss.item())
        return losses

    kind = wrap(bitsandbytes.optim.AdamW8bit)
    first = kind(named, lr=1e-2)
    losses = steps(first, 10)
    assert losses[-1] < losses[0]
    assert first.state[named[0][1]]["state1"].dtype == torch.uint8
    state, weights = copy.deepcopy(first.state_dict()), [p.detach().clone() for _, p in named]
    going_on = steps(first, 3)
    for (_, parameter), before in zip(named, weights, strict=True):
        parameter.data.copy_(before)
    second = kind(named, lr=1e-2)
    second.load_state_dict(state)
    assert steps(second, 3) == going_on


@needed
def test_a_run_in_fewer_bits_resumes_exactly(short, stopped_run):
    settings = config.load(NAME, [*short(), "model.quantize=nf4", "learning_rate=1e-2"])
    whole = Store(settings.runs).create(settings)
    assert execute(InstructionTuning, settings, whole).state == "done"
    run = stopped_run(InstructionTuning, settings, at=4)
    assert execute(InstructionTuning, settings, run).state == "done"
    left, right = (load_file(one.result / "adapter_model.safetensors") for one in (whole, run))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
