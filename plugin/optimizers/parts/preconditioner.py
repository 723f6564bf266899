"""The r×r preconditioner of Riemannian-preconditioned LoRA, batched over all pairs of a model.

Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024, eq. 1:
    dA ← (BᵀB + δI)⁻¹ dA,  dB ← dB (AAᵀ + δI)⁻¹
The relative damping δ·tr(G)/r is not the paper's: it makes δ free of the factor's scale.

float32 carries a Gram matrix only so far: its inverse is off by about its condition times 1e-7, and early in a run,
when B has hardly left 0, the condition passes 1e7. Those matrices alone are made, inverted and multiplied in float64.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries per work buffer. On the CPU stacked matrices and their products should stay in the cache, and stacking pays
# only for small ones; on a device few launches matter more.
_CHUNK_CPU, _CHUNK_DEVICE = 2**16, 2**22
_SINGLE_CPU = 2**12  # entries from which on a matrix is worked on alone
_GRAM_ENTRIES = 2**20  # of r×r matrices held at a time: at rank 256 those of all pairs rival the factors

_CUDA_REPORT_EVERY = 100  # steps; reading a counter waits for the device
# Condition times machine epsilon from which on an inverse counts as inexact. Errors of scaled gradients were measured
# at up to five times this product, so all stay below 1 %.
_INEXACT = 1e-3

_log = logging.getLogger("equipoise")


def chunk_entries(device: torch.device) -> int:
    """Entries that a work buffer on this device should have."""
    return _CHUNK_CPU if device.type == "cpu" else _CHUNK_DEVICE


@dataclass(frozen=True, eq=False)
class Side:
    """One factor whose gradient is to be scaled, and the factor that scales it."""

    param: Tensor  # A (r, n…), or B (m, r…)
    other: Tensor  # B (m, r…), or A (r, n…): its Gram matrix scales param.grad
    left: bool  # True for A: the inverse multiplies from the left
    group: int  # index of the parameter group whose damping holds

    @property
    def factors(self) -> tuple[Tensor, Tensor]:
        return self.param, self.other


class Preconditioner:
    """Scales the gradients of `sides`. What does not depend on the step is worked out once."""

    def __init__(self, sides: Sequence[Side]):
        self.sides = list(sides)
        self._factors = list({id(factor): factor for side in sides for factor in (side.param, side.other)}.values())
        self._params = [side.param for side in self.sides]
        self._layout: tuple[list, ...] = ()
        self._options: list[tuple[float, str]] = []
        self._batches: list[_Batch] = []
        self._counted = 0  # failures of earlier plans
        self._steps = 0
        self._next_report = 1

    @property
    def failures(self) -> int:
        """How often a Gram matrix could not be inverted, or not exactly. Waits for the device."""
        return self._counted + sum(int(batch.failures) for batch in self._batches)

    @torch.no_grad()
    def scale(self, options: list[tuple[float, str]]) -> None:
        """Scale every gradient that is there.

        Args:
            options: (damping, damping mode) of each parameter group.
        """
        # Other programs move and replace what is behind a parameter; the plan holds views of it.
        layout = (
            list(map(Tensor.data_ptr, self._factors)),
            [factor.dtype for factor in self._factors],
            [param.grad is None for param in self._params],
        )
        if layout != self._layout:
            self._counted = self.failures
            self._batches = _plan([side for side in self.sides if side.param.grad is not None])
            self._layout, self._options = layout, []
        if options != self._options:
            for batch in self._batches:
                batch.set_options(options)
            self._options = list(options)
        for batch in self._batches:
            batch.scale()
        self._report()

    def _report(self) -> None:
        self._steps += 1
        if any(batch.failures.is_cuda for batch in self._batches):
            early = self._steps & (self._steps - 1) == 0  # 1, 2, 4, 8 …: as B leaves 0
            if not (early or self._steps % _CUDA_REPORT_EVERY == 0) or torch.cuda.is_current_stream_capturing():
                return
            for batch in self._batches:
                batch.note_inexact()
        if (failures := self.failures) >= self._next_report:
            _log.warning(
                "%d LoRA gradients so far were left unscaled or scaled inexactly, because the other factor's Gram "
                "matrix was not finite, or too close to singular. Against the second, a larger damping or "
                "damping_mode='relative' helps.",
                failures,
            )
            while self._next_report <= failures:
                self._next_report *= 10


class _Batch:
    """Sides of one rank, dtype and device: one Cholesky factorisation for all of them.

    Args:
        room: (3, k or more, r, r) to work in; nothing in it need last beyond `scale`.
        buckets: The k sides, by shape.
    """

    def __init__(self, room: Tensor, buckets: list[list[Side]]):
        dtype, device = room.dtype, room.device
        chunks = [chunk for bucket in buckets for chunk in _chunked(bucket, dtype)]
        self.chunks = chunks
        self.groups = [side.group for chunk in chunks for side in chunk]
        self.failures = torch.zeros((), dtype=torch.int64, device=device)
        self.inverse = DampedInverse(room[:, : len(self.groups)])
        self._inexact = torch.zeros(len(self.groups), dtype=torch.bool, device=device)  # at any step, on a device
        self._known: list[int] = []  # those of them that were read back
        self.stacks: list[_Stack] = []
        self.singles: list[tuple[Side, Tensor, Tensor, Tensor]] = []  # with its Gram matrix and what that is made of
        # Kept from step to step: memory that is allocated anew costs more than the arithmetic.
        alone = [reads_in_place(chunk[0].factors, dtype) for chunk in chunks]
        stacked = [chunk for chunk, one in zip(chunks, alone, strict=True) if not one]
        size = max((len(c) * max(c[0].param.numel(), c[0].other.numel()) for c in stacked), default=0)
        buffers = [torch.empty(size, dtype=dtype, device=device) for _ in range(2)]
        grams = self.inverse.matrices.split([len(chunk) for chunk in chunks])
        for chunk, one, gram in zip(chunks, alone, grams, strict=True):
            if one:
                other = chunk[0].other.detach()
                self.singles.append((chunk[0], gram[0], *((other.mT, other) if chunk[0].left else (other, other.mT))))
            else:
                self.stacks.append(_Stack(chunk, gram, *buffers))

    def set_options(self, options: list[tuple[float, str]]) -> None:
        self.inverse.set_damping([options[group] for group in self.groups])

    def scale(self) -> None:
        # A step taken inside an autocast block must not drop to half precision.
        with torch.autocast(self.failures.device.type, enabled=False):
            for _, gram, *factors in self.singles:
                torch.mm(*factors, out=gram)
            for stack in self.stacks:
                stack.fill_gram()
            self._invert()
            for side, gram, *_ in self.singles:
                param, grad = side.param, side.param.grad
                # A new tensor costs less than a copy into the old one: it takes the memory of the gradient freed before
                param.grad = torch.mm(gram, grad) if side.left else torch.mm(grad, gram)  # type: ignore[arg-type]
            for stack in self.stacks:
                stack.apply()

    def _invert(self) -> None:
        if (inexact := self.inverse.invert_()) is None:
            return
        again = self._known  # to read which they are would wait for the device
        if inexact.is_cuda:
            self._inexact |= inexact
        elif inexact.device.type == "cpu":  # others may have no float64
            again = inexact.nonzero().flatten().tolist()
        if self.inverse.matrices.dtype == torch.float64:
            again = []  # it is as exact as it gets
        start = 0
        for chunk in self.chunks if again else ():
            if members := [i for i in again if start <= i < start + len(chunk)]:
                self._scale_exactly(members, [chunk[i - start] for i in members], inexact)
            start += len(chunk)
        self.failures += inexact.sum()

    def _scale_exactly(self, members: list[int], sides: list[Side], inexact: Tensor) -> None:
        """Scale the gradients of sides of one shape in float64, and have the rest of the step leave them so."""
        others = [as_matrix(side.other.detach()) for side in sides]
        grads = [side.param.grad for side in sides if side.param.grad is not None]
        left, stacked = sides[0].left, torch.stack(list(map(as_matrix, grads))).double()
        inverses = self.inverse.invert_exactly(members, torch.stack(others).double(), left, inexact)
        product = torch.bmm(*((inverses, stacked) if left else (stacked, inverses)))
        torch._foreach_copy_(grads, list(product.view(len(grads), *sides[0].param.shape).unbind(0)))

    def note_inexact(self) -> None:
        """Invert in float64 from now on what was inexact so far. Waits for the device."""
        self._known = self._inexact.nonzero().flatten().tolist()


class _Stack:
    """Sides of one shape, copied together: for matrices so small that a call for each would cost more."""

    def __init__(self, sides: list[Side], gram: Tensor, stack: Tensor, product: Tensor):
        first, k = sides[0], len(sides)
        rows, columns = first.param.flatten(1).shape
        self.left, self.gram = first.left, gram  # (k, r, r): the Gram matrices, then their inverses
        self.params = [side.param for side in sides]
        self.others = [side.other for side in sides]
        self.stack = stack
        self.product = product[: k * rows * columns].view(k, rows, columns)
        self.results = list(self.product.view(k, *first.param.shape).unbind(0))

    def fill_gram(self) -> None:
        others = self._stacked(self.others)
        torch.bmm(others.mT, others, out=self.gram) if self.left else torch.bmm(others, others.mT, out=self.gram)

    def apply(self) -> None:
        grads = [param.grad for param in self.params if param.grad is not None]
        stacked = self._stacked(grads)
        factors = (self.gram, stacked) if self.left else (stacked, self.gram)
        torch.bmm(*factors, out=self.product)
        torch._foreach_copy_(grads, self.results)

    def _stacked(self, matrices: list[Tensor]) -> Tensor:  # (k, rows, columns)
        matrices = [as_matrix(m) for m in matrices]
        k, (rows, columns) = len(matrices), matrices[0].shape
        stack = self.stack[: k * rows * columns]
        torch.cat(matrices, out=stack.view(k * rows, columns))
        return stack.view(k, rows, columns)


def as_matrix(factor: Tensor) -> Tensor:
    """Convolution kernels as the matrices they are: A (r, n), B (m, r)."""
    return factor if factor.ndim == 2 else factor.flatten(1)


def _chunked(bucket: list[Side], dtype: torch.dtype) -> list[list[Side]]:
    """Sides of one shape in portions to be worked on together."""
    size = max(bucket[0].param.numel(), bucket[0].other.numel())
    k = 1 if reads_in_place(bucket[0].factors, dtype) else max(1, chunk_entries(bucket[0].param.device) // size)
    return [bucket[i : i + k] for i in range(0, len(bucket), k)]


def reads_in_place(factors: Sequence[Tensor], dtype: torch.dtype) -> bool:
    """Whether products of the factors themselves are faster than products of stacked copies."""
    return all(f.ndim == 2 and f.dtype == dtype and f.device.type == "cpu" for f in factors) and (
        max(f.numel() for f in factors) >= _SINGLE_CPU
    )


def _plan(sides: list[Side]) -> list[_Batch]:
    batches: dict[tuple[int, torch.dtype, torch.device], dict[tuple, list[Side]]] = {}
    for side in sides:
        rank = side.param.shape[0] if side.left else side.other.shape[0]
        dtype = torch.promote_types(torch.promote_types(side.param.dtype, side.other.dtype), torch.float32)
        buckets = batches.setdefault((rank, dtype, side.param.device), {})
        buckets.setdefault((side.left, side.param.shape, side.other.shape), []).append(side)
    return [
        _Batch(room, portion)
        for key, buckets in batches.items()
        for room, portion in portions(3, *key, list(buckets.values()))
    ]


def portions(
    copies: int, rank: int, dtype: torch.dtype, device: torch.device, buckets: list[list]
) -> list[tuple[Tensor, list[list]]]:
    """(room for their r×r matrices, `copies` times; sides or pairs by shape): all buckets, in portions of limited size.

    All portions have the same room, (copies, k or more, r, r), and take turns in it.
    """
    most = min(max(1, _GRAM_ENTRIES // rank**2), sum(map(len, buckets)))
    room = torch.empty(copies, most, rank, rank, dtype=dtype, device=device)
    parts: list[list[list]] = []
    left = 0
    for bucket in buckets:
        start = 0
        while start < len(bucket):
            if not left:
                parts.append([])
                left = most
            parts[-1].append(bucket[start : start + left])
            start, left = start + len(parts[-1][-1]), left - len(parts[-1][-1])
    return [(room, part) for part in parts]


class DampedInverse:
    """Inverts many symmetric matrices plus damping by Cholesky, in place, without waiting for the device."""

    def __init__(self, room: Tensor):  # (3, k, r, r)
        self.matrices, self._factor, self._inverse_factor = room.unbind(0)
        self._info = torch.empty(len(self.matrices), dtype=torch.int32, device=room.device)
        self._eye = torch.eye(room.shape[-1], dtype=room.dtype, device=room.device)

    def set_damping(self, options: list[tuple[float, str]]) -> None:
        """Set (damping, damping mode) of each matrix."""
        like, self._options = self.matrices, list(options)
        self._damping = torch.tensor([damping for damping, _ in options], dtype=like.dtype, device=like.device)
        relative = [mode == "relative" for _, mode in options]
        self._relative = torch.tensor(relative, device=like.device) if any(relative) else None

    def invert_(self) -> Tensor | None:
        """Replace `matrices` by their damped inverses, or by the identity where there is none.

        An exactly zero Gram matrix under relative damping is the ordinary state of a fresh adapter (B = 0): it gets the
        identity too, and counts as exact.

        Returns:
            (k,) which are not exact, or have no inverse; None if all are known to be exact.
        """
        matrices, eye = self.matrices, self._eye.expand_as(self.matrices)
        diagonal, damping, fresh = matrices.diagonal(dim1=-2, dim2=-1), self._damping, None
        if self._relative is not None:
            mean = diagonal.mean(-1)
            fresh = self._relative & (mean == 0)
            damping = damping * torch.where(self._relative, mean, 1.0)
        diagonal.add_(damping.unsqueeze(-1))
        condition = torch.linalg.vector_norm(matrices, dim=(1, 2))
        torch.linalg.cholesky_ex(matrices, out=(self._factor, self._info))
        # (LLᵀ)⁻¹ = L⁻ᵀL⁻¹: a triangular solve and a product are faster than the two solves of cholesky_solve.
        torch.linalg.solve_triangular(self._factor, eye, upper=False, out=self._inverse_factor)
        torch.bmm(self._inverse_factor.mT, self._inverse_factor, out=matrices)
        condition *= torch.linalg.vector_norm(matrices, dim=(1, 2))
        good = (self._info == 0) & (condition <= _INEXACT / torch.finfo(matrices.dtype).eps)  # NaN is not
        if not matrices.is_cuda and good.all():
            return None
        usable = (self._info == 0) & condition.isfinite()
        torch.where(usable[:, None, None], matrices, self._eye, out=matrices)
        return ~(good if fresh is None else good | fresh)

    def invert_exactly(self, indices: list[int], others: Tensor, left: bool, inexact: Tensor) -> Tensor:
        """The inverses at `indices` in float64. In `matrices` the identity takes their place.

        Args:
            others: (len(indices), m, r) or (…, r, n), what their Gram matrices are made of, in float64.
            left: Which of the two.
            inexact: (k,); those that are exact now are unmarked.
        """
        exact = DampedInverse(others.new_empty(3, len(indices), *self._eye.shape))
        exact.set_damping([self._options[i] for i in indices])
        torch.bmm(*((others.mT, others) if left else (others, others.mT)), out=exact.matrices)
        bad = exact.invert_()
        # An inverse that only float64 can hold is of no use.
        held = torch.linalg.vector_norm(exact.matrices, dim=(1, 2)) < torch.finfo(self.matrices.dtype).max
        inverses = torch.where(held[:, None, None], exact.matrices, exact._eye)
        torch._foreach_copy_([self.matrices[i] for i in indices], [self._eye] * len(indices))
        torch._foreach_copy_([inexact[i] for i in indices], list((~held if bad is None else bad | ~held).unbind(0)))
        return inverses
