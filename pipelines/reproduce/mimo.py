"""MIMO's Table 1 in small: every objective on one model and data; the λ × μ ablation and the loss landscape.

Paper: Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization: SGD at
1e-3 for 100 epochs of CREMA-D and of UR-Funny (Table 1, Figures 2 and 3). In place of those: drawn digits with tones,
or a manifest of your own with two or three modalities, with the small model of `audio_visual/demo`. All objectives
share the data, the start, the batches and the learning rate of a seed.
"""

import csv
import json
import math
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from PIL import Image

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, interval, spread, workers
from equipoise.pipelines.tables import table

STEPS = 300
OBJECTIVES = {  # row: objective
    "unimodal": "unimodal",
    "MML": "joint",
    "MSES": "mses",
    "MSLR": "mslr",
    "OGM-GE": "ogm_ge",
    "AGM": "agm",
    "EW": "equal_weight",
    "MGDA": "mgda",
    "MMPareto": "mmpareto",
    "MIMO": "mimo",
    "OPM": "opm",
    "Re-learning": "relearning",
    "G-Blending": "gradient_blending",
    "PMR": "pmr",
    "InfoReg": "info_reg",
    "ReconBoost": "recon_boost",
    "MLA": "mla",
    "LFM": "lfm",
}
# Epochs are few here: re-learning is done after each, ReconBoost's stages are short, and LFM's schedule ends with them.
OPTIONS = {
    "relearning": {"every": 1.0},
    "recon_boost": {"epochs_each": 0.25, "epochs_all": 0.25},
    "lfm": {"epochs_all": 4.0},
}
HEADS = {"mla": "shared"}  # joint heads other than the demo's
TURNS = "MLA, all turns"  # the row that has as many times the steps as there are modalities
CREMA_D = {  # Table 1: joint, audio, visual in %, subroutine seconds
    "unimodal": (None, 59.31, 61.04, 0.028),
    "MML": (60.26, 58.02, 22.69, 0.038),
    "MSES": (57.96, 55.84, 27.37, 0.042),
    "MSLR": (62.09, 58.35, 25.62, 0.0412),
    "OGM-GE": (74.49, 53.78, 47.82, 0.112),
    "AGM": (46.63, 43.05, 18.32, 0.205),
    "EW": (65.50, 58.80, 59.66, 0.036),
    "MGDA": (63.47, 60.80, 26.25, 0.310),
    "MMPareto": (68.67, 60.59, 58.82, 0.309),
    "MIMO": (75.96, 55.60, 59.76, 0.037),
}
UR_FUNNY = {  # Table 1: joint, audio, visual, text in %, subroutine seconds
    "unimodal": (None, 58.00, 53.12, 63.74, 0.038),
    "MML": (63.10, 53.02, 50.18, 62.49, 0.038),
    "MSES": (62.90, 53.33, 49.91, 62.71, 0.071),
    "MSLR": (63.16, 54.77, 50.69, 61.89, 0.074),
    "AGM": (64.18, 54.76, 49.45, 62.74, 0.384),
    "EW": (63.63, 54.00, 49.69, 62.41, 0.090),
    "MGDA": (63.81, 53.85, 49.81, 62.96, 0.441),
    "MMPareto": (63.94, 52.48, 50.31, 63.35, 0.436),
    "MIMO": (64.54, 52.19, 50.38, 62.10, 0.101),
}
KINDS = ("audio", "visual", "text")
PAPER: dict[tuple[str, ...], tuple[str, Mapping[str, tuple]]] = {
    KINDS[:2]: ("CREMA-D", CREMA_D),
    KINDS: ("UR-Funny", UR_FUNNY),
}
COMPARED = (  # one, other: over each, in joint accuracy
    ("MIMO", "MML"), ("MIMO", "EW"), ("MIMO", "MMPareto"), ("MIMO", "OGM-GE"), ("MIMO", "AGM"), ("MIMO", "MGDA"),
    ("EW", "MML"),
)  # fmt: skip
LAMBDAS, MUS = (1.0, 10.0, 100.0), (0.001, 0.01, 0.1, 1.0)  # the paper's grid
REACH, SIDE = 0.6, 7  # of the landscape, in units of each filter's norm; points along a side
SHOWN = 120  # clips of each split, drawn by chance, behind a point of the landscape
LARGE = 1e6  # a loss beyond is drawn as this
POINTS = 10  # of a curve, at most
LEVELS, BLACK, YELLOW, WIDE = 8, (20, 20, 20), (250, 210, 60), 360  # of the landscape's contours; pixels of its side

