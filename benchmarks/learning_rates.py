"""How forgiving each optimizer is of the learning rate: held-out loss against learning rate on three small tasks.

    python benchmarks/learning_rates.py run --task shapes --seeds 0 1 2   measures, cell by cell, where it ended last
    python benchmarks/learning_rates.py report                            the tables of learning_rates.md

Tasks, all with LoRA on a frozen base:
    shapes         the embedded diffusion base (U-Net attention) learns an object it has never seen from six pictures;
                   held out: the denoising loss on other drawings of it, at fixed noise and timesteps
    text_encoder   the same with LoRA on the text encoder too, whose rate alone is varied; the U-Net's stays at 1e-3
                   (as in the paper's Section 6.2)
    text           a byte-level GPT that was first trained on the standard library's prose (docstrings) learns its
                   code; held out: the cross entropy on other modules
    long_text      the same with ten times the steps
    least_squares  the ill-conditioned low-rank problem of the paper's Section 7: ‖BA − W‖² from a small start, W of
                   rank r and condition number 100; here the loss itself

A score is 1 − loss / loss of the untouched base; the usable range is that of
equipoise.pipelines.comparing.robustness, by what was learnt alone.
"""

import argparse
import copy
import itertools
import json
import math
import statistics
import time
from collections.abc import Callable
from functools import cache
from pathlib import Path

import torch
from keeping.bases import as_bytes, drawn, encoded, gpt, modules, windows
from peft import LoraConfig, inject_adapter_in_model
from peft.optimizers import create_loraplus_optimizer, create_riemannian_optimizer
from torch import Tensor, nn
from torch.nn import functional as F
from torch.optim import AdamW, Optimizer
from torch.optim.lr_scheduler import CosineAnnealingLR

from equipoise import BoundedAdamW, ScaledAdamW

RATES = [1e-4, 3e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1, 1.0, 10.0]
DATA = Path(__file__).with_suffix(".jsonl")


def _peft(maker: Callable, model: nn.Module, lr: float, **options) -> Optimizer:
    return maker(model, AdamW, lr=lr, **options)


def groups(net: nn.Module, lr: float) -> list[dict]:
    """What is to be trained, at `lr` or at the rate that its part of the model is fixed to."""
    fixed = getattr(net, "fixed_rates", {})
    parts = [(net.get_submodule(name), rate) for name, rate in fixed.items()]
    inside = {id(param) for part, _ in parts for param in part.parameters()}
    rest = [param for param in net.parameters() if param.requires_grad and id(param) not in inside]
    return [{"params": rest, "lr": lr}] + [
        {"params": [param for param in part.parameters() if param.requires_grad], "lr": rate} for part, rate in parts
    ]


def _lora_rite(model: nn.Module, lr: float) -> Optimizer:
    try:
        from pytorch_optimizer import LoRARite
    except ImportError:
        raise SystemExit(
            "lora-rite: pip install pytorch_optimizer, which has it, or choose other --optimizers."
        ) from None
    return LoRARite([p for p in model.parameters() if p.requires_grad], lr)  # peft's order: A, B, A, B, …


