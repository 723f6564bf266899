"""The kinds of models that can be tuned, one file each; loop, data, sampling and saving are shared.

A new family is a subclass of `Family` in a file of its own here, and its line in FAMILIES. Torch is not imported here.
"""

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from importlib import import_module
from typing import TYPE_CHECKING, Any, ClassVar

if TYPE_CHECKING:
    from torch import Tensor

FAMILIES = {  # the class in a checkpoint's model_index.json → the module here and the class in it
    "StableDiffusionPipeline": ("stable_diffusion", "StableDiffusion"),
    "StableDiffusionXLPipeline": ("stable_diffusion_xl", "StableDiffusionXL"),
}
TITLES = "Stable Diffusion 1.x, 2.x and XL"


class Family(ABC):
    """One kind of checkpoint: which parts it has, how it reads captions, and what other apps call its layers."""

    pipeline: ClassVar[str]  # diffusers' class for sampling
    title: ClassVar[str]
    parts: ClassVar[tuple[str, ...]]  # the folders with weights
    text_encoders: ClassVar[dict[str, str]]  # each with the folder of its tokenizer
    left_out: ClassVar[tuple[str, ...]]  # components of the pipeline class that neither training nor sampling needs

    @abstractmethod
    def embed(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        """What the denoiser reads of captions, each tensor (captions, …). Differentiable."""

    @abstractmethod
    def predict(
        self, denoiser: Any, noisy: "Tensor", times: "Tensor", embedded: "Mapping[str, Tensor]", places: "Tensor"
    ) -> "Tensor":
        """The denoiser's answer.

        Args:
            noisy: (batch, channels, height, width), of the denoiser's dtype.
            times: (batch,) timesteps.
            embedded: from `embed`.
            places: (batch, 6) pixels: height and width of the picture before it was cut, top and left of the cut, and
                height and width of the cut.
        """

    @abstractmethod
    def kohya(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        """kohya's name for a layer, given its part and its name there, and the base's `shape`."""

    @abstractmethod
    def comfyui(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        """ComfyUI's name for a layer."""

    @abstractmethod
    def versions(self, shape: Mapping[str, Any]) -> tuple[str, str]:
        """What kohya's scripts and Stability's ModelSpec call the base."""


def family(pipeline: str) -> Family:
    """The family of a class in FAMILIES."""
    module, name = FAMILIES[pipeline]
    return getattr(import_module(f"{__name__}.{module}"), name)()


def shape_of(pipeline: str, denoiser: Mapping[str, Any]) -> dict[str, Any]:
    """What other apps' names depend on: the family, and some of the denoiser's config."""
    keys = ("layers_per_block", "up_block_types", "cross_attention_dim")
    return {"family": pipeline} | {key: denoiser[key] for key in keys}