Got = Callable[[str, str], list[Any]]  # method, key → one value per seed


def methods(kinds: Sequence[str]) -> dict[str, tuple[str, dict[str, Any]]]:
    """Row → objective and options, of those that take so many modalities; MSLR once for each that it may favour, and
    MLA once more, with every modality's turn on as many batches as the others have steps."""
    found: dict[str, tuple[str, dict[str, Any]]] = {}
    for row, name in OBJECTIVES.items():
        if name == "mslr":
            for kind in reversed(kinds):
                found[f"{row}, {kind}"] = name, {"factors": {k: 3.0 if k == kind else 0.3 for k in kinds}}
        elif len(kinds) <= registry.load("objectives", name).modalities[1]:
            found[row] = name, OPTIONS.get(name, {})
            if name == "mla":
                found[TURNS] = found[row]
    return found


def reproduce(
    seeds: int,
    count: int,
    steps: int | None = None,
    data: str | None = None,
    earlier: Sequence[Trial] = (),
    keep: Callable[[Trial], None] | None = None,
) -> Reproduction:
    """Trains with seeds from 0 in `count` processes.

    Args:
        data: A manifest in place of the drawn digits; three modalities where it has a column text.
        earlier: Runs that are not trained again.
        keep: Is given every run once it is trained.
    """
    steps, kinds = steps or STEPS, _kinds(data)
    rows = methods(kinds)

    def cell(name: str, seed: int, options: dict[str, Any] | None = None, extra: str = "") -> Trial:
        objective, usual = rows[name]
        settings = {"method": name, "objective": objective, "options": usual | (options or {}), "seed": seed}
        taken = steps * len(kinds) if name == TURNS else steps
        settings |= {"data": data or "demo", "kinds": list(kinds), "steps": taken, "evaluations": taken}
        return {**settings, "extra": extra}

    wanted = [cell(name, seed) for seed, name in product(range(seeds), rows)]
    wanted += [cell("MIMO", 0, {"lam": lam, "mu": mu}, "ablation") for lam, mu in product(LAMBDAS, MUS)]
    wanted += [cell(name, 0, extra="landscape") for name in ("MML", "MIMO")]
    known = {_key(c): c for c in earlier if ("landscape" if c["extra"] == "landscape" else "probe_joint") in c}
    if missing := [c for c in wanted if _key(c) not in known]:
        known |= {_key(c): c for c in _train_all(missing, count, data, keep)}
    cells = [known.pop(_key(c)) for c in wanted]

    def got(name: str, key: str) -> list[Any]:
        return [c[key] for c in cells if c["method"] == name and not c["extra"]]

    found = {(c["options"]["lam"], c["options"]["mu"]): c["accuracy_joint"] for c in cells if c["extra"] == "ablation"}
    starved = max(reversed(kinds), key=lambda kind: _gap(got, kind))
    lands = [c for c in cells if c["extra"] == "landscape"]
    lines = _first_table(got, rows, kinds, f"{steps} steps, {seeds} seed(s), data: {_where(data)}")
    lines += [*_probed(got, rows, kinds, starved), *_ranking(got, rows), *_findings(got, kinds, starved)]
    lines += [*_ablation(found), *_diverged(cells), *_figure_2(lands, kinds)]
    pictures = {c["method"]: c["landscape"] for c in lands}
    sheet = Image.fromarray(np.concatenate([_paint(land, pictures) for land in pictures.values()], 1))
    panels = _panels(got, found, steps, starved)
    return Reproduction("\n".join(lines), panels, [*cells, *known.values()], {"landscape.png": sheet})


def _where(data: str | None) -> str:
    return "/".join(Path(data).parts[-2:]) if data else "drawn digits with tones"


def _key(cell: Trial) -> str:
    return json.dumps([cell[name] for name in ("method", "options", "seed", "data", "steps", "extra")], sort_keys=True)


