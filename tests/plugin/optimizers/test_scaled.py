"""The scaled optimizers against the golden trajectories, their slow twin, PEFT's version and the paper's limits."""

import copy
import doctest
import inspect
import io
import json
import logging
import pickle
from pathlib import Path

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.optim import LBFGS, SGD, Adam, AdamW, Optimizer

from equipoise import AlphaAdam, BoundedAdamW, ScaledAdamW, ScaledGD, attach, scaled
from equipoise.errors import InputError, PairingError
from equipoise.optimizers import scaled as module
from equipoise.optimizers.reference import ReferenceScaled

GOLDEN = Path(__file__).parents[2] / "golden" / "scaled.json"  # float64 trajectories of an independent numpy twin
EXACT = 1e-10  # float64: what is left is the rounding of a Cholesky solve against that of an LU inverse


class Lora(nn.Module):
    """A frozen linear layer with one LoRA pair under peft's names, and whatever else one wants beside it."""

    def __init__(self, n: int = 12, m: int = 9, r: int = 3, dtype: torch.dtype = torch.float64, fresh: bool = False):
        super().__init__()
        self.base = nn.Parameter(torch.randn(m, n, dtype=dtype), requires_grad=False)
        self.lora_A = nn.Parameter(torch.randn(r, n, dtype=dtype) / n**0.5)
        self.lora_B = nn.Parameter(torch.zeros(m, r, dtype=dtype) if fresh else torch.randn(m, r, dtype=dtype) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.base + self.lora_B @ self.lora_A).T


def net(**options) -> nn.Sequential:
    return nn.Sequential(Lora(12, 9, 3, **options), nn.Tanh(), Lora(9, 10, 2, **options))


def batch(index: int, dtype: torch.dtype = torch.float64) -> Tensor:
    return torch.randn(5, 12, dtype=dtype, generator=torch.Generator().manual_seed(index))


def backward(model: nn.Module, index: int = 0) -> Tensor:
    loss = model(batch(index, next(model.parameters()).dtype)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: int, start: int = 0) -> None:
    for index in range(start, start + steps):
        optimizer.zero_grad()
        backward(model, index)
        optimizer.step()


def weights(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten().double() for param in model.parameters()])


def twin(model: nn.Module, lr: float, **options) -> ReferenceScaled:
    pairs = [(layer.lora_A, layer.lora_B) for layer in model.modules() if isinstance(layer, Lora)]
    return ReferenceScaled(pairs, lr, **options)


def same(a: nn.Module, b: nn.Module, tolerance: float = 0.0) -> bool:
    return bool((weights(a) - weights(b)).abs().max() <= tolerance)


# Against the golden trajectories


@pytest.fixture
def golden() -> dict:
    return json.loads(GOLDEN.read_text())


def pair_of(golden: dict) -> list[nn.Parameter]:
    return [nn.Parameter(torch.tensor(golden[name], dtype=torch.float64)) for name in "AB"]


@pytest.mark.parametrize("kernel", [{}, {"fused": True}, {"foreach": True}, {"foreach": False}])
@pytest.mark.parametrize("trajectory", ["scaled_gd", "scaled_adamw_simultaneous", "scaled_adamw_sequential"])
def test_golden_trajectories(golden: dict, trajectory: str, kernel: dict):
    factors = pair_of(golden)
    if trajectory == "scaled_gd":
        optimizer = ScaledGD(factors, golden["lr_gd"], damping=golden["delta"], **kernel)
    else:
        names = ("lr", "eps", "weight_decay")
        options = {name: golden[name] for name in names} | {"betas": tuple(golden["betas"])} | kernel
        order = trajectory.removeprefix("scaled_adamw_")
        optimizer = ScaledAdamW(factors, damping=golden["delta"], order=order, **options)
    assert len(golden["grads"]) == len(golden[trajectory]) == 8
    for grads, wanted in zip(golden["grads"], golden[trajectory], strict=True):
        for factor, grad in zip(factors, grads, strict=True):
            factor.grad = torch.tensor(grad, dtype=torch.float64)
        optimizer.step()
        for factor, value in zip(factors, wanted, strict=True):
            torch.testing.assert_close(factor.data, torch.tensor(value, dtype=torch.float64), rtol=0, atol=EXACT)


