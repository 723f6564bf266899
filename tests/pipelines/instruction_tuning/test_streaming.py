"""Data sets that are read as they are trained on: every conversation as often, in bounded memory, exactly resumed."""

import gc
import json
from collections import Counter
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from equipoise.errors import ConfigError, InputError
from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.data import Conversation
from equipoise.pipelines.instruction_tuning.examples import load_examples
from equipoise.pipelines.instruction_tuning.model import load_processor
from equipoise.pipelines.instruction_tuning.streaming import LEAST_HELD, Source, Stream
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store

NAME = "instruction_tuning/demo"
COUNT = 30  # conversations of each of three shards


def said(number: int, **more) -> dict:
    turns = [
        {"role": "user", "content": f"<image>Number {number}?"},
        {"role": "assistant", "content": f"It is {number}."},
    ]
    return {"messages": turns, **more}


@pytest.fixture
def shards(pictures, tmp_path) -> Path:
    """Parquet with pictures inside."""
    pyarrow = pytest.importorskip("pyarrow")
    from pyarrow import parquet

    folder = tmp_path / "shards"
    folder.mkdir()
    pixels = [(pictures.parent / f"{index}.png").read_bytes() for index in range(6)]
    for shard in range(3):
        records = [
            said(number, images=[{"bytes": pixels[number % 6], "path": f"{number}.png"}])
            for number in range(shard * COUNT, (shard + 1) * COUNT)
        ]
        parquet.write_table(pyarrow.Table.from_pylist(records), folder / f"train-{shard}.parquet", row_group_size=7)
    return folder


@pytest.fixture
def held(pictures) -> Path:
    return pictures


@pytest.fixture
def words(short, shards, held):
    def get(*more: str) -> list[str]:
        return [
            *(word for word in short() if not word.startswith("data=")),
            f"data={shards}",
            f"data.validation={held}",
            "data.streaming=true",
            "data.buffer=16",
            *more,
        ]

    return get


def stream(words: list[str]) -> Stream:
    settings = config.load(NAME, words)
    talk = Talk(load_processor(settings.model), "llava")
    _, held, problems = load_examples(settings, talk)
    assert problems == []
    return Stream(settings, talk, held, settings.train.batch, lambda text: None)


def asked(batch: list[Conversation]) -> list[int]:
    return [int(example.turns[0].answer.split()[-1].strip(".")) for example in batch]


def test_every_conversation_is_read_once_an_epoch_in_another_order(words):
    found = stream(words("batch=3"))  # blocks of 15
    epochs = [[number for at in range(30) for number in asked(found.batch(30 * epoch + at))] for epoch in range(2)]
    assert all(sorted(epoch) == list(range(3 * COUNT)) for epoch in epochs)
    assert epochs[0] != epochs[1] != sorted(epochs[1])
    again = stream(words("batch=3"))
    assert [number for at in range(30) for number in asked(again.batch(at))] == epochs[0]
    assert asked(again.batch(2)) == epochs[0][6:9], "numbers may go back"


def test_a_stream_goes_on_from_its_state_without_reading_what_came_before(words, monkeypatch):
    whole = stream(words("batch=3"))
    wanted = [asked(whole.batch(at)) for at in range(60)]
    first = stream(words("batch=3"))
    for at in range(41):
        first.batch(at)
    state = json.loads(json.dumps(first.state()))
    second = stream(words("batch=3"))
    second.restore(state)
    read = []
    take = Source._counted
    monkeypatch.setattr(Source, "_counted", lambda self, rows: (read.append(row) or row for row in take(self, rows)))
    assert [asked(second.batch(at)) for at in range(41, 60)] == wanted[41:]
    assert len(read) <= 3 * 20 + 15


@pytest.mark.parametrize("more", [["train.workers=2"], ["data.skip_bad=true", "train.packing=true"]])
def test_a_stopped_run_resumes_exactly(more, words, stopped_run):
    settings = config.load(NAME, words("learning_rate=1e-2", "steps=14", *more))
    whole = Store(settings.runs).create(settings)
    assert execute(InstructionTuning, settings, whole).state == "done"
    run = stopped_run(InstructionTuning, settings, at=10)
    assert execute(InstructionTuning, settings, run).state == "done"
    left, right = (load_file(one.result / "adapter_model.safetensors") for one in (whole, run))
    assert left.keys() == right.keys() and all(torch.equal(left[name], right[name]) for name in left)
    assert not list(Path(settings.runs, ".cache").glob("streamed-*/*/*")), "media are gone with the run"


