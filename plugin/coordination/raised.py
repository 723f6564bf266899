"""One side's rate raised for good: the probes Language LR↑ and Vision LR↑ of the CoMMIT paper.

Source: Wu et al., CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models, Section 4.1: one rate
of 1e-4 becomes 1e-3.
"""

from collections.abc import Sequence

from equipoise.coordination.balance import Metric
from equipoise.coordination.coordinator import Measured, split


class LanguageRaised(Measured):
    """Multiplies the language side's rate by `factor`.

    A baseline, and a probe of what imbalance does: the paper saw κ grow steadier with it, and results no better.

    References:
        Wu et al., CoMMIT, Section 4.1, Language LR↑.
    """

    two_sided = True

    def __init__(self, factor: float = 10.0, measure_every: int = 0, metric: Metric = "jensen_shannon"):
        """
        Args:
            factor: On the raised side's scheduled rate (> 0).
        """
        super().__init__(measure_every, metric)
        self.factor = factor

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        return split(components, self.factor, 1.0)


class EncoderRaised(LanguageRaised):
    """Multiplies the encoder side's rate by `factor`.

    A baseline: the paper saw it slow the whole model down.

    References:
        Wu et al., CoMMIT, Section 4.1, Vision LR↑.
    """

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        return split(components, 1.0, self.factor)
