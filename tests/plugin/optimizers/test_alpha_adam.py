"""AlphaAdam against the golden trajectories, its slow twin, torch's AdamW and the paper's limits."""

import copy
import doctest
import io
import json
import math
import pickle
from pathlib import Path
from statistics import median

import pytest
import torch
from torch import Tensor, nn
from torch.optim import SGD, AdamW
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves

from equipoise import AlphaAdam, attach, bounded, scaled
from equipoise.errors import InputError
from equipoise.optimizers import alpha_adam as module
from equipoise.optimizers.parts.optional import metrics
from equipoise.optimizers.reference import ReferenceAlphaAdam
from equipoise.options import options, read_options

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "alpha_adam.json").read_text())
EXACT = 1e-10  # float64: what is left is the order of a few products
SHAPES = [(40, 30), (7,), (2, 3, 3, 3), (), (300, 300)]  # the last in pieces on a CPU
PAPERS = [(mask, comp) for mask in ("async", "sync", "none") for comp in ("norm", "algorithm1", "none")]
READINGS = [*PAPERS, ("cautious", "cautious"), ("cautious", "norm"), ("sync", "cautious")]


def parameters(dtype: torch.dtype = torch.float64) -> list[nn.Parameter]:
    generator = torch.Generator().manual_seed(1)
    return [nn.Parameter(torch.randn(s, generator=generator, dtype=torch.float64).to(dtype)) for s in SHAPES]


def strided(tensor: Tensor) -> Tensor:
    """Equal, but not contiguous: on the CPU AlphaAdam then takes the operations that it takes on a device."""
    return torch.stack([tensor, tensor], -1)[..., 0]


def fill(params: list[nn.Parameter], index: int) -> None:
    generator = torch.Generator().manual_seed(100 + index)
    for param in params:
        param.grad = torch.randn(param.shape, generator=generator, dtype=torch.float64).to(param.dtype)


def train(params: list[nn.Parameter], optimizer: torch.optim.Optimizer, steps: int, start: int = 0) -> None:
    for index in range(start, start + steps):
        fill(params, index)
        optimizer.step()


def furthest(a: list[nn.Parameter], b: list[nn.Parameter]) -> float:
    return max(float((x.detach().double() - y.detach().double()).abs().max()) for x, y in zip(a, b, strict=True))


# Against the golden trajectories and the slow twin


@pytest.mark.parametrize(("foreach", "on_device"), [(True, False), (True, True), (False, False)])
@pytest.mark.parametrize("reading", GOLDEN["runs"])
def test_golden_trajectories(reading: str, foreach: bool, on_device: bool):
    mask, compensation, correction = reading.split("/")
    param = nn.Parameter(torch.tensor(GOLDEN["p"], dtype=torch.float64))
    names = {name: GOLDEN[name] for name in ("lr", "eps", "weight_decay")}
    optimizer = AlphaAdam([("p", param)], betas=tuple(GOLDEN["betas"]), mask=mask, compensation=compensation,
                          bias_correction=correction == "bc", foreach=foreach, **names)  # fmt: skip
    run = GOLDEN["runs"][reading]
    assert len(GOLDEN["grads"]) == len(run["steps"]) == len(run["alpha"]) == 8
    for grad, wanted, alpha in zip(GOLDEN["grads"], run["steps"], run["alpha"], strict=True):
        param.grad = torch.tensor(grad, dtype=torch.float64)
        param.grad = strided(param.grad) if on_device else param.grad
        optimizer.step()
        torch.testing.assert_close(param.data, torch.tensor(wanted, dtype=torch.float64), rtol=0, atol=EXACT)
        assert optimizer.alphas["p"] == pytest.approx(alpha, abs=EXACT)


