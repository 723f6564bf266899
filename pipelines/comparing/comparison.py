"""What a comparison is: runs laid out as rows (all but the rate) × columns (learning rate), with their scores."""

import csv
import hashlib
import io
import json
import math
import os
import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import TypeAdapter

from equipoise.errors import InputError
from equipoise.pipelines.comparing import votes
from equipoise.pipelines.comparing.robustness import (
    Point,
    UsableRange,
    kept_threshold,
    merit,
    reach,
    shown_rate,
    threshold,
    usable,
    usable_range,
)
from equipoise.pipelines.config import flat as flat_config
from equipoise.pipelines.config.records import RunConfig
from equipoise.pipelines.files import write_atomic
from equipoise.pipelines.runs.run import Run

RATE = "optimizer.learning_rate"
_NOT_AXES = {"name", "runs", "seed", "sweep", RATE}  # seeds are averaged, not laid out
_SHOWN_WITH_IT = ("optimizer.name", "optimizer.options")  # first in every label
WORKS = "usable"  # the verdict on a rate that learnt and kept enough; any other says what it lacks
_OUTSIDE = "optimizer.outside_learning_rate"  # each optimizer may have one of its own
_RATES = "optimizer.rates"  # part → its own rate
MOSTLY = 0.5  # share of a cell's pictures; where more are broken, its rate is not usable whatever its loss
_LATER = ("scored", "alike", "kept", "own", "column", "sources")  # parts that earlier versions did not write
SOURCE = "source"
_LONG = 40  # characters of a value in a label
_SERVED = re.compile(r"[A-Za-z0-9_][A-Za-z0-9_.,=+-]*")  # names of folders
_LONG_NAME = 100  # characters of a name, beside which others have to fit into a file system's


@dataclass
class Picture:
    """One generated picture, on disk in the comparison's folder."""

    prompt: int  # index into Comparison.prompts
    seed: int | None  # of its noise, where it was drawn from any
    file: str  # relative to the comparison's folder
    thumbnail: str
    right: bool | None = None  # the judge's verdict, where the domain is drawn
    note: str = ""  # what the judge saw
    scores: dict[str, float] = field(default_factory=dict)  # shares are 0 or 1 of one picture

    @property
    def key(self) -> str:
        """PROMPT-NOISE, by which the same picture is found in another cell."""
        return f"{self.prompt}-{'' if self.seed is None else self.seed}"


@dataclass
class Cell:
    """One run, or the untouched base, in the comparison."""

    run: str  # the run's id; "" for the base
    row: str
    rate: float  # learning rate; nan for the base
    seed: int
    state: str  # done, diverged, stopped, failed …
    message: str = ""
    metrics: dict[str, float] = field(default_factory=dict)
    pictures: list[Picture] = field(default_factory=list)
    config: dict[str, Any] = field(default_factory=dict)  # dotted key → value, where the cells differ
    doubt: str = ""  # one sentence on why the figures may not be what the configuration promises

    @classmethod
    def of(cls, run: Run, config: RunConfig, place: tuple[str, float, dict[str, Any]]) -> "Cell":
        """The cell of a run, where `lay_out` puts it."""
        status, (row, rate, differs) = run.status(), place
        return cls(run.id, row, rate, config.seed, status.state, status.message, config=differs, doubt=status.doubt)

    @property
    def who(self) -> str:
        named = {"base": "the untouched base", SOURCE: "the picture to start from"}
        return self.run or named.get(self.row, self.row)

    @property
    def score(self) -> float:
        return self.metrics.get("score", math.nan)

    def of_prompt(self, prompt: int) -> dict[str, float]:
        """The means of a prompt's pictures' scores; the cell's own metrics are those of all prompts."""
        return means([picture.scores for picture in self.pictures if picture.prompt == prompt])


def folder_names(runs: Sequence[str]) -> dict[str, str]:
    """What the folder of each run's or file's cell is called, the base's under "".

    The last part of its name, where that is its own, no base's, one that the page serves, and not an index; else its
    index.
    """
    short = [run.rpartition("/")[2] for run in runs]
    count = Counter([*short, "base"])
    own = {name for name in short if count[name] == 1 and len(name) < _LONG_NAME and not name.isdecimal()}
    return {"": "base"} | {
        run: name if name in own and _SERVED.fullmatch(name) else f"{index:03d}"
        for index, (run, name) in enumerate(zip(runs, short, strict=True))
    }


