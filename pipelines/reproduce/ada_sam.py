"""AdaSAM's Tables I and II and Figure 2 in small: SGD, SAM, AMSGrad and AdaSAM where generalisation matters.

Paper: Sun et al., AdaSAM, arXiv 2303.00565, 2023: RoBERTa-large on GLUE, momentum 0.9 (Table I) and 0 (Table II), ρ of
0.01, 0.005 and 0.001, warm-up over the first 6 % of the steps; Figure 2: batches of 4 to 32 with rates ∝ √batch. In
place of GLUE: a small convolutional net tells drawn shapes apart after 512 pictures, three in ten of them labelled
wrongly. Each optimizer gets the rate and ρ of one grid that do best on pictures held out for that, with a seed of its
own; then seeds from 0 are judged on other pictures. AdaSAM is judged at each ρ too, and the optimizers that evaluate
once also with twice the steps, which is as many gradients. The chart has Figures 1 and 3, loss and accuracy of all four
over the steps, with momentum and without.
"""

import math
from collections.abc import Callable
from functools import cache
from itertools import pairwise, product
from statistics import median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import SGD

from equipoise.optimizers.amsgrad import AMSGrad
from equipoise.optimizers.sharpness import AdaSAM, SharpnessAware
from equipoise.pipelines.demo import shapes
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, interval, spread, workers
from equipoise.pipelines.tables import table

STEPS, BATCH, SIDE, WRONG, TUNING_SEED = 300, 32, 16, 0.3, 1000
RATES = (1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 3e-1)
RHOS = (0.001, 0.005, 0.01, 0.05, 0.2)  # the paper's three, SAM's usual one, a larger one
OPTIMIZERS = {"SGD": SGD, "SAM": SharpnessAware(SGD), "AMSGrad": AMSGrad, "AdaSAM": AdaSAM}
PAPER = {  # averages over GLUE, each with its best ρ, of Tables I and II
    0.9: {"SGD": 55.8, "SAM": 82.51, "AMSGrad": 89.52, "AdaSAM": 89.8},
    0.0: {"SGD": 37.23, "SAM": 69.06, "AMSGrad": 88.79, "AdaSAM": 89.52},
}
ONCE = ("SGD", "AMSGrad")  # one gradient a step
COMPARED = (("SAM", "SGD"), ("AMSGrad", "SGD"), ("AdaSAM", "SAM"), ("AdaSAM", "AMSGrad"))
BATCHES = (4, 8, 16, 32)
POINTS = 40  # of a loss curve


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Tunes, then trains with seeds from 0, in `count` processes; `steps` None: the published number."""
    steps = steps or STEPS

    def cell(name: str, beta: float, rate: float, rho: float, seed: int, batch: int = BATCH, times: int = 1) -> Trial:
        settings = {"optimizer": name, "beta": beta, "rate": rate, "rho": rho, "seed": seed, "batch": batch}
        return {**settings, "steps": times * steps, "evaluations": times * steps * (1 + (rho > 0))}

    kinds = list(product(OPTIMIZERS, PAPER))
    grid = [
        cell(*kind, rate, rho, TUNING_SEED)
        for kind in kinds
        for rate, rho in product(RATES, RHOS if "SAM" in kind[0] else (0.0,))
    ]
    rest = 2 * 3 + 2 * 2 + 2 * 2 * len(RHOS) + 2 * 2 + 2 * (len(BATCHES) - 1)  # at most, in units of steps · seeds
    with workers(count, "ada-sam", sum(one["evaluations"] for one in grid) + rest * steps * seeds) as measure:
        grid = measure(train, grid)

        def best(name: str, beta: float, rho: float | None = None) -> Trial:
            tried = [c for c in grid if (c["optimizer"], c["beta"]) == (name, beta) and rho in (None, c["rho"])]
            return max(tried, key=lambda c: c["tuning"])

        settings = {kind: (best(*kind)["rate"], best(*kind)["rho"]) for kind in kinds}
        by_rho = {(beta, rho): best("AdaSAM", beta, rho)["rate"] for beta, rho in product(PAPER, RHOS)}
        ordered = _judged(settings, by_rho)
        chosen = [
            cell(name, beta, rate, rho, seed, batch, times)
            for name, beta, rate, rho, batch, times in ordered
            for seed in range(seeds)
        ]
        cells = measure(train, chosen)

    rate, rho = settings["AdaSAM", 0.9]
    found: dict[tuple[Any, ...], list[Trial]] = {
        one: cells[seeds * i : seeds * (i + 1)] for i, one in enumerate(ordered)
    }

    def got(key: str, *one: Any) -> list[Any]:  # one per seed, of (optimizer, β₁[, rate, ρ[, batch, times]])
        one += settings[one[:2]] if len(one) == 2 else ()
        return [c[key] for c in found[(*one, *(BATCH, 1)[len(one) - 4 :])]]

    text = [
        f"Test accuracy in % on drawn shapes after {steps} steps, {WRONG:.0%} of the training labels wrong, {seeds} "
        "seed(s); the paper's: averages over GLUE."
    ]
    for beta in PAPER:
        text += _tables(beta, settings, by_rho, got)
    text.append("\nDifferences, seed by seed, in points:")
    text += _differences(settings, by_rho, got)
    text.append(
        f"\nFigure 2, AdaSAM with β₁ = 0.9, ρ = {rho:g}, rate {rate:g}·√(batch/{BATCH}): how much sooner, in % of the "
        "steps,\na batch of twice the size is at the training loss where the smaller one ends (the paper: nearly half):"
    )
    falling = {b: got("losses", "AdaSAM", 0.9, rate * math.sqrt(b / BATCH), rho, b) for b in BATCHES}
    for half, batch in pairwise(BATCHES):
        sooner = [_sooner(*pair) for pair in zip(falling[half], falling[batch], strict=True)]
        text.append(finding(f"batch {half} to {batch}", 50.0, sooner, "+.0f"))
    return Reproduction("\n".join(text), _panels(grid, got, falling), grid + cells)


def _judged(settings: dict, by_rho: dict) -> list[tuple[Any, ...]]:
    """(optimizer, β₁, rate, ρ, batch, times the steps) of all that is judged, each once."""
    rate, rho = settings["AdaSAM", 0.9]
    judged = {(*kind, *settings[kind], BATCH, 1) for kind in settings}
    judged |= {("AdaSAM", beta, by_rho[beta, r], r, BATCH, 1) for beta, r in by_rho}
    judged |= {(*kind, *settings[kind], BATCH, 2) for kind in settings if kind[0] in ONCE}
    judged |= {("AdaSAM", 0.9, rate * math.sqrt(batch / BATCH), rho, batch, 1) for batch in BATCHES}
    return sorted(judged)


def _tables(beta: float, settings: dict, by_rho: dict, got: Callable[..., list[Any]]) -> list[str]:
    """The paper's table of one β₁, and AdaSAM at each ρ."""
    rows = [
        [name, *(f"{value:g}" for value in settings[name, beta])]
        + [spread(got(key, name, beta), ".1f") for key in ("test", "train")]
        + [average]
        for name, average in PAPER[beta].items()
    ]
    for name in ONCE:
        one = (name, beta, *settings[name, beta], BATCH, 2)
        rows.append([f"{name}, twice the steps", *(f"{value:g}" for value in settings[name, beta])])
        rows[-1] += [*(spread(got(key, *one), ".1f") for key in ("test", "train")), ""]
    plain = got("test", "AMSGrad", beta)
    swept = []
    for rho in RHOS:
        here = got("test", "AdaSAM", beta, by_rho[beta, rho], rho)
        over = [a - b for a, b in zip(here, plain, strict=True)]
        swept.append([f"{rho:g}", f"{by_rho[beta, rho]:g}", spread(here, ".1f"), interval(over, "+.1f")])
    return [
        f"\nβ₁ = {beta:g}\n\n" + table(["", "rate", "ρ", "test", "training labels", "paper"], rows),
        "\nAdaSAM at each ρ, at its best rate there:\n\n" + table(["ρ", "rate", "test", "over AMSGrad"], swept),
    ]


