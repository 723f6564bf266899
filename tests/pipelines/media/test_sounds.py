"""Sounds of every container that soundfile and PyAV write, read back to the same samples."""

from fractions import Fraction
from pathlib import Path

import av
import numpy as np
import pytest
import soundfile

from equipoise.pipelines.media import sounds
from equipoise.pipelines.media.reading import MediaError

RATE = 8000
TONE = (0.4 * np.sin(2 * np.pi * 440 * np.arange(RATE) / RATE)).astype(np.float32)


def write_by_av(path: Path, codec: str, channels: np.ndarray, format: str = "fltp", rate: int = 16000) -> Path:
    with av.open(str(path), "w") as out:
        stream = out.add_stream(codec, rate=rate, layout="mono" if len(channels) == 1 else "stereo")
        for start in range(0, channels.shape[1], 1024):
            part = np.ascontiguousarray(channels[:, start : start + 1024])
            frame = av.AudioFrame.from_ndarray(part, format=format, layout=stream.layout.name)
            frame.sample_rate, frame.pts, frame.time_base = rate, start, Fraction(1, rate)
            out.mux(stream.encode(frame))
        out.mux(stream.encode())
    return path


@pytest.mark.parametrize("scale", [2.0**15, 2.0**23, 2.0**31])
@pytest.mark.parametrize("subtype", ["FLOAT", "DOUBLE"])
def test_floats_that_hold_integers_sound_as_the_integers_do(scale, subtype, tmp_path):
    soundfile.write(tmp_path / "good.wav", TONE, RATE, subtype="FLOAT")
    soundfile.write(tmp_path / "loud.wav", TONE.astype(np.float64) * scale, RATE, subtype=subtype)
    good, loud = (sounds.decode(tmp_path / name)[0] for name in ("good.wav", "loud.wav"))
    assert np.allclose(loud, good, atol=1e-6) and np.abs(good).max() == pytest.approx(0.4, abs=1e-3)


def test_a_sound_that_overshoots_is_scaled_and_not_clipped(tmp_path):
    soundfile.write(tmp_path / "over.wav", TONE * 4, RATE, subtype="FLOAT")
    found, _ = sounds.decode(tmp_path / "over.wav")
    assert np.allclose(found, TONE / np.abs(TONE).max(), atol=1e-6)
    soundfile.write(tmp_path / "beyond.wav", TONE.astype(np.float64) * 1e12, RATE, subtype="DOUBLE")
    with pytest.raises(MediaError, match=r"beyond.wav: holds samples up to 4e\+11, where full scale is 1"):
        sounds.decode(tmp_path / "beyond.wav")


def test_channels_are_mixed_by_their_mean_whoever_reads_them(tmp_path):
    both = np.stack([np.tile(TONE, 4), np.zeros(4 * RATE, np.float32)])
    soundfile.write(tmp_path / "a.wav", both.T, 16000, subtype="FLOAT")
    write_by_av(tmp_path / "a.m4a", "aac", both)
    for name, off in (("a.wav", 1e-6), ("a.m4a", 0.02)):
        found, rate = sounds.decode(tmp_path / name)
        assert rate == 16000 and np.abs(found).max() == pytest.approx(0.2, abs=off), name


@pytest.mark.parametrize("name", ["a.wav", "a.flac", "a.ogg", "a.mp3", "a.aiff", "a.au", "a.caf", "a.w64"])
def test_what_soundfile_writes(name, tmp_path):
    soundfile.write(tmp_path / name, TONE, RATE)
    found, rate = sounds.decode(tmp_path / name)
    assert rate == RATE and abs(len(found) - RATE) < 2500
    assert np.abs(np.fft.rfft(found[:RATE], RATE)).argmax() == pytest.approx(440, abs=1)
    assert sounds.seconds(tmp_path / name) == pytest.approx(len(found) / rate, abs=0.01)


@pytest.mark.parametrize(("name", "codec"), [("a.m4a", "aac"), ("a.mp4", "aac"), ("a.mkv", "aac"), ("a.aac", "aac")])
def test_what_only_pyav_reads(name, codec, tmp_path):
    time = np.arange(32000) / 16000
    write_by_av(tmp_path / name, codec, (0.4 * np.sin(2 * np.pi * 440 * time)).astype(np.float32)[None])
    found, rate = sounds.decode(tmp_path / name)
    assert rate == 16000 and len(found) / rate == pytest.approx(2, abs=0.2)
    assert np.abs(np.fft.rfft(found[4000:20000])).argmax() == pytest.approx(440, abs=1)
    assert sounds.seconds(tmp_path / name) == pytest.approx(2, abs=0.3)


def test_a_name_says_nothing_about_what_is_in_a_file(tmp_path):
    soundfile.write(tmp_path / "a.wav", TONE, RATE)
    (tmp_path / "a.mp4").write_bytes((tmp_path / "a.wav").read_bytes())
    assert np.array_equal(sounds.decode(tmp_path / "a.mp4")[0], sounds.decode(tmp_path / "a.wav")[0])


def test_a_stream_that_does_not_say_how_long_it_is(tmp_path):
    """As programs write FLAC into a pipe: the header's count of samples is 0."""
    soundfile.write(tmp_path / "a.flac", TONE, RATE)
    data = bytearray((tmp_path / "a.flac").read_bytes())
    assert data[:4] == b"fLaC" and int.from_bytes(data[21:26], "big") & (1 << 36) - 1 == RATE
    data[21] &= 0xF0
    data[22:26] = bytes(4)
    (tmp_path / "a.flac").write_bytes(data)
    found, rate = sounds.decode(tmp_path / "a.flac")
    assert rate == RATE and np.allclose(found, TONE, atol=1e-4)


@pytest.mark.parametrize("name", ["a.wav", "a.aiff", "a.flac", "a.m4a", "a.mkv"])
def test_a_sound_that_is_cut_off_is_refused(name, tmp_path):
    long = np.tile(TONE, 20)
    if name in ("a.m4a", "a.mkv"):
        write_by_av(tmp_path / name, "aac", long[None])
    else:
        soundfile.write(tmp_path / name, long, RATE)
    data = (tmp_path / name).read_bytes()
    (tmp_path / name).write_bytes(data[: len(data) // 2])
    with pytest.raises(MediaError, match=rf"{name}: (is cut off|cannot be read as sound)"):
        sounds.decode(tmp_path / name)


def test_what_is_no_sound_is_said_in_a_sentence(tmp_path):
    soundfile.write(tmp_path / "none.wav", np.zeros(0), RATE)
    soundfile.write(tmp_path / "nan.wav", np.where(TONE > 0.3, np.nan, TONE), RATE, subtype="FLOAT")
    (tmp_path / "text.wav").write_text("hello")
    for name, problem in (
        ("none.wav", "holds no sound."),
        ("nan.wav", "holds samples that are not finite."),
        ("text.wav", "cannot be read as sound"),
        ("gone.wav", "cannot be read as sound"),
    ):
        with pytest.raises(MediaError, match=f"{name}: {problem}"):
            sounds.decode(tmp_path / name)
    assert sounds.is_silent(np.zeros(9, np.float32)) and not sounds.is_silent(TONE)
    assert np.isnan(sounds.seconds(tmp_path / "text.wav"))
