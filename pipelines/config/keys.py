"""The keys of a configuration record: what there is, for help and forms, and what is wrong with them, in sentences."""

import difflib
import os
import re
import types
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass, field
from functools import lru_cache
from typing import TYPE_CHECKING, Annotated, Any, Literal, Union, get_args, get_origin

from pydantic import BaseModel, ValidationError
from pydantic.fields import FieldInfo

from equipoise.options import WORDS

if TYPE_CHECKING:
    from equipoise.pipelines.config.records import RunConfig

_GUESSED = 20  # unknown keys that others are looked for that are spelt alike; a file of another kind has thousands
_SIGNS = {"gt": ">", "ge": ">=", "lt": "<", "le": "<="}


class Problems(ValueError):
    """For validators: several problems of the validated key, one sentence each; every one gets its own line.

    A sentence for a key below the validated one starts with that key and a colon ("damping: must be …").
    """

    def __init__(self, sentences: Iterable[str]):
        self.sentences = list(sentences)
        super().__init__(" ".join(self.sentences))


def is_set(section: BaseModel, key: str) -> bool:
    """Whether a key holds something else than its default."""
    return getattr(section, key) != type(section).model_fields[key].default


@dataclass(frozen=True)
class Opened:
    """Marks a key whose text names a file or folder: `Annotated[str, Opened()]`.

    Such a key is never empty, `~` in it means a home folder, and the web page lets it lead into its own folders alone.
    """

    hub: bool = False  # a hub id, such as owner/name, is good too
    demo: bool = False  # `demo` means what comes with Equipoise

    @staticmethod
    def read(text: str) -> str:
        """Raises ValueError where it can name nothing."""
        if not text.strip():
            raise ValueError("names no file or folder: it is empty; `.` is the current folder.")
        if (path := os.path.expanduser(text)).startswith("~"):
            raise ValueError(f"there is no such user, got {show(text)}; a name that begins with ~ is written ./~name.")
        return path


@dataclass(frozen=True)
class AtHub:
    """Marks a key whose text says which version of a model is meant: hubs' libraries make parts of a path of it."""

    @staticmethod
    def read(text: str) -> str:
        """Raises ValueError where it would lead elsewhere."""
        if not re.fullmatch(r"[A-Za-z0-9][\w.+-]*(/[A-Za-z0-9][\w.+-]*)*", text):
            raise ValueError(f"must be a branch, tag, commit or variant, such as main or refs/pr/1, got {show(text)}.")
        return text


class Follows:
    """Marks a number that may be left empty, and then follows from other keys: `Annotated[float, Follows()]`.

    Its section drops an empty one before it is validated, sets it afterwards, and has it in `left_empty`.
    """


class Replaceable:
    """Marks a number that may be left empty where another key is given in its place; its section sees to that."""


@dataclass(frozen=True)
class Key:
    """One thing that can be set."""

    key: str  # dotted path, "optimizer.learning_rate"
    short: str | None  # its short name, if it has one
    type: str  # "int", "float or none", "list[str]"
    default: Any  # None too where a value is required
    required: bool
    help: str
    choices: tuple = ()  # the values it may have, where they are few
    limits: dict[str, float] = field(default_factory=dict)  # gt, ge, lt, le
    wanted: str = ""  # the type for people, as `equipoise.options.Option.type` has it: "a number or none"
    opened: Opened | None = None  # where it names a file or folder
    follows: bool = False  # left empty, it follows from other keys
    replaceable: bool = False  # may be left empty, for another key

    @property
    def bounds(self) -> str:
        """The limits for people: "> 0, <= 1"."""
        return ", ".join(f"{_SIGNS[name]} {_number(limit)}" for name, limit in self.limits.items())


def describe(cls: "type[RunConfig]") -> list[Key]:
    """Every key of a configuration record, in the order of its definition."""
    shorts = {dotted: short for short, dotted in cls.SHORT.items()}

    def walk(model: type[BaseModel], prefix: str) -> Iterable[Key]:
        for name, info in model.model_fields.items():
            key = f"{prefix}{name}"
            if section := _section(info.annotation):
                yield from walk(section, f"{key}.")
                continue
            yield Key(
                key=key,
                short=shorts.get(key),
                type=_type(info.annotation),
                default=None if info.is_required() else info.get_default(call_default_factory=True),
                required=info.is_required(),
                help=info.description or "",
                choices=_choices(info.annotation),
                limits=_limits(info),
                wanted=_wanted(info.annotation),
                opened=next((mark for mark in marks(info) if isinstance(mark, Opened)), None),
                follows=any(isinstance(item, Follows) for item in info.metadata),
                replaceable=any(isinstance(item, Replaceable) for item in info.metadata),
            )

    return list(walk(cls, ""))


