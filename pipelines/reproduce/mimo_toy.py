"""The toy of MIMO's Appendix B, exactly: why joint training learns the modality that helps less first (Figure 1).

Paper: Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization,
Appendix B: 700 points, x₁ ~ N(0, 25) and x₂ ~ N(0, 0.25) in R⁵⁰, y = 0.001·x₁ + x₂, a linear encoder of 100 units and a
linear head per modality, weights near zero, gradient descent on all points at 0.01; MIMO with λ = 10 and μ = 0.2. The
paper does not say how a vector of 50 numbers becomes the label, so both ways stand here: the mean at the paper's rate,
and the sum at a tenth of it (at 0.01 the sum diverges).
"""

import math
from collections.abc import Callable, Sequence
from itertools import product
from statistics import median
from typing import Any

import torch
from torch import Tensor

from equipoise.balancing.joint import Joint
from equipoise.balancing.mimo import MIMO
from equipoise.balancing.objective import Losses
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, spread, workers
from equipoise.pipelines.tables import table

POINTS, INPUTS, UNITS = 700, 50, 100
NEAR_ZERO = 1e-4  # deviation of the weights at the start, which the paper does not give
LABELS = {"mean": 0.01, "sum": 0.001}  # how y is made of 50 coordinates: the learning rate
METHODS = {"MML": Joint, "MIMO": lambda: MIMO(lam=10.0, mu=0.2)}
STEPS = {"mean": 12000, "sum": 4000}
LEARNED, SMALL = 0.5, 0.05  # share of a norm's largest value; share of the loss at the start
SHOWN = 60  # points of a curve
FASTER = (1, 3, 10, 30, 100, 300, 1000)  # times the paper's rate, for each method's own best one
ALIKE = 1.5  # "similar speeds": neither modality takes over so many times the other's steps


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Trains with seeds from 0 in `count` processes; `steps` None: as many as the slower method needs."""
    cells = [
        {"label": label, "method": method, "seed": seed, "faster": faster, "steps": _enough(label, steps, faster)}
        for label, method, faster, seed in product(LABELS, METHODS, FASTER, range(seeds))
    ]
    cells = [{**cell, "evaluations": cell["steps"]} for cell in cells]
    with workers(count, "mimo-toy", sum(cell["evaluations"] for cell in cells)) as measure:
        cells = measure(train, cells)

    def got(label: str, method: str, key: str) -> list[Any]:
        return [c[key] for c in cells if (c["label"], c["method"], c["faster"]) == (label, method, 1)]

    text, panels = [], []
    for label, rate in LABELS.items():
        many = steps or STEPS[label]
        found = cells[[c["label"] for c in cells].index(label)]["conditions"]
        text += [
            f"Label: the {label} of 0.001·x₁ + x₂ over its coordinates; rate {rate:g}, {many} steps, {seeds} seed(s).",
            f"  Conditions (16), (18): ‖C_y1‖ > ‖C_y2‖: {found['y1']:.3g} and {found['y2']:.3g}, "
            f"{_verdict(found['y1'] > found['y2'])}; C_y1·C_1⁻¹·C_y1ᵀ < C_y2·C_2⁻¹·C_y2ᵀ: {found['gain1']:.3g} and "
            f"{found['gain2']:.3g}, {_verdict(found['gain1'] < found['gain2'])}.",
            f"  Condition (17): f(M₁) > f(M₂), the least loss with one modality alone: {found['alone1']:.3g} and "
            f"{found['alone2']:.3g}, {_verdict(found['alone1'] > found['alone2'])}; and m₁ is learned first, below.",
        ]
        rows = []
        for method in METHODS:
            first, second = got(label, method, "learned_1"), got(label, method, "learned_2")
            when = map(_steps, (first, second, got(label, method, "small")))
            rows.append([method, *when, spread(got(label, method, "final"), ".2e")])
        heads = ["", "m₁ learned at", "m₂ learned at", f"loss ≤ {SMALL:.0%} at", "loss at the end / at the start"]
        text.append(table(heads, rows, width=120))
        pairs = list(zip(got(label, "MML", "learned_1"), got(label, "MML", "learned_2"), strict=True))
        sooner = [one is not None and (other is None or one < other) for one, other in pairs]
        held = f"in {sum(sooner)} of {len(sooner)} seeds"
        text.append(
            f"- Condition (17): joint training learns m₁ before m₂, though m₂ explains more: {held} (paper: yes)."
        )
        ratios = [
            a / b
            for a, b in zip(got(label, "MML", "small"), got(label, "MIMO", "small"), strict=True)
            if a is not None and b is not None
        ]
        earlier = f"{spread(ratios, '.1f')} times sooner" if ratios else "not reached by both; more --steps may show it"
        text.append(_speeds(got, label))
        text.append(
            f"- MIMO is at a small loss, at that rate: {earlier} (paper: Figure 1 shows several times; no number)."
        )
        text += [_tuned(label, cells), ""]
        for method in METHODS:
            curves = got(label, method, "curves")
            lines = {name: _middle([curve[name] for curve in curves]) for name in ("‖θ₁‖", "‖θ₂‖", "loss / start")}
            ticks = [str((i + 1) * many // SHOWN) for i in range(SHOWN)]
            panels.append(Panel(f"{method}, label = {label}: each as a share of its largest", "steps", lines, ticks))
    return Reproduction("\n".join(text).rstrip(), panels, cells)


def _enough(label: str, steps: int | None, faster: float) -> int:
    """Steps at a multiple of the paper's rate, which needs fewer."""
    many = steps or STEPS[label]
    return max(min(many, 400), math.ceil(many / faster))


