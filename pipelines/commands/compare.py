"""`equipoise compare`: the same prompts from the same noise for every run, side by side."""

import argparse
import os
import secrets
import shutil
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from datetime import datetime
from pathlib import Path
from typing import Any

import psutil

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.comparing.report import NOT_JUDGED, write_report
from equipoise.pipelines.comparing.robustness import GAIN, shown_rate
from equipoise.pipelines.files import explained, user_path
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.runs import environment
from equipoise.pipelines.runs.store import Run, find
from equipoise.pipelines.tables import table

_MAKER = ".pid"  # in a folder that is being filled: who does it


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs_or_sweeps", nargs="+", metavar="SWEEP|RUN", help="Ids, folders, or latest.")
    parser.add_argument(
        "--prompt", action="append", help="A prompt in place of the configured ones; may be given several times."
    )
    parser.add_argument("--count", type=int, help="The number of pictures per prompt.")
    parser.add_argument("--scale", type=float, help="The strength of the LoRA, such as 0.7.")
    parser.add_argument("--sample-steps", type=int, help="The number of denoising steps.")
    parser.add_argument(
        "--clip",
        metavar="MODEL",
        help="A CLIP model (folder or hub id) that scores how pictures fit prompts and resemble training pictures.",
    )
    parser.add_argument(
        "--dino",
        metavar="MODEL",
        help="A DINO model (folder or hub id) that scores the likeness to the training pictures.",
    )
    parser.add_argument("--out", type=user_path, help="A new folder for the comparison.")
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")


def run(args: argparse.Namespace) -> int:
    found = [find(ref, args.runs) for ref in args.runs_or_sweeps]
    keys = {"prompts": args.prompt, "count": args.count, "scale": args.scale, "steps": args.sample_steps}
    changes = {f"samples.{key}": value for key, value in keys.items() if value is not None}
    for name in ("clip", "dino"):
        if path := getattr(args, name):
            changes[f"judges.{name}"] = str(user_path(path).resolve()) if user_path(path).exists() else path
    compare_and_report(found, changes, args.out)
    return 0


def compare_and_report(
    found: Sequence[Run], changes: dict[str, Any] | None = None, out: Path | None = None
) -> Comparison:
    """Compares runs and the cells of sweeps, writes the report, and prints where it is and what it says.

    Raises:
        InputError: nothing to compare, runs of different pipelines or bases, a folder that is in use.
    """
    runs = [run for one in found for run in (sweeps.cells(one) if one.status().kind == "sweep" else [one])]
    if not runs:
        raise InputError("comparison: there are no runs in what was given.")
    waiting = [run.id for run in runs if not run.status().over]
    if waiting:
        raise InputError(
            f"comparison: {', '.join(waiting[:3])} {'is' if len(waiting) == 1 else 'are'} not finished yet."
        )
    loaded = [run.config() for run in runs]
    if len(kinds := {config.pipeline for config in loaded}) > 1:
        raise InputError(f"comparison: runs of different pipelines ({', '.join(sorted(kinds))}) cannot be compared.")
    first = configs.set_keys(loaded[0], changes, source="comparison") if changes else loaded[0]
    pipeline = registry.load("pipelines", loaded[0].pipeline)
    folder, name = _place(found, out, own=bool(changes))
    with _swapped_in(folder) as staging, environment.there(runs[0].folder / "environment.json"):
        asked = getattr(first, "samples", None), getattr(first, "judges", None)
        comparison = pipeline.compare(name, staging, runs, loaded, *asked)
        paths = write_report(comparison)
    comparison.folder = folder
    _say(comparison, {what: folder / path.name for what, path in paths.items()})
    return comparison


def _place(found: Sequence[Run], out: Path | None, own: bool) -> tuple[Path, str]:
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
    return found[0].root / "comparisons" / name, found[0].id if len(found) == 1 else f"comparison {name}"


@contextmanager
def _swapped_in(folder: Path) -> Iterator[Path]:
    """A folder to fill, which takes the place of `folder` when it is complete, and vanishes when something fails."""
    mark = secrets.token_hex(4)
    staging, old = (folder.with_name(f".{folder.name}.{what}-{mark}") for what in ("new", "old"))
    try:
        with explained(folder):
            staging.mkdir(parents=True)
            (staging / _MAKER).write_text(str(os.getpid()))
        yield staging
        with explained(folder):
            (staging / _MAKER).unlink()
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


def being_made(folder: Path) -> int | None:
    """How many files a living process has made so far of the comparison that is to be `folder`; None: none makes it."""
    for staging in folder.parent.glob(f".{folder.name}.new-*"):
        with suppress(OSError, ValueError):
            if psutil.pid_exists(int((staging / _MAKER).read_text())):
                return sum(path.is_file() for path in staging.rglob("*")) - 1
    return None


def _say(comparison: Comparison, paths: dict[str, Path]) -> None:
    shown = [
        name
        for name in dict.fromkeys(
            (
                "score",
                "object",
                "colour",
                "shape",
                "kept",
                "broken",
                *comparison.scored,
                "loss_after",
                *comparison.beside,
            )
        )
        if any(name in cell.metrics for cell in [comparison.base, *comparison.cells])
    ]
    seeds = len({cell.seed for cell in comparison.cells}) > 1
    rows = [
        [
            cell.row,
            "" if not cell.run else shown_rate(cell.rate),
            *([cell.seed if cell.run else ""] if seeds else []),
            *(f"{cell.metrics[name]:.3g}" if name in cell.metrics else "" for name in shown),
            cell.state,
        ]
        for cell in [comparison.base, *comparison.cells]
    ]
    print(table(["", "RATE", *(["SEED"] if seeds else []), *(name.upper() for name in shown), "STATE"], rows))
    print(f"\nScore: {comparison.score}." if comparison.judged else f"\n{NOT_JUDGED}")
    for name, words in (comparison.beside | comparison.scored).items():
        print(f"{name.capitalize()}: {words}.")
    if comparison.judged:
        print("Learning rates that worked:")
        for row, found in comparison.ranges().items():
            print(f"  {row}: {found or 'none of those tried'}")
    if comparison.judged and comparison.line is None:
        print(f"No score is {GAIN:g} or more above the untouched base's; smaller gains are noise.")
    print()
    for what, path in paths.items():
        print(f"  {what + ':':<8} {path}")
