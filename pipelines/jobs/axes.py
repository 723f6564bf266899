"""The axes of a sweep: their words on the command line, the cells they span, and the cells' names."""

import hashlib
import itertools
import math
import re
from collections.abc import Sequence
from typing import Any

from equipoise.errors import ConfigError
from equipoise.pipelines import config as configs
from equipoise.pipelines.config.keys import show
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.runs.store import LONGEST
from equipoise.registry import looked_up_once

MOST = 10_000  # cells of a sweep


def parse_axes(words: Sequence[str]) -> dict[str, list[Any]]:
    """`key=value,value,…` words as axes; values are written as in YAML, and a YAML list keeps its commas.

    Raises:
        ConfigError: a word is not of that form.
    """
    axes: dict[str, list[Any]] = {}
    problems = []
    for word in words:
        key, sign, text = word.partition("=")
        if not sign or not key or not text:
            problems.append(f"--axis {word}: is not of the form key=value,value, such as learning_rate=1e-4,1e-3.")
        elif key in axes:
            problems.append(f"--axis {word}: there is an axis {key} already. Give all its values in one.")
        elif text.startswith("["):
            value = configs.parse_value(text)
            axes[key] = value if isinstance(value, list) else [value]
        else:
            axes[key] = [configs.parse_value(part) for part in text.split(",")]
    if problems:
        raise ConfigError(problems)
    return axes


@looked_up_once()
def expand(config: RunConfig) -> dict[str, RunConfig]:
    """Every cell's name and configuration.

    Raises:
        ConfigError: there is no axis, an axis is empty, or a combination is not valid (all such are named at once).
    """
    if not config.sweep:
        raise ConfigError(
            ["sweep: has no axes. Give some: --axis learning_rate=1e-4,1e-3, or a section `sweep` in the file."]
        )
    if (count := math.prod(map(len, config.sweep.values()))) > MOST:
        raise ConfigError(
            [f"sweep: has {show(count)} cells, and {MOST} are the most. Give fewer values or fewer axes."]
        )
    if "runs" in config.sweep:
        raise ConfigError(["sweep: runs: is no axis; all cells of a sweep are kept in one folder. Leave it out."])
    cells: dict[str, RunConfig] = {}
    problems: list[str] = []
    for values in itertools.product(*config.sweep.values()):
        chosen = dict(zip(config.sweep, values, strict=True))
        name = _name(chosen)
        try:
            cell = configs.set_keys(config, {**chosen, "sweep": {}}, source=f"cell {name}")
        except ConfigError as error:
            problems += error.problems
            continue
        if name in cells and cells[name] == cell:
            problems.append(f"sweep: {name} comes up twice; every value of an axis must be another one.")
        cells[_marked(name, chosen) if name in cells else name] = cell
    if problems:
        raise ConfigError(list(dict.fromkeys(problems)))
    return cells


def _name(chosen: dict[str, Any]) -> str:
    name = ",".join(f"{key.split('.')[-1]}={_slug(value)}" for key, value in chosen.items())
    return name if len(name) <= LONGEST else _marked(name, chosen)


def _marked(name: str, chosen: dict[str, Any]) -> str:
    """A name that is too long, or another combination's too, told apart by a digest of all values."""
    digest = hashlib.sha256(repr(chosen).encode()).hexdigest()[:8]
    return f"{name[: LONGEST - 9]}-{digest}"


def _slug(value: Any) -> str:
    """A value as part of a folder's name: a plugin with options reads scaled_adamw+damping=0.01."""
    if isinstance(value, dict):
        inner = {**value, **value.get("options", {})}
        inner.pop("options", None)
        name = inner.pop("name", "")
        return "+".join(part for part in (str(name), *(f"{k}={_slug(v)}" for k, v in inner.items())) if part)
    text = f"{value:g}" if isinstance(value, float) else str(value)
    return re.sub(r"[^A-Za-z0-9_.+=-]+", "_", text)[:60] or "_"