def _speeds(got: Callable[[str, str, str], list[Any]], label: str) -> str:
    """Whether MIMO learns both modalities at similar speeds: how many times m₁'s steps m₂ takes."""
    times, found = {}, []
    for method in METHODS:
        pairs = zip(got(label, method, "learned_1"), got(label, method, "learned_2"), strict=True)
        times[method] = [two / one for one, two in pairs if one and two]
        found.append(f"{spread(times[method], '.1f') if times[method] else 'unknown'} with {method}")
    alike = [1 / ALIKE <= ratio <= ALIKE for ratio in times["MIMO"]]
    verdict = "More --steps may show it."
    if alike:
        verdict = "It reproduces." if all(alike) else "It DOES NOT REPRODUCE."
    says = "paper: MIMO learns both at similar speeds"
    return f"- Steps until m₂ is learned, over those of m₁: {', '.join(found)} ({says}). {verdict}"


def _tuned(label: str, cells: Sequence[Trial]) -> str:
    """Each method at the rate at which it is soonest at a small loss in all seeds: what a fixed rate leaves open."""
    soonest: dict[str, tuple[float, float, list[int]]] = {}  # median steps, rate, steps
    for method, faster in product(METHODS, FASTER):
        took = [c["small"] for c in cells if (c["label"], c["method"], c["faster"]) == (label, method, faster)]
        if None not in took and median(took) < soonest.get(method, (math.inf,))[0]:
            soonest[method] = median(took), LABELS[label] * faster, took
    if len(soonest) < len(METHODS):
        return "- Each method at its own best rate: not reached by both; more --steps may show it."
    said = [f"{method} at {rate:g} in {spread(took, '.0f')} steps" for method, (_, rate, took) in soonest.items()]
    ratios = [a / b for a, b in zip(soonest["MML"][2], soonest["MIMO"][2], strict=True)]
    rates = ", ".join(f"{LABELS[label] * faster:g}" for faster in FASTER)
    return (
        f"- Each at its own best of the rates {rates} (the paper tunes neither): {' and '.join(said)}: MML takes "
        f"{spread(ratios, '.2f')} times MIMO's steps."
    )


def _verdict(holds: bool) -> str:
    return "holds" if holds else "DOES NOT HOLD"


def _steps(values: list[int | None]) -> str:
    known = [value for value in values if value is not None]
    return spread(known, ".0f") if len(known) == len(values) else "not in all seeds" if known else "not reached"


def _middle(curves: list[list[float]]) -> list[float]:
    return [median(values) for values in zip(*curves, strict=True)]


