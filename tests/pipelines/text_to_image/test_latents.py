"""Latents are made once per picture, whatever happens around them, and a run goes on with the same pictures only."""

import json
import os
import re
import shutil
import socket
from pathlib import Path

import pytest
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.media.pictures import size_of
from equipoise.pipelines.pipeline import execute, follow
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage, latents
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.buckets import BucketBatches
from equipoise.pipelines.text_to_image.data import read_examples
from equipoise.pipelines.text_to_image.latents import latents_of, prepare_latents
from equipoise.pipelines.text_to_image.verification import Verification
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.loop import UnreadableError

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


def made_of(latents):
    return [latents.of(picture) for picture in range(len(latents.shapes))]


def test_a_picture_that_is_added_renamed_or_there_twice_costs_no_other(own, encoded, tmp_path):
    first = prepared([*own, "data.crop=random"], tmp_path / "cache")
    folder, count = tmp_path / "own", len(encoded)
    assert count == len(made_of(first)) > 1
    shutil.copy(folder / "0.png", folder / "zz.png")
    Image.new("RGB", (40, 40), "blue").save(folder / "zzz.png")
    with (folder / "metadata.jsonl").open("a") as table:
        table.write('\n{"file_name": "zz.png", "text": "x"}\n{"file_name": "zzz.png", "text": "x"}\n')
    second = prepared([*own, "data.crop=random"], tmp_path / "cache")
    assert encoded[count:] == ["zzz.png"]
    for one, other in zip(made_of(first), made_of(second), strict=False):
        assert all(map(torch.equal, one, other))
    assert torch.equal(second.of(count)[0], first.of(0)[0])


def test_a_damaged_picture_that_comes_last_loses_none_of_the_others(own, encoded, tmp_path):
    examples = read_examples(config.load(NAME, own).data)[0]
    whole = examples[-1].path.read_bytes()
    examples[-1].path.write_bytes(whole[:-60])  # its beginning is whole
    with pytest.raises(InputError, match="cannot be read as a picture"):
        prepared(own, tmp_path / "cache")
    before = len(encoded)
    examples[-1].path.write_bytes(whole)
    prepared(own, tmp_path / "cache")
    assert encoded[before:] == [examples[-1].path.name]


@pytest.mark.parametrize("when", ["before it is read", "while it is read"])
def test_what_a_picture_was_when_the_run_began_is_never_kept_as_another(own, tmp_path, monkeypatch, when):
    settings = config.load(NAME, own)
    examples = read_examples(settings.data)[0]
    path, base = examples[0].path, load_base(settings.model, "no")
    whole = path.read_bytes()
    base.latents.clear()
    found = latents_of(base, examples, settings.data, tmp_path / "cache")

    def other() -> None:
        Image.new("RGB", size_of(path), "blue").save(path)

    if when == "before it is read":
        other()
    encode = latents._encode
    monkeypatch.setattr(latents, "_encode", lambda *words: (encode(*words), other())[0])
    with pytest.raises(InputError, match=f"{path.name}: changed since the run began"):
        found.of(0)
    monkeypatch.undo()
    path.write_bytes(whole)
    again, anew = (made_of(prepared(own, tmp_path / name))[0] for name in ("cache", "another"))
    assert torch.equal(again[0], anew[0])


def test_latents_of_a_folder_that_was_renamed_are_made_from_where_it_lies_now(own, tmp_path):
    settings = config.load(NAME, own)
    base = load_base(settings.model, "no")
    base.latents.clear()
    latents_of(base, read_examples(settings.data)[0], settings.data, tmp_path / "cache")
    (tmp_path / "own").rename(tmp_path / "renamed")
    data = settings.data.model_copy(update={"folder": str(tmp_path / "renamed")})
    made = latents_of(base, read_examples(data)[0], data, tmp_path / "cache").of(0)
    assert made[0].isfinite().all()


def test_a_cache_that_cannot_be_written_ends_no_run(own, capfd):
    settings, run = started(own, "batch=1", "steps=3")
    cache = Path(settings.runs) / ".cache" / "latents"
    cache.parent.mkdir(parents=True, exist_ok=True)
    cache.write_text("no folder")  # stands for a full or read-only disk, which stops nobody who may do everything
    assert execute(TextToImage, settings, run).state == "done"
    assert capfd.readouterr().err.count("latents cannot be written (Not a directory)") == 1


