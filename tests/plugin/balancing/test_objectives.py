"""Every objective on a small late-fusion model in float64: its gradients by its definition, and what it refuses."""

import json
import math
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor, nn
from torch.nn import functional as F

from equipoise import registry
from equipoise.balancing.agm import AGM
from equipoise.balancing.equal_weight import EqualWeight
from equipoise.balancing.joint import Joint
from equipoise.balancing.mgda import MGDA
from equipoise.balancing.mimo import MIMO, PRESETS
from equipoise.balancing.min_norm import min_norm
from equipoise.balancing.mmpareto import MMPareto
from equipoise.balancing.mses import MSES
from equipoise.balancing.mslr import MSLR
from equipoise.balancing.objective import Losses, Objective, Reached, differentiate
from equipoise.balancing.ogm_ge import OGMGE
from equipoise.balancing.unimodal import Unimodal
from equipoise.errors import InputError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "mimo.json").read_text())
OPTIONS = {  # objectives that need some
    "mslr": {"factors": {"m0": 0.5}},
    "gradient_blending": {"weights": {"joint": 0.5, "m0": 0.3, "m1": 0.2}},
}
ALTERNATE = ("mla", "recon_boost")  # one encoder in each step


class Net(nn.Module):
    """Two or three encoders with a convolution and a linear layer each, a sum-fusion head and unimodal heads."""

    def __init__(self, count: int = 2):
        super().__init__()
        self.names = [f"m{index}" for index in range(count)]
        self.encoders = nn.ModuleDict(
            {n: nn.Sequential(nn.Conv2d(1, 2, 3), nn.Tanh(), nn.Flatten(), nn.Linear(8, 5)) for n in self.names}
        )
        self.joint = nn.ModuleDict({n: nn.Linear(5, 3) for n in self.names})
        self.heads = nn.ModuleDict({n: nn.Linear(5, 3) for n in self.names})
        self.double()

    def forward(self, batch: dict[str, Tensor], labels: Tensor, live: bool = True, parts: bool = False) -> Losses:
        features = {n: self.encoders[n](batch[n]) for n in self.names}
        logits = sum(self.joint[n](features[n]) for n in self.names)
        heads = {n: self.heads[n](h if live else h.detach()) for n, h in features.items()}
        unimodal = {n: F.cross_entropy(out, labels) for n, out in heads.items()}
        responses = {n: self.joint[n](h) if parts else self.joint[n](h).detach() for n, h in features.items()}
        return Losses(F.cross_entropy(logits, labels), unimodal, labels, responses, features)

    def own(self) -> dict[str, list[nn.Parameter]]:
        return {n: list(self.encoders[n].parameters()) for n in self.names}


@pytest.fixture
def task() -> Callable[..., tuple[Net, dict[str, Tensor], Tensor]]:
    def make(count: int = 2):
        torch.manual_seed(0)
        net, labels = Net(count), torch.arange(6) % 3
        batch = {n: torch.randn(6, 1, 4, 4).double() * (index + 1) for index, n in enumerate(net.names)}
        return net, batch, labels

    return make


def grads(net: Net, part: str = "") -> dict[str, Tensor]:
    return {n: p.grad.clone() for n, p in net.named_parameters() if n.startswith(part) and p.grad is not None}


def gradient_of(net: Net, loss: Tensor) -> dict[str, Tensor]:
    named = dict(net.named_parameters())
    found = torch.autograd.grad(loss, list(named.values()), retain_graph=True, allow_unused=True)
    return {n: torch.zeros_like(p) if g is None else g for (n, p), g in zip(named.items(), found, strict=True)}


def flat(found: dict[str, Tensor], encoder: str) -> Tensor:
    return torch.cat([g.flatten() for n, g in found.items() if n.startswith(f"encoders.{encoder}.")])


def close(one: dict[str, Tensor], other: dict[str, Tensor]) -> bool:
    zero = torch.zeros((), dtype=torch.float64)
    return all(torch.allclose(one.get(n, zero), other.get(n, zero), rtol=1e-10, atol=1e-13) for n in {*one, *other})


