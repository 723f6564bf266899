"""Coordinated learning rates for transformers' Trainer and what derives from it, trl's SFTTrainer among them:

    from equipoise.hosts.coordination import coordinated

    trainer = coordinated(SFTTrainer)(model=model, args=args, train_dataset=data, coordinator="commit_clr")
    trainer.train()

The components are `encoder` and `language` by the model's architecture, or by patterns of one's own. Trainer mixes
everything in two parameter groups; here each component gets groups of its own, which is what rates by component need.
The model is asked again for what it was asked in training, whatever a trainer puts between a batch and its model.
CoMMIT's regulariser wants further backward passes, which Trainer does not make: that is the pipeline's.
"""

import json
import os
from collections.abc import Iterator, Mapping, Sequence
from contextlib import ExitStack, contextmanager
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
from equipoise.coordination.balance import (
    Balance,
    Prediction,
    measure,
    normalized_gradients,
    sides,
    undisturbed,
)
from equipoise.coordination.components import architecture, partition
from equipoise.coordination.coordinator import Coordinator
from equipoise.coordination.norms import IGNORED, with_norms
from equipoise.coordination.sides import Watch, resting
from equipoise.errors import InputError, UnknownNameError
from equipoise.hosts.choice import report
from equipoise.options import read_options

STATE = "coordination.safetensors"  # in a checkpoint: the coordinator's tensors, and all else of its state as JSON