def test_few_conversations_and_their_media_are_held(words, tmp_path):
    found = stream(words("batch=4"))
    for at in range(60):
        found.batch(at)
        folders = list((tmp_path / "runs" / ".cache").glob("streamed-*"))
        assert len(folders) <= 2 and sum(len(list(folder.rglob("*.png"))) for folder in folders) <= 12
    gc.collect()
    alive = sum(
        isinstance(one, Conversation) and one.where.startswith(str(tmp_path / "shards")) for one in gc.get_objects()
    )
    assert 0 < alive <= 4 * 16 + len(found.talk._spans)


def test_the_first_are_held_out_where_no_validation_is_given(words):
    found = stream([*words("batch=2"), "data.validation="])
    seen = Counter(number for at in range(8 * 26) for number in asked(found.batch(at)))
    assert seen.keys() == set(range(LEAST_HELD, 3 * COUNT)) and set(seen.values()) == {16}


def test_what_is_wrong_later_ends_the_run_in_a_sentence_or_is_left_out(words, shards, tmp_path):
    from pyarrow import Table, parquet

    rows = parquet.read_table(shards / "train-2.parquet").to_pylist()
    rows[4]["messages"] = [{"role": "user", "content": "Nobody answers."}]
    parquet.write_table(Table.from_pylist(rows), shards / "train-2.parquet")
    with pytest.raises(InputError, match=r"train-2.parquet:row 5: .*\n.*data.skip_bad=true leaves out"):
        found = stream(words())
        for at in range(45):
            found.batch(at)
    said: list[str] = []
    found = stream(words("data.skip_bad=true", "batch=1"))
    found.tell = said.append
    assert len({number for at in range(96) for number in asked(found.batch(at))}) == 89
    assert len(said) == 1 and "train-2.parquet:row 5" in said[0]


def test_one_too_long_does_not_end_the_epoch_and_resuming_stays_exact(words, shards):
    from pyarrow import Table, parquet

    rows = parquet.read_table(shards / "train-1.parquet").to_pylist()
    for index in (4, 5, 20):
        rows[index]["messages"][0]["content"] += " long" * 400
    parquet.write_table(Table.from_pylist(rows), shards / "train-1.parquet")
    options = words("data.skip_bad=true", "batch=3")  # blocks of 15
    whole = stream(options)
    whole.limit = 300
    wanted = [asked(whole.batch(at)) for at in range(5 * 29)]  # five epochs, which are a number of blocks
    seen = Counter(number for batch in wanted for number in batch)
    assert seen == dict.fromkeys(set(range(3 * COUNT)) - {34, 35, 50}, 5)
    first, second = stream(options), stream(options)
    first.limit = second.limit = 300
    for at in range(23):
        first.batch(at)
    second.restore(json.loads(json.dumps(first.state())))
    assert [asked(second.batch(at)) for at in range(23, 5 * 29)] == wanted[23:]


def test_where_all_are_too_long_it_ends_in_a_sentence(words):
    found = stream(words("data.skip_bad=true"))
    found.limit = 1
    with pytest.raises(InputError, match="no conversation is left to train on"):
        found.batch(0)


@pytest.mark.parametrize("more", [[], ["data.skip_bad=true"]])
def test_pictures_and_later_sounds_are_refused_as_when_read_at_once(more, words, shards, pictures, tmp_path):
    file = tmp_path / "both.jsonl"
    records = [{"image": str(pictures.parent / "0.png"), "question": "?", "answer": str(n)} for n in range(40)]
    records[30] = {"audio": "a.wav", "question": "?", "answer": "A."}
    file.write_text("\n".join(map(json.dumps, records)))
    found = stream([*words("batch=2", *more), f"data={file}"])
    found.batch(0)
    found.talk.problems = lambda example: []  # of a model that takes both
    with pytest.raises(
        InputError, match=r"has pictures \(first in line 1\) and sounds \(first in line 31\); one model"
    ):
        for at in range(20):
            found.batch(at)


def test_a_stream_that_goes_on_knows_which_media_it_has_seen(words, pictures, tmp_path):
    file = tmp_path / "both.jsonl"
    records = [{"image": str(pictures.parent / "0.png"), "question": "?", "answer": "A."} for _ in range(20)]
    records += [{"question": "?", "answer": "A."} for _ in range(20)]
    file.write_text("\n".join(map(json.dumps, records)))
    begun = stream([*words("batch=2"), f"data={file}"])
    begun.talk.problems = lambda example: []
    begun.batch(19)
    state = json.loads(json.dumps(begun.state()))
    records[35] = {"audio": "a.wav", "question": "?", "answer": "A."}
    file.write_text("\n".join(map(json.dumps, records)))
    state["starts"] = {"2": [[0, 32]]}
    again = stream([*words("batch=2"), f"data={file}"])
    again.talk.problems = lambda example: []
    again.restore(state)
    with pytest.raises(
        InputError, match=r"has pictures \(first in line 1\) and sounds \(first in line 36\); one model"
    ):
        again.batch(17)


