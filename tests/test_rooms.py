"""The map of the code: every room builds on earlier ones alone."""

import runpy
from pathlib import Path

ROOT = Path(__file__).parent.parent
MAP = runpy.run_path(str(Path(__file__).with_name("rooms.py")))
ORDER, IMPORTS = MAP["ORDER"], MAP["imports"](ROOT)


def wrong(one) -> bool:
    """An import of a later room, or of a command: the command line finds those by their entry points."""
    return one.imported == "pipelines.commands" or ORDER.index(one.importer) < ORDER.index(one.imported)


def test_every_room_has_its_place_in_the_order():
    assert sorted(ORDER) == sorted(MAP["rooms"](ROOT))


def test_no_room_imports_a_later_one():
    found = [f"{one.where}: {one.importer} → {one.imported}" for one in IMPORTS if wrong(one)]
    assert found == [], "A room imports what stands before it in ORDER of tests/rooms.py; move what is needed down."


def test_no_rooms_go_round():
    assert MAP["cycles"](MAP["arrows"](IMPORTS)) == []


def test_an_import_counts_wherever_it_stands(tmp_path):
    files = {
        "plugin/__init__.py": "",
        "plugin/low.py": "def f():\n    from equipoise.pipelines.room.one import g\n",
        "pipelines/room/__init__.py": '"""A room."""\n',
        "pipelines/room/one.py": "from typing import TYPE_CHECKING\nif TYPE_CHECKING:\n    from equipoise import low\n",
        "pipelines/room/two.py": "from equipoise.pipelines.room import one\nimport equipoise.ui.page\n",
        "ui/__init__.py": "",
        "ui/page.py": "from torch import Tensor\n",
    }
    for name, source in files.items():
        (tmp_path / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / name).write_text(source)
    assert MAP["imports"](tmp_path) == [
        ("plugin/low.py:2", "low", "pipelines.room"),
        ("pipelines/room/one.py:3", "pipelines.room", "low"),
        ("pipelines/room/two.py:2", "pipelines.room", "ui"),
    ]
    graph = MAP["arrows"](MAP["imports"](tmp_path))
    assert (MAP["cycles"](graph), MAP["floors"](graph)) == ([["low", "pipelines.room"]], 2)
