"""Scaled GD's Theorem 7.4: on the convexified two-layer ReLU net its rate does not depend on the condition number.

Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024,
problem (3) and Definition 7.3: ½‖Σᵢ DᵢX(Wᵢ + AᵢBᵢᵀ) − Y‖², Y from known products X*ᵢ, from the extended spectral
initialisation. Here are P = 2 activation patterns, 1{Xu ≥ 0} and its complement, Gaussian X, Wᵢ = 0 (it drops out),
and X*ᵢ of rank 3 with singular values from 1 down to 1/κ. Scaled GD runs at η = 1/2, which the theorem allows, and
without damping; plain GD at the rate of a grid that ends lowest for each κ.
"""

import math
from itertools import product
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import SGD

from equipoise.optimizers.scaled import ScaledGD
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, spread, workers
from equipoise.pipelines.tables import table

STEPS, ROWS, WIDTH, OUTPUTS, RANK = 150, 20_000, 20, 10, 3
CONDITIONS = (1, 10, 100, 1000)
RATE, RATES = 0.5, (0.03, 0.1, 0.3, 0.5, 1.0)  # of scaled GD; of plain GD
CLOSE = 1e-6  # relative error that counts as there
LEAST = 1e-15  # of what a chart's logarithm shows


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Runs both optimizers at all condition numbers, with seeds from 0, in `count` processes; `steps` None: 150."""
    steps = steps or STEPS
    cells: list[Trial] = [
        {"optimizer": name, "condition": kappa, "rate": rate, "seed": seed, "steps": steps, "evaluations": steps}
        for seed, kappa in product(range(seeds), CONDITIONS)
        for name, rate in [("scaled GD", RATE), *(("GD", rate) for rate in RATES)]
    ]
    with workers(count, "scaled-gd", steps * len(cells)) as measure:
        cells = measure(train, cells)

    def errors(name: str, kappa: int, rate: float) -> list[list[float]]:  # (seeds, steps + 1)
        return [c["errors"] for c in cells if (c["optimizer"], c["condition"], c["rate"]) == (name, kappa, rate)]

    def last(kappa: int, rate: float) -> float:
        return median(e[-1] if math.isfinite(e[-1]) else math.inf for e in errors("GD", kappa, rate))

    best = {kappa: min(RATES, key=lambda rate: last(kappa, rate)) for kappa in CONDITIONS}
    found = {("scaled GD", kappa): errors("scaled GD", kappa, RATE) for kappa in CONDITIONS}
    found |= {("GD", kappa): errors("GD", kappa, best[kappa]) for kappa in CONDITIONS}
    rows = [
        [
            f"{kappa}",
            *(
                _middle([_arrival(e) for e in found["scaled GD", kappa]]),
                f"{median(map(_factor, found['scaled GD', kappa])):.3f}",
            ),
            f"{best[kappa]:g}",
            *(_middle([_arrival(e) for e in found["GD", kappa]]), f"{median(map(_factor, found['GD', kappa])):.3f}"),
        ]
        for kappa in CONDITIONS
    ]
    constants = [isometry(seed) for seed in range(seeds)]
    slowest = max(_factor(e) for kappa in CONDITIONS for e in found["scaled GD", kappa])
    bound = 1 - RATE / 2
    outcome = "holds in every run" if slowest <= bound else "does NOT hold in every run"
    text = [
        f"Steps until ‖AB − X*‖ is {CLOSE:g} of ‖X*‖ (of {steps}), and by what the error shrinks per step on the way;",
        f"medians of {seeds} seed(s). Scaled GD at η = {RATE:g}, GD at the best of {', '.join(map(str, RATES))}.\n",
        table(["κ", "scaled GD: steps", "per step", "GD: rate", "steps", "per step"], rows),
        f"\nTheorem 7.4: at most 1 − η/2 = {bound:g} per step, whatever κ. Here at most {slowest:.3f}: it {outcome}.",
        f"It asks for data with an RIP constant of at most 0.01; of these it is {spread(constants)}.",
    ]
    ticks = [str(step) for step in range(steps + 1)]
    panels = [
        Panel(
            f"log10 of the relative error, {name}",
            "step",
            {f"condition number {k}": _logs(found[name, k]) for k in CONDITIONS},
            ticks,
        )
        for name in ("scaled GD", "GD")
    ]
    return Reproduction("\n".join(text), panels, cells)


def _arrival(errors: list[float]) -> float:
    """The first step at which the error is close to none; inf: never."""
    return next((float(step) for step, error in enumerate(errors) if error <= CLOSE), math.inf)


def _factor(errors: list[float]) -> float:
    """By what the error shrinks per step, in the geometric mean until it is close to none or the steps are over."""
    end = int(min(_arrival(errors), len(errors) - 1))
    return (errors[end] / errors[0]) ** (1 / end) if end else 0.0


def _middle(steps: list[float]) -> str:
    middle = median(steps)
    return f"{middle:g}" if math.isfinite(middle) else "not there"


def _logs(errors: list[list[float]]) -> list[float]:
    return [math.log10(max(LEAST, median(at))) for at in zip(*errors, strict=True)]


class Patterns(nn.Module):
    """Problem (3): one LoRA pair per activation pattern."""

    def __init__(self, inputs: list[Tensor], wanted: list[Tensor]):
        super().__init__()
        self.inputs = inputs  # DᵢX without its zero rows, each (rows, d)
        self.outputs = [x @ w for x, w in zip(inputs, wanted, strict=True)]  # the patterns share no row of Y
        self.pairs = nn.ModuleList()
        for x, y in zip(inputs, self.outputs, strict=True):
            left, sizes, right = torch.linalg.svd(x.T @ y, full_matrices=False)  # Definition 7.3
            root = sizes[:RANK].sqrt()
            pair = nn.Module()
            pair.lora_A = nn.Linear(OUTPUTS, RANK, bias=False, dtype=x.dtype)
            pair.lora_B = nn.Linear(RANK, WIDTH, bias=False, dtype=x.dtype)
            pair.lora_A.weight.data = root[:, None] * right[:RANK]
            pair.lora_B.weight.data = (left[:, :RANK] * root).contiguous()
            self.pairs.append(pair)

    def products(self) -> list[Tensor]:  # each (d, c)
        return [pair.lora_B.weight @ pair.lora_A.weight for pair in self.pairs]  # type: ignore[union-attr]

    def forward(self) -> Tensor:
        parts = zip(self.inputs, self.products(), self.outputs, strict=True)
        return torch.stack([(x @ w - y).square().sum() / 2 for x, w, y in parts]).sum()


def _inputs(rng: torch.Generator) -> list[Tensor]:
    """DᵢX of both patterns without their zero rows, each (rows, d)."""
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=rng)
    active = x @ torch.randn(WIDTH, dtype=torch.float64, generator=rng) >= 0
    return [x[rows] / rows.sum().sqrt() for rows in (active, ~active)]


def isometry(seed: int) -> float:
    """The RIP constant of a seed's data, Definition 7.1: of any rank, for one of rank 1 lies along an eigenvector."""
    inputs = _inputs(torch.Generator().manual_seed(seed))
    return max((torch.linalg.eigvalsh(x.T @ x) - 1).abs().max().item() for x in inputs)


