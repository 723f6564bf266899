"""The embedded base is what its report says: small, loadable by diffusers, and good at what it was trained on."""

import json
from importlib.resources import files

import pytest
import torch
from diffusers import StableDiffusionPipeline
from safetensors import safe_open

from equipoise.pipelines.demo import base_folder, shapes
from equipoise.pipelines.demo.train_base import HELD_OUT, sample


@pytest.fixture(scope="module")
def pipeline():
    return StableDiffusionPipeline.from_pretrained(base_folder(), dtype=torch.float32)


def test_the_embedded_base_is_small_and_half_precision():
    weights = sorted(base_folder().glob("*/*.safetensors"))
    assert [path.parent.name for path in weights] == ["text_encoder", "unet", "vae"]
    assert sum(path.stat().st_size for path in base_folder().rglob("*") if path.is_file()) <= 15e6
    for path in weights:
        with safe_open(path, "pt") as file:
            assert {file.get_tensor(key).dtype for key in file.keys()} == {torch.float16}
    assert not list(base_folder().rglob("*.bin"))


def test_every_word_of_the_domain_is_one_token(pipeline):
    words = ["a", "on", "background", "object", shapes.IDENTIFIER, *shapes.COLOURS, *shapes.SHAPES, *shapes.BACKGROUNDS]
    assert [len(pipeline.tokenizer.tokenize(word)) for word in words] == [1] * len(words)
    assert len(pipeline.tokenizer.tokenize("teapot")) > 1


def test_the_report_holds_what_is_promised():
    report = json.loads(files("equipoise.pipelines.demo").joinpath("base", "report.json").read_text())
    trained = {name: row["right"] for name, row in report["cells"].items() if row["trained"]}
    assert len(trained) == len(shapes.COLOURS) * len(shapes.SHAPES) - len(HELD_OUT)
    assert min(trained.values()) >= 0.9
    assert report["the untaught object"] <= 0.05


def test_fresh_samples_agree_with_the_report(pipeline):
    """One sample of every trained colour × shape, from noise that the report has not seen."""
    wanted = [
        (shapes.shape(colour, name), shapes.BACKGROUNDS[index % 4])
        for index, (colour, name) in enumerate((c, s) for c in shapes.COLOURS for s in shapes.SHAPES)
        if (colour, name) not in HELD_OUT
    ]
    pictures = sample(pipeline, [shapes.caption(subject.name, background) for subject, background in wanted], seed=77)
    right = sum(shapes.judge(picture, subject).right for picture, (subject, _) in zip(pictures, wanted, strict=True))
    assert right >= 0.85 * len(wanted)  # at a true share of 0.95, fewer than 1 draw in 200 falls below
