"""What training reads in place of sound, video and text: spectrograms, frames and tokens, made once and kept on disk.

Sound is mixed to mono, resampled (soxr), repeated or cut to the clip's length, and becomes the logarithm of its
Hann-windowed spectrum, in mel bands (HTK's scale, 0 Hz to half the sample rate, triangles of height 1) or as it is.
Frames come from the middles of equal stretches, scaled and cut to a square. Of a clip that is longer than it is to be,
`data.stretch` says which part; where that is drawn anew in each step, the features of five parts are kept.
"""

import hashlib
import json
import os
import secrets
from collections.abc import Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from fractions import Fraction
from functools import lru_cache
from pathlib import Path
from threading import Lock
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageOps
from safetensors import SafetensorError
from safetensors.torch import load_file, save_file
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.audio_visual.config import AudioSection, AudioVisualData
from equipoise.pipelines.audio_visual.data import Clip
from equipoise.pipelines.files import disk_full, explained
from equipoise.pipelines.media import pictures, sounds, videos
from equipoise.pipelines.media.reading import VERSION as READERS
from equipoise.pipelines.media.reading import AbsentError, MediaError, brief
from equipoise.pipelines.progress import progress

APART = 0.5  # seconds by which sound and picture of a clip may differ in length, or a tenth where that is more
MEMORY = 2 << 30  # bytes of features that are kept in memory; the rest is read from disk ahead of its step
PARTS = 5  # of a long clip, one of which is drawn when it is trained on; odd, for the middle one is looked at else
PRESENT = "present"  # the key of a batch's (batch, modalities) mask of what its clips have, where some lack something
_VERSION = 1  # of what these functions make of what the readers give

# Of one clip: audio (1, bins, windows), visual (frames, 3, size, size) uint8, text (length,). In the store sound and
# frames have one dimension more where a part of them is drawn in each step: (parts, …).
Features = dict[str, Tensor]


class LackingError(InputError):
    """A file without sound, or without pictures."""


def extract(clip: Clip, data: AudioVisualData, tokenizer: Any = None) -> Features:
    """One clip's features.

    Raises:
        InputError: A file cannot be read, the sound is silent or not finite, or sound and picture differ in length: all
            of it.
    """
    found, wrong = _read(clip, data, tokenizer)
    if wrong:
        raise InputError(" ".join(wrong))
    return found


def _read(clip: Clip, data: AudioVisualData, tokenizer: Any) -> tuple[Features, list[str]]:
    """A clip's features as far as its files are there and can be read, and what is wrong with those files."""
    found: Features = {}
    lengths: dict[str, float] = {}
    wrong: list[str] = []

    def parts(made: Tensor, count: int) -> Tensor:
        """Apart, where one is drawn in each step; else there is one."""
        made = made.unflatten(0, (count, -1))
        return made if data.stretch == "random" else made[0]

    def add_sound(path: Path) -> None:
        if path.suffix == ".npy":
            _without_span(clip, path, "is a spectrogram, whose seconds nobody knows")
            found["audio"] = parts(read_spectrogram(path, data.audio), 1)
            return
        samples, rate = read_audio(path)
        lengths["sound"] = len(samples) / rate
        spans = stretches(lengths["sound"], clip, data)
        cut = [samples[round(float(begin) * rate) : round(float(end) * rate)] for begin, end in spans]
        found["audio"] = parts(torch.cat([spectrogram(part, rate, data.audio) for part in cut]), len(spans))

    def add_pictures(path: Path) -> None:
        spans: list[videos.Span] = [(0, 1)]
        if clip.frames:
            if seconds := lengths.get("sound"):
                spans = [(begin / seconds, end / seconds) for begin, end in stretches(seconds, clip, data)]
            elif not wrong and not path.is_file():
                _without_span(clip, path, "is a folder of pictures, and without sound nobody knows their seconds")
            made = read_frames(path, data.visual.frames, data.visual.size, spans)
        else:

            def choose(seconds: Fraction) -> list[videos.Span]:
                spans[:] = stretches(seconds, clip, data)
                return spans

            made, lengths["video"] = read_video(path, data.visual.frames, data.visual.size, choose)
        found["visual"] = parts(made, len(spans))

    for reader, path in _media(clip, data, {"audio": add_sound, "visual": add_pictures}):
        if path is None or not os.path.exists(path):
            continue
        try:
            reader(path)
        except LackingError as error:
            if data.missing == "refuse" or path != clip.video:
                wrong.append(str(error))
        except InputError as error:
            wrong.append(str(error))
        except OSError as error:
            wrong.append(f"{path.name} cannot be read: {error.strerror or error}.")
        except Exception as error:  # whatever a damaged file makes of its decoder
            wrong.append(f"{path.name} cannot be read ({brief(error)}).")
    if "text" in data.modalities and (clip.text or data.missing == "refuse"):
        found["text"] = tokens(clip.text or "", data.text.length, tokenizer)
    if len(lengths) == 2 and abs(lengths["sound"] - lengths["video"]) > max(APART, 0.1 * max(lengths.values())):
        wrong.append(f"the sound lasts {lengths['sound']:.1f} s and the video {lengths['video']:.1f} s.")
    if not found and not wrong:
        wrong.append(f"{clip.name} has none of the modalities {', '.join(data.modalities)}.")
    return found, list(dict.fromkeys(wrong))


