"""Media of conversations: what is wrong with one, a sound at the rate that a model listens at, a video's frames."""

import os
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

from equipoise.errors import InputError
from equipoise.pipelines.media import pictures, sounds, videos
from equipoise.pipelines.media.reading import MediaError

if TYPE_CHECKING:
    import numpy as np
    from PIL import Image


class Frames(NamedTuple):
    """How a video is looked at."""

    rate: float | None = 1.0  # frames a second; None: as many of every video
    most: int = 16  # frames of a video

    def count(self, seconds: float) -> int:
        return self.most if self.rate is None else max(1, min(self.most, round(seconds * self.rate)))


class Video(NamedTuple):
    """Frames of a video, each shown in the middle of its part."""

    frames: "list[Image.Image]"
    seconds: float


SHORTEST_SOUND, LONGEST_SOUND = 0.05, 3600.0  # seconds; a few of the frames that models listen in, 10 ms each


def media_problem(path: Path, kind: str) -> str:
    """A sentence on why a file cannot be used as an `image`, an `audio` or a `video`; empty if it can."""
    try:
        if kind == "audio":
            _sound(path)
        elif kind == "video":
            open_video(path, Frames(None, 1))
        else:
            open_picture(path)
    except InputError as error:
        return str(error)
    return ""


def open_picture(path: Path) -> "Image.Image":  # shared, not to be changed
    """A picture as RGB, upright.

    Raises:
        InputError: it cannot be decoded.
    """
    _there(path, "image")
    try:
        return pictures.open_picture(path)
    except MediaError as error:
        raise InputError(f"image {path} {error.problem}") from None


def open_sound(
    path: Path,
    rate: int,  # samples per second that are wanted
) -> "np.ndarray":  # (samples,) float32, mono
    """A sound, mixed down to one channel and resampled.

    Raises:
        InputError: it cannot be decoded.
    """
    import soxr

    samples, found = _sound(path)
    return soxr.resample(samples, found, rate).astype("float32")


def open_video(path: Path, wanted: Frames) -> Video:
    """Frames of a video at equal distances, as many as its length has at the wanted rate.

    Raises:
        InputError: it cannot be decoded.
    """
    _there(path, "video")
    try:
        frames, seconds = videos.read_frames(path, wanted.count)
    except MediaError as error:
        raise InputError(f"video {path} {error.problem}") from None
    return Video(frames, seconds)


def _sound(path: Path) -> sounds.Sound:
    _there(path, "audio")
    seconds = sounds.seconds(path)  # before it is decoded: an enormous one would fill the memory
    if seconds > LONGEST_SOUND:
        raise InputError(f"audio {path} is enormous ({seconds / 60:.0f} minutes). Cut it into pieces.")
    if seconds == 0:
        raise InputError(f"audio {path} has zero length.")
    if seconds < SHORTEST_SOUND:
        least = f"Give {SHORTEST_SOUND} s or more."
        raise InputError(f"audio {path} is too short ({1000 * seconds:.2g} ms) to be heard. {least}")
    try:
        return sounds.open_sound(path)
    except MediaError as error:
        raise InputError(f"audio {path} {error.problem}") from None


def _there(path: Path, kind: str) -> None:
    try:
        if not os.path.exists(path):  # unlike pathlib's, False also where no path can be so long
            raise InputError(f"{kind} {path} does not exist.")
        if not path.is_file():
            raise InputError(f"{kind} {path} is no file.")
        if path.stat().st_size == 0:
            raise InputError(f"{kind} {path} is empty (0 bytes).")
    except OSError as error:
        raise InputError(f"{kind} {path} cannot be read: {error.strerror or error}.") from None
