"""`equipoise run`: an unmodified training script with one of these optimizers.

The short form of `python -m equipoise.run`.
"""

import argparse

from equipoise.hosts.script import main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = "equipoise run SCRIPT.py [its arguments] --optimizer NAME [--optimizer-args key=value …]"


def run(args: argparse.Namespace) -> int:
    return main(args.words)
