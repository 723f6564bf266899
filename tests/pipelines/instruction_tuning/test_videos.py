"""Conversations about videos: read from every format, looked at by time, trained on where the processor takes them."""

import json
import shutil
import tarfile
from importlib.util import find_spec
from pathlib import Path

import numpy as np
import pytest
import torch

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.collator import AnswerCollator
from equipoise.pipelines.instruction_tuning.data import read_examples
from equipoise.pipelines.instruction_tuning.media import Frames, media_problem, open_video
from equipoise.pipelines.instruction_tuning.talk import _shown
from equipoise.pipelines.runs.store import Store

NAME = "instruction_tuning/demo"
needs_torchvision = pytest.mark.skipif(not find_spec("torchvision"), reason="processors take videos with torchvision")
KINDS = ["qwen2_vl", "qwen2_5_vl", "qwen3_vl", "smolvlm", "smolvlm2", "llava_onevision", "internvl"]
ALIKE = ("llava_onevision", "internvl")  # whose processors take videos of one length together


def read(file: Path):
    examples, problems = read_examples(file, None)
    assert problems == []
    return examples


def test_every_format_gives_the_same_conversation(films):
    folder = films.parent
    asked, answer = "Which comes first?", "red"
    (want, *_) = read(films)
    parts = [{"type": "video", "video": "0.mp4"}, {"type": "text", "text": asked}]
    by_url = [{"type": "video_url", "video_url": {"url": "0.mp4"}}, {"type": "text", "text": asked}]
    given = {"role": "assistant", "content": answer}
    for record in (
        {"video": "0.mp4", "question": asked, "answer": answer},
        {"videos": ["0.mp4"], "messages": [{"role": "user", "content": f"<video>\n{asked}"}, given]},
        {"messages": [{"role": "user", "content": parts}, given]},
        {"messages": [{"role": "user", "content": by_url}, given]},
    ):
        (folder / "one.jsonl").write_text(json.dumps(record))
        (found,) = read(folder / "one.jsonl")
        assert (found.kind, found.media, found.turns) == ("video", want.media, want.turns), record
    (folder / "one.csv").write_text(f"video,question,answer\n0.mp4,{asked},{answer}\n")
    (found,) = read(folder / "one.csv")
    assert (found.media, found.turns) == (want.media, want.turns)
    (folder / "0.json").write_text(json.dumps({"question": asked, "answer": answer}))
    with tarfile.open(folder / "one.tar", "w") as made:
        made.add(folder / "0.json", "0.json")
        made.add(folder / "0.mp4", "0.mp4")
    (found,) = read(folder / "one.tar")
    assert found.kind == "video" and found.turns == want.turns
    assert found.media[0].read_bytes() == want.media[0].read_bytes() and found.media[0].suffix == ".mp4"


