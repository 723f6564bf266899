"""The `equipoise` command: a table of commands, each a module that is imported only when its command is chosen.

Exit codes: 0 done, 1 failed while running, 2 bad input, 130 or 143 stopped on request with the state saved.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` puts the current folder first, and a torch.py in it is not meant; from a file nothing is imported.
    sys.path[0] = sys.executable

import argparse
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from difflib import get_close_matches
from importlib import import_module
from typing import NoReturn

from equipoise import __version__
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.files import disk_full

# command → (module in equipoise.pipelines.commands, one line of help); `args.command` tells a shared module which it is
COMMANDS = {
    "list": ("listing", "List what is installed: optimizers, coordinators, objectives, pipelines, configs."),
    "show": ("listing", "Show one of them: what it is, its options, its paper."),
    "train": ("train", "Train a configuration: equipoise train CONFIG [key=value …]."),
    "resume": ("train", "Continue a run from its last checkpoint."),
    "runs": ("runs", "List the runs so far and their states."),
    "logs": ("runs", "Print what a run has printed."),
    "stop": ("runs", "Ask a run to save its state and stop."),
    "run": ("script", "Run an unmodified training script with one of these optimizers."),
    "wrap": ("wrap", "Run a program that starts its own workers, with one of these optimizers in each."),
    "sweep": ("sweep", "Train over optimizers × learning rates × seeds, or any other keys."),
    "compare": ("compare", "Compare runs or a sweep: grid picture, HTML report, table."),
    "export": ("export", "Write a run's LoRA as a file that diffusers, kohya's scripts or ComfyUI load."),
    "prepare": ("prepare", "Write the manifest of a published audio-visual data set: equipoise prepare SET DIR."),
    "reproduce": ("reproduce", "Repeat a paper's table in small, beside the paper's numbers."),
    "ui": ("ui", "Serve the web page: launch runs, watch them, compare what they draw."),
    "demo": ("demo", "Compare learning rates on the embedded model, with no network."),
}


class _Parser(argparse.ArgumentParser):
    """Keys of a configuration, given as if they were options, are answered with how they are given."""

    def error(self, message: str) -> NoReturn:
        found = re.match(r"unrecognized arguments: --(\w[\w.-]*)(?:[= ](\S+))?", message)
        if found and any(action.dest == "overrides" for action in self._actions):
            key, value = found[1].replace("-", "_"), found[2] or "VALUE"
            if "=" in value:  # --set key=value, as others have it
                key, _, value = value.partition("=")
            message += f". A key of the configuration is given without dashes: {key}={value}"
        super().error(message.replace("required: CONFIG, key=value", "required: CONFIG"))


def _parse(argv: Sequence[str]) -> tuple[argparse.Namespace, str]:
    """The chosen command's arguments and its module's name; argparse exits by itself for --help and wrong usage."""
    width = max(map(len, COMMANDS))
    lines = [f"  {name:<{width}}  {text}" for name, (_, text) in COMMANDS.items()]
    top = argparse.ArgumentParser(
        prog="equipoise",
        usage="equipoise COMMAND …",
        description="Fine-tuning that forgives the learning rate.",
        epilog="\n".join(["Commands:", *lines, "", "`equipoise COMMAND --help` explains one."]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    top.add_argument("--version", action="version", version=f"equipoise {__version__}")
    top.add_argument("command", help=argparse.SUPPRESS)
    if not argv:
        top.print_help(sys.stderr)
        raise SystemExit(2)
    command = top.parse_args(argv[:1]).command  # what follows the command is the command's own
    if command not in COMMANDS:
        close = get_close_matches(command, COMMANDS, n=1)
        top.error(f"no command {command!r}. " + (f"Did you mean {close[0]!r}? " if close else "") + "See --help.")
    module = f"equipoise.pipelines.commands.{COMMANDS[command][0]}"
    parser = _Parser(prog=f"equipoise {command}", description=COMMANDS[command][1])
    parser.set_defaults(command=command)
    import_module(module).add_arguments(parser)
    if command in ("run", "wrap") and argv[1:2] not in (["--help"], ["-h"]):  # what follows is mostly another's
        return argparse.Namespace(command=command, words=list(argv[1:])), module
    return parser.parse_intermixed_args(argv[1:]), module  # intermixed: options may stand between key=value words


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Raises:
        SystemExit: From argparse, for --help, --version (0) and wrong usage (2).
    """
    # Pillow's, of pictures that are then refused in a sentence of ours
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    try:
        args, module = _parse(sys.argv[1:] if argv is None else argv)
        code = import_module(module).run(args)
        sys.stdout.flush()  # a reader that has gone away shows here rather than while Python shuts down
        return code
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141  # what a shell reports for a program that SIGPIPE ended
    except KeyboardInterrupt:
        return 130
    except EquipoiseError as error:
        print(error, file=sys.stderr)
        return 2 if isinstance(error, InputError) else 1
    except Exception as error:
        print(_unexpected(error), file=sys.stderr)
        return 1


def _unexpected(error: Exception) -> str:
    """A sentence on an error that nobody had foreseen; its traceback goes into a file, unless the reason is plain."""
    where = f"{error.filename}: " if isinstance(error, OSError) and error.filename else ""
    if disk_full(error):
        return (
            f"{where}the disk is full (or a quota or file size limit is reached). Free some space, or choose another "
            "place with --runs FOLDER, and start again."
        )
    if isinstance(error, OSError) and where:
        return f"{where}{error.strerror or error}. Nothing more was done; see to that, and start again."
    words = " ".join(f"{type(error).__name__}: {error}".split()).removesuffix(":")
    try:
        with tempfile.NamedTemporaryFile("w", prefix="equipoise-", suffix=".txt", delete=False) as file:
            traceback.print_exception(error, file=file)
        return f"equipoise has a fault: {words}. Please report it, with the traceback in {file.name}."
    except OSError:
        return f"equipoise has a fault: {words}. Please report it; its traceback could not be written."


if __name__ == "__main__":
    raise SystemExit(main())
