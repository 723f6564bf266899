"""Sharpness-aware optimizers: any torch optimizer, stepping with the gradient at the worst nearby point.

Methods: SAM, Foret et al., Sharpness-Aware Minimization, arXiv 2010.01412, 2021, Algorithm 1; AdaSAM, Sun et al., arXiv
2303.00565, 2023, Algorithm 1, which is SAM over a literal AMSGrad (amsgrad.py).
Options: `rho` is ρ; `adaptive` is ASAM, Kwon et al., arXiv 2102.11600, 2021, with T = |w|; `every` is in no paper.
What a step does stands in parts/sharp_optimizer.py.
"""

import functools
import inspect
from collections.abc import Callable, Iterable
from typing import Any

from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Optimizer, SparseAdam

from equipoise.errors import InputError
from equipoise.optimizers.amsgrad import AMSGrad
from equipoise.optimizers.parts.pair_optimizer import make_class, unpack, unwrap
from equipoise.optimizers.parts.sharp_optimizer import OPTIONS, SharpOptimizer, check_sharpness

_DOC = """{base} with the gradient at the worst nearby point: two evaluations of each batch per step.

Args:
    rho: How far that point is, in the norm over all parameters; may differ between groups. 0: {base} alone. (>= 0)
    adaptive: Measure the distance of each weight in units of its size (ASAM); a weight of 0 then stays in place.
    every: Look for that point only at each so-many-th step; the others are {base}'s own. (>= 1)

The other options are {base}'s. `step` needs a closure, or `perturb()` and `restore()` before it.

References:
    Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412, 2021, Algorithm 1
    `adaptive`: ASAM, arXiv 2102.11600, 2021
"""


class AdaSAM(SharpOptimizer, AMSGrad):
    """AMSGrad with the gradient at the worst nearby point: two evaluations of each batch per step.

    The update: s at x and g at x + ρ·s/‖s‖ on the same batch, m ← β₁m + (1 − β₁)g, v ← β₂v + (1 − β₂)g²,
    v̂ ← max(v̂, v) from v̂ = ε², x ← x − lr·m/√v̂, with no bias correction and nothing added to √v̂. ρ is `rho`, ε `eps`.
    Without the correction the first steps are long: (1 − β₁)/√(1 − β₂), about 3·lr at the default `betas`.
    `SharpnessAware(torch.optim.AdamW)(…, amsgrad=True)` is the same method with torch's corrections. A step costs twice
    as much; do not use it where a batch cannot be evaluated again. Train in float32 where you can: in float16 and
    bfloat16 ρ rounds away, and so do v and v̂, as `AMSGrad` says.

    Args:
        params: A model (its trainable parameters), named parameters, parameter groups, or an iterator of tensors.
        lr: Learning rate. (>= 0)
        rho: How far the worst nearby point is, in the norm over all parameters; may differ between groups. (>= 0)
        adaptive: Measure the distance of each weight in units of its size (ASAM); a weight of 0 then stays in place.
        every: Look for that point only at each so-many-th step; the others are AMSGrad's own. (>= 1)
        betas: Decay of the running means of the gradient and of its square; the paper tries 0.9 and 0. A second
            one of 1 leaves √v̂ at eps: SAM with a rate of lr/eps (Remark 1). (0 <= x <= 1)
        eps: Where √v̂ starts, and so its least value. (> 0)
        weight_decay: Decoupled weight decay; the paper has none. (>= 0)
        penalty: λ of eq. 3, for λ‖x‖² beside the worst loss nearby: 2λx at x is added to g, and not to s. (>= 0)
        maximize: Maximise the objective instead of minimising it.

    Raises:
        InputError: An option is out of bounds, a model has nothing to train, or `step` has nothing to evaluate again.

    Example:
        >>> import torch
        >>> weight = torch.nn.Parameter(torch.tensor([3.0, -4.0]))
        >>> optimizer = AdaSAM([weight], lr=0.1, rho=0.5)
        >>> def closure():
        ...     optimizer.zero_grad()
        ...     loss = weight.square().sum()
        ...     loss.backward()
        ...     return loss
        >>> print(optimizer.step(closure).item())
        25.0
        >>> print((weight.grad / 2).tolist())  # the gradient at the point 0.5 further out
        [3.299999952316284, -4.400000095367432]

    References:
        AdaSAM: Boosting Sharpness-Aware Minimization with Adaptive Learning Rate and Momentum for Training Deep Neural
        Networks, arXiv 2303.00565, 2023, Algorithm 1
        `adaptive`: ASAM, arXiv 2102.11600, 2021
    """

    _BASE = AMSGrad

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-3,
        *,
        rho: float = 0.005,
        adaptive: bool = False,
        every: int = 1,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
        penalty: float = 0.0,
        maximize: bool = False,
    ) -> None:
        given, _ = unpack(params)
        super().__init__(given, lr, betas=betas, eps=eps, weight_decay=weight_decay, penalty=penalty, maximize=maximize)
        self._sharpen({"rho": rho, "adaptive": adaptive, "every": every})


