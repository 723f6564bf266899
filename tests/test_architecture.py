"""docs/architecture.md and README.md name files and functions that exist."""

import ast
import re
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
TEXT = " ".join((ROOT / "docs" / "architecture.md").read_text(encoding="utf-8").split())
FILES = sorted(set(re.findall(r"`((?:plugin|pipelines|ui|configs|tests)/[\w/.]*)`", TEXT)))
NAMES = sorted(set(re.findall(r"`(\w+)`[ \w]*? in `([\w/]+\.py)`", TEXT)))


def defined(file: str) -> set[str]:
    """Names of a file's functions, classes and methods."""
    tree = ast.parse((ROOT / file).read_text(encoding="utf-8"))
    return {node.name for node in ast.walk(tree) if isinstance(node, ast.FunctionDef | ast.ClassDef)}


def test_the_walks_name_files_and_functions():
    assert len(FILES) > 20 and len(NAMES) > 20


@pytest.mark.parametrize("file", FILES)
def test_a_file_named_in_the_walks_exists(file):
    assert (ROOT / file).exists()


@pytest.mark.parametrize(("name", "file"), NAMES)
def test_a_function_named_in_the_walks_is_where_they_say(name, file):
    assert name in defined(file)


def test_every_folder_of_the_readme_exists_and_none_is_left_out():
    tree = (ROOT / "README.md").read_text(encoding="utf-8").partition("## Where things are")[2].split("```")[1]
    named, parents = set(), []
    for line in tree.strip().splitlines():
        if found := re.match(r"( *)([\w/]+)/ ", line):
            parents = [*parents[: len(found[1]) // 2], found[2]]
            named.add("/".join(parents))
    assert [name for name in sorted(named) if not (ROOT / name).is_dir()] == []
    rooms = {
        file.parent.relative_to(ROOT).as_posix()
        for top in ("plugin", "pipelines")
        for file in ROOT.glob(f"{top}/*/__init__.py")
    }
    assert rooms <= named
