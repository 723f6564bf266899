"""Scales gradients before an optimizer's step and bounds the step after it: what happens when, and in which order."""

import functools
import logging
import sys
import weakref
from collections import Counter
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any, NoReturn

import torch
from torch import Tensor, nn
from torch.optim import Optimizer

from equipoise.errors import InputError, PairingError
from equipoise.lora.frozen import Frozen, weight_norms
from equipoise.lora.pairs import REPLACED, Pair, PairReport, find_pairs
from equipoise.optimizers.parts.checks import check_not_negative, group_label, is_number
from equipoise.optimizers.parts.fused_adamw import match_layout
from equipoise.optimizers.parts.pair_factors import PairFactors
from equipoise.optimizers.parts.preconditioner import Preconditioner, Side
from equipoise.optimizers.parts.product_bound import ProductBound
from equipoise.optimizers.parts.sharded import full, shard

REACHED = 1.001  # times its reach that a pair may lie out when it is resumed: what rounding may add
START = "equipoise_start"  # in the optimizer's state of a factor: as the adapter began, where reach is measured from
_CHOICES = {"damping_mode": ("absolute", "relative"), "order": ("simultaneous", "sequential")}
# Entries of param_groups in which a base counts its own steps (Prodigy, schedule-free, apex): two passes count double.
_STEP_COUNTERS = ("k", "step")
_HOOKED_STEP = Optimizer.profile_hook_step(lambda self: None).__code__  # type: ignore[attr-defined]

_log = logging.getLogger("equipoise")


