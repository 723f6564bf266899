"""CoMMIT's Theorem 1 on a quadratic, where every quantity in it is known: what of it holds, and what it does not say.

Paper: Wu et al., CoMMIT, Section 6: x_k = x_{k−1} − α_k u_k with u_k = (∇f + λ∇h)/√(v_k + ε), v_k = β₂ v_{k−1} +
(∇f + λ∇h)², α_k = α √((1 − β₂^k)/(1 − β₂)). f(x) = ½ xᵀ A x with A diagonal; R bounds ‖∇f + λ∇h‖ + √ε.
"""

import math

import pytest
import torch

CURVATURE = torch.tensor([1.0, 0.3, 0.05], dtype=torch.float64)
START = torch.tensor([1.0, -2.0, 3.0], dtype=torch.float64)
ALPHA, BETA, EPSILON, STEPS = 0.01, 0.99, 1e-8, 400
SMOOTH = CURVATURE.max().item()  # L


def descend(weight: float, towards: float = 1.0) -> dict:
    """Eq. 9 and 10 with ∇h = towards · ∇f; what the theorem's two sides are made of."""
    x, v = START.clone(), torch.zeros(3, dtype=torch.float64)
    values, slopes, inner, moves, largest = [], [], [], [], 0.0
    for step in range(1, STEPS + 1):
        slope = CURVATURE * x
        pull = towards * slope
        values.append((x * slope).sum().item() / 2)
        slopes.append(slope.square().sum().item())
        inner.append((slope * pull).sum().item())
        whole = slope + weight * pull
        largest = max(largest, whole.norm().item() + math.sqrt(EPSILON))
        v = BETA * v + whole.square()
        move = whole / (v + EPSILON).sqrt()
        moves.append(move.square().sum().item())
        x = x - ALPHA * math.sqrt((1 - BETA**step) / (1 - BETA)) * move
    last = (x * CURVATURE * x).sum().item() / 2
    return {"x": x, "F": [*values, last], "slopes": slopes, "inner": inner, "moves": moves, "R": largest}


def constant(bound: float) -> float:
    """C below eq. 12."""
    return 2 * ALPHA * bound / math.sqrt(1 - BETA) + ALPHA**2 * SMOOTH / (2 * (1 - BETA))


def bound(found: dict, share: float) -> float:
    """The right side of eq. 12 (share = λ) and of eq. 23 (share = 1 + λ), with f* = 0."""
    floor = math.log((1 - BETA**STEPS) * found["R"] ** 2 / ((1 - BETA) * EPSILON)) / STEPS - math.log(BETA)
    return 2 * found["R"] * found["F"][0] / (ALPHA * share * STEPS) + constant(found["R"]) * floor


@pytest.mark.parametrize("weight", [0.0, 0.5, 2.0])
def test_equation_11_holds_where_the_regulariser_pulls_downhill(weight):
    found = descend(weight)
    right = constant(found["R"]) * sum(found["moves"])
    right -= ALPHA / (2 * found["R"]) * (sum(found["slopes"]) + weight * sum(found["inner"]))
    assert found["F"][-1] - found["F"][0] <= right


def test_the_two_bounds_disagree_and_both_hold_where_the_regulariser_pulls_downhill():
    """Eq. 12 divides by αλK, its proof's eq. 23 by α(1+λ)K: the former is the weaker, and is nothing at λ = 0."""
    found = descend(2.0)
    mean = sum(found["slopes"]) / STEPS
    assert mean <= bound(found, 1 + 2.0) < bound(found, 2.0)


def test_the_acceleration_is_not_there():
    """λ stands below the fraction, and R above it. R bounds ‖∇f + λ∇h‖, and grows as 1 + λ does: Adam's steps have the
    same size whatever the gradient's scale, so that ten times the gradient takes the same way."""
    plain, tenfold = descend(0.0), descend(9.0)
    torch.testing.assert_close(plain["x"], tenfold["x"], rtol=1e-3, atol=1e-6)
    assert tenfold["R"] / (1 + 9.0) == pytest.approx(plain["R"], rel=1e-3)


def test_a_regulariser_that_pulls_uphill_breaks_equation_12():
    """What it needs is ∇F·∇h ≥ ‖∇F‖². Nothing makes that so of the regulariser, which never sees the loss; with
    ∇h = −∇f and λ = 2 the loss grows, and the mean gradient is above the bound."""
    found = descend(2.0, towards=-1.0)
    assert found["F"][-1] > found["F"][0]
    assert sum(found["slopes"]) / STEPS > bound(found, 2.0)