def section_at(cls: type[BaseModel], dotted: str) -> type[BaseModel] | None:
    """The section that stands at a dotted key, or None where there is no section."""
    model: type[BaseModel] | None = cls
    for part in dotted.split("."):
        model = _sections(model).get(part) if model else None
    return model


@lru_cache(1000)  # asked for every key of every configuration
def _sections(model: type[BaseModel]) -> dict[str, type[BaseModel]]:
    found = {name: _section(info.annotation) for name, info in model.model_fields.items()}
    return {name: section for name, section in found.items() if section}


def explain(
    cls: "type[RunConfig]",
    error: ValidationError,
    tree: Mapping[str, Any],  # what was validated
    sources: Mapping[str, str],  # dotted key → where it was given
    label: str,  # where keys that were not given should have been
) -> list[str]:
    """One line per problem: `source: key: sentence.`"""
    keys, strangers = describe(cls), 0
    lines: dict[str, list[str]] = {}
    for item in error.errors(include_url=False):
        key = _key(item, tree)
        strangers += item["type"] == "extra_forbidden"
        guessed = item["type"] != "extra_forbidden" or strangers <= _GUESSED
        for sentence in _sentences(item, key, keys if guessed else []):
            below = re.match(r"(\w+): ", sentence) if isinstance(item.get("ctx", {}).get("error"), Problems) else None
            lines.setdefault(f"{key}.{below[1]}" if below else key, []).append(sentence[below.end() if below else 0 :])
    return [
        f"{_source(key, sources, label)}: {key}: {sentence}"
        for key, sentences in lines.items()
        for sentence in _merged(sentences)
    ]


def show(value: Any) -> str:
    """A value as people wrote it, shortened."""
    words = {None: "nothing", True: "true", False: "false"}
    text = words[value] if value is None or isinstance(value, bool) else repr(value)
    return text if len(text) <= 60 else f"{text[:57]}…"


def _number(value: float) -> str:
    return f"{value:g}" if isinstance(value, float) else str(value)


def _section(annotation: Any) -> type[BaseModel] | None:
    for candidate in (annotation, *_members(annotation)):
        if isinstance(candidate, type) and not get_origin(candidate) and issubclass(candidate, BaseModel):
            return candidate
    return None


def _members(annotation: Any) -> tuple:
    return get_args(annotation) if get_origin(annotation) in (Union, types.UnionType) else ()


def _type(annotation: Any) -> str:
    if members := _members(annotation):
        return " or ".join(_type(member) for member in members)
    if get_origin(annotation) is Literal:
        return " or ".join(dict.fromkeys(type(choice).__name__ for choice in get_args(annotation)))
    if annotation is types.NoneType:
        return "none"
    if get_origin(annotation) is Annotated:
        return _type(get_args(annotation)[0])
    if get_origin(annotation) is dict:
        return "mapping"
    return annotation.__name__ if isinstance(annotation, type) and not get_args(annotation) else str(annotation)


def _wanted(annotation: Any) -> str:
    if members := _members(annotation):
        return " or ".join(map(_wanted, members))
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return f"one of {', '.join(map(repr, args))}"
    if origin is Annotated:
        return _wanted(args[0])
    if origin is list:
        choices = _choices(args[0])
        return f"[{' or '.join(map(repr, choices)) if choices else _wanted(args[0])}, …]"
    if origin is dict:
        return f"{{name: {_wanted(args[1])}, …}}"
    return "anything" if annotation is Any else WORDS.get(annotation) or _type(annotation)


def _choices(annotation: Any) -> tuple:
    if get_origin(annotation) is Literal:
        return get_args(annotation)
    return tuple(choice for member in _members(annotation) for choice in _choices(member))


def marks(info: FieldInfo) -> list[Opened | AtHub]:
    """The marks of a field, of the members of its union and of what is in its lists and mappings."""

    def walk(annotation: Any) -> Iterator[Any]:
        yield from getattr(annotation, "__metadata__", ())
        for part in get_args(annotation):
            yield from walk(part)

    return [item for item in (*info.metadata, *walk(info.annotation)) if isinstance(item, Opened | AtHub)]


