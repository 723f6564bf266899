"""The bound on a whole run: it holds from where the adapter began, for any base, rate and length, and is resumed."""

import copy
import io
import pickle
import warnings

import pytest
import torch
from lion_pytorch import Lion
from peft import LoraConfig, inject_adapter_in_model
from torch import Tensor, nn
from torch.optim import SGD, Adafactor, Adam, AdamW, NAdam, Optimizer

from equipoise import AdaSAM, AlphaAdam, BoundedAdamW, ScaledAdamW, ScaledGD, attach, bounded, scaled
from equipoise.errors import InputError
from equipoise.lora import pairs
from equipoise.optimizers.parts.sharded import FullFactors
from equipoise.optimizers.parts.step_hook import START
from equipoise.optimizers.reference import reference_share

REACH = 0.02
BASES = [AdamW, Adam, NAdam, SGD, Adafactor, Lion, AlphaAdam]
CLASSES = [*map(bounded, BASES), ScaledAdamW, ScaledGD, scaled(Adam), bounded(AdaSAM)]


class Lora(nn.Module):
    """A frozen linear layer with a LoRA pair on it, whose product is not 0 where `started`."""

    def __init__(self, n: int = 12, m: int = 9, r: int = 3, started: bool = False, dtype: torch.dtype = torch.float64):
        super().__init__()
        self.base_layer = nn.Linear(n, m, bias=False, dtype=dtype).requires_grad_(False)
        self.lora_A = nn.Linear(n, r, bias=False, dtype=dtype)
        self.lora_B = nn.Linear(r, m, bias=False, dtype=dtype)
        if not started:
            nn.init.zeros_(self.lora_B.weight)
        self.began = (self.lora_A.weight.detach().clone(), self.lora_B.weight.detach().clone())

    def forward(self, x: Tensor) -> Tensor:
        return self.base_layer(x) + self.lora_B(self.lora_A(x))

    @property
    def factors(self) -> tuple[nn.Parameter, nn.Parameter]:
        return self.lora_A.weight, self.lora_B.weight

    @property
    def distance(self) -> float:
        A, B = (factor.to(self.base_layer.weight.dtype) for factor in self.began)
        change = self.lora_B.weight @ self.lora_A.weight - B @ A
        return float(change.detach().norm() / self.base_layer.weight.norm())


def train(net: Lora, optimizer: Optimizer, steps: range) -> list[float]:
    """The distance after each step towards a target that is far away."""
    target = torch.randn(9, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(7))
    distances = []
    for index in steps:
        x = torch.randn(32, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(index))

        def closure(x: Tensor = x) -> Tensor:
            optimizer.zero_grad()
            loss = (net(x) - x @ target.T).square().mean()
            loss.backward()
            return loss

        optimizer.step(closure)
        distances.append(net.distance)
    return distances


@pytest.mark.parametrize("started", [False, True])
@pytest.mark.parametrize("rate", [1e-2, 1.0, 100.0])
@pytest.mark.parametrize("cls", CLASSES, ids=lambda cls: cls.__name__)
def test_no_run_goes_farther_than_its_reach(cls, rate: float, started: bool):
    torch.manual_seed(0)
    net = Lora(started=started)
    optimizer = cls(net, lr=rate, reach=REACH)
    distances = train(net, optimizer, range(40))
    assert max(distances) <= REACH * (1 + 1e-9)
    (moved,) = optimizer.moved.values()
    assert moved == pytest.approx(net.distance, abs=1e-7)
    assert optimizer.param_groups[0]["trust"] == pytest.approx(REACH / 10), "steps of a tenth of it, left alone"


def test_within_its_reach_a_run_is_the_one_without_to_the_bit():
    torch.manual_seed(0)
    net = Lora()
    twin = copy.deepcopy(net)
    train(net, BoundedAdamW(net, lr=1e-4, trust=0.01, reach=10.0), range(10))
    train(twin, BoundedAdamW(twin, lr=1e-4, trust=0.01), range(10))
    assert all(map(torch.equal, net.parameters(), twin.parameters()))


