"""Scaled optimizers: any torch optimizer on Riemannian-preconditioned LoRA gradients.

Method: Riemannian-preconditioned LoRA ("scaled GD", "scaled AdamW").
Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024.
Options: `damping` is the paper's δ; `order="simultaneous"` is eq. 1, `order="sequential"` the authors' AdamW
(Algorithm 1: A first, then B with the new A); `damping_mode="relative"`, `trust` and `reach` are not in
the paper.

The raw gradient of each step is scaled, then the base optimizer runs on it. That happens in a step hook, so that
schedulers, GradScaler and accelerate see an ordinary optimizer and the scaling runs exactly once per step.
"""

import functools
from collections.abc import Iterable
from typing import Any, ClassVar, Literal

from torch import Tensor, nn
from torch.optim import LBFGS, SGD, AdamW, Optimizer

from equipoise.errors import InputError
from equipoise.optimizers.parts.fused_adamw import FusedAdamW
from equipoise.optimizers.parts.pair_optimizer import PairOptimizer, make_class, unpack
from equipoise.optimizers.sharpness import SharpOptimizer, compose

DampingMode = Literal["absolute", "relative"]
Order = Literal["simultaneous", "sequential"]

_OPTIONS: dict[str, Any] = {
    "damping": (float, 1e-6),
    "damping_mode": (DampingMode, "absolute"),
    "order": (Order, "simultaneous"),
    "trust": (float | None, None),
    "reach": (float | None, None),
}
_DOC = """{base} on Riemannian-preconditioned LoRA gradients.

Args:
    damping: Added to the diagonal of the r×r Gram matrix before it is inverted. (>= 0)
    damping_mode: "absolute": `damping` as it is. "relative": in units of tr(Gram)/r, free of the factors' scale.
    order: "simultaneous": both factors from the old ones (eq. 1). "sequential": A first, then B with the new A, at the
        price of a second pass of {base}; not for bases that count steps for a whole group (Prodigy, schedule-free).
    trust: Bound on how far a step moves an adapted weight, as a share of the frozen one's norm; None: a tenth of reach,
        or no bound. (> 0)
    reach: The same for the whole run, from where the adapter began; None: no bound. (> 0)

The other options are {base}'s.

Paper: Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024, eq. 1
"""


class Scaled(PairOptimizer):
    """What every scaled optimizer class adds to its base. Use `ScaledAdamW`, `ScaledGD`, `scaled` or `attach`."""

    _OPTIONS: ClassVar[dict[str, Any]] = {name: default for name, (_, default) in _OPTIONS.items()}


class ScaledAdamW(Scaled, FusedAdamW):
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
        trust: Bound on how far a step moves an adapted weight, as a share of the frozen one's norm: see `BoundedAdamW`;
            None: a tenth of reach, or no bound. (> 0)
        reach: The same for the whole run, from where the adapter began; None: no bound. (> 0)
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
        self._make_adamw(
            *unpack(params),
            {"damping": damping, "damping_mode": damping_mode, "order": order, "trust": trust, "reach": reach},
            lr=lr, betas=betas, eps=eps, weight_decay=weight_decay, amsgrad=amsgrad, maximize=maximize,
            foreach=foreach, capturable=capturable, differentiable=differentiable, fused=fused,
        )  # fmt: skip


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
        trust: Bound on how far a step moves an adapted weight, as a share of the frozen one's norm: see `BoundedAdamW`;
            None: a tenth of reach, or no bound. (> 0)
        reach: The same for the whole run, from where the adapter began; None: no bound. (> 0)
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
        trust: float | None = None,
        reach: float | None = None,
        momentum: float = 0.0,
        dampening: float = 0.0,
        weight_decay: float = 0.0,
        nesterov: bool = False,
        maximize: bool = False,
        foreach: bool | None = None,
        differentiable: bool = False,
        fused: bool | None = None,
    ) -> None:
        given, model = unpack(params)
        super().__init__(
            given, lr, momentum, dampening, weight_decay, nesterov,
            maximize=maximize, foreach=foreach, differentiable=differentiable, fused=fused,
        )  # fmt: skip
        options = {"damping": damping, "damping_mode": damping_mode, "order": order, "trust": trust, "reach": reach}
        self._work_on_pairs(options, model)


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
    if issubclass(base, SharpOptimizer):
        return compose(scaled, base)
    if issubclass(base, PairOptimizer):
        raise InputError(f"{base.__name__} is bounded already. Scale its base, and give that the option trust.")
    if issubclass(base, LBFGS):
        raise InputError(f"{base.__name__} builds a curvature estimate from true gradients, so they cannot be scaled.")
    if base in (AdamW, SGD):
        return ScaledAdamW if base is AdamW else ScaledGD
    return make_class(scaled, Scaled, base, _OPTIONS, _DOC.format(base=base.__name__))
