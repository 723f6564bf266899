"""`equipoise export`: a run's LoRA as a file that diffusers, kohya's scripts or ComfyUI load.

Or as a repository on the hub.
"""

import argparse
import tempfile
from pathlib import Path

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines.commands import hub
from equipoise.pipelines.commands.one_run import one_run
from equipoise.pipelines.files import user_path


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="An id (of a sweep's cell: SWEEP/CELL or latest/CELL), a folder, or latest."
    )
    parser.add_argument("--format", metavar="NAME", help="The format: diffusers (the default), kohya or comfyui.")
    parser.add_argument("--output", type=user_path, metavar="FILE", help="A new .safetensors file.")
    parser.add_argument(
        "--push-to-hub",
        metavar="REPO",
        help="Upload the result with its model card to this repository on the Hugging Face hub, which is made if it "
        f"is not there; with --format, a file of that format too. The token is read from the variable {hub.TOKEN}.",
    )
    parser.add_argument("--private", action="store_true", help="With --push-to-hub: make a new repository private.")
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")


def run(args: argparse.Namespace) -> int:
    found = one_run(args.run, args.runs)
    config = found.config()
    pipeline = registry.load("pipelines", config.pipeline)
    if args.format and pipeline.formats and args.format not in pipeline.formats:
        raise InputError(f"--format: {args.format!r} is none of {', '.join(pipeline.formats)}.")
    if not args.output and not args.push_to_hub:
        raise InputError("--output: give a new .safetensors file, or --push-to-hub REPO.")
    if args.push_to_hub:
        hub.token()  # before anything is written
    output: Path | None = args.output
    result = found.folder / "result"
    if output:
        if output.suffix != ".safetensors":
            raise InputError(f"--output: {output} must end in .safetensors.")
        if output.exists():
            raise InputError(f"--output: {output} is there already. Give a new name, or delete it first.")
        pipeline.export(result, args.format or "diffusers", output)
        print(output)
    if args.push_to_hub:
        with tempfile.TemporaryDirectory() as folder:
            pipeline.publish(found.folder, config, Path(folder))
            if args.format not in (None, "diffusers"):
                pipeline.export(result, args.format, Path(folder, f"{args.format}.safetensors"))
            print(hub.push(Path(folder), args.push_to_hub, args.private, f"{found.id}, by equipoise"))
    return 0
