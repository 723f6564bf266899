"""Prior preservation: class pictures given or drawn by the untouched base, and what they do to the loss."""

import shutil

import pytest
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines import config
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage, prior
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.generate import generate
from equipoise.pipelines.text_to_image.offloading import VisitingLinear

NAME = "text_to_image/dreambooth"


def train(*overrides):
    settings = config.load(NAME, overrides)
    assert TextToImage.check(settings) == []
    run = Store(settings.runs).create(settings)
    assert execute(TextToImage, settings, run).state == "done"
    return run


def losses(run) -> list[dict]:
    return run.metrics()


def test_the_untouched_base_draws_them_once(short, tmp_path, monkeypatch):
    words = ["prior.prompt=a vase", "prior.count=5", "samples.batch=2", "samples.negative=x"]
    settings = config.load(NAME, [*short, *words])
    base = load_base(settings.model, "no")
    examples = prior.class_examples(base, settings, tmp_path)
    (folder,) = tmp_path.glob("prior-*")
    drawn = sorted(folder.iterdir())
    assert [(e.path, e.caption, e.repeats) for e in examples] == [(path, "a vase", 1) for path in drawn]
    assert [path.name for path in drawn] == [f"{seed:05d}.png" for seed in range(5)]
    asked = settings.samples.model_copy(update={"prompts": ["a vase"], "negative": "", "count": 2, "seed": 2})
    for path, sample in zip(drawn[2:4], generate(base.pipeline, asked, 32), strict=True):
        with Image.open(path) as picture:
            assert picture.tobytes() == sample.image.tobytes()

    seeds = []
    monkeypatch.setattr(prior, "generate", lambda *args: seeds.append(args[1].seed) or generate(*args))
    assert prior.class_examples(base, settings, tmp_path) == examples and seeds == []
    drawn[3].unlink()
    prior.class_examples(base, settings, tmp_path)
    assert seeds == [2], "the batch that it was of"
    more = config.load(NAME, [*short, *words, "prior.count=7"])
    assert len(prior.class_examples(base, more, tmp_path)) == 7 and seeds == [2, 4, 6]
    other = config.load(NAME, [*short, *words, "samples.steps=1"])
    prior.class_examples(base, other, tmp_path)
    assert len(list(tmp_path.glob("prior-*"))) == 2


@pytest.mark.parametrize("more", [["model.quantize=fp8"], ["model.offload=1"]])
def test_weights_elsewhere_count_for_which_pictures_are_drawn_anew(short, more):
    base = load_base(config.load(NAME, [*short, *more]).model, "no")
    first = prior._fingerprint(base)
    held = [layer.offloaded for layer in base.denoiser.modules() if isinstance(layer, VisitingLinear)][-1]
    found = []
    for part in ("weight", "scale") if held.scale is not None else ("weight",):
        own = getattr(held, part)
        try:
            setattr(held, part, (own.float() / 2).to(own.dtype))
            found.append(prior._fingerprint(base))
        finally:
            setattr(held, part, own)
    assert first not in found and prior._fingerprint(base) == first


def test_a_base_in_fewer_bits_draws_pictures_of_its_own(short, tmp_path):
    words = [*short, "prior.prompt=a vase", "prior.count=1"]
    base, drawn = load_base(config.load(NAME, words).model, "no"), []
    for how in ("null", "fp8", "int8"):  # by the key alone: some kinds of weights do not show their values
        settings = config.load(NAME, [*words, f"model.quantize={how}"])
        drawn += [example.path for example in prior.class_examples(base, settings, tmp_path)]
    assert len(set(drawn)) == 3


def test_a_damaged_class_picture_of_the_folder_is_found_by_the_check(short, pictures, tmp_path):
    folder = shutil.copytree(pictures, tmp_path / "class")
    words = [*short, "prior.prompt=a vase", f"prior.folder={folder}"]
    assert TextToImage.check(config.load(NAME, words)) == []
    path = sorted(folder.glob("*.png"))[0]
    path.write_bytes(path.read_bytes()[:-60])
    (problem,) = TextToImage.check(config.load(NAME, words))
    assert problem.startswith(f"{path}: cannot be read as a picture")