@pytest.mark.parametrize("name", [e.name for e in registry.entries("objectives") if e.distribution == "equipoise"])
def test_every_objective_gives_each_parameter_a_finite_gradient_and_sums_over_forward_passes(name, task):
    net, batch, labels = task()
    for passes in (1, 2):
        torch.manual_seed(1)
        objective = registry.load("objectives", name)(**OPTIONS.get(name, {}))
        objective.bind(net.own())
        objective.steps_per_epoch, objective.joint_head = 10.0, list(net.joint["m0"].parameters())
        net.zero_grad()
        if objective.wants_features():
            made = {n: net.encoders[n](batch[n]).detach() for n in net.names}, labels
            objective.take_features(*made, *made)
        for _ in range(passes):
            logged = objective.backward(net(batch, labels, objective.uses_unimodal, objective.needs_head != "any"))
        assert logged["loss"].isfinite() and not logged["loss"].requires_grad
        found = grads(net, "encoders")
        assert len(found) == (4 if name in ALTERNATE else 8) and all(
            g.isfinite().all() and g.any() for g in found.values()
        )
        if passes == 1:
            once = found
    assert close({n: 2 * g for n, g in once.items()}, found), "the same pass twice doubles the gradient"
    assert all(float(value) == float(value) for value in objective.before_step().values())


@pytest.mark.parametrize(
    ("name", "missing"),
    [
        ("ogm_ge", "what each modality alone predicts"),
        ("agm", "what each modality alone predicts"),
        ("info_reg", "what each modality alone predicts"),
        ("recon_boost", "what each modality alone predicts"),
        ("lfm", "what each modality alone predicts"),
        ("mla", "what each modality alone predicts and the encoders' features"),
        ("pmr", "the encoders' features"),
    ],
)
def test_what_a_training_loop_does_not_give_is_named(name, missing, task):
    net, batch, labels = task()
    objective = registry.load("objectives", name)()
    objective.bind(net.own())
    objective.steps_per_epoch = 1.0
    given = net(batch, labels)
    with pytest.raises(InputError, match=f"^{type(objective).__name__} needs {missing}, which this training does not"):
        objective.backward(Losses(given.joint, given.unimodal, labels))
    with pytest.raises(InputError, match="needs the examples' classes"):
        objective.backward(Losses(given.joint, given.unimodal))
    assert not grads(net), "before anything was differentiated"


def test_all_objectives_are_covered():
    names = {e.name for e in registry.entries("objectives") if e.distribution == "equipoise"}
    assert names >= {"joint", "equal_weight", "mimo", "mses", "mslr", "ogm_ge", "agm", "mgda", "mmpareto", "unimodal"}
    assert names >= {"opm", "relearning", "gradient_blending", "pmr", "info_reg", "recon_boost", "mla", "lfm"}


@pytest.mark.parametrize("index", range(6))
def test_mimo_meets_the_golden_values(index):
    joint = torch.tensor(GOLDEN["joint"][index], dtype=torch.float64)
    unimodal = torch.tensor(GOLDEN["unimodal"][index], dtype=torch.float64, requires_grad=True)
    objective = MIMO(lam=GOLDEN["lam"], mu=GOLDEN["mu"])
    losses = Losses(joint, dict(zip("abc", unimodal.unbind(), strict=True)))
    logged = objective.backward(losses)
    assert abs(float(logged["loss"]) - GOLDEN["objective"][index]) < 1e-10
    weights = torch.tensor(GOLDEN["weights"][index], dtype=torch.float64)
    assert torch.allclose(unimodal.grad, weights, rtol=0, atol=1e-10)
    assert [float(logged[f"weight_{name}"]) for name in "abc"] == pytest.approx(weights.tolist(), abs=1e-10)


def test_mimo_has_the_gradient_that_finite_differences_have(task):
    net, batch, labels = task(3)
    objective = MIMO(lam=2.0, mu=0.5, f_star={"m1": 0.3})
    objective.bind(net.own())
    objective.backward(net(batch, labels))
    for name in ("encoders.m0.0.weight", "encoders.m2.3.weight", "joint.m1.weight", "heads.m1.bias"):
        weight = net.get_parameter(name)
        with torch.no_grad():
            values = []
            for shift in (1e-5, -2e-5):
                weight.view(-1)[0] += shift
                values.append(objective.combine(net(batch, labels)).item())
            weight.view(-1)[0] += 1e-5
        # central difference: error of order 1e-10, and rounding of 1e-16 / 1e-5
        assert weight.grad.view(-1)[0].item() == pytest.approx((values[0] - values[1]) / 2e-5, abs=1e-8)