def _differences(settings: dict, by_rho: dict, got: Callable[..., list[Any]]) -> list[str]:
    def judged(claim: str, one: tuple, other: tuple, paper: float | None) -> str:
        here = [a - b for a, b in zip(got("test", *one), got("test", *other), strict=True)]
        return f"{finding(claim, paper, here, '+.1f')} Mean {interval(here, '+.1f')}."

    lines = []
    for beta, (one, other) in product(PAPER, COMPARED):
        paper = PAPER[beta][one] - PAPER[beta][other]
        lines.append(judged(f"β₁ = {beta:g}, {one} over {other}", (one, beta), (other, beta), paper))
    for beta, (one, other) in product(PAPER, (("SAM", "SGD"), ("AdaSAM", "AMSGrad"))):
        twice = (other, beta, *settings[other, beta], BATCH, 2)
        claim = f"β₁ = {beta:g}, {one} over {other} at equal gradients (twice the steps)"
        lines.append(judged(claim, (one, beta), twice, None))
    for name in OPTIMIZERS:
        paper = PAPER[0.9][name] - PAPER[0.0][name]
        lines.append(judged(f"β₁ = 0.9 over 0, {name}", (name, 0.9), (name, 0.0), paper))
    return lines


def _panels(grid: list[Trial], got: Callable[..., list[Any]], falling: dict[int, list[list[float]]]) -> list[Panel]:
    def middle(curves: list[list[float]]) -> list[float]:
        return list(map(median, zip(*curves, strict=True)))

    tuned = {
        name: [
            max(c["tuning"] for c in grid if (c["optimizer"], c["beta"], c["rate"]) == (name, 0.9, r)) for r in RATES
        ]
        for name in OPTIMIZERS
    }
    shares = [f"{2.5 * (i + 1):g}" for i in range(POINTS)]
    curves = {"Training loss": ("losses", shares), "Test accuracy in %": ("scores", shares[1::2])}
    return [
        Panel("Accuracy when tuning in %, momentum 0.9", "learning rate", tuned, [f"{r:g}" for r in RATES]),
        Panel("AdaSAM's training loss", "% of steps", {f"batch {b}": middle(f) for b, f in falling.items()}, shares),
        *(
            Panel(
                f"{what}, momentum {beta:g}",
                "% of steps",
                {name: middle(got(key, name, beta)) for name in OPTIMIZERS},
                ticks,
            )
            for beta in PAPER
            for what, (key, ticks) in curves.items()
        ),
    ]


