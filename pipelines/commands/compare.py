"""`equipoise compare`: the same prompts from the same noise for every run, side by side."""

import argparse
import shutil
from collections.abc import Sequence
from datetime import datetime
from pathlib import Path
from typing import Any

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines import sweep as sweeps
from equipoise.pipelines.comparison import Comparison
from equipoise.pipelines.report import write_report
from equipoise.pipelines.store import Run, find
from equipoise.pipelines.tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("runs_or_sweeps", nargs="+", metavar="SWEEP|RUN", help="ids, folders, or latest")
    parser.add_argument(
        "--prompt", action="append", help="generate this instead of the configured prompts; may be given again"
    )
    parser.add_argument("--count", type=int, help="pictures per prompt")
    parser.add_argument("--scale", type=float, help="strength of the LoRA, such as 0.7")
    parser.add_argument("--sample-steps", type=int, help="denoising steps")
    parser.add_argument(
        "--clip", metavar="MODEL", help="a CLIP model (folder or hub id) to score pictures against prompts with"
    )
    parser.add_argument("--out", type=Path, help="a new folder for the comparison")
    parser.add_argument("--runs", metavar="FOLDER", help="the folder of runs")


def run(args: argparse.Namespace) -> int:
    found = [find(ref, args.runs) for ref in args.runs_or_sweeps]
    keys = {"prompts": args.prompt, "count": args.count, "scale": args.scale, "steps": args.sample_steps}
    changes = {f"samples.{key}": value for key, value in keys.items() if value is not None}
    compare_and_report(found, changes, args.clip, args.out)
    return 0


def compare_and_report(
    found: Sequence[Run], changes: dict[str, Any] | None = None, clip: str | None = None, out: Path | None = None
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
    folder, name = _place(found, out)
    first = configs.set_keys(loaded[0], changes, source="comparison") if changes else loaded[0]
    pipeline = registry.load("pipelines", loaded[0].pipeline)
    comparison = pipeline.compare(name, folder, runs, loaded, first.samples, clip)
    paths = write_report(comparison)
    _say(comparison, paths)
    return comparison


def _place(found: Sequence[Run], out: Path | None) -> tuple[Path, str]:
    """The comparison's folder, empty, and its name."""
    if out is not None:
        if out.exists() and (not out.is_dir() or any(out.iterdir())):
            raise InputError(f"--out: {out} exists and is not an empty folder; give a new one.")
        return out.resolve(), out.name
    if len(found) == 1:
        folder = found[0].folder / "comparison"
        shutil.rmtree(folder, ignore_errors=True)  # ours alone, and made anew
        return folder, found[0].id
    name = f"{datetime.now():%Y%m%d-%H%M%S}"
    return found[0].root / "comparisons" / name, f"comparison {name}"


def _say(comparison: Comparison, paths: dict[str, Path]) -> None:
    shown = [
        name
        for name in ("score", "object", "colour", "shape", "kept", "broken", "clip", "loss_after")
        if name in comparison.base.metrics
    ]
    rows = [
        [
            cell.row,
            "" if not cell.run else f"{cell.rate:.0e}",
            *(f"{cell.metrics[name]:.3g}" if name in cell.metrics else "" for name in shown),
            cell.state,
        ]
        for cell in [comparison.base, *comparison.cells]
    ]
    print(table(["", "RATE", *(name.upper() for name in shown), "STATE"], rows))
    print(f"\nScore: {comparison.score}.\nLearning rates that worked:")
    for row, found in comparison.ranges().items():
        print(f"  {row}: {found or 'none of those tried'}")
    print()
    for what, path in paths.items():
        print(f"  {what + ':':<8} {path}")
