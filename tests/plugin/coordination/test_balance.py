"""κ by hand on a linear model of two components, the metrics against their definitions, and rates against goldens."""

import copy
import json
import math
from pathlib import Path

import pytest
import torch
from torch import nn

from equipoise import registry
from equipoise.coordination.balance import (
    Balance,
    Prediction,
    balance_of,
    distance,
    mean_distance,
    measure,
    normalized_gradients,
    swapped,
    undisturbed,
)
from equipoise.coordination.commit import Commit, CommitCLR, look_ahead
from equipoise.errors import InputError

GOLDEN = json.loads((Path(__file__).parents[2] / "golden" / "coordinated.json").read_text())
METRICS = ("jensen_shannon", "total_variation", "hellinger", "l2")


def by_definition(first, second, metric):
    """In float64, term by term as the definitions have it."""
    p, q = first.double().softmax(-1), second.double().softmax(-1)
    m = (p + q) / 2
    return {
        "jensen_shannon": ((p * (p / m).log() + q * (q / m).log()).sum(-1) / 2).clamp(min=0).sqrt(),
        "total_variation": (p - q).abs().sum(-1) / 2,
        "hellinger": (((p.sqrt() - q.sqrt()) ** 2).sum(-1) / 2).sqrt(),
        "l2": ((p - q) ** 2).sum(-1).sqrt(),
    }[metric]


@pytest.mark.parametrize("metric", METRICS)
@pytest.mark.parametrize("size", [1e-3, 1.0, 30.0])
def test_a_distance_is_its_definition(metric, size):
    first = torch.randn(50, 200) * 3
    second = first + torch.randn(50, 200) * size
    # rounding of log-probabilities of about −20, over the size of the change
    torch.testing.assert_close(
        distance(first, second, metric).double(), by_definition(first, second, metric), rtol=1e-5 / min(size, 1), atol=0
    )


@pytest.mark.parametrize("metric", METRICS)
def test_a_distance_is_a_metric(metric):
    a, b, c = (torch.randn(500, 7, dtype=torch.float64) * 2 for _ in range(3))
    ab, bc, ac = (distance(*pair, metric) for pair in ((a, b), (b, c), (a, c)))
    assert (ac <= ab + bc + 1e-12).all() and (ab > 0).all()
    assert torch.allclose(ab, distance(b, a, metric), atol=1e-14) and (distance(a, a, metric) == 0).all()
    assert torch.allclose(distance(a, b + 5, metric), ab), "logits stand for distributions"


def test_a_change_of_the_last_digits_is_seen():
    """Sums of p log(p/m) of both signs would give noise of √1e-7 here."""
    logits = torch.randn(20, 1000)
    change = torch.randn(20, 1000) * 1e-5
    found = distance(logits, logits + change).double()
    exact = by_definition(logits.double(), (logits + change).double(), "jensen_shannon")
    assert ((found - exact).abs() / exact).max() < 0.1


@pytest.mark.parametrize("metric", METRICS)
def test_the_slope_of_a_distance_is_finite_and_right(metric):
    first = torch.randn(5, 6, dtype=torch.float64) * 4
    second = (first + torch.randn(5, 6, dtype=torch.float64) * torch.tensor([[0.1], [1], [3], [10], [40]])).double()
    second.requires_grad_()
    assert torch.autograd.gradcheck(lambda moved: distance(first, moved, metric), second, atol=1e-5)
    equal = first.clone().requires_grad_()
    distance(first, equal, metric).sum().backward()
    assert (equal.grad == 0).all()


def test_an_unknown_metric_is_refused():
    with pytest.raises(InputError, match="KL is no metric"):
        distance(torch.zeros(1, 2), torch.zeros(1, 2), "kl")  # type: ignore[arg-type]  # what a configuration may say


def test_tokens_are_averaged_within_samples_first():
    zero, other = torch.zeros(4, 2), torch.tensor([[0.0, 9.0]]).repeat(4, 1)
    other[3] = 0
    d = distance(zero[:1], other[:1]).item()
    found = mean_distance(Prediction(zero, torch.tensor([0, 0, 7, 7])), Prediction(other, torch.tensor([0, 0, 7, 7])))
    assert found.item() == pytest.approx((d + d / 2) / 2)


