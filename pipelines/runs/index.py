"""The SQLite table that indexes the runs of a folder and is their queue.

The folders are the truth. A table that is missing, damaged or of another version is made anew from them.
"""

import errno
import fcntl
import json
import logging
import shutil
import sqlite3
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from dataclasses import asdict, replace
from pathlib import Path
from typing import TypeVar

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.files import explained
from equipoise.pipelines.runs import status as statuses
from equipoise.pipelines.runs.status import Status

_VERSION = 1
_COLUMNS = ("id", "kind", "sweep", "name", "pipeline", "state", "created", "queued")
_SCHEMA = f"""
    PRAGMA journal_mode = WAL;
    CREATE TABLE runs (
        id TEXT PRIMARY KEY, kind TEXT, sweep TEXT, name TEXT, pipeline TEXT, state TEXT,
        created REAL, queued REAL, worker TEXT
    );
    CREATE INDEX by_age ON runs (created);
    PRAGMA user_version = {_VERSION};
"""
_PUT = (
    f"INSERT INTO runs ({', '.join(_COLUMNS)}) VALUES ({', '.join(f':{name}' for name in _COLUMNS)}) "
    f"ON CONFLICT (id) DO UPDATE SET {', '.join(f'{name} = :{name}' for name in _COLUMNS[1:])}"
)
_NO_DAMAGE = (sqlite3.SQLITE_BUSY, sqlite3.SQLITE_LOCKED, sqlite3.SQLITE_FULL, sqlite3.SQLITE_READONLY)
_ROOM = 100_000  # bytes that it takes to open a table: its journal's own index has 32 KiB
_KINDS = ("run", "sweep", "cell")
_log = logging.getLogger(__name__)
T = TypeVar("T")


