"""Coordinated learning rates for transformers' Trainer and what derives from it, trl's SFTTrainer among them:

    from equipoise.hosts.coordination import coordinated

    trainer = coordinated(SFTTrainer)(model=model, args=args, train_dataset=data, coordinator="commit_clr")
    trainer.train()

The components are `encoder` and `language` by the model's architecture, or by patterns of one's own. Trainer mixes
everything in two parameter groups; here each component gets groups of its own, which is what rates by component need.
CoMMIT's regulariser wants further backward passes, which Trainer has no place for: that is the pipeline's.
"""

from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_callback import ExportableState

from equipoise import registry
from equipoise.coordination.balance import LANGUAGE, Prediction, measure, sides, undisturbed
from equipoise.coordination.components import architecture, partition, preset
from equipoise.coordination.coordinator import Coordinator
from equipoise.errors import InputError

IGNORED = -100  # the label of a token that is no answer's


def coordinated(trainer: type) -> type:
    """A subclass of a Trainer class with two keyword arguments more.

    Args:
        trainer: transformers.Trainer, trl.SFTTrainer or another that derives from it.

    Its constructor's arguments: `coordinator`, a name (`equipoise list coordinators`) or a Coordinator, and
    `components`, patterns of parameter names by component where the architecture's own are not wanted.
    """

    class Coordinated(trainer):
        def __init__(
            self,
            *args: Any,
            coordinator: str | Coordinator = "commit_clr",
            components: Mapping[str, Sequence[str]] | None = None,
            **kwargs: Any,
        ):
            super().__init__(*args, **kwargs)
            if isinstance(coordinator, str):
                coordinator = registry.load("coordinators", coordinator)()
            assert isinstance(coordinator, Coordinator)
            if any(coordinator.weight(step) for step in range(10_000)):
                raise InputError(
                    "coordinator: a regularizer needs further backward passes, which a Trainer has no place for. Use "
                    "commit_clr, or the pipeline instruction_tuning."
                )
            self.coordination = Coordination(coordinator, find_components(self.model, components))
            self.add_callback(self.coordination)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            made = super().create_optimizer(*args, **kwargs)
            split_groups(self.optimizer, self.coordination.components)
            return made

        def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            seen = {name: value for name, value in self.coordination.seen.items() if value == value}
            super().log({**logs, **seen} if "loss" in logs else logs, *args, **kwargs)

    Coordinated.__name__ = Coordinated.__qualname__ = f"Coordinated{trainer.__name__}"
    return Coordinated


def find_components(
    model: nn.Module, patterns: Mapping[str, Sequence[str]] | None = None
) -> dict[str, list[nn.Parameter]]:
    """What is trained of a model, by component.

    Raises:
        InputError: parameters in no component or in several, or only one side is trained.
    """
    trained = {name: tensor for name, tensor in model.named_parameters() if tensor.requires_grad}
    if patterns is None:
        kind = getattr(getattr(model, "config", None), "model_type", type(model).__name__)
        known = architecture(kind, [name for name, _ in model.named_parameters()])
        found: dict[str, dict[str, Tensor]] = {name: {} for name in preset(known)}
        for name, tensor in trained.items():
            found[LANGUAGE if known.part(name) == LANGUAGE else "encoder"][name] = tensor
    else:
        found = partition(trained, patterns)
    components: Any = {name: list(inside.values()) for name, inside in found.items()}
    sides({name: tensors for name, tensors in components.items() if tensors})
    return components


def split_groups(optimizer: torch.optim.Optimizer, components: Mapping[str, Sequence[Tensor]]) -> None:
    """Splits each parameter group by component, in place and before the first step; options are kept."""
    owner = {id(tensor): name for name, tensors in components.items() for tensor in tensors}
    groups = []
    for group in optimizer.param_groups:
        for name in components:
            inside = [tensor for tensor in group["params"] if owner.get(id(tensor)) == name]
            if inside:
                groups.append({**group, "params": inside, "component": name})
        if rest := [tensor for tensor in group["params"] if id(tensor) not in owner]:
            groups.append({**group, "params": rest, "component": "other"})
    optimizer.param_groups[:] = groups


class Coordination(TrainerCallback, ExportableState):
    """Sets the components' rates before each step, and measures κ after those that need it, on the step's last batch.

    With accumulated batches, that is the last of them. Saved with the Trainer's own state and resumed from there.
    """

    def __init__(self, coordinator: Coordinator, components: Mapping[str, Sequence[Tensor]]):
        self.coordinator, self.components = coordinator, components
        self.seen: dict[str, float] = {}  # what was measured last, for the log
        self._batch: dict[str, Any] = {}
        self._before: dict[str, list[Tensor]] = {}
        self._rates: list[float] = []
        self._hook: Any = None

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        def catch(module: nn.Module, positional: tuple, given: dict[str, Any]) -> None:
            if module.training and "labels" in given:
                self._batch = given

        saved = state.stateful_callbacks.get(type(self).__name__, {}).get("attributes", {})
        if saved and state.global_step:
            self.coordinator.load_state_dict(saved["coordinator"])
        self._hook = kwargs["model"].register_forward_pre_hook(catch, with_kwargs=True)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._hook.remove()

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = _bare(kwargs["optimizer"])
        named = [group["component"] for group in optimizer.param_groups]
        factors = self.coordinator.factors([name for name in named if name != "other"])
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factors.get(group["component"], 1.0)
        if self.coordinator.measures(state.global_step):
            self._before = {n: [t.detach().clone() for t in tensors] for n, tensors in self.components.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = _bare(kwargs["optimizer"])
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            self.seen[f"rate_{group['component']}"] = group["lr"]
            group["lr"] = rate  # the schedule goes on from its own
        if self._before:
            self.seen |= self.coordinator.observe(state.global_step, self._measure(kwargs["model"]))
            self._before = {}
        self.coordinator.stepped(self.components, state.global_step, state.max_steps)

    def state(self) -> dict[str, Any]:
        # trainer_state.json holds no tensors: coordinate descent's window begins anew after a resume
        plain = {name: value for name, value in self.coordinator.state_dict().items() if name != "then"}
        return {"args": {}, "attributes": {"coordinator": plain}}

    def _measure(self, model: nn.Module) -> Any:
        labels = self._batch["labels"][:, 1:]
        inputs = {name: value for name, value in self._batch.items() if name not in ("labels", "num_items_in_batch")}
        mask = labels != IGNORED

        def predict() -> Prediction:
            logits = model(**inputs).logits[:, :-1]
            return Prediction(logits[mask], mask.nonzero()[:, 0])

        with undisturbed(model):
            return measure(predict, self.components, self._before, self.coordinator.metric)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper
