"""The package map: what is listed is what is there, and the wheel holds all of it under the right names."""

import json
import re
import shutil
import subprocess
import sys
import tomllib
from pathlib import Path
from zipfile import ZipFile

import pytest

import equipoise

ROOT = Path(__file__).parent.parent
PYPROJECT = tomllib.loads((ROOT / "pyproject.toml").read_text())
SETUPTOOLS = PYPROJECT["tool"]["setuptools"]
MAP = SETUPTOOLS["package-dir"]  # {"equipoise": "plugin", "equipoise.pipelines": "pipelines", …}
IMPORT_ALL = """
import importlib, json, pkgutil, sys
import equipoise
optional, found = {"axolotl", "gradio", "ray", "swift"}, {}
walk = pkgutil.walk_packages(equipoise.__path__, "equipoise.", onerror=lambda name: None)
for name in ["equipoise", *(module.name for module in walk)]:
    if not name.endswith("__main__"):
        try:
            found[name] = importlib.import_module(name).__file__
        except ModuleNotFoundError as error:
            if error.name not in optional:
                raise
print(json.dumps(found))
"""


def packages_in_the_tree():
    """{import name: folder} of every folder under a mapped one that holds Python or YAML files."""
    found = {}
    for name, top in MAP.items():
        for file in (ROOT / top).rglob("*"):
            if file.suffix in (".py", ".yaml"):
                inside = file.parent.relative_to(ROOT / top).parts
                found[".".join([name, *inside])] = file.parent
    return found


def test_the_packages_listed_are_those_in_the_tree():
    found = packages_in_the_tree()
    assert len(found) > 8
    assert SETUPTOOLS["packages"] == sorted(found)
    for folder in found.values():
        assert (folder / "__init__.py").exists(), folder
    for name, folder in found.items():
        if any(folder.glob("*.yaml")):
            assert "*.yaml" in SETUPTOOLS["package-data"][name]


def test_tests_are_no_package():
    assert not list((ROOT / "tests").rglob("__init__.py"))


def test_the_version_is_said_once():
    assert PYPROJECT["project"]["version"] == equipoise.__version__


def test_code_imports_by_full_names_and_reads_data_by_resources():
    sources = {file: file.read_text() for top in MAP.values() for file in (ROOT / top).rglob("*.py")}
    assert len(sources) > 20
    for file, text in sources.items():
        assert not re.search(r"^\s*from \.", text, re.M), f"{file}: relative imports break the package map"
        assert "__file__" not in text, f"{file}: read data through importlib.resources.files"


@pytest.mark.slow
def test_the_wheel_is_whole_and_works_on_its_own(tmp_path, environment):
    source = tmp_path / "source"
    ignored = shutil.ignore_patterns("__pycache__", "*.egg-info")
    for name in MAP.values():
        shutil.copytree(ROOT / name, source / name, ignore=ignored)
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, source)
    # The source distribution first and the wheel from it, so that both are known to hold everything.
    build = [sys.executable, "-m", "build", "--no-isolation", "--outdir", tmp_path / "dist", source]
    done = subprocess.run(build, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr
    (wheel,) = (tmp_path / "dist").glob("*.whl")
    assert wheel.stat().st_size <= 25e6

    names = ZipFile(wheel).namelist()
    assert {name.partition("/")[0] for name in names} == {"equipoise", f"equipoise-{equipoise.__version__}.dist-info"}
    assert any(name.endswith("licenses/LICENSE") for name in names)
    in_wheel = sorted(name for name in names if not name.endswith("/") and ".dist-info/" not in name)
    in_tree = sorted(
        str(Path(name.replace(".", "/")) / file.relative_to(ROOT / top))
        for name, top in MAP.items()
        for file in (ROOT / top).rglob("*")
        if file.is_file() and "__pycache__" not in file.parts and file.suffix != ".pyc"
    )
    assert in_wheel == in_tree  # YAML files, model weights and py.typed among them
    assert sum(name.endswith(".yaml") for name in in_wheel) == len(list((ROOT / "configs").rglob("*.yaml")))

    python = environment(wheel, editable=False)
    done = subprocess.run([python, "-c", IMPORT_ALL], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    files = json.loads(done.stdout)
    assert set(SETUPTOOLS["packages"]) <= set(files)
    installed = tmp_path / "environment"
    assert [name for name, file in files.items() if not Path(file).is_relative_to(installed)] == []

    command = [installed / "bin" / "equipoise", "list", "--json"]
    listed = json.loads(subprocess.run(command, capture_output=True, check=True, cwd=tmp_path).stdout)
    ours = {(r["kind"], r["name"]): r["error"] for r in listed if r["distribution"] == "equipoise"}
    points = PYPROJECT["project"]["entry-points"]
    assert ours == {(g.removeprefix("equipoise."), n): "" for g, names in points.items() for n in names}
