"""The configuration of instruction tuning, section by section; its face is the YAML in configs/instruction_tuning."""

# pydantic's sections are complete without arguments; pyright misses defaults that Field takes by position.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import Annotated, ClassVar, Literal

from pydantic import Field, field_validator, model_validator

from equipoise.pipelines.config.records import BasePath, DataPath, LocalPath, Revision, Section
from equipoise.pipelines.config.sections import (
    Batch,
    GradientCheckpointing,
    LearningRate,
    OptimizerSection,
    Rate,
    SamplesSection,
    SamplingConfig,
    ValidatedTrainSection,
)


class InstructionTuningModel(Section):
    path: BasePath = Field(
        "demo",
        description="A multimodal language model of transformers: a folder, a hub id, or `demo`, the embedded BLIP-2.",
    )
    revision: Revision | None = Field(None, description="The revision on the hub: a branch, tag or commit.")
    quantize: Literal["nf4", "int8"] | None = Field(
        None,
        description="Holds the language model's frozen layers in 4 bits (QLoRA) or 8 bits; needs bitsandbytes.",
    )
    shard: bool = Field(
        False,
        description="Spreads the language model's frozen weights over the processes of a run (FSDP2), a share each.",
    )
    min_pixels: int | None = Field(
        None, ge=1, description="The least pixels that a picture is enlarged to; empty: as the processor has it."
    )
    max_pixels: int | None = Field(
        None, ge=1, description="The most pixels that a picture is reduced to; empty: as the processor has it."
    )

    @model_validator(mode="after")
    def _in_order(self) -> "InstructionTuningModel":
        if self.min_pixels and self.max_pixels and self.min_pixels > self.max_pixels:
            raise ValueError(f"min_pixels must not be above max_pixels, got {self.min_pixels} and {self.max_pixels}.")
        if self.shard and self.quantize:
            raise ValueError(
                f"shard is for weights as they are, and quantize is {self.quantize}. Leave one of them out."
            )
        return self


class InstructionTuningData(Section):
    file: DataPath = Field(
        "demo",
        description="Conversations: JSON, JSONL, CSV, Parquet, Arrow or WebDataset, a folder of those, hub:OWNER/NAME; "
        "or `demo`.",
    )
    more: list[LocalPath] = Field([], description="Further data sets in any of the formats, mixed with the first.")
    weights: list[Rate] = Field(
        [],
        description="How much of an epoch each data set is, the first one's first; empty: every conversation as often, "
        "which streaming cannot know.",
    )
    folder: LocalPath | None = Field(
        None, description="The folder with the pictures and sounds; empty: the file's own."
    )
    validation: LocalPath | None = Field(
        None, description="Held-out conversations in any of the formats; empty: every tenth of each data set."
    )
    fps: float | None = Field(
        1.0, gt=0, le=60, description="The frames that are taken of a second of video; empty: `frames` of every video."
    )
    frames: int = Field(16, ge=1, le=4096, description="The most frames of a video, at equal distances.")
    question: str | None = Field(None, description="What is asked of media that have a caption and no question.")
    max_tokens: int | None = Field(
        None, ge=8, description="The longest sequence, media included; a longer one is cut at its end, with a warning."
    )
    streaming: bool = Field(
        False,
        description="Reads the data set as it is trained on, some conversations at a time, as one larger than the "
        "memory needs it.",
    )
    buffer: int = Field(
        1024, ge=1, description="With streaming: the conversations that are held, and trained on in random order."
    )
    skip_bad: bool = Field(False, description="Leaves out the conversations that cannot be used, and says which.")
    prompt: str | None = Field(
        None, description="For models without a chat template: the text before an answer, with {question} in it."
    )

    @field_validator("prompt")
    @classmethod
    def _has_question(cls, prompt: str | None) -> str | None:
        if prompt is not None and "{question}" not in prompt:
            raise ValueError(f"must have {{question}} in it, got {prompt!r}.")
        return prompt

    @model_validator(mode="after")
    def _a_weight_each(self) -> "InstructionTuningData":
        if self.weights and len(self.weights) != 1 + len(self.more):
            raise ValueError(f"weights: {1 + len(self.more)} are needed, one for each data set; got {self.weights}.")
        if self.streaming and self.more and not self.weights:
            raise ValueError(
                f"weights: of {1 + len(self.more)} data sets that are streamed nobody knows how many conversations "
                "each has. Give weights, one for each, or leave streaming out."
            )
        if self.streaming and self.file == "demo":
            raise ValueError("streaming: is for data sets of one's own, and file is `demo`. Leave it out.")
        return self


class InstructionTuningEncoder(Section):
    parts: list[Literal["tower", "connector"]] = Field(
        ["connector"], min_length=1, description="The parts in front of the language model that are trained."
    )
    method: Literal["full", "lora"] = Field(
        "full", description="Trains all weights of those parts, or LoRA factors on them."
    )
    targets: list[str] = Field(
        [],
        description="The layers in those parts that get factors, by the ends of their names; empty: all linear ones.",
    )

    @model_validator(mode="after")
    def _lora_has_targets(self) -> "InstructionTuningEncoder":
        if self.targets and self.method != "lora":
            raise ValueError("targets are for LoRA factors; add method: lora.")
        return self


class InstructionTuningLanguage(Section):
    method: Literal["lora", "full", "frozen"] = Field(
        "lora", description="Trains LoRA factors on the language model, all of its weights, or nothing of it."
    )


