"""Stable Diffusion 3 and 3.5: a transformer over picture and words together, which reads two CLIP encoders and T5.

Esser et al., Scaling Rectified Flow Transformers for High-Resolution Image Synthesis, arXiv:2403.03206, 2024. T5 may be
missing: diffusers then gives zeros for what it would have read.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.transformer import TransformerFamily, renamed

if TYPE_CHECKING:
    from torch import Tensor

_PICTURE = {
    "attn.to_q": "x_block.attn.qkv",
    "attn.to_k": "x_block.attn.qkv",
    "attn.to_v": "x_block.attn.qkv",
    "attn.to_out.0": "x_block.attn.proj",
    "attn2.to_q": "x_block.attn2.qkv",
    "attn2.to_k": "x_block.attn2.qkv",
    "attn2.to_v": "x_block.attn2.qkv",
    "attn2.to_out.0": "x_block.attn2.proj",
    "ff.net.0.proj": "x_block.mlp.fc1",
    "ff.net.2": "x_block.mlp.fc2",
    "norm1.linear": "x_block.adaLN_modulation.1",
}
_WORDS = {
    "attn.add_q_proj": "context_block.attn.qkv",
    "attn.add_k_proj": "context_block.attn.qkv",
    "attn.add_v_proj": "context_block.attn.qkv",
    "attn.to_add_out": "context_block.attn.proj",
    "ff_context.net.0.proj": "context_block.mlp.fc1",
    "ff_context.net.2": "context_block.mlp.fc2",
    "norm1_context.linear": "context_block.adaLN_modulation.1",
}
_OUTSIDE = {
    "pos_embed.proj": "x_embedder.proj",
    "time_text_embed.timestep_embedder.linear_1": "t_embedder.mlp.0",
    "time_text_embed.timestep_embedder.linear_2": "t_embedder.mlp.2",
    "time_text_embed.text_embedder.linear_1": "y_embedder.mlp.0",
    "time_text_embed.text_embedder.linear_2": "y_embedder.mlp.2",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_ROWS = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2}


class StableDiffusion3(TransformerFamily):
    """A transformer over picture and words together, which reads two CLIP encoders and T5."""

    pipeline = "StableDiffusion3Pipeline"
    network = "networks.lora_sd3"
    title = "Stable Diffusion 3"
    text_encoders: ClassVar[dict[str, str]] = {
        "text_encoder": "tokenizer",
        "text_encoder_2": "tokenizer_2",
        "text_encoder_3": "tokenizer_3",
    }
    tokens: ClassVar[dict[str, int]] = {"text_encoder_3": 256}  # as in diffusers' pipeline
    tuned_encoders = ("text_encoder", "text_encoder_2")
    optional = ("text_encoder_3",)
    left_out = ("image_encoder", "feature_extractor")
    targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
    )
    shape = ("num_attention_heads", "attention_head_dim", "num_layers")
    times = "logit_normal"
    preconditioned = True
    encoders: ClassVar[dict[str, tuple[str, str]]] = {
        "text_encoder": ("lora_te1", "clip_l"),
        "text_encoder_2": ("lora_te2", "clip_g"),
    }

    def embed(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        device = pipeline.text_encoder.device
        words, _, pooled, _ = pipeline.encode_prompt(
            list(captions), None, None, device=device, do_classifier_free_guidance=False
        )
        return {"encoder_hidden_states": words, "pooled_projections": pooled}

    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 0,
    ) -> "Tensor":
        return denoiser(noisy, timestep=times, **embedded).sample

    def original(self, module: str) -> str:
        inside = re.sub(r"^transformer_blocks\.", "joint_blocks.", module)
        return renamed(inside, _PICTURE | _WORDS) if inside != module else _OUTSIDE.get(module, module)

    def fused(self, part: str, module: str, shape: Mapping[str, Any]) -> tuple[int, tuple[int, ...]] | None:
        row = _ROWS.get(module.rsplit(".", 1)[-1])
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        return None if part != self.denoiser or row is None else (row, (width,) * 3)

    def swapped(self, part: str, module: str, shape: Mapping[str, Any]) -> bool:
        last = shape.get("num_layers", 0) - 1  # whose words are not answered
        return module in ("norm_out.linear", f"transformer_blocks.{last}.norm1_context.linear")

    def versions(self, shape: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
        return "sd3", "stable-diffusion-3"
