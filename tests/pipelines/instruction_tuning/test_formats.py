"""Every format that other tools write gives the same conversations, and what cannot be read is explained."""

import base64
import io
import json
import tarfile
from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from PIL import Image

from equipoise.pipelines.instruction_tuning.config import InstructionTuningData
from equipoise.pipelines.instruction_tuning.data import Conversation, Turn, read_all, read_examples
from equipoise.pipelines.instruction_tuning.media import open_picture, open_sound

COLOURS = ("red", "green")
ASKED, CLOSING = "Is it red?", ("Sure?", "Quite sure.")


@pytest.fixture
def folder(tmp_path) -> Path:
    for colour in COLOURS:
        Image.new("RGB", (8, 8), colour).save(tmp_path / f"{colour}.png")
    return tmp_path


def answer(colour: str) -> str:
    return "Yes." if colour == "red" else "No."


def png(folder: Path, colour: str) -> bytes:
    return (folder / f"{colour}.png").read_bytes()


def data_url(folder: Path, colour: str) -> str:
    return f"data:image/png;base64,{base64.b64encode(png(folder, colour)).decode()}"


def said(question: Any, colour: str, who: str = "role", what: str = "content", names=("user", "assistant")) -> list:
    """A conversation of two turns."""
    texts = (question, answer(colour), *CLOSING)
    return [{who: names[index % 2], what: text} for index, text in enumerate(texts)]


def saved_jsonl(folder: Path, records: list[dict]) -> Path:
    (folder / "talk.jsonl").write_text("".join(json.dumps(record) + "\n" for record in records))
    return folder / "talk.jsonl"


def llava(folder: Path) -> Path:
    turns = {c: said(f"<image>\n{ASKED}", c, "from", "value", ("human", "gpt")) for c in COLOURS}
    return saved_jsonl(folder, [{"id": 1, "image": f"{c}.png", "conversations": turns[c]} for c in COLOURS])


def openai(folder: Path) -> Path:
    """As in OpenAI's guide to vision fine-tuning."""

    def content(colour: str) -> list[dict]:
        url = {"url": data_url(folder, colour), "detail": "low"}
        return [{"type": "image_url", "image_url": url}, {"type": "text", "text": ASKED}]

    return saved_jsonl(folder, [{"messages": said(content(colour), colour)} for colour in COLOURS])


def responses(folder: Path) -> Path:
    """OpenAI's Responses, and developers for a system."""

    def content(colour: str) -> list[dict]:
        picture = {"type": "input_image", "image_url": data_url(folder, colour)}
        return [picture, {"type": "input_text", "text": ASKED}]

    return saved_jsonl(folder, [{"messages": said(content(colour), colour)} for colour in COLOURS])


def anthropic(folder: Path) -> Path:
    def content(colour: str) -> list[dict]:
        data = base64.b64encode(png(folder, colour)).decode()
        source = {"type": "base64", "media_type": "image/png", "data": data}
        return [{"type": "image", "source": source}, {"type": "text", "text": ASKED}]

    return saved_jsonl(folder, [{"messages": said(content(colour), colour)} for colour in COLOURS])


def qwen(folder: Path) -> Path:
    """As Qwen-VL's messages, which name files in their parts."""

    def content(colour: str) -> list[dict]:
        url = (folder / f"{colour}.png").as_uri()
        return [{"type": "image", "image": url}, {"type": "text", "text": ASKED}]

    return saved_jsonl(folder, [{"messages": said(content(colour), colour)} for colour in COLOURS])


def llama_factory(folder: Path) -> Path:
    """As LLaMA-Factory's data/mllm_demo.json."""
    records = [{"messages": said(f"<image>{ASKED}", c), "images": [f"{c}.png"]} for c in COLOURS]
    (folder / "mllm_demo.json").write_text(json.dumps(records, indent=2))
    return folder / "mllm_demo.json"


