"""Scaled optimizers: any torch optimizer on Riemannian-preconditioned LoRA gradients.

Method: Riemannian-preconditioned LoRA ("scaled GD", "scaled AdamW").
Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024.
Options: `damping` is the paper's δ; `order="simultaneous"` is eq. 1, `order="sequential"` the authors' AdamW
(Algorithm 1: A first, then B with the new A); `damping_mode="relative"` is not in the paper.

The raw gradient of each step is scaled, then the base optimizer runs on it. That happens in a step hook, so that
schedulers, GradScaler and accelerate see an ordinary optimizer and the scaling runs exactly once per step.
"""

import functools
import inspect
from collections.abc import Iterable, Mapping
from typing import Any, Literal

from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from equipoise.errors import InputError
from equipoise.optimizers.step_hook import DEFAULTS, StepHook, check_options
from equipoise.pairs import PairReport

DampingMode = Literal["absolute", "relative"]
Order = Literal["simultaneous", "sequential"]

_OPTION_DOCS = """    damping: Added to the diagonal of the r×r Gram matrix before it is inverted. (>= 0)
    damping_mode: "absolute": `damping` as it is. "relative": in units of tr(Gram)/r, free of the factors' scale.
    order: "simultaneous": both factors from the old ones (eq. 1). "sequential": A first, then B with the new A, at the
        price of a second pass of {base}; not for bases that count steps for a whole group (Prodigy, schedule-free).
"""


class Scaled:
    """What every scaled optimizer class adds to its base. Use `ScaledAdamW`, `ScaledGD`, `scaled` or `attach`."""

    _hook: StepHook
    param_groups: list[dict[str, Any]]
    defaults: dict[str, Any]

    @property
    def pairs(self) -> PairReport:
        """The LoRA pairs that are scaled; looked up now if no step was taken yet."""
        return self._hook.look_up(self)

    @property
    def fallbacks(self) -> int:
        """How many gradients were left unscaled because a Gram matrix could not be inverted. Waits for the device."""
        return self._hook.failures

    def _scale_with(self, options: Mapping[str, Any], model: nn.Module | None) -> None:
        self.defaults.update(options)
        for group in self.param_groups:
            for name, value in options.items():
                group.setdefault(name, value)
        check_options(self)
        self._hook = StepHook(model)
        self._hook.register(self)

    def add_param_group(self, param_group: dict[str, Any]) -> None:
        super().add_param_group(param_group)  # type: ignore[misc]
        if "_hook" in self.__dict__:
            check_options(self)

    def __getstate__(self) -> dict[str, Any]:
        # A copy's tensors belong to no module, so what was found goes along (not into state_dict, which stays plain).
        return super().__getstate__() | {"_found": self._hook.found}  # type: ignore[misc]

    def __setstate__(self, state: dict[str, Any]) -> None:
        state = dict(state)
        found = state.pop("_found", None)
        super().__setstate__(state)  # type: ignore[misc]
        for group in self.param_groups:  # a state saved by the plain base lacks the options
            for name, value in DEFAULTS.items():
                group.setdefault(name, self.defaults.get(name, value))
        if "_hook" not in self.__dict__:  # copying and unpickling drop hooks
            self._hook = StepHook(None, found)
            self._hook.register(self)