def test_mimos_limits(task):
    net, batch, labels = task()
    losses = net(batch, labels)
    worst = max(losses.unimodal.values())
    assert torch.allclose(MIMO(1.0, 1e-9).combine(losses), losses.joint + worst), "a small μ is the maximum"
    assert torch.equal(MIMO(0.0, 0.1).combine(losses), losses.joint), "λ = 0 is the joint loss"
    mean = sum(losses.unimodal.values()) / 2
    large = MIMO(1.0, 1e6).combine(losses) - losses.joint - 1e6 * math.log(2)
    assert large.item() == pytest.approx(mean.item(), abs=1e-8), "a large μ is the mean, and a constant"
    shifted = MIMO(1.0, 1e-9, f_star={"m0": 100.0}).combine(losses)
    assert torch.allclose(shifted, losses.joint + losses.unimodal["m1"]), "what counts is the gap to f*"
    assert (MIMO().lam, MIMO().mu) == PRESETS["av_mnist"] == (10, 0.1)
    assert (MIMO(preset="ur_funny").lam, MIMO(mu=0.5, preset="ave").mu) == (10, 0.5)


def test_mimo_is_one_backward_pass(task):
    net, batch, labels = task()
    count, passed = [], []
    net.encoders["m0"][1].register_full_backward_hook(lambda *_: passed.append(1))
    objective = MIMO()
    objective.bind(net.own())

    def backward(total, *, retain_graph=False):
        count.append(1)
        total.backward(retain_graph=retain_graph)

    objective.backward(net(batch, labels), backward)
    assert len(count) == len(passed) == 1
    pareto = MMPareto()
    pareto.bind(net.own())
    pareto.backward(net(batch, labels), backward)
    assert len(count) == len(passed) == 3, "and this counts"


def test_mimo_survives_losses_whose_exponential_does_not_fit():
    unimodal = torch.tensor([2.0, 1.0], requires_grad=True)
    for overflow, mu in (("logsumexp", 0.001), ("doubling", 0.032)):  # 2/0.016 is beyond log(max float32 / 2), 88.03
        unimodal.grad = None
        objective = MIMO(1.0, 0.001, overflow=overflow)
        logged = objective.backward(Losses(torch.tensor(0.0), dict(zip("ab", unimodal.unbind(), strict=True))))
        assert torch.isfinite(logged["loss"]) and unimodal.grad.sum().item() == pytest.approx(1)
        assert float(logged["loss"]) == pytest.approx(2.0, abs=mu * math.log(2) + 1e-5)
        if overflow == "doubling":
            assert float(logged["mu"]) == pytest.approx(mu)
    small = Losses(torch.tensor(0.0), {"a": torch.tensor(0.02), "b": torch.tensor(0.01)})
    again = MIMO(1.0, 0.001, overflow="doubling").combine(small)
    assert again == pytest.approx(MIMO(1.0, 0.001).combine(small).item()), "where it fits, μ is the nominal one"
    below = MIMO(1.0, 0.001, f_star={"a": 1.0, "b": 1.0}, overflow="doubling").combine(small)
    assert float(below) == pytest.approx(-0.98, abs=0.016 * math.log(2)), "nor do losses far below f* vanish"


@pytest.mark.parametrize("count", [2, 3, 4])
def test_min_norm_is_the_shortest_point_of_the_hull(count):
    rng = np.random.default_rng(count)
    for _ in range(20):
        vectors = torch.tensor(rng.normal(size=(count, 5)) + rng.normal(size=5))
        weights = min_norm(vectors @ vectors.T)
        assert weights.sum().item() == pytest.approx(1) and (weights >= 0).all()
        point = weights @ vectors
        # optimal if and only if no vertex lies on the near side of the plane through the point (the KKT conditions)
        assert ((vectors @ point) >= point @ point - 1e-9).all()


@pytest.mark.parametrize("count", [2, 3])
def test_min_norm_of_several_at_once(count):
    vectors = torch.tensor(np.random.default_rng(0).normal(size=(2, 3, count, 5)))
    products = vectors @ vectors.mT
    assert min_norm(products).shape == (2, 3, count)
    for one, many in zip(products.flatten(0, 1), min_norm(products).flatten(0, 1), strict=True):
        assert torch.equal(min_norm(one), many)


