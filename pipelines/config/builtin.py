"""The configurations that come with Equipoise. Nothing here imports more than the standard library."""

from collections.abc import Iterator
from importlib.resources import files
from importlib.resources.abc import Traversable


def shipped() -> dict[str, Traversable]:
    """Name → file."""

    def walk(folder: Traversable, prefix: str) -> Iterator[tuple[str, Traversable]]:
        for item in folder.iterdir():
            if item.is_dir():
                yield from walk(item, f"{prefix}{item.name}/")
            elif item.name.endswith(".yaml"):
                yield f"{prefix}{item.name.removesuffix('.yaml')}", item

    return dict(sorted(walk(files("equipoise.configs"), "")))


def purpose(file: Traversable) -> str:
    """What a shipped configuration is for: the sentence that it begins with."""
    return file.read_text(encoding="utf-8").partition("\n")[0].lstrip("# ")
