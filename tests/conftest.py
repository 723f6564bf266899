"""Fixtures for every test."""

import random
import shutil
import site
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path

import pytest


@pytest.fixture(autouse=True)
def seed() -> None:
    """The same random numbers in every run; tests that never import torch do not pay for it."""
    random.seed(0)
    if numpy := sys.modules.get("numpy"):
        numpy.random.seed(0)
    if torch := sys.modules.get("torch"):
        torch.manual_seed(0)


@pytest.fixture
def distribution(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Installs a distribution on this process's path and its children's, as its dist-info and modules alone.

    Called as `distribution("name", {"equipoise.optimizers": {"entry": "module:Class"}}, module="its source")`; returns
    the folder that holds it.
    """
    folder = tmp_path / "site"
    folder.mkdir()
    monkeypatch.syspath_prepend(folder)
    monkeypatch.setenv("PYTHONPATH", str(folder))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))  # where the verdicts on plugins are kept

    def install(name: str, groups: dict[str, dict[str, str]], version: str = "1.0", **modules: str) -> Path:
        info = folder / f"{name.replace('-', '_')}-{version}.dist-info"
        info.mkdir()
        (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: {name}\nVersion: {version}\n")
        lines = [f"[{group}]\n" + "".join(f"{k} = {v}\n" for k, v in names.items()) for group, names in groups.items()]
        (info / "entry_points.txt").write_text("\n".join(lines))
        for module, source in modules.items():
            (folder / f"{module}.py").write_text(source)
            monkeypatch.delitem(sys.modules, module, raising=False)
        return folder

    return install


@pytest.fixture(scope="session")
def chromium() -> str:
    """A browser's path; `.ci/run` installs one, and elsewhere the tests that need it are skipped."""
    found = shutil.which("chromium") or shutil.which("chromium-browser") or shutil.which("google-chrome")
    if not found:
        pytest.skip("no Chromium is installed")
    return found


@pytest.fixture
def environment(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Makes a fresh virtual environment of the given wheels and this one's dependencies, and returns its python.

    `editable` says whether this environment's editable installs show through too, Equipoise among them.
    """
    monkeypatch.delenv("PYTHONPATH", raising=False)

    def make(*wheels: Path, editable: bool) -> Path:
        folder = tmp_path / "environment"
        subprocess.run([sys.executable, "-m", "venv", "--without-pip", folder], check=True)
        python = folder / "bin" / "python"
        pip = [sys.executable, "-m", "pip", "--python", python, "install", "-q", "--no-deps", "--no-index", *wheels]
        subprocess.run(pip, check=True)
        (packages,) = folder.glob("lib/python*/site-packages")
        # A path in a .pth file is searched, but the .pth files in it, which make installs editable, are not read.
        line = "import site; site.addsitedir({!r})" if editable else "{}"
        (packages / "dependencies.pth").write_text("\n".join(line.format(path) for path in site.getsitepackages()))
        return python

    return make
