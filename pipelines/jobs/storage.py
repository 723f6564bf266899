"""A run's folder and its copy in a storage that fsspec knows: how a run gets to a machine that shares no disk.

The copy is plain files below a URL, and a list of them with their digests, which is written last. Who brings the copy
back takes all of what the list has, or nothing: a copy that is just changing, or was left half-written, is none.

Each time a run is sent, it gets a place of its own, URL/1, URL/2, …: a process that goes on in an earlier one, such as
on a node that was taken for lost, can neither spoil the new one nor be mistaken for it, and ends when it notices. No
clock decides what is newer, for nodes have their own.
"""

import hashlib
import json
import math
import re
import secrets
import shutil
import sys
import threading
import time
from collections.abc import Collection, Iterable, Iterator, Mapping
from contextlib import contextmanager, suppress
from pathlib import Path, PurePosixPath
from typing import Any

from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.files import explained
from equipoise.pipelines.runs import status
from equipoise.pipelines.runs.run import FOLDERS, REQUESTS, Run, sentence
from equipoise.pipelines.runs.store import Store

EVERY = 5.0  # seconds between two looks at what is new, while a run is trained
_LIST = "files.json"
_BLOCK = 1 << 20  # bytes
OUTAGE = 600.0  # seconds that a storage may not answer before something is given up
_LAST = ("metrics.jsonl", "log.txt", "status.json")  # they tell of the other files, and are copied after them


