"""`equipoise predict` and `equipoise evaluate` on clips: without labels, from files, and beside what a run found."""

import csv
import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest

from equipoise.pipelines import config
from equipoise.pipelines.audio_visual import AudioVisual
from equipoise.pipelines.audio_visual.predict import Result
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store

spec = importlib.util.spec_from_file_location("clips", Path(__file__).with_name("conftest.py"))
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


@pytest.fixture
def trained(tiny):
    """A finished run."""

    def get(*words: str) -> Run:
        settings = config.load("audio_visual/demo", [*tiny, *words])
        run = Store(settings.runs).create(settings)
        assert execute(AudioVisual, settings, run).state == "done"
        return run

    return get


def rows(text: str) -> list[dict]:
    return [json.loads(line) for line in text.splitlines()]


def test_evaluating_a_runs_own_manifest_finds_what_the_run_found(trained, clips, tmp_path, capsys):
    run, output = trained("steps=30"), tmp_path / "judged.csv"
    facts = json.loads((run.result / "result.json").read_text())
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), str(clips), "--output", str(output)]) == 0
    printed = capsys.readouterr().out
    for name in ("joint", "audio", "visual"):
        assert f"accuracy_{name}: {facts[f'accuracy_{name}']:.4g}\n" in printed
    with (run.result / "confusion-joint.csv").open(newline="") as file:
        counts = list(csv.reader(file))
    said = printed.split("joint, clips by true class (rows) and predicted one:\n")[1].splitlines()
    assert [line.split() for line in said[:3]] == [counts[0][1:], *counts[1:]]
    with output.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert [row["clip"] for row in found] == [f"test{index}" for index in range(6)], "the split test alone"
    right = [row["label"] == row["wanted"] for row in found]
    assert sum(right) / 6 == pytest.approx(facts["accuracy_joint"])


def test_clips_that_lack_a_modality_are_predicted_from_what_they_have(trained, clips, tmp_path, capsys):
    run = trained("steps=30", "data.missing=mask")
    few = [{"clip": "both", "audio": "test1.wav", "frames": "test1.png", "label": "high"}]
    few += [
        {"clip": "heard", "audio": "test0.wav", "label": "low"},
        {"clip": "seen", "frames": "test1.png", "label": "low"},
    ]
    manifest = made.write_manifest(clips.with_name("some.csv"), few)
    capsys.readouterr()
    assert main(["predict", str(run.folder), str(manifest), "--features", str(tmp_path / "f.npz")]) == 0
    both, heard, seen = rows(capsys.readouterr().out)
    assert both["audio_label"] and both["visual_label"] and heard["label"] == "low" and seen["label"] == "high"
    assert heard["visual_label"] is heard["visual_probability"] is None and seen["audio_label"] is None
    with np.load(tmp_path / "f.npz") as held:
        assert np.isnan(held["features_audio"]).any(1).tolist() == [False, False, True]
    assert main(["evaluate", str(run.folder), str(manifest)]) == 0
    printed = capsys.readouterr().out
    assert "accuracy_joint: 0.6667" in printed and "accuracy_visual: 0.5" in printed
    assert "That of one modality is of the clips that have it." in printed
    assert main(["predict", str(run.folder), str(clips.parent / "test0.wav")]) == 0, "a sound alone"
    (lone,) = rows(capsys.readouterr().out)
    assert lone["label"] == "low" and lone["visual_label"] is None


def test_labels_alone_make_a_manifest_that_can_be_evaluated(trained, clips, capsys):
    run = trained()
    few = [{"audio": "test0.wav", "frames": "test0.png", "label": "low"}]
    capsys.readouterr()
    assert main(["evaluate", str(run.folder), str(made.write_manifest(clips.with_name("few.csv"), few))]) == 0
    assert "share of the 1 clips in it" in capsys.readouterr().out


def test_a_manifest_without_labels_gives_labels_probabilities_and_features(trained, clips, tmp_path, capsys):
    run = trained("steps=30")
    few = [{"clip": name, "audio": f"{name}.wav", "frames": f"{name}.png"} for name in ("test0", "test1")]
    bare = made.write_manifest(clips.with_name("bare.csv"), few)
    capsys.readouterr()
    arrays = tmp_path / "features.npz"
    assert main(["predict", str(run.folder), str(bare), "--features", str(arrays)]) == 0
    found = rows(capsys.readouterr().out)
    assert [(row["clip"], row["label"]) for row in found] == [("test0", "low"), ("test1", "high")]
    for row in found:
        assert row["probability of high"] + row["probability of low"] == pytest.approx(1, abs=1e-6)
        assert row["probability"] == row[f"probability of {row['label']}"]
        assert 0.5 <= row["visual_probability"] <= 1 and row["audio_label"] in ("high", "low")
    with np.load(arrays) as held:
        assert list(held["clip"]) == ["test0", "test1"] and list(held["classes"]) == ["high", "low"]
        assert held["features_audio"].shape == held["features_visual"].shape == (2, 8)
        assert held["probabilities_joint"][:, 0] == pytest.approx([row["probability of high"] for row in found])
        result = Result(run.result)
        logits = held["features_audio"] @ result.model.heads["audio"].weight.detach().numpy().T
        logits += result.model.heads["audio"].bias.detach().numpy()
        shares = np.exp(logits) / np.exp(logits).sum(1, keepdims=True)
        assert held["probabilities_audio"] == pytest.approx(shares, abs=1e-5), "the head's features"


