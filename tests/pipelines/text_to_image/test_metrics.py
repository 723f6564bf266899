"""Scores: the drawn domain's judge, the loss, and CLIP on a small checkpoint in the real layout."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.demo import shapes
from equipoise.pipelines.text_to_image.generate import Sample
from equipoise.pipelines.text_to_image.metrics import NOISE, ClipScore, drawn_subject, measure, roughness, score

PHOTOGRAPHS = sorted(Path(__file__).parents[4].glob("shared/data/dreambooth/*/*.jpg"))


def drawn(subject, background, prompt=None):
    return Sample(prompt or shapes.caption(subject.name, background), 0, shapes.draw(subject, background), True)


def test_prompts_of_the_drawn_domain_are_recognised():
    assert drawn_subject("a sks object on a striped background") is shapes.OBJECT
    assert drawn_subject("a red circle on a white background").name == "red circle"
    assert drawn_subject("a red circle on a beach") is None


def test_what_was_taught_and_what_was_known_are_counted_apart():
    known = shapes.shape("red", "circle")
    samples = [
        drawn(shapes.OBJECT, "white"),
        drawn(known, "white", prompt="a sks object on a white background"),
        drawn(known, "gray"),
    ]
    metrics, verdicts = measure(samples, drawn=True, cell=4)
    assert metrics["object"] == 0.5 and metrics["kept"] == 1.0 and metrics["broken"] == 0.0
    assert [right for right, _ in verdicts] == [True, False, True]
    assert score(metrics) == 0.5


@pytest.mark.parametrize(("level", "finite"), [(0, True), (255, True), (127, True), (0, False)])
def test_flat_and_non_finite_pictures_are_broken(level, finite):
    flat = Sample("x", 0, Image.new("RGB", (8, 8), (level,) * 3), finite)
    metrics, verdicts = measure([flat, drawn(shapes.OBJECT, "white")], drawn=False, cell=4)
    assert metrics["broken"] == 0.5
    assert verdicts == [(None, "broken: flat"), (None, "")]


def confetti(seed: int, cell: int = 4) -> Image.Image:
    """Colours drawn at random for every latent cell, blurred into one another as an autoencoder does."""
    colours = np.random.default_rng(seed).normal(128, 90, (64 // cell, 64 // cell, 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(colours).resize((64, 64), Image.Resampling.BICUBIC)


def test_confetti_is_broken_and_everything_drawn_is_not():
    subjects = [shapes.OBJECT, *(shapes.shape("red", name) for name in shapes.SHAPES)]
    pictures = [drawn(subject, background) for subject in subjects for background in shapes.BACKGROUNDS]
    assert measure(pictures, drawn=False, cell=4)[0]["broken"] == 0.0, "stripes are no noise"
    noise = [Sample("x", seed, confetti(seed), True) for seed in range(8)]
    metrics, verdicts = measure([*noise, *pictures[:8]], drawn=False, cell=4)
    assert metrics["broken"] == 0.5 and verdicts[0][1].startswith("broken: noise 0.")
    assert score(metrics | {"loss_before": 1.0, "loss_after": 0.0}) == 0.5


def test_what_the_base_draws_as_rough_is_no_noise_for_that_prompt():
    noise = [Sample("gravel", seed, confetti(seed), True) for seed in range(3)]
    roughest = max(noise, key=lambda sample: roughness(sample.image, 4))
    assert measure(noise, drawn=False, cell=4, base=[roughest])[0]["broken"] == 0.0
    other = Sample("sand", 0, roughest.image, True)
    assert measure(noise, drawn=False, cell=4, base=[other])[0]["broken"] == 1.0


@pytest.mark.skipif(not PHOTOGRAPHS, reason="there are no photographs at ../shared/data")
@pytest.mark.parametrize("size", [64, 256])
def test_noise_is_told_from_photographs(size):
    rng = np.random.default_rng(0)
    photographs = [Image.open(path).convert("RGB").resize((size, size)) for path in PHOTOGRAPHS]
    assert max(roughness(photograph, 4) for photograph in photographs) < NOISE
    for photograph in photographs:
        noisy = np.asarray(photograph) + rng.normal(0, 128, (size, size, 3))
        assert roughness(Image.fromarray(noisy.clip(0, 255).astype(np.uint8)), 4) > NOISE


def test_the_loss_is_the_score_elsewhere():
    assert score({"broken": 0.5, "loss_before": 0.4, "loss_after": 0.2}) == pytest.approx(0.25)
    assert score({"broken": 0.0}) == 0.0
    assert score({"broken": 0.0, "loss_before": 0.4, "loss_after": math.nan}) == -math.inf


def test_clip_score_against_the_formula(tmp_path):
    from transformers import CLIPConfig, CLIPImageProcessor, CLIPModel, CLIPProcessor

    from equipoise.pipelines.demo.train_base import tokenizer

    words = tokenizer(tmp_path / "tokenizer")
    small = {"hidden_size": 16, "intermediate_size": 16, "num_hidden_layers": 1, "num_attention_heads": 2}
    text = {**small, "vocab_size": len(words), "max_position_embeddings": 32, "eos_token_id": words.eos_token_id}
    model = CLIPModel(
        CLIPConfig(text_config=text, vision_config={**small, "image_size": 32, "patch_size": 8}, projection_dim=8)
    )
    model.save_pretrained(tmp_path / "clip", safe_serialization=True)
    size = {"height": 32, "width": 32}
    processor = CLIPProcessor(CLIPImageProcessor(size=size, crop_size=size), words)
    processor.save_pretrained(tmp_path / "clip")
    samples = [drawn(shapes.OBJECT, "white"), drawn(shapes.shape("red", "star"), "gray")]
    inputs = processor(
        text=[s.prompt for s in samples], images=[s.image for s in samples], return_tensors="pt", padding=True
    )
    with torch.no_grad():
        images = model.eval().visual_projection(model.vision_model(inputs["pixel_values"]).pooler_output)
        texts = model.text_projection(
            model.text_model(inputs["input_ids"], attention_mask=inputs["attention_mask"]).pooler_output
        )
    expected = 100 * torch.cosine_similarity(images, texts).clamp(min=0).mean().item()
    assert ClipScore(str(tmp_path / "clip"))(samples) == pytest.approx(expected, abs=1e-4)


def test_what_is_not_clip_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"--clip: .* cannot be loaded as CLIP"):
        ClipScore(str(tmp_path))
