"""The configuration of audio-visual classification, section by section; its face: the YAML in configs/audio_visual."""

# pydantic's sections are complete without arguments; pyright misses defaults that Field takes by position.
# pyright: reportCallIssue=false, reportArgumentType=false

from typing import ClassVar, Literal

from pydantic import Field, ValidationInfo, field_validator, model_validator

from equipoise.pipelines.config.records import DataPath, ModelPath, Revision, Section
from equipoise.pipelines.config.sections import (
    Clip,
    LearningRate,
    ObjectiveSection,
    OptimizerName,
    OptimizerSection,
    Rate,
    Steps,
    TrainConfig,
    ValidatedTrainSection,
)

Modality = Literal["audio", "visual", "text"]


class AudioSection(Section):
    sample_rate: int = Field(16000, ge=1000, description="The rate, in Hz, that sound is resampled to.")
    seconds: float = Field(
        3.0, gt=0, le=600, description="The length of a clip; longer sound is cut (data.stretch), shorter repeated."
    )
    scale: Literal["log_mel", "log_stft"] = Field(
        "log_mel",
        description="The spectrogram; log_mel: HTK's mel bands; log_stft: magnitudes, as for OGM-GE and AGM.",
    )
    window: int = Field(512, ge=16, le=8192, description="The samples in a Hann window, and in its Fourier transform.")
    hop: int = Field(160, ge=1, description="The samples from one window to the next.")
    mels: int = Field(128, ge=4, le=512, description="The number of mel bands, for log_mel.")


class VisualSection(Section):
    frames: int = Field(
        1, ge=1, le=64, description="The number of frames of a clip, from the middles of equal stretches."
    )
    size: int = Field(224, ge=8, le=1024, description="The side, in pixels, of the square that frames are cut to.")


class TextSection(Section):
    length: int = Field(128, ge=4, le=4096, description="The largest number of tokens; longer text is cut.")


class AudioVisualData(Section):
    manifest: DataPath = Field(
        "demo",
        description="A CSV with the columns clip, audio, frames, video, text, text_file, start, end, label, split; "
        "`demo` draws a set.",
    )
    modalities: list[Modality] = Field(
        ["audio", "visual"], min_length=1, description="The modalities that the model is given."
    )
    audio: AudioSection = Field(default_factory=AudioSection)
    visual: VisualSection = Field(default_factory=VisualSection)
    text: TextSection = Field(default_factory=TextSection)
    validation: float = Field(
        0.1, gt=0, lt=1, description="The share of the training clips to validate on where no split is called val."
    )
    stretch: Literal["start", "middle", "random"] = Field(
        "start",
        description="What of a clip that is longer than audio.seconds; start: sound's beginning, and frames of all of "
        "it; middle: both from its middle; random: both from one of five stretches while training, else the middle.",
    )
    missing: Literal["refuse", "mask"] = Field(
        "refuse",
        description="A clip that lacks a modality; refuse: it cannot be used; mask: it is trained and scored on what "
        "is there.",
    )
    class_weights: Literal["none", "balanced"] = Field(
        "none", description="How classes weigh in the loss; balanced: rare ones weigh more."
    )
    flip: bool = Field(False, description="Mirrors half of the frames while training.")
    shift: float = Field(
        0.0, ge=0, le=0.5, description="Moves frames by up to this share of their side while training."
    )
    roll: float = Field(
        0.0, ge=0, le=1, description="Starts sound up to this share of its length later while training."
    )
    skip_bad: bool = Field(
        False, description="Leaves out clips that cannot be used, and lists them; --skip-bad on the command line."
    )

    @field_validator("modalities")
    @classmethod
    def _each_once(cls, modalities: list[str]) -> list[str]:
        if len(set(modalities)) < len(modalities):
            raise ValueError(f"must name each modality once, got {', '.join(modalities)}.")
        return modalities


