"""Manifests and features: real sound and video read back, and everything that can be wrong, said at once."""

import importlib.util
import os
from fractions import Fraction
from pathlib import Path

import numpy as np
import pytest
import soundfile
import torch

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.audio_visual.config import AudioSection, AudioVisualData
from equipoise.pipelines.audio_visual.data import doubts, read_manifest, settle, with_validation
from equipoise.pipelines.audio_visual.features import (
    Batches,
    FeatureStore,
    extract,
    mel_bands,
    picture_files,
    read_audio,
    read_frames,
    read_video,
    spectrogram,
    tokens,
)
from equipoise.pipelines.audio_visual.prepared import prepare
from equipoise.pipelines.cli import main

spec = importlib.util.spec_from_file_location("clips", Path(__file__).with_name("conftest.py"))
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)

SMALL = {"audio": {"sample_rate": 4000, "seconds": 0.25, "window": 64, "hop": 64, "mels": 16}, "visual": {"size": 16}}


def test_a_wav_files_pitch_is_where_it_belongs(tmp_path):
    samples, rate = read_audio(made.write_sound(tmp_path / "a.wav", 1000.0))
    assert rate == 4000 and samples.dtype == np.float32 and len(samples) == 1200
    settings = AudioSection(sample_rate=8000, seconds=0.5, window=256, hop=128, mels=40, scale="log_stft")
    found = spectrogram(samples, rate, settings)
    assert found.shape == (1, 129, 32), "0.3 s repeated to 0.5 s, at twice the rate"
    loudest = found[0, :, 4:14].mean(1).argmax().item() * 8000 / 256
    assert loudest == pytest.approx(1000, abs=8000 / 256)
    mel = spectrogram(samples, rate, settings.model_copy(update={"scale": "log_mel"}))
    assert mel.shape == (1, 40, 32) and mel.isfinite().all()
    assert mel[0].mean(1).argmax() == mel_bands(40, 256, 8000)[:, 32].argmax(), "1 kHz is bin 32"


def test_mel_bands_are_triangles_that_cover_all_frequencies():
    bands = mel_bands(20, 512, 16000)
    assert bands.shape == (20, 257) and (bands >= 0).all() and bands.max() <= 1
    assert (bands.sum(0)[3:-3] > 0).all() and (bands.argmax(1).diff() > 0).all()
    total = bands.sum(0)[int(bands[0].argmax()) : int(bands[-1].argmax())]
    assert torch.allclose(total, torch.ones_like(total), atol=1e-5), "neighbours cross at a half"


def test_a_videos_frames_and_sound_are_read_back(tmp_path):
    path = made.write_video(tmp_path / "a.mp4", seconds=2.0, pitch=500.0)
    frames, seconds = read_video(path, 4, 16)
    assert frames.shape == (4, 3, 16, 16) and frames.dtype == torch.uint8 and seconds == pytest.approx(2.0)
    levels = frames.float().mean((1, 2, 3))
    assert levels.tolist() == pytest.approx([255 * (i * 5 + 2) / 19 for i in range(4)], abs=12), "middles of quarters"
    samples, rate = read_audio(path)
    assert rate == 16000 and len(samples) / rate == pytest.approx(2.0, abs=0.15)
    spectrum = np.abs(np.fft.rfft(samples[4000:20000]))
    assert spectrum.argmax() * rate / 16000 == pytest.approx(500, abs=2)


def long_clip(folder: Path, name: str = "long") -> dict[str, str]:
    """Ten seconds: a tone that rises from 200 Hz by 100 Hz in each second, and frames that go from black to white."""
    time = np.arange(40000) / 4000
    soundfile.write(folder / f"{name}.wav", 0.3 * np.sin(2 * np.pi * (200 * time + 50 * time**2)), 4000)
    made.write_video(folder / f"{name}.mp4", seconds=10.0, pitch=None)
    return {"clip": name, "audio": f"{name}.wav", "video": f"{name}.mp4", "label": "a", "split": "train"}