def test_min_norm_in_special_cases():
    same = torch.ones(2, 2, dtype=torch.float64)
    assert min_norm(same).tolist() == [0.5, 0.5]
    assert min_norm(torch.zeros(3, 3)).sum().item() == pytest.approx(1)
    assert torch.allclose(min_norm(torch.ones(3, 3)).sum(), torch.tensor(1.0))
    opposite = torch.tensor([[4.0, -2.0], [-2.0, 1.0]])
    assert torch.allclose(min_norm(opposite), torch.tensor([1 / 3, 2 / 3]))
    inside = torch.tensor([[1.0, 2.0], [2.0, 9.0]])  # the first is the shortest of all
    assert min_norm(inside).tolist() == [1, 0]
    with pytest.raises(ValueError, match="at most 8"):
        min_norm(torch.eye(9))


@pytest.mark.parametrize("count", [2, 3])
def test_objectives_of_one_pass_have_the_gradient_of_their_sum(count, task):
    net, batch, labels = task(count)
    losses = net(batch, labels)
    alone = losses.unimodal["m1"]
    total = losses.joint + sum(losses.unimodal.values())
    made = [
        (Joint(), losses.joint),
        (EqualWeight(), total),
        (Unimodal(), total - losses.joint),
        (Unimodal("m1"), alone),
        (MSES(), losses.joint),
        (MSLR({"m0": 0.5}), losses.joint),  # their rates differ, not their gradients
        (AGM(), losses.joint),  # modulated when the step's gradients are complete
    ]
    made += [(OGMGE(), losses.joint)] if count == 2 else []
    for objective, expected in made:
        net.zero_grad()
        objective.bind(net.own())
        objective.backward(net(batch, labels))
        assert close(grads(net), gradient_of(net, expected)), type(objective).__name__
    assert not Unimodal().trains_joint and Joint().trains_joint


@pytest.mark.parametrize("count", [2, 3])
def test_mgda_by_its_definition(count, task):
    """Against the best of a fine grid of weights, which is within the grid's spacing of the least norm."""
    net, batch, labels = task(count)
    losses = net(batch, labels)
    joint, own = (gradient_of(net, loss) for loss in (losses.joint, sum(losses.unimodal.values())))
    objective = MGDA()
    objective.bind(net.own())
    logged = objective.backward(net(batch, labels))
    found = grads(net)
    for name in net.names:
        a, b = flat(joint, name), flat(own, name)
        shares = torch.linspace(0, 1, 2001).double()
        norms = torch.stack([(share * a + (1 - share) * b).norm() for share in shares])
        assert flat(found, name).norm() <= norms.min() + 1e-12
        share = float(logged[f"joint_weight_{name}"])
        assert torch.allclose(flat(found, name), share * a + (1 - share) * b, rtol=1e-9)
        assert share == pytest.approx(float(shares[norms.argmin()]), abs=1e-3)
    sums = {n: joint[n] + own[n] for n in joint if not n.startswith("encoders")}
    assert close({n: g for n, g in found.items() if not n.startswith("encoders")}, sums), "heads as usual"


def test_mgda_over_all_encoders_lowers_every_loss(task):
    net, batch, labels = task(3)
    losses = net(batch, labels)
    each = [losses.joint, *losses.unimodal.values()]
    rows = [torch.cat([flat(gradient_of(net, loss), name) for name in net.names]) for loss in each]
    objective = MGDA(scope="all")
    objective.bind(net.own())
    logged = objective.backward(net(batch, labels))
    direction = torch.cat([flat(grads(net), name) for name in net.names])
    stacked = torch.stack(rows)
    weights = min_norm(stacked @ stacked.T)
    assert torch.allclose(direction, sum(w * row for w, row in zip(weights, rows, strict=True)), rtol=1e-8, atol=1e-12)
    assert all(row @ direction >= direction @ direction - 1e-9 for row in rows)
    assert float(logged["joint_weight_m0"]) == pytest.approx(float(weights[0]))
    with pytest.raises(InputError, match=r"MGDA takes 1 to 7 modalities"):
        MGDA(scope="all").bind({str(index): [] for index in range(8)})


