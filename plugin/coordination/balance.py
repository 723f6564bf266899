"""How evenly a multimodal model's two sides learn: the balance coefficient κ, and what is measured beside it.

Paper: Wu et al., CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models, Section 3. S is the
encoder side (all that is trained before the language model), T the language side (the language model's adapter).

After a step, the same batch is evaluated at (T_t, S_t), (T_{t+1}, S_t) and (T_t, S_{t+1}). The weights before the step
are swapped with those after it, storage for storage: nothing is copied, and all are back, to the bit, afterwards.
"""

import contextlib
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Literal, NamedTuple

import torch
from torch import Tensor, nn

from equipoise.errors import InputError

LANGUAGE = "language"  # the component that is T; every other one belongs to S
Metric = Literal["jensen_shannon", "total_variation", "hellinger", "l2"]
_ROWS = 1 << 24  # entries of a block of distributions, so that float32 copies stay small beside the logits themselves


class Prediction(NamedTuple):
    """What a model predicts for a batch."""

    logits: Tensor  # (answer tokens, vocabulary)
    sample: Tensor  # (answer tokens,) which sample of the batch each token belongs to
    text_norm: float = 0.0  # mean over samples of ‖I^T‖, the embedded instruction
    media_norm: float = 0.0  # mean of ‖I^S‖, the picture's or sound's features as the model is given them
    encoded_norm: float = 0.0  # mean of ‖θ_S(I^S)‖, what the encoder side hands to the language model


@dataclass(frozen=True)
class Balance:
    """One measurement."""

    language: float  # d[T_{t+1}(S_t), T_t(S_t)]
    encoder: float  # d[S_{t+1}(T_t), S_t(T_t)]
    h_language: float = float("nan")  # H^T of eq. 5
    h_encoder: float = float("nan")  # H^S
    each: Mapping[str, float] = field(default_factory=dict)  # d of each encoder component alone, where that was asked

    @property
    def kappa(self) -> float:
        """κ of eq. 3: above 1 the language side moves the output more. NaN where that is undefined."""
        return _ratio(self.language, self.encoder)

    @property
    def kappas(self) -> dict[str, float]:
        """κ between the language side and each of those components, likewise."""
        return {name: _ratio(self.language, moved) for name, moved in self.each.items()}


def _ratio(language: float, encoder: float) -> float:
    sound = 0 < encoder < float("inf") and 0 < language < float("inf")
    return language / encoder if sound else float("nan")


def distance(first: Tensor, second: Tensor, metric: Metric = "jensen_shannon") -> Tensor:  # (tokens,)
    """d between the distributions that two sets of logits (tokens, vocabulary) stand for, token by token.

    Every choice is a metric, as the triangle inequality of eq. 2 needs; KL is none. Computed in float32 at least.
    """
    if first.dtype not in (torch.float32, torch.float64):
        first, second = first.float(), second.float()
    logs, others = first.log_softmax(-1), second.to(first.dtype).log_softmax(-1)
    p, q = logs.exp(), others.exp()
    if metric == "total_variation":
        return (p - q).abs().sum(-1) / 2
    if metric == "hellinger":
        return _root((((logs / 2).exp() - (others / 2).exp()) ** 2).sum(-1) / 2)
    if metric == "l2":
        return _root(((p - q) ** 2).sum(-1))
    if metric != "jensen_shannon":
        raise InputError(
            f"metric: must be jensen_shannon, total_variation, hellinger or l2, got {metric!r}. KL is no metric."
        )
    # JS = ½ Σ m [(1+t) log(1+t) + (1−t) log(1−t)] with m = (p+q)/2 and t = (p−q)/(p+q) = tanh(u/2), u = log p − log q.
    # Every summand is ≥ 0 and of second order in u, so that a step's small change is not lost in rounding, as it is
    # where p log(p/m) of different signs are summed.
    u = logs - others
    small = u.abs() < 1
    t = torch.tanh(torch.where(small, u, 0.0) / 2)
    large = torch.where(small, 0.0, u).abs()
    near = torch.where(small, u, 0.0) * t + torch.log1p(-t * t)
    far = large * torch.tanh(large / 2) - large - 2 * torch.log1p((-large).exp()) + 2 * _LOG2
    return _root(((p + q) / 4 * torch.where(small, near, far)).sum(-1))


