"""What pipelines have in common when they train: a step with optimizer, objective, coordinator and schedule; its state.

A pipeline's work is a subclass with `evaluate` and `evaluation_loss`; the loop in `training.loop` drives it.
"""

# accelerate annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false

import copy
import hashlib
import math
import time
from collections.abc import Iterable, Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext
from functools import cache, lru_cache
from typing import Any, Generic, TypeVar

import torch
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor
from torch.nn import Parameter
from torch.optim import AdamW

from equipoise import registry
from equipoise.balancing.objective import Losses
from equipoise.errors import InputError
from equipoise.lora.pairs import find_pairs, is_dtensor
from equipoise.optimizers.parts.fused_adamw import FusedAdamW
from equipoise.optimizers.parts.optional import Perturbing, metrics
from equipoise.optimizers.parts.outside import with_rate_outside
from equipoise.optimizers.parts.pair_optimizer import PairOptimizer
from equipoise.optimizers.parts.sharded import full
from equipoise.pipelines.config.sections import TrainConfig, ValidatedTrainSection
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.loop import NonFiniteError
from equipoise.pipelines.training.schedule import make_schedule, renew_rates
from equipoise.pipelines.training.validation import Validation


def make_accelerator(precision: str) -> Accelerator:
    """One for this run: a sweep's earlier cell in this process may have used another precision."""
    if AcceleratorState._shared_state:
        AcceleratorState._reset_state()
    return Accelerator(mixed_precision=precision)


ConfigT = TypeVar("ConfigT", bound=TrainConfig)
FAST = 100  # times an optimizer's own rate for what no bound holds, from which a run is doubted