class Copy:
    """A run's folder here, which may be none yet, and its copy."""

    def __init__(self, folder: Path, url: str):
        """
        Raises:
            InputError: fsspec does not know this kind of storage, or lacks the package for it.
        """
        self.folder, self.url = folder, url
        self.files, self.place = _opened(url)
        self._seen: dict[str, tuple[tuple[int, ...], str]] = {}  # file here → its version, and its digest
        self._there: dict[str, str] = {}  # file in the storage → its digest, as far as that is known
        self._made: set[str] = set()  # folders in the storage
        self._before = 0.0  # the start of the run's last session when it was sent

    def push(self) -> None:
        """Makes the copy what the folder is.

        Raises:
            OSError: The storage does not take it.
        """
        here: dict[str, str] = {}
        for name in _names(self.folder):
            with suppress(FileNotFoundError):  # removed meanwhile, as old checkpoints are
                here[name] = self._sent(name)
        if here == self._there:
            return
        now = Run(self.folder).status()
        listed = {"made": now.created, "before": self._before, "session": now.started or 0.0, "files": here}
        self._write(_LIST, json.dumps(listed).encode())
        for name in self._there.keys() - here.keys():
            with suppress(FileNotFoundError):
                self.files.rm_file(f"{self.place}/{name}")
        self._there = here

    def pull(self) -> bool:
        """Makes the folder what the copy is; False where that is not whole, or not there, or does not go on from it.

        It does not if it is another run's, or if the run has had another session since it was sent.

        Raises:
            OSError: The storage does not answer.
            InputError: The folder cannot be written, or what is in the storage is no copy of a run.
        """
        try:
            said = json.loads(self.files.cat_file(f"{self.place}/{_LIST}"))
            there, made = dict(said["files"]), float(said["made"])
            before, session = float(said["before"]), float(said["session"])
        except (FileNotFoundError, ValueError, KeyError, TypeError, RecursionError):
            return False
        if self.folder.exists():
            now = Run(self.folder).status()
            if made != now.created or (now.started or 0.0) not in (before, session):
                return False
        if bad := [name for name in there if not (_proper(name) and self._fits(name, there))]:
            raise InputError(f"{self.place}: {bad[0]!r} is no file of a run; is something else kept there?")
        staging = self.folder / f".brought-{secrets.token_hex(4)}"
        with explained(self.folder):
            staging.mkdir(parents=True)
        try:
            new = [name for name, digest in there.items() if self._digest(name) != digest]
            if not all(self._fetched(name, there[name], staging / name) for name in new):
                return False
            if "status.json" in new:
                status.read(staging, as_written=True)
            with explained(self.folder):
                for name in sorted(new, key=_rank):
                    (self.folder / name).parent.mkdir(parents=True, exist_ok=True)
                    (staging / name).replace(self.folder / name)
                for name in _names(self.folder):
                    if name.startswith("checkpoints/") and name not in there:  # an older one
                        (self.folder / name).unlink(missing_ok=True)
                        with suppress(OSError):  # while there are others in it
                            (self.folder / name).parent.rmdir()
                for name in FOLDERS:  # storages keep no empty ones
                    (self.folder / name).mkdir(exist_ok=True)
        finally:
            shutil.rmtree(staging, ignore_errors=True)
        self._there, self._before = there, before
        return True

    def ask(self) -> None:
        """Passes requests on that are in the folder."""
        for kind in REQUESTS:
            if (file := self.folder / "requests" / kind).exists():
                self._write(f"requests/{kind}", b"")
                file.unlink(missing_ok=True)

    def fetch_requests(self) -> None:
        """Fetches requests that were passed on."""
        for kind in REQUESTS:
            if self.files.exists(f"{self.place}/requests/{kind}"):
                self.files.rm_file(f"{self.place}/requests/{kind}")
                Run(self.folder).request(kind)

    @contextmanager
    def kept(self, every: float) -> Iterator[None]:
        """Copies the folder while it is worked on, and, when that ends, once more; requests come the other way.

        Args:
            every: Seconds between two copies. A tenth of the time at most is spent on them.

        Raises:
            EquipoiseError: The last state could not be copied.
        """
        over = threading.Event()

        def keep() -> None:
            pause = every
            while not over.wait(pause):
                began = time.monotonic()
                try:
                    if self._withdrawn():
                        print(f"{self.place}: was given to another process; this one ends.", file=sys.stderr)
                        Run(self.folder).request("stop")
                        return
                    self.fetch_requests()
                    self.push()
                except Exception as error:  # a network may come back; the last copy tells where it does not
                    print(f"{self.place}: {error}", file=sys.stderr, flush=True)
                pause = max(every, 9 * (time.monotonic() - began))

        thread = threading.Thread(target=keep, name="copy", daemon=True)
        thread.start()
        try:
            yield
        finally:
            over.set()
            thread.join()
            until = time.monotonic() + OUTAGE
            while True:
                try:
                    if not self._withdrawn():
                        self.push()
                    break
                except Exception as error:
                    if time.monotonic() > until:
                        raise EquipoiseError(
                            f"{self.place}: the last state could not be brought there: {error}."
                        ) from error
                    time.sleep(every)

    def _withdrawn(self) -> bool:
        """Whether the run was sent once more since."""
        base, _, place = self.url.rpartition("/")
        return place.isdigit() and max(_places(base), default=0) > int(place)

    def _sent(self, name: str) -> str:
        """Copies a file, unless this version of it is there; returns the digest of what was copied."""
        version = _version(self.folder / name)
        known, digest = self._seen.get(name, ((), ""))
        if known != version or self._there.get(name) != digest:
            found = hashlib.blake2b(digest_size=16)
            with open(self.folder / name, "rb") as source, self._open(name) as target:
                while block := source.read(_BLOCK):
                    found.update(block)
                    target.write(block)
            digest = found.hexdigest()
            self._seen[name] = version, digest
        return digest

    def _fetched(self, name: str, digest: str, path: Path) -> bool:
        path.parent.mkdir(parents=True, exist_ok=True)
        found = hashlib.blake2b(digest_size=16)
        try:
            with self.files.open(f"{self.place}/{name}", "rb") as source, open(path, "wb") as target:
                while block := source.read(_BLOCK):
                    found.update(block)
                    target.write(block)
        except FileNotFoundError:
            return False
        return found.hexdigest() == digest

    def _fits(self, name: str, there: Mapping[str, str]) -> bool:
        """Whether a file of that name can be in the folder: none is a folder, too."""
        above = [str(parent) for parent in PurePosixPath(name).parents if parent.name]
        return not (
            (self.folder / name).is_dir() or any(path in there or (self.folder / path).is_file() for path in above)
        )

    def _digest(self, name: str) -> str | None:
        """Of the file here."""
        try:
            version = _version(self.folder / name)
            if self._seen.get(name, ((), ""))[0] != version:
                with open(self.folder / name, "rb") as file:
                    digest = hashlib.file_digest(file, lambda: hashlib.blake2b(digest_size=16)).hexdigest()
                self._seen[name] = version, digest
            return self._seen[name][1]
        except FileNotFoundError:
            return None

    def _write(self, name: str, data: bytes) -> None:
        with self._open(name) as target:
            target.write(data)

    def _open(self, name: str) -> Any:
        path = f"{self.place}/{name}"
        parent = path.rpartition("/")[0]
        if parent not in self._made:
            self.files.makedirs(parent, exist_ok=True)
            self._made.add(parent)
        return self.files.open(path, "wb")


