"""`equipoise export`: what a run has learnt, as a file for another app."""

import argparse
from pathlib import Path

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines.store import TOP, find


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("run", metavar="RUN", help="an id (a sweep's cell: SWEEP/CELL), a folder, or latest")
    parser.add_argument("--format", required=True, metavar="NAME", help="diffusers, kohya or comfyui")
    parser.add_argument("--output", required=True, type=Path, metavar="FILE", help="a new .safetensors file")
    parser.add_argument("--runs", metavar="FOLDER", help="the folder of runs")


def run(args: argparse.Namespace) -> int:
    found = find(args.run, args.runs, (*TOP, "cell"))
    if found.status().kind == "sweep":
        raise InputError(f"{found.id} is a sweep, and one of its cells is wanted. `equipoise runs --all` lists them.")
    pipeline = registry.load("pipelines", found.config().pipeline)
    if pipeline.formats and args.format not in pipeline.formats:
        raise InputError(f"--format: {args.format!r} is none of {', '.join(pipeline.formats)}.")
    output: Path = args.output
    if output.suffix != ".safetensors":
        raise InputError(f"--output: {output} must end in .safetensors.")
    if output.exists():
        raise InputError(f"--output: {output} is there already. Give a new name, or delete it first.")
    pipeline.export(found.folder / "result", args.format, output)
    print(output)
    return 0
