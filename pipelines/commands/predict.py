"""`equipoise predict`: what a trained run answers to new pictures or sounds: equipoise predict RUN FILE_OR_FOLDER.
`equipoise evaluate`: how right a trained run is on labelled data of your own: equipoise evaluate RUN FILE.

As CSV or JSONL, where the run's pipeline can.
"""

import argparse
import csv
import io
import json
import os
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines.commands.one_run import one_run
from equipoise.pipelines.files import explained, user_path, write_atomic
from equipoise.pipelines.media.reading import decoded_once
from equipoise.pipelines.runs import environment

_FORMATS = (".csv", ".jsonl")


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="An id (of a sweep's cell: SWEEP/CELL or latest/CELL), a folder, or latest."
    )
    if parser.get_default("command") == "evaluate":
        parser.add_argument("source", metavar="FILE", help="Labelled data in the format that the run was trained on.")
    else:
        parser.add_argument(
            "source", metavar="FILE_OR_FOLDER", help="A picture or sound, a folder of them, or a table of questions."
        )
        parser.add_argument(
            "--prompt",
            action="append",
            default=[],
            help="A question to each, in place of the table's own; may be given several times.",
        )
    parser.add_argument(
        "--output", type=user_path, metavar="FILE", help="A new .csv or .jsonl file; otherwise JSONL is printed."
    )
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")


@decoded_once()
def run(args: argparse.Namespace) -> int:
    found = one_run(args.run, args.runs)
    config = found.config()
    pipeline = registry.load("pipelines", config.pipeline)
    source = Path(os.path.abspath(user_path(args.source)))  # the run's own paths start elsewhere
    output: Path | None = args.output and Path(os.path.abspath(args.output))
    _check(source, output)
    with environment.there(found.folder / "environment.json"):
        if args.command == "evaluate":
            made = pipeline.evaluate(found.folder, config, source)
        else:
            made = pipeline.predict(found.folder, config, source, args.prompt)
    if output is not None:
        with explained(output):
            write_atomic(output, _csv(made.rows) if output.suffix == ".csv" else _jsonl(made.rows))
        print(args.output)
    elif args.command == "predict":
        print(_jsonl(made.rows), end="")
    for name, value in made.figures.items():
        print(f"{name}: {value:.4g}")
    if made.meaning:
        print(made.meaning)
    return 0


def _check(source: Path, output: Path | None) -> None:
    if not os.path.exists(source):  # unlike pathlib's, False also where no path can be so long
        raise InputError(f"{source} does not exist. Give a file or folder that is there.")
    if output is None:
        return
    if output.suffix not in _FORMATS:
        raise InputError(f"--output: {output} must end in {' or '.join(_FORMATS)}.")
    if os.path.exists(output):
        raise InputError(f"--output: {output} is there already. Give a new name, or delete it first.")


def _jsonl(rows: Sequence[dict[str, Any]]) -> str:
    return "".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows)


def _csv(rows: Sequence[dict[str, Any]]) -> str:
    text = io.StringIO()
    columns = list(dict.fromkeys(key for row in rows for key in row))
    writer = csv.DictWriter(text, columns, lineterminator="\n")
    writer.writeheader()
    writer.writerows(
        {key: ";".join(map(str, value)) if isinstance(value, list) else value for key, value in row.items()}
        for row in rows
    )
    return text.getvalue()