class OptimizedWork(Generic[ConfigT]):
    """Most of a `training.loop.Work`: what the sections of `TrainConfig` say is done here.

    Subclasses give `evaluate`, `evaluation_loss` and, where there is something to show, `sample`.
    """

    tensors = "parameters"  # what is trained, for messages
    watched = "validation loss"  # by what validations judge, likewise
    together = False  # whether samples are made by all processes at once, as by a model that is spread over them

    def __init__(
        self,
        config: ConfigT,
        run: Run,
        accelerator: Accelerator,
        named: dict[str, Tensor],  # what is trained
        groups: list[dict[str, Any]],  # of named parameters, each with a `component`, and an `lr` if it has its own
        encoders: Mapping[str, Sequence[Tensor]] | None = None,  # modality → parameters that it has to itself
        buffers: dict[str, Tensor] | None = None,  # what changes with the weights and is saved with them
        frozen: Iterable[Tensor] = (),  # what the run stands on: it resumes only on the same
    ):
        self.frozen = _fingerprint(frozen)
        self.config, self.run, self.accelerator, self.named = config, run, accelerator, named
        self.kept = {**named, **(buffers or {})}
        chosen = config.optimizer
        optimizer = registry.load("optimizers", chosen.name)
        if optimizer is AdamW:
            optimizer = FusedAdamW
        if (outside := chosen.outside_learning_rate) is not None:
            groups = with_rate_outside(groups, find_pairs(groups), outside)
        try:
            self.optimizer = optimizer(groups, lr=chosen.learning_rate, **chosen.options)
        except (RuntimeError, TypeError, ValueError) as error:
            raise InputError(f"optimizer.name: {chosen.name} does not take these {self.tensors}: {error}") from error
        if isinstance(self.optimizer, PairOptimizer) and (doubt := _doubt(self.optimizer)):
            run.update(doubt=doubt)
        # Neither is accelerate's: its schedule stays behind where a scaler skips a step, and its optimizer looks for
        # the files of a package twice a step.
        self.schedule = make_schedule(config.schedule, self.optimizer, config.train.steps)
        self.objective = registry.load("objectives", config.objective.name)(**config.objective.options)
        self.objective.bind(encoders or {})
        self.coordinator = registry.load("coordinators", config.coordinator.name)(**config.coordinator.options)
        self.good = [tensor.detach().clone() for tensor in self.kept.values()]
        self.checked: float | None = None  # the loss that `sound` has found, of the weights as they stand since
        self.balancing = 0.0  # seconds that the last step took after its forward passes: the papers' subroutine time
        validated = isinstance(config.train, ValidatedTrainSection)
        self.validation = Validation(config.train, self.kept, self.watched) if validated else None

    def evaluate(self, step: int, micro: int) -> Losses:
        """The losses of one forward pass. All it draws must come from (seed, step, micro): asked again, it is the same
        batch and the same noise, and so it is after a resume and in every cell of a sweep. Of several processes each
        evaluates its `share` of the batch."""
        raise NotImplementedError

    def evaluation_loss(self) -> float:
        """A loss that is comparable between runs and steps."""
        raise NotImplementedError

    def final_loss(self) -> float:
        """`evaluation_loss` once training is over, not evaluated anew where `sound` has just done it."""
        return self.evaluation_loss() if self.checked is None else self.checked

    def share(self, number: int) -> range:
        """The positions of this process's examples, of forward pass `number`, in the endless sequence of examples."""
        size = self.config.train.batch
        first = (number * processes.count() + processes.rank()) * size
        return range(first, first + size)

    def backward(self, total: Tensor, /, **options: Any) -> None:
        """Adds a scalar's gradient to what is there; that of all processes' examples where there are several.

        Args:
            options: Those of `Tensor.backward`.
        """
        if processes.count() == 1:
            self.accelerator.backward(total, **options)
            return
        parameters = list(self.named.values())
        before = [parameter.grad for parameter in parameters]  # averaged already
        for parameter in parameters:
            parameter.grad = None
        self.accelerator.backward(total, **options)
        processes.average_gradients(parameters)
        for parameter, earlier in zip(parameters, before, strict=True):
            if earlier is not None:
                parameter.grad = earlier if parameter.grad is None else earlier.add_(parameter.grad)

    def again(self) -> AbstractContextManager:
        """Around the second evaluation of a batch, which a subclass may have to count for nothing."""
        return nullcontext()

    def gradients(self) -> dict[str, Tensor]:
        """What to log of the step's gradients before they are clipped."""
        return {}

    def amend(self, step: int) -> None:
        """Called with the gradients of the whole step, before they are clipped: a subclass may add to them."""

    def after_step(self, step: int) -> dict[str, float]:
        """Called when the optimizer has stepped, while `good` still holds the weights before; gives what to log."""
        return {}

    def sample(self, step: int) -> None: ...

    def validate(self, taken: int) -> dict[str, float]:
        """Validation figures after so many steps, for the log; `validation` takes the one that it judges by."""
        assert self.validation is not None
        # the first process's number, for what follows from it must be the same in all
        loss = self.checked = processes.first({"loss": self.evaluation_loss()})["loss"]
        self.validation.take(loss, taken)
        return {"val_loss": loss} if finite(loss) else {}

    @torch.no_grad()
    def settle(self) -> None:
        """Takes the weights that are to be the result."""
        if self.validation and self.validation.settle():
            self.checked = None

    def step(self, step: int) -> dict[str, float]:
        if self.validation:
            self.validation.begin_step()
        values = self._optimize(step)
        if self.validation and self.validation.due(step + 1):
            values |= self.validate(step + 1)
        return values

    def _optimize(self, step: int) -> dict[str, float]:
        self.checked = None
        optimizer, scaler = self.optimizer, self.accelerator.scaler
        components = list(dict.fromkeys(group["component"] for group in optimizer.param_groups))
        factors, more = self.coordinator.factors(components), self.objective.factors(components)
        for group, rate in zip(optimizer.param_groups, self.schedule.get_last_lr(), strict=True):
            group["lr"] = rate * factors[group["component"]] * more.get(group["component"], 1.0)
        self.balancing = 0.0
        values, logged = self._evaluate_all(step)
        if not all(map(finite, values.values())):
            optimizer.zero_grad()
            raise NonFiniteError("the loss was not finite")
        if isinstance(optimizer, Perturbing) and optimizer.perturb():  # it wants the gradient at another point too
            objective, self.objective = self.objective, copy.copy(self.objective)  # what it hears there is not counted
            try:
                with self.again():
                    self._evaluate_all(step)
            finally:
                self.objective = objective
                optimizer.restore()
        if all(tensor.grad is None for tensor in self.named.values()):
            scaler = None  # which refuses a step without a gradient
        started = self._now()
        if processes.count() > 1:  # each has its own random numbers until here
            seed_all(mix(self.config.seed, step, "step"))
        if scaler:  # first, for what the objective adds to the gradients is in no scale
            scaler.unscale_(optimizer)
        logged |= self.objective.before_step()
        logged |= self.gradients()
        self.amend(step)
        length = torch.nn.utils.get_total_norm(t.grad for t in self.named.values() if t.grad is not None)
        norm, clip = float(length), self.config.train.clip
        if not finite(norm) and scaler is None:  # with a scaler, it skips the step by itself
            optimizer.zero_grad()
            raise NonFiniteError("the gradient was not finite")
        if clip:
            torch.nn.utils.clip_grads_with_norm_(self.named.values(), clip, length)
        self.balancing += self._now() - started
        torch._foreach_copy_(self.good, [tensor.detach() for tensor in self.kept.values()])
        started = self._now()
        if scaler:
            scaler.step(optimizer)
            scaler.update()
        else:
            optimizer.step()
        self.balancing += self._now() - started
        optimizer.zero_grad()
        processes.average([t for name, t in self.kept.items() if name not in self.named and t.is_floating_point()])
        values |= {"gradient_norm": norm}
        logged = metrics(optimizer) | logged
        values |= {name: float(value) for name, value in logged.items() if name not in values}
        values["rate"] = optimizer.param_groups[0]["lr"]
        if len(components) > 1:
            # of several groups the first one's: what lies outside of pairs, and LoRA+'s B, come after it
            values |= {f"rate_{group['component']}": group["lr"] for group in optimizer.param_groups[::-1]}
        values |= self.after_step(step)
        self.schedule.step()
        return values

    def _evaluate_all(self, step: int) -> tuple[dict[str, float], dict[str, Any]]:
        """Makes the gradients of a step's micro-batches; their mean losses, and what the objective says of the last."""
        seen, logged, count = [], {}, self.config.train.accumulate
        names: list[str] = []
        for micro in range(count):
            losses = _of_all(self.evaluate(step, micro))
            names = ["loss", *(f"loss_{name}" for name in losses.unimodal)]
            seen.append(torch.stack([loss.detach().float() for loss in (losses.joint, *losses.unimodal.values())]))
            heads = [] if self.objective.uses_unimodal else list(losses.unimodal.values())

            def backward(total: Tensor, /, heads: list[Tensor] = heads, **options: bool) -> None:
                for loss in heads:  # they share no parameter with the rest, and their features carry no gradient
                    total = total + loss
                self.backward(total / count, **options)

            started = self._now()
            logged = self.objective.backward(losses, backward)
            self.balancing += self._now() - started
        return dict(zip(names, torch.stack(seen).mean(0).tolist(), strict=True)), logged

    def _now(self) -> float:
        if self.accelerator.device.type == "cuda":
            torch.cuda.synchronize()
        return time.perf_counter()

    def weights(self) -> dict[str, Tensor]:
        return dict(self.kept)

    def state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "coordinator": self.coordinator.state_dict(),
            "objective": self.objective.state_dict(),
            "scaler": scaler.state_dict() if scaler else None,
            "frozen": self.frozen,
            # the weights above may be those of a step that went wrong, which only the next loss will tell
            "good": dict(zip(self.kept, self.good, strict=True)),
            **(self.validation.state() if self.validation else {}),
        }

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        if state.get("frozen", self.frozen) != self.frozen:
            raise InputError(
                "model: its frozen weights are not those that this run was trained on so far. Put them back, or train "
                "anew."
            )
        for name, tensor in self.kept.items():
            tensor.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        renew_rates(self.schedule)
        self.coordinator.load_state_dict(state["coordinator"])
        self.objective.load_state_dict(state["objective"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, kept in zip(self.kept, self.good, strict=True):
            kept.copy_(state["good"][name])
        if self.validation:
            self.validation.restore(state)

    @torch.no_grad()
    def sound(self) -> bool:
        if not all(torch.isfinite(tensor).all() for tensor in self.kept.values()):
            return False
        self.checked = self.final_loss()
        return finite(self.checked)

    @torch.no_grad()
    def rewind(self) -> None:
        self.checked = None
        torch._foreach_copy_(list(self.kept.values()), self.good)


def _doubt(optimizer: PairOptimizer) -> str:
    """Why a run may not be what was meant: nothing to scale or bound, or a rate that only a bound makes harmless."""
    if not optimizer.pairs:
        return optimizer.pairs.summary
    own = getattr(type(optimizer), "default_outside_lr", math.inf)
    factors = optimizer.pairs.factors
    fast = [
        group["lr"]
        for group in optimizer.param_groups
        for parameter in group["params"]
        if group["lr"] > FAST * own and id(parameter) not in factors
    ]
    if not fast:
        return ""
    return (
        f"{len(fast)} of the trained tensors are in no LoRA pair, so that no bound holds them, and have a learning "
        f"rate of {max(fast):g}; optimizer.outside_learning_rate={own:g} is the optimizer's own for these"
    )


def _fingerprint(tensors: Iterable[Tensor]) -> str:
    """Tells weights from others by the beginning of each tensor: all of them would take long."""
    begins = [
        full(tensor.detach()).reshape(-1)[:64].float().cpu()  # some may wait in the computer's memory
        for tensor in tensors
        if type(tensor) in (Tensor, Parameter) or is_dtensor(tensor)  # not those of quantised weights
    ]
    if not begins:
        return ""
    return hashlib.blake2b(torch.cat(begins).numpy().tobytes(), digest_size=16).hexdigest()


def _of_all(losses: Losses) -> Losses:
    """The losses of all processes' examples together."""
    if processes.count() == 1:
        return losses
    joint, *unimodal = processes.mean(torch.stack([losses.joint, *losses.unimodal.values()])).unbind()
    return Losses(
        joint,
        dict(zip(losses.unimodal, unimodal, strict=True)),
        None if losses.labels is None else processes.gathered(losses.labels),
        losses.responses and {name: processes.gathered(said) for name, said in losses.responses.items()},
        losses.features and {name: processes.gathered(made) for name, made in losses.features.items()},
        None if losses.weights is None else processes.gathered(losses.weights),
    )


def finite(value: float) -> bool:
    return value - value == 0


def number(value: float) -> float | None:
    """JSON has no word for NaN and infinity."""
    return value if finite(value) else None


def mix(*parts: object) -> int:
    """A seed from several numbers and words, well spread."""
    return int.from_bytes(hashlib.blake2s(repr(parts).encode(), digest_size=8).digest(), "big") >> 1


def seed_all(number: int) -> None:
    """torch.manual_seed. Where there is no accelerator, without the stack that torch keeps of every call for later."""
    if _accelerated():
        torch.manual_seed(number)
    else:
        torch.default_generator.manual_seed(number)


@cache
def _accelerated() -> bool:
    return torch.accelerator.is_available()


def place(position: int, count: int, seed: int) -> int:
    """Which of `count` examples comes at a position of the endless sequence; each epoch is a permutation of them."""
    epoch, index = divmod(position, count)
    return int(_order(epoch, count, seed)[index])


@lru_cache(4)
def _order(epoch: int, count: int, seed: int) -> Tensor:
    return torch.randperm(count, generator=torch.Generator().manual_seed(mix(seed, epoch)))