def sharegpt(folder: Path) -> Path:
    names = ("human", "gpt")
    turns = {c: said(f"<image>{ASKED}", c, "from", "value", names) for c in COLOURS}
    return saved_jsonl(
        folder, [{"conversations": turns[c], "images": [f"{c}.png"], "system": "", "tools": ""} for c in COLOURS]
    )


def alpaca(folder: Path) -> Path:
    """As LLaMA-Factory's alpaca format: the last turn's question is instruction and input."""
    return saved_jsonl(
        folder,
        [
            {
                "instruction": CLOSING[0],
                "input": "",
                "output": CLOSING[1],
                "history": [[f"<image>{ASKED}", answer(colour)]],
                "images": [f"{colour}.png"],
            }
            for colour in COLOURS
        ],
    )


def swift(folder: Path) -> Path:
    """As ms-swift's query and response, with its history."""
    return saved_jsonl(
        folder,
        [
            {
                "query": CLOSING[0],
                "response": CLOSING[1],
                "history": [[f"<image>{ASKED}", answer(colour)]],
                "images": [{"bytes": None, "path": f"{colour}.png"}],
            }
            for colour in COLOURS
        ],
    )


def trl_messages(folder: Path) -> Path:
    """As TRL's conversational vision data sets: `datasets` writes it, pictures inside."""
    from datasets import Dataset, Image, List

    def content(colour: str) -> list[dict]:
        return [{"type": "image", "text": None}, {"type": "text", "text": ASKED}]

    def text(words: str) -> list[dict]:
        return [{"type": "text", "text": words}]

    def turns(colour: str) -> list[dict]:
        return [
            {**turn, "content": content(colour) if index == 0 else text(turn["content"])}
            for index, turn in enumerate(said(ASKED, colour))
        ]

    made = Dataset.from_dict(
        {
            "images": [[str(folder / f"{colour}.png")] for colour in COLOURS],
            "messages": [turns(colour) for colour in COLOURS],
        }
    ).cast_column("images", List(Image()))
    made.to_parquet(folder / "train.parquet")  # with the pictures' bytes
    return folder / "train.parquet"


def trl_prompts(folder: Path) -> Path:
    """As TRL's prompt and completion, saved by `datasets` in its own way, which is Arrow."""
    from datasets import Dataset, Image, List

    turns = [said(ASKED, colour) for colour in COLOURS]
    made = Dataset.from_dict(
        {
            "images": [[str(folder / f"{colour}.png")] for colour in COLOURS],
            "prompt": [some[:3] for some in turns],
            "completion": [some[3:] for some in turns],
        }
    ).cast_column("images", List(Image()))
    made.save_to_disk(folder / "saved", num_shards=2)
    return folder / "saved"


def parquet_folder(folder: Path) -> Path:
    """Shards that pyarrow writes, as at the hub: LLaVA's turns, and a picture's bytes."""
    import pyarrow
    from pyarrow import parquet

    (folder / "data").mkdir()
    for index, colour in enumerate(COLOURS):
        record = {
            "image": {"bytes": png(folder, colour), "path": "somewhere/else.png"},
            "conversations": said(f"<image>\n{ASKED}", colour, "from", "value", ("human", "gpt")),
        }
        parquet.write_table(
            pyarrow.Table.from_pylist([record]), folder / "data" / f"train-0000{index}-of-00002.parquet"
        )
    return folder / "data"


def feather(folder: Path) -> Path:
    import pyarrow
    from pyarrow import ipc

    table = pyarrow.Table.from_pylist(
        [{"image": png(folder, colour), "messages": said(ASKED, colour)} for colour in COLOURS]
    )
    with ipc.new_file(folder / "talk.arrow", table.schema) as file:
        file.write_table(table)
    return folder / "talk.arrow"


def cauldron(folder: Path) -> Path:
    import pyarrow
    from pyarrow import parquet

    records = [
        {
            "images": [{"bytes": png(folder, colour), "path": None}],
            "texts": [
                {"user": ASKED, "assistant": answer(colour), "source": "VQA"},
                {"user": CLOSING[0], "assistant": CLOSING[1], "source": "VQA"},
            ],
        }
        for colour in COLOURS
    ]
    parquet.write_table(pyarrow.Table.from_pylist(records), folder / "cauldron.parquet")
    return folder / "cauldron.parquet"


