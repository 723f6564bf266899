"""A learning rate that is left empty is the optimizer's own, or else the pipeline's; one that is given wins."""

import json
from pathlib import Path

import pytest

from equipoise.errors import ConfigError
from equipoise.pipelines import config as configs
from equipoise.pipelines.cli import main
from equipoise.pipelines.comparing.comparison import lay_out
from equipoise.pipelines.jobs import checks, sweep
from equipoise.pipelines.jobs.axes import expand
from equipoise.pipelines.runs.store import Store

USUAL = {"text_to_image": 1e-4, "instruction_tuning": 1e-4, "audio_visual": 1e-3}
CALM = """
import torch

class Calm(torch.optim.SGD):
    default_lr = 0.25

class Hasty(torch.optim.SGD):
    default_lr = "much"
"""


@pytest.fixture
def calm(distribution):
    """A third party's optimizers, of which one says what learning rate it wants, and one says nonsense."""
    distribution("calm", {"equipoise.optimizers": {"calm": "calm:Calm", "hasty": "calm:Hasty"}}, calm=CALM)


def bare(pipeline: str, *words: str):
    """A configuration that gives nothing but what it must."""
    Path("bare.yaml").write_text(f"pipeline: {pipeline}\nname: bare\n")
    return configs.load("bare.yaml", words)


def rates(config) -> tuple[float, float | None]:
    return config.optimizer.learning_rate, config.optimizer.outside_learning_rate


