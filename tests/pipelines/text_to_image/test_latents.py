"""Latents are made once per picture, whatever happens around them, and a run goes on with the same pictures only."""

import os
import shutil
from pathlib import Path

import pytest
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage, latents
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.data import read_examples
from equipoise.pipelines.text_to_image.latents import prepare_latents

NAME = "text_to_image/dreambooth"


@pytest.fixture
def own(short, pictures, tmp_path):
    """Overrides as in `short`, with a folder of pictures that a test may change."""
    folder = shutil.copytree(pictures, tmp_path / "own")
    return [*short, f"data={folder}", "samples.prompts=[]"]


@pytest.fixture
def encoded(monkeypatch):
    """The names of the pictures that were encoded."""
    names, encode = [], latents._encode

    def counted(base, path, *rest):
        names.append(path.name)
        return encode(base, path, *rest)

    monkeypatch.setattr(latents, "_encode", counted)
    return names


def prepared(words, cache: Path, **more):
    settings = config.load(NAME, words)
    base = load_base(settings.model, "no")
    base.latents.clear()  # as in another process
    return prepare_latents(base, read_examples(settings.data)[0], settings.data, cache, **more)


def test_a_picture_that_is_added_renamed_or_there_twice_costs_no_other(own, encoded, tmp_path):
    first = prepared([*own, "data.crop=random"], tmp_path / "cache")
    folder, count = tmp_path / "own", len(encoded)
    assert count == len(first.moments) > 1
    shutil.copy(folder / "0.png", folder / "zz.png")
    Image.new("RGB", (40, 40), "blue").save(folder / "zzz.png")
    with (folder / "metadata.jsonl").open("a") as table:
        table.write('\n{"file_name": "zz.png", "text": "x"}\n{"file_name": "zzz.png", "text": "x"}\n')
    second = prepared([*own, "data.crop=random"], tmp_path / "cache")
    assert encoded[count:] == ["zzz.png"]
    assert all(torch.equal(a, b) for a, b in zip(first.moments, second.moments, strict=False))
    assert torch.equal(second.crops[: len(first.crops)], first.crops)
    assert torch.equal(second.moments[-2], first.moments[0])


def test_a_damaged_picture_that_comes_last_loses_none_of_the_others(own, encoded, tmp_path):
    examples = read_examples(config.load(NAME, own).data)[0]
    whole = examples[-1].path.read_bytes()
    examples[-1].path.write_bytes(whole[:60])
    with pytest.raises(InputError, match="cannot be read as a picture"):
        prepared(own, tmp_path / "cache")
    before = len(encoded)
    examples[-1].path.write_bytes(whole)
    prepared(own, tmp_path / "cache")
    assert encoded[before:] == [examples[-1].path.name]


def test_what_a_crash_left_of_a_file_is_made_anew(own, encoded, tmp_path):
    first = prepared(own, tmp_path / "cache")
    before = len(encoded)
    file = next((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    again = prepared(own, tmp_path / "cache")
    assert len(encoded) == before + 1
    assert all(torch.equal(a, b) for a, b in zip(first.moments, again.moments, strict=True))


def test_those_that_were_not_used_for_longest_go_first_and_never_a_runs_own(own, tmp_path, monkeypatch):
    cache = tmp_path / "cache"
    prepared(own, cache)
    files = list((cache / "latents").rglob("*.safetensors"))
    old = cache / "moments-0.safetensors"  # as version 0.1.0 kept them
    old.write_bytes(bytes(1000))
    os.utime(old, (1, 1))
    prepared([*own, "data.flip=true"], cache)
    assert old.exists() and all(file.exists() for file in files)
    monkeypatch.setattr(latents, "KEPT", 0)
    prepared([*own, "data.flip=true"], cache)
    assert not old.exists() and not any(file.exists() for file in files)
    assert len(list((cache / "latents").rglob("*.safetensors"))) == len(files)


def test_a_run_stops_while_latents_are_made_and_keeps_them(own, encoded, tmp_path, monkeypatch):
    settings = config.load(NAME, own)
    run = Store(settings.runs).create(settings)
    load_base(settings.model, "no").latents.clear()
    encode = latents._encode

    def asked(*words):
        run.request("stop")
        run.request("save")
        return encode(*words)

    monkeypatch.setattr(latents, "_encode", asked)
    outcome = execute(TextToImage, settings, run)
    total = len(read_examples(settings.data)[0])
    assert (outcome.state, outcome.message) == (
        "stopped",
        f"stopped on request after 1 of {total} pictures were encoded; what was made is kept.",
    )
    assert run.status().exit_code == 143
    assert (run.folder / "requests" / "save").exists(), "only the request to stop is answered there"
    monkeypatch.setattr(latents, "_encode", encode)
    run.forget_requests()
    assert execute(TextToImage, settings, run).state == "done"
    assert len(encoded) == total


def test_a_run_stops_while_class_pictures_are_drawn(own, monkeypatch):
    settings = config.load(NAME, [*own, "prior.prompt=a vase", "prior.count=4", "samples.batch=2"])
    run = Store(settings.runs).create(settings)
    from equipoise.pipelines.text_to_image import prior

    draw = prior.generate
    monkeypatch.setattr(prior, "generate", lambda *words: run.request("stop") or draw(*words))
    outcome = execute(TextToImage, settings, run)
    assert outcome.state == "stopped"
    assert outcome.message == "stopped on request after 2 of 4 class pictures were drawn; what was made is kept."


@pytest.mark.parametrize("change", ["caption", "picture", "repeats"])
def test_a_run_goes_on_with_the_pictures_that_it_began_with_and_with_no_others(own, stopped_run, change):
    settings = config.load(NAME, own)
    run = stopped_run(TextToImage, settings, at=2)
    example = read_examples(settings.data)[0][0]
    if change == "caption":
        table = example.path.with_name("metadata.jsonl")
        table.write_text(table.read_text().replace(example.caption, "something else"))
    elif change == "picture":
        Image.new("RGB", (40, 40), "blue").save(example.path)
    else:
        settings = settings.model_copy(update={"data": settings.data.model_copy(update={"repeats": {".": 2}})})
    run.forget_requests()
    with pytest.raises(InputError, match="its pictures or captions are not those that this run was trained on so far"):
        execute(TextToImage, settings, run)
