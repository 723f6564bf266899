"""Whether every process collects the same tests: pytest-xdist runs none where two of its workers do not.

    python tests/collect_twice.py

Collects here, and at the same time in a copy elsewhere: at another hour, with another hash seed, and with folders
listed backwards.
"""

import difflib
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
NOT_COPIED = shutil.ignore_patterns(".*", "__pycache__", "*.egg-info", "build", "dist")
# The local time differs in its day, hour, minute and second: POSIX reads this as so much ahead of and behind UTC.
HERE = {"PYTHONHASHSEED": "1", "TZ": "AAA-13:42:17"}
ELSEWHERE = {"PYTHONHASHSEED": "2", "TZ": "BBB+11:11:05"}


class Backwards:
    """What `os.scandir` finds, in the opposite order."""

    def __init__(self, path=".", scandir=os.scandir):
        with scandir(path) as found:
            self.entries = list(found)

    def __iter__(self):
        return self

    def __next__(self) -> os.DirEntry:
        if not self.entries:
            raise StopIteration
        return self.entries.pop()

    def __enter__(self):
        return self

    def __exit__(self, *error) -> None:
        self.entries.clear()

    close = __exit__


def not_copied(folder: Path, names: list[str]) -> set[str]:
    """Not what was made here, nor the runs of whoever works here."""
    return NOT_COPIED(str(folder), names) | ({"runs"} & set(names) if folder == ROOT else set())


def disturb() -> None:
    """Sets this process's clock a million seconds ahead, and has it find the entries of folders in another order."""
    now, nanoseconds, listdir = time.time, time.time_ns, os.listdir
    time.time = lambda: now() + 1e6
    time.time_ns = lambda: nanoseconds() + 10**15
    os.listdir = lambda path=".": listdir(path)[::-1]
    os.scandir = Backwards


class Listing:
    """Has pytest write each test's id, and its parameters but for the addresses of objects."""

    def __init__(self, file: str):
        self.file = Path(file)

    def pytest_collection_finish(self, session: pytest.Session) -> None:
        with self.file.open("w") as file:
            for item in session.items:
                given = repr(getattr(getattr(item, "callspec", None), "params", {}))
                print(item.nodeid, re.sub(r"\b0x[0-9a-f]+", "0x", given), file=file)


def collect(file: str, *how: str) -> int:
    """Lists the tests of the current folder in `file`; soaks count, for they are spread over processes, too."""
    if how:
        disturb()
    words = ["--collect-only", "-qq", "--no-summary", "-m", "", "-p", "no:cacheprovider"]
    return pytest.main(words, plugins=[Listing(file)])


def main() -> int:
    with tempfile.TemporaryDirectory() as place:
        copy, packages = Path(place, "a copy"), Path(place, "packages", "equipoise")
        shutil.copytree(ROOT, copy, ignore=lambda folder, names: not_copied(Path(folder), names))
        packages.mkdir(parents=True)  # the folders under their import names, before those that are installed
        for part in (*(copy / "plugin").iterdir(), *(copy / name for name in ("pipelines", "ui", "configs"))):
            (packages / part.name).symlink_to(part)
        files = [Path(place, name) for name in ("here", "elsewhere")]
        processes = [
            subprocess.Popen(
                [sys.executable, folder / "tests" / "collect_twice.py", file, *how],
                env={**os.environ, **variables},
                cwd=folder,
                stdout=subprocess.PIPE,
                stderr=subprocess.STDOUT,
                text=True,
            )
            for folder, file, how, variables in (
                (ROOT, files[0], [], HERE),
                (copy, files[1], ["disturbed"], {**ELSEWHERE, "PYTHONPATH": str(packages.parent)}),
            )
        ]
        for process, said in [(process, process.communicate()[0]) for process in processes]:
            if process.returncode:
                print(said, f"pytest could not collect in {process.args[1]}.", sep="\n", file=sys.stderr)
                return 1
        here, elsewhere = (file.read_text().splitlines() for file in files)
    difference = list(difflib.unified_diff(here, elsewhere, "here", "elsewhere", lineterm="", n=0))
    if difference:
        print(*(line[:300] for line in difference[:40]), sep="\n", file=sys.stderr)
        print(
            "Two processes collect different tests, or tests of different data. Let ids and parameters depend on "
            "nothing but the source: no clock, no order of sets or folders, no path, no address.",
            file=sys.stderr,
        )
        return 1
    print(f"{len(here)} tests, twice the same.")
    return 0


if __name__ == "__main__":
    raise SystemExit(collect(*sys.argv[1:]) if sys.argv[1:] else main())
