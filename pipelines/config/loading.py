"""Configurations: typed records, with YAML as their face.

A pipeline's `Config` is a `RunConfig` made of `Section`s. `load` reads a YAML file (or a shipped one by name), lays
`key=value` overrides over it, and reports everything that is wrong at once, each with its source and key.
"""

import difflib
import os
import re
import sys
from collections.abc import Iterable, Iterator, Mapping
from pathlib import Path
from typing import Any, NamedTuple

from pydantic import BaseModel, ValidationError

from equipoise.errors import ConfigError, EquipoiseError, InputError
from equipoise.pipelines.config import format, yamlio
from equipoise.pipelines.config.builtin import shipped
from equipoise.pipelines.config.keys import explain, section_at, show
from equipoise.pipelines.config.records import RunConfig, Section, trusting_options
from equipoise.registry import load as load_plugin
from equipoise.registry import looked_up_once

COMMAND_LINE = "command line"
DEEPEST = 32  # parts of a dotted key
_UNWRITABLE = re.compile("[\0\ud800-\udfff]")  # no file's name and no text holds any of these


class _Given(NamedTuple):
    value: Any
    source: str


@looked_up_once()  # as every plugin's name and options ask what is installed
def load(source: str | Path, overrides: Iterable[str] = ()) -> Any:
    """Read a configuration.

    Args:
        source: a YAML file's path, or the name of a shipped configuration such as "text_to_image/dreambooth".
        overrides: `key=value` words; a key is a dotted path or a short name, a value is written as in YAML.

    Returns:
        An instance of the pipeline's `Config`.

    Raises:
        ConfigError: everything that is wrong, one line each.
        InputError: there is no such configuration.
    """
    label, data = _read(source)
    cls = _pipeline_config(label, data, overrides := list(overrides))
    problems: list[str] = []
    given: dict[str, _Given] = {}
    for key, value in _spread(cls, data):
        if key in given:
            problems.append(f"{label}: {key}: is given twice, once under its short name; keep one of them.")
        given[key] = _Given(value, label)
    for word in overrides:
        key, sign, text = word.partition("=")
        if not sign or not key.strip():
            problems.append(f"{COMMAND_LINE}: {word}: is not of the form key=value, such as train.steps=100.")
            continue
        key = key.strip()
        if not text.strip():  # `data=` is an empty path, and no section that is left as it is
            key = cls.SHORT.get(key, key)
        for dotted, value in _spread(cls, {key: parse_value(text)}):
            _put(given, dotted, value, COMMAND_LINE)
    return _validated(cls, given, label, problems)


@looked_up_once()
def set_keys(config: RunConfig, values: Mapping[str, Any], source: str = "set_keys") -> Any:
    """A copy of `config` with other values (dotted keys or short names), checked anew; `source` names them in errors.

    Raises:
        ConfigError: everything that is wrong, one line each.
    """
    given: dict[str, _Given] = {}
    for data, label in ((_plain(config, as_given=True), "config"), (values, source)):
        for dotted, value in _spread(type(config), data):
            _put(given, dotted, value, label)
    return _validated(type(config), given, "config", [])


def dump(config: RunConfig, as_given: bool = False) -> str:
    """The whole configuration as YAML, defaults included, so that it can be replayed.

    Args:
        as_given: what was left empty stays empty, as in a sweep, whose cells have a value each.
    """
    return yamlio.render({format.KEY: format.FORMAT, **_plain(config, as_given)})


def flat(config: RunConfig, as_given: bool = False) -> dict[str, Any]:
    """Every key's value by its dotted path, as plain data; `as_given`: None where it was left empty."""
    return dict(_spread(type(config), _plain(config, as_given)))


def _plain(section: Section, as_given: bool) -> dict[str, Any]:
    data = section.model_dump(mode="json")
    if as_given:
        data |= dict.fromkeys(section.left_empty)
        data |= {name: _plain(value, as_given) for name, value in section if isinstance(value, Section)}
    return data


def config_class(source: str | Path) -> type[RunConfig]:
    """The record that `source` is written for, whatever else it lacks.

    Raises:
        ConfigError, InputError: as `load`.
    """
    return _pipeline_config(*_read(source), [])


def _read(source: str | Path) -> tuple[str, dict]:
    """What to call the source in messages, and the mapping in it."""
    text = str(source)
    if os.path.isdir(text):
        inside = (
            f"; the run in it can be repeated with {text}/config.yaml" if (Path(text) / "config.yaml").is_file() else ""
        )
        raise InputError(f"{text}: is a folder, not a YAML file{inside}.")
    try:
        if os.path.exists(text):
            with open(text, "rb") as file:
                raw = file.read(yamlio.LIMIT + 1)
        elif item := shipped().get(text.removesuffix(".yaml")):
            raw = item.read_bytes()
        else:
            raise InputError(_not_found(text))
    except OSError as error:
        raise InputError(f"{text}: cannot be read: {error.strerror or error}.") from error
    if len(raw) > yamlio.LIMIT:
        raise ConfigError([f"{text}: is larger than {yamlio.LIMIT // 1000} kB, which no configuration is."])
    try:
        data = yamlio.parse(raw.decode("utf-8-sig"))
    except UnicodeDecodeError:
        raise ConfigError([f"{text}: is not a text file in UTF-8; a configuration is written in YAML."]) from None
    except ValueError as error:
        raise ConfigError([f"{text}: {error}."]) from None
    if data is None:
        raise ConfigError([f"{text}: is empty. `equipoise train NAME --dry-run` shows what a complete one looks like."])
    if not isinstance(data, dict):
        raise ConfigError([f"{text}: must be lines of `key: value`, got {show(data)}."])
    try:
        format.check_format(data.pop(format.KEY, 1), text)
    except ValueError as error:
        raise ConfigError([f"{text}: {error}."]) from None
    return text, {str(key): value for key, value in data.items()}


