"""Equipoise on an optimizer that exists already: `attach` changes its class, and leaves everything else as it is."""

from torch import nn
from torch.optim import Optimizer

from equipoise.errors import InputError
from equipoise.optimizers.bounded import bounded
from equipoise.optimizers.parts.pair_optimizer import PairOptimizer, fill_group, unwrap, with_trust
from equipoise.optimizers.parts.step_hook import check_options
from equipoise.optimizers.scaled import scaled


def attach(
    optimizer: Optimizer,
    model: nn.Module | None = None,
    *,
    damping: float | None = 1e-6,
    damping_mode: str = "absolute",
    order: str = "simultaneous",
    trust: float | None = None,
    reach: float | None = None,
) -> Optimizer:
    """Make an optimizer that exists already a scaled or bounded one, in place; its state, groups and schedulers stay.

    The object's class becomes `scaled(its class)`, or `bounded(its class)` if `damping` is None. Options that a
    parameter group already has win over the arguments.

    Args:
        optimizer: The optimizer, or accelerate's wrapper around it.
        model: Where to look for the LoRA pairs. Without it, the modules that own the optimizer's tensors are searched.
        damping: As in `ScaledAdamW`; None: no scaling, only the bound. (>= 0)
        damping_mode: As in `ScaledAdamW`.
        order: As in `ScaledAdamW`.
        trust: As in `BoundedAdamW`; None: a tenth of reach, or no bound. (> 0)
        reach: As in `BoundedAdamW`; None: no bound, or as there if damping and trust are None too. (> 0)

    Returns:
        The same object.

    Raises:
        InputError: It treats its pairs already, is no optimizer, or an option is out of bounds.
    """
    inner = unwrap(optimizer)
    if isinstance(optimizer, nn.Module):
        raise InputError(f"attach(optimizer, model) takes the optimizer first; got a {type(optimizer).__name__}.")
    if isinstance(inner, PairOptimizer):
        raise InputError(f"This {type(inner).__name__} treats its LoRA pairs already; change its param_groups.")
    options = {"damping": damping, "damping_mode": damping_mode, "order": order, "trust": trust, "reach": reach}
    if damping is None:
        options = {"trust": trust, "reach": reach}
    cls = (scaled if damping is not None else bounded)(type(inner))
    check_options(inner, options)
    try:
        inner.__class__ = cls
    except TypeError as error:
        made = f"{'scaled' if damping is not None else 'bounded'}({type(inner).__name__})"
        raise InputError(f"This {type(inner).__name__} cannot change its class; construct {made} instead.") from error
    if any(value is not None for value in options.values()):  # else the bounds are those of `bounded`
        for group in inner.param_groups:
            fill_group(group, with_trust(options))
    inner._work_on_pairs(options, model)
    return optimizer