def test_what_is_wrong_with_videos_is_said(films, pictures):
    folder = films.parent
    whole = (folder / "0.mp4").read_bytes()
    (folder / "cut.mp4").write_bytes(whole[: len(whole) // 2])
    (folder / "text.mp4").write_text("no video")
    shutil.copy(pictures.parent / "0.png", folder)
    records = [{"video": name, "question": "?", "answer": "a"} for name in ("none.mp4", "cut.mp4", "text.mp4")]
    records += [{"video": "0.mp4", "image": "0.png", "question": "?", "answer": "a"}]
    records += [{"image": "0.png", "question": "<video>?", "answer": "a"}]
    (folder / "bad.jsonl").write_text("\n".join(map(json.dumps, records)))
    examples, problems = read_examples(folder / "bad.jsonl", None)
    text = "\n".join(problems)
    assert examples == [] and "none.mp4 does not exist." in text and "cut.mp4 " in text and "text.mp4 cannot be" in text
    assert "has both an image and a video; one model takes one of them." in text
    assert "mentions <video>, but no video is given." in text
    assert "has pictures (first in line 4) and videos (first in line 1); one model takes one of them." in text
    assert media_problem(folder / "0.mp4", "video") == ""


def test_frames_are_those_in_the_middles_of_equal_parts_and_so_are_their_times(films):
    file = films.parent / "1.mp4"  # 3 seconds: green, and then blue
    video = open_video(file, Frames(2.0, 16))
    assert len(video.frames) == 6 and video.seconds == pytest.approx(3.0, abs=0.01)
    first = [int(np.asarray(frame)[4, 4].argmax()) for frame in video.frames]
    assert first == [1, 1, 1, 2, 2, 2]
    (about,) = _shown([video])["video_metadata"]
    assert about.timestamps == pytest.approx([0.25, 0.75, 1.25, 1.75, 2.25, 2.75], abs=0.01)
    assert about.sampled_fps == pytest.approx(2.0, rel=0.01)
    assert [Frames(1.0, 4).count(seconds) for seconds in (0.1, 3.2, 60)] == [1, 3, 4]
    assert Frames(None, 5).count(0.1) == Frames(None, 5).count(60) == 5


def test_a_model_without_videos_says_so(short, films):
    (problem, *_) = InstructionTuning.check(config.load(NAME, short("llava", films)))
    assert problem.endswith("has a video, but llava takes image.")


@pytest.mark.skipif(bool(find_spec("torchvision")), reason="torchvision is here")
def test_a_missing_torchvision_is_named(short, films):
    (problem, *_) = InstructionTuning.check(config.load(NAME, short("qwen2_vl", films)))
    assert "has a video, for which the processor of qwen2_vl needs the package torchvision." in problem


@needs_torchvision
@pytest.mark.parametrize("kind", KINDS)
def test_a_run_on_videos_sees_them_and_learns(kind, short, films, tmp_path):
    words = [*short(kind, films), "learning_rate=1e-2", "coordinator.options={measure_every: 1}"]
    if kind in ALIKE:
        with pytest.raises(InputError, match=r"Set data.fps= for data.frames frames of every video"):
            AnswerCollator(str(words[0].removeprefix("model=")))(read(films)[:2])
        words += ["data.fps=", "data.frames=4"]
    assert main(["train", NAME, *words, "--id", "films"]) == 0
    run = Store(tmp_path / "runs").get("films")
    said = json.loads((run.result / "result.json").read_text())
    assert said["loss_after"] < said["loss_before"]
    assert "of 2 media change what is answered" in (run.folder / "log.txt").read_text()
    assert run.metrics()[-1]["kappa"] > 0
    capped = ["--prompt", "What?", "--output", str(tmp_path / "answers.jsonl")]
    assert main(["predict", str(run.folder), str(films.parent / "3.mp4"), *capped]) == 0
    (row,) = map(json.loads, (tmp_path / "answers.jsonl").read_text().splitlines())
    assert row["video"] == str(films.parent / "3.mp4")


@needs_torchvision
def test_more_frames_are_more_tokens(checkpoints, films):
    (example, *_) = read(films)
    counts = [
        AnswerCollator(str(checkpoints("qwen2_5_vl")), fps=None, frames=frames)([example])["input_ids"].shape[1]
        for frames in (2, 4, 8)
    ]
    assert counts[2] - counts[1] == 2 * (counts[1] - counts[0]) > 0


@needs_torchvision
@pytest.mark.parametrize("kind", ["qwen2_5_vl", "qwen3_vl"])
def test_videos_are_packed_too(kind, short, films, tmp_path):
    words = [*short(kind, films), "batch=4", "learning_rate=1e-3", "data.max_tokens=400"]
    for name, more in (("plain", []), ("packed", ["train.packing=true"])):
        assert main(["train", NAME, *words, *more, "--id", name]) == 0
    losses = [[r["loss"] for r in Store(tmp_path / "runs").get(name).metrics()] for name in ("plain", "packed")]
    torch.testing.assert_close(*map(torch.tensor, losses), rtol=1e-4, atol=1e-4)
