"""Pictures and sounds from files: what is wrong with one, and what is in it."""

from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from equipoise.errors import InputError

if TYPE_CHECKING:
    import numpy as np

LARGEST_PICTURE = Image.MAX_IMAGE_PIXELS or 1 << 26  # pixels: from here on Pillow warns, and from twice that refuses
LONGEST_SOUND = 3600.0  # seconds


def media_problem(path: Path, kind: str) -> str:
    """A sentence on why a file cannot be used as a picture (`image`) or a sound (`audio`); empty if it can."""
    try:
        if not path.exists():
            return f"{kind} {path} does not exist."
        if not path.is_file():
            return f"{kind} {path} is no file."
        if path.stat().st_size == 0:
            return f"{kind} {path} is empty (0 bytes)."
        return _sound_problem(path) if kind == "audio" else _picture_problem(path)
    except OSError as error:
        return f"{kind} {path} cannot be read: {error.strerror or error}."


def _picture_problem(path: Path) -> str:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > LARGEST_PICTURE:
                return f"image {path} is enormous ({width} × {height} pixels). Make it smaller."
            image.load()
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        return f"image {path} is enormous (over {LARGEST_PICTURE} pixels). Make it smaller."
    except (OSError, SyntaxError, ValueError) as error:
        return f"image {path} cannot be read as a picture ({error})."
    return ""


def _sound_problem(path: Path) -> str:
    import soundfile

    try:
        with soundfile.SoundFile(path) as sound:
            seconds = sound.frames / sound.samplerate
            if seconds > LONGEST_SOUND:
                return f"audio {path} is enormous ({seconds / 60:.0f} minutes). Cut it into pieces."
            if not sound.frames:
                return f"audio {path} has zero length."
            sound.seek(sound.frames - 1)
            if len(sound.read(1)) != 1:
                return f"audio {path} is cut off."
    except (soundfile.LibsndfileError, RuntimeError) as error:
        return f"audio {path} cannot be read as a sound ({error})."
    return ""


def open_picture(path: Path) -> Image.Image:
    """A picture as RGB, upright.

    Raises:
        InputError: it cannot be decoded.
    """
    if problem := media_problem(path, "image"):
        raise InputError(problem)
    with Image.open(path) as image:
        return ImageOps.exif_transpose(image).convert("RGB")


def open_sound(
    path: Path,
    rate: int,  # samples per second that are wanted
) -> "np.ndarray":  # (samples,) float32, mono
    """A sound, mixed down to one channel and resampled.

    Raises:
        InputError: it cannot be decoded.
    """
    import soundfile
    import soxr

    if problem := media_problem(path, "audio"):
        raise InputError(problem)
    samples, found = soundfile.read(path, dtype="float32", always_2d=True)
    return soxr.resample(samples.mean(axis=1), found, rate).astype("float32")