class Linear(nn.Module):
    """y = T (S x): both components are one matrix."""

    def __init__(self):
        super().__init__()
        self.encoder = nn.Linear(3, 3, bias=False, dtype=torch.float64)
        self.dropout = nn.Dropout(0.5)
        self.norm = nn.BatchNorm1d(3, dtype=torch.float64)
        self.language = nn.Linear(3, 2, bias=False, dtype=torch.float64)
        with torch.no_grad():
            self.encoder.weight.copy_(torch.eye(3))
            self.language.weight.copy_(torch.tensor([[1.0, 0, 0], [0, 0, 0]]))

    def forward(self, x):
        return self.language(self.norm(self.dropout(self.encoder(x))))

    def components(self):
        return {"encoder": [self.encoder.weight], "language": [self.language.weight]}


def stepped(model):
    """A step of known size on both sides; returns what was before."""
    before = {name: [tensor.detach().clone() for tensor in some] for name, some in model.components().items()}
    with torch.no_grad():
        model.encoder.weight[0, 0] += 0.5  # the logit of class 0 of x = e₁ goes from 1 to 1.5
        model.language.weight[0, 0] += 2.0  # and from 1 to 3
    return before


def test_kappa_by_hand():
    model, x = Linear(), torch.eye(3, dtype=torch.float64)[:1]
    before = stepped(model)
    shrink = (1 + model.norm.eps) ** -0.5  # of the normalisation in evaluation mode

    def tv(first, second):  # of two classes with logits (z, 0)
        return abs(torch.sigmoid(torch.tensor(first)) - torch.sigmoid(torch.tensor(second))).item()

    def predict():
        return Prediction(model(x), torch.zeros(1, dtype=torch.long), 3.0, 4.0, 5.0)

    with undisturbed(model):
        found = measure(predict, model.components(), before, "total_variation")
    assert found.language == pytest.approx(tv(1.0 * shrink, 3.0 * shrink), abs=1e-7)
    assert found.encoder == pytest.approx(tv(1.0 * shrink, 1.5 * shrink), abs=1e-7)
    assert found.kappa == pytest.approx(found.language / found.encoder)
    assert found.h_language == pytest.approx(found.language / 4) and found.h_encoder == pytest.approx(found.encoder / 8)


