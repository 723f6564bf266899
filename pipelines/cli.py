"""The `equipoise` command: finds the commands that are installed, and imports the module of the one that is chosen.

Exit codes: 0 done, 1 failed while running, 2 bad input, 130 or 143 stopped on request with the state saved.
"""

import sys

if __name__ == "__main__" and not sys.flags.safe_path:
    # `python -m` puts the current folder first, and a torch.py in it is not meant; from a file nothing is imported.
    sys.path[0] = sys.executable

import argparse
import atexit
import gc
import io
import os
import re
import tempfile
import traceback
import warnings
from collections.abc import Sequence
from contextlib import suppress
from difflib import get_close_matches
from importlib import import_module
from typing import Any, NoReturn

from equipoise import __version__, registry
from equipoise.errors import EquipoiseError, InputError
from equipoise.pipelines.files import disk_full
from equipoise.registry import Entry

# Else Python searches all that was imported for garbage when it ends, for more than a second after a training.
atexit.register(gc.freeze)

# At the start of a module. Parsing all of the modules would take longer than everything else that --help does.
_DOCSTRING = re.compile(r"""(?:\s+|#[^\n]*+)*+[rR]?(?P<quotes>"{3}|'{3}|"|')(?P<text>.*?)(?P=quotes)""", re.S)


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


def _chosen(argv: Sequence[str]) -> Entry:
    """The command that was asked for; argparse exits by itself for --help, --version and wrong usage."""
    known = {entry.name: entry for entry in registry.entries("commands")}
    if argv and argv[0] in known:
        return known[argv[0]]
    width = max(map(len, known), default=0)
    lines = [f"  {name:<{width}}  {_about(entry)}" for name, entry in known.items()]
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
    close = get_close_matches(command, known, n=1)
    top.error(f"no command {command!r}. " + (f"Did you mean {close[0]!r}? " if close else "") + "See --help.")


def _about(entry: Entry) -> str:
    """A line on a command: what its module's docstring says of it, and whose it is; nothing is imported for that."""
    if entry.error:
        return entry.error
    origin = "" if _ours(entry) else f" ({entry.distribution} {entry.version})"
    words = ""
    with suppress(Exception):  # whatever Python makes of what nobody can read
        found = _DOCSTRING.match(registry.find_source(entry.target)[1])
        words = found["text"].strip() if found else ""
    line = re.search(rf"^`equipoise {re.escape(entry.name)}`: (.+)$", words, re.M)
    return (line[1] if line else words.partition("\n")[0] or "it says nothing about itself").rstrip(".") + origin


def _ours(entry: Entry) -> bool:
    return entry.distribution == "equipoise"


@registry.looked_up_once()  # help and options name pipelines, plugins and more
def _arguments(entry: Entry, module: Any, words: Sequence[str]) -> argparse.Namespace:
    parser = _Parser(prog=f"equipoise {entry.name}", description=_about(entry))
    parser.set_defaults(command=entry.name)
    module.add_arguments(parser)
    if entry.name in ("run", "wrap") and words[:1] not in (["--help"], ["-h"]):  # what follows is mostly another's
        return argparse.Namespace(command=entry.name, words=list(words))
    return parser.parse_intermixed_args(words)  # intermixed: options may stand between key=value words


def _open_streams() -> None:
    """What was closed, as by `>&-`, leads to nowhere; characters that a terminal's encoding lacks are written as their
    numbers, as Python does on standard error."""
    for number, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(number)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free; a file of ours would otherwise
        if getattr(sys, name) is None:
            setattr(sys, name, open(number, "w" if number else "r", closefd=False))
    if isinstance(sys.stdout, io.TextIOWrapper):
        sys.stdout.reconfigure(errors="backslashreplace")


def main(argv: Sequence[str] | None = None) -> int:
    """Runs one command and returns its exit code.

    Raises:
        SystemExit: From argparse, for --help, --version (0) and wrong usage (2).
    """
    # Pillow's, of pictures that are then refused in a sentence of ours
    warnings.filterwarnings("ignore", "Image size .* exceeds limit")
    _open_streams()
    argv, entry = sys.argv[1:] if argv is None else argv, None
    try:
        entry = _chosen(argv)
        # A fault of ours keeps its traceback; a plugin that cannot be imported is a sentence.
        module = import_module(entry.target) if _ours(entry) and not entry.error else registry.load_entry(entry)
        code = module.run(_arguments(entry, module, argv[1:]))
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
        print(_unexpected(error, "equipoise" if entry is None or _ours(entry) else str(entry)), file=sys.stderr)
        return 1


def _unexpected(error: Exception, whose: str) -> str:
    """A sentence on an error that nobody had foreseen; its traceback goes into a file, unless the reason is plain.

    Args:
        whose: the program or the plugin that it came up in.
    """
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
        return f"{whose} has a fault: {words}. Please report it, with the traceback in {file.name}."
    except OSError:
        return f"{whose} has a fault: {words}. Please report it; its traceback could not be written."


if __name__ == "__main__":
    raise SystemExit(main())
