"""The methods that came after MIMO's baselines, each against a slow twin of its formulas in float64."""

import math

import numpy as np
import pytest
import torch
from torch import nn

from equipoise.balancing.clusters import _start, clusters, purity
from equipoise.balancing.gradient_blending import GradientBlending
from equipoise.balancing.objective import Losses, Reached
from equipoise.balancing.opm import OPM
from equipoise.balancing.relearning import Relearning
from equipoise.errors import InputError


def logits_of(rows: list[list[float]]) -> torch.Tensor:
    return torch.tensor(rows, dtype=torch.float64).log()


RESPONSES = {"a": logits_of([[0.75, 0.25], [0.5, 0.5]]), "b": logits_of([[0.25, 0.75], [0.75, 0.25]])}
LABELS = torch.tensor([0, 1])  # scores 1.25 and 0.5: a is 2.5 times ahead


def opm(**options) -> OPM:
    made = OPM(**options)
    made.bind({"a": [], "b": []})
    return made


@pytest.mark.parametrize(("base", "lam"), [(0.5, 0.5), (0.2, 0.0), (0.8, 2.0)])
def test_opms_probabilities_are_those_of_its_formula(base, lam):
    q = opm(base=base, lam=lam).probabilities(RESPONSES, LABELS)
    assert float(q["a"]) == pytest.approx(min(1.0, base * (1 + lam * math.tanh(1.25 / 0.5 - 1))), abs=1e-6)
    assert float(q["b"]) == 0, "the one behind is kept"
    level = opm().probabilities({"a": RESPONSES["a"], "b": RESPONSES["a"]}, LABELS)
    assert [float(value) for value in level.values()] == [0, 0]


def test_opm_drops_and_rescales_as_its_slow_twin():
    generator = np.random.default_rng(0)
    features = {name: torch.tensor(generator.normal(size=(2, width))) for name, width in (("a", 6), ("b", 2))}
    objective = opm(execute=1.0)
    torch.manual_seed(5)
    found = objective.fuse(features, RESPONSES, LABELS)
    torch.manual_seed(5)
    drawn = {name: torch.rand(2, 1).numpy() for name in features}
    q = {"a": 0.5 * (1 + 0.5 * math.tanh(1.5)), "b": 0.0}
    theta = (6 * q["a"] + 2 * q["b"]) / 8
    for name, made in features.items():
        expected = np.where(drawn[name] < q[name], 0, made.numpy()) / (1 - theta)
        assert np.allclose(found[name].numpy(), expected, atol=1e-6), name


def test_opm_drops_in_a_share_of_the_batches_and_of_the_examples():
    torch.manual_seed(0)
    ones = {name: torch.ones(2, 4) for name in "ab"}
    objective, zeros, done = opm(execute=0.25), 0, 0
    for _ in range(2000):
        found = objective.fuse(ones, RESPONSES, LABELS)
        if found is not ones:
            done += 1
            zeros += int((found["a"][:, 0] == 0).sum())
            assert (found["b"] > 1).all()
    q = 0.5 * (1 + 0.5 * math.tanh(1.5))
    assert done / 2000 == pytest.approx(0.25, abs=0.04) and zeros / (2 * done) == pytest.approx(q, abs=0.05)
    assert objective.fuse(ones, RESPONSES, LABELS).keys() == ones.keys()
    assert not any(opm(execute=0.0).fuse(ones, RESPONSES, LABELS) is not ones for _ in range(20))


def test_opm_waits_for_its_first_epoch_and_takes_two_modalities():
    ones = {name: torch.ones(2, 4) for name in "ab"}
    objective = opm(execute=1.0, starts=2)
    with pytest.raises(InputError, match="this training has no epochs to count"):
        objective.fuse(ones, RESPONSES, LABELS)
    objective.steps_per_epoch = 1.5
    dropped = []
    for _ in range(5):
        dropped.append(objective.fuse(ones, RESPONSES, LABELS) is not ones)
        objective.before_step()
    assert dropped == [False, False, False, True, True]
    again = opm(execute=1.0, starts=2)
    again.steps_per_epoch = 1.5
    again.load_state_dict(objective.state_dict())
    assert again.fuse(ones, RESPONSES, LABELS) is not ones
    with pytest.raises(InputError, match="OPM takes 2 modalities"):
        OPM().bind(dict.fromkeys("abc", ()))


