"""FLUX.1 (Black Forest Labs, 2024): a transformer that reads T5's words, CLIP's summary, and latents in fours.

The dev model is distilled: it is given how strongly to be guided in place of being guided. Schnell is not told.
"""

import re
from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.transformer import TransformerFamily, renamed

if TYPE_CHECKING:
    from torch import Tensor

_DOUBLE = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "ff.net.0.proj": "img_mlp.0",
    "ff.net.2": "img_mlp.2",
    "ff_context.net.0.proj": "txt_mlp.0",
    "ff_context.net.2": "txt_mlp.2",
    "norm1.linear": "img_mod.lin",
    "norm1_context.linear": "txt_mod.lin",
}
_SINGLE = {
    "attn.to_q": "linear1",
    "attn.to_k": "linear1",
    "attn.to_v": "linear1",
    "proj_mlp": "linear1",
    "proj_out": "linear2",
    "norm.linear": "modulation.lin",
}
_OUTSIDE = {
    "x_embedder": "img_in",
    "context_embedder": "txt_in",
    "time_text_embed.timestep_embedder.linear_1": "time_in.in_layer",
    "time_text_embed.timestep_embedder.linear_2": "time_in.out_layer",
    "time_text_embed.text_embedder.linear_1": "vector_in.in_layer",
    "time_text_embed.text_embedder.linear_2": "vector_in.out_layer",
    "time_text_embed.guidance_embedder.linear_1": "guidance_in.in_layer",
    "time_text_embed.guidance_embedder.linear_2": "guidance_in.out_layer",
    "proj_out": "final_layer.linear",
    "norm_out.linear": "final_layer.adaLN_modulation.1",
}
_ROWS = {"to_q": 0, "to_k": 1, "to_v": 2, "add_q_proj": 0, "add_k_proj": 1, "add_v_proj": 2, "proj_mlp": 3}
_MLP = 4  # times the width, in the single blocks


class Flux(TransformerFamily):
    """A transformer that reads T5's words, CLIP's summary, and latents in fours."""

    pipeline = "FluxPipeline"
    network = "networks.lora_flux"
    title = "FLUX.1"
    text_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    tokens: ClassVar[dict[str, int]] = {"text_encoder_2": 512}  # as in diffusers' pipeline
    tuned_encoders = ("text_encoder",)
    left_out = ("image_encoder", "feature_extractor")
    targets = (
        "attn.to_k",
        "attn.to_q",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_k_proj",
        "attn.add_q_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "ff.net.0.proj",
        "ff.net.2",
        "ff_context.net.0.proj",
        "ff_context.net.2",
    )
    shape = ("num_attention_heads", "attention_head_dim", "guidance_embeds")
    distilled = True
    negative = False
    guidance = 3.5
    encoders: ClassVar[dict[str, tuple[str, str]]] = {"text_encoder": ("lora_te1", "clip_l")}

    def embed(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        words, pooled, _ = pipeline.encode_prompt(list(captions), device=pipeline.text_encoder.device)
        return {"encoder_hidden_states": words, "pooled_projections": pooled}

    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 3.5,
    ) -> "Tensor":
        from diffusers import FluxPipeline

        batch, channels, height, width = noisy.shape
        words = embedded["encoder_hidden_states"]
        answer = denoiser(
            FluxPipeline._pack_latents(noisy, batch, channels, height, width),
            timestep=times / 1000,
            guidance=times.new_full((batch,), guidance) if denoiser.config.guidance_embeds else None,
            img_ids=FluxPipeline._prepare_latent_image_ids(batch, height // 2, width // 2, noisy.device, noisy.dtype),
            txt_ids=words.new_zeros(words.shape[1], 3),
            **embedded,
        ).sample
        return FluxPipeline._unpack_latents(answer, height, width, vae_scale_factor=1)

    def draw(
        self,
        pipeline: Any,
        prompts: Sequence[str],
        negative: str,
        noise: "Tensor",
        size: tuple[int, int],
        steps: int,
        guidance: float,
    ) -> "Tensor":
        packed = pipeline(
            list(prompts),
            latents=pipeline._pack_latents(noise.to(pipeline.transformer.dtype), *noise.shape),
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images
        return pipeline._unpack_latents(packed, *size, pipeline.vae_scale_factor)

    def original(self, module: str) -> str:
        if module.startswith("transformer_blocks."):
            return renamed(re.sub(r"^transformer", "double", module), _DOUBLE)
        if module.startswith("single_transformer_blocks."):
            return renamed(re.sub(r"^single_transformer", "single", module), _SINGLE)
        return _OUTSIDE.get(module, module)

    def fused(self, part: str, module: str, shape: Mapping[str, Any]) -> tuple[int, tuple[int, ...]] | None:
        row = _ROWS.get(module.rsplit(".", 1)[-1])
        if part != self.denoiser or row is None:
            return None
        width = shape["num_attention_heads"] * shape["attention_head_dim"]
        return row, (width,) * 3 + ((_MLP * width,) if module.startswith("single_") else ())

    def swapped(self, part: str, module: str, shape: Mapping[str, Any]) -> bool:
        return module == "norm_out.linear"

    def versions(self, shape: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
        return "flux1", "flux-1-dev" if shape["guidance_embeds"] else "flux-1-schnell"
