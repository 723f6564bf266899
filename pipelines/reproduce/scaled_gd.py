"""Scaled GD's Theorem 7.4: on the convexified two-layer ReLU net its rate does not depend on the condition number.

Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024,
problem (3) and Definition 7.3: ½‖Σᵢ DᵢX(Wᵢ + AᵢBᵢᵀ) − Y‖², Y from known products X*ᵢ, from the extended spectral
initialisation. Here are P = 2 activation patterns, 1{Xu ≥ 0} and its complement, Gaussian X, Wᵢ = 0 (it drops out),
and X*ᵢ of rank 3 with singular values from 1 down to 1/κ. Scaled GD runs at η = 1/2, which the theorem allows, and
without damping; plain GD at the rate of a grid that ends lowest for each κ. The theorem bounds its distance (eq. 6) in
each step, for data with an RIP constant of at most 0.01. That is checked on the Gaussian data and, since theirs is
larger, on the same with singular values that are drawn towards 1 until it is 0.01.
"""

import math
from itertools import pairwise, product
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
ISOMETRY = 0.01  # the largest RIP constant for which the theorem is stated
GAUSSIAN, NEAR = "Gaussian", "near an isometry"  # the data


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Runs both optimizers at all condition numbers, with seeds from 0, in `count` processes; `steps` None: 150."""
    steps = steps or STEPS
    tried = [(GAUSSIAN, "scaled GD", RATE), *((GAUSSIAN, "GD", rate) for rate in RATES), (NEAR, "scaled GD", RATE)]
    cells: list[Trial] = [
        {"data": data, "optimizer": name, "condition": kappa, "rate": rate, "seed": seed}
        | {"steps": steps, "evaluations": steps}
        for seed, kappa in product(range(seeds), CONDITIONS)
        for data, name, rate in tried
    ]
    with workers(count, "scaled-gd", steps * len(cells)) as measure:
        cells = measure(train, cells)

    def errors(name: str, kappa: int, rate: float) -> list[list[float]]:  # (seeds, steps + 1)
        wanted = (GAUSSIAN, name, kappa, rate)
        return [c["errors"] for c in cells if (c["data"], c["optimizer"], c["condition"], c["rate"]) == wanted]

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
    text = [
        f"Steps until ‖AB − X*‖ is {CLOSE:g} of ‖X*‖ (of {steps}), and by what the error shrinks per step on the way;",
        f"medians of {seeds} seed(s). Scaled GD at η = {RATE:g}, GD at the best of {', '.join(map(str, RATES))}.\n",
        table(["κ", "scaled GD: steps", "per step", "GD: rate", "steps", "per step"], rows),
        *_stepwise([cell for cell in cells if cell["optimizer"] == "scaled GD"]),
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


def _stepwise(cells: list[Trial]) -> list[str]:
    """What the theorem says of each step, beside what is seen."""
    bound, rows, slowest = 1 - RATE / 2, [], 0.0
    for data, kappa in product((GAUSSIAN, NEAR), CONDITIONS):
        some = [cell for cell in cells if (cell["data"], cell["condition"]) == (data, kappa)]
        slowest = max(slowest, *(cell["slowest"] for cell in some))
        shown = [spread([cell[name] for cell in some]) for name in ("start", "slowest", "norm")]
        rows.append([f"{data}: {kappa}", spread([cell["isometry"] for cell in some]), *shown])
    outcome = "it holds in every run" if slowest <= bound else "it does NOT hold in every run"
    return [
        f"\nTheorem 7.4: at most 1 − η/2 = {bound:g} per step, whatever κ. That is how much of the distance of eq. 6 "
        "a step may leave,",
        "the larger one of the two patterns; and ‖AB − X*‖ is at most 1.5 times the distance. It is stated for data "
        "with an RIP",
        f"constant δ of at most {ISOMETRY:g}, and its proof begins at a distance of at most 0.1·σᵣ.\n",
        table(["data: κ", "δ", "distance/σᵣ at the start", "left by the worst step", "‖AB − X*‖/distance"], rows),
        f"\nThe worst step of all leaves {slowest:.3f}: {outcome}.",
    ]


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

    def factors(self) -> list[tuple[Tensor, Tensor]]:  # each (d, r) and (c, r)
        return [(pair.lora_B.weight, pair.lora_A.weight.T) for pair in self.pairs]  # type: ignore

    def products(self) -> list[Tensor]:  # each (d, c)
        return [pair.lora_B.weight @ pair.lora_A.weight for pair in self.pairs]  # type: ignore[union-attr]

    def forward(self) -> Tensor:
        parts = zip(self.inputs, self.products(), self.outputs, strict=True)
        return torch.stack([(x @ w - y).square().sum() / 2 for x, w, y in parts]).sum()


def _inputs(rng: torch.Generator, data: str) -> list[Tensor]:
    """DᵢX of both patterns without their zero rows, each (rows, d)."""
    x = torch.randn(ROWS, WIDTH, dtype=torch.float64, generator=rng)
    active = x @ torch.randn(WIDTH, dtype=torch.float64, generator=rng) >= 0
    inputs = [x[rows] / rows.sum().sqrt() for rows in (active, ~active)]
    return inputs if data == GAUSSIAN else [_nearer(x) for x in inputs]


def _nearer(x: Tensor) -> Tensor:
    """The same with squared singular values that are drawn towards 1, the farthest to just within ISOMETRY."""
    left, sizes, right = torch.linalg.svd(x, full_matrices=False)
    away = sizes.square() - 1
    within = ISOMETRY * (1 - 1e-9)  # rounding, too, may not lead out of it
    return left * (1 + away * within / away.abs().max()).sqrt() @ right


def isometry(inputs: list[Tensor]) -> float:
    """The RIP constant, Definition 7.1: of any rank, for a matrix of rank 1 lies along an eigenvector."""
    return max((torch.linalg.eigvalsh(x.T @ x) - 1).abs().max().item() for x in inputs)


def distance(
    a: Tensor,  # (d, r)
    b: Tensor,  # (c, r)
    left: Tensor,  # U* (d, r)
    sizes: Tensor,  # Σ* (r,)
    right: Tensor,  # V* (c, r)
) -> float:
    """Eq. 6: the least ‖(AQ − U*Σ*^½)Σ*^½‖² + ‖(BQ⁻ᵀ − V*Σ*^½)Σ*^½‖² over invertible Q, its root; by Gauss-Newton."""
    root, one = sizes.sqrt(), torch.eye(len(sizes), dtype=a.dtype)
    first = torch.linalg.lstsq(a, left * root).solution
    a, b = a @ first, torch.linalg.solve(first, b.T).T

    def apart(a: Tensor, b: Tensor) -> Tensor:
        return torch.cat([(a - left * root) * root, (b - right * root) * root])

    found = apart(a, b)
    for _ in range(50):
        slope = torch.cat(  # by E, of A(I + E) and B(I + E)⁻ᵀ
            [torch.einsum("ik,lj->ijkl", a, one) * root[:, None, None],
             -torch.einsum("il,kj->ijkl", b, one) * root[:, None, None]]
        ).flatten(2).flatten(0, 1)  # fmt: skip
        change = -torch.linalg.lstsq(slope, found.flatten()[:, None]).solution.view(len(one), -1)
        for half in range(20):
            moved = one + change / 2**half
            nearer = a @ moved, torch.linalg.solve(moved, b.T).T
            if (now := apart(*nearer)).norm() < found.norm():
                break
        else:
            break
        done = now.norm() > (1 - 1e-10) * found.norm()
        (a, b), found = nearer, now
        if done:
            break
    return found.norm().item()


def train(cell: Trial) -> Trial:
    """Runs one optimizer: the relative error before each step and after the last; of scaled GD, what the theorem is
    about."""
    rng = torch.Generator().manual_seed(cell["seed"])
    inputs = _inputs(rng, cell["data"])
    sizes, parts = torch.logspace(0, -math.log10(cell["condition"]), RANK, dtype=torch.float64), []
    for _ in inputs:
        left, _ = torch.linalg.qr(torch.randn(WIDTH, RANK, dtype=torch.float64, generator=rng))
        right, _ = torch.linalg.qr(torch.randn(OUTPUTS, RANK, dtype=torch.float64, generator=rng))
        parts.append((left, sizes, right))
    wanted = [left * sizes @ right.T for left, _, right in parts]
    net, scaled = Patterns(inputs, wanted), cell["optimizer"] == "scaled GD"
    optimizer = ScaledGD(net, lr=cell["rate"], damping=0.0) if scaled else SGD(net.parameters(), lr=cell["rate"])
    size, errors = torch.stack([w.norm() for w in wanted]).norm(), []
    distances: list[float] = []  # the larger of the two patterns', until they are close to none
    norms: list[float] = []  # the largest ‖AB − X*‖ in units of its own pattern's distance
    for step in range(cell["steps"] + 1):
        with torch.no_grad():
            apart = [p - w for p, w in zip(net.products(), wanted, strict=True)]
            errors.append((torch.stack([d.norm() for d in apart]).norm() / size).item())
            if scaled and errors[-1] > CLOSE:
                far = [distance(*pair, *part) for pair, part in zip(net.factors(), parts, strict=True)]
                distances.append(max(far))
                norms.append(max(d.norm().item() / one for d, one in zip(apart, far, strict=True)))
        if step < cell["steps"]:
            optimizer.zero_grad()
            net().backward()
            optimizer.step()
    if not scaled:
        return {"errors": errors}
    slowest = max((after / before for before, after in pairwise(distances)), default=0.0)
    about = {"isometry": isometry(inputs), "start": distances[0] / sizes[-1].item(), "slowest": slowest}
    return {"errors": errors, "distances": distances, "norm": max(norms), **about}
