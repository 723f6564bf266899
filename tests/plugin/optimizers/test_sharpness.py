"""The sharpness-aware optimizers against the golden trajectory, their slow twin, torch, and known faults of others."""

import copy
import doctest
import inspect
import io
import json
import pickle
import random
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adadelta, Adam, AdamW, NAdam, Optimizer, RMSprop, SparseAdam
from torch.optim.lr_scheduler import LambdaLR
from torch.utils._python_dispatch import TorchDispatchMode

from equipoise import AdaSAM, AlphaAdam, BoundedAdamW, ScaledAdamW, SharpnessAware, attach, bounded, scaled
from equipoise.errors import InputError
from equipoise.optimizers import sharpness as module
from equipoise.optimizers.amsgrad import AMSGrad
from equipoise.optimizers.reference import ReferenceAdaSAM
from equipoise.optimizers.sharpness import SAM

GOLDEN = Path(__file__).parents[2] / "golden" / "ada_sam.json"  # float64 trajectory of an independent numpy twin
EXACT = 1e-10  # float64: what is left is the order of a few sums


def net(dtype: torch.dtype = torch.float64) -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).to(dtype)


def batch(index: int, dtype: torch.dtype = torch.float64, size: int = 7) -> Tensor:
    return torch.randn(size, 6, generator=torch.Generator().manual_seed(index), dtype=torch.float64).to(dtype)


def loss_of(model: nn.Module, index: int) -> Tensor:
    return model(batch(index, next(model.parameters()).dtype)).square().mean()


def closure_of(model: nn.Module, optimizer: Optimizer, index: int, calls: list[Tensor] | None = None):
    def closure():
        assert torch.is_grad_enabled()
        optimizer.zero_grad()
        loss = loss_of(model, index)
        loss.backward()
        if calls is not None:
            calls.append(flat(model))
        return loss

    return closure


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for index in steps:
        optimizer.step(closure_of(model, optimizer, index))


def train_plain(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for index in steps:
        closure_of(model, optimizer, index)()
        optimizer.step()


def train_by_hand(model: nn.Module, optimizer, steps: range) -> None:
    for index in steps:
        optimizer.zero_grad()
        loss_of(model, index).backward()
        if optimizer.perturb():
            loss_of(model, index).backward()
            optimizer.restore()
        optimizer.step()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten().double() for param in model.parameters()])


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> bool:
    return bool((flat(a) - flat(b)).abs().max() <= tolerance)


def moments(optimizer: Optimizer) -> list[Tensor]:
    return [value for state in optimizer.state.values() for value in state.values() if isinstance(value, Tensor)]


# Against the golden trajectory, the slow twin and torch


def golden() -> tuple[dict, nn.Parameter, Tensor, list[Tensor]]:
    read = json.loads(GOLDEN.read_text())
    x, Q, b = (torch.tensor(read[name], dtype=torch.float64) for name in ("x0", "Q", "b"))
    return read, nn.Parameter(x), Q, list(b)


@pytest.mark.parametrize("loop", ["closure", "by hand"])
@pytest.mark.parametrize("split", [1, 3], ids=["one tensor", "three tensors in two groups"])
def test_golden_trajectory(loop: str, split: int):
    read, x, Q, b = golden()
    parts = [nn.Parameter(part.detach().clone()) for part in x.tensor_split(split)]
    groups = [{"params": parts[:1]}, {"params": parts[1:]}] if split > 1 else parts
    optimizer = AdaSAM(groups, lr=read["lr"], rho=read["rho"], betas=tuple(read["betas"]), eps=read["eps"])
    assert len(b) == len(read["steps"]) == 10
    for linear, wanted in zip(b, read["steps"], strict=True):

        def evaluate(linear: Tensor = linear) -> Tensor:
            optimizer.zero_grad()
            whole = torch.cat(parts)
            loss = whole @ Q @ whole / 2 + linear @ whole
            loss.backward()
            return loss

        if loop == "closure":
            optimizer.step(evaluate)
        else:
            evaluate()
            assert optimizer.perturb()
            evaluate()
            optimizer.restore()
            optimizer.step()
        wanted = torch.tensor(wanted, dtype=torch.float64)
        torch.testing.assert_close(torch.cat(parts).detach(), wanted, rtol=0, atol=EXACT)


@pytest.mark.parametrize("adaptive", [False, True])
@pytest.mark.parametrize("betas", [(0.9, 0.999), (0.0, 0.999)])
@pytest.mark.parametrize("penalty", [0.0, 0.7])
def test_matches_the_slow_twin_step_by_step(adaptive: bool, betas, penalty: float):
    _, x, Q, b = golden()
    options = {"rho": 0.3, "betas": betas, "eps": 1e-4, "adaptive": adaptive, "penalty": penalty}
    twin = ReferenceAdaSAM(x.detach().clone(), 0.05, **options)
    optimizer = AdaSAM([x], lr=0.05, **options)
    assert len(b) == 10
    for linear in b:

        def closure(linear: Tensor = linear) -> Tensor:
            optimizer.zero_grad()
            loss = x @ Q @ x / 2 + linear @ x
            loss.backward()
            return loss

        optimizer.step(closure)
        twin.step(lambda at, linear=linear: Q @ at + linear)
        torch.testing.assert_close(x.detach(), twin.x, rtol=0, atol=EXACT)


def reading_gap(eps: float, rho: float, steps: int, **options) -> float:
    """How far AdaSAM's step is from AdamW's with amsgrad, whose rate is set so that their first steps agree."""
    model, betas = net(), (0.9, 0.999)
    other = copy.deepcopy(model)
    ours = AdaSAM(model, lr=1e-2, rho=rho, betas=betas, eps=eps)
    rate = 1e-2 * (1 - betas[0]) / (1 - betas[1]) ** 0.5  # what bias correction would have divided by
    make = SharpnessAware(AdamW) if rho else AdamW
    options |= {"rho": rho} if rho else {}
    torchs = make(other.parameters(), lr=rate, betas=betas, eps=0.0, weight_decay=0.0, amsgrad=True, **options)
    train(model, ours, range(steps))
    train(other, torchs, range(steps))
    return float((flat(model) - flat(other)).abs().max())


def test_a_second_beta_of_1_is_sam_as_remark_1_has_it():
    """√v̂ then stays eps, and the rate is lr/eps; m has 1 − β₁ of each gradient, where SGD's momentum has all."""
    model = net()
    other = copy.deepcopy(model)
    train(model, AdaSAM(model, lr=1e-3, rho=0.1, betas=(0.9, 1.0), eps=1e-2), range(10))
    train(other, SAM(other, lr=1e-3 / 1e-2 * (1 - 0.9), rho=0.1, momentum=0.9), range(10))
    assert same(model, other, EXACT)
    with pytest.raises(InputError, match=r"below 1; the second alone may be 1; got \(1.0, 1.0\)"):
        AdaSAM(model, betas=(1.0, 1.0))