def _without_span(clip: Clip, path: Path, what: str) -> None:
    """
    Raises:
        InputError: The clip is some seconds of a file that has none, as `what` says.
    """
    if clip.start is not None or clip.end is not None:
        raise InputError(f"{path.name} {what}. Give what is of the span alone, and leave start and end empty.")


def stretches(length: float | Fraction, clip: Clip, data: AudioVisualData) -> list[videos.Span]:
    """From where to where a clip goes, in seconds of a file that lasts `length`; several where one of them is drawn.

    Raises:
        InputError: The file ends before the clip begins.
    """
    begin, end = min(clip.start or 0, length), min(length if clip.end is None else clip.end, length)
    if length and begin >= end:
        raise InputError(f"its start is at {clip.start:g} s, and the file lasts {float(length):.1f} s.")
    spare = end - begin - data.audio.seconds
    if data.stretch == "start" or spare <= 0:
        return [(begin, end)]
    shares = [Fraction(1, 2)] if data.stretch == "middle" else [Fraction(i, PARTS - 1) for i in range(PARTS)]
    starts = [begin + type(spare)(share) * spare for share in shares]
    return [(start, start + data.audio.seconds) for start in starts]


def _media(clip: Clip, data: AudioVisualData, by: dict[str, Any]) -> list[tuple[Any, Path | None]]:
    """What `by` has for the modalities that are in files, and the file of each."""
    paths = {"audio": clip.audio or clip.video, "visual": clip.frames or clip.video}
    # sound first: its length says where in a folder of pictures the clip is
    return [(by[name], paths[name]) for name in ("audio", "visual") if name in data.modalities]


def read_audio(path: Path) -> tuple[np.ndarray, int]:
    """Mono samples in -1 … 1, and their rate in Hz.

    Raises:
        InputError: The file cannot be read, is cut off, has no sound, or it is silent or not finite.
    """
    try:
        samples, rate = sounds.decode(path)
    except MediaError as error:
        raise _of_clip(path, error) from None
    if sounds.is_silent(samples):
        raise InputError(f"{path.name} is silent.")
    return samples, rate


def read_spectrogram(path: Path, settings: AudioSection) -> Tensor:  # (1, bins, windows) float32
    """One that was made elsewhere, as AV-MNIST's are, from a NumPy file; taken as it is.

    Raises:
        InputError: It cannot be read, is of another size than the settings', or is not finite.
    """
    try:
        made = torch.from_numpy(np.load(path, allow_pickle=False).astype(np.float32))
    except (OSError, ValueError, EOFError) as error:
        raise InputError(f"{path.name} cannot be read as a NumPy array ({brief(error)}).") from None
    if tuple(made.shape) != bins(settings):
        raise InputError(
            f"{path.name} holds {' × '.join(map(str, made.shape))} values, and data.audio wants {bins(settings)[0]} "
            f"bins × {bins(settings)[1]} windows."
        )
    if not made.isfinite().all():
        raise InputError(f"{path.name} holds values that are not finite.")
    return made[None].contiguous()


