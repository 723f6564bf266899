"""Drawn digits with tones: an audio-visual data set in which one modality is easy and the other informative.

The tone is the class's own in eight clips of ten and any class's in the rest: it is learned at once, and a model that
trusts it is wrong as often as that. The digit is always right, but turned, shifted, crossed out and noisy, so that it
takes many more steps to learn. Everything comes from one seed; files are ordinary WAV and PNG, with a manifest.
"""

import csv
from pathlib import Path

from equipoise.pipelines.demo import once

CLASSES = 10
CLIPS = {"train": 800, "val": 200, "test": 600}
RIGHT = 0.8  # share of clips whose tone is their class's
RATE, SECONDS, SIDE = 8000, 0.5, 32  # Hz; of a tone; pixels
_VERSION = 3


def manifest(runs: Path) -> Path:
    """The manifest of the set, drawn below the runs folder once, whoever else wants it too."""
    folder = runs / ".demo" / f"digits-{_VERSION}"
    return once(folder, lambda made: (made / "manifest.csv").is_file(), write) / "manifest.csv"


def write(folder: Path, seed: int = 0) -> None:
    """Draws the set into a new folder."""
    import numpy as np
    import soundfile

    rng = np.random.default_rng(seed)
    (folder / "clips").mkdir(parents=True)
    with (folder / "manifest.csv").open("w", newline="") as file:
        writer = csv.writer(file, lineterminator="\n")
        writer.writerow(["clip", "audio", "frames", "label", "split"])
        for split, count in CLIPS.items():
            for index in range(count):
                digit = index % CLASSES
                spoken = digit if rng.random() < RIGHT else int(rng.integers(CLASSES))
                name = f"{split}-{index:04d}"
                soundfile.write(folder / "clips" / f"{name}.wav", tone(spoken, rng), RATE)
                draw(digit, rng).save(folder / "clips" / f"{name}.png")
                writer.writerow([name, f"clips/{name}.wav", f"clips/{name}.png", digit, split])


def tone(digit: int, rng):  # (samples,) float32
    """A tone of the digit's pitch, in noise."""
    import numpy as np

    time = np.arange(int(RATE * SECONDS)) / RATE
    pitch = 300 * 2 ** (digit / 4) * 2 ** rng.normal(0, 0.02)  # three semitones apart
    wave = 0.3 * np.sin(2 * np.pi * (pitch * time + rng.random())) + rng.normal(0, 0.05, time.shape)
    return (wave * rng.uniform(0.5, 1)).astype(np.float32)


def draw(digit: int, rng):
    """A picture of the digit, SIDE × SIDE."""
    import numpy as np
    from PIL import Image, ImageDraw, ImageFont

    ink, paper = (40, 215) if rng.random() < 0.5 else (215, 40)
    sheet = Image.new("L", (2 * SIDE, 2 * SIDE), paper)
    pen = ImageDraw.Draw(sheet)
    centre = tuple(rng.uniform(0.42, 0.58, 2) * 2 * SIDE)
    pen.text(centre, str(digit), ink, ImageFont.load_default(float(rng.uniform(34, 50))), anchor="mm")
    sheet = sheet.rotate(float(rng.uniform(-20, 20)), Image.Resampling.BICUBIC, fillcolor=paper)
    pen = ImageDraw.Draw(sheet)
    for _ in range(3):
        ends = rng.uniform(0, 2 * SIDE, 4).tolist()
        pen.line(ends, int(rng.choice((ink, paper))), width=2)
    pixels = np.asarray(sheet.resize((SIDE, SIDE), Image.Resampling.BOX), np.float32)
    return Image.fromarray((pixels + rng.normal(0, 25, pixels.shape)).clip(0, 255).astype(np.uint8))
