"""`equipoise prepare` on small copies of the published layouts: which clips, labels and splits it finds."""

import csv
import gzip
import json
import pickle
import subprocess
import sys
from functools import partial
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.balancing.mimo import PRESETS
from equipoise.pipelines import config
from equipoise.pipelines.audio_visual.papers import RECIPES, configuration
from equipoise.pipelines.cli import main
from equipoise.pipelines.commands.prepare import LANGUAGES, SETS

gzipped = partial(gzip.compress, mtime=0)  # else it holds the time, and each process collects another test


def touch(root: Path, *names: str) -> None:
    for name in names:
        (root / name).parent.mkdir(parents=True, exist_ok=True)
        (root / name).touch()


def rows(file: Path) -> list[dict[str, str]]:
    with file.open(newline="") as opened:
        return list(csv.DictReader(opened))


def test_crema_d_is_split_by_digest_without_lists(tmp_path, capsys):
    names = [f"{1000 + i}_DFA_{emotion}_XX" for i in range(20) for emotion in ("ANG", "HAP")]
    touch(tmp_path, *(f"AudioWAV/{n}.wav" for n in names), *(f"VideoFlash/{n}.flv" for n in names[1:]))
    touch(tmp_path, "AudioWAV/notes.wav", "AudioWAV/1001_DFA_BAD_XX.wav")
    assert main(["prepare", "crema-d", str(tmp_path)]) == 0
    found = rows(tmp_path / "manifest.csv")
    assert len(found) == 39 and {row["label"] for row in found} == {"anger", "happiness"}
    assert found[0] == {
        "clip": "1000_DFA_HAP_XX", "audio": "AudioWAV/1000_DFA_HAP_XX.wav", "video": "VideoFlash/1000_DFA_HAP_XX.flv",
        "label": "happiness", "split": found[0]["split"],
    }  # fmt: skip
    assert {row["split"] for row in found} == {"train", "val", "test"}
    assert "39 clips of 2 classes" in capsys.readouterr().out
    assert main(["prepare", "crema-d", str(tmp_path), "--output", str(tmp_path / "sub" / "m.csv")]) == 0
    again = rows(tmp_path / "sub" / "m.csv")
    assert again[0]["audio"] == "../AudioWAV/1000_DFA_HAP_XX.wav"
    assert [row["split"] for row in again] == [row["split"] for row in found], "the split is the same everywhere"


def test_crema_d_by_the_lists_and_pictures_of_ogm_ge(tmp_path, capfd):
    names = [f"{1001 + i}_IEO_SAD_{level}" for i in range(3) for level in ("HI", "LO")]
    touch(tmp_path, *(f"AudioWAV/{n}.wav" for n in names), *(f"Image-01-FPS/{n}/00000.jpg" for n in names))
    (tmp_path / "val.csv").write_text(f"{names[3]},SAD\n")
    assert main(["prepare", "crema-d", str(tmp_path)]) == 2
    assert "has val.csv without test.csv and train.csv. Give train.csv and" in capfd.readouterr().err
    (tmp_path / "val.csv").unlink()
    (tmp_path / "train.csv").write_text("".join(f"{n},SAD\n" for n in names[:3]), encoding="utf-8-sig")
    assert main(["prepare", "crema-d", str(tmp_path)]) == 2
    assert "has train.csv without test.csv. Give train.csv and test.csv, or no list." in capfd.readouterr().err
    (tmp_path / "test.csv").write_text(f"{names[4]},SAD\nnot_there,SAD\n")
    assert main(["prepare", "crema-d", str(tmp_path)]) == 0
    found = rows(tmp_path / "manifest.csv")
    assert [(r["clip"], r["split"]) for r in found] == [*((n, "train") for n in names[:3]), (names[4], "test")]
    assert found[0]["frames"] == f"Image-01-FPS/{names[0]}" and found[0]["label"] == "sadness"


