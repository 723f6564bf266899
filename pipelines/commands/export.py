"""`equipoise export`: a run's LoRA as a file that diffusers, kohya's scripts or ComfyUI load.

Of a multimodal language model as a folder: the adapter, or merged weights. Of audio-visual classification as a folder
too: weights, or ONNX. Or as a repository on the hub.
"""

import argparse
import os
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
    parser.add_argument(
        "--format",
        metavar="NAME",
        help="The format: of a LoRA for pictures diffusers (the default), kohya or comfyui; of a language model "
        "adapter (the default) or merged; of audio-visual classification weights (the default) or onnx.",
    )
    parser.add_argument(
        "--output",
        type=user_path,
        metavar="FILE",
        help="A new .safetensors file; of instruction tuning and audio-visual classification a new folder.",
    )
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
    usual = pipeline.formats[0] if pipeline.formats else "diffusers"
    kind = "folder" if pipeline.exports_folders else ".safetensors file"
    if not args.output and not args.push_to_hub:
        raise InputError(f"--output: give a new {kind}, or --push-to-hub REPO.")
    if args.push_to_hub:
        hub.token()  # before anything is written
    result = found.folder / "result"
    if args.output:
        output = Path(os.path.abspath(args.output))
        if output.suffix != ".safetensors" and not pipeline.exports_folders:
            raise InputError(f"--output: {args.output} must end in .safetensors.")
        if os.path.lexists(output):
            raise InputError(f"--output: {args.output} is there already. Give a new name, or delete it first.")
        pipeline.export(result, args.format or usual, output)
        print(args.output)
    if args.push_to_hub:
        with tempfile.TemporaryDirectory() as folder:
            repository = Path(folder, "repository")
            if pipeline.exports_folders:
                pipeline.export(result, args.format or usual, repository)
            else:
                repository.mkdir()
                pipeline.publish(found.folder, config, repository)
                if args.format not in (None, usual):
                    pipeline.export(result, args.format, repository / f"{args.format}.safetensors")
            print(hub.push(repository, args.push_to_hub, args.private, f"{found.id}, by equipoise"))
    return 0
