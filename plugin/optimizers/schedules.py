"""Rates and distances as the papers' theorems have them, for loops of your own.

Papers: Chang, Li & Yuan, AlphaAdam, 2025, Theorem 3.8: η_t = η/√t; Sun et al., AdaSAM, arXiv 2303.00565, 2023,
Corollary 1: γ ∝ √(b/T) and ρ ∝ 1/√(bT), by which the mean squared gradient norm falls as 1/√(bT).
"""

import math

from equipoise.errors import InputError


def inverse_sqrt(step: int, warmup: int = 0) -> float:
    """The share of the learning rate at a step, counted from 0: up to 1 over the warm-up, and then 1/√t.

    Example:
        >>> from functools import partial
        >>> import torch
        >>> optimizer = torch.optim.SGD([torch.nn.Parameter(torch.zeros(1))], lr=1.0)
        >>> schedule = torch.optim.lr_scheduler.LambdaLR(optimizer, partial(inverse_sqrt, warmup=2))
        >>> rates = []
        >>> for _ in range(6):
        ...     rates.append(round(schedule.get_last_lr()[0], 3))
        ...     optimizer.step()
        ...     schedule.step()
        >>> print(rates)
        [0.0, 0.5, 1.0, 0.707, 0.577, 0.5]
    """
    return step / warmup if step < warmup else 1 / math.sqrt(step - warmup + 1)


def linear_speedup(
    batch: int, steps: int, *, lr: float, rho: float, tuned_batch: int = 1, tuned_steps: int = 1
) -> dict[str, float]:
    """AdaSAM's learning rate and ρ for a run of `steps` steps with batches of `batch`, by its Corollary 1.

    Args:
        batch: b, what a step's gradient is the mean of, over all processes and micro-batches. (>= 1)
        steps: T, of the run. (>= 1)
        lr: Learning rate, and
        rho: ρ, as they were found with
        tuned_batch: batches of this size, and
        tuned_steps: runs of this many steps. With both at 1, lr and ρ are the constants of the corollary.

    Raises:
        InputError: a batch or a number of steps is below 1.

    Example:
        >>> options = linear_speedup(64, 400, lr=1e-2, rho=0.05, tuned_batch=16, tuned_steps=100)
        >>> print(options)
        {'lr': 0.01, 'rho': 0.0125}
    """
    sizes = {"batch": batch, "steps": steps, "tuned_batch": tuned_batch, "tuned_steps": tuned_steps}
    for name, value in sizes.items():
        if value < 1:
            raise InputError(f"linear_speedup: {name} must be 1 or more; got {value!r}.")
    larger, longer = batch / tuned_batch, steps / tuned_steps
    return {"lr": lr * math.sqrt(larger / longer), "rho": rho / math.sqrt(larger * longer)}