def webdataset(folder: Path, name: str = "shard-000000.tar") -> Path:
    """As WebDataset's writer: a sample's files follow each other."""
    with tarfile.open(folder / name, "w:gz" if name.endswith("gz") else "w") as made:
        for index, colour in enumerate(COLOURS):
            record = {"image": "away.png", "messages": said(f"<image>{ASKED}", colour)}
            put(made, f"./{index:06d}.json", json.dumps(record).encode())
            put(made, f"./{index:06d}.png", png(folder, colour))
    return folder / name


def webdataset_packed(folder: Path) -> Path:
    return webdataset(folder, "shard-000000.tar.gz")


def put(made: tarfile.TarFile, name: str, content: bytes) -> None:
    member = tarfile.TarInfo(name)
    member.size = len(content)
    made.addfile(member, io.BytesIO(content))


FORMATS = [
    llava,
    openai,
    responses,
    anthropic,
    qwen,
    llama_factory,
    sharegpt,
    alpaca,
    swift,
    trl_messages,
    trl_prompts,
    parquet_folder,
    feather,
    cauldron,
    webdataset,
    webdataset_packed,
]


@pytest.mark.parametrize("written", FORMATS)
def test_all_formats_give_the_same_conversations(folder, written):
    examples, problems = read_examples(written(folder), str(folder), unpacked=folder / "unpacked")
    assert problems == []
    for example, colour in zip(examples, COLOURS, strict=True):
        (path,) = example.media
        assert open_picture(path).getpixel((0, 0)) == open_picture(folder / f"{colour}.png").getpixel((0, 0))
        marked = example.turns[0].question.replace("<image>Is", "<image>\nIs")  # marks in a text stay as they stand
        turns = (Turn(marked, example.turns[0].answer), *example.turns[1:])
        wanted = (Turn(f"<image>\n{ASKED}", answer(colour)), Turn(*CLOSING))
        assert replace(example, turns=turns, media=(), where="") == Conversation("image", (), wanted)


def spoken(path: Path) -> bytes:
    import soundfile

    soundfile.write(path, 0.5 * np.sin(np.arange(8000) / 5), 8000)
    return path.read_bytes()


@pytest.mark.parametrize("written", ["openai", "swift", "tar"])
def test_sounds_are_read_as_well(folder, written):
    wav = spoken(folder / "tone.wav")
    encoded = base64.b64encode(wav).decode()
    part = {"type": "input_audio", "input_audio": {"data": encoded, "format": "wav"}}
    record: dict[str, Any] = {"messages": said([part, {"type": "text", "text": ASKED}], "red")}
    if written == "swift":
        record = {"messages": said(f"<audio>\n{ASKED}", "red"), "audios": ["tone.wav"]}
    file = saved_jsonl(folder, [record])
    if written == "tar":
        file = folder / "sounds.tar"
        with tarfile.open(file, "w") as made:
            put(made, "a/1.wav", wav)
            put(made, "a/1.json", json.dumps({"messages": said(ASKED, "red")}).encode())
    ((example,), problems) = read_examples(file, None)
    assert problems == [] and example.kind == "audio"
    assert example.turns[0] == Turn(f"<audio>\n{ASKED}", "Yes.")
    assert np.array_equal(open_sound(example.media[0], 8000), open_sound(folder / "tone.wav", 8000))


def test_captions_need_a_question(folder):
    """A tar of pictures and texts, and a table of both."""
    with tarfile.open(folder / "captions.tar", "w") as made:
        for colour in COLOURS:
            put(made, f"{colour}.jpg", png(folder, colour))
            put(made, f"{colour}.txt", f"All {colour}.\n".encode())
    records = [{"image": f"{colour}.png", "text": f"All {colour}."} for colour in COLOURS]
    for file in (folder / "captions.tar", saved_jsonl(folder, records)):
        examples, problems = read_examples(file, None)
        assert not examples and len(problems) == 2 and "has a caption and no question. Give" in problems[0]
        examples, problems = read_examples(file, None, asked="What is it?")
        assert problems == [] and [example.turns for example in examples] == [
            (Turn("<image>\nWhat is it?", f"All {colour}."),) for colour in COLOURS
        ]


