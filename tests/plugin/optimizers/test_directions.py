"""GC and DS of a step against their formulas, and the rates and distances of the papers' theorems."""

import doctest
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn
from torch.optim import SGD, AdamW

from equipoise import AdaSAM, AlphaAdam
from equipoise.errors import InputError
from equipoise.optimizers import directions, schedules
from equipoise.optimizers.directions import measure_step
from equipoise.optimizers.schedules import inverse_sqrt, linear_speedup

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "directions.json").read_text())


def test_the_examples():
    for module in (directions, schedules):
        assert doctest.testmod(module).failed == 0 and doctest.testmod(module).attempted > 2


@pytest.mark.parametrize("case", GOLDEN, ids=lambda case: case["mask"])
def test_the_golden_quadratic(case):
    """½θᵀHθ + bᵀθ: GC and DS of each step by eq. 2 and 3, from an independent twin."""
    weight = nn.Parameter(torch.tensor(case["start"], dtype=torch.float64))
    hessian, slope = (torch.tensor(case[name], dtype=torch.float64) for name in ("hessian", "slope"))
    optimizer = AlphaAdam([weight], lr=case["lr"], weight_decay=0.0, mask=case["mask"], compensation="norm")

    def loss():
        return weight @ hessian @ weight / 2 + slope @ weight

    for step in case["steps"]:
        optimizer.zero_grad()
        began = loss()
        began.backward()
        found = measure_step(optimizer, loss)
        assert torch.allclose(weight.detach(), torch.tensor(step["theta"], dtype=torch.float64), rtol=0, atol=1e-10)
        assert found.correlation == pytest.approx(step["gc"], abs=1e-10)
        assert found.sharpness == pytest.approx(step["ds"], abs=1e-10)
        assert found.gain == pytest.approx((began - loss()).item(), abs=1e-10), "eq. 1 is exact on a quadratic"


def test_a_step_that_is_measured_is_the_same_to_the_bit_and_leaves_the_gradients():
    def trained(measure: bool) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        torch.manual_seed(0)
        block = nn.TransformerEncoderLayer(8, 2, 16, 0.0, batch_first=True)
        x, optimizer = torch.randn(3, 5, 8), AdamW(block.parameters(), lr=1e-2)
        for _ in range(2):
            optimizer.zero_grad()
            block(x).square().mean().backward()
            if measure:
                found = measure_step(optimizer, lambda: block(x).square().mean())
                assert found.correlation > 0 and math.isfinite(found.sharpness)
            else:
                optimizer.step()
        return [p.detach() for p in block.parameters()], [p.grad for p in block.parameters() if p.grad is not None]

    for plain, measured in zip(trained(False), trained(True), strict=True):
        assert all(map(torch.equal, plain, measured))


def test_an_optimizer_that_evaluates_twice_is_measured_too():
    weight = nn.Parameter(torch.tensor([3.0, -4.0], dtype=torch.float64))
    optimizer = AdaSAM([weight], lr=1e-3, rho=0.1)

    def closure():
        optimizer.zero_grad()
        loss = weight.square().sum()
        loss.backward()
        return loss

    found = measure_step(optimizer, lambda: weight.square().sum(), closure)
    assert found.gain == pytest.approx(25 - weight.square().sum().item(), abs=1e-12)


def test_a_loss_of_nothing_that_moved_is_refused_and_the_step_stays_taken():
    weight, other = nn.Parameter(torch.ones(2)), nn.Parameter(torch.ones(2))
    weight.square().sum().backward()
    with pytest.raises(InputError, match="depends on no parameter that the step moved"):
        measure_step(SGD([weight], lr=0.1), lambda: other.sum())
    assert weight.tolist() == pytest.approx([0.8, 0.8])
    linear = nn.Parameter(torch.ones(2))
    linear.grad = torch.ones(2)
    assert measure_step(SGD([linear], lr=1.0), lambda: linear.sum()) == (2.0, 0.0)


class OnceDifferentiable(torch.autograd.Function):
    """A square, whose second derivative autograd loses without an error."""

    @staticmethod
    def forward(ctx, x):
        ctx.save_for_backward(x)
        return x.square()

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx, *grads):
        return 2 * ctx.saved_tensors[0] * grads[0]


@pytest.mark.parametrize("outer", [torch.sum, lambda y: y.exp().sum()], ids=["linear above", "curved above"])
def test_a_function_that_is_differentiated_once_is_refused_by_name(outer):
    weight = nn.Parameter(torch.ones(2))
    weight.grad = torch.ones(2)
    with pytest.raises(InputError, match="goes through OnceDifferentiable, which is differentiated only once"):
        measure_step(SGD([weight], lr=0.1), lambda: outer(OnceDifferentiable.apply(weight)))
    assert weight.tolist() == pytest.approx([0.9, 0.9]), "the step stays taken"


def test_the_rate_falls_with_the_root_of_the_step_after_its_warm_up():
    assert [inverse_sqrt(step) for step in (0, 3, 99)] == [1.0, 0.5, 0.1]
    assert [inverse_sqrt(step, 4) for step in (0, 2, 4, 7)] == [0.0, 0.5, 1.0, 0.5]


def test_adasams_corollary_in_rate_and_distance():
    one = linear_speedup(1, 1, lr=0.3, rho=0.2)
    assert one == {"lr": 0.3, "rho": 0.2}
    for batch, steps in ((4, 100), (32, 300)):
        found = linear_speedup(batch, steps, lr=0.3, rho=0.2)
        assert found["lr"] == pytest.approx(0.3 * math.sqrt(batch / steps))
        assert found["rho"] == pytest.approx(0.2 / math.sqrt(batch * steps))
    with pytest.raises(InputError, match="tuned_steps must be 1 or more; got 0"):
        linear_speedup(4, 100, lr=0.3, rho=0.2, tuned_steps=0)
