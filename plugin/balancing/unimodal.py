"""Unimodal training: every modality by itself, what the joint model is to be better than.

Source: rows Audio, Visual and Text of the tables in Fernando et al., "Mitigating Modality Imbalance in Multi-modal
Learning via Multi-objective Optimization".
"""

import math
from typing import ClassVar

import torch
from torch import Tensor

from equipoise.balancing.objective import Losses, Objective
from equipoise.errors import InputError


class Unimodal(Objective):
    """Trains each modality by itself: the sum of the unimodal losses, without the joint one.

    Encoders share no parameter, so one run trains all of them as separate runs would, except that clipping goes by the
    norm of all gradients together. In audio-visual classification `train.keep: best` takes each modality's own best
    weights, while `train.patience` waits for the sum of their losses. The joint head is not trained.

    Args:
        modality: Train this one alone; none: all of them.

    Raises:
        InputError: There is no such modality.

    References:
        Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization,
        Table 1.
    """

    trains_joint: ClassVar[bool] = False
    modalities: ClassVar[tuple[int, float]] = (1, math.inf)

    def __init__(self, modality: str | None = None) -> None:
        self.modality = modality

    def bind(self, encoders) -> None:
        super().bind(encoders)
        if self.modality is not None and self.modality not in encoders:
            raise InputError(f"modality: {self.modality} is no modality here; there are {', '.join(encoders)}.")

    def combine(self, losses: Losses) -> Tensor:
        if self.modality is not None:
            return losses.unimodal[self.modality]
        return torch.stack(list(losses.unimodal.values())).sum()
