"""`equipoise wrap`: a command that starts its own Python workers, with one of these optimizers in each of them."""

import argparse

from equipoise.hosts.wrap import USAGE, main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    parser.epilog = "Example: equipoise wrap --optimizer scaled_adamw -- llamafactory-cli train lora.yaml"


def run(args: argparse.Namespace) -> int:
    return main(args.words)
