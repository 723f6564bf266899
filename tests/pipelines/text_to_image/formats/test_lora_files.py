"""LoRA files for other apps: the names that they look for, every bit of the factors, the same pictures."""

import json
import re

import pytest
import torch
from diffusers import StableDiffusionPipeline, UNet2DConditionModel
from diffusers.loaders.single_file_utils import convert_ldm_unet_checkpoint
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.families import shape_of
from equipoise.pipelines.text_to_image.families.unet import original_name
from equipoise.pipelines.text_to_image.formats.lora_files import (
    Factors,
    canonical,
    factors_of,
    name_in,
    read_lora,
    write_lora,
)
from equipoise.pipelines.text_to_image.formats.names import FORMATS
from equipoise.pipelines.text_to_image.result import LORA_FILE, export

NAME = "text_to_image/dreambooth"
EVERYWHERE = (
    "[to_q, to_k, to_v, to_out.0, ff.net.0.proj, ff.net.2, proj_in, proj_out, conv1, conv2, conv_shortcut, conv]"
)
OPTIONS = ["lora.text_encoder=true", "lora.alpha=2", "lora.rank=4", f"lora.targets={EVERYWHERE}"]


def train(*overrides):
    settings = config.load(NAME, overrides)
    if wrong := TextToImage.check(settings):
        raise InputError("\n".join(wrong))
    run = Store(settings.runs).create(settings)
    return run, execute(TextToImage, settings, run)


@pytest.fixture(scope="module")
def tuned(checkpoint, tmp_path_factory):
    """A run whose factors are anything but zero: its folder, and the command's other words."""
    runs = tmp_path_factory.mktemp("runs")
    words = [f"model={checkpoint}", "data=demo", "data.instance_prompt=a photo of sks object", "steps=3", "batch=2"]
    words += ["data.resolution=32", "learning_rate=0.05", "optimizer.name=adamw", f"runs={runs}", "samples.prompts=[]"]
    run, outcome = train(*words, *OPTIONS)
    assert outcome.state == "done"
    return run, words


def unet(**options) -> UNet2DConditionModel:
    with torch.device("meta"):
        return UNet2DConditionModel(**options)


def layers(model) -> list[str]:
    return [name for name, module in model.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1]


