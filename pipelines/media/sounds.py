"""Sounds from files, and out of videos: all that soundfile reads, and else what PyAV reads.

Channels are mixed by their mean. Samples span −1 … 1; where a file in floating point goes beyond, it is scaled: by
the full scale of 16, 24 or 32 bits where it holds such integers, and otherwise so that its loudest sample is 1.
"""

from functools import lru_cache
from pathlib import Path

import numpy as np

from equipoise.pipelines.files import cut_off
from equipoise.pipelines.media import containers
from equipoise.pipelines.media.reading import AbsentError, MediaError, brief, once

SILENCE = 1e-4  # of full scale, -80 dB: nothing louder than that is no sound
_OVERSHOT = 256.0  # peaks beyond are of integers; what mixing and lossy codecs overshoot by is far less
_SCALES = (2.0**15, 2.0**23, 2.0**31)
_UNKNOWN = 1 << 62  # frames: what libsndfile says of a stream that does not tell

_NAMED = frozenset({".aac", ".aif", ".m4a", ".mka", ".mp3", ".opus", ".webm", ".wma"})  # beside soundfile's formats

Sound = tuple[np.ndarray, int]  # (samples,) float32, mono; samples per second


def open_sound(path: Path) -> Sound:  # shared, not to be changed
    """A sound; within a run it is decoded once, where it fits into memory.

    Raises:
        MediaError: it cannot be read, is empty, cut off, or not finite.
    """
    return once(decode, path, lambda sound: sound[0].nbytes)


def decode(path: Path) -> Sound:
    """A sound's mono samples, and their rate in Hz.

    Raises:
        MediaError: it cannot be read, is empty, cut off, or not finite.
    """
    channels, rate = _by_soundfile(path) or _by_av(path)
    if not len(channels):
        raise MediaError(path, "holds no sound.")
    if cut_off(path):
        raise MediaError(path, "is cut off.")
    if not np.isfinite(channels).all():
        raise MediaError(path, "holds samples that are not finite.")
    return _scaled(path, channels.mean(axis=1)), rate


@lru_cache
def suffixes() -> frozenset[str]:
    """What the names of sounds usually end in, in small letters; a sound may have another, and is read all the same."""
    import soundfile

    return _NAMED | {f".{kind.lower()}" for kind in soundfile.available_formats()}


def seconds(path: Path) -> float:
    """How long a sound lasts, by its header where that tells; NaN where it cannot be read, which `decode` says."""
    import av
    import soundfile

    try:
        info = soundfile.info(path)
        if info.frames < _UNKNOWN:
            return info.duration
    except (OSError, RuntimeError, TypeError):
        pass
    try:
        with containers.opened(path) as container:
            if container.duration and container.streams.audio:
                return container.duration / av.time_base
        samples, rate = open_sound(path)
        return len(samples) / rate
    except Exception:  # whatever a damaged one makes of its decoder
        return float("nan")


def is_silent(samples: np.ndarray) -> bool:
    return float(np.abs(samples).max()) < SILENCE


def _by_soundfile(path: Path) -> tuple[np.ndarray, int] | None:  # (samples, channels) float32
    """None where the file is of no format that soundfile knows, or does not say how long it is."""
    import soundfile

    try:
        sound = soundfile.SoundFile(path)
    except (OSError, RuntimeError, TypeError):  # LibsndfileError is a RuntimeError; TypeError: raw samples
        return None
    try:
        with sound:
            if sound.frames >= _UNKNOWN:
                return None
            channels = sound.read(dtype="float32", always_2d=True)
            if len(channels) < sound.frames:
                raise MediaError(path, "is cut off.")
            return channels, sound.samplerate
    except (OSError, RuntimeError) as error:
        raise MediaError(path, f"cannot be read as sound ({brief(error)}).") from None


def _by_av(path: Path) -> tuple[np.ndarray, int]:  # (samples, channels) float32
    import av

    try:
        with containers.opened(path) as container:
            if not container.streams.audio:
                raise AbsentError(path, "has no sound track. Give a file that has one, or leave it out.")
            stream = container.streams.audio[0]
            planes = av.AudioResampler(format="fltp")
            parts = []
            for packet in containers.packets(container, path):
                if packet.stream.index == stream.index:
                    parts += [part for frame in packet.decode() for part in planes.resample(frame)]
    except MediaError:
        raise
    except Exception as error:  # whatever a damaged one makes of its decoder
        raise MediaError(path, f"cannot be read as sound ({brief(error)}).") from None
    rows = [part.to_ndarray() for part in parts]
    return (np.concatenate(rows, axis=1).T if rows else np.zeros((0, 1), np.float32)), stream.rate


def _scaled(path: Path, samples: np.ndarray) -> np.ndarray:
    """Within −1 … 1."""
    peak = float(np.abs(samples).max())
    if peak <= 1:
        return samples
    full = peak if peak <= _OVERSHOT else next((scale for scale in _SCALES if peak <= scale), None)
    if full is None:
        raise MediaError(path, f"holds samples up to {peak:.3g}, where full scale is 1. Scale them.")
    return samples / np.float32(full)