def _kinds(data: str | None) -> tuple[str, ...]:
    """The modalities that a manifest has columns for.

    Raises:
        InputError: there are fewer than two.
    """
    from equipoise.pipelines.audio_visual.data import NEEDED

    if data is None or not Path(data).is_file():  # what is wrong with it is said by `_check`
        return KINDS[:2]
    with open(data, newline="", encoding="utf-8-sig", errors="replace") as file:
        columns = {(column or "").strip() for column in next(csv.reader(file), [])}
    kinds = tuple(kind for kind in KINDS if columns & set(NEEDED[kind]))
    if len(kinds) < 2:
        has = f"only {' and '.join(kinds)}" if kinds else "none"
        raise InputError(f"--data: {data} has columns for {has} of {', '.join(KINDS)}. Balancing needs two.")
    return kinds


def _train_all(
    missing: Sequence[Trial], count: int, data: str | None, keep: Callable[[Trial], None] | None
) -> list[Trial]:
    def bare(cell: Trial) -> Trial:
        return {name: value for name, value in cell.items() if name != "runs"}

    with tempfile.TemporaryDirectory(prefix="equipoise-mimo-") as runs:
        _check(runs, data, missing[0]["kinds"])
        evaluations = sum(cell["evaluations"] for cell in missing)
        with workers(count, "mimo", evaluations, (lambda cell: keep(bare(cell))) if keep else None) as measure:
            return [bare(cell) for cell in measure(train, [{**cell, "runs": runs} for cell in missing])]


def _first_table(got: Got, rows: Mapping[str, Any], kinds: Sequence[str], what: str) -> list[str]:
    of, paper = PAPER.get(tuple(kinds), ("", {}))
    lines = [f"Test accuracy in %, {what}" + (f"; the paper's: {of}." if of else ".")]
    lines.append("t: seconds per batch of balancing, backward pass and update; the paper's on its GPUs.")
    if "MLA" in rows:
        lines.append(
            "MLA trains one modality in a step, its authors' code each of them on every batch: here each has had "
            f"1/{len(kinds)} of the steps." + (f" {TURNS}: {len(kinds)} times the steps." if TURNS in rows else "")
        )
    rest = [row for row, name in OBJECTIVES.items() if len(kinds) > registry.load("objectives", name).modalities[1]]
    if rest:
        lines.append(f"Left out, for they take two modalities: {', '.join(rest)}.")
    lines[-1] += "\n"
    made = []
    for name in rows:
        shown = [_shown(got(name, f"accuracy_{kind}")) for kind in ("joint", *kinds)]
        theirs = paper.get(name.split(",")[0], ())
        beside = [" / ".join("-" if value is None else f"{value:g}" for value in theirs) or "-"] if of else []
        made.append([name, *shown, f"{median(got(name, 'balancing')):.4f}", *beside])
    head = ["", "joint", *kinds, "t", *([f"paper: joint / {' / '.join(kinds)} / t"] if of else [])]
    return [*lines, table(head, made, width=170)]


def _ranking(got: Got, rows: Mapping[str, Any]) -> list[str]:
    """By mean joint accuracy; whose seeds do not tell it from the first."""
    joint = {name: got(name, "accuracy_joint") for name in rows if None not in got(name, "accuracy_joint")}
    order = sorted(joint, key=lambda name: -fmean(joint[name]))
    lines = ["\nMean joint accuracy, with its 95 % interval over seeds; behind the first, seed by seed:\n"]
    made = []
    for name in order:
        behind = [a - b for a, b in zip(joint[order[0]], joint[name], strict=True)]
        made.append([name, interval(joint[name]), "" if name == order[0] else interval(behind, "+.1f")])
    return [*lines, table(["", "joint", "behind"], made)]


def _findings(got: Got, kinds: Sequence[str], starved: str) -> list[str]:
    lines = ["\nDifferences, seed by seed, in points of accuracy; of one modality, by its own head as in the paper:"]
    paper = PAPER.get(tuple(kinds), ("", {}))[1]
    for one, other, kind in (("MIMO", "MML", starved), *((one, other, "joint") for one, other in COMPARED)):
        if not (got(one, "seed") and got(other, "seed")):
            continue
        key = f"accuracy_{kind}"
        here = [a - b for a, b in zip(got(one, key), got(other, key), strict=True)]
        claim = f"{one} over {other}, {kind}"
        if one in paper and other in paper:
            # of one modality the paper's figure is of the one that starves there
            column = 0 if kind == "joint" else 1 + _starved(paper, len(kinds))
            lines.append(finding(claim, paper[one][column] - paper[other][column], here, "+.1f"))
        else:
            lines.append(f"- {claim}: {spread(here, '+.1f')}.")
    return lines