def data(label: str, seed: int) -> tuple[Tensor, Tensor, Tensor]:
    """x₁, x₂ (points, inputs) and y (points,) in float64."""
    generator = torch.Generator().manual_seed(seed)
    x1, x2 = (s * torch.randn(POINTS, INPUTS, generator=generator, dtype=torch.float64) for s in (5.0, 0.5))
    combined = 0.001 * x1 + x2
    return x1, x2, combined.mean(1) if label == "mean" else combined.sum(1)


def conditions(x1: Tensor, x2: Tensor, y: Tensor) -> dict[str, float]:
    """The two sides of the inequalities in (16), (18) and (17): in that, the least losses that one modality alone
    reaches."""
    found = {}
    for name, x in (("1", x1), ("2", x2)):
        own, with_label = x.T @ x / len(x), y @ x / len(x)
        found[f"y{name}"] = with_label.norm().item()
        found[f"gain{name}"] = (with_label @ torch.linalg.solve(own, with_label)).item()
        best = torch.linalg.lstsq(x, y[:, None]).solution[:, 0]
        found[f"alone{name}"] = (y - x @ best).square().mean().item()
    return found


def quadratic(x1: Tensor, x2: Tensor, y: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    """The mean over all points of (y − x₁·v₁ − x₂·v₂)², as a function of v₁ and v₂, through the correlation matrices:
    the same number for a hundredth of the work."""
    x = torch.cat([x1, x2], 1)
    own, with_label, square = x.T @ x / len(x), y @ x / len(x), y @ y / len(y)

    def loss(v1: Tensor, v2: Tensor) -> Tensor:
        v = torch.cat([v1, v2])
        return square - 2 * with_label @ v + v @ own @ v

    return loss


def train(cell: Trial) -> Trial:
    """Trains one model: when each encoder's norm was half its largest, when the loss was small, and the curves."""
    x1, x2, y = data(cell["label"], cell["seed"])
    generator = torch.Generator().manual_seed(cell["seed"] + 1000)

    def start(*shape: int) -> Tensor:
        return (NEAR_ZERO * torch.randn(shape, generator=generator, dtype=torch.float64)).requires_grad_()

    encoders = [start(INPUTS, UNITS), start(INPUTS, UNITS)]
    joint, own = [start(UNITS), start(UNITS)], [start(UNITS), start(UNITS)]
    parameters = [*encoders, *joint, *own]
    objective = METHODS[cell["method"]]()
    objective.bind({"m1": encoders[:1], "m2": encoders[1:]})
    optimizer = torch.optim.SGD(parameters, lr=cell.get("faster", 1) * LABELS[cell["label"]])
    f = quadratic(x1, x2, y)
    losses, norms = [], []
    for _ in range(cell["steps"]):
        maps = [(encoders[k] @ joint[k], encoders[k] @ own[k]) for k in (0, 1)]
        zero = torch.zeros_like(maps[0][0])
        together = f(maps[0][0], maps[1][0])
        objective.backward(Losses(together, {"m1": f(maps[0][1], zero), "m2": f(zero, maps[1][1])}))
        losses.append(together.detach())
        norms.append(torch.stack([encoder.detach().norm() for encoder in encoders]))
        optimizer.step()
        optimizer.zero_grad()
    loss, norm = torch.stack(losses) / losses[0], torch.stack(norms)
    shares = norm / norm.amax(0).clamp(min=1e-300)
    grown = norm.amax(0) > 3 * norm[0]  # of an encoder that has not left zero there is nothing to date

    def when(reached: Tensor) -> int | None:
        return int(reached.nonzero()[0]) + 1 if reached.any() and math.isfinite(loss[-1]) else None

    chosen = [max(0, (i + 1) * cell["steps"] // SHOWN - 1) for i in range(SHOWN)]
    return {
        "conditions": conditions(x1, x2, y),
        "learned_1": when((shares[:, 0] > LEARNED) & grown[0]),
        "learned_2": when((shares[:, 1] > LEARNED) & grown[1]),
        "small": when(loss <= SMALL),
        "final": loss[-1].item(),
        "curves": {
            "‖θ₁‖": shares[chosen, 0].tolist(),
            "‖θ₂‖": shares[chosen, 1].tolist(),
            "loss / start": loss[chosen].tolist(),
        },
    }
