"""How the learning rate changes over a run's steps: the formulas of diffusers' schedules, without its import."""

import math

from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from equipoise.pipelines.config.sections import ScheduleSection


def make_schedule(
    schedule: ScheduleSection,
    optimizer: Optimizer,
    steps: int,  # of the run
) -> LambdaLR:
    """The schedule, stepped once after each optimizer step."""
    return LambdaLR(optimizer, lambda step: _factor(schedule, steps, step))


def _factor(schedule: ScheduleSection, steps: int, step: int) -> float:
    """What the configured rate is multiplied by after so many steps."""
    if schedule.name == "piecewise_constant":
        *parts, last = (schedule.rules or "1").split(",")
        rules = (part.split(":") for part in parts)
        return next((float(factor) for factor, end in rules if step < int(end)), float(last))
    if step < schedule.warmup:
        return step / schedule.warmup
    length = max(1, steps - schedule.warmup)
    done = (step - schedule.warmup) / length
    match schedule.name:
        case "linear":
            return max(0.0, (steps - step) / length)
        case "cosine":
            return 0.5 * (1 + math.cos(math.pi * schedule.cycles * done))
        case "cosine_with_restarts":
            return 0.0 if done >= 1 else 0.5 * (1 + math.cos(math.pi * (schedule.cycles * done % 1)))
        case "polynomial":  # diffusers' own ends at a rate that depends on the optimizer's default one
            return max(0.0, 1 - done) ** schedule.power
        case _:
            return 1.0