class InstructionTuningLora(Section):
    rank: int = Field(8, ge=1, le=1024, description="The rank r of the factors A (r, n) and B (m, r).")
    alpha: Rate | None = Field(None, description="The update is scaled by alpha / rank; empty: as the rank.")
    rslora: bool = Field(False, description="Scales by alpha / √rank instead: a higher rank then learns as fast.")
    dora: bool = Field(False, description="Trains each output's size apart from its direction (DoRA), which is slower.")
    dropout: float = Field(0.0, ge=0, lt=1, description="The share of the LoRA's inputs dropped while training.")
    targets: list[str] = Field(
        [],
        description="The language model's layers that get factors, by the ends of their names; empty: all linear ones.",
    )
    modules_to_save: list[str] = Field(
        [],
        description="The language model's modules that are trained in full beside the factors, by the ends of their "
        "names, such as lm_head.",
    )


class InstructionTuningOptimizer(OptimizerSection):
    learning_rate: LearningRate = Field(
        1e-4,
        description="The learning rate, per step, of every component without a rate of its own; empty: the optimizer's "
        "own, or else the default.",
    )
    rates: dict[str, Rate] = Field({}, description="Component → its own learning rate, such as {encoder: 1e-5}.")
    weight_decays: dict[str, Annotated[float, Field(ge=0)]] = Field(
        {}, description="Component → its own weight decay, for optimizers that have one."
    )
    loraplus_lr_ratio: Rate | None = Field(
        None, description="LoRA+: the learning rate of the factors B, as a multiple of that of A; empty: the same."
    )


class InstructionTuningTrain(ValidatedTrainSection):
    batch: Batch = Field(
        4, description="Conversations of each process in a forward pass; those of similar length go together."
    )
    workers: int = Field(
        0, ge=0, le=64, description="The threads that make the next batches while a step runs; 0: none."
    )
    packing: bool = Field(
        False,
        description="Puts a batch's conversations behind each other, without attention across, into rows of up to "
        "data.max_tokens tokens, or as long as its longest.",
    )
    gradient_checkpointing: GradientCheckpointing = False


class InstructionTuningSamples(SamplesSection):
    prompts: list[str] = Field(
        [], description="Questions to ask of the held-out media in place of their own; the answers are not judged."
    )
    count: int = Field(200, ge=1, description="The held-out questions that are answered and judged at the end.")
    shown: int = Field(8, ge=1, description="The answers that are written out at each sampling.")
    max_new_tokens: int = Field(32, ge=1, le=4096, description="The most tokens of an answer.")
    metric: Literal["exact", "vqa", "rouge_l"] = Field(
        "exact", description="How answers are judged: the same words, VQA accuracy over several answers, or ROUGE-L."
    )
    batch: int = Field(32, ge=1, description="The questions that are answered at a time.")


class InstructionTuningConfig(SamplingConfig):
    RESUMABLE: ClassVar[tuple[str, ...]] = (*SamplingConfig.RESUMABLE, "model.shard")
    SHORT: ClassVar[dict[str, str]] = {
        "model": "model.path",
        "data": "data.file",
        "rank": "lora.rank",
        "alpha": "lora.alpha",
        **SamplingConfig.SHORT,
    }

    pipeline: Literal["instruction_tuning"] = Field(
        "instruction_tuning", description="The pipeline this configuration is for."
    )
    model: InstructionTuningModel = Field(default_factory=InstructionTuningModel)
    data: InstructionTuningData = Field(default_factory=InstructionTuningData)
    encoder: InstructionTuningEncoder = Field(default_factory=InstructionTuningEncoder)
    language: InstructionTuningLanguage = Field(default_factory=InstructionTuningLanguage)
    lora: InstructionTuningLora = Field(default_factory=InstructionTuningLora)
    components: dict[str, list[str]] = Field(
        {},
        description="Component → patterns of its parameters' names, such as vision_tower; empty: by architecture.",
    )
    frozen: list[str] = Field([], description="Patterns of the names of parameters that are never trained.")
    optimizer: InstructionTuningOptimizer = Field(default_factory=InstructionTuningOptimizer)
    train: InstructionTuningTrain = Field(default_factory=InstructionTuningTrain)
    samples: InstructionTuningSamples = Field(default_factory=InstructionTuningSamples)

    @field_validator("components")
    @classmethod
    def _both_sides(cls, components: dict[str, list[str]]) -> dict[str, list[str]]:
        if components and ("language" not in components or len(components) < 2):
            raise ValueError(f"must name `language` and at least one more, got {', '.join(components)}.")
        return components

    @model_validator(mode="after")
    def _has_factors(self) -> "InstructionTuningConfig":
        method = self.language.method
        for key in ("targets", "modules_to_save"):
            if method != "lora" and getattr(self.lora, key):
                raise ValueError(f"lora.{key} is for language.method=lora, and it is {method}. Leave one of them out.")
        if method != "lora" and self.encoder.method != "lora" and self.optimizer.loraplus_lr_ratio:
            raise ValueError("optimizer.loraplus_lr_ratio is for LoRA factors, and nothing gets any. Leave it out.")
        if method == "full" and self.model.shard:
            raise ValueError(
                "model.shard is for frozen weights, and language.method=full leaves none. Leave it out, or use "
                "language.method=lora."
            )
        if method == "full" and self.model.quantize:
            raise ValueError(
                f"model.quantize is for frozen weights: {self.model.quantize} cannot be trained in full. Leave it "
                "out, or use language.method=lora."
            )
        return self
