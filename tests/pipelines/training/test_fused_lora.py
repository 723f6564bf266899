"""The fused LoRA layer is peft's: to rounding where it works itself, exactly where it leaves the work to peft."""

import copy

import pytest
import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora import Linear
from torch import nn
from torch.optim import SGD

from equipoise.optimizers.directions import measure_step
from equipoise.pipelines.training import fused_lora
from equipoise.pipelines.training.fused_lora import FusedLinear, fuse


def layer(bias: bool = True, dtype: torch.dtype = torch.float64, **options) -> nn.Module:
    torch.manual_seed(0)
    net = nn.Sequential(nn.Linear(6, 5, bias=bias))
    given = {"r": 3, "lora_alpha": 5, "target_modules": ["0"], "init_lora_weights": False} | options
    return inject_adapter_in_model(LoraConfig(**given), net).to(dtype)


def passed(net: nn.Module, x: torch.Tensor) -> list[torch.Tensor | None]:
    """The output, and the gradients of the input and of everything that is trained."""
    x = x.detach().clone().requires_grad_(x.requires_grad)
    torch.manual_seed(1)  # of dropout
    y = net(x)
    y.square().sum().backward()
    return [y.detach(), x.grad, *(p.grad for p in net.parameters() if p.requires_grad)]


@pytest.fixture
def calls(monkeypatch) -> list:
    """The calls that were not left to peft."""
    made = []
    apply = fused_lora._Update.apply
    monkeypatch.setattr(fused_lora._Update, "apply", lambda *args: (made.append(args), apply(*args))[1])
    return made


def pair(net: nn.Module) -> tuple[nn.Module, nn.Module]:
    fused = copy.deepcopy(net)
    fuse(fused)
    assert type(fused[0]) is FusedLinear and type(net[0]) is Linear
    return net, fused


@pytest.mark.parametrize("shape", [(6,), (4, 6), (2, 4, 6), (2, 3, 4, 6), (0, 6)])
@pytest.mark.parametrize("wanted", [True, False])
@pytest.mark.parametrize("bias", [True, False])
def test_it_is_the_same_layer(shape, wanted, bias, calls):
    net, fused = pair(layer(bias))
    x = torch.randn(shape, dtype=torch.float64).requires_grad_(wanted)
    for expected, got in zip(passed(net, x), passed(fused, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1
    assert all(p.grad.is_contiguous() for p in fused.parameters() if p.requires_grad), "as optimizers want them"


def test_what_it_gives_may_be_changed_in_place(calls):
    net, fused = (nn.Sequential(one[0], nn.ReLU(inplace=True)) for one in pair(layer()))
    x = torch.randn(2, 4, 6, dtype=torch.float64, requires_grad=True)
    for expected, got in zip(passed(net, x), passed(fused, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


def test_its_gradients_are_those_of_its_values():
    fused = pair(layer())[1][0]
    factors = [p for p in fused.parameters() if p.requires_grad]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert len(factors) == 2 and torch.autograd.gradcheck(lambda *_: fused(x), (x, *factors))


def test_its_second_derivatives_are_those_of_its_gradients():
    fused = pair(layer())[1][0]
    factors = [p for p in fused.parameters() if p.requires_grad]
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    assert len(factors) == 2 and torch.autograd.gradgradcheck(lambda *_: fused(x), (x, *factors))


def test_a_step_of_it_is_as_sharp_as_one_of_pefts_layer(calls):
    """Of two layers one after the other, so that sharpness also passes through a layer."""
    x, found = torch.randn(4, 6, dtype=torch.float64), []
    options = {"target_modules": ["0", "2"], "r": 3, "lora_alpha": 5, "init_lora_weights": False}
    net = inject_adapter_in_model(LoraConfig(**options), nn.Sequential(nn.Linear(6, 6), nn.Tanh(), nn.Linear(6, 2)))
    for one in pair(net.double()):
        optimizer = SGD([p for p in one.parameters() if p.requires_grad], lr=0.1)
        one(x).square().sum().backward()
        found.append(measure_step(optimizer, lambda one=one: one(x).square().sum()))
    assert found[1] == pytest.approx(found[0], rel=1e-9) and found[0].sharpness > 1
    assert len(calls) == 4


@pytest.mark.parametrize("frozen", ["lora_A", "lora_B"])
def test_a_frozen_factor_gets_no_gradient(frozen, calls):
    net, fused = pair(layer())
    for one in (net, fused):
        getattr(one[0], frozen)["default"].requires_grad_(False)
    x = torch.randn(4, 6, dtype=torch.float64)
    for expected, got in zip(passed(net, x), passed(fused, x), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-12, atol=1e-12)
    assert len(calls) == 1 and getattr(fused[0], frozen)["default"].weight.grad is None


def disabled(net):
    net[0].enable_adapters(False)


def merged(net):
    net[0].merge()


def second(net):
    torch.manual_seed(2)
    net[0].update_layer("other", 2, 2, LoraConfig(r=2, init_lora_weights=False))
    net[0].set_adapter(["default", "other"])
    net.double()


def trained_base(net):
    net[0].base_layer.requires_grad_(True)


def hooked(net):
    net[0].base_layer.register_forward_hook(lambda module, given, made: 2 * made)


def offloaded(net):
    forward = net[0].base_layer.forward
    net[0].base_layer.forward = lambda x: 3 * forward(x)


@pytest.mark.parametrize(
    ("options", "change"),
    [
        ({"lora_dropout": 0.5}, None),
        ({"use_dora": True}, None),
        ({"lora_bias": True}, None),
        *(({}, change) for change in (disabled, merged, second, trained_base, hooked, offloaded)),
    ],
)
def test_what_it_does_not_know_is_left_to_peft(options, change, calls):
    net, fused = pair(layer(**options))
    for one in (net, fused):
        if change:
            change(one)
    x = torch.randn(4, 6, dtype=torch.float64, requires_grad=True)
    for expected, got in zip(passed(net, x), passed(fused, x), strict=True):
        assert (expected is None and got is None) or torch.equal(expected, got)
    assert not calls


def test_dropout_rests_where_nothing_is_trained(calls):
    net, fused = pair(layer(lora_dropout=0.5))
    x = torch.randn(4, 6, dtype=torch.float64)
    torch.testing.assert_close(fused.eval()(x), net.eval()(x), rtol=1e-12, atol=1e-12)
    assert len(calls) == 1


def test_autocast_is_left_to_peft(calls):
    net, fused = pair(layer(dtype=torch.float32))
    with torch.autocast("cpu", torch.bfloat16):
        x = torch.randn(4, 6)
        assert torch.equal(fused(x), net(x)) and fused(x).dtype == torch.bfloat16
    assert not calls


def test_bfloat16_bases_are_left_to_peft(calls):
    net, fused = pair(layer(dtype=torch.float32))
    for one in (net, fused):
        one[0].base_layer.to(torch.bfloat16)
    x = torch.randn(4, 6, dtype=torch.bfloat16)
    assert torch.equal(fused(x), net(x)) and not calls
