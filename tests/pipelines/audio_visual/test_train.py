"""Runs of the audio-visual pipeline on a few small clips: what they learn, save, survive and leave behind."""

import csv
import importlib.util
import json
import math
import shlex
import shutil
import time
from collections.abc import Collection
from contextlib import nullcontext
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file
from torch.nn import functional as F

from equipoise import registry
from equipoise.balancing.relearning import Relearning
from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.audio_visual import AudioVisual, features
from equipoise.pipelines.audio_visual.features import Batches
from equipoise.pipelines.audio_visual.model import FUSIONS, LateFusion, load, present
from equipoise.pipelines.audio_visual.prepared import prepare
from equipoise.pipelines.audio_visual.scores import scores
from equipoise.pipelines.audio_visual.train import AudioVisualWork
from equipoise.pipelines.cli import main
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.comparing.report import write_report
from equipoise.pipelines.jobs import sweep
from equipoise.pipelines.pipeline import Outcome, execute
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.training.loop import NonFiniteError
from equipoise.pipelines.training.state import make_accelerator

spec = importlib.util.spec_from_file_location("clips", Path(__file__).with_name("conftest.py"))
made = importlib.util.module_from_spec(spec)
spec.loader.exec_module(made)

NAME = "audio_visual/demo"
OPTIONS = {
    "mslr": "{factors: {audio: 0.5, visual: 2}}",
    "relearning": "{every: 0.5}",
    "opm": "{starts: 1}",
    "recon_boost": "{epochs_each: 1, epochs_all: 0.5}",
}
HEADS = {"mla": ["fusion=shared"]}  # what their joint head must be, where the demo's will not do


def train(*overrides):
    settings = config.load(NAME, overrides)
    run = Store(settings.runs).create(settings)
    return run, execute(AudioVisual, settings, run)


def weights(run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "result" / "model.safetensors")


def equal(left, right) -> bool:
    return left.keys() == right.keys() and all(torch.equal(left[key], right[key]) for key in left)


def test_a_run_learns_and_leaves_everything_it_promises(tiny):
    run, outcome = train(*tiny, "steps=30", "train.keep=best", "train.validate_every=10", "train.baselines=[joint]")
    assert outcome.state == "done"
    assert "30 steps. Test accuracy with mimo: all modalities together 100.0%, audio alone " in outcome.message
    assert "; guessing 50.0%. With joint in its place: all modalities together " in outcome.message
    records = run.metrics()
    per_step = {"loss", "loss_audio", "loss_visual", "gradient_norm_audio", "weight_visual", "balancing", "rate_heads"}
    assert per_step <= records[0].keys() and len(records) == 30
    assert all(0 < r["loading"] < r["seconds"] for r in records)
    validated = {"val_accuracy_joint", "val_accuracy_audio", "val_f1_visual", "val_loss_joint"}
    assert [r["step"] for r in records if validated <= r.keys()] == [10, 20, 30]
    result = json.loads((run.folder / "result" / "result.json").read_text())
    assert result["accuracy_joint"] == 1.0 and result["f1_joint"] == 1.0 and result["chance"] == 0.5
    assert "accuracy_visual" in result["baselines"]["joint"]
    with (run.folder / "result" / "confusion-joint.csv").open() as file:
        assert list(csv.reader(file)) == [["true \\ predicted", "high", "low"], ["high", "3", "0"], ["low", "0", "3"]]


def test_crema_d_from_the_published_layout_to_a_result(tmp_path, capfd):
    """Real .wav and .flv files by name, OGM-GE's lists, and the configuration as shipped but for smaller encoders."""
    lists: dict[str, list[str]] = {"train": [], "test": []}
    for part in ("AudioWAV", "VideoFlash"):
        (tmp_path / part).mkdir()
    for actor in range(1001, 1009):
        for emotion, pitch in (("ANG", 900.0), ("HAP", 300.0)):
            name = f"{actor}_DFA_{emotion}_XX"
            made.write_sound(tmp_path / "AudioWAV" / f"{name}.wav", pitch, 1.0)
            made.write_video(tmp_path / "VideoFlash" / f"{name}.flv", 1.0, pitch=None)
            lists["train" if actor < 1007 else "test"].append(f"{name},{emotion}\n")
    for split, lines in lists.items():
        (tmp_path / f"{split}.csv").write_text("".join(lines))
    assert main(["prepare", "crema-d", str(tmp_path)]) == 0
    small = [f"model.{name}={{widths: [4, 8], depths: [1, 1]}}" for name in ("audio", "visual")]
    words = [f"data={tmp_path / 'manifest.csv'}", f"runs={tmp_path / 'runs'}", "steps=2", "batch=4", *small]
    assert main(["train", "audio_visual/crema_d", *words, "--id", "faces"]) == 0, capfd.readouterr().err
    result = json.loads((tmp_path / "runs" / "faces" / "result" / "result.json").read_text())
    assert result["objective"] == "mimo" and {"accuracy_joint", "accuracy_audio", "accuracy_visual"} <= result.keys()


def test_a_folder_of_flash_videos_is_prepared_trained_on_and_predicted(tmp_path, capfd):
    """As CREMA-D's, of which some begin late: pictures from their second half second on, and other sounds."""
    for part in ("AudioWAV", "VideoFlash"):
        (tmp_path / part).mkdir()
    for actor in range(1001, 1025):
        for emotion, pitch in (("ANG", 900.0), ("HAP", 300.0)):
            name = f"{actor}_DFA_{emotion}_XX"
            made.write_sound(tmp_path / "AudioWAV" / f"{name}.wav", pitch, 1.5)
            made.write_video(tmp_path / "VideoFlash" / f"{name}.flv", 1.0, pitch=None, late=0.5 * (actor % 2))
    assert main(["prepare", "crema-d", str(tmp_path)]) == 0
    small = [f"model.{name}={{widths: [4, 8], depths: [1, 1]}}" for name in ("audio", "visual")]
    words = [f"data={tmp_path / 'manifest.csv'}", f"runs={tmp_path / 'runs'}", "steps=2", "batch=4", *small]
    assert main(["train", "audio_visual/demo", *words, "--id", "faces"]) == 0, capfd.readouterr().err
    table = tmp_path / "found.csv"
    assert (
        main(["predict", str(tmp_path / "runs" / "faces"), str(tmp_path / "manifest.csv"), "--output", str(table)]) == 0
    )
    with table.open(newline="") as file:
        found = list(csv.DictReader(file))
    assert len(found) == 48 and {row["label"] for row in found} <= {"anger", "happiness"}


def write_ur_funny(folder: Path) -> None:
    lines = ["id,text,label,split"]
    for index, split in enumerate(["train"] * 4 + ["val"] * 2 + ["test"] * 2):
        made.write_video(folder / "urfunny2_videos" / f"{index}.mp4")
        lines.append(f"{index},so they say {index},{index % 2},{split}")
    (folder / "labels.csv").write_text("\n".join(lines))


def write_cmu_mosei(folder: Path) -> None:
    lines = ["video_id,clip_id,text,label,annotation,mode"]
    for index, split in enumerate(["train"] * 4 + ["valid"] * 2 + ["test"] * 2):
        made.write_video(folder / "Raw" / f"v{index}" / "0.mp4")
        lines.append(f"v{index},0,so they say {index},0.5,{('Positive', 'Negative')[index % 2]},{split}")
    (folder / "label.csv").write_text("\n".join(lines))


