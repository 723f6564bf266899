"""Bounded optimizers: any torch optimizer whose step may move the product BA of a LoRA pair only so far.

Method: a trust region in the space of the adapted weights; derivation in parts/product_bound.py. Not from a paper.
Options: `trust` is τ of ‖s(BA − B₀A₀)‖_F ≤ τ‖W‖_F for each step from B₀A₀ at the full learning rate; a schedule lowers
both alike. `reach` is the same for the whole run, from B₀A₀ where the adapter began, whatever the schedule.
"""

import functools
from collections.abc import Iterable, Mapping
from typing import Any, ClassVar

from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from equipoise.errors import InputError
from equipoise.lora.pairs import PairReport, find_pairs
from equipoise.optimizers.parts.fused_adamw import FusedAdamW
from equipoise.optimizers.parts.outside import with_rate_outside
from equipoise.optimizers.parts.pair_optimizer import STEPS, PairOptimizer, make_class, unpack
from equipoise.optimizers.sharpness import SharpOptimizer, compose

# Where neither trust nor reach is given, n adapted layers share this: by benchmarks/keeping, where n is 6 to 120.
REACH, LEAST, MOST = 1.8, 0.02, 0.5
_OPTIONS: dict[str, Any] = {"trust": (float | None, None), "reach": (float | None, None)}

_DOC = """{base} with a bound on how far one step moves each LoRA-adapted weight.

Args:
    trust: Share of the frozen weight's norm by which one step may move the adapted weight; None: a tenth of reach.
        (> 0)
    reach: Share of the frozen weight's norm by which the whole run may move the adapted weight; None: 1.8/n
        for n adapted layers, at least 0.02 and at most 0.5, or no bound where trust is given. (> 0)

The other options are {base}'s.
"""


class Bounded(PairOptimizer):
    """What every bounded optimizer class adds to its base. Use `BoundedAdamW`, `bounded` or `attach`."""

    _OPTIONS: ClassVar[dict[str, Any]] = {"trust": None, "reach": None}

    def _work_on_pairs(
        self, options: Mapping[str, Any], model: nn.Module | None, found: PairReport | None = None
    ) -> None:
        if all(value is None for value in options.values()):
            found = find_pairs(self, model) if found is None else found
            reach = min(MOST, max(LEAST, REACH / max(1, len({id(pair.A) for pair in found}))))
            usual = {"trust": STEPS * reach, "reach": reach}
            for group in self.param_groups:
                group.update({} if usual.keys() & group.keys() else usual)
            super()._work_on_pairs(options, model)
            self.defaults.update(usual)
        else:
            super()._work_on_pairs(options, model)


class BoundedAdamW(Bounded, FusedAdamW):
    """AdamW with bounds on how far a step and the run move each LoRA-adapted weight; other parameters get plain AdamW.

    The update: AdamW's step (ΔA, ΔB), shrunk by the largest c ≤ 1 with s·‖(B + cΔB)(A + cΔA) − BA‖_F ≤ τ‖W‖_F for each
    pair A (r, n), B (m, r) on a frozen weight W (m, n) with scale s. τ is `trust`. Then, likewise, the way from where
    the run began, by `reach`. Steps within the bounds are AdamW's to the bit. Use it where the learning rate is
    uncertain: too large a rate then acts like a moderate one. It does nothing for a rate that is too small, and nothing
    for parameters outside LoRA pairs.

    Args:
        params: A model (its trainable parameters), named parameters, parameter groups, or an iterator of tensors.
        lr: Learning rate. None: 1 for LoRA factors, whose steps are bounded, and 0.001 for all else, in a group of its
            own. (>= 0)
        trust: Share of the frozen weight's norm by which one step may move the adapted weight. Smaller: safer at large
            rates, but a run of T steps cannot move further than T·trust. Where a scheduler lowers the learning rate,
            it holds times the share of the full rate that is left: else a rate that is bounded all along would end as
            restless as it began. None: a tenth of reach. (> 0)
        reach: Share of the frozen weight's norm by which the whole run may move the adapted weight from where the
            adapter began (BA = 0, or B₀A₀ of PiSSA and of adapters that are trained further), whatever the learning
            rate and the number of steps. Smaller keeps more of what the base knew; the factors' start is kept in the
            optimizer's state. None: 1.8/n for n adapted layers, at least 0.02 and at most 0.5, or no bound where trust
            is given. (> 0)
        betas: Decay of the running means of the gradient and of its square. (0 <= x < 1)
        eps: Added to the denominator. (>= 0)
        weight_decay: Decoupled weight decay. (>= 0)
        amsgrad: Divide by the largest second moment so far.
        maximize: Maximise the objective instead of minimising it.
        foreach: Use torch's multi-tensor implementation.
        capturable: Safe to capture in a CUDA graph.
        differentiable: Let autograd run through the step.
        fused: Use torch's fused kernel; left open, it is used wherever all parameters allow it, on the CPU too.

    Raises:
        InputError: An option is out of bounds, or a model has nothing to train.
        PairingError: At the first step, if LoRA factors cannot be paired with certainty, or the frozen weight under one
            cannot be found.

    Example:
        >>> layer = torch.nn.Linear(8, 8, bias=False).requires_grad_(False)
        >>> layer.lora_A = torch.nn.Linear(8, 2, bias=False)
        >>> layer.lora_B = torch.nn.Linear(2, 8, bias=False)
        >>> optimizer = BoundedAdamW(layer, lr=10.0, trust=0.01)
        >>> before = (layer.lora_B.weight @ layer.lora_A.weight).detach()
        >>> layer.lora_B(layer.lora_A(torch.ones(1, 8))).sum().backward()
        >>> optimizer.step()
        >>> moved = (layer.lora_B.weight @ layer.lora_A.weight).detach() - before
        >>> print(f"{moved.norm() / layer.weight.norm():.4f}")
        0.0100

    References:
        No paper: the derivation stands at the top of equipoise/optimizers/parts/product_bound.py.
        For the layer-wise ratio of which this is a relative: You et al., LAMB, arXiv 1904.00962, 2020, Algorithm 2
    """

    default_lr: ClassVar[float] = 1.0
    default_outside_lr: ClassVar[float] = 1e-3

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor | None = None,
        *,
        trust: float | None = None,
        reach: float | None = None,
        betas: tuple[float | Tensor, float | Tensor] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        amsgrad: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        capturable: bool = False,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        given, model = unpack(params)
        found = None
        if lr is None:
            found = find_pairs(given if model is None else model)
            given, lr = with_rate_outside(given, found, self.default_outside_lr), self.default_lr
        super().__init__(
            given, lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._work_on_pairs({"trust": trust, "reach": reach}, model, found)


@functools.cache
def bounded(base: type[Optimizer]) -> type[Optimizer]:
    """The bounded version of any torch optimizer class: `bounded(Base)(params, lr=…, trust=…, **base options)`.

    Raises:
        InputError: `base` is no optimizer class, or a scaled one, which has the option itself.
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise InputError(f"bounded() makes a class from a torch.optim.Optimizer class; got {base!r}. Pass the class.")
    if issubclass(base, Bounded):
        return base
    if issubclass(base, SharpOptimizer):
        return compose(bounded, base)
    if issubclass(base, PairOptimizer):
        raise InputError(f"{base.__name__} has the option trust itself. Set that.")
    if base is AdamW:
        return BoundedAdamW
    return make_class(bounded, Bounded, base, _OPTIONS, _DOC.format(base=base.__name__), Bounded._work_on_pairs)