_LOG2 = 0.6931471805599453


def _root(squares: Tensor) -> Tensor:
    """√, whose slope at 0 is taken as 0: two equal distributions pull nowhere."""
    there = squares > 0
    return torch.where(there, torch.where(there, squares, 1.0).sqrt(), 0.0)


def mean_distance(first: Prediction, second: Prediction, metric: Metric = "jensen_shannon") -> Tensor:  # scalar
    """d averaged over each sample's answer tokens, then over the samples, as in eq. 7 and 8."""
    return mean_of(distances(first, second, metric), first.sample)


def distances(first: Prediction, second: Prediction, metric: Metric = "jensen_shannon") -> Tensor:  # (tokens,)
    """d of each answer token."""
    rows = max(1, _ROWS // max(1, first.logits.shape[-1]))
    blocks = zip(first.logits.split(rows), second.logits.split(rows), strict=True)
    return torch.cat([distance(one, other, metric) for one, other in blocks])


def mean_of(each: Tensor, sample: Tensor) -> Tensor:  # scalar
    """The mean of values (tokens,) over each sample's tokens, then over the samples."""
    _, index, counts = sample.unique(return_inverse=True, return_counts=True)
    return (each / counts.to(each)[index]).sum() / len(counts)


def sides(components: Mapping[str, Sequence[Tensor]]) -> tuple[list[Tensor], list[Tensor]]:
    """(T's parameters, S's parameters).

    Raises:
        InputError: one of the two has none.
    """
    language = list(components.get(LANGUAGE, ()))
    encoder = [tensor for name, tensors in components.items() if name != LANGUAGE for tensor in tensors]
    if not language or not encoder:
        raise InputError(
            f"components: {', '.join(components) or 'none'}. To balance two sides there must be a component named "
            f"{LANGUAGE!r} and another one, both with trained parameters."
        )
    return language, encoder


@contextlib.contextmanager
def swapped(parameters: Iterable[Tensor], values: Iterable[Tensor]) -> Iterator[None]:
    """Lets parameters and values exchange their storages for the time of the block. Nothing is copied or rounded."""
    pairs = list(zip(parameters, values, strict=True))

    def exchange() -> None:
        for parameter, value in pairs:
            parameter.data, value.data = value.data, parameter.data
        if torch.is_autocast_enabled() or torch.is_autocast_enabled("cpu"):
            torch.clear_autocast_cache()  # which would go on with the weights as they were

    exchange()
    try:
        yield
    finally:
        exchange()


@contextlib.contextmanager
def undisturbed(model: nn.Module, checkpointing: bool = False) -> Iterator[None]:
    """Evaluation mode (no dropout, statistics of normalisation layers unmoved) for the block; then all is as before,
    torch's random numbers too.

    `checkpointing`: layers that checkpoint their activations, which they do only while training, go on with it.
    """
    training = [
        module for module in model.modules() if module.training and not (checkpointing and _checkpoints(module))
    ]
    states = (torch.get_rng_state(), torch.cuda.get_rng_state_all() if torch.cuda.is_initialized() else [])
    for module in training:
        module.training = False
    try:
        yield
    finally:
        for module in training:
            module.training = True
        torch.set_rng_state(states[0])
        if states[1]:
            torch.cuda.set_rng_state_all(states[1])


def _checkpoints(module: nn.Module) -> bool:
    """Whether a layer checkpoints and has no dropout of its own."""
    if not getattr(module, "gradient_checkpointing", False):
        return False
    return not any("drop" in name and isinstance(value, float) and value for name, value in vars(module).items())


def measure(
    predict: Callable[[], Prediction],
    components: Mapping[str, Sequence[Tensor]],  # the parameters after the step
    before: Mapping[str, Sequence[Tensor]],  # their values before it, in the same order
    metric: Metric = "jensen_shannon",
    base: Prediction | None = None,  # at (T_t, S_t), where the step's own forward pass gave it already
    predict_anew: Callable[[], Prediction] | None = None,  # `predict` where the encoder side is that of `base`
    each: bool = False,  # whether that is also done with each component of the encoder side alone
) -> Balance:
    """Measures κ's two distances and H^S, H^T on a step's batch, without gradients. Call it inside `undisturbed`."""
    language, encoder = sides(components)
    old_language, old_encoder = sides(before)
    with torch.no_grad():
        with swapped(language, old_language):
            if base is None:
                with swapped(encoder, old_encoder):
                    base = predict()
            stepped_encoder = mean_distance(base, predict(), metric)  # (T_t, S_{t+1})
        with swapped(encoder, old_encoder):
            stepped_language = mean_distance(base, (predict_anew or predict)(), metric)  # (T_{t+1}, S_t)
    alone = moved_alone(predict, components, before, base, stepped_encoder, metric) if each else {}
    return balance_of(base, stepped_language, stepped_encoder, alone)


@torch.no_grad()
def moved_alone(
    predict: Callable[[], Prediction],
    components: Mapping[str, Sequence[Tensor]],  # the parameters after the step
    before: Mapping[str, Sequence[Tensor]],  # their values before it, in the same order
    base: Prediction,  # at (T_t, S_t)
    together: Tensor,  # d of the whole encoder side's step
    metric: Metric = "jensen_shannon",
) -> dict[str, Tensor]:
    """d of the step of each component of the encoder side alone; of several that moved each costs a forward pass."""
    pairs = {name: list(zip(components[name], before[name], strict=True)) for name in components if name != LANGUAGE}
    moved = [name for name, some in pairs.items() if not all(torch.equal(new, old) for new, old in some)]
    found = dict.fromkeys(pairs, torch.zeros_like(together))
    if len(moved) == 1:
        return found | {moved[0]: together}
    names = list(components)
    with swapped(*([tensor for name in names for tensor in some[name]] for some in (components, before))):
        for name in moved:
            with swapped(components[name], before[name]):
                found[name] = mean_distance(base, predict(), metric)
    return found


def balance_of(
    base: Prediction, language: Tensor, encoder: Tensor, each: Mapping[str, Tensor] | None = None
) -> Balance:
    """The measurement from its distances; where there are several processes, that of all their batches together."""
    each = each or {}
    values = [language.detach(), encoder.detach(), base.media_norm, base.text_norm, base.encoded_norm, *each.values()]
    several = torch.distributed.is_available() and torch.distributed.is_initialized()
    if several:
        count = base.sample.unique().numel()  # means over samples: one without any counts for nothing
        values = [count * value if count else 0.0 for value in values] + [count]
    found = torch.stack([torch.as_tensor(value, dtype=torch.float64, device=language.device) for value in values])
    if several:
        torch.distributed.all_reduce(found)
        found = found[:-1] / found[-1]
    moved_language, moved_encoder, media, text, encoded, *alone = found.tolist()
    known = media > 0
    return Balance(
        moved_language,
        moved_encoder,
        moved_language / media if known else float("nan"),
        moved_encoder / (text + encoded) if known else float("nan"),
        dict(zip(each, alone, strict=True)),
    )


def normalized_gradients(components: Mapping[str, Sequence[Tensor]]) -> dict[str, float]:
    """‖G‖/‖θ‖ of each component (Figure 3), from the gradients that are there."""
    found = {}
    for name, tensors in components.items():
        with torch.no_grad():
            gradients = [tensor.grad for tensor in tensors if tensor.grad is not None]
            norm = _norm(gradients)
            size = _norm(list(tensors))
        found[name] = norm / size if size else 0.0
    return found


def _norm(tensors: Sequence[Tensor]) -> float:
    if not tensors:
        return 0.0
    return torch.stack([n.float() for n in torch._foreach_norm([t.detach() for t in tensors])]).norm().item()
