"""`equipoise export` of audio-visual results: weights with a card, and ONNX with the model's own numbers."""

import importlib.util
import json
from pathlib import Path

import numpy as np
import pytest
import torch
from huggingface_hub import ModelCard

from equipoise.pipelines import config
from equipoise.pipelines.audio_visual import AudioVisual, export
from equipoise.pipelines.audio_visual.card import card
from equipoise.pipelines.audio_visual.features import blank
from equipoise.pipelines.audio_visual.model import load
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store

spec = importlib.util.spec_from_file_location("clips", Path(__file__).with_name("conftest.py"))
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)


@pytest.fixture
def run(tiny) -> Run:
    settings = config.load("audio_visual/demo", [*tiny, "steps=20"])
    started = Store(settings.runs).create(settings)
    assert execute(AudioVisual, settings, started).state == "done"
    return started


def test_weights_are_exported_with_a_card_and_load_again(run, clips, tmp_path, capsys):
    assert main(["export", str(run.folder), "--output", str(tmp_path / "out")]) == 0
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == [
        "README.md", "model.json", "model.safetensors", "result.json"
    ]  # fmt: skip
    figures = json.loads((run.folder / "result" / "result.json").read_text())
    text = (tmp_path / "out" / "README.md").read_text()
    assert ModelCard(text).data.library_name == "equipoise" and "high, low" in text
    audio = [f"{figures[f'{key}_audio']:.1%}" for key in ("accuracy", "f1", "probe", "contribution")]
    assert f"| audio | {' | '.join(audio)} |" in text and "objective.name | mimo" in text
    one = made.write_manifest(clips.with_name("one.csv"), [{"audio": "test1.wav", "frames": "test1.png"}])
    for source in (tmp_path / "out", tmp_path / "out" / "model.safetensors"):
        model, classes = load(source)
        (row,) = model.predict([one])
        assert row["label"] in classes and 0.5 <= row["probability"] <= 1
    assert main(["export", str(run.folder), "--output", str(tmp_path / "other"), "--format", "merged"]) == 2
    assert "--format: 'merged' is none of weights, onnx." in capsys.readouterr().err


def test_a_result_is_pushed_to_the_hub_and_loads_from_what_lies_there(run, hub, tmp_path):
    done = hub.push(run.folder)
    assert done.returncode == 0, done.stderr
    assert hub.files.keys() == {"README.md", "model.json", "model.safetensors", "result.json"}
    for name, data in hub.files.items():
        (tmp_path / name).write_bytes(data)
    pushed, classes = load(tmp_path)
    own, _ = load(run.folder / "result")
    assert classes == ["high", "low"] and hub.secret not in done.stdout + done.stderr
    assert all(torch.equal(value, own.state_dict()[name]) for name, value in pushed.state_dict().items())


def test_what_load_gives_takes_files(tiny, clips):
    settings = config.load("audio_visual/demo", [*tiny, "steps=20", "data.modalities=[audio]"])
    started = Store(settings.runs).create(settings)
    execute(AudioVisual, settings, started)
    model, _ = load(started.folder / "result")
    files = [clips.parent / f"test{index}.wav" for index in (0, 1)]
    found = model.predict(files)
    assert [row["clip"] for row in found] == [str(file) for file in files]
    assert [row["label"] for row in found] == ["low", "high"]
    model.train()
    before = {name: value.clone() for name, value in model.state_dict().items()}
    assert model.predict(files) == found and model.training
    assert all(torch.equal(value, before[name]) for name, value in model.state_dict().items())


