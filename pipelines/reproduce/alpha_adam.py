"""AlphaAdam's Table 3 in small: what the masks and the compensation do to a GPT that is trained from scratch.

Paper: Chang, Li & Yuan, AlphaAdam, 2025, Section 4.4 and Appendix F.2: GPT-2 of 125M parameters, 10,000 steps on
OpenWebText. Kept: betas (0.9, 0.95), eps 1e-8, weight decay 0.1, batch 12; and its codebase's gradient clipping,
warm-up and cosine decay to a tenth. In place of the rest: a small GPT on bytes of a text that a seeded grammar makes.
The paper says that it tuned every method's rate, and prints one per model size. Here every method is trained at every
rate of a grid: the table has AdamW's best rate for all, and a second one each method's own. Two rows are not in that
table: α of at most 2, as Appendix F.4 has it, and cautious AdamW, which Tables 1 and 2 compare with. The chart's last
panel is Figures 4 and 5: the α of all tensors over the training. On the way of AdamW at one rate each method's next
step is tried and measured: gradient correlation and directional sharpness (eq. 2 and 3), which the theorems are about.
"""

import math
from copy import deepcopy
from functools import cache
from itertools import product
from random import Random
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW

from equipoise.optimizers.alpha_adam import AlphaAdam
from equipoise.optimizers.directions import measure_step
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, spread, workers
from equipoise.pipelines.tables import table

