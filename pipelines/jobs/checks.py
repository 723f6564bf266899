"""What is wrong with what would be started: one answer for `--dry-run`, the page's Check, and the start itself."""

from collections.abc import Callable, Iterable
from contextlib import suppress
from typing import Any

from equipoise import registry
from equipoise.errors import ConfigError
from equipoise.hosts.choice import SMALL
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import RATE
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.config.sections import OptimizerSection, own_rates
from equipoise.pipelines.pipeline import Pipeline
from equipoise.pipelines.training.trackers import missing


@registry.looked_up_once()
def check(runs: Iterable[RunConfig]) -> None:
    """Refuses what could not be trained. Nothing is written but a pipeline's own cache of what it read.

    Args:
        runs: one run, or all cells of a sweep.

    Raises:
        ConfigError: an optimizer refuses its options, a tracker is not installed, or a pipeline's check found
            problems, one line each.
    """
    runs = list(runs)
    found = _found(runs, lambda pipeline, config: pipeline.check(config))
    if problems := [*_refused_options(runs), *missing(runs), *found]:
        raise ConfigError(problems)


@registry.looked_up_once()
def doubts(runs: Iterable[RunConfig]) -> list[str]:
    """What of these runs may be meant but is unlikely to work, one sentence each."""
    runs = list(runs)
    return [*_small_rates(runs), *_found(runs, lambda pipeline, config: pipeline.doubts(config))]


def _small_rates(runs: Iterable[RunConfig]) -> list[str]:
    """Where an optimizer says which learning rate it wants, and has none near it, as a file's for another optimizer."""
    largest: dict[str, float] = {}
    for section in (getattr(config, "optimizer", None) for config in runs):
        if isinstance(section, OptimizerSection):
            largest[section.name] = max(section.learning_rate, largest.get(section.name, 0.0))
    wanted = {name: _own_rate(name) for name in largest}
    return [
        f"optimizer.learning_rate: {rate:g} is small for {name}, whose own is {wanted[name]:g}; `learning_rate=` "
        "leaves it to the optimizer."
        for name, rate in largest.items()
        if rate < SMALL * wanted[name]
    ]


def _own_rate(name: str) -> float:
    with suppress(ValueError):  # the start says that it is none
        return own_rates(name, registry.load("optimizers", name)).get("learning_rate", 0.0)
    return 0.0


def _refused_options(runs: Iterable[RunConfig]) -> list[str]:
    """What optimizers say of options that are valid one by one, such as a trust beyond the reach."""
    sections = [getattr(config, "optimizer", None) for config in runs]
    chosen = {
        repr((section.name, section.options)): section
        for section in sections
        if isinstance(section, OptimizerSection) and section.options
    }
    return [f"optimizer.options: {refusal}" for section in chosen.values() if (refusal := _refusal(section))]


def _refusal(section: OptimizerSection) -> str:
    from torch import nn

    def build(options: dict[str, Any]) -> None:
        factors = {f"lora_{side}.weight": nn.Linear(2, 2, bias=False).weight for side in "AB"}
        registry.load("optimizers", section.name)([{"params": list(factors.items())}], lr=1e-3, **options)

    try:
        build(section.options)
    except Exception as error:  # torch raises RuntimeError of options, and a plugin's class may raise anything
        try:
            build({})
        except Exception:
            return ""  # it wants something else than these factors, or needs an option: the run will tell
        return f"{section.name}: {error}"
    return ""


def _found(runs: Iterable[RunConfig], ask: Callable[[type[Pipeline], RunConfig], list[str]]) -> list[str]:
    """The answers of the runs' pipelines, each once."""
    # The world does not depend on rate and seed, and looking at it may mean decoding every picture.
    worlds = {
        repr([item for item in configs.flat(config).items() if item[0] not in ("seed", RATE)]): config
        for config in runs
    }
    answers = (ask(registry.load("pipelines", config.pipeline), config) for config in worlds.values())
    return list(dict.fromkeys(line for lines in answers for line in lines))