def test_golden_relative_damping(golden: dict):
    factors = pair_of(golden)
    optimizer = ScaledGD(factors, damping=golden["delta"], damping_mode="relative")
    for factor, grad in zip(factors, golden["grads"][0], strict=True):
        factor.grad = torch.tensor(grad, dtype=torch.float64)
    optimizer.step()
    for factor, value in zip(factors, golden["first_relative"], strict=True):
        torch.testing.assert_close(factor.grad, torch.tensor(value, dtype=torch.float64), rtol=0, atol=EXACT)


# Against the slow twin and PEFT


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("mode", ["absolute", "relative"])
@pytest.mark.parametrize("betas", [None, (0.7, 0.8)])
def test_matches_the_slow_twin_step_by_step(order, mode, betas):
    model = net()
    slow_model = copy.deepcopy(model)
    slow = twin(slow_model, 1e-2, damping=1e-3, relative=mode == "relative", sequential=order == "sequential",
                betas=betas, weight_decay=0.1 if betas else 0.0)  # fmt: skip
    extra = {"betas": betas, "weight_decay": 0.1} if betas else {}
    cls = ScaledAdamW if betas else ScaledGD
    fast = cls(model, lr=1e-2, damping=1e-3, damping_mode=mode, order=order, **extra)
    for index in range(10):
        train(model, fast, 1, index)
        slow_model.zero_grad()
        backward(slow_model, index)
        slow.step()
        assert same(model, slow_model, EXACT)
    assert fast.fallbacks == 0


def test_large_matrices_and_replaced_storage_take_the_same_steps():
    """Large matrices are read where they lie, through views; `param.data = …` must not leave the views behind."""
    model = nn.Sequential(Lora(700, 900, 12), Lora(40, 30, 4), Lora(40, 30, 4))
    slow_model = copy.deepcopy(model)
    fast = ScaledAdamW(model, lr=1e-2, damping=1e-3, weight_decay=0.0)
    slow = twin(slow_model, 1e-2, damping=1e-3)
    for _ in range(4):
        for param, slow_param in zip(model.parameters(), slow_model.parameters(), strict=True):
            param.grad = torch.randn_like(param) if param.requires_grad else None
            slow_param.grad = None if param.grad is None else param.grad.clone()
            param.data = param.data * 2
            slow_param.data.mul_(2)
        fast.step()
        slow.step()
        assert same(model, slow_model, EXACT)


def test_matches_pefts_riemannian_adamw_over_50_steps():
    from peft import LoraConfig, get_peft_model
    from peft.optimizers import create_riemannian_optimizer

    base = nn.Sequential(nn.Linear(12, 24), nn.Tanh(), nn.Linear(24, 12))
    ours = get_peft_model(base, LoraConfig(r=4, target_modules=["0", "2"]))
    theirs = copy.deepcopy(ours)
    start = weights(ours)
    for model, optimizer in (
        (ours, ScaledAdamW(ours, 1e-3, damping=1e-2)),
        (theirs, create_riemannian_optimizer(theirs, AdamW, lr=1e-3, reg=1e-2)),
    ):
        for index in range(50):
            optimizer.zero_grad()
            x = batch(index, torch.float32)
            (model(x) - x.flip(1)).square().mean().backward()
            optimizer.step()
    # float32: a Cholesky solve and an SVD inverse differ in their rounding, and Adam carries that along.
    assert same(ours, theirs, 1e-5)
    assert (weights(ours) - start).abs().max() > 1e-2


# The paper's limits


def test_equals_adamw_with_a_larger_eps_when_damping_dwarfs_the_grams():
    model = net()
    plain = copy.deepcopy(model)
    train(model, ScaledAdamW(model, 1e-2, damping=1e10, eps=1e-8), 10)
    train(plain, AdamW(plain.parameters(), 1e-2, eps=1e2), 10)
    assert same(model, plain, 1e-8)
    other = copy.deepcopy(plain)
    train(plain, AdamW(plain.parameters(), 1e-2), 5)
    train(other, ScaledAdamW(other, 1e-2, damping=1e-6), 5)
    assert not same(plain, other, 1e-3)


