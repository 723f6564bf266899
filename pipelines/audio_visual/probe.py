"""What the encoders know: a logistic probe on frozen features, and what each modality contributes to it.

A unimodal head says as much about how fast it trained as about its encoder, and it trains at another speed under each
objective. A probe is fitted to convergence in the same way after all of them, so that its accuracies compare.
"""

import math
from collections.abc import Mapping
from itertools import combinations, permutations

import torch
from torch import Tensor
from torch.nn import functional as F

PENALTY = 1e-3  # on half the squared weights, against the mean loss: scikit-learn's usual one at 1,000 clips
MOST = 10_000  # training clips that a probe is fitted to, at most
_ITERATIONS, _FLAT = 2000, 1e-6  # the fit ends there, or where no entry of the gradient is larger


def probes(
    train: Mapping[str, Tensor],
    labels: Tensor,
    test: Mapping[str, Tensor],
    true: Tensor,
    classes: int,
    chance: float,
) -> dict[str, float]:
    """Test accuracies of probes on each modality's features and on all (`joint`), and every modality's contribution.

    A contribution is a Shapley value: what the modality adds to the accuracy of a probe, on average over the orders in
    which modalities can be added to none. Contributions sum to the accuracy on all less `chance`.

    Args:
        train: Modality → (clips, width) features.
        labels: (clips,) classes of those.
        test: Modality → (clips, width) features of other clips.
        true: (clips,) classes of those.
        classes: How many.
        chance: The accuracy without any modality.

    Returns:
        `probe_NAME` and `contribution_NAME`; NaN where features are not finite.
    """
    value = {frozenset[str](): chance}
    for count in range(1, len(train) + 1):
        for names in combinations(train, count):
            given, asked = (torch.cat([part[name] for name in names], 1) for part in (train, test))
            value[frozenset(names)] = probe(given, labels, asked, true, classes)
    found = {f"probe_{name}": value[frozenset([name])] for name in train}
    shares = {f"contribution_{name}": share for name, share in contributions(list(train), value).items()}
    return {"probe_joint": value[frozenset(train)], **found, **shares}


def contributions(names: list[str], value: Mapping[frozenset[str], float]) -> dict[str, float]:
    """The Shapley value of each name, exactly, of the values of all subsets."""
    made = dict.fromkeys(names, 0.0)
    for order in permutations(names):
        for index, name in enumerate(order):
            made[name] += value[frozenset(order[: index + 1])] - value[frozenset(order[:index])]
    return {name: total / math.factorial(len(names)) for name, total in made.items()}


def probe(train: Tensor, labels: Tensor, test: Tensor, true: Tensor, classes: int) -> float:
    """Test accuracy of a logistic regression on standardized features; NaN where those are not finite."""
    train, test = train.double(), test.double()
    if not (train.isfinite().all() and test.isfinite().all()):
        return math.nan
    mean, spread = train.mean(0), train.std(0, correction=0)
    # what differs by no more than rounding says nothing, and would be blown up
    spread = spread.where(spread > 1e-6 * mean.abs(), torch.inf)
    weight, bias = _fitted((train - mean) / spread, labels, classes)
    predicted = ((test - mean) / spread @ weight + bias).argmax(1)
    return (predicted == true).double().mean().item()


def _fitted(features: Tensor, labels: Tensor, classes: int) -> tuple[Tensor, Tensor]:
    """(width, classes) weights and (classes,) biases of the least penalized loss, from zero: always the same."""
    weight = torch.zeros(features.shape[1], classes, dtype=torch.float64, requires_grad=True)
    bias = torch.zeros(classes, dtype=torch.float64, requires_grad=True)
    optimizer = torch.optim.LBFGS(
        [weight, bias],
        max_iter=_ITERATIONS,
        max_eval=2 * _ITERATIONS,
        tolerance_grad=_FLAT,
        tolerance_change=0.0,
        history_size=20,
        line_search_fn="strong_wolfe",
    )

    @torch.enable_grad()
    def loss() -> Tensor:
        optimizer.zero_grad()
        total = F.cross_entropy(features @ weight + bias, labels) + PENALTY / 2 * weight.square().sum()
        total.backward()
        return total

    optimizer.step(loss)
    return weight.detach(), bias.detach()