class AudioVisualEncoder(Section):
    kind: Literal["resnet", "ast", "transformer"] = Field(
        "resnet", description="The architecture; resnet: for sound and pictures; ast: for sound; transformer: for text."
    )
    path: ModelPath | None = Field(
        None, description="Pretrained weights: a folder or hub id; empty: it is trained from scratch."
    )
    revision: Revision | None = Field(None, description="The revision on the hub: a branch, tag or commit.")
    widths: list[int] = Field([64, 128, 256, 512], min_length=1, description="The channels of each stage of a resnet.")
    depths: list[int] = Field([2, 2, 2, 2], min_length=1, description="The blocks of each stage of a resnet.")
    width: int = Field(192, ge=8, description="The channels of an ast or transformer.")
    layers: int = Field(4, ge=1, description="The layers of an ast or transformer.")
    heads: int = Field(4, ge=1, description="The attention heads of an ast or transformer.")
    rank: int = Field(
        0,
        ge=0,
        le=1024,
        description="The rank of LoRA factors on a pretrained encoder; 0: all its weights are trained.",
    )
    alpha: Rate | None = Field(None, description="The update is scaled by alpha / rank; empty: as the rank.")
    targets: list[str] = Field(
        [],
        description="Layers that get factors, by the ends of their names; empty: all linear and convolutional ones.",
    )

    @model_validator(mode="after")
    def _fits(self) -> "AudioVisualEncoder":
        if self.rank and not self.path:
            raise ValueError("rank is for pretrained weights, which stay as they are; give their path, or rank 0.")
        if not self.rank and (self.targets or self.alpha is not None):
            raise ValueError("targets and alpha are for LoRA factors; give a rank above 0.")
        if len(self.widths) != len(self.depths):
            raise ValueError(f"needs as many depths as widths, got {len(self.depths)} and {len(self.widths)}.")
        if self.width % self.heads:
            raise ValueError(f"needs a width that its heads divide, got {self.width} and {self.heads}.")
        return self


class TextEncoderSection(AudioVisualEncoder):
    kind: Literal["resnet", "ast", "transformer"] = Field(
        "transformer", description="The architecture; transformer: for text."
    )


class AudioVisualModel(Section):
    fusion: Literal["sum", "concat", "gated", "film", "shared"] = Field(
        "concat",
        description="How the modalities' features become the joint prediction; gated and film take two modalities; "
        "shared: one head for all of them, its predictions weighed by how sure they are.",
    )
    audio: AudioVisualEncoder = Field(default_factory=AudioVisualEncoder)
    visual: AudioVisualEncoder = Field(default_factory=AudioVisualEncoder)
    text: TextEncoderSection = Field(default_factory=TextEncoderSection)

    @field_validator("audio", "visual", "text")
    @classmethod
    def _suits(cls, encoder: AudioVisualEncoder, info: ValidationInfo) -> AudioVisualEncoder:
        good = {"audio": ("resnet", "ast"), "visual": ("resnet",), "text": ("transformer",)}[str(info.field_name)]
        if encoder.kind not in good:
            raise ValueError(f"kind must be {' or '.join(good)} for {info.field_name}, got {encoder.kind}.")
        return encoder


class AudioVisualOptimizer(OptimizerSection):
    name: OptimizerName = "sgd"
    learning_rate: LearningRate = 1e-3


class AudioVisualTrain(ValidatedTrainSection):
    steps: Steps = 1000
    batch: int = Field(64, ge=2, description="Clips of each process in a forward pass; 2 at least.")
    clip: Clip = 0.0
    validate_every: int = Field(100, ge=1, description="The steps between validations.")
    patience: int = Field(0, ge=0, description="Ends after so many validations without a better joint loss; 0: never.")
    keep: Literal["best", "last"] = Field(
        "best", description="The weights of the result: the best by validation loss, or the last."
    )
    baselines: list[str] = Field(
        [], description="Objectives that are trained too, with the same data, seed and steps, for comparison."
    )


class AudioVisualConfig(TrainConfig):
    SHORT: ClassVar[dict[str, str]] = {
        "data": "data.manifest",
        "fusion": "model.fusion",
        **TrainConfig.SHORT,
    }

    pipeline: Literal["audio_visual"] = Field("audio_visual", description="The pipeline this configuration is for.")
    data: AudioVisualData = Field(default_factory=AudioVisualData)
    model: AudioVisualModel = Field(default_factory=AudioVisualModel)
    optimizer: AudioVisualOptimizer = Field(default_factory=AudioVisualOptimizer)
    objective: ObjectiveSection = Field(default_factory=lambda: ObjectiveSection(name="mimo"))
    train: AudioVisualTrain = Field(default_factory=AudioVisualTrain)

    @field_validator("train")
    @classmethod
    def _known_baselines(cls, train: AudioVisualTrain) -> AudioVisualTrain:
        for name in train.baselines:
            try:
                ObjectiveSection(name=name)
            except ValueError as error:
                raise ValueError(f"baselines: {name}: {_first(error)}") from None
        return train

    @model_validator(mode="after")
    def _two_for_some_fusions(self) -> "AudioVisualConfig":
        count = len(self.data.modalities)
        if self.model.fusion in ("gated", "film") and count != 2:
            raise ValueError(f"model.fusion: {self.model.fusion} takes two modalities, and there are {count}.")
        return self


def _first(error: ValueError) -> str:
    found = getattr(error, "errors", None)
    return str(found(include_url=False)[0]["ctx"]["error"]) if found else str(error)