def test_a_step_across_the_border_ends_where_the_slow_twin_does():
    """On the line from the start through the factors of the step: the last point within, seen from the start."""
    torch.manual_seed(0)
    net = Lora(started=True)
    twin = copy.deepcopy(net)
    train(net, BoundedAdamW(net, lr=0.05, trust=1e6, reach=1e6), range(1))
    train(twin, BoundedAdamW(twin, lr=0.05, trust=REACH, reach=REACH), range(1))
    A, B = net.began
    dA, dB = (net.lora_A.weight - A).detach(), (net.lora_B.weight - B).detach()
    c = reference_share(A, B, dA, dB, REACH * float(net.base_layer.weight.norm()))
    assert 0 < c < 1
    # trust takes back the same share first, so that reach finds the step at its border already
    torch.testing.assert_close(twin.lora_A.weight.detach(), A + c * dA, rtol=0, atol=1e-5)
    torch.testing.assert_close(twin.lora_B.weight.detach(), B + c * dB, rtol=0, atol=1e-5)
    assert twin.distance == pytest.approx(REACH, rel=1e-4)


def test_small_and_large_layers_fresh_and_trained_further_keep_their_bounds_in_one_optimizer():
    """Small factors are stacked and large ones read where they lie; those that begin with B = 0 go another way back."""
    torch.manual_seed(0)
    sizes = [(n, dtype, started) for n in (12, 3000) for dtype in (torch.float32, torch.bfloat16) for started in (0, 1)]
    layers = [Lora(n, 9, 3, bool(started), dtype) for n, dtype, started in sizes for _ in range(2)]
    net, still = nn.ModuleList(layers), layers[-1]
    optimizer = BoundedAdamW(net, lr=0.1, trust=REACH, reach=REACH)
    for _ in range(3):
        optimizer.zero_grad()
        for layer in layers:
            layer.lora_A.weight.grad, layer.lora_B.weight.grad = (torch.randn_like(w) for w in layer.factors)
        still.lora_A.weight.grad = still.lora_B.weight.grad = None
        optimizer.step()
    for layer in layers[:-1]:
        slack = 1e-5 if layer.base_layer.weight.dtype == torch.float32 else 0.05  # of what eight bits can say
        assert layer.float().distance == pytest.approx(REACH, rel=slack)
    assert still.float().distance == 0


def test_a_run_at_its_border_goes_on_learning():
    """It moves along the border, towards the best point there."""
    torch.manual_seed(0)
    net = Lora()
    optimizer = BoundedAdamW(net, lr=1.0, reach=0.2, weight_decay=0.0)
    schedule = torch.optim.lr_scheduler.CosineAnnealingLR(optimizer, 300)
    target = torch.randn(9, 12, dtype=torch.float64)
    losses = []
    for _ in range(300):
        optimizer.zero_grad()
        change = target - net.base_layer.weight - net.lora_B.weight @ net.lora_A.weight
        loss = change.square().sum()
        loss.backward()
        optimizer.step()
        schedule.step()
        losses.append(float(loss.detach()))
    # the best change of rank 3 and that norm is the truncated singular value decomposition, cut to the norm
    U, S, V = torch.linalg.svd(target - net.base_layer.weight.detach())
    best = (U[:, :3] * S[:3]) @ V[:3]
    best *= 0.2 * net.base_layer.weight.norm() / best.norm()
    floor = float((target - net.base_layer.weight - best).detach().square().sum())
    start = losses[0]
    assert net.distance == pytest.approx(0.2, rel=1e-3)
    assert (start - losses[-1]) / (start - floor) > 0.5  # of the most that can be had there


