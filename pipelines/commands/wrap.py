"""`equipoise wrap`: a program that starts its own workers, with one of these optimizers in each."""

import argparse

from equipoise.hosts.wrap import USAGE, main


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.usage = USAGE
    parser.epilog = "Example: equipoise wrap --optimizer scaled_adamw -- llamafactory-cli train lora.yaml"


def run(args: argparse.Namespace) -> int:
    return main(args.words)
