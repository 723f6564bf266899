"""The r×r preconditioner of Riemannian-preconditioned LoRA, batched over all pairs of a model.

Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024, eq. 1:
    dA ← (BᵀB + δI)⁻¹ dA,  dB ← dB (AAᵀ + δI)⁻¹
The relative damping δ·tr(G)/r is not the paper's: it makes δ free of the factor's scale.
"""

import logging
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

# Entries per work buffer. On the CPU stacked matrices and their products should stay in the cache, and memory that is
# allocated anew for every step costs more than the arithmetic; on a device few launches matter more.
_CHUNK_CPU, _CHUNK_DEVICE = 2**16, 2**22

_CUDA_REPORT_EVERY = 100  # steps; reading a counter waits for the device

_log = logging.getLogger("equipoise")


@dataclass(frozen=True, eq=False)
class Side:
    """One factor whose gradient is to be scaled, and the factor that scales it."""

    param: Tensor  # A (r, n…), or B (m, r…)
    other: Tensor  # B (m, r…), or A (r, n…): its Gram matrix scales param.grad
    left: bool  # True for A: the inverse multiplies from the left
    group: int  # index of the parameter group whose damping holds


class Preconditioner:
    """Scales the gradients of `sides` in place. What does not depend on the step is worked out once."""

    def __init__(self, sides: Sequence[Side]):
        self.sides = list(sides)
        self._seen: list[tuple | None] = []
        self._options: list[tuple[float, str]] = []
        self._batches: list[_Batch] = []
        self._counted = 0  # failures of earlier plans
        self._steps = 0
        self._next_report = 1

    @property
    def failures(self) -> int:
        """How often a Gram matrix could not be inverted. Waits for the device."""
        return self._counted + sum(int(batch.failures) for batch in self._batches)

    @torch.no_grad()
    def scale(self, options: list[tuple[float, str]]) -> None:
        """Scale every gradient that is there.

        Args:
            options: (damping, damping mode) of each parameter group.
        """
        params = [side.param for side in self.sides]
        seen = [None if p.grad is None else (p.dtype, p.device) for p in params]
        if seen != self._seen:
            self._counted = self.failures
            self._batches = _plan([side for side in self.sides if side.param.grad is not None])
            self._seen, self._options = seen, []
        if options != self._options:
            for batch in self._batches:
                batch.set_options(options)
            self._options = list(options)
        for batch in self._batches:
            batch.scale()
        self._report()

    def _report(self) -> None:
        self._steps += 1
        on_cuda = any(batch.failures.is_cuda for batch in self._batches)
        if on_cuda and (self._steps % _CUDA_REPORT_EVERY or torch.cuda.is_current_stream_capturing()):
            return
        if (failures := self.failures) >= self._next_report:
            _log.warning(
                "%d LoRA gradients so far were left unscaled, because the other factor's Gram matrix was not positive "
                "definite or not finite. A larger damping, or damping_mode='relative', avoids this.",
                failures,
            )
            while self._next_report <= failures:
                self._next_report *= 10


