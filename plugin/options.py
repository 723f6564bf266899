"""What options a plugin class has: forms, `--help` and the validation of configurations all read them from here.

Names, types and defaults come from the signature of `__init__`, whose `**kwargs` is followed to the base class. Help
and bounds come from the docstring's `Args:` section, bounds as an entry's last parenthesis: `(> 0)`, `(0 <= x < 1)`.
"""

import inspect
import math
import operator
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from types import NoneType, UnionType
from typing import Any, Literal, NamedTuple, Union, get_args, get_origin

_COMPARE = {"<": operator.lt, "<=": operator.le, ">": operator.gt, ">=": operator.ge}
_FLIP = {"<": ">", "<=": ">="}  # `0 < x` says x > 0
_NUMBER = r"[-+]?[\d.]+(?:[eE][-+]?\d+)?"
_TWO_SIDED = re.compile(rf"(?:each )?({_NUMBER}) *(<=?) *\w+ *(<=?) *({_NUMBER})")
_ONE_SIDED = re.compile(rf"(?:each )?(?:[a-z]\w* *)?([<>]=?) *({_NUMBER})")
WORDS = {NoneType: "none", bool: "true or false", int: "a whole number", float: "a number", str: "text"}
_TRUTH = {"true": True, "yes": True, "on": True, "false": False, "no": False, "off": False}


@dataclass(frozen=True)
class MappingType:
    """The type of an option that gives a value by name, such as {audio: 0.3}."""

    values: tuple[Any, ...]  # types of a value; empty: anything


class Bounds(NamedTuple):
    """Where a number, or each number of a tuple or mapping, must lie."""

    text: str  # as written, for people: `> 0`
    tests: tuple[tuple[str, float], ...]  # (comparison, limit), all of which must hold

    def __str__(self) -> str:
        return self.text

    @classmethod
    def parse(cls, text: str) -> "Bounds | None":
        if match := _TWO_SIDED.fullmatch(text):
            low, below, above, high = match.groups()
            return cls(text, ((_FLIP[below], float(low)), (above, float(high))))
        if match := _ONE_SIDED.fullmatch(text):
            return cls(text, ((match[1], float(match[2])),))
        return None

    def contain(self, value: Any) -> bool:
        values = value.values() if isinstance(value, dict) else value if isinstance(value, tuple) else (value,)
        return all(_COMPARE[sign](v, limit) for v in values if type(v) in (int, float) for sign, limit in self.tests)


@dataclass(frozen=True)
class Option:
    """One option of a plugin class."""

    name: str
    types: tuple[Any, ...]  # bool, int, float, str, NoneType, MappingType, or a tuple with types per item; empty: any
    default: Any
    bounds: Bounds | None
    choices: tuple[Any, ...]  # from a Literal annotation; empty: any value of the types
    help: str
    required: bool

    @property
    def type(self) -> str:
        """The accepted types as a person would say them."""
        return self._wanted("")

    def convert(self, value: Any) -> Any:
        """The value as the class takes it: `"1e-4"` (YAML 1.1 reads it as text) to a float, a list to a tuple.

        Raises:
            ValueError: Says what is wanted and what was got.
        """
        for reading in [value] if not self.types else [v for kind in self.types for v in _as(kind, value)]:
            if self._allows(reading):
                return reading
        bounds = self.bounds.text if self.bounds else ""
        glue = ", " if bounds.startswith("each") else " " if bounds.startswith(("<", ">")) else " with "
        close = get_close_matches(str(value), list(map(str, self.choices)), n=1)
        hint = f" Did you mean {close[0]!r}?" if close else ""
        raise ValueError(f"must be {self._wanted(glue + bounds if bounds else '')}, got {value!r}.{hint}")

    def _wanted(self, bounds: str) -> str:
        words = [f"one of {', '.join(map(repr, self.choices))}"] if self.choices else []
        words += [
            _wanted(kind) + (bounds if kind in (int, float) or isinstance(kind, tuple | MappingType) else "")
            for kind in self._free()
        ]
        return " or ".join(words) or "anything"

    def _allows(self, value: Any) -> bool:
        chosen = type(value) in self._free() or isinstance(value, dict) or not self.choices or value in self.choices
        return chosen and (self.bounds is None or self.bounds.contain(value))

    def _free(self) -> list[Any]:
        """The types whose values are not limited to the choices."""
        return [kind for kind in self.types if kind not in map(type, self.choices)]


