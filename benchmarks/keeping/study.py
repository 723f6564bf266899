"""What each optimizer learns at each learning rate, and what it keeps of the pretrained base.

    python benchmarks/keeping/study.py run --task orders --methods adamw bounded --rates 1e-3 1 --seeds 0 1 2
    python benchmarks/keeping/study.py report        the tables of keeping.md
    python benchmarks/keeping/study.py short         the table of README.md and docs/optimizers.md
    python benchmarks/keeping/study.py plot          claim.png and transfer.png, with matplotlib

`run` measures cell by cell, and goes on where it ended last; cells.jsonl holds them. bases.py describes the pretrained
models, tasks.py the tasks. Every run has gradients clipped to a norm of 1, a cosine schedule (but for schedule-free),
and LoRA with alpha equal to the rank, but for the adapters that are rivals themselves; no weight decay, but for
`bounded`, which is `BoundedAdamW(model, lr=rate)` as it comes.

Gain: 1 − loss / loss of the untouched base, on held-out examples of the task. Forgotten: how far the loss on what the
base knew before rose. Moved: the median over the layers of ‖ΔW‖ / ‖W‖.
"""

import argparse
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable, Collection, Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft import DeloraConfig, HRAConfig, LoraConfig, OFTConfig
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from peft.tuners.tuners_utils import BaseTunerLayer
from tasks import TASKS, Adapter, Task
from torch import nn
from torch.optim import SGD, AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from equipoise import AdaSAM, AlphaAdam, BoundedAdamW, ScaledAdamW, ScaledGD
from equipoise.optimizers.amsgrad import AMSGrad

CELLS = Path(__file__).with_name("cells.jsonl")
LAYERS = {"orders": 120, "bookings": 120, "docstringsfew": 6, "docstrings": 18, "code": 18, "docstringsall": 36,
          "drawn": 32, "emblem": 32, "program": 8, "trees": 8}  # fmt: skip  # how many have an adapter
KEYS = ("task", "method", "rate", "steps", "rank", "batch", "seed")


def lora(rank: int, layers: list[str]) -> LoraConfig:
    return LoraConfig(r=rank, lora_alpha=rank, target_modules=layers, fan_in_fan_out="c_attn" in layers)


@dataclass(frozen=True)
class Method:
    """An optimizer on an adapter, and what is done after each step."""

    make: Callable[[nn.Module, float], Optimizer]
    adapter: Adapter = lora
    after: Callable[[nn.Module], None] = lambda model: None
    scheduled: bool = True  # by a cosine


def _plain(cls: type, **options) -> Method:
    return Method(lambda net, lr: cls([p for p in net.parameters() if p.requires_grad], lr=lr, **options))


def _ours(cls: type, **options) -> Method:
    return Method(lambda net, lr: cls(net, lr=lr, weight_decay=0.0, **options))


def _peft(maker: Callable, **options) -> Method:
    return Method(lambda net, lr: maker(net, AdamW, lr=lr, weight_decay=0.0, **options))


def _installed(module: str, name: str, group: Mapping[str, Any] = {}, scheduled: bool = True, **options) -> Method:
    def make(net: nn.Module, lr: float) -> Optimizer:
        try:
            cls = getattr(__import__(module), name)
        except ImportError:
            raise SystemExit(f"{name}: pip install {module}, which has it, or choose other --methods.") from None
        factors = [p for p in net.parameters() if p.requires_grad]  # in peft's order: A, B, A, B, …
        return cls([{"params": factors, **group}], lr=lr, **options)

    return Method(make, scheduled=scheduled)


@torch.no_grad()
def scale_weight_norms(model: nn.Module, most: float = 1.0) -> None:
    """As kohya's option does it: a product of a norm above `most` is scaled down, by a square root in each factor."""
    for A, B, scale in _factors(model):
        norm = scale * (B.flatten(1) @ A.flatten(1)).norm()
        if norm > most:
            A *= (most / norm).sqrt()
            B *= (most / norm).sqrt()


def _layers(model: nn.Module) -> int:
    return sum(1 for _ in _factors(model))


def _factors(model: nn.Module):
    for layer in model.modules():
        if "default" in getattr(layer, "lora_A", {}):
            yield layer.lora_A["default"].weight, layer.lora_B["default"].weight, layer.scaling["default"]


