"""The loss of held-out pictures while a run is training: its curve, the best weights, an early end, and a resume."""

import json
import shutil

import pytest
import torch
from PIL import Image
from safetensors.torch import load_file

from equipoise.errors import ConfigError, InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.result import LORA_FILE
from equipoise.pipelines.text_to_image.train import TextToImageWork

NAME = "text_to_image/dreambooth"
WORSE = [  # from the third step on
    "optimizer=adamw",
    "learning_rate=0.03",
    "schedule=piecewise_constant",
    "schedule.rules=1:2,100",
    "lora.targets=[conv_out]",
    "train.clip=0",
    "train.give_up=0",
]
BEST = [*WORSE, "train.validate_every=1", "train.keep=best"]


@pytest.fixture
def held(pictures, tmp_path):
    """Two pictures of the same captions that are not trained on."""
    folder = tmp_path / "held"
    folder.mkdir()
    for index, colour in enumerate(("navy", "olive")):
        Image.new("RGB", (64, 48), colour).save(folder / f"{index}.png")
        (folder / f"{index}.txt").write_text(f"a sks object on {colour}")
    return folder


@pytest.fixture
def words(short, held) -> list[str]:
    return [*short, f"data.validation={held}"]


def train(*overrides) -> tuple[Run, str]:
    settings = config.load(NAME, overrides)
    assert TextToImage.check(settings) == []
    run = Store(settings.runs).create(settings)
    return run, execute(TextToImage, settings, run).message


def weights(run: Run) -> dict[str, torch.Tensor]:
    return load_file(run.result / LORA_FILE)


def equal(left: Run, right: Run) -> bool:
    return all(torch.equal(tensor, weights(right)[name]) for name, tensor in weights(left).items())


def curve(run: Run) -> dict[int, float]:
    return {record["step"]: record["val_loss"] for record in run.metrics() if "val_loss" in record}


def facts(run: Run) -> dict:
    return json.loads((run.result / "result.json").read_text())


def test_the_curve_is_of_held_out_pictures_and_changes_nothing(short, words):
    plain, _ = train(*short, "lora.dropout=0.5")
    seen, _ = train(*words, "lora.dropout=0.5", "train.validate_every=2")
    assert list(curve(seen)) == [2, 4, 6] and curve(plain) == {}
    assert [r["loss"] for r in seen.metrics()] == [r["loss"] for r in plain.metrics()] and equal(seen, plain)
    assert curve(seen)[6] == facts(seen)["loss_after"] != facts(plain)["loss_after"]
    assert (facts(seen)["kept"], "kept" in facts(plain)) == ("last", False)


def test_the_loss_is_comparable_between_runs_of_other_seeds_and_batches(words):
    first, _ = train(*words)
    other, _ = train(*words, "seed=7", "batch=3")
    assert facts(other)["loss_before"] == pytest.approx(facts(first)["loss_before"], rel=1e-5)


def test_the_best_weights_are_the_result(words):
    last, _ = train(*words, *WORSE, "train.validate_every=1")
    best, _ = train(*words, *BEST)
    assert curve(last) == curve(best)
    step = min(curve(best), key=curve(best).__getitem__)
    assert step < 6, "it got worse"
    assert facts(best)["loss_after"] == pytest.approx(curve(best)[step], rel=1e-6)
    assert (facts(best)["best_step"], facts(best)["kept"]) == (step, "best")
    there, _ = train(*words, *WORSE, f"steps={step}")
    assert equal(there, best) and not equal(last, best)


def test_patience_ends_a_run(words):
    run, message = train(*words, *BEST, "steps=40", "train.patience=3")
    losses = list(curve(run).values())
    best = losses.index(min(losses[: len(losses) - 3]))
    assert len(losses) == best + 4 < 40 and "no better validation loss in 3 validations" in message
    assert facts(run)["loss_after"] == pytest.approx(min(losses))


def test_with_a_moving_average_it_is_the_average_that_is_judged_and_kept(words):
    run, _ = train(*words, *BEST, "train.ema=0.5")
    plain, _ = train(*words, *BEST)
    assert [r["loss"] for r in run.metrics()] == [r["loss"] for r in plain.metrics()] and curve(run) != curve(plain)
    step = facts(run)["best_step"]
    there, _ = train(*words, *WORSE, "train.ema=0.5", f"steps={step}")
    assert step < 6 and equal(there, run)
    assert facts(run)["loss_after"] == pytest.approx(curve(run)[step], rel=1e-6)


@pytest.mark.parametrize("extra", [[], ["train.ema=0.5"]])
def test_the_best_so_far_survives_a_stop(words, stopped_run, extra):
    overrides = [*words, *BEST, "train.patience=9", *extra]
    whole, _ = train(*overrides)
    settings = config.load(NAME, overrides)
    run = stopped_run(TextToImage, settings, at=4)
    assert execute(TextToImage, settings, run).state == "done"
    assert curve(run) == curve(whole) and facts(run)["best_step"] == facts(whole)["best_step"] < 4
    assert equal(whole, run)