def test_measuring_leaves_everything_as_it_was():
    model, x = Linear().train(), torch.randn(8, 3, dtype=torch.float64)
    model(x).sum().backward()
    before = stepped(model)
    storages = [p.data_ptr() for p in model.parameters()]
    state, kept = copy.deepcopy(model.state_dict()), {k: [t.clone() for t in v] for k, v in before.items()}
    gradients, rng = [p.grad.clone() for p in model.parameters()], torch.get_rng_state()

    def predict():
        torch.rand(3)
        return Prediction(model(x), torch.arange(8))

    model.eval()
    first = predict()
    model.train()
    for base in (None, first):
        torch.set_rng_state(rng)
        with undisturbed(model):
            assert not model.dropout.training
            measure(predict, model.components(), before, base=base)
    assert all(torch.equal(value, model.state_dict()[name]) for name, value in state.items())
    assert all(torch.equal(a, b) for name in kept for a, b in zip(kept[name], before[name], strict=True))
    assert [p.data_ptr() for p in model.parameters()] == storages, "swapped back, not copied back"
    assert all(torch.equal(a, p.grad) for a, p in zip(gradients, model.parameters(), strict=True))
    assert torch.equal(rng, torch.get_rng_state()) and model.training and model.dropout.training and model.norm.training


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_mixed_precision_and_a_gradient_scaler(dtype):
    """Autocast's copies of the weights are those of the weights swapped in; a step that the scaler skips has no κ."""
    torch.manual_seed(0)
    model = nn.ModuleDict({"encoder": nn.Linear(8, 8), "language": nn.Linear(8, 4)})
    x, index = torch.randn(6, 8), torch.arange(6)
    components = {name: list(module.parameters()) for name, module in model.items()}
    optimizer, scaler = torch.optim.SGD(model.parameters(), lr=0.3), torch.amp.GradScaler("cpu", init_scale=64.0)
    coordinator = CommitCLR(measure_every=1, every=1)

    def logits():
        return model["language"](model["encoder"](x).relu())

    def predict():
        return Prediction(logits(), index, 1.0, 1.0, 1.0)

    def predict_afresh():
        with torch.autocast("cpu", dtype):
            return predict()

    for spoiled in (False, True):
        before = {name: [tensor.detach().clone() for tensor in inside] for name, inside in components.items()}
        with torch.autocast("cpu", dtype):  # one context for all, so that its cache of cast weights would be stale
            scaler.scale(logits().float().square().mean()).backward()
            if spoiled:
                model["encoder"].weight.grad[0, 0] = float("inf")
            scaler.step(optimizer)
            scaler.update()
            found = measure(predict, components, before)
        coordinator.observe(0, found)
        if spoiled:
            break
        optimizer.zero_grad()
        assert found == measure(predict_afresh, components, before) and found.kappa > 0
        assert found.kappa == pytest.approx(measure(predict, components, before).kappa, rel=0.2), "float32"
        base = Prediction(torch.zeros(6, 4), index)
        gradients = []
        for scale in (scaler.scale, lambda loss: loss):

            def backward(loss, inputs, scale=scale):
                scale(loss).backward(inputs=inputs)

            look_ahead(predict_afresh, components, before, base, 1.0, backward=backward)
            gradients.append([p.grad.clone() for p in model.parameters()])
            optimizer.zero_grad()
        for scaled, plain in zip(*gradients, strict=True):
            torch.testing.assert_close(scaled / 64, plain, rtol=0.02, atol=1e-3)  # half precision's digits
    assert (found.language, found.encoder) == (0.0, 0.0) and coordinator.skipped == 1 and len(coordinator.recent) == 1


def test_each_tower_has_a_kappa_of_its_own():
    """y = T(u + v) with a tower for each summand: alone each moves what it moves, and one that rests costs no pass."""
    u, v, T = (nn.Parameter(torch.tensor([value], dtype=torch.float64)) for value in (1.0, 0.0, 1.0))
    components = {"vision": [u], "audio": [v], "language": [T]}
    calls = []

    def predict():
        calls.append(1)
        logit = T * (u + v)
        return Prediction(torch.stack([logit, 0 * logit], dim=1), torch.zeros(1, dtype=torch.long), 1.0, 1.0, 1.0)

    def tv(z):
        return abs(torch.sigmoid(torch.tensor(1.0)) - torch.sigmoid(torch.tensor(z))).item()

    for moved, passes in ((0.0, 3), (2.0, 5)):
        before = {name: [tensor.detach().clone() for tensor in some] for name, some in components.items()}
        with torch.no_grad():
            u += 0.5
            v += moved
            T += 1.0
        calls.clear()
        found = measure(predict, components, before, "total_variation", each=True)
        assert len(calls) == passes
        assert found.each["vision"] == pytest.approx(tv(1.5)) and found.encoder == pytest.approx(tv(1.5 + moved))
        assert found.each["audio"] == pytest.approx(tv(1.0 + moved), abs=1e-6)
        kappas = {"vision": tv(2.0) / tv(1.5), "audio": tv(2.0) / tv(3.0) if moved else float("nan")}
        assert found.kappas == pytest.approx(kappas, nan_ok=True)
        base = Prediction(torch.tensor([[1.0, 0.0]], dtype=torch.float64), torch.zeros(1, dtype=torch.long))
        ascended = look_ahead(predict, components, before, base, 1.0, "total_variation", each=True)
        assert ascended.each == pytest.approx(found.each) and measure(predict, components, before).each == {}
        for tensor, old in zip((u, v, T), (1.0, 0.0, 1.0), strict=True):
            tensor.data.fill_(old)


