"""A bound on how far one step may move the product BA of each LoRA pair, batched over all pairs of a model.

Not from a paper. After the base optimizer's step from (A₀, B₀) to (A₀ + ΔA, B₀ + ΔB), both changes of a pair shrink by
one factor c ≤ 1, the largest for which the adapted weight W + s·BA moves by at most a share τ of the frozen W:

    s·‖(B₀ + cΔB)(A₀ + cΔA) − B₀A₀‖_F ≤ τ‖W‖_F

With P = B₀ΔA + ΔB·A₀ and Q = ΔB·ΔA the left side is s·‖cP + c²Q‖, and every inner product of P and Q is one of r×r Gram
matrices, for example ⟨B₀ΔA, ΔB·A₀⟩ = tr(B₀ᵀΔB · A₀ΔAᵀ): the product itself, as large as W, is never formed.

c is approached from below, so that every iterate keeps the bound: from a feasible c, by the triangle inequality,
‖Δ(c + h)‖ ≤ ‖Δ(c)‖ + h‖P + 2cQ‖ + h²‖Q‖, and the h that makes the right side equal the limit solves a quadratic.

How it relates to others: LARS and LAMB scale each tensor's step by ‖θ‖ / ‖Δθ‖, up as well as down, which for a LoRA
factor B that starts at zero means nothing; Muon makes every step of equal size. Here the size that counts is that of
the product, a step that is small enough is left untouched to the bit, and no step is ever made larger.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.optimizers.preconditioner import chunk_entries

_ITERATIONS = 4  # the error shrinks at least twentyfold in each, where P and Q do not cancel


class ProductBound:
    """Holds the factors of `pairs` as they were before a step, and bounds the step after it.

    Args:
        pairs: (A, B) of shapes (r, n…) and (m, r…).
        limits: τ‖W‖_F / s of each pair.
    """

    def __init__(self, pairs: Sequence[tuple[Tensor, Tensor]], limits: Sequence[float]):
        self.pairs, self.limits = list(pairs), list(limits)
        self._factors = [factor for pair in self.pairs for factor in pair]
        self._old = [torch.empty_like(factor, requires_grad=False) for factor in self._factors]
        self._chunks = self._plan()

    @property
    def current(self) -> bool:
        """Whether every factor still has the device and dtype that it was planned for."""
        return all(
            f.device == old.device and f.dtype == old.dtype for f, old in zip(self._factors, self._old, strict=True)
        )

    @property
    def shares(self) -> list[Tensor]:
        """() c of each pair in the last step, on its device; empty before the first."""
        shares = {
            i: c for chunk in self._chunks if chunk.c is not None for i, c in zip(chunk.indices, chunk.c, strict=True)
        }
        return [shares[i] for i in sorted(shares)]

    @torch.no_grad()
    def remember(self) -> None:
        if self.pairs:
            torch._foreach_copy_(self._old, self._factors)

    @torch.no_grad()
    def shrink(self) -> None:
        for chunk in self._chunks:
            with torch.autocast(chunk.limits.device.type, enabled=False):
                chunk.shrink()

    def _plan(self) -> list["_Chunk"]:
        shapes: dict[tuple, list[int]] = {}
        for index, (A, B) in enumerate(self.pairs):
            shapes.setdefault((A.shape, B.shape, A.dtype, B.dtype, A.device), []).append(index)
        chunks = []
        for indices in shapes.values():
            A, B = self.pairs[indices[0]]
            k = max(1, chunk_entries(A.device) // max(A.numel(), B.numel()))
            chunks += [_Chunk(self, indices[i : i + k]) for i in range(0, len(indices), k)]
        return chunks


class _Chunk:
    """Pairs of one shape that are worked on together."""

    def __init__(self, bound: ProductBound, indices: list[int]):
        self.indices = indices
        self.now = [[bound.pairs[i][side] for i in indices] for side in (0, 1)]
        self.old = [[bound._old[2 * i + side] for i in indices] for side in (0, 1)]
        A, B = self.now[0][0], self.now[1][0]
        self.dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
        self.limits = torch.tensor([bound.limits[i] for i in indices], dtype=self.dtype, device=A.device)
        self.c: Tensor | None = None

    def shrink(self) -> None:
        old = [self._stack(self.old[0]), self._stack(self.old[1])]
        new = [self._stack(self.now[0]), self._stack(self.now[1])]
        c = self.c = largest_share(old[0], old[1], new[0] - old[0], new[1] - old[1], self.limits)
        if c.device.type == "cpu" and bool((c == 1).all()):
            return  # untouched to the bit, and nothing to write
        for factors, before, after in zip(self.now, old, new, strict=True):
            # lerp gives `after` itself, to the bit, where c is 1
            moved = torch.lerp(before, after, c[:, None, None])
            torch._foreach_copy_(factors, [m.view_as(f) for m, f in zip(moved.unbind(0), factors, strict=True)])

    def _stack(self, factors: list[Tensor]) -> Tensor:  # (k, rows, columns)
        return torch.stack([factor.flatten(1) for factor in factors]).to(self.dtype)


def largest_share(
    A: Tensor,  # (k, r, n) before the step
    B: Tensor,  # (k, m, r)
    dA: Tensor,  # (k, r, n)
    dB: Tensor,  # (k, m, r)
    limits: Tensor,  # (k,) of ‖(B + c·dB)(A + c·dA) − BA‖_F
) -> Tensor:  # (k,) c, from 0 to 1
    """The largest share of each step that stays within its limit, by the derivation at the top of this file."""
    AA, AdA, dAdA = A @ A.mT, A @ dA.mT, dA @ dA.mT  # (k, r, r) each
    BB, BdB, dBdB = B.mT @ B, B.mT @ dB, dB.mT @ dB
    PP = _dot(BB, dAdA) + _dot(dBdB, AA) + 2 * _dot(BdB, AdA.mT)
    PQ = _dot(BdB, dAdA) + _dot(dBdB, AdA)
    QQ = _dot(dBdB, dAdA)
    q, c = QQ.clamp(min=0).sqrt(), torch.zeros_like(limits)
    for _ in range(_ITERATIONS):
        moved = (c * c * (PP + c * (2 * PQ + c * QQ))).clamp(min=0).sqrt()
        slope = (PP + 4 * c * (PQ + c * QQ)).clamp(min=0).sqrt()
        room = (limits - moved).clamp(min=0)
        # 0/0 where nothing moves: nothing to bound either
        c = (c + 2 * room / (slope + (slope * slope + 4 * q * room).sqrt())).nan_to_num(1.0, posinf=1.0)
    # Changes so large that their squares overflow are taken back whole.
    return torch.where((PP + QQ).isfinite(), c.clamp(max=1), 0.0)


def _dot(X: Tensor, Y: Tensor) -> Tensor:  # (k,)
    return (X * Y).sum((1, 2))
