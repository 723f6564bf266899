"""MMPareto: min-norm where joint and unimodal gradients conflict, their sum where they do not, at a boosted length.

Method: MMPareto.
Paper: Wei & Hu, MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance, ICML 2024.
Option: `gamma` is the paper's γ.
"""

import torch

from equipoise.balancing.mgda import TwoGradients
from equipoise.balancing.min_norm import min_norm


class MMPareto(TwoGradients):
    """Follows a common direction where joint and unimodal gradients conflict, at γ times the usual length (MMPareto).

    For each encoder: with weights of 1/2 each where the two gradients' angle is sharp, and those of the shortest convex
    combination where it is not, the direction is h = w₁∇f_mm + w₂∇f_mk, and the gradient γ·‖∇f_mm + ∇f_mk‖·h/‖h‖. Heads
    get their ordinary gradients. Two backward passes.

    Args:
        gamma: Length against that of the plain sum; more than 1 is to keep the noise that helps to generalize. (> 0)

    References:
        Wei & Hu, MMPareto: Boosting Multimodal Learning with Innocent Unimodal Assistance, ICML 2024, Algorithm 1.
    """

    def __init__(self, gamma: float = 1.5) -> None:
        self.gamma = gamma

    def mix(self, products):
        weights = torch.where(products[:, 0, 1:] > 0, 0.5, min_norm(products))
        summed = products.sum((1, 2)).clamp(min=0).sqrt()  # ‖∇f_mm + ∇f_mk‖
        length = (weights[:, None] @ products @ weights[..., None]).flatten().clamp(min=0).sqrt()
        # two opposite gradients leave nothing to follow
        factor = torch.where(length > 0, self.gamma * summed / length, 0.0)
        return weights * factor[:, None], weights[:, 0]
