"""Comparisons of runs on a small checkpoint: what they are scored by, and files that are missing or wrong."""

import json
import logging
import resource

import pytest

from equipoise.pipelines.cli import main
from equipoise.pipelines.text_to_image.metrics import DRAWN_SCORE, LOSS_SCORE
from equipoise.pipelines.text_to_image.result import LORA_FILE


@pytest.fixture
def trained(short, tmp_path):
    assert main(["train", "text_to_image/dreambooth", *short, "--id", "one"]) == 0
    return tmp_path / "runs" / "one"


@pytest.fixture
def compare(trained):
    def run(*words: str) -> int:
        return main(["compare", str(trained), *words])

    return run


def test_a_lora_file_that_is_missing_or_broken_is_named(compare, trained, capfd):
    file = trained / "result" / LORA_FILE
    for damage, said in (
        (lambda: file.write_bytes(b"no tensors"), "cannot be loaded on this base"),
        (file.unlink, "is missing"),
    ):
        damage()
        capfd.readouterr()
        assert compare() == 2
        err = capfd.readouterr().err
        assert f"{file}: {said}" in err and "Traceback" not in err
    assert not (trained / "comparison").exists()


def test_the_end_of_training_says_where_the_result_is_and_what_is_next(short, tmp_path, capfd):
    assert main(["train", "text_to_image/dreambooth", *short, "--id", "one"]) == 0
    result = tmp_path / "runs" / "one" / "result"
    out = capfd.readouterr().out
    assert f"  result:  {result / LORA_FILE}\n" in out
    assert f"  load it: pipeline.load_lora_weights('{result}')\n" in out
    assert f"`equipoise compare {result.parent}`" in out


def test_what_is_no_news_is_not_printed(compare):
    """The run has no factors for the text encoder, which diffusers says of every cell."""
    logger, heard = logging.getLogger("diffusers.loaders.lora_base"), []
    handler = logging.Handler()
    handler.emit = lambda record: heard.append(record.getMessage())
    logger.addHandler(handler)
    try:
        assert compare() == 0
        logger.warning("something else")
    finally:
        logger.removeHandler(handler)
    assert heard == ["something else"]


def test_a_disk_that_fills_up_while_pictures_are_written(compare, trained, capfd):
    before = resource.getrlimit(resource.RLIMIT_FSIZE)
    resource.setrlimit(resource.RLIMIT_FSIZE, (600, before[1]))
    try:
        code = compare()
    finally:
        resource.setrlimit(resource.RLIMIT_FSIZE, before)
    err = capfd.readouterr().err
    assert code == 1 and "the disk is full" in err and "Traceback" not in err
    assert sorted(item.name for item in trained.iterdir() if "comparison" in item.name) == []


def test_the_score_says_what_it_is(tmp_path):
    """The embedded base is scored by the new object only where a prompt asks for that."""
    words = ["text_to_image/demo", "steps=1", "samples.steps=1", "samples.count=1", "prior.prompt=null"]
    words.append(f"runs={tmp_path / 'runs'}")
    assert main(["train", *words, "rank=1", "--id", "one"]) == 0
    for prompt, score in (("a sks object", DRAWN_SCORE), ("a red circle", LOSS_SCORE)):
        out = tmp_path / prompt.split()[1]
        given = ["--prompt", f"{prompt} on a white background", "--out", str(out)]
        assert main(["compare", str(tmp_path / "runs/one"), *given]) == 0
        document = json.loads((out / "table.json").read_text())
        assert document["score"] == score
        assert ("object" in document["cells"][0]["metrics"]) == (score == DRAWN_SCORE)
        assert document["kept"] == ("kept" if prompt == "a red circle" else ""), "what the base knew is not asked for"
