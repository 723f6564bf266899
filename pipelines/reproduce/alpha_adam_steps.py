"""AlphaAdam's eq. 2 and 3 in small: gradient correlation and directional sharpness of the masks' steps.

Paper: Chang, Li & Yuan, AlphaAdam, 2025, Section 3.1 and Theorem 3.5: an asynchronous mask is to have more GC and less
DS than a synchronous one.

AdamW trains the small GPT of `reproduce alpha-adam` at its best rate there. On its way, from the same point, with the
same moments, each method's next step is tried and measured by the exact Hessian, without weight decay: by the loss of
the step's own batch, in whose signs the masks look, and by that of held-out text.
"""

from collections.abc import Mapping, Sequence
from copy import deepcopy
from statistics import median

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.optimizers.directions import measure_step
from equipoise.pipelines.reproduce import Panel, Reproduction, Sign, Trial, finding, spread, workers
from equipoise.pipelines.reproduce.alpha_adam import BATCH, GPT, METHODS, make_optimizer, scheduled, texts
from equipoise.pipelines.tables import table

STEPS, POINTS, ROWS, RATE = 300, 5, 24, 3e-3  # ROWS: held-out windows
OTHERS = [method for method in METHODS if method != "AdamW"]
COLUMNS = ("GC, batch", "DS, batch", "gain, batch", "GC, held out", "DS, held out", "gain, held out")
_THEOREM: dict[int, Sign] = {0: "above 0", 1: "below 0", 3: "above 0", 4: "below 0"}  # by column


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Trains with seeds from 0, in `count` processes; `steps` None: the published number."""
    steps = steps or STEPS
    cells: list[Trial] = [{"seed": seed, "steps": steps, "evaluations": steps} for seed in range(seeds)]
    with workers(count, "alpha-adam-steps", steps * seeds) as measure:
        cells = measure(train, cells)

    def over(which: int, *methods: str) -> list[float]:  # one per seed, the median over the points
        return [median(_over(at, which, *methods) for at in cell["points"]) for cell in cells]

    rows = [[method, *(spread(over(which, method), "+.2f") for which in range(len(COLUMNS)))] for method in OTHERS]
    text = [
        "How much more than AdamW's (below 0: less) each method's next step would have on AdamW's way at a rate of "
        f"{RATE:g}, in units\nof the size of AdamW's: medians of {POINTS} points of {steps} steps, {seeds} seed(s). "
        "GC: gradient correlation (eq. 2);\nDS: directional sharpness (eq. 3); gain: GC − DS/2.\n",
        table(["", *COLUMNS], rows),
        "",
        "The asynchronous mask less the synchronous one, point by point (the paper: Theorem 3.5):",
        *(finding(COLUMNS[which], sign, over(which, "+AM", "+SM")) for which, sign in _THEOREM.items()),
    ]

    def line(method: str, which: int) -> list[float]:
        at = [[cell["points"][i] for cell in cells] for i in range(POINTS)]
        return [median(_over(point, which, method) for point in points) for points in at]

    ticks = [f"{100 * (point + 1) // POINTS}" for point in range(POINTS)]
    panels = [
        Panel(
            f"{COLUMNS[which]}, more than AdamW's",
            "% of training",
            {method: line(method, which) for method in OTHERS},
            ticks,
        )
        for which in (3, 4)
    ]
    return Reproduction("\n".join(text), panels, cells)


def _over(at: Mapping[str, Sequence[float]], which: int, method: str, other: str = "AdamW") -> float:
    """A method's figure at one point less another's, by the size of AdamW's, which may itself be below 0."""
    return (at[method][which] - at[other][which]) / abs(at["AdamW"][which])


def train(cell: Trial) -> Trial:
    """Trains one GPT with AdamW: at each point GC, DS and gain of each method's step, by batch and by held-out text."""
    steps, points = cell["steps"], []
    torch.manual_seed(cell["seed"])
    net, (learned, held_out) = GPT(), texts()
    optimizer = make_optimizer("AdamW", net, RATE)
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(RATE, step, steps)
        rows = learned[torch.randint(len(learned), (BATCH,))]
        optimizer.zero_grad()
        net.loss(rows).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        if due := (step + 1) * POINTS // steps - len(points):
            points += [{method: _tried(method, net, optimizer, rows, held_out[:ROWS]) for method in METHODS}] * due
        optimizer.step()
    return {"points": points}


def _tried(method: str, net: GPT, optimizer: Optimizer, *judging: Tensor) -> list[float]:
    """GC, DS and gain, by each text's loss, of a method's step with AdamW's moments; the net is left as it was."""
    before, found = [param.detach().clone() for param in net.parameters()], []
    for rows in judging:
        other = make_optimizer(method, net, RATE)
        other.load_state_dict(deepcopy(optimizer.state_dict()))
        for group in other.param_groups:
            group["weight_decay"] = 0.0
        direction = measure_step(other, lambda rows=rows: net.loss(rows))
        found += [*direction, direction.gain]
        with torch.no_grad():
            for param, value in zip(net.parameters(), before, strict=True):
                param.copy_(value)
    return found