def conflicting(net: Net, batch: dict[str, Tensor], labels: Tensor) -> None:
    """Turns the unimodal head of m0 around, so that its gradient opposes the joint one."""
    with torch.no_grad():
        for part in ("weight", "bias"):
            getattr(net.heads["m0"], part).copy_(-3 * getattr(net.joint["m0"], part))
            getattr(net.heads["m1"], part).copy_(getattr(net.joint["m1"], part))
    losses = net(batch, labels)
    joint, own = (gradient_of(net, loss) for loss in (losses.joint, sum(losses.unimodal.values())))
    assert flat(joint, "m0") @ flat(own, "m0") < 0 < flat(joint, "m1") @ flat(own, "m1")


def test_mmpareto_by_its_definition(task):
    net, batch, labels = task()
    conflicting(net, batch, labels)
    losses = net(batch, labels)
    joint, own = (gradient_of(net, loss) for loss in (losses.joint, sum(losses.unimodal.values())))
    objective = MMPareto(gamma=1.25)
    objective.bind(net.own())
    logged = objective.backward(net(batch, labels))
    found = grads(net)
    assert torch.allclose(flat(found, "m1"), 1.25 * (flat(joint, "m1") + flat(own, "m1"))), (
        "no conflict: γ times the sum"
    )
    a, b = flat(joint, "m0"), flat(own, "m0")
    share = ((b - a) @ b / ((a - b) @ (a - b))).clamp(0, 1)
    point = share * a + (1 - share) * b
    assert torch.allclose(flat(found, "m0"), 1.25 * (a + b).norm() * point / point.norm(), rtol=1e-8)
    assert float(logged["joint_weight_m0"]) == pytest.approx(float(share)) and float(logged["joint_weight_m1"]) == 0.5
    assert flat(found, "m0") @ a >= 0 and flat(found, "m0") @ b >= 0, "lowers both"


@pytest.mark.parametrize("kind", [torch.float64, torch.bfloat16])
def test_two_gradients_of_any_size_kind_and_layout(kind):
    """Long and short tensors, a transposed one, one without a gradient of the joint loss and one without any."""
    torch.manual_seed(0)
    shapes = (300, 200), (7, 5), (), (4,), (3,)
    starts = [torch.randn(shape).to(kind) for shape in shapes]
    parameters = [nn.Parameter(start.T if start.ndim == 2 else start) for start in starts]
    objective = MGDA()
    objective.bind({"a": parameters})
    joint = sum((p.double() + 0.5).square().sum() for p in parameters[:3])
    own = sum((p.double() - 0.5).square().sum() for p in parameters[:4])
    logged = objective.backward(Losses(joint, {"a": own}))
    zero = torch.zeros(3, dtype=torch.float64)
    pairs = [(2 * p.double() + 1, 2 * p.double() - 1) for p in (p.detach() for p in parameters)]
    pairs[3:] = [(0 * pairs[3][0], pairs[3][1]), (zero, zero)]
    rows = torch.stack([torch.cat([pair[side].flatten() for pair in pairs]) for side in (0, 1)])
    share = min_norm(rows @ rows.T)[0]
    assert 0.1 < share < 1
    near = {"rtol": 1e-12, "atol": 1e-14} if kind == torch.float64 else {"rtol": 0.02, "atol": 0.01}  # 8 bits, twice
    assert float(logged["joint_weight_a"]) == pytest.approx(float(share), rel=near["rtol"])
    for parameter, (one, other) in zip(parameters, pairs, strict=True):
        assert parameter.grad is not None and parameter.grad.dtype == kind
        assert torch.allclose(parameter.grad.double(), share * one + (1 - share) * other, **near)


