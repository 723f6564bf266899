"""The judge is exact: it accepts every picture of the drawn domain and nothing else."""

import itertools

import numpy as np
import pytest
from PIL import Image, ImageFilter

from equipoise.pipelines.demo import shapes

PAIRS = list(itertools.product(shapes.COLOURS, shapes.SHAPES))


def test_every_drawn_picture_is_right():
    rng = np.random.default_rng(0)
    for (colour, name), background in itertools.product(PAIRS, shapes.BACKGROUNDS):
        subject = shapes.shape(colour, name)
        assert shapes.judge(shapes.draw_varied(subject, background, rng), subject).right, (colour, name, background)
    for background in shapes.BACKGROUNDS:
        assert shapes.judge(shapes.draw_varied(shapes.OBJECT, background, rng), shapes.OBJECT).right


@pytest.mark.parametrize("name", shapes.SHAPES)
def test_a_picture_of_another_shape_is_wrong(name):
    for other in shapes.SHAPES.keys() - {name}:
        verdict = shapes.judge(shapes.draw(shapes.shape("red", other), "white"), shapes.shape("red", name))
        assert verdict.colour and not verdict.shape, (name, other)


@pytest.mark.parametrize("colour", shapes.COLOURS)
def test_a_picture_in_another_colour_is_wrong(colour):
    for other in shapes.COLOURS.keys() - {colour}:
        verdict = shapes.judge(shapes.draw(shapes.shape(other, "star"), "black"), shapes.shape(colour, "star"))
        assert verdict.shape and not verdict.colour, (colour, other)


def test_no_known_shape_passes_for_the_object():
    for colour, name in PAIRS:
        assert not shapes.judge(shapes.draw(shapes.shape(colour, name), "white"), shapes.OBJECT).right


def test_the_object_needs_each_part_in_its_colour():
    stem, cap = shapes.OBJECT.parts
    swapped = shapes.Subject("swapped", (shapes.Part(stem.polygon, cap.hue), shapes.Part(cap.polygon, stem.hue)))
    verdict = shapes.judge(shapes.draw(swapped, "white"), shapes.OBJECT)
    assert verdict.shape and not verdict.colour


@pytest.mark.parametrize("level", [0, 128, 255])
def test_flat_pictures_are_wrong(level):
    picture = Image.new("RGB", (shapes.SIZE, shapes.SIZE), (level, level, level))
    assert shapes.judge(picture, shapes.OBJECT) == shapes.Verdict(False, False, 0.0)


def test_a_picture_of_noise_is_wrong():
    noise = np.random.default_rng(1).integers(0, 256, (shapes.SIZE, shapes.SIZE, 3), dtype=np.uint8)
    assert not any(shapes.judge(Image.fromarray(noise), shapes.shape(c, s)).right for c, s in PAIRS)


def test_a_little_blur_is_forgiven_and_a_lot_is_not():
    subject = shapes.shape("blue", "star")
    picture = shapes.draw(subject, "gray")
    assert shapes.judge(picture.filter(ImageFilter.GaussianBlur(0.7)), subject).right
    assert not shapes.judge(picture.filter(ImageFilter.GaussianBlur(9)), subject).right


def test_hues_are_drawn_as_named():
    picture = shapes.draw(shapes.shape("green", "square"), "black")
    red, green, blue = picture.getpixel((32, 32))
    assert green > 200 and red < 60 and blue < 60