OPTIMIZERS: dict[str, Callable[[nn.Module, float], Optimizer]] = {
    "adamw": lambda net, lr: AdamW(groups(net, lr)),
    "lora+ 16 (peft)": lambda net, lr: _peft(create_loraplus_optimizer, net, lr, loraplus_lr_ratio=16),
    "riemannian 1e-6 (peft)": lambda net, lr: _peft(create_riemannian_optimizer, net, lr, reg=1e-6),
    "riemannian 1e-2 (peft)": lambda net, lr: _peft(create_riemannian_optimizer, net, lr, reg=1e-2),
    "lora-rite (pytorch_optimizer)": _lora_rite,
    "scaled 1e-6": lambda net, lr: ScaledAdamW(groups(net, lr), damping=1e-6),
    "scaled 1e-2": lambda net, lr: ScaledAdamW(groups(net, lr), damping=1e-2),
    "scaled 1": lambda net, lr: ScaledAdamW(groups(net, lr), damping=1.0),
    "scaled relative 1e-2": lambda net, lr: ScaledAdamW(groups(net, lr), damping=1e-2, damping_mode="relative"),
    "scaled relative 1": lambda net, lr: ScaledAdamW(groups(net, lr), damping=1.0, damping_mode="relative"),
    "scaled sequential 1e-6": lambda net, lr: ScaledAdamW(groups(net, lr), damping=1e-6, order="sequential"),
    "scaled 1e-6, betas .7 .8": lambda net, lr: ScaledAdamW(groups(net, lr), damping=1e-6, betas=(0.7, 0.8)),
    "bounded 0.003": lambda net, lr: BoundedAdamW(groups(net, lr), trust=0.003),
    "bounded 0.01": lambda net, lr: BoundedAdamW(groups(net, lr), trust=0.01),
    "bounded 0.03": lambda net, lr: BoundedAdamW(groups(net, lr), trust=0.03),
    "bounded 0.1": lambda net, lr: BoundedAdamW(groups(net, lr), trust=0.1),
    "scaled 1e-6, bounded 0.01": lambda net, lr: ScaledAdamW(groups(net, lr), damping=1e-6, trust=0.01),
}


class Task:
    """A model with fresh LoRA factors, its training loss by step, and what it is judged by."""

    steps: int
    model: nn.Module

    def loss(self, step: int) -> Tensor:
        raise NotImplementedError

    def held_out(self) -> float:
        raise NotImplementedError


@cache
def _shapes() -> tuple:
    """The embedded U-Net, text encoder and noise schedule, and (latents, tokens, text embeddings) of six pictures to
    learn and twelve held out.
    """
    from equipoise.pipelines.demo import shapes

    pictures = [(shapes.OBJECT, background) for background in ["white", "gray", "black"] * 6]
    unet, text_encoder, *_, alphas = drawn()
    return unet, text_encoder, alphas, encoded(pictures, 0)


class Shapes(Task):
    steps, batch = 120, 4

    def __init__(self, seed: int, rank: int):
        unet, _, self.alphas, (self.latents, self.tokens, self.embedded) = _shapes()
        self.model = self.unet = self._adapted(unet, ["to_q", "to_k", "to_v", "to_out.0"], rank)
        self.seed = seed

    @staticmethod
    def _adapted(model: nn.Module, targets: list[str], rank: int) -> nn.Module:
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets)
        return inject_adapter_in_model(config, copy.deepcopy(model))

    def _embed(self, which: Tensor) -> Tensor:
        return self.embedded[which]

    def _denoising(self, which: Tensor, generator: torch.Generator) -> Tensor:
        clean = self.latents[which]
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(0, len(self.alphas), (len(which),), generator=generator)
        signal = self.alphas[times].view(-1, 1, 1, 1)
        noisy = signal.sqrt() * clean + (1 - signal).sqrt() * noise
        return F.mse_loss(self.unet(noisy, times, self._embed(which)).sample, noise)

    def loss(self, step: int) -> Tensor:
        generator = torch.Generator().manual_seed(1_000_003 * self.seed + step)
        return self._denoising(torch.randint(0, 6, (self.batch,), generator=generator), generator)

    def held_out(self) -> float:
        generator = torch.Generator().manual_seed(7)
        return statistics.fmean(self._denoising(torch.arange(6, 18), generator).item() for _ in range(8))


class TextEncoder(Shapes):
    def __init__(self, seed: int, rank: int):
        super().__init__(seed, rank)
        self.text_encoder = self._adapted(_shapes()[1], ["q_proj", "k_proj", "v_proj", "out_proj"], rank)
        self.model = nn.ModuleDict({"unet": self.unet, "text_encoder": self.text_encoder})
        self.model.fixed_rates = {"unet": 1e-3}

    def _embed(self, which: Tensor) -> Tensor:
        return self.text_encoder(self.tokens[which]).last_hidden_state


