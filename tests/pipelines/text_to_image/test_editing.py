"""Bases that edit: trained on pairs, by their pipeline's own code; diffusers makes the same picture of a picture."""

import json
import shutil
from dataclasses import replace

import pytest
import torch
from diffusers import FluxKontextPipeline, FluxPipeline
from PIL import Image
from safetensors.torch import load_file

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.cuts import cut, to_tensor
from equipoise.pipelines.text_to_image.data import open_picture
from equipoise.pipelines.text_to_image.families import autoencoders
from equipoise.pipelines.text_to_image.families.noise import make_noise
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAME = "text_to_image/dreambooth"
PROMPT = "a sks object"
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # of diffusers, by it


@pytest.fixture(scope="module")
def kontext(build_checkpoint, tmp_path_factory):
    """FLUX.1's small checkpoint, as Kontext's is published: other weights, and another class in its index."""
    folder = tmp_path_factory.mktemp("kontext") / "tiny"
    plain = FluxPipeline.from_pretrained(build_checkpoint("FluxPipeline"))
    FluxKontextPipeline(**plain.components).save_pretrained(folder)
    return folder


@pytest.fixture
def sources(pictures, tmp_path):
    """For each picture one of its own to start from, with another ending."""
    folder = tmp_path / "sources"
    folder.mkdir()
    for path in pictures.glob("*.png"):
        with Image.open(path) as picture:
            picture.transpose(Image.Transpose.FLIP_LEFT_RIGHT).convert("L").save(folder / f"{path.stem}.webp")
    return folder


@pytest.fixture
def words(short, kontext, sources):
    own = [word for word in short if not word.startswith("model=")]
    return [*own, f"model={kontext}", f"data.sources={sources}", "train.clip=0", "learning_rate=0.02"]


def test_either_picture_of_a_damaged_pair_may_be_replaced(work, words):
    """By what a run resumes on; a caption may not."""
    own = work(*words).own
    for index, free in ((0, True), (1, False), (3, True)):  # the picture's content, its caption, the source's content
        first = tuple("another" if fact == index else value for fact, value in enumerate(own.facts[0]))
        other = replace(own, facts=[first, *own.facts[1:]])
        assert other.digest() != own.digest() and (other.digest([0]) == own.digest([0])) == free


