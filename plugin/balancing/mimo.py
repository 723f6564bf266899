"""MIMO: the joint loss, and a smooth maximum of the unimodal ones that holds the worst modality to its best.

Method: MML-via-MOO (MIMO).
Paper: Fernando, Ram, Zhou, Dan, Samulowitz, Baracaldo & Chen, Mitigating Modality Imbalance in Multi-modal Learning via
Multi-objective Optimization, 2025.
Options: `lam` and `mu` are λ and μ of eq. 13, `preset` a column of Table 9, `f_star` the f* of eq. 8;
`overflow="doubling"` is the paper's rule for large losses (Appendix F), `overflow="logsumexp"` needs none.
"""

import math
from collections.abc import Mapping
from typing import Any, ClassVar, Literal

import torch
from torch import Tensor

from equipoise.balancing.objective import Backward, Losses, Objective, differentiate
from equipoise.errors import InputError

PRESETS = {  # Table 9: λ, μ
    "crema_d": (100.0, 0.01),
    "ur_funny": (10.0, 1.0),
    "kinetics_sounds": (10.0, 0.01),
    "vggsound": (10.0, 0.01),
    "av_mnist": (10.0, 0.1),
    "cmu_mosei": (100.0, 0.001),
    "ave": (100.0, 0.01),
}
HELD, IDLE, BETTER = 0.9, 3, 0.99  # share of λ; validations; times the best loss: what is less is better
Preset = Literal["crema_d", "ur_funny", "kinetics_sounds", "vggsound", "av_mnist", "cmu_mosei", "ave"]