@pytest.mark.parametrize("cls", [BoundedAdamW, bounded(SGD), scaled(Adam)], ids=lambda cls: cls.__name__)
def test_a_resumed_run_measures_from_where_the_first_one_began(cls):
    torch.manual_seed(0)
    net = Lora(started=True)
    optimizer = cls(net, lr=1.0, reach=REACH)
    train(net, optimizer, range(15))
    saved = io.BytesIO()
    torch.save(optimizer.state_dict(), saved)
    saved.seek(0)
    later = copy.deepcopy(net)
    resumed = cls(later, lr=1.0, reach=REACH)
    resumed.load_state_dict(torch.load(saved, weights_only=True))
    copied, pickled = copy.deepcopy((net, optimizer)), pickle.loads(pickle.dumps((net, optimizer)))
    wanted = train(net, optimizer, range(15, 30))
    for model, other in ((later, resumed), copied, pickled):
        assert train(model, other, range(15, 30)) == wanted
        assert all(map(torch.equal, net.parameters(), model.parameters()))
    assert max(wanted) <= REACH * (1 + 1e-9)


def test_a_state_that_is_loaded_into_a_run_under_way_brings_its_start():
    torch.manual_seed(0)
    net = Lora(started=True)
    optimizer = BoundedAdamW(net, lr=1.0, reach=REACH)
    train(net, optimizer, range(3))
    other = Lora(started=True)
    other.base_layer.load_state_dict(net.base_layer.state_dict())
    under_way = BoundedAdamW(other, lr=1.0, reach=REACH)
    train(other, under_way, range(3))
    other.load_state_dict(net.state_dict())
    under_way.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # torch loads the tensors themselves
    other.began = net.began
    assert train(other, under_way, range(3, 20)) == train(net, optimizer, range(3, 20))


def test_attached_to_an_optimizer_that_exists():
    torch.manual_seed(0)
    net = Lora()
    optimizer = AdamW([net.lora_A.weight, net.lora_B.weight], lr=1.0)
    attach(optimizer, net, damping=None, reach=REACH)
    assert max(train(net, optimizer, range(30))) <= REACH * (1 + 1e-9)


def test_each_group_has_its_own():
    torch.manual_seed(0)
    model = nn.ModuleDict({"near": Lora(), "far": Lora(), "free": Lora()})
    groups = [
        {"params": [p for p in net.parameters() if p.requires_grad]} | options
        for net, options in zip(model.values(), ({"reach": 0.01}, {"reach": 0.05}, {}), strict=True)
    ]
    optimizer = BoundedAdamW(groups, lr=1.0, trust=0.005)
    for _ in range(40):
        optimizer.zero_grad()
        sum(net(torch.ones(2, 12, dtype=torch.float64)).sum() for net in model.values()).backward()
        optimizer.step()
    near, far, free = (net.distance for net in model.values())
    assert near == pytest.approx(0.01, rel=1e-3) and far == pytest.approx(0.05, rel=1e-3) and free > 0.1


def test_what_is_out_of_bounds_or_too_far_out_is_refused_in_a_sentence():
    for reach in (0, -1.0, float("nan"), float("inf"), "far", True):
        with pytest.raises(InputError, match="reach must be a finite number above 0"):
            BoundedAdamW(Lora(), reach=reach)
    with pytest.raises(InputError, match=r"reach, 0\.01, bounds the whole run, and trust, 0\.02"):
        BoundedAdamW(Lora(), reach=0.01, trust=0.02)
    torch.manual_seed(0)
    net = Lora()
    optimizer = BoundedAdamW(net, lr=1.0, reach=0.1)
    train(net, optimizer, range(30))
    state = optimizer.state_dict()
    for group in state["param_groups"]:
        group |= {"reach": 0.05, "trust": 0.005}
    optimizer.load_state_dict(state)
    with pytest.raises(InputError, match=r"has gone 0\.1 .* farther than reach, 0\.05"):
        train(net, optimizer, range(30, 31))