def test_the_commonest_of_several_answers(folder):
    people = {"question": "How many?", "answers": [{"answer": "two"}, {"answer": "2"}, {"answer": "2"}]}
    ((example,), problems) = read_examples(saved_jsonl(folder, [people]), None)
    assert problems == [] and example.turns == (Turn("How many?", "2", ("two", "2")),)


def test_media_stand_where_their_marks_do(folder):
    """Those of a key and those of parts, in one conversation."""
    parts = [
        {"type": "text", "text": "Compare"},
        {"type": "image"},
        {"type": "text", "text": "with"},
        {"type": "image_url", "image_url": data_url(folder, "green")},
    ]
    last = {"role": "user", "content": "And <image>?"}
    messages = [{"role": "user", "content": parts}, {"role": "assistant", "content": "Same."}, last, last]
    messages[3] = {"role": "assistant", "content": [{"type": "text", "text": "Yes"}, {"type": "text", "text": "!"}]}
    file = saved_jsonl(folder, [{"images": ["red.png", "red.png"], "messages": messages}])
    ((example,), problems) = read_examples(file, None)
    assert problems == []
    assert example.turns == (Turn("Compare\n<image>\nwith\n<image>", "Same."), Turn("And <image>?", "Yes!"))
    assert [open_picture(path).getpixel((0, 0)) for path in example.media] == [(255, 0, 0), (0, 128, 0), (255, 0, 0)]


TOLD = [{"role": "user", "content": ASKED}, {"role": "assistant", "content": "Yes."}]
REFUSED = [
    (
        {"messages": TOLD, "clips": ["a.mp4"]},
        "has clips; media are named under image or audio (or video), a path",
    ),
    (
        {"messages": [{"role": "user", "content": [{"type": "file", "file": "a.mp4"}]}, TOLD[1]]},
        "turn 1 has a part of the type 'file'; there are text, image, audio and video.",
    ),
    ({"prompt": "a", "chosen": "b", "rejected": "c"}, "has chosen: preferences are not trained on here."),
    ({"messages": TOLD, "tools": [{"type": "function"}]}, "has tools, which no prompt here has."),
    (
        {"messages": [TOLD[0], {"role": "assistant", "content": None, "tool_calls": [{"id": "1"}]}]},
        "turn 2 has tool_calls, which no prompt here has.",
    ),
    ({"messages": [TOLD[0], {**TOLD[1], "weight": 0}]}, "turn 2 has the weight 0, but every answer is trained on."),
    ({"messages": [*TOLD, {"role": "tool", "content": "3"}]}, "turn 3 is from 'tool', which is neither"),
    ({"image": "data:image/png;base64,%%%", "messages": TOLD}, "has a medium that is no base64 ('%%%'…)."),
    ({"image": "red.png", "images": ["red.png"], "messages": TOLD}, "has images; so are media under image."),
    ({"image": {"bytes": "text"}, "messages": TOLD}, "has a medium whose bytes are str."),
    ({"messages": "hello"}, "has no conversations"),
    ({"text": "No chat at all."}, "has no conversations"),
]


def test_what_would_be_trained_on_otherwise_than_meant_is_refused(folder):
    file = saved_jsonl(folder, [record for record, _ in REFUSED])
    examples, problems = read_examples(file, None)
    assert examples == [] and len(problems) == len(REFUSED), problems
    for number, ((_, sentence), problem) in enumerate(zip(REFUSED, problems, strict=True), 1):
        assert problem.startswith(f"{file}:{number}: {sentence}"), problem