class Copies:
    """The copies of a sweep's cells, where the sweep is: sent to their tasks, and fetched while these work and after.

    A storage that does not answer is asked again.

    Args:
        url: Of the storage.
    """

    def __init__(self, url: str):
        self.url = url.rstrip("/")
        self._copies: dict[str, Copy | None] = {}  # cell → its copy, once that was looked for
        self._looked = -math.inf  # when copies were looked at last
        self._away: dict[str, tuple[float, str]] = {}  # cell → since when it could not be fetched, and why
        self._silent: tuple[float, str] | None = None  # since when nothing was answered, and why

    def send(self, cell: Run) -> str | None:
        """Makes a copy of a cell for its task; returns its URL, or None where that cannot be for now.

        Raises:
            EquipoiseError: The storage has not answered for long.
        """
        if cell.id not in self._copies:  # one that is ahead of the folder is to be fetched first
            self._give_up()
            if said := self.given_up(cell):  # others are answered for
                cell.update(state="failed", message=said, queued=None, ended=time.time(), exit_code=1)
            return None
        try:
            copy = self._copies[cell.id] = send(cell.folder, self._place(cell))
        except Exception as error:  # each kind of storage has its own
            self._missed(cell, error)
            self._give_up()
            return None
        self._silent = None
        return copy.url

    def fetch(self, cells: Iterable[Run], at_work: Collection[str], ended: Collection[str]) -> None:
        """Brings back the cells whose tasks have ended, and now and then those that are at work.

        Once also those that a task of an earlier session may have left: the folder may know less than the copy.
        """
        due = time.monotonic() - self._looked >= EVERY
        for cell in cells:
            now, mine = cell.status(), cell.id in at_work
            if mine and now.taken_out:  # the copy says that it waits
                continue
            new = cell.id not in self._copies and now.state not in ("done", "diverged")
            left = not mine and (new or now.state in ("running", "dead"))
            if (cell.id in ended and cell.id not in self._away) or (due and (mine or left)):
                fetched = self._fetch(cell)
                if fetched and not mine and now.state == "queued" and cell.status().state in ("stopped", "failed"):
                    Store(cell.root).enqueue(cell)
        if due:
            self._looked = time.monotonic()

    def waits(self, cell: Run) -> bool:
        """Whether what a cell has come to is still to be fetched."""
        return cell.id in self._away and not self.given_up(cell)

    def given_up(self, cell: Run) -> str:
        """What to say of a cell that could not be fetched for long; empty for others."""
        since, why = self._away.get(cell.id, (math.inf, ""))
        return self._said(why) if time.monotonic() - since >= OUTAGE else ""

    def _fetch(self, cell: Run) -> bool:
        copy = None
        try:
            if copy := self._copies.get(cell.id) or newest(cell.folder, self._place(cell)):
                copy.ask()
                copy.pull()
        except InputError as error:  # of no use, and asking again does not help
            cell.log(str(error))
        except Exception as error:  # each kind of storage has its own
            self._missed(cell, error)
            self._away.setdefault(cell.id, (time.monotonic(), sentence(error)))
            return False
        self._copies[cell.id], self._silent = copy, None
        self._away.pop(cell.id, None)
        return True

    def _missed(self, cell: Run, error: Exception) -> None:
        if self._silent is None:
            self._silent = time.monotonic(), sentence(error)
            cell.log(f"{self.url}: {sentence(error)}; tried again")

    def _give_up(self) -> None:
        if self._silent and time.monotonic() - self._silent[0] >= OUTAGE:
            raise EquipoiseError(self._said(self._silent[1]))

    def _said(self, why: str) -> str:
        return f"{self.url} has not answered for {OUTAGE:g} s ({why}). `equipoise resume` goes on from what is there."

    def _place(self, cell: Run) -> str:
        """Also another sweep of that name may use the storage."""
        return f"{self.url}/{cell.id}/{cell.status().token or 'run'}"


