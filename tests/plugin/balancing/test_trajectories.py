"""Golden trajectories: small late-fusion models in NumPy, differentiated by complex steps, trained by each method's
formulas as its paper and its authors' code have them; torch and the objective must take the same steps."""

import math
from collections.abc import Callable
from functools import partial

import numpy as np
import pytest
import torch

from equipoise.balancing.info_reg import InfoReg
from equipoise.balancing.lfm import LFM
from equipoise.balancing.mla import MLA
from equipoise.balancing.objective import Losses, Objective
from equipoise.balancing.pmr import PMR
from equipoise.balancing.recon_boost import ReconBoost
from equipoise.errors import InputError

RATE, PER_EPOCH, BATCH, CLASSES = 0.4, 2, 6, 3
INPUTS, WIDTHS = {"a": 3, "b": 2, "c": 2}, {"a": 4, "b": 3, "c": 2}
RNG = np.random.default_rng(0)
LABELS = np.arange(PER_EPOCH * BATCH) % CLASSES
# a is the easiest to tell classes by, c says nothing
DATA = {
    n: RNG.normal(size=(len(LABELS), d)) + s * LABELS[:, None]
    for (n, d), s in zip(INPUTS.items(), (1, 0.3, 0), strict=True)
}
Weights = dict[str, np.ndarray]


def start(names: str, shared: bool = False) -> Weights:
    rng = np.random.default_rng(1)
    made = {f"encoder.{n}": rng.normal(size=(INPUTS[n], WIDTHS[n])) / 2 for n in names}
    heads = ["shared"] if shared else list(names)
    for head in heads:
        made[f"head.{head}"] = rng.normal(size=(max(WIDTHS.values()) if shared else WIDTHS[head], CLASSES))
        made[f"bias.{head}"] = rng.normal(size=CLASSES) / 5
    return made


def batch(step: int) -> slice:
    return slice(step % PER_EPOCH * BATCH, (step % PER_EPOCH + 1) * BATCH)


# The twin: plain arrays and loops.


def encoded(w: Weights, name: str, rows: slice = slice(None)) -> np.ndarray:
    return np.tanh(DATA[name][rows] @ w[f"encoder.{name}"])


def part(w: Weights, name: str, rows: slice) -> np.ndarray:
    features = encoded(w, name, rows)
    head = w.get(f"head.{name}")
    if head is None:  # one for all
        return features @ w["head.shared"][: features.shape[1]] + w["bias.shared"]
    return features @ head + w[f"bias.{name}"]


def softmax(logits: np.ndarray) -> np.ndarray:
    return np.exp(logits) / np.exp(logits).sum(1, keepdims=True)


def entropy(logits: np.ndarray, rows: slice) -> np.ndarray:
    """Mean cross-entropy."""
    return -sum(np.log(softmax(logits)[i, y]) for i, y in enumerate(LABELS[rows])) / len(LABELS[rows])


def score(logits: np.ndarray, rows: slice) -> float:
    return sum(softmax(logits)[i, y] for i, y in enumerate(LABELS[rows])).real


def joint(w: Weights, names: str, rows: slice) -> np.ndarray:
    return entropy(sum(part(w, n, rows) for n in names), rows)


def slope(loss: Callable[[Weights], np.ndarray], w: Weights) -> Weights:
    """Its gradient, by complex steps: exact to rounding."""
    found = {}
    for name, values in w.items():
        found[name] = np.zeros_like(values)
        for index in np.ndindex(values.shape):
            moved = values.astype(complex)
            moved[index] += 1e-30j
            found[name][index] = np.imag(loss({**w, name: moved})) / 1e-30
    return found


def descend(names: str, steps: int, gradient: Callable[[Weights, int], Weights], shared: bool = False) -> list[Weights]:
    w, path = start(names, shared), []
    for step in range(steps):
        found = gradient(w, step)
        w = {name: values - RATE * found[name] for name, values in w.items()}
        path.append(w)
    return path


# Torch and the objective.


def features_of(w: dict[str, torch.Tensor], name: str, rows: slice = slice(None)) -> torch.Tensor:
    return torch.tanh(torch.tensor(DATA[name][rows]) @ w[f"encoder.{name}"])


def losses_of(w: dict[str, torch.Tensor], names: str, step: int, shared: bool) -> Losses:
    rows = batch(step)
    features, labels = {n: features_of(w, n, rows) for n in names}, torch.tensor(LABELS[rows])
    if shared:
        padded = {n: torch.nn.functional.pad(f, (0, 4 - f.shape[1])) for n, f in features.items()}
        said = {n: f @ w["head.shared"].T + w["bias.shared"] for n, f in padded.items()}
    else:
        said = {n: f @ w[f"head.{n}"].T + w[f"bias.{n}"] for n, f in features.items()}
    whole = torch.stack(list(said.values())).sum(0)
    return Losses(torch.nn.functional.cross_entropy(whole, labels), {}, labels, said, features)