def test_media_at_urls_are_refused_once(folder, monkeypatch):
    import socket

    monkeypatch.setattr(socket.socket, "connect", lambda *_: pytest.fail("asked the network"))
    urls = [{"messages": TOLD, "images": [f"https://example.org/{number}.png"] * 2} for number in range(3)]
    file = saved_jsonl(folder, [{"messages": TOLD}, *urls])
    examples, problems = read_examples(file, None)
    assert len(examples) == 1
    assert problems == [
        f"{file}:2: names media by URL, and nothing is downloaded (https://example.org/0.png). Download it, and name "
        "the file. 2 more do so."
    ]


def test_pictures_of_a_tar_are_in_the_order_of_their_numbers(folder):
    """They are sorted by name otherwise, so that 10 comes before 2."""
    with tarfile.open(folder / "many.tar", "w") as made:
        for number in (11, 2, 0, 10, 1):
            png = io.BytesIO()
            Image.new("RGB", (number + 1, 1)).save(png, "PNG")
            put(made, f"s.{number}.png", png.getvalue())
        put(made, "s.txt", b"a caption")
    ((example,), problems) = read_examples(folder / "many.tar", None, asked="What?", unpacked=folder / "unpacked")
    assert problems == [] and [open_picture(path).width - 1 for path in example.media] == [0, 1, 2, 10, 11]


def test_members_of_tars_lead_nowhere(folder):
    """Whatever their names: what is in them is kept under the digest of it."""
    with tarfile.open(folder / "evil.tar", "w") as made:
        put(made, "../../outside.json", json.dumps({"messages": TOLD}).encode())
        put(made, "../../outside.png", png(folder, "red"))
        link = tarfile.TarInfo("../link.png")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd"
        made.addfile(link)
    before = {path for path in folder.parent.rglob("*")}
    ((example,), problems) = read_examples(folder / "evil.tar", None, unpacked=folder / "unpacked")
    assert problems == [] and example.media[0].is_relative_to(folder / "unpacked")
    new = {path for path in folder.parent.rglob("*")} - before
    kept = folder / "good-media"  # what could be decoded, beside what was unpacked
    assert {path for path in new if path.is_file()} == {example.media[0], kept}, "and nothing else was written"


def test_a_medium_is_unpacked_once(folder):
    file = saved_jsonl(folder, [{"image": data_url(folder, "red"), "messages": TOLD}] * 3)
    read_examples(file, None, unpacked=folder / "unpacked")
    (path,) = [path for path in (folder / "unpacked").rglob("*") if path.is_file()]
    written = path.stat().st_mtime_ns
    path.write_bytes(b"half")  # as after a crash
    read_examples(file, None, unpacked=folder / "unpacked")
    assert path.read_bytes() == png(folder, "red") and path.stat().st_mtime_ns > written


@pytest.mark.parametrize(
    ("name", "content", "sentence"),
    [
        ("a.parquet", b"PAR1 and so on", "a.parquet:row 1: cannot be read from here on (Parquet"),
        ("a.arrow", b"ARROW1 and so on", "a.arrow:row 1: cannot be read from here on ("),
        ("a.arrow", b"", "a.arrow:row 1: cannot be read from here on ("),
        ("a.tar", b"no tar at all", "a.tar:sample 1: cannot be read as a tar from here on ("),
        ("a.tar.gz", b"\x1f\x8b and so on", "a.tar.gz:sample 1: cannot be read as a tar from here on ("),
    ],
)
def test_damaged_files_are_explained(folder, name, content, sentence):
    (folder / name).write_bytes(content)
    examples, (problem,) = read_examples(folder / name, None)
    assert examples == [] and sentence in problem and problem.endswith(").")


def test_a_damaged_shard_among_others_may_be_left_out(folder):
    shards = parquet_folder(folder)
    broken = shards / "train-00002-of-00002.parquet"
    broken.write_bytes(b"PAR1")
    examples, problems = read_examples(shards, None)
    assert len(examples) == 2 and len(problems) == 1 and problems[0].startswith(f"{broken}:row 1: cannot be read")
    left_out: list[str] = []
    examples, problems = read_examples(shards, None, left_out=left_out)
    assert len(examples) == 2 and problems == [] and left_out[0].startswith(f"{broken}:row 1: cannot be read")