def test_the_golden_file_holds_every_reading():
    assert set(GOLDEN["runs"]) == {f"{m}/{c}/{b}" for m, c in PAPERS for b in ("bc", "nobc")}


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize(("mask", "compensation"), READINGS)
def test_matches_the_slow_twin_on_many_tensors(mask, compensation, foreach):
    params = parameters()
    twins = [ReferenceAlphaAdam(p.detach().clone(), 1e-2, mask=mask, compensation=compensation) for p in params]
    optimizer = AlphaAdam(params, 1e-2, mask=mask, compensation=compensation, foreach=foreach, count_kept=True)
    for index in range(6):
        train(params, optimizer, 1, index)
        seen = [twin.step(p.grad) for twin, p in zip(twins, params, strict=True)]
        for twin, param in zip(twins, params, strict=True):
            torch.testing.assert_close(param.data, twin.x, rtol=0, atol=EXACT)
        assert list(optimizer.alphas.values()) == pytest.approx([alpha for alpha, _ in seen], abs=EXACT)
        assert list(optimizer.kept.values()) == pytest.approx([kept for _, kept in seen], abs=EXACT)


@pytest.mark.parametrize("foreach", [True, False])
def test_the_cautious_mask_leaves_alone_what_has_no_gradient_and_the_others_do_not(foreach: bool):
    """As rows of an embedding whose words are not in the batch: momentum would move them on."""
    for mask, rests in (("cautious", True), ("sync", False), ("async", False)):
        param = nn.Parameter(torch.zeros(3))
        optimizer = AlphaAdam([param], lr=0.1, weight_decay=0.0, mask=mask, compensation="cautious", foreach=foreach)
        for gradient in ([1.0, 1.0, 1.0], [1.0, 1.0, 0.0]):
            before = param.detach().clone()
            param.grad = torch.tensor(gradient)
            optimizer.step()
        assert (param[2] == before[2]).item() is rests and param[0] < before[0]
        assert optimizer.alphas["0.0"] == pytest.approx(3 / (3 - rests + 1))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(("mask", "compensation"), READINGS)
def test_foreach_and_readable_agree(dtype, mask, compensation):
    many, one = parameters(dtype), parameters(dtype)
    common = {"lr": 1e-2, "mask": mask, "compensation": compensation}
    train(many, AlphaAdam(many, foreach=True, **common), 5)
    train(one, AlphaAdam(one, foreach=False, **common), 5)
    # One unit in the last place of numbers below 8, for a rounding may go either way; in float32, of a few sums too.
    assert furthest(many, one) <= {torch.float32: 1e-5, torch.bfloat16: 2**-5}[dtype]
    assert furthest(many, parameters(dtype)) > 1e-2


@pytest.mark.parametrize("options", [{}, {"maximize": True, "eps": 1e-3, "bias_correction": False}], ids=str)
@pytest.mark.parametrize(("mask", "compensation"), READINGS)
def test_on_a_device_it_is_the_same(mask, compensation, options):
    ours, theirs = parameters(), parameters()
    common = {"lr": 1e-2, "mask": mask, "compensation": compensation, "count_kept": True, **options}
    here, there = AlphaAdam(ours, **common), AlphaAdam(theirs, **common)
    for index in range(5):
        fill(ours, index)
        fill(theirs, index)
        for param in theirs:
            param.grad = strided(param.grad)
        here.step()
        there.step()
    assert furthest(ours, theirs) < EXACT
    assert here.alphas == pytest.approx(there.alphas, rel=1e-9) and here.kept == pytest.approx(there.kept, rel=1e-9)


# The limit, and that it is one


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("maximize", [True, False])
def test_is_adamw_without_mask_and_compensation_and_else_is_not(foreach: bool, maximize: bool):
    common = {"lr": 1e-2, "betas": (0.8, 0.95), "eps": 1e-3, "weight_decay": 0.1, "maximize": maximize}
    plain = parameters()
    train(plain, AdamW(plain, foreach=False, **common), 8)
    for mask, compensation in READINGS:
        params = parameters()
        train(params, AlphaAdam(params, mask=mask, compensation=compensation, foreach=foreach, **common), 8)
        same = mask == "none" and compensation != "algorithm1"
        assert (furthest(params, plain) < EXACT) is same
        assert same or furthest(params, plain) > 1e-3


