"""Videos whose stamps, rotation, pixels or beginnings are not the plain ones, read back as a player shows them."""

import struct
from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest

from equipoise.pipelines.media import videos
from equipoise.pipelines.media.reading import MediaError


def write(
    path: Path,
    times: list[int],  # ms at which each frame is shown, from black to white by time
    codec: str = "libvpx",
    pixels: np.ndarray | None = None,  # of every frame, instead
    aspect: Fraction | None = None,
    sound: int = 0,  # ms
    format: str | None = None,
) -> Path:
    height, width = (64, 64) if pixels is None else pixels.shape[:2]
    with av.open(str(path), "w", format=format) as out:
        video = out.add_stream(codec, rate=1000 if codec == "libvpx" else 25)
        encoder = "aac" if path.suffix in (".flv", ".mp4") else "libopus"
        audio = out.add_stream(encoder, rate=48000 if encoder == "libopus" else 44100, layout="mono") if sound else None
        video.width, video.height, video.pix_fmt = width, height, "yuv420p"
        timed = codec in ("libvpx", "libx264")  # to the millisecond, and not by a rate
        if timed:
            video.codec_context.time_base = Fraction(1, 1000)
        if aspect:
            video.codec_context.sample_aspect_ratio = aspect
        for ms in times:
            grey = ms * 255 // max(times) if times[-1] else 0
            image = np.full((height, width, 3), grey, np.uint8) if pixels is None else pixels
            frame = av.VideoFrame.from_ndarray(image, format="rgb24")
            frame.pts, frame.time_base = (ms, Fraction(1, 1000)) if timed else (ms // 40, Fraction(1, 25))
            out.mux(video.encode(frame))
        out.mux(video.encode(None))
        rate, form = (48000, "flt") if encoder == "libopus" else (44100, "fltp")
        size = 960 if encoder == "libopus" else 1024
        for start in range(0, sound * rate // 1000, size):
            frame = av.AudioFrame.from_ndarray(np.full((1, size), 0.1, np.float32), format=form, layout="mono")
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            out.mux(audio.encode(frame))
        if audio:
            out.mux(audio.encode(None))
    return path


def grey(frames) -> list[float]:
    return [float(np.asarray(frame).mean()) for frame in frames]


@pytest.mark.parametrize(("name", "codec"), [("v.webm", "libvpx"), ("v.mkv", "libvpx"), ("v.mp4", "libx264")])
def test_length_and_frames_go_by_time_where_the_rate_varies(name, codec, tmp_path):
    times = [i * 100 for i in range(20)] + [2000 + i * 1000 // 30 for i in range(60)]  # 10 a second, then 30
    frames, seconds = videos.read_frames(write(tmp_path / name, times, codec), 4)
    assert seconds == pytest.approx(4, abs=0.1)
    assert grey(frames) == pytest.approx([255 * t / 4 for t in (0.5, 1.5, 2.5, 3.5)], abs=10)


def test_a_first_frame_that_comes_late_is_shown_until_then(tmp_path):
    """Sound from the beginning, pictures from its third second on: as long as the sound, and the wait counts."""
    times = list(range(2000, 4000, 100))
    frames, seconds = videos.read_frames(write(tmp_path / "v.webm", times, sound=4000), 4)
    assert seconds == pytest.approx(4, abs=0.15)
    first = 255 * 2000 / 3900
    assert grey(frames) == pytest.approx([first, first, 255 * 2.5 / 3.9, 255 * 3.5 / 3.9], abs=12)


@pytest.mark.parametrize("sound", [0, 4000])
def test_flash_video_whose_first_frame_comes_late_is_read(sound, tmp_path):
    """Seeking to 0 finds nothing there. With sound from 0 on, the wait counts."""
    frames, seconds = videos.read_frames(write(tmp_path / "v.flv", list(range(2000, 4000, 40)), "flv", sound=sound), 2)
    assert seconds == pytest.approx(4 if sound else 2, abs=0.15)
    first = 255 * 2000 / 3960
    # middles: seconds 1 and 3 of the sound's clock; without sound 2.5 and 3.5
    assert grey(frames) == pytest.approx(
        [first, 255 * 3 / 3.96] if sound else [255 * 2.5 / 3.96, 255 * 3.5 / 3.96], abs=12
    )


def test_frames_of_some_spans_are_those_that_are_shown_then(tmp_path):
    """In the order of the spans, which may overlap and go backwards."""
    path = write(tmp_path / "v.mkv", list(range(0, 4000, 40)), "mpeg4")
    frames, seconds = videos.read_frames(path, 2, lambda seconds: [(2, 4), (0, 1), (0.5, seconds)])
    times = [2.5, 3.5, 0.25, 0.75, 0.5 + 3.5 / 4, 0.5 + 3 * 3.5 / 4]
    assert seconds == pytest.approx(4, abs=0.1) and grey(frames) == pytest.approx(
        [255 * t / 3.96 for t in times], abs=12
    )


@pytest.mark.parametrize(
    ("matrix", "corner"),  # of the display; where the stored picture's white first quarter is then
    [
        ((1, 0, 0, 1), "top left"),
        ((0, 1, -1, 0), "top right"),
        ((-1, 0, 0, -1), "bottom right"),
        ((0, -1, 1, 0), "bottom left"),
        ((-1, 0, 0, 1), "top right"),
        ((1, 0, 0, -1), "bottom left"),
    ],
)
def test_a_video_is_turned_as_its_display_matrix_says(matrix, corner, tmp_path):
    stored = np.zeros((32, 64, 3), np.uint8)
    stored[:16, :32] = 255
    path = write(tmp_path / "v.mp4", [0, 40, 80], "mpeg4", stored)
    data = bytearray(path.read_bytes())
    at = data.find(b"tkhd") + 44  # in a track header of version 0
    a, b, c, d = (number << 16 for number in matrix)
    data[at : at + 36] = struct.pack(">9i", a, b, 0, c, d, 0, 0, 0, 1 << 30)
    path.write_bytes(data)
    (frame,), _ = videos.read_frames(path, 1)
    assert frame.size == ((32, 64) if matrix[0] == 0 else (64, 32))
    shown = np.asarray(frame)[..., 0].astype(int)
    half, side = shown.shape[0] // 2, shown.shape[1] // 2
    quarters = {
        "top left": shown[:half, :side],
        "top right": shown[:half, side:],
        "bottom left": shown[half:, :side],
        "bottom right": shown[half:, side:],
    }
    assert max(quarters, key=lambda name: quarters[name].mean()) == corner


def test_pixels_that_are_not_square_are_made_so(tmp_path):
    path = write(tmp_path / "v.mp4", [0, 40, 80], "mpeg4", np.zeros((48, 64, 3), np.uint8), aspect=Fraction(3, 2))
    assert videos.read_frames(path, 1)[0][0].size == (96, 48)


def test_streams_without_stamps_go_by_their_rate(tmp_path):
    """Bare MPEG-4: no container, no stamps, no seeking."""
    path = write(tmp_path / "v.m4v", list(range(0, 2000, 40)), "mpeg4", format="m4v")
    frames, seconds = videos.read_frames(path, 2)
    assert seconds == pytest.approx(2, abs=0.1) and grey(frames) == pytest.approx([64, 191], abs=12)


@pytest.mark.parametrize("name", ["v.mp4", "v.avi", "v.mkv", "v.ts", "v.mov"])
def test_containers_give_the_same_frames(name, tmp_path):
    frames, seconds = videos.read_frames(write(tmp_path / name, list(range(0, 2000, 40)), "mpeg4"), 2)
    assert seconds == pytest.approx(2, abs=0.1) and grey(frames) == pytest.approx([64, 191], abs=12)


def test_a_video_that_is_cut_off_is_refused(tmp_path):
    noise = np.random.default_rng(0).integers(0, 256, (64, 64, 3), dtype=np.uint8)
    for name in ("v.mkv", "v.mp4", "v.avi"):
        path = write(tmp_path / name, list(range(0, 4000, 40)), "mpeg4", noise)
        data = path.read_bytes()
        path.write_bytes(data[: len(data) // 3])
        with pytest.raises(MediaError, match=rf"{name}: (is cut off|cannot be read as video)"):
            videos.read_frames(path, 2)


def test_what_has_no_pictures_is_said_in_a_sentence(tmp_path):
    import soundfile

    soundfile.write(tmp_path / "a.wav", np.full(8000, 0.1), 8000)
    (tmp_path / "text.mp4").write_text("hello")
    for name, problem in (("a.wav", "has no pictures."), ("text.mp4", "cannot be read as video"), ("no.mp4", "cannot")):
        with pytest.raises(MediaError, match=f"{name}: {problem}"):
            videos.read_frames(tmp_path / name, 1)


def test_nothing_is_decoded_after_the_last_frame_that_is_wanted(tmp_path):
    decoded = []

    class Counting:
        """A real container that notes what is taken from its decoder."""

        def __init__(self, container):
            self.container, self.streams = container, container.streams

        def decode(self, stream):
            for frame in self.container.decode(stream):
                decoded.append(frame.time)
                yield frame

    path = write(tmp_path / "v.mp4", list(range(0, 4000, 40)), "libx264")
    with av.open(str(path)) as container:
        line = videos._timeline(container, path)
    with av.open(str(path)) as container:
        shown = videos._shown_at(Counting(container), path, line, [Fraction(0), Fraction(1, 2)])
    assert grey(shown) == pytest.approx([0, 255 / 8], abs=10) and max(decoded) < 0.6
