"""YAML as people mean it: YAML 1.2's scalars, no duplicate keys, nothing but plain data.

PyYAML speaks YAML 1.1, in which `1e-4` is a string and `no`, `on`, `2024-01-01` and `1:30` are not. Here numbers are
numbers, only `true` and `false` are booleans, and the rest is text. Anchors are refused: a configuration needs none,
and a few lines of them can stand for gigabytes.
"""

import re
from collections.abc import Hashable
from typing import Any, ClassVar

import yaml
from yaml.composer import ComposerError
from yaml.constructor import ConstructorError

LIMIT = 1_000_000  # bytes; a configuration is a page or two
_RESOLVERS = (
    ("null", r"~|null|Null|NULL|", ["~", "n", "N", ""]),
    ("bool", r"true|True|TRUE|false|False|FALSE", list("tTfF")),
    ("int", r"[-+]?(?:0|[1-9][0-9_]*)", list("-+0123456789")),
    (
        "float",
        r"[-+]?(?:\.[0-9]+|[0-9][0-9_]*\.[0-9]*|[0-9][0-9_]*(?=[eE]))(?:[eE][-+]?[0-9]+)?",
        list("-+.0123456789"),
    ),
    ("float", r"[-+]?\.(?:inf|Inf|INF)|\.(?:nan|NaN|NAN)", list("-+.")),
)


_PLAIN = ("null", "bool", "int", "float", "str", "seq", "map")  # no dates, sets, bytes


class _Loader(yaml.SafeLoader):
    yaml_implicit_resolvers: ClassVar[dict] = {}  # none of YAML 1.1's; ours are added below
    yaml_constructors: ClassVar[dict] = {
        tag: made for tag, made in yaml.SafeLoader.yaml_constructors.items() if not tag or tag.split(":")[-1] in _PLAIN
    }

    def compose_node(self, parent, index):
        if self.check_event(yaml.AliasEvent):
            raise ComposerError(
                None, None, "anchors and aliases are not supported; write the value out", self.peek_event().start_mark
            )
        return super().compose_node(parent, index)

    def construct_mapping(self, node, deep=False):
        seen: set[Hashable] = set()
        for key_node, _ in node.value:
            key = self.construct_object(key_node, deep=True)
            if not isinstance(key, Hashable):
                raise ConstructorError(None, None, "a key must be a word", key_node.start_mark)
            if key in seen:
                raise ConstructorError(
                    None, None, f"the key {key!r} is there twice; keep one of them", key_node.start_mark
                )
            seen.add(key)
        return super().construct_mapping(node, deep)


class _Dumper(yaml.SafeDumper):
    """Quotes every string that YAML 1.1 or this module's loader would read as something else."""

    yaml_implicit_resolvers: ClassVar[dict] = {k: list(v) for k, v in yaml.SafeDumper.yaml_implicit_resolvers.items()}

    def increase_indent(self, flow=False, indentless=False):
        return super().increase_indent(flow, False)  # lists indented below their key


for _tag, _pattern, _first in _RESOLVERS:
    for _class in (_Loader, _Dumper):
        _class.add_implicit_resolver(f"tag:yaml.org,2002:{_tag}", re.compile(rf"^(?:{_pattern})$"), _first)


def parse(text: str) -> Any:
    """The data in a YAML document.

    Raises:
        ValueError: what is wrong, with line and column where they are known.
    """
    try:
        return yaml.load(text, Loader=_Loader)
    except yaml.MarkedYAMLError as error:
        mark = error.problem_mark or error.context_mark
        where = f"line {mark.line + 1}, column {mark.column + 1}: " if mark else ""
        raise ValueError(f"{where}{error.problem or error.context}") from None
    except yaml.YAMLError as error:  # characters that no YAML text may hold
        raise ValueError(f"is not a text file: {str(error).splitlines()[0]}") from None
    except RecursionError:
        raise ValueError("is nested too deeply") from None
    except (KeyError, IndexError, TypeError):  # of PyYAML's constructors
        raise ValueError("has a tag (!!…) that does not fit what it stands before") from None


def render(data: Any) -> str:
    """A YAML document that `parse` reads back as the same data."""
    return yaml.dump(data, Dumper=_Dumper, sort_keys=False, allow_unicode=True, width=120)