def test_each_of_several_prompts_has_its_part_of_the_count(short, tmp_path):
    words = ["prior.prompt=a vase", "prior.more_prompts=[a cup, a jug]", "prior.count=5"]
    settings = config.load(NAME, [*short, *words])
    base = load_base(settings.model, "no")
    examples = prior.class_examples(base, settings, tmp_path)
    assert [e.caption for e in examples] == ["a vase", "a vase", "a cup", "a cup", "a jug"]
    assert len({e.path for e in examples}) == 5 and all(e.path.is_file() for e in examples)
    alone = prior.class_examples(base, config.load(NAME, [*short, "prior.prompt=a cup", "prior.count=2"]), tmp_path)
    assert alone == examples[2:4]  # pictures of a prompt are drawn once, in whatever company


def test_a_count_that_leaves_prompts_without_a_picture_is_refused(short):
    words = ["prior.prompt=a vase", "prior.more_prompts=[a cup, a jug]"]
    (problem,) = TextToImage.check(config.load(NAME, [*short, *words, "prior.count=2"]))
    assert problem == "prior.count: 2 pictures are too few for 3 prompts, which share them. Give at least 3."
    assert TextToImage.check(config.load(NAME, [*short, *words, "prior.count=3"])) == []


def test_the_loss_is_of_both_and_the_weight_counts(short, tmp_path):
    """By the first step's loss, before which the factors change nothing: own + weight × class."""
    given = ["samples.prompts=[]", "samples.steps=1", "steps=2", "learning_rate=0.01"]
    classed = ["prior.prompt=a vase", "prior.count=2"]
    alone, nothing, half = (
        losses(train(*short, *given, *words))
        for words in ([], [*classed, "prior.weight=0"], [*classed, "prior.weight=0.5"])
    )
    beside = [record["loss_prior"] for record in half]
    own = [record["loss"] for record in alone]
    assert half[0]["loss"] == pytest.approx(own[0] + 0.5 * beside[0], rel=1e-5) and beside[0] > 0
    assert half[1]["loss"] != pytest.approx(own[1] + 0.5 * beside[1], rel=1e-6), "it has trained something"
    assert [record["loss"] for record in nothing] == pytest.approx(own, rel=1e-6)


def test_a_second_look_at_a_batch_is_not_logged(short):
    given = ["samples.prompts=[]", "samples.steps=1", "steps=1", "prior.prompt=a vase", "prior.count=2"]
    words = (["optimizer=adamw"], ["optimizer=sam", "optimizer.options={rho: 2.0}"])
    plain, sharp = (losses(train(*short, *given, *more))[0] for more in words)
    assert sharp["loss_prior"] == plain["loss_prior"] and sharp["loss"] == plain["loss"]


def test_what_is_wrong_is_said_before(short, tmp_path):
    def said(*words):
        return TextToImage.check(config.load(NAME, [*short, *words]))

    assert said("prior.folder=x") == ["prior.folder: needs prior.prompt, what the class is called."]
    assert any(
        "prior.folder: nowhere does not exist" in line for line in said("prior.prompt=x", "prior.folder=nowhere")
    )
    assert said("prior.prompt=x") == []


def test_a_run_goes_on_with_the_class_pictures_that_it_began_with(short, stopped_run):
    settings = config.load(NAME, [*short, "prior.prompt=a vase", "prior.count=2", "samples.prompts=[]"])
    run = stopped_run(TextToImage, settings, at=2)
    run.forget_requests()
    others = config.set_keys(settings, {"samples.steps": 3})
    with pytest.raises(InputError, match="its class pictures are not those that this run was trained on so far"):
        execute(TextToImage, others, run)
