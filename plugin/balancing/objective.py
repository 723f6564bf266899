"""What an objective is: it turns one batch's joint and unimodal losses into gradients."""

from collections.abc import Callable
from typing import NamedTuple

from torch import Tensor


class Losses(NamedTuple):
    """One batch's losses, each a scalar tensor with its graph."""

    joint: Tensor  # the loss of the prediction from all modalities
    unimodal: dict[str, Tensor]  # modality → the loss of the prediction from that modality alone; may be empty


class Objective:
    """Base of every objective. Override `combine`, or `backward` where gradients are made in another way.

    Options are the keyword arguments of the subclass's `__init__`. Objectives are found by name in the entry-point
    group `equipoise.objectives`.
    """

    def combine(self, losses: Losses) -> Tensor:
        """The scalar to differentiate."""
        raise NotImplementedError(f"{type(self).__name__} defines neither combine() nor backward()")

    def backward(
        self, losses: Losses, backward: Callable[[Tensor], object] = Tensor.backward
    ) -> dict[str, float | Tensor]:
        """Adds the objective's gradient to the parameters' `.grad`.

        Args:
            losses: This batch's losses.
            backward: What differentiates a scalar; a training loop passes `accelerator.backward` here.

        Returns:
            Numbers worth logging, by name. Tensors are detached scalars, left on their device so as not to wait for it.
        """
        total = self.combine(losses)
        backward(total)
        return {"loss": total.detach()}