@cache
def _gpt() -> tuple:
    """A byte-level GPT trained on prose, and the code to learn and to hold out."""
    code = as_bytes(list(modules().values()))
    return gpt()[0], code[::2], code[1::2]


class Text(Task):
    steps = 150

    def __init__(self, seed: int, rank: int):
        model, self.seen, self.unseen = _gpt()
        targets = ["c_attn", "c_proj", "c_fc"]
        config = LoraConfig(r=rank, lora_alpha=rank, target_modules=targets, fan_in_fan_out=True)
        self.model, self.seed = inject_adapter_in_model(config, copy.deepcopy(model)), seed

    def loss(self, step: int) -> Tensor:
        rows = windows(self.seen, 12, torch.Generator().manual_seed(1_000_003 * self.seed + step))
        return self.model(rows, labels=rows).loss

    def held_out(self) -> float:
        rows = windows(self.unseen, 256, torch.Generator().manual_seed(7))
        return self.model(rows, labels=rows).loss.item()


class LongText(Text):
    steps = 1500


class Pair(nn.Module):
    def __init__(self, weight: Tensor, rank: int):
        super().__init__()
        m, n = weight.shape
        self.register_buffer("weight", weight)
        self.lora_A = nn.ModuleDict({"default": nn.Linear(n, rank, bias=False)})
        self.lora_B = nn.ModuleDict({"default": nn.Linear(rank, m, bias=False)})


class LeastSquares(Task):
    steps = 400

    def __init__(self, seed: int, rank: int):
        generator = torch.Generator().manual_seed(seed)
        left, _ = torch.linalg.qr(torch.randn(80, rank, generator=generator))
        right, _ = torch.linalg.qr(torch.randn(60, rank, generator=generator))
        self.wanted = left * torch.logspace(0, -2, rank) @ right.T  # condition number 100
        self.model = nn.ModuleDict({"0": Pair(self.wanted / self.wanted.norm(), rank)})
        for param in self.model.parameters():
            nn.init.normal_(param, std=0.05, generator=generator)

    def loss(self, step: int) -> Tensor:
        pair = self.model["0"]
        return (pair.lora_B["default"].weight @ pair.lora_A["default"].weight - self.wanted).square().sum()

    def held_out(self) -> float:
        return self.loss(0).item()


TASKS = {
    "shapes": Shapes,
    "text_encoder": TextEncoder,
    "text": Text,
    "long_text": LongText,
    "least_squares": LeastSquares,
}
SCHEDULES = ("constant", "cosine")


def measure(
    task: Task, make: Callable[[nn.Module, float], Optimizer], rate: float, schedule: str
) -> dict[str, float | None]:
    """Losses before and after training; None once a loss is not finite."""
    with torch.no_grad():
        before = task.held_out()
    optimizer = make(task.model, rate)
    scheduler = CosineAnnealingLR(optimizer, task.steps) if schedule == "cosine" else None
    start = time.perf_counter()
    for step in range(task.steps):
        loss = task.loss(step)
        if not math.isfinite(loss.item()):
            return {"before": before, "after": None, "seconds": time.perf_counter() - start}
        loss.backward()
        optimizer.step()
        optimizer.zero_grad()
        if scheduler is not None:
            scheduler.step()
    seconds = time.perf_counter() - start
    with torch.no_grad():
        after = task.held_out()
    return {"before": before, "after": after if math.isfinite(after) else None, "seconds": seconds}


def _cells() -> dict[tuple, dict]:
    lines = DATA.read_text().splitlines() if DATA.exists() else []
    keys = ("task", "schedule", "rank", "optimizer", "rate", "seed")
    return {tuple(cell[key] for key in keys): cell for cell in map(json.loads, lines)}


