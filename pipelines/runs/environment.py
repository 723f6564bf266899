"""What a run was made with: versions, code, hardware. Reads metadata only; imports no library for its version."""

import json
import os
import platform
import subprocess
import sys
from contextlib import AbstractContextManager, chdir, nullcontext
from functools import cache
from importlib.metadata import PackageNotFoundError, version
from importlib.resources import files
from pathlib import Path
from typing import Any

import psutil

from equipoise.pipelines.files import write_atomic

_PACKAGES = ("equipoise", "torch", "diffusers", "transformers", "peft", "accelerate", "safetensors", "numpy")


def describe(seed: int | None) -> dict[str, Any]:
    """Everything that a reader needs in order to repeat the run; memory in bytes."""
    return {
        "versions": {"python": platform.python_version()} | {name: _version(name) for name in _PACKAGES},
        "seed": seed,
        "commit": _commit(),
        "working_folder": os.getcwd(),  # relative paths in the configuration start here
        "host": {
            "name": platform.node(),
            "system": platform.platform(),
            "cpu": _cpu(),
            "cores": psutil.cpu_count(logical=False),
            "threads": psutil.cpu_count(),
            "memory": psutil.virtual_memory().total,
            "gpus": _gpus(),
        },
    }


def renew(file: Path, first: bool) -> None:
    """Write this session's environment into a run's `environment.json`.

    The first session's stands for the run, with the seed and working folder that the run was made with; a later
    session that differs from all before it is added under `later`.
    """
    before = _recorded(file)
    now = describe(before.get("seed"))
    now["working_folder"] = before.get("working_folder", now["working_folder"])
    if first or not before:
        write_atomic(file, json.dumps(now, indent=2))
        return
    later = before.pop("later", [])
    if now not in [before, *later]:
        write_atomic(file, json.dumps({**before, "later": [*later, now]}, indent=2))


def working_folder(file: Path) -> Path | None:
    """Where the run was started, as its `environment.json` says."""
    folder = _recorded(file).get("working_folder")
    return Path(folder) if folder and isinstance(folder, str) else None


def there(file: Path) -> AbstractContextManager[None]:
    """In the folder that the run was started in, from which its relative paths lead on, as far as it still exists."""
    folder = working_folder(file)
    return chdir(folder) if folder and folder.is_dir() else nullcontext()


def _recorded(file: Path) -> dict[str, Any]:
    try:
        return dict(json.loads(file.read_bytes()))
    except (OSError, ValueError, TypeError, RecursionError):
        return {}


@cache
def _version(package: str) -> str | None:
    try:
        return version(package)
    except PackageNotFoundError:
        return None


@cache
def _commit() -> str | None:
    """Equipoise's own git commit, with "+changes" where files differ from it; None where it is not run from a checkout.

    An installation may lie within somebody else's repository, which then does not track its files.
    """
    try:
        folder = str(files("equipoise"))
        _git(folder, "ls-files", "--error-unmatch", "__init__.py")
        commit = _git(folder, "rev-parse", "HEAD")
        return commit + ("+changes" if _git(folder, "status", "--porcelain", "--untracked-files=no") else "")
    except (OSError, subprocess.SubprocessError):
        return None


def _git(folder: str, *words: str) -> str:
    done = subprocess.run(["git", "-C", folder, *words], capture_output=True, text=True, timeout=5, check=True)
    return done.stdout.strip()


@cache
def _cpu() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
        return next(line.partition(":")[2].strip() for line in lines if line.startswith("model name"))
    except (OSError, StopIteration):
        return platform.processor() or platform.machine()


def _gpus() -> list[str]:
    """The names of the GPUs, if torch is there already; asking is not worth an import."""
    torch = sys.modules.get("torch")
    if torch is None or not torch.cuda.is_available():
        return []
    return [torch.cuda.get_device_name(index) for index in range(torch.cuda.device_count())]