def options(cls: type) -> list[Option]:
    """The options of a plugin class in the order of its signature; `self` and an optimizer's `params` are none."""
    text: dict[str, str] = {}
    for base in reversed(cls.__mro__):  # a subclass's words replace its base's
        for source in (base, vars(base).get("__init__")):
            text |= _arguments(getattr(source, "__doc__", None))
    found = {}
    for parameter in _parameters(cls):
        kinds, choices = _types(parameter.annotation)
        required = parameter.default is parameter.empty
        if not kinds and isinstance(parameter.default, bool | int | float | str):
            kinds = (type(parameter.default),)
        help_text, bounds = _split_bounds(text.get(parameter.name, ""))
        default = None if required else parameter.default
        found.setdefault(parameter.name, Option(parameter.name, kinds, default, bounds, choices, help_text, required))
    return list(found.values())


def read_options(cls: type, given: Mapping[str, Any]) -> tuple[dict[str, Any], list[str]]:
    """(the given options as the class takes them, every problem with them as `option: what is wrong`)."""
    known = {option.name: option for option in options(cls)}
    values, problems = {}, []
    for name, value in given.items():
        if name not in known:
            close = get_close_matches(str(name), known, n=1)
            hint = f"Did you mean {close[0]!r}? " if close else ""
            problems.append(f"{name}: no such option. {hint}{cls.__name__} has: {', '.join(known) or 'none'}.")
            continue
        try:
            values[name] = known[name].convert(value)
        except ValueError as error:
            problems.append(f"{name}: {error}")
    missing = [option for option in known.values() if option.required and option.name not in given]
    problems += [f"{option.name}: missing; must be {option.type}." for option in missing]
    return values, problems


def summary(cls: Any) -> str:
    """A class's or module's docstring's first paragraph on one line; of a pipeline without one, its title."""
    words = inspect.cleandoc(vars(cls).get("__doc__") or "").split("\n\n")[0]
    title = getattr(cls, "title", "")
    return " ".join((words or (title if isinstance(title, str) else "")).split())


def description(cls: Any) -> list[str]:
    """What a class's or module's docstring says after its first paragraph, a paragraph a line, up to its first section
    or directive."""
    found = []
    for words in inspect.cleandoc(vars(cls).get("__doc__") or "").split("\n\n")[1:]:
        if re.match(r"\.\. |[A-Z]\w*:(\n|$| )", words):
            break
        found.append(" ".join(words.split()))
    return found


def references(cls: Any) -> list[str]:
    """The papers behind a class or module: its docstring's `References:` or `Paper:`, or the links of a torch one."""
    doc = inspect.cleandoc(vars(cls).get("__doc__") or "")
    entries: list[str] = []
    for line in _section(re.sub(r"^Paper: ", "Paper:\n ", doc, flags=re.M), "References", "Paper"):
        if line.startswith(" ") and entries:
            entries[-1] += " " + line.strip()
        elif line:
            entries.append(line.removeprefix("- "))
    links = re.findall(r"^\.\. _(.+?):\s+(https?://\S+)", doc, re.M)
    return entries or [f"{title.replace(chr(92), '')}: {link}" for title, link in links]  # Sphinx escapes colons


def _parameters(cls: type) -> Iterator[inspect.Parameter]:
    """The parameters of `cls`, then, for as long as one takes **kwargs, those of the next `__init__` up the bases."""
    inits = [vars(base)["__init__"] for base in cls.__mro__ if base is not object and "__init__" in vars(base)]
    for call in [cls, *inits]:
        try:
            signature = inspect.signature(call, eval_str=True)
        except Exception:  # an annotation that only a type checker can resolve; types then come from the defaults
            signature = inspect.signature(call)
        named = (inspect.Parameter.POSITIONAL_OR_KEYWORD, inspect.Parameter.KEYWORD_ONLY)
        yield from (p for p in signature.parameters.values() if p.kind in named and p.name not in ("self", "params"))
        if all(p.kind is not inspect.Parameter.VAR_KEYWORD for p in signature.parameters.values()):
            return