def trained(make: Callable[[], Objective], names: str, steps: int, shared: bool = False) -> list[Weights]:
    """By plain descent; the objective is put away and taken up again on the way."""
    turned = {n: v.T.copy() if n.startswith("head") else v for n, v in start(names, shared).items()}  # as nn.Linear has
    w = {name: torch.tensor(values, requires_grad=True) for name, values in turned.items()}

    def bound() -> Objective:
        objective = make()
        objective.bind({n: [w[f"encoder.{n}"]] for n in names})
        objective.steps_per_epoch = float(PER_EPOCH)
        objective.joint_head = [v for n, v in w.items() if not n.startswith("encoder")]
        return objective

    objective, path = bound(), []
    for step in range(steps):
        if step == steps // 2:
            saved, objective = objective.state_dict(), bound()
            objective.load_state_dict(saved)
        if objective.wants_features():
            given = {n: features_of(w, n).detach() for n in names}, torch.tensor(LABELS)
            objective.take_features(*given, *given)
        logged = objective.backward(losses_of(w, names, step, shared))
        assert logged["loss"].isfinite() and not logged["loss"].requires_grad
        objective.before_step()
        with torch.no_grad():
            for values in w.values():
                if values.grad is not None:
                    values -= RATE * values.grad
                values.grad = None
        path.append(
            {
                n: v.detach().numpy().T.copy() if n.startswith("head") else v.detach().numpy().copy()
                for n, v in w.items()
            }
        )
    return path


def assert_same(found: list[Weights], expected: list[Weights]) -> None:
    first = start("".join(n[-1] for n in expected[0] if n.startswith("encoder")), "head.shared" in expected[0])
    for step, (one, other) in enumerate(zip(found, expected, strict=True)):
        for name in other:
            assert np.allclose(one[name], other[name], rtol=0, atol=1e-9), (step, name)
    assert all(not np.allclose(found[-1][n], first[n], atol=1e-3) for n in first), "everything was trained"


def test_pmr_takes_its_twins_steps():
    """Prototypes from the third time on are mixed with the old; the slower of the two is drawn to its own."""
    prototypes: Weights = {}
    slower: list[str] = []

    def gradient(w: Weights, step: int) -> Weights:
        rows, epoch = batch(step), step // PER_EPOCH
        if step % PER_EPOCH == 0:
            for n in "ab":
                new = np.array([encoded(w, n)[LABELS == c].mean(0) for c in range(CLASSES)])
                prototypes[n] = new if epoch < 2 else 0.7 * new + 0.3 * prototypes[n]

        def near(w: Weights, n: str) -> np.ndarray:
            return np.array([[-np.sqrt(((z - p) ** 2).sum()) for p in prototypes[n]] for z in encoded(w, n, rows)])

        ahead = score(near(w, "a"), rows) / score(near(w, "b"), rows)
        slower.append("b" if ahead > 1 else "a")
        weight = 0.8 if epoch <= 2 else 0.0
        return slope(lambda w: joint(w, "ab", rows) + weight * entropy(near(w, slower[-1]), rows), w)

    assert_same(trained(lambda: PMR(alpha=0.8, momentum=0.3, ends=2), "ab", 9), descend("ab", 9, gradient))
    assert "b" in slower


def test_pmr_goes_by_the_classes_that_have_prototypes():
    objective = PMR(momentum=0.5)
    objective.bind({"a": [], "b": []})
    with pytest.raises(InputError, match="PMR counts epochs, and this training has none"):
        objective.wants_features()
    objective.steps_per_epoch = 1.0
    with pytest.raises(InputError, match="PMR needs the encoders' features, which this training does not give"):
        objective.backward(Losses(torch.tensor(1.0), {}, torch.tensor([0])))
    two = {n: torch.tensor([[0.0, 0.0], [2.0, 0.0]]) for n in "ab"}
    objective.take_features(two, torch.tensor([0, 2]), two, torch.tensor([0, 2]))
    made = {n: torch.tensor([[2.0, 0.0], [5.0, 5.0], [1.0, 1.0]], requires_grad=True) for n in "ab"}
    here = torch.tensor([2, 1, 4])  # class 1 has no prototype, nor has 4, which none of those clips had
    assert objective.wants_features() is False
    logged = objective.backward(Losses(sum(f.sum() for f in made.values()), {}, here, None, made))
    # two modalities alike: neither is slower, and the joint loss is all there is
    assert float(logged["loss"]) == 28 and float(logged["prototype_weight_a"]) == 0
    for _ in range(2):  # a class that comes later is taken as it is; one that is gone stays
        objective.before_step()
        assert objective.wants_features()
        more = {n: torch.tensor([[4.0, 4.0], [2.0, 2.0]]) for n in "ab"}
        objective.take_features(more, torch.tensor([1, 2]), two, torch.tensor([0, 2]))
    assert objective.prototypes["a"].tolist() == [[0.0, 0.0], [4.0, 4.0], [2.0, 2.0]]


