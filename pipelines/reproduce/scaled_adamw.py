"""Theorem 4.1: whether one learning rate moves a LoRA layer's features alike at every width.

Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024,
Section 4 and Appendix A: with A ~ N(0, 1/n), B = 0, inputs and outputs of size 1 in each of n entries, a step changes
BAx by Θ(1) at a rate of Θ(1) where Adam's processed gradients are preconditioned, and unscaled Adam needs rates of
1/n for A and 1 for B. The theorem's proof preconditions what Adam has made of the gradient; the paper's Algorithm 1,
and `ScaledAdamW`, precondition the gradient before Adam. Here are both, and Adam, LoRA+ and plain scaled GD, at one
rate for all widths. Each trains one layer of rank 4 towards a given output.
"""

import math
from itertools import product
from statistics import linear_regression, median

import torch
from torch import Tensor, nn
from torch.optim import Adam, Optimizer

from equipoise.optimizers.scaled import ScaledAdamW, ScaledGD
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, spread, workers
from equipoise.pipelines.tables import table

STEPS, RANK, RATE = 8, 1, 1e-3
WIDTHS = (64, 128, 256, 512, 1024, 2048, 4096)
FIRST = 3  # the step from which both factors move
RATIO = 16  # of LoRA+: B's rate by A's
DAMPING = 1e-12


class ScaledAfterAdam(Adam):
    """Adam's step on each factor, and that preconditioned: A ← A − η(BᵀB + δ)⁻¹g_A, B ← B − ηg_B(AAᵀ + δ)⁻¹."""

    def __init__(self, layer: "Layer", lr: float) -> None:
        super().__init__([layer.lora_A.weight, layer.lora_B.weight], lr=lr)

    @torch.no_grad()
    def step(self, closure=None):  # type: ignore[override]
        a, b = self.param_groups[0]["params"]
        before = a.clone(), b.clone()
        super().step(closure)
        moved = [now - old for now, old in zip((a, b), before, strict=True)]
        one = DAMPING * torch.eye(RANK, dtype=a.dtype)
        a.copy_(before[0] + torch.linalg.solve(before[1].T @ before[1] + one, moved[0]))
        b.copy_(before[1] + torch.linalg.solve(before[0] @ before[0].T + one, moved[1].T).T)


def _lora_plus(layer: "Layer", lr: float) -> Optimizer:
    groups = [{"params": [layer.lora_A.weight]}, {"params": [layer.lora_B.weight], "lr": RATIO * lr}]
    return Adam(groups, lr=lr)


def _by_width(layer: "Layer", lr: float) -> Optimizer:
    groups = [{"params": [layer.lora_A.weight], "lr": lr / layer.width}, {"params": [layer.lora_B.weight]}]
    return Adam(groups, lr=lr)


METHODS = {  # how each is made, and what the theory says of Δ by width
    "Adam": (lambda layer, lr: Adam(layer.parameters(), lr=lr), "grows"),
    f"LoRA+, ratio {RATIO}": (_lora_plus, "grows"),
    "Adam, A's rate by n": (_by_width, "steady"),
    "scaled before Adam": (lambda layer, lr: ScaledAdamW(layer, lr=lr, damping=DAMPING, weight_decay=0.0), ""),
    "scaled after Adam": (ScaledAfterAdam, "steady"),
    "scaled GD": (lambda layer, lr: ScaledGD(layer, lr=lr, damping=DAMPING), "grows"),
}
STEADY = 0.25  # of an exponent: below it a change is called steady


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Trains the layer at all widths, with seeds from 0, in `count` processes; `steps` None: 8."""
    steps = max(steps or STEPS, FIRST + 1)
    cells: list[Trial] = [
        {"method": name, "width": width, "seed": seed, "steps": steps, "evaluations": steps}
        for seed, name, width in product(range(seeds), METHODS, WIDTHS)
    ]
    with workers(count, "scaled-adamw", steps * len(cells)) as measure:
        cells = measure(train, cells)

    def found(name: str, width: int) -> list[float]:  # one per seed
        return [cell["change"] for cell in cells if (cell["method"], cell["width"]) == (name, width)]

    def exponents(name: str) -> list[float]:  # one per seed, of the line through all widths
        widths = [math.log(width) for width in WIDTHS]
        curves = zip(*(found(name, width) for width in WIDTHS), strict=True)
        return [linear_regression(widths, list(map(math.log, curve))).slope for curve in curves]

    rows = [
        [name, *(f"{median(found(name, width)):.3g}" for width in WIDTHS), spread(exponents(name), "+.2f"), _word(name)]
        for name in METHODS
    ]
    text = [
        f"How far a step moves the features BAx, root mean square of an entry: the median of steps {FIRST} to {steps},",
        f"at a rate of {RATE:g} for all widths; medians of {seeds} seed(s). Exponent: p of Δ ∝ nᵖ, a line "
        "through all widths.\n",
        table(["n", *map(str, WIDTHS), "exponent", "theory"], rows),
        "",
        *(_verdict(name, exponents(name)) for name, (_, theory) in METHODS.items() if theory),
    ]
    lines = {name: [math.log10(median(found(name, width))) for width in WIDTHS] for name in METHODS}
    panels = [Panel("log10 of a step's change of the features", "width", lines, [str(width) for width in WIDTHS])]
    return Reproduction("\n".join(text), panels, cells)


def _word(name: str) -> str:
    return METHODS[name][1] or "none"


def _verdict(name: str, exponents: list[float]) -> str:
    middle = median(exponents)  # one seed's first Ax may be small at one width by chance
    here = "steady" if abs(middle) < STEADY else "grows" if middle > 0 else "falls"
    same = "as the theory has it" if here == METHODS[name][1] else "NOT as the theory has it"
    return f"- {name}: {here} with the width, {same}."


class Layer(nn.Module):
    """BAx for one x, with peft's names."""

    def __init__(self, width: int, seed: int):
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        self.width = width
        self.lora_A = nn.Linear(width, RANK, bias=False, dtype=torch.float64)
        self.lora_B = nn.Linear(RANK, width, bias=False, dtype=torch.float64)
        self.lora_A.weight.data = torch.randn(RANK, width, generator=rng, dtype=torch.float64) / width**0.5
        self.lora_B.weight.data.zero_()
        self.x, self.y = torch.randn(2, width, generator=rng, dtype=torch.float64)

    def forward(self) -> Tensor:
        return self.lora_B(self.lora_A(self.x))


def train(cell: Trial) -> Trial:
    """Trains one layer: the median root mean square of what a step changes in an entry of BAx."""
    layer = Layer(cell["width"], cell["seed"])
    optimizer, changes = METHODS[cell["method"]][0](layer, RATE), []
    with torch.no_grad():
        before = layer()
    for _ in range(cell["steps"]):
        optimizer.zero_grad()
        ((layer() - layer.y).square().sum() / 2).backward()
        optimizer.step()
        with torch.no_grad():
            after = layer()
            changes.append((after - before).square().mean().sqrt().item())
            before = after
    return {"change": median(changes[FIRST - 1 :]), "changes": changes}
