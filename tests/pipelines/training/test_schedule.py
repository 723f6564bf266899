"""Every schedule follows its formula, whatever the optimizer, and no option is dropped."""

import math

import pytest
import torch

from equipoise.errors import ConfigError
from equipoise.pipelines import config
from equipoise.pipelines.config.sections import ScheduleSection
from equipoise.pipelines.training.schedule import make_schedule

STEPS = 20
FORMULAS = {
    "constant": ({}, lambda n: 1),
    "constant_with_warmup": ({"warmup": 5}, lambda n: min(1, n / 5)),
    "linear": ({"warmup": 5}, lambda n: n / 5 if n < 5 else (20 - n) / 15),
    "cosine": ({}, lambda n: (1 + math.cos(math.pi * n / 20)) / 2),
    "cosine_with_restarts": ({"cycles": 2}, lambda n: (1 + math.cos(math.pi * (n % 10) / 10)) / 2 if n < 20 else 0),
    "polynomial": ({"power": 2.0, "warmup": 5}, lambda n: n / 5 if n < 5 else ((20 - n) / 15) ** 2),
    "inverse_sqrt": ({"warmup": 4}, lambda n: n / 4 if n < 4 else 1 / math.sqrt(n - 3)),
    "piecewise_constant": ({"rules": "1:3,0.5:10,0.1"}, lambda n: 1 if n < 3 else 0.5 if n < 10 else 0.1),
}


def rates(optimizer=torch.optim.SGD, rate=0.1, **options) -> list[float]:
    made = optimizer([{"params": [torch.nn.Parameter(torch.zeros(1))], "lr": rate}])
    schedule = make_schedule(ScheduleSection(**options), made, STEPS)
    seen = []
    for _ in range(STEPS + 1):
        seen.append(schedule.get_last_lr()[0])
        made.step()
        schedule.step()
    return seen


@pytest.mark.parametrize("name", FORMULAS)
@pytest.mark.parametrize("optimizer", [torch.optim.SGD, torch.optim.AdamW])
@pytest.mark.parametrize("rate", [0.1, 1e-9])
def test_formulas(name, optimizer, rate):
    options, formula = FORMULAS[name]
    expected = [rate * formula(step) for step in range(STEPS + 1)]
    assert rates(optimizer, rate, name=name, **options) == pytest.approx(expected, rel=1e-6, abs=rate * 1e-6)


def test_every_schedule_is_covered():
    assert set(FORMULAS) == set(ScheduleSection.model_fields["name"].annotation.__args__)


def test_cosine_reads_its_cycles():
    assert rates(name="cosine", cycles=2)[10] == pytest.approx(0, abs=1e-9)
    assert rates(name="cosine", cycles=2)[20] == pytest.approx(0.1)


def test_a_warm_up_as_long_as_the_run():
    assert rates(name="polynomial", warmup=STEPS)[-1] == 0.1


@pytest.mark.parametrize(
    ("overrides", "message"),
    [
        (["schedule=piecewise_constant"], "piecewise_constant needs schedule.rules, such as"),
        (
            ["schedule=piecewise_constant", "schedule.rules=abc"],
            "schedule.rules: must be factor:until step, … with rising steps, and a last factor",
        ),
        (["schedule=piecewise_constant", "schedule.rules=1:10"], "got 1:10"),
        (["schedule=piecewise_constant", "schedule.rules=1:10,1:5,0"], "got 1:10,1:5,0"),
        (["schedule=piecewise_constant", "schedule.rules=1:10,nan"], "got 1:10,nan"),
        (["schedule=cosine_with_restarts", "schedule.cycles=1.5"], "schedule.cycles: must be a whole number"),
        (["schedule.warmup=5"], "schedule.warmup: has no effect on the schedule constant, only on constant_with"),
        (["schedule=linear", "schedule.cycles=3"], "schedule.cycles: has no effect on the schedule linear"),
        (["schedule=cosine", "schedule.power=2"], "schedule.power: has no effect on the schedule cosine"),
        (["schedule=cosine", "schedule.rules=1:10,0"], "schedule.rules: has no effect on the schedule cosine"),
    ],
)
def test_what_cannot_work_is_said(overrides, message):
    with pytest.raises(ConfigError) as caught:
        config.load("text_to_image/dreambooth", overrides)
    assert message in str(caught.value) and len(caught.value.problems) == 1


def test_a_run_that_goes_on_for_longer_has_the_longer_schedule_from_its_next_step(short, stopped_run):
    from equipoise.pipelines import config
    from equipoise.pipelines.pipeline import execute
    from equipoise.pipelines.text_to_image import TextToImage

    words = [*short, "schedule=cosine", "learning_rate=1e-3", "samples.prompts=[]"]
    settings = config.load("text_to_image/dreambooth", words)
    run = stopped_run(TextToImage, settings, at=4)
    run.forget_requests()
    longer = config.load("text_to_image/dreambooth", [*words, "steps=16"])
    assert execute(TextToImage, longer, run).state == "done"
    seen = [record["rate"] for record in run.metrics()]
    wanted = [5e-4 * (1 + math.cos(math.pi * n / (6 if n < 4 else 16))) for n in range(16)]
    assert seen == pytest.approx(wanted)
