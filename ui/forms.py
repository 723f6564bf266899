"""A pipeline's configuration as a form: one field per key of its record, and back again.

Several plugins, or several values of a number separated by commas, become axes of a sweep. Nothing here knows any
pipeline or optimizer by name, and nothing imports gradio.
"""

import json
import math
import re
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from functools import cache
from typing import Any

from equipoise import registry
from equipoise.errors import ConfigError, EquipoiseError
from equipoise.options import options
from equipoise.pipelines import config as configs
from equipoise.pipelines.config import Key, PluginSection, RunConfig, yamlio
from equipoise.pipelines.config.keys import section_at
from equipoise.plugin_cache import load_errors

NOT_ASKED = ("pipeline", "runs", "script")  # what the form itself settles, and what no page may start
SWEEP = "sweep"  # holds the axes that no other field can show
OPTION_HEADERS = ["plugin", "option", "value", "default", "must be", "what it does"]
_DECIMAL_COMMA = re.compile(r"-?(0,\d+|\d+,0\d+)")  # 0,5 and 1,05: hardly a list of 0 and 5, or of 1 and 05
_NUMBERS = ("int", "float", "int or none", "float or none")


@dataclass(frozen=True)
class Field:
    """How one key is asked for."""

    key: Key
    kind: str  # plugin, choice, truth, number, lines, text, axes
    choices: tuple[str, ...] = ()
    basic: bool = False  # shown before the sections are opened

    @property
    def label(self) -> str:
        if self.kind == "axes":
            return "other axes"
        return (self.key.short or self.key.key.rpartition(".")[2]).replace("_", " ")

    @property
    def section(self) -> str:
        return self.key.key.rpartition(".")[0].replace(".", " · ").replace("_", " ") or "run"

    @property
    def placeholder(self) -> str | None:
        """What stands in it while it is empty, before any plugin is imported; `empty_means` knows more."""
        return f"empty: its own, or {_text(self.key.default)}" if self.key.follows else None

    @property
    def info(self) -> str:
        """Help, bounds and key on one line."""
        if self.kind == "axes":
            return "Other keys that the sweep goes over, such as {schedule: [constant, cosine]} [sweep]"
        words = [self.key.help.rstrip(".")]
        if self.key.bounds:
            words.append(self.key.bounds)
        return f"{'; '.join(filter(None, words))} [{self.key.key}]"


@registry.looked_up_once()
def fields(cls: type[RunConfig]) -> list[Field]:
    """The form of a configuration record, in the order of its definition."""
    return [_field(cls, key) for key in configs.describe(cls) if key.key not in NOT_ASKED and not _is_options(cls, key)]


def _field(cls: type[RunConfig], key: Key) -> Field:
    if key.key == SWEEP:
        return Field(key, "axes")
    basic = bool(key.short) or key.key in ("name", "seed") or key.key.endswith(".prompts")
    if kind := plugin_kind(cls, key.key):
        return Field(key, "plugin", _usable(tuple(registry.entries(kind))), basic)
    if key.choices:
        return Field(key, "choice", tuple(map(str, key.choices)), basic)
    if key.type == "bool":
        return Field(key, "truth", (), basic)
    if key.type in _NUMBERS:
        return Field(key, "number", (), basic)
    return Field(key, "lines" if key.type.startswith("list[") else "text", (), basic)


@cache
def _usable(entries: tuple[registry.Entry, ...]) -> tuple[str, ...]:
    """The names of those that can be loaded; the tab Plugins says why the others cannot."""
    return tuple(entry.name for entry, error in zip(entries, load_errors(entries), strict=True) if not error)


def plugin_kind(cls: type[RunConfig], dotted: str) -> str | None:
    """The kind of plugin that a key chooses, or None."""
    parent, _, last = dotted.rpartition(".")
    section = section_at(cls, parent) if parent and last == "name" else None
    return section.KIND if section and issubclass(section, PluginSection) else None


def _is_options(cls: type[RunConfig], key: Key) -> bool:
    parent, _, last = key.key.rpartition(".")
    return last == "options" and plugin_kind(cls, f"{parent}.name") is not None