def seen_and_heard(found: dict) -> tuple[list[float], list[float]]:
    """The second of each frame, and that of each part's sound, by their greys and pitches."""
    frames = found["visual"].float().flatten(-3).mean(-1).flatten() / 255 * 10
    pitch = found["audio"].mean(-1).argmax(-1).flatten() * 4000 / 64
    return frames.tolist(), ((pitch - 200) / 100).tolist()


@pytest.mark.parametrize(
    ("stretch", "event", "seconds"),  # where each part begins
    [
        ("start", {}, [0]),
        ("middle", {}, [4]),
        ("random", {}, [0, 2, 4, 6, 8]),
        ("middle", {"start": "5", "end": "9"}, [6]),
        ("start", {"start": "5", "end": "9"}, [5]),
        ("random", {"start": "7.5"}, [7.5, 7.625, 7.75, 7.875, 8]),
        ("random", {"start": "7", "end": "8.5"}, [7]),
    ],
)
def test_long_clips_are_sampled_where_the_settings_and_their_event_say(stretch, event, seconds, tmp_path):
    row = {**long_clip(tmp_path), **event}
    audio = {"sample_rate": 4000, "seconds": 2, "window": 64, "hop": 64, "scale": "log_stft"}
    data = AudioVisualData(audio=audio, visual={"size": 16, "frames": 2}, stretch=stretch)
    manifest = read_manifest(data, made.write_manifest(tmp_path / "m.csv", [row]))
    found = extract(manifest.clips[0], data)
    frames, sounds = seen_and_heard(found)
    whole = (0, 10) if not event else (float(event.get("start", 0)), float(event.get("end", 10)))
    spans = [whole] if stretch == "start" else [(s, min(s + 2, whole[1])) for s in seconds]
    assert frames == pytest.approx([a + (b - a) * share for a, b in spans for share in (0.25, 0.75)], abs=0.35)
    assert sounds == pytest.approx([s + min(2, whole[1] - whole[0]) / 2 for s in seconds], abs=0.7)
    assert found["audio"].shape == ((5,) if len(seconds) > 1 else (1,) * (stretch == "random")) + (1, 33, 126)


@pytest.mark.parametrize(
    ("files", "modalities", "message"),
    [
        ({"frames": "many"}, ["visual"], "many is a folder of pictures, and without sound nobody knows their seconds"),
        ({"frames": "many", "audio": "a.npy"}, ["audio", "visual"], "a.npy is a spectrogram, whose seconds nobody"),
        ({"frames": "0.png"}, ["visual"], None),  # the same at any time
        ({"frames": "many", "audio": "a.wav"}, ["audio", "visual"], None),
    ],
)
def test_spans_of_files_without_seconds_are_refused(files, modalities, message, tmp_path):
    (tmp_path / "many").mkdir()
    for place in ("0.png", "many/0.png", "many/1.png"):
        made.write_picture(tmp_path / place, (0, 0, 0))
    made.write_sound(tmp_path / "a.wav", 500, 1.0)
    np.save(tmp_path / "a.npy", np.zeros((16, 16), np.float32))
    data = AudioVisualData(modalities=modalities, **SMALL)
    row = {**files, "start": "0.25", "end": "0.75", "label": "a", "split": "train"}
    (clip,) = read_manifest(data, made.write_manifest(tmp_path / "m.csv", [row])).clips
    if message is None:
        assert extract(clip, data).keys() == set(modalities)
        return
    with pytest.raises(InputError, match=message):
        extract(clip, data)


