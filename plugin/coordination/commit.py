"""CoMMIT-CLR and CoMMIT: learning rates that follow the balance of a multimodal model's two sides.

Paper: Wu et al., CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models, eq. 3 to 8. With κ̃ the
mean of the last `window` values of κ (eq. 6), the paper's rates are β^T = α/(γ(κ̃+1)) and β^S = α/(γ(1/κ̃+1)). Here
α/γ is twice the scheduled rate, so that κ̃ = 1 keeps it and equal base rates always sum to 2 × base:

    language side:  rate × 2/(κ̃+1)          encoder side:  rate × 2κ̃/(κ̃+1)

CoMMIT adds ascent on d(ŷ, ŷ^T) and d(ŷ, ŷ^S): ŷ is the prediction before a step, ŷ^X the one with only X's step
taken. Its gradient is taken there, after the step, for at equal weights it is zero.

Near equal predictions a metric grows as |x| does: its slope is as large after the smallest step as after a long one.
So ∇d never fades, while ∇L and the rates do, and at weight 1 it soon decides where the steps go. The slope of d² is in
proportion to the step. That is the default here; the paper's letter is an option.
"""

import math
from collections import deque
from collections.abc import Callable, Mapping, Sequence

from torch import Tensor

from equipoise.coordination.balance import (
    Balance,
    Metric,
    Prediction,
    balance_of,
    distances,
    mean_of,
    moved_alone,
    sides,
    swapped,
)
from equipoise.coordination.coordinator import Ascended, Measured, split


class CommitCLR(Measured):
    """Slows whichever side moves the model's output more, and speeds up the other (CoMMIT-CLR).

    language × 2/(κ̃+1), encoder × 2κ̃/(κ̃+1), set anew every `every` steps from the moving average κ̃ of
    κ = (how far the language side's step alone moves the answers' distributions) / (how far the encoder side's does).
    Until there are `window` values κ is measured at every step, so that the first change does not rest on one of them.
    When to use it: an encoder side and a language adapter trained together, and no good ratio of their rates known.
    It finds a ratio, not a level: with one side frozen there is nothing to balance.

    Args:
        window: N_κ, how many measured values the moving average has (>= 1).
        every: L_lr, steps between changes of the rates (>= 1).
        measure_every: Steps between measurements of κ. 1 is the paper's, at two or three forward passes each (>= 1).
        metric: d, what the distance between two predictions is.
        each: Whether each component of the encoder side follows a κ of its own, between it alone and the language side,
            as with a tower of pictures and one of sounds. A forward pass more for each of several that move.

    References:
        Wu et al., CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models, eq. 3 to 6.
    """

    two_sided = True

    def __init__(
        self,
        window: int = 10,
        every: int = 10,
        measure_every: int = 10,
        metric: Metric = "jensen_shannon",
        each: bool = False,
    ):
        super().__init__(measure_every, metric)
        self.every, self.each = every, each
        self.recent: deque[float] = deque(maxlen=window)  # the last values of κ
        self.skipped = 0  # measurements without a finite, positive ratio
        self.average = 1.0  # κ̃ that the rates follow now
        self.apart: dict[str, tuple[deque[float], float]] = {}  # the same of each encoder component, where asked for

    def factors(self, components: Sequence[str]) -> dict[str, float]:
        language = 2 / (self.average + 1)
        found = split(components, language, 2 - language)  # 2κ̃/(κ̃+1) = 2 − 2/(κ̃+1)
        return found | {name: 2 - 2 / (own + 1) for name, (_, own) in self.apart.items() if name in found}

    def measures(self, step: int) -> bool:
        if len(self.recent) + self.skipped < self.recent.maxlen:  # type: ignore[operator]  # it has one
            return True
        # the last of its steps, not the first: where `every` is a multiple, the rates change right after a measurement
        return step % self.measure_every == self.measure_every - 1

    def observe(self, step: int, balance: Balance) -> dict[str, float]:
        if math.isfinite(balance.kappa):
            self.recent.append(balance.kappa)
        else:
            self.skipped += 1
        for name, kappa in balance.kappas.items():
            if math.isfinite(kappa):
                recent, own = self.apart.get(name, (deque(maxlen=self.recent.maxlen), self.average))
                recent.append(kappa)
                self.apart[name] = recent, own
        return super().observe(step, balance) | {"skipped": self.skipped}

    def stepped(self, components: Mapping[str, Sequence[Tensor]], step: int, steps: int) -> None:
        if (step + 1) % self.every == 0 and self.recent:
            self.average = sum(self.recent) / len(self.recent)
            self.apart = {name: (recent, sum(recent) / len(recent)) for name, (recent, _) in self.apart.items()}

    def state_dict(self) -> dict:
        apart = {name: {"seen": list(recent), "average": own} for name, (recent, own) in self.apart.items()}
        return {"seen": list(self.recent), "skipped": self.skipped, "average": self.average, "apart": apart}

    def load_state_dict(self, state: dict) -> None:
        self.recent = deque(state["seen"], maxlen=self.recent.maxlen)
        self.skipped, self.average = state["skipped"], state["average"]
        apart = state.get("apart", {})  # version 1 had none
        self.apart = {n: (deque(s["seen"], maxlen=self.recent.maxlen), s["average"]) for n, s in apart.items()}


