"""Confusion matrices as pictures: shares by colour, names and numbers beside and in them."""

import csv

import numpy as np
from PIL import Image

from equipoise.pipelines.audio_visual import confusion


def table(path, counts: list[list[int]]):
    classes = [f"class {index}" for index in range(len(counts))]
    with path.open("w", newline="") as file:
        csv.writer(file).writerows(
            [["true \\ predicted", *classes], *([c, *row] for c, row in zip(classes, counts, strict=True))]
        )
    return path


def dark(image: Image.Image) -> np.ndarray:
    return np.asarray(image.convert("L")) < 100


def test_the_large_one_has_names_and_numbers(tmp_path):
    classes, counts = confusion.read(table(tmp_path / "a.csv", [[9, 1], [0, 5]]))
    assert classes == ["class 0", "class 1"] and counts.tolist() == [[9, 1], [0, 5]]
    small, large = confusion.small(counts), confusion.large(classes, counts)
    assert small.size == (320, 320) and small.getpixel((0, 319)) == (255, 255, 255), "nothing was taken for it"
    blue = np.asarray(small)[0, 0]
    assert blue[2] > blue[0] and np.asarray(small)[319, 319].tolist() == list(confusion._DARK)
    ink = dark(large)
    left = large.width - 8 - 60
    assert ink[-50:-20, : left - 4].any() and ink[: left - 2, -50:-20].any(), "names beside and above it"
    empty = np.asarray(large)[-36:-10, left + 2 : left + 28]
    assert (empty > 250).all(), "no number where there are no clips"
    few = np.asarray(large.convert("L"))[-66:-40, left + 32 : left + 58]
    assert few.min() < 100 < few.max(), "1 of 10 is written in ink on a pale cell"


def test_very_many_classes_are_drawn_without(tmp_path):
    counts = np.eye(confusion.LABELLED + 1)
    assert confusion.large(["x"] * len(counts), counts).size == (4 * len(counts),) * 2
    long = confusion.large(["x" * 500, "y"], np.zeros((2, 2)))
    assert long.width < 400, "a long name is cut"
