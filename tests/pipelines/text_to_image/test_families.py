"""Every family of models: trained, saved, and loaded by diffusers, on small checkpoints in the real layouts."""

import json
import shutil
from pathlib import Path

import diffusers
import pytest
import torch
from diffusers import EDMEulerScheduler, StableDiffusionXLPipeline
from PIL import Image
from safetensors import safe_open
from safetensors.torch import load_file

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.config import TextToImageData, TextToImageModel
from equipoise.pipelines.text_to_image.data import read_examples
from equipoise.pipelines.text_to_image.families import family, known
from equipoise.pipelines.text_to_image.formats.layout import model_problems
from equipoise.pipelines.text_to_image.latents import prepare_latents
from equipoise.pipelines.text_to_image.result import LORA_FILE

FAMILIES = known()


def train(*overrides):
    settings = config.load("text_to_image/dreambooth", overrides)
    assert TextToImage.check(settings) == []
    run = Store(settings.runs).create(settings)
    return run, execute(TextToImage, settings, run)


@pytest.fixture
def xl(short, xl_checkpoint) -> list[str]:
    return [f"model={xl_checkpoint}" if word.startswith("model=") else word for word in short]


@pytest.mark.parametrize("name", FAMILIES)
def test_what_a_family_says_of_itself(name):
    known = family(name)
    assert known.pipeline == name and known.parts == (known.denoiser, "vae", *known.text_encoders)
    assert known.targets and set(known.tuned_encoders) <= set(known.text_encoders) >= set(known.optional)
    theirs = getattr(diffusers, name)
    assert set(theirs._lora_loadable_modules) == {known.denoiser, *known.tuned_encoders}


@pytest.mark.parametrize("subject", ["dog", "teapot", "vase"])
@pytest.mark.parametrize("name", FAMILIES)
def test_the_photographs(name, subject, short, build_checkpoint):
    """Real pictures, where they are at hand, of their own shapes."""
    photographs = Path(__file__).parents[4] / "shared" / "data" / "dreambooth" / subject
    if not photographs.is_dir():
        pytest.skip("the photographs are not at ../shared/data")
    words = [f"model={build_checkpoint(name)}", f"data={photographs}", f"data.instance_prompt=a photo of sks {subject}"]
    run, outcome = train(*short, *words, "data.flip=true", "data.buckets=true", "samples.prompts=[]", "steps=3")
    assert outcome.state == "done"
    factors = load_file(run.folder / "result" / LORA_FILE)
    assert factors and all(tensor.isfinite().all() for tensor in factors.values())
    assert any(tensor.count_nonzero() for key, tensor in factors.items() if "lora_B" in key or ".up." in key)


@pytest.mark.soak  # a minute each
@pytest.mark.filterwarnings("ignore:.torch.jit:DeprecationWarning")  # of torch, by torch
@pytest.mark.filterwarnings("ignore:Torchinductor does not support code generation for complex")  # it leaves those be
@pytest.mark.parametrize("words", [[], ["data.buckets=true", "steps=8", "batch=1"]], ids=["one shape", "buckets"])
@pytest.mark.parametrize("name", FAMILIES)
def test_every_family_trains_alike_when_it_is_compiled(name, words, short, build_checkpoint):
    words = [*short, f"model={build_checkpoint(name)}", "samples.prompts=[]", *words]
    plain, _ = train(*words)
    compiled, outcome = train(*words, "train.compile=true")
    assert outcome.state == "done"
    losses = ([record["loss"] for record in run.metrics()] for run in (plain, compiled))
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-3, atol=1e-5)


