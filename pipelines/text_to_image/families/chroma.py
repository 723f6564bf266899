"""Chroma: what diffusers' pipeline makes of it, and a mask that it loses in training."""

from collections.abc import Iterator
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.flux import Flux
from equipoise.pipelines.text_to_image.families.generic import GenericFlow

if TYPE_CHECKING:
    from torch import Tensor


class Chroma(GenericFlow):
    """Chroma (Lodestone Rock, 2025): FLUX.1 without distillation, which reads T5 alone."""

    pipeline = "ChromaPipeline"
    title = "Chroma"
    captions: ClassVar = {"prompt_embeds": (0, (512, "joint_attention_dim")), "prompt_attention_mask": (2, (512,))}
    tokens: ClassVar = {"text_encoder": 512}
    left_out = ("image_encoder", "feature_extractor")
    packed = True
    guidance = 5.0
    refused = ()
    network = "networks.lora_flux"
    shape = ("num_attention_heads", "attention_head_dim")
    original, fused = Flux.original, Flux.fused  # pyright: ignore[reportAssignmentType]  # layers are FLUX.1's by name

    def predict(self, denoiser: Any, *given: Any, **more: Any) -> "Tensor":
        with _masked(self._pipeline.transformer):
            return super().predict(denoiser, *given, **more)


@contextmanager
def _masked(denoiser: Any) -> Iterator[None]:
    """diffusers 0.42 gives Chroma's single blocks no mask where they are checkpointed: here that of the double ones."""
    if not denoiser.gradient_checkpointing:
        yield
        return
    own, masks = denoiser._gradient_checkpointing_func, []

    def call(block: Any, *given: Any) -> Any:
        if len(given) == 3:
            return own(block, *given, masks[-1])
        masks.append(given[-1])
        return own(block, *given)

    denoiser._gradient_checkpointing_func = call
    try:
        yield
    finally:
        denoiser._gradient_checkpointing_func = own
