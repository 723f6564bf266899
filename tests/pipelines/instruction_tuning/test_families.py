"""The families of today, from a saved checkpoint by the command line to a result that is loaded as the docs say."""

import json
import runpy
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoConfig, AutoModelForMultimodalLM
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning.config import InstructionTuningModel
from equipoise.pipelines.instruction_tuning.model import adapt, load_processor

COMMAND = runpy.run_path(str(Path(__file__).parents[3] / "benchmarks" / "families.py"))
ONE, TWO = "encoder, language", "audio, language, vision"
FAMILIES = {  # that need no further package: what they take and how it is split
    "qwen3_vl": (["image"], ONE),
    "qwen3_vl_moe": (["image"], ONE),
    "qwen3_5": (["image"], ONE),
    "qwen3_5_moe": (["image"], ONE),
    "qwen2_5_omni": (["image", "audio"], TWO),
    "qwen3_omni": (["image", "audio"], TWO),
    "gemma3": (["image"], ONE),
    "gemma4": (["image", "audio"], TWO),
    "internvl": (["image"], ONE),
    "glm46v": (["image"], ONE),
    "llava_onevision": (["image"], ONE),
    "aya_vision": (["image"], ONE),
    "smolvlm2": (["image"], ONE),
    "minicpm_v": (["image"], ONE),
    "ovis2": (["image"], ONE),
}


@pytest.fixture
def data(pictures, sounds):
    return {"image": pictures, "audio": sounds}


@pytest.mark.parametrize("kind", FAMILIES)
def test_every_family_is_trained_and_comes_back(kind, checkpoints, data, tmp_path):
    """The self-check passes, κ is measured, and what is loaded has the loss that the run ended at, by its own loss."""
    found = COMMAND["rows"](kind, lambda *_: checkpoints(kind), data, tmp_path)
    media, components = FAMILIES[kind]
    assert [row[1:3] for row in found] == [[medium, components] for medium in media]
    assert all(float(kappa) > 0 and loaded == "yes" for *_, kappa, loaded in found), found


@pytest.mark.parametrize(
    ("kind", "reason"),
    [
        ("florence2", "this florence2 has a language model with an encoder of its own"),
        ("voxtral", "makes tokens of a conversation by itself and takes no media beside a text"),
    ],
)
def test_what_is_refused_is_refused_in_a_sentence(kind, reason, checkpoints, data, tmp_path):
    ((_, _, said, *_),) = COMMAND["rows"](kind, lambda *_: checkpoints(kind), data, tmp_path)
    assert said.startswith("refused: ") and reason in said


def test_the_side_that_no_media_reach_stays_as_it_is(checkpoints, pictures, tmp_path):
    folder = checkpoints("gemma4")
    words = [f"model={folder}", f"data={pictures}", "steps=2", "rank=2", "samples.max_new_tokens=1"]
    assert main(["train", "instruction_tuning/demo", *words, f"runs={tmp_path}", "--id", "seen"]) == 0
    moved = load_file(tmp_path / "seen" / "result" / "encoder.safetensors")
    base = AutoModelForMultimodalLM.from_pretrained(folder).state_dict()
    assert {name.split(".")[1] for name in moved} == {"embed_vision", "embed_audio"}
    assert {name.split(".")[1] for name in moved if not torch.equal(moved[name], base[name])} == {"embed_vision"}


def test_an_omnis_thinker_that_was_saved_alone(checkpoints, data, tmp_path):
    """As a result is that was merged and saved."""
    whole, alone = checkpoints("qwen2_5_omni"), tmp_path / "thinker"
    thinker = AutoConfig.from_pretrained(whole).thinker_config
    AutoModelForMultimodalLM.from_pretrained(whole, config=thinker).save_pretrained(alone)
    load_processor(InstructionTuningModel(path=str(whole))).save_pretrained(alone)
    assert json.loads((alone / "config.json").read_text())["model_type"] == "qwen2_5_omni_thinker"
    found = COMMAND["rows"]("thinker", lambda *_: alone, data, tmp_path)
    assert [row[-1] for row in found] == ["yes", "yes"]


def test_a_rate_for_each_tower(checkpoints):
    words = [f"model={checkpoints('qwen2_5_omni')}", "optimizer.rates={encoder: 1e-5}"]
    with torch.device("meta"):
        described = CONFIG_MAPPING["qwen2_5_omni_thinker"].from_pretrained(checkpoints("qwen2_5_omni"))
        model = AutoModelForMultimodalLM.from_config(described).requires_grad_(False)
        with pytest.raises(InputError, match=r"rates: encoder: no such component. There are audio, vision, language"):
            adapt(model, config.load("instruction_tuning/demo", words))


@pytest.mark.parametrize("kind", ["llama4", "qwen3_vl_moe", "qwen3_5_moe", "glm4v_moe", "ernie4_5_vl_moe"])
def test_no_router_of_experts_gets_factors(kind):
    """Llama 4's is a linear layer that gives two tensors; the shared expert beside it is a layer like any."""
    text = {"num_hidden_layers": 2} | ({"layer_types": ["full_attention"] * 2} if kind == "qwen3_5_moe" else {})
    described = CONFIG_MAPPING[kind](text_config=text)
    settings = config.load("instruction_tuning/demo", ["coordinator=constant"])
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(described).requires_grad_(False)
        factors = list(adapt(model, settings).components["language"])
        with pytest.raises(InputError, match=r"lora.targets: (router|gate)"):
            adapt(model, config.set_keys(settings, {"lora.targets": ["router" if kind == "llama4" else "gate"]}))
    assert factors and not [name for name in factors if ".router." in name or ".gate." in name or "_gate." in name]
    assert any(".shared_expert" in name for name in factors) == (kind not in ("qwen3_vl_moe", "glm4v_moe"))


def test_layers_that_peft_takes_for_experts_get_no_factors():
    """It would put them on all the experts' weights, at another rank, and not on the layers that were named."""
    described = CONFIG_MAPPING["glm4v_moe"](text_config={"num_hidden_layers": 2})
    settings = config.load("instruction_tuning/demo", ["rank=4"])
    with torch.device("meta"):
        model = AutoModelForMultimodalLM.from_config(described).requires_grad_(False)
        tuned = adapt(model, settings)
        other = AutoModelForMultimodalLM.from_config(described).requires_grad_(False)
        named = config.set_keys(settings, {"lora.targets": ["q_proj", "up_proj", "down_proj"]})
        with pytest.raises(InputError, match=r"lora.targets: peft would put .* Leave out down_proj, up_proj"):
            adapt(other, named)
    assert {name.split(".lora_")[0].split(".")[-2] for name in tuned.components["language"]} == {"self_attn"}
    assert {tensor.shape[0] for name, tensor in tuned.named.items() if "lora_A" in name} == {4}


@pytest.mark.skipif(find_spec("torchvision") is not None, reason="torchvision is here")
def test_a_processor_that_needs_a_package_is_refused_with_its_name(checkpoints, tmp_path, capfd):
    """Llama 4's takes pictures with torchvision alone."""
    folder = tmp_path / "llama4"
    CONFIG_MAPPING["llama4"]().save_pretrained(folder)
    (folder / "model.safetensors").touch()
    settings = {
        "processor_class": "Llama4Processor",
        "image_processor": {"image_processor_type": "Llama4ImageProcessor"},
    }
    (folder / "processor_config.json").write_text(json.dumps(settings))
    assert main(["train", "instruction_tuning/demo", f"model={folder}", f"runs={tmp_path / 'runs'}"]) == 2
    error = capfd.readouterr().err
    assert f"the processor of {folder} needs the package torchvision, which is not installed." in error
