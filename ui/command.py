"""`equipoise ui`: the web page: launch runs, watch them, compare what they draw.

It needs the extra `ui`, and is found as plugins' commands are: nothing below this folder knows of it.
"""

import argparse
import os
from importlib.util import find_spec
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines.files import user_path

_TAKEN = ("demo", "uploads")  # which mean something else where data are chosen


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--host", default="127.0.0.1", help="The address to listen on (default: %(default)s).")
    parser.add_argument("--port", type=int, default=7860, help="The port; 0 takes a free one (default: %(default)s).")
    parser.add_argument(
        "--auth",
        type=user_path,
        metavar="FILE",
        help="A file with NAME:PASSWORD, needed for other addresses; or the environment variable EQUIPOISE_UI_AUTH.",
    )
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")
    parser.add_argument(
        "--data",
        action="append",
        default=[],
        metavar="NAME=FOLDER",
        help="A folder of data or models that the page may use; may be given several times.",
    )
    parser.add_argument(
        "--workers",
        type=int,
        default=min(2, os.cpu_count() or 1),
        help="The number of processes that train a sweep (default: %(default)s).",
    )
    parser.add_argument(
        "--read-only", action="store_true", help="Only show what is there: nothing can be started, changed or deleted."
    )


def run(args: argparse.Namespace) -> int:
    if not find_spec("gradio"):
        raise InputError("The web page needs gradio. pip install 'equipoise[ui]'.")
    from equipoise.ui.quick import import_gradio
    from equipoise.ui.safety import read_password

    if args.workers < 1:
        raise InputError(f"--workers: must be at least 1, got {args.workers}.")
    auth, roots = read_password(args.auth), list(map(_root, args.data))
    data = dict(roots)
    if len(data) < len(roots):
        raise InputError("--data: two folders have the same name; give each its own.")
    import_gradio()
    from equipoise.ui.app import serve

    serve(args.host, args.port, auth, args.runs, data, args.workers, args.read_only)
    return 0


def _root(word: str) -> tuple[str, Path]:
    name, sign, folder = word.partition("=")
    if not (sign and folder and user_path(folder).is_dir()):
        raise InputError(f"--data {word}: must be NAME=FOLDER with a folder that exists, such as photos=/srv/photos.")
    if not name.strip() or not name.isprintable() or "/" in name or name[0] in ".~" or name in _TAKEN:
        raise InputError(
            f"--data {word}: {name!r} cannot be its name; take words such as 'my photos', without a slash."
        )
    return name, user_path(folder).resolve()
