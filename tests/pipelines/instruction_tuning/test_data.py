"""Conversations in every format, and all that is wrong with one, each problem with its file and line."""

import json
import os
from pathlib import Path

import numpy as np
import pytest
from PIL import Image

from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning import data as reading
from equipoise.pipelines.instruction_tuning.config import InstructionTuningData
from equipoise.pipelines.instruction_tuning.data import Turn, read_all, read_examples
from equipoise.pipelines.instruction_tuning.good_media import _known, line_of
from equipoise.pipelines.instruction_tuning.media import media_problem, open_picture, open_sound

ASK, SAY = {"from": "human", "value": "Is it red?"}, {"from": "gpt", "value": "yes"}


@pytest.fixture
def folder(tmp_path) -> Path:
    Image.new("RGB", (8, 8), "red").save(tmp_path / "red.png")
    return tmp_path


def written(folder: Path, *records, name: str = "talk.jsonl") -> Path:
    text = "\n".join(r if isinstance(r, str) else json.dumps(r) for r in records)
    (folder / name).write_text(text)
    return folder / name


def test_the_formats_say_the_same(folder):
    item = {"image": "red.png", "conversations": [ASK, SAY]}
    (folder / "talk.csv").write_text('\ufeffimage,question,answer\nred.png,"Is it\nred?",yes\nred.png,Is it red?,yes\n')
    jsonl, wrong = read_examples(written(folder, item), None)
    listed, worse = read_examples(written(folder, json.dumps([item, item], indent=2), name="talk.json"), None)
    table, worst = read_examples(folder / "talk.csv", None)
    assert wrong + worse + worst == []
    assert jsonl[0].turns == listed[1].turns == table[1].turns == (Turn("<image>\nIs it red?", "yes"),)
    assert [Path(e.where).name for e in [*jsonl, *listed, *table]] == [
        "talk.jsonl:1",
        "talk.json:2",
        "talk.json:15",
        "talk.csv:2",
        "talk.csv:4",
    ]


def test_a_list_may_be_one_line(folder):
    """As json.dump writes it: none takes another's place, and one with a fault takes none with it."""
    items = [{"image": "red.png", "conversations": [{**ASK, "value": f"{number}?"}, SAY]} for number in range(5)]
    items[2]["conversations"] = [ASK]
    examples, problems = read_examples(written(folder, json.dumps(items), name="talk.json"), None)
    assert [example.turns[0].question for example in examples] == [f"<image>\n{number}?" for number in (0, 1, 3, 4)]
    assert problems == [f"{folder / 'talk.json'}:1: has no answer."]


def test_turns_systems_and_several_pictures(folder):
    more = [{"from": "system", "value": "Be brief."}, {"from": "human", "value": "<image> and <image>?"}, SAY, ASK, SAY]
    ((example,), wrong) = read_examples(
        written(folder, {"image": ["red.png", "red.png"], "conversations": [*more, ASK]}), None
    )
    assert wrong == [] and len(example.media) == 2 and example.system == "Be brief."
    assert [turn.question for turn in example.turns] == ["<image> and <image>?", "Is it red?"]


BAD = [
    ({"image": "no.png", "conversations": [ASK, SAY]}, "no.png does not exist."),
    ({"image": "empty.png", "conversations": [ASK, SAY]}, "empty.png is empty (0 bytes)."),
    ({"image": "text.png", "conversations": [ASK, SAY]}, "text.png cannot be read as a picture"),
    ({"image": "half.png", "conversations": [ASK, SAY]}, "half.png cannot be read as a picture"),
    ({"image": "vast.png", "conversations": [ASK, SAY]}, "vast.png is enormous (over "),
    ({"image": "red.png", "conversations": [SAY, ASK]}, "begins with the assistant; the user must begin."),
    ({"image": "red.png", "conversations": [ASK]}, "has no answer."),
    ({"image": "red.png", "conversations": [ASK, {"from": "gpt", "value": " "}]}, "has an empty answer."),
    ({"image": "red.png", "conversations": [ASK, ASK, SAY]}, "has two turns of the same speaker in a row"),
    ({"image": "red.png"}, "has no conversations"),
    ({"image": "red.png", "conversations": ["hello"]}, "turn 1 needs `from` and `value`, both text."),
    ({"image": "red.png", "conversations": [{"from": "cat", "value": "miau"}]}, "turn 1 is from 'cat'"),
    ({"conversations": [{"from": "human", "value": "<image>?"}, SAY]}, "mentions <image>, but no image is given."),
    ({"image": "red.png", "conversations": [{"from": "human", "value": "<image><image>?"}, SAY]}, "mentions 2 <image>"),
    ({"image": "red.png", "audio": "a.wav", "conversations": [ASK, SAY]}, "has both an image and an audio"),
    ({"image": 3, "conversations": [ASK, SAY]}, "image must be a path or a list of paths, got 3."),
    ({"image": "red.png", "conversations": [ASK, {"from": "gpt", "value": "red \ud83d"}]}, "has half a character"),
    ({"pictures": ["red.png"], "conversations": [ASK, SAY]}, "has pictures; media are named under image or audio"),
    (
        {"image": "red.png", "conversations": [ASK, {"from": "gpt", "value": "<image>"}]},
        "mentions <image> in an answer",
    ),
    ("{not json", "is not JSON"),
    ("[" * 100_000, "is not JSON (maximum recursion depth exceeded"),
    ("[1, 2]", "must be an object with conversations, got list."),
    ('"hello"', "must be an object with conversations, got str."),
]


