"""Buckets, the order of batches, and what captions say when they are drawn."""

import json
from collections import Counter
from itertools import chain

import numpy as np
import pytest
import torch
from PIL import Image

from equipoise.pipelines import config
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.buckets import BucketBatches, nearest, sizes
from equipoise.pipelines.text_to_image.captions import spoken
from equipoise.pipelines.text_to_image.config import TextToImageData
from equipoise.pipelines.text_to_image.data import read_examples
from equipoise.pipelines.text_to_image.latents import prepare_latents
from equipoise.pipelines.training.state import place

NAME = "text_to_image/dreambooth"


@pytest.mark.parametrize(
    ("settings", "stride", "found"),
    [
        ({"resolution": 512}, 8, [(384, 640), (448, 576), (512, 512), (576, 448), (640, 384)]),
        ({"resolution": 512, "bucket_limit": 1.3}, 8, [(448, 576), (512, 512), (576, 448)]),
        ({"resolution": 32}, 8, [(24, 40), (32, 32), (40, 24)]),
        ({"resolution": 64, "bucket_step": 8}, 32, [(64, 64)]),
        ({"resolution": 512, "buckets": False}, 8, [(512, 512)]),
    ],
)
def test_sizes_have_about_one_area_and_sides_of_whole_steps(settings, stride, found):
    assert sizes(TextToImageData(**{"buckets": True, **settings}), stride) == found


@pytest.mark.parametrize(("given", "size"), [((400, 300), (576, 448)), ((300, 400), (448, 576)), ((9, 9), (512, 512))])
def test_a_picture_goes_to_the_size_of_its_shape(given, size):
    assert nearest(given, sizes(TextToImageData(resolution=512, buckets=True))) == size


def test_an_epoch_holds_everything_as_often_as_it_is_repeated_one_size_a_batch():
    repeats, shapes = [1, 3, 1, 1, 2], [(1, 1), (1, 1), (1, 2), (1, 2), (1, 2)]
    batches = BucketBatches(repeats, shapes, 2, seed=0)
    assert batches.per_epoch == 4
    epochs = [[batches[4 * epoch + i] for i in range(4)] for epoch in range(20)]
    for epoch in epochs:
        assert all(len({shapes[index] for index in batch}) == 1 and len(batch) == 2 for batch in epoch)
        assert Counter(chain(*epoch)) == dict(enumerate(repeats)), "both buckets fill their batches here"
    assert len({repr(epoch) for epoch in epochs}) > 10, "each is another order"
    assert [batches[i] for i in range(80)] == list(chain(*epochs)), "whatever was asked before"
    assert [BucketBatches(repeats, shapes, 2, seed=1)[i] for i in range(80)] != list(chain(*epochs))
    filled = BucketBatches([1, 1, 1, 1], [(1, 1)] * 3 + [(1, 2)], 2, seed=0)
    assert Counter(chain(*(filled[i] for i in range(filled.per_epoch))))[3] == 2, "filled up with itself"


def test_one_size_keeps_the_order_that_runs_had_before():
    batches = BucketBatches([1] * 5, [(1, 1)] * 5, 3, seed=7)
    assert [batches[i] for i in range(4)] == [[place(3 * i + j, 5, 7) for j in range(3)] for i in range(4)]


def test_captions_are_dropped_and_shuffled_as_often_as_asked():
    def draw(count=2000, **settings):
        generator = torch.Generator().manual_seed(0)
        return [spoken("vase, red, tall, old", TextToImageData(**settings), generator) for _ in range(count)]

    assert set(draw()) == {"vase, red, tall, old"}
    assert draw(caption_dropout=0.25).count("") == pytest.approx(500, abs=60)  # three deviations of a binomial: 58
    shuffled = Counter(draw(shuffle_tags=True, keep_tags=1))
    assert len(shuffled) == 6 and all(text.startswith("vase, ") for text in shuffled)
    assert min(shuffled.values()) > 250  # of 333, four and a half deviations
    assert len(set(draw(shuffle_tags=True))) == 24
    assert set(draw(10, shuffle_tags=True, keep_tags=9)) == {"vase, red, tall, old"}


