"""The kinds of models that can be tuned, one file each; loop, data, sampling and saving are shared.

A new family is a subclass of `Family`, named by an entry point in the group `equipoise.families` under the class that a
checkpoint's model_index.json names. Those that their pipelines' own code can train are some facts in `flows`. Torch is
not imported here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from functools import cache
from typing import TYPE_CHECKING, Any, ClassVar, Literal, cast

from equipoise import registry

if TYPE_CHECKING:
    from torch import Tensor

TITLES = (  # what comes with Equipoise
    "Stable Diffusion 1.x, 2.x, XL, 3 and 3.5, FLUX.1, its Kontext and FLUX.2, Z-Image, Qwen-Image, Krea 2, Chroma, "
    "Lumina 2, Sana, HiDream-I1, Anima, AuraFlow, CogView4 and ERNIE-Image"
)

NOTHING_TO_SEE = (  # what is wrong with a schedule that ends in pure noise where the noise is what is predicted
    "noise.zero_terminal_snr: needs noise.prediction=v_prediction (or sample): this base predicts the noise, and at "
    "the last step of such a schedule there is nothing else to see."
)


class Family(ABC):
    """One kind of checkpoint: which parts it has, how it reads captions, and what other apps call its layers."""

    pipeline: ClassVar[str]  # diffusers' class for sampling
    title: ClassVar[str]
    denoiser: ClassVar[str]  # the part that is trained, and its folder
    text_encoders: ClassVar[dict[str, str]]  # each with the folder of its tokenizer
    tuned_encoders: ClassVar[tuple[str, ...]] = ()  # those that diffusers' LoRA loader knows
    tokens: ClassVar[dict[str, int]] = {}  # of a caption, that an encoder reads at most, if not as its tokenizer says
    optional: ClassVar[tuple[str, ...]] = ()  # text encoders that a checkpoint may be without
    # Text encoders that a checkpoint may be published without, to be given beside it: their class, and what they are.
    apart: ClassVar[dict[str, tuple[str, str]]] = {}
    left_out: ClassVar[tuple[str, ...]] = ()  # components of the pipeline class that nobody needs here
    targets: ClassVar[tuple[str, ...]]  # the denoiser's layers that get factors by default
    shape: ClassVar[tuple[str, ...]] = ()  # keys of the denoiser's config that other apps' names depend on

    noise: ClassVar[Literal["diffusion", "flow"]]  # how it is added: see `families.noise`
    times: ClassVar[str] = "uniform"  # flow: how they are drawn by default, as diffusers' script does
    preconditioned: ClassVar[bool] = False  # flow: the loss is of the picture that is predicted, not of the velocity
    mean_latents: ClassVar[bool] = False  # trained on the autoencoder's means, not on draws from what it gives
    distilled: ClassVar[bool] = False  # takes the guidance as an input, in place of being guided
    negative: ClassVar[bool] = True  # reads negative prompts
    edits: ClassVar[bool] = False  # may start from pictures, whose latents `predict` finds as `source` in `embedded`
    must_edit: ClassVar[bool] = False  # does nothing else
    several: ClassVar[bool] = False  # from more than one
    loads_textual_inversion: ClassVar[bool] = False  # diffusers does for it, into the tuned encoders

    network: ClassVar[str] = "networks.lora"  # the module of kohya's scripts that reads such a file
    patch: ClassVar[int] = 1  # cells of the latents to a side of one token
    native: ClassVar[int | None] = None  # pixels, where the denoiser's config does not say
    guidance: ClassVar[float] = 7.0  # for samples, by default

    modular: ClassVar[bool] = False  # the pipeline is one of diffusers' modular ones, which are called in another way
    refused: ClassVar[tuple[str, ...]] = ()  # formats of files in which its layers have no names that are known

    @property
    def parts(self) -> tuple[str, ...]:
        """The folders with weights."""
        return (self.denoiser, "vae", *self.text_encoders)

    def load(self, source: str, **options: Any) -> Any:
        """The pipeline of a checkpoint, with diffusers' options of loading."""
        import diffusers

        return getattr(diffusers, self.pipeline).from_pretrained(source, **options)

    def assemble(self, **parts: Any) -> Any:
        """The pipeline of these parts."""
        import diffusers

        return getattr(diffusers, self.pipeline)(**parts)

    def bind(self, pipeline: Any) -> None:  # noqa: B027 (most need none)
        """Is given the pipeline that it will be used with, before `predict`."""

    def usual_guidance(self, pipeline: Any) -> float:
        """For samples of this checkpoint, by default."""
        return self.guidance

    def most_tokens(self, denoiser: Mapping[str, Any]) -> int | None:
        """How many tokens a picture that is no square may have, and is filled up to, by the denoiser's config."""
        return None

    def before(self, tokenizer: Any, special: int) -> int:
        """How many tokens the pipeline puts before a caption, given how many a tokenizer puts around any text."""
        return special

    @abstractmethod
    def embed(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        """What the denoiser reads of captions, each tensor (captions, …). Differentiable."""

    def stack(self, rows: "Sequence[Mapping[str, Tensor]]") -> "dict[str, Tensor]":
        """What `embed` made of single captions, as if it had read them together."""
        from torch import cat

        return {name: cat([row[name] for row in rows]) for name in rows[0]}

    def embed_empty(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        """The like of what `embed` makes, of tensors without values, where the pipeline's parts have none."""
        return self.embed(pipeline, captions)

    @abstractmethod
    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 3.5,
    ) -> "Tensor":
        """The denoiser's answer, of the shape of `noisy`.

        Args:
            noisy: (batch, channels, height, width), of the denoiser's dtype.
            times: (batch,) timesteps.
            embedded: from `embed`.
            crops: (batch, 6) pixels: height and width of the picture before it was cut, top and left of the cut, and
                height and width of the cut.
            guidance: the input of a distilled model.
        """

    def draw(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        negative: str,
        noise: "Tensor",  # (prompts, channels, height, width) float32: the latents to start from
        size: tuple[int, int],  # pixels: height, width
        steps: int,
        guidance: float,
    ) -> "Tensor":
        """The latents of pictures, by the family's own sampling in diffusers."""
        return pipeline(
            list(prompts),
            negative_prompt=[negative] * len(prompts) if negative else None,  # XL has zeros for none
            latents=noise.to(getattr(pipeline, self.denoiser).dtype),
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images

    def drawn(self, times: "Tensor", size: Sequence[int]) -> "Tensor":
        """Times as the pipeline's own schedule has them for latents of that height and width, of times drawn evenly."""
        return times

    @abstractmethod
    def kohya(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        """kohya's name for a layer, given its part and its name there, and the base's `shape`."""

    @abstractmethod
    def comfyui(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        """ComfyUI's name for a layer."""

    def aliases(self, part: str, module: str, shape: Mapping[str, Any]) -> set[str]:
        """Other names that a layer may have in files that are read."""
        return set()

    def fused(self, part: str, module: str, shape: Mapping[str, Any]) -> tuple[int, tuple[int, ...]] | None:
        """Where kohya's layer of that name is several of ours, one below the other: this one's index among them, and
        the rows of each."""
        return None

    writes_fused: ClassVar[bool] = True  # kohya's scripts have it so; if not, such a layer is only read

    def joint(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        """That layer's name."""
        return self.kohya(part, module, shape)

    def swapped(self, part: str, module: str, shape: Mapping[str, Any]) -> bool:
        """Whether kohya's layer has the halves of its rows, shift and scale, the other way round."""
        return False

    @abstractmethod
    def versions(self, shape: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
        """What kohya's scripts and Stability's ModelSpec call the base, by what its denoiser predicts."""

    def is_kohyas_v2(self, shape: Mapping[str, Any]) -> bool:
        """Whether the base is a Stable Diffusion 2.x; kohya's files tell it from 1.x by that."""
        return False


def family(pipeline: str) -> Family:
    """The family of a checkpoint's class, as its model_index.json names it.

    Raises:
        InputError: No distribution has one, more than one has, or it cannot be used.
    """
    return _loaded(str(pipeline))()  # a file may hold anything in its place


@cache  # asked for each layer
def _loaded(pipeline: str) -> "type[Family]":
    if pipeline in (built := _by_their_pipelines()) and pipeline not in known():
        return cast("type[Family]", built[pipeline])
    return registry.load("families", pipeline)


def known() -> list[str]:
    """The classes that there is a family with code of its own for."""
    return [entry.name for entry in registry.entries("families") if not entry.error]


def trained() -> list[str]:
    """All classes that there is a family for."""
    return [*known(), *(name for name in _by_their_pipelines() if name not in known())]


def _by_their_pipelines() -> Mapping[str, type]:
    """The families that their pipelines' own code trains."""
    from equipoise.pipelines.text_to_image.families.edits import EDITS
    from equipoise.pipelines.text_to_image.families.flows import FLOWS

    return FLOWS | EDITS


def shape_of(pipeline: str, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    """What other apps' names depend on: the family, and some of the denoiser's config."""
    return {"family": pipeline} | {key: denoiser[key] for key in family(pipeline).shape}