def _not_found(text: str) -> str:
    names = shipped()
    wanted = text.removesuffix(".yaml").removeprefix("./").removeprefix("configs/")
    close = difflib.get_close_matches(wanted, names, 3, 0.5) or [n for n in names if n.split("/")[-1] == wanted]
    hint = f"Did you mean {_words(close)}?" if close else f"Shipped are: {_words(names) or 'none'}."
    return f"{text}: is neither a file nor the name of a shipped configuration. {hint}"


def _pipeline_config(label: str, data: Mapping[str, Any], overrides: list[str]) -> type[RunConfig]:
    chosen = [(label, data.get("pipeline"))] + [
        (COMMAND_LINE, word.partition("=")[2]) for word in overrides if word.startswith("pipeline=")
    ]
    where, name = chosen[-1]
    if not isinstance(name, str) or not name:
        got = "is required" if name is None else f"must be a pipeline's name, got {show(name)}"
        raise ConfigError([f"{where}: pipeline: {got}; `equipoise list pipelines` shows all."])
    try:
        cls = load_plugin("pipelines", name).Config
    except InputError as error:
        raise ConfigError([f"{where}: pipeline: {error}"]) from error
    if not (isinstance(cls, type) and issubclass(cls, RunConfig)):
        raise EquipoiseError(f"The pipeline {name!r} is broken: its Config must be a RunConfig, got {cls!r}.")
    return cls


def parse_value(text: str) -> Any:
    """The value of a `key=value` word: YAML where that is a number, a truth value, nothing, or bracketed; else text."""
    try:
        value = yamlio.parse(text)
    except ValueError:
        return text
    return value if text.lstrip()[:1] in ("[", "{", "'", '"') or not isinstance(value, str | list | dict) else text


def _spread(cls: type[RunConfig], data: Mapping[str, Any], prefix: str = "") -> Iterator[tuple[str, Any]]:
    """Dotted keys and values of nested `data`, short names resolved, sections opened, other mappings left whole."""
    for key, value in data.items():
        dotted = f"{prefix}{key}"
        section = section_at(cls, dotted)
        if not prefix and key in cls.SHORT and not (section and isinstance(value, dict | None)):
            dotted, section = cls.SHORT[key], None
        if section and isinstance(value, dict):
            yield from _spread(cls, {str(k): v for k, v in value.items()}, f"{dotted}.")
        elif not (section and value is None):  # a section whose keys are all commented out
            yield dotted, value


def _put(given: dict[str, _Given], key: str, value: Any, source: str) -> None:
    for below in [other for other in given if other.startswith(f"{key}.")]:
        del given[below]
    given[key] = _Given(value, source)


def _validated(cls: type[RunConfig], given: Mapping[str, _Given], label: str, problems: list[str]) -> Any:
    tree: dict[str, Any] = {}
    for key, (value, source) in given.items():
        *parents, last = key.split(".")
        if len(parents) >= DEEPEST:
            problems.append(f"{source}: {show(key)}: unknown key: it has {len(parents)} dots.")
            continue
        node = tree
        for part in parents:
            below = node.get(part)
            node[part] = node = dict(below) if isinstance(below, dict) else {}
        node[last] = value
    _open_sections(cls, tree)
    try:
        with_options = any(item.value for key, item in given.items() if "options" in key.split("."))
        if not with_options and "torch" not in sys.modules:
            with trusting_options():  # what is wrong with other keys is known before a plugin imports torch, in seconds
                cls.model_validate(tree)
        config = cls.model_validate(tree)
    except ValidationError as error:
        sources = {key: item.source for key, item in given.items()}
        raise ConfigError(problems + explain(cls, error, tree, sources, label)) from None
    for key, (value, source) in given.items():
        if any(_UNWRITABLE.search(text) for text in _texts(value)):
            problems.append(
                f"{source}: {key}: holds a character that no text or file's name can have, got {show(value)}."
            )
    if problems:
        raise ConfigError(problems)
    return config


def _texts(value: Any) -> Iterator[str]:
    """All texts in nested data."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, Mapping):
        yield from (text for pair in value.items() for one in pair for text in _texts(one))
    elif isinstance(value, list | tuple):
        yield from (text for one in value for text in _texts(one))


def _open_sections(cls: type[BaseModel], tree: dict[str, Any]) -> None:
    """Give every required section an empty mapping, so that its keys are reported missing, and not only the section."""
    for name, info in cls.model_fields.items():
        section = section_at(cls, name)
        if section and info.is_required():
            below = tree.setdefault(name, {})
            if isinstance(below, dict):
                _open_sections(section, below)


def _words(names: Iterable[str]) -> str:
    return " or ".join(repr(name) for name in names)