def test_nothing_is_drawn_for_what_is_not_asked():
    generator = torch.Generator().manual_seed(0)
    spoken("a, b", TextToImageData(), generator)
    assert torch.rand((), generator=generator) == torch.rand((), generator=torch.Generator().manual_seed(0))


@pytest.fixture
def shapes(tmp_path):
    """A tall picture, two wide ones and a square, in the folders that kohya's scripts want."""
    folder = tmp_path / "photographs"
    rng = np.random.default_rng(0)
    for name, size in {
        "2_a vase/tall": (30, 60),
        "b/wide": (60, 32),
        "b/wide2": (66, 36),
        "b/square": (50, 50),
    }.items():
        path = folder / f"{name}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        Image.fromarray(rng.integers(0, 255, (size[1], size[0], 3), dtype=np.uint8)).save(path)
    for name in ("wide", "wide2", "square"):
        (folder / "b" / f"{name}.txt").write_text("thing, tag one, tag two")
    return folder


def test_kohyas_folders_say_repeats_and_captions(shapes):
    examples, problems = read_examples(TextToImageData(folder=str(shapes)))
    assert not problems
    assert [(e.path.stem, e.caption, e.repeats) for e in examples] == [
        ("tall", "a vase", 2),
        ("square", "thing, tag one, tag two", 1),
        ("wide", "thing, tag one, tag two", 1),
        ("wide2", "thing, tag one, tag two", 1),
    ]
    examples, _ = read_examples(TextToImageData(folder=str(shapes), repeats={"b": 5, "2_a vase": 1}))
    assert [example.repeats for example in examples] == [1, 5, 5, 5]
    assert read_examples(TextToImageData(folder=str(shapes), repeats={"c": 5}))[1] == [
        f"data.repeats: c is no folder with pictures in {shapes}. There are 2_a vase, b."
    ]


def test_latents_are_of_the_buckets_and_kept_apart_from_squares(shapes, short, tmp_path):
    settings = config.load(NAME, [*short, f"data={shapes}"])
    base = load_base(settings.model, "no")
    examples, _ = read_examples(settings.data)
    square = prepare_latents(base, examples, settings.data, tmp_path / "cache")
    assert set(square.shapes) == {(4, 4, 4)}
    data = settings.data.model_copy(update={"buckets": True})
    found = prepare_latents(base, examples, data, tmp_path / "cache")
    assert found.shapes == [(4, 5, 3), (4, 4, 4), (4, 3, 5), (4, 3, 5)]
    assert found.of(0)[1][0].tolist() == [60, 30, 4, 0, 40, 24], "48 high when 24 wide; cut from the middle"
    base.latents.clear()
    again = prepare_latents(base, examples, data, tmp_path / "cache")
    assert all(torch.equal(again.of(picture)[0], found.of(picture)[0]) for picture in range(4))


def test_a_run_with_all_of_it_learns_and_resumes_exactly(shapes, short):
    words = [*short, f"data={shapes}", "data.buckets=true", "data.crop=random", "data.caption_dropout=0.3"]
    words += ["data.shuffle_tags=true", "data.keep_tags=1", "checkpoint.every=3", "learning_rate=1e-3"]
    settings = config.load(NAME, words)
    assert TextToImage.check(settings) == []
    losses = []
    for stop in (False, True):
        run = Store(settings.runs).create(settings)
        if stop:
            told = type(run).metric

            def metric(step, run=run, told=told, **values):
                told(run, step, **values)
                if step == 4:
                    run.request("stop")

            run.metric = metric
            assert execute(TextToImage, settings, run).state == "stopped"
            del run.metric
        assert execute(TextToImage, settings, run).state == "done"
        losses.append([record["loss"] for record in run.metrics()])
        result = json.loads((run.folder / "result" / "result.json").read_text())
        assert result["loss_after"] < result["loss_before"]
    assert losses[0] == losses[1] and len(losses[0]) == 6