def test_splits_are_not_mixed(folder):
    from datasets import Dataset, DatasetDict

    shards = parquet_folder(folder)
    (shards / "train-00000-of-00002.parquet").rename(shards / "test-00000-of-00001.parquet")
    assert read_examples(shards, None)[1] == [
        f"data.file: {shards} holds several splits (test, train). Give {shards}/train*.parquet, for one."
    ]
    assert [len(some) for some in read_examples(f"{shards}/train*.parquet", None)] == [1, 0]
    for pattern in ("dev*", "**", "***x"):
        assert read_examples(f"{shards}/{pattern}", None)[1][0].startswith(f"data.file: {shards}/{pattern} ")
    assert read_examples(f"{shards}/dev*", None)[1] == [f"data.file: {shards}/dev* matches no file."]
    made = Dataset.from_list([{"messages": TOLD}])
    DatasetDict({"train": made, "test": made}).save_to_disk(folder / "splits")
    assert read_examples(folder / "splits", None)[1] == [
        f"data.file: {folder / 'splits'} holds the splits of a data set. Give {folder / 'splits' / 'test'} or "
        f"{folder / 'splits' / 'train'}."
    ]
    assert [len(some) for some in read_examples(folder / "splits" / "test", None)] == [1, 0]
    (folder / "splits" / "test" / "state.json").write_text('{"_data_files": [{"filename": "../../up.arrow"}]}')
    assert "names files that are elsewhere." in read_examples(folder / "splits" / "test", None)[1][0]


def test_the_hub_is_asked_by_name_alone(folder, monkeypatch):
    import datasets

    asked = []

    def load(*args: Any, **options: Any) -> Any:
        asked.append((args, options))
        return datasets.Dataset.from_list([{"messages": TOLD, "id": 1}, {"messages": TOLD, "id": 2}])

    monkeypatch.setattr(datasets, "load_dataset", load)
    examples, problems = read_examples("hub:owner/name/part:train[:9]@v1", None)
    assert problems == [] and [example.where for example in examples] == [
        "hub:owner/name/part:train[:9]@v1:row 1",
        "hub:owner/name/part:train[:9]@v1:row 2",
    ]
    assert asked == [(("owner/name", "part"), {"split": "train[:9]", "revision": "v1"})]
    assert read_examples("owner/name", None)[1] == ["data.file: owner/name does not exist."]
    assert "must be hub:OWNER/NAME" in read_examples("hub:name", None)[1][0] and len(asked) == 1


def test_a_missing_package_is_a_sentence(folder, monkeypatch):
    from equipoise.pipelines.instruction_tuning.formats import tables

    monkeypatch.setattr(tables, "find_spec", lambda name: None)
    file = feather(folder)
    assert read_examples(file, None)[1] == [
        f"{file}: needs the package pyarrow, which is not installed. pip install 'equipoise[data]'."
    ]


def test_a_hundred_thousand_records_take_seconds(folder):
    import time

    file = saved_jsonl(folder, [{"messages": said(f"{ASKED} {number}", "red")} for number in range(100_000)])
    started = time.process_time()
    examples, problems = read_examples(file, None)
    assert len(examples) == 100_000 and problems == []
    assert time.process_time() - started < 20, "a few on a quiet core"