def test_pmrs_prototype_loss_weighs_classes_as_the_joint_loss_does():
    objective = PMR(alpha=1)
    objective.bind({"a": [], "b": []})
    objective.steps_per_epoch = 1.0
    centres, labels = {n: torch.eye(2) * 3 for n in "ab"}, torch.tensor([0, 1, 1, 2])  # 2 has no prototype
    objective.take_features(centres, torch.tensor([0, 1]), centres, torch.tensor([0, 1]))
    made = {"a": torch.eye(2)[labels.clamp(max=1)] * 3, "b": torch.zeros(4, 2) + torch.tensor([1.0, 0.0])}
    weights, joint = torch.tensor([4.0, 0.5, 0.5, 7.0]), torch.zeros((), requires_grad=True)
    logged = objective.backward(Losses(joint, {}, labels, None, made, weights))
    near = -torch.stack([(made["b"][0] - centre).norm() for centre in centres["b"]])  # b is the slower
    each = -near.log_softmax(0)
    assert float(logged["loss"]) == pytest.approx(float(4 * each[0] + 2 * 0.5 * each[1]) / 5)


def test_info_reg_takes_its_twins_steps():
    """Twelve epochs: the means of ten traces are compared, and the window closes where they grow no more."""
    traces: dict[str, list[float]] = {"a": [], "b": []}
    begun: Weights = {}
    held: list[str] = []

    def gradient(w: Weights, step: int) -> Weights:
        rows = batch(step)
        if step % PER_EPOCH == 0:
            begun.update(w)
            for n in "ab":
                traces[n].append(0.0)

        def loss(w: Weights) -> np.ndarray:
            return joint(w, "ab", rows) + sum(entropy(part(w, n, rows), rows) for n in "ab")

        found = slope(loss, w)
        scores = {n: score(part(w, n, rows), rows) for n in "ab"}
        ahead, other = sorted("ab", key=lambda n: -scores[n])
        done = traces[ahead][:-1]
        now, before = sum(done[-10:]) / 10, sum(done[-11:-1]) / 10
        if not done or (now - before) / now > 0.05:
            beta = 0.5 * math.exp(math.tanh(scores[ahead] - scores[other]))
            found[f"encoder.{ahead}"] += beta * (w[f"encoder.{ahead}"] - begun[f"encoder.{ahead}"])
            held.append(ahead)
        else:
            held.append("")
        for n in "ab":
            traces[n][-1] += (found[f"encoder.{n}"] ** 2).mean()
        return found

    steps = 15 * PER_EPOCH
    assert_same(trained(lambda: InfoReg(alpha=0.5), "ab", steps), descend("ab", steps, gradient))
    assert "a" in held and held[-1] == "", "the window is open first, and shut at the end"


