"""Scores: the drawn domain's judge, broken pictures, and the loss."""

import math
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.pipelines.demo import shapes
from equipoise.pipelines.text_to_image.generate import Sample
from equipoise.pipelines.text_to_image.metrics import FAULTS, NOISE, drawn_subject, measure, roughness, score

PHOTOGRAPHS = sorted(Path(__file__).parents[4].glob("shared/data/dreambooth/*/*.jpg"))


def drawn(subject, background, prompt=None):
    return Sample(prompt or shapes.caption(subject.name, background), 0, shapes.draw(subject, background), True)


def test_prompts_of_the_drawn_domain_are_recognised():
    assert drawn_subject("a sks object on a striped background") is shapes.OBJECT
    assert drawn_subject("a red circle on a white background").name == "red circle"
    assert drawn_subject("a red circle on a beach") is None


def test_the_new_object_and_known_shapes_are_counted_apart():
    known = shapes.shape("red", "circle")
    samples = [
        drawn(shapes.OBJECT, "white"),
        drawn(known, "white", prompt="a sks object on a white background"),
        drawn(known, "gray"),
    ]
    metrics, verdicts, scores = measure(samples, drawn=True, cell=4)
    assert [one["right"] for one in scores] == [1.0, 0.0, 1.0]
    assert metrics["object"] == 0.5 and metrics["kept"] == 1.0 and metrics["broken"] == 0.0
    assert [right for right, _ in verdicts] == [True, False, True]
    assert score(metrics) == 0.5


@pytest.mark.parametrize(
    ("level", "finite", "fault"),
    [(0, True, "black"), (255, True, "flat"), (127, True, "flat"), (0, False, "not_finite")],
)
def test_flat_and_non_finite_pictures_are_broken(level, finite, fault):
    flat = Sample("x", 0, Image.new("RGB", (8, 8), (level,) * 3), finite)
    metrics, verdicts, scores = measure([flat, drawn(shapes.OBJECT, "white")], drawn=False, cell=4)
    assert metrics["broken"] == 0.5
    assert {name: metrics[name] for name in FAULTS} == dict.fromkeys(FAULTS, 0.0) | {fault: 0.5}
    assert verdicts == [(None, f"broken: {fault.replace('_', ' ')}"), (None, "")]
    assert [one["broken"] for one in scores] == [1.0, 0.0]


def confetti(seed: int, cell: int = 4) -> Image.Image:
    """Colours drawn at random for every latent cell, blurred into one another as an autoencoder does."""
    colours = np.random.default_rng(seed).normal(128, 90, (64 // cell, 64 // cell, 3)).clip(0, 255).astype(np.uint8)
    return Image.fromarray(colours).resize((64, 64), Image.Resampling.BICUBIC)


def test_confetti_is_broken_and_everything_drawn_is_not():
    subjects = [shapes.OBJECT, *(shapes.shape("red", name) for name in shapes.SHAPES)]
    pictures = [drawn(subject, background) for subject in subjects for background in shapes.BACKGROUNDS]
    assert measure(pictures, drawn=False, cell=4)[0]["broken"] == 0.0, "stripes are no noise"
    noise = [Sample("x", seed, confetti(seed), True) for seed in range(8)]
    metrics, verdicts, _ = measure([*noise, *pictures[:8]], drawn=False, cell=4)
    assert metrics["broken"] == metrics["noise"] == 0.5 and verdicts[0][1].startswith("broken: noise 0.")
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