def _sooner(half: list[float], twice: list[float]) -> float:
    """By how many % of the steps `twice` is sooner where `half` ends; below 0: by how many it is later."""

    def share(losses: list[float], end: float) -> float:
        return 100 * next((i + 1 for i, loss in enumerate(losses) if loss <= end), POINTS) / POINTS

    return 100 - share(twice, half[-1]) if twice[-1] <= half[-1] else share(half, twice[-1]) - 100


def train(cell: Trial) -> Trial:
    """Trains one net: its accuracies in %, its training loss after each fortieth of the steps, and, when it is judged,
    its test accuracy after each twentieth."""
    pictures, labels = _data()
    steps, classes, rng = cell["steps"], len(shapes.SHAPES), torch.Generator().manual_seed(cell["seed"])
    right = labels["train"]
    wrong = torch.rand(right.shape, generator=rng) < WRONG
    learned = (right + wrong * torch.randint(1, classes, right.shape, generator=rng)) % classes
    epochs = steps * cell["batch"] // len(learned) + 1
    order = torch.cat([torch.randperm(len(learned), generator=rng) for _ in range(epochs)]).split(cell["batch"])
    torch.manual_seed(cell["seed"])
    net = nn.Sequential(
        nn.Conv2d(3, 16, 3, 2, 1), nn.GroupNorm(4, 16), nn.ReLU(),
        nn.Conv2d(16, 32, 3, 2, 1), nn.GroupNorm(4, 32), nn.ReLU(),
        nn.Flatten(), nn.Linear(2 * SIDE * SIDE, classes),
    )  # fmt: skip
    options = {"momentum": cell["beta"]} if cell["optimizer"] in ("SGD", "SAM") else {"betas": (cell["beta"], 0.999)}
    options |= {"rho": cell["rho"]} if cell["rho"] else {}
    optimizer, losses = OPTIMIZERS[cell["optimizer"]](net.parameters(), lr=cell["rate"], **options), []
    scores: list[float] = []

    def accuracy(kind: str, wanted: Tensor) -> float:
        return 100 * (wanted == net(pictures[kind]).argmax(1)).double().mean().item()

    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = cell["rate"] * min((step + 1) / (0.06 * steps), (steps - step) / (0.94 * steps), 1.0)

        def closure(batch: Tensor = order[step]) -> Tensor:
            optimizer.zero_grad()
            loss = F.cross_entropy(net(pictures["train"][batch]), learned[batch])
            loss.backward()
            return loss

        optimizer.step(closure)
        if due := (step + 1) * POINTS // steps - len(losses):
            with torch.no_grad():
                losses += [F.cross_entropy(net(pictures["train"]), learned).item()] * due
                if cell["seed"] != TUNING_SEED and (more := len(losses) // 2 - len(scores)):
                    scores += [accuracy("test", labels["test"])] * more
    with torch.no_grad():
        ended = {kind: accuracy(kind, wanted) for kind, wanted in {**labels, "train": learned}.items()}
    return ended | {"losses": losses} | ({"scores": scores} if scores else {})


@cache
def _data() -> tuple[dict[str, Tensor], dict[str, Tensor]]:
    """By use, (count, 3, SIDE, SIDE) pictures as the embedded base was trained on them, and which shape each shows."""
    rng, pictures, labels = np.random.default_rng(0), {}, {}
    names, colours = list(shapes.SHAPES), list(shapes.COLOURS)
    for kind, count in (("train", 512), ("tuning", 512), ("test", 1024)):
        labels[kind], drawn = torch.arange(count) % len(names), []
        for label in labels[kind].tolist():
            subject = shapes.shape(colours[rng.integers(len(colours))], names[label])
            background = shapes.BACKGROUNDS[rng.integers(len(shapes.BACKGROUNDS))]
            picture = shapes.draw_varied(subject, background, rng).resize((SIDE, SIDE), Image.Resampling.BOX)
            drawn.append(np.asarray(picture, dtype=np.float32))
        pictures[kind] = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
    return pictures, labels