def test_equals_the_base_on_orthonormal_factors_without_damping():
    def orthonormal() -> Lora:
        layer = Lora()
        layer.lora_A.data = torch.linalg.qr(layer.lora_A.data.T)[0].T.contiguous()
        layer.lora_B.data = torch.linalg.qr(layer.lora_B.data)[0]
        return layer

    model = orthonormal()
    plain = copy.deepcopy(model)
    train(model, ScaledGD(model, 1e-2, damping=0.0), 1)
    train(plain, SGD(plain.parameters(), 1e-2), 1)
    assert same(model, plain, EXACT)
    train(model, ScaledGD(model, 1e-2, damping=0.0), 3)  # no longer orthonormal
    train(plain, SGD(plain.parameters(), 1e-2), 3)
    assert not same(model, plain, 1e-6)


def test_the_product_moves_alike_however_it_is_split_between_the_factors():
    """Section 5: the metric is invariant under (A, B) → (cA, B/c), which plain gradient descent is not."""

    def moved(cls: type[Optimizer], split: float, **options) -> Tensor:
        torch.manual_seed(0)
        layer = Lora()
        layer.lora_A.data *= split
        layer.lora_B.data /= split
        train(layer, cls(layer.parameters(), lr=1e-2, **options), 5)
        return (layer.lora_B @ layer.lora_A).detach()

    torch.testing.assert_close(moved(ScaledGD, 1, damping=0.0), moved(ScaledGD, 10, damping=0.0), rtol=0, atol=1e-9)
    relative = {"damping": 0.1, "damping_mode": "relative"}
    torch.testing.assert_close(moved(ScaledGD, 1, **relative), moved(ScaledGD, 10, **relative), rtol=0, atol=1e-9)
    assert (moved(ScaledGD, 1, damping=0.1) - moved(ScaledGD, 10, damping=0.1)).abs().max() > 1e-3
    assert (moved(SGD, 1) - moved(SGD, 10)).abs().max() > 1e-3


def test_a_step_carries_the_square_of_alpha_over_the_rank():
    """Twice the scale at a quarter of the rate is the same run of scaled GD, from B = 0."""

    class Scaled(Lora):
        scale = 1.0

        def forward(self, x: Tensor) -> Tensor:
            return x @ (self.base + self.scale * self.lora_B @ self.lora_A).T

    moved = []
    for scale in (1.0, 2.0):
        torch.manual_seed(0)
        layer = Scaled(fresh=True)
        layer.scale = scale
        train(layer, ScaledGD(layer, lr=0.2 / scale**2, damping=0.0, damping_mode="relative"), 6)
        moved.append((scale * layer.lora_B @ layer.lora_A).detach())
    assert moved[0].norm() > 0.1
    torch.testing.assert_close(moved[0], moved[1], rtol=0, atol=1e-12)


def test_the_authors_adam_without_bias_correction_is_a_composition():
    """correct_bias=False of the authors' AdamW: their order, on AlphaAdam without mask and compensation."""
    options = {"mask": "none", "compensation": "none", "bias_correction": False, "weight_decay": 0.0, "eps": 0.0}
    torch.manual_seed(0)
    layer = Lora()
    a, b, (beta1, beta2), lr = layer.lora_A.detach().clone(), layer.lora_B.detach().clone(), (0.7, 0.8), 0.01
    optimizer = scaled(AlphaAdam)(layer, lr=lr, damping=1e-3, order="sequential", betas=(beta1, beta2), **options)
    moments = [torch.zeros(2, *factor.shape, dtype=a.dtype) for factor in (a, b)]
    one = 1e-3 * torch.eye(3, dtype=a.dtype)
    for index in range(4):
        optimizer.zero_grad()
        backward(layer, index)
        grad_a, grad_b = (factor.grad.clone() for factor in (layer.lora_A, layer.lora_B))
        optimizer.step()
        for side, factor in enumerate((a, b)):
            inverse = torch.linalg.inv((b.T @ b if side == 0 else a @ a.T) + one)
            g, (m, v) = (inverse @ grad_a if side == 0 else grad_b @ inverse), moments[side]
            m.mul_(beta1).add_((1 - beta1) * g)
            v.mul_(beta2).add_((1 - beta2) * g * g)
            factor.sub_(lr * m / v.sqrt())
    torch.testing.assert_close(layer.lora_A.detach(), a, rtol=0, atol=EXACT)
    torch.testing.assert_close(layer.lora_B.detach(), b, rtol=0, atol=EXACT)


def test_sequential_differs_from_simultaneous():
    model = net()
    other = copy.deepcopy(model)
    train(model, ScaledAdamW(model, 1e-2), 3)
    train(other, ScaledAdamW(other, 1e-2, order="sequential"), 3)
    assert not same(model, other, 1e-4)