@pytest.mark.parametrize(
    ("stretch", "sound", "pictures"),
    [
        ("start", "longer sound cut to its first 0.25 s", "of the clip"),
        ("middle", "of longer sound the middle 0.25 s", "of the middle 0.25 s of the clip"),
        ("random", "of longer sound the middle 0.25 s", "of the middle 0.25 s of the clip"),
    ],
)
def test_the_card_says_which_part_of_a_long_clip_is_looked_at(stretch, sound, pictures, tiny):
    settings = config.load("audio_visual/demo", [*tiny, f"data.stretch={stretch}"])
    text = card(settings, ["high", "low"], {}, "onnx")
    assert sound in text and f"equal stretches {pictures}" in text
    assert ("one of five stretches" in text) == (stretch == "random")


@pytest.mark.slow
def test_an_onnx_model_of_clips_that_may_lack_a_modality_is_said_to_need_all(tiny, tmp_path, capfd):
    pytest.importorskip("onnxscript")
    settings = config.load("audio_visual/demo", [*tiny, "data.missing=mask", "steps=2"])
    started = Store(settings.runs).create(settings)
    execute(AudioVisual, settings, started)
    capfd.readouterr()
    assert main(["export", str(started.folder), "--output", str(tmp_path / "out"), "--format", "onnx"]) == 0
    said = "takes clips that have all of audio and visual"
    assert said in capfd.readouterr().err and said in (tmp_path / "out" / "README.md").read_text()


@pytest.mark.slow
def test_onnx_gives_the_models_own_numbers(tiny, clips, tmp_path, capfd):
    onnxruntime = pytest.importorskip("onnxruntime")
    pytest.importorskip("onnxscript")
    words = [
        "data.modalities=[audio, visual, text]",
        "model.text={width: 8, layers: 1, heads: 2}",
        "data.visual.frames=2",
    ]
    settings = config.load("audio_visual/demo", [*tiny, *words])
    started = Store(settings.runs).create(settings)
    execute(AudioVisual, settings, started)
    capfd.readouterr()
    assert main(["export", str(started.folder), "--output", str(tmp_path / "out"), "--format", "onnx"]) == 0
    printed = capfd.readouterr()
    assert printed.out == f"{tmp_path / 'out'}\n" and printed.err == ""
    assert sorted(file.name for file in (tmp_path / "out").iterdir()) == ["README.md", "features.json", "model.onnx"]
    described = json.loads((tmp_path / "out" / "features.json").read_text())
    assert described["classes"] == ["high", "low"] and described["inputs"]["audio"]["mels"] == 16
    assert "(clips, 1, 16, 16)" in (tmp_path / "out" / "README.md").read_text()
    session = onnxruntime.InferenceSession(tmp_path / "out" / "model.onnx")
    model, _ = load(started.folder / "result")
    generator = torch.Generator().manual_seed(0)
    for count in (1, 5):
        given = blank(settings.data, count)
        given["audio"] = torch.randn(given["audio"].shape, generator=generator) - 5
        given["visual"] = torch.randint(0, 256, given["visual"].shape, generator=generator, dtype=torch.uint8)
        given["text"][:, :7] = torch.randint(1, 257, (count, 7), generator=generator)
        found = dict(
            zip(
                [o.name for o in session.get_outputs()],
                session.run(None, {k: v.numpy() for k, v in given.items()}),
                strict=True,
            )
        )
        with torch.no_grad():
            joint, own = model(given)
            features = model.features(given)
        expected = (
            {"logits_joint": joint}
            | {f"logits_{n}": v for n, v in own.items()}
            | {f"features_{n}": v for n, v in features.items()}
        )
        assert found.keys() == expected.keys()
        for name, values in expected.items():
            # float32 sums in another order
            assert np.allclose(found[name], values.numpy(), rtol=1e-4, atol=1e-5), name


def test_without_what_onnx_needs_it_is_refused_in_a_sentence(run, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(export, "find_spec", lambda name: None)
    assert main(["export", str(run.folder), "--output", str(tmp_path / "out"), "--format", "onnx"]) == 2
    assert "onnx needs onnx and onnxscript. Install them with pip install 'equipoise[onnx]'." in capsys.readouterr().err
    assert not (tmp_path / "out").exists()