def test_towers_follow_their_own_kappa_where_that_is_asked_for():
    names, base = ["vision", "audio", "language"], Prediction(torch.zeros(1), torch.zeros(1))
    made = CommitCLR(every=1, each=True)
    moved = {"vision": torch.tensor(0.5), "audio": torch.tensor(0.0)}
    logged = made.observe(0, balance_of(base, torch.tensor(2.0), torch.tensor(1.0), moved))
    assert (logged["kappa"], logged["kappa_vision"], logged["moved_vision"]) == (2.0, 4.0, 0.5)
    assert logged["kappa_audio"] != logged["kappa_audio"], "a tower that rests has none"
    made.stepped({}, 0, 10)
    assert made.factors(names) == pytest.approx({"language": 2 / 3, "audio": 4 / 3, "vision": 8 / 5})
    again = CommitCLR(every=1, each=True)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert again.factors(names) == made.factors(names) and again.state_dict() == made.state_dict()
    again.load_state_dict({"seen": [2.0], "skipped": 0, "average": 2.0})
    assert again.factors(names) == pytest.approx({"language": 2 / 3, "audio": 4 / 3, "vision": 4 / 3}), "an older state"


def test_what_raises_inside_is_swapped_back():
    weight, value = nn.Parameter(torch.zeros(2)), torch.ones(2)
    with pytest.raises(ZeroDivisionError), swapped([weight], [value]):
        assert (weight == 1).all()
        raise ZeroDivisionError
    assert (weight == 0).all() and (value == 1).all()


def test_a_known_base_saves_a_pass_and_changes_nothing():
    model, x = Linear().eval(), torch.randn(4, 3, dtype=torch.float64)
    index, calls = torch.arange(4), []
    first = Prediction(model(x).detach(), index, 1.0, 1.0, 1.0)

    def predict():
        calls.append(1)
        return Prediction(model(x), index, 1.0, 1.0, 1.0)

    before = stepped(model)
    assert measure(predict, model.components(), before, base=first) == measure(predict, model.components(), before)
    assert len(calls) == 2 + 3


def test_without_two_sides_there_is_no_balance():
    with pytest.raises(InputError, match="a component named 'language'"):
        measure(
            lambda: Prediction(torch.zeros(1, 2), torch.zeros(1)),
            {"encoder": [torch.zeros(1)]},
            {"encoder": [torch.zeros(1)]},
        )


def test_the_goldens_rates():
    made = CommitCLR(window=GOLDEN["window"], every=1, measure_every=1)
    for step, (kappa, (average, language, encoder)) in enumerate(zip(GOLDEN["kappa"], GOLDEN["rates"], strict=True)):
        assert made.measures(step)
        made.observe(step, Balance(kappa, 1.0))
        made.stepped({}, step, 12)
        factors = made.factors(["encoder", "language"])
        assert made.average == pytest.approx(average, abs=1e-10)
        assert factors["language"] * GOLDEN["base_lr"] == pytest.approx(language, rel=1e-10)
        assert factors["encoder"] * GOLDEN["base_lr"] == pytest.approx(encoder, rel=1e-10)
        assert factors["encoder"] + factors["language"] == pytest.approx(2, abs=1e-15)


@pytest.mark.parametrize(("kappa", "slower"), [(1.0, None), (3.0, "language"), (1 / 3, "encoder")])
def test_the_side_that_moves_more_is_slowed(kappa, slower):
    made = CommitCLR()
    assert made.factors(["encoder", "language"]) == {"encoder": 1.0, "language": 1.0}
    for step in range(20):
        if made.measures(step):
            made.observe(step, Balance(kappa, 1.0))
        made.stepped({}, step, 20)
    factors = made.factors(["language", "encoder"])
    if slower is None:
        assert factors == {"encoder": 1.0, "language": 1.0}
    else:
        other = next(name for name in factors if name != slower)
        assert factors[slower] == pytest.approx(0.5) and factors[other] == pytest.approx(1.5)