def test_a_factor_without_gradients_leaves_its_bases_state_to_it():
    """A base makes its state at the first gradient, and only if it is empty."""
    torch.manual_seed(0)
    net = Lora(started=True)
    optimizer = BoundedAdamW(net, lr=1.0, reach=REACH)
    for step in range(6):
        optimizer.zero_grad(set_to_none=True)
        (net.lora_B.weight.sum() if step < 3 else net(torch.ones(2, 12, dtype=torch.float64)).sum()).backward()
        optimizer.step()
        assert (START in optimizer.state[net.lora_A.weight]) == (step >= 3)
        assert net.distance <= REACH * (1 + 1e-9)
    assert torch.equal(optimizer.state[net.lora_A.weight][START], net.began[0])


def test_a_product_that_began_as_nothing_keeps_its_direction():
    """It is cut by one factor for both, as if from nothing."""
    torch.manual_seed(0)
    net = Lora()
    optimizer = BoundedAdamW(net, lr=0.0, trust=REACH, reach=REACH)
    train(net, optimizer, range(1))
    net.lora_B.weight.data.normal_()
    A, B = net.lora_A.weight.detach().clone(), net.lora_B.weight.detach().clone()
    assert net.distance > REACH
    train(net, optimizer, range(1, 2))
    share = net.lora_A.weight.detach() / A
    assert share.allclose(share[0, 0].expand_as(share), rtol=1e-6) and net.lora_B.weight.allclose(
        B * share[0, 0], rtol=1e-6
    )
    assert net.distance == pytest.approx(REACH, rel=1e-6)
    assert not optimizer.state[net.lora_A.weight][START].any()


def test_bounds_that_are_made_anew_gather_sharded_factors_once(monkeypatch):
    """Once before a step and once after it, for each is a transfer of every factor."""
    gathered = []
    gather = FullFactors.gather
    monkeypatch.setattr(FullFactors, "gather", lambda self: gathered.append(1) or gather(self))
    net = Lora(started=True)
    optimizer = BoundedAdamW(net, lr=1e-3, reach=REACH, trust=0.01)
    for reach in (REACH, 2 * REACH):
        optimizer.param_groups[0]["reach"] = reach
        gathered.clear()
        train(net, optimizer, range(1))
        assert len(gathered) == 2


@pytest.mark.parametrize("cls", [BoundedAdamW, ScaledAdamW])
def test_several_adapters_on_a_layer_keep_the_bounds_together(cls):
    torch.manual_seed(0)
    layer = nn.Linear(12, 9, bias=False, dtype=torch.float64)
    model, config = nn.Sequential(layer), LoraConfig(r=3, lora_alpha=6, target_modules=["0"])
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", UserWarning)  # peft: "multiple adapters", which are meant
        for name in ("one", "two"):
            inject_adapter_in_model(config, model, adapter_name=name)
    model[0].set_adapter(["one", "two"])
    model.double()
    weight = layer.weight.detach().clone()
    target, x = torch.randn(9, 12, dtype=torch.float64), torch.randn(64, 12, dtype=torch.float64)
    optimizer = cls(model, lr=1.0, reach=REACH, trust=REACH / 4)

    def change() -> Tensor:
        return sum(model[0].get_delta_weight(name).detach() for name in ("one", "two"))

    before = change()
    for _ in range(20):
        optimizer.zero_grad()
        (model(x) - x @ target.T).square().mean().backward()
        optimizer.step()
        now = change()
        assert (now - before).norm() <= REACH / 4 * weight.norm() * (1 + 1e-9)
        assert now.norm() <= REACH * weight.norm() * (1 + 1e-9)
        before = now
    assert now.norm() >= 0.7 * REACH * weight.norm()  # they pull in nearly one direction
    assert len(optimizer.moved) == 2
    assert all(far == pytest.approx(REACH / 2) for far in optimizer.moved.values())


class WithHead(nn.Module):
    def __init__(self):
        super().__init__()
        self.lora, self.head = Lora(), nn.Linear(9, 2, dtype=torch.float64)