def test_videos_give_both_modalities_wherever_they_lie(trained, tmp_path, capsys):
    run, folder = trained(), tmp_path / "new"
    made.write_video(folder / "deep" / "b.mp4", 1.0)
    made.write_video(folder / "a.mkv", 1.0)
    (folder / "notes.txt").write_text("no video")
    (folder / ".hidden.mp4").write_text("no video")
    capsys.readouterr()
    assert main(["predict", str(run.folder), str(folder)]) == 0
    found = rows(capsys.readouterr().out)
    assert [row["clip"] for row in found] == [str(folder / "a.mkv"), str(folder / "deep" / "b.mp4")]
    assert main(["predict", str(run.folder), str(folder / "deep" / "b.mp4"), str(folder)]) == 0
    again = rows(capsys.readouterr().out)
    assert [row["clip"] for row in again] == [found[1]["clip"], found[0]["clip"]], "each once"
    assert again[0]["probability of high"] == pytest.approx(found[1]["probability of high"], abs=1e-5)
    loaded = Result(run.result).predict([folder])
    assert [row["label"] for row in loaded.rows] == [row["label"] for row in found]


def test_a_sound_alone_is_enough_where_the_run_reads_sound_alone(trained, clips, tmp_path, capsys):
    run = trained("data.modalities=[audio]", "objective=unimodal", "objective.options={}")
    capsys.readouterr()
    output = tmp_path / "said.csv"
    assert main(["predict", str(run.folder), str(clips.with_name("test0.wav")), "--output", str(output)]) == 0
    with output.open(newline="") as file:
        (row,) = csv.DictReader(file)
    assert row.keys() == {"clip", "audio_label", "audio_probability"}, "the joint head is not trained"
    assert main(["predict", str(run.folder), str(clips.with_name("test0.png"))]) == 2
    assert "test0.png: a picture alone has no audio, and the run reads audio. Give" in capsys.readouterr().err


def test_refusals_are_sentences_and_all_at_once(trained, clips, tmp_path, capsys):
    run, folder = trained(), tmp_path / "bad"
    folder.mkdir()
    (folder / "broken.mp4").write_bytes(b"no video")
    made.write_video(folder / "mute.mp4", 1.0, pitch=None)
    (tmp_path / "empty").mkdir()
    strange = [
        {"audio": "test0.wav", "frames": "test0.png", "label": "odd", "split": "test"},
        {"audio": "gone.wav", "frames": "test1.png", "label": "high", "split": "test"},
        {"audio": "gone.wav", "frames": "test2.png", "label": "", "split": "train"},
    ]
    manifest = str(made.write_manifest(clips.with_name("strange.csv"), strange))
    untold = str(made.write_manifest(clips.with_name("untold.csv"), [{"audio": "test0.wav"}]))
    wanted = {
        ("predict", str(clips.with_name("test0.wav")), str(clips.with_name("test1.png"))): (
            "test0.wav: a sound alone has no visual, and the run reads audio and visual.",
            "test1.png: a picture alone has no audio",
        ),
        ("predict", str(folder)): ("bad/broken.mp4 cannot be read", "bad/mute.mp4 "),
        ("predict", str(tmp_path / "empty")): ("empty: has no video, sound or picture in it or in its folders.",),
        ("predict",): ("FILE_OR_FOLDER: give one manifest (.csv), or media and folders of them; got 0.",),
        ("predict", untold): ("untold.csv:1: the modality visual needs a column 'frames' or 'video'",),
        ("predict", manifest, "--prompt", "What?", "--features", "x.txt"): (
            "--prompt: the pipeline audio_visual does not read it.",
            "--features: ",
            "x.txt must end in .npz.",
        ),
        ("evaluate", manifest): ("strange.csv:2: its class 'odd' is none of those", "strange.csv:3: gone.wav does not"),
        ("evaluate", untold): ("untold.csv:1: there is no column 'label'.",),
        ("evaluate", str(folder)): ("bad: is a folder. Give a manifest, a CSV file with a column label.",),
    }
    for (command, *words), messages in wanted.items():
        capsys.readouterr()
        assert main([command, str(run.folder), *words]) == 2, words
        error = capsys.readouterr().err
        assert all(message in error for message in messages) and "Traceback" not in error, (words, error)
    assert main(["evaluate", str(run.folder), manifest]) == 2
    assert "strange.csv:4" not in capsys.readouterr().err, "of another split"
    (run.result / "model.safetensors").unlink()
    assert main(["predict", str(run.folder), str(clips)]) == 2
    assert "model.safetensors: is missing." in capsys.readouterr().err
    (run.result / "result.json").unlink()
    assert main(["evaluate", str(run.folder), str(clips)]) == 2
    assert "has no result yet" in capsys.readouterr().err