@registry.looked_up_once()
def show(config: RunConfig) -> dict[str, Any]:
    """What each field shows for a configuration, its sweep's axes included, by dotted key."""
    flat, cls = configs.flat(config, as_given=True), type(config)
    axes = {_canonical(cls, key): values for key, values in shown_axes(config).items()}
    rest = {key: values for key, values in config.sweep.items() if _canonical(cls, key) not in axes}
    shown = {}
    for item in fields(cls):
        values = axes.get(item.key.key, [flat.get(item.key.key)])
        if item.kind == "axes":
            shown[item.key.key] = _text(rest) if rest else ""
        elif item.kind == "plugin":
            shown[item.key.key] = [str(value["name"] if isinstance(value, dict) else value) for value in values]
        elif item.kind == "number":
            shown[item.key.key] = ", ".join(map(_text, values))
        elif item.kind == "choice":
            shown[item.key.key] = "" if values[0] is None else str(values[0])
        elif item.kind == "truth":
            shown[item.key.key] = bool(values[0])
        elif item.kind == "lines":
            shown[item.key.key] = "\n".join(map(_text, values[0] or ()))
        else:
            shown[item.key.key] = _text(values[0])
    return shown


def shown_axes(config: RunConfig) -> dict[str, list[Any]]:
    """Of a configuration's axes those that a field of their own can show: plugins, each once, and numbers."""
    kinds = {item.key.key: item.kind for item in fields(type(config))}

    def fits(kind: str | None, values: list[Any]) -> bool:
        if kind == "plugin":
            names = [value.get("name") if isinstance(value, dict) else value for value in values]
            return all(isinstance(name, str) for name in names) and len(set(names)) == len(names)
        return kind == "number" and all(isinstance(value, int | float) for value in values)

    return {
        key: values for key, values in config.sweep.items() if fits(kinds.get(_canonical(type(config), key)), values)
    }


def _canonical(cls: type[RunConfig], key: str) -> str:
    """An axis by its full key; `optimizer` and `optimizer.name` mean the same one."""
    key = cls.SHORT.get(key, key)
    return f"{key}.name" if plugin_kind(cls, f"{key}.name") else key


def _text(value: Any) -> str:
    if value is None:
        return ""
    if isinstance(value, float):
        short = f"{value:g}"
        return short if float(short) == value else repr(value)
    return value if isinstance(value, str) else json.dumps(value, ensure_ascii=False)


@registry.looked_up_once()
def option_rows(cls: type[RunConfig], chosen: Mapping[str, Sequence[str]], given: RunConfig | None) -> list[list[str]]:
    """The options of the chosen plugins, as rows under OPTION_HEADERS.

    Args:
        cls: the configuration record.
        chosen: dotted key of a plugin's name → the names chosen there.
        given: a configuration whose options fill the values in.
    """
    rows = []
    for key, names in chosen.items():
        section = section_at(cls, key.rpartition(".")[0])
        assert section is not None and issubclass(section, PluginSection)
        for name in names:
            values = _given_options(given, key, name) if given else {}
            for option, default, wanted, text in _options(section.KIND, name):
                if option not in section.OWN:
                    rows.append([name, option, _text(values.get(option)), default, wanted, text])
    return rows


@registry.looked_up_once()
def empty_means(cls: type[RunConfig], chosen: Mapping[str, Sequence[str]]) -> dict[str, str]:
    """What an empty field means that follows from the plugins chosen in its section, in words by dotted key.

    Args:
        cls: the configuration record.
        chosen: dotted key of a plugin's name → the names chosen there.
    """
    found = {}
    for key in (item.key.key for item in fields(cls) if item.key.follows):
        parent, _, last = key.rpartition(".")
        if (section := section_at(cls, parent)) is None:
            continue
        values = []
        for name in chosen.get(f"{parent}.name", ()):
            with suppress(ValueError):  # of one that cannot be used, or not without options; the check reports it
                values.append(_text(getattr(section.model_validate({"name": name}), last)))
        shown = values[:1] if len(set(values)) == 1 else values  # in the order of the names; a field is narrow
        found[key] = f"{'empty' if len(shown) < 2 else 'each its own'}: {', '.join(shown)}" if shown else ""
    return found


def given_rows(cls: type[RunConfig], chosen: Mapping[str, Sequence[str]], given: RunConfig) -> list[list[str]]:
    """Of the rows of `option_rows` those with a value, which needs no plugin to be imported."""
    found = [(name, _given_options(given, key, name)) for key, names in chosen.items() for name in names]
    return [[name, option, _text(value), "", "", ""] for name, some in found for option, value in some.items()]


def kept(rows: list[list[str]], before: Sequence[Sequence[Any]]) -> list[list[str]]:
    """Rows with the values that the table already held, where they have none themselves."""
    held = {(str(row[0]), str(row[1])): _cell(row[2]) for row in before}
    return [[*row[:2], row[2] or held.get((row[0], row[1]), ""), *row[3:]] for row in rows]