# Precision, layout, and factors that are not there


def test_other_parameters_get_the_base_alone():
    model = nn.ModuleDict({"lora": Lora(), "full": nn.Linear(12, 9, dtype=torch.float64)})
    optimizer = ScaledGD(model, 1e-2)
    (model["lora"](batch(0)) + model["full"](batch(0))).square().sum().backward()
    grads = {param: param.grad.clone() for param in model["full"].parameters()}
    raw = model["lora"].lora_A.grad.clone()
    optimizer.step()
    assert all(torch.equal(param.grad, grad) for param, grad in grads.items())
    assert not torch.equal(model["lora"].lora_A.grad, raw)


@pytest.mark.parametrize("shape", [((2, 3, 3, 3), (8, 2, 1, 1)), ((2, 30), (8, 2))])
def test_convolutions_count_as_matrices_in_any_memory_format(shape):
    A, B = (torch.randn(size, dtype=torch.float64) for size in shape)
    dA, dB = torch.randn_like(A), torch.randn_like(B)
    flat = [nn.Parameter(tensor.flatten(1).clone()) for tensor in (A, B)]
    memory = torch.channels_last if A.ndim == 4 else torch.contiguous_format
    factors = [nn.Parameter(tensor.to(memory_format=memory)) for tensor in (A, B)]
    for params, copies in ((flat, 1), (factors, 0)):
        for param, grad in zip(params, (dA, dB), strict=True):
            param.grad = grad.flatten(1).clone() if copies else grad.clone(memory_format=memory)
        ScaledAdamW(zip(("lora_down", "lora_up"), params, strict=True), 0.1).step()
    for a, b in zip(flat, factors, strict=True):
        torch.testing.assert_close(a.data, b.data.flatten(1), rtol=0, atol=EXACT)
        assert b.grad is not None and b.grad.stride() == b.stride()


def test_bf16_is_scaled_in_float32():
    model = net(dtype=torch.bfloat16)
    exact = copy.deepcopy(model).float()
    backward(model)
    for mine, reference in zip(model.parameters(), exact.parameters(), strict=True):
        reference.grad = None if mine.grad is None else mine.grad.float()
    ScaledGD(model, 0.0, damping=1e-3).step()
    ScaledGD(exact, 0.0, damping=1e-3).step()
    for mine, reference in zip(model.parameters(), exact.parameters(), strict=True):
        if mine.requires_grad:
            assert mine.grad is not None and reference.grad is not None
            assert torch.equal(mine.grad, reference.grad.bfloat16())


def test_a_step_under_autocast_keeps_its_precision():
    model = net(dtype=torch.float32)
    other = copy.deepcopy(model)
    for m in (model, other):
        backward(m)
    ScaledGD(model, 0.1).step()
    with torch.autocast("cpu", torch.bfloat16):
        ScaledGD(other, 0.1).step()
    assert same(model, other)


def test_hand_made_gradients_of_another_layout_are_used_as_they_are_meant():
    weight = torch.randn(6, 4)
    grad = torch.randn(4, 6).T
    fused, plain = nn.Parameter(weight.clone()), nn.Parameter(weight.clone())
    fused.grad, plain.grad = grad.clone(), grad.clone()
    optimizer = ScaledAdamW([("weight", fused)], 0.1)
    assert optimizer.param_groups[0]["fused"] is True
    optimizer.step()
    AdamW([plain], 0.1, foreach=False).step()
    torch.testing.assert_close(fused.data, plain.data)


def test_fused_is_chosen_only_where_torch_can():
    def fused(param: nn.Parameter, **options) -> bool | None:
        return ScaledAdamW([("w", param)], **options).param_groups[0]["fused"]

    assert fused(nn.Parameter(torch.randn(4, 4))) is True
    assert fused(nn.Parameter(torch.randn(4, 8)[:, ::2])) is None
    assert fused(nn.Parameter(torch.randn(4, 4)), foreach=False) is None
    assert fused(nn.Parameter(torch.randn(4, 4)), fused=False) is False
    assert fused(nn.Parameter(torch.randn(4, 4)), differentiable=True) is None


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_still_scales_the_other(frozen: str, order):
    model, full = Lora(), Lora()
    full.load_state_dict(model.state_dict())
    getattr(model, frozen).requires_grad_(False)
    learning = "lora_B" if frozen == "lora_A" else "lora_A"
    for layer in (model, full):
        backward(layer)
        ScaledGD(layer, 0.1, order="simultaneous" if layer is full else order).step()
    assert torch.equal(getattr(model, learning), getattr(full, learning))
    assert not torch.equal(getattr(model, frozen), getattr(full, frozen))


