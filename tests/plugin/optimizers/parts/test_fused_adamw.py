"""FusedAdamW against torch's AdamW, whose numbers it must have to the bit."""

import copy
from itertools import product

import pytest
import torch
from torch import nn
from torch.optim import AdamW
from torch.testing import assert_close

from equipoise.optimizers.parts.fused_adamw import FusedAdamW

SHAPES = ((4, 320), (640, 4), (7,), ())


def twins(dtypes=(torch.float32,), **options):
    """torch's AdamW and ours over equal tensors in two groups of different options."""
    made = []
    for kind in (AdamW, FusedAdamW):
        torch.manual_seed(0)
        params = [nn.Parameter(torch.randn(shape).to(dtype)) for shape, dtype in product(SHAPES, dtypes)]
        groups = [{"params": params[:3]}, {"params": params[3:], "lr": 3e-3, "weight_decay": 0.3, "betas": (0.8, 0.95)}]
        made.append((kind(groups, **{"lr": 1e-2, "fused": True, **options}), params))
    return made


def step(sides, count=3, seed=1, left_out=()):
    for optimizer, params in sides:
        torch.manual_seed(seed)
        for _ in range(count):
            for index, param in enumerate(params):
                param.grad = torch.randn_like(param) if index not in left_out else None
            optimizer.step()


def assert_twins(sides):
    (theirs, expected), (ours, params) = sides
    assert_close(params, expected, rtol=0, atol=0)
    assert_close(ours.state_dict(), theirs.state_dict(), rtol=0, atol=0)


@pytest.mark.parametrize(
    "options",
    [{}, {"maximize": True}, {"amsgrad": True}, {"fused": False}, {"fused": None, "foreach": True}, {"eps": 0.1}],
    ids=str,
)
def test_steps_equal_those_of_torch(options):
    step(sides := twins(**options))
    assert_twins(sides)


@pytest.mark.parametrize("dtypes", [(torch.bfloat16,), (torch.float64,), (torch.float32, torch.bfloat16)], ids=str)
def test_equal_to_torch_in_other_dtypes(dtypes):
    step(sides := twins(dtypes))
    assert_twins(sides)


def test_equal_when_gradients_come_and_go():
    sides = twins()
    step(sides, left_out=(1,))
    step(sides, seed=2)  # its state is made now; its count is behind the others'
    step(sides, seed=3, left_out=(0, 1, 2))  # a whole group without
    assert_twins(sides)


def test_equal_through_each_others_state():
    sides = twins()
    step(sides)
    (theirs, _), (ours, _) = sides
    saved = copy.deepcopy(theirs.state_dict())
    theirs.load_state_dict(ours.state_dict())
    ours.load_state_dict(saved)
    step(sides, seed=2)
    assert_twins(sides)


def test_equal_under_a_gradient_scaler():
    """It divides by its scale inside the fused kernel, and an infinite gradient leaves parameters and counts alone."""
    sides = twins()
    step(sides)
    for optimizer, params in sides:
        scaler = torch.amp.GradScaler("cpu", init_scale=8.0)
        for factor in (1.0, float("inf"), 2.0):
            optimizer.zero_grad()
            scaler.scale(sum((param * factor).sum() for param in params)).backward()
            scaler.step(optimizer)
            scaler.update()
    assert_twins(sides)


def test_left_open_it_fuses_what_the_kernel_takes():
    whole, strided = nn.Parameter(torch.randn(4, 3)), nn.Parameter(torch.randn(3, 4).t())
    for params, options, expected in (
        ([whole], {}, True),
        ([{"params": iter([whole])}], {}, True),
        ([whole, strided], {}, None),
        ([whole], {"foreach": True}, None),
        ([whole], {"differentiable": True}, None),
        ([{"params": [whole], "foreach": True}], {}, None),
        ([whole], {"fused": False}, False),
    ):
        assert FusedAdamW(params, **options).param_groups[0]["fused"] is expected


def test_gradients_of_other_strides_are_laid_out_anew():
    (theirs, expected), (ours, params) = twins(fused=False)[0], twins(fused=None)[1]
    for optimizer, own in ((theirs, expected), (ours, params)):
        torch.manual_seed(1)
        for _ in range(3):
            for param in own:
                param.grad = torch.randn_like(param)
            own[0].grad = torch.randn(320, 4).t()
            optimizer.step()
    assert ours.param_groups[0]["fused"]
    assert_close(params, expected)


def test_the_fused_path_is_taken(monkeypatch):
    """Else all of the above would compare torch with torch."""
    (ours, params) = twins()[1]
    step([(ours, params)])
    monkeypatch.setattr(AdamW, "_init_group", lambda *args: pytest.fail("torch's step was asked"))
    step([(ours, params)])
