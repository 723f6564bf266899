"""`equipoise demo`: compare learning rates on the embedded model, with no network.

AdamW and bounded AdamW at four learning rates, by what they learn and what they keep.
"""

import argparse
import os
import time

from equipoise.pipelines import config as configs
from equipoise.pipelines.commands.sweep import check_workers, resume
from equipoise.pipelines.jobs import sweep as sweeps
from equipoise.pipelines.training import processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("overrides", nargs="*", metavar="key=value", help="Values of keys, such as steps=100.")
    parser.add_argument(
        "--workers",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="The number of processes that train (default: %(default)s).",
    )
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")


def run(args: argparse.Namespace) -> int:
    check_workers(args.workers)
    processes.alone("The demo")
    started = time.perf_counter()
    overrides = [*args.overrides, f"runs={args.runs}"] if args.runs else args.overrides
    config = configs.load("text_to_image/demo", overrides)
    sweep = sweeps.create(config)
    print(
        "Training the embedded model on a new object, from six pictures, at four learning rates.",
        flush=True,
    )
    if code := resume(sweep, args.workers):
        return code
    print(
        f"\nDone in {time.perf_counter() - started:.0f} seconds. Open the report in a browser; the grid is a picture."
    )
    return 0