@pytest.mark.parametrize(
    ("name", "write", "modalities"),
    [("ur-funny", write_ur_funny, ["audio", "text", "visual"]), ("cmu-mosei", write_cmu_mosei, ["audio", "text"])],
)
def test_what_prepare_says_to_do_next_trains_on_videos_with_text(name, write, modalities, tmp_path, capfd):
    folder = tmp_path / "a folder"
    write(folder)
    assert main(["prepare", name, str(folder)]) == 0
    command = shlex.split(capfd.readouterr().out.split("next: equipoise ")[1])
    small = [f"model.{kind}={{widths: [4, 8], depths: [1, 1]}}" for kind in modalities if kind != "text"]
    small += ["model.text={width: 8, layers: 1, heads: 2}", "steps=2", "epochs=", "batch=4"]
    small.append(f"runs={tmp_path / 'runs'}")
    assert main([*command, *small, "--id", "said"]) == 0, capfd.readouterr().err
    result = json.loads((tmp_path / "runs" / "said" / "result" / "result.json").read_text())
    assert sorted(key[9:] for key in result if key.startswith("accuracy_")) == sorted(["joint", *modalities])


def test_the_result_loads_and_predicts_the_same(tiny, clips):
    run, _ = train(*tiny)
    model, classes = load(run.folder / "result")
    assert classes == ["high", "low"] and equal(dict(model.state_dict()), weights(run))
    with pytest.raises(InputError, match="holds no model of this pipeline"):
        load(run.folder)


@pytest.mark.parametrize("name", [e.name for e in registry.entries("objectives") if e.distribution == "equipoise"])
def test_every_objective_trains_and_resumes_exactly(name, tiny, stopped_run):
    words = [*tiny, f"objective={name}", f"objective.options={OPTIONS.get(name, '{}')}", "train.accumulate=2"]
    words += HEADS.get(name, [])
    whole, outcome = train(*words)
    assert outcome.state == "done"
    settings = config.load(NAME, words)
    run = stopped_run(AudioVisual, settings, at=3)
    assert execute(AudioVisual, settings, run).state == "done"
    assert equal(weights(whole), weights(run))
    result = json.loads((run.folder / "result" / "result.json").read_text())
    assert ("accuracy_joint" in result) == (name != "unimodal") and "accuracy_audio" in result