def test_ogm_ge_coefficients_by_hand():
    """Two examples; modality a gives the true class 3/4 and 1/2, modality b 1/4 and 1/4: ratio 2.5."""
    conv, line = nn.Parameter(torch.ones(2, 1, 3, 3)), nn.Parameter(torch.ones(4))
    other = nn.Parameter(torch.ones(2, 1, 3, 3))
    objective = OGMGE(alpha=0.5, noise=False)
    objective.bind({"a": [conv, line], "b": [other]})
    labels = torch.tensor([0, 1])
    responses = {
        "a": torch.tensor([[0.75, 0.25], [0.5, 0.5]]).log(),
        "b": torch.tensor([[0.25, 0.75], [0.75, 0.25]]).log(),
    }
    loss = conv.sum() + line.sum() + other.sum()
    objective.backward(Losses(loss, {}, labels, responses))
    logged = objective.before_step()
    expected = 1 - math.tanh(0.5 * 2.5)
    assert float(logged["coefficient_a"]) == pytest.approx(expected) and float(logged["coefficient_b"]) == 1
    assert conv.grad.unique().tolist() == pytest.approx([expected]), "the dominant one's convolutions"
    assert line.grad.unique().tolist() == other.grad.unique().tolist() == [1.0], "and nothing else"
    line.grad = None
    objective.bind({"a": [line], "b": [other]})  # an encoder of text
    objective.backward(Losses(line.sum(), {}, labels, responses))
    objective.before_step()
    assert line.grad.unique().tolist() == pytest.approx([expected]), "one without convolutions is slowed as a whole"


def test_ogm_ges_noise_is_as_wide_as_the_gradient():
    torch.manual_seed(0)
    weights = [nn.Parameter(torch.randn(16, 16, 5, 5)) for _ in "ab"]
    objective = OGMGE()
    objective.bind({"a": [weights[0]], "b": [weights[1]]})
    same = torch.zeros(2, 2)
    total = sum((0.5 * w.square()).sum() for w in weights)  # the gradient is the weight, of deviation 1
    objective.backward(Losses(total, {}, torch.tensor([0, 1]), {"a": same, "b": same}))
    objective.before_step()
    for weight in weights:  # equal scores: the coefficient is 1, and only noise was added
        noise = weight.grad - weight.detach()
        assert noise.std().item() == pytest.approx(1, rel=0.05) and noise.mean().abs().item() < 0.05


def test_agm_coefficients_by_hand():
    """Scores (1, 2), then (1, 3): the average before is (1, 2), so r̂ = (e, 1/e) and r = (e², 1/e²)."""
    parameters = [nn.Parameter(torch.ones(2)) for _ in "ab"]
    objective = AGM(alpha=0.25)
    objective.bind({"a": [parameters[0]], "b": [parameters[1]]})

    def step(*scores: float) -> list[float]:
        for parameter in parameters:
            parameter.grad = None
        labels = torch.tensor([0])
        made = [torch.tensor([[-score, math.log(1 - math.exp(-score))]]) for score in scores]
        total = sum(p.sum() for p in parameters)
        objective.backward(Losses(total, {}, labels, dict(zip("ab", made, strict=True))))
        logged = objective.before_step()
        found = [float(p.grad[0]) for p in parameters]
        assert found == pytest.approx([float(logged["coefficient_a"]), float(logged["coefficient_b"])])
        return found

    assert step(1, 2) == [1, 1]
    assert step(1, 3) == pytest.approx(
        [math.exp(0.25 * (math.e - math.e**2)), math.exp(0.25 * (1 / math.e - math.e**-2))], rel=1e-5
    )
    saved = objective.state_dict()
    assert saved["average"].tolist() == pytest.approx([1, 2.5]) and saved["steps"] == 2
    after = step(2, 1)
    again = AGM(alpha=0.25)
    again.bind(objective.encoders)
    again.load_state_dict(saved)
    objective = again
    assert step(2, 1) == after, "its memory is all in its state"
    expected = math.exp(0.25 * min(math.exp(1.5) - math.exp(-1), 10))
    assert after[0] == pytest.approx(expected, rel=1e-5)


def test_agm_is_capped():
    parameter = nn.Parameter(torch.ones(1))
    objective = AGM(alpha=1.0)
    objective.bind({"a": [parameter], "b": []})
    for scores in ((0.0, 15.0), (0.0, 0.0)):  # r̂ − r = e¹⁵ − 1
        parameter.grad = None
        made = {
            n: torch.tensor([[0.0, math.log(math.expm1(s)) if s else -50.0]]) for n, s in zip("ab", scores, strict=True)
        }
        objective.backward(Losses(parameter.sum(), {}, torch.tensor([0]), made))
        objective.before_step()
    assert parameter.grad.item() == pytest.approx(math.exp(10), rel=1e-4)


