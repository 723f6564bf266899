"""Scores: the drawn domain's judge, the loss, and CLIP on a small checkpoint in the real layout."""

import math

import pytest
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.demo import shapes
from equipoise.pipelines.text_to_image.generate import Sample
from equipoise.pipelines.text_to_image.metrics import ClipScore, drawn_subject, measure, score


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
    metrics, verdicts = measure(samples, drawn=True)
    assert metrics["object"] == 0.5 and metrics["kept"] == 1.0 and metrics["broken"] == 0.0
    assert [right for right, _ in verdicts] == [True, False, True]
    assert score(metrics) == 0.5


@pytest.mark.parametrize(("level", "finite"), [(0, True), (255, True), (127, True), (0, False)])
def test_flat_and_non_finite_pictures_are_broken(level, finite):
    flat = Sample("x", 0, Image.new("RGB", (8, 8), (level,) * 3), finite)
    metrics, verdicts = measure([flat, drawn(shapes.OBJECT, "white")], drawn=False)
    assert metrics == {"broken": 0.5}
    assert verdicts[0] == (None, "broken")


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