STEPS, BATCH, WINDOW, WIDTH, HEADS, LAYERS = 300, 12, 64, 64, 4, 2
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
DIRECTED, POINTS, ROWS = 3e-3, 5, 24  # AdamW's rate there, how many steps are tried, and windows to judge them by
METHODS = {
    "AdamW": AdamW,
    "+SM": lambda *args, **options: AlphaAdam(*args, **options, mask="sync", compensation="none"),
    "+AM": lambda *args, **options: AlphaAdam(*args, **options, compensation="none"),
    "+AM+alpha": AlphaAdam,
    "+AM+alpha<=2": lambda *args, **options: AlphaAdam(*args, **options, max_alpha=2.0),
    "CAdamW": lambda *args, **options: AlphaAdam(*args, **options, mask="cautious", compensation="cautious"),
}
COLUMNS = ("20 %", "40 %", "60 %", "100 %", "early", "late")  # of training; early and late: means of two
PAPER = {  # Table 3, validation losses
    "AdamW": (3.799, 3.420, 3.288, 3.198, 3.610, 3.243),
    "+SM": (3.850, 3.442, 3.310, 3.227, 3.646, 3.269),
    "+AM": (3.717, 3.391, 3.282, 3.213, 3.554, 3.247),
    "+AM+alpha": (3.658, 3.374, 3.271, 3.203, 3.523, 3.237),
}
_LAST, _JUDGED = 3, (4, 5, 3)  # indices of COLUMNS


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Trains all methods at all rates, with seeds from 0, in `count` processes; `steps` None: the published number."""
    steps = steps or STEPS
    cells: list[Trial] = [
        {"method": method, "rate": rate, "seed": seed, "steps": steps, "evaluations": steps}
        for seed, method, rate in product(range(seeds), METHODS, RATES)
    ]
    with workers(count, "alpha-adam", steps * len(cells)) as measure:
        cells = measure(train, cells)

    def at(method: str, rate: float) -> list[list[float]]:  # (seeds, 10) losses
        return [cell["losses"] for cell in cells if (cell["method"], cell["rate"]) == (method, rate)]

    def columns(method: str, rate: float) -> list[tuple[float, ...]]:  # (6, seeds)
        points = [[losses[i] for i in (1, 3, 5, 9)] for losses in at(method, rate)]
        return list(zip(*((*p, fmean(p[:2]), fmean(p[2:])) for p in points), strict=True))

    def best(method: str) -> float:
        return min(RATES, key=lambda rate: median(columns(method, rate)[_LAST]))

    rate = best("AdamW")
    lines = []
    for method in METHODS:
        found = columns(method, rate)
        lines.append([method, "median", *(f"{median(values):.3f}" for values in found)])
        lines.append(["", "spread", *(f"{max(values) - min(values):.3f}" for values in found)])
        if method in PAPER:
            lines.append(["", "paper", *(f"{value:.3f}" for value in PAPER[method])])
    own = [[m, f"{best(m):g}", *(spread(columns(m, best(m))[i]) for i in _JUDGED)] for m in METHODS]
    tried = ", ".join(f"{median(columns('AdamW', r)[_LAST]):.3f} at {r:g}" for r in RATES)
    text = [
        f"Validation loss of a small GPT over {steps} steps, {seeds} seed(s); the paper's: of GPT-2 over 10,000.",
        f"Learning rate of all: {rate:g}, AdamW's best ({tried}).\n",
        table(["", "", *COLUMNS], lines),
        "\nEach method at the rate at which it ends best:\n",
        table(["", "rate", *(COLUMNS[i] for i in _JUDGED)], own),
        f"\nDifferences to AdamW, seed by seed, at {rate:g} (below 0: ahead of AdamW):",
    ]
    for method, i in product(list(METHODS)[1:], _JUDGED):
        here = [a - b for a, b in zip(columns(method, rate)[i], columns("AdamW", rate)[i], strict=True)]
        printed = PAPER[method][i] - PAPER["AdamW"][i] if method in PAPER else None
        text.append(finding(f"{method}, {COLUMNS[i]}", printed, here))
    text += _directions(cells, seeds)

    curves = {method: [median(losses) for losses in zip(*at(method, rate), strict=True)] for method in METHODS}
    ahead = {m: [a - b for a, b in zip(y, curves["AdamW"], strict=True)] for m, y in curves.items()}
    shares = [f"{share}" for share in range(10, 101, 10)]
    alphas = next(cell["alphas"] for cell in cells if (cell["method"], cell["rate"]) == ("+AM+alpha", rate))
    layers = {name: [at[i] for at in alphas] for i, name in enumerate(("smallest", "median", "largest"))}
    panels = [
        Panel(f"Validation loss at learning rate {rate:g}", "% of training", curves, shares),
        Panel("The same, less AdamW's", "% of training", ahead, shares),
        Panel("Alpha of all tensors, seed 0 (Figures 4 and 5)", "% of training", layers, shares),
    ]
    return Reproduction("\n".join(text), panels, cells)


def train(cell: Trial) -> Trial:
    """Trains one GPT: after each tenth of the steps its validation loss, and the smallest, median and largest α of its
    tensors; on the way of AdamW at one rate also every method's directions. A seed's batches are the same for all."""
    steps = cell["steps"]
    torch.manual_seed(cell["seed"])
    net, (learned, held_out) = GPT(), _texts()
    optimizer = _optimizer(cell["method"], net, cell["rate"])
    losses, alphas, directions = [], [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            warm = min(1.0, (step + 1) / (0.05 * steps))
            group["lr"] = cell["rate"] * warm * (0.55 + 0.45 * math.cos(math.pi * step / steps))
        rows = learned[torch.randint(len(learned), (BATCH,))]
        loss = net.loss(rows)
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        judged = (cell["method"], cell["rate"]) == ("AdamW", DIRECTED)
        if judged and (step + 1) * POINTS // steps > step * POINTS // steps:
            directions.append({method: _directed(method, net, optimizer, rows, held_out[:ROWS]) for method in METHODS})
        optimizer.step()
        if tenths := (step + 1) * 10 // steps - len(losses):
            with torch.no_grad():
                losses += [net.loss(held_out).item()] * tenths
            if isinstance(optimizer, AlphaAdam):
                found = sorted(optimizer.alphas.values())
                alphas += [[found[0], median(found), found[-1]]] * tenths
    return {"losses": losses, "alphas": alphas} | ({"directions": directions} if directions else {})


def _optimizer(method: str, net: nn.Module, rate: float) -> torch.optim.Optimizer:
    groups = [
        {"params": [param for param in net.parameters() if (param.ndim > 1) is large], "weight_decay": 0.1 * large}
        for large in (True, False)
    ]
    return METHODS[method](groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)


def _directed(method: str, net: "GPT", optimizer: torch.optim.Optimizer, *texts: Tensor) -> list[float]:
    """GC and DS by each text's loss of the step that a method would take with AdamW's moments, without decay."""
    before, found = [param.detach().clone() for param in net.parameters()], []
    for rows in texts:
        other = _optimizer(method, net, DIRECTED)
        other.load_state_dict(deepcopy(optimizer.state_dict()))
        for group in other.param_groups:
            group["weight_decay"] = 0.0
        found += measure_step(other, lambda rows=rows: net.loss(rows))
        with torch.no_grad():
            for param, value in zip(net.parameters(), before, strict=True):
                param.copy_(value)
    return found


def _directions(cells: list[Trial], seeds: int) -> list[str]:
    """What of eq. 2 and 3 each method's step has, in units of AdamW's from the same point."""
    ways = [cell["directions"] for cell in cells if "directions" in cell]

    def shares(method: str, which: int) -> list[float]:  # one per seed: GC and DS by the batch, then by held-out text
        return [median(point[method][which] / point["AdamW"][which] for point in way) for way in ways]

    rows = [[m, *(spread(shares(m, which), ".2f") for which in range(4))] for m in list(METHODS)[1:]]
    return [
        "\nGradient correlation GC (eq. 2) and directional sharpness DS (eq. 3) of the step that each method would take "
        f"on the way\nof AdamW at {DIRECTED:g}, with its moments and without weight decay, in units of AdamW's: medians "
        f"of {POINTS} points; {seeds} seed(s).\n",
        table(["", "GC, its batch", "DS, its batch", "GC, held out", "DS, held out"], rows),
    ]


class GPT(nn.Module):
    """A byte-level GPT in GPT-2's form: pre-norm blocks, learned positions, tied embeddings."""

    def __init__(self) -> None:
        super().__init__()
        self.bytes, self.positions = nn.Embedding(128, WIDTH), nn.Embedding(WINDOW, WIDTH)
        self.blocks = nn.ModuleList(
            nn.TransformerEncoderLayer(WIDTH, HEADS, 4 * WIDTH, 0.0, "gelu", batch_first=True, norm_first=True)
            for _ in range(LAYERS)
        )
        self.norm = nn.LayerNorm(WIDTH)
        self.register_buffer("mask", nn.Transformer.generate_square_subsequent_mask(WINDOW))
        for param in self.parameters():
            if param.ndim > 1:
                nn.init.normal_(param, std=0.02)

    def loss(self, rows: Tensor) -> Tensor:  # (batch, WINDOW + 1) bytes
        x = self.bytes(rows[:, :-1]) + self.positions.weight
        for block in self.blocks:
            x = block(x, src_mask=self.mask, is_causal=True)
        logits = F.linear(self.norm(x), self.bytes.weight)
        return F.cross_entropy(logits.flatten(0, 1), rows[:, 1:].flatten())