BETAS = (0.7, 0.8)
METHODS: dict[str, Method] = {
    "adamw": _plain(AdamW, weight_decay=0.0),
    "adamw, betas .7 .8": _plain(AdamW, weight_decay=0.0, betas=BETAS),
    "lora+ 16 (peft)": _peft(create_loraplus_optimizer, loraplus_lr_ratio=16),
    "riemannian 1e-6 (peft)": _peft(create_riemannian_optimizer, reg=1e-6),
    "lora-rite (pytorch_optimizer)": _installed("pytorch_optimizer", "LoRARite"),
    "prodigy (prodigyopt)": _installed("prodigyopt", "Prodigy", weight_decay=0.0),
    "spectral adamw (adv_optm)": _installed("adv_optm", "AdamW_adv", spectral_normalization=True),
    "muon (pytorch_optimizer)": _installed("pytorch_optimizer", "Muon", {"use_muon": True}),  # on each factor by itself
    "schedule-free adamw (schedulefree)": _installed("schedulefree", "AdamWScheduleFree", scheduled=False),
    "sgd": _plain(SGD),
    "scaled gd": Method(lambda net, lr: ScaledGD(net, lr=lr)),
    "scaled adamw": _ours(ScaledAdamW, damping=1e-6),
    "scaled adamw, betas .7 .8": _ours(ScaledAdamW, damping=1e-6, betas=BETAS),
    "alphaadam": _plain(AlphaAdam, weight_decay=0.0),
    "cautious adamw": _plain(AlphaAdam, weight_decay=0.0, mask="cautious", compensation="cautious"),
    "amsgrad": _plain(AMSGrad),
    "adasam, rho .005": _plain(AdaSAM, rho=0.005),  # two gradients a step, as the next
    "adasam, rho .05": _plain(AdaSAM, rho=0.05),
    "max norm 1 (kohya)": Method(_plain(AdamW, weight_decay=0.0).make, after=scale_weight_norms),
    "delora (peft)": Method(
        _plain(AdamW, weight_decay=0.0).make, lambda rank, layers: DeloraConfig(r=rank, target_modules=layers)
    ),
    "hra (peft)": Method(
        _plain(AdamW, weight_decay=0.0).make, lambda rank, layers: HRAConfig(r=rank, target_modules=layers)
    ),
    "oft (peft)": Method(
        _plain(AdamW, weight_decay=0.0).make,
        lambda rank, layers: OFTConfig(oft_block_size=32, r=0, target_modules=layers, use_cayley_neumann=False),
    ),
    "bounded": Method(lambda net, lr: BoundedAdamW(net, lr=lr)),  # by its defaults
    "bounded, reach .5/√n": Method(lambda net, lr: BoundedAdamW(net, lr=lr, reach=0.5 / _layers(net) ** 0.5)),
    "trust .01": _ours(BoundedAdamW, trust=0.01),
    "trust .003": _ours(BoundedAdamW, trust=0.003),
    "trust .001": _ours(BoundedAdamW, trust=0.001),
    "reach .005, no decay": _ours(BoundedAdamW, reach=0.005),
    "reach .01, no decay": _ours(BoundedAdamW, reach=0.01),
    "reach .02, no decay": _ours(BoundedAdamW, reach=0.02),
    "reach .05, no decay": _ours(BoundedAdamW, reach=0.05),
    "reach .1, no decay": _ours(BoundedAdamW, reach=0.1),
    "reach .2, no decay": _ours(BoundedAdamW, reach=0.2),
    "reach .4, no decay": _ours(BoundedAdamW, reach=0.4),
    "reach .02, betas .7 .8, no decay": _ours(BoundedAdamW, reach=0.02, betas=BETAS),
    "scaled, reach .02": _ours(ScaledAdamW, damping=1e-6, reach=0.02),
}


def measure(task: Task, method: Method, rate: float, steps: int) -> dict[str, float | None]:
    """What a run ends with; None for each loss that is not finite."""
    optimizer = method.make(task.model, rate)
    trained = [p for p in task.model.parameters() if p.requires_grad]
    schedule = CosineAnnealingLR(optimizer, steps) if method.scheduled else None
    start, finite = time.perf_counter(), True
    if schedule_free := hasattr(optimizer, "eval"):
        optimizer.train()  # type: ignore
    for step in range(steps):
        loss = task.loss(step)
        if not (finite := math.isfinite(loss.item())):
            break
        loss.backward()
        if isinstance(optimizer, AdaSAM) and optimizer.perturb():
            task.loss(step).backward()
            optimizer.restore()
        nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        optimizer.zero_grad()
        if schedule:
            schedule.step()
        method.after(task.model)
    if schedule_free:
        optimizer.eval()  # type: ignore
    seconds, moved = round(time.perf_counter() - start, 1), movements(task.model)
    end = judged(task) if finite else {"loss": math.inf, "general": math.inf, "right": 0.0}
    far = {"moved": statistics.median(moved), "moved_most": max(moved)} if moved else {}
    return {k: _short(v) for k, v in (end | far).items()} | {"seconds": seconds}