@dataclass
class Comparison:
    name: str
    folder: Path
    prompts: list[str]
    score: str  # what the score is, in words
    base: Cell
    cells: list[Cell]
    beside: dict[str, str] = field(default_factory=dict)  # metrics reported beside the score: shares, and what they are
    scored: dict[str, str] = field(default_factory=dict)  # others that are no shares, reported after them
    alike: str = ""  # a sentence on what is the same for all cells, so that they can be compared
    kept: str = ""  # which of `beside` says what is left of what the base knew; "": none, and the score judges alone
    own: bool | None = None  # whether the pictures are of the runs' own prompts and strength; None: not recorded
    column: str = "learning rate"  # what cells differ in from left to right, their `rate`; of files it is the strength
    sources: list[Picture] = field(default_factory=list)  # of each prompt, what a base that edits starts from

    @classmethod
    def read(cls, folder: Path) -> "Comparison":
        """The comparison that `write_tables` wrote into `folder`.

        Raises:
            InputError: There is none, one of a version that wrote less, or one with pictures outside of it.
        """
        try:
            data = json.loads((folder / "table.json").read_text())
            base, *cells = [
                {
                    **{name: it[name] for name in ("run", "row", "seed", "state", "message", "pictures", "config")},
                    "rate": math.nan if it["learning_rate"] is None else it["learning_rate"],
                    "metrics": {name: math.nan if value is None else value for name, value in it["metrics"].items()},
                    "doubt": it.get("doubt", ""),
                }
                for it in data["cells"]
            ]
            known = {name: data[name] for name in ("name", "prompts", "score", "beside")}
            known |= {name: data[name] for name in _LATER if name in data}
            text = json.dumps({**known, "folder": str(folder), "base": base, "cells": cells})
            found = _record(cls).validate_json(text, strict=True)  # the file may be anybody's
            if not all(0 < cell.rate < math.inf for cell in found.cells):
                raise ValueError("a cell has no rate")
        except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
            raise InputError(f"{folder}: holds no comparison that can be read; compare anew.") from error
        found._refuse_what_lies_elsewhere()
        found.count_votes()
        return found

    def _refuse_what_lies_elsewhere(self) -> None:
        """Raises InputError for a picture outside of the folder: the file may be anybody's, and pictures are shown."""
        folder = os.path.realpath(self.folder)
        resolved: dict[str, str] = {}
        for picture in (picture for cell in (*self.untouched, *self.cells) for picture in cell.pictures):
            for name in (picture.file, picture.thumbnail):
                if not _is_in(folder, name, resolved):
                    raise InputError(
                        f"{self.folder}: table.json names the picture {name[:200]!r}, which is not a file's name in "
                        "that folder, so nothing of it is shown; compare anew."
                    )

    @property
    def untouched(self) -> list[Cell]:
        """What stands before the cells: the base, and before it what its pictures are made of, where it edits."""
        made_of = Cell("", SOURCE, math.nan, self.base.seed, self.base.state, pictures=self.sources)
        return [*([made_of] if self.sources else []), self.base]

    def count_votes(self) -> None:
        """What blind votes say of the cells now, as metrics of them."""
        counted = votes.tally(self.folder)
        self.beside.pop(votes.PREFERRED, None)
        for cell in (self.base, *self.cells):
            for name in (votes.PREFERRED, votes.VOTES):
                cell.metrics.pop(name, None)
            cell.metrics |= counted.get(cell.run, {})
        if counted or votes.left_out(self.folder):
            self.beside[votes.PREFERRED] = votes.meaning(self.folder)

    def place_of(self, cell: Cell) -> Path:
        """The folder in which what a cell drew or answered lies, if it did either."""
        if cell.pictures:
            return self.folder / Path(cell.pictures[0].file).parent
        return self.folder / "cells" / folder_names([one.run for one in self.cells])[cell.run]

    @property
    def noun(self) -> str:
        """A column in one word: rate, or strength."""
        return self.column.split()[-1]

    def shown(self, rate: float) -> str:
        """A column as people write it: 1e-4, or a strength of 0.5; nothing of the base's."""
        if math.isnan(rate):
            return ""
        return shown_rate(rate) if self.of_rates else f"{rate:g}"

    @property
    def of_rates(self) -> bool:
        """Whether columns are learning rates, of everything or of one part; those of files are strengths."""
        return is_rate(self.column)

    @property
    def rows(self) -> list[str]:
        return list(dict.fromkeys(cell.row for cell in self.cells))

    @property
    def rates(self) -> list[float]:
        return sorted({cell.rate for cell in self.cells})

    def at(self, row: str, rate: float) -> list[Cell]:
        """The cells of one place, one per seed."""
        return sorted((c for c in self.cells if c.row == row and c.rate == rate), key=lambda cell: cell.seed)

    def counted(self, cell: Cell) -> float:
        """A cell's score as it counts: one that diverged, draws mostly broken pictures, or has no score, counts exactly
        as the base."""
        return self.base.score if _failure(cell) else cell.score

    def forget_scores(self) -> None:
        """Nothing is judged: scores are of the runs' own prompts and strength, and these pictures of others."""
        for cell in (self.base, *self.cells):
            cell.metrics.pop("score", None)

    def points(self, row: str) -> list[Point]:
        """A row's means over the seeds at each rate: its score, and what it kept over those that measured it."""
        places: dict[float, list[Cell]] = {}
        for cell in sorted((cell for cell in self.cells if cell.row == row), key=lambda cell: cell.seed):
            places.setdefault(cell.rate, []).append(cell)
        points = []
        for rate, cells in sorted(places.items()):
            scores = [self.counted(cell) for cell in cells]
            left = [cell.metrics[self.kept] for cell in cells if self.kept in cell.metrics]
            kept = sum(left) / len(left) if left else math.nan
            points.append(Point(rate, sum(scores) / len(scores), kept))
        return points

    def usable(self, row: str, rate: float) -> bool:
        """Whether a rate worked, by the mean over its seeds, as the curve and the range have it."""
        return self.verdict(row, rate) == WORKS

    @property
    def line(self) -> float | None:
        """The score that counts as usable, or None where no cell beats the base by enough."""
        best = max((point.score for row in self.rows for point in self.points(row)), default=-math.inf)
        return threshold(self.base.score, best)

    @property
    def kept_line(self) -> float | None:
        """What a usable rate keeps, or None where it is judged by what was learnt alone."""
        return kept_threshold(self.base.metrics.get(self.kept, math.nan))

    @property
    def best(self) -> tuple[str, Point] | None:
        """The row and rate with most merit of those that are usable; where none is, what comes nearest to it.

        None where no gain can be told from noise.
        """
        line, bar = self.line, self.kept_line
        if line is None:
            return None
        places = [(row, point) for row in self.rows for point in self.points(row)]
        works = [(row, point) for row, point in places if usable(point, line, bar)]
        if works:
            return max(works, key=lambda place: merit(place[1], bar))
        return max(places, key=lambda place: reach(place[1], self.base.score, line, bar))

    @property
    def judged(self) -> bool:
        """Whether any cell has a score; questions of one's own have no right answer to be compared with."""
        return any(math.isfinite(cell.score) for cell in [self.base, *self.cells])

    def verdict(self, row: str, rate: float) -> str:
        """WORKS, or why a rate is not usable, in a few words; nothing for the base and where nothing is judged."""
        point = next((point for point in self.points(row) if point.rate == rate), None)
        if point is None or not self.judged:
            return ""
        line, bar = self.line, self.kept_line
        if line is not None and usable(point, line, bar):
            return WORKS
        failures = [_failure(cell) for cell in self.at(row, rate)]
        if all(failures):  # of seeds that came out well, the means say what they lack
            return ", ".join(dict.fromkeys(failures))
        learnt = line is not None and point.score >= line
        if learnt and math.isnan(point.kept):
            return "kept is not measured"
        kept = bar is None or not point.kept < bar
        return f"{' & '.join([*([] if learnt else ['learnt']), *([] if kept else ['kept'])])} too little"

    def ranges(self) -> dict[str, UsableRange | None]:
        line, bar = self.line, self.kept_line
        return {row: usable_range(self.points(row), line, bar) if line is not None else None for row in self.rows}

    @property
    def doubts(self) -> list[str]:
        """What to know before rows are believed, one sentence each, with the rows that it is of."""
        rows: dict[str, list[str]] = {}
        for cell in self.cells:
            if cell.doubt and cell.row not in rows.setdefault(cell.doubt, []):
                rows[cell.doubt].append(cell.row)
        return [f"{', '.join(of)}: {doubt}" for doubt, of in rows.items()]

    @property
    def picture_scores(self) -> list[str]:
        """What single pictures are scored by."""
        pictures = [picture for cell in [self.base, *self.cells] for picture in cell.pictures]
        return list(dict.fromkeys(name for picture in pictures for name in picture.scores))

    def write_tables(self) -> list[Path]:
        """Writes table.csv, prompts.csv (the same prompt by prompt, where pictures have scores) and table.json; returns
        the paths of the first and the last."""
        names = list(dict.fromkeys(name for cell in [self.base, *self.cells] for name in cell.metrics))
        facts = ["row", "learning_rate", "seed", "run", "state"]
        cells = [(_facts(cell), cell) for cell in [self.base, *self.cells]]
        rows = [[*known, *(_shown(cell.metrics.get(name)) for name in names)] for known, cell in cells]
        _write_csv(self.folder / "table.csv", [[*facts, *names], *rows])
        if names := self.picture_scores:
            rows = [
                [*known, prompt, *(_shown(cell.of_prompt(index).get(name)) for name in names)]
                for index, prompt in enumerate(self.prompts)
                for known, cell in cells
                if cell.of_prompt(index)
            ]
            _write_csv(self.folder / "prompts.csv", [[*facts, "prompt", *names], *rows])
        document = {
            "name": self.name,
            "score": self.score,
            "prompts": self.prompts,
            "beside": self.beside,
            "scored": self.scored,
            "alike": self.alike,
            "kept": self.kept,
            "own": self.own,
            "column": self.column,
            "sources": [asdict(picture) for picture in self.sources],
            "usable_from": self.line,
            "kept_from": self.kept_line,
            "usable_ranges": {
                row: None
                if found is None
                else {
                    "low": found.low,
                    "high": found.high,
                    "decades": found.decades,
                    "open_low": found.open_low,
                    "open_high": found.open_high,
                }
                for row, found in self.ranges().items()
            },
            "cells": [
                {
                    "row": c.row,
                    "learning_rate": None if math.isnan(c.rate) else c.rate,
                    "seed": c.seed,
                    "run": c.run,
                    "state": c.state,
                    "message": c.message,
                    "verdict": self.verdict(c.row, c.rate),
                    "metrics": {k: _finite(v) for k, v in c.metrics.items()},
                    "pictures": [asdict(picture) for picture in c.pictures],
                    "config": c.config,
                    "doubt": c.doubt,
                }
                for c in [self.base, *self.cells]
            ],
        }
        write_atomic(self.folder / "table.json", json.dumps(document, indent=1) + "\n")
        return [self.folder / "table.csv", self.folder / "table.json"]


