"""Treats the optimizers that a program makes for itself, and says on stderr what was done.

Two ways in, both without touching the program's code: scaling and the bound happen in hooks around the step of whatever
optimizer there is, attached when it takes its first step; an update rule of its own takes torch.optim.AdamW's place.
"""

import functools
import gc
import inspect
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from equipoise.errors import EquipoiseError, InputError
from equipoise.hosts.script import refuse_deepspeed
from equipoise.optimizers.pair_optimizer import PairOptimizer, attach
from equipoise.pairs import find_pairs

_clipped: Counter[str] = Counter()  # calls of clip_grad_norm_ so far: "tensors" or "nothing"


def treat(
    name: str, method: str, base: type[Optimizer] | None, given: dict[str, Any], defaults: dict[str, Any]
) -> None:
    """Attach `method` to every optimizer that holds LoRA factors, at its first step.

    Args:
        base: The class that the user named with the method; other optimizers are refused. None: any.
        given: The options that the user gave. They win over those of a state that the script has loaded, and these
            over `defaults`.
    """
    _watch_clipping()
    seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
    treated: list[str] = []  # their classes

    @_or_end
    def first_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if optimizer in seen:
            return
        refuse_deepspeed(name)  # a program may have turned it on after its start
        seen.add(optimizer)
        if isinstance(optimizer, PairOptimizer):
            treated.append(type(optimizer).__name__)
            return  # the script made it so itself
        found = find_pairs(optimizer)
        params = [param for group in optimizer.param_groups for param in group["params"]]
        if not found.pairs:
            if not treated and not _others_hold_pairs(optimizer):
                raise InputError(
                    f"--optimizer {name}: the {type(optimizer).__name__} of {len(params)} tensors holds no LoRA pairs, "
                    "and neither does any other optimizer of this program, so there is nothing to treat. Have it train "
                    "LoRA adapters, or leave --optimizer out."
                )
            _say(f"{type(optimizer).__name__} of {len(params)} tensors holds no LoRA pairs: left as it is.")
            return
        if len(params) == 1:
            raise InputError(
                f"--optimizer {name}: the script makes one optimizer per parameter, so none of them sees both factors "
                "of a LoRA pair. Turn the script's fused backward pass off."
            )
        kind = type(optimizer).__name__
        if base is not None and not (isinstance(optimizer, base) or base.__name__.lower() in kind.lower()):
            raise InputError(
                f"--optimizer {name}: the script makes a {kind}, not an {base.__name__}. Use --optimizer {method}, "
                f"which treats any optimizer, or the script's own option for {base.__name__}."
            )
        for group in optimizer.param_groups:
            group.update(given)
        attach(optimizer, **{"damping": None, **defaults, **given})
        treated.append(kind)
        options = {key: optimizer.param_groups[0][key] for key in defaults}
        factors = {id(factor) for pair in found for factor in (pair.A, pair.B)}
        _report(method, kind, options, found.summary, params, factors, optimizer)

    register_optimizer_step_pre_hook(first_step)


def _others_hold_pairs(optimizer: Optimizer) -> bool:
    """Whether another optimizer alive in this process holds LoRA pairs; its turn to step may come later."""
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Optimizer)}
    found: list[Any] = [o for o in objects if type(o) in kinds and "state" in vars(o)]  # others are still being made
    return any(o is not optimizer and find_pairs(o).pairs for o in found)


def _or_end(call: Callable[..., None]) -> Callable[..., None]:
    """End the process with the sentence, exit code 2: a program that skips bad batches would go on untreated."""

    @functools.wraps(call)
    def checked(*args: Any) -> None:
        try:
            call(*args)
        except EquipoiseError as error:
            print(error, file=sys.stderr, flush=True)
            raise SystemExit(2) from error

    return checked


def replace_adamw(name: str, cls: type[Optimizer], options: dict[str, Any]) -> None:
    """Put `cls` where scripts find torch.optim.AdamW. What AdamW takes and `cls` does not is dropped, and said."""
    known = inspect.signature(cls).parameters
    takes_all = any(parameter.kind is parameter.VAR_KEYWORD for parameter in known.values())

    class Replacement(cls):  # type: ignore[misc, valid-type]
        def __init__(self, params: Any, lr: Any = 1e-3, **given: Any):
            kept = {key: value for key, value in given.items() if takes_all or key in known}
            arguments: dict[str, Any] = {**kept, **options, "lr": lr}
            super().__init__(params, **arguments)
            lost = [f"{key}={given[key]!r}" for key in given if key not in kept]
            _say(f"{name} takes AdamW's place, lr {lr:g}, options {options or 'at their defaults'}.")
            if lost:
                _say(f"warning: {name} does not have {', '.join(lost)}, which the script sets.")

    Replacement.__name__ = Replacement.__qualname__ = cls.__name__
    for module in (torch.optim, sys.modules["torch.optim.adamw"]):
        module.AdamW = Replacement  # type: ignore[attr-defined, misc]


def _report(
    method: str,
    kind: str,
    options: dict[str, Any],
    summary: str,
    params: list[Tensor],
    factors: set[int],
    optimizer: Optimizer,
) -> None:
    shown = ", ".join(f"{key} {value}" for key, value in options.items() if value is not None)
    _say(f"{method} ({shown}) on {kind}. {summary}")
    others = sum(id(param) not in factors for param in params)
    dtypes = Counter(str(param.dtype).removeprefix("torch.") for param in params)
    rates = ", ".join(
        "its own" if rate is None else f"{float(rate):g}"  # transformers' Adafactor works its rate out
        for rate in dict.fromkeys(g["lr"] for g in optimizer.param_groups)
    )
    clipping = "on" if _clipped["tensors"] else "off"
    _say(
        f"{others} other tensors are {kind}'s alone; dtypes {', '.join(f'{n} × {d}' for d, n in dtypes.items())}; "
        f"learning rate {rates}; gradient clipping {clipping}."
    )
    if _clipped["nothing"]:
        _say(
            "warning: the script clips an exhausted iterator, so no gradient is clipped at all (a fault of the script)."
        )
    if {"bfloat16", "float16"} & set(dtypes):
        _say("warning: LoRA weights in half precision lose small steps to rounding; train them in float32 if you can.")


def _watch_clipping() -> None:
    clip: Callable[..., Tensor] = nn.utils.clip_grad_norm_

    def watched(parameters, *args, **kwargs):
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        _clipped["tensors" if parameters else "nothing"] += 1
        return clip(parameters, *args, **kwargs)

    nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad.clip_grad_norm_ = watched  # type: ignore[assignment]


def _say(text: str) -> None:
    print(f"equipoise: {text}", file=sys.stderr, flush=True)