def test_several_data_sets_are_mixed_by_weight_and_resume_exactly(words, shards, pictures):
    more = ["data.more=[" + str(other := shards.with_name("other.jsonl")) + "]", "data.weights=[3, 1]", "batch=4"]
    picture = str(pictures.parent / "0.png")
    records = [{"image": picture, "question": "?", "answer": f"It is {1000 + number}."} for number in range(40)]
    other.write_text("\n".join(map(json.dumps, records)))
    whole = stream(words(*more))
    wanted = [asked(whole.batch(at)) for at in range(120)]
    seen = [number for batch in wanted for number in batch]
    small = [number for number in seen if number >= 1000]
    assert 0.2 < len(small) / len(seen) < 0.3 and set(seen) == {*range(3 * COUNT), *range(1000, 1040)}
    assert max(Counter(small).values()) - min(Counter(small).values()) <= 1, "each goes on where it was"
    first, second = stream(words(*more)), stream(words(*more))
    for at in range(71):
        first.batch(at)
    second.restore(json.loads(json.dumps(first.state())))
    assert [asked(second.batch(at)) for at in range(71, 120)] == wanted[71:]
    assert first.digest != stream(words(*more[:1], "data.weights=[1, 1]", "batch=4")).digest
    apart = stream([*words(*more), "data.validation="])
    held = apart.sources[0].held
    assert len([where for where in held if "other.jsonl" in where]) == len(held) / 2, "some of each are held out"


def test_pictures_in_one_data_set_and_sounds_in_another_are_refused(words, shards):
    other = shards.with_name("other.jsonl")
    records = [{"question": "?", "answer": "A."}] * 30 + [{"audio": "a.wav", "question": "?", "answer": "A."}]
    other.write_text("\n".join(map(json.dumps, records)))
    found = stream([*words("batch=2"), f"data.more=[{other}]", "data.weights=[1, 1]"])
    found.talk.problems = lambda example: []
    with pytest.raises(InputError, match="there are data sets with pictures and others with sounds"):
        for at in range(60):
            found.batch(at)


def test_all_batches_of_a_step_can_be_made_again_without_reading_again(words, monkeypatch):
    found = stream(words("batch=8", "train.accumulate=12"))  # blocks of 2 batches
    for at in range(12):
        found.batch(at)
    monkeypatch.setattr(found, "_go_to", lambda block: pytest.fail("reads again"))
    for at in range(24):
        found.batch(at if at < 12 else at - 12)


def test_other_files_are_refused_when_a_run_goes_on(words, shards, stopped_run):
    settings = config.load(NAME, words())
    run = stopped_run(InstructionTuning, settings, at=4)
    (shards / "train-1.parquet").unlink()
    with pytest.raises(InputError, match="its conversations are not those that this run was trained on"):
        execute(InstructionTuning, settings, run)


def test_the_hubs_are_read_as_they_come_and_pictures_stay_bytes(words, shards, monkeypatch):
    import datasets

    load = datasets.load_dataset

    def local(name: str, part: str | None, split: str, revision: str | None, streaming: bool):
        assert streaming and name == "owner/name"
        return load("parquet", data_files=[str(file) for file in sorted(shards.iterdir())], split=split, streaming=True)

    monkeypatch.setattr(datasets, "load_dataset", local)
    found = stream([*words("batch=3")[:-6], "data=hub:owner/name", *words("batch=3")[-5:]])
    assert sorted(number for at in range(30) for number in asked(found.batch(at))) == list(range(3 * COUNT))
    assert all(path.is_file() for path in found.batch(30)[0].media)


def test_what_cannot_be_streamed_and_what_the_check_cannot_show(words):
    with pytest.raises(ConfigError, match="weights: of 2 data sets that are streamed nobody knows"):
        config.load(NAME, [*words(), "data.more=[b.jsonl]"])
    with pytest.raises(ConfigError, match="file is `demo`"):
        config.load(NAME, ["data.streaming=true"])
    settings = config.load(NAME, words())
    assert InstructionTuning.check(settings) == [] and InstructionTuning.examples(settings) is None
    (doubt,) = InstructionTuning.doubts(settings)
    assert "16 conversations and those held out are looked at now" in doubt