def test_training_draws_stretches_and_everything_else_sees_the_middle(tmp_path):
    rows = [long_clip(tmp_path, name) for name in "ab"]
    data = AudioVisualData(audio={"sample_rate": 4000, "seconds": 2}, visual={"size": 16}, stretch="random")
    manifest = read_manifest(data, made.write_manifest(tmp_path / "m.csv", rows))
    batches = Batches(FeatureStore(data, tmp_path / "cache"), manifest.clips)
    middle = batches.get([0, 1])
    assert middle["visual"].shape == (2, 1, 3, 16, 16) and torch.equal(
        middle["visual"], batches.get([0, 1], (), [0.4, 0.59])["visual"]
    )
    drawn = batches.get([0, 1], (), [0.0, 0.99])
    assert drawn["visual"][0].float().mean() < middle["visual"][0].float().mean() < drawn["visual"][1].float().mean()


def test_events_that_cannot_be_are_said_in_a_sentence(tmp_path):
    times = [("3", "2"), ("-1", ""), ("soon", ""), ("12", "")]
    rows = [{**long_clip(tmp_path), "clip": str(i), "start": a, "end": b} for i, (a, b) in enumerate(times)]
    data = AudioVisualData(**SMALL)
    manifest = read_manifest(data, made.write_manifest(tmp_path / "m.csv", rows))
    assert manifest.bad[2] == "its end, 2 s, is not after its start, 3 s."
    assert manifest.bad[3].startswith("start must be seconds from 0 on, got -1") and "got soon" in manifest.bad[4]
    (clip,) = manifest.clips
    with pytest.raises(InputError, match=r"its start is at 12 s, and the file lasts 10\.0 s"):
        extract(clip, data)


def test_text_comes_from_a_column_or_a_file(tmp_path):
    (tmp_path / "a.txt").write_text("so they say\n", encoding="utf-8-sig")
    (tmp_path / "bad.txt").write_bytes(b"\xff\xfe\x00")
    (tmp_path / "empty.txt").write_text(" \n")
    cells = [("spoken", ""), ("", "a.txt"), ("", "bad.txt"), ("", "empty.txt"), ("", "no.txt"), ("", "")]
    rows = [
        {"text": t, "text_file": f, "label": "a", "split": "train", "clip": str(i)} for i, (t, f) in enumerate(cells)
    ]
    data = AudioVisualData(modalities=["text"])
    manifest = read_manifest(data, made.write_manifest(tmp_path / "m.csv", rows))
    assert [clip.text for clip in manifest.clips] == ["spoken", "so they say"]
    said = [
        "bad.txt is not text",
        "empty.txt holds no text",
        "no.txt does not exist",
        "has nothing in text or text_file",
    ]
    assert [manifest.bad[line][: len(text)] for line, text in zip(range(4, 8), said, strict=True)] == said
    store = FeatureStore(data, None)
    before = store.key(manifest.clips[1])
    (tmp_path / "a.txt").write_text("something else")
    changed = read_manifest(data, tmp_path / "m.csv").clips[1]
    assert store.key(changed) != before and extract(changed, data)["text"][0] == ord("s") + 1


def test_a_folders_pictures_are_chosen_from_the_middles(tmp_path):
    for index in range(6):
        made.write_picture(tmp_path / f"{index}.png", (40 * index, 0, 0))
    frames = read_frames(tmp_path, 3, 8)
    assert frames[:, 0, 0, 0].tolist() == [40, 120, 200]
    assert read_frames(tmp_path / "5.png", 2, 8)[:, 0, 0, 0].tolist() == [200, 200]


def test_text_is_its_bytes():
    assert tokens("hé", 5).tolist() == [105, 196, 170, 0, 0] and tokens("abc", 2).tolist() == [98, 99]


