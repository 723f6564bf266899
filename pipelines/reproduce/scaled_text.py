"""Scaled GD and scaled AdamW on text, by rank: whether preconditioning helps, each at its own best learning rate.

Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024,
Section 6: SGD, scaled GD, AdamW and scaled AdamW with LoRA of several ranks on GPT-2. Here the small GPT of `reproduce
alpha-adam`, trained on a made-up language, learns the same language with its vowels and some consonants exchanged, by
LoRA on the feed-forward layers, alpha = rank. One more row shows what alpha does: scaled GD's step carries
(alpha/rank)², so that twice the rank as alpha at a quarter of the rate is the same run.
"""

import math
from functools import cache
from itertools import product
from statistics import median
from typing import Any

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.optim import SGD, AdamW

from equipoise.optimizers.scaled import ScaledAdamW, ScaledGD
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, spread, workers
from equipoise.pipelines.reproduce.alpha_adam import BATCH, GPT, make_optimizer, scheduled, texts
from equipoise.pipelines.tables import table

STEPS, RANKS, ROWS, BASE_STEPS, BASE_RATE = 60, (1, 4, 8), 64, 300, 3e-3
METHODS: dict[str, tuple[Any, tuple[float, ...]]] = {  # the optimizer, and its rates
    "SGD": (SGD, (0.3, 1.0, 3.0, 10.0, 30.0)),
    "scaled GD": (lambda net, lr: ScaledGD(net, lr=lr, damping=1e-6), (0.1, 0.3, 1.0, 3.0, 10.0)),
    "AdamW": (AdamW, (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
    "scaled AdamW": (lambda net, lr: ScaledAdamW(net, lr=lr), (3e-3, 1e-2, 3e-2, 1e-1, 3e-1)),
}
TWICE = "scaled GD, alpha = 2·rank"
EXCHANGED = bytes.maketrans(b"aeiourstln", b"oiuaetnlsr")


def reproduce(seeds: int, count: int, steps: int | None = None) -> Reproduction:
    """Trains every method at every rate and rank, with seeds from 0, in `count` processes; `steps` None: 60."""
    steps = steps or STEPS

    def cell(method: str, rank: int, rate: float, seed: int) -> Trial:
        return {"method": method, "rank": rank, "rate": rate, "seed": seed, "steps": steps, "evaluations": steps}

    tried = [(m, rank, rate) for m, (_, rates) in METHODS.items() for rank, rate in product(RANKS, rates)]
    with workers(count, "scaled-text", steps * seeds * (len(tried) + len(RANKS))) as measure:
        cells = measure(train, [cell(*one, seed) for one in tried for seed in range(seeds)])

        def losses(method: str, rank: int, rate: float) -> list[float]:  # one per seed; not finite is inf
            same = (method, rank, rate)
            return [c["loss"] for c in cells if (c["method"], c["rank"], c["rate"]) == same]

        def best(method: str, rank: int) -> float:
            return min(METHODS[method][1], key=lambda rate: median(losses(method, rank, rate)))

        quarter = [(TWICE, rank, best("scaled GD", rank) / 4) for rank in RANKS]
        cells += measure(train, [cell(*one, seed) for one in quarter for seed in range(seeds)])
    chosen = {(method, rank): best(method, rank) for method, rank in product(METHODS, RANKS)}
    chosen |= {(method, rank): rate for method, rank, rate in quarter}
    names = [*METHODS, TWICE]
    rows = [
        [name if rank == RANKS[0] else "", f"{rank}", f"{rate:g}", spread(losses(name, rank, rate))]
        for name in names
        for rank in RANKS
        for rate in [chosen[name, rank]]
    ]

    def ahead(one: str, other: str, rank: int) -> str:
        pairs = zip(*(losses(method, rank, chosen[method, rank]) for method in (one, other)), strict=True)
        return finding(f"{one} less {other}, rank {rank}", "below 0", [a - b for a, b in pairs])

    before = cells[0]["before"]
    text = [
        f"Held-out loss after {steps} steps, from {before:.3f}, each at the best of its rates; {seeds} seed(s).\n",
        table(["", "rank", "rate", "loss"], rows),
        "\nDifferences, seed by seed (below 0: the scaled one is ahead):",
        *(ahead(*pair, rank) for pair in (("scaled GD", "SGD"), ("scaled AdamW", "AdamW")) for rank in RANKS),
    ]
    panels = [
        Panel(
            f"Held-out loss, rank {rank}",
            "learning rate, from the least to the largest of its own",
            {m: [min(median(losses(m, rank, rate)), 2 * before) for rate in METHODS[m][1]] for m in METHODS},
            [f"{index + 1}" for index in range(5)],
        )
        for rank in RANKS
    ]
    return Reproduction("\n".join(text), panels, cells)


def train(cell: Trial) -> Trial:
    """Trains one adapter: its held-out loss, and that of the base."""
    learned, held_out = exchanged()
    held_out = held_out[:ROWS]
    scale, net = 2 if cell["method"] == TWICE else 1, GPT()
    net.load_state_dict(base_weights())
    with torch.no_grad():
        before = net.loss(held_out).item()
    torch.manual_seed(cell["seed"])
    config = LoraConfig(r=cell["rank"], lora_alpha=scale * cell["rank"], target_modules=["linear1", "linear2"])
    inject_adapter_in_model(config, net)
    make = METHODS["scaled GD" if scale == 2 else cell["method"]][0]
    trained = [param for param in net.parameters() if param.requires_grad]
    optimizer = make(net if "scaled" in cell["method"] else trained, lr=cell["rate"])
    rng = torch.Generator().manual_seed(cell["seed"])
    for step in range(cell["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(cell["rate"], step, cell["steps"])
        optimizer.zero_grad()
        net.loss(learned[torch.randint(len(learned), (BATCH,), generator=rng)]).backward()
        optimizer.step()
    with torch.no_grad():
        loss = net.loss(held_out).item()
    return {"loss": loss if math.isfinite(loss) else math.inf, "before": before}


@cache
def exchanged() -> tuple[Tensor, Tensor]:
    """Windows of the language with exchanged letters, to learn from and to be judged by."""
    letters = torch.tensor(list(EXCHANGED), dtype=torch.long)
    learned, held_out = (letters[rows.long()] for rows in texts())
    return learned, held_out


@cache
def base_weights() -> dict[str, Tensor]:
    """The base's weights, the same in every process."""
    torch.manual_seed(0)
    net, (learned, _) = GPT(), texts()
    optimizer = make_optimizer("AdamW", net, BASE_RATE)
    for step in range(BASE_STEPS):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(BASE_RATE, step, BASE_STEPS)
        optimizer.zero_grad()
        net.loss(learned[torch.randint(len(learned), (BATCH,))]).backward()
        nn.utils.clip_grad_norm_(net.parameters(), 1.0)
        optimizer.step()
    return net.state_dict()