def test_it_learns_and_diffusers_makes_the_same_picture_of_the_same_picture(words, kontext, sources, tmp_path):
    more = [
        f"samples.prompts=[{PROMPT}]",
        f"samples.sources=[{sources / '0.webp'}]",
        "train.gradient_checkpointing=true",
    ]
    assert main(["train", NAME, *words, *more, "--id", "edits"]) == 0
    run = Store(tmp_path / "runs").get("edits")
    result = json.loads((run.result / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"]
    assert f"pairs: 4, each with its picture in {sources} to start from." in run.log_file.read_text()
    (sample,) = (run.folder / "samples").rglob("*.png")

    pipeline = FluxKontextPipeline.from_pretrained(kontext)
    pipeline.set_progress_bar_config(disable=True)
    pipeline.load_lora_weights(run.result, weight_name=LORA_FILE)
    noise = torch.randn((1, 4, 4, 4), generator=torch.Generator().manual_seed(0))
    drawn = {}
    for start in ("0.webp", "1.webp"):
        image = to_tensor(cut(open_picture(sources / start), (32, 32), (0.5, 0.5)))[None]
        with torch.no_grad():
            latents, _ = autoencoders.encode(pipeline.vae, image)
        drawn[start] = pipeline(
            image=latents,
            prompt=PROMPT,
            latents=pipeline._pack_latents(noise, *noise.shape),
            height=32,
            width=32,
            max_area=32 * 32,
            num_inference_steps=2,
            guidance_scale=7.0,
        ).images[0]
    with Image.open(sample) as ours:
        assert ours.convert("RGB").tobytes() == drawn["0.webp"].tobytes() != drawn["1.webp"].tobytes()

    assert main(["compare", str(run.folder), "--out", str(tmp_path / "compared")]) == 0
    (start,) = Comparison.read(tmp_path / "compared").sources
    with Image.open(tmp_path / "compared" / start.file) as shown:
        assert shown.tobytes() == cut(open_picture(sources / "0.webp"), (32, 32), (0.5, 0.5)).tobytes()


def test_the_loss_is_of_a_call_that_is_given_the_pair(words, kontext):
    """By hand, as the pipeline has it: the source's tokens follow, numbered 1 in their first coordinate."""
    settings = config.load(NAME, words)
    base = load_base(settings.model, "no")
    source = torch.Generator().manual_seed(0)
    clean, noise, other = (torch.randn((2, 4, 4, 6), generator=source) for _ in range(3))
    times = torch.tensor([300.0, 800.0])
    way = make_noise(base.family, base.pipeline.scheduler, settings.noise)
    noisy = way.add(clean, noise, times)
    with torch.no_grad():
        embedded = base.family.embed(base.pipeline, [PROMPT, "a dog"])
        ours = base.family.predict(base.denoiser, noisy, times, embedded | {"source": other}, torch.zeros(2, 6), 3.5)
        plain = base.family.predict(base.denoiser, noisy, times, embedded, torch.zeros(2, 6), 3.5)
        pack, ids = FluxPipeline._pack_latents, FluxPipeline._prepare_latent_image_ids
        own = ids(2, 2, 3, noisy.device, noisy.dtype)
        beside = own.clone()
        beside[:, 0] = 1
        words_, pooled, text = base.pipeline.encode_prompt([PROMPT, "a dog"], None)
        answer = base.denoiser(
            torch.cat([pack(noisy, *noisy.shape), pack(other, *other.shape)], dim=1),
            timestep=times / 1000,
            guidance=torch.full((2,), 3.5),
            img_ids=torch.cat([own, beside]),
            txt_ids=text,
            encoder_hidden_states=words_,
            pooled_projections=pooled,
        ).sample[:, :6]
    theirs = FluxPipeline._unpack_latents(answer, 4, 6, vae_scale_factor=1)
    assert torch.allclose(ours, theirs, atol=1e-6) and not torch.allclose(ours, plain, atol=1e-3)


def test_a_run_of_pairs_resumes_exactly_and_not_with_other_sources(words, sources, stopped_run):
    settings = config.load(NAME, [*words, "samples.prompts=[]", "data.flip=true"])
    assert TextToImage.check(settings) == []
    whole = Store(settings.runs).create(settings)
    assert execute(TextToImage, settings, whole).state == "done"
    run = stopped_run(TextToImage, settings, at=2)
    kept = (sources / "0.webp").read_bytes()
    shutil.copy(sources / "1.webp", sources / "0.webp")
    with pytest.raises(InputError, match="are not those that this run was trained on so far"):
        execute(TextToImage, settings, run)
    (sources / "0.webp").write_bytes(kept)
    run.forget_requests()
    assert execute(TextToImage, settings, run).state == "done"
    assert [record["loss"] for record in run.metrics()] == [record["loss"] for record in whole.metrics()]
    factors = [load_file(one.result / LORA_FILE) for one in (run, whole)]
    assert all(torch.equal(factors[0][name], factors[1][name]) for name in factors[1])


def test_what_is_wrong_with_pairs_is_found_before_anything_is_written(words, short, sources, kontext, tmp_path):
    def said(*more, own=words):
        return TextToImage.check(config.load(NAME, [*own, *more]))

    (sources / "2.webp").unlink()
    (sources / "3.webp").write_bytes(b"no")
    assert said() == [
        f"data.sources: {sources} has no picture for 2.png. Name each source as its picture in data.folder; endings "
        "may differ."
    ]
    Image.new("RGB", (40, 40)).save(sources / "2.png")
    assert len(said()) == 1 and said()[0].startswith(f"{sources / '3.webp'}: cannot be read as a picture")
    Image.new("RGB", (40, 40)).save(sources / "3.webp")
    assert said("data.crop=random", "prior.prompt=a vase") == [
        "data.crop: random: is not for pairs, as data.sources makes them. Leave it out.",
        "prior.prompt: is not for pairs, as data.sources makes them. Leave it out.",
    ]
    assert said("data.sources=null") == [
        "data.sources: FLUX.1 Kontext edits pictures. Give the folder of those that it is to start from."
    ]
    wrong = f"samples.sources=[{sources / '2.png'}, {sources / '3.webp'}]"
    assert said(wrong, "samples.prompts=[a, b, c]") == [
        "samples.sources: 2 pictures for 3 prompts. Give one for each, or one for all."
    ]
    tall = Image.new("RGB", (40, 80))
    tall.save(sources / "3.webp")
    settings = config.load(NAME, [*words, "data.buckets=true", "data.resolution=64"])
    with pytest.raises(InputError, match=r"3.webp is of another shape than .*3.png. Cut it to that."):
        execute(TextToImage, settings, Store(settings.runs).create(settings))
    assert said(f"data.sources={sources}", own=short) == [
        "data.sources: Stable Diffusion does not start from pictures. Leave it out."
    ]
