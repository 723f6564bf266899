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
    assert not both["diverged"] and not alone["diverged"]
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
                right = dict.fromkeys(scaled_pictures.LEARNT, share) | dict.fromkeys(scaled_pictures.KEPT, 7.0)
                found = {f"{s:g}": right for s in scaled_pictures.STRENGTHS[task]}
                pictures = {f"{s:g}": dict.fromkeys(kinds, picture) for s in scaled_pictures.STRENGTHS[task]}
                about = {"task": task, "method": method, "rate": rate, "seed": 0, "steps": 3}
                earlier.append({**about, "right": found, "pictures": pictures})
    right = dict(zip(scaled_pictures.KINDS, (0.0, 38.0, 99.0), strict=True))
    about = {"task": "untouched", "method": "untouched", "rate": 0.0, "seed": 0, "steps": 0}
    earlier.append({**about, "right": {"1": right}, "pictures": {"1": dict.fromkeys(kinds, picture)}})
    made = scaled_pictures.reproduce(1, 1, 3, earlier=earlier)
    assert made.cells == earlier and list(made.pictures) == ["figure-1.png", "figures-3-and-7-to-14.png"]
    lines = [" ".join(line.split()) for line in made.text.splitlines()]
    assert lines.count("untouched 0 0 38 19 99") == 2, "in either table; the mean is of what is learnt, not of all"
    assert "AdamW 0.1 50 50 50 7" in lines and "0.7 scaled AdamW 0.005 75 75 75 7" in lines
    one = "paper above 0, here +25. Same direction, of one seed."
    assert f"- scaled AdamW over AdamW, learnt at 0.1: {one}" in lines
    assert f"- scaled AdamW over AdamW, learnt at 0.005, strength 0.7: {one}" in lines
    assert "learnt at 0.001, strength 1: paper above 0, here +0. No difference." in made.text
    assert made.pictures["figures-3-and-7-to-14.png"].size == (9 * scaled_pictures.SIDE, 4 * scaled_pictures.SIDE)


def test_the_base_draws_by_another_name_what_is_to_be_learnt_and_not_by_the_new_word(monkeypatch):
    monkeypatch.setattr(scaled_pictures, "COUNT", 1)
    subject, triangle = scaled_pictures.SUBJECT, shapes.shape("red", "triangle")
    assert subject.parts == triangle.parts
    monkeypatch.setattr(scaled_pictures, "KINDS", {"a red triangle": triangle, f"a {subject.name}": triangle})
    untouched = {"task": scaled_pictures.NOTHING, "method": "", "rate": 0.0, "seed": 0, "steps": 0}
    assert scaled_pictures.train(untouched)["right"] == {"1": {"a red triangle": 100.0, "a sks object": 0.0}}
    latents, tokens = scaled_pictures._learned()
    assert latents.shape == (6, 4, 16, 16) and len(tokens) == 6 and torch.isfinite(latents).all()