def send(folder: Path, url: str) -> Copy:
    """Makes a new copy of a run; those that were made before are removed.

    Raises:
        OSError: The storage does not take it.
    """
    before = _places(url)
    copy = Copy(folder, f"{url}/{max(before, default=0) + 1}")
    copy._before = Run(folder).status().started or 0.0
    copy.push()
    for place in before:
        with suppress(Exception):  # what stays is removed next time
            copy.files.rm(f"{copy.place.rpartition('/')[0]}/{place}", recursive=True)
    return copy


def newest(folder: Path, url: str) -> Copy | None:
    """The last copy that was made of a run; None where there is none."""
    for place in sorted(_places(url), reverse=True):
        copy = Copy(folder, f"{url}/{place}")
        with suppress(FileNotFoundError):  # its sender died over it
            copy.files.info(f"{copy.place}/{_LIST}")
            return copy
    return None


def _places(url: str) -> list[int]:
    files, place = _opened(url)
    try:
        names = [str(path).rstrip("/").rpartition("/")[2] for path in files.ls(place, detail=False)]
    except FileNotFoundError:
        return []
    return [int(name) for name in names if re.fullmatch("[0-9]{1,9}", name)]


def check(url: str) -> None:
    """Writes into a storage and reads from it.

    Raises:
        InputError: It is of a kind that fsspec does not know, or cannot be written.
    """
    files, place = _opened(url)
    path, word = f"{place}/.equipoise-{secrets.token_hex(4)}", b"a test"
    try:
        files.makedirs(place, exist_ok=True)
        files.pipe_file(path, word)
        if files.cat_file(path) != word:
            raise OSError("what was written there is not what is read")
        files.rm_file(path)
    except Exception as error:  # each kind of storage has its own
        raise InputError(
            f"--storage {url}: cannot be used: {' '.join(str(error).split()) or type(error).__name__}."
        ) from error


def _opened(url: str) -> tuple[Any, str]:
    from fsspec.core import url_to_fs

    try:
        files, place = url_to_fs(url, use_listings_cache=False)
    except (ImportError, ValueError) as error:
        raise InputError(f"--storage {url}: {' '.join(str(error).split())}") from error
    except Exception as error:  # of a kind that connects at once
        raise InputError(f"--storage {url}: cannot be used: {' '.join(str(error).split())}.") from error
    return files, place.rstrip("/")


def _names(folder: Path) -> list[str]:
    """The files that are the run, in the order in which they are to be copied."""
    found = [path.relative_to(folder).as_posix() for path in folder.rglob("*") if path.is_file()]
    return sorted(filter(_proper, found), key=_rank)


def _proper(name: str) -> bool:
    """Whether this is a file of a run that others need: no lock, no request, nothing half-written, no way out."""
    parts = PurePosixPath(name).parts
    if not parts or "\\" in name or not name.isprintable() or name.startswith("/") or len(name) > 1000:
        return False
    inside = all(part[0] != "." and len(part.encode()) < 256 for part in parts)
    return inside and parts[0] not in ("lock", "requests", _LIST)


def _rank(name: str) -> tuple[int, str]:
    return (1 + _LAST.index(name) if name in _LAST else 0), name


def _version(path: Path) -> tuple[int, ...]:
    about = path.stat()
    return about.st_ino, about.st_mtime_ns, about.st_size