def test_the_best_so_far_survives_a_kill(words, killed_run):
    overrides = [*words, *BEST, "steps=40", "checkpoint_every=4"]
    whole, _ = train(*overrides)
    run = killed_run(NAME, overrides, "step-00000008", "step-00000040")
    assert curve(run) == curve(whole) and facts(run)["best_step"] == facts(whole)["best_step"]
    assert equal(whole, run)


def test_a_run_does_not_go_on_with_other_held_out_pictures(words, held, stopped_run):
    settings = config.load(NAME, [*words, "train.validate_every=1"])
    run = stopped_run(TextToImage, settings, at=3)
    (held / "0.txt").write_text("something else")
    with pytest.raises(InputError, match=r"data.validation: .* are not those that this run was judged by so far"):
        execute(TextToImage, settings, run)


def test_two_processes_judge_alike(words, launched, tmp_path):
    out = launched("train", NAME, *words, *BEST, "steps=20", "train.patience=2", "batch=1", "--id", "two")
    assert "no better validation loss in 2 validations" in out
    assert Store(tmp_path / "runs").get("two").status().step < 20


def test_runs_of_one_process_share_the_held_out_latents(words, monkeypatch):
    more = [*words, "train.validate_every=3", "prior.prompt=a vase", "prior.count=1"]
    train(*more)
    base = load_base(config.load(NAME, more).model, "no")
    before = dict(base.latents)
    monkeypatch.setattr("equipoise.pipelines.text_to_image.latents._kept", lambda file: pytest.fail("read again"))
    train(*more, "seed=1")
    assert len(before) == 3 and all(base.latents[key] is made for key, made in before.items())


def test_of_many_pictures_those_that_are_judged_by_are_spread_over_all(words, held, monkeypatch):
    for index in range(130):
        Image.new("RGB", (16, 16), (index, 0, 0)).save(held / f"{index:03d}.png")
    taken, embed = set(), TextToImageWork._embed

    def watched(work, captions):
        taken.update(captions if not torch.is_grad_enabled() else [])
        return embed(work, captions)

    (held / "metadata.jsonl").write_text(
        "\n".join(json.dumps({"file_name": path.name, "text": path.stem}) for path in sorted(held.glob("*.png")))
    )
    monkeypatch.setattr(TextToImageWork, "_embed", watched)
    train(*words, "train.give_up=0", "steps=1")
    numbers = sorted(int(name) for name in taken if len(name) == 3)
    assert len(taken - {"a"}) >= 64 and numbers[-1] > 120


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda folder: shutil.rmtree(folder), "data.validation: {} does not exist. Give a folder of pictures."),
        (lambda folder: [file.unlink() for file in folder.iterdir()], "data.validation: {} holds no pictures ("),
        (lambda folder: (folder / "1.txt").unlink(), "data.validation: {} has no captions for 1.png."),
        (lambda folder: (folder / "1.png").write_bytes(b"no"), "{}/1.png: "),
    ],
)
def test_what_is_wrong_with_the_folder_is_found_before_anything_is_written(words, held, make, message, capfd, tmp_path):
    make(held)
    assert main(["train", NAME, *words]) == 2
    error = capfd.readouterr().err
    assert message.format(held) in error and "Traceback" not in error and not (tmp_path / "runs").exists()


def test_a_folder_that_goes_while_a_run_waits_is_a_sentence(words, held):
    settings = config.load(NAME, words)
    run = Store(settings.runs).create(settings)
    shutil.rmtree(held)
    with pytest.raises(ConfigError, match=r"data.validation: .* does not exist"):
        execute(TextToImage, settings, run)


def test_validations_need_pictures(short):
    assert TextToImage.check(config.load(NAME, [*short, "train.validate_every=5"])) == [
        "train.validate_every: there is nothing to validate on. Give data.validation, a folder of pictures."
    ]
    with pytest.raises(ConfigError, match="keep: best chooses by validations, and there are none"):
        config.load(NAME, [*short, "train.keep=best"])


def test_pictures_in_both_folders_are_named_whatever_they_are_called(words, held, pictures):
    assert TextToImage.doubts(config.load(NAME, words)) == []
    shutil.copy(pictures / "2.png", held / "other.png")
    (held / "other.txt").write_text("x")
    (doubt,) = TextToImage.doubts(config.load(NAME, words))
    assert f"data.validation: 1 picture of {held} (other.png) is in data.folder too" in doubt


def test_the_pictures_held_out_are_counted_before_a_run(words, held, capfd):
    assert main(["train", NAME, *words, "--dry-run"]) == 0
    assert f"held out for validation: {held}: 2 pictures; captions: 2 from .txt files." in capfd.readouterr().out