class Commit(CommitCLR):
    """CoMMIT-CLR, and a regulariser that keeps each side's steps from vanishing (CoMMIT).

    θ^X ← θ^X − β^X (∇L − regularizer · ∇d(ŷ, ŷ^X)²), through the optimizer like any gradient. A regularised step also
    measures κ, for it has all that κ needs; it costs two further forward and backward passes.

    Args:
        window: N_κ, how many measured values the moving average has (>= 1).
        every: L_lr, steps between changes of the rates (>= 1).
        regularizer: The regulariser's weight; 0 is CoMMIT-CLR, 1 is the paper's, on d (>= 0).
        regularize_every: Steps between regularised ones; 1 is the paper's (>= 1).
        ascends: `squared` is d², whose pull is in proportion to the step; `distance` is d, as the paper has it, whose
            pull is as large after the smallest step as after any, and costs accuracy.
        within: Whether a step is taken on trial for the regulariser's gradient, and then anew with it, as the paper has
            it; else that gradient is taken after the step and enters the next, which needs no copy of the state.
        measure_every: Steps between measurements of κ where none is regularised (>= 1).
        metric: d, what the distance between two predictions is.
        each: Whether each component of the encoder side follows a κ of its own, between it alone and the language side,
            as with a tower of pictures and one of sounds. A forward pass more for each of several that move.

    References:
        Wu et al., CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models, eq. 3 to 8.
    """

    def __init__(
        self,
        window: int = 10,
        every: int = 10,
        regularizer: float = 0.1,
        regularize_every: int = 1,
        ascends: Ascended = "squared",
        within: bool = False,
        measure_every: int = 10,
        metric: Metric = "jensen_shannon",
        each: bool = False,
    ):
        super().__init__(window, every, measure_every, metric, each)
        self.regularizer, self.regularize_every = regularizer, regularize_every
        self.ascends, self.within = ascends, within

    def weight(self, step: int) -> float:
        return 0.0 if (step + 1) % self.regularize_every else self.regularizer

    def measures(self, step: int) -> bool:
        return bool(self.weight(step)) or super().measures(step)


def look_ahead(
    predict: Callable[[], Prediction],
    components: Mapping[str, Sequence[Tensor]],  # the parameters after the step
    before: Mapping[str, Sequence[Tensor]],  # their values before it, in the same order
    base: Prediction,  # ŷ: at the weights before the step, without a graph
    weight: float,
    metric: Metric = "jensen_shannon",
    backward: Callable[..., object] = Tensor.backward,
    ascends: Ascended = "squared",
    each: bool = False,
) -> Balance:
    """Adds −weight · ∇d(ŷ, ŷ^X)² to the `.grad` of each side X's parameters; returns what κ is made of.

    Under DistributedDataParallel, `predict` asks the module inside it: each process's gradients then wait in `.grad`,
    and are averaged with those of the next step by its backward pass.

    Args:
        backward: What differentiates a scalar with respect to `inputs`; a loop passes `accelerator.backward`.
        ascends: `distance` has d in the place of d².
        each: See `measure`.
    """
    language, encoder = sides(components)
    old_language, old_encoder = sides(before)
    found = []
    for mine, other, old in ((language, encoder, old_encoder), (encoder, language, old_language)):
        with swapped(other, old):
            apart = distances(base, predict(), metric)
            ascended = mean_of(apart if ascends == "distance" else apart.square(), base.sample)
            backward(-weight * ascended, inputs=[tensor for tensor in mine if tensor.requires_grad])
            found.append(mean_of(apart, base.sample))
    alone = moved_alone(predict, components, before, base, found[1].detach(), metric) if each else {}
    return balance_of(base, found[0], found[1], alone)