class ScaledAdamW(Scaled, AdamW):
    """AdamW on Riemannian-preconditioned LoRA gradients; parameters outside LoRA pairs get plain AdamW.

    The update: dA ← (BᵀB + δI)⁻¹ dA and dB ← dB (AAᵀ + δI)⁻¹ for each pair A (r, n), B (m, r), then AdamW. δ is
    `damping`. Use it for LoRA fine-tuning where one learning rate has to serve both factors. It does nothing new where
    δ is far above the Gram matrices: Adam cancels a constant factor, so that is AdamW with eps·δ for eps.

    Args:
        params: A model (its trainable parameters), named parameters, parameter groups, or an iterator of tensors.
        lr: Learning rate. (>= 0)
        damping: Added to the diagonal of the r×r Gram matrix before it is inverted; larger is closer to AdamW. (>= 0)
        damping_mode: "absolute": `damping` as it is. "relative": in units of tr(Gram)/r, free of the factors' scale.
        order: "simultaneous": both factors from the old ones (eq. 1). "sequential": A first, then B with the new A
            (Algorithm 1), at the price of a second pass of AdamW.
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
        PairingError: At the first step, if LoRA factors cannot be paired with certainty.

    Example:
        >>> layer = torch.nn.ModuleDict({"lora_A": torch.nn.Linear(8, 2), "lora_B": torch.nn.Linear(2, 8)})
        >>> optimizer = ScaledAdamW(layer, lr=1e-3, damping=1e-2)
        >>> layer["lora_B"](layer["lora_A"](torch.ones(1, 8))).sum().backward()
        >>> optimizer.step()
        >>> print(optimizer.pairs.summary)
        1 LoRA pair of rank 2, found by modules.

    Paper: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024, eq. 1, Algorithm 1
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-4,
        *,
        damping: float = 1e-6,
        damping_mode: DampingMode = "absolute",
        order: Order = "simultaneous",
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
        given, model = _unpack(params)
        ours = foreach is None and fused is None and not differentiable and _can_fuse(given)
        super().__init__(
            given, lr, betas, eps, weight_decay, amsgrad,
            maximize=maximize, foreach=foreach, capturable=capturable, differentiable=differentiable,
            fused=True if ours else fused,
        )  # fmt: skip
        self._scale_with({"damping": damping, "damping_mode": damping_mode, "order": order}, model)


class ScaledGD(Scaled, SGD):
    """Gradient descent on Riemannian-preconditioned LoRA gradients; other parameters get plain SGD.

    The update: A ← A − lr·(BᵀB + δI)⁻¹ dA and B ← B − lr·dB (AAᵀ + δI)⁻¹ for each pair A (r, n), B (m, r). δ is
    `damping`. On a quadratic loss the step no longer depends on how the product is split between the two factors.

    Args:
        params: A model (its trainable parameters), named parameters, parameter groups, or an iterator of tensors.
        lr: Learning rate. (>= 0)
        damping: Added to the diagonal of the r×r Gram matrix before it is inverted. (>= 0)
        damping_mode: "absolute": `damping` as it is. "relative": in units of tr(Gram)/r, free of the factors' scale.
        order: "simultaneous": both factors from the old ones (eq. 1). "sequential": A first, then B with the new A.
        momentum: Momentum on the scaled gradient. (>= 0)
        dampening: Dampening of the momentum.
        weight_decay: L2 penalty, added to the scaled gradient. (>= 0)
        nesterov: Use Nesterov momentum.
        maximize: Maximise the objective instead of minimising it.
        foreach: Use torch's multi-tensor implementation.
        differentiable: Let autograd run through the step.
        fused: Use torch's fused kernel.

    Raises:
        InputError: An option is out of bounds, or a model has nothing to train.
        PairingError: At the first step, if LoRA factors cannot be paired with certainty.

    Paper: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024, eq. 1
    """

    def __init__(
        self,
        params: nn.Module | Iterable[Any],
        lr: float | Tensor = 1e-2,
        *,
        damping: float = 1e-6,
        damping_mode: DampingMode = "absolute",
        order: Order = "simultaneous",
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        given, model = _unpack(params)
        super().__init__(
            given, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        self._scale_with({"damping": damping, "damping_mode": damping_mode, "order": order}, model)


@functools.cache
def scaled(base: type[Optimizer]) -> type[Optimizer]:
    """The scaled version of any torch optimizer class: `scaled(Base)(params, lr=…, damping=…, **base options)`.

    Raises:
        InputError: `base` is no optimizer class, or one that needs the true gradient (LBFGS).
    """
    if not (isinstance(base, type) and issubclass(base, Optimizer)):
        raise InputError(f"scaled() makes a class from a torch.optim.Optimizer class; got {base!r}. Pass the class.")
    if issubclass(base, Scaled):
        return base
    if issubclass(base, LBFGS):
        raise InputError(f"{base.__name__} builds a curvature estimate from true gradients, so they cannot be scaled.")
    if base in (AdamW, SGD):
        return ScaledAdamW if base is AdamW else ScaledGD

    def __init__(self, params, *args, damping=1e-6, damping_mode="absolute", order="simultaneous", **options):
        given, model = _unpack(params)
        base.__init__(self, given, *args, **options)
        self._scale_with({"damping": damping, "damping_mode": damping_mode, "order": order}, model)

    def __reduce_ex__(self, protocol):
        return _blank, (base,), self.__getstate__()

    __init__.__signature__ = _signature(base)  # type: ignore[attr-defined]
    doc = (
        f"{base.__name__} on Riemannian-preconditioned LoRA gradients.\n\nArgs:\n"
        f"{_OPTION_DOCS.format(base=base.__name__)}"
        f"\nThe other options are {base.__name__}'s.\n\n"
        "Paper: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024, eq. 1\n"
    )
    body = {"__init__": __init__, "__reduce_ex__": __reduce_ex__, "__doc__": doc, "__module__": __name__}
    return type(f"Scaled{base.__name__}", (Scaled, base), body)


def attach(
    optimizer: Optimizer,
    model: nn.Module | None = None,
    *,
    damping: float = 1e-6,
    damping_mode: DampingMode = "absolute",
    order: Order = "simultaneous",
) -> Optimizer:
    """Make an optimizer that exists already a scaled one, in place; its state, groups and schedulers stay.

    The object's class becomes `scaled(its class)`. Options that a parameter group already has win over the arguments.

    Args:
        optimizer: The optimizer, or accelerate's wrapper around it.
        model: Where to look for the LoRA pairs. Without it, the modules that own the optimizer's tensors are searched.
        damping: As in `ScaledAdamW`. (>= 0)
        damping_mode: As in `ScaledAdamW`.
        order: As in `ScaledAdamW`.

    Returns:
        The same object.

    Raises:
        InputError: It is scaled already, is no optimizer, or an option is out of bounds.
    """
    inner: Any = optimizer
    while not hasattr(inner, "_optimizer_step_pre_hooks") and isinstance(getattr(inner, "optimizer", None), Optimizer):
        inner = inner.optimizer  # accelerate's wrapper
    if isinstance(inner, Scaled):
        raise InputError(f"This {type(inner).__name__} is scaled already; change the damping in its param_groups.")
    cls = scaled(type(inner))
    options = {"damping": damping, "damping_mode": damping_mode, "order": order}
    check_options(inner, options)
    inner.__class__ = cls
    inner._scale_with(options, model)
    return optimizer


def _blank(base: type[Optimizer]) -> Optimizer:
    cls = scaled(base)
    return cls.__new__(cls)


def _signature(base: type[Optimizer]) -> inspect.Signature:
    """base's signature with the three options of scaling as keywords."""
    given = list(inspect.signature(base.__init__).parameters.values())
    keyword, rest = inspect.Parameter.KEYWORD_ONLY, inspect.Parameter.VAR_KEYWORD
    types = {"damping": float, "damping_mode": DampingMode, "order": Order}
    ours = [inspect.Parameter(name, keyword, default=DEFAULTS[name], annotation=kind) for name, kind in types.items()]
    last = [parameter for parameter in given if parameter.kind is rest]
    return inspect.Signature([p for p in given if p.kind is not rest] + ours + last)


def _unpack(params: nn.Module | Iterable[Any]) -> tuple[Any, nn.Module | None]:
    """The parameters as torch takes them, and the model if that is what was given."""
    if not isinstance(params, nn.Module):
        return (params if isinstance(params, Tensor) else list(params)), None
    named = [(name, param) for name, param in params.named_parameters() if param.requires_grad]
    if not named:
        raise InputError(
            f"The model ({type(params).__name__}) has no trainable parameter. Add a LoRA adapter, or call "
            "requires_grad_(True) on what is to learn."
        )
    return named, params


def _can_fuse(params: Any) -> bool:
    """Whether torch's fused kernel takes all of them. On the CPU it walks memory linearly and would overwrite gaps."""
    tensors: list[Any] = []
    for item in [params] if isinstance(params, Tensor) else params:
        entries = item["params"] if isinstance(item, Mapping) else [item]
        tensors += [entries] if isinstance(entries, Tensor) else list(entries)
    tensors = [entry[1] if isinstance(entry, tuple) else entry for entry in tensors]
    return all(t.is_floating_point() and t.device.type in ("cpu", "cuda") and t.is_contiguous() for t in tensors)
