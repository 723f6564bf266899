"""What is wrong with what would be started: one answer for `--dry-run`, the page's Check, and the start itself."""

from collections.abc import Callable, Iterable

from equipoise import registry
from equipoise.errors import ConfigError
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import RATE
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.pipeline import Pipeline


def check(runs: Iterable[RunConfig]) -> None:
    """Refuses what could not be trained. Nothing is written but a pipeline's own cache of what it read.

    Args:
        runs: one run, or all cells of a sweep.

    Raises:
        ConfigError: a pipeline's check found problems, one line each.
    """
    if problems := _found(runs, lambda pipeline, config: pipeline.check(config)):
        raise ConfigError(problems)


def doubts(runs: Iterable[RunConfig]) -> list[str]:
    """What of these runs may be meant but is unlikely to work, one sentence each."""
    return _found(runs, lambda pipeline, config: pipeline.doubts(config))


@registry.looked_up_once()
def _found(runs: Iterable[RunConfig], ask: Callable[[type[Pipeline], RunConfig], list[str]]) -> list[str]:
    """The answers of the runs' pipelines, each once."""
    # The world does not depend on rate and seed, and looking at it may mean decoding every picture.
    worlds = {
        repr([item for item in configs.flat(config).items() if item[0] not in ("seed", RATE)]): config
        for config in runs
    }
    answers = (ask(registry.load("pipelines", config.pipeline), config) for config in worlds.values())
    return list(dict.fromkeys(line for lines in answers for line in lines))