def lacking(clips: Path, folder: Path) -> Path:
    """The clips of a manifest, in three modalities, of which every second clip lacks one; a video lacks sound."""
    with clips.open(newline="") as file:
        rows = list(csv.DictReader(file))
    made.write_video(folder / "mute.mp4", pitch=None)
    for index, row in enumerate(rows):
        row |= {column: str(clips.parent / row[column]) for column in ("audio", "frames")}
        if index % 2:
            row[("audio", "frames", "text")[index // 2 % 3]] = ""
    rows[0] |= {"audio": "", "frames": "", "video": "mute.mp4"}
    return made.write_manifest(folder / "manifest.csv", rows)


MASKED = ["data.modalities=[audio, visual, text]", "model.text={width: 8, layers: 1, heads: 2}"]


@pytest.mark.parametrize("name", [e.name for e in registry.entries("objectives") if e.distribution == "equipoise"])
def test_clips_that_lack_a_modality_are_trained_and_scored_on_what_is_there(name, tiny, clips, tmp_path, capfd):
    words = [*tiny, f"data={lacking(clips, tmp_path)}", *MASKED, "data.missing=mask", f"objective={name}", "batch=3"]
    options = OPTIONS.get(name, "{}")
    if not registry.load("objectives", name).takes_missing:
        words += ["data.modalities=[audio, visual]", *HEADS.get(name, [])]
        assert main(["train", NAME, *words]) == 2
        said = capfd.readouterr().err
        does = {"relearning": "clusters the features of every clip", "mla": "weighs every modality of every clip"}
        why = does.get(name, "compares what modalities say of the same")
        assert f"objective.name: {name} {why}" in said
        return
    run, outcome = train(*words, f"objective.options={options}")
    assert outcome.state == "done"
    found = json.loads((run.folder / "result" / "result.json").read_text())
    for kind in ("audio", "visual", "text"):
        with (run.folder / "result" / f"confusion-{kind}.csv").open() as file:
            counts = sum(int(cell) for row in list(csv.reader(file))[1:] for cell in row[1:])
        assert counts == 5, "the sixth test clip does not have it"
        assert 0 <= found[f"accuracy_{kind}"] <= 1


def test_what_a_clip_lacks_changes_nothing(tiny, clips, tmp_path):
    """Neither the encoder that it is not given to, nor the gradient of its head."""
    path = lacking(clips, tmp_path)
    settings = config.load(NAME, [*tiny, f"data={path}", *MASKED, "data.missing=mask"])
    prepared = prepare(settings)
    assert prepared.problems == [] and prepared.store.given[2] == {"visual", "text"}, "a video without sound"
    work = AudioVisualWork(settings, Store(settings.runs).create(settings), make_accelerator("no"), prepared)
    batch = work.batches["train"].get([0, 1, 2, 3])
    there = present(batch, work.model.modalities, "audio")
    assert there.tolist() == [False, False, True, True]
    work.model.eval()
    features = work.model.features(batch)["audio"]
    assert not features[:2].any() and features[2:].any()
    other = dict(batch, audio=torch.where(there.view(-1, 1, 1, 1), batch["audio"], 7.0))
    assert torch.equal(work.model.features(other)["audio"], features)
    work.model.train()
    lone = {name: part[:3] for name, part in batch.items()}
    assert work.model.features(lone)["audio"].isfinite().all(), "one clip that has it"
    none = {name: part[:2] for name, part in batch.items()}
    work.model.zero_grad()
    made_of = work.model.features(none)["audio"]
    assert not made_of.any()


def test_batches_in_which_one_clip_or_none_has_a_modality_leave_the_batch_norms_alone(tiny, clips, tmp_path):
    settings = config.load(NAME, [*tiny, f"data={lacking(clips, tmp_path)}", *MASKED, "data.missing=mask"])
    run, prepared = Store(settings.runs).create(settings), prepare(settings)
    model = AudioVisualWork(settings, run, make_accelerator("no"), prepared).model.train()
    batch = Batches(prepared.store, prepared.splits(settings)["train"]).get([0, 1, 2, 3])
    norms = {name: value.clone() for name, value in model.encoders["audio"].named_buffers()}
    for count, wanted in ((2, False), (3, True)):
        model.zero_grad()
        joint, own = model({name: part[:count] for name, part in batch.items()})
        (joint.sum() + own["audio"].sum()).backward()
        assert equal(dict(model.encoders["audio"].named_buffers()), norms)
        assert model.heads["audio"].bias.grad.any()
        grads = [parameter.grad for parameter in model.encoders["audio"].parameters()]
        assert any(grad is not None and bool(grad.any()) for grad in grads) == wanted
    model(batch)
    assert not equal(dict(model.encoders["audio"].named_buffers()), norms), "two clips have it"


def with_rare_text(clips: Path, folder: Path, kept: Collection[str]) -> Path:
    """The clips of a manifest, of which those of these names alone have text."""
    with clips.open(newline="") as file:
        rows = [dict(row, text=row["text"] if row["clip"] in kept else "") for row in csv.DictReader(file)]
    for row in rows:
        row |= {column: str(clips.parent / row[column]) for column in ("audio", "frames")}
    return made.write_manifest(folder / "m.csv", rows)


@pytest.mark.parametrize(
    ("kept", "drawn", "lacking"),
    [
        ([], False, ["train", "val", "test"]),
        (["train0", "test0"], False, ["val"]),
        (["train0", "val0", "test0"], False, []),
        (["train0", "test0"], True, ["val", "train"]),  # one of them, by where the only clip is drawn to
    ],
)
def test_a_modality_that_no_clip_of_a_split_has_is_a_problem(kept, drawn, lacking, tiny, clips, tmp_path):
    path = with_rare_text(clips, tmp_path, kept)
    if drawn:
        path.write_text("".join(line for line in path.read_text().splitlines(True) if not line.startswith("val")))
    settings = config.load(NAME, [*tiny, f"data={path}", *MASKED, "data.missing=mask"])
    found = prepare(settings).problems
    named = {split for split in ("train", "val", "test") for line in found if f"no clip of the split {split}" in line}
    assert len(named) == len(found) == min(len(lacking), 1 if drawn else 3) and named <= set(lacking)
    assert all("has the modality text" in line for line in found)


def test_sound_that_is_rare_is_standardized_by_the_clips_that_have_it(tiny, clips, tmp_path, monkeypatch):
    with clips.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {column: str(clips.parent / row[column]) for column in ("audio", "frames")}
        row["audio"] = "" if row["split"] == "train" and row["clip"] != "train5" else row["audio"]
    path = made.write_manifest(tmp_path / "m.csv", rows)
    settings = config.load(NAME, [*tiny, f"data={path}", "data.missing=mask"])
    monkeypatch.setattr("equipoise.pipelines.audio_visual.train._HEARD", 2)  # clips, which else miss the only one
    prepared = prepare(settings)
    work = AudioVisualWork(settings, Store(settings.runs).create(settings), make_accelerator("no"), prepared)
    sound = prepared.store.get(next(clip for clip in prepared.manifest.clips if clip.name == "train5"))["audio"]
    assert work.model.sound.tolist() == pytest.approx([float(sound.mean()), float(sound.std())], rel=1e-4)


def test_a_modality_that_no_test_clip_has_is_a_problem(tiny, clips, tmp_path, capfd):
    with clips.open(newline="") as file:
        rows = list(csv.DictReader(file))
    for row in rows:
        row |= {column: str(clips.parent / row[column]) for column in ("audio", "frames")}
        row["text"] = "" if row["split"] == "test" else row["text"]
    path = made.write_manifest(tmp_path / "m.csv", rows)
    assert main(["train", NAME, *tiny, f"data={path}", *MASKED, "data.missing=mask"]) == 2
    assert "no clip of the split test has the modality text" in capfd.readouterr().err
    assert main(["train", NAME, *tiny, f"data={path}", *MASKED]) == 2
    assert "has nothing in text or text_file for the modality text" in capfd.readouterr().err


def with_empty_text(clips: Path, folder: Path) -> Path:
    """The clips of a manifest with the same word for each."""
    with clips.open(newline="") as file:
        rows = [dict(row, text="so") for row in csv.DictReader(file)]
    for row in rows:
        row |= {column: str(clips.parent / row[column]) for column in ("audio", "frames")}
    return made.write_manifest(folder / "manifest.csv", rows)


def test_f_star_auto_keeps_lambda_from_a_modality_that_says_nothing(tiny, clips, tmp_path, capfd):
    words = [*tiny, f"data={with_empty_text(clips, tmp_path)}", "data.modalities=[audio, text]", "steps=40"]
    words += ["model.text={width: 8, layers: 1, heads: 2}", "train.validate_every=4", "optimizer.learning_rate=1e-2"]
    share, noted = {}, {}
    for name, options in (("zero", "{}"), ("auto", "{f_star: auto}")):
        run, outcome = train(*words, f"objective.options={options}")
        assert outcome.state == "done"
        noted[name] = "text holds" in (run.folder / "log.txt").read_text()
        share[name] = sum(record["weight_text"] for record in run.metrics()[20:]) / 20 / 10
        assert ("text holds" in capfd.readouterr().err) == noted[name]
    result = json.loads((run.folder / "result" / "result.json").read_text())
    assert 0.6 < result["alone_text"] < 0.8 and result["alone_audio"] < result["alone_text"], "log 2 is a guess"
    assert noted == {"zero": True, "auto": False} and share["zero"] > 0.9 > share["auto"]


def test_a_run_with_an_automatic_f_star_stops_and_resumes_exactly(tiny, stopped_run):
    words = [*tiny, "objective.options={f_star: auto}"]
    whole, _ = train(*words)
    settings = config.load(NAME, words)
    run = stopped_run(AudioVisual, settings, at=3)
    assert execute(AudioVisual, settings, run).state == "done"
    assert equal(weights(whole), weights(run)) and not equal(weights(whole), weights(train(*tiny)[0]))
    one, other = (json.loads((r.folder / "result" / "result.json").read_text()) for r in (whole, run))
    assert one["alone_audio"] == other["alone_audio"] and one["alone_visual"] == other["alone_visual"]


def test_relearning_moves_the_encoders_back_and_says_by_how_much(tiny):
    run, _ = train(*tiny, "steps=10", "objective=relearning", "objective.options={every: 1, times: 2}")
    log = (run.folder / "log.txt").read_text()
    assert log.count("moved back towards the start: audio by ") == 2
    moved = [record["step"] for record in run.metrics() if "moved_audio" in record]
    assert moved == [4, 7], "before the steps after three and after six, of epochs of 12 clips by 4"


def test_relearning_clusters_some_clips_of_very_many(tiny, monkeypatch):
    given, take = [], Relearning.take_features
    monkeypatch.setattr("equipoise.pipelines.audio_visual.train.MOST", 5)
    monkeypatch.setattr(Relearning, "take_features", lambda self, *parts: given.append(parts) or take(self, *parts))
    train(*tiny, "steps=4", "objective=relearning", "objective.options={every: 1, times: 1}")
    ((features, labels, validation, _),) = given
    assert len(features["audio"]) == len(labels) == 5 and len(validation["audio"]) == 4


def test_gradient_blending_estimates_its_weights_before_the_run(tiny):
    run, outcome = train(*tiny, "steps=10", "objective=gradient_blending")
    result = json.loads((run.folder / "result" / "result.json").read_text())
    assert outcome.state == "done" and {"alone_audio", "alone_visual", "alone_joint"} <= result.keys()
    log = (run.folder / "log.txt").read_text()
    assert "alone: audio " in log and "weights: audio " in log
    assert sum(run.metrics()[0][f"weight_{name}"] for name in ("audio", "visual", "joint")) == pytest.approx(1)


def test_opm_changes_what_the_joint_head_is_given(tiny):
    plain, dropped = (weights(train(*tiny, f"objective={name}")[0]) for name in ("joint", "opm"))
    never = weights(train(*tiny, "objective=opm", "objective.options={execute: 0}")[0])
    assert equal(plain, never) and not equal(plain, dropped)


def test_unimodal_takes_the_best_of_each_modality_by_itself(tiny, stopped_run, monkeypatch):
    """Also where each was best at another validation, and after a stop between the two."""
    words = ["objective=unimodal", "steps=20", "train.validate_every=4", "learning_rate=0.3"]
    run, _ = train(*tiny, *words, "train.keep=best")
    found = {r["step"]: r for r in run.metrics() if "val_loss_audio" in r}
    best = {name: min(found, key=lambda step: found[step][f"val_loss_{name}"]) for name in ("audio", "visual")}
    assert best["audio"] != best["visual"], "or this shows nothing"
    kept = weights(run)
    for name, step in best.items():
        short = weights(train(*tiny, *words, "train.keep=last", f"steps={step}")[0])
        own = [key for key in kept if key.startswith((f"encoders.{name}.", f"heads.{name}."))]
        assert own and all(torch.equal(kept[key], short[key]) for key in own), name
    settings = config.load(NAME, [*tiny, *words, "train.keep=best"])
    stopped = stopped_run(AudioVisual, settings, at=min(best.values()) + 1)
    assert execute(AudioVisual, settings, stopped).state == "done" and equal(weights(stopped), kept)

    now = AudioVisualWork.state
    with monkeypatch.context() as earlier:
        earlier.setattr(AudioVisualWork, "state", lambda work: {k: v for k, v in now(work).items() if k != "each"})
        stopped = stopped_run(AudioVisual, settings, at=min(best.values()) + 1)
    sums = {step: row["val_loss_audio"] + row["val_loss_visual"] for step, row in found.items()}
    short = train(*tiny, *words, "train.keep=last", f"steps={min(sums, key=sums.get)}")[0]
    assert execute(AudioVisual, settings, stopped).state == "done"
    assert equal(weights(stopped), weights(short)), "an earlier version's goes on with the best of the sum"


def test_objectives_differ(tiny):
    found = [
        weights(train(*tiny, f"objective={name}")[0]) for name in ("joint", "equal_weight", "mimo", "mmpareto", "agm")
    ]
    for index, one in enumerate(found):
        for other in found[index + 1 :]:
            assert not torch.equal(one["encoders.audio.net.embedder.embedder.convolution.weight"],
                                   other["encoders.audio.net.embedder.embedder.convolution.weight"])  # fmt: skip


def test_heads_that_learn_beside_leave_the_encoders_alone(tiny, monkeypatch):
    """Plain joint training with and without unimodal heads gives the same encoders."""
    with_heads = weights(train(*tiny, "objective=joint")[0])
    monkeypatch.setattr("equipoise.balancing.joint.Joint.uses_unimodal", True)  # then nothing trains the heads
    without = weights(train(*tiny, "objective=joint")[0])
    parts = {key.split(".")[0] for key in with_heads if not torch.equal(with_heads[key], without[key])}
    assert parts == {"heads"}


@pytest.mark.parametrize(
    "words",
    [
        ["optimizer=alpha_adam", "optimizer.options={}", "schedule=cosine"],
        ["optimizer=ada_sam", "optimizer.options={}"],
        ["optimizer=sam", "optimizer.options={rho: 0.1}", "data.flip=true", "data.shift=0.2", "data.roll=0.5"],
        ["train.precision=bf16", "data.class_weights=balanced"],
        ["fusion=gated"],
        ["fusion=film", "objective=ogm_ge"],
        ["fusion=shared", "model.visual={widths: [4, 16], depths: [1, 1]}", "objective=mimo"],
        ["fusion=concat", "objective=info_reg", "data.class_weights=balanced", "train.precision=bf16"],
        ["objective=mla", "fusion=shared", "optimizer=ada_sam", "optimizer.options={}"],
        ["data.modalities=[audio, visual, text]", "model.text={kind: transformer, width: 8, layers: 1, heads: 2}"],
        ["data.modalities=[visual, text]", "model.text={kind: transformer, width: 8, layers: 1, heads: 2}"],
        ["model.audio={kind: ast, width: 8, layers: 1, heads: 2}", "fusion=concat"],
        ["data.visual.frames=3"],
    ],
)
def test_every_way_to_train_ends_with_finite_weights(words, tiny):
    run, outcome = train(*tiny, *words, "learning_rate=1e-3")
    assert outcome.state == "done" and all(torch.isfinite(w.float()).all() for w in weights(run).values())


@pytest.mark.parametrize("name", [e.name for e in registry.entries("objectives") if e.distribution == "equipoise"])
def test_a_gradient_scaler_scales_and_clips(name, tiny, monkeypatch):
    """fp16 needs a scaler, which divides a step's gradients by its factor once; here it runs on the CPU in float32."""

    def scaled(precision):
        accelerator = make_accelerator(precision)
        accelerator.native_amp, accelerator.scaler = True, torch.amp.GradScaler("cpu", init_scale=1024.0)
        accelerator.state._mixed_precision, accelerator.autocast = "fp16", nullcontext
        return accelerator

    words = [*tiny, "train.clip=0.5", "train.keep=last", f"objective={name}", *HEADS.get(name, [])]
    words += [f"objective.options={OPTIONS.get(name, '{}')}"]
    plain = train(*words)[0]
    monkeypatch.setattr("equipoise.pipelines.audio_visual.train.make_accelerator", scaled)
    run, outcome = train(*words)
    assert outcome.state == "done"
    assert [m["gradient_norm"] for m in run.metrics()] == pytest.approx([m["gradient_norm"] for m in plain.metrics()])
    one, other = weights(plain), weights(run)  # a power of two scales without rounding
    assert all(torch.allclose(one[key].float(), other[key].float(), atol=1e-6) for key in one)
    held = [[m.get("held_audio", 0) + m.get("held_visual", 0) for m in r.metrics()] for r in (plain, run)]
    assert held[0] == pytest.approx(held[1])


def test_a_second_evaluation_leaves_the_running_means_alone(tiny):
    """Sharpness-aware steps of a rate of nearly 0 keep what one evaluation per step makes of the batch norms."""
    words = [*tiny, "learning_rate=1e-30", "train.keep=last"]
    plain = weights(train(*words)[0])
    twice = weights(train(*words, "optimizer=sam", "optimizer.options={rho: 0.5}")[0])
    means = [key for key in plain if "running_mean" in key]
    assert means and all(torch.allclose(plain[key], twice[key]) for key in means)


@pytest.mark.parametrize("objective", ["agm", "ogm_ge"])
def test_a_second_evaluation_counts_for_no_objective(tiny, objective):
    """At a rate of nearly 0 its coefficients are those of one evaluation per step."""
    words = [*tiny, "learning_rate=1e-30", f"objective={objective}"]
    plain = train(*words)[0].metrics()
    twice = train(*words, "optimizer=sam", "optimizer.options={rho: 0.5}")[0].metrics()
    names = [name for name in plain[-1] if name.startswith("coefficient_")]
    assert names and [m[n] for m in plain for n in names] == pytest.approx([m[n] for m in twice for n in names])
    assert any(m[name] != 1 for m in plain for name in names)


def test_two_processes_train_as_one(tiny, launched, tmp_path):
    """With class weights and baselines; without dropout, batch norms and augmentation, which each has for itself."""
    words = [NAME, *tiny, "data.modalities=[audio]", "model.audio={kind: ast, width: 8, layers: 1, heads: 2}"]
    words += ["train.baselines=[joint]", "train.keep=last", "data.class_weights=balanced"]
    out = launched("train", *words, "batch=2", "--id", "two")
    assert out.count("two: done.") == 1 and "With joint in its place: all modalities together " in out
    assert main(["train", *words, "batch=4", "--id", "one"]) == 0
    two, one = (weights(Store(tmp_path / "runs").get(name)) for name in ("two", "one"))
    assert all(torch.allclose(two[key], one[key], atol=1e-5) for key in one)


@pytest.mark.soak
def test_a_killed_run_resumes_exactly(tiny, killed_run):
    """SIGKILL somewhere after the second checkpoint; what is trained again is trained the same way."""
    overrides = [*tiny, "steps=60", "checkpoint_every=5", "objective=agm", "train.keep=best"]
    whole, _ = train(*overrides)
    assert equal(weights(whole), weights(killed_run(NAME, overrides, "step-00000010", "step-00000060")))


def test_training_ends_early_where_nothing_gets_better(tiny):
    _, outcome = train(*tiny, "steps=50", "learning_rate=1e-30", "train.patience=2", "data.audio.mels=8")
    assert outcome.state == "done" and "no better joint validation loss in 2 validations" in outcome.message
    assert outcome.step is not None and outcome.step < 50


def test_the_best_weights_are_the_result(tiny):
    """A rate that blows the weights up after some steps: the result is what was good before."""
    rules = ["schedule=piecewise_constant", "schedule.rules=1:4,1e4", "objective=joint"]
    losses = {}
    for keep in ("best", "last"):
        run, _ = train(*tiny, *rules, f"train.keep={keep}")
        losses[keep] = json.loads((run.folder / "result" / "result.json").read_text())["loss_joint"]
    assert losses["best"] < 2 and (losses["last"] is None or losses["last"] > 2)


def test_a_rate_that_is_too_large_diverges_with_a_result(tiny):
    run, outcome = train(*tiny, "learning_rate=1e30", "optimizer.options={}", "steps=12")
    assert outcome.state == "diverged" and "of 12" in outcome.message
    assert all(torch.isfinite(w.float()).all() for w in weights(run).values())


@pytest.mark.parametrize(
    ("name", "options", "ways"),
    [("mimo", "{f_star: auto}", "objective.options.f_star"), ("gradient_blending", "{}", "objective.options.weights")],
)
def test_a_preliminary_training_that_diverges_is_named_and_leaves_no_result(name, options, ways, tiny):
    words = [*tiny, f"objective={name}", f"objective.options={options}"]
    settings = config.load(NAME, [*words, "learning_rate=1e30", "optimizer.options={}", "steps=12"])
    run = Store(settings.runs).create(settings)
    with pytest.raises(InputError, match=r"the training of audio and visual alone, before the run's own") as caught:
        execute(AudioVisual, settings, run)
    assert "Set a smaller optimizer.learning_rate" in str(caught.value) and ways in str(caught.value)
    assert not list((run.folder / "result").iterdir())


def test_a_baseline_whose_preliminary_training_diverges_is_said_to(tiny, monkeypatch):
    steps = AudioVisualWork.step

    def step(self, number):
        if self.config.objective.name == "unimodal":
            raise NonFiniteError("the loss was not finite")
        return steps(self, number)

    monkeypatch.setattr(AudioVisualWork, "step", step)
    run, outcome = train(*tiny, "train.baselines=[gradient_blending]")
    assert "With gradient_blending in its place nothing was trained: the training of audio and" in outcome.message
    assert json.loads((run.folder / "result" / "result.json").read_text())["baselines"] == {}


def test_the_loss_of_an_absent_modality_is_the_mean_of_the_batches_that_have_it(tiny, clips, tmp_path):
    path = with_rare_text(clips, tmp_path, {"train0", "val0", "test0"})
    words = [*tiny, f"data={path}", *MASKED, "data.missing=mask", "objective=joint", "objective.options={}", "steps=3"]
    losses = {}
    for accumulate, batch in ((1, 4), (2, 6)):  # of twelve clips one has text
        run, _ = train(*words, f"train.accumulate={accumulate}", f"batch={batch}", "learning_rate=1e-30")
        losses[accumulate] = [record["loss_text"] for record in run.metrics() if "loss_text" in record]
        assert all("loss_audio" in record for record in run.metrics())
    assert len(losses[1]) == 1 and len(losses[2]) == 3, "one batch of three, and a half of each step"
    assert losses[1] + losses[2] == pytest.approx([losses[1][0]] * 4, rel=0.3)


def test_gradient_blending_looks_at_the_clips_that_have_a_rare_modality(tiny, clips, tmp_path, monkeypatch):
    """Of twelve clips one has text, and two are looked at."""
    monkeypatch.setattr("equipoise.pipelines.audio_visual.train._SEEN", 2)
    path = with_rare_text(clips, tmp_path, {"train7", "val0", "test0"})
    words = [*tiny, f"data={path}", *MASKED, "data.missing=mask", "objective=gradient_blending", "steps=3"]
    record = train(*words)[0].metrics()[-1]
    weights = [record[f"weight_{name}"] for name in ("joint", "audio", "visual", "text")]
    assert all(0 <= weight <= 1 for weight in weights) and sum(weights) == pytest.approx(1)
    settings = config.load(NAME, words)
    work = AudioVisualWork(settings, Store(settings.runs).create(settings), make_accelerator("no"), prepare(settings))
    found = work._both_losses(["joint", "audio", "text"])

    def loss(split: str, index: int) -> float:
        batch = work.batches[split].get([index])
        assert batch["text"].any()
        return F.cross_entropy(work.model(batch)[1]["text"], work.labels[split][[index]]).item()

    assert found["text"][:2] == pytest.approx((loss("train", 7), loss("val", 0)), rel=1e-5)
    assert found["text"][2:] == (math.inf, 1) and found["audio"][3] == 4, "of one validation clip, and of four"


def test_every_clip_is_decoded_once(tiny, tmp_path, monkeypatch):
    counted, real = [], features.extract
    monkeypatch.setattr(features, "extract", lambda *given: counted.append(1) or real(*given))
    assert main(["train", NAME, *tiny, "steps=1", "train.baselines=[joint]"]) == 0
    assert len(counted) == 22


def test_baselines_that_were_stopped_or_diverged_are_said_to_be(tiny, monkeypatch):
    steps = AudioVisualWork.step

    def step(self, number):
        if self.config.objective.name == "joint" and number == 3:
            raise NonFiniteError("the loss was not finite")
        if self.config.objective.name == "equal_weight":
            self.run.request("stop")
        return steps(self, number)

    monkeypatch.setattr(AudioVisualWork, "step", step)
    run, outcome = train(*tiny, "train.baselines=[joint, equal_weight, agm]")
    assert (
        outcome.state == "done" and "With joint in its place (diverged at step 4): all modalities " in outcome.message
    )
    assert "Stopped before equal_weight and agm had been trained instead." in outcome.message
    made = json.loads((run.folder / "result" / "result.json").read_text())["baselines"]
    assert made.keys() == {"joint"} and (made["joint"]["state"], made["joint"]["step"]) == ("diverged", 4)


def test_a_stop_while_a_baselines_modalities_train_alone_keeps_the_result(tiny, monkeypatch):
    steps = AudioVisualWork.step

    def step(self, number):
        if self.config.objective.name == "unimodal":
            assert (self.run.folder / "result" / "result.json").is_file(), "the run's own result is there by now"
            self.run.request("stop")
        return steps(self, number)

    monkeypatch.setattr(AudioVisualWork, "step", step)
    run, outcome = train(*tiny, "objective=joint", "objective.options={}", "train.baselines=[gradient_blending]")
    assert outcome.state == "done"
    assert outcome.message.endswith("Stopped before gradient_blending had been trained instead.")
    found = json.loads((run.folder / "result" / "result.json").read_text())
    assert found["objective"] == "joint" and found["baselines"] == {} and weights(run)


def test_a_run_does_not_go_on_with_other_clips(tiny, clips, stopped_run):
    path = clips.with_name("changing.csv")
    path.write_text(clips.read_text())
    settings = config.load(NAME, [*tiny, f"data.manifest={path}", "checkpoint_every=2"])
    run = stopped_run(AudioVisual, settings, at=3)
    lines = clips.read_text().splitlines()
    for text in ("\n".join(lines[:1] + lines[4:]), clips.read_text().replace("low,train", "new,train", 1)):
        path.write_text(text)
        with pytest.raises(InputError, match=r"changing.csv: its usable clips, their classes or splits are not those"):
            execute(AudioVisual, settings, run)
    path.write_text(clips.read_text())
    assert execute(AudioVisual, settings, run).state == "done"


def test_what_was_trained_for_comparison_is_compared(tiny, tmp_path):
    run, _ = train(*tiny, "train.baselines=[joint]")
    made = AudioVisual.compare("one", tmp_path, [run], [config.load(NAME, tiny)], "fixed")
    assert made.name == "one" and [cell.row.split(",")[0] for cell in made.cells] == ["mimo", "joint"]
    facts = json.loads((run.folder / "result" / "result.json").read_text())
    assert made.cells[1].score == facts["baselines"]["joint"]["accuracy_joint"]
    assert [len(cell.pictures) for cell in made.cells] == [3, 3]
    write_report(made)
    page = (tmp_path / "report.html").read_text()
    assert "same test clips" in page and "joint, sgd" in page and "of each prompt" not in page


def test_a_joint_accuracy_of_nothing_is_the_score(tiny, tmp_path):
    run, _ = train(*tiny)
    file = run.folder / "result" / "result.json"
    file.write_text(json.dumps({**json.loads(file.read_text()), "accuracy_joint": 0.0}))
    (cell,) = AudioVisual.compare("one", tmp_path, [run], [config.load(NAME, tiny)], "fixed").cells
    assert cell.metrics["score"] == 0.0


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["objective=ogm_ge", "data.modalities=[audio, visual, text]"], "objective: ogm_ge: OGMGE takes 2 modalities"),
        (["train.baselines=[agm, mini]"], "baselines: mini: no objective 'mini'."),
        (["train.baselines=[mslr]"], "baselines: mslr: factors: missing"),
        (["fusion=gated", "data.modalities=[audio]"], "model.fusion: gated takes two modalities, and there are 1."),
        (["objective=mla"], "objective.name: mla trains one head that all modalities go through, and model.fusion=sum"),
        (["objective=recon_boost", "fusion=concat"], "objective.name: recon_boost lets the other modalities' parts of"),
        (["train.baselines=[lfm]", "fusion=film"], "train.baselines: lfm takes the joint logits apart into a part of"),
        (["model.audio.kind=transformer"], "kind must be resnet or ast for audio, got transformer."),
        (["model.visual={widths: [8], depths: [1, 1]}"], "needs as many depths as widths"),
        (["data.modalities=[audio, audio]"], "must name each modality once"),
        (["objective.options={f_star: {sound: 1}}"], "f_star: sound is no modality here; there are audio, visual."),
        (["model.visual.path=./nowhere"], "model.visual.path: ./nowhere does not exist."),
        (["data.modalities=[audio, text]", "model.text.path=./nowhere"], "model.text.path: ./nowhere does not exist."),
        (["model.audio={kind: ast, width: 8, layers: 1, heads: 2}", "data.audio.mels=8"], "model: its encoders cannot"),
        (["model.visual={widths: [0, 8], depths: [1, 1]}"], "model: its encoders cannot"),
        (
            ["objective.options={f_star: {audio: .nan}}"],
            "or {name: a number, …} or none, got {'audio': nan}",
        ),
    ],
)
def test_bad_input_is_a_sentence_and_leaves_nothing(tiny, words, message, tmp_path, capfd):
    assert main(["train", NAME, *tiny, *words]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error
    runs = tmp_path / "runs"
    assert not runs.exists() or not [p for p in runs.iterdir() if not p.name.startswith((".", "index"))]


def write_bert(folder: Path, padding: bool = True) -> Path:
    from transformers import BertConfig, BertModel

    torch.manual_seed(3)
    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    BertModel(BertConfig(vocab_size=12, max_position_embeddings=16, **sizes)).save_pretrained(folder)
    words = ["[PAD]", "[UNK]", "[CLS]", "[SEP]", "[MASK]", "high", "low"]
    from tokenizers import Tokenizer, models
    from transformers import PreTrainedTokenizerFast

    named = {"pad_token": "[PAD]"} if padding else {}
    split = Tokenizer(models.WordLevel({word: index for index, word in enumerate(words)}, unk_token="[UNK]"))
    PreTrainedTokenizerFast(tokenizer_object=split, unk_token="[UNK]", **named).save_pretrained(folder)
    return folder


def test_a_pretrained_text_encoder_from_a_folder(tiny, tmp_path, capfd):
    words = [*tiny, "data.modalities=[visual, text]", f"model.text.path={write_bert(tmp_path / 'bert')}"]
    assert main(["train", NAME, *words]) == 2
    assert "takes 16 tokens, and data.text.length is 128. Set data.text.length=16." in capfd.readouterr().err
    run, outcome = train(*words, "data.text.length=16", "learning_rate=1e-30", "train.keep=last")
    assert outcome.state == "done"
    wanted, key = load_file(tmp_path / "bert" / "model.safetensors"), "embeddings.word_embeddings.weight"
    assert torch.equal(weights(run)[f"encoders.text.net.{key}"], wanted[key])
    other = write_bert(tmp_path / "unpadded", padding=False)
    assert main(["train", NAME, *words, f"model.text.path={other}", "data.text.length=16"]) == 2
    assert "has no token to pad with." in capfd.readouterr().err


def test_a_pretrained_ast_hears_what_it_was_made_for(tiny, tmp_path):
    from transformers import ASTConfig, ASTModel

    sizes = {"hidden_size": 8, "num_hidden_layers": 1, "num_attention_heads": 2, "intermediate_size": 16}
    net = ASTModel(ASTConfig(num_mel_bins=16, max_length=16, **sizes))
    net.save_pretrained(tmp_path / "ast")
    words = [*tiny, f"model.audio={{kind: ast, path: {tmp_path / 'ast'}}}", "learning_rate=1e-30", "train.keep=last"]
    run, _ = train(*words)
    model, _ = load(run.folder / "result")
    sound = model.sound[0] + model.sound[1] * torch.randn(2, 1, 16, 16)
    heard = (sound - model.sound[0]) / (2 * model.sound[1])
    with torch.no_grad():
        wanted = net.eval()(heard[:, 0].transpose(1, 2)).pooler_output
        assert torch.allclose(model.encoders["audio"]((sound - model.sound[0]) / model.sound[1]), wanted, atol=1e-5)


@pytest.mark.parametrize("part", ["config", "tokenizer"])
def test_no_code_from_a_models_folder_runs(part, tiny, tmp_path, capfd, monkeypatch):
    """Not even where the question whether to trust it would be answered with yes."""
    monkeypatch.setattr("builtins.input", lambda *_: "y")
    folder = write_bert(tmp_path / "net")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: ...\n")
    if part == "config":
        (folder / "config.json").write_text(
            json.dumps({"model_type": "evil", "auto_map": {"AutoConfig": "evil.Evil", "AutoModel": "evil.Evil"}})
        )
    else:
        told = {"tokenizer_class": "Evil", "auto_map": {"AutoTokenizer": ["evil.Evil", None]}}
        (folder / "tokenizer_config.json").write_text(json.dumps(told))
        (folder / "tokenizer.json").unlink()
    words = ["data.modalities=[visual, text]", f"model.text.path={folder}", "data.text.length=16"]
    assert main(["train", NAME, *tiny, *words]) == 2
    assert "model.text.path: " in capfd.readouterr().err and not (tmp_path / "ran").exists()


@pytest.fixture
def pretrained(tmp_path) -> Path:
    from transformers import ResNetConfig, ResNetModel

    torch.manual_seed(3)
    net = ResNetModel(ResNetConfig(embedding_size=4, hidden_sizes=[4, 8], depths=[1, 1], layer_type="basic"))
    net.save_pretrained(tmp_path / "net")
    return tmp_path / "net"


def test_a_pretrained_encoder_from_a_folder(tiny, pretrained):
    paths = [f"model.{part}.path={pretrained}" for part in ("audio", "visual")]
    run, _ = train(*tiny, *paths, "learning_rate=1e-30", "train.keep=last")
    found, key = weights(run), "embedder.embedder.convolution.weight"
    wanted = load_file(pretrained / "model.safetensors")[key]
    assert torch.equal(found[f"encoders.audio.net.{key}"], wanted), "three channels see the sound"
    assert torch.equal(found[f"encoders.visual.net.{key}"], wanted)


@pytest.mark.parametrize("optimizer", ["adamw", "scaled_adamw", "bounded_adamw"])
def test_lora_on_a_pretrained_encoder(optimizer, tiny, pretrained, stopped_run):
    """Only its factors are trained, beside the other encoder; a stopped run resumes exactly; the result loads."""
    lora = f"model.visual={{path: {pretrained}, rank: 2, alpha: 4}}"
    words = [*tiny, lora, f"optimizer={optimizer}", "optimizer.options={}", "learning_rate=1e-2", "train.keep=last"]
    run, outcome = train(*words)
    assert outcome.state == "done"
    found, start = weights(run), load_file(pretrained / "model.safetensors")
    frozen = {key: value for key, value in found.items() if "visual" in key and "base_layer.weight" in key}
    assert len(frozen) == 6 and all(
        torch.equal(value, start[key.removeprefix("encoders.visual.net.").replace("base_layer.", "")])
        for key, value in frozen.items()
    )
    assert all(value.any() for key, value in found.items() if "lora_B" in key)
    settings = config.load(NAME, words)
    again = stopped_run(AudioVisual, settings, at=3)
    saved = load_file(checkpoints.complete(again.folder / "checkpoints")[-1] / "weights.safetensors")
    assert not any("base_layer.weight" in key for key in saved), "what is frozen is where it came from"
    assert execute(AudioVisual, settings, again).state == "done" and equal(found, weights(again))
    shutil.rmtree(pretrained)
    model, _ = load(run.folder / "result")
    assert equal(dict(model.state_dict()), found), "without what was pretrained at hand"


@pytest.mark.parametrize("harm", ["damaged", "foreign", "misshapen"])
def test_pretrained_weights_that_cannot_be(harm, tiny, pretrained, capfd):
    file, key = pretrained / "model.safetensors", "embedder.embedder.convolution.weight"
    if harm == "damaged":
        file.write_bytes(file.read_bytes()[:1000])
    else:
        found = load_file(file)
        changed = (
            {f"other.{k}": v for k, v in found.items()} if harm == "foreign" else found | {key: torch.ones(1, 3, 7, 7)}
        )
        save_file(changed, file, {"format": "pt"})
    assert main(["train", NAME, *tiny, f"model.visual.path={pretrained}"]) == 2
    error = capfd.readouterr().err
    assert ("lacks 36 weights of a resnet, such as " if harm == "foreign" else "cannot be loaded: ") in error
    assert "Traceback" not in error


def test_a_run_does_not_go_on_with_another_encoder(tiny, pretrained, stopped_run):
    settings = config.load(NAME, [*tiny, f"model.visual={{path: {pretrained}, rank: 2}}", "optimizer.options={}"])
    run = stopped_run(AudioVisual, settings, at=3)
    file = pretrained / "model.safetensors"
    save_file({name: 3 * tensor for name, tensor in load_file(file).items()}, file, {"format": "pt"})
    with pytest.raises(InputError, match="model: its frozen weights are not those that this run was trained on so far"):
        execute(AudioVisual, settings, run)


def test_what_needs_a_language_model_is_refused_before_the_run(tiny, tmp_path, capfd):
    assert main(["train", NAME, *tiny, "coordinator=commit_clr", "--dry-run"]) == 2
    assert (
        "commit_clr sets a language model's rate against an encoder's, and audio_visual has not"
        in capfd.readouterr().err
    )


def test_however_much_is_validated_something_is_left_to_train(tiny, clips):
    path = clips.with_name("unsplit.csv")
    path.write_text(clips.read_text().replace(",val", ",train"))
    assert train(*tiny, f"data.manifest={path}", "data.validation=0.95", "batch=2")[1].state == "done"


def test_lora_that_cannot_be(tiny, pretrained, capfd):
    for words, message in (
        ("model.visual={rank: 2}", "rank is for pretrained weights, which stay as they are; give their path"),
        (f"model.visual={{path: {pretrained}, alpha: 2}}", "targets and alpha are for LoRA factors; give a rank"),
        (
            f"model.visual={{path: {pretrained}, rank: 2, targets: [to_q]}}",
            "model.visual.targets: to_q: no layer has a name that ends so. There are convolution.",
        ),
    ):
        assert main(["train", NAME, *tiny, words]) == 2
        assert message in capfd.readouterr().err


@pytest.mark.parametrize("fusion", FUSIONS)
def test_what_a_modality_says_alone(fusion, tiny):
    """Where the joint logits are no sum, its own head's: gates say who is the gate, and not who is ahead."""
    torch.manual_seed(0)
    model = LateFusion(config.load(NAME, [*tiny, f"fusion={fusion}"]), 5, (16, 16))
    features = {"audio": torch.randn(2, 8), "visual": torch.randn(2, 8)}

    def own(given):
        return {name: model.heads[name](made) for name, made in given.items()}

    alone, heads = model.responses(features, own(features)), own(features)
    assert all(logits.shape == (2, 5) for logits in alone.values())
    if fusion in ("sum", "concat"):
        assert torch.allclose(sum(alone.values()), model.fusion(features), atol=1e-6), "the joint logits are their sum"
    elif fusion == "shared":  # a clip at a time, by its own entropies
        each = {name: logits.detach().double().softmax(1) for name, logits in alone.items()}
        for clip, joint in enumerate(model.fusion(features)):
            sure = {name: math.exp(sum(float(p) * math.log(p) for p in each[name][clip])) for name in each}
            mean = sum(share * alone[name][clip] for name, share in sure.items()) / sum(sure.values())
            assert torch.allclose(joint, mean.float(), atol=1e-5)
    else:
        assert all(torch.equal(alone[name], heads[name]) and not alone[name].requires_grad for name in heads)
    other = {"audio": features["audio"], "visual": torch.randn(2, 8)}
    assert torch.equal(model.responses(other, own(other))["audio"], alone["audio"]), "it does not depend on the other"


def test_modalities_share_a_head_whose_width_is_the_widest_ones():
    torch.manual_seed(0)
    head = FUSIONS["shared"]({"audio": 2, "visual": 3}, 4)
    said = head.alone("audio", {"audio": torch.tensor([[1.0, 2.0]])})
    assert torch.allclose(said, torch.tensor([[1.0, 2.0, 0.0]]) @ head.out.weight.T + head.out.bias)
    assert sum(parameter.numel() for parameter in head.parameters()) == 16


def test_a_shared_head_gives_what_a_clip_lacks_no_say():
    torch.manual_seed(0)
    head = FUSIONS["shared"]({"audio": 2, "visual": 3, "text": 2}, 4)
    features = {name: torch.randn(3, width) for name, width in (("audio", 2), ("visual", 3), ("text", 2))}
    features["audio"][1:] = 0
    features["visual"][2] = features["text"][2] = 0
    features = {name: made.requires_grad_() for name, made in features.items()}
    joint = head(features)
    both = {name: features[name] for name in ("visual", "text")}
    assert not torch.allclose(joint[0], head(both)[0])
    assert torch.allclose(joint[1], head(both)[1]), "as if there were no sound"
    assert torch.allclose(joint[2], head.out.bias), "a clip of nothing"
    joint.square().sum().backward()
    assert all(made.grad.isfinite().all() for made in (*features.values(), head.out.weight, head.out.bias))


def test_what_recon_boost_lets_rest_stands_still(tiny):
    """Whatever momentum its optimizer has, and weight decay."""
    words = ["objective=recon_boost", "objective.options={epochs_each: 1, epochs_all: 0}", "learning_rate=1e-2"]
    settings = config.load(NAME, [*tiny, *words, "optimizer=adamw", "optimizer.options={weight_decay: 0.1}"])
    run = Store(settings.runs).create(settings)
    work = AudioVisualWork(settings, run, make_accelerator("no"), prepare(settings))
    for resting, steps in (("visual", range(3)), ("audio", range(3, 6)), ("visual", range(6, 9))):  # epochs of 3 steps
        before = {name: parameter.detach().clone() for name, parameter in work.named.items()}
        for step in steps:
            work.step(step)
        still = {name for name, parameter in work.named.items() if torch.equal(parameter, before[name])}
        assert still == {n for n in work.named if n.startswith((f"encoders.{resting}.", f"fusion.parts.{resting}."))}


def test_an_objective_without_the_head_it_needs_is_refused_in_python_too(tiny):
    settings = config.load(NAME, [*tiny, "objective=mla"])
    with pytest.raises(InputError, match=r"^objective.name: mla trains one head that all modalities go through, and "):
        AudioVisualWork(settings, Store(settings.runs).create(settings), make_accelerator("no"), prepare(settings))


def test_scores_by_hand():
    found = scores(torch.tensor([1.0, 2, 3, 2]), torch.tensor([0, 1, 1, 1]), torch.tensor([0, 0, 1, 1]), 3)
    assert found.loss == 2 and found.accuracy == 0.75
    assert found.f1 == pytest.approx((2 / 3 + 4 / 5) / 2), "the third class does not occur"
    assert found.confusion.tolist() == [[1, 1, 0], [0, 2, 0], [0, 0, 0]]


@pytest.mark.parametrize("memory", [features.MEMORY, 0])
def test_the_loader_takes_little_of_a_step(memory, clips, tmp_path, monkeypatch):
    """With cached features, at the demo's sizes of clips and model, in memory or on disk: under a tenth of a step."""
    monkeypatch.setattr(features, "MEMORY", memory)
    caught = []

    def one_step(_, work, *rest):
        work.step(0)
        times = [0.0, 0.0]
        get = work.batches["train"].get

        def timed(*given):
            started = time.perf_counter()
            batch = get(*given)
            times[0] += time.perf_counter() - started
            return batch

        work.batches["train"].get = timed
        started = time.perf_counter()
        for step in range(1, 4):
            work.step(step)
        times[1] = time.perf_counter() - started
        caught.append(times[0] / times[1])
        return Outcome("stopped")

    monkeypatch.setattr("equipoise.pipelines.audio_visual.train.train_loop", one_step)
    words = [f"data.manifest={clips}", f"runs={tmp_path / 'runs'}", "train.baselines=[]"]
    train(*words, "steps=1000", "train.validate_every=1000", "batch=12")
    assert caught[0] < 0.1


def test_a_sweep_compares_objectives_and_rates(tiny, tmp_path, capfd):
    axes = ["--axis", "objective=joint,mimo", "--axis", "learning_rate=1e-3,3e-2"]
    assert main(["sweep", NAME, *tiny, "steps=20", *axes, "--id", "grid"]) == 0
    out = capfd.readouterr().out
    assert "objective=mimo" in out and "ACCURACY_AUDIO" in out and "Learning rates that worked:" in out
    table = json.loads((tmp_path / "runs" / "grid" / "comparison" / "table.json").read_text())
    assert [cell["row"] for cell in table["cells"][1:]] == ["sgd objective=joint"] * 2 + ["sgd objective=mimo"] * 2
    assert table["cells"][0]["metrics"]["score"] == 0.5, "chance"
    assert (tmp_path / "runs" / "grid" / "comparison" / "grid.png").stat().st_size > 1000


def test_a_sweep_says_which_rows_found_no_lora_pairs(tiny, tmp_path, capfd):
    """Their optimizer is its base alone: that stands in the table, in the report, and where nothing is compared."""
    words = [NAME, *tiny, "steps=2", "optimizer.options={}", "--axis", "optimizer=adamw,bounded_adamw"]
    assert main(["sweep", *words, "--id", "grid"]) == 0
    said = "mimo, bounded_adamw: No LoRA pairs found: every parameter is left to the base optimizer."
    assert said in capfd.readouterr().out.splitlines()
    folder = tmp_path / "runs" / "grid" / "comparison"
    assert Comparison.read(folder).doubts == [said] and said in (folder / "report.html").read_text()
    (line,) = sweep.doubts(sweep.cells(Store(tmp_path / "runs").get("grid")))
    assert line.startswith("  1 of these cells: No LoRA pairs found")


def test_epochs_are_permutations_of_the_clips(tiny, monkeypatch):
    caught: list[AudioVisualWork] = []
    monkeypatch.setattr(
        "equipoise.pipelines.audio_visual.train.train_loop",
        lambda _, work, *rest: caught.append(work) or Outcome("stopped"),
    )
    train(*tiny)
    seen = [index for batch in range(6) for index in caught[0]._chosen(batch)]
    assert sorted(seen[:12]) == sorted(seen[12:]) == list(range(12)) and seen[:12] != seen[12:]


def test_without_a_rate_a_bounded_run_learns_at_a_moderate_one_where_nothing_is_a_pair(tiny):
    run, outcome = train(*tiny, "optimizer=bounded_adamw", "optimizer.options={}", "learning_rate=", "steps=30")
    losses = [record["loss"] for record in run.metrics()]
    assert outcome.state == "done" and max(losses[-5:]) < min(losses[:5])
    assert {record["rate"] for record in run.metrics()} == {1e-3}
    assert run.config().optimizer.outside_learning_rate == 1e-3 and "No LoRA pairs" in run.status().doubt


def test_without_a_rate_factors_get_a_large_one_and_the_heads_a_moderate_one(tiny, pretrained):
    lora = f"model.visual={{path: {pretrained}, rank: 2, alpha: 4}}"
    words = ["optimizer=bounded_adamw", "optimizer.options={}", "learning_rate=", "schedule=constant", "steps=40"]
    run, outcome = train(*tiny, lora, *words)
    records = run.metrics()
    losses = [record["loss"] for record in records]
    assert outcome.state == "done" and sum(losses[-10:]) < 0.8 * sum(losses[:10])
    assert {(record["rate_visual"], record["rate_heads"]) for record in records} == {(1.0, 1e-3)}
