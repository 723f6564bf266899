"""HiDream-I1: four text encoders, and experts that answer in another way in training."""

import math
from collections.abc import Mapping, Sequence
from copy import copy
from functools import partial
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.generic import GenericFlow

if TYPE_CHECKING:
    from torch import Tensor


class HiDream(GenericFlow):
    """HiDream-I1 (HiDream.ai, arXiv:2505.22705, 2025): a mixture of experts, which reads four text encoders."""

    pipeline = "HiDreamImagePipeline"
    title = "HiDream-I1"
    text_encoders: ClassVar = {f"text_encoder{n}": f"tokenizer{n}" for n in ("", "_2", "_3", "_4")}
    tokens: ClassVar = {f"text_encoder{n}": 128 for n in ("", "_2", "_3", "_4")}
    apart: ClassVar = {
        "text_encoder_4": ("LlamaForCausalLM", "Llama 3.1 8B Instruct, such as meta-llama/Llama-3.1-8B-Instruct")
    }
    targets = ("to_q", "to_k", "to_v", "to_out")
    captions: ClassVar = {
        "prompt_embeds_t5": (0, (128, "caption_channels.0")),
        "prompt_embeds_llama3": (2, (32, 128, "caption_channels.1")),
        "pooled_prompt_embeds": (4, ("text_emb_dim",)),
    }
    casts = False
    guidance = 5.0
    refused = ("kohya",)

    def bind(self, pipeline: Any) -> None:
        super().bind(pipeline)
        # In training it would answer in patches. The experts are left in training: else they pass no gradient on.
        pipeline.transformer.register_to_config(force_inference_output=True)

    def embed_empty(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        pipeline.transformer.register_to_config(force_inference_output=False)
        for layer in pipeline.transformer.modules():
            if hasattr(layer, "experts"):  # which one it goes to depends on values; all are alike
                layer.forward = partial(_through_one, layer)
        return super().embed_empty(pipeline, captions)

    def read(self, pipeline: Any, caption: str) -> "dict[str, Tensor]":
        found = super().read(pipeline, caption)
        return found | {"prompt_embeds_llama3": found["prompt_embeds_llama3"].transpose(0, 1)}

    def arguments(self, embedded: "dict[str, Tensor]") -> "dict[str, Tensor]":
        return embedded | {"prompt_embeds_llama3": embedded["prompt_embeds_llama3"].transpose(0, 1)}

    def most_tokens(self, denoiser: Mapping[str, Any]) -> int | None:
        height, width = denoiser["max_resolution"]  # cells of the latents
        return height * width // denoiser["patch_size"] ** 2

    def sized(self, pipeline: Any, height: int, width: int) -> Any:
        """It makes every size one of so many pixels."""
        own = copy(pipeline)
        own.default_sample_size = math.sqrt(height * width) / pipeline.vae_scale_factor * (1 + 1e-9)  # rounded down
        return own


def _through_one(layer: Any, given: "Tensor") -> "Tensor":
    repeated = given.repeat_interleave(layer.num_activated_experts, dim=1)
    made = layer.experts[0](repeated).unflatten(1, (-1, layer.num_activated_experts)).sum(2)
    return made + layer.shared_experts(given)