def _starved(paper: Mapping[str, tuple], count: int) -> int:
    """The index of the modality that is furthest below what it learns alone under MML, in the paper."""
    alone, beside = (paper[name][1 : 1 + count] for name in ("unimodal", "MML"))
    return max(range(count), key=lambda index: alone[index] - beside[index])


def _ablation(found: Mapping[tuple[float, float], float]) -> list[str]:
    rows = [[f"λ = {lam:g}", *(f"{found[lam, mu]:.1f}" for mu in MUS)] for lam in LAMBDAS]
    title = "\nFigure 3: MIMO's joint accuracy by λ and μ, seed 0 (paper: poor at λ = 1 and at large μ).\n"
    return [title, table(["", *(f"μ = {mu:g}" for mu in MUS)], rows)]


def _diverged(cells: Sequence[Trial]) -> list[str]:
    lines = []
    for c in cells:
        if c["diverged"] is not None:
            settings = "".join(f", {key} = {value}" for key, value in c["options"].items())
            lines.append(
                f"DIVERGED after {c['diverged']} steps: {c['method']}{settings}, seed {c['seed']}; its figures are "
                "those of the weights before."
            )
    return lines


def _figure_2(lands: Sequence[Trial], kinds: Sequence[str]) -> list[str]:
    one, other = kinds[:2]
    lines = [
        "\nFigure 2: landscape.png, around the end of training, which modality leads, and contours of the joint loss: "
        "black in training, dashed yellow in the test:"
    ]
    for c in lands:
        lines.append(
            f"- {c['method']}: at the end, training accuracy of {one} over {other} "
            f"{c[f'train_{one}'] - c[f'train_{other}']:+.1f} points; joint loss {c['train_joint_loss']:.3f} in "
            f"training, {c['test_joint_loss']:.3f} in the test."
        )
    return lines


def _panels(got: Got, found: Mapping[tuple[float, float], float], steps: int, starved: str) -> list[Panel]:
    curves = {name: zip(*got(name, f"curve_{starved}"), strict=True) for name in ("MML", "MIMO", "EW")}
    rising = {name: [median(seeds) for seeds in curve] for name, curve in curves.items()}
    ticks = [str(min(steps, (i + 1) * _validate_every(steps))) for i in range(_points(steps))]
    by_rate = {f"λ = {lam:g}": [found[lam, mu] for mu in MUS] for lam in LAMBDAS}
    return [
        Panel(f"{starved.capitalize()} validation accuracy in %, by its own head", "steps", rising, ticks),
        Panel("Figure 3: joint accuracy in %", "μ", by_rate, [f"{mu:g}" for mu in MUS]),
    ]


def _probed(got: Got, rows: Mapping[str, Any], kinds: Sequence[str], starved: str) -> list[str]:
    """What the encoders know, by a probe that is the same for every objective: heads train at different speeds."""
    lines = ["\nOf a logistic probe on the frozen features: test accuracy in %, and contributions in points.\n"]
    keys = ["probe_joint", *(f"{what}_{kind}" for what in ("probe", "contribution") for kind in kinds)]
    made = [[name, *(spread(_known(got(name, key)), ".1f") for key in keys)] for name in rows]
    lines.append(table(["", *keys], made, width=190))
    theirs = " (paper, by its head: visual, 38.4 points)" if tuple(kinds) == KINDS[:2] else ""
    gap = f"{_gap(got, starved):.1f} points below what it learns alone{theirs}"
    lines.append(f"\nFurthest behind under MML, by the probe: {starved}, {gap}.")
    lines.append(f"Differences of probe_{starved}, seed by seed, in points:")
    key = f"probe_{starved}"
    for other in ("MML", "EW", "MMPareto", "unimodal"):
        pairs = zip(_known(got("MIMO", key)), _known(got(other, key)), strict=True)
        lines.append(f"- MIMO over {other}: {spread([a - b for a, b in pairs], '+.1f')}.")
    return lines


def _gap(got: Got, kind: str) -> float:
    """By how much, to a probe, training a modality alone is ahead of what it learns beside the others."""
    alone, beside = (median(_known(got(name, f"probe_{kind}"))) for name in ("unimodal", "MML"))
    return alone - beside


def _known(values: Sequence[float | None]) -> list[float]:
    """NaN for what could not be probed."""
    return [math.nan if value is None else value for value in values]


