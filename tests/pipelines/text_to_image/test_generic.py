"""Families that their pipelines' own code trains: a checkpoint in its real layout, a result that diffusers loads."""

import copy
import inspect
import json
import runpy
import shutil
import subprocess
import sys
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import ClassVar

import diffusers
import pytest
import torch
from diffusers import (
    ChromaPipeline,
    ChromaTransformer2DModel,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    QwenImagePipeline,
)
from diffusers.loaders.lora_conversion_utils import (
    _convert_kohya_flux2_lora_to_diffusers,
    _convert_kohya_flux_lora_to_diffusers,
    _convert_non_diffusers_qwen_lora_to_diffusers,
)
from PIL import Image
from safetensors.torch import load_file
from torch._dynamo.testing import CompileCounter

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import begin_training, load_base, place
from equipoise.pipelines.text_to_image.config import NoiseSection, TextToImageModel, TextToImageSamples
from equipoise.pipelines.text_to_image.families import Family, autoencoders, family, known, shape_of, trained
from equipoise.pipelines.text_to_image.families.flows import FLOWS
from equipoise.pipelines.text_to_image.families.generic import GenericFlow
from equipoise.pipelines.text_to_image.formats import layout
from equipoise.pipelines.text_to_image.formats.factors import Factors
from equipoise.pipelines.text_to_image.formats.layout import model_problems
from equipoise.pipelines.text_to_image.formats.lora_files import read_lora, write_lora
from equipoise.pipelines.text_to_image.formats.names import FORMATS
from equipoise.pipelines.text_to_image.generate import generate
from equipoise.pipelines.text_to_image.overview import unread_words
from equipoise.pipelines.text_to_image.prior import class_examples
from equipoise.pipelines.text_to_image.result import LORA_FILE

NAMES = list(FLOWS)
OWN = [name for name in known() if family(name).noise == "flow"]
PROMPT = "a sks object"
CLASS = ("prior.prompt=a vase", "prior.count=1", "samples.steps=1")
OPTIMIZERS = ("scaled_adamw", "bounded_adamw", "alpha_adam")
DRAW = """
import json, runpy, sys
from safetensors.torch import save_file
draw = runpy.run_path(sys.argv[1])["draw"]
save_file({name: draw(*given) for name, given in json.loads(sys.argv[2]).items()}, sys.argv[3])
"""
FILE = Path(__file__).with_name("flows.py")
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # of diffusers, by it


@pytest.fixture(scope="module", autouse=True)
def few_draws():
    """Behind the losses before and after: eight instead of 64, for these are no measurements."""
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr("equipoise.pipelines.text_to_image.fixed.DRAWS", 8)
        yield


@pytest.fixture(scope="module")
def built(tmp_path_factory, build_checkpoint):
    write = runpy.run_path(str(FILE))["write"]
    root, made = tmp_path_factory.mktemp("flows"), {}

    def build(name: str) -> Path:
        if name in OWN:
            return build_checkpoint(name)
        if name not in made:
            made[name] = write(name, root / name)
        return made[name]

    return build


@pytest.fixture
def base(built):
    return lambda name: load_base(TextToImageModel(path=str(built(name))), "no")


def words(folder: Path, runs: Path, *more: str) -> list[str]:
    given = [f"model={folder}", "data=demo", "data.resolution=32", "batch=2", "samples.steps=2", f"runs={runs}"]
    return ["text_to_image/dreambooth", *given, "samples.guidance=null", "train.clip=0", "lora.alpha=2", *more]


@pytest.fixture(scope="module")
def tuned(built, tmp_path_factory):
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


def test_a_sweep_of_rates_is_drawn_beside_the_untouched_base(built, tmp_path):
    more = ["steps=2", f"samples.prompts=[{PROMPT}]", "--axis", "learning_rate=0.01,0.02"]
    assert main(["sweep", *words(built("QwenImagePipeline"), tmp_path / "runs", *more)]) == 0
    cells = Store(tmp_path / "runs").list(kinds=("cell",))
    assert [cell.state for cell in cells] == ["done"] * 2
    assert len({picture.read_bytes() for picture in (tmp_path / "runs").rglob("cells/*/00-0.png")}) == 3


def test_a_card_says_how_a_modular_pipeline_is_called(tuned):
    modular, other = (
        (tuned[name].result / "README.md").read_text() for name in ("AnimaModularPipeline", "SanaPipeline")
    )
    assert "pipe.load_components()\n" in modular and 'output="images")[0].save("picture.png")' in modular
    assert "load_components" not in other and ').images[0].save("picture.png")' in other


# Times, signs and scales