def run(arguments: argparse.Namespace) -> None:
    torch.set_num_threads(arguments.threads)
    done = _cells()
    schedule, axes = arguments.schedule, (arguments.task, arguments.ranks, arguments.seeds, arguments.optimizers)
    for task, rank, seed, optimizer, rate in itertools.product(*axes, arguments.rates):
        if (task, schedule, rank, optimizer, rate, seed) in done:
            continue
        if task == "text_encoder" and "peft" in optimizer:
            continue  # these makers know one rate for all
        torch.manual_seed(seed)
        cell = measure(TASKS[task](seed, rank), OPTIMIZERS[optimizer], rate, schedule)
        key = {"task": task, "schedule": schedule, "rank": rank, "optimizer": optimizer, "rate": rate, "seed": seed}
        with DATA.open("a") as file:
            file.write(json.dumps(key | cell) + "\n")
        shown = "not finite" if cell["after"] is None else f"{cell['after']:.4f}"
        print(f"{task} rank {rank} seed {seed} {optimizer} {rate:g}: {shown}", flush=True)


def report(arguments: argparse.Namespace) -> None:
    from equipoise.pipelines.comparing.robustness import Point, threshold, usable_range

    cells = _cells()
    for task, schedule, rank in sorted({key[:3] for key in cells}):
        mine = {key[3:]: cell for key, cell in cells.items() if key[:3] == (task, schedule, rank)}
        # An optimizer that was tried at two rates or fewer has no range to speak of yet.
        names = [name for name in OPTIMIZERS if len({key[1] for key in mine if key[0] == name}) > 2]
        rates = sorted({key[1] for key in mine})
        seeds = sorted({key[2] for key in mine})
        base = statistics.fmean(cell["before"] for cell in mine.values())

        def losses(name: str, rate: float, mine=mine, seeds=seeds) -> list[float]:
            found = [mine.get((name, rate, seed)) for seed in seeds]
            return [math.inf if cell["after"] is None else cell["after"] for cell in found if cell]

        def score(name: str, rate: float, base=base, losses=losses) -> float:
            return 1 - statistics.median(losses(name, rate)) / base

        def tried(name: str, rates=rates, losses=losses) -> list[float]:
            return [rate for rate in rates if losses(name, rate)]

        best = max(score(name, rate) for name in names for rate in tried(name))
        line = threshold(0.0, best)
        print(f"\n## {task}, {schedule}, rank {rank}, {len(seeds)} seed(s); untouched {base:.4f}\n")
        print("| optimizer | " + " | ".join(f"{rate:g}" for rate in rates) + " | usable range |")
        print("| --- |" + " ---: |" * len(rates) + " --- |")
        spreads = []
        for name in names:
            row = [f"{statistics.median(losses(name, rate)):.3g}" if losses(name, rate) else "" for rate in rates]
            points = [Point(rate, score(name, rate)) for rate in tried(name)]
            usable = usable_range(points, line) if line is not None else None
            for rate in tried(name):
                if line is not None and score(name, rate) >= line and len(found := losses(name, rate)) > 1:
                    spreads.append((max(found) - min(found)) / base / best)
            own = {key[2] for key in mine if key[0] == name}
            fewer = f", {len(own)} seed(s)" if len(own) < len(seeds) else ""
            print(f"| {name}{fewer} | " + " | ".join(row) + f" | {usable or 'none'} |")
        if spreads:
            middle, most = statistics.median(spreads), max(spreads)
            print(f"\nA usable cell's seeds lie {middle:.1%} of the best gain apart in the median, {most:.1%} at most.")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    commands = parser.add_subparsers(required=True)
    runs = commands.add_parser("run")
    runs.add_argument("--task", nargs="+", choices=TASKS, default=list(TASKS))
    runs.add_argument("--schedule", choices=SCHEDULES, default="cosine")
    runs.add_argument("--ranks", nargs="+", type=int, default=[4])
    runs.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    runs.add_argument("--rates", nargs="+", type=float, default=RATES)
    runs.add_argument("--optimizers", nargs="+", choices=OPTIMIZERS, default=list(OPTIMIZERS))
    runs.add_argument("--threads", type=int, default=1)
    runs.set_defaults(run=run)
    commands.add_parser("report").set_defaults(run=report)
    arguments = parser.parse_args()
    arguments.run(arguments)


if __name__ == "__main__":
    main()
