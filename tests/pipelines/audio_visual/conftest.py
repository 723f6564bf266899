"""Small real clips: WAV files, pictures, and videos with sound, written by the libraries that read them."""

import csv
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
from PIL import Image

RATE = 4000  # Hz


def write_sound(path: Path, pitch: float, seconds: float = 0.3) -> Path:
    time = np.arange(int(RATE * seconds)) / RATE
    soundfile.write(path, 0.3 * np.sin(2 * np.pi * pitch * time), RATE)
    return path


def write_picture(path: Path, colour: tuple[int, int, int]) -> Path:
    Image.new("RGB", (20, 16), colour).save(path)
    return path


def write_video(
    path: Path,
    seconds: float = 1.0,
    pitch: float | None = 440.0,
    sound_seconds: float | None = None,
    title: str = "",
    late: float = 0.0,
) -> Path:
    """Frames that turn from black to white at 10 a second, the first one `late`, with a tone unless `pitch` is None."""
    import av

    path.parent.mkdir(parents=True, exist_ok=True)
    with av.open(path, "w") as container:
        container.metadata["title"] = title
        video = container.add_stream("flv" if path.suffix == ".flv" else "mpeg4", rate=10)
        video.width = video.height = 32
        video.pix_fmt = "yuv420p"
        audio = container.add_stream("aac", rate=16000, layout="mono") if pitch else None
        total = int(10 * seconds)
        for index in range(total):
            pixels = np.full((32, 32, 3), 255 * index // max(1, total - 1), np.uint8)
            frame = av.VideoFrame.from_ndarray(pixels)
            frame.pts, frame.time_base = index + round(10 * late), Fraction(1, 10)
            container.mux(video.encode(frame))
        container.mux(video.encode())
        if audio is not None:
            time = np.arange(int(16000 * (sound_seconds or seconds))) / 16000
            wave = (0.3 * np.sin(2 * np.pi * pitch * time)).astype(np.float32)
            for start in range(0, len(wave), 1024):
                frame = av.AudioFrame.from_ndarray(wave[None, start : start + 1024], format="fltp", layout="mono")
                frame.sample_rate, frame.pts, frame.time_base = 16000, start, Fraction(1, 16000)
                container.mux(audio.encode(frame))
            container.mux(audio.encode())
    return path


def write_manifest(path: Path, rows: list[dict[str, str]]) -> Path:
    columns = list(dict.fromkeys(column for row in rows for column in row))
    with path.open("w", newline="") as file:
        writer = csv.DictWriter(file, columns, restval="")
        writer.writeheader()
        writer.writerows(rows)
    return path


@pytest.fixture(scope="session")
def clips(tmp_path_factory) -> Path:
    """A manifest of two classes that both sound and picture tell apart: 12 clips to train, 4 to validate, 6 to test."""
    folder = tmp_path_factory.mktemp("clips")
    rows = []
    for split, count in (("train", 12), ("val", 4), ("test", 6)):
        for index in range(count):
            name, high = f"{split}{index}", index % 2
            write_sound(folder / f"{name}.wav", 1200 + 10 * index if high else 300 + 10 * index)
            write_picture(folder / f"{name}.png", (200 - index, 30, 30) if high else (30, 30, 200 - index))
            row = {"audio": f"{name}.wav", "frames": f"{name}.png", "text": f"{'high' if high else 'low'} {index}"}
            rows.append({"clip": name, **row, "label": "high" if high else "low", "split": split})
    return write_manifest(folder / "manifest.csv", rows)


@pytest.fixture
def tiny(clips, tmp_path) -> list[str]:
    """Overrides that make the demo's configuration a run of seconds on those clips."""
    return [
        f"data.manifest={clips}",
        f"data.audio.sample_rate={RATE}",
        "data.audio.seconds=0.25",
        "data.audio.window=64",
        "data.audio.hop=64",
        "data.audio.mels=16",
        "data.visual.size=16",
        "model.audio={widths: [4, 8], depths: [1, 1]}",
        "model.visual={widths: [4, 8], depths: [1, 1]}",
        "steps=6",
        "batch=4",
        "train.validate_every=2",
        "train.baselines=[]",
        f"runs={tmp_path / 'runs'}",
    ]
