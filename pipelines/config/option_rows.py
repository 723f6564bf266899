"""What can be set of a plugin, as rows of text: for listings and the page."""

import json
from typing import Any

from equipoise.options import options


def _yaml(default: Any) -> str:
    """A default as a configuration would give it: (0.9, 0.99) is [0.9, 0.99], False is false."""
    return default if isinstance(default, str) else json.dumps(default, default=str).replace("null", "none")


def option_rows(kind: str, cls: Any) -> list[dict[str, str]]:
    """The options as text; a pipeline's are the keys of its configuration, some with a short name, and a command has
    arguments instead.
    """
    if kind == "commands":
        return []
    if kind == "pipelines":
        from equipoise.pipelines.config import describe  # not needed for a listing, which is to be quick

        found = [(key.key, key.wanted, {"short": key.short or ""}, key) for key in describe(cls.Config)]
    else:
        found = [(option.name, option.type, {}, option) for option in options(cls)]
    return [
        {
            "name": name,
            "type": wanted,
            "default": "required" if option.required else _yaml(option.default),
            "bounds": str(option.bounds or ""),
            "help": option.help,
            **more,
        }
        for name, wanted, more, option in found
    ]