@pytest.mark.parametrize("rho", [0.0, 0.1])
def test_agrees_with_torchs_amsgrad_on_the_first_step_and_not_later(rho: float):
    """m/√v̂ is then (1−β₁)g/√(1−β₂)|g|, of which torch corrects the factors away; from the second step they differ."""
    assert reading_gap(1e-12, rho, 1) < EXACT
    assert reading_gap(1e-12, rho, 2) > 1e-4
    assert reading_gap(10.0, rho, 1) > 1e-4, "a large eps is where v̂ starts, not something added"


def test_without_moments_and_perturbation_it_is_torchs_amsgrad():
    """β₁ = β₂ = 0: no start at zero to correct. eps as v̂'s start or added: 0 either way but for the last bits."""
    model = net()
    other = copy.deepcopy(model)
    ours = AdaSAM(model, lr=1e-2, rho=0.0, betas=(0.0, 0.0), eps=1e-30)
    torchs = AdamW(other.parameters(), lr=1e-2, betas=(0.0, 0.0), eps=0.0, weight_decay=0.0, amsgrad=True)
    train(model, ours, range(10))
    train(other, torchs, range(10))
    assert same(model, other, EXACT)


@pytest.mark.parametrize("base", [SGD, AdamW, NAdam, RMSprop, AMSGrad, AlphaAdam])
def test_rho_0_is_the_base_to_the_bit_and_else_it_is_not(base: type[Optimizer]):
    models = [net() for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    train_plain(models[0], base(models[0].parameters(), lr=1e-2), range(10))
    for model, rho in zip(models[1:], (0.0, 0.1), strict=True):
        train(model, SharpnessAware(base)(model.parameters(), lr=1e-2, rho=rho), range(10))
    assert same(models[0], models[1])
    assert not same(models[0], models[2], 1e-6)


def test_the_second_point_is_rho_away_up_the_gradient_and_the_base_steps_from_the_first():
    model, rate = net(), 0.1
    start = flat(model)
    optimizer = SAM(model.parameters(), lr=rate, rho=0.3)
    seen: list[Tensor] = []
    loss = optimizer.step(closure_of(model, optimizer, 0, seen))
    assert len(seen) == 2 and torch.equal(seen[0], start)
    other = net()
    nn.utils.vector_to_parameters(start, other.parameters())
    expected = loss_of(other, 0)
    assert loss.item() == expected.item(), "the loss is that of the first evaluation"
    s = torch.cat([grad.flatten() for grad in torch.autograd.grad(expected, list(other.parameters()))])
    torch.testing.assert_close(seen[1], start + 0.3 * s / s.norm(), rtol=0, atol=EXACT)
    nn.utils.vector_to_parameters(seen[1], other.parameters())
    g = torch.cat([grad.flatten() for grad in torch.autograd.grad(loss_of(other, 0), list(other.parameters()))])
    torch.testing.assert_close(flat(model), start - rate * g, rtol=0, atol=EXACT)


def test_maximising_looks_for_the_worst_point_downwards():
    model = net()
    other = copy.deepcopy(model)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.3)
    flipped = SAM(other.parameters(), lr=0.1, rho=0.3, maximize=True)

    def closure():
        flipped.zero_grad()
        loss = -loss_of(other, 0)
        loss.backward()
        return loss

    optimizer.step(closure_of(model, optimizer, 0))
    flipped.step(closure)
    assert same(model, other)


def test_options_differ_by_group_and_the_norm_is_over_all():
    model = net()
    first, last = list(model[0].parameters()), list(model[2].parameters())
    optimizer = SAM([{"params": first, "rho": 0.0}, {"params": last, "rho": 0.3, "adaptive": True}], lr=0.1)
    optimizer.zero_grad()
    loss_of(model, 0).backward()
    start = flat(model)
    count = sum(param.numel() for param in first)
    weight = torch.cat([torch.ones(count, dtype=torch.float64), start[count:].abs()])
    weighted = weight * torch.cat([param.grad.flatten() for param in model.parameters()])
    rho = torch.where(torch.arange(len(start)) < count, 0.0, torch.tensor(0.3, dtype=torch.float64))
    expected = rho * weight * weighted / weighted.norm()
    assert optimizer.perturb()
    torch.testing.assert_close(flat(model) - start, expected, rtol=0, atol=EXACT)
    optimizer.restore()
    assert torch.equal(flat(model), start)


def test_every_evaluates_twice_only_on_each_nth_step_and_a_resumed_run_keeps_count():
    model = net()
    optimizer = AdaSAM(model, lr=1e-2, every=3)
    counts = []

    def step(model, optimizer, index):
        calls: list[Tensor] = []
        optimizer.step(closure_of(model, optimizer, index, calls))
        counts.append(len(calls))

    for index in range(4):
        step(model, optimizer, index)
    other = copy.deepcopy(model)
    resumed = AdaSAM(other, lr=1e-2)
    resumed.load_state_dict(optimizer.state_dict())
    for index in range(4, 8):
        step(other, resumed, index)
    assert counts == [2, 1, 1, 2, 1, 1, 2, 1]
    hand = net()
    by_hand = AdaSAM(hand, lr=1e-2, every=3)
    due = []
    for index in range(4):
        loss_of(hand, index).backward()
        due.append(by_hand.perturb())
        by_hand.restore()
        by_hand.step()
    assert due == [True, False, False, True]


# What other implementations get wrong


def test_the_state_holds_the_bases_moments_and_resuming_is_exact():
    for cls in (AdaSAM, SAM, SharpnessAware(AdamW), SharpnessAware(Adam)):
        options = {"momentum": 0.9} if cls is SAM else {}
        model = net(torch.float32)
        optimizer = cls(model.parameters(), lr=1e-2, **options)
        train(model, optimizer, range(5))
        file = io.BytesIO()
        torch.save([model.state_dict(), optimizer.state_dict()], file)
        file.seek(0)
        weights, saved = torch.load(file, weights_only=True)
        assert len(saved["state"]) == 4 and any(value.any() for value in saved["state"][0].values())
        other = net(torch.float32)
        other.load_state_dict(weights)
        resumed = cls(other.parameters(), lr=1.0, **options)
        resumed.load_state_dict(saved)
        for index in range(5, 25):
            train(model, optimizer, range(index, index + 1))
            train(other, resumed, range(index, index + 1))
            assert same(model, other), f"{cls.__name__}, step {index}"
        assert all(map(torch.equal, moments(optimizer), moments(resumed)))


