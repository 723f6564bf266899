"""CONTRIBUTING's table "to add X, write Y": each row's list is there, and names every file that it should."""

import ast
import re
import tomllib
from pathlib import Path

import pytest

ROOT = Path(__file__).parent.parent
POINTS = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]["entry-points"]
MAP = {"equipoise.ui": "ui", "equipoise.pipelines": "pipelines", "equipoise": "plugin"}  # import name → folder
TABLE = re.search(r"^\| to add .*?\n\n", (ROOT / "CONTRIBUTING.md").read_text(), re.M | re.S)
ROWS = {}  # what → (pattern of files, name of the list, file that holds it)
for _row in re.findall(r"^\| (.+?) \| `(.+?)` \| `(.+?)` in (\S+?\.\w+)", TABLE[0] if TABLE else "", re.M):
    ROWS[_row[0]] = _row[1:]
GROUPS = {what: row for what, row in ROWS.items() if row[2] == "pyproject.toml"}
LISTS = {what: row for what, row in ROWS.items() if row[2] != "pyproject.toml"}
# Modules of these folders that are none of what the row adds: bases, parts, and what several share.
BESIDES = {
    "a method": {"amsgrad", "attach", "directions", "reference", "schedules"},
    "an objective": {"clusters", "counted", "min_norm", "objective"},
    "a coordinator": {"norms", "sides", "balance", "components", "coordinator"},
    "a family of text-to-image models": {"config", "noise", "transformer", "unet"}
    | {
        "autoencoders",
        "generic",
        "one_step",
        "flows",
        "edits",
        "anima",
        "chroma",
        "hidream",
    },  # by the code of diffusers
    "a command": {"conversations", "hub", "one_run", "pictures", "question_sets", "skip_bad"},
    "a pipeline": set(),
}


def file_of(target: str) -> Path:
    """The file of an entry point's target."""
    module = target.partition(":")[0]
    name, folder = next((name, folder) for name, folder in MAP.items() if f"{module}.".startswith(f"{name}."))
    path = ROOT / folder / module.removeprefix(name).strip(".").replace(".", "/")
    return path / "__init__.py" if path.is_dir() else path.with_suffix(".py")


def test_the_table_has_a_row_for_each_group_of_entry_points():
    assert sorted(name for _, name, _ in GROUPS.values()) == sorted(POINTS) and len(LISTS) == 3


@pytest.mark.parametrize("what", GROUPS)
def test_every_file_of_a_row_is_named_in_its_group(what):
    pattern, group, _ = GROUPS[what]
    files = set(ROOT.glob(pattern.replace("NAME", "[!_]*")))
    if what == "a pipeline":  # its neighbours are rooms of other kinds
        files = {file for file in files if "(Pipeline):" in file.read_text()}
    named = {file_of(target) for target in POINTS[group].values()}
    assert all(file.is_file() for file in named)
    unnamed = {file.parent.name if file.name == "__init__.py" else file.stem for file in files - named}
    assert unnamed == BESIDES[what], "name it in pyproject.toml, or among BESIDES if it adds nothing of its own"


@pytest.mark.parametrize("what", LISTS)
def test_the_list_of_a_row_is_where_the_table_says(what):
    pattern, name, file = LISTS[what]
    assert (ROOT / pattern).parent.is_dir()
    targets = {
        target.id: node.value
        for node in ast.parse((ROOT / file).read_text()).body
        if isinstance(node, ast.Assign | ast.AnnAssign)
        for target in (node.targets if isinstance(node, ast.Assign) else [node.target])
        if isinstance(target, ast.Name)
    }
    found = targets[name]
    assert isinstance(found, ast.Dict) and len(found.keys) > 1


def test_every_paper_and_tab_has_its_file():
    papers, tabs = ((ROOT / file).read_text() for _, _, file in (LISTS["a paper's table"], LISTS["a tab of the page"]))
    names = re.findall(r'^    "([\w-]+)":', papers.partition("PAPERS = {")[2].partition("}")[0], re.M)
    files = {file.stem for file in (ROOT / "pipelines" / "reproduce").glob("[!_]*.py")}
    assert files == {name.replace("-", "_") for name in names}
    tabs = re.findall(r'^    "(\w+)":', tabs.partition("TABS:")[2].partition("\n}")[0], re.M)
    assert tabs and all((ROOT / "ui" / f"{tab.lower()}.py").is_file() for tab in tabs)