def read_video(path: Path, count: int, size: int, choose: Any = None) -> tuple[Tensor, float]:
    """(frames, 3, size, size) uint8, and the video's length in seconds; `choose` gives spans of it, all of it unless
    given, with so many frames each.

    Raises:
        InputError: The file cannot be read, is cut off, or has no pictures.
    """
    try:
        shown, seconds = videos.read_frames(path, count, *([choose] if choose else []))
    except MediaError as error:
        raise _of_clip(path, error) from None
    return torch.stack([_square(image, size) for image in shown]), seconds


def read_frames(
    path: Path,
    count: int,
    size: int,
    spans: Sequence[videos.Span] = ((0, 1),),  # shares of the folder, with `count` pictures of each
) -> Tensor:  # (frames, 3, size, size) uint8
    """A folder's pictures in the order of their names, or one picture.

    Raises:
        InputError: There are none, or one cannot be read.
    """
    files = picture_files(path)
    if not files:
        raise InputError(f"{path.name} holds no pictures ({pictures.NAMED}).")
    made: dict[Path, Tensor] = {}
    parts = [Fraction(2 * index + 1, 2 * count) for index in range(count)]
    middles = [Fraction(begin) + (Fraction(end) - Fraction(begin)) * part for begin, end in spans for part in parts]
    chosen = [files[min(len(files) - 1, int(middle * len(files)))] for middle in middles]
    for file in dict.fromkeys(chosen):  # each once
        try:
            made[file] = _square(pictures.decode(file), size)
        except MediaError as error:
            raise _of_clip(file, error) from None
    return torch.stack([made[file] for file in chosen])


def picture_files(path: Path) -> list[Path]:
    """A folder's in the order of their names, or the one."""
    if path.is_file():
        return [path]
    files = (file for file in path.iterdir() if file.suffix.lower() in pictures.suffixes())
    return sorted(file for file in files if not pictures.of_systems(file.name))


def _of_clip(path: Path, error: MediaError) -> InputError:
    """By the file's name alone, as it stands in the manifest."""
    kind = LackingError if isinstance(error, AbsentError) else InputError
    return kind(f"{path.name} {error.problem}")


def _square(image: Image.Image, size: int) -> Tensor:
    fitted = ImageOps.fit(image, (size, size), Image.Resampling.BILINEAR)
    return torch.from_numpy(np.array(fitted)).permute(2, 0, 1).contiguous()


