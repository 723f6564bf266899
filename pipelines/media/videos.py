"""Frames of videos, as a player shows them: chosen by their time stamps, turned upright, with square pixels."""

from bisect import bisect_right
from collections.abc import Callable, Sequence
from fractions import Fraction
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple

import numpy as np
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.files import cut_off
from equipoise.pipelines.media import containers
from equipoise.pipelines.media.reading import AbsentError, MediaError, brief

if TYPE_CHECKING:
    from av import VideoFrame
    from av.container import InputContainer
    from av.video.stream import VideoStream

_RATE = 25  # frames a second, where a file has neither stamps nor a rate
_STRETCHED = 8  # a pixel is at most so many times as wide as high, or the other way round; else it is no pixel's shape
_TURNS = {  # the display matrix's first four numbers, as signs → what brings the stored picture into that position
    (1, 0, 0, 1): None,
    (0, 1, -1, 0): Image.Transpose.ROTATE_270,
    (-1, 0, 0, -1): Image.Transpose.ROTATE_180,
    (0, -1, 1, 0): Image.Transpose.ROTATE_90,
    (-1, 0, 0, 1): Image.Transpose.FLIP_LEFT_RIGHT,
    (1, 0, 0, -1): Image.Transpose.FLIP_TOP_BOTTOM,
    (0, 1, 1, 0): Image.Transpose.TRANSPOSE,
    (0, -1, -1, 0): Image.Transpose.TRANSVERSE,
}


Span = tuple[float | Fraction, float | Fraction]  # seconds: from, to


class Timeline(NamedTuple):
    """When the frames of a video are shown, in seconds from where the file begins: sound may come before pictures."""

    start: Fraction  # where the file begins, on the clock of its stamps
    frames: list[Fraction]  # ascending
    end: Fraction
    stamped: bool  # or else the frames follow each other at the file's rate


def suffixes() -> frozenset[str]:
    """What the names of videos usually end in, in small letters."""
    return frozenset((".mp4", ".mkv", ".webm", ".avi", ".mov", ".flv", ".m4v", ".mpg", ".mpeg"))


def _whole(seconds: Fraction) -> Sequence[Span]:
    return [(0, seconds)]


def read_frames(
    path: Path, count: int | Callable[[float], int], choose: Callable[[Fraction], Sequence[Span]] = _whole
) -> tuple[list[Image.Image], float]:
    """The RGB frames that are shown in the middles of `count` equal parts, and the video's length in seconds.

    Before the first frame there is the first frame.

    Args:
        path: The video.
        count: The frames of each span, or what gives that for the video's length in seconds.
        choose: Gives spans for the video's length in seconds; unless given, all of it is one.

    Raises:
        MediaError: it cannot be read, is cut off, or has no pictures.
    """
    try:
        with containers.opened(path) as container:
            line = _timeline(container, path)
            each = count if isinstance(count, int) else count(float(line.end))
        middles = [
            Fraction(begin) + (Fraction(end) - Fraction(begin)) * (2 * index + 1) / (2 * each)
            for begin, end in choose(line.end)
            for index in range(each)
        ]
        order = sorted(range(len(middles)), key=middles.__getitem__)
        with containers.opened(path) as container:  # not all formats can seek
            shown = _shown_at(container, path, line, [middles[index] for index in order])
        found = [frame for _, frame in sorted(zip(order, shown, strict=True), key=lambda pair: pair[0])]
    except InputError:
        raise
    except Exception as error:  # whatever a damaged one makes of its decoder
        raise MediaError(path, f"cannot be read as video ({brief(error)}).") from None
    if cut_off(path):
        raise MediaError(path, "is cut off.")
    return found, float(line.end)


def _stream(container: "InputContainer", path: Path) -> "VideoStream":
    from av.stream import Disposition

    cover = Disposition.attached_pic
    for stream in container.streams.video:
        if not stream.disposition & cover:
            return stream
    raise AbsentError(path, "has no pictures.")


def _timeline(container: "InputContainer", path: Path) -> Timeline:
    """By the packets alone: nothing is decoded."""
    import av

    stream = _stream(container, path)
    shown = [  # not the packets themselves, which are the file
        (containers.stamp(packet), packet.duration or 0)
        for packet in containers.packets(container, path)
        if packet.stream.index == stream.index and packet.size and not packet.is_discard
    ]
    if not shown:
        raise MediaError(path, "has no pictures.")
    base = stream.time_base or Fraction(1)
    stamps = [(at, lasts) for at, lasts in shown if at is not None]
    if len(stamps) < len(shown):
        step = 1 / Fraction(stream.average_rate or stream.guessed_rate or _RATE)
        times = [index * step for index in range(len(shown))]
        return Timeline(Fraction(0), times, times[-1] + step, False)
    stamped = sorted((at * base, lasts * base) for at, lasts in stamps)
    first, (last, lasts) = stamped[0][0], stamped[-1]
    if not lasts:  # as long as the one before
        lasts = last - stamped[-2][0] if len(stamped) > 1 else 1 / Fraction(stream.average_rate or _RATE)
    begin = Fraction(container.start_time or 0, av.time_base)
    start = min(first, max(begin, Fraction(0)))  # sound may begin before 0, with what its decoder needs to begin
    return Timeline(start, [time - start for time, _ in stamped], last + lasts - start, True)


def _shown_at(
    container: "InputContainer",
    path: Path,
    line: Timeline,
    middles: Sequence[Fraction],  # ascending
) -> list[Image.Image]:
    """The frame at each time: the last one that was shown by then."""
    stream = _stream(container, path)
    stream.thread_type = "AUTO"
    found: list[Image.Image] = []
    before: VideoFrame | None = None
    for index, frame in enumerate(container.decode(stream)):
        time = _time(frame, line) if line.stamped else line.frames[min(index, len(line.frames) - 1)]
        due = bisect_right(middles, time - Fraction(1, 1000)) if time is not None else len(found)
        if due > len(found):
            found += [_upright(before or frame, stream)] * (due - len(found))
        before = frame
        if len(found) == len(middles):
            break
    if before is None:
        raise MediaError(path, "has no pictures.")
    return found + [_upright(before, stream)] * (len(middles) - len(found))


def _time(frame: "VideoFrame", line: Timeline) -> Fraction | None:
    at = frame.dts if frame.pts is None else frame.pts
    return None if at is None or frame.time_base is None else at * frame.time_base - line.start


def _upright(frame: "VideoFrame", stream: "VideoStream") -> Image.Image:
    """The frame as it is meant to be shown."""
    image = frame.to_image()
    shape = stream.sample_aspect_ratio
    if shape and shape != 1 and Fraction(1, _STRETCHED) <= shape <= _STRETCHED:
        image = image.resize((max(1, round(image.width * shape)), image.height), Image.Resampling.BILINEAR)
    turn = _TURNS.get(_signs(frame))
    return image if turn is None else image.transpose(turn)


def _signs(frame: "VideoFrame") -> tuple[int, int, int, int]:
    """What the display matrix does to directions: across and down of the stored picture, each as across and down."""
    matrix = frame.side_data.get("DISPLAYMATRIX")
    if matrix is None:
        return 1, 0, 0, 1
    a, b, _, c, d = np.frombuffer(bytes(matrix), np.int32)[:5].tolist()
    largest = max(abs(a), abs(b), abs(c), abs(d), 1)
    return round(a / largest), round(b / largest), round(c / largest), round(d / largest)