def test_what_a_crash_left_of_a_file_is_made_anew(own, encoded, tmp_path):
    first = prepared(own, tmp_path / "cache")
    before = len(encoded)
    file = next((tmp_path / "cache" / "latents").rglob("*.safetensors"))
    file.write_bytes(file.read_bytes()[:100])
    again = prepared(own, tmp_path / "cache")
    assert len(encoded) == before + 1
    assert all(torch.equal(a, b) for (a, _), (b, _) in zip(made_of(first), made_of(again), strict=True))


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


def curve(run) -> list[float]:
    return [record["loss"] for record in run.metrics()]


def started(own, *more):
    settings = config.load(NAME, [*own, *more])
    load_base(settings.model, "no").latents.clear()
    return settings, Store(settings.runs).create(settings)


def test_latents_are_made_by_the_step_that_needs_them_and_change_no_loss(own, encoded):
    settings, run = started(own, "steps=4", "batch=1")
    known = []
    metric = run.metric
    run.metric = lambda *words, **values: known.append(len(encoded)) or metric(*words, **values)
    assert execute(TextToImage, settings, run).state == "done"
    assert known == [1, 2, 3, 4], "an epoch of four steps; the last one is followed by an evaluation of all"
    settings, again = started(own, "steps=4", "batch=1", "seed=0")
    prepared(own, Path(settings.runs) / ".cache")
    execute(TextToImage, settings, again)
    assert curve(again) == curve(run) and len(encoded) == 4


def test_the_loss_before_is_that_of_the_first_weights_whenever_it_is_evaluated(own, work):
    """After 20 steps a run is judged by it; here before and after, and once after a resume."""
    results = []
    for more in (["train.give_up=0", "steps=22"], ["steps=22"], ["steps=22", "checkpoint.every=21"]):
        settings, run = started(own, *more, "learning_rate=1e-2", "train.ema=0.5")
        assert execute(TextToImage, settings, run).state == "done"
        results.append(json.loads((run.folder / "result" / "result.json").read_text())["loss_before"])
        results.append(curve(run))
    assert results[::2] == [results[0]] * 3 and results[1::2] == [results[1]] * 3
    assert results[0] == work(*own).evaluation_loss()


def test_a_stop_is_heard_after_the_step_in_which_the_first_latents_are_made(own, encoded, monkeypatch):
    settings, run = started(own, "batch=1", "steps=40", "train.give_up=0")
    encode = latents._encode
    monkeypatch.setattr(latents, "_encode", lambda *words: run.request("stop") or encode(*words))
    assert execute(TextToImage, settings, run).message == "stopped on request at step 1 of 40; the state is saved."
    assert len(encoded) == 1


def test_a_picture_found_damaged_on_the_way_saves_the_run_which_goes_on_once_it_is_replaced(own, encoded):
    more = ["batch=1", "steps=6", "learning_rate=1e-2"]
    settings, whole = started(own, *more)
    execute(TextToImage, settings, whole)
    third, folder = encoded[2], Path(settings.data.folder)
    sound, cache = (folder / third).read_bytes(), Path(settings.runs) / ".cache"
    shutil.rmtree(cache)
    (folder / third).write_bytes(sound[:-60])
    settings, run = started(own, *more)
    with pytest.raises(InputError, match=rf"{third}: cannot be read as a picture .* The state after step 2 is saved"):
        execute(TextToImage, settings, run)
    assert len(list((cache / "latents").rglob("*.safetensors"))) == 2 and run.status().exit_code == 2
    (folder / encoded[0]).rename(folder / "kept")
    shutil.copy(folder / third, folder / encoded[0])
    with pytest.raises(InputError, match="are not those that this run was trained on so far"):
        execute(TextToImage, settings, run)
    (folder / "kept").rename(folder / encoded[0])
    (folder / third).write_bytes(sound)
    assert execute(TextToImage, settings, run).state == "done"
    assert curve(run) == curve(whole)


def test_all_damaged_pictures_are_named_at_once_and_all_may_be_replaced(own, encoded):
    settings, run = started(own, "batch=1", "steps=6")
    execute(TextToImage, settings, run)
    folder, cache = Path(settings.data.folder), Path(settings.runs) / ".cache"
    sound = {name: (folder / name).read_bytes() for name in encoded[1:3]}
    shutil.rmtree(cache)
    for name, whole in sound.items():
        (folder / name).write_bytes(whole[:-60])
    settings, run = started(own, "batch=1", "steps=6")
    with pytest.raises(InputError, match="The state after step 1 is saved") as caught:
        execute(TextToImage, settings, run)
    assert all(f"{name}: cannot be read as a picture" in str(caught.value) for name in sound)
    assert "Remove" not in str(caught.value), "the run goes on with as many pictures"
    for name, whole in sound.items():
        (folder / name).write_bytes(whole)
    assert execute(TextToImage, settings, run).state == "done"


