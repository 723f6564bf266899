"""Ways back to the border of a bounded run, on a problem whose best point within the ball is known.

    python benchmarks/reach.py

A weight W (9, 12) is to become a random target; LoRA of rank 3 may move it by 0.2 of its norm. The best such change is
the truncated singular value decomposition of what is missing, cut to that norm. Printed is the share of its gain that
300 steps reach (cosine schedule, trust 0.02, no weight decay): the mean over seeds, and the least and most.

- line: both factors go back on the line to those that the adapter began with
- both: A and B are multiplied by one number, as `reach` does it
- B: only B is
"""

import argparse
from statistics import mean

import torch
from torch import Tensor, nn
from torch.optim.lr_scheduler import CosineAnnealingLR

from equipoise import BoundedAdamW, ScaledAdamW
from equipoise.optimizers.parts.product_bound import ProductBound

REACH, STEPS, RANK = 0.2, 300, 3


def gain(way: str, cls: type, rate: float, seed: int) -> float:
    """The share of the largest gain within the ball."""
    torch.manual_seed(seed)
    net = nn.Module()
    net.base_layer = nn.Linear(12, 9, bias=False, dtype=torch.float64).requires_grad_(False)
    net.lora_A = nn.Linear(12, RANK, bias=False, dtype=torch.float64)
    net.lora_B = nn.Linear(RANK, 9, bias=False, dtype=torch.float64)
    nn.init.zeros_(net.lora_B.weight)
    W, A, B = net.base_layer.weight, net.lora_A.weight, net.lora_B.weight
    line = ProductBound([(A, B)], [float(W.norm())], [0])
    line.remember()
    optimizer = cls(net, lr=rate, trust=REACH / 10, reach=REACH if way == "both" else None, weight_decay=0.0)
    schedule = CosineAnnealingLR(optimizer, STEPS)
    missing = torch.randn(9, 12, dtype=torch.float64) - W
    for _ in range(STEPS):
        optimizer.zero_grad()
        (missing - B @ A).square().sum().backward()
        optimizer.step()
        schedule.step()
        if way == "line":
            line.shrink([REACH])
        elif way == "B":
            with torch.no_grad():
                B *= (REACH * W.norm() / (B @ A).norm()).clamp(max=1)
    start, end = missing.square().sum(), (missing - B @ A).detach().square().sum()
    return float((start - end) / (start - (missing - best(missing, REACH * W.norm())).square().sum()))


def best(missing: Tensor, norm: Tensor) -> Tensor:
    U, S, V = torch.linalg.svd(missing)
    change = (U[:, :RANK] * S[:RANK]) @ V[:RANK]
    return change * norm / change.norm()


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rates", type=float, nargs="+", default=[1e-2, 1.0])
    parser.add_argument("--seeds", type=int, default=10)
    given = parser.parse_args()
    torch.set_num_threads(1)
    print("| optimizer | rate | line | both | B |\n| --- | --- | --- | --- | --- |")
    for cls in (BoundedAdamW, ScaledAdamW):
        for rate in given.rates:
            cells = []
            for way in ("line", "both", "B"):
                gains = [gain(way, cls, rate, seed) for seed in range(given.seeds)]
                cells.append(f"{mean(gains):.2f} ({min(gains):.2f} to {max(gains):.2f})")
            print(f"| {cls.__name__} | {rate:g} | {' | '.join(cells)} |", flush=True)


if __name__ == "__main__":
    main()