def _types(annotation: Any) -> tuple[tuple[Any, ...], tuple[Any, ...]]:
    """(accepted types, choices) of an annotation; what no configuration can write, such as a Tensor, is left out."""
    if annotation in (bool, int, float, str):
        return (annotation,), ()
    if annotation in (None, NoneType):
        return (NoneType,), ()
    origin, args = get_origin(annotation), get_args(annotation)
    if origin is Literal:
        return tuple(dict.fromkeys(map(type, args))), args
    if origin in (Union, UnionType):
        parts = [_types(arg) for arg in args]
        return tuple(t for types, _ in parts for t in types), tuple(c for _, choices in parts for c in choices)
    if origin is tuple:
        items = tuple(_types(arg)[0] for arg in args)
        return ((items,) if items and all(items) else ()), ()
    if (origin or annotation) in (dict, Mapping) and args[:1] in ((), (str,)):
        values = _types(args[1])[0] if args else ()
        return (MappingType(values),), ()
    return (), ()


def _wanted(kind: Any) -> str:
    if isinstance(kind, tuple):
        return f"[{', '.join(' or '.join(map(_wanted, item)) for item in kind)}]"
    if isinstance(kind, MappingType):
        return f"{{name: {' or '.join(map(_wanted, kind.values)) or 'anything'}, …}}"
    return WORDS[kind]


def _as(kind: Any, value: Any) -> list[Any]:
    """[value as `kind`], or [] when it is not one."""
    if isinstance(kind, tuple):
        if not isinstance(value, list | tuple) or len(value) != len(kind):
            return []
        items = [[v for one in kinds for v in _as(one, part)] for kinds, part in zip(kind, value, strict=True)]
        return [tuple(readings[0] for readings in items)] if all(items) else []
    if isinstance(kind, MappingType):
        if not isinstance(value, Mapping) or not all(isinstance(name, str) for name in value):
            return []
        if not kind.values:
            return [dict(value)]
        read = {name: [v for one in kind.values for v in _as(one, part)] for name, part in value.items()}
        return [{name: readings[0] for name, readings in read.items()}] if all(read.values()) else []
    if kind is str:
        return [value] if isinstance(value, str) else []
    if kind is NoneType:
        return [None] if value is None or value in ("none", "null") else []
    if kind is bool:
        truth = value if isinstance(value, bool) else _TRUTH.get(str(value).lower()) if isinstance(value, str) else None
        return [] if truth is None else [truth]
    if isinstance(value, bool) or not isinstance(value, int | float | str):
        return []
    try:
        number = float(value)
        return [number if kind is float else int(number)] if math.isfinite(number) and kind(number) == number else []
    except (ValueError, OverflowError):
        return []


def _section(doc: str, *titles: str) -> list[str]:
    """The lines under `Title:` in a cleaned docstring, without their common indent."""
    match = re.search(rf"^(?:{'|'.join(titles)}):\n((?:[ \t]+.*\n?|\n)+)", doc + "\n", re.M)
    return inspect.cleandoc("\n" + match[1]).splitlines() if match else []


def _arguments(doc: str | None) -> dict[str, str]:
    """{name: text} of a docstring's `Args:`, also in torch's form `name (type, optional): text (default: …)`."""
    found: dict[str, str] = {}
    name = ""
    for line in _section(inspect.cleandoc(doc or ""), "Args", "Arguments"):
        if match := re.match(r"(\w+)(?: \(.*?\))?:(?: +|$)(.*)", line):
            name, line = match[1], match[2]
            found[name] = ""
        if name:
            found[name] = f"{found[name]} {line.strip()}".strip()
    return {name: re.sub(r"\s*\(default: (?:[^()]|\([^()]*\))*\)", "", text) for name, text in found.items()}


def _split_bounds(text: str) -> tuple[str, Bounds | None]:
    match = re.search(r"\s*\(([^()]*)\)\.?$", text)
    bounds = Bounds.parse(match[1].strip()) if match else None
    return (text[: match.start()].rstrip(), bounds) if match and bounds else (text, None)