class StepHook:
    """The step hooks of one optimizer, and the pairs it treats.

    Nothing of it lives in the optimizer's groups or state: other programs copy, move and reload those.

    Args:
        model: Where the pairs live.
        scales: Whether gradients are scaled; else only the option `trust` counts.
        found: The pairs, if they are known already.
        norms: `weight_norms` of them, likewise.
    """

    def __init__(
        self,
        model: nn.Module | None,
        *,
        scales: bool,
        found: PairReport | None = None,
        norms: list[Frozen] | None = None,
    ):
        self.found, self.norms = found, norms
        self._model = weakref.ref(model) if model is not None else None
        self._scales = scales
        self._matrices = False  # whether the optimizer was made for any
        self._params: list[Tensor] = []  # those the pairs were looked up for; held, so that no id is used twice
        self._factors = PairFactors([])
        self._sides: list[Side] = []
        self._options: list[tuple[float, str, str]] = []
        self._early = Preconditioner([])  # what is scaled from the old factors
        self._late = Preconditioner([])  # "sequential": the Bs, scaled once A has moved
        self._hidden: list[tuple[Tensor, Tensor]] = []
        self._failures = 0  # of preconditioners that were replaced
        self._step = _Bound("trust")  # how far a step may go
        self._run = _Bound("reach")  # how far the run may go, from `_starts`
        self._starts: dict[int, Tensor] = {}  # by id of a factor
        self._beside: dict[int, Tensor] = {}  # by id of a factor, schedule-free's z of it before the step

    def register(self, optimizer: Any) -> None:
        self._matrices = any(param.ndim > 1 for param in _params(optimizer))
        optimizer.register_step_pre_hook(self.before)
        optimizer.register_step_post_hook(self.after)
        optimizer.register_load_state_dict_post_hook(self._forget_starts)

    @property
    def failures(self) -> int:
        return self._failures + self._early.failures + self._late.failures

    def before(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> tuple[tuple, dict[str, Any]] | None:
        """Scale now or, if the step brings a closure, each time the closure has made fresh gradients."""
        if is_nested(optimizer):
            return None
        _restore(self._hidden)  # left over if the last step raised
        self._remember(optimizer)
        closure = args[1] if len(args) > 1 else kwargs.get("closure")
        if self._scales and any(group["order"] == "sequential" for group in optimizer.param_groups):
            loss = None
            if closure is not None:
                with torch.enable_grad():
                    loss = closure()
            self._two_passes(optimizer)
            # All is done: the step proper finds no gradients and only returns the loss.
            self._hidden = _hide(_params(optimizer))
            return None if closure is None else with_closure(args, kwargs, lambda: loss)
        prepare = self._scale_early if self._scales else _match_layout
        if closure is None:
            prepare(optimizer)
            return None

        def prepared_closure() -> Any:
            loss = closure()
            prepare(optimizer)
            return loss

        return with_closure(args, kwargs, prepared_closure)

    def after(self, optimizer: Any, args: tuple, kwargs: dict[str, Any]) -> None:
        if not is_nested(optimizer):
            if self._step.bound is not None or self._run.bound is not None:
                self._factors.gather()
                for asked, beside in ((self._step, self._beside), (self._run, self._starts)):
                    if asked.bound is not None:
                        asked.bound.shrink(asked.limits(optimizer))
                        self._shrink_beside(optimizer, asked.bound, beside)
                self._factors.scatter()
            _restore(self._hidden)
            self._save_starts(optimizer)

    def look_up(self, optimizer: Any) -> PairReport:
        """Find the pairs, unless they are known for exactly these parameters."""
        params = _params(optimizer)
        if self.found is None or (self._params and list(map(id, params)) != list(map(id, self._params))):
            if self._matrices and all(param.ndim < 2 for param in params):
                raise PairingError(REPLACED)
            self.found = find_pairs(optimizer, self._model() if self._model is not None else None)
            doubtful = not self.found.pairs or "adjacency" in self.found.found_by
            _log.log(logging.WARNING if doubtful else logging.INFO, self.found.summary)
            self._params, self.norms = [], None
        if not self._params:
            self._params, self._options, self._starts = params, [], {}
            self._step.bound = self._run.bound = None
            group = {id(p): index for index, group in enumerate(optimizer.param_groups) for p in group["params"]}
            self._factors = PairFactors(self.found.pairs)
            couples = [(p, *self._factors.of(p)) for p in self.found]
            self._sides = [Side(A, B, True, group[id(p.A)]) for p, A, B in couples if id(p.A) in group]
            self._sides += [Side(B, A, False, group[id(p.B)]) for p, A, B in couples if id(p.B) in group]
        return self.found

    @property
    def shares(self) -> dict[str, float]:
        if self._step.bound is None or not self._step.bound.shares:
            return {}
        return dict(zip(self._step.names, torch.stack(self._step.bound.shares).tolist(), strict=True))

    @property
    def moved(self) -> dict[str, float]:
        if self._run.bound is not None:
            self._factors.gather()
        return self._moved()

    def _moved(self) -> dict[str, float]:
        """The same, with the full factors as they are."""
        if self._run.bound is None or not self._run.names:
            return {}
        moved = torch.stack(self._run.bound.moved()).tolist()
        return {name: far / n for name, far, n in zip(self._run.names, moved, self._run.beside, strict=True)}

    def _remember(self, optimizer: Any) -> None:
        """Keep the factors as they are before the step, if any group asks for a bound."""
        wanted = [asked for asked in (self._step, self._run) if asked.is_wanted(optimizer)]
        if not wanted:
            return
        self.look_up(optimizer)
        self._factors.gather()
        for asked in wanted:
            if not asked.is_current(optimizer):
                check_options(optimizer)
                self._make(asked, optimizer)
        if self._step.bound is not None:
            self._step.bound.remember()
            self._beside = {key: z.clone() for key, z in self._second(optimizer, self._step.bound).items()}

    @torch.no_grad()
    def _shrink_beside(self, optimizer: Any, bound: ProductBound, earlier: Mapping[int, Tensor]) -> None:
        """Take back as much of schedule-free's second sequence as of the first; else the two part for good."""
        if not (now := self._second(optimizer, bound)):
            return
        for pair, old, c in zip(bound.pairs, bound.old, bound.shares, strict=True):
            for factor, before in zip(pair, old, strict=True):
                if (z := now.get(id(factor))) is not None:
                    before = earlier.get(id(factor), before)  # z starts as the parameter, within its first step
                    z.copy_(torch.lerp(before.to(c.dtype), z.to(c.dtype), c))

    def _second(self, optimizer: Any, bound: ProductBound) -> dict[int, Tensor]:
        """Schedule-free's second sequence z of each bounded factor, by its id. Its `eval` goes along y − z."""
        if not any("train_mode" in group for group in optimizer.param_groups):
            return {}
        factors = [factor for pair in bound.pairs for factor in pair]
        states = [optimizer.state.get(self._factors.parameter(factor), {}) for factor in factors]
        return {
            id(f): self._factors.part(f, state["z"]) for f, state in zip(factors, states, strict=True) if "z" in state
        }

    def _make(self, asked: "_Bound", optimizer: Any) -> None:
        """Make the bound on a step or on the run, for the pairs of the groups that ask for it."""
        assert self.found is not None
        group = {id(p): i for i, group in enumerate(optimizer.param_groups) for p in group["params"]}
        values = asked.values(optimizer)
        if self.norms is None:
            self.norms = self._measure(optimizer, self.found.pairs)
        if self._factors.sharded and any("train_mode" in group for group in optimizer.param_groups):
            raise InputError(
                f"{type(optimizer).__name__}: the option {asked.option} cannot bound a schedule-free step of factors "
                f"that FSDP2 shards over processes. Leave {asked.option} out, or take another base."
            )
        if self.found.rest:
            _log.warning("The option %s bounds LoRA pairs alone: %s.", asked.option, "; ".join(self.found.rest))
        pairs, frozen, kinds, names = [], [], [], []
        for pair, under in zip(self.found, self.norms, strict=True):
            indices = [group[id(factor)] for factor in (pair.A, pair.B) if id(factor) in group]
            if kind := tuple(sorted({i for i in indices if values[i] is not None})):
                pairs.append(pair)
                frozen.append(under)
                kinds.append(kind)
                names.append(pair.name)
        distinct = list(dict.fromkeys(kinds))
        # Several adapters on a layer: each may go its part of the way, so that their sum keeps the bound.
        on_layer = Counter(under.layer for under in frozen)
        beside = [on_layer[under.layer] for under in frozen]
        norms = [under.norm / n for under, n in zip(frozen, beside, strict=True)]
        begun = asked is self._run
        start = [factor for pair in pairs for factor in self._start(optimizer, pair)] if begun else None
        bound = ProductBound(list(map(self._factors.of, pairs)), norms, [distinct.index(kind) for kind in kinds], start)
        asked.set(optimizer, bound, distinct, names, beside)
        if begun:
            self._refuse_far_out(optimizer, kinds)

    def _measure(self, optimizer: Any, pairs: Sequence[Pair]) -> list[Frozen]:
        """`weight_norms`; errors speak of what the user gave. A bounded class has a bound without being given one."""
        model, name = self._model() if self._model is not None else None, type(optimizer).__name__
        if not self._scales:
            return weight_norms(pairs, model, name, "take an optimizer without a bound")
        given = [it.option for it in (self._step, self._run) if any(v is not None for v in it.values(optimizer))]
        return weight_norms(pairs, model, f"The bound of {name}", f"leave {' and '.join(given)} out")

    def _start(self, optimizer: Any, pair: Pair) -> list[Tensor]:
        """A pair's factors as the adapter began: as an earlier run saved them, or as they are before the first step.

        Where their product is 0 they count as 0 themselves: what takes a pair back to its border is then one factor for
        both, which keeps the direction of BA. On the way back to an A that means nothing, it would turn.
        """
        factors = (pair.A, pair.B)
        for factor in factors:
            if id(factor) not in self._starts:
                kept = optimizer.state[factor].get(START) if factor in optimizer.state else None
                self._starts[id(factor)] = factor.detach().clone() if kept is None else kept
        starts = [self._starts[id(factor)] for factor in factors]
        wholes = list(map(full, starts))
        parts = [pair.part(side, whole) for side, whole in enumerate(wholes)]
        if not all(part.any() for part in parts):
            for start, whole, part in zip(starts, wholes, parts, strict=True):
                part.zero_()
                if whole is not start:
                    start.copy_(shard(whole, start))
        return parts

    def _save_starts(self, optimizer: Any) -> None:
        """Into the optimizer's state of each factor, once its base has made its own there, which may want it empty."""
        for param in self._params if self._run.bound is not None else ():
            if id(param) in self._starts and param.grad is not None:
                optimizer.state[param].setdefault(START, self._starts[id(param)])

    def _forget_starts(self, optimizer: Any) -> None:
        """After a state was loaded, which brings its own."""
        self._starts, self._run.bound = {}, None

    def _refuse_far_out(self, optimizer: Any, kinds: list[tuple[int, ...]]) -> None:
        values = self._run.values(optimizer)
        for kind, n, (name, moved) in zip(kinds, self._run.beside, self._moved().items(), strict=True):
            reach = min(values[i] for i in kind if values[i] is not None) / n  # type: ignore[type-var]
            if not moved <= reach * REACHED:
                raise InputError(
                    f"{name}: has gone {moved:.3g} of the frozen weight's norm from where it began, which is farther "
                    f"than reach, {reach:g}. Give a reach that is larger, or begin anew."
                )

    def _prepare(self, optimizer: Any) -> list[tuple[float, str]]:
        """Bring pairs and options up to date; (damping, damping mode) of each group."""
        self.look_up(optimizer)
        options = [(group["damping"], group["damping_mode"], group["order"]) for group in optimizer.param_groups]
        if options != self._options:
            check_options(optimizer)
            if [order for *_, order in options] != [order for *_, order in self._options]:
                self._failures = self.failures
                late = [not side.left and options[side.group][2] == "sequential" for side in self._sides]
                self._early = Preconditioner([s for s, wait in zip(self._sides, late, strict=True) if not wait])
                self._late = Preconditioner([s for s, wait in zip(self._sides, late, strict=True) if wait])
            self._options = options
        return [(damping, mode) for damping, mode, _ in options]

    def _scale_early(self, optimizer: Any) -> None:
        options = self._prepare(optimizer)
        _match_layout(optimizer)
        self._scale(self._early, options)

    def _scale(self, sides: Preconditioner, options: list[tuple[float, str]]) -> None:
        self._factors.gather()
        self._factors.gather_grads()
        sides.scale(options)
        self._factors.scatter_grads()

    def _two_passes(self, optimizer: Any) -> None:
        """The base's own step for everything but the late Bs, then for these alone."""
        step = type(optimizer).step
        step = step.__wrapped__ if getattr(step, "hooked", False) else step  # without hooks: they run once, outside
        self._scale_early(optimizer)
        late = {id(self._factors.parameter(side.param)) for side in self._late.sides}
        counts = _counts(optimizer)
        for second in (False, True):
            if second:
                self._scale(self._late, [(damping, mode) for damping, mode, _ in self._options])
            hidden = _hide(p for p in self._params if (id(p) in late) is not second)
            try:
                step(optimizer)
            finally:
                _restore(hidden)
            if not second and (index := _first_change(counts, optimizer)) is not None:
                _refuse_two_passes(optimizer, *index)


class _Bound:
    """A bound that groups ask for by an option: on each step (trust), or on the whole run (reach)."""

    def __init__(self, option: str):
        self.option = option
        self.bound: ProductBound | None = None
        self.names: list[str] = []  # of the pairs in it
        self.beside: list[int] = []  # how many of them stand on the layer of each, itself among them
        self._asked: list[float | None] = []  # the option of each group, when the bound was made
        self._kinds: list[tuple[int, ...]] = []  # the groups that ask for it, of each kind of pairs in the bound

    def values(self, optimizer: Any) -> list[float | None]:
        return [group.get(self.option) for group in optimizer.param_groups]

    def is_wanted(self, optimizer: Any) -> bool:
        if all(value is None for value in self.values(optimizer)):
            self.bound = None
            return False
        return True

    def is_current(self, optimizer: Any) -> bool:
        return self.bound is not None and self.values(optimizer) == self._asked and self.bound.current

    def set(
        self,
        optimizer: Any,
        bound: ProductBound,
        kinds: list[tuple[int, ...]],
        names: list[str],
        beside: list[int],
    ) -> None:
        self.bound, self._kinds, self.names, self.beside = bound, kinds, names, beside
        self._asked = self.values(optimizer)

    def limits(self, optimizer: Any) -> list[float | Tensor]:
        """The bound of each kind of pairs, now; that on a step is lowered as a schedule lowers the learning rate."""
        now = [
            value if value is None or self.option == "reach" else value * _progress(group)
            for value, group in zip(self.values(optimizer), optimizer.param_groups, strict=True)
        ]
        return [functools.reduce(_smaller, [now[i] for i in kind if now[i] is not None]) for kind in self._kinds]


def check_options(optimizer: Any, given: Mapping[str, Any] | None = None) -> None:
    """Check the options for LoRA pairs in every parameter group, or `given` where a group says nothing.

    Raises:
        InputError: The first that is out of bounds: where, what was got, what to do.
    """
    for index, group in enumerate(optimizer.param_groups):
        options = {**(given or {}), **group}
        where = group_label(optimizer, index)
        trust = options.get("trust")
        if trust is not None and not (is_number(trust) and trust > 0):
            raise InputError(f"{where}: trust must be a finite number above 0, or None; got {trust!r}. Try 0.01.")
        reach = options.get("reach")
        if reach is not None and not (is_number(reach) and reach > 0):
            raise InputError(f"{where}: reach must be a finite number above 0, or None; got {reach!r}. Try 0.02.")
        if reach is not None and trust is not None and trust > reach:
            raise InputError(
                f"{where}: reach, {reach:g}, bounds the whole run, and trust, {trust:g}, each of its steps, which must "
                "not be more. Leave trust out for a tenth of reach."
            )
        if "damping" not in options:
            continue
        check_not_negative(where, "damping", options["damping"], " Try 1e-6.")
        for name, choices in _CHOICES.items():
            if options[name] not in choices:
                raise InputError(f"{where}: {name} must be {' or '.join(map(repr, choices))}; got {options[name]!r}.")
        counter = next((name for name in _STEP_COUNTERS if name in options), None)
        if options["order"] == "sequential" and counter:
            _refuse_two_passes(optimizer, index, counter)


def _refuse_two_passes(optimizer: Any, group: int, counter: str) -> NoReturn:
    raise InputError(
        f"{group_label(optimizer, group)}: order 'sequential' steps the base optimizer twice, but this one counts its "
        f"steps in {counter!r} for the whole group. Use order='simultaneous'."
    )


def _counts(optimizer: Any) -> list[dict[str, Any]]:
    """The numbers in every parameter group."""
    return [{k: v for k, v in group.items() if isinstance(v, int | float)} for group in optimizer.param_groups]


def _first_change(counts: list[dict[str, Any]], optimizer: Any) -> tuple[int, str] | None:
    """(group, name) of the first number that is new or another; some bases begin to count within their first step."""
    pairs = enumerate(zip(counts, _counts(optimizer), strict=True))
    return next(((i, name) for i, (old, new) in pairs for name in new if new[name] != old.get(name)), None)


def _progress(group: Mapping[str, Any]) -> float | Tensor:
    """The share of the full learning rate that a schedule leaves now; torch's schedulers write the full one down."""
    lr, full = group.get("lr"), group.get("max_lr", group.get("initial_lr"))
    if full is None:
        return 1.0
    if isinstance(lr, Tensor) or isinstance(full, Tensor):
        return (torch.as_tensor(lr) / full).nan_to_num(1.0).clamp(max=1.0)
    return min(1.0, lr / full) if full > 0 else 1.0


def _smaller(a: Any, b: Any) -> Any:
    return torch.minimum(*map(torch.as_tensor, (a, b))) if isinstance(a, Tensor) or isinstance(b, Tensor) else min(a, b)


def _params(optimizer: Any) -> list[Tensor]:
    return [param for group in optimizer.param_groups for param in group["params"]]


def _match_layout(optimizer: Any) -> None:
    for group in optimizer.param_groups:
        if group.get("fused"):
            match_layout(group["params"])


def is_nested(optimizer: Any) -> bool:
    """Whether this hook runs for a step inside the optimizer's step: a subclass that calls super().step()."""
    depth, frame = 0, sys._getframe(1)
    while frame is not None:
        depth += frame.f_code is _HOOKED_STEP and frame.f_locals.get("self") is optimizer
        frame = frame.f_back
    return depth > 1


def with_closure(args: tuple, kwargs: dict[str, Any], closure: Callable[[], Any]) -> tuple[tuple, dict[str, Any]]:
    return ((args[0], closure, *args[2:]), kwargs) if len(args) > 1 else (args, {**kwargs, "closure": closure})


def _hide(params: Iterable[Tensor]) -> list[tuple[Tensor, Tensor]]:
    hidden = [(param, param.grad) for param in params if param.grad is not None]
    for param, _ in hidden:
        param.grad = None
    return hidden


def _restore(hidden: list[tuple[Tensor, Tensor]]) -> None:
    while hidden:
        param, grad = hidden.pop()
        param.grad = grad