@pytest.fixture
def messy(tmp_path) -> tuple[Path, dict[int, str]]:
    """A manifest in which nearly every line has something wrong, and what each is to be told."""
    for index in range(4):
        made.write_sound(tmp_path / f"{index}.wav", 300 + 300 * index)
        made.write_picture(tmp_path / f"{index}.png", (60 * index, 0, 0))
    soundfile.write(tmp_path / "silent.wav", np.zeros(1000), 4000)
    soundfile.write(tmp_path / "nan.wav", np.array([0.1, np.nan] * 500), 4000, subtype="FLOAT")
    (tmp_path / "broken.wav").write_bytes(b"RIFF, but no more")
    (tmp_path / "broken.png").write_text("no picture")
    (tmp_path / "empty").mkdir()
    made.write_video(tmp_path / "mute.mp4", pitch=None)
    made.write_video(tmp_path / "short.mp4", seconds=3.0, sound_seconds=1.0)
    (tmp_path / "broken.mp4").write_bytes(b"no video")
    good = [{"audio": f"{i}.wav", "frames": f"{i}.png", "label": "ab"[i % 2], "split": s} for i, s in
            enumerate(("train", "train", "test", "test"))]  # fmt: skip
    base = {"audio": "0.wav", "frames": "0.png", "label": "a", "split": "train"}
    bad = [
        ({"label": ""}, "has no label."),
        ({"split": "training"}, "the split must be train, val or test, got training."),
        ({"audio": "silent.wav"}, "silent.wav is silent."),
        ({"audio": "nan.wav"}, "nan.wav holds samples that are not finite."),
        ({"audio": "broken.wav"}, "broken.wav cannot be read as sound"),
        ({"frames": "broken.png"}, "broken.png cannot be read as a picture"),
        ({"frames": "empty"}, "empty holds no pictures"),
        ({"audio": "gone.wav"}, "gone.wav does not exist."),
        ({"audio": "", "frames": "", "video": "mute.mp4"}, "mute.mp4 has no sound track."),
        ({"audio": "", "frames": "", "video": "short.mp4"}, "the sound lasts 1.0 s and the video 3.0 s."),
        ({"audio": "", "frames": "", "video": "broken.mp4"}, "broken.mp4 cannot be read as video"),
        ({"audio": ""}, "has nothing in audio or video for the modality audio."),
        ({"label": "c", "split": "test"}, "its class 'c' is in the split test and not in train."),
    ]
    rows = [{"clip": f"c{i}", **base, **(r if i < 4 else bad[i - 4][0])} for i, r in enumerate(good + [{}] * len(bad))]
    path = made.write_manifest(tmp_path / "messy.csv", rows)
    return path, {6 + index: text for index, (_, text) in enumerate(bad)}


def test_everything_wrong_with_a_manifest_is_said_at_once(messy, tmp_path, capfd, monkeypatch):
    path, expected = messy
    monkeypatch.chdir(tmp_path)
    words = ["train", "audio_visual/demo", f"data={path}", "data.audio.window=64", "data.visual.size=16", "runs=runs"]
    assert main(words) == 2
    lines = capfd.readouterr().err.splitlines()
    assert len(lines) == len(expected)
    assert [p.name for p in Path("runs").iterdir()] == [".cache"], "the good clips' features, for the next try"
    for line, (number, text) in zip(lines, expected.items(), strict=True):
        assert line.startswith(f"{path}:{number}: ") and text in line, line


def test_faults_of_one_clip_hide_neither_each_other_nor_blame_other_clips(messy, tmp_path):
    """A class whose clips to train with are all spoilt is the fault of those alone, unless they are skipped."""
    base = {"audio": "0.wav", "frames": "0.png", "label": "a", "split": "train"}
    rows = [
        {**base, "audio": "silent.wav", "frames": "broken.png", "label": "", "split": "tren"},
        {**base, "audio": "silent.wav", "label": "b"},
        {**base, "label": "b", "split": "test"},
        base,
        {**base, "split": "test"},
    ]
    path = made.write_manifest(tmp_path / "faults.csv", [{"clip": f"c{i}", **row} for i, row in enumerate(rows)])
    config = configs.load("audio_visual/demo", [f"data={path}", f"runs={tmp_path / 'runs'}"])
    first, second = prepare(config).problems
    for text in ("has no label.", "got tren.", "silent.wav is silent.", "broken.png cannot be read as a picture"):
        assert text in first
    assert second == f"{path}:3: silent.wav is silent."
    skipping = configs.set_keys(config, {"data.skip_bad": True})
    assert any("its class 'b' has no usable clip in the split train" in line for line in prepare(skipping).problems)