def test_half_precision_is_torchs_fused_adamw_in_the_limit():
    params, plain = parameters(torch.bfloat16), parameters(torch.bfloat16)
    train(params, AlphaAdam(params, 1e-2, mask="none"), 5)
    train(plain, AdamW(plain, 1e-2, fused=True), 5)  # its arithmetic is float32, too
    assert furthest(params, plain) <= 2**-5
    state = AlphaAdam(params).state
    assert not state
    optimizer = AlphaAdam(params)
    train(params, optimizer, 1)
    stored = [optimizer.state[p][name].dtype for p in params for name in ("exp_avg", "exp_avg_sq")]
    assert set(stored) == {torch.bfloat16}
    assert all(set(optimizer.state[p]) == {"step", "exp_avg", "exp_avg_sq"} for p in params)


def test_the_norm_of_the_step_is_restored_and_the_masked_entries_stay():
    param, plain = (nn.Parameter(torch.zeros(50, dtype=torch.float64)) for _ in range(2))
    optimizer, adamw = AlphaAdam([param], 1e-2, weight_decay=0.0), AdamW([plain], 1e-2, weight_decay=0.0)
    past = torch.zeros(50, dtype=torch.float64)
    for index in range(5):
        before, plain_before = param.detach().clone(), plain.detach().clone()
        for each, rule in (([param], optimizer), ([plain], adamw)):
            train(each, rule, 1, index)
        step, plain_step = param.detach() - before, plain.detach() - plain_before
        torch.testing.assert_close(step.norm(), plain_step.norm())
        dropped = past * param.grad < 0
        assert not step[dropped].any() and step[~dropped].all() and bool(dropped.any()) is (index > 0)
        past = optimizer.state[param]["exp_avg"].clone()


# Tensors of which nothing is kept, without gradients, of zero


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("compensation", ["norm", "algorithm1", "none"])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_where_nothing_is_kept_nothing_moves(foreach, compensation, dtype):
    params = [nn.Parameter(torch.ones(4, 3, dtype=dtype)), nn.Parameter(torch.ones(2, dtype=dtype))]
    common = {"weight_decay": 0.0, "compensation": compensation, "foreach": foreach, "count_kept": True}
    optimizer = AlphaAdam(params, 1e-2, **common)
    for param in params:
        param.grad = torch.ones_like(param)
    optimizer.step()
    before = copy.deepcopy(params)
    params[0].grad = -torch.ones_like(params[0])
    optimizer.step()
    assert torch.equal(params[0], before[0]) and not torch.equal(params[1], before[1])
    assert list(optimizer.kept.values()) == [0.0, 1.0]
    assert all(math.isfinite(alpha) for alpha in optimizer.alphas.values())


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("eps", [1e-8, 0.0])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
def test_zero_gradients_move_nothing(foreach, eps, dtype):
    params = [nn.Parameter(torch.ones(4, dtype=dtype)), nn.Parameter(torch.ones(0, dtype=dtype))]
    optimizer = AlphaAdam(params, 1e-2, eps=eps, weight_decay=0.0, foreach=foreach)
    for _ in range(3):
        for param in params:
            param.grad = torch.zeros_like(param)
        optimizer.step()
    assert torch.equal(params[0], torch.ones(4, dtype=dtype))
    params[0].grad = torch.tensor([0, 0.5, 0, 0], dtype=dtype)  # one entry among those that never had a gradient
    optimizer.step()
    assert params[0].isfinite().all() and (params[0] != 1).tolist() == [False, True, False, False]


def test_a_missing_gradient_is_no_step():
    params = parameters()
    optimizer = AlphaAdam([(f"p{i}", p) for i, p in enumerate(params)], 1e-2)
    train(params, optimizer, 2)
    before = params[1].detach().clone()
    fill(params, 2)
    params[1].grad = None
    optimizer.step()
    assert torch.equal(params[1], before)
    assert [int(optimizer.state[p]["step"]) for p in params] == [3, 2, 3, 3, 3]
    twin = parameters()
    other = AlphaAdam(twin, 1e-2, foreach=False)
    train(twin, other, 2)
    fill(twin, 2)
    twin[1].grad = None
    other.step()
    for rule, each in ((optimizer, params), (other, twin)):  # counts that differ from here on
        train(each, rule, 2, 3)
    assert furthest(params, twin) < EXACT


