"""The runs folder: making runs, finding them, listing them, and the queue of those that wait.

    RUNS/20260705-141500-vase-1f3a/       a run, or a sweep
    RUNS/20260705-141500-vase-1f3a/CELL/  a sweep's cell, itself a run
    RUNS/index.sqlite                     an index and queue, made anew from the folders whenever it is missing

Nothing here imports torch.
"""

import errno
import os
import re
import secrets
import shutil
import time
from collections.abc import Collection, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import asdict
from datetime import datetime
from difflib import get_close_matches
from json import dumps
from pathlib import Path

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.files import explained, write_atomic
from equipoise.pipelines.runs import environment, status
from equipoise.pipelines.runs.index import Index, look, run_folders, scan
from equipoise.pipelines.runs.run import FOLDERS, Run, runs_folder
from equipoise.pipelines.runs.status import Status

__all__ = ["Run", "Status", "Store", "find", "write_atomic"]

LONGEST = 120  # characters of an id, or of a cell's name
_PART = re.compile(rf"[A-Za-z0-9_][A-Za-z0-9_.,=+-]{{0,{LONGEST - 1}}}")
TOP = ("run", "sweep")


class Store:
    """A folder of runs."""

    def __init__(self, root: Path | str | None = None):
        """`root` is EQUIPOISE_RUNS, or "runs", where it is not given. Nothing is made before the first run is."""
        self.root = runs_folder(root)
        self.index = Index(self.root)

    def create(
        self,
        config: configs.RunConfig,
        kind: str = "run",
        sweep: str | None = None,
        id: str | None = None,
        cells: Mapping[str, configs.RunConfig] | None = None,
    ) -> Run:
        """Make a run's folder: all of it, or nothing.

        Args:
            config: what is written to its config.yaml.
            kind: "run", "sweep" or "cell".
            sweep: a cell's sweep.
            id: a name of the user's choice, for a cell its name within the sweep; by default made from time and name.
            cells: a sweep's, by name; they wait in the queue from the start.

        Raises:
            InputError: there is a run of that id; the id is not a word; the disk is full; ….
        """
        parent = self.get(sweep, kinds=("sweep",)).folder if sweep else self.root
        name = id or f"{datetime.now():%Y%m%d-%H%M%S}-{config.name}-{secrets.token_hex(2)}"
        for word in (name, *(cells or ())):
            if not _PART.fullmatch(word) or word == "latest":
                raise InputError(
                    f"the id {word!r} must be one word of at most {LONGEST} letters, digits and _ . , = + -, "
                    "and not 'latest'."
                )
        full = f"{sweep}/{name}" if sweep else name
        record = _record(config, full, kind, sweep)
        queued = {cell: _record(it, f"{full}/{cell}", "cell", full, time.time()) for cell, it in (cells or {}).items()}
        with _staged(parent, name, full) as folder:
            for cell, it in (cells or {}).items():
                _fill(folder / cell, it, queued[cell])
            _fill(folder, config, record)
        try:
            self.index.put(record, *queued.values())
            return Run(parent / name)
        except BaseException:  # an interrupt, too
            shutil.rmtree(parent / name)
            raise

    def get(self, ref: str, kinds: Collection[str] = TOP) -> Run:
        """The run of that id, or of the only id that starts so, or the newest of `kinds` for "latest".

        In "latest/CELL" it is the newest sweep.

        Never leaves this store: folders elsewhere are for `find`.

        Raises:
            InputError: there is none, or there are several.
        """
        if ref == "latest":
            for item in self.list(kinds=kinds):
                return self._open(item.id)
            raise InputError(f"{self.root}: there is no {' or '.join(kinds)} yet.")
        parts = ref.split("/")
        if parts[0] == "latest" and len(parts) == 2:
            ref = f"{self.get('latest', kinds=('sweep',)).id}/{parts[1]}"
            parts = ref.split("/")
        if len(parts) > 2 or not all(_PART.fullmatch(part) for part in parts):
            raise InputError(f"{ref!r} is not the id of a run. `equipoise runs` shows them.")
        if (self.root / ref / "status.json").is_file():
            return self._open(ref)
        kinds = ("cell",) if len(parts) == 2 else TOP
        ids = [item.id for item in self.list(kinds=kinds)]
        found = [id for id in ids if id.startswith(ref)]
        if len(found) == 1:
            return self._open(found[0])
        if found:
            raise InputError(f"{ref!r} may be {' or '.join(found[:4])}; give more of the id.")
        close = get_close_matches(ref, ids, n=2)
        hint = f"Did you mean {' or '.join(close)}?" if close else "`equipoise runs` shows those that are there."
        raise InputError(f"{self.root}: no run {ref!r}. {hint}")

    def at_work(self) -> list[Status]:
        """The runs and sweeps that are queued or running, by the index: who waits asks for them twice a second."""
        found = [look(self.root / id, id) for id in self.index.at_work()] if self.root.is_dir() else []
        return [item for item in found if not item.over]

    def list(
        self, states: Collection[str] | None = None, kinds: Collection[str] = TOP, sweep: str | None = None
    ) -> list[Status]:
        """How the runs stand, newest first; of all states and sweeps where none is given."""
        try:
            ids = self.index.ids(tuple(kinds), sweep) if self.root.is_dir() else []
            found = [look(self.root / id, id) for id in ids]
        except EquipoiseError:  # a folder that may be read only
            found = [item for folder in run_folders(self.root) for item in scan(folder)]
            found.sort(key=lambda item: item.created, reverse=True)
        return [
            item
            for item in found
            if item.kind in kinds and (states is None or item.state in states) and sweep in (None, item.sweep)
        ]

    def enqueue(self, run: Run) -> None:
        """Let a worker have this run.

        Raises:
            InputError: it is being trained.
        """
        run.update(state="queued", queued=time.time(), ended=None, exit_code=None, message="", pid=None)
        self.index.offer(run.id)

    def claim(self, sweep: str | None = None) -> Run | None:
        """The run that waits longest in the queue (of a sweep, or of all), now this process's; None when none waits.

        No run is given to two living processes; that of one which died before its session began is given again.
        """
        while id := self.index.claim(sweep):
            if look(self.root / id, id).state == "queued":  # the folder is the truth
                return self._open(id)
        return None

    def rebuild(self) -> None:
        """Make the index anew from the folders."""
        self.index.rebuild()

    def _open(self, id: str) -> Run:
        folder = (self.root / id).resolve()
        if not folder.is_relative_to(self.root):  # a link that leads elsewhere
            raise InputError(f"{id!r} lies outside of {self.root}; give its own folder.")
        return Run(folder)