def some_latents(base, count: int, seed: int = 0) -> torch.Tensor:
    shape = autoencoders.shape(base.vae, 32, 32)
    return torch.randn((count, *shape), generator=torch.Generator().manual_seed(seed))


def test_class_pictures_of_a_distilled_base_are_not_those_of_the_other_one(built, base, tmp_path):
    made = base("Krea2Pipeline")
    name, *more = words(built("Krea2Pipeline"), tmp_path, *CLASS)
    settings = config.load(name, more)
    before, folders = made.pipeline.config.get("is_distilled"), []
    try:
        for distilled in (False, True, False):
            made.pipeline.register_to_config(is_distilled=distilled)
            folders += [example.path.parent for example in class_examples(made, settings, tmp_path)]
    finally:
        made.pipeline.register_to_config(is_distilled=before)
    assert folders[0] == folders[2] != folders[1]


@torch.no_grad()
def test_cogview4_is_trained_at_the_noise_by_which_its_pipeline_draws(base):
    """Times are even before their shift, which depends on the size; noise.shift takes the place of that."""
    made = base("CogView4Pipeline")
    noise, shape = made.set_scheduler(NoiseSection()), torch.Size((6, 4, 8, 16))
    even = noise.times(6, torch.Generator().manual_seed(1))
    scheduler = copy.deepcopy(made.pipeline.scheduler)
    mu = (8 * 16 / 4 / 256) ** 0.5 * 0.75 + 0.25
    scheduler.set_timesteps(timesteps=even.numpy(), sigmas=(even / 1000).numpy(), mu=mu)
    found = noise.scheduled(even, shape)
    assert torch.allclose(found / 1000, scheduler.sigmas[:-1], atol=1e-6) and not torch.allclose(found, even, atol=10)
    generator = torch.Generator().manual_seed(1)
    _, drawn = noise.draw(shape, generator)
    generator.manual_seed(1)
    torch.randn(shape, generator=generator)
    assert torch.equal(drawn, noise.scheduled(noise.times(6, generator), shape))
    still = made.set_scheduler(NoiseSection(shift=2.0))
    assert torch.equal(still.scheduled(even, shape), even)


@pytest.mark.parametrize("name", [*NAMES, *OWN])
@torch.no_grad()
def test_one_step_of_the_familys_own_sampling_with_the_exact_answer_lands_on_the_picture(name, base, monkeypatch):
    """The denoiser gives whatever it gives; if that is the noise less the picture, the picture is what is left."""
    made = base(name)
    kind, pipeline, noise = made.family, made.pipeline, made.set_scheduler(NoiseSection())
    pipeline.scheduler = FlowMatchEulerDiscreteScheduler()
    sigma = 1.0 if name == "ErnieImagePipeline" else 0.6  # its call takes none, and a single step begins at 1
    clean, time = some_latents(made, 1), torch.tensor([1000 * sigma])
    embedded = kind.embed(pipeline, [PROMPT])
    fixed, seen, forward = [], [], made.denoiser.forward

    def answer(*given, return_dict=True, **more):
        seen.append([value for key, value in more.items() if key.startswith("timestep")] or given[1])
        if not fixed:
            fixed.append(forward(*given, return_dict=False, **more)[0])
        return SimpleNamespace(sample=fixed[0]) if return_dict else (fixed[0],)

    monkeypatch.setattr(made.denoiser, "forward", answer)
    given = kind.predict(made.denoiser, clean, time, embedded, torch.zeros(1, 6))
    noisy = noise.add(clean, clean + given, time)  # the noise for which that is the exact answer
    assert torch.allclose(noise.target(clean, clean + given, time), given, atol=1e-6)
    landed = one_drawn_step(kind, pipeline, noisy, sigma)
    assert torch.allclose(landed, clean, atol=1e-5)
    assert not torch.allclose(noisy, clean, atol=1e-2)
    predicted, drawn = (float(time[0]) for time in seen)
    assert predicted == pytest.approx(drawn), "the same time is read"


