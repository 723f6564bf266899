"""AdaSAM in fine-tuning: SGD, SAM, AMSGrad and AdaSAM on LoRA factors of a small language model.

Paper: Sun et al., AdaSAM, arXiv 2303.00565, 2023: RoBERTa-large fine-tuned on GLUE (Table I), momentum 0.9, ρ of 0.01,
0.005 and 0.001. Here the small GPT of `reproduce scaled-text` learns its language with some letters exchanged, by LoRA
of rank 8 on the feed-forward layers, from so few windows that it fits them better than others. Each optimizer has the
rate and ρ with which its median loss is least on windows held out for that, and is judged on others; those that
evaluate once are judged with twice the steps too, which is as many gradients.
"""

import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from statistics import median

import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor

from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, interval, spread, workers
from equipoise.pipelines.reproduce.ada_sam import COMPARED, ONCE, OPTIMIZERS, RHOS
from equipoise.pipelines.reproduce.alpha_adam import BATCH, GPT, scheduled
from equipoise.pipelines.reproduce.scaled_text import base_weights, exchanged
from equipoise.pipelines.tables import table

STEPS, RANK, BETA, LEARNED, HELD = 120, 8, 0.9, 64, 64  # LEARNED, HELD: windows to learn from; of each held-out set
RATES = {"SGD": (0.1, 0.3, 1.0, 3.0), "AMSGrad": (3e-3, 1e-2, 3e-2, 1e-1)}
RATES |= {"SAM": RATES["SGD"], "AdaSAM": RATES["AMSGrad"]}

Setting = tuple[str, float, float]  # optimizer, rate and ρ


def reproduce(
    seeds: int,
    count: int,
    steps: int | None = None,
    earlier: Sequence[Trial] = (),
    keep: Callable[[Trial], None] | None = None,
) -> Reproduction:
    """Trains all settings with seeds from 0, in `count` processes; `steps` None: 120. `earlier` runs are not trained
    again, and `keep` is given each that is."""
    steps = steps or STEPS
    known = {_key(cell): cell for cell in earlier}

    def cells(name: str, rate: float, rho: float, times: int = 1) -> list[Trial]:  # one per seed
        settings = {"optimizer": name, "rate": rate, "rho": rho, "steps": times * steps}
        return [{**settings, "seed": s, "evaluations": times * steps * (1 + (rho > 0))} for s in range(seeds)]

    tried = [(name, rate, rho) for name in OPTIMIZERS for rate, rho in product(RATES[name], _rhos(name))]
    first = [cell for one in tried for cell in cells(*one)]
    total = sum(cell["evaluations"] for cell in first if _key(cell) not in known) + 2 * steps * seeds * len(ONCE)
    with workers(count, "ada-sam-text", total, keep) as measure:

        def run(wanted: Sequence[Trial]) -> None:
            missing = [cell for cell in wanted if _key(cell) not in known]
            known.update({_key(cell): cell for cell in (measure(train, missing) if missing else [])})

        run(first)

        def got(key: str, name: str, rate: float, rho: float, times: int = 1) -> list[float]:  # one per seed
            return [known[_key(cell)][key] for cell in cells(name, rate, rho, times)]

        def best(name: str, rho: float | None = None) -> Setting:
            some = [one for one in tried if one[0] == name and rho in (None, one[2])]
            return min(some, key=lambda one: median(got("tuning", *one)))

        run([cell for name in ONCE for cell in cells(*best(name), times=2)])

    before = known[_key(first[0])]["before"]
    text = [
        f"Held-out loss after {steps} steps on {LEARNED} windows, from {before:.3f}, β₁ = {BETA:g}; {seeds} seed(s).\n"
    ]
    text.append(
        f"SAM and AdaSAM choose among {len(RATES['SAM']) * len(RHOS)} settings, SGD and AMSGrad among "
        f"{len(RATES['SGD'])}, by other windows than they are judged on, but with the same training seeds. Twice the "
        "steps have the rate that was best for half of them.\n"
    )
    text += [*_tables(got, best), "\nThe paper has scores, higher is better; its signs here are those of a loss."]
    text += ["Differences, seed by seed (below 0: the first is ahead):"]
    for (one, other), times in [*((pair, 1) for pair in COMPARED), (("SAM", "SGD"), 2), (("AdaSAM", "AMSGrad"), 2)]:
        pair = zip(got("loss", *best(one)), got("loss", *best(other), times), strict=True)
        equal = " at equal gradients" if times > 1 else ""
        text.append(finding(f"{one} less {other}{equal}", None if equal else "below 0", [a - b for a, b in pair]))
    lines = {name: [min(median(got("loss", name, r, best(name)[2])), 9.0) for r in RATES[name]] for name in OPTIMIZERS}
    panels = [Panel("Held-out loss", "learning rate, from the least to the largest of its own", lines, list("1234"))]
    return Reproduction("\n".join(text), panels, list(known.values()))