def test_mses_stops_a_modality_when_its_validation_loss_rises():
    objective = MSES(patience=2)
    objective.bind({"audio": [], "visual": []})
    reported = [
        objective.after_validation({"audio": a, "visual": v}) for a, v in ((3, 3), (4, 2), (2.9, 3), (5, 2.5), (5, 1))
    ]
    assert reported[:3] == ["", "", ""] and reported[3].startswith("stopped the encoder of visual")
    assert reported[4].startswith("stopped the encoder of audio")
    assert objective.factors(["audio", "visual", "heads"]) == {"audio": 0.0, "visual": 0.0}, "also if it falls again"
    again = MSES(patience=2)
    again.load_state_dict(objective.state_dict())
    assert again.stopped == objective.stopped


def test_mslr_sets_the_rates_it_is_told():
    objective = MSLR({"audio": 0.5})
    objective.bind({"audio": [], "visual": []})
    assert objective.factors(["audio", "visual", "heads"]) == {"audio": 0.5}
    for factors, message in (
        ({"video": 1}, "video is no modality here; there are audio, visual"),
        ({"audio": "fast"}, "must be modalities with numbers >= 0"),
        ({"audio": -1}, "must be modalities with numbers >= 0"),
        ({}, "must be modalities"),
    ):
        with pytest.raises(InputError, match=message):
            MSLR(factors).bind({"audio": [], "visual": []})


@pytest.mark.parametrize(
    ("make", "modalities", "message"),
    [
        (OGMGE, "abc", r"OGMGE takes 2 modalities .* there are 3 \(a, b, c\)"),
        (OGMGE, "a", "OGMGE takes 2 modalities"),
        (AGM, "a", r"AGM takes at least 2 modalities"),
        (MIMO, "", "MIMO needs a loss of each modality, and here a step has one loss in all. Use the objective"),
        (lambda: MIMO(f_star={"c": 1.0}), "ab", "f_star: c is no modality here; there are a, b"),
        (lambda: MIMO(f_star={"a": "low"}), "ab", "must give a number for each modality"),
        (lambda: MIMO(f_star={"a": math.nan}), "ab", "must give a number for each modality"),
        (lambda: MIMO(lam=-1), "ab", "^lam: must be a number >= 0 or none, got -1"),
        (lambda: MIMO(mu=0), "ab", "^mu: must be a number > 0 or none, got 0"),
        (lambda: MIMO(preset="crema"), "ab", "^preset: must be one of 'crema_d'.* Did you mean 'crema_d'"),
        (lambda: MIMO(f_star="best"), "ab", "^f_star: must be one of 'auto' or "),
        (lambda: MGDA(scope="some"), "ab", "^scope: must be one of 'encoders', 'all', got 'some'"),
        (lambda: OGMGE(alpha=-1), "ab", "^alpha: must be a number >= 0, got -1"),
        (lambda: OGMGE(1.0, "maybe"), "ab", "^noise: must be true or false, got 'maybe'"),
        (lambda: AGM(-0.5), "ab", "^alpha: must be a number >= 0, got -0.5"),
        (lambda: MMPareto(gamma=0), "ab", "^gamma: must be a number > 0, got 0"),
        (lambda: MSES(patience=0), "ab", "^patience: must be a whole number >= 1, got 0"),
        (lambda: Unimodal("c"), "ab", "modality: c is no modality here; there are a, b"),
    ],
)
def test_what_does_not_fit_is_refused_in_a_sentence(make, modalities, message):
    with pytest.raises(InputError, match=message):
        make().bind({name: [] for name in modalities})


def test_constructors_read_options_as_the_command_line_does():
    assert MIMO(lam="1e1", mu="1").lam == 10 and MSES("2").patience == 2
    with pytest.raises(TypeError, match="unexpected keyword argument 'lambda_'"):
        MIMO(lambda_=1)

    class Mine(Objective):
        """Half of it.

        Args:
            share: How much. (0 < x <= 1)
        """

        def __init__(self, share: float = 0.5) -> None:
            self.share = share

    assert Mine().share == 0.5 and Mine("0.25").share == 0.25
    with pytest.raises(InputError, match=r"^share: must be a number with 0 < x <= 1, got 2"):
        Mine(2)


