"""Trackers through accelerate: what they get of a run, where it lies, what a resume does, what a failure does not."""

from importlib.util import find_spec

import numpy as np
import pytest
from accelerate.tracking import GeneralTracker
from PIL import Image

from equipoise.errors import ConfigError, InputError
from equipoise.pipelines import config
from equipoise.pipelines.cli import main
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Run, Store
from equipoise.pipelines.text_to_image import TextToImage
from equipoise.pipelines.training.trackers import Trackers, missing

NAME = "text_to_image/dreambooth"


class Kept(GeneralTracker):
    """Keeps in memory what it gets."""

    name, requires_logging_directory = "kept", False

    def __init__(self, fails_at: int = -1):
        super().__init__()
        self.fails_at = fails_at
        self.config, self.metrics, self.images, self.finished = {}, {}, {}, 0

    @property
    def tracker(self):
        return self.metrics

    def start(self):
        if self.fails_at == 0:
            raise OSError("no such service")

    def store_init_configuration(self, values):
        self.config = values

    def log(self, values, step=None, **_):
        if step == self.fails_at:
            raise ConnectionError("the service is gone")
        self.metrics[step] = values

    def log_images(self, values, step=None, **_):
        self.images[step] = values

    def finish(self):
        self.finished += 1


def made(short, *words) -> Run:
    settings = config.load(NAME, [*short, *words])
    return Store(settings.runs).create(settings)


def run_with(short, tracker: Kept, *words) -> Run:
    run = made(short, *words)
    run.watcher = Trackers([tracker], run, config.flat(run.config()))
    assert execute(TextToImage, run.config(), run).state == "done"
    return run


def logged(run: Run):
    """What TensorBoard would show of a run."""
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    found = EventAccumulator(str(run.folder / "trackers" / "equipoise")).Reload()
    return {tag: {event.step: event.value for event in found.Scalars(tag)} for tag in found.Tags()["scalars"]}, found


def test_a_tracker_gets_the_configuration_the_metrics_and_the_pictures(short):
    tracker = Kept()
    run = run_with(short, tracker, "samples.every=3", "samples.prompts=[a vase, a cup]", "samples.count=2")
    assert tracker.config["optimizer.name"] == "scaled_adamw" and tracker.config["samples.prompts"] == (
        '["a vase", "a cup"]'
    )
    assert all(isinstance(value, bool | int | float | str) for value in tracker.config.values())
    assert {step: values["loss"] for step, values in tracker.metrics.items()} == {
        record["step"]: record["loss"] for record in run.metrics()
    }
    assert list(tracker.images) == [3, 6]
    for step, shown in tracker.images.items():
        for prompt in ("00", "01"):
            folder = run.folder / "samples" / f"step-{step:08d}"
            files = [np.asarray(Image.open(file)) for file in sorted(folder.glob(f"{prompt}-*.png"))]
            assert np.array_equal(shown[f"samples/{prompt}"], np.stack(files)) and len(files) == 2


def test_a_tracker_that_fails_does_not_end_the_run(short, capfd):
    tracker = Kept(fails_at=3)
    run = run_with(short, tracker)
    assert list(tracker.metrics) == [1, 2] and len(run.metrics()) == 6
    said = f"trackers: kept failed and gets no more of {run.id}: ConnectionError: the service is gone"
    assert said in (run.folder / "log.txt").read_text() and capfd.readouterr().err.count(said) == 1


def test_a_tracker_that_cannot_start_ends_it_before_the_first_step(short):
    run = made(short)
    run.watcher = Trackers([Kept(fails_at=0)], run, {})
    with pytest.raises(InputError, match=r"trackers: cannot be started: OSError: no such service"):
        execute(TextToImage, run.config(), run)
    assert run.metrics() == [] and run.status().exit_code == 2


def test_a_log_goes_on_where_the_run_does(tmp_path, short):
    pytest.importorskip("tensorboard")
    run = made(short)
    for begin, last in ((0, 5), (3, 6)):  # killed after step 5, and resumed from a checkpoint of step 3
        trackers = Trackers(["tensorboard"], run, {"rate": 0.1, "name": "x"})
        trackers.begin(begin)
        for step in range(begin + 1, last + 1):
            trackers.metrics(step, {"loss": float(10 * begin + step), "word": "left out"})
        trackers.end()
    scalars, _ = logged(run)
    assert scalars == {"loss": {1: 1, 2: 2, 3: 3, 4: 34, 5: 35, 6: 36}}


def test_tensorboard_shows_a_run_that_was_resumed(short, stopped_run):
    pytest.importorskip("tensorboard")
    settings = config.load(NAME, [*short, "trackers=[tensorboard]", "samples.every=2"])
    run = stopped_run(TextToImage, settings, at=3)
    assert execute(TextToImage, settings, run).state == "done" and run.watcher is None
    scalars, found = logged(run)
    for name in ("loss", "rate", "gradient_norm"):
        assert scalars[name] == pytest.approx({r["step"]: r[name] for r in run.metrics()})
    assert [event.step for event in found.Images("samples/00")] == [2, 4, 6]


def test_tensorboard_shows_an_instruction_tuning_that_was_resumed(stopped_run, tmp_path):
    pytest.importorskip("tensorboard")
    words = ["steps=6", "batch=4", "samples.count=2", "samples.max_new_tokens=2", "train.validate_every=3"]
    words += ["trackers=[tensorboard]", f"runs={tmp_path / 'runs'}"]
    settings = config.load("instruction_tuning/demo", words)
    run = stopped_run(InstructionTuning, settings, at=4)
    assert execute(InstructionTuning, settings, run).state == "done"
    scalars, _ = logged(run)
    for name in ("loss", "kappa", "rate_encoder", "rate_language", "val_loss"):
        wanted = {r["step"]: r[name] for r in run.metrics() if name in r}
        assert wanted and scalars[name] == pytest.approx(wanted), name


def test_nothing_is_logged_unless_it_is_asked_for(short):
    run = made(short)
    execute(TextToImage, run.config(), run)
    assert not (run.folder / "trackers").exists()


@pytest.mark.parametrize("name", [NAME, "instruction_tuning/demo", "audio_visual/demo"])
def test_every_pipeline_names_a_tracker_that_is_not_installed(name):
    asked = config.load(name, ["trackers=[tensorboard, wandb]"])
    assert missing([asked, asked]) == [
        f"trackers: {tracker} needs the package {tracker}. pip install {tracker}."
        for tracker in ("tensorboard", "wandb")
        if not find_spec(tracker)
    ]


@pytest.mark.skipif(find_spec("wandb") is not None, reason="wandb is installed")
def test_a_tracker_that_is_not_installed_is_refused_before_anything_is_written(short, capfd, tmp_path):
    assert main(["train", NAME, *short, "trackers=[wandb]"]) == 2
    assert "trackers: wandb needs the package wandb. pip install wandb." in capfd.readouterr().err
    assert not (tmp_path / "runs").exists()
    assert main(["train", NAME, *short, "trackers=[tensorboart]"]) == 2
    assert "trackers" in (error := capfd.readouterr().err) and "tensorboard" in error


@pytest.mark.parametrize("name", ["mlflow", "trackio"])
def test_those_that_keep_their_logs_elsewhere_are_refused_before_the_run(name, short):
    with pytest.raises(ConfigError, match=f"trackers.0: must be 'tensorboard' or 'wandb', got '{name}'"):
        made(short, f"trackers=[{name}]")