@cache
def _record(cls: type[Comparison]) -> TypeAdapter[Comparison]:
    """What checks the types of a file."""
    return TypeAdapter(cls)


def _is_in(folder: str, name: str, resolved: dict[str, str]) -> bool:
    """Whether a name leads to something in the (resolved) folder: on disk, links followed, and in a browser, for which
    it is an address beside the report's own. `resolved`: folders that were followed already, which many files share."""
    if any(mark in name for mark in ":\\\0") or {"", ".", ".."} & set(name.split("/")):
        return False
    place, _, last = f"{folder}/{name}".rpartition("/")
    if place not in resolved:
        resolved[place] = os.path.realpath(place)  # pathlib's takes thrice as long
    file = f"{resolved[place]}/{last}"
    return (os.path.realpath(file) if os.path.islink(file) else file).startswith(f"{folder}/")


def _failure(cell: Cell) -> str:
    """Why a cell's rate cannot be usable, whatever its score."""
    if cell.state == "diverged":
        return "diverged"
    if not math.isfinite(cell.score):
        return "no score" if cell.state == "done" else cell.state
    return "mostly broken pictures" if cell.metrics.get("broken", 0) > MOSTLY else ""


def means(scores: Sequence[dict[str, float]]) -> dict[str, float]:
    """Name by name, over those that have it."""
    found = {name: [one[name] for one in scores if name in one] for name in dict.fromkeys(n for s in scores for n in s)}
    return {name: sum(values) / len(values) for name, values in found.items()}