def test_what_no_decoder_says_is_a_problem_of_its_clip(tmp_path):
    """Words in a video that are no UTF-8 are no problem; sound that becomes another midway is one."""
    import av

    made.write_video(tmp_path / "plain.avi", title="cafe")
    odd = (tmp_path / "plain.avi").read_bytes().replace(b"cafe", b"caf\xe9")
    (tmp_path / "odd.avi").write_bytes(odd)
    both = b""
    for rate, layout in ((16000, "mono"), (44100, "stereo")):
        with av.open(tmp_path / f"{layout}.aac", "w", format="adts") as container:
            stream = container.add_stream("aac", rate=rate, layout=layout)
            noise = np.random.default_rng(0).normal(0, 0.1, (1 if layout == "mono" else 2, 1024)).astype(np.float32)
            for start in range(8):
                frame = av.AudioFrame.from_ndarray(noise, format="fltp", layout=layout)
                frame.sample_rate, frame.pts, frame.time_base = rate, 1024 * start, Fraction(1, rate)
                container.mux(stream.encode(frame))
            container.mux(stream.encode())
        both += (tmp_path / f"{layout}.aac").read_bytes()
    (tmp_path / "both.aac").write_bytes(both)
    assert b"caf\xe9" in odd and read_video(tmp_path / "odd.avi", 2, 8)[0].shape == (2, 3, 8, 8)
    path = made.write_manifest(tmp_path / "m.csv", [{"audio": "both.aac", "label": "a", "split": "train"}])
    data = AudioVisualData(manifest=str(path), modalities=["audio"], **SMALL)
    assert FeatureStore(data, None).prepare(read_manifest(data, path).clips)[2].startswith("both.aac cannot be read")


def test_columns_that_are_wrong_hide_nothing(messy, tiny, capfd):
    path, expected = messy
    head, _, rest = path.read_text().partition("\n")
    path.write_text(f"{head},lable\n{rest}")
    assert main(["train", "audio_visual/demo", *tiny, f"data={path}"]) == 2
    first, *others = capfd.readouterr().err.splitlines()
    assert f"{path}:1: unknown column 'lable'. Did you mean 'label'?" in first and len(others) == len(expected)


def test_skip_bad_goes_on_and_says_what_it_left_out(messy, tmp_path, capfd, tiny):
    path, expected = messy
    assert main(["train", "audio_visual/demo", *tiny, f"data={path}", "--id", "one", "--skip-bad"]) == 0
    err = capfd.readouterr().err
    assert f"skipped {len(expected)} of {4 + len(expected)} clips:" in err and f"{path}:8: silent.wav is silent." in err
    log = (tmp_path / "runs" / "one" / "log.txt").read_text()
    assert f"skipped {len(expected)} of" in log and "has no sound track" in log


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("audio,frames,lable,split\n", "unknown column 'lable'. Did you mean 'label'?"),
        ("audio,frames,lable,split\n", "there is no column 'label'."),
        ("frames,label,split\n", "the modality audio needs a column 'audio' or 'video'"),
        ("audio,audio,frames,label,split\n", "the column audio is there twice."),
        ("audio,frames,label,split\n", "there is no usable clip in the split train."),
        ("", "there is no column 'label'."),
        ("audio,frames,label,split\n0.wav,0.png,a,train\n0.wav,0.png,a,test\n", "there is one class only, a;"),
        ("audio,frames,label,split\n0.wav,0.png,a,train\n1.wav,0.png,b,train\n", "no usable clip in the split test."),
        (
            "clip,audio,frames,label,split\nx,0.wav,0.png,a,train\nx,1.wav,0.png,b,test\n",
            "The clip x is on line 2 already",
        ),
        (
            "audio,frames,label,split\n0.wav,0.png,a,train\n0.wav,0.png,,test\n",
            ":3: has no label. The clip 0.wav is on line 2 already; every clip needs a name of its own, in a column",
        ),
        ("frames,label\n0.png,a\ngone.png,a\n", ":3: gone.png does not exist."),
        ("audio,frames,label,split\n0.wav,0.png,a,train,more\n", "has more cells than there are columns."),
        (b"\xff\xfe\x00", "cannot be read as CSV in UTF-8"),
    ],
)
def test_manifests_that_cannot_be_used(text, message, tmp_path):
    for index in range(2):
        made.write_sound(tmp_path / f"{index}.wav", 500)
    made.write_picture(tmp_path / "0.png", (0, 0, 0))
    path = tmp_path / "manifest.csv"
    path.write_bytes(text if isinstance(text, bytes) else text.encode())
    found = read_manifest(AudioVisualData(manifest=str(path)), path)
    settle(found, skip_bad=False)
    assert any(message in line for line in found.sentences()), found.sentences()