# Groups, options, state


def test_each_group_has_its_own_options():
    a, b = parameters()[:2]
    groups = [
        {"params": iter([a]), "mask": "sync", "lr": 1e-3},
        {"params": [b], "compensation": "none", "max_alpha": 2.0},
    ]
    optimizer = AlphaAdam(groups, lr=1e-2)
    twins = [
        ReferenceAlphaAdam(a.detach().clone(), 1e-3, mask="sync"),
        ReferenceAlphaAdam(b.detach().clone(), 1e-2, compensation="none"),
    ]
    for index in range(4):
        train([a, b], optimizer, 1, index)
        for twin, param in zip(twins, (a, b), strict=True):
            twin.step(param.grad)
            torch.testing.assert_close(param.data, twin.x, rtol=0, atol=EXACT)


@pytest.mark.parametrize("foreach", [True, False])
def test_max_alpha_limits_it(foreach: bool):
    free, limited = parameters(), parameters()
    unlimited = AlphaAdam(free, 1e-2, foreach=foreach)
    optimizer = AlphaAdam(limited, 1e-2, foreach=foreach, max_alpha=1.1)
    train(free, unlimited, 3)
    train(limited, optimizer, 3)
    assert max(unlimited.alphas.values()) > 1.1 >= max(optimizer.alphas.values()) > 1.0
    assert furthest(free, limited) > 1e-4


def test_a_rate_in_a_tensor_is_that_rate():
    params, others = parameters(), parameters()
    train(params, AlphaAdam(params, torch.tensor(1e-2, dtype=torch.float64)), 3)
    train(others, AlphaAdam(others, 1e-2), 3)
    assert furthest(params, others) < EXACT


class Watch(TorchDispatchMode):
    """Lets no operation take tensors of two devices: but for copies, those want the host's numbers on the device."""

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        leaves = tree_leaves((args, kwargs or {}))
        assert len({leaf.device for leaf in leaves if isinstance(leaf, Tensor)}) < 2, f"{func} mixes devices"
        return func(*args, **(kwargs or {}))