def test_clusters_are_the_groups_that_are_far_apart():
    generator = torch.Generator().manual_seed(0)
    centres = 20 * torch.eye(4)
    groups = torch.arange(80) % 4
    points = centres[groups] + torch.randn(80, 4, generator=generator)
    found = clusters(points, 4)
    assert torch.equal(found, clusters(points, 4)), "always the same"
    assert all(len(found[groups == group].unique()) == 1 for group in range(4)) and len(found.unique()) == 4
    assert purity(points, groups) == 1


def test_the_starts_of_k_means_look_at_each_centre_once(monkeypatch):
    """The distances to one new centre at a time, and not to all before again."""
    points = torch.randn(50, 3, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    measured, cdist = [], torch.cdist
    monkeypatch.setattr(torch, "cdist", lambda one, other: measured.append(len(other)) or cdist(one, other))
    centres = _start(points, 10, torch.Generator().manual_seed(0))
    assert measured == [1] * 9 and len(centres.unique(dim=0)) == 10


def test_purity_counts_each_clusters_commonest_class():
    """Two far groups; of the first one's six, two are of another class: 8 of 10."""
    points = torch.tensor([[0.0, 7.0]] * 6 + [[9.0, 7.0]] * 4)  # a feature that is the same everywhere says nothing
    labels = torch.tensor([3, 3, 3, 3, 5, 5, 5, 5, 5, 5])
    assert purity(points, labels) == pytest.approx(0.8)


def test_relearning_moves_encoders_back_as_its_formula_says():
    weights = {name: nn.Parameter(torch.tensor([1.0, 2.0], dtype=torch.float64)) for name in "abc"}
    objective = Relearning(lam=2.0, every=2, times=2)
    objective.bind({name: [weight] for name, weight in weights.items()})
    with pytest.raises(InputError, match="counts epochs, and this training has none"):
        objective.wants_features()
    objective.steps_per_epoch = 1.5
    asked = []
    labels = torch.tensor([0, 0, 0, 0, 1, 1, 1, 1])
    apart, mixed = torch.tensor([[0.0]] * 4 + [[9.0]] * 4), torch.tensor([[0.0], [9.0]] * 4)
    for step in range(8):
        if objective.wants_features():
            asked.append(step)
            with torch.no_grad():
                for weight in weights.values():
                    weight.copy_(torch.tensor([5.0, -4.0]))
            train, validation = {"a": apart, "b": apart, "c": mixed}, {"a": mixed, "b": apart, "c": apart}
            said = objective.take_features(train, labels, validation, labels)
            # purities 1 and 1/2: a gap of 1/2 for a and c, none for b
            share = math.tanh(2.0 * 0.5)
            for name, expected in (("a", share), ("b", 0.0), ("c", share)):
                slow = [expected * first + (1 - expected) * now for first, now in ((1.0, 5.0), (2.0, -4.0))]
                assert weights[name].tolist() == pytest.approx(slow, abs=1e-12)
            assert "a by 0.762, for its purity differs by 0.500" in said
            logged = objective.before_step()
            assert logged == {"moved_a": share, "moved_b": 0.0, "moved_c": share}
        else:
            assert objective.before_step() == {}
    assert asked == [3, 6], "after two epochs and after four, of 1.5 steps each, and no third time"
    again = Relearning(lam=2.0, every=2, times=2)
    again.load_state_dict(objective.state_dict())
    again.steps_per_epoch = 1.5
    assert not again.wants_features()


def test_relearning_without_features_is_refused_in_a_sentence():
    objective = Relearning(every=1)
    objective.bind({"a": []})
    objective.steps_per_epoch = 1.0
    objective.before_step()
    with pytest.raises(InputError, match="needs the encoders' features, which this training does not give"):
        objective.before_step()


def reached(train: tuple[float, float], validation: tuple[float, float]) -> Reached:
    return Reached(train[0], validation[0], train[1], validation[1], min(validation))


def test_gradient_blendings_weights_are_those_of_its_formula():
    found = {
        "a": reached((2.3, 0.4), (2.4, 1.4)),  # gains 1.0, overfits by 0.9
        "b": reached((2.3, 1.1), (2.2, 1.3)),  # gains 0.9, overfits by 0.3
        "joint": reached((2.3, 0.1), (2.3, 1.8)),  # gains 0.5, overfits by 1.7
        "c": reached((2.3, 0.1), (2.3, 2.9)),  # gains nothing
    }
    objective = GradientBlending()
    objective.bind(dict.fromkeys("abc", ()))
    assert objective.needs_alone
    objective.take_alone(found)
    slow = np.array([1.0 / 0.9**2, 0.9 / 0.3**2, 0.5 / 1.7**2, 0.0], np.float64)
    assert [objective.weights[name] for name in ("a", "b", "joint", "c")] == pytest.approx(slow / slow.sum(), abs=1e-10)
    losses = {name: torch.tensor(value, dtype=torch.float64) for name, value in (("a", 0.7), ("b", 1.2), ("c", 2.0))}
    total = objective.combine(Losses(torch.tensor(0.3, dtype=torch.float64), losses))
    assert float(total) == pytest.approx((slow / slow.sum()) @ [0.7, 1.2, 0.3, 2.0], abs=1e-10)
    again = GradientBlending()
    again.load_state_dict(objective.state_dict())
    assert again.weights == objective.weights and not again.needs_alone
    objective.take_alone(dict.fromkeys(found, reached((1.0, 1.0), (1.0, 2.0))))
    assert set(objective.weights.values()) == {0.25}, "where nothing gains, all weigh alike"


def test_gradient_blending_takes_nothing_below_the_noise_for_overfitting():
    """A modality that learns nothing overfits by nothing either: its weight would be that of its chance gain."""
    found = {
        "a": Reached(2.3, 2.4, 0.4, 1.4, 1.4, 0.1),  # gains 1.0, overfits by 0.9
        "b": Reached(2.3, 2.304, 2.3, 2.303, 2.303, 0.004),  # gains 0.001, overfits by -0.001
        "joint": Reached(2.3, 2.4, 0.4, 1.4, 1.4, 0.1),
    }
    objective = GradientBlending()
    objective.bind(dict.fromkeys("ab", ()))
    said = objective.take_alone(found)
    slow = np.array([1.0 / 0.9**2, 0.001 / 0.1**2, 1.0 / 0.9**2])
    assert [objective.weights[name] for name in ("a", "b", "joint")] == pytest.approx(slow / slow.sum())
    assert said == "weights: a 0.4805, b 0.03892, joint 0.4805."
    losses = {name: torch.tensor(1.0, requires_grad=True) for name in ("a", "b")}
    logged = objective.backward(Losses(torch.tensor(1.0, requires_grad=True), losses))
    assert logged["weight_b"] == objective.weights["b"] and logged.keys() >= {"loss", "weight_a", "weight_joint"}


def test_gradient_blendings_noise_is_each_losss_own():
    """A modality that few validation clips have says little of its own overfitting, and nothing of the others'."""
    often = {
        "a": Reached(2.3, 2.4, 1.35, 1.4, 1.4, 0.02, 400),  # gains 1.0 and overfits by -0.05
        "b": Reached(2.3, 2.4, 0.8, 1.4, 1.4, 0.01, 400),  # by 0.5
    }
    rare = {"joint": Reached(2.3, 2.4, 1.4, 1.4, 1.4, 0.1, 4)}  # its clips scatter by 0.2, those of a by 0.4
    objective = GradientBlending()
    objective.bind(dict.fromkeys("ab", ()))
    objective.take_alone(often | rare)
    slow = np.array([1 / 0.05**2, 1 / 0.5**2, 1 / 0.2**2])
    assert [objective.weights[name] for name in ("a", "b", "joint")] == pytest.approx(slow / slow.sum())
    objective.take_alone(often | {"joint": Reached(2.3, 2.4, 1.4, 1.4, 1.4, math.inf, 1)})
    slow[2] = 1 / 0.4**2
    assert [objective.weights[name] for name in ("a", "b", "joint")] == pytest.approx(slow / slow.sum())
    objective.take_alone(dict.fromkeys(("joint", "a", "b"), Reached(2.3, 2.4, 1.4, 1.4, 1.4, math.inf, 1)))
    assert set(objective.weights.values()) == {1 / 3}, "of one clip each, nothing is known"


def test_gradient_blending_takes_weights_and_refuses_what_it_cannot():
    objective = GradientBlending({"joint": 0.5, "a": 0.25, "b": 0.25})
    objective.bind({"a": [], "b": []})
    assert not objective.needs_alone
    with pytest.raises(InputError, match="weights: must be of joint, a, b, c, got joint, a, b"):
        objective.bind(dict.fromkeys("abc", ()))
    with pytest.raises(InputError, match=r"^weights: must be"):
        GradientBlending({"a": -1})
    with pytest.raises(InputError, match="this training does not estimate them"):
        GradientBlending().combine(Losses(torch.tensor(1.0), {}))