class _Batch:
    """Sides of one rank, dtype and device: one Cholesky factorisation for all of them."""

    def __init__(self, rank: int, dtype: torch.dtype, device: torch.device, buckets: list[list[Side]]):
        limit = _CHUNK_CPU if device.type == "cpu" else _CHUNK_DEVICE
        chunks = []
        for bucket in buckets:
            size = max(1, limit // max(bucket[0].param.numel(), bucket[0].other.numel()))
            chunks += [bucket[i : i + size] for i in range(0, len(bucket), size)]
        self.sides = [side for chunk in chunks for side in chunk]
        self.failures = torch.zeros((), dtype=torch.int64, device=device)
        self.grams = torch.empty(len(self.sides), rank, rank, dtype=dtype, device=device)
        room = max(len(chunk) * max(chunk[0].param.numel(), chunk[0].other.numel()) for chunk in chunks)
        buffers = [torch.empty(room, dtype=dtype, device=device) for _ in range(2)]
        grams = self.grams.split([len(chunk) for chunk in chunks])
        self.chunks = [_Chunk(chunk, gram, *buffers) for chunk, gram in zip(chunks, grams, strict=True)]

    def set_options(self, options: list[tuple[float, str]]) -> None:
        chosen = [options[side.group] for side in self.sides]
        like = self.grams
        self.damping = torch.tensor([damping for damping, _ in chosen], dtype=like.dtype, device=like.device)
        self.relative = torch.tensor([mode == "relative" for _, mode in chosen], device=like.device)

    def scale(self) -> None:
        # A step taken inside an autocast block must not drop to half precision.
        with torch.autocast(self.grams.device.type, enabled=False):
            for chunk in self.chunks:
                chunk.fill_gram()
            inverses, failures = damped_inverse(self.grams, self.damping, self.relative)
            self.failures += failures
            for chunk, inverse in zip(self.chunks, inverses.split([len(c.params) for c in self.chunks]), strict=True):
                chunk.apply(inverse)


class _Chunk:
    """Sides of one shape that are worked on together, in buffers shared with the other chunks."""

    def __init__(self, sides: list[Side], gram: Tensor, stack: Tensor, product: Tensor):
        first, k = sides[0], len(sides)
        rows, columns = first.param.flatten(1).shape
        self.left, self.gram = first.left, gram
        self.params = [side.param for side in sides]
        self.others = [side.other for side in sides]
        self.stack = stack
        self.product = product[: k * rows * columns].view(k, rows, columns)
        self.results = list(self.product.view(k, *first.param.shape).unbind(0))

    def fill_gram(self) -> None:
        others = self._stacked(self.others)
        torch.bmm(others.mT, others, out=self.gram) if self.left else torch.bmm(others, others.mT, out=self.gram)

    def apply(self, inverse: Tensor) -> None:  # (k, r, r)
        grads = [param.grad for param in self.params if param.grad is not None]
        stacked = self._stacked(grads)
        torch.bmm(inverse, stacked, out=self.product) if self.left else torch.bmm(stacked, inverse, out=self.product)
        torch._foreach_copy_(grads, self.results)

    def _stacked(self, matrices: list[Tensor]) -> Tensor:  # (k, rows, columns)
        matrices = [m if m.ndim == 2 else m.flatten(1) for m in matrices]
        k, (rows, columns) = len(matrices), matrices[0].shape
        if k == 1:
            return matrices[0].to(self.stack.dtype).unsqueeze(0)
        stack = self.stack[: k * rows * columns]
        torch.cat(matrices, out=stack.view(k * rows, columns))
        return stack.view(k, rows, columns)


def _plan(sides: list[Side]) -> list[_Batch]:
    batches: dict[tuple[int, torch.dtype, torch.device], dict[tuple, list[Side]]] = {}
    for side in sides:
        rank = side.param.shape[0] if side.left else side.other.shape[0]
        dtype = torch.promote_types(torch.promote_types(side.param.dtype, side.other.dtype), torch.float32)
        buckets = batches.setdefault((rank, dtype, side.param.device), {})
        buckets.setdefault((side.left, side.param.shape, side.other.shape), []).append(side)
    return [_Batch(*key, list(buckets.values())) for key, buckets in batches.items()]


def damped_inverse(
    gram: Tensor,  # (k, r, r), fp32 or fp64; its diagonal is changed in place
    damping: Tensor,  # (k,) added to the diagonal
    relative: Tensor,  # (k,) bool: that damping is in units of tr(gram)/r
) -> tuple[Tensor, Tensor]:  # (k, r, r) inverses, the identity where there is none; () how many of those are failures
    """Invert symmetric matrices plus damping by Cholesky, without waiting for the device.

    An exactly zero Gram matrix under relative damping is the ordinary state of a fresh adapter (B = 0): it gets the
    identity too, and is no failure.
    """
    diagonal = gram.diagonal(dim1=-2, dim2=-1)
    mean = diagonal.mean(-1)
    diagonal.add_((damping * torch.where(relative, mean, 1.0)).unsqueeze(-1))
    eye = torch.eye(gram.shape[-1], dtype=gram.dtype, device=gram.device)
    factor, info = torch.linalg.cholesky_ex(gram)
    inverse = torch.cholesky_solve(eye.expand_as(gram), factor)
    good = (info == 0) & inverse.sum((1, 2)).isfinite()
    fresh = relative & (mean == 0)
    return torch.where(good[:, None, None], inverse, eye), (~(good | fresh)).sum()
