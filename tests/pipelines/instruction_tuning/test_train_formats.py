"""Training on data sets of other tools' formats, mixed by weight: the same to the last bit as on plain files."""

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from equipoise.errors import ConfigError
from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store

NAME = "instruction_tuning/demo"


def trained(words: list[str]) -> Run:
    settings = config.load(NAME, words)
    assert InstructionTuning.check(settings) == []
    run = Store(settings.runs).create(settings)
    assert execute(InstructionTuning, settings, run).state == "done"
    return run


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.folder / "result" / "adapter_model.safetensors")


@pytest.fixture
def packed(pictures) -> Path:
    """The same conversations in Parquet, their pictures inside."""
    import pyarrow
    from pyarrow import parquet

    records = [json.loads(line) for line in pictures.read_text().splitlines()]
    for record in records:
        record["image"] = {"bytes": (pictures.parent / record["image"]).read_bytes(), "path": None}
    parquet.write_table(pyarrow.Table.from_pylist(records), pictures.parent / "talk.parquet")
    return pictures.parent / "talk.parquet"


def test_the_format_changes_nothing(short, pictures, packed):
    plain, other = (trained([*short(data=file), "coordinator=constant"]) for file in (pictures, packed))
    assert [m["loss"] for m in plain.metrics()] == [m["loss"] for m in other.metrics()]
    assert all(torch.equal(value, weights(other)[name]) for name, value in weights(plain).items())
    kept = list((other.root / ".cache" / "media").rglob("*.bin"))
    assert len(kept) == 12, "each picture once, however often the file was read"


def test_a_mixture_resumes_exactly(short, pictures, packed, stopped_run):
    words = [*short(data=pictures), f"data.more=[{packed}]", "data.weights=[3, 1]", "coordinator=constant", "batch=4"]
    whole = trained(words)
    settings = config.load(NAME, words)
    run = stopped_run(InstructionTuning, settings, at=4)
    assert execute(InstructionTuning, settings, run).state == "done"
    assert [m["loss"] for m in whole.metrics()] == [m["loss"] for m in run.metrics()]
    assert all(torch.equal(value, weights(run)[name]) for name, value in weights(whole).items())


def test_a_weight_needs_a_data_set(short, pictures):
    with pytest.raises(ConfigError, match="weights: 1 are needed, one for each data set"):
        config.load(NAME, [*short(), "data.weights=[1, 2]"])
    (problem,) = InstructionTuning.check(config.load(NAME, [f"data.more=[{pictures}]"]))
    assert problem.startswith("data.more: is for data sets of one's own, and data.file is `demo`.")
    empty = pictures.parent / "empty.jsonl"
    empty.write_text('{"messages": []}\n')
    words = [*short(), f"data.more=[{empty}]", "data.weights=[1, 2]", "data.skip_bad=true"]
    problems = InstructionTuning.check(config.load(NAME, words))
    assert problems == [f"data.weights: {empty} has no conversation to train on. Leave it out."]
