"""What the families share whose denoiser is a transformer trained by flow matching: noise, and names in other apps."""

from collections.abc import Mapping
from typing import Any, ClassVar

from equipoise.pipelines.text_to_image.families import Family


class TransformerFamily(Family):
    denoiser = "transformer"
    noise = "flow"
    patch = 2
    native = 1024
    prefix: ClassVar[str] = "transformer"  # of ComfyUI's names
    encoders: ClassVar[dict[str, tuple[str, str]]] = {}  # text encoder → what kohya's scripts and ComfyUI call it

    def original(self, module: str) -> str:
        """A module under its name in the code that the model was published with. Several of ours may be one there."""
        raise NotImplementedError

    def kohya(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        if part != self.denoiser:
            return f"{self.encoders[part][0]}_{module.replace('.', '_')}"
        return f"lora_unet_{self.original(module).replace('.', '_')}"

    def comfyui(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        if part != self.denoiser:
            return f"text_encoders.{self.encoders[part][1]}.transformer.{module}"
        return f"{self.prefix}.{module}"  # it knows diffusers' modules, and which rows of its own they are

    def aliases(self, part: str, module: str, shape: Mapping[str, Any]) -> set[str]:
        return {f"lora_transformer_{module.replace('.', '_')}"} if part == self.denoiser else set()  # OneTrainer's


def renamed(module: str, names: Mapping[str, str]) -> str:
    """`module` with its end replaced by what `names` has for it; unknown ends stay."""
    for ours, theirs in names.items():
        if module == ours or module.endswith(f".{ours}"):
            return module.removesuffix(ours) + theirs
    return module
