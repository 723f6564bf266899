"""`equipoise compare`: compare runs or a sweep: grid picture, HTML report, table.

The same prompts from the same noise for every run, side by side.
"""

import argparse
import math
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.comparing.answer import answer
from equipoise.pipelines.comparing.comparison import Comparison
from equipoise.pipelines.comparing.report import not_judged, usable_words
from equipoise.pipelines.files import user_path
from equipoise.pipelines.jobs import hub_files
from equipoise.pipelines.jobs.making import make, make_of_files
from equipoise.pipelines.runs.store import Run, find
from equipoise.pipelines.tables import table


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "refs",
        nargs="+",
        metavar="SWEEP|RUN|FILE",
        help="Ids, folders, or latest; or LoRA files (.safetensors) of any program, also as hub:OWNER/NAME or "
        "hub:OWNER/NAME/FILE.safetensors, which are compared by strength.",
    )
    parser.add_argument(
        "--prompt", action="append", help="A prompt in place of the configured ones; may be given several times."
    )
    parser.add_argument("--count", type=int, help="The number of pictures per prompt.")
    parser.add_argument(
        "--scale",
        type=_strengths,
        metavar="S[,S…]",
        help="The strength of the LoRA, such as 0.7; several, such as 0.5,1, become the columns.",
    )
    parser.add_argument(
        "--checkpoints", action="store_true", help="Also draw from each checkpoint that the runs have kept."
    )
    parser.add_argument("--model", help="The base of LoRA files, a folder or a hub id, where no run says it.")
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
    at_hub = [ref for ref in args.refs if ref.startswith(hub_files.SIGN)]
    refs = [ref for ref in args.refs if ref not in at_hub]
    files = [path for ref in refs if (path := user_path(ref)).suffix == ".safetensors"]
    found = [find(ref, args.runs) for ref in refs if user_path(ref) not in files]
    files += map(hub_files.fetch, at_hub)
    keys = {"prompts": args.prompt, "count": args.count, "steps": args.sample_steps}
    changes: dict[str, Any] = {f"samples.{key}": value for key, value in keys.items() if value is not None}
    for name in ("clip", "dino"):
        if path := getattr(args, name):
            changes[f"judges.{name}"] = _path(path)
    strengths = args.scale or [1.0]
    if wrong := [strength for strength in strengths if not 0 <= strength < math.inf]:
        raise InputError(f"--scale: must be 0 or more, got {wrong[0]:g}.")
    if files or args.checkpoints or len(strengths) > 1:
        missing = [file for file in files if not file.is_file()]
        if missing:
            raise InputError(f"{missing[0]}: is no file.")
        if args.model:
            changes["model.path"] = _path(args.model)
        elif not found:
            raise InputError("--model: LoRA files need their base: a folder in diffusers' layout, or a hub id.")
        _say(
            *make_of_files(
                files, found, strengths, changes, each_checkpoint=args.checkpoints, runs=args.runs, out=args.out
            )
        )
        return 0
    if args.model:
        raise InputError("--model: a run says its base itself; this is for LoRA files alone.")
    if args.scale:
        changes["samples.scale"] = strengths[0]
    compare_and_report(found, changes, args.out)
    return 0


def _path(text: str) -> str:
    """A path from any working folder; a hub id as it is."""
    return str(user_path(text).resolve()) if user_path(text).exists() else text


def _strengths(text: str) -> list[float]:
    return [float(part) for part in text.split(",")]


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
            comparison.shown(cell.rate),
            *([cell.seed if cell.run else ""] if seeds else []),
            *(f"{cell.metrics[name]:.3g}" if name in cell.metrics else "" for name in shown),
            cell.state,
            *(comparison.verdict(cell.row, cell.rate) for _ in verdicts),
        ]
        for cell in [comparison.base, *comparison.cells]
    ]
    names = [name.upper() for name in shown]
    print(table(["", comparison.noun.upper(), *(["SEED"] if seeds else []), *names, "STATE", *verdicts], rows))
    for doubt in comparison.doubts:
        print(f"\n{doubt}")
    print(f"\nScore: {comparison.score}." if comparison.judged else f"\n{not_judged(comparison)}")
    for name, words in (comparison.beside | comparison.scored).items():
        print(f"{name.capitalize()}: {words}.")
    if comparison.judged:
        print(usable_words(comparison))
        print(f"{comparison.column.capitalize()}s that worked:")
        for row, found in comparison.ranges().items():
            print(f"  {row}: {found or 'none of those tried'}")
        print(answer(comparison))
    print()
    for what, path in paths.items():
        print(f"  {what + ':':<8} {path}")
