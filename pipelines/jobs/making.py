"""Makes the comparison of runs and sweeps: checked, generated and measured by their pipeline, and written as a report.

It is filled beside the folder where it is to be, and takes its place when it is complete.
"""

import math
import os
import secrets
import shutil
import sys
from collections import Counter
from collections.abc import Collection, Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager, nullcontext, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.comparing.remade import carried_votes
from equipoise.pipelines.comparing.report import REWRITTEN, write_report
from equipoise.pipelines.files import explained, version
from equipoise.pipelines.jobs import hub_files
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.pipeline import Pipeline
from equipoise.pipelines.runs import environment
from equipoise.pipelines.runs.run import runs_folder
from equipoise.pipelines.runs.store import Run
from equipoise.pipelines.tables import listed

_FILES = "text_to_image"  # the pipeline of files that no run says the base of
STRENGTHS = 12  # at most in one comparison
_MAKER = ".pid"  # in a folder that is being filled: who does it


def make(
    found: Sequence[Run], changes: dict[str, Any] | None = None, out: Path | None = None
) -> tuple[Comparison, dict[str, Path]]:
    """Compares runs and the cells of sweeps, and writes the report.

    Args:
        changes: key of the configuration → what it is in place of the first run's.
        out: where the comparison is to be; None: in the one run's folder, or among the comparisons.

    Returns:
        The comparison, and what was written of it: what it is → the file.

    Raises:
        InputError: nothing to compare, runs of different pipelines or bases, a folder that is in use.
    """
    runs, loaded = _finished(found)
    first = configs.set_keys(loaded[0], changes, source="comparison") if changes else loaded[0]
    pipeline = registry.load("pipelines", loaded[0].pipeline)
    folder, name = _place(found, out, own=bool(changes))
    rewritten = REWRITTEN if (folder / "table.json").exists() else ()  # by votes on the comparison before
    with (
        ExitStack() as until_swapped,
        swapped_in(folder, rewritten) as staging,
        environment.there(runs[0].folder / "environment.json"),
    ):
        comparison = pipeline.compare(name, staging, runs, loaded, first)
        comparison.own = not _other_pictures(loaded[0], first)
        if not comparison.own:
            comparison.forget_scores()
        if outdated := until_swapped.enter_context(carried_votes(folder, comparison)):
            print(f"{outdated} of the votes are on what looked different, and no longer count.", file=sys.stderr)
        paths = write_report(comparison)
    comparison.folder = folder
    return comparison, {what: folder / path.name for what, path in paths.items()}


def _other_pictures(own: Any, asked: Any) -> bool:
    """Whether what is drawn is not what the runs are judged by: other prompts, or another strength."""
    mine, wanted = configs.flat(own), configs.flat(asked)
    return any(mine.get(key) != wanted.get(key) for key in ("samples.prompts", "samples.scale"))


def _finished(found: Sequence[Run]) -> tuple[list[Run], list[Any]]:
    """The runs and the cells of sweeps, and their configurations, if they can be compared."""
    runs = [run for one in found for run in (sweeps.cells(one) if one.status().kind == "sweep" else [one])]
    if not runs:
        raise InputError("comparison: there are no runs in what was given.")
    waiting = [run.id for run in runs if not run.status().over]
    if waiting:
        raise InputError(f"comparison: {listed(waiting)} {'is' if len(waiting) == 1 else 'are'} not finished yet.")
    loaded = [run.config() for run in runs]
    if len(kinds := {config.pipeline for config in loaded}) > 1:
        raise InputError(f"comparison: runs of different pipelines ({', '.join(sorted(kinds))}) cannot be compared.")
    return runs, loaded


def make_of_files(
    files: Sequence[Path],
    found: Sequence[Run],
    strengths: Sequence[float],
    changes: Mapping[str, Any],
    *,
    each_checkpoint: bool = False,
    runs: Path | str | None = None,
    out: Path | None = None,
) -> tuple[Comparison, dict[str, Path]]:
    """Compares files of weights, and runs' results or checkpoints, each at several strengths, and writes the report.

    Args:
        files: Of weights, of whatever origin.
        found: Runs and sweeps; the first one's configuration says the base, if there is one.
        strengths: Above 0, at most 12; of those that are written alike, the last.
        changes: Key of the configuration → what it is in place of that.
        each_checkpoint: Takes each checkpoint that a run has kept beside its result.
        runs: The folder of runs.
        out: Where the comparison is to be; None: among the comparisons.

    Returns:
        As `make`.

    Raises:
        InputError: As `make`; too many strengths or one that is not above 0; files without a base.
    """
    strengths = columns(strengths)
    cells, loaded = _finished(found) if found else ([], [])
    config = loaded[0] if loaded else registry.load("pipelines", _FILES).Config(name="files")
    pipeline = registry.load("pipelines", config.pipeline)
    _of_one_base(loaded, {"model.path", "model.revision"} - changes.keys() | {"data.resolution"})
    given = _labelled(pipeline, cells, files, each_checkpoint)
    if not given:
        raise InputError("comparison: none of these runs has a result yet.")
    first = configs.set_keys(config, changes, source="comparison")
    folder, name = _place([*found], out, own=True, root=runs_folder(runs))
    with (
        swapped_in(folder) as staging,
        environment.there(cells[0].folder / "environment.json") if cells else nullcontext(),
    ):
        comparison = pipeline.compare_files(name, staging, given, first, strengths)
        paths = write_report(comparison)
    comparison.folder = folder
    return comparison, {what: folder / path.name for what, path in paths.items()}