def test_a_plain_checkpoint_loads():
    model = net()
    plain = AdamW(model.parameters(), lr=1e-2)
    train_plain(model, plain, range(3))
    for own in ({"rho": 0.2}, {"rho": 0.3, "adaptive": True}):  # as the class's default, and as the group's own
        groups = [{"params": model.parameters(), **(own if "adaptive" in own else {})}]
        optimizer = SharpnessAware(AdamW)(groups, lr=1.0, every=2, **({} if "adaptive" in own else own))
        optimizer.load_state_dict(plain.state_dict())
        group = optimizer.param_groups[0]
        assert (group["lr"], group["every"]) == (1e-2, 2) and group | own == group
        train(model, optimizer, range(1))


def test_a_closure_that_does_not_clear_the_gradients_still_gives_the_second_alone():
    model = net()
    other = copy.deepcopy(model)
    first, second = SAM(model, lr=0.1), SAM(other, lr=0.1)
    train(model, first, range(1))

    def closure():
        loss = loss_of(other, 0)
        loss.backward()
        return loss

    second.step(closure)
    assert same(model, other)


def test_by_hand_equals_the_closure():
    for cls in (AdaSAM, SharpnessAware(AdamW)):
        model = net()
        other = copy.deepcopy(model)
        train(model, cls(model.parameters(), lr=1e-2, rho=0.1), range(10))
        train_by_hand(other, cls(other.parameters(), lr=1e-2, rho=0.1), range(10))
        assert same(model, other)


def test_a_step_without_a_second_evaluation_is_refused():
    model = net()
    optimizer = AdaSAM(model)
    loss_of(model, 0).backward()
    before = flat(model)
    with pytest.raises(InputError, match=r"AdaSAM evaluates each batch twice: call step\(closure\)"):
        optimizer.step()
    assert optimizer.perturb()
    with pytest.raises(InputError, match=r"still perturbed. Call restore\(\) before step\(\)."):
        optimizer.step()
    optimizer.restore()
    optimizer.restore()
    assert torch.equal(flat(model), before)
    loss_of(model, 0).backward()
    optimizer.step()
    assert not torch.equal(flat(model), before)
    with pytest.raises(InputError, match="evaluates each batch twice"):
        optimizer.step()


@pytest.mark.parametrize("loop", ["closure", "by hand"])
def test_the_parameters_come_back_to_the_bit_when_the_second_evaluation_raises(loop: str):
    model = nn.Sequential(net(torch.float32), nn.BatchNorm1d(4))
    # values at which (p + δ) − δ is not p, so that subtracting would show
    with torch.no_grad():
        for param in model.parameters():
            param.mul_(1 + torch.rand_like(param)).add_(1e-7)
    optimizer = SAM(model.parameters(), lr=0.1, rho=0.7)
    before = flat(model)
    statistics = []
    calls = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        calls.append(flat(model))
        statistics.append([buffer.clone() for buffer in model.buffers()])
        if len(calls) == 2:
            raise KeyError("out of memory, say")
        return loss

    if loop == "closure":
        with pytest.raises(KeyError):
            optimizer.step(closure)
    else:
        closure()
        assert optimizer.perturb()
        with pytest.raises(KeyError):
            closure()
        optimizer.restore()
    assert len(calls) == 2 and not torch.equal(calls[1], before)
    assert torch.equal(flat(model), before)
    assert all(map(torch.equal, statistics[0], model.buffers()))
    if loop == "closure":
        with pytest.raises(InputError, match="evaluates each batch twice"):
            optimizer.step()
    optimizer.step(closure)
    assert not torch.equal(flat(model), before)


def test_a_left_over_perturbation_is_refused_by_hand_and_undone_before_a_closure():
    model = net()
    optimizer = SAM(model, lr=0.0, rho=0.5)
    before = flat(model)
    for _ in range(2):
        loss_of(model, 0).backward()
        optimizer.perturb()  # and a loop that went on to its next batch after an error
        assert not torch.equal(flat(model), before)
        optimizer.zero_grad()
        loss_of(model, 1).backward()
        with pytest.raises(InputError, match=r"still perturbed, .* call restore\(\) before the next forward pass"):
            optimizer.perturb()
        assert torch.equal(flat(model), before)
        with pytest.raises(InputError, match="evaluates each batch twice"):
            optimizer.step()
    loss_of(model, 0).backward()
    assert optimizer.perturb()
    calls: list[Tensor] = []
    optimizer.step(closure_of(model, optimizer, 0, calls))
    assert len(calls) == 2 and torch.equal(calls[0], before) and not torch.equal(calls[1], before)
    assert torch.equal(flat(model), before)


@pytest.mark.parametrize("loop", ["closure", "by hand"])
def test_the_second_evaluation_is_elsewhere_inside_autocast_too(loop: str):
    """Autocast keeps the low-precision copies of weights until its outermost block ends."""
    model = net(torch.float32)
    optimizer = SAM(model, lr=0.0, rho=5.0)
    seen = []

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0).float()
        loss.backward()
        seen.append(loss.item())
        return loss

    with torch.autocast("cpu", torch.bfloat16):
        if loop == "closure":
            optimizer.step(closure)
        else:
            closure()
            assert optimizer.perturb()
            closure()
            optimizer.restore()
        closure()
    assert seen[1] > seen[0] == seen[2]


def test_a_zero_gradient_perturbs_nothing():
    model = net()
    optimizer = SAM(model, lr=0.1, rho=0.5, momentum=0.9)
    before, seen = flat(model), []

    def closure():
        optimizer.zero_grad()
        loss = (model(batch(0)) * 0).sum()
        loss.backward()
        seen.append(flat(model))
        return loss

    optimizer.step(closure)
    assert len(seen) == 2 and all(torch.equal(point, before) for point in [*seen, flat(model)])


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@pytest.mark.parametrize("adaptive", [False, True])
def test_a_gradient_that_is_not_finite_perturbs_nothing(bad: float, adaptive: bool):
    model = net()
    optimizer = SAM(model, lr=0.1, rho=0.5, adaptive=adaptive)
    before = flat(model)
    loss_of(model, 0).backward()
    model[0].weight.grad[1, 2] = bad
    assert optimizer.perturb()
    assert torch.equal(flat(model), before)
    optimizer.restore()


@pytest.mark.parametrize("dtype", [torch.float32, torch.float16])
def test_the_direction_is_free_of_the_gradients_scale(dtype: torch.dtype):
    """float16: the norm of scaled gradients is beyond what the dtype holds, and so is ρ over that of small ones."""
    moved = []
    for scale in (1.0, 2.0**-12, 2.0**15):
        model = net(dtype)
        nn.utils.vector_to_parameters(torch.linspace(-1, 1, len(flat(model))).to(dtype), model.parameters())
        start = flat(model)
        for param in model.parameters():
            param.grad = torch.full_like(param, scale)
        assert SAM(model, rho=0.5).perturb()
        moved.append(flat(model) - start)
    assert torch.equal(moved[0], moved[1]) and torch.equal(moved[0], moved[2])
    assert moved[0].norm().item() == pytest.approx(0.5, rel=1e-2)


