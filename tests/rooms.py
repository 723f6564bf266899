"""The map of the code: rooms, the arrows between them, and cycles. `python tests/rooms.py [ROOT]` prints it.

A room is a folder; a module that lies directly in plugin/ or pipelines/ is a room of its own. Every import counts,
wherever it stands: inside a function, and for type checkers alone, too.
"""

import ast
import sys
from collections import defaultdict
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import NamedTuple

ORDER = [  # each room imports only those before it
    "errors",
    "quick",
    "options",
    "registry",
    "plugin_cache",
    "lora",
    "optimizers.parts",
    "optimizers",
    "equipoise",  # the names at the top
    "coordination",
    "balancing",
    "hosts",
    "hosts.startup",
    "hosts.swift",
    "run",
    "pipelines.files",
    "pipelines.media",
    "pipelines.progress",
    "pipelines.tables",
    "pipelines.config",
    "pipelines.runs",
    "pipelines.comparing",
    "pipelines.training",
    "pipelines.pipeline",
    "pipelines.jobs",
    "pipelines.demo",
    "pipelines.text_to_image.families",
    "pipelines.text_to_image.formats",
    "pipelines.text_to_image",
    "pipelines.instruction_tuning.formats",
    "pipelines.instruction_tuning",
    "pipelines.audio_visual",
    "pipelines.reproduce",
    "pipelines.commands",
    "pipelines.cli",
    "ui",
]
FOLDERS = {"plugin": "equipoise", "pipelines": "equipoise.pipelines", "ui": "equipoise.ui"}


class Import(NamedTuple):
    """One module that imports another one."""

    where: str  # "pipelines/runs/store.py:25"
    importer: str  # a room
    imported: str  # another room


def imports(root: Path) -> list[Import]:
    """Every import that crosses from one room into another, in the order of files and lines."""
    files = {module: file for top, name in FOLDERS.items() for module, file in _modules(root / top, name)}
    found = []
    for module, file in files.items():
        for line, name in _imported(ast.parse(file.read_text()), files):
            if (importer := _room(module, files)) != (imported := _room(name, files)):
                found.append(Import(f"{file.relative_to(root)}:{line}", importer, imported))
    return found


def rooms(root: Path) -> list[str]:
    """The rooms that hold code."""
    files = {module: file for top, name in FOLDERS.items() for module, file in _modules(root / top, name)}
    found = {_room(module, files) for module, file in files.items() if file.read_text().strip()}
    return sorted(found, key=lambda room: (ORDER.index(room) if room in ORDER else len(ORDER), room))


def arrows(found: list[Import]) -> dict[str, set[str]]:
    """Room → the rooms that it imports."""
    graph: dict[str, set[str]] = defaultdict(set)
    for one in found:
        graph[one.importer].add(one.imported)
    return dict(graph)


def cycles(graph: Mapping[str, set[str]]) -> list[list[str]]:
    """The groups of rooms that reach each other, by the names of their members."""
    reached = {room: _reached(graph, room) for room in graph}
    mutual = {room: [other for other in seen if room in reached.get(other, ())] for room, seen in reached.items()}
    return [list(group) for group in sorted({tuple(sorted(group)) for group in mutual.values() if group})]


def floors(graph: Mapping[str, set[str]]) -> int:
    """The rooms on the longest way down; a cycle counts as one."""
    home = {room: group[0] for group in cycles(graph) for room in group}
    below: dict[str, set[str]] = defaultdict(set)
    for room, others in graph.items():
        below[home.get(room, room)] |= {home.get(other, other) for other in others} - {home.get(room, room)}

    def height(room: str) -> int:
        return 1 + max((height(other) for other in below.get(room, ())), default=0)

    return max(map(height, list(below)), default=0)


def _modules(folder: Path, name: str) -> Iterator[tuple[str, Path]]:
    for file in sorted(folder.rglob("*.py")):
        parts = file.relative_to(folder).with_suffix("").parts
        yield ".".join([name, *(parts[:-1] if parts[-1] == "__init__" else parts)]), file


def _room(module: str, files: Mapping[str, Path]) -> str:
    package = module if files[module].name == "__init__.py" else module.rpartition(".")[0]
    room = module if package in ("equipoise", "equipoise.pipelines") else package
    return room.removeprefix("equipoise.")


def _imported(tree: ast.Module, files: Mapping[str, Path]) -> Iterator[tuple[int, str]]:
    """(line, module) of each import of a module of ours."""
    for node in ast.walk(tree):
        if isinstance(node, ast.Import):
            names = [alias.name for alias in node.names]
        elif isinstance(node, ast.ImportFrom):
            inside = [f"{node.module}.{alias.name}" for alias in node.names]
            names = [name if name in files else str(node.module) for name in inside]
        else:
            continue
        yield from ((node.lineno, name) for name in dict.fromkeys(names) if name in files)


def _reached(graph: Mapping[str, set[str]], start: str) -> set[str]:
    seen: set[str] = set()
    waiting = [start]
    while waiting:
        for other in graph.get(waiting.pop(), ()):
            if other not in seen:
                seen.add(other)
                waiting.append(other)
    return seen


def main(root: Path) -> None:
    graph = arrows(imports(root))
    for room in rooms(root):
        print(f"{room} → {', '.join(sorted(graph.get(room, ()))) or 'nothing'}")
    circles = cycles(graph)
    count = sum(map(len, graph.values()))
    print(f"\n{len(rooms(root))} rooms, {count} arrows, {floors(graph)} floors, {len(circles)} cycles")
    for circle in circles:
        print(f"cycle: {', '.join(circle)}")


if __name__ == "__main__":
    main(Path(sys.argv[1]) if sys.argv[1:] else Path(__file__).parent.parent)