def test_info_regs_window_is_not_shut_by_a_step_that_overflowed():
    """A gradient scaler begins with such steps and skips them; their trace would be infinite for ten epochs."""
    encoders = {n: [torch.ones(2, 2, requires_grad=True)] for n in "ab"}
    objective = InfoReg()
    objective.bind(encoders)
    objective.steps_per_epoch = 2.0
    said = {n: torch.zeros(1, 2, requires_grad=True) for n in "ab"}
    for slope in (math.inf, 1.0, 1.0, 1.0, 1.0):
        objective.backward(Losses(sum(v.sum() for v in said.values()), {}, torch.tensor([0]), said))
        for (parameter,) in encoders.values():
            parameter.grad = torch.full_like(parameter, slope)
        objective.before_step()
    assert objective.grows("a") == pytest.approx(2 / 3)  # traces of 1 and 2: their means are 0.3 and 0.1


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_recon_boost_takes_its_twins_steps(names):
    """An epoch for one modality, half a one for all, and the next one's turn."""

    def gradient(w: Weights, step: int) -> Weights:
        rows = batch(step)
        stage, within = divmod(step, 3)
        if within == 2:
            return slope(lambda w: joint(w, names, rows), w)
        turn = names[stage % len(names)]
        known = softmax(sum(part(w, n, rows) for n in names if n != turn)).real  # as it stands

        def loss(w: Weights) -> np.ndarray:
            own = np.log(softmax(part(w, turn, rows)))
            each = [
                sum((y == c) * (-4 + 2 * known[i, c]) * own[i, c] for c in range(3)) / 3
                for i, y in enumerate(LABELS[rows])
            ]
            return sum(each) / len(each)

        return slope(loss, w)

    objective = partial(ReconBoost, fit=4, differ=2, epochs_each=1, epochs_all=0.5)
    assert_same(trained(objective, names, 11), descend(names, 11, gradient))


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_mla_takes_its_twins_steps(names):
    """The head is 4 wide, and narrower features are filled up with zeros."""
    projection = [np.eye(4)]

    def gradient(w: Weights, step: int) -> Weights:
        rows, turn = batch(step), names[step % len(names)]
        found = slope(lambda w: entropy(part(w, turn, rows), rows), w)
        mean = np.zeros(4)
        mean[: WIDTHS[turn]] = encoded(w, turn, rows).mean(0)
        if step:
            p = projection[-1]
            p = p - p @ mean[:, None] @ mean[None] @ p.T / (0.1 ** (1 + step % PER_EPOCH / PER_EPOCH) + mean @ p @ mean)
            projection.append(p / math.sqrt((p**2).sum()))
            found["head.shared"] = projection[-1] @ found["head.shared"]
        return found

    assert_same(trained(MLA, names, 8, shared=True), descend(names, 8, gradient, shared=True))
    unheaded = MLA()
    unheaded.bind({"a": [], "b": []})
    unheaded.steps_per_epoch = 1.0
    with pytest.raises(InputError, match="MLA needs a head that all modalities share"):
        unheaded.before_step()


@pytest.mark.parametrize("names", ["ab", "abc"])
def test_lfm_takes_its_twins_steps(names):
    """Two epochs of the authors' two hundred, and one beyond."""
    fitted = [2.04623704e-01, 3.35472727e-03, 1.22989557e-04, -2.92947416e-06, 2.23835486e-08, -5.39717505e-11]

    def gradient(w: Weights, step: int) -> Weights:
        rows = batch(step)
        epoch = min(200, step // PER_EPOCH * 100)
        share = sum(factor * epoch**power for power, factor in enumerate(fitted))

        def apart(p: np.ndarray, q: np.ndarray) -> np.ndarray:
            m = (p + q) / 2
            each = [sum(m[i] * (np.log(m[i]) - np.log(one[i]))) for one in (p, q) for i in range(len(m))]
            return sum(each) / 2 / len(p)

        def loss(w: Weights) -> np.ndarray:
            pairs = [(x, y) for i, x in enumerate(names) for y in names[i + 1 :]]
            all_pairs = [apart(softmax(part(w, x, rows)), softmax(part(w, y, rows))) for x, y in pairs]
            return 2 * (share * joint(w, names, rows) + (1 - share) * sum(all_pairs) / len(pairs))

        return slope(loss, w)

    assert_same(trained(lambda: LFM(epochs_all=2), names, 7), descend(names, 7, gradient))


@pytest.mark.parametrize("make", [PMR, InfoReg, ReconBoost, MLA, LFM])
def test_they_take_two_modalities_at_least(make):
    with pytest.raises(
        InputError, match=f"{make.__name__} takes .*2 modalities with losses of their own, and there are 1"
    ):
        make().bind({"a": []})


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: PMR(alpha=-1), "^alpha: must be a number >= 0, got -1"),
        (lambda: PMR(momentum=1), "^momentum: must be a number with 0 <= x < 1, got 1"),
        (lambda: PMR(ends=-1), "^ends: must be a whole number >= 0 or none, got -1"),
        (lambda: InfoReg(alpha=-1), "^alpha: must be a number >= 0, got -1"),
        (lambda: InfoReg(growth=-0.1), "^growth: must be a number >= 0, got -0.1"),
        (lambda: ReconBoost(fit=0), "^fit: must be a number > 0, got 0"),
        (lambda: ReconBoost(differ=-1), "^differ: must be a number >= 0, got -1"),
        (lambda: ReconBoost(epochs_each=0), "^epochs_each: must be a number > 0, got 0"),
        (lambda: ReconBoost(epochs_all=-1), "^epochs_all: must be a number >= 0, got -1"),
        (lambda: LFM(epochs_all=0), "^epochs_all: must be a number > 0, got 0"),
    ],
)
def test_options_out_of_bounds_are_refused_in_a_sentence(make, message):
    with pytest.raises(InputError, match=message):
        make()
