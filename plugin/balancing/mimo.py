"""MIMO: the joint loss, and a smooth maximum of the unimodal ones that holds the worst modality to its best.

Method: MML-via-MOO (MIMO).
Paper: Fernando, Ram, Zhou, Dan, Samulowitz, Baracaldo & Chen, Mitigating Modality Imbalance in Multi-modal Learning via
Multi-objective Optimization, 2025.
Options: `lam` and `mu` are λ and μ of eq. 13, `preset` a column of Table 9, `f_star` the f* of eq. 8;
`overflow="doubling"` is the paper's rule for large losses (Appendix F), `overflow="logsumexp"` needs none.
"""

import math
from typing import ClassVar, Literal

import torch
from torch import Tensor

from equipoise.balancing.objective import Backward, Losses, Objective, differentiate
from equipoise.errors import InputError
from equipoise.options import read_options

PRESETS = {  # Table 9: λ, μ
    "crema_d": (100.0, 0.01),
    "ur_funny": (10.0, 1.0),
    "kinetics_sounds": (10.0, 0.01),
    "vggsound": (10.0, 0.01),
    "av_mnist": (10.0, 0.1),
    "cmu_mosei": (100.0, 0.001),
    "ave": (100.0, 0.01),
}
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
            update.
        overflow: "logsumexp": computed so that it cannot overflow, at the nominal μ. "doubling": μ is doubled, from the
            nominal one again in each step, until the exponentials fit the data type, as in the paper.

    Raises:
        InputError: An option is not what it must be; or, once the modalities are known, f_star names none of them.

    Example:
        >>> losses = Losses(torch.tensor(1.0), {"audio": torch.tensor(0.5), "visual": torch.tensor(2.0)})
        >>> MIMO(lam=10, mu=0.1).combine(losses)
        tensor(21.)

    References:
        Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization, eq. 13
        and 14, Algorithm 1, Table 9.
    """

    modalities: ClassVar[tuple[int, float]] = (1, math.inf)

    def __init__(
        self,
        lam: float | None = None,
        mu: float | None = None,
        preset: Preset = "av_mnist",
        f_star: dict[str, float] | None = None,
        overflow: Literal["logsumexp", "doubling"] = "logsumexp",
    ) -> None:
        given, problems = read_options(MIMO, {"lam": lam, "mu": mu, "preset": preset, "overflow": overflow})
        if problems:
            raise InputError("\n".join(problems))
        lam, mu = given["lam"], given["mu"]
        usual = PRESETS[preset]
        self.lam = usual[0] if lam is None else lam
        self.mu = usual[1] if mu is None else mu
        self.f_star, self.overflow = f_star or {}, overflow

    def bind(self, encoders) -> None:
        super().bind(encoders)
        if not isinstance(self.f_star, dict):
            raise InputError(f"f_star: must give a number for each modality, as {{audio: 0.3}}, got {self.f_star!r}.")
        if unknown := [name for name in self.f_star if name not in encoders]:
            raise InputError(f"f_star: {', '.join(unknown)} is no modality here; there are {', '.join(encoders)}.")
        if not all(isinstance(value, int | float) and math.isfinite(value) for value in self.f_star.values()):
            raise InputError(f"f_star: must give a number for each modality, got {self.f_star}.")

    def combine(self, losses: Losses) -> Tensor:
        """f̂_mm of eq. 13."""
        return self._combined(losses)[0]

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        total, heights, mu = self._combined(losses)
        backward(total)
        weights = self.lam * torch.softmax(heights.detach(), 0)
        logged: dict[str, float | Tensor] = {"loss": total.detach()}
        logged |= {f"weight_{name}": weight for name, weight in zip(losses.unimodal, weights.unbind(), strict=True)}
        return logged | ({"mu": mu} if self.overflow == "doubling" else {})

    def _combined(self, losses: Losses) -> tuple[Tensor, Tensor, float | Tensor]:
        """f̂_mm; (modalities,) the exponents; and the μ that they are divided by."""
        best = self.f_star
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
