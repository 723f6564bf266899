"""`equipoise sweep`: train over the product of some keys' values, then compare what came out."""

import argparse
import sys

from equipoise.errors import InputError
from equipoise.pipelines import background
from equipoise.pipelines import config as configs
from equipoise.pipelines import sweep as sweeps
from equipoise.pipelines.axes import parse_axes
from equipoise.pipelines.store import Run, find

EPILOG = """examples:
  equipoise sweep text_to_image/demo
  equipoise sweep my.yaml --axis optimizer=adamw,scaled_adamw --axis learning_rate=1e-5,1e-4,1e-3 --axis seed=0,1
  equipoise sweep latest        continues a sweep where it stopped"""


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.formatter_class = argparse.RawDescriptionHelpFormatter
    parser.epilog = EPILOG
    parser.add_argument(
        "config", metavar="CONFIG|SWEEP", help="a YAML file or a shipped configuration; or a sweep to continue"
    )
    parser.add_argument(
        "overrides", nargs="*", metavar="key=value", help="other values for every cell, such as steps=100"
    )
    parser.add_argument(
        "--axis", action="append", default=[], metavar="KEY=V,V", help="a key and its values; replaces the file's axes"
    )
    parser.add_argument(
        "--workers", type=int, help="processes that train cells (by default one per CUDA device, or one)"
    )
    parser.add_argument("--id", help="the sweep's id (by default made from time and name)")
    parser.add_argument("--runs", metavar="FOLDER", help="the folder of runs")
    parser.add_argument("--no-compare", action="store_true", help="only train")
    parser.add_argument("--in-turn", action="store_true", help=argparse.SUPPRESS)  # given to detached processes


def run(args: argparse.Namespace) -> int:
    check_workers(args.workers)
    found = _continued(args) or _new(args)
    if args.in_turn and not background.wait_for_turn(found):
        print(f"{found.id}: was cancelled before it began.")
        return found.status().exit_code or 0
    return resume(found, args.workers, not args.no_compare)


def check_workers(workers: int | None) -> None:
    if workers is not None and workers < 1:
        raise InputError(f"--workers: must be at least 1, got {workers}.")


def resume(sweep: Run, workers: int | None = None, compare: bool = True) -> int:
    """Trains what is left of a sweep, which is all of a new one, and compares; returns the exit code."""
    mine = sweeps.cells(sweep)
    print(f"{sweep.id}: {len(mine)} cells in {sweep.folder}", flush=True)
    try:
        outcome = sweeps.train(sweep, workers or sweeps.default_workers())
    except KeyboardInterrupt:
        print(f"{sweep.id}: interrupted. `equipoise resume {sweep.id}` continues it.", file=sys.stderr)
        return sweep.status().exit_code or 130
    print(f"{sweep.id}: {outcome.state}. {outcome.message}", flush=True)
    if outcome.state == "stopped":
        print(f"`equipoise resume {sweep.id}` continues it.")
        return sweep.status().exit_code or 0
    for line in sweeps.troubles(mine):
        print(line, file=sys.stderr, flush=True)
    if compare:
        from equipoise.pipelines.commands.compare import compare_and_report

        compare_and_report([sweep])
    return sweep.status().exit_code or 0


def _continued(args: argparse.Namespace) -> Run | None:
    """The sweep that is asked for, if it is one and not a configuration."""
    name = args.config
    if name in configs.shipped() or name.endswith((".yaml", ".yml")):
        return None
    try:
        sweep = find(name, args.runs, kinds=("sweep",))
    except InputError:
        if name == "latest":
            raise
        return None  # the configuration loader has the better words for what is wrong
    if sweep.status().kind != "sweep":
        raise InputError(f"{sweep.id}: is a single run; `equipoise resume {sweep.id}` continues it.")
    if args.overrides or args.axis or args.id:
        raise InputError(f"{sweep.id}: a sweep is continued as it is; start a new one to change keys or axes.")
    return sweep


def _new(args: argparse.Namespace) -> Run:
    overrides = [*args.overrides, f"runs={args.runs}"] if args.runs else args.overrides
    config = configs.load(args.config, overrides)
    if axes := parse_axes(args.axis):
        config = configs.set_keys(config, {"sweep": axes}, source="--axis")
    return sweeps.create(config, args.id)