@torch.no_grad()
def judged(task: Task) -> dict[str, float | None]:
    task.model.eval()
    return {"loss": task.held_out(), "right": task.right(), "general": task.general()}


@torch.no_grad()
def movements(model: nn.Module) -> list[float]:
    """‖ΔW‖ / ‖W‖ of each layer whose adapter adds to its weight."""
    layers = [m for m in model.modules() if isinstance(m, BaseTunerLayer) and hasattr(m, "get_delta_weight")]
    weights = [(layer.get_delta_weight("default"), layer.get_base_layer().weight) for layer in layers]
    return [(change.norm() / weight.norm()).item() for change, weight in weights if change.shape == weight.shape]


def _short(value: float | None) -> float | None:
    return float(f"{value:.5g}") if value is not None and math.isfinite(value) else None


def cells() -> list[dict]:
    return [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []


def _store(cell: dict) -> None:
    with CELLS.open("a") as file:
        file.write(json.dumps(cell, ensure_ascii=False) + "\n")


def run(given: argparse.Namespace) -> None:
    torch.set_num_threads(given.threads)
    done = {tuple(cell[key] for key in KEYS) for cell in cells()}
    axes = (
        given.task,
        given.seeds,
        given.ranks,
        given.steps or [None],
        given.batches or [None],
        given.methods,
        given.rates,
    )
    for name, seed, rank, steps, batch, method, rate in itertools.product(*axes):
        cls = TASKS[name]
        steps, batch = steps or cls.steps, batch or cls.batch
        if method != "untouched" and ("untouched", 0.0) not in {(k[1], k[2]) for k in done if k[0] == name}:
            key = dict(zip(KEYS, (name, "untouched", 0.0, 0, 0, 0, 0), strict=True))
            done.add(tuple(key.values()))
            _store(key | {k: _short(v) for k, v in judged(cls(0, 1, lora)).items()})
        key = dict(zip(KEYS, (name, method, rate, steps, rank, batch, seed), strict=True))
        if tuple(key.values()) in done:
            continue
        try:
            cell = measure(cls(seed, rank, METHODS[method].adapter, batch), METHODS[method], rate, steps)
        except ValueError as error:  # an adapter that does not know the layers
            print(f"{name}, {method}: left out, {error}", flush=True)
            continue
        _store(key | cell)
        print(f"{name}, {method}, {rate:g}, {steps} steps, rank {rank}, seed {seed}: {json.dumps(cell)}", flush=True)


class Table:
    """The cells, and gain and what was forgotten in medians over seeds."""

    def __init__(self) -> None:
        found = cells()
        self.base = {cell["task"]: cell for cell in found if cell["method"] == "untouched"}
        self.cells: dict[tuple, list[dict]] = {}
        for cell in found:
            if cell["method"] != "untouched":
                self.cells.setdefault(tuple(cell[key] for key in KEYS[:-1]), []).append(cell)

    def settings(self) -> list[tuple]:
        """(task, steps, rank, batch) with AdamW and the bound, the tasks in order."""
        return sorted(
            {(t, s, r, b) for t, m, _, s, r, b in self.cells if m == "bounded"}
            & {(t, s, r, b) for t, m, _, s, r, b in self.cells if m == "adamw"},
            key=lambda key: (list(TASKS).index(key[0]), *key[1:]),
        )

    def rates(self, setting: tuple, method: str) -> list[float]:
        task, *rest = setting
        return sorted({key[2] for key in self.cells if key[:2] == (task, method) and list(key[3:]) == rest})

    def cell(self, setting: tuple, method: str, rate: float, seeds: Collection[int] = ()) -> tuple[float, float, int]:
        """(gain, forgotten, seeds), of all seeds or of those that are named."""
        task, *rest = setting
        found, base = self.cells[(task, method, rate, *rest)], self.base[task]
        found = [cell for cell in found if not seeds or cell["seed"] in seeds]
        gains = [-math.inf if c["loss"] is None else 1 - c["loss"] / base["loss"] for c in found]
        lost = [math.inf if c["general"] is None else c["general"] - base["general"] for c in found]
        return statistics.median(gains), statistics.median(lost), len(found)

    def best(self, setting: tuple, method: str) -> tuple[float, float, float]:
        """(rate, gain, forgotten) of seed 0 at the rate with the largest gain."""
        cells = [(rate, *self.cell(setting, method, rate, [0])[:2]) for rate in self.rates(setting, method)]
        return max(cells, key=lambda cell: cell[1])

    def seeds(self, setting: tuple, method: str, rate: float) -> list[int]:
        task, *rest = setting
        return sorted(cell["seed"] for cell in self.cells[(task, method, rate, *rest)])


def report(_: argparse.Namespace) -> None:
    table = Table()
    _print_verdicts(table)
    _print_seeds(table)
    _print_reaches(table)
    _print_transfer(table)
    for setting in table.settings():
        if setting[1] == TASKS[setting[0]].steps and setting[2] == 8:
            _print_task(table, setting)


OURS = ("bounded", "trust", "reach", "scaled, reach")  # how the methods are called that are no rivals


def rivals(table: Table, setting: tuple) -> list[str]:
    return [name for name in METHODS if not name.startswith(OURS) and table.rates(setting, name)]


def _print_verdicts(table: Table) -> None:
    print("\n## One default against AdamW and the best rival, each at its best rate\n")
    print("Seed 0, gain and forgotten. Spared most: what forgets least with at least 95 % of the largest gain.\n")
    print("| task | steps, rank, batch | AdamW at | | best rival of | | bounded at | of AdamW's gain | of the best "
          "rival's | lost | spared most |")  # fmt: skip
    print("| --- | --- | ---: | --- | --- | --- | --- | --- | --- | --- | --- |")
    for setting in table.settings():
        task, steps, rank, batch = setting
        rate, gain, lost = table.best(setting, "adamw")
        best = max(rivals(table, setting), key=lambda name: table.best(setting, name)[1])
        top_rate, top_gain, top_lost = table.best(setting, best)
        others = len(rivals(table, setting)) - 1
        named_rival = "AdamW is" if best == "adamw" else f"{best} at {top_rate:g}"
        rival = f"{others}: {named_rival} | {top_gain:.3f}, {top_lost:.3g}" if others else " | "
        rates = [r for r in table.rates(setting, "bounded") if 0 in table.seeds(setting, "bounded", r)]
        ours = [table.cell(setting, "bounded", r, [0]) for r in rates]
        named = TASKS[task].base + ("" if TASKS[task].chosen_on else ", not chosen on")
        print(
            f"| {task} ({named}) | {steps}, {rank}, {batch} | {rate:g} | {gain:.3f}, {lost:.3g} | {rival} | "
            f"{', '.join(f'{r:g}' for r in rates)} | {_range([g / gain for g, *_ in ours], '.0%')} | "
            f"{_range([g / top_gain for g, *_ in ours], '.0%') if others else ''} | "
            f"{_range([f for _, f, _ in ours], '.3g')} | {_spared(table, setting) if others else ''} |"
        )


def _print_seeds(table: Table) -> None:
    print("\n## Seed by seed: the bound at a rate of 1 in units of AdamW's at the rate that is best in their mean\n")
    print("The mean over the seeds, and the least and the most. The last column: what each of at least three seeds "
          "says of what is forgotten.\n")  # fmt: skip
    print("| task | steps, rank, batch | seeds | AdamW at | gain | forgotten | every seed forgets |")
    print("| --- | --- | ---: | ---: | --- | --- | --- |")
    for setting in table.settings():
        task, steps, rank, batch = setting
        both, rate, gains, forgotten = _seed_by_seed(table, setting)
        less = {ratio <= 1 for ratio in forgotten}
        verdict = "undecided" if len(less) > 1 or len(both) < 3 else "less" if less == {True} else "more"
        lost = "AdamW nothing" if math.inf in forgotten else _spread(forgotten, ".2f")
        print(f"| {task} | {steps}, {rank}, {batch} | {len(both)} | {rate:g} | {_spread(gains, '.0%')} | {lost} | "
              f"{verdict} |")  # fmt: skip


def _seed_by_seed(table: Table, setting: tuple) -> tuple[list[int], float, list[float], list[float]]:
    """(seeds, AdamW's best rate, the bound's gain and what it forgets in units of AdamW's, seed by seed).

    Best in the mean of the bound's seeds, of the rates at which AdamW has all of them; that of seed 0 is always one of
    these. The last is infinite where AdamW forgets nothing.
    """
    both = table.seeds(setting, "bounded", 1.0)
    rates = [rate for rate in table.rates(setting, "adamw") if {*both} <= {*table.seeds(setting, "adamw", rate)}]
    rate = max(rates, key=lambda rate: statistics.fmean(table.cell(setting, "adamw", rate, [seed])[0] for seed in both))
    gains, forgotten = [], []
    for seed in both:
        gain, lost, _ = table.cell(setting, "bounded", 1.0, [seed])
        other_gain, other_lost, _ = table.cell(setting, "adamw", rate, [seed])
        gains.append(gain / other_gain)
        forgotten.append(lost / other_lost if other_lost > 0 else math.inf)
    return both, rate, gains, forgotten


def _spread(values: list[float], form: str) -> str:
    mean = f"{statistics.fmean(values):{form}}"
    return mean if len(values) < 2 else f"{mean} ({min(values):{form}} to {max(values):{form}})"


KINDS = ("rate", "trust", "reach")


def _transfers(table: Table) -> Iterator[tuple[tuple, list[tuple[float, float]]]]:
    """Each setting, its task's own one first, with `_transfer` of each of KINDS."""
    for task in TASKS:
        settings = [setting for setting in table.settings() if setting[0] == task]
        own = next((key for key in settings if key[1:] == (TASKS[task].steps, 8, TASKS[task].batch)), None)
        for setting in [own, *(key for key in settings if key != own)] if own else []:
            found = [_transfer(table, kind, own, setting) for kind in KINDS]
            if all(found):
                yield setting, [pair for pair in found if pair]


def _transfer(table: Table, kind: str, own: tuple, setting: tuple) -> tuple[float, float] | None:
    """(best value, the gain there of the value that is best in `own`, as a share of the best gain)."""
    found = []
    for name, value in _values(kind).items():
        rates = table.rates(setting, name) if kind == "rate" else [1.0]
        for rate in rates:
            if rate in table.rates(setting, name) and rate in table.rates(own, name):
                gains = [table.cell(where, name, rate, [0])[0] for where in (own, setting)]
                found.append((*gains, rate if kind == "rate" else value))
    if len(found) < 3:
        return None
    here = max(found, key=lambda cell: cell[1])
    return here[2], max(found)[1] / here[1]


def _values(kind: str) -> dict[str, float]:
    if kind == "rate":
        return {"adamw": 0.0}  # which has several
    return _reaches() if kind == "reach" else {n: float(n.split()[1]) for n in METHODS if n.startswith("trust")}


def _print_transfer(table: Table) -> None:
    print("\n## What has to be chosen anew: the best of AdamW's rates, of `trust` alone and of `reach` alone, seed 0\n")
    print("By the gain, of those tried in both settings. In brackets, what the value that is best in the first row has "
          "of the best gain.\n")  # fmt: skip
    print("| task | steps, rank, batch | rate | trust | reach |")
    print("| --- | --- | --- | --- | --- |")
    for (task, steps, rank, batch), found in _transfers(table):
        cells = [f"{value:g} ({share:.0%})" for value, share in found]
        print(f"| {task} | {steps}, {rank}, {batch} | " + " | ".join(cells) + " |")


SHORT = {  # (task, steps, rank, batch) of the short table, and what it calls them
    ("orders", 60, 8, 4): "SmolLM2-135M, orders into a house code",
    ("bookings", 60, 8, 4): "SmolLM2-135M, payments into ledger lines (nothing was chosen on it)",
    ("bookings", 240, 8, 4): "the same in 240 steps in place of 60",
    ("bookings", 60, 64, 4): "the same at rank 64 in place of 8",
    ("docstrings", 80, 8, 16): "MiniLM-L6, the module of a docstring",
    ("docstrings", 1000, 8, 16): "the same in 1,000 steps in place of 80",
    ("docstringsall", 80, 8, 16): "the same, adapters on all 36 linear layers",
    ("code", 80, 8, 16): "MiniLM-L6, the module of a line of code (nothing was chosen on it)",
}


def short(_: argparse.Namespace) -> None:
    """Prints the pretrained models' rows of the table by seeds, with what AdamW's figures are."""
    table = Table()
    print("| task | AdamW at | gain, forgotten | bounded: share of that gain | of what AdamW forgets |")
    print("| --- | ---: | --- | --- | --- |")
    for setting, name in SHORT.items():
        both, rate, gains, forgotten = _seed_by_seed(table, setting)
        gain, lost, _ = table.cell(setting, "adamw", rate, both)
        print(f"| {name} | {rate:g} | {gain:.3f}, {lost:.3g} | {_spread(gains, '.0%')} | {_spread(forgotten, '.2f')} |")


def _spared(table: Table, setting: tuple) -> str:
    """What forgets least of all that has at least 95 % of the largest gain, ours and rivals at every rate, seed 0."""
    cells = [
        (name, rate, *table.cell(setting, name, rate, [0])[:2])
        for name in METHODS
        for rate in table.rates(setting, name)
        if 0 in table.seeds(setting, name, rate)
    ]
    most = max(gain for *_, gain, _ in cells)
    name, rate, gain, lost = min((cell for cell in cells if cell[2] >= 0.95 * most), key=lambda cell: cell[3])
    return f"{name} at {rate:g}: {gain:.3f}, {lost:.3g}"


def plot(_: argparse.Namespace) -> None:
    """Writes claim.png (gain and forgetting beside AdamW, and the best reach by layers) and transfer.png."""
    from matplotlib import pyplot  # pip install matplotlib

    table = Table()
    figure, (claim, reach) = pyplot.subplots(1, 2, figsize=(12, 5), layout="constrained")
    claim.axvspan(0.95, 1.6, ymax=1 / 2.5, color="tab:green", alpha=0.12, label="the claim")
    for name in dict.fromkeys(setting[0] for setting in table.settings()):
        points = []
        for setting in (setting for setting in table.settings() if setting[0] == name):
            _, _, gains, forgotten = _seed_by_seed(table, setting)
            points.append((statistics.fmean(gains), min(2.45, statistics.fmean(forgotten))))
        claim.scatter(*zip(*points, strict=True), label=f"{name} ({len(points)})")
    claim.set(xlim=(0.5, 1.6), ylim=(0, 2.5), xlabel="gain, in units of AdamW's at its best rate")
    claim.set(
        ylabel="forgotten, in the same units",
        title="The default at a rate of 1, mean of the seeds: lengths, ranks, batches",
    )
    for setting in table.settings():
        tried = [(value, table.cell(setting, name, 1.0)) for name, value in _reaches().items()
                 if 1.0 in table.rates(setting, name)]  # fmt: skip
        if len(tried) > 1:
            _, _, lost = table.best(setting, "adamw")
            layers, best = LAYERS[setting[0]], max(tried, key=lambda item: item[1][0])[0]
            spared = max((value for value, (_, forgotten, _) in tried if forgotten <= lost), default=None)
            reach.scatter(layers, best, marker="^", color="tab:blue")
            reach.annotate(setting[0], (layers, best), fontsize="small", xytext=(4, 4), textcoords="offset points")
            if spared:
                reach.scatter(layers, spared, marker="v", color="tab:orange")
    reach.plot([5, 90, 150], [0.36, 0.02, 0.02], color="tab:gray", label="the default, 1.8/n, at least 0.02")
    reach.scatter([], [], marker="^", color="tab:blue", label="learns most of those tried")
    reach.scatter([], [], marker="v", color="tab:orange", label="the largest that forgets at most what AdamW does")
    reach.set(xscale="log", yscale="log", xlabel="adapted layers n", ylabel="reach", title="Which reach")
    for axes in (claim, reach):
        axes.legend(fontsize="small", loc="upper left" if axes is claim else "lower left")
    figure.savefig(CELLS.with_name("claim.png"), dpi=100)

    _plot_transfer(table)


def _plot_transfer(table: Table) -> None:
    """Writes transfer.png: what a value that was best in a task's own setting has of the best gain in the others."""
    from matplotlib import pyplot

    found = list(_transfers(table))
    figure, axes = pyplot.subplots(figsize=(12, 4.5), layout="constrained")
    for which, (kind, marker) in enumerate(zip(KINDS, "osD", strict=True)):
        shares = [max(0.0, values[which][1]) for _, values in found]
        axes.plot([x + 0.15 * (which - 1) for x in range(len(found))], shares, marker, label=AXES[kind])
    names = [f"{task}\n{steps} steps\nrank {rank}\nbatch {batch}" for (task, steps, rank, batch), _ in found]
    axes.set_xticks(range(len(found)), names, fontsize="small")
    axes.set(ylim=(-0.03, 1.05), ylabel="gain, in units of the best of those tried")
    axes.set_title("Chosen once, where a task's settings begin: what the choice is worth in the others (seed 0)")
    axes.legend(fontsize="small", loc="lower left")
    axes.grid(axis="y", alpha=0.3)
    figure.savefig(CELLS.with_name("transfer.png"), dpi=100)


AXES = {
    "rate": "AdamW's learning rate",
    "trust": "trust alone: a bound on each step",
    "reach": "reach, a bound on the run",
}


def _reaches() -> dict[str, float]:
    """The methods that differ in their reach alone."""
    return {
        name: float(name.split()[1].strip(",")) for name in METHODS if name.startswith("reach") and "betas" not in name
    }


def _range(values: list[float], form: str) -> str:
    low, high = f"{min(values):{form}}", f"{max(values):{form}}"
    return low if low == high else f"{low} to {high}"


def _print_reaches(table: Table) -> None:
    named = _reaches()
    print("\n## Which reach: gain, forgotten at a rate of 1\n")
    columns = " | ".join(f"{reach:g}" for reach in named.values())
    print(f"| task | steps, rank, batch | layers | {columns} | AdamW, best rate |")
    print("| --- | --- | ---: |" + " --- |" * (len(named) + 1))
    for setting in table.settings():
        tried = {name: table.cell(setting, name, 1.0) for name in named if 1.0 in table.rates(setting, name)}
        if len(tried) < 2:  # one is no choice
            continue
        row = [f"{tried[name][0]:.3f}, {tried[name][1]:.3g}" if name in tried else "" for name in named]
        _, gain, lost = table.best(setting, "adamw")
        task, *shape = setting
        print(f"| {task} | {', '.join(map(str, shape))} | {LAYERS.get(task, '')} | {' | '.join(row)} | "
              f"{gain:.3f}, {lost:.3g} |")  # fmt: skip


def _print_task(table: Table, setting: tuple) -> None:
    task, steps, rank, batch = setting
    base = table.base[task]
    print(f"\n## {task}: {TASKS[task].__doc__.splitlines()[0]}\n")
    print(f"{TASKS[task].base}, {steps} steps of {batch}, rank {rank}; untouched: loss {base['loss']:.4g}, general "
          f"{base['general']:.4g}. Gain, forgotten.\n")  # fmt: skip
    names = [name for name in METHODS if table.rates(setting, name)]
    rates = sorted({rate for name in names for rate in table.rates(setting, name)})
    print("| optimizer | " + " | ".join(f"{rate:g}" for rate in rates) + " |")
    print("| --- |" + " --- |" * len(rates))
    for name in names:
        row = []
        for rate in rates:
            if rate not in table.rates(setting, name):
                row.append("")
                continue
            gain, lost, seeds = table.cell(setting, name, rate)
            row.append(
                "not finite" if math.isinf(gain) else f"{gain:.3f}, {lost:.3g}" + (f" ({seeds})" if seeds > 1 else "")
            )
        print(f"| {name} | " + " | ".join(row) + " |")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    running = commands.add_parser("run")
    running.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    running.add_argument("--methods", nargs="+", choices=METHODS, default=list(METHODS))
    running.add_argument("--rates", nargs="+", type=float, default=[3e-4, 1e-3, 3e-3, 1e-2, 1e-1, 1.0, 10.0])
    running.add_argument("--steps", nargs="+", type=int, help="default: the task's own")
    running.add_argument("--batches", nargs="+", type=int, help="default: the task's own")
    running.add_argument("--ranks", nargs="+", type=int, default=[8])
    running.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    running.add_argument("--threads", type=int, default=1)
    running.set_defaults(run=run)
    commands.add_parser("report").set_defaults(run=report)
    commands.add_parser("short").set_defaults(run=short)
    commands.add_parser("plot").set_defaults(run=plot)
    given = parser.parse_args()
    given.run(given)


if __name__ == "__main__":
    main()