def _metadata(info: FieldInfo) -> list[Any]:
    """What stands in `Annotated`, of the field and of the members of its union."""
    inner = [item for member in _members(info.annotation) for item in get_args(member)[1:]]
    return [*info.metadata, *(item for field in inner for item in getattr(field, "metadata", [field]))]


def _limits(info: FieldInfo) -> dict[str, float]:
    return {name: getattr(item, name) for item in _metadata(info) for name in _SIGNS if hasattr(item, name)}


def _key(item: Any, tree: Any) -> str:
    """The dotted key that an error is about; pydantic adds the members of unions to its location."""
    parts: list[str] = []
    for part in item["loc"]:
        if isinstance(tree, Mapping) and part in tree:
            tree = tree[part]
        elif isinstance(tree, list) and isinstance(part, int) and part < len(tree):
            tree = tree[part]
        elif item["type"] == "missing" or isinstance(item.get("ctx", {}).get("error"), Problems):
            tree = None  # not given at all, be it required or with a default that does not fit
        else:
            break
        parts.append(str(part))
    return ".".join(parts)


def _sentences(item: Any, key: str, keys: list[Key]) -> list[str]:
    kind, limits = item["type"], item.get("ctx", {})
    if kind == "missing":
        known = next((k for k in keys if k.key == key), None)
        text = f": {known.help.rstrip('.')}" if known and known.help else ""
        return [f"is required{text}. Give {(known and known.short) or key}=…"]
    if kind == "extra_forbidden":
        close = _close(key, keys)
        return [f"unknown key. {close or '`equipoise train CONFIG --keys` shows all.'}"]
    if kind == "value_error":
        cause = limits["error"]
        return cause.sentences if isinstance(cause, Problems) else [str(cause)]
    for name, sign in _SIGNS.items():
        if name in limits:
            return [f"must be {sign} {_number(limits[name])}, got {show(item['input'])}."]
    if kind == "model_type":
        below = ", ".join(k.key for k in keys if k.key.startswith(f"{key}."))
        return [f"is a section, got {show(item['input'])}. Its keys are {below}."]
    if kind in ("int_from_float", "int_parsing_size"):
        fewer = " of fewer digits" if kind == "int_parsing_size" else ""
        return [f"must be a whole number{fewer}, got {show(item['input'])}."]
    text = item["msg"].split(", unable to parse")[0].replace("Input should be ", "must be ")
    several = isinstance(item["input"], str) and "," in item["input"] and "number" in text
    hint = " Several values are for a sweep: --axis KEY=VALUE,VALUE." if several else ""
    return [f"{text[0].lower()}{text[1:]}, got {show(item['input'])}.{hint}"]


def _merged(sentences: list[str]) -> list[str]:
    """The complaints of a union's members ("must be an int, got x.", "must be a string, got x.") as one."""
    if len(sentences) < 2 or not all(text.startswith("must be ") and ", got " in text for text in sentences):
        return sentences
    wants = [text.removeprefix("must be ").rpartition(", got ")[0] for text in sentences]
    return [f"must be {' or '.join(dict.fromkeys(wants))}, got {sentences[0].rpartition(', got ')[2]}"]


def _close(key: str, keys: list[Key]) -> str:
    if len(key) > 200:
        return ""
    shorts = {k.key: k.short for k in keys if k.short}
    names = {k.key: k.key for k in keys} | {short: dotted for dotted, short in shorts.items()}  # name → what it means
    last = key.rpartition(".")[2]
    found = difflib.get_close_matches(key, names, 2, 0.7)
    found += [name for name in names if difflib.SequenceMatcher(None, name.rpartition(".")[2], last).ratio() >= 0.8]
    meant = dict.fromkeys(names[name] for name in found if name != key)  # each key once, under one of its names
    shown = [dotted if "." in key else shorts.get(dotted, dotted) for dotted in meant]
    return f"Did you mean {' or '.join(map(repr, shown[:3]))}?" if shown else ""


def _source(key: str, sources: Mapping[str, str], label: str) -> str:
    """Where a key was given, itself, within a bigger value, or as parts."""
    parent = key
    while parent:
        if parent in sources:
            return sources[parent]
        parent = parent.rpartition(".")[0]
    return next((source for other, source in sources.items() if other.startswith(f"{key}.")), label)