def columns(strengths: Sequence[float]) -> list[float]:
    """Strengths, of those that are written alike one.

    Raises:
        InputError: one is not above 0, or there are too many.
    """
    if wrong := [strength for strength in strengths if not 0 < strength < math.inf]:
        raise InputError(f"--scale: must be above 0, got {wrong[0]:g}; the untouched base is drawn in any case.")
    apart = list({f"{strength:g}": strength for strength in strengths}.values())
    if len(apart) > STRENGTHS:
        raise InputError(f"--scale: there are {len(apart)} strengths; give at most {STRENGTHS}.")
    return apart


def _labelled(
    pipeline: type[Pipeline], cells: Sequence[Run], files: Sequence[Path], each_checkpoint: bool
) -> dict[str, Path]:
    """Label → what is drawn with: runs' results and, if wanted, their checkpoints; then the files."""
    from equipoise.pipelines.runs import checkpoints  # which needs torch

    given: dict[str, Path] = {}
    names = Counter(run.id.rpartition("/")[2] for run in cells)
    for run in cells:
        short = run.id.rpartition("/")[2]  # of a cell, what sets it apart in its sweep
        label = short if names[short] == 1 else run.id
        own = {label: file} if (file := pipeline.result_file(run)).is_file() else {}
        if each_checkpoint:
            own |= {f"{label} {path.name}": path for path in checkpoints.complete(run.checkpoints)}
        if not own:
            print(f"{run.id}: has nothing to draw with yet, and is left out.", file=sys.stderr)
        given |= own
    for file in dict.fromkeys(files):
        label = next(name for name in _names(file) if _is_free(name, file, files, given))
        given[label] = file if hub_files.repository_of(file) else file.resolve()  # which there has no name
    return given


def _names(file: Path) -> Iterator[str]:
    """What a file may be called, the shortest first; where on this machine it lies is said last."""
    if repository := hub_files.repository_of(file):
        yield repository
    yield file.stem
    yield from ("/".join(file.parts[-count:]) for count in range(1, len(file.parts)))
    yield str(file)


def _is_free(name: str, file: Path, files: Sequence[Path], taken: Mapping[str, Path]) -> bool:
    """Whether no other file could be called the same; of a whole path, none can."""
    return name == str(file) or not (name in taken or any(name in _names(one) for one in files if one != file))


def _of_one_base(loaded: Sequence[Any], keys: set[str]) -> None:
    flat = [configs.flat(config) for config in loaded]
    for key in sorted(keys):
        if len(different := {str(one.get(key)) for one in flat}) > 1:
            values = " and ".join(sorted(different))
            raise InputError(f"comparison: {key} differs between the runs ({values}); compare runs of one base.")


def _place(found: Sequence[Run], out: Path | None, own: bool, root: Path | None = None) -> tuple[Path, str]:
    """The comparison's folder and its name; what was asked for in other words than the runs' gets a folder of its own.

    Raises:
        InputError: the folder that was asked for is in use.
    """
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out: {out} exists and is not an empty folder; give a new one.")
        return out.resolve(), out.name
    if len(found) == 1 and not own:
        return found[0].folder / "comparison", found[0].id
    name = f"{datetime.now():%Y%m%d-%H%M%S}-{secrets.token_hex(2)}"
    parent = found[0].root if found else root or runs_folder()
    return parent / "comparisons" / name, found[0].id if len(found) == 1 else f"comparison {name}"


@contextmanager
def swapped_in(folder: Path, rewritten: Collection[str] = ()) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when it is complete, and vanishes when something fails.

    Args:
        folder: where it is to be.
        rewritten: names of files in it that may be written meanwhile, and are replaced nevertheless.

    Raises:
        InputError: it cannot be written; or something else was written to `folder` meanwhile, which is kept: what was
            made is then beside it.
    """
    before = _held(folder, rewritten)
    mark = secrets.token_hex(4)
    staging, old = (folder.with_name(f".{folder.name}.{what}-{mark}") for what in ("new", "old"))
    try:
        with explained(folder):
            staging.mkdir(parents=True)
            (staging / _MAKER).write_text(str(os.getpid()))
        yield staging
        with explained(folder):
            (staging / _MAKER).unlink()
            if _held(folder, rewritten) != before:
                other = folder.with_name(f"{folder.name}-{mark}")
                staging.rename(other)
                raise InputError(
                    f"{folder}: something else was written there meanwhile, and is kept. What was made is in {other}."
                )
            if folder.exists():
                folder.rename(old)
            try:
                staging.rename(folder)
            except OSError:
                old.rename(folder)
                raise
    finally:
        shutil.rmtree(staging, ignore_errors=True)
        shutil.rmtree(old, ignore_errors=True)


def _held(folder: Path, rewritten: Collection[str]) -> dict[Path, tuple[int, ...]]:
    """What is in a folder but the files that may be rewritten, and what tells that it was written anew."""
    hidden = tuple(f".{name}." for name in rewritten)  # while it is written
    files = [path for path in folder.rglob("*") if path.is_file()]
    held = {
        path: version(path)
        for path in files
        if path.parent != folder or not (path.name in rewritten or path.name.startswith(hidden))
    }
    return held | {folder: version(folder)[: 1 if rewritten else None]}  # its own time is that of what is in it


def being_made(folder: Path) -> int | None:
    """How many files a living process has made so far of the comparison that is to be `folder`; None: none makes it."""
    for staging in folder.parent.glob(f".{folder.name}.new-*"):
        with suppress(OSError, ValueError):
            if psutil.pid_exists(int((staging / _MAKER).read_text())):
                return sum(path.is_file() for path in staging.rglob("*")) - 1
    return None