def test_everything_that_is_wrong_is_found_at_once(folder):
    (folder / "empty.png").touch()
    (folder / "text.png").write_text("hello")
    noise = Image.fromarray(np.random.default_rng(0).integers(0, 255, (64, 64, 3), dtype=np.uint8))
    noise.save(folder / "whole.png")
    (folder / "half.png").write_bytes((folder / "whole.png").read_bytes()[:4000])
    Image.new("1", (20000, 10000)).save(folder / "vast.png")
    file = written(folder, *(record for record, _ in BAD), {"image": "red.png", "conversations": [ASK, SAY]})
    examples, problems = read_examples(file, None)
    assert len(problems) == len(BAD)
    for line, (_, sentence) in enumerate(BAD, 1):
        (mine,) = [problem for problem in problems if problem.startswith(f"{file}:{line}: ")]
        assert sentence in mine and mine.endswith(".")
    assert examples[-1].where == f"{file}:{len(BAD) + 1}", "the rest of the file is read, too"


@pytest.mark.parametrize(
    ("name", "text", "sentence"),
    [
        ("talk.csv", "picture,text\n", "talk.csv:1: lacks the column question and answer; it has picture, text."),
        (
            "talk.csv",
            "image,question,answer,picture\n",
            "has the column 'picture', which is unknown; there are id",
        ),
        ("talk.csv", "question,answer,answer\n", "talk.csv:1: has the column 'answer' twice."),
        ("talk.csv", 'question,answer\n"What,\nsir?","\t|\t"\n', "talk.csv:2: has an empty answer."),
        ("talk.csv", "question,answer\nWhat?\n", "talk.csv:2: has fewer cells than the 2 columns."),
        ("talk.csv", "question,answer\nWhat, sir?,red\n", "talk.csv:2: has more cells than the 2 columns. Put text"),
        ("talk.json", '{"a": 1}', "talk.json:1: must be a list of conversations"),
        ("talk.json", '[\n{"a": }]', "talk.json:2: is not JSON from here on"),
        ("talk.json", '[{"conversations": 1}\n{}]', "talk.json:2: is not JSON from here on (a comma or ] is missing)"),
        ("talk.jsonl", "", "talk.jsonl: holds no conversations."),
        ("talk.jsonl", b"\xff\xfe\x00", "talk.jsonl: is not UTF-8 text"),
        ("talk.txt", "", "talk.txt is not .json, .jsonl, .csv, .parquet, .arrow or .tar."),
    ],
)
def test_files_that_are_none(folder, name, text, sentence):
    (folder / name).write_bytes(text if isinstance(text, bytes) else text.encode())
    assert sentence in "\n".join(read_examples(folder / name, None)[1])


def test_sounds_are_resampled_and_bad_ones_listed(folder):
    import soundfile

    time = np.arange(8000) / 8000
    soundfile.write(folder / "tone.flac", np.stack([np.sin(2 * np.pi * 440 * time)] * 2, axis=1), 8000)
    soundfile.write(folder / "none.wav", np.zeros(0), 8000)
    soundfile.write(folder / "click.wav", np.zeros(1), 48000)
    (folder / "text.wav").write_text("hello")
    soundfile.write(folder / "nan.wav", np.where(time == 0.5, np.nan, time), 8000, subtype="FLOAT")
    samples = open_sound(folder / "tone.flac", 16000)
    assert samples.shape == (16000,) and samples.dtype == np.float32
    peak = np.abs(np.fft.rfft(samples)).argmax()
    assert peak == 440, "one second, resampled without changing the pitch"
    named = ("tone.flac", "none.wav", "text.wav", "click.wav", "nan.wav")
    rows = "audio,question,answer\n" + "".join(f"{name},What?,x\n" for name in named)
    (folder / "talk.csv").write_text(rows)
    _, problems = read_examples(folder / "talk.csv", None)
    assert len(problems) == 4 and "none.wav has zero length." in problems[0]
    assert "text.wav cannot be read as sound" in problems[1]
    assert "click.wav is too short (0.021 ms) to be heard." in problems[2]
    assert "nan.wav holds samples that are not finite." in problems[3]


