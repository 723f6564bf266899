"""Coordinated learning rates for transformers' Trainer and what derives from it, trl's SFTTrainer among them:

    from equipoise.hosts.coordination import coordinated

    trainer = coordinated(SFTTrainer)(model=model, args=args, train_dataset=data, coordinator="commit_clr")
    trainer.train()

The components are `encoder` and `language` by the model's architecture, or by patterns of one's own. Trainer mixes
everything in two parameter groups; here each component gets groups of its own, which is what rates by component need.
CoMMIT's regulariser wants further backward passes, which Trainer does not make: that is the pipeline's.
"""

import json
import os
from collections.abc import Mapping, Sequence
from inspect import signature
from pathlib import Path
from typing import Any

import torch
from safetensors import safe_open
from safetensors.torch import save_file
from torch import Tensor, nn
from transformers import TrainerCallback
from transformers.trainer_utils import get_last_checkpoint

from equipoise import registry
from equipoise.coordination.balance import Prediction, measure, sides, undisturbed
from equipoise.coordination.components import architecture, partition
from equipoise.coordination.coordinator import Coordinator
from equipoise.errors import InputError

IGNORED = -100  # the label of a token that is no answer's
STATE = "coordination.safetensors"  # in a checkpoint: the coordinator's tensors, and all else of its state as JSON


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
            if self.lr_scheduler is not None:  # it counts the parameter groups that it was made with
                raise InputError(
                    "optimizers: a scheduler of your own does not fit parameter groups that are split by component. "
                    "Give (optimizer, None), and the schedule as lr_scheduler_type in TrainingArguments."
                )
            if isinstance(coordinator, str):
                coordinator = registry.load("coordinators", coordinator)()
            assert isinstance(coordinator, Coordinator)
            if any(coordinator.weight(step) for step in range(10_000)):
                raise InputError(
                    "coordinator: a regularizer needs further backward passes, which a Trainer does not make. Use "
                    "commit_clr, or the pipeline instruction_tuning."
                )
            self.coordination = Coordination(coordinator, find_components(self.model, components))
            self.add_callback(self.coordination)

        def create_optimizer(self, *args: Any, **kwargs: Any) -> Any:
            made = super().create_optimizer(*args, **kwargs)
            split_groups(self.optimizer, self.coordination.components)
            return made

        def train(self, resume_from_checkpoint: str | bool | None = None, *args: Any, **kwargs: Any) -> Any:
            found = resume_from_checkpoint
            if found is True:
                found = get_last_checkpoint(self.args.output_dir)
            if found and not Path(found, STATE).is_file():
                raise InputError(
                    f"resume_from_checkpoint: {found} has no {STATE}, so that no coordinated trainer wrote it, and its "
                    "optimizer's parameter groups are others. Load its weights into the model, and begin anew."
                )
            self.coordination.resumed = Path(found) if found else None
            return super().train(resume_from_checkpoint, *args, **kwargs)

        def compute_loss(self, model: nn.Module, inputs: dict[str, Any], *args: Any, **kwargs: Any) -> Any:
            if model.training:
                self.coordination.batch = dict(inputs)  # some trainers take things out of it, or put some in
            return super().compute_loss(model, inputs, *args, **kwargs)

        def log(self, logs: dict[str, Any], *args: Any, **kwargs: Any) -> None:
            measured = {name: value for name, value in self.coordination.measured.items() if value == value}
            super().log({**logs, **measured} if "loss" in logs else logs, *args, **kwargs)

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
        names = [name for name, _ in model.named_parameters()]
        known = architecture(kind, names)
        found: dict[str, dict[str, Tensor]] = {name: {} for name in known.components(names)}
        for name, tensor in trained.items():
            found[known.component(name)][name] = tensor
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


class Coordination(TrainerCallback):
    """Sets the components' rates before each step, and measures κ after those that need it, on the step's last batch.

    With accumulated batches, that is the last of them; with several processes, each process's, averaged. Saved in the
    Trainer's checkpoints and resumed from there.
    """

    def __init__(self, coordinator: Coordinator, components: Mapping[str, Sequence[Tensor]]):
        self.coordinator, self.components = coordinator, components
        self.measured: dict[str, float] = {}  # what was measured last, for the log
        self.batch: dict[str, Any] = {}  # what the model was trained on last
        self.resumed: Path | None = None  # the checkpoint that training begins from
        self._before: dict[str, list[Tensor]] = {}
        self._rates: list[float] = []

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resumed:
            self.coordinator.load_state_dict(_load(self.resumed / STATE))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            _save(self.coordinator.state_dict(), folder / STATE)

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
            self.measured[f"rate_{group['component']}"] = group["lr"]
            group["lr"] = rate  # the schedule goes on from its own
        if self._before:
            self.measured |= self.coordinator.observe(state.global_step, self._measure(kwargs["model"]))
            self._before = {}
        self.coordinator.stepped(self.components, state.global_step, state.max_steps)

    def _measure(self, model: nn.Module) -> Any:
        if "labels" not in self.batch:
            raise InputError(
                "coordinator: the batches have no labels, by which the answers' tokens are known. Use a data collator "
                "that gives them, or the coordinator constant."
            )
        mask = self.batch["labels"][:, 1:] != IGNORED
        inputs = {name: value for name, value in self.batch.items() if name != "labels"}
        positions = mask.any(dim=0).nonzero()[:, 0]  # logits of all tokens would be the largest tensor of a step
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if "logits_to_keep" in signature(type(plain).forward).parameters:
            inputs["logits_to_keep"] = positions

        def predict() -> Prediction:
            logits = model(**inputs).logits
            if "logits_to_keep" not in inputs:
                logits = logits[:, positions]
            return Prediction(logits[mask[:, positions]], mask.nonzero()[:, 0])

        with undisturbed(model):
            return measure(predict, self.components, self._before, self.coordinator.metric)


def _bare(optimizer: Any) -> torch.optim.Optimizer:
    return getattr(optimizer, "optimizer", optimizer)  # accelerate's wrapper


def _save(state: Mapping[str, Any], file: Path) -> None:
    tensors, plain = {}, {}
    for name, value in state.items():
        several = value if isinstance(value, list) else [value]
        if several and all(isinstance(one, Tensor) for one in several):
            # the list's length tells one tensor from a list of one
            plain[name] = {"tensors": len(value) if isinstance(value, list) else None}
            tensors |= {f"{name}.{index}": one.contiguous() for index, one in enumerate(several)}
        else:
            plain[name] = {"value": value}
    part = file.with_suffix(".part")
    save_file(tensors, part, {"state": json.dumps(plain)})
    os.replace(part, file)


def _load(file: Path) -> dict[str, Any]:
    with safe_open(file, "pt") as inside:
        state = json.loads(inside.metadata()["state"])
        for name, kept in state.items():
            if "value" in kept:
                state[name] = kept["value"]
            elif kept["tensors"] is None:
                state[name] = inside.get_tensor(f"{name}.0")
            else:
                state[name] = [inside.get_tensor(f"{name}.{index}") for index in range(kept["tensors"])]
    return state
