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

from equipoise.balancing.min_norm import min_norm
from equipoise.balancing.objective import Backward, Losses, Objective, differentiate


class TwoGradients(Objective):
    """Base of objectives that combine, for each encoder, the gradients of the joint and of its own unimodal loss.

    Encoders share no parameter, so two backward passes give all of these gradients, however many modalities there are;
    the heads' gradients are those of the sum of all losses. Override `mix`.
    """

    modalities: ClassVar[tuple[int, float]] = (1, math.inf)

    def mix(
        self,
        rows: Mapping[str, Tensor],  # modality → (2, size): its encoder's gradient of the joint and of its own loss
    ) -> tuple[dict[str, Tensor], dict[str, float | Tensor]]:
        """The weights (2,) of each encoder's two gradients, and numbers worth logging."""
        raise NotImplementedError(f"{type(self).__name__} does not define mix()")

    def backward(self, losses: Losses, backward: Backward = differentiate) -> dict[str, float | Tensor]:
        before = self._taken()  # of earlier forward passes in the same step
        backward(losses.joint, retain_graph=True)
        joint = self._taken()
        total = torch.stack(list(losses.unimodal.values())).sum()
        backward(total)
        unimodal = self._taken()
        with torch.no_grad():
            # as vectors: a few large products in place of some for every tensor
            rows = {name: torch.stack([self._row(name, g) for g in (joint[name], unimodal[name])]) for name in joint}
            weights, logged = self.mix(rows)
            for name, parameters in self.encoders.items():
                flat = weights[name] @ rows[name]
                parts = flat.split([parameter.numel() for parameter in parameters])
                for parameter, part, old in zip(parameters, parts, before[name], strict=True):
                    grad = part.view_as(parameter).to(parameter.dtype)
                    parameter.grad = grad if old is None else old.add_(grad)
        return {"loss": (losses.joint + total).detach(), **logged}

    def _taken(self) -> dict[str, list[Tensor | None]]:
        """The encoders' gradients, taken off the parameters."""
        taken = {name: [p.grad for p in parameters] for name, parameters in self.encoders.items()}
        for parameters in self.encoders.values():
            for parameter in parameters:
                parameter.grad = None
        return taken

    def _row(self, name: str, grads: Sequence[Tensor | None]) -> Tensor:  # (size,) in at least float32
        found = [torch.zeros_like(p) if g is None else g for p, g in zip(self.encoders[name], grads, strict=True)]
        row = torch.cat([grad.flatten() for grad in found])
        return row if row.dtype == torch.float64 else row.float()


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

    def mix(self, rows):
        blocks = {name: pair @ pair.T for name, pair in rows.items()}
        if self.scope == "all":
            weights = self._over_all(blocks)
        else:
            weights = {name: min_norm(block) for name, block in blocks.items()}
        return weights, {f"joint_weight_{name}": pair[0] for name, pair in weights.items()}

    def _over_all(self, blocks: Mapping[str, Tensor]) -> dict[str, Tensor]:
        """A unimodal gradient is zero on other modalities' encoders, which most of the Gram matrix comes from."""
        count = len(blocks) + 1
        products = next(iter(blocks.values())).new_zeros(count, count)
        for index, block in enumerate(blocks.values(), start=1):
            products[0, 0] += block[0, 0]
            products[0, index] = products[index, 0] = block[0, 1]
            products[index, index] = block[1, 1]
        weights = min_norm(products)
        return {name: weights[[0, index]] for index, name in enumerate(blocks, start=1)}