@pytest.mark.parametrize("words", ["lora.text_encoder=true", "lora.text_encoder=false"])
def test_xl_learns_and_draws_the_very_same_picture_in_diffusers(xl, xl_checkpoint, words, tmp_path):
    run, outcome = train(*xl, words, "learning_rate=0.02", "lora.alpha=2", "samples.guidance=5")
    assert outcome.state == "done"
    result = json.loads((run.folder / "result" / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"]
    parts = {key.split(".")[0] for key in load_file(run.folder / "result" / LORA_FILE)}
    assert parts == ({"unet", "text_encoder", "text_encoder_2"} if "true" in words else {"unet"})

    kohya = tmp_path / "kohya.safetensors"
    assert main(["export", str(run.folder), "--format", "kohya", "--output", str(kohya)]) == 0
    with Image.open(run.folder / "samples" / "step-00000006" / "00-0.png") as sample:
        ours = torch.tensor(list(sample.convert("RGB").tobytes())).int()
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    for folder, name in ((run.folder / "result", LORA_FILE), (tmp_path, kohya.name)):
        pipeline = StableDiffusionXLPipeline.from_pretrained(xl_checkpoint)  # and its own scheduler, Euler's
        pipeline.set_progress_bar_config(disable=True)
        pipeline.load_lora_weights(folder, weight_name=name)
        drawn = pipeline(
            "a photo of sks object", latents=noise, height=32, width=32, num_inference_steps=2, guidance_scale=5.0
        ).images[0]
        assert (ours - torch.tensor(list(drawn.tobytes())).int()).abs().max() <= 1  # two ways of rounding to 8 bits


def test_xls_names_in_other_apps(xl, tmp_path):
    targets = "[to_q, to_out.0, ff.net.0.proj, proj_in, conv1, time_emb_proj, add_embedding.linear_1]"
    run, _ = train(*xl, "lora.text_encoder=true", f"lora.targets={targets}", "samples.prompts=[]", "steps=1")
    names = {}
    for format in ("kohya", "comfyui"):
        file = tmp_path / f"{format}.safetensors"
        assert main(["export", str(run.folder), "--format", format, "--output", str(file)]) == 0
        with safe_open(file, "pt") as opened:
            names[format] = {name.rsplit(".lora_", 1)[0] for name in opened.keys() if ".lora_" in name}
            assert opened.metadata()["ss_base_model_version"] == "sdxl_base_v1-0"
    assert {
        "lora_unet_input_blocks_3_1_transformer_blocks_1_attn2_to_q",
        "lora_unet_middle_block_0_in_layers_2",
        "lora_unet_output_blocks_3_0_emb_layers_1",
        "lora_unet_label_emb_0_0",
        "lora_te1_text_model_encoder_layers_0_self_attn_q_proj",
        "lora_te2_text_model_encoder_layers_1_self_attn_out_proj",
    } <= names["kohya"]
    assert {
        "diffusion_model.input_blocks.3.1.transformer_blocks.1.attn2.to_q",
        "text_encoders.clip_l.transformer.text_model.encoder.layers.0.self_attn.q_proj",
        "text_encoders.clip_g.transformer.text_model.encoder.layers.1.self_attn.out_proj",
    } <= names["comfyui"]


def test_xl_is_told_how_pictures_were_cut(xl, xl_checkpoint, tmp_path):
    """Micro-conditioning: (height, width) before the cut, (top, left) of it, (height, width) of the result."""
    folder = tmp_path / "wide"
    folder.mkdir()
    Image.new("RGB", (120, 60), "red").save(folder / "a.png")
    base = load_base(TextToImageModel(path=str(xl_checkpoint)), "no")
    data = TextToImageData(folder=str(folder), instance_prompt="red", resolution=32, flip=True)
    latents = prepare_latents(base, read_examples(data)[0], data, tmp_path / "cache")
    assert latents.of(0)[1].tolist() == [[60, 120, 0, 16, 32, 32]] * 2
    assert prepare_latents(base, read_examples(data)[0], data, tmp_path / "cache") is latents

    embedded = base.family.embed(base.pipeline, ["red"])
    noisy, times = torch.randn(1, 4, 4, 4), torch.tensor([500])
    with torch.no_grad():
        said = [base.family.predict(base.denoiser, noisy, times, embedded, p[None]) for p in latents.of(0)[1]]
        other = base.family.predict(base.denoiser, noisy, times, embedded, torch.tensor([[60, 120, 0, 0, 32, 32.0]]))
    assert torch.equal(*said) and not torch.equal(said[0], other)


def test_schedules_that_are_not_of_betas_are_refused(xl_checkpoint, tmp_path):
    copied = shutil.copytree(xl_checkpoint, tmp_path / "copy")
    EDMEulerScheduler().save_pretrained(copied / "scheduler")
    (problem,) = model_problems(str(copied))
    assert "EDMEulerScheduler has another noise schedule than Stable Diffusion XL is trained with" in problem


def test_a_second_text_encoder_that_is_missing(xl_checkpoint, tmp_path):
    copied = shutil.copytree(xl_checkpoint, tmp_path / "copy")
    (copied / "text_encoder_2" / "model.safetensors").unlink()
    assert model_problems(str(copied)) == [f"model.path: {copied / 'text_encoder_2' / 'model.safetensors'} is missing."]