def test_rates_change_only_every_so_often():
    made = CommitCLR(every=5, measure_every=1)
    seen = []
    for step in range(10):
        made.observe(step, Balance(step + 1.0, 1.0))
        made.stepped({}, step, 10)
        seen.append(made.factors(["encoder", "language"])["language"])
    assert [a != b for a, b in zip([1.0, *seen], seen, strict=False)] == [False] * 4 + [True] + [False] * 4 + [True]


def test_what_has_no_ratio_is_skipped_and_counted():
    made = CommitCLR(measure_every=1)
    for balance in (Balance(1.0, 0.0), Balance(math.nan, 1.0), Balance(0.0, 1.0), Balance(math.inf, 1.0)):
        assert math.isnan(balance.kappa)
        made.observe(0, balance)
    assert made.skipped == 4 and not made.recent
    made.observe(0, Balance(2.0, 1.0))
    again = CommitCLR(measure_every=1)
    again.load_state_dict(json.loads(json.dumps(made.state_dict())))
    assert (list(again.recent), again.skipped) == ([2.0], 4)


@pytest.mark.parametrize(("ascends", "power"), [("squared", 2), ("distance", 1)])
def test_the_regulariser_ascends_and_touches_one_side_at_a_time(ascends, power):
    """Its gradient against a finite difference, and 0 before any step. With one sample of one token, the mean of d² is
    the square of the mean."""
    torch.manual_seed(3)
    model, x = Linear().eval(), torch.randn(1, 3, dtype=torch.float64)

    def predict():
        return Prediction(model(x), torch.arange(1), 1.0, 1.0, 1.0)

    base = predict()
    base = base._replace(logits=base.logits.detach())
    same = {name: [t.detach().clone() for t in some] for name, some in model.components().items()}
    look_ahead(predict, model.components(), same, base, 1.0, ascends=ascends)
    assert all((p.grad == 0).all() for p in (model.encoder.weight, model.language.weight)), "at equal weights"
    before = stepped(model)
    model.zero_grad()
    found = look_ahead(predict, model.components(), before, base, 0.5, ascends=ascends)
    assert found == measure(predict, model.components(), before, base=base)
    for name, weight in (("encoder", model.encoder.weight), ("language", model.language.weight)):
        change = torch.zeros_like(weight)
        change[0, 1] = 1e-6
        moved = []
        for sign in (1, -1):
            with torch.no_grad():
                weight.add_(sign * change)
            moved.append(getattr(measure(predict, model.components(), before, base=base), name) ** power)
            with torch.no_grad():
                weight.sub_(sign * change)
        assert weight.grad[0, 1].item() == pytest.approx(-0.5 * (moved[0] - moved[1]) / 2e-6, rel=1e-4)


def test_the_pull_of_the_square_fades_with_the_step_and_that_of_the_distance_does_not():
    """Why the default is the square: after a step a thousandth as long, d pulls as hard as before."""
    torch.manual_seed(0)
    x = torch.randn(6, 3, dtype=torch.float64)
    pulls: dict[str, list[float]] = {"squared": [], "distance": []}
    for ascends, found in pulls.items():
        for length in (1e-2, 1e-5):
            model = Linear().eval()
            base = Prediction(model(x).detach(), torch.arange(6))
            before = {name: [t.detach().clone() for t in some] for name, some in model.components().items()}
            with torch.no_grad():
                model.language.weight.add_(length)
                model.language.weight[0].add_(length)

            def predict(model=model):
                return Prediction(model(x), torch.arange(6))

            look_ahead(predict, model.components(), before, base, 1.0, ascends=ascends)
            found.append(model.language.weight.grad.norm().item())
    assert pulls["distance"][1] == pytest.approx(pulls["distance"][0], rel=0.05)
    assert pulls["squared"][1] == pytest.approx(pulls["squared"][0] / 1000, rel=0.05)