def _shown(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known, ".1f") if known else "-"


def _check(runs: str, data: str | None, kinds: Sequence[str]) -> None:
    """Draws or reads the data before any process starts.

    Raises:
        InputError: The manifest cannot be used; all that is wrong with it.
    """
    from equipoise.pipelines.audio_visual.prepared import prepare

    prepared = prepare(_config({"data": data or "demo", "runs": runs, "seed": 0, "steps": 1, "kinds": kinds}))
    if prepared.problems:
        raise InputError("\n".join(prepared.problems))


def _config(cell: Trial) -> Any:
    from equipoise.pipelines import config

    words = {"data.manifest": cell["data"], "runs": cell["runs"], "seed": cell["seed"], "train.steps": cell["steps"]}
    words["data.modalities"] = list(cell.get("kinds", KINDS[:2]))
    words |= {"train.baselines": [], "train.validate_every": _validate_every(cell["steps"]), "sweep": {}}
    if "text" in words["data.modalities"]:  # as small as the demo's other encoders
        words |= {"model.text.width": 32, "model.text.layers": 2, "data.text.length": _longest(cell["data"])}
    if "objective" in cell:
        words |= {"objective.name": cell["objective"], "objective.options": cell["options"]}
        words |= {"model.fusion": HEADS[cell["objective"]]} if cell["objective"] in HEADS else {}
    return config.set_keys(config.load("audio_visual/demo"), words, "reproduce")


@cache
def _longest(data: str) -> int:
    """The bytes of a manifest's longest text, as far as an encoder is given them: to pad to more only costs time."""
    from equipoise.pipelines.audio_visual.config import AudioVisualData
    from equipoise.pipelines.audio_visual.data import read_manifest

    section = AudioVisualData.model_validate({"modalities": ["text"]})
    texts = [clip.text.encode() for clip in read_manifest(section, Path(data)).clips if clip.text]
    return max(4, min(section.text.length, max(map(len, texts), default=section.text.length)))


def _validate_every(steps: int) -> int:
    return math.ceil(steps / POINTS)


def _points(steps: int) -> int:
    """Validations: the last is at the end, also where that is no full stretch after the one before."""
    return math.ceil(steps / _validate_every(steps))


@cache
def _prepared(runs: str, data: str, kinds: tuple[str, ...]):
    from equipoise.pipelines.audio_visual.prepared import prepare

    return prepare(_config({"data": data, "runs": runs, "seed": 0, "steps": 1, "kinds": kinds}))


class _Quiet:
    """What a training asks of a run, where there is none."""

    def log(self, text: str) -> None: ...

    def requested(self) -> set[str]:
        return set()


def train(cell: Trial) -> Trial:
    """Trains one model: test accuracies in %, of its heads and of probes, what each modality contributes, seconds per
    batch of balancing, a validation curve, and the step at which it diverged, if it did."""
    from equipoise.pipelines.audio_visual.train import AudioVisualWork
    from equipoise.pipelines.training.loop import NonFiniteError
    from equipoise.pipelines.training.state import make_accelerator

    started, kinds = time.process_time(), tuple(cell.get("kinds", KINDS[:2]))
    prepared = _prepared(cell["runs"], cell["data"], kinds)
    work = AudioVisualWork(_config(cell), _Quiet(), make_accelerator("no"), prepared)  # type: ignore[arg-type]
    times: list[float] = []
    curves: dict[str, list[float]] = {kind: [] for kind in kinds}
    diverged = None
    for step in range(cell["steps"]):
        try:
            values = work.step(step)
        except NonFiniteError:  # as a run ends there: with the last weights that gave a finite loss
            diverged = step
            work.rewind()
            break
        times.append(values["balancing"])
        for kind, curve in curves.items():
            if (accuracy := values.get(f"val_accuracy_{kind}")) is not None:
                curve.append(100 * accuracy)
    found = work.figures(work.test())
    keys = [f"accuracy_{kind}" for kind in ("joint", *kinds)]
    made: Trial = {key: 100 * found[key] if key in found else None for key in keys}  # type: ignore[operator]
    made |= {name: value and 100 * value for name, value in work.probe().items()}
    if cell["extra"] == "landscape":
        made |= _landscape(work)
    count = _points(cell["steps"])
    for kind, curve in curves.items():
        made[f"curve_{kind}"] = (curve + [made[f"accuracy_{kind}"]] * count)[:count]
    spent = {"processor_seconds": time.process_time() - started}
    return made | {"balancing": median(times or [0.0]), "diverged": diverged} | spent


