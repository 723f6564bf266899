"""A bound on how far one step may move the product BA of each LoRA pair, batched over all pairs of a model.

Not from a paper. After the base optimizer's step from (A₀, B₀) to (A₀ + ΔA, B₀ + ΔB), both changes of a pair shrink by
one factor c ≤ 1, the largest for which the adapted weight W + s·BA moves by at most a share τ of the frozen W:

    s·‖(B₀ + cΔB)(A₀ + cΔA) − B₀A₀‖_F ≤ τ‖W‖_F

With P = B₀ΔA + ΔB·A₀ and Q = ΔB·ΔA the left side is s·‖cP + c²Q‖, and every inner product of P and Q is one of r×r Gram
matrices, for example ⟨B₀ΔA, ΔB·A₀⟩ = tr(B₀ᵀΔB · A₀ΔAᵀ): the product itself, as large as W, is never formed.

c is approached from below, so that every iterate keeps the bound: from a feasible c, by the triangle inequality,
‖Δ(c + h)‖ ≤ ‖Δ(c)‖ + h‖P + 2cQ‖ + h²‖Q‖, and the h that makes the right side equal the limit solves a quadratic.

τ is the option trust times the share of the full learning rate that a schedule leaves: a step that is bounded all along
has no other way to settle, for its size no longer depends on the rate.

The same arithmetic bounds how far a whole run may go, by the option reach β in place of τ, with (A₀, B₀) the factors as
the adapter began, or 0 where their product is: each step ends within s·‖BA − B₀A₀‖_F ≤ β‖W‖_F. From 0, c has a closed
form, (β‖W‖_F / s‖BA‖_F)^½, and a third of the Gram matrices. Where both are asked for, the step is bounded first, then
the run, which can make a step at most twice as long as τ allows.

How it relates to others: LARS and LAMB scale each tensor's step by ‖θ‖ / ‖Δθ‖, up as well as down, which for a LoRA
factor B that starts at zero means nothing; Muon makes every step of equal size. Here the size that counts is that of
the product, a step that is small enough is left untouched to the bit, and no step is ever made larger.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.optimizers.parts.preconditioner import as_matrix, chunk_entries, portions, reads_in_place

_ITERATIONS = 4  # the error shrinks at least twentyfold in each, where P and Q do not cancel


class ProductBound:
    """Holds the factors of `pairs` as they were before a step, and bounds the step after it.

    Args:
        pairs: (A, B) of shapes (r, n…) and (m, r…).
        norms: ‖W‖_F / s of each pair.
        kinds: Which entry of the `trust` of each step holds for each pair.
        start: The factors A, B, A, B … that every `shrink` measures from, used as they are; None: see `remember`.
    """

    def __init__(
        self,
        pairs: Sequence[tuple[Tensor, Tensor]],
        norms: Sequence[float],
        kinds: Sequence[int],
        start: Sequence[Tensor] | None = None,
    ):
        self.pairs, self.norms, self.kinds = list(pairs), list(norms), list(kinds)
        self._factors = [factor for pair in self.pairs for factor in pair]
        self._places = [factor.data_ptr() for factor in self._factors]
        self._old = (
            [torch.empty_like(factor, requires_grad=False) for factor in self._factors]
            if start is None
            else list(start)
        )
        batches: dict[tuple[bool, int, torch.dtype, torch.device], dict[tuple, list[int]]] = {}
        for index, ((A, B), old) in enumerate(zip(self.pairs, self.old, strict=True)):
            dtype = torch.promote_types(torch.promote_types(A.dtype, B.dtype), torch.float32)
            from_zero = start is not None and not any(factor.any() for factor in old)
            shapes = batches.setdefault((from_zero, A.shape[0], dtype, A.device), {})
            shapes.setdefault((A.shape, B.shape, A.dtype, B.dtype), []).append(index)
        self._batches = [
            _PairBatch(self, room, portion, from_zero)
            for (from_zero, rank, dtype, device), shapes in batches.items()
            for room, portion in portions(2 if from_zero else 6, rank, dtype, device, list(shapes.values()))
        ]

    @property
    def current(self) -> bool:
        """Whether every factor still lies where it lay, in the dtype that was planned for."""
        return self._places == [factor.data_ptr() for factor in self._factors] and all(
            factor.dtype == old.dtype for factor, old in zip(self._factors, self._old, strict=True)
        )

    @property
    def shares(self) -> list[Tensor]:
        """() c of each pair in the last step, on its device; empty before the first."""
        shares = {i: c for batch in self._batches for i, c in zip(batch.indices, batch.c, strict=False)}
        return [shares[i] for i in sorted(shares)]

    @property
    def old(self) -> list[tuple[Tensor, Tensor]]:
        """(A, B) of each pair as they were before the step."""
        return list(zip(self._old[::2], self._old[1::2], strict=True))

    @torch.no_grad()
    def remember(self) -> None:
        """Keep the factors as they are now: what `shrink` measures from."""
        if self.pairs:
            torch._foreach_copy_(self._old, self._factors)

    @torch.no_grad()
    def moved(self) -> list[Tensor]:
        """() s·‖BA − B₀A₀‖_F / ‖W‖_F of each pair, on its device, for the (A₀, B₀) that were kept."""
        moved: dict[int, Tensor] = {}
        for batch in self._batches:
            with torch.autocast(batch.grams.device.type, enabled=False):
                moved |= zip(batch.indices, batch.moved(), strict=True)
        return [moved[i] for i in sorted(moved)]

    @torch.no_grad()
    def shrink(self, trust: Sequence[float | Tensor]) -> None:
        """Take back what is too much.

        Args:
            trust: τ of each kind of pairs.
        """
        for batch in self._batches:
            with torch.autocast(batch.grams.device.type, enabled=False):
                batch.shrink(trust)


class _PairBatch:
    """Pairs of one rank, dtype and device: their Gram matrices lie together, and c is found for all of them at once.

    Args:
        bound: What they belong to.
        room: (6, k or more, r, r) for the Gram matrices, or (2, …) from 0; nothing in it need last beyond `shrink`.
        shapes: The k pairs by shape, as indices into `bound.pairs`.
        from_zero: Whether the old factors are all 0, and stay so.
    """

    def __init__(self, bound: ProductBound, room: Tensor, shapes: list[list[int]], from_zero: bool):
        dtype, device = room.dtype, room.device
        self.indices = [index for indices in shapes for index in indices]
        # One row for each kind, 0 where a pair is of another: limits are then made without waiting for the device.
        rows = [
            [bound.norms[i] * (bound.kinds[i] == kind) for i in self.indices] for kind in range(max(bound.kinds) + 1)
        ]
        self.norms = torch.tensor(rows, dtype=dtype, device=device).unbind(0)
        self.grams = room[:, : len(self.indices)]
        self.c: Sequence[Tensor] | Tensor = ()
        chunks = []
        for indices in shapes:
            A, B = bound.pairs[indices[0]]
            alone = reads_in_place((A, B), dtype)
            k = 1 if alone else max(1, chunk_entries(device) // max(A.numel(), B.numel()))
            chunks += [(alone, indices[i : i + k]) for i in range(0, len(indices), k)]
        # Kept from step to step: memory that is allocated anew costs more than the arithmetic.
        size = max(len(indices) * max(f.numel() for f in bound.pairs[indices[0]]) for _, indices in chunks)
        buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(1 if from_zero else 2)]
        grams = self.grams.split([len(indices) for _, indices in chunks], dim=1)
        self.from_zero = from_zero
        self.parts = [
            _part(bound, alone, indices, part, buffers) for (alone, indices), part in zip(chunks, grams, strict=True)
        ]

    def moved(self) -> Tensor:  # (k,)
        for part in self.parts:
            part.fill_grams()
        if self.from_zero:
            squares = _dot(*self.grams.unbind(0))
        else:
            PP, PQ, QQ = _inner_products(*self.grams.unbind(0))
            squares = PP + 2 * PQ + QQ
        return squares.clamp(min=0).sqrt() / torch.stack(self.norms).sum(0)

    def shrink(self, trust: Sequence[float | Tensor]) -> None:
        for part in self.parts:
            part.fill_grams()
        limits = torch.stack([norms * share for norms, share in zip(self.norms, trust, strict=True)]).sum(0)
        if self.from_zero:
            c = self.c = _share_from_zero(*self.grams.unbind(0), limits=limits)
        else:
            c = self.c = largest_share(*self.grams.unbind(0), limits=limits)
        start = 0
        known = c.tolist() if c.device.type == "cpu" else None
        for part in self.parts:
            end = start + part.count
            if known is None or min(known[start:end]) < 1:  # else untouched to the bit, and nothing to write
                part.apply(c[start:end])
            start = end


class _PairStack:
    """Pairs of one shape, copied together: for factors so small that a call for each would cost more."""

    def __init__(self, bound: ProductBound, indices: list[int], grams: Tensor, before: Tensor, change: Tensor):
        self.count = len(indices)
        self.now = [[bound.pairs[i][side] for i in indices] for side in (0, 1)]
        self.old = [[bound._old[2 * i + side] for i in indices] for side in (0, 1)]
        self.grams, self.before, self.change = grams.unbind(0), before, change

    def fill_grams(self) -> None:
        for side in (0, 1):
            old, change = _stack(self.old[side], self.before), _stack(self.now[side], self.change)
            change.sub_(old)
            if side == 1:
                old, change = old.mT, change.mT
            for gram, left, right in zip(
                self.grams[3 * side :], (old, old, change), (old, change, change), strict=False
            ):
                torch.bmm(left, right.mT, out=gram)

    def apply(self, c: Tensor) -> None:
        for side in (0, 1):
            old, new = _stack(self.old[side], self.before), _stack(self.now[side], self.change)
            torch.lerp(old, new, c[:, None, None], out=new)  # `new` itself, to the bit, where c is 1
            factors = self.now[side]
            torch._foreach_copy_(factors, [m.view_as(f) for m, f in zip(new.unbind(0), factors, strict=True)])


class _PairStackFromZero:
    """The same where the factors were 0: the change is what they are now."""

    def __init__(self, bound: ProductBound, indices: list[int], grams: Tensor, now: Tensor):
        self.count = len(indices)
        self.factors = [[bound.pairs[i][side] for i in indices] for side in (0, 1)]
        self.grams, self.now = grams.unbind(0), now

    def fill_grams(self) -> None:
        for side, gram in enumerate(self.grams):
            now = _stack(self.factors[side], self.now)
            now = now if side == 0 else now.mT
            torch.bmm(now, now.mT, out=gram)

    def apply(self, c: Tensor) -> None:
        for factors in self.factors:
            now = _stack(factors, self.now).mul_(c[:, None, None])
            torch._foreach_copy_(factors, [m.view_as(f) for m, f in zip(now.unbind(0), factors, strict=True)])


def _stack(factors: list[Tensor], out: Tensor) -> Tensor:  # (k, rows, columns)
    matrices = [as_matrix(factor) for factor in factors]
    k, (rows, columns) = len(matrices), matrices[0].shape
    stack = out[: k * rows * columns]
    torch.cat(matrices, out=stack.view(k * rows, columns))
    return stack.view(k, rows, columns)


class _Single:
    """One pair whose factors are large enough to be read where they lie."""

    count = 1

    def __init__(self, bound: ProductBound, indices: list[int], grams: Tensor, _: Tensor, change: Tensor):
        (index,) = indices
        self.now = bound.pairs[index]  # themselves: a base may put new storage behind a parameter
        self.old = bound._old[2 * index : 2 * index + 2]
        self.change = [change[: factor.numel()].view_as(factor) for factor in self.now]
        (A, B), (dA, dB), (AA, AdA, dAdA, BB, BdB, dBdB) = self.old, self.change, grams[:, 0].unbind(0)
        self.products = (
            ((A, A.mT, AA), (A, dA.mT, AdA), (dA, dA.mT, dAdA)),
            ((B.mT, B, BB), (B.mT, dB, BdB), (dB.mT, dB, dBdB)),
        )

    def fill_grams(self) -> None:
        for now, old, change, products in zip(self.now, self.old, self.change, self.products, strict=True):
            torch.sub(now, old, out=change)
            for left, right, gram in products:
                torch.mm(left, right, out=gram)

    def apply(self, c: Tensor) -> None:
        for now, old in zip(self.now, self.old, strict=True):
            torch.lerp(old, now, c[0], out=now)


class _SingleFromZero:
    """The same where the factors were 0."""

    count = 1

    def __init__(self, bound: ProductBound, indices: list[int], grams: Tensor):
        (index,) = indices
        self.now, self.grams = bound.pairs[index], grams[:, 0].unbind(0)

    def fill_grams(self) -> None:
        (A, B), (AA, BB) = self.now, self.grams
        torch.mm(A, A.mT, out=AA)
        torch.mm(B.mT, B, out=BB)

    def apply(self, c: Tensor) -> None:
        for factor in self.now:
            factor.mul_(c[0])


def _part(
    bound: ProductBound, alone: bool, indices: list[int], grams: Tensor, buffers: Sequence[Tensor]
) -> _Single | _PairStack | _SingleFromZero | _PairStackFromZero:
    """What works on these pairs: one that is large alone, the others in a stack; with one buffer, from 0."""
    if len(buffers) == 1:
        return _SingleFromZero(bound, indices, grams) if alone else _PairStackFromZero(bound, indices, grams, *buffers)
    before, change = buffers
    kind = _Single if alone else _PairStack
    return kind(bound, indices, grams, before, change)


def largest_share(
    AA: Tensor,  # (k, r, r) A·Aᵀ before the step
    AdA: Tensor,  # A·ΔAᵀ
    dAdA: Tensor,  # ΔA·ΔAᵀ
    BB: Tensor,  # (k, r, r) Bᵀ·B
    BdB: Tensor,  # Bᵀ·ΔB
    dBdB: Tensor,  # ΔBᵀ·ΔB
    limits: Tensor,  # (k,) of ‖(B + c·ΔB)(A + c·ΔA) − BA‖_F
) -> Tensor:  # (k,) c, from 0 to 1
    """The largest share of each step that stays within its limit, by the derivation at the top of this file."""
    PP, PQ, QQ = _inner_products(AA, AdA, dAdA, BB, BdB, dBdB)
    q, c = QQ.clamp(min=0).sqrt(), torch.zeros_like(limits)
    for _ in range(_ITERATIONS):
        moved = (c * c * (PP + c * (2 * PQ + c * QQ))).clamp(min=0).sqrt()
        slope = (PP + 4 * c * (PQ + c * QQ)).clamp(min=0).sqrt()
        room = (limits - moved).clamp(min=0)
        # 0/0 where nothing moves: nothing to bound either
        c = (c + 2 * room / (slope + (slope * slope + 4 * q * room).sqrt())).nan_to_num(1.0, posinf=1.0)
    # Changes so large that their squares overflow are taken back whole.
    return torch.where((PP + QQ).isfinite(), c.clamp(max=1), 0.0)


def _share_from_zero(AA: Tensor, BB: Tensor, limits: Tensor) -> Tensor:  # (k,) c, from 0 to 1
    """`largest_share` where A and B were 0: from (k, r, r) A·Aᵀ and Bᵀ·B, c²‖BA‖_F = limit."""
    squares = _dot(AA, BB)
    c = (limits / squares.clamp(min=0).sqrt()).sqrt().nan_to_num(1.0, posinf=1.0).clamp(max=1)
    return torch.where(squares.isfinite(), c, 0.0)


def _inner_products(
    AA: Tensor, AdA: Tensor, dAdA: Tensor, BB: Tensor, BdB: Tensor, dBdB: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """(k,) ‖P‖², ⟨P, Q⟩ and ‖Q‖² of P = B·ΔA + ΔB·A and Q = ΔB·ΔA."""
    PP = _dot(BB, dAdA) + _dot(dBdB, AA) + 2 * _dot(BdB, AdA.mT)
    return PP, _dot(BdB, dAdA) + _dot(dBdB, AdA), _dot(dBdB, dAdA)


def _dot(X: Tensor, Y: Tensor) -> Tensor:  # (k,)
    return (X * Y).sum((1, 2))