def coordinated(trainer: type, default: str | Coordinator = "commit_clr") -> type:
    """A subclass of a Trainer class with two keyword arguments more.

    Args:
        trainer: transformers.Trainer, trl.SFTTrainer or another that derives from it.
        default: The coordinator where the constructor is given none, for programs that make the trainer themselves.

    Its constructor's arguments: `coordinator`, a name (`equipoise list coordinators`) or a Coordinator, and
    `components`, patterns of parameter names by component where the architecture's own are not wanted.
    """

    class Coordinated(trainer):
        def __init__(
            self,
            *args: Any,
            coordinator: str | Coordinator = default,
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
            if not model.training:
                return super().compute_loss(model, inputs, *args, **kwargs)
            with self.coordination.watching(model, inputs):
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
        known = architecture(kind, names, model=model)
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
        self.batch: dict[str, Any] = {}  # what the model was asked last in training, and the labels
        self.resumed: Path | None = None  # the checkpoint that training begins from
        self.watch = Watch()
        self._before: dict[str, list[Tensor]] = {}
        self._rates: list[float] = []
        self._resting = ExitStack()

    @contextmanager
    def watching(self, model: nn.Module, inputs: Mapping[str, Any]) -> Iterator[None]:
        """Keeps what the model is asked within the block, and the labels: a trainer may take things out of its batch
        that are no model's, or have the model compute the loss in a way of its own."""
        self.batch = dict(inputs)

        def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
            if not args:
                self.batch = {n: v for n, v in self.batch.items() if n in kwargs or n == "labels"}

        # before those hooks that make something else of it, such as ms-swift's, which encodes the pictures there
        hook = model.register_forward_pre_hook(keep, with_kwargs=True, prepend=True)
        try:
            yield
        finally:
            hook.remove()

    def on_train_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if self.resumed:
            self.coordinator.load_state_dict(_load(self.resumed / STATE))

    def on_save(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        folder = Path(args.output_dir) / f"checkpoint-{state.global_step}"
        if args.should_save and folder.is_dir():
            _save(self.coordinator.state_dict(), folder / STATE)

    def on_step_begin(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        if args.world_size == 1:  # DistributedDataParallel waits for the gradients of all that it began with
            self._resting.enter_context(resting(self.components, self._factors()))

    def on_pre_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer, factors = _bare(kwargs["optimizer"]), self._factors()
        self._rates = [group["lr"] for group in optimizer.param_groups]
        for group in optimizer.param_groups:
            group["lr"] = group["lr"] * factors.get(group["component"], 1.0)
        for tensor in (t for name, factor in factors.items() if factor == 0 for t in self.components[name]):
            tensor.grad = None
        if self.coordinator.measures(state.global_step):
            found = normalized_gradients(self.components)
            self.measured |= {f"gradient_{name}": value for name, value in found.items()}
            self._before = {n: [t.detach().clone() for t in tensors] for n, tensors in self.components.items()}

    def on_optimizer_step(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        optimizer = _bare(kwargs["optimizer"])
        for group, rate in zip(optimizer.param_groups, self._rates, strict=True):
            self.measured[f"rate_{group['component']}"] = group["lr"]
            group["lr"] = rate  # the schedule goes on from its own
        if self._before:
            balance = self._measure(kwargs["model"])
            self.measured |= self.coordinator.observe(state.global_step, balance)
            self._before = {}
            gradients = {name: self.measured[f"gradient_{name}"] for name in self.components}
            if all(self._factors().values()) and (words := self.watch.observe(balance, gradients)):
                if state.is_world_process_zero:
                    report(words)
        self._resting.close()
        self.coordinator.stepped(self.components, state.global_step, state.max_steps)

    def on_train_end(self, args: Any, state: Any, control: Any, **kwargs: Any) -> None:
        self._resting.close()

    def _factors(self) -> dict[str, float]:
        return self.coordinator.factors(list(self.components))

    def _measure(self, model: nn.Module) -> Balance:
        batch = whole_labels(self.batch)
        mask = batch["labels"][:, 1:] != IGNORED
        inputs = {name: value for name, value in batch.items() if name not in ("labels", "logits_to_keep")}
        positions = mask.any(dim=0).nonzero()[:, 0]  # logits of all tokens would be the largest tensor of a step
        plain: Any = model.get_base_model() if hasattr(model, "get_base_model") else model  # type: ignore[operator]
        if "logits_to_keep" in signature(type(plain).forward).parameters:
            inputs["logits_to_keep"] = positions
        embeddings: list[Tensor] = []

        def predict() -> Prediction:
            embeddings.clear()
            logits = model(**inputs).logits
            if "logits_to_keep" not in inputs:
                logits = logits[:, positions]
            found = Prediction(logits[mask[:, positions]], mask.nonzero()[:, 0])
            return with_norms(found, batch, embeddings[0] if embeddings else None, plain.config)

        with undisturbed(model), _embedded(model, embeddings):
            chosen = self.coordinator
            return measure(predict, self.components, self._before, chosen.metric, each=chosen.each)


@contextmanager
def _embedded(model: nn.Module, found: list[Tensor]) -> Iterator[None]:
    """Appends to `found` what the language model is given in the block."""

    def keep(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if isinstance(given := kwargs.get("inputs_embeds"), Tensor):
            found.append(given.detach())

    names = ("language_model", "text_model")
    decoders = [module for name, module in model.named_modules() if name.split(".")[-1] in names]
    hooks = [module.register_forward_pre_hook(keep, with_kwargs=True) for module in decoders[:1]]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()


def whole_labels(batch: Mapping[str, Any]) -> dict[str, Any]:
    """The batch with labels of every token, where a trainer has cut them down to those whose logits it asks for.

    Such a trainer, ms-swift's among them, gives the model `logits_to_keep`, a count from the end, a mask or positions,
    and the labels at the same positions. Each token's logits are about the next label.

    Raises:
        InputError: There are no labels, or they fit neither the tokens nor the logits that are kept.
    """
    labels = batch.get("labels")
    if not isinstance(labels, Tensor):
        raise InputError(
            "coordinator: the batches have no labels, by which the answers' tokens are known. Use a data collator "
            "that gives them, or the coordinator constant."
        )
    tokens = next(batch[name] for name in ("input_ids", "inputs_embeds", "attention_mask") if name in batch)
    length, kept = tokens.shape[1], batch.get("logits_to_keep")
    if labels.shape[1] == length:
        return dict(batch)
    if isinstance(kept, int):
        kept = torch.arange(length - kept, length, device=labels.device)
    elif isinstance(kept, Tensor) and kept.dtype == torch.bool:
        kept = kept.nonzero()[:, 0]
    if not isinstance(kept, Tensor) or len(kept) != labels.shape[1]:
        about = "no logits_to_keep" if kept is None else "another logits_to_keep"
        raise InputError(
            f"coordinator: the batches have labels of {labels.shape[1]} tokens where the model is given {length}, with "
            f"{about}, so that the answers' tokens are not known. Use labels as long as input_ids."
        )
    whole = labels.new_full((len(labels), length), IGNORED)
    whole[:, kept[:-1] + 1] = labels[:, 1:]
    return {**batch, "labels": whole}


def make_coordinator(name: str, given: Mapping[str, Any], called: str) -> Coordinator:
    """A coordinator by name with options as a user wrote them.

    Args:
        called: Where they were written: errors say so.

    Raises:
        InputError: No such coordinator, or an option that it does not have.
    """
    try:
        cls = registry.load("coordinators", name)
    except UnknownNameError as error:
        raise InputError(f"{called}: {error}") from None
    options, problems = read_options(cls, given)
    if problems:
        raise InputError(f"{called}: {name}: {' '.join(problems)}")
    return cls(**options)


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