def test_nothing_need_be_given():
    """Factors get a large rate and a reach of 1.8/n; what is outside pairs, which no bound holds, a moderate rate."""
    model = WithHead()
    optimizer = BoundedAdamW(model)
    factors, head = optimizer.param_groups
    assert [group["lr"] for group in (factors, head)] == [1.0, 1e-3]
    assert factors["param_names"] == ["lora.lora_A.weight", "lora.lora_B.weight"]
    assert head["param_names"] == ["head.weight", "head.bias"]
    assert all((group["reach"], group["trust"]) == (0.5, pytest.approx(0.05)) for group in (factors, head))
    distances = train(model.lora, optimizer, range(60))
    assert max(distances) <= 0.5 * (1 + 1e-9) and distances[-1] == pytest.approx(0.5)
    optimizer.add_param_group({"params": [("late", nn.Parameter(torch.zeros(2)))], "lr": 0.1})
    assert optimizer.param_groups[-1]["reach"] == 0.5
    for count, reach in ((2, 0.5), (4, 0.45), (18, 0.1), (90, 0.02), (200, 0.02)):
        several = nn.ModuleList(Lora() for _ in range(count))
        assert [group["reach"] for group in BoundedAdamW(several).param_groups] == [pytest.approx(reach)]


def test_a_rate_that_is_given_counts_for_all_and_one_of_a_group_for_the_group():
    model = WithHead()
    assert [group["lr"] for group in BoundedAdamW(model, lr=0.1).param_groups] == [0.1]
    factors, head = list(model.lora.parameters())[1:], list(model.head.parameters())
    groups = [{"params": factors}, {"params": head, "lr": 0.2, "weight_decay": 0.0}]
    assert [group["lr"] for group in BoundedAdamW(groups).param_groups] == [1.0, 0.2]
    mixed = [{"params": factors + head, "betas": (0.5, 0.6)}]
    made = BoundedAdamW(mixed).param_groups
    assert [(group["lr"], group["betas"], len(group["params"])) for group in made] == [
        (1.0, (0.5, 0.6), 2),
        (1e-3, (0.5, 0.6), 2),
    ]


def test_modules_are_searched_once_when_nothing_is_given_and_again_at_the_first_step(monkeypatch):
    """Layers may be wrapped, replaced or merged in between, so that the first step believes nothing from before."""
    net = Lora()
    searched, search = [], pairs.live_roots
    monkeypatch.setattr(pairs, "live_roots", lambda: searched.append(1) or search())
    optimizer = BoundedAdamW([net.lora_A.weight, net.lora_B.weight])
    assert len(searched) == 1 and optimizer.param_groups[0]["reach"] == 0.5
    train(net, optimizer, range(2))
    assert len(searched) == 2 and list(optimizer.moved) == [pair.name for pair in optimizer.pairs]


def test_trust_alone_bounds_no_run_and_a_group_of_ones_own_keeps_to_its_options():
    assert BoundedAdamW(Lora(), trust=0.1).param_groups[0]["reach"] is None
    groups = [{"params": list(Lora().parameters())[1:], "trust": 0.2}, {"params": list(Lora().parameters())[1:]}]
    made = BoundedAdamW(groups, lr=1.0).param_groups
    assert [(group["trust"], group["reach"]) for group in made] == [
        (0.2, None),
        (pytest.approx(0.05), 0.5),
    ]


def test_a_state_from_before_there_was_a_reach_goes_on_without_one():
    net = Lora()
    old = BoundedAdamW(net, lr=1.0, trust=0.01)
    train(net, old, range(20))
    state = old.state_dict()
    for group in state["param_groups"]:
        del group["reach"]
    resumed = BoundedAdamW(net, lr=1.0)
    resumed.load_state_dict(state)
    assert (resumed.param_groups[0]["trust"], resumed.param_groups[0]["reach"]) == (0.01, None)
    twin = copy.deepcopy(net)
    other = BoundedAdamW(twin, lr=1.0, trust=0.01)
    other.load_state_dict(copy.deepcopy(old.state_dict()))
    assert train(net, resumed, range(20, 30)) == train(twin, other, range(20, 30))
