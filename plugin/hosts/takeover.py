"""Treats the optimizers that a program makes for itself, and reports on stderr what was done.

Two ways in, both without touching the program's code: scaling and the bound happen in hooks around the step of whatever
optimizer there is, attached when it takes its first step; an update rule of its own takes torch.optim.AdamW's place.
"""

import atexit
import functools
import gc
import inspect
import os
import sys
import weakref
from collections import Counter
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim import Optimizer
from torch.optim.optimizer import register_optimizer_step_pre_hook

from equipoise.errors import EquipoiseError, InputError, NamelessError
from equipoise.hosts.choice import Choice, refuse_deepspeed, report, tell
from equipoise.lora.pairs import PairReport, find_pairs, live_roots
from equipoise.optimizers.attach import attach
from equipoise.optimizers.parts.pair_optimizer import PairOptimizer

_clipped: Counter[str] = Counter()  # calls of clip_grad_norm_ so far: "tensors" or "nothing"


def treat(choice: Choice) -> None:
    """Attach the method to every optimizer that holds LoRA factors, at its first step.

    The options that the user gave win over those of a state that the script has loaded, and these over the defaults.
    An optimizer without LoRA pairs is left as it is, for one with pairs may come later. If none has come when the
    process ends, the exit code is 2; and one that trains most of the weights there are is refused at once.
    """
    _watch_clipping()
    seen: weakref.WeakSet[Optimizer] = weakref.WeakSet()
    held: list[str] = []  # the optimizers that held pairs, and those that did not
    left: list[str] = []

    @_or_end
    def first_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if optimizer in seen:
            return
        refuse_deepspeed(choice.name)  # a program may have turned it on after its start
        seen.add(optimizer)
        kind = type(optimizer).__name__
        params = [param for group in optimizer.param_groups for param in group["params"]]
        found, doubt = _look(optimizer)
        if not found.pairs:
            what = f"{kind} of {len(params)} tensors"
            if not held and not _others_hold_pairs(optimizer):
                if _trains_most(params):
                    left.clear()
                    raise _nothing_to_treat(choice, what)
                left.append(what)
            report(f"{what} holds no LoRA pairs: left as it is.{f' ({doubt})' if doubt else ''}")
            return
        held.append(kind)
        if len(params) == 1 and all(side.requires_grad for pair in found for side in (pair.A, pair.B)):
            raise InputError(
                f"--optimizer {choice.name}: the script makes one optimizer per parameter, so none of them sees both "
                "factors of a LoRA pair. Turn the script's fused backward pass off."
            )
        choice.check_base(type(optimizer))
        if isinstance(optimizer, PairOptimizer):
            _refuse_other_options(choice, optimizer)
        else:
            for group in optimizer.param_groups:
                group.update(choice.options)
            attach(optimizer, **{"damping": None, **choice.defaults, **choice.options})
        choice.say_treated(optimizer, kind, found.summary)
        _report_rest(optimizer, kind, params, found)

    register_optimizer_step_pre_hook(first_step)

    def last_word() -> None:
        if left and not held and not hasattr(sys, "last_value"):  # which an error that ended the program has set
            tell(str(_nothing_to_treat(choice, " and ".join(dict.fromkeys(left)))))
            sys.stdout.flush()
            os._exit(2)  # the one way to set the exit code here; what the program registered has run by now

    atexit.register(last_word)


def _look(optimizer: Optimizer) -> tuple[PairReport, str]:
    """(the pairs, what is doubtful). Tensors that nothing names are no pairs unless their shapes leave no doubt."""
    try:
        found = optimizer.pairs if isinstance(optimizer, PairOptimizer) else find_pairs(optimizer)
        return found, "; ".join(found.rest)
    except NamelessError as error:
        return PairReport(()), str(error)


def _nothing_to_treat(choice: Choice, what: str) -> InputError:
    return InputError(
        f"--optimizer {choice.name}: the {what} holds no LoRA pairs, and neither does any other optimizer of this "
        "program, so there is nothing to treat. Have it train LoRA adapters, or leave --optimizer out."
    )


def _refuse_other_options(choice: Choice, optimizer: Optimizer) -> None:
    """The script has made a treated optimizer itself: it must be of the method, with the options that the user gave."""
    for group in optimizer.param_groups:
        if all(group.get(key) is None for key in choice.defaults):
            raise InputError(
                f"--optimizer {choice.name}: the script makes a {type(optimizer).__name__} itself, which has none of "
                f"{', '.join(choice.defaults)}. Leave --optimizer out, or change the script."
            )
        for key, default in choice.defaults.items():
            own = group.get(key)
            if choice.options.get(key, own) != own or (own is None and default is not None):
                asked = choice.options.get(key, default)
                raise InputError(
                    f"--optimizer {choice.name}: the script makes a {type(optimizer).__name__} itself, whose {key} is "
                    f"{own}, not {asked}. Set it in the script, and leave --optimizer out."
                )