def test_a_missing_gradient_on_either_side():
    for missing in ("lora_A", "lora_B"):
        model = Lora()
        optimizer = ScaledAdamW(model)
        train(model, optimizer, 1)
        backward(model)
        getattr(model, missing).grad = None
        before = getattr(model, missing).clone()
        optimizer.step()
        assert torch.equal(getattr(model, missing), before)
        train(model, optimizer, 1, start=2)
        assert not torch.equal(getattr(model, missing), before)


# Gram matrices that cannot be inverted


def test_a_bad_gram_falls_back_for_that_pair_alone_and_is_reported(caplog):
    model = net()
    model[0].lora_B.data.zero_()  # without damping: singular
    backward(model)
    raw = model[0].lora_A.grad.clone(), model[2].lora_A.grad.clone()
    optimizer = ScaledGD(model, 0.0, damping=0.0)
    with caplog.at_level(logging.WARNING, "equipoise"):
        optimizer.step()
    assert optimizer.fallbacks == 1
    assert "1 LoRA gradients so far were left unscaled" in caplog.text
    assert torch.equal(model[0].lora_A.grad, raw[0]) and not torch.equal(model[2].lora_A.grad, raw[1])
    for index in range(9):
        train(model, optimizer, 1, index)
    assert optimizer.fallbacks == 10
    assert len(caplog.records) == 2  # at 1 and at 10


def test_a_non_finite_factor_counts_as_a_fallback():
    model = net()
    backward(model)
    model[0].lora_B.data[0, 0] = float("nan")
    raw = model[0].lora_A.grad.clone()
    optimizer = ScaledGD(model, 0.0)
    optimizer.step()
    assert optimizer.fallbacks == 1
    assert torch.equal(model[0].lora_A.grad, raw)


def test_a_fresh_adapter_under_relative_damping_is_no_fallback():
    model = net(fresh=True)
    optimizer = ScaledAdamW(model, 1e-2, damping=1e-2, damping_mode="relative")
    train(model, optimizer, 5)
    assert optimizer.fallbacks == 0
    assert weights(model).isfinite().all() and model[0].lora_B.abs().max() > 0


# Saving, copying, attaching


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("cls", [ScaledAdamW, ScaledGD, scaled(Adam)])
def test_resume_is_exact_and_loads_with_weights_only(cls, order):
    model = net()
    optimizer = cls(model, lr=1e-2, damping=1e-3, damping_mode="relative", order=order)
    train(model, optimizer, 3)
    file = io.BytesIO()
    torch.save({"model": model.state_dict(), "optimizer": optimizer.state_dict()}, file)
    file.seek(0)
    saved = torch.load(file, weights_only=True)
    for group in saved["optimizer"]["param_groups"]:
        assert group["damping"] == 1e-3 and group["damping_mode"] == "relative" and group["order"] == order
    resumed_model = net()
    resumed_model.load_state_dict(saved["model"])
    resumed = cls(resumed_model, lr=1.0)  # every option comes from the file
    resumed.load_state_dict(saved["optimizer"])
    train(model, optimizer, 20, start=3)
    train(resumed_model, resumed, 20, start=3)
    assert same(model, resumed_model)


def test_a_plain_checkpoint_loads_into_a_scaled_optimizer():
    model = net()
    plain = AdamW([(n, p) for n, p in model.named_parameters() if p.requires_grad], 1e-2, fused=True)
    train(model, plain, 2)
    optimizer = ScaledAdamW(model, damping=1e-2)
    optimizer.load_state_dict(plain.state_dict())
    assert optimizer.param_groups[0]["damping"] == 1e-2 and optimizer.param_groups[0]["lr"] == 1e-2
    train(model, optimizer, 1)