@pytest.mark.parametrize("fused", [True, False])
def test_grad_scaler_changes_nothing_and_skips_overflow(fused: bool):
    models = [net(torch.float32) for _ in range(3)]
    for model in models[1:]:
        model.load_state_dict(models[0].state_dict())
    cls = SharpnessAware(AdamW)
    plain, *scaled_ones = (cls(model.parameters(), lr=1e-2, rho=0.1, fused=fused) for model in models)
    train_by_hand(models[0], plain, range(10))
    for unscale, model, optimizer in zip((False, True), models[1:], scaled_ones, strict=True):
        scaler = torch.amp.GradScaler("cpu", init_scale=2.0**10, growth_interval=4)

        def step(index, blow=None, scaler=scaler, model=model, optimizer=optimizer, unscale=unscale):
            optimizer.zero_grad()
            scaler.scale(loss_of(model, index) * (torch.inf if blow == "first" else 1)).backward()
            if optimizer.perturb():
                scaler.scale(loss_of(model, index) * (torch.inf if blow else 1)).backward()
                optimizer.restore()
            if unscale:
                scaler.unscale_(optimizer)
                nn.utils.clip_grad_norm_(model.parameters(), 1e9)
            scaler.step(optimizer)
            scaler.update()

        for index in range(10):
            if index in (3, 6):
                before, scale = flat(model), scaler.get_scale()
                step(index, "first" if index == 3 else "second")
                assert torch.equal(flat(model), before), "an overflow in either evaluation skips the step"
                assert scaler.get_scale() == scale / 2
            step(index)
        # equal but for the rounding of clipping's factor, 1
        assert same(models[0], model, 1e-6)


@pytest.mark.parametrize("make", [SharpnessAware(AdamW), AdaSAM, scaled(SAM)])
@pytest.mark.parametrize("fused", [True, False])
def test_a_closure_through_grad_scaler_is_refused_unless_that_is_off(make, fused: bool):
    """Positional, as accelerate passes it: torch itself refuses it only as a keyword."""
    model = net(torch.float32)
    optimizer = make(model, **({} if make is AdaSAM else {"fused": fused}))
    before = flat(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=1024.0)

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        scaler.scale(loss).backward()
        return loss

    closure()
    with pytest.raises(InputError, match=r"still multiplied by the scale. Call backward, perturb\(\), .* restore\(\)"):
        scaler.step(optimizer, closure)
    assert torch.equal(flat(model), before)
    scaler = torch.amp.GradScaler("cpu", enabled=False)
    scaler.step(optimizer, closure)
    assert not torch.equal(flat(model), before)


def test_a_step_that_grad_scaler_skipped_does_not_let_the_next_one_through():
    model = net(torch.float32)
    optimizer = AdaSAM(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=4.0)
    for every in (1, 2):  # with a second evaluation, and without one, as between `every`
        optimizer.param_groups[0].update(every=every, sharpness_step=1)
        scaler.scale(loss_of(model, 0) * torch.inf).backward()
        if optimizer.perturb():
            optimizer.zero_grad()  # here, of no meaning
            scaler.scale(loss_of(model, 0) * torch.inf).backward()
            optimizer.restore()
        scaler.step(optimizer)
        scaler.update()
        optimizer.zero_grad()
        before = flat(model)
        loss_of(model, 1).backward()
        with pytest.raises(InputError, match="evaluates each batch twice"):
            optimizer.step()
        assert torch.equal(flat(model), before)
        optimizer.zero_grad(set_to_none=False)
        assert not any(param.grad.any() for param in model.parameters())


def test_schedulers_drive_it_also_one_made_before():
    for made_before in (False, True):
        model = net()
        optimizer = AdamW(model.parameters(), lr=1e-2) if made_before else SharpnessAware(AdamW)(model.parameters())
        schedule = LambdaLR(optimizer, lambda step: 1.0 if step < 2 else 0.0)
        if made_before:
            assert SharpnessAware(optimizer, rho=0.1) is optimizer
        calls: list[Tensor] = []
        for index in range(2):
            optimizer.step(closure_of(model, optimizer, index, calls))
            schedule.step()
        assert len(calls) == 4
        before = flat(model)
        optimizer.step(closure_of(model, optimizer, 2))
        assert torch.equal(flat(model), before)


def accumulated(model: nn.Module, optimizer, backward, steps: int) -> None:
    """Two micro-batches to a step, all of which are evaluated again."""

    def evaluate(index: int) -> None:
        for micro in (0, 1):
            backward(loss_of(model, 2 * index + micro) / 2)

    for index in range(steps):
        optimizer.zero_grad()
        evaluate(index)
        if optimizer.perturb():
            evaluate(index)
            optimizer.restore()
        optimizer.step()


def test_accumulation_is_one_large_batch():
    model = net()
    other = copy.deepcopy(model)
    optimizer = AdaSAM(other, lr=1e-2, rho=0.1)
    accumulated(model, AdaSAM(model, lr=1e-2, rho=0.1), Tensor.backward, 10)
    for index in range(10):

        def closure(index=index):
            optimizer.zero_grad()
            loss = other(torch.cat([batch(2 * index), batch(2 * index + 1)])).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
    assert same(model, other, EXACT)


def test_under_accelerate():
    from accelerate import Accelerator
    from accelerate.state import AcceleratorState, GradientState

    AcceleratorState._reset_state(True)
    GradientState._reset_state()
    accelerator = Accelerator(cpu=True, gradient_accumulation_steps=2)
    model = net()
    other = copy.deepcopy(model)
    prepared, wrapper = accelerator.prepare(model, AdamW(model.parameters(), lr=1e-2))
    assert SharpnessAware(wrapper, rho=0.1) is wrapper
    inner = wrapper.optimizer
    for index in range(6):
        for micro in (0, 1):
            with accelerator.accumulate(prepared):
                accelerator.backward(loss_of(prepared, 2 * index + micro))
                if accelerator.sync_gradients and inner.perturb():
                    for again in (0, 1):
                        accelerator.backward(loss_of(prepared, 2 * index + again))
                    inner.restore()
                    accelerator.clip_grad_norm_(prepared.parameters(), 1e9)
                wrapper.step()
                wrapper.zero_grad()
    accumulated(other, SharpnessAware(AdamW)(other.parameters(), lr=1e-2, rho=0.1), Tensor.backward, 6)
    assert same(model, other, 1e-7)  # clipping multiplies by 1/(1 + 1e-6/norm)-like factors
    called: list[int] = []
    for micro in (0, 1):  # what the docs warn of: accelerate leaves the closures of all but the last out
        with accelerator.accumulate(prepared):
            wrapper.step(lambda micro=micro: called.append(micro) or closure_of(model, wrapper, micro)())
    assert called == [1, 1]
    wrapper.step(closure_of(model, wrapper, 0))  # and the closure, through the wrapper


