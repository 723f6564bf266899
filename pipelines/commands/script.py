"""`equipoise run`: an unmodified training script with one of these optimizers.

The short form of `python -m equipoise.run`.
"""

import argparse
import atexit
import gc

from equipoise.hosts.script import main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "equipoise run SCRIPT.py [its arguments] --optimizer NAME [--optimizer-args key=value …]"


def run(args: argparse.Namespace) -> int:
    atexit.unregister(gc.freeze)  # of the command line: a script ends as under Python itself
    return main(args.words)