@torch.no_grad()
def _landscape(work: Any) -> Trial:
    """Along two random directions, each filter's as long as the filter itself: joint loss of training and test, and by
    how much the first modality leads the second in training accuracy, on some clips of each split; at the end, on all.
    """
    first, second = work.model.modalities[:2]
    chosen = {split: _some(len(work.labels[split])) for split in ("train", "test")}
    end = {split: work.predict(split) for split in chosen}
    weights = [p for p in work.model.parameters() if p.ndim > 1]
    start = [p.clone() for p in weights]
    generator = torch.Generator().manual_seed(0)

    def direction() -> list[torch.Tensor]:
        found = []
        for p in weights:
            d = torch.randn(p.shape, generator=generator)
            each = d.flatten(1).norm(dim=1), p.flatten(1).norm(dim=1)
            found.append(d * (each[1] / each[0].clamp(min=1e-12)).view(-1, *[1] * (p.ndim - 1)))
        return found

    one, other = direction(), direction()
    ends = torch.linspace(-REACH, REACH, SIDE).tolist()
    points: list[list[float]] = []
    for a, b in product(ends, ends):
        for p, base, x, y in zip(weights, start, one, other, strict=True):
            p.copy_(base + a * x + b * y)
        train, test = (work.predict(split, clips) for split, clips in chosen.items())
        points.append([train["joint"].loss, test["joint"].loss, train[first].accuracy - train[second].accuracy])
    for p, base in zip(weights, start, strict=True):
        p.copy_(base)
    return {
        "landscape": points,
        **{f"train_{kind}": 100 * end["train"][kind].accuracy for kind in work.model.modalities},
        "train_joint_loss": end["train"]["joint"].loss,
        "test_joint_loss": end["test"]["joint"].loss,
    }


def _some(count: int) -> torch.Tensor:
    """Indices of at most SHOWN clips, by chance and always the same: a manifest is often sorted by class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SHOWN]


def _paint(points: list[list[float]], all_of_them: dict[str, list[list[float]]]) -> np.ndarray:
    """A square of the landscape: blue where the first modality leads, green where the second does, and contours of the
    joint loss, black in training and dashed yellow in the test, at levels that all squares share."""
    every = np.log(_finite([loss for land in all_of_them.values() for point in land for loss in point[:2]]))
    levels = np.linspace(every.min(), every.max(), LEVELS + 2)[1:-1]
    gap = np.clip([p[2] for p in points], -1, 1).reshape(SIDE, SIDE)
    tint = np.where(gap[..., None] > 0, np.array([60, 110, 230]), np.array([40, 160, 80]))
    pixels = (255 - np.abs(gap)[..., None] * (255 - tint)).astype(np.uint8)
    done = np.array(Image.fromarray(pixels).resize((WIDE, WIDE), Image.Resampling.BICUBIC))
    dashes = np.add.outer(np.arange(WIDE), np.arange(WIDE)) // 6 % 2 == 0
    done[_contours([p[0] for p in points], levels)] = BLACK
    done[_contours([p[1] for p in points], levels) & dashes] = YELLOW
    middle = WIDE // 2
    done[middle - 4 : middle + 4, middle - 4 : middle + 4] = (220, 30, 30)
    return np.pad(done, ((8, 8), (8, 8), (0, 0)), constant_values=255)


def _finite(losses: Sequence[float]) -> np.ndarray:
    return np.nan_to_num(losses, nan=LARGE).clip(1e-9, LARGE)


def _contours(losses: Sequence[float], levels: np.ndarray) -> np.ndarray:  # (WIDE, WIDE) of bool
    """Where the logarithm of a loss passes a level, two pixels wide."""
    grid = Image.fromarray(np.log(_finite(losses)).reshape(SIDE, SIDE).astype(np.float32))
    band = np.searchsorted(levels, np.array(grid.resize((WIDE, WIDE), Image.Resampling.BICUBIC)))
    passed = np.zeros((WIDE, WIDE), bool)
    passed[1:] |= band[1:] != band[:-1]
    passed[:, 1:] |= band[:, 1:] != band[:, :-1]
    passed[:-1] |= passed[1:]
    passed[:, :-1] |= passed[:, 1:]
    return passed
