"""`equipoise loss`: the last loss that a run has written down."""

import argparse

from equipoise.errors import InputError
from equipoise.pipelines.runs.store import find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", help="an id, a folder, or latest")


def run(args: argparse.Namespace) -> int:
    losses = [record["loss"] for record in find(args.run).metrics()]
    if not losses:
        raise InputError(f"{args.run}: it has taken no step yet. Ask again later.")
    print(f"{losses[-1]:.4g}")
    return 0