def take_part(rank: int, where: str, words: list[str], folder: Path) -> str:
    """What a process ends with that trains a run beside another one, and what a checkpoint is there then."""
    os.environ |= {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2"}
    os.environ |= {"MASTER_ADDR": "127.0.0.1", "MASTER_PORT": where, "ACCELERATE_USE_CPU": "true"}
    torch.set_num_threads(1)
    processes.join()
    settings = config.load(NAME, words)
    try:
        if rank:
            follow(TextToImage, settings, folder)
        else:
            execute(TextToImage, settings, Run(folder))
    except InputError as error:
        return str(error)
    finally:
        torch.distributed.destroy_process_group()
    return "done"


def test_a_picture_that_a_following_process_finds_damaged_ends_all_in_its_name(own, two_processes):
    words = [*own, "batch=1", "steps=4", "seed=1"]
    settings, run = started(words)
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    order = BucketBatches([1] * 4, [(4, 8, 8)] * 4, 2, settings.seed)
    bad = read_examples(settings.data)[0][order[1][1]].path  # of the second step, the second process's share
    sound = bad.read_bytes()
    bad.write_bytes(sound[:-60])
    leading, following = two_processes(take_part, port, words, run.folder)
    named = rf"{bad.name}: cannot be read as a picture .* Replace it by one of its size\."
    assert re.search(named, leading) and re.search(named, following)
    assert "The state after step 1 is saved" in leading
    assert [path.name for path in checkpoints.complete(run.checkpoints)] == ["step-00000001"]
    bad.write_bytes(sound)
    assert two_processes(take_part, port, words, run.folder) == ["done", "done"]
    assert [record["step"] for record in run.metrics()] == [1, 2, 3, 4]


def test_what_only_a_later_step_needs_is_found_beside_the_first(own, work, tmp_path):
    made = work(*own, "batch=1")
    last = tmp_path / "own" / "3.png"
    last.write_bytes(last.read_bytes()[:-60])
    settings, base = config.load(NAME, own), made.base
    base.latents.clear()
    found = latents_of(base, read_examples(settings.data)[0], settings.data, tmp_path / "cache")
    with Verification({"pictures": [found]}, 1) as verification:
        verification._thread.join()
    assert verification.finished and list(verification.damage) == [("pictures", 3)]
    made.verification, made.verified = verification, False
    with pytest.raises(UnreadableError, match=r"3\.png: cannot be read as a picture"):
        made._make_ready(0)
    assert made.damaged == {"pictures": [3]}
    assert Verification({"pictures": [found]}, 4).finished, "what the check has decoded is not decoded again"


def test_training_looks_at_the_pictures_that_no_step_has_needed(own, encoded, monkeypatch):
    settings, run = started(own, "batch=1", "steps=4")
    execute(TextToImage, settings, run)
    last = next(name for name in reversed(encoded) if name != "0.png")  # the first one is for the check
    shutil.rmtree(Path(settings.runs) / ".cache")
    path, enter = Path(settings.data.folder) / last, Verification.__enter__
    path.write_bytes(path.read_bytes()[:-60])

    def waited(verification):
        enter(verification)._thread.join()  # so that steps are not faster
        return verification

    monkeypatch.setattr(Verification, "__enter__", waited)
    monkeypatch.setattr("equipoise.pipelines.text_to_image.train.DECODED", 1)
    settings, run = started(own, "batch=1", "steps=4")
    with pytest.raises(InputError, match=f"{last}: cannot be read as a picture"):
        execute(TextToImage, settings, run)
    assert run.metrics() == [] and encoded.index(last) > 0, "without, the first step would have gone well"


def test_a_look_that_fails_is_over_and_says_so(work, capsys, monkeypatch):
    found = work().latents
    monkeypatch.setattr(found, "fault", lambda picture: Path("/dev/null/x").read_text())
    with Verification({"pictures": [found]}, 1) as verification:
        verification._thread.join()
    assert verification.finished and verification.damage == {}
    assert "could be looked at beside the steps ([Errno 20] Not a directory" in capsys.readouterr().err


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