def test_a_list_may_be_larger_than_what_is_read_of_it_at_once(folder, monkeypatch):
    """Whatever stands at the borders of the window: numbers, marks of escapes, lines."""
    from equipoise.pipelines.instruction_tuning.formats import texts

    items = [{"n": number, "x": [1.5e3, None, True], "text": 'a "\\u00e4\n' * number} for number in range(12)]
    file = folder / "talk.json"
    file.write_text(json.dumps(items, indent=1) + "\n \n")
    lines = [row.at for row in texts.json_list(file)]
    for size in range(1, 40):
        monkeypatch.setattr(texts, "_READ", size)
        rows = list(texts.json_list(file))
        assert [row.record for row in rows] == items and [row.at for row in rows] == lines
    broken = file.read_text().replace('"n": 7', '"n" 7')
    file.write_text(broken)
    (*rows, last) = texts.json_list(file)
    assert len(rows) == 7 and str(last.record) == "is not JSON from here on (Expecting ':' delimiter)."
    for text, sentence in (("[1, 2", "a comma or ]"), ("[1, ", "Expecting value"), ('["a', "Unterminated string")):
        file.write_text(text)
        assert sentence in str([*texts.json_list(file)][-1].record)


def test_many_problems_are_summarized(folder):
    from equipoise.pipelines.instruction_tuning.examples import summarized

    records = [{"messages": TOLD[:1]}, {"messages": TOLD, "image": 3}] * 10_000
    _, problems = read_examples(saved_jsonl(folder, records), None)
    assert len(problems) == 20_000
    lines = summarized(problems)
    assert lines[:20] == problems[:20] and lines[20:] == [
        f"and 9,990 more like this one: {problems[20]}",
        f"and 9,990 more like this one: {problems[21]}",
    ]
    assert summarized(problems[:40]) == problems[:40]


def test_the_first_held_out_conversations_are_of_all_data_sets(folder):
    files = []
    for name, count in (("a", 40), ("b", 10), ("c", 25)):
        records = [{"messages": said(f"{name}{number}?", "red")} for number in range(count)]
        files.append(str(saved_jsonl(folder, records).rename(folder / f"{name}.jsonl")))
    _, held, problems = read_all(InstructionTuningData(file=files[0], more=files[1:]))
    asked = [example.turns[0].question for example in held]
    assert problems == [] and asked == ["a9?", "b9?", "c9?", "a19?", "c19?", "a29?", "a39?"]
    _, held, _ = read_all(InstructionTuningData(file=files[0]))
    assert [example.turns[0].question for example in held] == ["a9?", "a19?", "a29?", "a39?"]


def test_data_sets_are_mixed(folder):
    one = saved_jsonl(folder, [{"messages": said(f"{number}?", "red")} for number in range(25)])
    two = folder / "more.jsonl"
    two.write_bytes(one.read_bytes()[: one.read_bytes().index(b'"5?"')].rpartition(b"\n")[0])  # the first five
    kept, held, problems = read_all(InstructionTuningData(file=str(one), more=[str(two)]))
    assert problems == [] and [example.source for example in kept] == [0] * 23 + [1] * 5
    assert [example.turns[0].question for example in held] == ["9?", "19?"], "every tenth of each; five are too few"
    gone = InstructionTuningData(file=str(one), more=["gone.jsonl"])
    assert read_all(gone)[2] == ["data.more: gone.jsonl does not exist."]
    spoken(folder / "tone.wav")
    (folder / "sounds.csv").write_text("audio,question,answer\ntone.wav,What?,x\n")
    (folder / "pictures.csv").write_text("image,question,answer\nred.png,What?,x\n")
    both = InstructionTuningData(file=str(folder / "sounds.csv"), more=[str(folder / "pictures.csv")])
    assert "data.more: there are data sets with pictures and others with sounds" in read_all(both)[2][0]


def test_a_second_list_in_a_json_file_is_refused_and_not_dropped(folder):
    one = json.dumps([{"image": "red.png", "question": ASKED, "answer": "Yes."}], indent=1)
    file = folder / "two.json"
    for more, problem in (("\n", None), (f"\n{one}", "goes on behind the list's end"), (" x", "goes on behind")):
        file.write_text(one + more)
        examples, problems = read_examples(file, None)
        assert len(examples) == 1 and bool(problems) == bool(problem)
        if problem:
            line = one.count("\n") + 1 + more.count("\n", 0, 1)
            assert problems == [f"{file}:{line}: goes on behind the list's end. Put all conversations into one list."]