_DDP = """
import os, sys
import torch
import torch.distributed as dist
from torch import nn
from equipoise import AdaSAM

rank, world, port, out = int(sys.argv[1]), int(sys.argv[2]), sys.argv[3], sys.argv[4]
torch.set_num_threads(1)
torch.manual_seed(0)
model = nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4)).double()
data = torch.randn(5, 2, 8, 6, dtype=torch.float64)  # (steps, micro-batches, samples, features)
wrapped = model
if world > 1:
    os.environ.update(MASTER_ADDR="127.0.0.1", MASTER_PORT=port)
    dist.init_process_group("gloo", rank=rank, world_size=world)
    wrapped = nn.parallel.DistributedDataParallel(model)
optimizer = AdaSAM(wrapped, lr=1e-2, rho=0.2)
for step in data:
    def evaluate():
        first, second = (micro[rank::world] for micro in step)
        if world > 1:
            with wrapped.no_sync():
                (wrapped(first).square().mean() / 2).backward()
        else:
            (wrapped(first).square().mean() / 2).backward()
        (wrapped(second).square().mean() / 2).backward()
    optimizer.zero_grad()
    evaluate()
    if optimizer.perturb():
        evaluate()
        optimizer.restore()
    optimizer.step()
torch.save(torch.cat([p.detach().flatten() for p in model.parameters()]), f"{out}/{world}-{rank}.pt")
if world > 1:
    dist.destroy_process_group()
"""


@pytest.mark.slow
def test_two_processes_take_the_steps_of_one(tmp_path: Path, forked):
    """DistributedDataParallel with accumulation under no_sync: both processes perturb by the averaged gradient."""
    import socket

    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    script = tmp_path / "train.py"
    script.write_text(_DDP)
    started = [
        forked.start(tmp_path, str(script), str(rank), str(world), port, str(tmp_path))
        for world, rank in ((1, 0), (2, 0), (2, 1))
    ]
    for ended in [end() for end in started]:
        assert ended.returncode == 0, ended.stderr
    one, first, second = (torch.load(tmp_path / f"{name}.pt") for name in ("1-0", "2-0", "2-1"))
    assert torch.equal(first, second)
    torch.testing.assert_close(one, first, rtol=0, atol=EXACT)


class Normed(nn.Module):
    """A backbone that is not trained, and a head that is; both keep statistics."""

    def __init__(self):
        super().__init__()
        self.backbone = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).requires_grad_(False)
        self.head = nn.Sequential(nn.Linear(5, 5), nn.BatchNorm1d(5, momentum=None), nn.Linear(5, 4))
        self.plain = nn.BatchNorm1d(4, track_running_stats=False)

    def forward(self, x: Tensor) -> Tensor:
        return self.plain(self.head(self.backbone(x))) * torch.arange(1, 5)


@pytest.mark.parametrize("loop", [train, train_by_hand])
def test_running_statistics_count_each_batch_once(loop):
    model = Normed().double()
    other = copy.deepcopy(model)
    loop(model, SAM(model.head.parameters(), lr=0.0, rho=0.5), range(4))
    for index in range(4):
        other(batch(index))
    buffers = dict(other.named_buffers())
    assert len(buffers) == 6 and all(torch.equal(buffers[name], value) for name, value in model.named_buffers())
    assert buffers["head.1.num_batches_tracked"] == 4


def test_running_statistics_of_a_frozen_part_that_stands_apart_count_each_batch_once():
    backbone, head = nn.Sequential(nn.Linear(6, 5), nn.BatchNorm1d(5)).requires_grad_(False), nn.Linear(5, 3)
    optimizer = SAM(head, lr=0.1)

    def closure():
        optimizer.zero_grad()
        loss = head(backbone(batch(0, torch.float32))).square().mean()
        loss.backward()
        return loss

    for count in (1, 2):
        optimizer.step(closure)
        assert backbone[1].num_batches_tracked == count


def test_the_random_numbers_are_the_same_in_both_evaluations_and_advance_once():
    """Dropout, and the noise of a diffusion loss."""
    model = nn.Sequential(net(), nn.Dropout(0.5))
    optimizer = SAM(model, lr=0.0, rho=0.1)
    drawn = []

    def closure():
        drawn.append((torch.rand(3), model[1](torch.ones(50))))
        return closure_of(model, optimizer, 0)()

    torch.manual_seed(1)
    optimizer.step(closure)
    after = torch.rand(3)
    assert len(drawn) == 2 and all(map(torch.equal, *drawn))
    torch.manual_seed(1)
    closure()
    assert torch.equal(after, torch.rand(3))


OF_THE_MODULE = random.Random(3)


def test_generators_that_the_closure_names_give_the_same_numbers_in_both_evaluations():
    """And Python's and NumPy's own, of which captions and masks are drawn."""
    optimizer = SAM(model := net(), lr=0.0, rho=0.1)
    drawn: list[list[float]] = []
    around, its_own = torch.Generator().manual_seed(1), np.random.default_rng(1)

    def closure(default: np.random.Generator = its_own):
        numbers = [torch.rand((), generator=around).item(), default.random(), OF_THE_MODULE.random()]
        drawn.append([*numbers, random.random(), np.random.rand()])
        return closure_of(model, optimizer, 0)()

    optimizer.step(closure)
    optimizer.step(closure)
    assert drawn[0] == drawn[1] and drawn[2] == drawn[3]
    assert all(one != other for one, other in zip(drawn[0], drawn[2], strict=True)), "they go on from step to step"


def test_nothing_waits_for_the_device():
    """Reading one number of a tensor is what would; on the CPU it can be caught."""

    class Watch(TorchDispatchMode):
        def __torch_dispatch__(self, func, types, args=(), kwargs=None):
            assert func is not torch.ops.aten._local_scalar_dense.default, "a number was read"
            return func(*args, **(kwargs or {}))

    model = nn.Sequential(net(), nn.BatchNorm1d(4).double())
    for adaptive in (False, True):
        optimizer = AdaSAM(model, rho=0.1, adaptive=adaptive)
        for index in range(2):
            loss_of(model, index).backward()
            with Watch():
                assert optimizer.perturb()
            loss_of(model, index).backward()
            with Watch():
                optimizer.restore()
                optimizer.step()
    with pytest.raises(AssertionError, match="a number was read"), Watch():
        torch.ones(1).item()