class MIMO(Objective):
    """Trains on the joint loss and on a smooth maximum of the unimodal losses (MIMO).

    Minimizes f_mm + λ·μ·log Σ_k exp((f_mk − f*_k)/μ) in one backward pass: the unimodal loss of modality k is weighted
    by λ·softmax((f_m − f*)/μ)_k, so that nearly all of λ goes to the modality that lags behind. λ is `lam`, μ is `mu`.
    Use it where a model of several modalities learns one and neglects the others. A large μ weights all modalities
    alike, as `equal_weight` does; a λ of 0 is `joint`. The encoders' gradients grow with λ: a learning rate that suited
    `joint` may be too high.

    Args:
        lam: Weight of the worst modality against the joint loss, λ; none: the preset's. (>= 0)
        mu: Smoothing, in units of the loss, μ: small is close to the maximum; none: the preset's. (> 0)
        preset: λ and μ of the paper's Table 9 for a data set of this name: 10 and 0.1 for av_mnist, 10 and 0.01 for
            kinetics_sounds and vggsound, 100 and 0.01 for crema_d and ave, 10 and 1 for ur_funny, 100 and 0.001 for
            cmu_mosei.
        f_star: Modality → the best unimodal loss to hold it to, f*, as {audio: 0.3}; none: 0 for all, as in the paper's
            update, where a modality that says nothing about the classes takes nearly all of λ for good. "auto": the
            validation loss that each reaches by itself, in a training before this one of as many steps at most, which
            ends where none gets better.
        overflow: "logsumexp": computed so that it cannot overflow, at the nominal μ. "doubling": μ is doubled, from the
            nominal one again in each step, until the exponentials fit the data type, as in the paper.

    Raises:
        InputError: An option is not what it must be; once the modalities are known, f_star names none of them; or it
            is "auto" and nothing has trained them.

    Example:
        >>> losses = Losses(torch.tensor(1.0), {"audio": torch.tensor(0.5), "visual": torch.tensor(2.0)})
        >>> MIMO(lam=10, mu=0.1).combine(losses)
        tensor(21.)

    References:
        Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization, eq. 13
        and 14, Algorithm 1, Table 9.
    """

    modalities: ClassVar[tuple[int, float]] = (1, math.inf)
    alone_option: ClassVar[str] = "f_star"

    def __init__(
        self,
        lam: float | None = None,
        mu: float | None = None,
        preset: Preset = "av_mnist",
        f_star: dict[str, float] | Literal["auto"] | None = None,
        overflow: Literal["logsumexp", "doubling"] = "logsumexp",
    ) -> None:
        if isinstance(f_star, dict) and not all(
            isinstance(value, int | float) and math.isfinite(value) for value in f_star.values()
        ):
            raise InputError(f"f_star: must give a number for each modality, as {{audio: 0.3}}, got {f_star!r}.")
        usual = PRESETS.get(preset, (0.0, 1.0))  # another name is refused once this is done
        self.lam = usual[0] if lam is None else lam
        self.mu = usual[1] if mu is None else mu
        self.f_star: dict[str, float] = f_star if isinstance(f_star, dict) else {}
        self.needs_alone, self.overflow = f_star == "auto", overflow
        self._held: Mapping[str, Tensor] = {}  # each modality's share of λ, summed since the last validation
        self._best: dict[str, float] = {}  # validation losses
        self._idle: dict[str, int] = {}  # validations in a row in which a modality held λ and got no better

    def bind(self, encoders) -> None:
        super().bind(encoders)
        if unknown := [name for name in self.f_star if name not in encoders]:
            raise InputError(f"f_star: {', '.join(unknown)} is no modality here; there are {', '.join(encoders)}.")

    def take_alone(self, reached) -> str:
        self._hold({name: found.validation_best for name, found in reached.items()})
        return ""

    def _hold(self, best: Mapping[str, float]) -> None:
        self.f_star, self.needs_alone = dict(best), False

    def after_validation(self, losses) -> str:
        total = sum((float(share) for share in self._held.values()), 0.0)
        shares = {name: float(share) / total for name, share in self._held.items()} if total else {}
        self._held, found = {}, []
        for name, loss in losses.items():
            better = loss < BETTER * self._best.get(name, math.inf)
            self._best[name] = loss if better else self._best.get(name, loss)
            idle = 0 if better or shares.get(name, 0.0) < HELD else self._idle.get(name, 0) + 1
            self._idle[name] = idle
            if idle == IDLE:
                found.append(
                    f"{name} holds {shares[name]:.0%} of lam, and its validation loss has hardly fallen in {IDLE} "
                    "validations: it may say nothing about the classes, or be fitted too closely. f_star=auto holds "
                    "each modality to what it reaches by itself; data.modalities leaves one out."
                )
        return " ".join(found)

    def state_dict(self) -> dict[str, Any]:
        held = {name: float(share) for name, share in self._held.items()}
        return {"f_star": self.f_star, "held": held, "best": self._best, "idle": self._idle}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        if not state:  # of an earlier version, which had none
            return
        self._held = {name: torch.tensor(share) for name, share in state["held"].items()}
        self._best, self._idle = dict(state["best"]), dict(state["idle"])
        if self.needs_alone:
            self._hold(state["f_star"])

    def combine(self, losses: Losses) -> Tensor:
        """f̂_mm of eq. 13."""
        return self._combined(losses)[0]

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        total, heights, mu = self._combined(losses)
        backward(total)
        shares = torch.softmax(heights.detach(), 0)
        weights = self.lam * shares
        self._held = {
            name: self._held.get(name, 0.0) + share
            for name, share in zip(losses.unimodal, shares.unbind(), strict=True)
        }
        logged: dict[str, float | Tensor] = {"loss": total.detach()}
        logged |= {f"weight_{name}": weight for name, weight in zip(losses.unimodal, weights.unbind(), strict=True)}
        return logged | ({"mu": mu} if self.overflow == "doubling" else {})

    def _combined(self, losses: Losses) -> tuple[Tensor, Tensor, float | Tensor]:
        """f̂_mm; (modalities,) the exponents; and the μ that they are divided by."""
        best = self.f_star
        if self.needs_alone:
            raise InputError(
                "f_star: auto needs a training that first trains each modality by itself, as audio-visual "
                "classification does. Give numbers, as {audio: 0.3}, or call take_alone()."
            )
        gaps = torch.stack([loss - best[name] if name in best else loss for name, loss in losses.unimodal.items()])
        mu = self._doubled(gaps.detach()) if self.overflow == "doubling" else self.mu
        heights = gaps / mu
        largest = heights.exp().sum().log() if self.overflow == "doubling" else torch.logsumexp(heights, 0)
        return losses.joint + self.lam * mu * largest, heights, mu

    def _doubled(self, gaps: Tensor) -> Tensor:
        """μ·2ⁿ with the least n for which no exponential, nor their sum, overflows, and not all of them vanish, as they
        would for losses below f*: without asking the device."""
        kind = torch.finfo(gaps.dtype)
        largest, least = math.log(kind.max / len(gaps)), math.log(kind.tiny)
        top = gaps.max()
        times = (torch.maximum(top / largest, top / least) / self.mu).clamp(min=1).log2().ceil()
        return self.mu * 2**times