def test_mimos_automatic_f_star_is_what_each_modality_reaches_alone():
    losses = Losses(torch.tensor(0.0), {"a": torch.tensor(0.7), "b": torch.tensor(0.6)})
    objective = MIMO(lam=1.0, mu=1e-3, f_star="auto")
    assert objective.needs_alone and not MIMO(f_star={"a": 1}).needs_alone
    with pytest.raises(InputError, match="f_star: auto needs a training that first trains each modality by itself"):
        objective.combine(losses)
    objective.take_alone({name: Reached(1, 1, 0, 1, best) for name, best in (("a", 0.69), ("b", 0.1))})
    logged = objective.backward(Losses(losses.joint.requires_grad_(), losses.unimodal))
    assert float(logged["weight_b"]) == pytest.approx(1), "b is further behind what it can reach"
    again = MIMO(lam=1.0, mu=1e-3, f_star="auto")
    again.load_state_dict(objective.state_dict())
    assert not again.needs_alone and again.combine(losses) == objective.combine(losses)
    again.load_state_dict({})


def test_mimo_doubts_a_modality_that_holds_lambda_and_gets_no_better():
    def validated(objective: MIMO, audio: float, text: float) -> str:
        for _ in range(3):
            unimodal = {"audio": torch.tensor(audio), "text": torch.tensor(text)}
            objective.backward(Losses(torch.tensor(0.0, requires_grad=True), unimodal))
        return objective.after_validation({"audio": audio, "text": text})

    objective = MIMO(lam=10.0, mu=0.1)
    assert [validated(objective, 0.1, 0.69) for _ in range(3)] == ["", "", ""]
    again = MIMO(lam=10.0, mu=0.1)
    again.load_state_dict(objective.state_dict())
    note = validated(again, 0.1, 0.69)
    assert note.startswith("text holds 100% of lam, and its validation loss has hardly fallen in 3 validations")
    assert validated(again, 0.1, 0.69) == "", "once"
    falling = MIMO(lam=10.0, mu=0.1)
    assert not any(validated(falling, 0.1, 0.69 - step / 50) for step in range(8)), "one that learns is none"
    shared = MIMO(lam=10.0, mu=10.0)
    assert not any(validated(shared, 0.1, 0.69) for _ in range(8)), "nor one that has half of it"


def test_ogm_ge_modulates_in_its_window_of_epochs():
    weight, other = (nn.Parameter(torch.ones(2, 1, 3, 3)) for _ in "ab")
    responses = {"a": torch.tensor([[0.9, 0.1]]).log(), "b": torch.tensor([[0.1, 0.9]]).log()}

    def coefficients(objective: OGMGE, count: int) -> list[bool]:
        found = []
        for _ in range(count):
            weight.grad = other.grad = None
            objective.backward(Losses(weight.sum() + other.sum(), {}, torch.tensor([0]), responses))
            slowed = float(objective.before_step()["coefficient_a"]) < 1
            assert slowed == (float(weight.grad[0, 0, 0, 0]) < 1)
            found.append(slowed)
        return found

    def made(**window: int) -> OGMGE:
        objective = OGMGE(noise=False, **window)
        objective.bind({"a": [weight], "b": [other]})
        return objective

    objective = made(starts=1, ends=2)
    with pytest.raises(InputError, match="this training has no epochs to count"):
        coefficients(objective, 1)
    objective = made(starts=1, ends=2)
    objective.steps_per_epoch = 1.5
    found = coefficients(objective, 4)
    again = made(starts=1, ends=2)
    again.steps_per_epoch = 1.5
    again.load_state_dict(objective.state_dict())
    # epochs of steps 0 to 6: 0, 0, 1, 2, 2, 3, 4
    assert found + coefficients(again, 3) == [False, False, True, True, True, False, False]
    assert all(coefficients(made(), 5)), "without a window always"


def test_a_third_partys_objective_needs_one_method():
    class Half(Objective):
        def combine(self, losses):
            return 0.5 * losses.joint

    weight = nn.Parameter(torch.tensor(3.0))
    objective = Half()
    objective.bind({})
    assert objective.backward(Losses(2 * weight, {}), differentiate)["loss"].item() == 3
    assert weight.grad.item() == 1 and objective.before_step() == {} and objective.factors(["a"]) == {}
    with pytest.raises(NotImplementedError, match=r"Objective defines neither combine\(\) nor backward"):
        Objective().backward(Losses(weight, {}))
