"""What a family's denoiser is given and answers by its pipeline's own code: times, signs, scales, captions, latents."""

import copy
from types import SimpleNamespace
from typing import ClassVar

import pytest
import torch
from diffusers import (
    ChromaPipeline,
    FlowMatchEulerDiscreteScheduler,
    Flux2Pipeline,
    QwenImagePipeline,
)

from equipoise.pipelines import config
from equipoise.pipelines.text_to_image.base import begin_training
from equipoise.pipelines.text_to_image.config import NoiseSection, TextToImageSamples
from equipoise.pipelines.text_to_image.families import Family, autoencoders, family, known
from equipoise.pipelines.text_to_image.families.flows import FLOWS
from equipoise.pipelines.text_to_image.families.generic import GenericFlow
from equipoise.pipelines.text_to_image.generate import generate
from equipoise.pipelines.text_to_image.overview import unread_words

NAMES = list(FLOWS)
OWN = [name for name in known() if family(name).noise == "flow"]
PROMPT = "a sks object"
pytestmark = pytest.mark.filterwarnings("ignore:`FluxPosEmbed` is deprecated:FutureWarning")  # of diffusers, by it


# Times, signs and scales


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
def test_one_step_of_the_familys_own_sampling_with_the_exact_answer_lands_on_the_picture(
    name, base, monkeypatch, some_latents
):
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
    name, base, monkeypatch, some_latents
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
def test_a_dropped_caption_is_read_as_the_pipeline_reads_no_negative_prompt(name, base, monkeypatch, some_latents):
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
def test_the_answer_is_that_of_a_direct_call(name, base, some_latents):
    made = base(name)
    noisy, times = some_latents(made, 2), torch.tensor([300.0, 800.0])
    read = made.family.embed(made.pipeline, ["a red vase", "a blue cup"])
    ours = made.family.predict(made.denoiser, noisy, times, read, torch.zeros(2, 6))
    assert torch.allclose(ours, direct(name, made.pipeline, noisy, times, read), atol=1e-5)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_every_picture_has_its_own_time_and_caption(name, base, some_latents):
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


@pytest.mark.parametrize("name", NAMES)
def test_the_gradient_is_that_of_the_answer(name, base, some_latents):
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
def test_the_families_with_code_of_their_own_equal_the_generic_one(generic, base, some_latents):
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
def test_the_autoencoder_is_given_what_the_pipeline_gives_it(name, base, monkeypatch, some_latents):
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