def spectrogram(samples: np.ndarray, rate: int, settings: AudioSection) -> Tensor:  # (1, bins, windows) float32
    """The logarithm of the clip's spectrum over time.

    Raises:
        InputError: It is not finite.
    """
    import soxr

    if rate != settings.sample_rate:
        samples = soxr.resample(samples, rate, settings.sample_rate)
    if not len(samples):
        raise InputError("its sound is too short to be resampled.")
    length = max(settings.window, round(settings.seconds * settings.sample_rate))
    samples = np.tile(samples, -(-length // len(samples)))[:length].clip(-1, 1)
    window = torch.hann_window(settings.window)
    spectrum = torch.stft(
        torch.from_numpy(samples.astype(np.float32)), settings.window, settings.hop, window=window, return_complex=True
    ).abs()
    if settings.scale == "log_mel":
        power = mel_bands(settings.mels, settings.window, settings.sample_rate) @ spectrum.square()
        made = (power + 1e-6).log()
    else:
        made = (spectrum + 1e-7).log()
    if not made.isfinite().all():
        raise InputError("its spectrogram is not finite.")
    return made[None].contiguous()  # the transform's own layout is another, which safetensors refuses


def bins(settings: AudioSection) -> tuple[int, int]:
    """The spectrogram's height and its windows."""
    height = settings.mels if settings.scale == "log_mel" else settings.window // 2 + 1
    return height, 1 + max(settings.window, round(settings.seconds * settings.sample_rate)) // settings.hop


def blank(data: AudioVisualData, count: int, dtype: torch.dtype = torch.float32) -> Features:
    """Features of `count` clips, all zero: for their shapes."""
    side = data.visual.size
    every = {
        "audio": torch.zeros(count, 1, *bins(data.audio), dtype=dtype),
        "visual": torch.zeros(count, data.visual.frames, 3, side, side, dtype=torch.uint8),
        "text": torch.zeros(count, data.text.length, dtype=torch.long),
    }
    return {name: every[name] for name in data.modalities}


@lru_cache
def mel_bands(count: int, window: int, rate: int) -> Tensor:  # (count, window // 2 + 1)
    """Triangles of height 1, their corners equally spaced in mel = 2595·log₁₀(1 + f/700), from 0 Hz to rate/2."""
    top = 2595 * np.log10(1 + rate / 2 / 700)
    corners = 700 * (10 ** (np.linspace(0, top, count + 2) / 2595) - 1)  # Hz
    bins = np.linspace(0, rate / 2, window // 2 + 1)
    rising = (bins - corners[:-2, None]) / np.diff(corners)[:-1, None]
    falling = (corners[2:, None] - bins) / np.diff(corners)[1:, None]
    return torch.from_numpy(np.minimum(rising, falling).clip(0).astype(np.float32))


def tokens(text: str, length: int, tokenizer: Any = None) -> Tensor:  # (length,) int64
    """A pretrained encoder's tokens, or the text's bytes + 1; 0, or the tokenizer's own, where the text has ended."""
    if tokenizer is not None:
        made = tokenizer(text, padding="max_length", truncation=True, max_length=length).input_ids
    else:
        made = [byte + 1 for byte in text.encode()][:length]
        made += [0] * (length - len(made))
    return torch.tensor(made, dtype=torch.int64)


class FeatureStore:
    """The features of clips: made when first asked for, kept on disk by file and settings, in memory where they fit."""

    def __init__(
        self,
        data: AudioVisualData,
        cache: Path | None,  # a folder; none: nothing is looked for on disk
        tokenizer: Any = None,
        identity: str = "",  # of the tokenizer
    ):
        self.data, self.cache, self.tokenizer = data, cache, tokenizer
        self.settings = [_VERSION, READERS, identity, sorted(data.modalities)]
        self.settings += [getattr(data, name).model_dump(mode="json") for name in sorted(data.modalities)]
        if data.stretch != "start":  # beside what earlier versions made
            self.settings += [data.stretch, data.audio.seconds]
        if data.missing != "refuse":
            self.settings.append(data.missing)
        self.given: dict[int, frozenset[str]] = {}  # line → modalities that its clip has
        self.memory: dict[str, Features] = {}
        self.held = 0  # bytes
        self.full = False  # whether there was a clip that did not fit
        self.lock = Lock()

    def key(self, clip: Clip) -> str:
        """By the clip's files as far as the modalities read them, and the settings."""
        facts: list[Any] = [self.settings, clip.text if "text" in self.data.modalities else None]
        if clip.start is not None or clip.end is not None:
            facts.append([clip.start, clip.end])
        read = {"audio": clip.audio or clip.video, "visual": clip.frames or clip.video}
        for path in dict.fromkeys(path for name in self.data.modalities if (path := read.get(name))):
            for file in picture_files(path) if path == clip.frames else [path]:
                stat = file.stat()
                facts.append((str(file.resolve()), stat.st_size, stat.st_mtime_ns))
        return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:32]

    def prepare(self, clips: Sequence[Clip], spoilt: Sequence[Clip] = ()) -> dict[int, str]:
        """Makes what is not there yet; gives what is wrong with clips, by line. Of `spoilt` ones, which a manifest says
        something about already, also files that are missing, nothing of that is said again."""
        wrong: dict[int, str] = {}
        known = {clip.line for clip in spoilt}

        def make(clip: Clip) -> None:
            files = [path for _, path in _media(clip, self.data, {"audio": 0, "visual": 0})]
            try:
                if clip.line not in known or all(path and os.path.exists(path) for path in files):
                    self.given[clip.line] = frozenset(self.get(clip))
                elif flaws := _read(clip, self.data, self.tokenizer)[1]:
                    wrong[clip.line] = " ".join(flaws)
            except InputError as error:
                if disk_full(error.__cause__ or error):  # no fault of the clip's
                    raise
                wrong[clip.line] = str(error)
            except OSError as error:
                wrong[clip.line] = f"{error.filename or clip.name} cannot be read: {error.strerror or error}."

        # decoders release Python's lock
        with ThreadPoolExecutor(min(8, os.cpu_count() or 1)) as pool:
            done = pool.map(make, [*clips, *spoilt])
            list(progress("features", "clip", done, len(clips) + len(spoilt), leave=False))
        return wrong

    def get(
        self,
        clip: Clip,
        key: str | None = None,  # the clip's, where it is known
    ) -> Features:
        key = key or self.key(clip)
        if (found := self.memory.get(key)) is None:
            found = self._load(key)
            if found is None:
                found = extract(clip, self.data, self.tokenizer)
                self._save(key, found)
            size = sum(tensor.nbytes for tensor in found.values())
            with self.lock:
                if self.held + size > MEMORY:
                    self.full = True
                elif key not in self.memory:
                    self.held += size
                    self.memory[key] = found
        return found

    def _file(self, key: str) -> Path | None:
        return self.cache and self.cache / key[:2] / f"{key}.safetensors"

    def _load(self, key: str) -> Features | None:
        file = self._file(key)
        try:
            return load_file(file) if file and file.is_file() else None
        except (SafetensorError, OSError):  # half of one, from a machine that went down: made anew
            return None

    def _save(self, key: str, found: Features) -> None:
        if file := self._file(key):
            with explained(file):
                file.parent.mkdir(parents=True, exist_ok=True)
                partial = file.with_name(f".{file.name}.{secrets.token_hex(4)}")
                save_file(found, partial)
                os.replace(partial, file)


class Batches:
    """Batches of some clips' features; where not all are in memory, read while the step before is computed."""

    def __init__(self, store: FeatureStore, clips: Sequence[Clip]):
        self.store, self.clips = store, clips
        self.keys: dict[int, str] = {}  # of the clips that were read: working them out costs as much as reading
        self.reader = ThreadPoolExecutor(1)
        self.ahead: dict[tuple[int, ...], Future] = {}

    def get(
        self, indices: Sequence[int], following: Sequence[int] = (), shares: Sequence[float] | None = None
    ) -> Features:
        """The clips at `indices`, stacked.

        Args:
            indices: Of the clips.
            following: Those that will be asked for next.
            shares: From 0 to below 1, which of a clip's parts to take where it has several; unless given, the middle.
        """
        drawn = self.store.data.stretch == "random"
        read = self._read if drawn else self._whole
        found: Any = None
        if self.store.full:
            future = self.ahead.pop(tuple(indices), None)
            self.ahead = {tuple(following): self.reader.submit(read, following)} if following else {}
            found = future.result() if future else None
        found = read(indices) if found is None else found
        return self._stacked(found, shares) if drawn else found

    def _whole(self, indices: Sequence[int]) -> Features:
        """Stacked as well by who reads ahead, where no part is drawn in the step itself."""
        return self._stacked(self._read(indices), None)

    def _stacked(self, rows: list[Features], shares: Sequence[float] | None) -> Features:
        data = self.store.data
        if data.stretch == "random":
            chosen = shares or [0.5] * len(rows)
            rows = [
                {name: made if name == "text" else made[int(share * len(made))] for name, made in row.items()}
                for row, share in zip(rows, chosen, strict=True)
            ]
        if data.missing == "refuse":
            return {name: torch.stack([row[name] for row in rows]) for name in rows[0]}
        empty = {name: made[0] for name, made in blank(data, 1).items()}
        found = {name: torch.stack([row.get(name, empty[name]) for row in rows]) for name in data.modalities}
        return {**found, PRESENT: torch.tensor([[name in row for name in data.modalities] for row in rows])}

    def _read(self, indices: Sequence[int]) -> list[Features]:
        self.keys |= {index: self.store.key(self.clips[index]) for index in indices if index not in self.keys}
        return [self.store.get(self.clips[index], self.keys[index]) for index in indices]
