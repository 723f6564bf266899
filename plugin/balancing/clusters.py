"""How well features fall into classes by themselves: k-means, and the purity of its clusters."""

import torch
from torch import Tensor

_STARTS, _STEPS = 10, 300  # of k-means; the start with the least distances counts


def purity(
    features: Tensor,  # (examples, width)
    labels: Tensor,  # (examples,)
) -> float:
    """The share of examples whose class is their cluster's most frequent one, of as many clusters as classes.

    Each feature is first scaled to span −1 … 1.
    """
    low, high = features.amin(0), features.amax(0)
    scaled = 2 * (features - low) / (high - low).where(high > low, torch.inf) - 1
    _, classes = labels.unique(return_inverse=True)
    count = int(classes.max()) + 1
    assigned = clusters(scaled, count)
    table = torch.bincount(assigned * count + classes, minlength=count * count).view(count, count)
    return float(table.amax(1).sum()) / len(labels)


def clusters(
    points: Tensor,  # (points, width)
    count: int,
) -> Tensor:  # (points,) each one's cluster
    """k-means from several k-means++ starts, always the same for the same points."""
    generator = torch.Generator().manual_seed(0)
    points = points.double().cpu()
    best, least = torch.zeros(len(points), dtype=torch.long), torch.inf
    for _ in range(_STARTS):
        centres = _start(points, min(count, len(points)), generator)
        assigned = torch.cdist(points, centres).argmin(1)
        for _ in range(_STEPS):
            sums = torch.zeros_like(centres).index_add_(0, assigned, points)
            sizes = torch.bincount(assigned, minlength=len(centres))[:, None]
            centres = torch.where(sizes > 0, sums / sizes.clamp(min=1), centres)
            again = torch.cdist(points, centres).argmin(1)
            if torch.equal(again, assigned):
                break
            assigned = again
        spread = float((points - centres[assigned]).square().sum())
        if spread < least:
            best, least = assigned, spread
    return best


def _start(points: Tensor, count: int, generator: torch.Generator) -> Tensor:
    """Points far from one another: each is drawn by the square of its distance to those before."""
    chosen = [int(torch.randint(len(points), (), generator=generator))]
    near = points.new_full((len(points),), torch.inf)  # the squared distance to the nearest of those chosen
    for _ in range(count - 1):
        near = torch.minimum(near, torch.cdist(points, points[chosen[-1:]])[:, 0].square())
        weights = near if float(near.sum()) > 0 else torch.ones_like(near)
        chosen.append(int(torch.multinomial(weights, 1, generator=generator)))
    return points[chosen]
