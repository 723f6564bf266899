"""Families that make a picture of a picture and words: trained on pairs by their pipelines' own code, see `generic`.

The source's latents, which `predict` finds beside what was read of the captions, go to the pipeline as its `image`.
"""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.flux import Flux
from equipoise.pipelines.text_to_image.families.generic import GenericFlow

if TYPE_CHECKING:
    from torch import Tensor


class FluxKontext(GenericFlow):
    """FLUX.1 Kontext [dev] (Black Forest Labs, arXiv:2506.15742, 2025): the source's tokens follow the picture's."""

    pipeline = "FluxKontextPipeline"
    title = "FLUX.1 Kontext"
    edits = must_edit = True
    text_encoders: ClassVar = Flux.text_encoders
    tokens: ClassVar = Flux.tokens
    left_out = Flux.left_out
    targets = Flux.targets
    shape = Flux.shape
    captions: ClassVar = {
        "prompt_embeds": (0, (512, "joint_attention_dim")),
        "pooled_prompt_embeds": (1, ("pooled_projection_dim",)),
    }
    packed = True
    distilled = True
    negative = False
    guidance = 2.5  # as its model card has it
    refused = ()
    network = Flux.network
    encoders: ClassVar = Flux.encoders

    original = Flux.original  # pyright: ignore[reportAssignmentType]  # layers are FLUX.1's by name
    fused = Flux.fused
    swapped = Flux.swapped

    def of_size(self, height: int, width: int) -> dict[str, Any]:
        return {"max_area": height * width}  # else it draws a million pixels, whatever was asked for

    def read(self, pipeline: Any, caption: str) -> "dict[str, Tensor]":
        import torch

        words, pooled, _ = pipeline.encode_prompt(caption, None, device=pipeline.text_encoder.device)
        return {
            "prompt_embeds": words,
            "pooled_prompt_embeds": pooled,
            "lengths": torch.tensor([words.shape[1]]),
        }

    def versions(self, shape: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
        return "flux1", "flux-1-kontext-dev"


EDITS: dict[str, type[GenericFlow]] = {kind.pipeline: kind for kind in (FluxKontext,)}
