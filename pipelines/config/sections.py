"""What the configuration of every training has, `TrainConfig`, section by section; pipelines add their own keys.

A section of a pipeline's own is a subclass. It gives a shared key another default in one line (`steps: Steps = 1000`),
and the key's help and bounds stay those that stand here.
"""

# pydantic's sections are complete without arguments; pyright misses defaults that Field takes by position.
# pyright: reportCallIssue=false, reportArgumentType=false

import math
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, ValidationInfo, field_serializer, field_validator, model_validator

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines.config.keys import Follows, Replaceable
from equipoise.pipelines.config.records import PluginSection, RunConfig, Section

Rate = Annotated[float, Field(gt=0, allow_inf_nan=False)]
Schedule = Literal[
    "constant",
    "constant_with_warmup",
    "linear",
    "cosine",
    "cosine_with_restarts",
    "polynomial",
    "piecewise_constant",
    "inverse_sqrt",
]

# The schedules that read each option; to any other it would do nothing.
READ_BY = {
    "warmup": ("constant_with_warmup", "linear", "cosine", "cosine_with_restarts", "polynomial", "inverse_sqrt"),
    "cycles": ("cosine", "cosine_with_restarts"),
    "power": ("polynomial",),
    "rules": ("piecewise_constant",),
}


# The keys of the sections below whose default is a pipeline's own.
OptimizerName = Annotated[
    str, Field(description="The optimizer: `equipoise list optimizers` shows all, and torch.optim's names work too.")
]
LearningRate = Annotated[
    Rate,
    Field(description="The learning rate, per step; empty: the optimizer's own, or else the default."),
    Follows(),
]
Steps = Annotated[int, Field(ge=1, description="How many steps the optimizer takes."), Replaceable()]
Batch = Annotated[int, Field(ge=1, description="Examples of each process in a forward pass.")]
Clip = Annotated[float, Field(ge=0, description="The gradient's norm is cut to this; 0 cuts nothing.")]
Precision = Annotated[
    Literal["no", "fp16", "bf16"],
    Field(description="The format of frozen weights and of the forward pass; trained weights stay float32."),
]
GradientCheckpointing = Annotated[bool, Field(description="Takes less memory, and is about a third slower.")]

# Keys of the section below → the attribute of an optimizer's class that says what an empty one means: docs/plugins.md.
OWN_RATES = {"learning_rate": "default_lr", "outside_learning_rate": "default_outside_lr"}