def test_frozen_and_missing_gradients_stay_where_they_are():
    model = net()
    model[0].weight.requires_grad_(False)
    unused = nn.Parameter(torch.ones(3, dtype=torch.float64))
    params = [*model.parameters(), unused]
    optimizer = AdaSAM(params, lr=1e-2, rho=0.5)
    before = [param.detach().clone() for param in params]
    train(model, optimizer, range(3))
    moved = [not torch.equal(a, b) for a, b in zip(before, params, strict=True)]
    assert moved == [False, True, True, True, False]


def test_hooks_of_others_fire_once_with_the_gradient_that_counts():
    model = net()
    optimizer = SharpnessAware(AdamW)(model.parameters(), lr=0.1, rho=0.5)
    seen: list[str] = []
    points: list[Tensor] = []
    optimizer.register_step_pre_hook(lambda *_: seen.append("before") or points.append(flat(model)))
    optimizer.register_step_post_hook(lambda *_: seen.append("after"))
    start = flat(model)
    optimizer.step(closure_of(model, optimizer, 0))
    assert seen == ["before", "after"] and torch.equal(points[0], start)


def test_a_base_whose_step_calls_its_parents_is_evaluated_twice_and_no_more():
    class Child(AdamW):
        def step(self, closure=None):
            return super().step(closure)

    model = net()
    other = copy.deepcopy(model)
    AdamW(net().parameters())  # so that torch has put its hooks around AdamW.step too
    optimizer, calls = SharpnessAware(Child)(model.parameters(), lr=1e-2), []
    for index in range(3):
        optimizer.step(closure_of(model, optimizer, index, calls))
    train(other, SharpnessAware(AdamW)(other.parameters(), lr=1e-2), range(3))
    assert len(calls) == 6 and same(model, other)


def test_complex_parameters_are_pairs_of_real_ones():
    start = torch.randn(4, dtype=torch.complex128)
    weight, pairs = nn.Parameter(start.clone()), nn.Parameter(torch.view_as_real(start).clone())
    target = torch.randn(4, 2, dtype=torch.float64)
    for adaptive in (False, True):
        for param, real in ((weight, torch.view_as_real), (pairs, lambda tensor: tensor)):
            optimizer = AdaSAM([param], lr=1e-2, rho=0.3, adaptive=adaptive)

            def closure(optimizer=optimizer, param=param, real=real):
                optimizer.zero_grad()
                loss = (real(param) - target).pow(4).sum()
                loss.backward()
                return loss

            for _ in range(3):
                optimizer.step(closure)
        assert torch.equal(torch.view_as_real(weight.detach()), pairs.detach())


@pytest.mark.parametrize("maximize", [False, True])
def test_the_penalty_is_equation_3_at_the_point_that_is_left(maximize: bool):
    """λ‖x‖² beside the worst loss nearby: λ pulls to 0 also when f is maximised, and makes no way to that point."""
    weight, sign = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64)), -1 if maximize else 1
    slope = torch.tensor([1.0, 0.5], dtype=torch.float64)
    optimizer = AdaSAM([weight], lr=0.1, rho=0.5, betas=(0.0, 1.0), eps=1.0, penalty=0.25, maximize=maximize)

    def closure() -> Tensor:
        optimizer.zero_grad()
        loss = sign * slope @ weight
        loss.backward()
        return loss

    optimizer.step(closure)
    expected = torch.tensor([2.0, -3.0], dtype=torch.float64) * (1 - 0.1 * 0.5) - 0.1 * slope
    torch.testing.assert_close(weight.detach(), expected, rtol=0, atol=EXACT)


def test_weight_decay_is_decoupled_and_maximising_goes_up():
    weight = nn.Parameter(torch.tensor([2.0, -3.0], dtype=torch.float64))
    optimizer = AMSGrad([weight], lr=0.1, weight_decay=0.5)
    weight.grad = torch.zeros_like(weight)
    optimizer.step()
    torch.testing.assert_close(weight.data, 0.95 * torch.tensor([2.0, -3.0], dtype=torch.float64))
    moves = []
    for maximize in (False, True):
        weight = nn.Parameter(torch.zeros(2))
        weight.grad = torch.tensor([1.0, -2.0])
        AMSGrad([weight], lr=0.1, maximize=maximize).step()
        moves.append(weight.detach())
    assert torch.equal(moves[0], -moves[1]) and moves[0].sign().tolist() == [-1, 1]


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
def test_half_precision_rounds_only_what_is_stored(dtype: torch.dtype):
    weight = nn.Parameter(torch.randn(200).to(dtype))
    optimizer = AMSGrad([weight], lr=0.05, betas=(0.7, 0.9), weight_decay=0.3)
    for _ in range(5):
        wide = nn.Parameter(weight.detach().float())
        twin = AMSGrad([wide], lr=0.05, betas=(0.7, 0.9), weight_decay=0.3)
        twin.state[wide] = {name: value.float() for name, value in optimizer.state[weight].items()}
        weight.grad = torch.randn(200).to(dtype)
        wide.grad = weight.grad.float()
        if not twin.state[wide]:
            twin._begin(wide, {"eps": float(torch.finfo(dtype).tiny) ** 0.5 if dtype == torch.float16 else 1e-8})
        optimizer.step()
        twin.step()
        assert torch.equal(weight, wide.to(dtype))
        assert all(
            torch.equal(optimizer.state[weight][name], value.to(dtype)) for name, value in twin.state[wide].items()
        )


@pytest.mark.parametrize(("dtype", "least", "most"), [(torch.bfloat16, 0.25, 0.25), (torch.float32, 0.39, 0.4)])
def test_the_second_moment_stops_early_in_bfloat16(dtype: torch.dtype, least: float, most: float):
    """What the docstring warns of; 0.999⁵⁰⁰ = 0.606."""
    weight = nn.Parameter(torch.ones(1, dtype=dtype))
    weight.grad = torch.ones_like(weight)
    optimizer = AMSGrad([weight])
    for _ in range(500):
        optimizer.step()
    assert least <= optimizer.state[weight]["exp_avg_sq"].item() <= most


def test_a_rate_in_a_tensor_is_that_rate_and_is_not_read_on_a_device():
    moved = []
    for rate in (0.25, torch.tensor(0.25)):
        weight = nn.Parameter(torch.linspace(-1, 1, 5))
        weight.grad = torch.linspace(2, 3, 5)
        AMSGrad([weight], lr=rate, weight_decay=0.5).step()
        moved.append(weight.detach())
    assert torch.equal(*moved)
    weight = nn.Parameter(torch.empty(5, device="meta"))
    weight.grad = torch.empty_like(weight)
    AMSGrad([weight], lr=torch.tensor(0.25, device="meta"), weight_decay=0.5).step()  # there, reading raises


