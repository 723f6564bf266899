"""MGDA: each encoder follows the shortest convex combination of its joint and its unimodal gradient.

Method: multiple-gradient descent algorithm.
Paper: Désidéri, Multiple-gradient Descent Algorithm (MGDA) for Multi-objective Optimization, Comptes Rendus 350, 2012;
as a baseline of modality balancing in Fernando et al. (Appendix F, "MOO baseline implementation").
"""

import math
from collections.abc import Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from equipoise.balancing.min_norm import min_norm
from equipoise.balancing.objective import Backward, Losses, Objective, differentiate

_SHORT = 2**15  # elements of a tensor; below, a call costs more than a copy


class TwoGradients(Objective):
    """Base of objectives that combine, for each encoder, the gradients of the joint and of its own unimodal loss.

    Encoders share no parameter, so two backward passes give all of these gradients, however many modalities there are;
    the heads' gradients are those of the sum of all losses. Override `mix`.
    """

    modalities: ClassVar[tuple[int, float]] = (1, math.inf)

    def mix(
        self,
        products: Tensor,  # (modalities, 2, 2) of each encoder: ⟨∇f_i, ∇f_j⟩ of the joint and its own loss
    ) -> tuple[Tensor, Tensor]:  # (modalities, 2), (modalities,)
        """The weights of each encoder's two gradients, and the joint one's share to be logged."""
        raise NotImplementedError(f"{type(self).__name__} does not define mix()")

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        before = self._taken()  # of earlier forward passes in the same step
        backward(losses.joint, retain_graph=True)
        joint = self._taken()
        total = torch.stack(list(losses.unimodal.values())).sum()
        backward(total)
        own = self._taken()
        with torch.no_grad():
            pairs = [
                [[torch.zeros_like(p) if g is None else g for p, g in zip(ps, gs, strict=True)] for gs in both]
                for ps, *both in zip(self.encoders.values(), joint, own, strict=True)
            ]
            weights, shares = self.mix(torch.stack([_gram(*pair) for pair in pairs]))
            for parameters, (a, b), row, olds in zip(self.encoders.values(), pairs, weights, before, strict=True):
                for grads, weight in zip((a, b), row.unbind(), strict=True):
                    torch._foreach_mul_(grads, weight)
                torch._foreach_add_(a, b)
                for parameter, grad, old in zip(parameters, a, olds, strict=True):
                    parameter.grad = grad if old is None else old.add_(grad)
        logged = {f"joint_weight_{name}": share for name, share in zip(self.encoders, shares.unbind(), strict=True)}
        return {"loss": (losses.joint + total).detach(), **logged}

    def _taken(self) -> list[list[Tensor | None]]:
        """The encoders' gradients, taken off the parameters."""
        taken = [[p.grad for p in parameters] for parameters in self.encoders.values()]
        for parameters in self.encoders.values():
            for parameter in parameters:
                parameter.grad = None
        return taken


def _gram(
    one: Sequence[Tensor],
    other: Sequence[Tensor],  # of the same shapes
) -> Tensor:  # (2, 2), in at least float32
    dots = [torch.stack([a.dot(a), a.dot(b), b.dot(b)]) for a, b in zip(_vectors(one), _vectors(other), strict=True)]
    return torch.stack(dots).sum(0)[[0, 1, 1, 2]].view(2, 2)


def _vectors(grads: Sequence[Tensor]) -> list[Tensor]:
    """All short ones as one vector, and each long one."""
    short, long = [], []
    for grad in grads:
        (short if grad.numel() < _SHORT else long).append(grad.reshape(-1))
    vectors = [torch.cat(short), *long] if short else long
    return [vector if vector.dtype == torch.float64 else vector.float() for vector in vectors]


class MGDA(TwoGradients):
    """Follows the shortest convex combination of the losses' gradients (MGDA), which lowers all of them at once.

    For each encoder the weights w minimize ‖w₁∇f_mm + w₂∇f_mk‖ with w₁ + w₂ = 1, in closed form; heads get their
    ordinary gradients. Two backward passes. It does what multi-objective theory asks for, but a loss that is nearly
    learned has the shorter gradient and so most of the weight: a fast modality can still take over.

    Args:
        scope: "encoders": weights for each encoder alone, as in Fernando et al. "all": one set of weights for the joint
            loss and every unimodal one, over all encoders together, as in Désidéri; up to seven modalities.

    References:
        Désidéri, Multiple-gradient Descent Algorithm (MGDA) for Multi-objective Optimization, 2012.
        Fernando et al., Mitigating Modality Imbalance in Multi-modal Learning via Multi-objective Optimization,
        Appendix F, baseline MGDA.
    """

    def __init__(self, scope: Literal["encoders", "all"] = "encoders") -> None:
        self.scope = scope
        if scope == "all":
            self.modalities = (1, 7)  # pyright: ignore[reportAttributeAccessIssue]

    def mix(self, products):
        weights = self._over_all(products) if self.scope == "all" else min_norm(products)
        return weights, weights[:, 0]

    def _over_all(self, blocks: Tensor) -> Tensor:
        """A unimodal gradient is zero on other modalities' encoders, which most of the Gram matrix comes from."""
        (joint, mixed), (_, own) = blocks.permute(1, 2, 0)
        products = torch.cat([joint.sum()[None], own]).diag()
        products[0, 1:] = products[1:, 0] = mixed
        weights = min_norm(products)
        return torch.stack([weights[0].expand_as(own), weights[1:]], 1)
