"""Slow twins of the optimizers, written as the papers write them; the tests hold the fast ones against these.

Papers: Zhang & Pilanci, Riemannian Preconditioned LoRA, arXiv 2402.02347, 2024, eq. 1 (scaled GD) and Algorithm 1; Sun
et al., AdaSAM, arXiv 2303.00565, 2023, Algorithm 1, with the distance of ASAM, Kwon et al., arXiv 2102.11600, 2021.
"""

from collections.abc import Callable, Sequence

import torch
from torch import Tensor


class ReferenceScaled:
    """Scaled GD (`betas=None`) or scaled AdamW, one pair and one tensor at a time.

    Args:
        pairs: (A, B) of shapes (r, n) and (m, r), with gradients.
        damping: δ; with `relative`, in units of tr(G)/r.
        sequential: A first, then B with the new A (Algorithm 1), instead of both from the old factors (eq. 1).
        betas: Adam's decay rates, or None for plain gradient descent.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        lr: float,
        *,
        damping: float = 1e-6,
        relative: bool = False,
        sequential: bool = False,
        betas: tuple[float, float] | None = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 0.0,
    ):
        self.pairs, self.lr, self.damping, self.relative, self.sequential = pairs, lr, damping, relative, sequential
        self.betas, self.eps, self.weight_decay = betas, eps, weight_decay
        self.moments = {factor: (torch.zeros_like(factor), torch.zeros_like(factor)) for p in pairs for factor in p}
        self.t = 0

    @torch.no_grad()
    def step(self) -> None:
        self.t += 1
        for A, B in self.pairs:
            assert A.grad is not None and B.grad is not None
            old_A = A.clone()
            self._update(A, self._inverse(B.T @ B) @ A.grad)
            self._update(B, B.grad @ self._inverse(A @ A.T if self.sequential else old_A @ old_A.T))

    def _inverse(self, gram: Tensor) -> Tensor:  # (r, r)
        rank = gram.shape[0]
        if self.relative and not gram.any():
            return torch.eye(rank, dtype=gram.dtype)
        damping = self.damping * gram.trace() / rank if self.relative else self.damping
        return torch.linalg.inv(gram + damping * torch.eye(rank, dtype=gram.dtype))

    def _update(self, factor: Tensor, grad: Tensor) -> None:
        factor.mul_(1 - self.lr * self.weight_decay)
        if self.betas is None:
            factor.sub_(self.lr * grad)
            return
        (beta1, beta2), (m, v) = self.betas, self.moments[factor]
        m.copy_(beta1 * m + (1 - beta1) * grad)
        v.copy_(beta2 * v + (1 - beta2) * grad**2)
        m_hat, v_hat = m / (1 - beta1**self.t), v / (1 - beta2**self.t)
        factor.sub_(self.lr * m_hat / (v_hat.sqrt() + self.eps))


def reference_share(
    A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, limit: float, intervals: int = 100_000
) -> float:  # c, to 1/intervals
    """The c of `parts/product_bound.py` by walking up from 0 until ‖(B + c·dB)(A + c·dA) − BA‖_F leaves the limit."""
    P, Q = B @ dA + dB @ A, dB @ dA
    PP, PQ, QQ = (P * P).sum(), (P * Q).sum(), (Q * Q).sum()
    c = torch.linspace(0, 1, intervals + 1, dtype=A.dtype)
    outside = c * c * (PP + c * (2 * PQ + c * QQ)) > limit**2
    return float(c[max(int(outside.to(torch.uint8).argmax()) - 1, 0)]) if outside.any() else 1.0


class ReferenceAdaSAM:
    """AdaSAM on one flat vector, line by line.

    Args:
        x: The parameters, (n,); replaced by each step.
        adaptive: ASAM: δ = ρ·w²⊙s/‖w⊙s‖.
        penalty: λ of eq. 3.
    """

    def __init__(
        self,
        x: Tensor,
        lr: float,
        *,
        rho: float = 0.005,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        adaptive: bool = False,
        penalty: float = 0.0,
    ):
        self.x, self.lr, self.rho, self.betas, self.adaptive, self.penalty = x, lr, rho, betas, adaptive, penalty
        self.m, self.v, self.v_hat = torch.zeros_like(x), torch.zeros_like(x), torch.full_like(x, eps**2)

    def step(self, gradient: Callable[[Tensor], Tensor]) -> None:
        """One iteration; `gradient` is that of the step's batch, at any point."""
        (beta1, beta2), s = self.betas, gradient(self.x)
        delta = self.x**2 * s / (self.x * s).norm() if self.adaptive else s / s.norm()
        g = gradient(self.x + self.rho * delta) + 2 * self.penalty * self.x
        self.m = beta1 * self.m + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g**2
        self.v_hat = torch.maximum(self.v_hat, self.v)
        self.x = self.x - self.lr * self.m / self.v_hat.sqrt()


class ReferenceAlphaAdam:
    """AlphaAdam on one tensor, line by line: Chang, Li & Yuan, AlphaAdam, 2025, eq. 5, 6 and 9 and Algorithm 1.

    Args:
        x: The parameter, of any shape; replaced by each step.
        mask: "async" (eq. 6), "sync" (eq. 5), "cautious" (arXiv 2411.16085) or "none".
        compensation: "norm" (eq. 9), "algorithm1" (the box), "cautious" or "none".
    """

    def __init__(
        self,
        x: Tensor,
        lr: float,
        *,
        betas: tuple[float, float] = (0.9, 0.999),
        eps: float = 1e-8,
        weight_decay: float = 1e-2,
        mask: str = "async",
        compensation: str = "norm",
        bias_correction: bool = True,
    ):
        self.x, self.lr, self.betas, self.eps, self.weight_decay = x, lr, betas, eps, weight_decay
        self.mask, self.compensation, self.bias_correction = mask, compensation, bias_correction
        self.h, self.v, self.t = torch.zeros_like(x), torch.zeros_like(x), 0

    def step(self, g: Tensor) -> tuple[float, float]:  # α, kept share
        (beta1, beta2), old = self.betas, self.h
        self.t += 1
        self.h = beta1 * self.h + (1 - beta1) * g
        self.v = beta2 * self.v + (1 - beta2) * g * g
        h, v = self.h, self.v
        if self.bias_correction:
            h, v = h / (1 - beta1**self.t), v / (1 - beta2**self.t)
        u = h / (v.sqrt() + self.eps)
        judged = old * g if self.mask == "async" else self.h * g
        phi = {"none": judged == judged, "cautious": judged > 0}.get(self.mask, judged >= 0).to(u.dtype)
        alpha, kept = 1.0, float((phi * u).square().sum())
        if kept > 0 and self.compensation != "none":
            alpha = (float(u.square().sum()) / kept) ** 0.5
        if self.compensation == "algorithm1":
            alpha = alpha**2 * u.numel() / (float(phi.sum()) + 1)
        if self.compensation == "cautious":
            alpha = u.numel() / (float(phi.sum()) + 1)
        self.x = self.x * (1 - self.lr * self.weight_decay) - self.lr * alpha * phi * u
        return alpha, float(phi.mean())
