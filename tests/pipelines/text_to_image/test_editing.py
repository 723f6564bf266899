"""Bases that edit: trained on pairs, by their pipeline's own code; diffusers makes the same picture of a picture."""

import json
import shutil
import subprocess
import sys
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
from equipoise.pipelines.text_to_image.config import TextToImageModel
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
        ours = base.family.predict(
            base.denoiser, noisy, times, embedded | {"source": other[:, None]}, torch.zeros(2, 6), 3.5
        )
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


# FLUX.2, which may be given several pictures, or none

DRAW = """
import json, sys, torch
from diffusers import DiffusionPipeline
from PIL import Image
checkpoint, result, several, shape, guidance = json.loads(sys.argv[1])
pipeline = DiffusionPipeline.from_pretrained(checkpoint)
pipeline.set_progress_bar_config(disable=True)
pipeline.load_lora_weights(result)
noise = torch.randn((1, *shape), generator=torch.Generator().manual_seed(0))
size = {"height": 64, "width": 64, "num_inference_steps": 2, "guidance_scale": guidance}
for target, pictures in several.items():
    given = [Image.open(picture).convert("RGB") for picture in pictures]
    pipeline(image=given, prompt="a sks object", latents=noise, **size).images[0].save(target)
"""


@pytest.fixture
def references(pictures, tmp_path):
    """Of each picture two to start from, in a folder each, of 64 × 64 pixels."""
    folders = [tmp_path / "before", tmp_path / "style"]
    for folder in folders:
        folder.mkdir()
        for path in pictures.glob("*.png"):
            with Image.open(path) as picture:
                turned = picture.resize((64, 64)) if folder.name == "before" else picture.resize((64, 64)).rotate(90)
                turned.convert("RGB").save(folder / path.name)
    return folders


@pytest.mark.parametrize("name", ["Flux2Pipeline", "Flux2KleinPipeline"])
def test_it_learns_of_several_pictures_and_diffusers_makes_the_same_of_them(name, built, short, references, tmp_path):
    before, style = references
    given = [str(before / "0.png"), str(style / "1.png")]
    own = [word for word in short if not word.startswith(("model=", "data.resolution="))]
    own += [f"model={built(name)}", "data.resolution=64", f"data.sources=[{before}, {style}]", "train.clip=0"]
    own += [f"samples.prompts=[{PROMPT}]", f"samples.sources=[[{', '.join(given)}]]", "samples.guidance=null"]
    own += ["learning_rate=0.02", "train.gradient_checkpointing=true"]
    assert main(["train", NAME, *own, "--id", "edits"]) == 0
    run = Store(tmp_path / "runs").get("edits")
    result = json.loads((run.result / "result.json").read_text())
    assert result["loss_after"] < result["loss_before"]
    assert f"pairs: 4, each with its picture in {before} and in {style} to start from." in run.log_file.read_text()
    (sample,) = (run.folder / "samples").rglob("*.png")
    drawn = {}
    base = load_base(config.load(NAME, own).model, "no")
    shape, guidance = autoencoders.shape(base.vae, 64, 64), base.family.guidance
    wanted = {"same": given, "other way round": given[::-1], "one": given[:1]}
    several = {str(tmp_path / f"{key}.png"): paths for key, paths in wanted.items()}
    told = json.dumps([str(built(name)), str(run.result), several, shape, guidance])
    done = subprocess.run([sys.executable, "-c", DRAW, told], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    for key in ("ours", *wanted):
        with Image.open(sample if key == "ours" else tmp_path / f"{key}.png") as picture:
            drawn[key] = torch.tensor(list(picture.convert("RGB").tobytes())).int()
    ours = drawn.pop("ours")
    assert (ours - drawn["same"]).abs().max() <= 1  # two ways of rounding to 8 bits
    unlike = {key: int((ours != theirs).sum()) for key, theirs in drawn.items()}
    assert 5 * unlike["same"] < min(unlike["other way round"], unlike["one"]), unlike  # random weights heed them little

    assert main(["compare", str(run.folder), "--out", str(tmp_path / "compared")]) == 0
    (start,) = Comparison.read(tmp_path / "compared").sources
    with Image.open(tmp_path / "compared" / start.file) as shown:
        assert shown.size == (128, 64)
        for index, path in enumerate(given):
            with Image.open(path) as one:
                assert shown.crop((64 * index, 0, 64 * index + 64, 64)).tobytes() == one.tobytes()


@pytest.mark.parametrize("name", ["Flux2Pipeline", "Flux2KleinPipeline"])
@torch.no_grad()
def test_references_are_what_a_direct_call_is_given(name, built):
    """Their tokens follow the picture's, numbered 10, 20, … in their first coordinate."""
    base = load_base(TextToImageModel(path=str(built(name))), "no")
    source = torch.Generator().manual_seed(0)
    channels = autoencoders.shape(base.vae, 64, 64)[0]
    noisy, first, second = (torch.randn((2, channels, 4, 6), generator=source) for _ in range(3))
    times, embedded = torch.tensor([300.0, 800.0]), base.family.embed(base.pipeline, [PROMPT, "a blue vase"])
    both = embedded | {"source": torch.stack([first, second], 1)}
    ours, plain = (
        base.family.predict(base.denoiser, noisy, times, some, torch.zeros(2, 6), 3.5) for some in (both, embedded)
    )
    places = [torch.cartesian_prod(torch.tensor([t]), *map(torch.arange, (4, 6, 1))) for t in (0, 10, 20)]
    words = torch.cartesian_prod(*map(torch.arange, (1, 1, 1, embedded["prompt_embeds"].shape[1])))
    answer = base.denoiser(
        torch.cat([some.flatten(2).mT for some in (noisy, first, second)], 1),
        timestep=times / 1000,
        guidance=torch.full((2,), 3.5) if base.family.distilled else None,
        encoder_hidden_states=embedded["prompt_embeds"],
        txt_ids=words.expand(2, -1, -1),
        img_ids=torch.cat(places).expand(2, -1, -1),
    ).sample[:, :24]
    assert torch.allclose(ours, answer.mT.unflatten(2, (4, 6)), atol=1e-5) and not torch.allclose(
        ours, plain, atol=1e-3
    )


def test_how_many_pictures_a_base_starts_from_is_checked(words, short, sources, built):
    def said(*more, own=words):
        return TextToImage.check(config.load(NAME, [*own, *more]))

    two = (f"data.sources=[{sources}, {sources}]", f"samples.sources=[[{sources / '0.webp'}, {sources / '1.webp'}]]")
    assert said(*two) == [
        "data.sources, samples.sources: FLUX.1 Kontext starts from one picture, not from 2. Give one."
    ]
    for unlike, got in {
        f"[[{sources / '0.webp'}, {sources / '1.webp'}], {sources / '2.png'}]": "1 and 2",
        "[[]]": "0",
    }.items():
        with pytest.raises(InputError, match=f"samples.sources: must give each prompt as many .* got {got}"):
            said(f"samples.sources={unlike}")
    flux2 = [*short, f"model={built('Flux2KleinPipeline')}"]
    assert said(own=flux2) == said(*two, own=flux2) == []
    assert said(two[0], f"samples.sources=[{sources / '0.webp'}]", own=flux2) == [
        "samples.sources: 1 for a prompt, where 2 are trained on. Give as many."
    ]
    estimates = [TextToImage.estimate_memory(config.load(NAME, [*flux2, *more])) for more in ([], two[:1])]
    assert estimates[1].activations > estimates[0].activations  # tokens of two more pictures