class OptimizerSection(PluginSection):
    KIND = "optimizers"
    OWN: ClassVar[dict[str, str]] = {"lr": "learning_rate"}

    name: OptimizerName = "adamw"
    learning_rate: LearningRate = 1e-4  # the default where the optimizer has none of its own either
    outside_learning_rate: Rate | None = Field(
        None,
        description="The learning rate of weights in no LoRA pair that have none of their own; empty: learning_rate, "
        "or where that is empty too, the optimizer's own.",
    )
    options: dict[str, Any] = Field({}, description="The optimizer's own options; `equipoise show NAME` lists them.")

    @property
    def left_empty(self) -> frozenset[str]:
        return frozenset(OWN_RATES) - self.model_fields_set

    @model_validator(mode="before")
    @classmethod
    def _without_empty(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        return {key: value for key, value in given.items() if value is not None or key not in OWN_RATES}

    @model_validator(mode="after")
    def _follows_the_optimizer(self) -> "OptimizerSection":
        if "learning_rate" in self.left_empty and (optimizer := self.plugin()):
            for key, rate in own_rates(self.name, optimizer).items():
                if key in self.left_empty:
                    object.__setattr__(self, key, rate)  # not as a value that was given
        return self


def own_rates(name: str, optimizer: Any) -> dict[str, float]:
    """The learning rates that an optimizer's class says it wants where none is given, by the section's keys.

    Raises:
        ValueError: what it says is none.
    """
    found = {key: getattr(optimizer, attribute, None) for key, attribute in OWN_RATES.items()}
    for key, rate in found.items():
        if rate is not None and not (isinstance(rate, int | float) and 0 < rate < math.inf):
            raise ValueError(f"{name} cannot be used: its {OWN_RATES[key]} must be a number above 0, got {rate!r}.")
    return {key: float(rate) for key, rate in found.items() if rate is not None}


class ScheduleSection(Section):
    name: Schedule = Field("constant", description="How the learning rate changes over the steps.")
    warmup: int = Field(0, ge=0, description="The steps of linear warm-up from 0.")
    cycles: float = Field(
        1,
        gt=0,
        description="For cosine: half waves, 1 falls to 0 once; for cosine_with_restarts: the falls to 0.",
    )
    power: float = Field(1.0, gt=0, description="For polynomial: the exponent of the fall to 0.")
    rules: str | None = Field(
        None, description="For piecewise_constant: factor:until step, …, last factor, such as 1:100,0.1:200,0.01."
    )

    @field_validator(*READ_BY)
    @classmethod
    def _read(cls, given: Any, info: ValidationInfo) -> Any:
        field, name = str(info.field_name), info.data.get("name")
        if name and given != cls.model_fields[field].default and name not in READ_BY[field]:
            raise ValueError(f"has no effect on the schedule {name}, only on {' and '.join(READ_BY[field])}.")
        return given

    @field_validator("cycles")
    @classmethod
    def _whole(cls, cycles: float, info: ValidationInfo) -> float:
        if info.data.get("name") == "cosine_with_restarts" and cycles % 1:
            raise ValueError(f"must be a whole number for cosine_with_restarts, got {cycles:g}.")
        return cycles

    @field_validator("rules")
    @classmethod
    def _readable(cls, rules: str | None, info: ValidationInfo) -> str | None:
        if info.data.get("name") != "piecewise_constant":
            return rules
        if not rules:
            raise ValueError("piecewise_constant needs schedule.rules, such as 1:100,0.1:200,0.01.")
        try:
            *parts, last = rules.split(",")
            pairs = [part.split(":") for part in parts]
            factors, ends = [float(factor) for factor, _ in pairs] + [float(last)], [int(end) for _, end in pairs]
            good = all(0 <= factor < math.inf for factor in factors) and ends == sorted({0, *ends})[1:]
        except ValueError:
            good = False
        if not good:
            raise ValueError(
                "must be factor:until step, … with rising steps, and a last factor, such as 1:100,0.1:200,0.01, "
                f"got {rules}."
            )
        return rules


class ObjectiveSection(PluginSection):
    KIND = "objectives"

    name: str = Field(
        "joint", description="What turns the losses into gradients; `equipoise list objectives` shows all."
    )


class CoordinatorSection(PluginSection):
    KIND = "coordinators"

    name: str = Field("constant", description="What balances learning rates; `equipoise list coordinators` shows all.")


class CheckpointSection(Section):
    every: int = Field(250, ge=0, description="The steps between checkpoints; 0 keeps none but the one at a stop.")
    keep: int = Field(2, ge=1, description="How many of the newest checkpoints are kept.")


class TrainSection(Section):
    steps: Steps = 500
    epochs: Rate | None = Field(
        None, description="How often every example is trained on, in place of steps, which are then left empty."
    )
    batch: Batch = 4
    accumulate: int = Field(1, ge=1, description="Forward passes of each step, whose gradients add up.")
    clip: Clip = 1.0
    precision: Precision = "no"

    @field_serializer("steps")
    def _steps_given(self, steps: int) -> int | None:
        return steps if self.epochs is None else None

    @model_validator(mode="before")
    @classmethod
    def _steps_or_epochs(cls, given: Any) -> Any:
        if not isinstance(given, Mapping):
            return given
        if given.get("steps") is not None and given.get("epochs") is not None:
            raise ValueError("steps and epochs are both given. Leave one of them empty: steps= or epochs=.")
        return {key: value for key, value in given.items() if key != "steps" or value is not None}


class ValidatedTrainSection(TrainSection):
    """That of a training which can look at held-out examples on its way: `equipoise.pipelines.training.validation`."""

    validate_every: int = Field(
        0, ge=0, description="The steps between validations on the same held-out examples; 0: none before the end."
    )
    patience: int = Field(0, ge=0, description="Ends after so many validations without a better loss; 0: never.")
    keep: Literal["best", "last"] = Field(
        "last", description="The weights of the result: the best by validation loss, or the last."
    )

    @model_validator(mode="after")
    def _validates(self) -> "ValidatedTrainSection":
        if not self.validate_every and (self.patience or self.keep == "best"):
            what = "patience counts" if self.patience else "keep: best chooses by"
            raise ValueError(f"{what} validations, and there are none. Give validate_every, the steps between them.")
        return self


class SamplesSection(Section):
    prompts: list[str] = Field([], description="What to generate, while training and for comparison.")
    count: int = Field(1, ge=1, description="How many to generate.")
    every: int = Field(0, ge=0, description="Steps between samples while training; 0 samples only at the end.")


Tracker = Literal["tensorboard", "wandb"]
_SHARED = ("optimizer", "objective", "coordinator", "schedule", "train", "samples", "checkpoint", "trackers")


class TrainConfig(RunConfig):
    """What every pipeline's configuration has that trains in `equipoise.pipelines.training.loop.train_loop`.

    A subclass adds sections of its own, which come before these in files, forms and help, and may give a section more
    keys, or other defaults, by a subclass of it: `train: MyTrainSection = Field(default_factory=MyTrainSection)`.
    """

    SHORT: ClassVar[dict[str, str]] = {
        "steps": "train.steps",
        "epochs": "train.epochs",
        "batch": "train.batch",
        "learning_rate": "optimizer.learning_rate",
        "optimizer": "optimizer.name",
        "objective": "objective.name",
        "coordinator": "coordinator.name",
        "schedule": "schedule.name",
        "checkpoint_every": "checkpoint.every",
    }
    RESUMABLE: ClassVar[tuple[str, ...]] = ("train.steps", "train.batch", "checkpoint")

    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    coordinator: CoordinatorSection = Field(default_factory=CoordinatorSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection = Field(default_factory=TrainSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
    trackers: list[Tracker] = Field(
        [],
        description="Trackers that get metrics and samples too: tensorboard, in the run's folder, or wandb, a service; "
        "empty: none.",
    )

    @property
    def total_steps(self) -> int:
        return self.train.steps

    @property
    def sample_every(self) -> int:
        """Steps between samples while training; 0 for none."""
        return 0

    @classmethod
    def __pydantic_init_subclass__(cls, **kwargs: Any) -> None:
        super().__pydantic_init_subclass__(**kwargs)
        for name in _SHARED:
            if name in cls.model_fields:  # inherited ones would stand first
                cls.model_fields[name] = cls.model_fields.pop(name)
        cls.model_rebuild(force=True)


class SamplingConfig(TrainConfig):
    """That of a training which shows samples on its way, in its work's `sample`."""

    RESUMABLE: ClassVar[tuple[str, ...]] = (*TrainConfig.RESUMABLE, "samples")

    samples: SamplesSection = Field(default_factory=SamplesSection)

    @property
    def sample_every(self) -> int:
        return self.samples.every


def objective_problems(config: TrainConfig, modalities: Sequence[str] = (), baselines: Sequence[str] = ()) -> list[str]:
    """What is wrong with the objective, and with those trained beside it, for a pipeline's losses.

    Args:
        config: with a section `objective`.
        modalities: those that have losses of their own; none where a step has one loss.
        baselines: names of objectives that are trained with their own defaults, `train.baselines`.
    """
    found = []
    chosen = [("objective", config.objective.name, config.objective.options)]
    for key, name, options in chosen + [("train.baselines", name, {}) for name in baselines]:
        try:
            registry.load("objectives", name)(**options).bind({modality: [] for modality in modalities})
        except InputError as error:
            found.append(f"{key}: {name}: {error}")
    return found


def one_sided(config: TrainConfig) -> list[str]:
    """What is wrong with a coordinator of language and encoder for a pipeline that has not both."""
    name = config.coordinator.name
    if not registry.load("coordinators", name).two_sided:
        return []
    return [
        f"coordinator.name: {name} sets a language model's rate against an encoder's, and {config.pipeline} has not "
        "both. Use constant."
    ]
