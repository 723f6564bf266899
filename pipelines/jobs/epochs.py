"""`train.epochs` as steps, once it is known how many examples there are; what is trained has steps alone."""

import math

from equipoise import registry
from equipoise.errors import ConfigError
from equipoise.pipelines import config as configs
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.config.sections import TrainSection
from equipoise.pipelines.training import processes

_COUNTED = ("train.epochs", "train.batch", "train.accumulate", "data")  # what the number of steps depends on


def in_steps(config: RunConfig) -> tuple[RunConfig, list[str]]:
    """A configuration that has steps in place of epochs, and a sentence on how many; others as they are.

    Raises:
        ConfigError: the pipeline does not know its examples, or the cells of a sweep have other numbers of steps.
    """
    train = getattr(config, "train", None)
    if not isinstance(train, TrainSection) or train.epochs is None:
        return config, []
    axes = [config.SHORT.get(axis, axis) for axis in config.sweep]
    if varied := [axis for axis in axes for key in _COUNTED if axis == key or axis.startswith(f"{key}.")]:
        raise ConfigError([f"train.epochs: means other steps for each value of {varied[0]}. Give steps in its place."])
    examples = registry.load("pipelines", config.pipeline).examples(config)
    if examples is None:
        raise ConfigError([f"train.epochs: {config.pipeline} does not say how many examples it has. Give train.steps."])
    each = train.batch * train.accumulate * processes.count()
    steps = max(1, math.ceil(train.epochs * examples / each))
    made = configs.set_keys(config, {"train.steps": steps, "train.epochs": None})
    return made, [f"train.epochs: {train.epochs:g} of {examples:,} examples, {each} a step, are {steps:,} steps."]