def test_attach_equals_the_scaled_class_and_keeps_state():
    model = net()
    other = copy.deepcopy(model)
    params = [p for p in other.parameters() if p.requires_grad]
    plain = AdamW(params, 1e-2, fused=True)
    scheduler = torch.optim.lr_scheduler.ExponentialLR(plain, 0.9)
    attached = attach(plain, other, damping=1e-3)
    assert attached is plain and isinstance(attached, ScaledAdamW) and attached.param_groups[0]["params"] == params
    optimizer = ScaledAdamW(model, 1e-2, damping=1e-3)
    theirs = torch.optim.lr_scheduler.ExponentialLR(optimizer, 0.9)
    for index in range(5):
        train(model, optimizer, 1, index)
        train(other, attached, 1, index)
        scheduler.step()
        theirs.step()
    assert same(model, other)
    with pytest.raises(InputError, match="already"):
        attach(attached)
    with pytest.raises(InputError, match="takes the optimizer first; got a "):
        attach(model, optimizer)


def test_attach_without_a_model_finds_the_live_one():
    model = net()
    optimizer = attach(SGD([p for p in model.parameters() if p.requires_grad], 1e-2))
    assert len(optimizer.pairs) == 2 and optimizer.pairs.found_by == ("modules",)


@pytest.mark.parametrize("stepped", [True, False])
@pytest.mark.parametrize("cls", [ScaledAdamW, scaled(Adam)])
@pytest.mark.parametrize("copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_and_pickles_go_on_scaling(cls, copier, stepped: bool):
    model = Lora()
    optimizer = cls(model, lr=1e-2)
    train(model, optimizer, int(stepped))
    other, other_optimizer = copier((model, optimizer))
    assert type(other_optimizer) is cls
    train(model, optimizer, 3, start=1)
    train(other, other_optimizer, 3, start=1)
    assert same(model, other)
    assert len(other_optimizer.pairs) == 1 and next(iter(other_optimizer.pairs)).A is other.lora_A


# Hooks, closures, schedulers, AMP, accelerate


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_hooks_of_others_fire_once_and_the_gradients_stay(order):
    model = net()
    optimizer = ScaledAdamW(model, order=order)
    fired: list[str] = []
    optimizer.register_step_pre_hook(lambda *_: fired.append("before"))
    optimizer.register_step_post_hook(lambda *_: fired.append("after"))
    train(model, optimizer, 2)
    assert fired == ["before", "after"] * 2
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)
    assert {int(state["step"]) for state in optimizer.state.values()} == {2}


def test_a_base_whose_step_calls_its_parents_is_scaled_once():
    class Counting(SGD):
        def step(self, closure=None):
            return super().step(closure)

    SGD([nn.Parameter(torch.ones(1))])  # from here on SGD.step has hooks of its own
    for order in ("simultaneous", "sequential"):
        model = net()
        other = copy.deepcopy(model)
        train(model, scaled(Counting)(model, lr=0.1, order=order), 2)
        train(other, ScaledGD(other, 0.1, order=order), 2)
        assert same(model, other)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("as_keyword", [True, False])
def test_a_closure_gives_the_same_steps_and_its_loss(order, as_keyword: bool):
    model = net()
    other = copy.deepcopy(model)
    optimizer, plain = ScaledAdamW(model, order=order), ScaledAdamW(other, order=order)
    for index in range(4):
        calls: list[Tensor] = []

        def closure(index=index, calls=calls) -> Tensor:
            optimizer.zero_grad()
            calls.append(backward(model, index))
            return calls[-1]

        loss = optimizer.step(closure=closure) if as_keyword else optimizer.step(closure)
        assert len(calls) == 1 and loss is calls[0]
        train(other, plain, 1, index)
    assert same(model, other)


@pytest.mark.parametrize("failing_call", [1, 2])
def test_gradients_are_restored_when_a_sequential_pass_raises(failing_call: int):
    class Breaking(SGD):
        calls = 0

        def step(self, closure=None):
            type(self).calls += 1
            if type(self).calls == failing_call:
                raise RuntimeError("broken")
            return SGD.step.__wrapped__(self, closure)

    SGD([nn.Parameter(torch.ones(1))])
    model = net()
    optimizer = scaled(Breaking)(model, lr=0.1, order="sequential")
    backward(model)
    with pytest.raises(RuntimeError, match="broken"):
        optimizer.step()
    assert all(p.grad is not None for p in model.parameters() if p.requires_grad)


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
@pytest.mark.parametrize("kernel", [{"fused": True}, {"foreach": False}])
def test_grad_scaler_changes_nothing_and_skips_overflow(kernel, order):
    model = net(dtype=torch.float32)
    other = copy.deepcopy(model)
    scaler = torch.amp.GradScaler("cpu", init_scale=2.0**12)
    optimizer, plain = (ScaledAdamW(m, 1e-2, order=order, **kernel) for m in (model, other))
    for index in range(3):
        optimizer.zero_grad()
        scaler.scale(model(batch(index, torch.float32)).square().mean()).backward()
        scaler.step(optimizer)
        scaler.update()
        train(other, plain, 1, index)
    assert same(model, other, 1e-5)
    before = weights(model)
    optimizer.zero_grad()
    scaler.scale(model(batch(0, torch.float32) * float("inf")).square().mean()).backward()
    scaler.step(optimizer)
    assert torch.equal(weights(model), before)


