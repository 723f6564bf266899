"""AlphaAdam's Table 3 in small: what the masks and the compensation do to a GPT that is trained from scratch.

Paper: Chang, Li & Yuan, AlphaAdam, 2025, Section 4.4 and Appendix F.2: GPT-2 of 125M parameters, 10,000 steps on
OpenWebText. Kept: betas (0.9, 0.95), eps 1e-8, weight decay 0.1, batch 12; and its codebase's gradient clipping,
warm-up and cosine decay to a tenth. In place of the rest: a small GPT on bytes of a text that a seeded grammar makes.
The paper says that it tuned every method's rate, and prints one per model size. Here every method is trained at every
rate of a grid: the table has AdamW's best rate for all, and a second one each method's own. Two rows are not in that
table: α of at most 2, as Appendix F.4 has it, and cautious AdamW, which Tables 1 and 2 compare with. The chart's last
panel is Figures 4 and 5: the α of all tensors over the training.
"""

import math
from functools import cache
from itertools import product
from random import Random
from statistics import fmean, median

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer

from equipoise.optimizers.alpha_adam import AlphaAdam
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, spread, workers
from equipoise.pipelines.tables import table

STEPS, BATCH, WINDOW, WIDTH, HEADS, LAYERS = 300, 12, 64, 64, 4, 2
RATES = (1e-3, 3e-3, 1e-2, 3e-2)
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
    tensors. A seed's batches are the same for all."""
    steps = cell["steps"]
    torch.manual_seed(cell["seed"])
    net, (learned, held_out) = GPT(), texts()
    optimizer = make_optimizer(cell["method"], net, cell["rate"])
    losses, alphas = [], []
    for step in range(steps):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(cell["rate"], step, steps)
        loss = net.loss(learned[torch.randint(len(learned), (BATCH,))])
        optimizer.zero_grad()
        loss.backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
        if tenths := (step + 1) * 10 // steps - len(losses):
            with torch.no_grad():
                losses += [net.loss(held_out).item()] * tenths
            if isinstance(optimizer, AlphaAdam):
                found = sorted(optimizer.alphas.values())
                alphas += [[found[0], median(found), found[-1]]] * tenths
    return {"losses": losses, "alphas": alphas}


def make_optimizer(method: str, net: nn.Module, rate: float) -> Optimizer:
    groups = [
        {"params": [param for param in net.parameters() if (param.ndim > 1) is large], "weight_decay": 0.1 * large}
        for large in (True, False)
    ]
    return METHODS[method](groups, lr=rate, betas=(0.9, 0.95), eps=1e-8)


def scheduled(rate: float, step: int, steps: int) -> float:
    return rate * min(1.0, (step + 1) / (0.05 * steps)) * (0.55 + 0.45 * math.cos(math.pi * step / steps))


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
def texts() -> tuple[Tensor, Tensor]:
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