@cache
def _texts() -> tuple[Tensor, Tensor]:
    """Windows to learn from and to be judged by, (count, WINDOW + 1) bytes each."""
    text = torch.tensor(list(write_text((8000 + 128) * (WINDOW + 1)).encode("ascii")))
    rows = text.view(-1, WINDOW + 1)
    return rows[128:], rows[:128]


def write_text(length: int) -> str:
    """A made-up language: Zipf's frequencies, topics, two genders and numbers that words agree in, clauses, sums."""
    rng = Random(0)

    def syllable() -> str:
        return rng.choice("b br d f g gr k l m n p pl r s st t tr v".split()) + rng.choice("aeiou")

    def word(longest: int) -> str:
        return "".join(syllable() for _ in range(rng.randint(1, longest))) + rng.choice("lnrst")

    nouns, verbs, adjectives = [[word(n) for _ in range(size)] for n, size in ((3, 400), (2, 150), (3, 100))]
    topics = [[rng.randrange(len(nouns)) for _ in range(12)] for _ in range(40)]
    topic: list[int] = []

    def often(count: int) -> int:  # the first are the most frequent
        return int((count + 1) ** rng.random()) - 1

    def phrase(depth: int) -> tuple[str, bool]:
        noun, many = rng.choice(topic) if rng.random() < 0.6 else often(len(nouns)), rng.random() < 0.3
        ending = ("o", "i", "a", "e")[noun % 2 * 2 + many]
        parts = ["l" + ending, nouns[noun] + "s" * many]
        if rng.random() < 0.4:
            parts.append(adjectives[often(len(adjectives))] + ending)
        if depth < 2 and rng.random() < 0.2:
            parts.append("ke " + clause(depth + 1, many))
        return " ".join(parts), many

    def clause(depth: int, many: bool | None = None) -> str:
        subject = ""
        if many is None:
            subject, many = phrase(depth)
        verb = verbs[often(len(verbs))] + ("en" if many else "et")
        return f"{subject} {verb} {phrase(depth)[0]}".strip()

    text: list[str] = []
    written = 0
    while written < length:
        if not topic or rng.random() < 0.15:
            topic = rng.choice(topics)
        a, b = rng.randrange(10), rng.randrange(10)
        text.append(f"{a} e {b} son {a + b}. " if rng.random() < 0.1 else clause(0).capitalize() + ". ")
        written += len(text[-1])
    return "".join(text)[:length]
