"""The bound on a step in the product space: exact where it binds, absent to the bit where it does not, never silent."""

import copy
import doctest
import io
import pickle
import warnings
from functools import partial

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.optim import SGD, Adam, AdamW, Optimizer
from torch.optim.lr_scheduler import LambdaLR, OneCycleLR

from equipoise import BoundedAdamW, ScaledAdamW, attach, bounded, scaled
from equipoise.errors import InputError, PairingError
from equipoise.optimizers import bounded as module
from equipoise.optimizers.parts.product_bound import largest_share
from equipoise.optimizers.reference import reference_share


class Lora(nn.Module):
    """A frozen linear layer with a LoRA pair on it."""

    def __init__(self, n: int = 12, m: int = 9, r: int = 3, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.base_layer = nn.Linear(n, m, bias=False, dtype=dtype).requires_grad_(False)
        self.lora_A = nn.Linear(n, r, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(r, m, bias=False, dtype=dtype)

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    @property
    def product(self) -> Tensor:
        return (self.lora_B.weight @ self.lora_A.weight).detach().clone()


def backward(model: nn.Module, index: int = 0) -> Tensor:
    x = torch.randn(5, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
    model.zero_grad()
    loss = model(x.to(next(model.parameters()).dtype)).square().mean()
    loss.backward()
    return loss


def train(model: nn.Module, optimizer: Optimizer, steps: range) -> None:
    for index in steps:
        backward(model, index)
        optimizer.step()


def trainable(model: nn.Module) -> list[nn.Parameter]:
    return [param for param in model.parameters() if param.requires_grad]


def same(a: nn.Module, b: nn.Module) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def moved(layer: Lora, optimizer: Optimizer, index: int) -> float:
    """‖change of the product‖ / ‖W‖ of one step."""
    before = layer.product
    train(layer, optimizer, range(index, index + 1))
    return float((layer.product - before).norm() / layer.base_layer.weight.norm())


# The share


def share(A: Tensor, B: Tensor, dA: Tensor, dB: Tensor, limits: Tensor) -> Tensor:
    return largest_share(A @ A.mT, A @ dA.mT, dA @ dA.mT, B.mT @ B, B.mT @ dB, dB.mT @ dB, limits)


@pytest.mark.parametrize("fresh", [False, True])
@pytest.mark.parametrize("size", [1e-3, 1e-1, 1.0, 10.0, 1e3])
def test_the_share_is_the_slow_twins(size: float, fresh: bool):
    A, dA = torch.randn(2, 20, 3, 12, dtype=torch.float64)
    B, dB = torch.randn(2, 20, 9, 3, dtype=torch.float64)
    B = B * (not fresh)
    dA, dB = dA * size, dB * size
    limits = torch.rand(20, dtype=torch.float64) * 3
    c = share(A, B, dA, dB, limits)
    assert ((c > 0) & (c <= 1)).all()
    for i in range(20):
        product = (B[i] + c[i] * dB[i]) @ (A[i] + c[i] * dA[i]) - B[i] @ A[i]
        assert product.norm() <= limits[i] * (1 + 1e-9)
        slow = reference_share(A[i], B[i], dA[i], dB[i], float(limits[i]))
        assert slow * (1 - 1e-3) - 1e-5 <= c[i] <= slow + 1e-5


def test_the_bound_holds_even_where_the_two_parts_of_a_change_cancel():
    """ΔA and ΔB that undo each other: P and Q are opposed, and the way to c is no longer straight."""
    A, B = torch.randn(1, 3, 12, dtype=torch.float64), torch.randn(1, 9, 3, dtype=torch.float64)
    for factor in (0.5, 1.0, 1.5, 2.0, 3.0):
        dA, dB = -factor * A, -factor * B
        limit = torch.tensor([0.3], dtype=torch.float64)
        c = share(A, B, dA, dB, limit)
        assert ((B + c * dB) @ (A + c * dA) - B @ A).norm() <= limit * (1 + 1e-9)


def test_changes_that_overflow_are_taken_back_and_nothing_stays_nothing():
    A, B = torch.randn(2, 3, 12), torch.randn(2, 9, 3)
    huge, none = torch.full_like(A[:1], 1e25), torch.zeros_like(A[:1])
    c = share(A, B, torch.cat([huge, none]), torch.zeros_like(B), torch.ones(2))
    assert c.tolist() == [0.0, 1.0]


# The optimizer


def test_a_large_rate_moves_the_product_by_exactly_the_bound():
    layer = Lora()
    optimizer = BoundedAdamW(layer, lr=10.0, trust=0.01)
    for index in range(5):
        assert moved(layer, optimizer, index) == pytest.approx(0.01, rel=1e-4)
    (share,) = optimizer.shares.values()
    assert 0 < share < 0.1


def test_within_the_bound_it_is_the_base_to_the_bit_and_beyond_it_is_not():
    for lr, equal in ((1e-4, True), (1.0, False)):
        layer = Lora(dtype=torch.float32)
        other = copy.deepcopy(layer)
        train(layer, BoundedAdamW(layer, lr=lr, trust=0.5), range(5))
        train(other, AdamW(trainable(other), lr=lr, fused=True), range(5))
        assert same(layer, other) is equal


def test_the_bound_survives_rates_that_break_adamw():
    losses = {}
    for name, make in (
        ("bounded", partial(BoundedAdamW, trust=0.01)),
        ("adamw", lambda net, lr: AdamW(trainable(net), lr)),
    ):
        torch.manual_seed(0)
        layer = Lora()
        optimizer = make(layer, lr=100.0)
        losses[name] = []
        for index in range(50):
            losses[name].append(backward(layer, index).item())
            optimizer.step()
    assert max(losses["bounded"]) < 2 < 1e6 < max(losses["adamw"]) and losses["bounded"][-1] < losses["bounded"][0]


@pytest.mark.parametrize("kind", ["linear", "conv", "embedding", "rslora"])
def test_pefts_scale_and_every_kind_of_layer_count(kind: str):
    layers = {"conv": nn.Conv2d(4, 6, 3), "embedding": nn.Embedding(20, 8)}
    model = nn.Sequential(layers.get(kind, nn.Linear(16, 12)))
    config = LoraConfig(r=2, lora_alpha=8, target_modules=["0"], use_rslora=kind == "rslora", init_lora_weights=False)
    inject_adapter_in_model(config, model)
    layer = model[0]
    W = layer.get_base_layer().weight.detach().clone()
    optimizer = BoundedAdamW(model, lr=1.0, trust=0.01)
    for param in trainable(model):
        param.grad = torch.randn_like(param)
    before = layer.get_delta_weight("default").detach().clone()  # s·BA in the layer's own shape
    optimizer.step()
    change = layer.get_delta_weight("default").detach() - before
    assert layer.scaling["default"] == (8 / 2**0.5 if kind == "rslora" else 4)
    assert float(change.norm() / W.norm()) == pytest.approx(0.01, rel=1e-3)


def test_every_adapter_has_its_own_scale():
    model = nn.Sequential(nn.Linear(16, 12))
    inject_adapter_in_model(LoraConfig(r=2, lora_alpha=2, target_modules=["0"]), model, adapter_name="one")
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft: "multiple adapters", which are meant
        inject_adapter_in_model(LoraConfig(r=2, lora_alpha=16, target_modules=["0"]), model, adapter_name="two")
    model.requires_grad_(True)
    model[0].get_base_layer().requires_grad_(False)
    optimizer = BoundedAdamW(model, lr=1.0, trust=0.01)
    for param in trainable(model):
        param.grad = torch.randn_like(param)
    before = [model[0].get_delta_weight(name).detach().clone() for name in ("one", "two")]
    optimizer.step()
    for name, old in zip(("one", "two"), before, strict=True):
        change = (model[0].get_delta_weight(name).detach() - old).norm() / model[0].get_base_layer().weight.norm()
        assert float(change) == pytest.approx(0.005, rel=1e-3)  # of each: that of both together is bounded by 0.01


class Kohya(nn.Module):
    """kohya's LoRAModule: it takes over a layer's forward, forgets the layer, and scales by alpha / rank."""

    def __init__(self, layer: nn.Linear, rank: int, alpha: float):
        super().__init__()
        self.lora_down = nn.Linear(layer.in_features, rank, bias=False)
        self.lora_up = nn.Linear(rank, layer.out_features, bias=False)
        self.register_buffer("alpha", torch.tensor(alpha))
        self.scale = alpha / rank
        self.org_forward = layer.forward


def test_kohyas_modules_lead_to_the_layer_they_took_over():
    layer = nn.Linear(16, 12)
    network = nn.ModuleDict({"lora_unet_0": Kohya(layer, 2, 1.0)})
    optimizer = BoundedAdamW([{"params": network.parameters()}], lr=1.0, trust=0.01)
    for param in network.parameters():
        param.grad = torch.randn_like(param)
    before = [param.detach().clone() for param in network.parameters()]
    optimizer.step()
    down, up = (param.detach() for param in network.parameters())
    change = 0.5 * (up @ down - before[1] @ before[0]).norm() / layer.weight.detach().norm()
    assert float(change) == pytest.approx(0.01, rel=1e-3)


def test_scaling_and_the_bound_compose():
    layer = Lora()
    other = copy.deepcopy(layer)
    optimizer = ScaledAdamW(layer, lr=10.0, damping=1e-3, trust=0.01)
    unbounded = ScaledAdamW(other, lr=10.0, damping=1e-3)
    before = copy.deepcopy(layer)
    assert moved(layer, optimizer, 0) == pytest.approx(0.01, rel=1e-4)
    train(other, unbounded, range(1))
    shares = [
        (now - old) / (full - old)
        for now, full, old in zip(trainable(layer), trainable(other), trainable(before), strict=True)
    ]
    for share in shares:  # the scaled step, shrunk: one factor for both sides
        torch.testing.assert_close(share, torch.full_like(share, next(iter(optimizer.shares.values()))))


def test_a_sequential_step_is_bounded_as_a_whole():
    layer = Lora()
    optimizer = ScaledAdamW(layer, lr=10.0, order="sequential", trust=0.01)
    assert moved(layer, optimizer, 0) == pytest.approx(0.01, rel=1e-4)


@pytest.mark.parametrize("base", [SGD, Adam])
def test_any_base_and_attach(base):
    layer = Lora()
    other = copy.deepcopy(layer)
    made = bounded(base)(layer, lr=5.0, trust=0.02)
    attached = attach(base(trainable(other), lr=5.0), other, damping=None, trust=0.02)
    assert type(made) is type(attached) and made.param_groups[0]["trust"] == 0.02
    for index in range(3):
        train(layer, made, range(index, index + 1))
        train(other, attached, range(index, index + 1))
    assert same(layer, other)
    assert bounded(base) is bounded(base) and bounded(bounded(base)) is bounded(base)


def test_the_smaller_trust_of_the_two_groups_counts_and_a_later_change_too():
    layer = Lora()
    groups = [
        {"params": [layer.lora_A.weight], "trust": 0.05},
        {"params": [layer.lora_B.weight], "trust": 0.01},
    ]
    optimizer = BoundedAdamW(groups, lr=10.0)
    assert moved(layer, optimizer, 0) == pytest.approx(0.01, rel=1e-4)
    optimizer.param_groups[1]["trust"] = 0.03
    assert moved(layer, optimizer, 1) == pytest.approx(0.03, rel=1e-4)


def test_the_bound_follows_the_schedule_down_and_never_above_trust():
    layer = Lora()
    optimizer = BoundedAdamW(layer, lr=10.0, trust=0.01)
    schedule = LambdaLR(optimizer, lambda step: [1.0, 0.5, 0.1, 3.0][step])
    for index, wanted in enumerate([0.01, 0.005, 0.001, 0.01]):
        assert moved(layer, optimizer, index) == pytest.approx(wanted, rel=1e-4)
        if index < 3:
            schedule.step()

    optimizer = BoundedAdamW(layer, lr=torch.tensor(10.0), trust=0.01)
    schedule = LambdaLR(optimizer, lambda step: 0.2)  # a rate on the device is not read back
    assert moved(layer, optimizer, 4) == pytest.approx(0.002, rel=1e-4)

    optimizer = BoundedAdamW(layer, lr=1.0, trust=0.01)
    schedule = OneCycleLR(optimizer, max_lr=10.0, total_steps=10, pct_start=0.5)  # its first rate is no full one
    assert moved(layer, optimizer, 5) == pytest.approx(0.01 / 25, rel=1e-4)


def test_without_trust_a_scaled_optimizer_asks_for_no_frozen_weight():
    factors = nn.ModuleDict({"lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 8)})
    factors["lora_B"](factors["lora_A"](torch.ones(1, 8))).sum().backward()
    ScaledAdamW(factors).step()
    with pytest.raises(PairingError, match="frozen weight under every LoRA pair"):
        ScaledAdamW(factors, trust=0.1).step()


@pytest.mark.parametrize(
    ("make", "asker", "instead"),
    [
        (BoundedAdamW, "BoundedAdamW needs", "or take an optimizer without a bound."),
        (lambda net: bounded(SGD)(net, lr=0.1, reach=0.1), "BoundedSGD needs", "or take an optimizer without a bound."),
        (lambda net: ScaledAdamW(net, trust=0.1), "The bound of ScaledAdamW needs", "or leave trust out."),
        (
            lambda net: attach(AdamW(net.parameters()), net, reach=0.1),
            "The bound of ScaledAdamW needs",
            "or leave trust and reach out.",
        ),
    ],
)
def test_a_frozen_weight_that_is_not_found_is_missed_in_the_words_of_who_asked(make, asker, instead):
    """A hand-made layer whose frozen part is called neither weight nor base_layer."""
    net = nn.ModuleDict({"frozen": nn.Linear(8, 8), "lora_A": nn.Linear(8, 2), "lora_B": nn.Linear(2, 8)})
    net["frozen"].requires_grad_(False)
    net["lora_B"](net["lora_A"](torch.ones(1, 8))).sum().backward()
    with pytest.raises(PairingError) as refused:
        make(net).step()
    said = str(refused.value)
    assert said.startswith(asker) and said.endswith(instead) and "`weight` or `base_layer.weight`" in said


def test_a_zero_weight_cannot_measure_a_step():
    layer = Lora()
    layer.base_layer.weight.data.zero_()
    backward(layer)
    with pytest.raises(PairingError, match="size of the frozen weight"):
        BoundedAdamW(layer).step()


def test_non_finite_steps_stay_visible():
    layer = Lora()
    optimizer = BoundedAdamW(layer, lr=1e-2)
    backward(layer)
    layer.lora_A.weight.grad[0, 0] = float("nan")
    optimizer.step()
    assert not layer.lora_A.weight.isfinite().all()  # so that the loss is not finite either, and the loop can tell


def test_a_frozen_side_and_a_missing_gradient():
    for name in ("lora_A", "lora_B"):
        layer = Lora()
        layer.get_submodule(name).weight.requires_grad_(False)
        assert moved(layer, BoundedAdamW(layer, lr=10.0, trust=0.01), 0) == pytest.approx(0.01, rel=1e-4)
    layer = Lora()
    optimizer = BoundedAdamW(layer, lr=10.0, trust=0.01)
    backward(layer)
    layer.lora_B.weight.grad = None
    before = layer.product
    optimizer.step()
    assert float((layer.product - before).norm() / layer.base_layer.weight.norm()) == pytest.approx(0.01, rel=1e-4)


def test_bf16_factors_are_bounded_in_float32():
    layer = Lora(64, 48, 4, dtype=torch.bfloat16)
    for param in trainable(layer):
        param.grad = torch.randn_like(param)
    before = [param.detach().double() for param in trainable(layer)]
    BoundedAdamW(layer, lr=1.0, trust=0.05).step()
    A, B = (param.detach().double() for param in trainable(layer))
    change = (B @ A - before[1] @ before[0]).norm() / layer.base_layer.weight.double().norm()
    assert float(change) == pytest.approx(0.05, rel=0.05)  # what bf16 can hold of it


@pytest.mark.parametrize("cls", [BoundedAdamW, bounded(Adam), scaled(Adam)])
def test_resume_copies_and_pickles_go_on_bounding(cls):
    layer = Lora()
    optimizer = cls(layer, lr=10.0, trust=0.02)
    train(layer, optimizer, range(2))
    file = io.BytesIO()
    torch.save([layer.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    resumed = Lora()
    resumed.load_state_dict(weights)
    again = cls(resumed, lr=1.0)
    again.load_state_dict(state)
    copies = [copy.deepcopy((layer, optimizer)), pickle.loads(pickle.dumps((layer, optimizer))), (resumed, again)]
    train(layer, optimizer, range(2, 5))
    for other, other_optimizer in copies:
        train(other, other_optimizer, range(2, 5))
        assert same(layer, other) and other_optimizer.param_groups[0]["trust"] == 0.02


def attached(net: nn.Module, lr: float, trust: float) -> Optimizer:
    return attach(AdamW(trainable(net), lr=lr), net, damping=None, trust=trust)


@pytest.mark.parametrize("make", [BoundedAdamW, attached])
def test_a_state_without_a_bound_leaves_the_bound_as_it_is(make):
    """A scaled run's state says trust None, a plain one's nothing; groups keep what they were given."""
    layer = Lora()
    for other in (ScaledAdamW, lambda net, lr: AdamW(trainable(net), lr)):
        optimizer = make(layer, lr=1.0, trust=0.02)
        optimizer.load_state_dict(other(layer, lr=10.0).state_dict())
        trust = optimizer.param_groups[0]["trust"]
        assert trust == 0.02 and moved(layer, optimizer, 0) == pytest.approx(trust, rel=1e-4)


def test_a_plain_state_leaves_each_group_its_own_options():
    layer = Lora()
    groups = [{"params": [layer.lora_A.weight], "trust": None}, {"params": [layer.lora_B.weight], "trust": 0.5}]
    optimizer = ScaledAdamW(groups, lr=1.0)
    plain = AdamW([{"params": [layer.lora_A.weight]}, {"params": [layer.lora_B.weight]}])
    optimizer.load_state_dict(plain.state_dict())
    assert [group["trust"] for group in optimizer.param_groups] == [None, 0.5]


@pytest.mark.parametrize("width", [12, 4096])
def test_a_base_that_replaces_what_is_behind_a_parameter_is_bounded_too(width: int):
    class Replacing(SGD):
        @torch.no_grad()
        def step(self, closure=None):
            for group in self.param_groups:
                for param in group["params"]:
                    param.data = param.data - group["lr"] * param.grad

    layer = Lora(n=width, dtype=torch.float32)
    for param in trainable(layer):
        param.grad = torch.randn_like(param)
    before = layer.product
    bounded(Replacing)(layer, lr=10.0, trust=0.01).step()
    change = (layer.product - before).norm() / layer.base_layer.weight.norm()
    assert float(change) == pytest.approx(0.01, rel=1e-3)


@pytest.mark.parametrize("trust", [0, -1.0, float("nan"), float("inf"), "much", True])
def test_trust_out_of_bounds(trust):
    with pytest.raises(InputError, match="trust must be a finite number above 0"):
        BoundedAdamW(Lora(), trust=trust)


def test_refuses_what_makes_no_sense():
    with pytest.raises(InputError, match="has the option trust itself"):
        bounded(ScaledAdamW)
    with pytest.raises(InputError, match="bounded already"):
        scaled(BoundedAdamW)
    layer = Lora()
    (group,) = attach(SGD(trainable(layer), 1e-2), layer, damping=None).param_groups
    assert (group["reach"], group["trust"]) == (0.5, 0.05), "as bounded(SGD) has them"
    with pytest.raises(InputError, match=r"torch\.optim\.Optimizer class"):
        bounded("adamw")


def test_the_examples_in_the_docstrings_run():
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted >= 5 and results.failed == 0


@pytest.mark.parametrize("with_closure", [False, True])
def test_gradients_of_other_strides_are_the_same_gradients(with_closure: bool):
    """torch's fused kernel reads them as if they had the parameter's."""
    ours, theirs = Lora(), Lora()
    theirs.load_state_dict(ours.state_dict())
    for model, turned in ((ours, False), (theirs, True)):
        optimizer = BoundedAdamW(model, lr=1e-3)
        generator = torch.Generator().manual_seed(3)
        for _ in range(3):
            grads = [torch.randn(p.shape, generator=generator, dtype=p.dtype) for p in trainable(model)]

            def closure(model=model, grads=grads, turned=turned):
                for param, grad in zip(trainable(model), grads, strict=True):
                    param.grad = grad.T.contiguous().T if turned else grad
                return 1.0

            optimizer.step(closure) if with_closure else (closure(), optimizer.step())
    assert same(ours, theirs)
