"""The methods on optimizers that others wrote: what each base sees, what it keeps, and what is refused."""

import copy
import functools
import io
import math
import pickle

import lion_pytorch
import prodigyopt
import pytest
import pytorch_optimizer
import schedulefree
import torch
import transformers
from torch import Tensor, nn
from torch.optim import Adafactor, Optimizer
from torch.optim.lr_scheduler import LambdaLR

from equipoise import attach, bounded, scaled
from equipoise.errors import InputError
from equipoise.optimizers.reference import ReferenceScaled

# (class, its options, a rate so large that the bound has to act)
BASES = {
    "torch Adafactor": (Adafactor, {"lr": 1e-2}, 10.0),
    "transformers Adafactor": (
        transformers.Adafactor,
        {"lr": 1e-2, "relative_step": False, "scale_parameter": False},
        1.0,
    ),
    "transformers Adafactor, own rate": (transformers.Adafactor, {}, None),
    "Prodigy": (prodigyopt.Prodigy, {"lr": 1.0, "d0": 1e-2}, 100.0),
    "schedule-free AdamW": (schedulefree.AdamWScheduleFree, {"lr": 1e-2}, 1.0),
    "schedule-free AdamW, pytorch_optimizer": (pytorch_optimizer.ScheduleFreeAdamW, {"lr": 1e-2}, 1.0),
    "Lion": (lion_pytorch.Lion, {"lr": 1e-3}, 1.0),
    "Lion, pytorch_optimizer": (pytorch_optimizer.Lion, {"lr": 1e-3}, 1.0),
    "cautious Lion": (pytorch_optimizer.Lion, {"lr": 1e-3, "cautious": True}, 1.0),
}
# Those that count steps for a whole parameter group, and so cannot take two passes in one step.
COUNTERS = {
    "Prodigy": "k",
    "schedule-free AdamW": "k",
    "schedule-free AdamW, pytorch_optimizer": "weight_sum",
    "Lion, pytorch_optimizer": "step",
    "cautious Lion": "step",
}
# Those whose own copies cannot step: torch's optimizers copy groups and state alone, and these keep settings elsewhere.
LOSE_ATTRIBUTES = {"schedule-free AdamW, pytorch_optimizer", "Lion", "Lion, pytorch_optimizer", "cautious Lion"}
DAMPING, TRUST = 1e-2, 1e-2


@pytest.fixture(params=BASES)
def name(request: pytest.FixtureRequest) -> str:
    return request.param


class Net(nn.Module):
    """A LoRA layer on a frozen one, and a full one beside it; float64, so that the twin's arithmetic is the same."""

    def __init__(self):
        super().__init__()
        generator = torch.Generator().manual_seed(0)
        random = functools.partial(torch.randn, dtype=torch.float64, generator=generator)
        self.lora_A, self.lora_B = nn.Parameter(random(2, 8) / 3), nn.Parameter(random(6, 2) / 3)
        self.register_buffer("weight", random(6, 8))
        self.full = nn.Parameter(random(6, 8))

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.full + self.lora_B @ self.lora_A).T

    @property
    def product(self) -> Tensor:
        return (self.lora_B @ self.lora_A).detach()


def start(name: str, make, rate: float | None = None, **options) -> tuple[Net, Optimizer]:
    model = Net()
    cls, given, _ = BASES[name]
    params = model if make in (scaled, bounded) else list(model.parameters())
    optimizer = make(cls)(params, **given | options | ({} if rate is None else {"lr": rate}))
    _switch(optimizer, "train")
    return model, optimizer


def _switch(optimizer: Optimizer, mode: str) -> None:
    if hasattr(optimizer, mode):  # schedule-free
        getattr(optimizer, mode)()


def fill_gradients(model: Net, index: int) -> None:
    model.zero_grad()
    x = torch.randn(5, 8, dtype=torch.float64, generator=torch.Generator().manual_seed(index))
    model(x).square().mean().backward()


def train(model: Net, optimizer: Optimizer, steps: range) -> None:
    for index in steps:
        fill_gradients(model, index)
        optimizer.step()


def same(a: Net, b: Net) -> bool:
    return all(map(torch.equal, a.parameters(), b.parameters()))