def short(name: str) -> str:
    """A metric's name in a cell, where there is little room."""
    return name.removeprefix("accuracy_")


def measured(result: Mapping[str, Any]) -> dict[str, float]:
    """What a run's result.json says of its training."""
    names = ("loss_before", "loss_after", "seconds", "step")
    return {name: result[name] for name in names if result.get(name) is not None}


def is_rate(column: str) -> bool:
    return column.endswith("learning rate")


def column_of(configs: Sequence[RunConfig]) -> str:
    """What the columns of these runs are called: the learning rate, or the one of a part that alone differs."""
    key = _rate_key([_by_part(flat_config(config)) for config in configs])
    if key.startswith(f"{_RATES}."):
        return f"{key.removeprefix(f'{_RATES}.')} learning rate"
    return key.removeprefix("optimizer.").replace(".", " ").replace("_", " ")


def lay_out(configs: Sequence[RunConfig]) -> list[tuple[str, float, dict[str, Any]]]:
    """Each run's row label, its rate (see `column_of`), and what of its configuration differs between the runs.

    Raises:
        InputError: a run has no optimizer and learning rate to lay it out by.
    """
    whole = [flat_config(config) for config in configs]
    flat = [_by_part(one) for one in whole]
    differing = _differing(flat)
    rate = _rate_key(flat)
    hidden = {*_NOT_AXES, *_SHOWN_WITH_IT, rate, *([_OUTSIDE] if _follows_the_optimizer(_OUTSIDE, flat) else [])}
    axes = [key for key in differing if key not in hidden]
    short = {key: key.removesuffix(".name").split(".")[-1] for key in axes}  # a plugin's section says which it is
    short |= {key: key.removeprefix("optimizer.") for key in axes if key.startswith(f"{_RATES}.")}
    last = Counter(short.values())
    names = {key: key if last[short[key]] > 1 else short[key] for key in axes}
    shown = [key for key in _differing(whole) if key not in ("name", "runs")]
    placed = []
    for one, given in zip(flat, whole, strict=True):
        for key, what in ((rate, "column"), ("optimizer.name", "row")):
            if key not in one:
                raise InputError(f"comparison: a run has no {key}, so it has no {what}.")
        options = {
            option: value
            for option, value in one.get("optimizer.options", {}).items()
            if any(other.get("optimizer.options", {}).get(option) != value for other in flat)
        }
        named = [*options.items(), *((name, one.get(key)) for key, name in names.items())]
        label = " ".join([_who(one), *(f"{name}={_brief(value)}" for name, value in named)])
        placed.append((label, float(one[rate]), {key: given.get(key) for key in shown}))
    return placed