def one_drawn_step(kind: Family, pipeline, noisy: torch.Tensor, sigma: float) -> torch.Tensor:
    """Of the family's own drawing, without guidance, from `sigma` to 0."""
    call = type(pipeline).__call__
    more = {} if sigma == 1 else {"sigmas": [sigma]}
    more |= {"timesteps": [1000 * sigma]} if kind.pipeline == "CogView4Pipeline" else {}
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(type(pipeline), "__call__", lambda self, *given, **words: call(self, *given, **words, **more))
        unguided = 0.0 if kind.pipeline == "ZImagePipeline" else getattr(kind, "unguided", 1.0)
        return kind.draw(pipeline, [PROMPT], "", noisy, (32, 32), 1, unguided)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_times_and_noise_go_together_in_training_as_in_sampling_by_the_checkpoints_own_schedule(
    name, base, monkeypatch
):
    made = base(name)
    kind, pipeline = made.family, made.pipeline
    made.set_scheduler(NoiseSection())
    times, levels, forward, step = [], [], made.denoiser.forward, pipeline.scheduler.step

    def answer(*given, **more):
        read = next((value for key, value in more.items() if key.startswith("timestep")), None)
        times.append(float((given[1] if read is None else read).flatten()[0]))
        return forward(*given, **more)

    def stepped(*given, **more):
        done = step(*given, **more)
        levels.append(float(pipeline.scheduler.sigmas[pipeline.scheduler.step_index - 1]))
        return done

    monkeypatch.setattr(made.denoiser, "forward", answer)
    monkeypatch.setattr(pipeline.scheduler, "step", stepped)
    kind.draw(pipeline, [PROMPT], "", some_latents(made, 1), (32, 32), 3, getattr(kind, "unguided", 1.0))
    sampled = times[:: len(times) // 3]
    times.clear()
    embedded = kind.embed(pipeline, [PROMPT])
    for level in levels:
        kind.predict(made.denoiser, some_latents(made, 1), torch.tensor([1000 * level]), embedded, torch.zeros(1, 6))
    assert len(levels) == len(sampled) == 3 and len({round(level, 3) for level in levels}) == 3
    scale = 1 if max(sampled) > 1 else 1000
    assert [scale * time for time in times] == pytest.approx([scale * time for time in sampled], abs=1)  # some round


@pytest.mark.parametrize("name", ["Lumina2Pipeline", "SanaPipeline"])
@torch.no_grad()
def test_a_dropped_caption_is_read_as_the_pipeline_reads_no_negative_prompt(name, base, monkeypatch):
    made, forward, read = base(name), base(name).denoiser.forward, []

    def answer(*given, encoder_hidden_states, encoder_attention_mask, **more):
        read.extend(zip(encoder_hidden_states, encoder_attention_mask, strict=True))
        return forward(
            *given,
            encoder_hidden_states=encoder_hidden_states,
            encoder_attention_mask=encoder_attention_mask,
            **more,
        )

    monkeypatch.setattr(made.denoiser, "forward", answer)
    made.family.draw(made.pipeline, [PROMPT], "", some_latents(made, 1), (32, 32), 1, 4.0)
    ours = [made.family.embed(made.pipeline, [caption]) for caption in ("", PROMPT)]
    assert len(read) == 2
    for found in ours:
        words, mask = found["prompt_embeds"][0], found["prompt_attention_mask"][0]
        assert sum(torch.equal(mask.bool(), m.bool()) and torch.allclose(words, w, atol=1e-5) for w, m in read) == 1


@pytest.mark.parametrize("name", ["Flux2Pipeline", "Flux2KleinPipeline", "Lumina2Pipeline"])
@torch.no_grad()
def test_what_a_long_caption_loses_beside_the_words_around_it_is_named(name, base, built):
    made = base(name)
    caption = "a red vase, a blue cup and a dog in a garden, " * 12
    lost = unread_words(str(built(name)), caption)
    kept = caption.rstrip().removesuffix(lost)
    assert lost and len(kept) > 10 and caption.rstrip() == kept + lost
    whole, cut, less = (made.family.embed(made.pipeline, [text]) for text in (caption, kept + "zzz", kept[:-2] + "zz"))
    assert torch.equal(whole["prompt_embeds"], cut["prompt_embeds"])
    assert not torch.equal(whole["prompt_embeds"], less["prompt_embeds"])


@pytest.mark.parametrize("name", ["Krea2Pipeline", "Flux2KleinPipeline"])
@torch.no_grad()
def test_a_distilled_checkpoint_is_sampled_without_guidance(name, base, monkeypatch):
    made, forward, calls = base(name), base(name).denoiser.forward, []
    monkeypatch.setattr(made.denoiser, "forward", lambda *some, **more: calls.append(1) or forward(*some, **more))
    asked = TextToImageSamples(prompts=[PROMPT], steps=2)
    generate(made.pipeline, asked, 32)
    assert len(calls) == 4 and made.family.usual_guidance(made.pipeline) == made.family.guidance
    try:
        made.pipeline.register_to_config(is_distilled=True)
        generate(made.pipeline, asked, 32)
        assert len(calls) == 6 and made.family.usual_guidance(made.pipeline) == made.family.unguided
    finally:
        made.pipeline.register_to_config(is_distilled=False)


# What the adapter gives is what a direct call gives


def direct(name: str, pipeline, noisy, times, read: dict[str, torch.Tensor]) -> torch.Tensor:
    """The denoiser called by hand, as diffusers' training scripts have it, or the family's paper."""
    model, words = pipeline.transformer, read["prompt_embeds"]
    batch, _, height, width = noisy.shape
    mask = next((read[key] for key in read if key.endswith("mask")), None)
    if name.startswith("Flux2"):
        answer = model(
            Flux2Pipeline._pack_latents(noisy),
            timestep=times / 1000,
            guidance=torch.full((batch,), 3.5) if name == "Flux2Pipeline" else None,
            encoder_hidden_states=words,
            txt_ids=Flux2Pipeline._prepare_text_ids(words),
            img_ids=Flux2Pipeline._prepare_latent_ids(noisy),
        ).sample
        return answer.mT.reshape(noisy.shape)
    if name == "QwenImagePipeline":
        packed = QwenImagePipeline._pack_latents(noisy, *noisy.shape)
        shapes = [[(1, height // 2, width // 2)]] * batch
        answer = model(packed, words, mask, times / 1000, img_shapes=shapes).sample
        return QwenImagePipeline._unpack_latents(answer, 8 * height, 8 * width, 8).squeeze(2)
    if name == "Krea2Pipeline":
        packed = pipeline._pack_latents(noisy, *noisy.shape)
        where = pipeline.prepare_position_ids(words.shape[1], height // 2, width // 2, noisy.device)
        answer = model(packed, words, times / 1000, where, encoder_attention_mask=mask).sample
        return pipeline._unpack_latents(answer, 8 * height, 8 * width).squeeze(2)
    if name == "ChromaPipeline":
        packed = ChromaPipeline._pack_latents(noisy, *noisy.shape)
        where = ChromaPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype)
        seen = torch.cat([mask, torch.ones(batch, packed.shape[1])], dim=1)
        nowhere = torch.zeros(words.shape[1], 3)
        answer = model(packed, words, times / 1000, img_ids=where, txt_ids=nowhere, attention_mask=seen).sample
        return ChromaPipeline._unpack_latents(answer, 8 * height, 8 * width, 8)
    if name == "Lumina2Pipeline":
        return -model(noisy, 1 - times / 1000, words, mask).sample
    if name == "SanaPipeline":
        return model(noisy, words, times, encoder_attention_mask=mask).sample
    if name == "ErnieImagePipeline":
        return model(noisy, times, words, read["lengths"]).sample
    if name == "AuraFlowPipeline":
        return model(noisy, words, times / 1000).sample
    assert name == "CogView4Pipeline"
    size, corner = torch.tensor([[32.0, 32.0]] * batch), torch.zeros(batch, 2)
    mu = (height * width / 4 / 256) ** 0.5 * 0.75 + 0.25  # the script's; it gives the time before its shift
    times = 1000 / (1 + mu * (1000 / times - 1))
    return model(noisy, words, times, original_size=size, target_size=size, crop_coords=corner).sample


@pytest.mark.parametrize(
    "name", [name for name in NAMES if name not in ("HiDreamImagePipeline", "AnimaModularPipeline")]
)
@torch.no_grad()
def test_the_answer_is_that_of_a_direct_call(name, base):
    made = base(name)
    noisy, times = some_latents(made, 2), torch.tensor([300.0, 800.0])
    read = made.family.embed(made.pipeline, ["a red vase", "a blue cup"])
    ours = made.family.predict(made.denoiser, noisy, times, read, torch.zeros(2, 6))
    assert torch.allclose(ours, direct(name, made.pipeline, noisy, times, read), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_picture_has_its_own_time_and_caption(name, base):
    """Captions of different lengths, which are filled up to the longest."""
    made = base(name)
    kind, captions = made.family, ["a red vase", "", "a dog in a garden with many a tree, and the sun behind it"]
    noisy, times, crops = some_latents(made, 3), torch.tensor([300.0, 800.0, 301.0]), torch.zeros(3, 6)
    made.read(captions)
    together = kind.predict(made.denoiser, noisy, times, made.known(captions), crops)
    assert together.shape == noisy.shape
    for index, caption in enumerate(captions):
        one = slice(index, index + 1)
        alone = kind.predict(made.denoiser, noisy[one], times[one], kind.embed(made.pipeline, [caption]), crops[one])
        assert torch.allclose(together[one], alone, atol=2e-5), caption
    other = kind.predict(made.denoiser, noisy, times + 50, made.known(captions), crops)
    others = kind.predict(made.denoiser, noisy, times, made.known(captions[::-1]), crops)
    assert not torch.allclose(together, other, atol=1e-4) and not torch.equal(together, others)


class GenericFlux(GenericFlow):
    pipeline, title = "FluxPipeline", "FLUX.1"
    captions: ClassVar = {"prompt_embeds": (0, (512, "joint_attention_dim")), "pooled_prompt_embeds": (1, ("…",))}
    text_encoders = family("FluxPipeline").text_encoders
    packed = distilled = True
    negative = False


class GenericStableDiffusion3(GenericFlow):
    pipeline, title = "StableDiffusion3Pipeline", "Stable Diffusion 3"
    captions: ClassVar = {"prompt_embeds": (0, (256, "joint_attention_dim")), "pooled_prompt_embeds": (2, ("…",))}
    text_encoders = family("StableDiffusion3Pipeline").text_encoders


class GenericZImage(GenericFlow):
    pipeline, title = "ZImagePipeline", "Z-Image"
    captions: ClassVar = {"prompt_embeds": (0, (512, "cap_feat_dim"))}
    unguided = 0.0

    def read(self, pipeline, caption):
        (words,) = pipeline.encode_prompt([caption], do_classifier_free_guidance=False)[0]
        return {"prompt_embeds": words[None], "lengths": torch.tensor([len(words)])}

    def arguments(self, embedded):
        return {"prompt_embeds": list(embedded["prompt_embeds"]), "negative_prompt_embeds": []}


@pytest.mark.parametrize("generic", [GenericFlux, GenericStableDiffusion3, GenericZImage])
@torch.no_grad()
def test_the_families_with_code_of_their_own_equal_the_generic_one(generic, base):
    made, other = base(generic.pipeline), generic()
    other.bind(made.pipeline)
    captions, noisy = ["a red vase", "a dog in a garden"], some_latents(made, 2)
    times, crops = torch.tensor([250.0, 875.0]), torch.zeros(2, 6)
    ours, theirs = (
        kind.predict(made.denoiser, noisy, times, kind.embed(made.pipeline, captions), crops, guidance=3.0)
        for kind in (made.family, other)
    )
    assert torch.allclose(ours, theirs, atol=1e-5) and ours.std() > 1e-2
    drawn = [kind.draw(made.pipeline, captions, "", noisy, (32, 32), 2, 3.0) for kind in (made.family, other)]
    assert torch.allclose(*drawn, atol=1e-4)


# Autoencoders


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_latents_are_scaled_as_the_pipeline_unscales_them(name, base):
    """What the autoencoder gives for a picture, and back from what is trained on to the same."""
    made, caught = base(name), []
    vae, picture = made.vae, torch.rand(1, 3, 32, 32) * 2 - 1
    mean, deviation = autoencoders.encode(vae, picture)
    assert mean.shape[1:] == deviation.shape[1:] == autoencoders.shape(vae, 32, 32)
    assert (deviation > 0).all() or name == "SanaPipeline"
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(vae, "decode", lambda latents, **_: caught.append(latents) or SimpleNamespace(sample=latents))
        autoencoders.decode(vae, mean)
    frames = picture.unsqueeze(2) if name in ("QwenImagePipeline", "Krea2Pipeline", "AnimaModularPipeline") else picture
    given = vae.encode(frames)
    assert torch.allclose(
        caught[0], given.latent_dist.mean if hasattr(given, "latent_dist") else given.latent, atol=1e-5
    )
    assert not torch.allclose(mean.flatten(), caught[0].flatten(), atol=1e-3) or name == "CogView4Pipeline"


@pytest.mark.parametrize("name", [*NAMES, *OWN])
@torch.no_grad()
def test_the_autoencoder_is_given_what_the_pipeline_gives_it(name, base, monkeypatch):
    made = base(name)
    kind, pipeline, call, given = made.family, made.pipeline, type(made.pipeline).__call__, []
    made.set_scheduler(NoiseSection())

    def drawn():
        return kind.draw(pipeline, [PROMPT], "", some_latents(made, 1), (32, 32), 2, getattr(kind, "unguided", 1.0))

    class Caught(Exception):
        pass

    def decode(latents, *_, **__):
        given.append(latents)
        raise Caught

    latents = drawn()
    changed = {"output": "images"} if kind.modular else {"output_type": "pil"}
    monkeypatch.setattr(type(pipeline), "__call__", lambda self, *some, **more: call(self, *some, **more | changed))
    monkeypatch.setattr(made.vae, "decode", decode)
    with pytest.raises(Caught):
        drawn()
    with pytest.raises(Caught):
        autoencoders.decode(made.vae, latents)
    theirs, ours = given
    assert torch.allclose(ours, theirs, rtol=1e-5, atol=1e-5)


# Everything else that a run needs


@pytest.mark.parametrize("name", NAMES)
def test_checkpointed_and_resumed_runs_end_alike(name, built, tmp_path, stopped_run):
    given = words(built(name), tmp_path, "steps=4", "optimizer=adamw", "learning_rate=0.01", "samples.prompts=[]")
    for key, more in {"plain": "false", "checkpointed": "true"}.items():
        assert main(["train", *given, f"train.gradient_checkpointing={more}", "--id", key]) == 0
    resumed = stopped_run(TextToImage, config.load(given[0], given[1:]), 2)
    assert execute(TextToImage, resumed.config(), resumed).state == "done"
    plain, checkpointed, gone_on = (
        load_file(folder / "result" / LORA_FILE)
        for folder in (tmp_path / "plain", tmp_path / "checkpointed", resumed.folder)
    )
    assert all(torch.equal(plain[key], gone_on[key]) for key in plain)
    assert all(torch.allclose(plain[key], checkpointed[key], atol=1e-5) for key in plain)


@pytest.mark.parametrize("name", NAMES)
def test_the_estimate_counts_every_weight(name, built, tmp_path):
    folder = built(name)
    estimate, more = (
        TextToImage.estimate_memory(config.load(words(folder, tmp_path)[0], [*words(folder, tmp_path)[1:], batch]))
        for batch in ("batch=2", "batch=4")
    )
    weights = sum(
        tensor.numel() * 4
        for file in folder.glob("*/*.safetensors")
        for tensor in load_file(file).values()
        if tensor.is_floating_point()
    )
    made = load_base(TextToImageModel(path=str(folder)), "no")
    with made.adapted(config.load("text_to_image/dreambooth", []).lora, 0) as parts:
        factors = sum(p.numel() * 4 for part in parts.values() for p in part.parameters() if p.requires_grad)
    assert estimate and more and estimate.model == pytest.approx(weights + factors, rel=1e-2)
    assert more.activations == pytest.approx(2 * estimate.activations, rel=0.1)


def test_a_text_encoder_that_is_published_elsewhere_is_given_beside_the_base(built, tmp_path, capsys):
    whole, base, other = built("HiDreamImagePipeline"), tmp_path / "hidream", tmp_path / "llama"
    shutil.copytree(whole, base)
    for part in ("text_encoder_4", "tokenizer_4"):
        shutil.copytree(base / part, other, dirs_exist_ok=True)
        shutil.rmtree(base / part)
    index = json.loads((base / "model_index.json").read_text())
    described = {key: value for key, value in index.items() if not key.endswith("_4")}
    (base / "model_index.json").write_text(json.dumps(described))
    runs, more = tmp_path / "runs", ["steps=1", "samples.prompts=[]", "--id"]
    assert main(["train", *words(base, runs), *more, "refused"]) == 2
    assert (
        f"model.path: {base} has no text_encoder_4. Give model.text_encoder_4: Llama 3.1 8B" in capsys.readouterr().err
    )
    assert main(["train", *words(base, runs, f"model.text_encoder_4={tmp_path}"), *more, "refused"]) == 2
    assert f"model.text_encoder_4: {tmp_path} is no folder with a model's config.json" in capsys.readouterr().err
    assert main(["train", *words(built("SanaPipeline"), runs, f"model.text_encoder_4={other}"), *more, "refused"]) == 2
    assert "model.text_encoder_4: has no effect on Sana" in capsys.readouterr().err
    beside = words(base, runs, f"model.text_encoder_4={other}")
    estimates = [TextToImage.estimate_memory(config.load(some[0], some[1:])) for some in (beside, words(whole, runs))]
    assert estimates[0] == estimates[1]
    assert main(["train", *beside, *more, "beside"]) == main(["train", *words(whole, runs), *more, "whole"]) == 0
    files = [load_file(runs / run / "result" / LORA_FILE) for run in ("beside", "whole")]
    assert all(torch.equal(tensor, files[1][key]) for key, tensor in files[0].items())
    card = (runs / "beside" / "result" / "README.md").read_text()
    assert 'text_encoder_4 = LlamaForCausalLM.from_pretrained("llama"' in card and "tokenizer_4=tokenizer_4" in card


def test_a_base_without_a_part_is_refused_before_anything_else_is_fetched():
    described = {"_class_name": "HiDreamImagePipeline", "text_encoder_4": [None, None], "vae": [None, None]}
    found = layout._index_problems(described, Path("model_index.json"), "owner/name")
    assert "model.path: owner/name has no vae, which HiDream-I1 needs. Give one that has it." in found
    assert any("has no text_encoder_4. Give model.text_encoder_4" in problem for problem in found)
    assert len(layout._index_problems(described, Path("model_index.json"), "owner/name", ["text_encoder_4"])) == 1


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
def test_the_gradient_is_that_of_the_answer(name, base):
    """Along a direction in all factors, beside what a small step in it changes: no part of the answer goes without."""
    made = base(name)
    kind, noisy, times = made.family, some_latents(made, 2), torch.tensor([300.0, 800.0])
    read = kind.embed(made.pipeline, ["a red vase", "a blue cup"])
    weights = some_latents(made, 2, seed=1)
    with made.adapted(config.load("text_to_image/dreambooth", ["lora.alpha=4"]).lora, 0) as parts:
        begin_training(parts["transformer"])
        factors = [parameter for parameter in parts["transformer"].parameters() if parameter.requires_grad]
        source = torch.Generator().manual_seed(2)
        with torch.no_grad():
            for factor in factors:
                factor.copy_(torch.randn(factor.shape, generator=source) * 0.3)
        ways = [torch.randn(factor.shape, generator=source) for factor in factors]

        def answer() -> torch.Tensor:
            made_of = kind.predict(made.denoiser, noisy, times, read, torch.zeros(2, 6))
            return (made_of.double() * weights).sum()

        def moved(step: float) -> float:
            torch._foreach_add_(factors, ways, alpha=step)
            found = answer().item()
            torch._foreach_sub_(factors, ways, alpha=step)
            return found

        gradients = torch.autograd.grad(answer(), factors)
        slope = sum((gradient.double() * way).sum() for gradient, way in zip(gradients, ways, strict=True)).item()
        with torch.no_grad():
            seen = (moved(3e-4) - moved(-3e-4)) / 6e-4
    assert slope == pytest.approx(seen, rel=0.05, abs=5e-3) and abs(slope) > 0.03


def test_the_estimate_counts_what_is_kept_of_captions(built, tmp_path):
    photos = tmp_path / "photos"
    photos.mkdir()
    for index, caption in enumerate(["a vase", "a cup", "a vase"]):
        Image.new("RGB", (32, 32), (80 * index, 0, 0)).save(photos / f"{index}.png")
        (photos / f"{index}.txt").write_text(caption)
    folder = built("HiDreamImagePipeline")
    found = []
    for more in (["data=demo"], [f"data={photos}"], [f"data={photos}", "data.caption_dropout=0.1"]):
        given = words(folder, tmp_path, "data.instance_prompt=null", *more)
        found.append(TextToImage.estimate_memory(config.load(given[0], given[1:])).model)
    one = (128 * 16 + 32 * 128 * 16 + 16) * 4 + 8  # float32 of three tensors, and a length
    assert [other - found[0] for other in found[1:]] == [2 * one, 3 * one]


def test_hidream_takes_no_pictures_that_are_no_squares_beyond_its_most_tokens(built, tmp_path, capsys):
    """This one has 8 × 8 cells of 8 pixels at most."""
    folder = built("HiDreamImagePipeline")
    given = words(folder, tmp_path, "data.buckets=true", "data.bucket_step=16")
    assert main(["train", *given, "data.resolution=96", "--id", "refused"]) == 2
    assert "data.buckets: HiDream-I1 takes pictures that are no squares up to 4096 pixels" in capsys.readouterr().err
    problems = TextToImage.check
    assert problems(config.load(given[0], [*given[1:], "data.resolution=64"])) == []
    assert problems(config.load(given[0], [*given[1:], "data.resolution=96", "data.buckets=false"])) == []
    found = [
        TextToImage.estimate_memory(config.load(given[0], [*given[1:], *more])).activations
        for more in (["data.resolution=32"], ["data.resolution=64"], ["data.resolution=64", "data.buckets=false"])
    ]
    assert found[0] == found[1] == found[2]


@pytest.mark.filterwarnings("ignore:Dynamo detected a call to:UserWarning")  # in diffusers
def test_chroma_is_compiled_once_where_it_is_checkpointed(base):
    made, counter = base("ChromaPipeline"), CompileCounter()
    compiled = torch.compile(made.denoiser, backend=counter, dynamic=False)
    noisy, read = some_latents(made, 1), made.family.embed(made.pipeline, [PROMPT])
    found = []
    with made.adapted(config.load("text_to_image/dreambooth", []).lora, 0) as parts:
        begin_training(parts["transformer"])
        for _ in range(2):
            made.denoiser.enable_gradient_checkpointing()  # a second run of this process
            for time in (300.0, 800.0):
                made.family.predict(compiled, noisy, torch.tensor([time]), read, torch.zeros(1, 6)).sum().backward()
                found.append(counter.frame_count)
    made.denoiser.disable_gradient_checkpointing()
    assert found[0] > 0 and len(set(found)) == 1


def test_captions_are_kept_in_the_computers_memory_and_those_of_runs_before_are_dropped(base):
    """The denoiser stands on a device without memory: nothing that is kept may be there, and all that it reads is."""
    made = base("SanaPipeline")
    made.read(["a vase", "a cup"])
    made.read(["a cup", "a jug"])
    assert made.embeddings.keys() == {"a cup", "a jug"}
    away = copy.copy(made.pipeline)
    with torch.device("meta"):
        vars(away)["transformer"] = type(made.denoiser).from_config(made.denoiser.config)
    there = replace(made, pipeline=away)
    assert {tensor.device.type for tensor in there.known(["a cup", "a jug"]).values()} == {"meta"}
    assert {tensor.device.type for kept in there.embeddings.values() for tensor in kept.values()} == {"cpu"}


def test_text_encoders_come_to_the_device_only_to_read(built):
    """A device without memory: what is moved there is seen to be."""
    made = load_base(TextToImageModel(path=str(built("HiDreamImagePipeline"))), "no")
    away = copy.copy(made.pipeline)
    for name in (made.family.denoiser, *made.encoders):
        vars(away)[name] = copy.deepcopy(getattr(away, name))
    place(away, made.family, made.encoders, torch.device("meta"), TextToImageModel())
    there = replace(made, pipeline=away)

    def where() -> set[str]:
        return {getattr(away, name).device.type for name in there.encoders}

    assert there.denoiser.device.type == "meta" and where() == {"cpu"}
    with pytest.raises(NotImplementedError, match="Cannot copy out"), there.encoders_on_device():
        assert where() == {"meta"}


# Names in other apps


def some_factors(kind: Family, model) -> dict[str, Factors]:
    source, found = torch.Generator().manual_seed(0), {}
    for layer, module in model.named_modules():
        if isinstance(module, torch.nn.Linear) and layer.endswith((*kind.targets, "proj_mlp")):
            down = torch.randn((2, module.in_features), generator=source)
            up = torch.randn((module.out_features, 2), generator=source)
            found[f"transformer.{layer}"] = Factors(down, up, 1.0)
    return found


@pytest.mark.parametrize(("name", "format"), [(n, f) for n in NAMES for f in FORMATS if f not in family(n).refused])
def test_every_bit_comes_back(name, format, base, tmp_path):
    made = base(name)
    factors = some_factors(made.family, made.denoiser)
    write_lora(tmp_path / "lora.safetensors", format, factors, made.shape, {"format": "pt"})
    found = read_lora(tmp_path / "lora.safetensors", factors, made.shape)
    assert found.keys() == factors.keys() and len(found) > 3
    assert all(torch.equal(found[layer].up, own.up) for layer, own in factors.items())
    if format == "comfyui":  # its loader knows diffusers' modules of these families by that prefix
        names = {name.rsplit(".lora_", 1)[0] for name in load_file(tmp_path / "lora.safetensors") if ".lora_" in name}
        assert names == factors.keys()


@pytest.mark.parametrize(
    ("name", "convert"),
    [
        ("Flux2Pipeline", _convert_kohya_flux2_lora_to_diffusers),
        ("ChromaPipeline", _convert_kohya_flux_lora_to_diffusers),
        ("QwenImagePipeline", _convert_non_diffusers_qwen_lora_to_diffusers),
    ],
)
def test_diffusers_reads_kohyas_files_as_the_same_updates(name, convert, base, tmp_path):
    model = base(name).denoiser
    if name == "ChromaPipeline":  # that converter knows one width
        with torch.device("meta"):
            model = ChromaTransformer2DModel(num_layers=1, num_single_layers=1)
    factors, shape = some_factors(family(name), model), shape_of(name, model.config)
    write_lora(tmp_path / "kohya.safetensors", "kohya", factors, shape, {"format": "pt"})
    theirs = convert(load_file(tmp_path / "kohya.safetensors"))
    for layer, own in factors.items():
        update = theirs.pop(f"{layer}.lora_B.weight") @ theirs.pop(f"{layer}.lora_A.weight")
        assert torch.allclose(update, own.up @ own.down * (own.alpha / own.rank), atol=1e-4), layer
    assert not theirs


@pytest.mark.soak  # two minutes
def test_the_tables_of_the_docs_are_what_the_command_prints():
    root = Path(__file__).parents[3]
    command = [sys.executable, str(root / "benchmarks" / "picture_families.py")]
    done = subprocess.run(command, capture_output=True, text=True, cwd=root)
    assert done.returncode == 0, done.stderr
    docs = (root / "docs" / "text_to_image.md").read_text()
    first, second = done.stdout.strip().split("\n\n")
    assert first in docs and second in docs