def test_ave_and_vggsound_and_kinetics(tmp_path, capfd):
    ave = tmp_path / "ave"
    touch(ave, "AVE/a1.mp4", "AVE/b2.mp4")
    (ave / "trainSet.txt").write_text("Church bell&a1&good&0&10\nBark&gone&good&0&10\nViolin, fiddle&a1&good&2&5\n")
    (ave / "testSet.txt").write_text("Bark&b2&good&1&5\n")
    assert main(["prepare", "ave", str(ave)]) == 0
    assert "left out 1 of 4: gone has no video\n" in capfd.readouterr().out
    found = rows(ave / "manifest.csv")
    assert [(r["label"], r["split"], r["video"]) for r in found] == [
        ("Church bell", "train", "AVE/a1.mp4"),
        ("Violin, fiddle", "train", "AVE/a1.mp4"),
        ("Bark", "test", "AVE/b2.mp4"),
    ]
    assert len({r["clip"] for r in found}) == 3, "a video under two labels is two clips"
    vgg = tmp_path / "vgg"
    touch(vgg, "video/xyz_000030.mp4", "video/uvw_7.mp4")
    (vgg / "vggsound.csv").write_text('xyz,30,"people, singing",test\nabc,1,dog,train\nuvw,7,dog,train\n')
    assert main(["prepare", "vggsound", str(vgg)]) == 0
    assert [(r["clip"], r["label"], r["split"], r["video"]) for r in rows(vgg / "manifest.csv")] == [
        ("xyz_000030", "people, singing", "test", "video/xyz_000030.mp4"),
        ("uvw_000007", "dog", "train", "video/uvw_7.mp4"),
    ]
    kinetics = tmp_path / "kinetics"
    touch(kinetics, "train/bowling/a.mp4", "val/bowling/b.mkv", "test/singing/c.mp4", "test/singing/readme.txt")
    assert main(["prepare", "kinetics-sounds", str(kinetics)]) == 0
    assert [(r["label"], r["split"]) for r in rows(kinetics / "manifest.csv")] == [
        ("bowling", "train"), ("bowling", "val"), ("singing", "test")
    ]  # fmt: skip


def test_three_modalities(tmp_path, capfd):
    funny, mosei = tmp_path / "funny", tmp_path / "mosei"
    touch(funny, "urfunny2_videos/7.mp4")
    (funny / "labels.csv").write_text('id,text,label,split\n7,"so,\nthen",1,dev\n8,no video,0,train\n')
    assert main(["prepare", "ur-funny", str(funny)]) == 0
    (row,) = rows(funny / "manifest.csv")
    assert (row["text"], row["label"], row["split"]) == ("so,\nthen", "funny", "val")
    made = config.load(funny / "manifest.yaml")
    assert made.data.modalities == ["audio", "visual", "text"] and made.objective.options == {"preset": "ur_funny"}
    touch(mosei, "Raw/v1/0.mp4")
    (mosei / "label.csv").write_text("video_id,clip_id,text,label,annotation,mode\nv1,0,fine,1.0,Positive,valid\n")
    assert main(["prepare", "cmu-mosei", str(mosei)]) == 0
    (row,) = rows(mosei / "manifest.csv")
    assert (row["video"], row["label"], row["split"]) == ("Raw/v1/0.mp4", "positive", "val")


@pytest.mark.parametrize("name", [name for name in SETS if not name.endswith("digits")])
def test_every_set_has_a_configuration_as_the_paper_trains_it(name, tmp_path):
    file = tmp_path / "manifest.yaml"
    file.write_text(configuration(name, tmp_path / "manifest.csv", 6027, "train.csv"))
    made = config.load(file)
    lam, mu = PRESETS[made.objective.options["preset"]]
    assert (made.objective.name, made.train.epochs, made.model.fusion) == ("mimo", 100, "sum")
    assert made.optimizer.name == "sgd" and made.optimizer.learning_rate == (1e-4 if name == "cmu-mosei" else 1e-3)
    assert made.objective.options["preset"] == name.replace("-", "_") and (lam, mu) == PRESETS[name.replace("-", "_")]
    assert made.schedule.rules == "1:6650,0.1" and made.train.validate_every == 95, "70 of epochs of 95 steps"
    assert (
        made.data.manifest == str(tmp_path / "manifest.csv") and f"{RECIPES[name].classes} classes" in file.read_text()
    )
    assert config.load(file, ["steps=2", "epochs="]).train.steps == 2


def test_an_epoch_is_counted_without_the_clips_that_are_held_out_to_validate_on(tmp_path):
    """70 clips by the list, of which training holds out 7: one step of 64."""
    touch(tmp_path, *(f"video/c_{index}.mp4" for index in range(71)))
    lines = [f"c,{index},dog,{'train' if index < 70 else 'test'}\n" for index in range(71)]
    (tmp_path / "vggsound.csv").write_text("".join(lines))
    assert main(["prepare", "vggsound", str(tmp_path)]) == 0
    made = config.load(tmp_path / "manifest.yaml")
    assert (made.train.validate_every, made.schedule.rules) == (1, "1:70,0.1")


