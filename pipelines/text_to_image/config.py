"""The configuration of text-to-image tuning, section by section; its face is the YAML in configs/text_to_image."""

# pydantic's sections are complete without arguments; pyright misses defaults that Field takes by position.
# pyright: reportCallIssue=false, reportArgumentType=false

import re
from typing import Annotated, Any, ClassVar, Literal

from pydantic import Field, field_validator

from equipoise.pipelines.config.records import BasePath, DataPath, LocalPath, ModelPath, Revision, Section
from equipoise.pipelines.config.sections import (
    Batch,
    GradientCheckpointing,
    OptimizerName,
    OptimizerSection,
    Rate,
    SamplesSection,
    SamplingConfig,
    ValidatedTrainSection,
)
from equipoise.pipelines.text_to_image.families.config import NoiseSection


class TextToImageModel(Section):
    path: BasePath = Field(
        "demo",
        description="The base in diffusers' layout: a folder, a hub id, or `demo`, the embedded Stable Diffusion.",
    )
    revision: Revision | None = Field(None, description="The revision on the hub: a branch, tag or commit.")
    variant: Revision | None = Field(None, description="The variant of the weights, such as fp16.")
    text_encoder_4: ModelPath | None = Field(
        None,
        description="For HiDream-I1, which is published without: the folder or hub id of Llama 3.1 8B Instruct.",
    )
    quantize: Literal["fp8", "int8", "nf4"] | None = Field(
        None,
        description="Holds the frozen denoiser in 8 bits (int8 needs torchao) or 4 bits (nf4 needs bitsandbytes).",
    )
    offload: float = Field(
        0.0,
        ge=0,
        le=1,
        description="The share of the denoiser's linear layers whose weights wait in the computer's memory; slower.",
    )

    @property
    def apart(self) -> dict[str, str]:
        """The parts that do not come from `path`, and where they do."""
        return {"text_encoder_4": self.text_encoder_4} if self.text_encoder_4 else {}


class TextToImageData(Section):
    folder: DataPath = Field(
        "demo",
        description="Pictures, captioned in metadata.jsonl, metadata.csv or .txt files; `demo` draws six of an object.",
    )
    validation: LocalPath | None = Field(
        None,
        description="A folder of pictures that are not trained on, captioned as those of data.folder, for validations.",
    )
    sources: list[LocalPath] = Field(
        [],
        description="For bases that edit: a folder of the pictures to start from, named as those in data.folder; "
        "several folders for several of each.",
    )
    instance_prompt: str | None = Field(
        None, description="One caption for all pictures; the folder's captions are then not read."
    )
    resolution: int = Field(
        512, ge=16, le=4096, multiple_of=8, description="The side, in pixels, of the square that pictures are cut to."
    )
    crop: Literal["center", "random"] = Field(
        "center", description="Where pictures are cut; random keeps four different cuts of each."
    )
    flip: bool = Field(False, description="Mirrors half of the pictures, left to right.")
    buckets: bool = Field(
        False,
        description="Cuts pictures to the nearest of several shapes of one area; each batch has one shape.",
    )
    bucket_step: Annotated[int, Field(ge=8, le=256, multiple_of=8)] | None = Field(
        None,
        description="The pixels that a bucket's sides are multiples of; empty: 64, or an eighth of the resolution.",
    )
    bucket_limit: float = Field(
        2.0, ge=1, le=8, description="The largest ratio of a bucket's longer side to its shorter one."
    )
    repeats: dict[str, Annotated[int, Field(ge=1, le=100_000)]] = Field(
        {},
        description="Folder in data.folder → times its pictures come in an epoch; a folder's name, 10_vase, works too.",
    )
    caption_dropout: float = Field(
        0.0, ge=0, le=1, description="The share of captions left empty in training, for classifier-free guidance."
    )
    shuffle_tags: bool = Field(False, description="Shuffles a caption's tags, which commas separate, at each step.")
    keep_tags: int = Field(
        0, ge=0, le=1000, description="The number of first tags that shuffle_tags leaves where they are."
    )

    @field_validator("sources", mode="before")
    @classmethod
    def _one_or_several(cls, sources: Any) -> Any:
        return [sources] if isinstance(sources, str) else [] if sources is None else sources


class PriorSection(Section):
    prompt: str | None = Field(
        None,
        description="A prompt for the subject's class, such as a photo of a vase, trained on too so that it is kept.",
    )
    more_prompts: list[str] = Field(
        [], description="Other prompts whose pictures shall be kept; they share prior.count with prior.prompt."
    )
    folder: LocalPath | None = Field(
        None, description="A folder of pictures of that class; empty: the untouched base draws them, once."
    )
    count: int = Field(100, ge=1, le=100_000, description="The number of class pictures that the base draws.")
    weight: float = Field(1.0, ge=0, le=100, description="The weight of the class pictures' loss beside the subject's.")


class TokenSection(Section):
    name: str | None = Field(
        None,
        description="A new word for the subject, such as <vase>, which captions use and whose vectors are trained.",
    )
    start: str = Field("object", description="A known word whose meaning the new word starts from.")
    vectors: int = Field(
        1, ge=1, le=64, description="The number of the new word's vectors; more hold more, and take more of a prompt."
    )
    learning_rate: Rate = Field(5e-4, description="The learning rate of the new word's vectors.")

    @field_validator("name")
    @classmethod
    def _one_word(cls, name: str | None) -> str | None:
        if name is not None and (not name or re.search(r"\s|,", name)):
            raise ValueError(f"must be one word, such as <vase>, got {name!r}.")
        return name


