"""The configuration of text-to-image tuning, section by section; its face is the YAML in configs/text_to_image."""

# pydantic's sections are complete without arguments; pyright misses defaults that Field takes by position.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Any, ClassVar, Literal

from pydantic import Field

from equipoise.pipelines.records import PluginSection, RunConfig, Section
from equipoise.pipelines.sections import (
    SHORT_NAMES,
    CheckpointSection,
    CoordinatorSection,
    ObjectiveSection,
    Rate,
    ScheduleSection,
)


class ModelSection(Section):
    path: str = Field(
        "demo",
        description="Stable Diffusion 1, 2 or XL in diffusers' layout: a folder, a hub id, or `demo`, the embedded one",
    )
    revision: str | None = Field(None, description="the hub revision (branch, tag or commit)")
    variant: str | None = Field(None, description="the weights' variant, such as fp16")


class DataSection(Section):
    folder: str = Field(
        "demo",
        description="pictures, captioned in metadata.jsonl, metadata.csv or .txt files; `demo` draws six of an object",
    )
    instance_prompt: str | None = Field(
        None, description="one caption for all pictures; captions in the folder are then not read"
    )
    resolution: int = Field(
        512, ge=16, le=4096, multiple_of=8, description="pixels, the side of the square that pictures are cut to"
    )
    crop: Literal["center", "random"] = Field("center", description="random keeps four different cuts of every picture")
    flip: bool = Field(False, description="mirror half of the pictures, left to right")


class LoraSection(Section):
    rank: int = Field(4, ge=1, le=1024, description="r of the factors A (r, n) and B (m, r)")
    alpha: Rate | None = Field(None, description="the update is scaled by alpha / rank; empty means equal to rank")
    dropout: float = Field(0.0, ge=0, lt=1, description="share of the LoRA's inputs dropped while training")
    targets: list[str] = Field(
        ["to_q", "to_k", "to_v", "to_out.0"], min_length=1, description="U-Net layers that get factors"
    )
    start: str | None = Field(
        None, description="a LoRA file to go on from, in diffusers', kohya's or ComfyUI's names; empty starts afresh"
    )
    text_encoder: bool = Field(False, description="tune the text encoder too")
    text_encoder_targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "out_proj"], min_length=1, description="text-encoder layers that get factors"
    )


class OptimizerSection(PluginSection):
    KIND = "optimizers"
    OWN: ClassVar[dict[str, str]] = {"lr": "learning_rate"}

    name: str = Field("scaled_adamw", description="`equipoise list optimizers` shows all; torch.optim's names work too")
    learning_rate: Rate = Field(1e-4, description="per step")
    text_encoder_learning_rate: Rate | None = Field(
        None, description="of the text encoder's factors; empty means learning_rate"
    )
    options: dict[str, Any] = Field({}, description="the optimizer's own options; `equipoise show NAME` lists them")


class TrainSection(Section):
    steps: int = Field(500, ge=1, description="optimizer steps")
    batch: int = Field(4, ge=1, description="pictures per device and forward pass")
    accumulate: int = Field(1, ge=1, description="forward passes per optimizer step")
    clip: float = Field(1.0, ge=0, description="largest norm of the gradient; 0 clips nothing")
    precision: Literal["no", "fp16", "bf16"] = Field(
        "no", description="of the frozen base and the forward pass; the factors stay float32"
    )
    gradient_checkpointing: bool = Field(False, description="less memory, about a third slower")


class SamplesSection(Section):
    prompts: list[str] = Field([], description="what to generate, while training and for comparison")
    negative: str = Field("", description="negative prompt")
    count: int = Field(1, ge=1, le=64, description="pictures per prompt, each from its own fixed noise")
    seed: int = Field(0, ge=0, description="of the noise: equal seeds give equal noise in every run")
    every: int = Field(0, ge=0, description="steps between samples while training; 0 samples only at the end")
    steps: int = Field(50, ge=1, le=1000, description="denoising steps")
    guidance: float = Field(7.0, ge=0, description="classifier-free guidance scale")
    scale: float = Field(1.0, ge=0, description="of the LoRA when generating (fusion coefficient)")
    batch: int = Field(8, ge=1, description="pictures generated at a time")


class TextToImageConfig(RunConfig):
    SHORT: ClassVar[dict[str, str]] = {
        "model": "model.path",
        "data": "data.folder",
        "steps": "train.steps",
        "batch": "train.batch",
        "rank": "lora.rank",
        "alpha": "lora.alpha",
        **SHORT_NAMES,
    }

    pipeline: Literal["text_to_image"] = Field("text_to_image", description="the pipeline this configuration is for")
    model: ModelSection = Field(default_factory=ModelSection)
    data: DataSection = Field(default_factory=DataSection)
    lora: LoraSection = Field(default_factory=LoraSection)
    optimizer: OptimizerSection = Field(default_factory=OptimizerSection)
    objective: ObjectiveSection = Field(default_factory=ObjectiveSection)
    coordinator: CoordinatorSection = Field(default_factory=CoordinatorSection)
    schedule: ScheduleSection = Field(default_factory=ScheduleSection)
    train: TrainSection = Field(default_factory=TrainSection)
    samples: SamplesSection = Field(default_factory=SamplesSection)
    checkpoint: CheckpointSection = Field(default_factory=CheckpointSection)