def test_under_accelerate():
    from accelerate import Accelerator

    model = net()
    other = copy.deepcopy(model)
    optimizer = ScaledAdamW(other, 1e-2)
    accelerator = Accelerator(cpu=True)
    prepared, accelerated = accelerator.prepare(model, AdamW([p for p in model.parameters() if p.requires_grad], 1e-2))
    assert attach(accelerated, prepared) is accelerated
    for index in range(3):
        accelerated.zero_grad()
        accelerator.backward(prepared(batch(index)).square().mean())
        accelerated.step()
        train(other, optimizer, 1, index)
    assert same(model, other, EXACT)


# Groups, options, refusals


def test_each_side_follows_its_own_group():
    model = Lora()
    exact = copy.deepcopy(model)
    groups = [{"params": [model.lora_B], "lr": 0.2, "damping": 1e-1, "damping_mode": "relative"},
              {"params": {"a": model.lora_A}.values(), "lr": 0.1}]  # fmt: skip
    optimizer = ScaledGD(groups, damping=1e-3)
    assert [group["damping"] for group in optimizer.param_groups] == [1e-1, 1e-3]
    train(model, optimizer, 1)
    backward(exact)
    A, B, eye = exact.lora_A.data, exact.lora_B.data, torch.eye(3, dtype=torch.float64)
    assert exact.lora_A.grad is not None and exact.lora_B.grad is not None
    gram = A @ A.T
    B1 = B - 0.2 * exact.lora_B.grad @ torch.linalg.inv(gram + 0.1 * gram.trace() / 3 * eye)
    A1 = A - 0.1 * torch.linalg.inv(B.T @ B + 1e-3 * eye) @ exact.lora_A.grad
    torch.testing.assert_close(model.lora_A.data, A1, rtol=0, atol=EXACT)
    torch.testing.assert_close(model.lora_B.data, B1, rtol=0, atol=EXACT)


def test_a_group_added_later_and_an_option_changed_later_count():
    first, second = Lora(), Lora()
    optimizer = ScaledGD(first, 0.0)
    backward(first)
    optimizer.step()
    optimizer.add_param_group({"params": [(f"second.{n}", p) for n, p in second.named_parameters() if p.requires_grad]})
    backward(second)
    raw = second.lora_A.grad.clone()
    optimizer.param_groups[1]["damping"] = 1e9
    optimizer.step()
    torch.testing.assert_close(second.lora_A.grad, raw / 1e9, rtol=1e-6, atol=0)
    optimizer.param_groups[0]["damping"] = -1.0
    with pytest.raises(InputError, match="damping must be a finite number"):
        optimizer.step()


def test_every_kind_of_params_takes_the_same_step():
    def run(make) -> Tensor:
        torch.manual_seed(1)
        model = net()
        train(model, ScaledAdamW(make(model), lr=1e-2), 3)
        return weights(model)

    wanted = run(lambda m: m)
    for make in (
        lambda m: m.named_parameters(),
        lambda m: filter(lambda p: p.requires_grad, m.parameters()),
        lambda m: [{"params": dict(m.named_parameters()).values()}],
        lambda m: [{"params": filter(lambda p: p.requires_grad, m.parameters())}],
    ):
        assert torch.equal(run(make), wanted)


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"damping": -1.0}, r"ScaledAdamW: parameter group 0: damping must be a finite number, 0 or more; got -1\.0"),
        ({"damping": float("nan")}, "got nan"),
        ({"damping": "1e-6"}, "got '1e-6'"),
        ({"damping_mode": "reletive"}, "damping_mode must be 'absolute' or 'relative'; got 'reletive'"),
        ({"order": "b_first"}, "order must be 'simultaneous' or 'sequential'; got 'b_first'"),
    ],
)
def test_options_out_of_bounds(options, message):
    with pytest.raises(InputError, match=message):
        ScaledAdamW(Lora(), **options)
    with pytest.raises(InputError, match=message):
        group = {"params": [Lora().lora_A], **options}
        ScaledAdamW([group])
    plain = AdamW(Lora().parameters())
    with pytest.raises(InputError):
        attach(plain, **options)
    assert type(plain) is AdamW


