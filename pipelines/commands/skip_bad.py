"""`--skip-bad` of `train` and `sweep`: training goes on without the data that cannot be used, where a pipeline can."""

import argparse
from typing import Any

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.config.keys import section_at

KEY = "data.skip_bad"  # what it sets; a pipeline can where its record has this key


class SkipBad(argparse.Action):
    """The option. Its help names the pipelines that have it, which are loaded only when somebody asks for the help."""

    def __init__(self, option_strings: list[str], dest: str):
        super().__init__(option_strings, dest, nargs=0, default=False)

    def __call__(self, parser: Any, namespace: argparse.Namespace, values: Any, option_string: str | None = None):
        setattr(namespace, self.dest, True)

    @property
    def help(self) -> str:
        return f"Leave out the data that cannot be used, and say which ({KEY}; pipelines that can: {_able()})."

    @help.setter
    def help(self, given: str | None) -> None: ...


def overrides(args: argparse.Namespace) -> list[str]:
    """What the option stands for.

    Raises:
        InputError: the configuration's pipeline has no such key.
    """
    if not args.skip_bad:
        return []
    cls = configs.config_class(args.config)
    if not _has(cls):
        name = next((name for name, other in _records().items() if other is cls), args.config)
        raise InputError(
            f"--skip-bad: the pipeline {name} leaves no data out; pipelines that can: {_able()}. Repair or remove what "
            "cannot be used."
        )
    return [f"{KEY}=true"]


def _records() -> dict[str, type[configs.RunConfig]]:
    """The record of each pipeline that can be loaded."""
    entries = [entry for entry in registry.entries("pipelines") if not registry.check(entry)]
    return {entry.name: registry.load("pipelines", entry.name).Config for entry in entries}


def _able() -> str:
    return ", ".join(name for name, cls in _records().items() if _has(cls)) or "none"


def _has(cls: type[configs.RunConfig]) -> bool:
    section, _, key = KEY.partition(".")
    data = section_at(cls, section)
    return data is not None and key in data.model_fields
