"""A run whose loss leads nowhere is given up, with its reason; in a sweep the others go on."""

import pytest

from equipoise.pipelines import config
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.text_to_image import TextToImage

NAME = "text_to_image/dreambooth"
WORDS = [
    "optimizer=adamw",
    "steps=30",
    "samples.prompts=[]",
    "lora.targets=[conv_out]",
]  # nothing normalises what it says


def test_a_high_loss_ends_a_run_also_after_a_resume_and_not_where_it_is_wanted(short):
    words = [*short, *WORDS, "learning_rate=10"]
    settings = config.load(NAME, words)
    store, ended = Store(settings.runs), []
    for stop in (False, True):
        run = store.create(settings)
        if stop:
            told = type(run).metric

            def metric(step, run=run, told=told, **values):
                told(run, step, **values)
                if step == 10:
                    run.request("stop")

            run.metric = metric
            assert execute(TextToImage, settings, run).state == "stopped"
            del run.metric
        ended.append(execute(TextToImage, settings, run))
    assert ended[0] == ended[1] and ended[0].state == "diverged"
    step = ended[0].step
    assert step is not None and 20 <= step < 30
    losses = [record["loss"] for record in run.metrics()]
    mean = sum(losses[-20:]) / 20
    assert len(losses) == step and f"the mean loss of 20 steps, {mean:.3g}, was more than 4 times" in ended[0].message
    assert f"at step {step + 1} of 30" in ended[0].message
    settings = config.load(NAME, [*words, "train.give_up=0"])
    assert execute(TextToImage, settings, store.create(settings)).state == "done"


def test_one_cell_of_a_sweep_is_given_up_and_says_why(short):
    words = [*short, *WORDS, "steps=25"]
    axes = {"sweep": {"optimizer.learning_rate": [1e-4, 10]}}
    made = sweeps.create(config.set_keys(config.load(NAME, words), axes))
    sweeps.work(str(made.folder))
    good, bad = sweeps.cells(made)
    assert good.status().state == "done" and bad.status().state == "diverged"
    assert bad.status().step < 25 and "times the untouched base's" in bad.status().message
    assert (bad.folder / "result" / "result.json").is_file() and good.status().step == 25


@pytest.mark.parametrize("bad", ["-1", "nan"])
def test_the_limit_has_bounds(bad):
    with pytest.raises(Exception, match=r"train\.give_up"):
        config.load(NAME, [f"train.give_up={bad}"])