def find(ref: str, root: Path | str | None = None, kinds: Collection[str] = TOP) -> Run:
    """The run that a user means: its folder, wherever that is, or what `Store.get` takes, in the store at `root`.

    Raises:
        InputError: there is none, or there are several.
    """
    if os.path.isfile(os.path.join(ref, "status.json")):  # unlike pathlib's, False also where no path can be so long
        return Run(ref)
    return Store(root).get(ref.rstrip("/"), kinds)


def _record(config: configs.RunConfig, id: str, kind: str, sweep: str | None, queued: float | None = None) -> Status:
    about = (id, kind, sweep, config.name, config.pipeline)
    section = None if kind == "sweep" else getattr(config, "optimizer", None)  # of a sweep, each cell has its own
    rate = getattr(section, "learning_rate", None)
    rate = rate if isinstance(rate, float) else None  # it may be anything in a plugin's record
    token = secrets.token_hex(8)
    return Status(*about, created=time.time(), queued=queued, token=token, learning_rate=rate)


def _fill(folder: Path, config: configs.RunConfig, record: Status) -> None:
    for sub in FOLDERS:
        (folder / sub).mkdir(parents=True)
    write_atomic(folder / "config.yaml", configs.dump(config, as_given=record.kind == "sweep"))
    write_atomic(folder / "environment.json", dumps(environment.describe(config.seed), indent=2))
    write_atomic(folder / "log.txt", "")
    write_atomic(folder / "status.json", dumps(status.plain(asdict(record)), indent=2))


@contextmanager
def _staged(parent: Path, name: str, id: str) -> Iterator[Path]:
    """A new folder to fill, which becomes `parent`/`name` when it is complete, and vanishes when something fails."""
    fresh = not parent.exists()
    staging = parent / f".new-{secrets.token_hex(4)}"
    try:
        with explained(parent):
            staging.mkdir(parents=True)
            yield staging
            try:
                staging.rename(parent / name)
            except OSError as error:
                if error.errno not in (errno.ENOTEMPTY, errno.EEXIST, errno.ENOTDIR):
                    raise
                raise InputError(
                    f"{parent / name}: exists already. `equipoise resume {Run(parent / name).ref}` continues it; a new "
                    "run needs a new id."
                ) from error
    except BaseException:
        shutil.rmtree(staging, ignore_errors=True)
        if fresh:
            with suppress(OSError):
                parent.rmdir()
        raise
