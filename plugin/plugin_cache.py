"""Which third-party plugins can be used: each is loaded once, in a process of its own, and the errors are kept.

Loading a plugin runs third-party code and usually imports torch, which takes seconds; a listing wants neither. What is
built in is not loaded here: its own tests do that.
"""

import hashlib
import json
import os
import subprocess
import sys
from collections.abc import Sequence
from contextlib import redirect_stdout, suppress
from dataclasses import asdict
from pathlib import Path

from equipoise import registry
from equipoise.registry import Entry

_TIMEOUT = 60  # seconds for all plugins that are new
_TRUSTED = ("equipoise", "torch")


def load_errors(entries: Sequence[Entry]) -> list[str]:
    """Why each entry cannot be used; empty where it can."""
    file = Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "equipoise" / "plugins.json"
    known = _read(file)
    keys = {entry: _key(entry) for entry in entries if not entry.error and entry.distribution not in _TRUSTED}
    new = [entry for entry, key in keys.items() if key not in known]
    if new:
        print(f"loading {len(new)} new plugin{'s' if len(new) > 1 else ''} once …", file=sys.stderr)
        found = {keys[entry]: error for entry, error in zip(new, _load(new), strict=True)}
        known = found | {key: known[key] for key in keys.values() if key in known}
        with suppress(OSError):  # then they are loaded again next time
            file.parent.mkdir(parents=True, exist_ok=True)
            draft = file.with_name(f".{file.name}-{os.getpid()}")
            draft.write_text(json.dumps(known, indent=1))
            draft.replace(file)
    return [entry.error or (known[keys[entry]] if entry in keys else "") for entry in entries]


def _key(entry: Entry) -> str:
    """What has to stay the same for a kept error to hold: the entry, its package's files, and where modules come from.

    Installing or removing anything touches the folder that it is installed in.
    """
    origin = registry.find_source(entry.target.partition(":")[0].strip())[0]
    paths = [*_sources(origin), *map(Path, sys.path)]
    facts = [*asdict(entry).values(), sys.executable, *((str(path), _touched(path)) for path in paths)]
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()


def _sources(origin: str) -> list[Path]:
    """The files of the outermost package that a module's file is in; none where it has no file."""
    if not os.path.isabs(origin):
        return []
    top = Path(origin)
    while (top.parent / "__init__.py").is_file():
        top = top.parent
    return sorted(top.rglob("*.py")) or [top]


def _touched(path: Path) -> int:
    try:
        return path.stat().st_mtime_ns
    except OSError:
        return 0


def _read(file: Path) -> dict[str, str]:
    try:
        known = json.loads(file.read_text())
    except (OSError, ValueError):
        return {}
    return known if isinstance(known, dict) else {}


def _load(entries: Sequence[Entry]) -> list[str]:
    """Load the entries in one process or, if that one does not survive it, each in its own."""
    # -P: no module of the current folder's; -B: none is compiled, which touches the folder that it is in.
    command = [sys.executable, "-P", "-B", "-m", "equipoise.plugin_cache"]
    command += [f"{entry.kind} {entry.name}" for entry in entries]
    try:
        ended = subprocess.run(command, capture_output=True, text=True, timeout=_TIMEOUT)
        return json.loads(ended.stdout)
    except (subprocess.TimeoutExpired, ValueError) as error:
        if len(entries) > 1:
            return [_load([entry])[0] for entry in entries]
        slow = isinstance(error, subprocess.TimeoutExpired)
        what = f"it takes more than {_TIMEOUT} seconds to load" if slow else "loading it ends the process"
        return [registry.broken(entries[0], what)]


if __name__ == "__main__":
    with redirect_stdout(sys.stderr):  # whatever plugins print while they are imported
        result = [registry.check(registry.find(*words.split(" ", 1))) for words in sys.argv[1:]]
    print(json.dumps(result))
