"""How the learning rate changes over a run's steps: diffusers' schedules by the names and options of the record,
and η/√t."""

from diffusers.optimization import get_cosine_schedule_with_warmup, get_scheduler
from torch.optim import Optimizer
from torch.optim.lr_scheduler import LambdaLR

from equipoise.optimizers.schedules import inverse_sqrt
from equipoise.pipelines.config.sections import ScheduleSection


def make_schedule(
    schedule: ScheduleSection,
    optimizer: Optimizer,
    steps: int,  # of the run
) -> LambdaLR:
    """The schedule, stepped once after each optimizer step."""
    if schedule.name == "cosine":  # diffusers' get_scheduler knows no cycles for it; it counts whole waves
        return get_cosine_schedule_with_warmup(optimizer, schedule.warmup, steps, num_cycles=schedule.cycles / 2)
    if schedule.name == "polynomial":  # diffusers' own ends at a rate that depends on the optimizer's default one
        return LambdaLR(optimizer, lambda step: _polynomial(step, schedule.warmup, steps, schedule.power))
    if schedule.name == "inverse_sqrt":
        return LambdaLR(optimizer, lambda step: inverse_sqrt(step, schedule.warmup))
    return get_scheduler(
        schedule.name,
        optimizer,
        step_rules=schedule.rules,
        num_warmup_steps=schedule.warmup,
        num_training_steps=steps,
        num_cycles=int(schedule.cycles),
    )


def renew_rates(schedule: LambdaLR) -> None:
    """Makes the rates of the next step those of this schedule: a state that was loaded has those of another one, if the
    run goes on for more steps than it was to take."""
    rates = zip(schedule.base_lrs, schedule.lr_lambdas, strict=True)
    schedule._last_lr = [rate * factor(schedule.last_epoch) for rate, factor in rates]


def _polynomial(step: int, warmup: int, steps: int, power: float) -> float:
    if step < warmup:
        return step / warmup
    return max(0.0, 1 - (step - warmup) / max(1, steps - warmup)) ** power
