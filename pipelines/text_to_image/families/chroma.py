"""Chroma: what diffusers' pipeline makes of it, and a mask that it loses in training."""

from typing import Any, ClassVar

from equipoise.pipelines.text_to_image.families.flux import Flux
from equipoise.pipelines.text_to_image.families.generic import GenericFlow


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

    def bind(self, pipeline: Any) -> None:
        super().bind(pipeline)
        denoiser, masked = pipeline.transformer, _Masked()

        def enable() -> None:
            type(denoiser).enable_gradient_checkpointing(denoiser)
            masked.own = masked.own or denoiser._gradient_checkpointing_func
            denoiser._gradient_checkpointing_func = masked  # the same one always: another would be compiled anew

        denoiser.enable_gradient_checkpointing = enable


class _Masked:
    """diffusers 0.42 gives Chroma's single blocks no mask where they are checkpointed: here that of the double ones."""

    own: Any = None
    mask: Any = None

    def __call__(self, block: Any, *given: Any) -> Any:
        if len(given) == 3:
            return self.own(block, *given, self.mask)
        self.mask = given[-1]
        return self.own(block, *given)