def test_prepare_writes_the_configuration_once_and_names_its_lists(tmp_path, capfd):
    touch(tmp_path, "AVE/a1.mp4", "AVE/b2.mp4")
    (tmp_path / "trainSet.txt").write_text("Bark&a1&good&2&7\n")
    (tmp_path / "testSet.txt").write_text("Bark&b2&good&0&10\n")
    assert main(["prepare", "ave", str(tmp_path)]) == 0
    printed, file = capfd.readouterr().out, tmp_path / "manifest.yaml"
    assert "ave has 28 classes in the papers, and 1 here" in printed
    assert printed.endswith(f"next: equipoise train {file}\n")
    assert file.read_text().startswith("# ave: 28 classes, splits by trainSet.txt, testSet.txt.\n# 100 epochs of SGD")
    (row, _) = rows(tmp_path / "manifest.csv")
    assert (row["start"], row["end"]) == ("2", "7"), "the event's own span"
    file.write_text("mine")
    assert main(["prepare", "ave", str(tmp_path)]) == 0
    assert "is there already, and is left as it is" in capfd.readouterr().out and file.read_text() == "mine"


def write_av_mnist(folder: Path, clips: int = 40) -> None:
    generator = np.random.default_rng(0)
    for split, count in (("train", clips), ("test", 8)):
        labels = np.arange(count) % 2
        for kind, side in (("image", 28), ("audio", 112)):
            (folder / kind).mkdir(exist_ok=True)
            made = generator.integers(0, 50, (count, side, side)) + 150 * labels[:, None, None]
            np.save(folder / kind / f"{split}_data.npy", made / 255 if kind == "image" else made)
        np.save(folder / f"{split}_labels.npy", labels)


def test_av_mnist_is_prepared_from_its_arrays_and_trained_on(tmp_path, capfd):
    write_av_mnist(tmp_path)
    assert main(["prepare", "av-mnist", str(tmp_path)]) == 0
    found = rows(tmp_path / "manifest.csv")
    assert len(found) == 48 and {row["split"] for row in found} == {"train", "val", "test"}
    sound = np.load(tmp_path / found[3]["audio"])
    assert sound.shape == (112, 112) and np.array_equal(sound, np.load(tmp_path / "audio" / "train_data.npy")[3])
    picture = np.asarray(Image.open(tmp_path / found[3]["frames"]))
    assert np.array_equal(picture, (255 * np.load(tmp_path / "image" / "train_data.npy")[3]).round())
    words = [
        "steps=30",
        "epochs=",
        "batch=8",
        "optimizer.learning_rate=2e-2",
        "train.keep=last",
        "schedule.rules=1:90,1",
    ]
    words.append(f"runs={tmp_path / 'runs'}")
    words += [f"model.{kind}={{widths: [4, 8], depths: [1, 1]}}" for kind in ("audio", "visual")]
    assert main(["train", str(tmp_path / "manifest.yaml"), *words, "--id", "av"]) == 0, capfd.readouterr().err
    assert json.loads((tmp_path / "runs" / "av" / "result" / "result.json").read_text())["accuracy_joint"] == 1
    np.save(tmp_path / found[0]["audio"], np.zeros((10, 112), np.float16))
    assert main(["train", str(tmp_path / "manifest.yaml"), *words, "--id", "bad"]) == 2
    assert "00000.npy holds 10 × 112 values, and data.audio wants 112 bins × 112 windows" in capfd.readouterr().err


def test_av_mnist_of_other_shapes_is_refused(tmp_path, capfd):
    write_av_mnist(tmp_path, 4)
    np.save(tmp_path / "train_labels.npy", np.zeros(3))
    assert main(["prepare", "av-mnist", str(tmp_path)]) == 2
    assert "wanted as many pictures of 28 × 28 as spectrograms of 112 × 112 and labels" in capfd.readouterr().err
    np.save(tmp_path / "train_labels.npy", np.array([{}], object), allow_pickle=True)
    assert main(["prepare", "av-mnist", str(tmp_path)]) == 2
    assert "train_labels.npy cannot be read as a NumPy array" in capfd.readouterr().err