def test_a_manifest_that_is_not_there(tmp_path):
    for path, what in ((tmp_path / "no.csv", "does not exist"), (tmp_path, "is a folder")):
        (line,) = read_manifest(AudioVisualData(), path).sentences()
        assert f"data.manifest: {path} {what}." in line


def test_classes_that_are_never_tested_are_a_doubt(tmp_path):
    for name in ("a", "b"):
        made.write_sound(tmp_path / f"{name}.wav", 500)
    rows = [{"audio": f"{n}.wav", "label": n, "split": s} for n, s in (("a", "train"), ("b", "train"), ("a", "test"))]
    path = made.write_manifest(tmp_path / "m.csv", [{"clip": str(i), **row} for i, row in enumerate(rows)])
    (line,) = doubts(read_manifest(AudioVisualData(modalities=["audio"]), path))
    assert "b: trained, but not in the split test." in line


def test_validation_clips_come_from_every_class_where_no_split_is_called_val(clips):
    data = AudioVisualData(manifest=str(clips))
    manifest = read_manifest(data, clips)
    manifest.clips = [clip for clip in manifest.clips if clip.split != "val"]
    splits = with_validation(manifest, 0.3, 0)
    assert len(splits["val"]) == 4 and {clip.label for clip in splits["val"]} == {"low", "high"}
    assert len(splits["train"]) == 8 and not {c.name for c in splits["train"]} & {c.name for c in splits["val"]}
    assert with_validation(manifest, 0.3, 0) == splits and with_validation(manifest, 0.3, 1) != splits


@pytest.mark.parametrize("scale", ["log_mel", "log_stft"])
def test_features_are_kept_by_file_and_settings(scale, clips, tmp_path, monkeypatch):
    data = AudioVisualData(manifest=str(clips), **{**SMALL, "audio": {**SMALL["audio"], "scale": scale}})
    clip = read_manifest(data, clips).clips[0]
    store = FeatureStore(data, tmp_path / "cache")
    first = store.get(clip)
    monkeypatch.setattr("equipoise.pipelines.audio_visual.features.extract", None)  # must not be needed again
    again = FeatureStore(data, tmp_path / "cache").get(clip)
    assert first.keys() == again.keys() and all(torch.equal(first[k], again[k]) for k in first)
    other = data.model_copy(update={"visual": data.visual.model_copy(update={"size": 8})})
    assert FeatureStore(other, tmp_path / "cache").key(clip) != store.key(clip)
    monkeypatch.undo()
    (file,) = (tmp_path / "cache").rglob("*.safetensors")
    file.write_bytes(file.read_bytes()[:50])
    assert torch.equal(FeatureStore(data, tmp_path / "cache").get(clip)["audio"], first["audio"]), (
        "half a file is made anew"
    )


