"""`equipoise reproduce scaled-pictures`: what is trained, at what strength it is drawn, and what its table counts."""

import base64
import io

import pytest
import torch
from PIL import Image

from equipoise.pipelines.demo import shapes
from equipoise.pipelines.reproduce import scaled_pictures


@pytest.fixture
def quick(monkeypatch):
    """One picture of each prompt, in one step."""
    monkeypatch.setattr(scaled_pictures, "COUNT", 1)
    monkeypatch.setattr(scaled_pictures, "SAMPLING", 1)
    monkeypatch.setattr(shapes, "BACKGROUNDS", ("white",))


def test_a_strength_changes_the_pictures_and_the_text_encoder_alone_learns_where_the_unet_is_frozen(quick, monkeypatch):
    drawn = []
    judged = scaled_pictures._judged

    def watched(pipe, seed):
        drawn.append(pipe)
        return judged(pipe, seed)

    monkeypatch.setattr(scaled_pictures, "_judged", watched)
    cell = {"method": "scaled AdamW", "rate": 1e-2, "seed": 0, "steps": 2}
    both, alone = (scaled_pictures.train({**cell, "task": t}) for t in (scaled_pictures.BOTH, scaled_pictures.ENCODER))
    assert both["pictures"].keys() == {"0.7", "1"} and alone["pictures"].keys() == {"1"}
    for kind in scaled_pictures.KINDS:
        weak, full = (both["pictures"][strength][kind] for strength in ("0.7", "1"))
        assert weak != full and Image.open(io.BytesIO(base64.b64decode(full))).size == (shapes.SIZE, shapes.SIZE)
    assert not both["diverged"] and all(share in (0.0, 100.0) for share in alone["right"]["1"].values())
    trained, frozen = drawn[0], drawn[-1]
    assert any("lora" in name for name, _ in trained.unet.named_parameters())
    assert not any("lora" in name for name, _ in frozen.unet.named_parameters())
    moved = [p for name, p in frozen.text_encoder.named_parameters() if "lora_B" in name]
    assert moved and any(p.abs().max() > 0 for p in moved)
    base = scaled_pictures._base()
    assert not any("lora" in name for name, _ in base.text_encoder.named_parameters()), "the next cell begins anew"


def test_the_table_is_of_every_cell_and_none_is_trained_twice():
    png = io.BytesIO()
    Image.new("RGB", (shapes.SIZE, shapes.SIZE), "red").save(png, "PNG")
    picture = base64.b64encode(png.getvalue()).decode()
    earlier = []
    for task, rates in scaled_pictures.RATES.items():
        for method in scaled_pictures.METHODS:
            for rate in rates:
                share = 75.0 if method == "scaled AdamW" and rate == max(rates) else 50.0
                kinds = scaled_pictures.KINDS
                found = {f"{s:g}": dict.fromkeys(kinds, share) for s in scaled_pictures.STRENGTHS[task]}
                pictures = {f"{s:g}": dict.fromkeys(kinds, picture) for s in scaled_pictures.STRENGTHS[task]}
                about = {"task": task, "method": method, "rate": rate, "seed": 0, "steps": 3}
                earlier.append({**about, "right": found, "pictures": pictures})
    made = scaled_pictures.reproduce(1, 1, 3, earlier=earlier)
    assert made.cells == earlier and list(made.pictures) == ["figure-1.png", "figures-7-to-11.png"]
    assert "- scaled AdamW over AdamW, mean at 0.1: paper above 0, here +25. Same direction." in made.text
    assert (
        "- scaled AdamW over AdamW, mean at 0.005, strength 0.7: paper above 0, here +25. Same direction." in made.text
    )
    assert "mean at 0.001, strength 1: paper above 0, here +0. No difference." in made.text
    assert made.pictures["figures-7-to-11.png"].size == (9 * scaled_pictures.SIDE, 4 * scaled_pictures.SIDE)


def test_the_word_to_be_learnt_means_what_the_base_draws_by_another_name():
    subject = scaled_pictures.SUBJECT
    assert subject.parts == shapes.shape("red", "triangle").parts and subject.name == "sks object"
    latents, tokens = scaled_pictures._learned()
    assert latents.shape == (6, 4, 16, 16) and len(tokens) == 6 and torch.isfinite(latents).all()