def test_a_sound_that_is_shorter_than_it_says(folder):
    import soundfile

    soundfile.write(folder / "whole.wav", np.full(8000, 0.5), 8000)
    whole = (folder / "whole.wav").read_bytes()
    (folder / "half.wav").write_bytes(whole[:9000])
    (folder / "stream.wav").write_bytes(whole[:4] + b"\xff" * 4 + whole[8:])
    assert media_problem(folder / "half.wav", "audio").endswith("half.wav is cut off.")
    assert not media_problem(folder / "whole.wav", "audio") and not media_problem(folder / "stream.wav", "audio")


def test_problems_of_one_kind_hide_no_others(folder, checkpoints, capfd):
    """A turn's, the media's and the model's, in the order of the lines; nothing is said twice."""
    told = {"from": "human", "value": "</s> really?"}
    file = written(
        folder,
        {"image": "gone.png", "conversations": [ASK]},
        {"image": "gone.png", "conversations": [told, SAY]},
        {"image": "red.png", "conversations": [told, SAY]},
        {"conversations": [{"from": "human", "value": " "}, SAY]},
        {"audio": "gone.wav", "conversations": [ASK, SAY]},
    )
    words = ["train", "instruction_tuning/demo", f"model={checkpoints('llava')}", f"data={file}"]
    capfd.readouterr()  # the checkpoint was just made
    odd = ["optimizer.rates={b: 1e-3}", "encoder.method=lora", "encoder.targets=[nowhere]"]
    assert main([*words, *odd, "frozen=[nothing.here]", "components={a: [no], language: [model]}"]) == 2
    lines = capfd.readouterr().err.splitlines()
    wanted = [
        "frozen: nothing.here: matches no parameter",
        "optimizer.rates: b: no such component. There are a, language.",
        "encoder.targets: nowhere: no layer of the connector has a name",
        "components.a: no trained parameter is in it; its patterns are no.",
        f"{file}: has pictures (first in line 1) and sounds (first in line 5)",
        f"{file}:1: has no answer.",
        f"{file}:1: image {folder / 'gone.png'} does not exist. (Also named in line 2.)",
        f"{file}:2: has </s> in its text",
        f"{file}:3: has </s> in its text",
        f"{file}:4: has an empty question.",
        f"{file}:5: has an audio, but llava takes image.",
        f"{file}:5: audio {folder / 'gone.wav'} does not exist.",
    ]
    assert len(lines) == len(wanted) and all(a in b for a, b in zip(wanted, lines, strict=True)), lines


def test_one_conversation_may_have_many_problems(folder):
    both = {"from": "human", "value": "<image><image>?"}
    file = written(
        folder,
        {"image": ["gone.png", 3], "images": "x", "audio": "a.wav", "conversations": [SAY, both]},
        {"image": "red.png", "conversations": [both]},
    )
    _, problems = read_examples(file, None, judge=lambda example: [f"{len(example.media)} media."])
    assert [problem.split(": ", 1)[1].split(",")[0].split(";")[0] for problem in problems] == [
        "has images",
        "has both an image and an audio",
        "image must be a path or a list of paths",
        "begins with the assistant",
        "1 media.",
        f"image {folder / 'gone.png'} does not exist.",
        "has no answer.",
        "mentions 2 <image>",
        "1 media.",
    ]


def test_one_conversation_is_a_doubt(folder):
    file = written(folder, {"image": "red.png", "conversations": [ASK, SAY]})
    made = config.load("instruction_tuning/demo", [f"data={file}"])
    (line,) = InstructionTuning.doubts(made)
    assert line.startswith(f"{file}: holds one conversation")


def test_sixteen_bits_are_not_all_white(folder):
    for name, kind in (("deep.png", np.uint16), ("deep.tiff", np.int32)):
        Image.fromarray(np.array([[0, 30000, 65535]] * 3, kind)).save(folder / name)
        assert np.asarray(open_picture(folder / name))[0, :, 0].tolist() == [0, 117, 255]


def test_a_missing_file_is_named_by_its_key(folder):
    file = written(folder, {"image": "red.png", "conversations": [ASK, SAY]})
    _, _, problems = read_all(InstructionTuningData(file=str(file), validation="gone.csv"))
    assert problems == ["data.validation: gone.csv does not exist."]


