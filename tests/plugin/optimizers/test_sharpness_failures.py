"""What the SAM that goes round in the community gets wrong: each a test that it fails and ours passes."""

import copy

import pytest
import torch
from torch import Tensor, nn
from torch.optim import AdamW, Optimizer

from equipoise import SharpnessAware


class CommonSAM(Optimizer):
    """As it is found in many repositories: a wrapper that holds its base, and goes back by subtracting."""

    def __init__(self, params, base, rho=0.05, **options):
        super().__init__(params, {"rho": rho, **options})
        self.base = base(self.param_groups, **options)
        self.param_groups = self.base.param_groups
        self.ways: list[tuple[Tensor, Tensor]] = []

    @torch.no_grad()
    def perturb(self) -> bool:
        params = [p for group in self.param_groups for p in group["params"] if p.grad is not None]
        norm = torch.stack([p.grad.norm() for p in params]).norm()
        self.ways = [(p, p.grad * (self.param_groups[0]["rho"] / (norm + 1e-12))) for p in params]
        for p, way in self.ways:
            p.add_(way)
        self.zero_grad()
        return True

    @torch.no_grad()
    def restore(self) -> None:
        for p, way in self.ways:
            p.sub_(way)

    @torch.no_grad()
    def step(self, closure=None):
        assert closure is not None, "it wants a closure, and the gradients of a first evaluation"
        self.perturb()
        with torch.enable_grad():
            loss = closure()
        self.restore()
        self.base.step()
        return loss


def common(params, **options) -> CommonSAM:
    return CommonSAM(params, AdamW, **options)


@pytest.fixture(params=[SharpnessAware(AdamW), pytest.param(common, marks=pytest.mark.xfail(strict=True))])
def make(request):
    return request.param


def net() -> nn.Sequential:
    torch.manual_seed(0)
    return nn.Sequential(nn.Linear(6, 5), nn.Tanh(), nn.Linear(5, 4))


def loss_of(model: nn.Module, index: int) -> Tensor:
    return model(torch.randn(7, 6, generator=torch.Generator().manual_seed(index))).square().mean()


def flat(model: nn.Module) -> Tensor:
    return torch.cat([param.detach().flatten() for param in model.parameters()])


def by_hand(model, optimizer, steps) -> None:
    for index in steps:
        optimizer.zero_grad()
        loss_of(model, index).backward()
        if optimizer.perturb():
            loss_of(model, index).backward()
            optimizer.restore()
        if isinstance(optimizer, CommonSAM):
            optimizer.base.step()
        else:
            optimizer.step()


def test_the_state_holds_the_moments_of_the_base(make):
    model = net()
    optimizer = make(model.parameters(), lr=1e-2)
    by_hand(model, optimizer, range(3))
    other = copy.deepcopy(model)
    resumed = make(other.parameters(), lr=1e-2)
    resumed.load_state_dict(copy.deepcopy(optimizer.state_dict()))
    by_hand(model, optimizer, range(3, 23))
    by_hand(other, resumed, range(3, 23))
    assert torch.equal(flat(model), flat(other))


def test_step_evaluates_the_closure_as_torchs_optimizers_do(make):
    """It needs no evaluation before it, and returns the loss at the point where the step begins."""
    model = net()
    optimizer = make(model.parameters(), lr=1e-2, rho=0.5)
    expected = loss_of(model, 0).item()

    def closure():
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    assert optimizer.step(closure).item() == expected


def test_a_gradient_scaler_takes_the_step(make):
    model, plain = net(), net()
    by_hand(plain, make(plain.parameters(), lr=1e-2), range(3))
    optimizer, scaler = make(model.parameters(), lr=1e-2), torch.amp.GradScaler("cpu", init_scale=2.0**10)
    for index in range(3):
        optimizer.zero_grad()
        scaler.scale(loss_of(model, index)).backward()
        if optimizer.perturb():
            scaler.scale(loss_of(model, index)).backward()
            optimizer.restore()
        scaler.step(optimizer)
        scaler.update()
    torch.testing.assert_close(flat(model), flat(plain), rtol=0, atol=1e-6)


def test_weights_come_back_to_the_bit_at_rate_0(make):
    model = net()
    before = flat(model)
    by_hand(model, make(model.parameters(), lr=0.0, rho=0.3), range(20))
    assert torch.equal(flat(model), before)


def test_weights_come_back_when_the_second_evaluation_raises(make):
    model = net()
    optimizer = make(model.parameters(), lr=1e-2)
    before, calls = flat(model), []
    loss_of(model, 0).backward()

    def closure():
        calls.append(torch.equal(flat(model), before))
        if calls[-1] is False:
            raise RuntimeError("out of memory")
        optimizer.zero_grad()
        loss = loss_of(model, 0)
        loss.backward()
        return loss

    with pytest.raises(RuntimeError):
        optimizer.step(closure)
    assert torch.equal(flat(model), before)


def test_a_closure_of_several_micro_batches_is_one_of_all(make):
    models = net(), net()
    for model, parts in zip(models, (1, 3), strict=True):
        optimizer = make(model.parameters(), lr=1e-2, rho=0.3)
        inputs = torch.randn(6, 6, generator=torch.Generator().manual_seed(9))

        def closure(model=model, optimizer=optimizer, parts=parts, inputs=inputs):
            optimizer.zero_grad()
            losses = [model(part).square().mean() / parts for part in inputs.chunk(parts)]
            for loss in losses:
                loss.backward()
            return sum(losses)

        optimizer.step(closure)
    torch.testing.assert_close(flat(models[0]), flat(models[1]), rtol=0, atol=1e-6)


def test_schedulers_of_torch_drive_it(make):
    """Where the loop calls backward itself, they must see its steps: else they warn, which here is an error."""
    model = net()
    optimizer = make(model.parameters(), lr=1e-2)
    scheduler = torch.optim.lr_scheduler.LambdaLR(optimizer, lambda step: 0.5**step)
    for index in range(2):
        by_hand(model, optimizer, range(index, index + 1))
        scheduler.step()
    assert optimizer.param_groups[0]["lr"] == 2.5e-3


def test_a_zero_gradient_perturbs_nothing(make):
    """Also where 1e-12 is 0."""
    weight = nn.Parameter(torch.ones(3, dtype=torch.float16))
    optimizer = make([weight], lr=1e-2)
    weight.grad = torch.zeros_like(weight)
    optimizer.perturb()
    assert torch.equal(weight, torch.ones_like(weight))