@pytest.mark.parametrize(
    "options",
    [
        {"cross_attention_dim": 768, "attention_head_dim": 8},  # Stable Diffusion 1.5
        {"cross_attention_dim": 1024, "attention_head_dim": [5, 10, 20, 20], "use_linear_projection": True},  # 2.1
        {
            "layers_per_block": 1,
            "block_out_channels": (32, 64, 128),
            "down_block_types": ("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
            "up_block_types": ("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        },
    ],
    ids=["1.5", "2.1", "embedded"],
)
def test_original_names_are_those_that_diffusers_converts(options):
    """diffusers turns checkpoints of the original code into its own: what comes back must be what went in."""
    model = unet(**options)
    names = layers(model)
    assert len({original_name(name, model.config) for name in names}) == len(names)
    original = {
        f"model.diffusion_model.{original_name(name, model.config)}.{end}": torch.tensor(index)
        for index, name in enumerate(names)
        for end in ("weight", "bias")
    }
    converted = convert_ldm_unet_checkpoint(original, model.config)
    assert {key: int(value) for key, value in converted.items()} == {
        f"{name}.{end}": index for index, name in enumerate(names) for end in ("weight", "bias")
    }


def test_layers_have_the_names_of_kohya_and_comfyui():
    shape = {
        "family": "StableDiffusionPipeline",
        "layers_per_block": 2,
        "up_block_types": ["UpBlock2D"] + ["CrossAttnUpBlock2D"] * 3,
        "cross_attention_dim": 768,
    }
    layer = "unet.up_blocks.1.attentions.2.transformer_blocks.0.attn2.to_out.0"
    assert name_in("kohya", layer, shape) == "lora_unet_up_blocks_1_attentions_2_transformer_blocks_0_attn2_to_out_0"
    assert name_in("comfyui", layer, shape) == ("diffusion_model.output_blocks.5.1.transformer_blocks.0.attn2.to_out.0")
    assert name_in("comfyui", "unet.up_blocks.0.upsamplers.0.conv", shape) == "diffusion_model.output_blocks.2.1.conv"
    assert name_in("comfyui", "unet.up_blocks.1.upsamplers.0.conv", shape) == "diffusion_model.output_blocks.5.2.conv"
    text = canonical("text_encoder", "encoder.layers.3.self_attn.q_proj")
    assert text == canonical("text_encoder", "text_model.encoder.layers.3.self_attn.q_proj")
    assert name_in("kohya", text, shape) == "lora_te_text_model_encoder_layers_3_self_attn_q_proj"
    place = "transformer.text_model.encoder.layers.3.self_attn.q_proj"
    assert name_in("comfyui", text, shape) == f"text_encoders.clip_l.{place}"
    assert name_in("comfyui", text, shape | {"cross_attention_dim": 1024}) == f"text_encoders.clip_h.{place}"


@pytest.mark.parametrize("format", FORMATS)
def test_every_bit_comes_back(tuned, format, tmp_path, capsys):
    run, words = tuned
    file = tmp_path / "new" / f"{format}.safetensors"
    assert main(["export", str(run.folder), "--format", format, "--output", str(file)]) == 0
    assert capsys.readouterr().out == f"{file}\n"

    chosen = config.load(NAME, [*words, *OPTIONS, f"lora.start={file}"])
    own = load_file(run.folder / "result" / LORA_FILE)
    base = load_base(chosen.model, "no")
    with base.adapted(chosen.lora, seed=5) as parts:
        started = {name: factors for part, model in parts.items() for name, factors in factors_of(part, model).items()}
        assert len(started) == len(own) / 2
        for name, factors in started.items():
            assert torch.equal(factors.down, own[f"{name}.lora_A.weight"])
            assert torch.equal(factors.up, own[f"{name}.lora_B.weight"]) and factors.up.any()
    found = read_lora(file, started, base.shape)
    assert {factors.alpha for factors in found.values()} == {2.0}, "not the rank"


def test_alpha_and_what_is_known_stand_in_the_files(tuned, checkpoint, tmp_path):
    run, _ = tuned
    for format in ("kohya", "comfyui"):
        file = tmp_path / f"{format}.safetensors"
        assert main(["export", str(run.folder), "--format", format, "--output", str(file)]) == 0
        with safe_open(file, "pt") as opened:
            known, names = opened.metadata(), list(opened.keys())
            assert {opened.get_tensor(name).item() for name in names if name.endswith(".alpha")} == {2.0}
        assert len(names) == 3 * len({name.rsplit(".", 1)[0] for name in names if name.endswith(".alpha")})
        assert known["ss_network_dim"] == "4" and known["ss_network_alpha"] == "2.0"
        assert known["modelspec.trigger_phrase"] == "a photo of sks object"
        assert known["modelspec.architecture"] == "stable-diffusion-v1/lora"
        assert known["ss_v2"] == "False" and known["modelspec.prediction_type"] == "epsilon"
        assert known["ss_steps"] == known["ss_max_train_steps"] == "3" and known["ss_optimizer"] == "adamw"
        assert known["ss_resolution"] == "(32, 32)" and known["ss_num_train_images"] == "6"
        assert known["ss_sd_model_name"] == checkpoint.name, "not where it lies on this machine"
        assert json.loads(known["equipoise"])["learning_rate"] == 0.05


def test_stable_diffusion_2_is_told_from_1(tmp_path):
    shape = {
        "family": "StableDiffusionPipeline",
        "layers_per_block": 1,
        "up_block_types": ["UpBlock2D"],
        "cross_attention_dim": 1024,
    }
    layer = {"unet.conv_in": Factors(torch.ones(2, 3), torch.ones(3, 2), 5.0)}
    described = {
        "base": "b",
        "optimizer": "adamw",
        "learning_rate": 1,
        "step": 1,
        "rank": 4,
        "alpha": 4,
        "trigger": None,
    }
    told = {"equipoise": json.dumps(described | {"shape": shape, "prediction": "v_prediction"})}
    write_lora(tmp_path / LORA_FILE, "diffusers", layer, shape, told)
    export(tmp_path, "kohya", tmp_path / "kohya.safetensors")
    known = safe_open(tmp_path / "kohya.safetensors", "pt").metadata()
    assert known["ss_v2"] == "True" and known["modelspec.prediction_type"] == "v"
    assert known["modelspec.architecture"] == "stable-diffusion-v2-768-v/lora"
    assert known["ss_network_dim"] == "2", "of the factors, whatever lora.rank was for others"


def test_nothing_in_the_file_tells_where_the_base_lies(tuned, checkpoint):
    run, _ = tuned
    known = safe_open(run.folder / "result" / LORA_FILE, "pt").metadata()
    assert str(checkpoint) not in json.dumps(known) and json.loads(known["lora_adapter_metadata"])["unet.r"] == 4


def test_kohyas_file_draws_the_very_same_pictures_in_diffusers(tuned, checkpoint, tmp_path):
    run, _ = tuned
    file = tmp_path / "kohya.safetensors"
    assert main(["export", str(run.folder), "--format", "kohya", "--output", str(file)]) == 0
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    drawn = []
    for folder, name in ((run.folder / "result", LORA_FILE), (tmp_path, file.name), (None, "")):
        pipeline = StableDiffusionPipeline.from_pretrained(checkpoint)
        pipeline.set_progress_bar_config(disable=True)
        if folder:
            pipeline.load_lora_weights(folder, weight_name=name)
        drawn.append(
            pipeline("sks object", latents=noise, height=32, width=32, num_inference_steps=2).images[0].tobytes()
        )
    assert drawn[0] == drawn[1] != drawn[2]


def test_files_that_diffusers_scripts_write_are_read(tuned, tmp_path):
    run, _ = tuned
    own = load_file(run.folder / "result" / LORA_FILE)
    theirs = {}
    for name, tensor in own.items():
        middle = ".lora_linear_layer" if name.startswith("text_encoder") else ".lora"
        theirs[name.replace(".lora_A.", f"{middle}.down.").replace(".lora_B.", f"{middle}.up.")] = tensor
    save_file(theirs, tmp_path / "theirs.safetensors")
    shape = json.loads(safe_open(run.folder / "result" / LORA_FILE, "pt").metadata()["equipoise"])["shape"]
    names = {name.rsplit(".lora_", 1)[0] for name in own}
    found = read_lora(tmp_path / "theirs.safetensors", names, shape)
    assert all(torch.equal(factors.up, own[f"{name}.lora_B.weight"]) for name, factors in found.items())
    assert found.keys() == names and {factors.alpha for factors in found.values()} == {4.0}, "the rank, when none says"


def test_going_on_from_a_file_trains_from_there(tuned, tmp_path):
    run, words = tuned
    before = json.loads((run.folder / "result" / "result.json").read_text())
    start = run.folder / "result" / LORA_FILE
    again, _ = train(*words, *OPTIONS, f"lora.start={start}", "learning_rate=1e-5")
    after = json.loads((again.folder / "result" / "result.json").read_text())
    assert after["loss_before"] == pytest.approx(before["loss_after"], rel=1e-5)


@pytest.mark.parametrize(
    "overrides, message",
    [
        (["lora.targets=[to_q, '0']"], "lora.targets: they name down_blocks.0 too, a CrossAttnDownBlock2D, which"),
        (["lora.rank=8"], "has rank 4, but lora.rank is 8 and lora.alpha 2. Set them to the file's."),
        (["lora.alpha=4"], "has alpha 2, but lora.rank is 4 and lora.alpha 4. Set them to the file's."),
        (["lora.targets=[to_q]"], "are no LoRA factors of layers that are tuned here. Are lora.targets and lora.text"),
        (["lora.dora=true"], "has no sizes of DoRA. Set lora.dora=false."),
    ],
)
def test_a_start_that_does_not_fit(tuned, overrides, message):
    run, words = tuned
    start = f"lora.start={run.folder / 'result' / LORA_FILE}"
    with pytest.raises(InputError, match=re.escape(message)):
        train(*words, *OPTIONS, start, *overrides)


@pytest.mark.parametrize(
    ("targets", "message"),
    [
        ("[fc1, fc2]", "diffusers loads a text encoder's factors only if some are on its attention. Add q_proj."),
        ("[q_proj, token_embedding]", "token_embedding: no layer has a name that ends so."),
    ],
)
def test_text_encoder_targets_that_nobody_could_load(tuned, targets, message):
    _, words = tuned
    given = ["lora.text_encoder=true", f"lora.text_encoder_targets={targets}"]
    (problem,) = TextToImage.check(config.load(NAME, [*words, *given]))
    assert problem.startswith("lora.text_encoder_targets: ") and message in problem


def test_bad_input_is_one_sentence(tuned, tmp_path, capsys):
    run, words = tuned
    output = tmp_path / "out.safetensors"

    def said(*argv) -> str:
        assert main(["export", str(run.folder), *argv]) == 2
        return capsys.readouterr().err.strip()

    assert said("--format", "webui", "--output", str(output)) == (
        "--format: 'webui' is none of diffusers, kohya, comfyui."
    )
    assert "must end in .safetensors" in said("--format", "kohya", "--output", "out.ckpt")
    result = run.folder / "result" / LORA_FILE
    whole = result.read_bytes()
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1, 1)}, result, {"equipoise": "[]"})
    assert "its metadata are not those that a run writes. Was it replaced?" in said("--output", str(output))
    result.write_bytes(whole)
    output.write_text("mine")
    assert "is there already" in said("--format", "kohya", "--output", str(output))
    assert output.read_text() == "mine"
    for start, message in (
        (tmp_path / "none.safetensors", "does not exist"),
        (output, "cannot be read as safetensors"),
    ):
        with pytest.raises(InputError, match=message):
            train(*words, *OPTIONS, f"lora.start={start}")
    save_file({"unet.conv_in.lora_A.weight": torch.zeros(1, 1)}, tmp_path / "half.safetensors")
    with pytest.raises(InputError, match=r"one of both factors of unet\.conv_in is missing"):
        read_lora(tmp_path / "half.safetensors", ["unet.conv_in"], shape_of("StableDiffusionPipeline", unet().config))
