"""`equipoise reproduce`: a paper's table in small, beside the paper's numbers."""

import argparse
import json
import os
import platform
import resource
import time
from collections.abc import Callable
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.files import explained, user_path
from equipoise.pipelines.runs.run import runs_folder

PAPERS = {
    "scaled-gd": "scaled GD's Theorem 7.4",
    "scaled-adamw": "scaled AdamW's Theorem 4.1",
    "scaled-text": "scaled GD and scaled AdamW by rank on text",
    "scaled-pictures": "scaled AdamW's Figures 1, 3 and 7 to 14 on drawn pictures",
    "alpha-adam": "AlphaAdam's Table 3",
    "alpha-adam-steps": "AlphaAdam's Theorem 3.5",
    "ada-sam": "AdaSAM's Tables I and II and Figures 1 to 3",
    "ada-sam-text": "AdaSAM in fine-tuning, by LoRA on text",
    "ada-sam-speedup": "AdaSAM's Corollary 1",
    "commit": "CoMMIT's Table 1 and Figures 2, 3, 5 and 6",
    "mimo": "MIMO's Table 1 and Figures 2 and 3",
    "mimo-toy": "MIMO's Appendix B and Figure 1",
}
WITH_DATA = ("mimo",)  # those that take a manifest in place of their embedded data
WITH_ADD = ("commit", "mimo", "scaled-pictures", "ada-sam-text")  # those that go on from an earlier call's results
WITH_TASK = ("commit",)  # those that have several tasks
CELLS = "cells.jsonl"  # one trained run a line, until results.json has them all


def add_arguments(parser: argparse.ArgumentParser) -> None:
    papers = "; ".join(f"{name}: {what}" for name, what in PAPERS.items())
    parser.add_argument("paper", metavar="PAPER", help=f"One of these; {papers}.")
    parser.add_argument("--seeds", type=int, default=3, help="The number of seeds (default: %(default)s).")
    parser.add_argument(
        "--steps", type=int, help="The steps of each training. Fewer give a quick look; the table needs the default."
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=os.cpu_count() or 1,
        help="The number of processes that train (default: %(default)s).",
    )
    parser.add_argument(
        "--data", metavar="MANIFEST", help=f"A manifest of your own clips, for {' and '.join(WITH_DATA)}."
    )
    parser.add_argument(
        "--add",
        action="store_true",
        help="Train only what the results in the output folder lack, of an interrupted call too, and add it, for "
        f"{' and '.join(WITH_ADD)}.",
    )
    parser.add_argument(
        "--task",
        action="append",
        help=f"One of the paper's tasks; may be given several times (default: all), for {' and '.join(WITH_TASK)}.",
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="FOLDER",
        help="The folder for the results (default: reproduce-PAPER in the folder of runs).",
    )
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")


