"""How good predictions are: accuracy, macro-F1 and the confusion matrix."""

import math
from typing import NamedTuple

import torch
from torch import Tensor


class Scores(NamedTuple):
    loss: float  # mean cross-entropy
    accuracy: float  # share of clips
    f1: float  # mean over the classes that occur
    confusion: Tensor  # (classes, classes) counts, rows the true class
    noise: float  # the standard error of the loss, over the clips; infinite of one alone


def scores(losses: Tensor, predicted: Tensor, labels: Tensor, classes: int) -> Scores:
    """All of them, of (clips,) losses, predictions and labels."""
    if not len(labels):
        nothing = float("nan")
        return Scores(nothing, nothing, nothing, torch.zeros(classes, classes, dtype=torch.long), nothing)
    confusion = torch.bincount(labels * classes + predicted, minlength=classes**2).view(classes, classes)
    right = confusion.diagonal().double()
    sizes = confusion.sum(0) + confusion.sum(1)  # predicted and true: twice the denominator of F1
    f1 = 2 * right / sizes.clamp(min=1)
    return Scores(
        losses.double().mean().item(),
        (right.sum() / len(labels)).item(),
        f1[confusion.sum(1) > 0].mean().item(),
        confusion,
        losses.double().std().item() / math.sqrt(len(losses)) if len(losses) > 1 else math.inf,
    )
