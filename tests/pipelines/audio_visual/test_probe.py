"""What probes say of features made by hand, and of a small model's encoders."""

import json
import math

import pytest
import torch

from equipoise.pipelines import config
from equipoise.pipelines.audio_visual import AudioVisual, probe
from equipoise.pipelines.comparing.report import write_report
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store


def blobs(count: int, seed: int, spread: float = 0.1) -> tuple[torch.Tensor, torch.Tensor]:
    """Three classes around three points of four dimensions."""
    generator = torch.Generator().manual_seed(seed)
    labels = torch.arange(count) % 3
    return torch.eye(4)[labels] + spread * torch.randn(count, 4, generator=generator), labels


def test_contributions_by_hand():
    value = {frozenset(k): v for k, v in (("", 0.1), ("a", 0.5), ("b", 0.3), ("ab", 0.9))}
    found = probe.contributions(["a", "b"], value)
    assert found == pytest.approx({"a": ((0.5 - 0.1) + (0.9 - 0.3)) / 2, "b": ((0.3 - 0.1) + (0.9 - 0.5)) / 2})
    value |= {frozenset(k): v for k, v in (("c", 0.1), ("ac", 0.5), ("bc", 0.3), ("abc", 0.9))}
    found |= {"c": 0.0}
    assert probe.contributions(["a", "b", "c"], value) == pytest.approx(found), "c adds nothing and is given nothing"


def test_a_modality_that_knows_and_one_that_does_not():
    (one, labels), (other, true) = blobs(300, seed=0), blobs(300, seed=1)
    noise = torch.randn(600, 4, generator=torch.Generator().manual_seed(2))
    parts = {"audio": one, "visual": noise[:300]}, {"audio": other, "visual": noise[300:]}
    found = probe.probes(parts[0], labels, parts[1], true, 3, chance=1 / 3)
    assert found["probe_audio"] == 1 and found["probe_joint"] > 0.99 and abs(found["probe_visual"] - 1 / 3) < 0.1
    assert found["contribution_audio"] > 0.6 and abs(found["contribution_visual"]) < 0.06
    total = found["contribution_audio"] + found["contribution_visual"]
    assert total == pytest.approx(found["probe_joint"] - 1 / 3)


def test_the_scale_of_features_does_not_matter_nor_one_that_never_changes():
    (one, labels), (other, true) = blobs(300, seed=0, spread=0.6), blobs(300, seed=1, spread=0.6)
    found = probe.probe(one, labels, other, true, 3)
    assert 0.5 < found < 0.95
    scale, shift = torch.tensor([1e-3, 1.0, 1e4, 30.0]), torch.tensor([5.0, 0.0, -1.0, 1e3])
    still = torch.full((300, 1), 0.1)
    moved = [torch.cat([part * scale + shift, still + near], 1) for part, near in ((one, 0), (other, 1e-4))]
    assert probe.probe(moved[0], labels, moved[1], true, 3) == pytest.approx(found, abs=0.01)


def test_it_is_fitted_to_convergence_and_always_the_same():
    features, labels = blobs(90, seed=0)
    features = torch.cat([features, features[:, :2] + 1e-3 * features[:, 2:]], 1).double()  # nearly the same twice
    weight, bias = probe._fitted(features, labels, 3)
    again = probe._fitted(features, labels, 3)
    assert torch.equal(weight, again[0]) and torch.equal(bias, again[1])
    errors = torch.softmax(features @ weight + bias, 1) - torch.nn.functional.one_hot(labels, 3)
    gradient = features.T @ errors / len(labels) + probe.PENALTY * weight
    assert gradient.abs().max() < 1e-5 and weight.abs().max() > 1


def test_features_that_are_not_finite_have_no_accuracy():
    features, labels = blobs(30, seed=0)
    broken = features.clone()
    broken[3, 1] = torch.inf
    assert math.isnan(probe.probe(broken, labels, features, labels, 3))


def test_a_run_reports_what_its_encoders_know_beside_its_heads(tiny, tmp_path):
    settings = config.load("audio_visual/demo", [*tiny, "steps=30", "train.baselines=[joint]"])
    run = Store(settings.runs).create(settings)
    outcome = execute(AudioVisual, settings, run)
    result = json.loads((run.folder / "result" / "result.json").read_text())
    for found in (result, result["baselines"]["joint"]):
        assert found["probe_joint"] == found["probe_audio"] == found["probe_visual"] == 1.0
        assert found["contribution_audio"] == found["contribution_visual"] == 0.25, "of a half above chance, half each"
    assert outcome.message.count("(probe 100.0%)") == 4
    made = AudioVisual.compare("one", tmp_path, [run], [settings], "fixed")
    assert list(made.beside) == ["probe_audio", "probe_visual", "accuracy_audio", "accuracy_visual"]
    assert all(cell.metrics["contribution_visual"] == 0.25 for cell in made.cells)
    write_report(made)
    assert all(f"probe_{kind} 100%" in (tmp_path / "report.html").read_text() for kind in ("audio", "visual"))


def test_a_head_that_learnt_nothing_does_not_hide_what_its_encoder_knows(tiny, monkeypatch):
    """With a unimodal head that stays zero, the probe is what it was."""
    from equipoise.pipelines.audio_visual.train import AudioVisualWork

    settings = config.load("audio_visual/demo", [*tiny, "steps=30"])
    caught = []
    settle = AudioVisualWork.settle
    monkeypatch.setattr(AudioVisualWork, "settle", lambda work: (settle(work), caught.append(work)))
    execute(AudioVisual, settings, Store(settings.runs).create(settings))
    (work,) = caught
    before = work.probe()
    for parameter in work.model.heads.parameters():
        torch.nn.init.zeros_(parameter)
    assert work.probe() == before and before["probe_audio"] == 1.0
    assert work.test()["audio"].accuracy == 0.5