def test_what_is_held_out(folder):
    file = written(folder, *({"image": "red.png", "conversations": [ASK, SAY]} for _ in range(25)))
    kept, held, _ = read_all(InstructionTuningData(file=str(file)))
    assert [len(kept), len(held)] == [23, 2] and not {e.where for e in kept} & {e.where for e in held}
    few = written(folder, *({"image": "red.png", "conversations": [ASK, SAY]} for _ in range(3)), name="few.jsonl")
    assert [len(some) for some in read_all(InstructionTuningData(file=str(few)))] == [2, 1, 0]
    kept, held, _ = read_all(InstructionTuningData(file=str(file), validation=str(file)))
    assert len(kept) == len(held) == 25


def test_the_command_lists_all_and_leaves_nothing(folder, checkpoints, capfd):
    file = written(
        folder, {"image": "no.png", "conversations": [ASK, SAY]}, {"image": "red.png", "conversations": [ASK]}
    )
    words = ["train", "instruction_tuning/demo", f"data={file}", "model=nowhere", f"runs={folder / 'runs'}"]
    assert main(words) == 2
    error = capfd.readouterr().err.splitlines()
    assert len(error) == 3 and "nowhere does not exist" in error[0], error
    assert (
        f"{file}:1: image {folder / 'no.png'} does not exist." in error[1] and f"{file}:2: has no answer." in error[2]
    )
    assert not (folder / "runs").exists()


def test_what_the_processor_refuses_is_found_before(folder, checkpoints, capfd):
    """All of it, with file and line."""
    Image.new("RGB", (2, 900)).save(folder / "thin.png")
    good = {"image": "red.png", "conversations": [ASK, SAY]}
    file = written(folder, {"image": "thin.png", "conversations": [ASK, SAY]}, good, good)
    words = ["train", "instruction_tuning/demo", f"data={file}", f"model={checkpoints('qwen2_vl')}"]
    assert main([*words, f"runs={folder / 'runs'}"]) == 2
    error = capfd.readouterr().err
    assert f"{file}:1: the processor of qwen2_vl does not take this (absolute aspect ratio" in error
    assert f"{file}:2" not in error and not (folder / "runs").exists()


def test_answers_that_are_cut_away(folder, checkpoints, capfd):
    long = {"from": "human", "value": "Why? " * 100}
    file = written(folder, *({"image": "red.png", "conversations": [long, SAY]} for _ in range(2)))
    words = ["train", "instruction_tuning/demo", f"model={checkpoints('llava')}", f"data={file}"]
    assert main([*words, "data.max_tokens=200", f"runs={folder / 'runs'}"]) == 2
    error = capfd.readouterr().err
    assert error.count("data.max_tokens=200 cuts its answers away entirely.") == 2 and f"{file}:1: has 5" in error


def test_media_that_stay_as_they_are_are_decoded_once(folder):
    """From run to run; what changes is looked at again, and what was bad always."""
    unpacked = folder / "runs" / ".cache" / "media"
    unpacked.parents[1].mkdir()
    (folder / "bad.png").write_bytes(b"no picture")
    records = [{"image": name, "conversations": [ASK, SAY]} for name in ("red.png", "bad.png")]
    data = InstructionTuningData(file=str(written(folder, *records)))

    def wrong() -> list[str]:
        _known.clear()  # as in another process
        return read_all(data, unpacked=unpacked)[2]

    (problem,) = wrong()
    assert "bad.png cannot be read" in problem and wrong() == [problem]
    (kept,) = (unpacked.with_name("good-media")).read_text().splitlines()
    path = folder / "red.png"
    about, whole = path.stat(), path.read_bytes()
    path.write_bytes(b"x" * len(whole))
    os.utime(path, ns=(about.st_atime_ns, about.st_mtime_ns))
    assert wrong() == [problem], "it is not opened"
    os.utime(path)
    assert len(wrong()) == 2 and "red.png cannot be read" in wrong()[0]
    path.write_bytes(whole)
    assert wrong() == [problem] and len(set(unpacked.with_name("good-media").read_text().splitlines()) - {kept}) == 1


def test_a_file_that_is_written_anew_while_it_is_looked_at_is_looked_at_again(folder, monkeypatch):
    path = folder / "red.png"
    record = {"image": path.name, "conversations": [ASK, SAY]}
    settings = InstructionTuningData(file=str(written(folder, record)))
    whole = path.read_bytes()

    def overwritten(*words) -> str:
        found = media_problem(*words)
        path.write_bytes(b"no picture")
        return found

    with monkeypatch.context() as patched:
        patched.setattr(reading, "media_problem", overwritten)
        assert read_all(settings, unpacked=folder / "media")[2] == []
    (problem,) = read_all(settings, unpacked=folder / "media")[2]
    assert "red.png cannot be read" in problem
    path.unlink()
    assert line_of(path, "image") is None and "does not exist" in read_all(settings, unpacked=folder / "media")[2][0]
    path.write_bytes(whole)
    assert read_all(settings, unpacked=folder / "media")[2] == []
