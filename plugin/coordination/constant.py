"""Constant rates: every component keeps the rate its schedule gives, the baseline of every coordinator.

Source: the baseline "Constant LR" of Wu et al., "CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language
Models".
"""

from collections.abc import Sequence

from equipoise.coordination.coordinator import Measured


class Constant(Measured):
    """Leaves every component's scheduled learning rate as it is.

    References:
        Wu et al., CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models, baseline Constant LR.
    """

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        return dict.fromkeys(components, 1.0)
