"""Runs side by side: joint and per-modality test accuracy, and confusion matrices as pictures."""

import json
import math
from collections.abc import Sequence
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines.audio_visual import confusion
from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.comparing.comparison import Cell, Comparison, Picture, column_of, folder_names, lay_out
from equipoise.pipelines.runs.run import Run

SCORE = "accuracy of the joint prediction on the test split; of the best modality where the joint head is not trained"
ALIKE = "Every cell is judged by the same test clips; chance is what guessing gets right."
_SHOWN = ("accuracy", "probe", "contribution", "f1", "loss", "seconds", "step")  # metrics of a cell, by first word


def compare(name: str, folder: Path, runs: Sequence[Run], configs: Sequence[AudioVisualConfig]) -> Comparison:
    """Reads every run's results, and draws its confusion matrices into `folder`.

    Raises:
        InputError: The runs were trained on different data.
    """
    first = configs[0].data
    for config in configs[1:]:
        for key in ("manifest", "modalities"):
            if (mine := getattr(first, key)) != (theirs := getattr(config.data, key)):
                raise InputError(f"comparison: data.{key} differs between the runs ({mine} and {theirs}).")
    kinds = ["joint", *first.modalities]
    alone = len({config.objective.model_dump_json() for config in configs}) == 1  # no row's label names the objective
    names, cells, chance = folder_names([run.id for run in runs]), [], math.nan
    for run, config, position in zip(runs, configs, lay_out(configs), strict=True):
        cell = Cell.of(run, config, position)
        cells.append(cell)
        row = cell.row
        if alone:
            cell.row = f"{config.objective.name}, {row}"
            cell.config = {"objective.name": config.objective.name, **cell.config}
        file = run.folder / "result" / "result.json"
        if not file.is_file():
            continue
        result = json.loads(file.read_text())
        chance = result["chance"]
        _fill(cell, result, file.parent, folder / "cells" / names[run.id], kinds)
        for objective, figures in result.get("baselines", {}).items() if alone else ():
            other = Cell(f"{run.id}+{objective}", f"{objective}, {row}", cell.rate, config.seed, figures["state"])
            other.message = f"trained by {run.id} for comparison"
            other.config = cell.config | {"objective.name": objective}
            other.doubt = cell.doubt  # the optimizer is the same
            cells.append(other)
            to = folder / "cells" / f"{names[run.id]}+{objective}"
            _fill(other, figures, file.parent / "baselines" / objective, to, kinds)
    base = Cell("", "chance", math.nan, configs[0].seed, "untouched", metrics={"score": chance})
    beside = {f"probe_{m}": f"accuracy of a probe on the frozen features of {m}" for m in first.modalities}
    beside |= {f"accuracy_{m}": f"accuracy of {m} alone, by its own head" for m in first.modalities}
    prompts = [f"confusion, {kind} (rows: true classes)" for kind in kinds]
    return Comparison(name, folder, prompts, SCORE, base, cells, beside, alike=ALIKE, column=column_of(configs))


def _fill(cell: Cell, figures: dict, results: Path, folder: Path, kinds: Sequence[str]) -> None:
    """A cell's metrics and its confusion matrices as pictures, into a folder of the comparison's `cells`."""
    cell.metrics = {
        key: value for key, value in figures.items() if isinstance(value, int | float) and key.split("_")[0] in _SHOWN
    }
    joint = figures.get("accuracy_joint")
    cell.metrics["score"] = max(figures[f"accuracy_{m}"] for m in kinds[1:]) if joint is None else joint
    for index, kind in enumerate(kinds):
        if (table := results / f"confusion-{kind}.csv").is_file():
            note = f"{kind}: accuracy {figures[f'accuracy_{kind}']:.1%}"
            cell.pictures.append(_draw(table, folder, index, kind, note))


def _draw(table: Path, folder: Path, index: int, kind: str, note: str) -> Picture:
    """A confusion matrix, small for the grid, and large with its classes' names and numbers."""
    classes, counts = confusion.read(table)
    names = f"{kind}.png", f"small-{kind}.png"
    folder.mkdir(parents=True, exist_ok=True)
    confusion.large(classes, counts).save(folder / names[0])
    confusion.small(counts).save(folder / names[1])
    place = f"cells/{folder.name}"
    return Picture(index, None, f"{place}/{names[0]}", f"{place}/{names[1]}", note=note)