@pytest.mark.parametrize("kind", ["adamw", "amsgrad", "sgd", "complex"])
def test_checkpoints_of_torchs_optimizers_load_and_go_on(kind: str):
    dtype = torch.complex128 if kind == "complex" else torch.float64
    weight = nn.Parameter(torch.ones(3, dtype=dtype))
    weight.grad = torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    options = {"momentum": 0.9} if kind == "sgd" else {"amsgrad": kind == "amsgrad", "weight_decay": 0.0}
    plain = (SGD if kind == "sgd" else AdamW)([weight], 1e-2, **options)
    plain.step()
    optimizer = AdaSAM([{"params": [weight], "rho": 0.2, "eps": 1e-3}], lr=1.0)
    optimizer.load_state_dict(plain.state_dict())
    state, eps = optimizer.state[weight], optimizer.param_groups[0]["eps"]
    assert (optimizer.param_groups[0]["rho"], eps) == (0.2, 1e-3 if kind == "sgd" else 1e-8)
    assert state["max_exp_avg_sq"].abs().min() >= eps**2
    if kind != "sgd":
        assert torch.equal(state["exp_avg"], plain.state[weight]["exp_avg"])
    before = weight.detach().clone()
    weight.grad = torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    optimizer.perturb()
    weight.grad = torch.tensor([1.0, -2.0, 0.0], dtype=dtype)
    optimizer.restore()
    optimizer.step()
    assert torch.view_as_real(weight + 0j).isfinite().all() and (weight != before).tolist() == [True, True, False]


def test_float16_parameters_without_gradient_do_not_divide_zero_by_zero():
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    weight.grad = torch.tensor([0.0, 1e-3, 0.0], dtype=torch.float16)
    AMSGrad([weight]).step()
    assert weight.isfinite().all() and weight[0] == 1


# Composition


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.register_buffer("weight", torch.randn(6, 6, dtype=torch.float64))
        self.lora_A = nn.Parameter(torch.randn(2, 6, dtype=torch.float64) / 3)
        self.lora_B = nn.Parameter(torch.randn(6, 2, dtype=torch.float64) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.lora_B @ self.lora_A).T


def by_parts(model: nn.Module, base: Optimizer, rho: float, steps: range) -> None:
    """What a composition must do: the base's whole step, scaling and bound and all, on the second gradient."""
    params = list(model.parameters())
    for index in steps:
        base.zero_grad()
        loss_of(model, index).backward()
        kept = [param.detach().clone() for param in params]
        s = torch.cat([param.grad.flatten() for param in params])
        nn.utils.vector_to_parameters(nn.utils.parameters_to_vector(params).detach() + rho * s / s.norm(), params)
        base.zero_grad()
        loss_of(model, index).backward()
        with torch.no_grad():
            for param, value in zip(params, kept, strict=True):
                param.copy_(value)
        base.step()


@pytest.mark.parametrize("options", [{}, {"order": "sequential"}, {"trust": 1e-3}], ids=str)
@pytest.mark.parametrize("base", [AdamW, SGD, AMSGrad, AlphaAdam])
def test_scaling_and_the_bound_come_once_on_the_second_gradient(base: type[Optimizer], options: dict):
    make = SharpnessAware(scaled(base))
    for how in ("class", "attach", "in place"):
        model = Lora()
        other = copy.deepcopy(model)
        if how == "class":
            optimizer = make(model, lr=1e-2, damping=1e-2, rho=0.1, **options)
        elif how == "attach":
            optimizer = attach(
                SharpnessAware(base)(model.parameters(), lr=1e-2, rho=0.1), model, damping=1e-2, **options
            )
        else:
            optimizer = scaled(base)(model, lr=1e-2, damping=1e-2, **options)
            SharpnessAware(optimizer, rho=0.1)
        assert type(optimizer) is make
        train(model, optimizer, range(5))
        by_parts(other, scaled(base)(other, lr=1e-2, damping=1e-2, **options), 0.1, range(5))
        assert same(model, other, EXACT), how
        assert optimizer.fallbacks == 0


def test_sharpness_is_outermost_in_whatever_order_it_is_asked():
    assert scaled(SharpnessAware(AdamW)) is SharpnessAware(scaled(AdamW)) is SharpnessAware(ScaledAdamW)
    assert bounded(SharpnessAware(AdamW)) is SharpnessAware(BoundedAdamW)
    assert scaled(AdaSAM) is SharpnessAware(scaled(AMSGrad)) and scaled(SAM) is SharpnessAware(scaled(SGD))
    assert scaled(SharpnessAware(ScaledAdamW)) is SharpnessAware(ScaledAdamW)
    assert SharpnessAware(SGD) is SAM and SharpnessAware(AMSGrad) is AdaSAM
    assert SharpnessAware(NAdam).__name__ == "SharpnessAwareNAdam"
    model = Lora()
    assert scaled(AdaSAM)(model).param_groups[0]["rho"] == AdaSAM(model).param_groups[0]["rho"] == 0.005


@pytest.mark.parametrize("cls", [AdaSAM, SAM, SharpnessAware(NAdam), scaled(AdaSAM), bounded(SAM)])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_and_pickles_go_on(cls, copier):
    model = Lora()
    optimizer = cls(model.named_parameters(), lr=1e-2, rho=0.2)
    train(model, optimizer, range(3))
    other, copied = copier([model, optimizer])
    assert type(copied) is cls
    train(model, optimizer, range(3, 6))
    train(other, copied, range(3, 6))
    assert same(model, other)
    with pytest.raises(InputError, match="evaluates each batch twice"):
        copied.step()


def test_in_place_keeps_state_groups_and_their_own_options():
    model = net()
    other = copy.deepcopy(model)
    optimizer = AdamW([{"params": model[0].parameters(), "rho": 0.3}, {"params": model[2].parameters()}], lr=1e-2)
    plain = AdamW(other.parameters(), lr=1e-2)
    train_plain(model, optimizer, range(3))
    train_plain(other, plain, range(3))
    groups, state = optimizer.param_groups, optimizer.state
    assert SharpnessAware(optimizer, rho=0.1, every=2) is optimizer
    assert optimizer.param_groups is groups and optimizer.state is state
    assert [group["rho"] for group in groups] == [0.3, 0.1]
    train(model, optimizer, range(3, 5))
    train_plain(other, plain, range(3, 5))
    assert not same(model, other, 1e-6)


def test_a_group_added_later():
    model = net()
    optimizer = AdaSAM(model[0].parameters(), rho=0.1)
    optimizer.add_param_group({"params": model[2].parameters(), "rho": 0.2})
    assert [group["rho"] for group in optimizer.param_groups] == [0.1, 0.2]
    train(model, optimizer, range(2))
    with pytest.raises(InputError, match="parameter group 2: rho must be"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(1))], "rho": -1.0})