class SAM(SharpOptimizer, SGD):
    """SGD with the gradient at the worst nearby point: two evaluations of each batch per step.

    The update: s at x and g at x + ρ·s/‖s‖ on the same batch, then SGD's step with g. ρ is `rho`. A step costs
    twice as much; do not use it where a batch cannot be evaluated again.

    Args:
        params: A model (its trainable parameters), named parameters, parameter groups, or an iterator of tensors.
        lr: Learning rate. (>= 0)
        rho: How far the worst nearby point is, in the norm over all parameters; may differ between groups. (>= 0)
        adaptive: Measure the distance of each weight in units of its size (ASAM); a weight of 0 then stays in place.
        every: Look for that point only at each so-many-th step; the others are SGD's own. (>= 1)
        momentum: Momentum on the gradient. (>= 0)
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty, added to the gradient. (>= 0)
        nesterov: Use Nesterov momentum.
        maximize: Maximise the objective instead of minimising it.
        foreach: Use torch's multi-tensor implementation.
        differentiable: Let autograd run through the step.
        fused: Use torch's fused kernel.

    Raises:
        InputError: An option is out of bounds, a model has nothing to train, or `step` has nothing to evaluate again.

    References:
        Sharpness-Aware Minimization for Efficiently Improving Generalization, arXiv 2010.01412, 2021, Algorithm 1
        `adaptive`: ASAM, arXiv 2102.11600, 2021
    """

    _BASE = SGD

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        rho: float = 0.05,
        adaptive: bool = False,
        every: int = 1,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        given, _ = unpack(params)
        super().__init__(
            given, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._sharpen({"rho": rho, "adaptive": adaptive, "every": every})


def SharpnessAware(base: Any, **options: Any) -> Any:
    """The sharpness-aware version of any torch optimizer: of a class a class, of an object the same object, in place.

    `SharpnessAware(Base)(params, lr=…, rho=…, adaptive=…, every=…, **base options)`, or
    `SharpnessAware(optimizer, rho=…, adaptive=…, every=…)` for an optimizer that exists already or accelerate's wrapper
    around it; its state, groups and schedulers stay, and options that a parameter group already has win.

    Raises:
        InputError: `base` is no optimizer, is one already, needs another kind of evaluation (LBFGS, SparseAdam) or has
            an option of the same name; or an option is unknown or out of bounds.
    """
    if isinstance(base, type):
        if options:
            raise InputError(
                f"SharpnessAware({base.__name__}) makes a class; give {', '.join(options)} to that: "
                f"SharpnessAware({base.__name__})(params, {next(iter(options))}=…)."
            )
        return _make(base)
    inner = unwrap(base)
    cls = _make(type(inner))
    if unknown := [name for name in options if name not in OPTIONS]:
        raise InputError(f"SharpnessAware() has no option {unknown[0]!r}. It has {', '.join(OPTIONS)}.")
    options = _defaults(type(inner)) | options
    check_sharpness(inner, options)
    try:
        inner.__class__ = cls
    except TypeError as error:
        name = type(inner).__name__
        raise InputError(f"This {name} cannot change its class; construct SharpnessAware({name}) instead.") from error
    inner._sharpen(options)
    return base


def compose(outer: Callable[[type], type], base: type) -> type:
    """`outer(base)` of a sharpness-aware base, which is the sharpness-aware `outer` of its base.

    Raises:
        InputError: `base` is a class derived from such a one, whose own additions would be lost.
    """
    if "_BASE" not in vars(base):
        raise InputError(
            f"{base.__name__} is derived from a sharpness-aware class. Derive it from {outer.__name__} of it."
        )
    return _make(outer(base._BASE))  # type: ignore[attr-defined]


@functools.cache
def _make(base: type) -> type[Optimizer]:
    if not issubclass(base, Optimizer):
        raise InputError(f"SharpnessAware() takes a torch.optim.Optimizer or a class of them; got {base.__name__}.")
    if issubclass(base, SharpOptimizer):
        raise InputError(f"{base.__name__} is sharpness-aware already. Set its rho, or take its base.")
    if issubclass(base, LBFGS | SparseAdam):
        what = (
            "evaluates batches as it needs them itself" if issubclass(base, LBFGS) else "takes sparse gradients alone"
        )
        raise InputError(f"{base.__name__} {what}, so it cannot be made sharpness-aware. Use another base.")
    if taken := [name for name in OPTIONS if name in inspect.signature(base.__init__).parameters]:
        raise InputError(f"{base.__name__} has an option {taken[0]} of its own, of another meaning. Use another base.")
    if base in (AMSGrad, SGD):
        return AdaSAM if base is AMSGrad else SAM
    options = {name: (kind, _defaults(base)[name]) for name, (kind, _) in OPTIONS.items()}
    doc = _DOC.format(base=base.__name__)
    cls = make_class(SharpnessAware, SharpOptimizer, base, options, doc, SharpOptimizer._sharpen)
    cls._BASE = base  # type: ignore[attr-defined]
    return cls


def _defaults(base: type) -> dict[str, Any]:
    return {name: value for name, (_, value) in OPTIONS.items()} | ({"rho": 0.005} if issubclass(base, AMSGrad) else {})