def _cell(value: Any) -> str:
    """What a cell of gradio's table holds; nothing may come as a NaN."""
    text = "" if value is None else str(value).strip()
    return "" if text == "nan" else text


@cache
def _options(kind: str, name: str) -> list[tuple[str, str, str, str]]:
    """(option, default, type and bounds, help); none of a plugin that cannot be loaded, which the check reports."""
    try:
        found = options(registry.load(kind, name))
    except EquipoiseError:
        return []
    return [
        (
            option.name,
            "required" if option.required else "none" if option.default is None else _text(option.default),
            f"{option.type} {option.bounds or ''}".strip(),
            option.help,
        )
        for option in found
    ]


def _given_options(config: RunConfig, key: str, name: str) -> dict[str, Any]:
    parent = key.rpartition(".")[0]
    for value in (item for axis, values in shown_axes(config).items() if axis in (parent, key) for item in values):
        if isinstance(value, dict) and value.get("name") == name:
            return dict(value.get("options", {}))
    flat = configs.flat(config)
    return dict(flat[f"{parent}.options"]) if flat[key] == name else {}


@registry.looked_up_once()
def read(
    cls: type[RunConfig], shown: Mapping[str, Any], rows: Sequence[Sequence[Any]], wrong: list[str] | None = None
) -> dict[str, Any]:
    """The values of a filled-in form by dotted key, `sweep` among them.

    Args:
        cls: the configuration record.
        shown: what the fields hold, by dotted key.
        rows: the table of options.
        wrong: is given what cannot be read, one line each, and the values are those of the rest.

    Raises:
        ConfigError: what cannot be read, where `wrong` is not given.
    """
    found = _Found(rows)
    for item in fields(cls):
        _READERS[item.kind](found, item, shown.get(item.key.key))
    taken = {_canonical(cls, key) for key in found.axes}
    found.problems += [
        f"sweep: {key} has several values in its own field too; give them once."
        for key in found.other
        if _canonical(cls, key) in taken
    ]
    if wrong is not None:
        wrong += found.problems
    elif found.problems:
        raise ConfigError(found.problems)
    return {**found.values, SWEEP: {**found.axes, **found.other}}


@dataclass
class _Found:
    """What has been read of a form so far."""

    rows: Sequence[Sequence[Any]]  # of the table of options
    problems: list[str] = field(default_factory=list)
    values: dict[str, Any] = field(default_factory=dict)
    axes: dict[str, list[Any]] = field(default_factory=dict)  # of fields that hold several values
    other: dict[str, list[Any]] = field(default_factory=dict)  # of the field that holds all others


def _read_plugin(found: _Found, item: Field, given: Any) -> None:
    parent = item.key.key.rpartition(".")[0]
    names = [given] if isinstance(given, str) else list(given or [])
    options = {name: _rows_of(found.rows, name) for name in names}
    if len(names) == 1:
        found.values |= {item.key.key: names[0], f"{parent}.options": options[names[0]]}
    elif names:
        found.values[f"{parent}.options"] = {}
        found.axes[parent] = [{"name": name, "options": options[name]} if options[name] else name for name in names]
    else:
        found.problems.append(f"{item.key.key}: choose at least one.")


def _read_number(found: _Found, item: Field, given: Any) -> None:
    key = item.key.key
    try:
        numbers = read_numbers(str(given or ""), whole="float" not in item.key.type)
    except ValueError as error:
        found.problems.append(f"{key}: {error}")
        return
    if len(numbers) > 1:
        found.axes[item.key.short or key] = numbers
    elif numbers or item.key.follows or item.key.replaceable or "none" in item.key.type:
        found.values[key] = numbers[0] if numbers else None
    else:
        found.problems.append(f"{key}: is empty; give a number.")


def _read_lines(found: _Found, item: Field, given: Any) -> None:
    lines = [line.strip() for line in str(given or "").splitlines() if line.strip()]
    nested = item.key.type.count("list[") > 1  # then a line in brackets is a list itself
    texts = "str" in item.key.type
    values = [line if texts and not (nested and line[0] == "[") else configs.parse_value(line) for line in lines]
    found.values[item.key.key] = None if not lines and "none" in item.key.type else values


def _read_text(found: _Found, item: Field, given: Any) -> None:
    key, text = item.key.key, str(given or "").strip()
    if item.key.type.startswith(("mapping", "dict")):
        found.values[key] = _mapping(key, text, found.problems)
    else:
        found.values[key] = text or (None if "none" in item.key.type else "")