@pytest.fixture(autouse=True)
def elsewhere(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("EQUIPOISE_RUNS", raising=False)


@pytest.mark.parametrize("pipeline", USUAL)
@pytest.mark.parametrize("empty", [(), ("learning_rate=",), ("optimizer.learning_rate=null",)])
def test_an_empty_rate_is_the_optimizers_own_or_else_the_pipelines(pipeline, empty):
    assert rates(bare(pipeline, "optimizer=bounded_adamw", *empty)) == (1.0, 1e-3)
    for name in ("adamw", "scaled_adamw", "sgd"):
        assert rates(bare(pipeline, f"optimizer={name}", *empty)) == (USUAL[pipeline], None)


@pytest.mark.parametrize("pipeline", USUAL)
def test_a_rate_that_is_given_wins(pipeline):
    name = "optimizer=bounded_adamw"
    assert rates(bare(pipeline, name, "learning_rate=1e-4")) == (1e-4, None)
    assert rates(bare(pipeline, name, "learning_rate=1")) == (1.0, None), "all else has it too, as in BoundedAdamW"
    assert rates(bare(pipeline, name, "optimizer.outside_learning_rate=0.1")) == (1.0, 0.1)
    assert rates(bare(pipeline, "optimizer.outside_learning_rate=0.1")) == (USUAL[pipeline], 0.1)


@pytest.mark.parametrize("name", ["text_to_image/dreambooth", "text_to_image/flux"])
def test_configurations_for_ones_own_data_leave_the_rate_to_the_optimizer(name):
    assert rates(configs.load(name)) == (1e-4, None)
    assert rates(configs.load(name, ["optimizer=bounded_adamw"])) == (1.0, 1e-3)


def test_a_dump_holds_the_numbers_and_one_as_given_the_emptiness():
    config = bare("text_to_image", "optimizer=bounded_adamw")
    for text, found in ((configs.dump(config), frozenset()), (configs.dump(config, as_given=True), {*KEYS})):
        Path("again.yaml").write_text(text)
        again = configs.load("again.yaml")
        assert again == config and again.optimizer.left_empty == found
    assert {key: configs.flat(config)[f"optimizer.{key}"] for key in KEYS} == {KEYS[0]: 1.0, KEYS[1]: 1e-3}
    assert {configs.flat(config, as_given=True)[f"optimizer.{key}"] for key in KEYS} == {None}


KEYS = ("learning_rate", "outside_learning_rate")


def test_another_optimizer_brings_its_own_rate_unless_one_was_given():
    config = bare("text_to_image", "optimizer=bounded_adamw")
    assert rates(configs.set_keys(config, {"optimizer": "adamw"})) == (1e-4, None)
    assert rates(configs.set_keys(config, {"seed": 3})) == (1.0, 1e-3)
    given = bare("text_to_image", "optimizer=adamw", "learning_rate=1e-4")
    given = configs.set_keys(given, {"optimizer": "bounded_adamw"})
    assert rates(given) == (1e-4, None)
    assert rates(configs.set_keys(given, {"learning_rate": None})) == (1.0, 1e-3)


def test_each_cell_of_a_sweep_has_the_rate_of_its_optimizer_and_stores_it(capsys):
    words = ["data=demo", "model=demo", "sweep={optimizer: [adamw, {name: bounded_adamw, options: {reach: 0.3}}]}"]
    config = bare("text_to_image", "samples.prompts=[]", *words)
    assert [rates(cell) for cell in expand(config).values()] == [(1e-4, None), (1.0, 1e-3)]
    made = Store("runs").create(config, kind="sweep", id="swept", cells=expand(config))
    cells = sweep.cells(made)
    assert [cell.status().learning_rate for cell in cells] == [1e-4, 1.0]
    assert [rates(cell.config()) for cell in cells] == [(1e-4, None), (1.0, 1e-3)]
    assert not any(cell.config().optimizer.left_empty & {"learning_rate"} for cell in cells)
    assert expand(made.config()) == expand(config), "what is made anew of a stored sweep is the same"
    Path("swept.yaml").write_text(configs.dump(config, as_given=True))
    assert main(["sweep", "swept.yaml", "--dry-run"]) == 0
    out, err = capsys.readouterr()
    assert "  learning_rate: null\n" in out
    assert "optimizer.learning_rate: is left empty, which means 0.0001 for adamw, 1 for bounded_adamw.\n" in err


def test_a_dry_run_shows_the_number_and_what_it_prints_trains_the_same(capsys):
    assert (
        main(["train", "text_to_image/dreambooth", "model=demo", "data=demo", "optimizer=bounded_adamw", "--dry-run"])
        == 0
    )
    out = capsys.readouterr().out
    assert "  learning_rate: 1.0\n  outside_learning_rate: 0.001\n" in out
    Path("again.yaml").write_text(out)
    assert rates(configs.load("again.yaml")) == (1.0, 1e-3)


def test_a_third_partys_optimizer_says_what_it_wants_in_one_attribute(calm, capsys):
    assert rates(bare("text_to_image", "optimizer=calm")) == (0.25, None)
    assert rates(bare("text_to_image", "optimizer=calm", "learning_rate=0.5")) == (0.5, None)
    assert main(["show", "calm"]) == 0
    assert "In a pipeline, where none is given: learning rate 0.25.\n" in capsys.readouterr().out
    assert main(["show", "--json", "bounded_adamw"]) == 0
    assert json.loads(capsys.readouterr().out)["rates"] == {"learning_rate": 1.0, "outside_learning_rate": 1e-3}


def test_an_attribute_that_is_no_rate_is_refused_in_a_sentence(calm, capsys):
    said = "hasty cannot be used: its default_lr must be a number above 0, got 'much'."
    with pytest.raises(ConfigError) as refused:
        bare("text_to_image", "optimizer=hasty")
    assert refused.value.problems == [f"command line: optimizer: {said}"]
    assert rates(bare("text_to_image", "optimizer=hasty", "learning_rate=0.5")) == (0.5, None), "nobody asks it"
    assert main(["show", "hasty"]) == 2 and capsys.readouterr().err == f"{said}\n"


def test_a_rate_far_below_the_optimizers_own_is_doubted_where_no_cell_has_another():
    """As that of a file for another optimizer; but to try it beside others is what a sweep is for."""
    said = (
        "optimizer.learning_rate: 0.005 is small for bounded_adamw, whose own is 1; `learning_rate=` leaves it to the "
        "optimizer."
    )

    def doubts(*words: str) -> list[str]:
        config = configs.load("text_to_image/demo", words)
        return [
            line for line in checks.doubts(expand(config).values() if config.sweep else [config]) if "small" in line
        ]

    bounded = ("sweep={}", "optimizer=bounded_adamw")
    assert doubts(*bounded) == [said]
    assert doubts(*bounded, "learning_rate=") == doubts(*bounded, "learning_rate=0.1") == doubts("sweep={}") == []
    assert doubts("sweep={optimizer: [adamw, bounded_adamw]}") == [said] and doubts() == []


def test_rows_are_not_told_apart_by_what_follows_from_the_optimizer():
    bounded, adamw = (bare("text_to_image", f"optimizer={name}") for name in ("bounded_adamw", "adamw"))
    assert [place[:2] for place in lay_out([bounded, adamw])] == [("bounded_adamw", 1.0), ("adamw", 1e-4)]
    for both in (1.0, 0.1):
        given = configs.set_keys(bounded, {"learning_rate": both})
        labels = [label for label, *_ in lay_out([bounded, given, adamw])]
        assert labels[:2] == [f"bounded_adamw outside_learning_rate={value}" for value in (0.001, None)]
