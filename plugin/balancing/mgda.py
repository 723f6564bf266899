"""MGDA: each encoder follows the shortest convex combination of its joint and its unimodal gradient.

Method: multiple-gradient descent algorithm.
Paper: Désidéri, Multiple-gradient Descent Algorithm (MGDA) for Multi-objective Optimization, Comptes Rendus 350, 2012;
as a baseline of modality balancing in Fernando et al. (Appendix F, "MOO baseline implementation").
"""

import math
from collections.abc import Mapping, Sequence
from typing import ClassVar, Literal

import torch
from torch import Tensor

from equipoise.balancing.min_norm import gram, min_norm
from equipoise.balancing.objective import Backward, Losses, Objective, differentiate

Gradient = list[Tensor]


class TwoGradients(Objective):
    """Base of objectives that combine, for each encoder, the gradients of the joint and of its own unimodal loss.

    Encoders share no parameter, so two backward passes give all of these gradients, however many modalities there are;
    the heads' gradients are those of the sum of all losses. Override `mix`.
    """

    modalities: ClassVar[tuple[int, float]] = (1, math.inf)

    def mix(
        self,
        joint: Mapping[str, Gradient],  # modality → gradient of the joint loss, one tensor per parameter
        unimodal: Mapping[str, Gradient],  # the same of the modality's own loss
    ) -> tuple[dict[str, Gradient], dict[str, float | Tensor]]:
        """Each encoder's gradient, and numbers worth logging."""
        raise NotImplementedError(f"{type(self).__name__} does not define mix()")

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        before = self._taken()  # of earlier forward passes in the same step
        backward(losses.joint, retain_graph=True)
        joint = self._taken()
        total = torch.stack(list(losses.unimodal.values())).sum()
        backward(total)
        unimodal = self._taken()
        with torch.no_grad():
            made, logged = self.mix(*(self._filled(taken) for taken in (joint, unimodal)))
            for name, parameters in self.encoders.items():
                for parameter, grad, old in zip(parameters, made[name], before[name], strict=True):
                    parameter.grad = grad if old is None else old.add_(grad)
        return {"loss": (losses.joint + total).detach(), **logged}

    def _taken(self) -> dict[str, list[Tensor | None]]:
        """The encoders' gradients, taken off the parameters."""
        taken = {name: [p.grad for p in parameters] for name, parameters in self.encoders.items()}
        for parameters in self.encoders.values():
            for parameter in parameters:
                parameter.grad = None
        return taken

    def _filled(self, taken: Mapping[str, Sequence[Tensor | None]]) -> dict[str, Gradient]:
        return {
            name: [torch.zeros_like(p) if g is None else g for p, g in zip(self.encoders[name], grads, strict=True)]
            for name, grads in taken.items()
        }


def weighted(weights: Sequence[Tensor], gradients: Sequence[Gradient]) -> Gradient:
    """Σ wᵢ·gᵢ, tensor by tensor, into the first gradient's memory."""
    total = gradients[0]
    torch._foreach_mul_(total, weights[0].to(total[0].dtype))
    for weight, gradient in zip(weights[1:], gradients[1:], strict=True):
        torch._foreach_add_(total, torch._foreach_mul(gradient, weight.to(total[0].dtype)))
    return total


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

    def mix(self, joint, unimodal):
        weights = self._over_all(joint, unimodal) if self.scope == "all" else self._each(joint, unimodal)
        made = {name: weighted(pair, [joint[name], unimodal[name]]) for name, pair in weights.items()}
        return made, {f"joint_weight_{name}": pair[0] for name, pair in weights.items()}

    def _each(self, joint, unimodal) -> dict[str, tuple[Tensor, Tensor]]:
        pairs = {name: min_norm(gram([joint[name], unimodal[name]])) for name in joint}
        return {name: (pair[0], pair[1]) for name, pair in pairs.items()}

    def _over_all(self, joint, unimodal) -> dict[str, tuple[Tensor, Tensor]]:
        """A unimodal gradient is zero on other modalities' encoders, which most of the Gram matrix comes from."""
        blocks = [gram([joint[name], unimodal[name]]) for name in joint]
        count = len(blocks) + 1
        products = blocks[0].new_zeros(count, count)
        for index, block in enumerate(blocks, start=1):
            products[0, 0] += block[0, 0]
            products[0, index] = products[index, 0] = block[0, 1]
            products[index, index] = block[1, 1]
        weights = min_norm(products)
        return {name: (weights[0], weights[index]) for index, name in enumerate(joint, start=1)}
