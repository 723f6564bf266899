"""AdaSAM's Theorem 1 and Corollary 1 in small: the mean squared gradient norm falls as 1/√(bT).

Paper: Sun et al., AdaSAM, arXiv 2303.00565, 2023: with γ ∝ √(b/T) and ρ ∝ 1/√(bT) the mean of ‖∇f(x_t)‖² over T steps
with batches of b is O(1/√(bT)), so that b machines need a b-th of the steps. Here f is the logistic loss of drawn data
with a penalty that is not convex, Σ x²/(1 + x²); batches are drawn with replacement, and ‖∇f‖² is that of all data.
Beside it ρ is left as it is at b = T = 1. The largest γ are beyond the theorem's ε/(16L), so that short runs get
somewhere.
"""

import math
from itertools import product
from statistics import linear_regression, median

import torch
from torch import Tensor, nn

from equipoise.errors import InputError
from equipoise.optimizers.schedules import linear_speedup
from equipoise.optimizers.sharpness import AdaSAM
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, spread, workers
from equipoise.pipelines.tables import table

ROWS, WIDTH, PENALTY, FLIPPED = 2000, 20, 0.01, 0.1
BATCHES, LENGTHS = (1, 4, 16, 64), (100, 400, 1600)
RATE, RHO, EPSILON = 0.3, 2.0, 0.3  # γ and ρ at b = T = 1, and ε
WAYS = ("ρ ∝ 1/√(bT)", "one ρ for all")
NEAR = 0.1  # how far from −1/2 an exponent may be to count as the corollary's


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Trains with seeds from 0, in `count` processes; `steps` None: the published lengths, else the longest of them.

    Raises:
        InputError: So few steps leave one length, and a line needs two.
    """
    longest = steps or LENGTHS[-1]
    lengths = sorted({max(1, length * longest // LENGTHS[-1]) for length in LENGTHS})
    if len(lengths) < 2:
        raise InputError("ada-sam-speedup: compares runs of several lengths, so --steps must be 2 or more; got 1.")
    cells: list[Trial] = [
        {"way": way, "batch": batch, "steps": length, "seed": seed, "evaluations": 2 * length}
        for seed, way, batch, length in product(range(seeds), WAYS, BATCHES, lengths)
    ]
    with workers(count, "ada-sam-speedup", sum(cell["evaluations"] for cell in cells)) as measure:
        cells = measure(train, cells)

    def found(way: str, batch: int, length: int) -> list[float]:  # one per seed
        same = (way, batch, length)
        return [cell["norm"] for cell in cells if (cell["way"], cell["batch"], cell["steps"]) == same]

    def exponents(way: str, of: str) -> list[float]:  # one per seed: of a line through all b and T in logarithms
        every = list(product(BATCHES, lengths))
        at = [math.log({"b": b, "T": t, "bT": b * t}[of]) for b, t in every]
        curves = zip(*(found(way, b, t) for b, t in every), strict=True)
        return [linear_regression(at, list(map(math.log, curve))).slope for curve in curves]

    text = [
        f"The mean of ‖∇f‖² over a run of T steps with batches of b: medians of {seeds} seed(s). γ = {RATE:g}·√(b/T).",
    ]
    for way in WAYS:
        rows = [[f"b = {b}", *(f"{median(found(way, b, t)):.3g}" for t in lengths)] for b in BATCHES]
        powers = {of: exponents(way, of) for of in ("b", "T", "bT")}
        held = all(abs(median(power) + 0.5) <= NEAR for power in powers.values())
        text += [
            f"\n{way}, {RHO:g} at b = T = 1:\n" if way == WAYS[0] else f"\n{way}, {RHO:g}:\n",
            table(["", *(f"T = {length}" for length in lengths)], rows),
            "\nExponents of "
            + ", ".join(f"{of}: {spread(power, '+.2f')}" for of, power in powers.items())
            + f"; the corollary's: -0.5{'' if way != WAYS[0] else ', and so it is' if held else ', and it is NOT'}.",
        ]
    lines = {f"b = {b}, {way}": [math.log10(median(found(way, b, t))) for t in lengths]
             for way, b in product(WAYS, (BATCHES[0], BATCHES[-1]))}  # fmt: skip
    panels = [Panel("log10 of the mean squared gradient norm", "T", lines, [str(length) for length in lengths])]
    return Reproduction("\n".join(text), panels, cells)


class Logistic(nn.Module):
    """log(1 + exp(−y·zᵀx)) over rows, and the penalty."""

    def __init__(self, seed: int) -> None:
        super().__init__()
        rng = torch.Generator().manual_seed(seed)
        z, right = torch.randn(ROWS + 1, WIDTH, dtype=torch.float64, generator=rng).split([ROWS, 1])
        wrong = torch.rand(ROWS, dtype=torch.float64, generator=rng) < FLIPPED
        self.rows = z * ((z @ right[0]).sign() * torch.where(wrong, -1.0, 1.0))[:, None]
        self.x = nn.Parameter(torch.zeros(WIDTH, dtype=torch.float64))

    def loss(self, rows: Tensor) -> Tensor:
        squares = self.x.square()
        return nn.functional.softplus(-rows @ self.x).mean() + PENALTY * (squares / (1 + squares)).sum()

    @torch.no_grad()
    def squared_norm(self) -> float:
        """‖∇f‖² of all rows, by hand."""
        slope = -(self.rows * torch.sigmoid(-self.rows @ self.x)[:, None]).mean(0)
        return (slope + PENALTY * 2 * self.x / (1 + self.x.square()).square()).square().sum().item()


def train(cell: Trial) -> Trial:
    """Trains one model: the mean of ‖∇f‖² at the points from which its steps go."""
    net, steps, batch = Logistic(cell["seed"]), cell["steps"], cell["batch"]
    options = linear_speedup(batch, steps, lr=RATE, rho=RHO)
    if cell["way"] != WAYS[0]:
        options["rho"] = RHO
    optimizer = AdaSAM([net.x], eps=EPSILON, **options)  # type: ignore[arg-type]
    rng, norms = torch.Generator().manual_seed(cell["seed"]), []
    for _ in range(steps):
        rows = net.rows[torch.randint(ROWS, (batch,), generator=rng)]
        norms.append(net.squared_norm())

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            loss = net.loss(rows)
            loss.backward()
            return loss

        optimizer.step(closure)
    return {"norm": sum(norms) / steps}
