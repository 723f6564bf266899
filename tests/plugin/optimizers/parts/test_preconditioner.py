"""Scaled gradients are exact in float32, whatever the factors: where it does not carry, float64 does, or it counts."""

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn

from equipoise import ScaledAdamW, ScaledGD
from equipoise.optimizers.parts import preconditioner
from equipoise.optimizers.reference import ReferenceScaled


def factor(rows: int, rank: int, smallest: float) -> Tensor:
    """(rows, rank) with singular values from 1 to `smallest`."""
    left, right = torch.linalg.qr(torch.randn(rows, rank))[0], torch.linalg.qr(torch.randn(rank, rank))[0]
    return left * torch.logspace(0, smallest, rank) @ right


def couples(rank: int, decades: float, count: int = 20) -> list[tuple[nn.Parameter, nn.Parameter]]:
    """Pairs (A, B) with the gradients that a random gradient of the product gives them."""
    pairs = []
    for index in range(count):
        spread = -decades * index / (count - 1)
        A, B = nn.Parameter(factor(96, rank, spread / 2).T.contiguous()), nn.Parameter(factor(80, rank, spread))
        product = torch.randn(80, 96)
        A.grad, B.grad = B.detach().T @ product, product @ A.detach().T
        pairs.append((A, B))
    return pairs


def errors(pairs: list[tuple[nn.Parameter, nn.Parameter]], **options) -> tuple[Tensor, int]:
    """(relative errors of the gradients that an optimizer has scaled, how many it counted as failures)."""
    slow = [[nn.Parameter(side.detach().double()) for side in pair] for pair in pairs]
    for mine, theirs in zip(pairs, slow, strict=True):
        for side, twin in zip(mine, theirs, strict=True):
            assert side.grad is not None
            twin.grad = side.grad.double()
    before = [side.detach().clone() for pair in slow for side in pair]
    relative = options.get("damping_mode") == "relative"
    ReferenceScaled(slow, 1.0, damping=options["damping"], relative=relative, betas=None).step()  # type: ignore[arg-type]
    named = [(f"{i}.lora_{'AB'[j]}", side) for i, pair in enumerate(pairs) for j, side in enumerate(pair)]
    optimizer = ScaledGD(named, 0.0, **options)
    optimizer.step()
    wanted = [old - new.detach() for old, new in zip(before, (s for pair in slow for s in pair), strict=True)]
    scaled = [side.grad.double() for pair in pairs for side in pair if side.grad is not None]
    found = [(a - b).norm() / b.norm() for a, b in zip(scaled, wanted, strict=True)]
    return torch.stack(found), optimizer.fallbacks


@pytest.mark.parametrize("rank", [4, 64], ids=["stacked", "alone"])  # read in portions, or where they lie
@pytest.mark.parametrize("mode", ["absolute", "relative"])
def test_ill_conditioned_factors_scale_gradients_exactly(rank: int, mode: str):
    torch.manual_seed(0)
    found, counted = errors(couples(rank, 4.0), damping=1e-9, damping_mode=mode)
    assert len(found) == 40 and found.max() < 0.01 and counted == 0


@pytest.mark.parametrize("rank", [4, 64])
def test_float32_alone_would_be_wrong(rank: int, monkeypatch):
    monkeypatch.setattr(preconditioner, "_INEXACT", float("inf"))
    torch.manual_seed(0)
    found, counted = errors(couples(rank, 4.0), damping=1e-9)
    assert (found > 0.05).sum() >= 3 and counted < (found > 0.05).sum()


@pytest.mark.parametrize("alone", [False, True])
def test_a_run_at_high_rank_and_rate_is_scaled_exactly(alone: bool, monkeypatch):
    """Factors as training leaves them: rank 64 on layers of width 64, at a rate of 1e-2."""
    if alone:  # float32, that is
        monkeypatch.setattr(preconditioner, "_INEXACT", float("inf"))
    torch.manual_seed(0)
    base = nn.Sequential(nn.Linear(64, 64), nn.Tanh(), nn.Linear(64, 64))
    model = inject_adapter_in_model(LoraConfig(r=64, lora_alpha=64, target_modules=["0", "2"]), base)
    optimizer = ScaledAdamW(model, 1e-2)
    target, damping, off = torch.randn(64, 64) / 8, 1e-6 * torch.eye(64, dtype=torch.float64), 0
    for _ in range(100):
        x = torch.randn(8, 64)
        optimizer.zero_grad()
        (model(x) - torch.tanh(x @ target)).square().mean().backward()
        wanted = []
        for pair in optimizer.pairs:
            A, B, dA, dB = (t.double() for t in (pair.A.detach(), pair.B.detach(), pair.A.grad, pair.B.grad))  # type: ignore[union-attr]
            wanted += [torch.linalg.solve(B.T @ B + damping, dA), torch.linalg.solve(A @ A.T + damping, dB.T).T]
        optimizer.step()
        grads = [side.grad for pair in optimizer.pairs for side in (pair.A, pair.B)]
        off += sum(bool((g - w).norm() > 0.01 * w.norm()) for g, w in zip(grads, wanted, strict=True))
    assert off > 40 if alone else off == optimizer.fallbacks == 0


def test_what_float64_does_not_carry_either_is_counted():
    torch.manual_seed(0)
    pairs = couples(16, 0.0, 6)
    for _, B in pairs[:2]:
        B.data[:, 1] = B.data[:, 0]  # singular
    found, counted = errors(pairs, damping=1e-15)
    assert counted == 2 and sorted(found)[-3] < 0.01


def test_damping_of_either_kind_avoids_it():
    """As the warning says."""
    for options in ({"damping": 1e-3}, {"damping": 1e-6, "damping_mode": "relative"}):
        torch.manual_seed(0)
        pairs = couples(16, 0.0, 6)
        for _, B in pairs[:2]:
            B.data[:, 1] = B.data[:, 0]
        found, counted = errors(pairs, **options)
        assert counted == 0 and found.max() < 0.01


def test_well_conditioned_factors_need_no_float64(monkeypatch):
    monkeypatch.setattr(preconditioner.DampedInverse, "invert_exactly", None)  # a call would fail
    found, counted = errors(couples(16, 1.0), damping=1e-6)
    assert found.max() < 1e-4 and counted == 0


def test_factors_too_small_for_squares_in_float32():
    torch.manual_seed(0)
    pairs = couples(4, 1.0, 4)
    for _, B in pairs:
        B.data *= 1e-16  # the Gram matrix is 1e-32, and its inverse 1e32
    found, counted = errors(pairs, damping=0.0)
    assert counted == 0 and found.max() < 0.01
