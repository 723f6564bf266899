"""What a coordinator is: it sets the learning rates of a model's components against one another while training."""

from collections.abc import Sequence


class Coordinator:
    """Base of every coordinator: one factor per component on the learning rate that the schedule gives it.

    A component is a named part of the model with its own parameter group, such as `encoder` and `language`. Factors
    multiply the scheduled rate and never overwrite it. Coordinators that probe the model to find their factors will be
    given `evaluate`, which runs the step's batch again.

    Options are the keyword arguments of the subclass's `__init__`. Coordinators are found by name in the entry-point
    group `equipoise.coordinators`.
    """

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        """The factor of each component for the next step; 1.0 leaves the scheduled rate as it is."""
        raise NotImplementedError(f"{type(self).__name__} does not define factors()")

    def state_dict(self) -> dict:
        """What a resumed run needs, in numbers, strings and tensors; empty for a coordinator without memory."""
        return {}

    def load_state_dict(self, state: dict) -> None:
        """Takes back what `state_dict` gave."""