def _read_choice(found: _Found, item: Field, given: Any) -> None:
    typed = {str(choice): choice for choice in item.key.choices}
    found.values[item.key.key] = typed.get(str(given), given or None)


def _read_truth(found: _Found, item: Field, given: Any) -> None:
    found.values[item.key.key] = bool(given)


def _read_axes(found: _Found, item: Field, given: Any) -> None:
    found.other = _axes(str(given or "").strip(), found.problems)


_READERS = {  # by a field's kind
    "plugin": _read_plugin,
    "number": _read_number,
    "lines": _read_lines,
    "text": _read_text,
    "choice": _read_choice,
    "truth": _read_truth,
    "axes": _read_axes,
}


def _rows_of(rows: Sequence[Sequence[Any]], name: str) -> dict[str, Any]:
    found = {}
    for row in rows:
        text = _cell(row[2])
        if str(row[0]) == name and text:
            found[str(row[1])] = configs.parse_value(text)
    return found


def _axes(text: str, problems: list[str]) -> dict[str, list[Any]]:
    found = _mapping(SWEEP, text, problems)
    problems += [
        f"sweep: {key} must have a list of values." for key, values in found.items() if not isinstance(values, list)
    ]
    return found


def _mapping(key: str, text: str, problems: list[str]) -> dict[str, Any]:
    try:
        value = yamlio.parse(text or "{}")
    except ValueError as error:
        problems.append(f"{key}: {error}.")
        return {}
    if not isinstance(value, dict):
        problems.append(f"{key}: must be a mapping such as {{name: value}}, got {text[:60]!r}.")
        return {}
    return value


def field_of(cls: type[RunConfig], line: str) -> str | None:
    """The key of the field that a line of an error is about, by the key that the line begins with."""
    found = re.match(r"(?:sweep\.)?([\w.]+): ", line)
    if not found:
        return None
    keys, key = [item.key.key for item in fields(cls)], _canonical(cls, found[1])
    if ".options" in key:  # which stand in a table below the plugin's own field
        key = f"{key.partition('.options')[0]}.name"
    return key if key in keys else None


def count(cls: type[RunConfig], shown: Mapping[str, Any]) -> int:
    """How many runs a filled-in form describes; 1 where it cannot be read."""
    wrong: list[str] = []
    axes = read(cls, shown, [], wrong)[SWEEP].values()
    return 1 if wrong else math.prod(len(values) for values in axes)


def read_numbers(text: str, whole: bool = False) -> list[int | float]:
    """`1e-4`, `1e-4, 1e-3`, or `1e-5 .. 1e-1 : 5`, which is five values at equal ratios.

    Args:
        text: What was typed.
        whole: Whether whole numbers are wanted, so that no comma can stand for a decimal point.

    Raises:
        ValueError: Something else.
    """
    if not whole and any(_DECIMAL_COMMA.fullmatch(part.strip()) for part in re.split(r",\s+|;|\.\.|:", text)):
        raise ValueError(
            f"decimals are written with a point, 0.001, and several numbers with a comma and a space between, "
            f"1e-4, 1e-3; got {text[:60]!r}."
        )
    if ".." in text:
        ends, _, count = text.partition(":")
        low, _, high = ends.partition("..")
        try:
            first, last, steps = float(low), float(high), int(count or 5)
        except ValueError:
            raise ValueError(f"a range is written 1e-5 .. 1e-1 : 5, got {text[:60]!r}.") from None
        if not (0 < first < last < math.inf and 2 <= steps <= 50):
            raise ValueError(f"a range rises from above 0, in 2 to 50 values, got {text[:60]!r}.")
        ratio = (last / first) ** (1 / (steps - 1))
        found = [float(f"{first * ratio**index:.3g}") for index in range(steps)]
        if len(set(found)) < steps:
            raise ValueError(f"a range of {steps} values needs ends that are farther apart, got {text[:60]!r}.")
        return found
    numbers: list[int | float] = []
    for part in (part.strip() for part in text.split(",")):
        if part:
            value = configs.parse_value(part)
            if isinstance(value, bool) or not isinstance(value, int | float):
                raise ValueError(f"must be a number, or several with commas between, got {part[:60]!r}.")
            numbers.append(value)
    if twice := [value for value in numbers if numbers.count(value) > 1]:
        raise ValueError(f"{twice[0]:g} is there twice.")
    return numbers
