"""Several data sets mixed by weight: which conversations an epoch has, known from the seed and its number."""

from collections.abc import Sequence

import torch
from torch import Tensor

from equipoise.pipelines.training.state import mix


def mixed(
    sources: Tensor,  # (examples,), the data set that each is of
    weights: Sequence[float],  # of the data sets
    epoch: int,
    total: int,  # conversations of an epoch
    seed: int,
) -> Tensor:  # (total,), indices of examples, by data set
    """Each data set goes on where the epoch before left off, so that its conversations are drawn equally often, be it
    smaller or larger than its share."""
    chosen = []
    for source, count in enumerate(shares(weights, total)):
        members = (sources == source).nonzero()[:, 0]
        positions = torch.arange(epoch * count, (epoch + 1) * count)
        for turn in (positions // len(members)).unique().tolist():
            generator = torch.Generator().manual_seed(mix(seed, "data set", source, turn))
            order = members[torch.randperm(len(members), generator=generator)]
            chosen.append(order[positions[positions // len(members) == turn] % len(members)])
    return torch.cat(chosen)


def shares(weights: Sequence[float], total: int) -> list[int]:
    """How many of a total each data set gives: by weight, and those that are missing by the largest remainders."""
    exact = [weight / sum(weights) * total for weight in weights]
    found = [int(share) for share in exact]
    most = sorted(range(len(weights)), key=lambda index: (found[index] - exact[index], index))
    for index in most[: total - sum(found)]:
        found[index] += 1
    return found