@pytest.mark.parametrize("foreach", [True, False])
@pytest.mark.parametrize("rate_on", ["none", "cpu", "meta"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_nothing_waits_for_the_device(foreach: bool, rate_on: str, dtype: torch.dtype):
    """On the meta device there is nothing to read: what would wait for another one raises."""
    rate = 1e-2 if rate_on == "none" else torch.tensor(1e-2, device=rate_on)
    params = [nn.Parameter(torch.empty(s, dtype=dtype, device="meta")) for s in SHAPES]
    for mask, compensation in READINGS:
        optimizer = AlphaAdam(params, rate, mask=mask, compensation=compensation, foreach=foreach, count_kept=True)
        for _ in range(2):
            for param in params:
                param.grad = torch.empty_like(param)
            with Watch():
                optimizer.step()
    with pytest.raises((RuntimeError, NotImplementedError), match="meta"):  # so reading would have been seen
        _ = optimizer.alphas
    with pytest.raises(AssertionError, match="mixes devices"), Watch():
        params[0].detach().mul_(torch.tensor(1.0))


@pytest.mark.parametrize("of", [AlphaAdam, scaled(AlphaAdam), bounded(AlphaAdam)])
def test_metrics_give_the_median_alpha_and_nothing_before_the_first_step(of):
    model = nn.Linear(8, 4)
    optimizer = of(model, 1e-2)
    assert metrics(optimizer) == {}
    train(list(model.parameters()), optimizer, 3)
    assert metrics(optimizer) == {"alpha": median(optimizer.alphas.values())}


def test_an_optimizer_without_metrics_has_none():
    weight = nn.Parameter(torch.ones(2))
    assert metrics(SGD([weight], 1e-2)) == {}


def test_alphas_are_by_name_and_kept_asks_to_be_switched_on():
    model = nn.Linear(8, 4)
    optimizer = AlphaAdam(model, 1e-2)
    assert optimizer.alphas == {}
    train(list(model.parameters()), optimizer, 3)
    assert optimizer.alphas.keys() == {"weight", "bias"} and optimizer.alphas["weight"] > 1
    with pytest.raises(InputError, match="count_kept=True"):
        _ = optimizer.kept


@pytest.mark.parametrize("foreach", [True, False])
def test_resume_is_exact_and_loads_with_weights_only(foreach: bool):
    params = parameters(torch.bfloat16)
    optimizer = AlphaAdam(params, 1e-2, mask="sync", max_alpha=3.0, foreach=foreach)
    train(params, optimizer, 3)
    file = io.BytesIO()
    torch.save([[p.data for p in params], optimizer.state_dict()], file)
    file.seek(0)
    weights, saved = torch.load(file, weights_only=True)
    others = [nn.Parameter(w) for w in weights]
    resumed = AlphaAdam(others, 1.0)  # every option comes from the file
    resumed.load_state_dict(saved)
    assert resumed.param_groups[0]["mask"] == "sync" and resumed.param_groups[0]["max_alpha"] == 3.0
    for index in range(3, 23):
        train(params, optimizer, 1, index)
        train(others, resumed, 1, index)
        assert furthest(params, others) == 0.0, f"step {index}"


@pytest.mark.parametrize("copier", [copy.deepcopy, lambda both: pickle.loads(pickle.dumps(both))])
def test_copies_take_the_same_steps(copier):
    params = parameters()
    optimizer = AlphaAdam(params, 1e-2)
    train(params, optimizer, 2)
    others, other = copier((params, optimizer))
    train(params, optimizer, 2, 2)
    train(others, other, 2, 2)
    assert furthest(params, others) == 0.0 and other.alphas == optimizer.alphas


def test_checkpoints_of_adamw_load_and_go_on():
    params = parameters(torch.float32)
    adamw = AdamW(params, 1e-2, fused=True)
    train(params, adamw, 3)
    optimizer = AlphaAdam(params, mask="none")
    optimizer.load_state_dict(adamw.state_dict())
    others = copy.deepcopy(params)
    plain = AdamW(others, 1e-2)
    plain.load_state_dict(copy.deepcopy(adamw.state_dict()))
    train(params, optimizer, 3, 3)
    train(others, plain, 3, 3)
    assert furthest(params, others) < 1e-6  # float32
    back = AdamW(params, 1e-2)
    back.load_state_dict(optimizer.state_dict())
    train(params, back, 1)


def test_a_state_of_adamw_leaves_each_group_its_own_options():
    params = parameters()[:3]
    adamw = AdamW([{"params": [param]} for param in params], 1e-2, betas=(0.5, 0.6))
    train(params, adamw, 1)
    own = [{"mask": "none"}, {"mask": "sync", "max_alpha": 2.0}, {}]
    optimizer = AlphaAdam([{"params": [p], **o} for p, o in zip(params, own, strict=True)], compensation="none")
    optimizer.load_state_dict(adamw.state_dict())
    groups = optimizer.param_groups
    assert [(group["mask"], group["max_alpha"]) for group in groups] == [("none", None), ("sync", 2.0), ("async", None)]
    assert all((group["lr"], group["betas"], group["compensation"]) == (1e-2, (0.5, 0.6), "none") for group in groups)
    momentum = SGD([{"params": [param]} for param in params], 0.5)
    optimizer.load_state_dict(momentum.state_dict())
    assert [(group["lr"], group["betas"]) for group in optimizer.param_groups] == [(0.5, (0.5, 0.6))] * 3
    train(params, optimizer, 1, 1)


# With pairs


class Lora(nn.Module):
    def __init__(self):
        super().__init__()
        self.weight = nn.Parameter(torch.randn(9, 12), requires_grad=False)
        self.lora_A, self.lora_B = nn.Parameter(torch.randn(3, 12) / 3), nn.Parameter(torch.randn(9, 3) / 3)

    def forward(self, x: Tensor) -> Tensor:
        return x @ (self.weight + self.lora_B @ self.lora_A).T


def descend(model: nn.Module, optimizer: torch.optim.Optimizer, steps: int) -> None:
    for index in range(steps):
        optimizer.zero_grad()
        model(torch.randn(5, 12, generator=torch.Generator().manual_seed(index))).square().mean().backward()
        optimizer.step()


@pytest.mark.parametrize("order", ["simultaneous", "sequential"])
def test_scaling_runs_before_it(order: str):
    model, plain = (copy.deepcopy(m) for m in [Lora()] * 2)
    optimizer = scaled(AlphaAdam)(model, lr=1e-2, damping=1e-3, order=order, mask="sync")
    assert optimizer.param_groups[0]["mask"] == "sync" and len(optimizer.pairs) == 1
    descend(model, optimizer, 5)
    descend(plain, AlphaAdam(plain, 1e-2, mask="sync"), 5)
    assert not torch.allclose(model.lora_A, plain.lora_A, atol=1e-3)
    assert optimizer.alphas.keys() == {"lora_A", "lora_B"}


def test_attached_it_is_the_scaled_class_and_the_bound_holds():
    model = Lora()
    other, held = copy.deepcopy(model), copy.deepcopy(model)
    descend(model, scaled(AlphaAdam)(model, lr=1e-2, damping=1e-3), 4)
    descend(other, attach(AlphaAdam(other, lr=1e-2), other, damping=1e-3), 4)
    assert torch.equal(model.lora_A, other.lora_A) and torch.equal(model.lora_B, other.lora_B)
    before = (held.lora_B @ held.lora_A).detach()
    optimizer = bounded(AlphaAdam)(held, lr=1.0, trust=0.01)
    descend(held, optimizer, 1)
    moved = (held.lora_B @ held.lora_A).detach() - before
    torch.testing.assert_close(moved.norm(), 0.01 * held.weight.norm())


# What cannot be


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"lr": -1.0}, "lr must be a finite number, 0 or more; got -1.0."),
        ({"lr": float("nan")}, "lr must be a finite number, 0 or more; got nan."),
        ({"lr": torch.tensor(-1.0)}, "lr must be a finite number, 0 or more; got -1.0."),
        ({"lr": torch.ones(2)}, "lr must be a finite number"),
        ({"lr": torch.tensor([1e-3])}, r"lr must be a finite number, or a real tensor .*; got one of shape \(1,\)"),
        ({"lr": None}, "lr must be a finite number, 0 or more; got None."),
        ({"eps": None}, "eps must be a finite number, 0 or more; got None."),
        ({"maximize": "no"}, "maximize must be True or False; got 'no'."),
        ({"bias_correction": "off"}, "bias_correction must be True or False; got 'off'."),
        ({"count_kept": 3}, "count_kept must be True or False; got 3."),
        ({"foreach": "x"}, "foreach must be True, False or None; got 'x'."),
        ({"eps": float("inf")}, "eps must be a finite number, 0 or more; got inf."),
        ({"eps": -1e-8}, "eps must be a finite number, 0 or more; got -1e-08."),
        ({"weight_decay": "0.1"}, "weight_decay must be a finite number, 0 or more; got '0.1'."),
        ({"betas": (0.9, 1.0)}, r"betas must be two numbers, each 0 or more and below 1; got \(0.9, 1.0\)."),
        ({"betas": (float("nan"), 0.9)}, "betas must be two numbers"),
        ({"betas": 0.9}, "betas must be two numbers"),
        ({"betas": ("a", 0.9)}, "betas must be two numbers"),
        ({"mask": "asynchronous"}, "mask must be 'async' or 'sync' or 'cautious' or 'none'; got 'asynchronous'."),
        ({"compensation": "box"}, "compensation must be 'norm' or 'algorithm1' or 'cautious' or 'none'; got 'box'."),
        ({"max_alpha": 0.5}, "max_alpha must be a finite number, 1 or more, or None; got 0.5."),
    ],
)
def test_options_out_of_bounds_are_one_sentence(given, message):
    param = nn.Parameter(torch.ones(3))
    with pytest.raises(InputError, match=f"^AlphaAdam: parameter group 0: {message}") as raised:
        AlphaAdam([param], **given)
    assert "\n" not in str(raised.value)
    optimizer = AlphaAdam([param])
    with pytest.raises(InputError, match="parameter group 1"):
        optimizer.add_param_group({"params": [nn.Parameter(torch.ones(2))], **given})
    assert len(optimizer.param_groups) == 1
    optimizer.param_groups[0].update(given)
    param.grad = torch.ones(3)
    with pytest.raises(InputError, match="parameter group 0"):
        optimizer.step()
    assert torch.equal(param, torch.ones(3)) and not optimizer.state


