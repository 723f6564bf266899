"""An example plugin for Equipoise: an optimizer and an objective."""

import torch

from equipoise.balancing.objective import Losses, Objective


class Signum(torch.optim.Optimizer):
    """Steps by the sign of the momentum, so that every weight moves by exactly the learning rate.

    Args:
        lr: How far each weight moves per step. (>= 0)
        momentum: Share of the old momentum that is kept. (0 <= x < 1)
        weight_decay: Share of each weight, times lr, that is taken off per step. (>= 0)

    References:
        Bernstein et al., signSGD: Compressed Optimisation for Non-Convex Problems, arXiv:1802.04434, 2018, Algorithm 2.
    """

    def __init__(self, params, lr: float = 1e-4, *, momentum: float = 0.9, weight_decay: float = 0.0):
        super().__init__(params, {"lr": lr, "momentum": momentum, "weight_decay": weight_decay})

    @torch.no_grad()
    def step(self, closure=None):
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for weight in group["params"]:
                if weight.grad is None:
                    continue
                state = self.state[weight]
                if not state:
                    state["momentum"] = torch.zeros_like(weight)
                state["momentum"].lerp_(weight.grad, 1 - group["momentum"])
                weight.mul_(1 - group["lr"] * group["weight_decay"])
                weight.add_(state["momentum"].sign(), alpha=-group["lr"])
        return loss


class WorstModality(Objective):
    """Trains on the joint loss and the largest of the unimodal ones.

    Args:
        weight: Of the unimodal loss against the joint one. (>= 0)
    """

    def __init__(self, weight: float = 1.0):
        self.weight = weight

    def combine(self, losses: Losses) -> torch.Tensor:
        worst = max(losses.unimodal.values(), default=0.0)  # a pipeline of one modality has none
        return losses.joint + self.weight * worst