class TextToImageLora(Section):
    rank: int = Field(4, ge=1, le=1024, description="The rank r of the factors A (r, n) and B (m, r).")
    alpha: Rate | None = Field(None, description="The update is scaled by alpha / rank; empty: as the rank.")
    ranks: dict[str, Annotated[int, Field(ge=1, le=1024)]] = Field(
        {}, description="Pattern in layers' names → their rank, such as {up_blocks.1: 16}; the first that fits counts."
    )
    rslora: bool = Field(False, description="Scales by alpha / √rank instead: a higher rank then learns as fast.")
    dora: bool = Field(False, description="Trains each output's size apart from its direction (DoRA), which is slower.")
    dropout: float = Field(0.0, ge=0, lt=1, description="The share of the LoRA's inputs dropped while training.")
    targets: Annotated[list[str], Field(min_length=1)] | None = Field(
        None,
        description="The denoiser's layers that get factors, by the ends of their names; empty: the family's own.",
    )
    start: LocalPath | None = Field(
        None, description="A LoRA file to go on from, in diffusers', kohya's or ComfyUI's names; empty: new factors."
    )
    text_encoder: bool = Field(False, description="Trains LoRA factors on the text encoder too.")
    text_encoder_targets: list[str] = Field(
        ["q_proj", "k_proj", "v_proj", "out_proj"],
        min_length=1,
        description="The text encoder's layers that get factors, by the ends of their names.",
    )


class TextToImageOptimizer(OptimizerSection):
    name: OptimizerName = "scaled_adamw"
    text_encoder_learning_rate: Rate | None = Field(
        None, description="The learning rate of the text encoder's factors; empty: learning_rate."
    )
    rates: dict[str, Rate] = Field(
        {},
        description="A pattern in layers' names → their learning rate, such as {mid_block: 1e-5}; the first counts.",
    )


class TextToImageTrain(ValidatedTrainSection):
    batch: Batch = Field(4, description="Pictures of each process in a forward pass.")
    ema: float = Field(
        0.0,
        ge=0,
        lt=1,
        description="Samples and result are of the moving average with this decay; 0: of the weights.",
    )
    give_up: float = Field(
        4.0,
        ge=0,
        description="A run has diverged at a mean loss over 20 steps of so many times the untouched base's; 0: never.",
    )
    gradient_checkpointing: GradientCheckpointing = False
    offload_activations: bool = Field(
        False,
        description="What the backward pass needs waits in the computer's memory; best with gradient_checkpointing.",
    )
    compile: bool = Field(
        False,
        description="Makes steps faster by torch.compile; the first of each shape takes minutes, once in a process.",
    )


class TextToImageSamples(SamplesSection):
    sources: list[DataPath | list[DataPath]] = Field(
        [],
        description="For bases that edit: the pictures to start from, one for each prompt, or one for all; a list in "
        "place of one, for several at once.",
    )
    negative: str = Field("", description="The negative prompt.")
    count: int = Field(1, ge=1, le=64, description="The pictures of each prompt, each from its own fixed noise.")
    seed: int = Field(0, ge=0, description="The seed of the noise: equal seeds give equal noise in every run.")
    steps: int = Field(50, ge=1, le=1000, description="The denoising steps.")
    guidance: Annotated[float, Field(ge=0)] | None = Field(
        None, description="The scale of classifier-free guidance; empty: what is usual for the family."
    )
    scale: float = Field(1.0, ge=0, description="The strength of the LoRA when generating (fusion coefficient).")
    batch: int = Field(8, ge=1, description="The pictures that are generated at a time.")

    @field_validator("sources")
    @classmethod
    def _as_many_for_each(cls, sources: list[str | list[str]]) -> list[str | list[str]]:
        counts = {1 if isinstance(source, str) else len(source) for source in sources}
        if 0 in counts or len(counts) > 1:
            got = " and ".join(str(count) for count in sorted(counts))
            raise ValueError(f"must give each prompt as many pictures, one or more, got {got}.")
        return sources


class JudgesSection(Section):
    clip: ModelPath | None = Field(
        None,
        description="A CLIP model that scores how pictures fit their prompts and resemble the training pictures.",
    )
    dino: ModelPath | None = Field(
        None,
        description="A DINO model, such as facebook/dinov2-small, that scores the likeness to the training pictures.",
    )


class TextToImageConfig(SamplingConfig):
    SHORT: ClassVar[dict[str, str]] = {
        "model": "model.path",
        "data": "data.folder",
        "rank": "lora.rank",
        "alpha": "lora.alpha",
        **SamplingConfig.SHORT,
    }

    pipeline: Literal["text_to_image"] = Field("text_to_image", description="The pipeline this configuration is for.")
    script: str | None = Field(
        None,
        description="Another program's training command, run in place of this one: {learning_rate}, {output} and "
        "other keys in braces become their values.",
    )
    model: TextToImageModel = Field(default_factory=TextToImageModel)
    data: TextToImageData = Field(default_factory=TextToImageData)
    prior: PriorSection = Field(default_factory=PriorSection)
    token: TokenSection = Field(default_factory=TokenSection)
    lora: TextToImageLora = Field(default_factory=TextToImageLora)
    noise: NoiseSection = Field(default_factory=NoiseSection)
    judges: JudgesSection = Field(default_factory=JudgesSection)
    optimizer: TextToImageOptimizer = Field(default_factory=TextToImageOptimizer)
    train: TextToImageTrain = Field(default_factory=TextToImageTrain)
    samples: TextToImageSamples = Field(default_factory=TextToImageSamples)