def train(cell: Trial) -> Trial:
    """Runs one optimizer: the relative error before each step and after the last."""
    rng = torch.Generator().manual_seed(cell["seed"])
    inputs = _inputs(rng)
    wanted = []
    for _ in inputs:
        left, _ = torch.linalg.qr(torch.randn(WIDTH, RANK, dtype=torch.float64, generator=rng))
        right, _ = torch.linalg.qr(torch.randn(OUTPUTS, RANK, dtype=torch.float64, generator=rng))
        wanted.append(left * torch.logspace(0, -math.log10(cell["condition"]), RANK, dtype=torch.float64) @ right.T)
    net = Patterns(inputs, wanted)
    if cell["optimizer"] == "GD":
        optimizer = SGD(net.parameters(), lr=cell["rate"])
    else:
        optimizer = ScaledGD(net, lr=cell["rate"], damping=0.0)
    size, errors = torch.stack([w.norm() for w in wanted]).norm(), []
    for step in range(cell["steps"] + 1):
        with torch.no_grad():
            far = torch.stack([(p - w).norm() for p, w in zip(net.products(), wanted, strict=True)]).norm()
            errors.append((far / size).item())
        if step < cell["steps"]:
            optimizer.zero_grad()
            net().backward()
            optimizer.step()
    return {"errors": errors}