def test_the_first_change_rests_on_a_whole_window():
    """κ is measured at every step until there are so many, and then at every tenth; what is undefined counts too."""
    made, measured = CommitCLR(), []
    for step in range(40):
        if made.measures(step):
            measured.append(step)
            made.observe(step, Balance(2.0 if step % 3 else math.nan, 1.0))
        made.stepped({}, step, 40)
        assert (made.factors(["encoder", "language"])["language"] == 1.0) == (step < 9)
    assert measured == [*range(10), 19, 29, 39] and made.average == 2.0


def test_commit_measures_where_it_regularises():
    made = Commit(regularize_every=4, measure_every=10)
    assert [step for step in range(12) if made.weight(step)] == [3, 7, 11]
    assert all(made.measures(step) for step in range(12)), "until the window is full"
    for step in range(10):
        made.observe(step, Balance(1.0, 1.0))
    assert [step for step in range(12) if made.measures(step)] == [3, 7, 9, 11]
    assert not any(Commit(regularizer=0).weight(step) for step in range(5))


def test_gradients_by_the_size_of_their_weights():
    model = Linear()
    model.encoder.weight.grad = torch.full((3, 3), 2.0, dtype=torch.float64)
    found = normalized_gradients(model.components())
    assert found == {"encoder": pytest.approx(6 / math.sqrt(3)), "language": 0.0}


NAMES = ["constant", "commit", "commit_clr", "feature_cd", "language_cd", "language_lr_up", "vision_lr_up"]


def test_all_coordinators_are_found():
    assert sorted(NAMES) == sorted(e.name for e in registry.entries("coordinators") if e.distribution == "equipoise")


@pytest.mark.parametrize("name", NAMES)
def test_a_coordinator_keeps_the_contract(name):
    """Factors for any components with both sides, 1 until something is known, and a state that comes back."""
    made = registry.load("coordinators", name)()
    parts = {"tower": [torch.ones(3)], "connector": [torch.ones(2)], "language": [torch.ones(4)]}
    factors = made.factors(list(parts))
    assert factors.keys() == parts.keys() and factors["tower"] == factors["connector"]
    for step in range(30):
        if made.measures(step):
            made.observe(
                step, balance_of(Prediction(torch.zeros(1), torch.zeros(1)), torch.tensor(2.0), torch.tensor(1.0))
            )
        parts["tower"][0] += 0.1 / (step + 1)
        parts["language"][0] += 0.1 / (step + 1)
        made.stepped(parts, step, 100)
    again = registry.load("coordinators", name)()
    again.load_state_dict(made.state_dict())
    assert again.factors(list(parts)) == made.factors(list(parts)) and again.state_dict() == made.state_dict()
    if made.two_sided:
        with pytest.raises(InputError, match="sets a component 'language' against an encoder side"):
            made.factors(["unet"])


@pytest.mark.parametrize(("name", "side"), [("language_lr_up", "language"), ("vision_lr_up", "encoder")])
def test_the_raised_side_is_the_one_of_the_name(name, side):
    factors = registry.load("coordinators", name)().factors(["encoder", "language"])
    assert factors == {"encoder": 1.0, "language": 1.0} | {side: 10.0}
    assert registry.load("coordinators", name)(factor=3.0).factors(["encoder", "language"])[side] == 3.0


@pytest.mark.parametrize(("name", "first"), [("feature_cd", "encoder"), ("language_cd", "language")])
def test_coordinate_descent_changes_sides_at_rest_or_at_half_time(name, first):
    cls = registry.load("coordinators", name)
    for still_from, expected in ((10, 39), (1000, 99)):  # at rest in the window that ends at 40; at half of 200 steps
        made, parts = cls(), {"encoder": [torch.zeros(3)], "language": [torch.zeros(3)]}
        changed = []
        for step in range(200):
            factors = made.factors(["encoder", "language"])
            changed.append(factors[first] == 0)
            assert sorted(factors.values()) == [0.0, 1.0]
            if step < still_from:
                parts[first][0] += 1.0
            made.stepped(parts, step, 200)
        assert made.changed_at == expected and changed.index(True) == expected + 1 and all(changed[expected + 1 :])
