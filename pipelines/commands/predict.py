"""`equipoise predict`: what a trained run makes of new data, without labels: equipoise predict RUN FILE_OR_FOLDER ….
`equipoise evaluate`: how right a trained run is on labelled data of your own: equipoise evaluate RUN FILE.

As CSV or JSONL, or, of a run that draws, as a folder of pictures; where the run's pipeline can.
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
from equipoise.pipelines.commands.one_run import one_run
from equipoise.pipelines.files import explained, user_path, write_atomic
from equipoise.pipelines.jobs.making import swapped_in
from equipoise.pipelines.media.reading import decoded_once
from equipoise.pipelines.pipeline import Asked, Pipeline, Predictions, refuse
from equipoise.pipelines.runs import environment
from equipoise.pipelines.runs.run import Run

_FORMATS = (".csv", ".jsonl")
_TABLE = "predictions.csv"  # beside the files of a pipeline that draws


def add_arguments(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "run", metavar="RUN", help="An id (of a sweep's cell: SWEEP/CELL or latest/CELL), a folder, or latest."
    )
    written = "A new .csv or .jsonl file for what is found of each example."
    if parser.get_default("command") == "evaluate":
        parser.add_argument(
            "source",
            metavar="FILE",
            help="Labelled data in the format that the run was trained on: a file, or a folder of captioned pictures.",
        )
    else:
        written = "A new .csv or .jsonl file; otherwise JSONL is printed. Text to image: a new folder for the pictures."
        parser.add_argument(
            "sources",
            nargs="*",
            metavar="FILE_OR_FOLDER",
            help="Instruction tuning: a picture or sound, a folder of them, or a table of questions. Audio-visual "
            "classification: a manifest, or media and folders of them. Text to image: a text file, a prompt on each "
            "line.",
        )
        parser.add_argument(
            "--prompt",
            action="append",
            default=[],
            help="A question to each, in place of the table's own, or a prompt to draw; may be given several times.",
        )
        parser.add_argument("--count", type=int, help="Text to image: the number of pictures of each prompt.")
        parser.add_argument("--scale", type=float, help="Text to image: the strength of the LoRA, such as 0.7.")
        parser.add_argument(
            "--features",
            type=user_path,
            metavar="FILE",
            help="Audio-visual classification: a new .npz file for features and probabilities of each modality.",
        )
    parser.add_argument(
        "--server",
        metavar="URL",
        help="Instruction tuning: a server that has what the run exports and speaks OpenAI's protocol answers, such as "
        "vLLM's at http://localhost:8000/v1; with #NAME behind it, its model of that name.",
    )
    parser.add_argument("--output", type=user_path, metavar="FILE", help=written)
    parser.add_argument("--runs", metavar="FOLDER", help="The folder of runs.")


@decoded_once()
def run(args: argparse.Namespace) -> int:
    found = one_run(args.run, args.runs)
    config = found.config()
    pipeline = registry.load("pipelines", config.pipeline)
    given = [args.source] if args.command == "evaluate" else args.sources
    sources = [Path(os.path.abspath(user_path(text))) for text in given]  # the run's own paths start elsewhere
    output: Path | None = args.output and Path(os.path.abspath(args.output))
    if args.command == "evaluate":
        unread = _unread(pipeline, {"server": args.server})
        refuse([*unread, *_missing(sources), *_taken(output, "--output", _FORMATS)])
        options = {"server": args.server} if args.server else {}
        with environment.there(found.folder / "environment.json"):
            made = pipeline.evaluate(found.folder, config, sources[0], **options)
        _write(made, args.output)
    else:
        _predict(pipeline, found, config, sources, output, args)
    return 0


def _predict(
    pipeline: type[Pipeline],
    found: Run,
    config: Any,
    sources: list[Path],
    output: Path | None,
    args: argparse.Namespace,
) -> None:
    arrays: Path | None = args.features and Path(os.path.abspath(args.features))
    wanted = {"prompts": args.prompt, "count": args.count, "scale": args.scale, "features": arrays is not None}
    wanted["server"] = args.server
    problems = _unread(pipeline, wanted)
    if pipeline.draws and output is None:
        problems.append("--output: give a new folder for what is made.")
    problems += [*_missing(sources), *_taken(output, "--output", () if pipeline.draws else _FORMATS)]
    refuse(problems + _taken(arrays, "--features", (".npz",)))
    if pipeline.draws and output:
        with swapped_in(output) as folder:
            with environment.there(found.folder / "environment.json"):
                made = pipeline.predict(found.folder, config, sources, Asked(**wanted, folder=folder))
            write_atomic(folder / _TABLE, _csv(made.rows))
        print(args.output)
        return
    with environment.there(found.folder / "environment.json"):
        made = pipeline.predict(found.folder, config, sources, Asked(**wanted))
    if arrays is not None:
        write_atomic(arrays, _npz(made.arrays))
    _write(made, args.output, shown=True)
    if arrays is not None and output is not None:
        print(args.features)


def _unread(pipeline: type[Pipeline], wanted: dict[str, Any]) -> list[str]:
    options = {"prompts": "--prompt"}
    return [
        f"{options.get(name, f'--{name}')}: the pipeline {pipeline.name} does not read it."
        for name, value in wanted.items()
        if value not in (None, False, []) and name not in pipeline.asks
    ]


def _missing(sources: Sequence[Path]) -> list[str]:
    return [
        f"{source} does not exist. Give a file or folder that is there."
        for source in sources
        if not os.path.exists(source)  # unlike pathlib's, False also where no path can be so long
    ]


def _taken(output: Path | None, option: str, formats: Sequence[str]) -> list[str]:
    """Why a file, or without formats a folder, cannot be written: its name."""
    if output is None:
        return []
    if formats and output.suffix not in formats:
        return [f"{option}: {output} must end in {' or '.join(formats)}."]
    if os.path.lexists(output):
        return [f"{option}: {output} is there already. Give a new name, or delete it first."]
    return []


def _write(made: Predictions, output: Path | None, shown: bool = False) -> None:
    """The rows into a file, or, if they are to be shown, onto standard output; and the figures."""
    if output is not None:
        with explained(output):
            write_atomic(output, _csv(made.rows) if output.suffix == ".csv" else _jsonl(made.rows))
        print(output)
    elif shown:
        print(_jsonl(made.rows), end="")
    for name, value in made.figures.items():
        print(f"{name}: {value:.4g}")
    if made.meaning:
        print(made.meaning)


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


def _npz(arrays: dict[str, Any]) -> bytes:
    import numpy as np

    data = io.BytesIO()
    np.savez(data, **arrays)
    return data.getvalue()