def run(args: argparse.Namespace) -> int:
    if args.paper not in PAPERS:
        close = get_close_matches(args.paper, PAPERS, n=1)
        hint = f"Did you mean {close[0]!r}? " if close else ""
        raise InputError(f"reproduce: no paper {args.paper!r}. {hint}There are {' and '.join(PAPERS)}.")
    for option in ("seeds", "steps", "workers"):
        if (value := getattr(args, option)) is not None and value < 1:
            raise InputError(f"--{option}: must be at least 1, got {value}.")
    if args.data and args.paper not in WITH_DATA:
        raise InputError(f"--data: is for {' and '.join(WITH_DATA)}; {args.paper} has its own.")
    if args.add and args.paper not in WITH_ADD:
        raise InputError(f"--add: is for {' and '.join(WITH_ADD)}; {args.paper} is trained anew.")
    if args.task and args.paper not in WITH_TASK:
        raise InputError(f"--task: is for {' and '.join(WITH_TASK)}; {args.paper} has one.")
    own: dict[str, Any] = {"data": str(user_path(args.data).resolve())} if args.data else {}
    root = runs_folder(args.runs)
    folder = (args.output or root / f"reproduce-{args.paper}").resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file; give a folder, new or not.")
    spent: dict[str, float] = {}  # by earlier calls
    if args.add:
        before = _earlier(folder, args.paper)
        own["earlier"] = before["runs"]
        spent = {name: before[name] for name in _SPENT}
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        module = import_module(f"equipoise.pipelines.reproduce.{args.paper.replace('-', '_')}")
        if args.paper in WITH_ADD:
            own["keep"] = _keeper(folder / CELLS, args.add)
        if args.paper in WITH_TASK:
            own["tasks"] = args.task
        found = module.reproduce(args.seeds, args.workers, args.steps, **own)
        seconds = time.perf_counter() - started
        print(found.text, flush=True)
        from torch import __version__

        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        took = {"seconds": seconds, "processor_seconds": used.ru_utime + used.ru_stime}
        took = {name: round(value + spent.get(name, 0), 1) for name, value in took.items()}
        about = {"paper": args.paper, "workers": args.workers, **took}
        about |= {"python": platform.python_version(), "torch": str(__version__), "machine": platform.machine()}
        paths = found.write(folder, about)
        (folder / CELLS).unlink(missing_ok=True)
    except BaseException:
        with suppress(OSError):  # unless something else is in it
            for path in new or [folder]:
                path.rmdir()
        raise
    print(
        f"\n{took['seconds']:.0f} seconds with {args.workers} worker(s), {took['processor_seconds']:.0f} of processor "
        f"time{', earlier calls included' if spent else ''}."
    )
    for path in paths:
        print(f"  {path}")
    return 0


_SPENT = ("seconds", "processor_seconds")


def _keeper(file: Path, add: bool) -> Callable[[dict[str, Any]], None]:
    """Gives a function that keeps a trained run on disk, whatever becomes of those after it."""
    from torch import __version__

    if not add:
        file.unlink(missing_ok=True)

    def keep(cell: dict[str, Any]) -> None:
        with file.open("a", encoding="utf-8") as lines:
            lines.write(json.dumps({"torch": str(__version__), "run": cell}) + "\n")

    return keep


def _earlier(folder: Path, paper: str) -> dict[str, Any]:
    """What earlier calls wrote: results.json, and the runs of a call that was interrupted.

    Raises:
        InputError: there is nothing, or it is another paper's or another version's of torch, whose numbers differ.
    """
    from torch import __version__

    file, cells = folder / "results.json", folder / CELLS
    found: dict[str, Any] = {"runs": [], **dict.fromkeys(_SPENT, 0.0)}
    try:
        if file.exists() or not cells.exists():
            whole = json.loads(file.read_text(encoding="utf-8"))
            same = {"paper": paper, "torch": str(__version__)}
            strange = [f"{name} {whole[name]}, not {value}" for name, value in same.items() if whole[name] != value]
            found = {"runs": [dict(run) for run in whole["runs"]], **{name: float(whole[name]) for name in _SPENT}}
        else:
            strange = []
        if cells.exists():
            file = cells
            lines = [json.loads(line) for line in cells.read_text(encoding="utf-8").splitlines()]
            strange += [f"torch {x['torch']}, not {__version__}" for x in lines if x["torch"] != str(__version__)][:1]
            found["runs"] += [dict(line["run"]) for line in lines]
            for name in _SPENT:
                found[name] += sum(line["run"]["processor_seconds"] for line in lines)
    except (OSError, ValueError, KeyError, TypeError) as error:
        reason = getattr(error, "strerror", None) or f"not what `equipoise reproduce {paper}` writes ({error!r})"
        raise InputError(f"--add: {file} cannot be added to: {reason}. Leave out --add to begin anew.") from None
    if strange:
        raise InputError(f"--add: {file} is of {' and '.join(strange)}. Give another --output, or leave out --add.")
    return found
