"""`equipoise reproduce`: a paper's table in small, beside the paper's own numbers."""

import argparse
import os
import platform
import resource
import time
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines.files import explained

PAPERS = {
    "scaled-gd": "scaled GD's Theorem 7.4",
    "alpha-adam": "AlphaAdam's Table 3",
    "ada-sam": "AdaSAM's Tables I and II and Figure 2",
    "commit": "CoMMIT's Table 1 and Figures 2, 3 and 6",
    "mimo": "MIMO's Table 1 and Figures 2 and 3",
    "mimo-toy": "MIMO's Appendix B and Figure 1",
}
WITH_DATA = ("mimo",)  # those that take a manifest in place of their embedded data


def add_arguments(parser: argparse.ArgumentParser) -> None:
    papers = "; ".join(f"{name}: {what}" for name, what in PAPERS.items())
    parser.add_argument("paper", metavar="PAPER", help=papers)
    parser.add_argument("--seeds", type=int, default=3, help="how many seeds (default: %(default)s)")
    parser.add_argument("--steps", type=int, help="of each training, for a quick look; the table wants the default")
    parser.add_argument(
        "--workers", type=int, default=os.cpu_count() or 1, help="processes that train (default: %(default)s)"
    )
    parser.add_argument("--data", metavar="MANIFEST", help=f"clips of your own, for {' and '.join(WITH_DATA)}")
    parser.add_argument("--output", type=Path, metavar="FOLDER", help="default: reproduce-PAPER in the folder of runs")
    parser.add_argument("--runs", metavar="FOLDER", help="the folder of runs")


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
    own = {"data": str(Path(args.data).resolve())} if args.data else {}
    root = Path(args.runs or os.environ.get("EQUIPOISE_RUNS") or "runs")
    folder = (args.output or root / f"reproduce-{args.paper}").resolve()
    if folder.exists() and not folder.is_dir():
        raise InputError(f"--output: {folder} is a file; give a folder, new or not.")
    new = [path for path in (folder, *folder.parents) if not path.exists()]
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    started = time.perf_counter()
    try:
        module = import_module(f"equipoise.pipelines.reproduce.{args.paper.replace('-', '_')}")
        found = module.reproduce(args.seeds, args.workers, args.steps, **own)
        seconds = time.perf_counter() - started
        print(found.text, flush=True)
        from torch import __version__

        about = {"paper": args.paper, "seconds": round(seconds, 1), "workers": args.workers}
        used = resource.getrusage(resource.RUSAGE_CHILDREN)
        about["processor_seconds"] = round(used.ru_utime + used.ru_stime, 1)
        about |= {"python": platform.python_version(), "torch": str(__version__), "machine": platform.machine()}
        paths = found.write(folder, about)
    except BaseException:
        with suppress(OSError):  # unless something else is in it
            for path in new or [folder]:
                path.rmdir()
        raise
    print(f"\n{seconds:.0f} seconds with {args.workers} worker(s), {about['processor_seconds']:.0f} of processor time.")
    for path in paths:
        print(f"  {path}")
    return 0
