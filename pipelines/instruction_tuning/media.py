"""Pictures and sounds from files: what is wrong with one, and what is in it."""

import os
from pathlib import Path
from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from equipoise.errors import InputError
from equipoise.pipelines.files import cut_off

if TYPE_CHECKING:
    import numpy as np

LARGEST_PICTURE = Image.MAX_IMAGE_PIXELS or 1 << 26  # pixels: from here on Pillow warns, and from twice that refuses
SHORTEST_SOUND, LONGEST_SOUND = 0.05, 3600.0  # seconds; a few of the frames that models hear in, 10 ms each


def media_problem(path: Path, kind: str) -> str:
    """A sentence on why a file cannot be used as a picture (`image`) or a sound (`audio`); empty if it can."""
    if problem := _file_problem(path, kind):
        return problem
    return _sound_problem(path) if kind == "audio" else _picture_problem(path)


def _file_problem(path: Path, kind: str) -> str:
    try:
        if not os.path.exists(path):  # unlike pathlib's, False also where no path can be so long
            return f"{kind} {path} does not exist."
        if not path.is_file():
            return f"{kind} {path} is no file."
        if path.stat().st_size == 0:
            return f"{kind} {path} is empty (0 bytes)."
    except OSError as error:
        return f"{kind} {path} cannot be read: {error.strerror or error}."
    return ""


def _picture_problem(path: Path) -> str:
    try:
        _decoded(path)
    except InputError as error:
        return str(error)
    return ""


def _decoded(path: Path) -> Image.Image:
    try:
        with Image.open(path) as image:
            width, height = image.size
            if width * height > LARGEST_PICTURE:
                raise InputError(f"image {path} is enormous ({width} × {height} pixels). Make it smaller.")
            image.load()
            if image.mode.startswith("I"):  # 16 bits, of which Pillow would take 255 for white
                return ImageOps.exif_transpose(_eight_bits(image)).convert("RGB")
            return ImageOps.exif_transpose(image).convert("RGB")
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise InputError(f"image {path} is enormous (over {LARGEST_PICTURE} pixels). Make it smaller.") from None
    except InputError:
        raise
    except Exception as error:  # whatever a damaged one makes of its decoder
        raise InputError(f"image {path} cannot be read as a picture ({error}).") from None


def _eight_bits(image: Image.Image) -> Image.Image:
    import numpy as np

    return Image.fromarray((np.asarray(image).clip(0, 65535) // 256).astype(np.uint8))


def _sound_problem(path: Path) -> str:
    import numpy as np
    import soundfile

    try:
        with soundfile.SoundFile(path) as sound:
            seconds = sound.frames / sound.samplerate
            if seconds > LONGEST_SOUND:
                return f"audio {path} is enormous ({seconds / 60:.0f} minutes). Cut it into pieces."
            if not sound.frames:
                return f"audio {path} has zero length."
            if seconds < SHORTEST_SOUND:
                return (
                    f"audio {path} is too short ({1000 * seconds:.2g} ms) to be heard. Give {SHORTEST_SOUND} s or more."
                )
            sound.seek(sound.frames - 1)
            if len(sound.read(1)) != 1 or cut_off(path):
                return f"audio {path} is cut off."
            if sound.subtype in ("FLOAT", "DOUBLE"):  # others have no words for what is no number
                sound.seek(0)
                if not all(np.isfinite(block).all() for block in sound.blocks(2**16, dtype="float64")):
                    return f"audio {path} holds samples that are not finite."
    except (OSError, RuntimeError) as error:  # LibsndfileError is a RuntimeError
        return f"audio {path} cannot be read as a sound ({error})."
    return ""


def open_picture(path: Path) -> Image.Image:
    """A picture as RGB, upright.

    Raises:
        InputError: it cannot be decoded.
    """
    if problem := _file_problem(path, "image"):
        raise InputError(problem)
    return _decoded(path)


def sound_seconds(path: Path) -> float:
    """How long a sound lasts; NaN where it cannot be read, which `media_problem` says."""
    import soundfile

    try:
        return soundfile.info(path).duration
    except (OSError, RuntimeError):
        return float("nan")


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
