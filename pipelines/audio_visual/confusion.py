"""A confusion matrix as a picture: its classes' names, and in each cell how many clips."""

import csv
from pathlib import Path

import numpy as np
from PIL import Image, ImageDraw, ImageFont

SIDE = 320  # pixels of the small picture
LABELLED = 60  # classes; of more, names and numbers would not be read
_DARK, _INK, _PALE = (9, 60, 120), "#1b1f24", "#ffffff"  # the first is the colour of a full cell
_LONG = 22  # characters of a name
_FONT = 13  # pixels


def read(table: Path) -> tuple[list[str], np.ndarray]:
    """The classes, and how many clips of each (rows) were taken for each (columns)."""
    with table.open(newline="") as file:
        rows = list(csv.reader(file))[1:]
    return [row[0] for row in rows], np.array([[int(value) for value in row[1:]] for row in rows], float)


def small(counts: np.ndarray) -> Image.Image:
    """Each row in shares of its class: the darker the diagonal, the better."""
    return _pixels(counts).resize((SIDE, SIDE), Image.Resampling.NEAREST)


def large(classes: list[str], counts: np.ndarray) -> Image.Image:
    """The same with names beside and above it and the counts in it; of very many classes without."""
    if len(classes) > LABELLED:
        side = 4 * len(classes)
        return _pixels(counts).resize((side, side), Image.Resampling.NEAREST)
    font = ImageFont.load_default(_FONT)
    names = [name if len(name) <= _LONG else name[: _LONG - 1] + "…" for name in classes]
    wide = max(int(font.getlength(name)) for name in names) + 12
    side = max(30, int(font.getlength(str(int(counts.max(initial=0))))) + 10)  # pixels of a cell
    left, top, size = wide + 20, wide + 20, side * len(classes)
    sheet = Image.new("RGB", (left + size + 8, top + size + 8), _PALE)
    sheet.paste(_pixels(counts).resize((size, size), Image.Resampling.NEAREST), (left, top))
    pen, shares = ImageDraw.Draw(sheet), _shares(counts)
    for row, name in enumerate(names):
        middle = top + side * row + side // 2
        pen.text((left - 6, middle), name, _INK, font, anchor="rm")
        sheet.paste(_turned(name, font, wide, side), (left + side * row, top - wide - 2))
        for column in np.flatnonzero(counts[row]):
            ink = _PALE if shares[row, column] > 0.5 else _INK
            at = (left + side * int(column) + side // 2, middle)
            pen.text(at, str(int(counts[row, column])), ink, font, anchor="mm")
    pen.text((left + size // 2, 8), "predicted", _INK, font, anchor="mm")
    sheet.paste(_turned("true", font, size, 16, middle=True), (0, top))
    return sheet


def _turned(
    words: str, font: ImageFont.ImageFont | ImageFont.FreeTypeFont, long: int, high: int, middle: bool = False
) -> Image.Image:
    """Words that are read from below, at the foot of a strip or in its middle."""
    strip = Image.new("RGB", (long, high), _PALE)
    at, anchor = ((long // 2, high // 2), "mm") if middle else ((4, high // 2), "lm")
    ImageDraw.Draw(strip).text(at, words, _INK, font, anchor=anchor)
    return strip.rotate(90, expand=True)


def _shares(counts: np.ndarray) -> np.ndarray:
    return counts / counts.sum(1, keepdims=True).clip(1)


def _pixels(counts: np.ndarray) -> Image.Image:
    pixels = 255 - _shares(counts)[..., None] * (255 - np.array(_DARK))
    return Image.fromarray(pixels.astype(np.uint8))