# Bad input


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"rho": -0.1}, "rho must be a finite number, 0 or more; got -0.1"),
        ({"rho": float("nan")}, "rho must be a finite number, 0 or more; got nan"),
        ({"rho": "0.1"}, "rho must be a finite number"),
        ({"adaptive": 1}, "adaptive must be True or False; got 1"),
        ({"every": 0}, "every must be a whole number, 1 or more; got 0"),
        ({"every": 1.5}, "every must be a whole number, 1 or more; got 1.5"),
        (
            {"betas": (1.0, 0.9)},
            "betas must be two numbers, each 0 or more and below 1; the second alone may be 1; got",
        ),
        ({"betas": 0.9}, "betas must be two numbers, each 0 or more and below 1; got 0.9."),
        ({"betas": ("a", 0.9)}, "betas must be two numbers"),
        ({"lr": None}, "lr must be a finite number, 0 or more; got None."),
        ({"lr": "0.1"}, "lr must be a finite number, 0 or more; got '0.1'."),
        ({"lr": torch.tensor([0.1])}, "lr must be a finite number, or a real tensor without dimensions; got one of"),
        ({"eps": None}, "eps must be a finite number above 0; got None."),
        ({"maximize": "no"}, "maximize must be True or False; got 'no'."),
        ({"betas": (-0.1, 0.9)}, "betas must be two numbers"),
        ({"betas": (float("nan"), 0.9)}, "betas must be two numbers"),
        ({"eps": 0.0}, "eps must be a finite number above 0; got 0.0"),
        ({"lr": -1.0}, "lr must be a finite number, 0 or more; got -1.0"),
        ({"lr": float("nan")}, "lr must be a finite number, 0 or more; got nan"),
        ({"weight_decay": float("inf")}, "weight_decay must be a finite number"),
        ({"penalty": -1.0}, "penalty must be a finite number"),
    ],
)
def test_options_out_of_bounds(options, message):
    with pytest.raises(InputError, match="AdaSAM: parameter group 0: ") as caught:
        AdaSAM(net(), **options)
    assert message in str(caught.value)


@pytest.mark.parametrize("rate", [float("nan"), float("inf")])
def test_a_rate_that_torchs_base_lets_through(rate: float):
    with pytest.raises(InputError, match="lr must be a finite number, 0 or more"):
        SAM(net(), lr=rate)


def test_sparse_gradients_of_the_base_are_refused():
    layer = nn.Embedding(5, 3, sparse=True)
    layer(torch.tensor([1, 2])).sum().backward()
    with pytest.raises(InputError, match="a gradient is sparse"):
        AMSGrad(layer.parameters()).step()


def test_every_is_one_for_all_groups():
    model = net()
    with pytest.raises(InputError, match="every is 2, and 1 in group 0"):
        SAM([{"params": model[0].parameters()}, {"params": model[2].parameters(), "every": 2}])
    optimizer = SAM(model)
    optimizer.param_groups[0]["rho"] = float("nan")
    with pytest.raises(InputError, match="rho must be"):
        train(model, optimizer, range(1))


def test_refuses_what_cannot_be_a_base():
    refused = [
        (LBFGS, "LBFGS evaluates batches as it needs them itself"),
        (SparseAdam, "SparseAdam takes sparse gradients alone"),
        (Adadelta, "Adadelta has an option rho of its own"),
        (AdaSAM, "AdaSAM is sharpness-aware already"),
        (SharpnessAware(AdamW), "SharpnessAwareAdamW is sharpness-aware already"),
        (scaled(SAM), "is sharpness-aware already"),
        (nn.Linear, r"takes a torch.optim.Optimizer or a class of them; got Linear"),
        ("adamw", r"takes a torch.optim.Optimizer or a class of them; got str"),
    ]
    for base, message in refused:
        with pytest.raises(InputError, match=message):
            SharpnessAware(base)
    params = list(net().parameters())
    for optimizer in (LBFGS(params), AdaSAM(params), Adadelta(params)):
        kind, groups = type(optimizer), [dict(group) for group in optimizer.param_groups]
        with pytest.raises(InputError):
            SharpnessAware(optimizer)
        assert type(optimizer) is kind and [group.keys() for group in groups] == [
            group.keys() for group in optimizer.param_groups
        ]
    optimizer = AdamW(params)
    with pytest.raises(InputError, match=r"SharpnessAware\(AdamW\) makes a class; give rho to that"):
        SharpnessAware(AdamW, rho=0.1)
    with pytest.raises(InputError, match=r"has no option 'radius'. It has rho, adaptive, every"):
        SharpnessAware(optimizer, radius=0.1)
    with pytest.raises(InputError, match="rho must be"):
        SharpnessAware(optimizer, rho=-1.0)
    assert type(optimizer) is AdamW and "rho" not in optimizer.param_groups[0]

    class Mine(AdaSAM):
        pass

    with pytest.raises(InputError, match="Mine is derived from a sharpness-aware class"):
        scaled(Mine)


def test_closures_that_do_not_do_their_part():
    model = net()
    optimizer = SAM(model)
    before = flat(model)

    def nothing():
        closure_of(model, optimizer, 0)()

    with pytest.raises(InputError, match=r"the closure returned None. Let it return the loss."):
        optimizer.step(nothing)
    optimizer.zero_grad()
    with pytest.raises(InputError, match="the closure left no gradient on any parameter"):
        optimizer.step(lambda: loss_of(model, 0))
    with pytest.raises(InputError, match=r"step\(\) takes a function .* got Tensor"):
        optimizer.step(loss_of(model, 0))
    calls = []

    def once():
        calls.append(1)
        return closure_of(model, optimizer, 0)() if len(calls) == 1 else 0.0

    with pytest.raises(InputError, match="the closure left no gradient on any parameter"):
        optimizer.step(once)
    assert torch.equal(flat(model), before)


def test_sparse_gradients_are_refused_and_the_parameters_stay():
    layer = nn.Embedding(5, 3, sparse=True)
    optimizer = SAM(layer)
    before = layer.weight.detach().clone()

    def closure():
        optimizer.zero_grad()
        loss = layer(torch.tensor([1, 2])).square().sum()
        loss.backward()
        return loss

    with pytest.raises(InputError, match=r"shape \(5, 3\) has a sparse gradient"):
        optimizer.step(closure)
    assert torch.equal(layer.weight, before)


def test_sharded_parameters_are_refused():
    weight = nn.Parameter(torch.empty(0))
    weight.grad = torch.empty(0)
    with pytest.raises(InputError, match="is empty on this process"):
        SAM([weight]).perturb()


def test_the_signatures_show_every_option():
    for cls in (AdaSAM, SAM, SharpnessAware(AdamW), scaled(AdaSAM)):
        assert {"rho", "adaptive", "every", "lr"} <= inspect.signature(cls).parameters.keys()


def test_the_examples_in_the_docstrings_run():
    result = doctest.testmod(module)
    assert result.attempted >= 3 and result.failed == 0