def test_sequential_refuses_bases_that_count_steps_in_their_groups():
    class ScheduleFree(SGD):
        def __init__(self, params, lr=1e-3):
            super().__init__([{"params": list(params), "k": 0}], lr=lr)

    with pytest.raises(InputError, match="counts its steps in 'k'"):
        scaled(ScheduleFree)(Lora().parameters(), order="sequential")
    scaled(ScheduleFree)(Lora().parameters())


def test_refuses_what_cannot_be_a_base():
    with pytest.raises(InputError, match="true gradients"):
        scaled(LBFGS)
    with pytest.raises(InputError, match="Pass the class"):
        scaled(nn.Linear)
    with pytest.raises(InputError, match="no trainable parameter"):
        ScaledAdamW(Lora().requires_grad_(False))


def test_refuses_uncertain_pairs_at_the_first_step():
    params = [nn.Parameter(torch.randn(size)) for size in ((2, 24), (2, 24), (8, 2), (8, 2))]
    optimizer = ScaledAdamW(params)
    for param in params:
        param.grad = torch.ones_like(param)
    with pytest.raises(PairingError):
        optimizer.step()


def test_classes_are_cached_named_and_describe_themselves():
    assert scaled(AdamW) is ScaledAdamW and scaled(SGD) is ScaledGD and scaled(ScaledGD) is ScaledGD
    cls = scaled(Adam)
    assert cls is scaled(Adam) and cls.__name__ == "ScaledAdam" and issubclass(cls, Adam)
    parameters = inspect.signature(cls).parameters
    assert parameters["damping"].default == 1e-6 and "betas" in parameters and "amsgrad" in parameters
    for each in (cls, ScaledAdamW, ScaledGD):
        assert each.__doc__ and "damping: Added to the diagonal" in each.__doc__ and "arXiv 2402.02347" in each.__doc__
    for each in (ScaledAdamW, ScaledGD):
        assert each.__doc__
        assert all(f"        {name}: " in each.__doc__ for name in inspect.signature(each).parameters)


def test_the_examples_in_the_docstrings_run():
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted >= 5 and results.failed == 0


@pytest.mark.parametrize("params", ["x", 3, [3], [("name", 3)], [{"params": "x"}], [("a", "b", "c")]])
def test_what_is_no_parameter_is_named(params):
    with pytest.raises(InputError, match=r"The parameters must be a model, tensors, .*, got ['3(]"):
        ScaledAdamW(params, lr=1)


@pytest.mark.parametrize("given", ["model", "tensors", "named", "groups"])
@pytest.mark.parametrize("make", [ScaledAdamW, BoundedAdamW, lambda params, lr: attach(AdamW(params, lr))])
def test_partitions_that_take_the_place_of_factors_are_refused(make, given):
    """As ZeRO's optimizers put one flat tensor into each group of the optimizer that they are given."""
    net = inject_adapter_in_model(LoraConfig(r=2, target_modules=["0"]), nn.Sequential(nn.Linear(6, 5)))
    tensors = [param for param in net.parameters() if param.requires_grad]
    named = [item for item in net.named_parameters() if item[1].requires_grad]
    known = {"model": net, "tensors": tensors, "named": named, "groups": [{"params": tensors}]}
    if given == "model" and make not in (ScaledAdamW, BoundedAdamW):
        known["model"] = tensors
    optimizer = make(known[given], 1e-2)
    flat = nn.Parameter(torch.cat([param.detach().flatten() for param in tensors])[:10])
    optimizer.param_groups[0]["params"] = [flat]
    flat.grad = torch.ones_like(flat)
    before = flat.detach().clone()
    with pytest.raises(PairingError, match="were replaced by flattened or partitioned ones"):
        optimizer.step()
    assert torch.equal(flat, before)
