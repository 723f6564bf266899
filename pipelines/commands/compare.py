"""`equipoise compare`: compare runs or a sweep: grid picture, HTML report, table.

The same prompts from the same noise for every run, side by side.
"""

import argparse
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.comparing.report import NOT_JUDGED, best_words, usable_words
from equipoise.pipelines.comparing.robustness import shown_rate
from equipoise.pipelines.files import user_path
from equipoise.pipelines.jobs.making import make
from equipoise.pipelines.runs.store import Run, find
from equipoise.pipelines.tables import table


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
    """Compares as `making.make` does, and prints where the report is and what it says."""
    comparison, paths = make(found, changes, out)
    _say(comparison, paths)
    return comparison


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
    verdicts = ["VERDICT"] if comparison.judged else []
    rows = [
        [
            cell.row,
            "" if not cell.run else shown_rate(cell.rate),
            *([cell.seed if cell.run else ""] if seeds else []),
            *(f"{cell.metrics[name]:.3g}" if name in cell.metrics else "" for name in shown),
            cell.state,
            *(comparison.verdict(cell.row, cell.rate) for _ in verdicts),
        ]
        for cell in [comparison.base, *comparison.cells]
    ]
    names = [name.upper() for name in shown]
    print(table(["", "RATE", *(["SEED"] if seeds else []), *names, "STATE", *verdicts], rows))
    for doubt in comparison.doubts:
        print(f"\n{doubt}")
    print(f"\nScore: {comparison.score}." if comparison.judged else f"\n{NOT_JUDGED}")
    for name, words in (comparison.beside | comparison.scored).items():
        print(f"{name.capitalize()}: {words}.")
    if comparison.judged:
        print(usable_words(comparison))
        print("Learning rates that worked:")
        for row, found in comparison.ranges().items():
            print(f"  {row}: {found or 'none of those tried'}")
        print(best_words(comparison))
    print()
    for what, path in paths.items():
        print(f"  {what + ':':<8} {path}")