def _differing(flat: Sequence[Mapping[str, Any]]) -> list[str]:
    keys = dict.fromkeys(key for one in flat for key in one)
    return [key for key in keys if len({json.dumps(one.get(key), sort_keys=True) for one in flat}) > 1]


def _by_part(flat: Mapping[str, Any]) -> dict[str, Any]:
    """With a key for each part's own rate, in place of all in one mapping."""
    return {key: value for key, value in flat.items() if key != _RATES} | {
        f"{_RATES}.{part}": rate for part, rate in (flat.get(_RATES) or {}).items()
    }


def _rate_key(flat: Sequence[Mapping[str, Any]]) -> str:
    """The key of the rates in columns: where all have one learning rate, that of a part, if it is the only such one."""
    parts = [
        key
        for key in _differing(flat)
        if key.endswith("learning_rate") or key.startswith(f"{_RATES}.")
        if all(one.get(key) for one in flat) and not (key == _OUTSIDE and _follows_the_optimizer(key, flat))
    ]
    return parts[0] if len(parts) == 1 else RATE


def _who(flat: Mapping[str, Any]) -> str:
    """What trained a run: its optimizer, or another program by the name of its script."""
    command = flat.get("script")
    if not command:
        return str(flat["optimizer.name"])
    words = command.split()
    script = next((word for word in words if word.endswith(".py")), words[0])
    name = script.rpartition("/")[2].removesuffix(".py")
    return f"{name} {flat['optimizer.name']}" if "{optimizer" in command else name


def _follows_the_optimizer(key: str, flat: Sequence[Mapping[str, Any]]) -> bool:
    """Whether runs of one optimizer have one value of a key, so that its name tells them apart."""
    found = {(one.get("optimizer.name"), json.dumps(one.get(key))) for one in flat}
    return len(found) == len({name for name, _ in found})


def _brief(value: Any) -> str:
    """A value in a label; a long one is cut, and reported apart from others by a digest."""
    text = str(value)
    return text if len(text) <= _LONG else f"{text[: _LONG - 6]}…{hashlib.sha256(text.encode()).hexdigest()[:5]}"


def _facts(cell: Cell) -> list[Any]:
    return [cell.row, "" if math.isnan(cell.rate) else repr(cell.rate), cell.seed, cell.run, cell.state]


def _write_csv(path: Path, rows: list[list[Any]]) -> None:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    write_atomic(path, text.getvalue())


def _finite(value: float) -> float | None:
    return value if math.isfinite(value) else None


def _shown(value: float | None) -> str:
    return "" if value is None else f"{value:.6g}"
