"""What is made for a user's folder takes its place, and nothing of anybody else's is lost on the way."""

import pytest

from equipoise.errors import InputError
from equipoise.pipelines.jobs.making import _labelled, swapped_in
from equipoise.pipelines.pipeline import Pipeline


def test_a_folder_is_replaced_when_all_is_made_and_stays_when_something_fails(tmp_path):
    folder = tmp_path / "out"
    with swapped_in(folder) as staging:
        (staging / "a").write_text("1")
    with pytest.raises(RuntimeError), swapped_in(folder) as staging:
        raise RuntimeError
    assert [path.name for path in folder.iterdir()] == ["a"]
    with swapped_in(folder) as staging:
        (staging / "b").write_text("2")
    assert [path.name for path in folder.iterdir()] == ["b"] and [path.name for path in tmp_path.iterdir()] == ["out"]


@pytest.mark.parametrize("there", [False, True])
def test_what_somebody_else_wrote_meanwhile_is_kept(there, tmp_path):
    folder = tmp_path / "out"
    if there:
        folder.mkdir()
        (folder / "old").write_text("0")
    with pytest.raises(InputError, match="something else was written there meanwhile, and is kept") as refused:
        with swapped_in(folder) as staging:
            (staging / "made").write_text("1")
            folder.mkdir(exist_ok=True)
            (folder / "notes").write_text("mine")
    assert (folder / "notes").read_text() == "mine" and (folder / "old").exists() == there
    (other,) = (path for path in tmp_path.iterdir() if path != folder)
    assert str(other) in str(refused.value) and [path.name for path in other.iterdir()] == ["made"]


def test_what_may_be_rewritten_meanwhile_is_replaced_and_nothing_else_is(tmp_path):
    folder = tmp_path / "out"
    (folder / "cells").mkdir(parents=True)
    for name in ("old", "votes.jsonl", ".table.csv.0123abcd"):
        (folder / name).write_text("0")
    with swapped_in(folder, ("votes.jsonl", "table.csv")) as staging:
        (staging / "made").write_text("1")
        (folder / "votes.jsonl").write_text("0 1")
        (folder / ".table.csv.0123abcd").rename(folder / "table.csv")
    assert [path.name for path in folder.iterdir()] == ["made"]
    for name in ("notes", "made", "cells/votes.jsonl"):
        with pytest.raises(InputError, match="something else was written"):
            with swapped_in(folder, ("votes.jsonl",)):
                (folder / "cells").mkdir(exist_ok=True)
                (folder / name).write_text("mine")
        assert (folder / name).read_text() == "mine"


def test_files_are_called_by_as_little_of_their_path_as_tells_them_apart(tmp_path):
    """Where they lie on this machine is in nothing that is handed on."""
    files = [tmp_path / name for name in ("a/lora.safetensors", "b/lora.safetensors", "c/one.bin", "c/one.safetensors")]
    names = list(_labelled(Pipeline, [], files, False))
    assert names == ["a/lora.safetensors", "b/lora.safetensors", "one.bin", "one.safetensors"]
    assert list(_labelled(Pipeline, [], files[:1], False)) == ["lora"]