def _trains_most(params: list[Tensor]) -> bool:
    """Whether `params` are more than half of the weights in this process's modules."""
    alive = {id(param): param.numel() for root in live_roots() for param in root.parameters()}
    return 2 * sum(alive.get(id(param), 0) for param in params) > sum(alive.values())


def _others_hold_pairs(optimizer: Optimizer) -> bool:
    """Whether another optimizer alive in this process holds LoRA pairs; its turn to step may come later."""
    objects = gc.get_objects()
    kinds = {kind for kind in set(map(type, objects)) if issubclass(kind, Optimizer)}
    found: list[Any] = [o for o in objects if type(o) in kinds and "state" in vars(o)]  # others are still being made
    return any(o is not optimizer and _look(o)[0].pairs for o in found)


def _or_end(call: Callable[..., None]) -> Callable[..., None]:
    """End the process with the sentence, exit code 2: a program that skips bad batches would go on untreated."""

    @functools.wraps(call)
    def checked(*args: Any) -> None:
        try:
            call(*args)
        except EquipoiseError as error:
            tell(str(error))
            raise SystemExit(2) from error

    return checked


def replace_adamw(choice: Choice) -> None:
    """Put the optimizer where scripts find torch.optim.AdamW. What AdamW alone takes is dropped, and reported.

    A program that takes a step before it has made an AdamW is refused: it would train without ours.
    """
    chosen: Any = choice.cls
    made: list[str] = []
    signature = inspect.signature(torch.optim.AdamW)

    def arguments(*args: Any, **given: Any) -> tuple[Any, dict[str, Any]]:
        bound = signature.bind(*args, **given).arguments
        bound.setdefault("lr", signature.parameters["lr"].default)
        made.append(choice.name)
        return bound.pop("params"), choice.take_place("AdamW", bound)

    class Replacement(chosen):
        """Makes a plain `chosen`, which copies and pickles; a class of its own, for programs that derive from AdamW."""

        def __new__(cls, *args: Any, **given: Any) -> Any:
            if cls is not Replacement or not (args or given):  # or it is read out of a pickle
                return super().__new__(cls)
            params, options = arguments(*args, **given)
            return chosen(params, **options)

        def __init__(self, *args: Any, **given: Any):
            params, options = arguments(*args, **given)
            super().__init__(params, **options)

    Replacement.__name__ = Replacement.__qualname__ = chosen.__name__
    for module in (torch.optim, sys.modules["torch.optim.adamw"]):
        module.AdamW = Replacement  # type: ignore[attr-defined, misc]

    @_or_end
    def first_step(optimizer: Optimizer, args: tuple, kwargs: dict[str, Any]) -> None:
        if not made:
            raise InputError(
                f"--optimizer {choice.name}: it takes the place of torch.optim.AdamW, but the program trains with "
                f"{type(optimizer).__name__}. Choose AdamW in the program, or use scaled or bounded, which treat any."
            )

    register_optimizer_step_pre_hook(first_step)


def _report_rest(optimizer: Optimizer, kind: str, params: list[Tensor], found: PairReport) -> None:
    factors = found.factors
    others = sum(id(param) not in factors for param in params)
    dtypes = Counter(str(param.dtype).removeprefix("torch.") for param in params)
    rates = ", ".join(
        "its own" if rate is None else f"{float(rate):g}"  # transformers' Adafactor works its rate out
        for rate in dict.fromkeys(g["lr"] for g in optimizer.param_groups)
    )
    clipping = "on" if _clipped["tensors"] else "off"
    report(
        f"{others} other tensors are {kind}'s alone; dtypes {', '.join(f'{n} × {d}' for d, n in dtypes.items())}; "
        f"learning rate {rates}; gradient clipping {clipping}."
    )
    if _clipped["nothing"]:
        report(
            "warning: the script clips an exhausted iterator, so no gradient is clipped at all (a fault of the script)."
        )
    if {"bfloat16", "float16"} & set(dtypes):
        report(
            "warning: LoRA weights in half precision lose small steps to rounding; train them in float32 if you can."
        )


def _watch_clipping() -> None:
    clip: Callable[..., Tensor] = nn.utils.clip_grad_norm_

    def watched(parameters, *args, **kwargs):
        parameters = [parameters] if isinstance(parameters, Tensor) else list(parameters)
        _clipped["tensors" if parameters else "nothing"] += 1
        return clip(parameters, *args, **kwargs)

    nn.utils.clip_grad_norm_ = torch.nn.utils.clip_grad.clip_grad_norm_ = watched  # type: ignore[assignment]