class Index:
    """The index of one runs folder."""

    def __init__(self, root: Path):
        self.root = root
        self.file = root / "index.sqlite"

    def put(self, *items: Status) -> None:
        """Write down how runs stand."""
        self._with(lambda db: db.executemany(_PUT, [asdict(item) for item in items]))

    def ids(self, kinds: tuple[str, ...], sweep: str | None = None) -> list[str]:
        """Ids, newest first; what has come or gone by other hands since the last look is taken into account."""
        here = {folder.name for folder in run_folders(self.root)}

        def look(db: sqlite3.Connection) -> list[tuple[str, str]]:
            rows = db.execute("SELECT id, kind, state FROM runs ORDER BY created DESC, id DESC").fetchall()
            sound = all(isinstance(id, str) and kind in _KINDS and state in statuses.STATES for id, kind, state in rows)
            if not sound or len({id for id, *_ in rows}) < len(rows):  # bytes went bad where SQLite does not notice
                raise sqlite3.DatabaseError("holds what nobody wrote")
            return [(id, kind) for id, kind, _ in rows]

        known = {id for id, _ in self._with(look)}
        gone = [id for id in known if id.split("/")[0] not in here or not (self.root / id).is_dir()]
        if gone:
            self._with(lambda db: db.executemany("DELETE FROM runs WHERE id = ?", [(id,) for id in gone]))
        if new := here - known:
            self.put(*(item for name in new for item in scan(self.root / name)))
        wanted = "" if sweep is None else f"{sweep}/"
        return [id for id, kind in self._with(look) if kind in kinds and id.startswith(wanted)]

    def at_work(self) -> list[str]:
        """Ids of the runs and sweeps that were queued or running when they last reported their state."""
        asked = "SELECT id FROM runs WHERE state IN ('queued', 'running') AND kind <> 'cell'"
        return [id for (id,) in self._with(lambda db: db.execute(asked).fetchall())]

    def offer(self, id: str) -> None:
        """Let workers claim a run again that was claimed before."""
        self._with(lambda db: db.execute("UPDATE runs SET worker = NULL WHERE id = ?", (id,)))

    def claim(self, sweep: str | None) -> str | None:
        """Take the queued run that waits longest; no two living processes ever get the same one."""
        me = json.dumps(statuses.process())

        def take(db: sqlite3.Connection) -> str | None:
            db.execute("BEGIN IMMEDIATE")
            with db:
                waiting = db.execute(
                    "SELECT id, worker FROM runs WHERE state = 'queued' AND queued IS NOT NULL "
                    "AND (:sweep IS NULL OR sweep = :sweep) ORDER BY queued, id",
                    {"sweep": sweep},
                )
                free = next((id for id, worker in waiting if _free(worker)), None)
                db.execute("UPDATE runs SET worker = ? WHERE id = ?", (me, free))
                return free

        return self._with(take)

    def rebuild(self) -> None:
        """Make the table anew from the folders."""
        with self._building():
            self._build()

    def _with(self, work: Callable[[sqlite3.Connection], T]) -> T:
        """Do `work` in a connection of its own, on a new table where there is none that can be used."""
        try:
            with self._connection() as db:
                return work(db)
        except sqlite3.DatabaseError as error:
            problem = error
        try:
            with self._building():
                try:
                    with self._connection() as db:
                        return work(db)  # another process has just made it anew
                except sqlite3.DatabaseError as again:
                    if getattr(again, "sqlite_errorcode", 0) & 0xFF in _NO_DAMAGE:
                        raise
                self._build()
                with self._connection() as db:
                    return work(db)
        except sqlite3.DatabaseError as error:  # locked for too long, on a full disk, in a read-only folder
            if shutil.disk_usage(self.root).free < _ROOM:  # of which SQLite speaks in several ways
                with explained(self.file):
                    raise OSError(errno.ENOSPC, str(error)) from error
            raise EquipoiseError(f"{self.file}: cannot be used: {error}.") from problem

    @contextmanager
    def _connection(self) -> Iterator[sqlite3.Connection]:
        # mode=rw: a table is only ever created in full, by _build
        with closing(
            sqlite3.connect(f"{self.file.resolve().as_uri()}?mode=rw", uri=True, timeout=10, isolation_level=None)
        ) as db:
            if db.execute("PRAGMA user_version").fetchone()[0] != _VERSION:
                raise sqlite3.DatabaseError("made by another version")
            try:
                yield db
            except UnicodeDecodeError as error:
                raise sqlite3.DatabaseError("holds bytes that are no text") from error

    @contextmanager
    def _building(self) -> Iterator[None]:
        with explained(self.file), open(self.root / ".index.lock", "wb") as lock:
            fcntl.flock(lock, fcntl.LOCK_EX)
            yield

    def _build(self) -> None:
        _log.info("%s: made anew from the folders", self.file)
        new = self.file.with_name(f".{self.file.name}.new")
        new.unlink(missing_ok=True)
        with closing(sqlite3.connect(new, isolation_level=None)) as db:
            db.executescript(_SCHEMA)
            db.executemany(_PUT, [asdict(item) for folder in run_folders(self.root) for item in scan(folder)])
        for tail in ("-wal", "-shm"):  # those of the old table
            self.file.with_name(self.file.name + tail).unlink(missing_ok=True)
        new.replace(self.file)


def _free(worker: str | None) -> bool:
    """Whether no living process has claimed a run."""
    try:
        return not worker or statuses.gone(**json.loads(worker))
    except (ValueError, TypeError):
        return True


def run_folders(root: Path) -> list[Path]:
    """The folders of runs and sweeps right below `root`."""
    try:
        return [item for item in root.iterdir() if item.name[0] != "." and (item / "status.json").is_file()]
    except FileNotFoundError:
        return []


def scan(folder: Path) -> list[Status]:
    """How the run in `folder` stands, and, where it is a sweep, its cells."""
    return [look(folder, folder.name), *(look(cell, f"{folder.name}/{cell.name}") for cell in run_folders(folder))]


def look(folder: Path, id: str) -> Status:
    """How a run stands, also where its status cannot be read; its folder gives it its id."""
    try:
        return replace(statuses.read(folder), id=id)
    except InputError as error:
        kind, sweep = ("cell", id.split("/")[0]) if "/" in id else ("run", None)
        return Status(id=id, kind=kind, sweep=sweep, state="failed", message=str(error))
