"""MIMO's Table 1 in small: every objective on one model and data; the λ × μ ablation and the loss landscape.

Paper: Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization: SGD at
1e-3 for 100 epochs of CREMA-D (Table 1, Figures 2 and 3). In place of CREMA-D: drawn digits with tones, or a
manifest of your own, with the small model of `audio_visual/demo`. All objectives share the data, the start, the batches
and the learning rate of a seed.
"""

import math
import tempfile
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from pathlib import Path
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, spread, workers
from equipoise.pipelines.tables import table

STEPS = 300
METHODS: dict[str, tuple[str, dict[str, Any]]] = {  # row: objective, options
    "unimodal": ("unimodal", {}),
    "MML": ("joint", {}),
    "MSES": ("mses", {}),
    "MSLR, visual": ("mslr", {"factors": {"audio": 0.3, "visual": 3.0}}),
    "MSLR, audio": ("mslr", {"factors": {"audio": 3.0, "visual": 0.3}}),
    "OGM-GE": ("ogm_ge", {}),
    "AGM": ("agm", {}),
    "EW": ("equal_weight", {}),
    "MGDA": ("mgda", {}),
    "MMPareto": ("mmpareto", {}),
    "MIMO": ("mimo", {}),
}
PAPER = {  # Table 1, CREMA-D: joint, audio, visual in %, subroutine seconds
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
LAMBDAS, MUS = (1.0, 10.0, 100.0), (0.001, 0.01, 0.1, 1.0)  # the paper's grid
REACH, SIDE = 0.6, 7  # of the landscape, in units of each filter's norm; points along a side
SHOWN = 120  # clips of each split, drawn by chance, behind a point of the landscape
LARGE = 1e6  # a loss beyond is drawn as this
POINTS = 10  # of a curve, at most


def reproduce(seeds: int, count: int, steps: int | None = None, data: str | None = None) -> Reproduction:
    """Trains with seeds from 0 in `count` processes; `data`: a manifest in place of the drawn digits."""
    steps = steps or STEPS
    with tempfile.TemporaryDirectory(prefix="equipoise-mimo-") as runs:
        _check(runs, data)

        def cell(name: str, seed: int, options: dict[str, Any] | None = None, extra: str = "") -> Trial:
            objective, usual = METHODS[name]
            settings = {"method": name, "objective": objective, "options": usual | (options or {}), "seed": seed}
            return {**settings, "data": data or "demo", "steps": steps, "evaluations": steps, "extra": extra}

        rows = [cell(name, seed) for name, seed in product(METHODS, range(seeds))]
        grid = [cell("MIMO", 0, {"lam": lam, "mu": mu}, "ablation") for lam, mu in product(LAMBDAS, MUS)]
        lands = [cell(name, 0, extra="landscape") for name in ("MML", "MIMO")]
        cells = [{**c, "runs": runs} for c in rows + grid + lands]
        with workers(count, "mimo", steps * len(cells)) as measure:
            cells = [{k: v for k, v in c.items() if k != "runs"} for c in measure(train, cells)]

    def got(name: str, key: str) -> list[Any]:  # one per seed
        return [c[key] for c in cells if c["method"] == name and not c["extra"]]

    where = "/".join(Path(data).parts[-2:]) if data else "drawn digits with tones"
    lines = [f"Test accuracy in %, {steps} steps, {seeds} seed(s), data: {where}; the paper's: CREMA-D."]
    lines.append("t: seconds per batch of balancing, backward pass and update; the paper's on its GPUs.\n")
    made = []
    for name in METHODS:
        paper = PAPER[name.split(",")[0]]
        shown = [_shown(got(name, f"accuracy_{kind}")) for kind in ("joint", "audio", "visual")]
        mine = [*shown, f"{median(got(name, 'balancing')):.4f}"]
        made.append([name, *mine, " / ".join("-" if value is None else f"{value:g}" for value in paper)])
    lines.append(table(["", "joint", "audio", "visual", "t", "paper: joint / audio / visual / t"], made, width=150))
    starved = max(("visual", "audio"), key=lambda kind: _gap(got, kind))
    lines += _probed(got, starved)
    lines.append("Differences, seed by seed, in points of accuracy; of one modality, by its own head as in the paper:")
    for one, other, kind in (
        ("MIMO", "MML", "joint"), ("MIMO", "MML", starved), ("MIMO", "EW", "joint"), ("MIMO", "MMPareto", "joint"),
        ("MIMO", "OGM-GE", "joint"), ("MIMO", "AGM", "joint"), ("MIMO", "MGDA", "joint"), ("EW", "MML", "joint"),
    ):  # fmt: skip
        key = f"accuracy_{kind}"
        here = [a - b for a, b in zip(got(one, key), got(other, key), strict=True)]
        column = 0 if kind == "joint" else 2
        lines.append(finding(f"{one} over {other}, {kind}", PAPER[one][column] - PAPER[other][column], here, "+.1f"))
    best = max(got_median(got, name) for name in METHODS if name != "unimodal")
    leaders = [name for name in METHODS if name != "unimodal" and got_median(got, name) == best]
    lines.append(f"Best joint accuracy here: {' and '.join(leaders)}, {best:.1f} (paper: MIMO, 75.96).")
    lines.append("\nFigure 3: MIMO's joint accuracy by λ and μ, seed 0 (paper: poor at λ = 1 and at large μ).\n")
    found = {(c["options"]["lam"], c["options"]["mu"]): c["accuracy_joint"] for c in cells if c["extra"] == "ablation"}
    ablation = [[f"λ = {lam:g}", *(f"{found[lam, mu]:.1f}" for mu in MUS)] for lam in LAMBDAS]
    lines.append(table(["", *(f"μ = {mu:g}" for mu in MUS)], ablation))
    for c in cells:
        if c["diverged"] is not None:
            settings = "".join(f", {key} = {value}" for key, value in c["options"].items())
            lines.append(
                f"DIVERGED after {c['diverged']} steps: {c['method']}{settings}, seed {c['seed']}; its figures are "
                "those of the weights before."
            )
    lines.append(
        "\nFigure 2: landscape.png, joint loss (light: low) around the end of training, and which modality leads:"
    )
    pictures = {}
    for c in cells:
        if c["extra"] == "landscape":
            land = c.pop("landscape")
            gap = [c["train_audio"] - c["train_visual"], c["train_joint_loss"], c["test_joint_loss"]]
            lines.append(
                f"- {c['method']}: at the end, training accuracy of audio over visual {gap[0]:+.1f} points; joint loss "
                f"{gap[1]:.3f} in training, {gap[2]:.3f} in the test."
            )
            pictures[c["method"]] = land
    sheet = Image.fromarray(np.concatenate([_paint(land, pictures) for land in pictures.values()], 1))
    curves = {name: zip(*got(name, f"curve_{starved}"), strict=True) for name in ("MML", "MIMO", "EW")}
    rising = {name: [median(seeds) for seeds in curve] for name, curve in curves.items()}
    ticks = [str(min(steps, (i + 1) * _validate_every(steps))) for i in range(_points(steps))]
    by_rate = {f"λ = {lam:g}": [found[lam, mu] for mu in MUS] for lam in LAMBDAS}
    panels = [
        Panel(f"{starved.capitalize()} validation accuracy in %, by its own head", "steps", rising, ticks),
        Panel("Figure 3: joint accuracy in %", "μ", by_rate, [f"{mu:g}" for mu in MUS]),
    ]
    return Reproduction("\n".join(lines), panels, cells, {"landscape.png": sheet})


def got_median(got: Callable[[str, str], list[Any]], name: str) -> float:
    return median(got(name, "accuracy_joint"))


def _probed(got: Callable[[str, str], list[Any]], starved: str) -> list[str]:
    """What the encoders know, by a probe that is the same for every objective: heads train at different speeds."""
    lines = ["\nOf a logistic probe on the frozen features: test accuracy in %, and contributions in points.\n"]
    keys = ("probe_joint", "probe_audio", "probe_visual", "contribution_audio", "contribution_visual")
    rows = [[name, *(spread(_known(got(name, key)), ".1f") for key in keys)] for name in METHODS]
    lines.append(table(["", *keys], rows, width=150))
    gap = f"{_gap(got, starved):.1f} points below what it learns alone (paper, by its head: visual, 38.4 points)"
    lines.append(f"\nFurthest behind under MML, by the probe: {starved}, {gap}.")
    lines.append(f"Differences of probe_{starved}, seed by seed, in points:")
    key = f"probe_{starved}"
    for other in ("MML", "EW", "MMPareto", "unimodal"):
        pairs = zip(_known(got("MIMO", key)), _known(got(other, key)), strict=True)
        lines.append(f"- MIMO over {other}: {spread([a - b for a, b in pairs], '+.1f')}.")
    return lines


def _gap(got: Callable[[str, str], list[Any]], kind: str) -> float:
    """By how much, to a probe, training a modality alone is ahead of what it learns beside the others."""
    alone, beside = (median(_known(got(name, f"probe_{kind}"))) for name in ("unimodal", "MML"))
    return alone - beside


def _known(values: Sequence[float | None]) -> list[float]:
    """NaN for what could not be probed."""
    return [math.nan if value is None else value for value in values]


def _shown(values: Sequence[float | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known, ".1f") if known else "-"


def _check(runs: str, data: str | None) -> None:
    """Draws or reads the data before any process starts.

    Raises:
        InputError: The manifest cannot be used; all that is wrong with it.
    """
    from equipoise.pipelines.audio_visual.prepared import prepare

    prepared = prepare(_config({"data": data or "demo", "runs": runs, "seed": 0, "steps": 1}))
    if prepared.problems:
        raise InputError("\n".join(prepared.problems))


def _config(cell: Trial) -> Any:
    from equipoise.pipelines import config

    words = {"data.manifest": cell["data"], "runs": cell["runs"], "seed": cell["seed"], "train.steps": cell["steps"]}
    words |= {"train.baselines": [], "train.validate_every": _validate_every(cell["steps"]), "sweep": {}}
    if "objective" in cell:
        words |= {"objective.name": cell["objective"], "objective.options": cell["options"]}
    return config.set_keys(config.load("audio_visual/demo"), words, "reproduce")


def _validate_every(steps: int) -> int:
    return math.ceil(steps / POINTS)


def _points(steps: int) -> int:
    """Validations: the last is at the end, also where that is no full stretch after the one before."""
    return math.ceil(steps / _validate_every(steps))


@cache
def _prepared(runs: str, data: str):
    from equipoise.pipelines.audio_visual.prepared import prepare

    return prepare(_config({"data": data, "runs": runs, "seed": 0, "steps": 1}))


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

    work = AudioVisualWork(_config(cell), _Quiet(), make_accelerator("no"), _prepared(cell["runs"], cell["data"]))  # type: ignore[arg-type]
    times: list[float] = []
    curves: dict[str, list[float]] = {"audio": [], "visual": []}
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
    kinds = ("joint", "audio", "visual")
    made: Trial = {f"accuracy_{k}": 100 * found[f"accuracy_{k}"] if f"accuracy_{k}" in found else None for k in kinds}  # type: ignore
    made |= {name: value and 100 * value for name, value in work.probe().items()}
    if cell["extra"] == "landscape":
        made |= _landscape(work)
    count = _points(cell["steps"])
    for kind, curve in curves.items():
        made[f"curve_{kind}"] = (curve + [made[f"accuracy_{kind}"]] * count)[:count]
    return made | {"balancing": median(times or [0.0]), "diverged": diverged}


@torch.no_grad()
def _landscape(work: Any) -> Trial:
    """Along two random directions, each filter's as long as the filter itself: joint loss of training and test, and by
    how much audio leads visual in training accuracy, on some clips of each split; at the end, on all."""
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
        points.append([train["joint"].loss, test["joint"].loss, train["audio"].accuracy - train["visual"].accuracy])
    for p, base in zip(weights, start, strict=True):
        p.copy_(base)
    return {
        "landscape": points,
        "train_audio": 100 * end["train"]["audio"].accuracy,
        "train_visual": 100 * end["train"]["visual"].accuracy,
        "train_joint_loss": end["train"]["joint"].loss,
        "test_joint_loss": end["test"]["joint"].loss,
    }


def _some(count: int) -> torch.Tensor:
    """Indices of at most SHOWN clips, by chance and always the same: a manifest is often sorted by class."""
    return torch.randperm(count, generator=torch.Generator().manual_seed(0))[:SHOWN]


def _paint(points: list[list[float]], all_of_them: dict[str, list[list[float]]]) -> np.ndarray:
    """A square of the landscape: blue where audio leads, green where visual does, darker where the loss is higher."""
    losses = np.log(np.nan_to_num([p[0] for p in points], nan=LARGE).clip(1e-9, LARGE))
    every = np.log(np.nan_to_num([p[0] for other in all_of_them.values() for p in other], nan=LARGE).clip(1e-9, LARGE))
    level = ((losses - every.min()) / max(1e-9, np.ptp(every))).reshape(SIDE, SIDE)
    gap = np.clip([p[2] for p in points], -1, 1).reshape(SIDE, SIDE)
    tint = np.where(gap[..., None] > 0, np.array([60, 110, 230]), np.array([40, 160, 80]))
    colour = 255 - np.abs(gap)[..., None] * (255 - tint)
    pixels = (colour * (1 - 0.6 * level[..., None])).astype(np.uint8)
    image = Image.fromarray(pixels).resize((360, 360), Image.Resampling.BICUBIC)
    middle = 180
    done = np.array(image)
    done[middle - 4 : middle + 4, middle - 4 : middle + 4] = (220, 30, 30)
    return np.pad(done, ((8, 8), (8, 8), (0, 0)), constant_values=255)