def _tables(got: Callable[..., list[float]], best: Callable[..., Setting]) -> list[str]:
    """Each optimizer at its best setting, and AdaSAM at each ρ."""
    rows = []
    for name, times in [*((name, 1) for name in OPTIMIZERS), *((name, 2) for name in ONCE)]:
        _, rate, rho = best(name)
        losses = [spread(got(key, name, rate, rho, times)) for key in ("loss", "learned")]
        rows.append([name + ", twice the steps" * (times > 1), f"{rate:g}", f"{rho:g}", *losses])
    base, by_rho = got("loss", *best("AMSGrad")), []
    for rho in RHOS:
        one = best("AdaSAM", rho)
        less = [a - b for a, b in zip(got("loss", *one), base, strict=True)]
        by_rho.append([f"{rho:g}", f"{one[1]:g}", spread(got("loss", *one)), interval(less, "+.3f")])
    return [
        table(["", "rate", "ρ", "held-out loss", "loss on what is learnt"], rows),
        "\nAdaSAM at each ρ, at its best rate there:\n",
        table(["ρ", "rate", "held-out loss", "less AMSGrad's"], by_rho),
    ]


def _rhos(name: str) -> tuple[float, ...]:
    return (0.0,) if name in ONCE else RHOS


def _key(cell: Trial) -> tuple:
    return tuple(cell[name] for name in ("optimizer", "rate", "rho", "seed", "steps"))


def train(cell: Trial) -> Trial:
    """Trains one adapter: its losses on windows to choose by, to judge by and to learn from, and the base's."""
    started, net = time.process_time(), GPT()
    net.load_state_dict(base_weights())
    learned, tuning, held_out = _windows()
    with torch.no_grad():
        before = net.loss(held_out).item()
    torch.manual_seed(cell["seed"])
    inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=["linear1", "linear2"]), net)
    name, rho = cell["optimizer"], {"rho": cell["rho"]} if cell["rho"] else {}
    options = {"momentum": BETA} if name in ("SGD", "SAM") else {"betas": (BETA, 0.999)}
    factors = [param for param in net.parameters() if param.requires_grad]
    optimizer = OPTIMIZERS[name](factors, lr=cell["rate"], **options, **rho)
    rng = torch.Generator().manual_seed(cell["seed"])
    for step in range(cell["steps"]):
        for group in optimizer.param_groups:
            group["lr"] = scheduled(cell["rate"], step, cell["steps"])
        rows = learned[torch.randint(len(learned), (BATCH,), generator=rng)]

        def closure(rows: Tensor = rows) -> Tensor:
            optimizer.zero_grad()
            loss = net.loss(rows)
            loss.backward()
            return loss

        optimizer.step(closure)
    with torch.no_grad():
        losses = {"tuning": net.loss(tuning), "loss": net.loss(held_out), "learned": net.loss(learned)}
    ended = {key: loss.item() if math.isfinite(loss.item()) else 1e9 for key, loss in losses.items()}
    return ended | {"before": before, "processor_seconds": time.process_time() - started}


@cache
def _windows() -> tuple[Tensor, Tensor, Tensor]:
    """Windows to learn from, to choose by and to judge by."""
    learned, held_out = exchanged()
    return learned[:LEARNED], held_out[:HELD], held_out[HELD : 2 * HELD]