def test_spoken_digits_pairs_recordings_with_pictures(tmp_path):
    labels = np.array([0, 1, 1, 0], np.uint8)
    pixels = np.stack([np.full((28, 28), 10 * i, np.uint8) for i in range(4)])
    touch(
        tmp_path, "mnist/x", "fsdd/recordings/1_ann_0.wav", "fsdd/recordings/1_ann_7.wav", "fsdd/recordings/1_bob_9.wav"
    )
    (tmp_path / "mnist" / "images-idx3.gz").write_bytes(gzipped(b"h" * 16 + pixels.tobytes()))
    (tmp_path / "mnist" / "labels-idx1.gz").write_bytes(gzipped(b"h" * 8 + labels.tobytes()))
    assert main(["prepare", "spoken-digits", str(tmp_path)]) == 0
    found = rows(tmp_path / "manifest.csv")
    assert [(r["clip"], r["frames"], r["split"]) for r in found] == [
        ("1_ann_0", "mnist-pictures/00001.png", "test"), ("1_ann_7", "mnist-pictures/00002.png", "train")
    ], "no picture twice"  # fmt: skip
    assert (tmp_path / found[0]["frames"]).stat().st_size > 0


def test_written_digits_are_tested_on_another_speaker_and_unseen_spellings(tmp_path):
    from num2words import num2words

    labels, pixels = np.arange(10, dtype=np.uint8).repeat(40), np.zeros((400, 28, 28), np.uint8)
    names = [f"{digit}_{who}_{index}.wav" for who in ("ann", "bob", "cy") for digit in range(10) for index in range(7)]
    touch(tmp_path, "mnist/x", *(f"fsdd/recordings/{name}" for name in names))
    (tmp_path / "mnist" / "images-idx3.gz").write_bytes(gzipped(b"h" * 16 + pixels.tobytes()))
    (tmp_path / "mnist" / "labels-idx1.gz").write_bytes(gzipped(b"h" * 8 + labels.tobytes()))
    assert main(["prepare", "spoken-written-digits", str(tmp_path)]) == 0
    found = rows(tmp_path / "manifest.csv")
    assert {(row["clip"].split("_")[1], row["split"]) for row in found} == {
        ("ann", "train"), ("bob", "val"), ("cy", "test")
    }  # fmt: skip
    known = {num2words(digit, lang=name) for name in LANGUAGES["train"] for digit in range(10)}
    assert [row["text"] for row in found if row["clip"].startswith("0_cy")] == ["cero", "nulle", "nul"] * 2 + ["cero"]
    for row in found:
        spelled = {num2words(int(row["label"]), lang=name) for name in LANGUAGES[row["split"]]}
        assert row["text"] in spelled and (row["split"] == "train" or row["text"] not in known), row
    made = config.load(tmp_path / "manifest.yaml")
    assert made.data.modalities == ["audio", "visual", "text"] and made.data.text.length == 16
    assert max(len(row["text"].encode()) for row in found) <= 16


def test_written_digits_of_too_few_speakers(tmp_path, capfd):
    touch(tmp_path, "mnist/x", "fsdd/recordings/1_ann_0.wav")
    (tmp_path / "mnist" / "images-idx3.gz").write_bytes(gzipped(b"h" * 16 + b"p" * 784))
    (tmp_path / "mnist" / "labels-idx1.gz").write_bytes(gzipped(b"h" * 8 + b"\1"))
    assert main(["prepare", "spoken-written-digits", str(tmp_path)]) == 2
    assert "fsdd has 1 speaker(s). Train, val and test need one each." in capfd.readouterr().err


@pytest.mark.parametrize(
    ("words", "message"),
    [
        (["crema"], "no data set 'crema'. Did you mean 'crema-d'? There are crema-d, ave,"),
        (["ave", "."], "holds no clips of ave. Expected are AVE/ID.mp4"),
        (["ave", "nowhere"], "nowhere is no folder."),
    ],
)
def test_what_cannot_be_prepared_is_said_in_a_sentence(words, message, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    assert main(["prepare", *words, *(["."] if len(words) == 1 else [])]) == 2
    assert message in capfd.readouterr().err and not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("name", "file", "text", "message"),
    [
        ("ur-funny", "sdk/humor_label_sdk.pkl", "cos", "is a pickle file, which can run any code when it is"),
        ("ur-funny", "labels.csv", "id,sentence\n1,x\n", "has no column text, label, split. It needs id, text,"),
        ("vggsound", "vggsound.csv", "a,1,dog,test\nb,1\n", "vggsound.csv:2: wanted 4 cells or more, got 2."),
        ("ave", "testSet.txt", "Bark,b2\n", "testSet.txt:1: wanted 2 cells or more, got 1."),
        ("ave", "trainSet.txt", f"Bark&{'b' * 200_000}", "trainSet.txt:1: cannot be read as CSV (field larger than"),
        ("cmu-mosei", "label.csv", "\xff", "label.csv is not text in UTF-8."),
    ],
)  # fmt: skip
def test_lists_that_are_not_as_published_are_refused_in_a_sentence(name, file, text, message, tmp_path, capfd):
    (tmp_path / file).parent.mkdir(exist_ok=True)
    (tmp_path / file).write_text(text, encoding="latin-1")
    assert main(["prepare", name, str(tmp_path)]) == 2
    error = capfd.readouterr().err
    assert message in error and "Traceback" not in error and not (tmp_path / "manifest.csv").exists()