def scale_by_hand(model: Net) -> None:
    """What the slow twin's gradient descent moves the factors by, as their gradients."""
    twin = copy.deepcopy(model)
    for param, original in zip(twin.parameters(), model.parameters(), strict=True):
        param.grad = original.grad.clone()
    ReferenceScaled([(twin.lora_A, twin.lora_B)], lr=1.0, damping=DAMPING, betas=None).step()
    for factor, moved in ((model.lora_A, twin.lora_A), (model.lora_B, twin.lora_B)):
        factor.grad = factor.detach() - moved.detach()


def test_the_base_runs_on_the_slow_twins_gradients(name: str):
    model, optimizer = start(name, scaled, damping=DAMPING)
    by_hand, base = start(name, lambda cls: cls)
    raw, plain = start(name, lambda cls: cls)
    for index in range(10):
        train(model, optimizer, range(index, index + 1))
        fill_gradients(by_hand, index)
        scale_by_hand(by_hand)
        base.step()
        for ours, wanted in zip(model.parameters(), by_hand.parameters(), strict=True):
            # float64: some hundred roundings of 1e-16, which inverting Gram matrices of condition 10 enlarges
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)
    train(raw, plain, range(10))
    assert not torch.allclose(model.lora_A, raw.lora_A, atol=1e-6)  # else nothing was scaled


def test_no_step_leaves_the_bound_and_some_reach_it(name: str):
    rate = BASES[name][2]
    trust = TRUST if rate is not None else TRUST / 100  # that rate cannot be made large
    model, optimizer = start(name, bounded, rate, trust=trust)
    shares = []
    for index in range(10):
        before = model.product
        train(model, optimizer, range(index, index + 1))
        moved = (model.product - before).norm() / model.weight.norm()
        assert moved <= trust * (1 + 1e-6), index  # the share's own tolerance
        shares.append(optimizer.shares["lora_A"])
    assert min(shares) < 1


def test_a_bound_that_never_acts_changes_nothing(name: str):
    model, optimizer = start(name, bounded, trust=1e3)
    plain, base = start(name, lambda cls: cls)
    train(model, optimizer, range(5))
    train(plain, base, range(5))
    assert same(model, plain) and optimizer.shares == {"lora_A": 1.0}


@pytest.mark.parametrize("make", [scaled, bounded])
def test_resume_then_20_equal_steps(name: str, make):
    model, optimizer = start(name, make)
    train(model, optimizer, range(5))
    file = io.BytesIO()
    torch.save([model.state_dict(), optimizer.state_dict()], file)
    file.seek(0)
    weights, state = torch.load(file, weights_only=True)
    other, resumed = start(name, make)
    other.load_state_dict(weights)
    resumed.load_state_dict(state)
    for index in range(5, 25):
        train(model, optimizer, range(index, index + 1))
        train(other, resumed, range(index, index + 1))
        assert same(model, other), index