def test_complex_and_float16_parameters_and_sparse_gradients_are_refused():
    with pytest.raises(InputError, match=r"shape \(3,\) is float16, .* in float32 with autocast"):
        AlphaAdam([nn.Parameter(torch.ones(3, dtype=torch.float16))])
    with pytest.raises(InputError, match="a parameter is complex"):
        AlphaAdam([nn.Parameter(torch.ones(3, dtype=torch.complex64))])
    table, dense = nn.Embedding(5, 2, sparse=True), nn.Parameter(torch.ones(3))
    optimizer = AlphaAdam([{"params": [dense]}, {"params": table.parameters()}])
    table(torch.tensor([1])).sum().backward()
    dense.grad = torch.ones(3)
    with pytest.raises(InputError, match="a gradient is sparse"):
        optimizer.step()
    assert torch.equal(dense, torch.ones(3))
    with pytest.raises(InputError, match="no trainable parameter"):
        AlphaAdam(nn.Linear(2, 2).requires_grad_(False))


def test_a_state_of_another_kind_is_refused_and_loses_nothing():
    params = parameters()
    other = SGD(params, 1e-2, momentum=0.9)
    train(params, other, 1)
    optimizer = AlphaAdam(params, 1e-2)
    train(params, optimizer, 2)
    before = copy.deepcopy(optimizer.state_dict())
    with pytest.raises(
        InputError, match=r"the state to load has no step, exp_avg, exp_avg_sq, so it is of another kind"
    ):
        optimizer.load_state_dict(other.state_dict())
    assert str(optimizer.state_dict()) == str(before)