def test_batches_are_the_same_from_memory_and_from_disk(clips, tmp_path, monkeypatch):
    data = AudioVisualData(manifest=str(clips), **SMALL)
    chosen = read_manifest(data, clips).split("train")
    held = Batches(FeatureStore(data, tmp_path / "cache"), chosen)
    assert not held.store.prepare(chosen) and not held.store.full
    size = held.store.held // len(chosen)
    monkeypatch.setattr("equipoise.pipelines.audio_visual.features.MEMORY", int(2.5 * size))
    read = Batches(FeatureStore(data, tmp_path / "cache"), chosen)
    assert not read.store.prepare(chosen) and read.store.full
    assert len(read.store.memory) == 2 and read.store.held == 2 * size, "of twelve"
    for indices, following in (([0, 3], [5, 1]), ([5, 1], [2, 2]), ([4, 4], ())):
        one, other = held.get(indices, following), read.get(indices, following)
        assert all(torch.equal(one[name], other[name]) for name in ("audio", "visual"))


def test_features_are_made_anew_when_a_file_changes_that_is_read(tmp_path):
    folder = tmp_path / "frames"
    folder.mkdir()
    made.write_picture(folder / "0.png", (255, 0, 0))
    row = {"audio": "gone.wav", "frames": "frames", "label": "a", "split": "train"}
    path = made.write_manifest(tmp_path / "m.csv", [row])
    data = AudioVisualData(manifest=str(path), modalities=["visual"], visual={"size": 8})
    (clip,) = read_manifest(data, path).clips
    assert FeatureStore(data, tmp_path / "cache").prepare([clip]) == {}, (
        "a column that is not used may name what is not there"
    )
    assert FeatureStore(data, tmp_path / "cache").get(clip)["visual"][0, :, 0, 0].tolist() == [255, 0, 0]
    made.write_picture(folder / "0.png", (0, 0, 255))
    os.utime(folder / "0.png", ns=(1, 1))
    assert FeatureStore(data, tmp_path / "cache").get(clip)["visual"][0, :, 0, 0].tolist() == [0, 0, 255]


def test_clips_that_no_decoder_foresaw_are_problems_too(tmp_path):
    soundfile.write(tmp_path / "one.wav", np.array([0.5]), 44100)
    (tmp_path / "x.raw").write_bytes(b"\0\1" * 1000)
    names = ("one.wav", "x.raw", "a" * 300 + ".wav")
    rows = [{"audio": name, "label": "a", "split": "train"} for name in names]
    path = made.write_manifest(tmp_path / "m.csv", rows)
    data = AudioVisualData(manifest=str(path), modalities=["audio"], **SMALL)
    manifest = read_manifest(data, path)
    assert "does not exist." in manifest.bad[4]
    wrong = FeatureStore(data, None).prepare(manifest.clips)
    assert "too short to be resampled" in wrong[2] and "x.raw has no sound track." in wrong[3]
    assert "does not exist" in read_manifest(data, tmp_path / ("b" * 300)).problems[0]


def test_a_file_that_goes_away_is_a_problem_of_its_clip(clips, tmp_path):
    data = AudioVisualData(manifest=str(clips), modalities=["audio"], **SMALL)
    clip = read_manifest(data, clips).clips[0]
    gone = clip.__class__(**{**vars(clip), "audio": tmp_path / "gone.wav"})
    assert "cannot be read: No such file" in FeatureStore(data, None).prepare([gone])[clip.line]
    with pytest.raises(InputError, match="is silent"):
        soundfile.write(tmp_path / "s.wav", np.zeros(100), 4000)
        read_audio(tmp_path / "s.wav")


def test_what_systems_put_among_frames_is_none_of_them(tmp_path):
    for name in ("2.png", "1.png", "._1.png", ".thumb.png"):
        (tmp_path / name).write_bytes(b"")
    assert [file.name for file in picture_files(tmp_path)] == ["1.png", "2.png"]