@pytest.mark.parametrize(
    ("images", "labels", "message"),
    [
        (b"no gzip", gzipped(b"h" * 9), "x-images.gz is no gzipped file of IDX's ("),
        (gzipped(b""), gzipped(b"h" * 9), "x-images.gz is no gzipped file of IDX's ("),
        (gzipped(b"h" * (16 + 784)), gzipped(b"h" * 10), "mnist has 1 pictures and 2 labels."),
    ],
    ids=["not gzipped", "nothing in it", "more labels than pictures"],
)
def test_damaged_pictures_of_digits(images, labels, message, tmp_path, capfd):
    touch(tmp_path, "mnist/x", "fsdd/recordings/1_ann_0.wav")
    (tmp_path / "mnist/x-images.gz").write_bytes(images)
    (tmp_path / "mnist/x-labels.gz").write_bytes(labels)
    assert main(["prepare", "spoken-digits", str(tmp_path)]) == 2
    assert message in capfd.readouterr().err


def test_splits_that_there_are_not(tmp_path, capfd):
    touch(tmp_path, "urfunny2_videos/7.mp4")
    (tmp_path / "labels.csv").write_text("id,text,label,split\n7,so,1,trian\n")
    assert main(["prepare", "ur-funny", str(tmp_path)]) == 2
    assert "has the split trian; there are train, val, test." in capfd.readouterr().err


def test_the_documented_export_of_ur_funnys_labels(tmp_path):
    """The lines in docs/audio_visual.md, on pickle files of the published form."""
    page = (Path(__file__).parents[2] / "docs" / "audio_visual.md").read_text()
    (code,) = [block.split("```")[0] for block in page.split("```python\n")[1:] if "humor_label_sdk" in block]
    folds = {"train": [7], "dev": [8], "test": [9]}
    language = {key: {"punchline_sentence": f"it is {key}", "context_sentences": []} for key in (7, 8, 9)}
    for file, what in (("data_folds", folds), ("language_sdk", language), ("humor_label_sdk", {7: 1, 8: 0, 9: 1})):
        (tmp_path / f"{file}.pkl").write_bytes(pickle.dumps(what))
    touch(tmp_path, *(f"urfunny2_videos/{key}.mp4" for key in (7, 8, 9)))
    subprocess.run([sys.executable, "-c", code], cwd=tmp_path, check=True)
    assert main(["prepare", "ur-funny", str(tmp_path)]) == 0
    assert [(r["clip"], r["text"], r["label"], r["split"]) for r in rows(tmp_path / "manifest.csv")] == [
        ("7", "it is 7", "funny", "train"), ("8", "it is 8", "serious", "val"), ("9", "it is 9", "funny", "test")
    ]  # fmt: skip


def test_real_spoken_digits(tmp_path):
    """The data sets, where they are at hand: every recording is read, and its picture is of its digit."""
    data = Path(__file__).parents[3] / "shared" / "data"
    if not (data / "fsdd").is_dir():
        pytest.skip("the spoken digits are not at ../shared/data")
    output = tmp_path / "manifest.csv"
    assert main(["prepare", "spoken-digits", str(data), "--output", str(output)]) == 0
    found = rows(output)
    assert len(found) == 3000 and sum(row["split"] == "test" for row in found) == 300
    assert len({row["frames"] for row in found}) == 3000
    from equipoise.pipelines.audio_visual.config import AudioVisualData
    from equipoise.pipelines.audio_visual.data import read_manifest
    from equipoise.pipelines.audio_visual.features import FeatureStore

    section = AudioVisualData.model_validate({"audio": {"sample_rate": 8000, "seconds": 0.5}, "visual": {"size": 32}})
    manifest = read_manifest(section, output)
    assert not manifest.sentences()
    assert FeatureStore(section, None).prepare(manifest.clips[::100]) == {}