@pytest.mark.parametrize("copied", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_take_the_same_steps(name: str, copied):
    model, optimizer = start(name, scaled, trust=TRUST)
    train(model, optimizer, range(3))
    if name in LOSE_ATTRIBUTES:
        plain, base = copied(start(name, lambda cls: cls))
        with pytest.raises(AttributeError, match="has no attribute"):
            train(plain, base, range(1))
        return
    other, twin = copied((model, optimizer))
    train(model, optimizer, range(3, 6))
    train(other, twin, range(3, 6))
    assert type(twin) is type(optimizer) and same(model, other)


@pytest.mark.parametrize("damping", [DAMPING, None])
def test_an_optimizer_that_exists_is_treated_from_then_on(name: str, damping: float | None):
    model, optimizer = start(name, lambda cls: cls)
    made, known = start(name, scaled if damping is not None else bounded, **{"damping": DAMPING} if damping else {})
    train(model, optimizer, range(3))
    made.load_state_dict(model.state_dict())
    state = copy.deepcopy(optimizer.state_dict())  # loading would share its tensors
    attach(optimizer, model, damping=damping, trust=TRUST)
    known.load_state_dict(state)
    for group in known.param_groups:
        group["trust"] = TRUST
    train(model, optimizer, range(3, 6))
    train(made, known, range(3, 6))
    assert type(optimizer) is type(known) and same(model, made)


def test_a_schedule_drives_it(name: str):
    if name == "transformers Adafactor, own rate":
        model, optimizer = start(name, scaled)
        with pytest.raises(TypeError):  # the base's own: its groups hold no rate
            LambdaLR(optimizer, lambda step: 0.5)
        return
    model, optimizer = start(name, scaled, damping=DAMPING)
    schedule = LambdaLR(optimizer, lambda step: 0.1)
    by_hand, base = start(name, lambda cls: cls, BASES[name][1]["lr"] * 0.1)
    train(model, optimizer, range(1))
    schedule.step()
    fill_gradients(by_hand, 0)
    scale_by_hand(by_hand)
    base.step()
    assert math.isclose(optimizer.param_groups[0]["lr"], base.param_groups[0]["lr"])
    torch.testing.assert_close(model.lora_A, by_hand.lora_A, rtol=1e-9, atol=1e-11)


def test_two_passes_are_refused_where_steps_are_counted_for_a_whole_group(name: str):
    if counter := COUNTERS.get(name):
        with pytest.raises(InputError, match=f"counts its steps in '{counter}' for the whole group"):
            train(*start(name, scaled, order="sequential"), range(1))
        return
    model, optimizer = start(name, scaled, order="sequential", damping=DAMPING)
    by_hand, base = start(name, lambda cls: cls)
    train(model, optimizer, range(1))
    fill_gradients(by_hand, 0)
    gradients = [param.grad.clone() for param in by_hand.parameters()]
    scale_by_hand(by_hand)
    by_hand.lora_B.grad = None
    base.step()
    for param, grad in zip(by_hand.parameters(), gradients, strict=True):
        param.grad = grad
    scale_by_hand(by_hand)  # B's, with the new A
    by_hand.lora_A.grad = by_hand.full.grad = None
    base.step()
    assert not torch.equal(by_hand.lora_B, Net().lora_B)
    for ours, wanted in zip(model.parameters(), by_hand.parameters(), strict=True):
        torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-11)


SCHEDULE_FREE = [name for name in BASES if name.startswith("schedule-free")]


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_evaluating_in_between_changes_nothing(name: str):
    model, optimizer = start(name, scaled, 1.0, trust=TRUST)
    other, undisturbed = start(name, scaled, 1.0, trust=TRUST)
    for index in range(6):
        train(model, optimizer, range(index, index + 1))
        train(other, undisturbed, range(index, index + 1))
        weights = [param.detach().clone() for param in model.parameters()]
        optimizer.eval()
        assert not same(model, other) or index == 0  # after one step, both averages are the same point
        optimizer.train()
        for ours, before, wanted in zip(model.parameters(), weights, other.parameters(), strict=True):
            torch.testing.assert_close(ours, before, rtol=1e-12, atol=1e-12)  # there and back by two lerps
            torch.testing.assert_close(ours, wanted, rtol=1e-9, atol=1e-9)
    assert optimizer.pairs.found_by == ("modules",)


@pytest.mark.parametrize("name", SCHEDULE_FREE)
def test_the_bound_takes_back_the_same_share_of_schedule_frees_average(name: str):
    """Else z runs away from the bounded y, and `eval` shows a weight far from the one that was trained."""
    model, optimizer = start(name, bounded, 1.0, trust=TRUST)
    for index in range(10):
        other = copy.deepcopy(model)
        base = BASES[name][0](list(other.parameters()), lr=1.0)
        base.load_state_dict(copy.deepcopy(optimizer.state_dict()))  # the plain base, from the same point
        before = {p: optimizer.state[p].get("z", p).detach().clone() for p in (model.lora_A, model.lora_B)}
        train(model, optimizer, range(index, index + 1))
        train(other, base, range(index, index + 1))
        share = optimizer.shares["lora_A"]
        for ours, free in ((model.lora_A, other.lora_A), (model.lora_B, other.lora_B)):
            wanted = torch.lerp(before[ours], base.state[free]["z"], share)
            torch.testing.assert_close(optimizer.state[ours]["z"], wanted, rtol=1e-9, atol=1e-12)
    assert share < 1
    trained = model.product
    optimizer.eval()
    assert (model.product - trained).norm() <= 10 * TRUST * model.weight.norm()