def test_a_closure_must_be_one_and_return_the_loss():
    optimizer = AlphaAdam(parameters(), 1e-2)
    with pytest.raises(InputError, match=r"step\(\) takes a function .* got Tensor"):
        optimizer.step(torch.ones(()))
    with pytest.raises(InputError, match=r"the closure returned None. Let it return the loss."):
        optimizer.step(lambda: None)


def test_options_are_read_from_text():
    values, problems = read_options(
        AlphaAdam, {"mask": "sync", "max_alpha": "2", "bias_correction": "no", "lr": "1e-4"}
    )
    assert not problems and values == {"mask": "sync", "max_alpha": 2.0, "bias_correction": False, "lr": 1e-4}
    _, problems = read_options(AlphaAdam, {"mask": "asink", "max_alpha": "0.5", "eps": "-1"})
    assert len(problems) == 3 and "Did you mean 'async'?" in problems[0]
    known = {option.name: option for option in options(AlphaAdam)}
    assert all(option.help for option in known.values())
    assert {name for name, option in known.items() if option.bounds} == {
        "lr",
        "betas",
        "eps",
        "weight_decay",
        "max_alpha",
    }


def test_the_examples_in_the_docstrings_run():
    results = doctest.testmod(module, extraglobs={"torch": torch})
    assert results.attempted >= 4 and results.failed == 0
