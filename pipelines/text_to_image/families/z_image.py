"""Z-Image (Tongyi-MAI, arXiv:2511.22699, 2025): one stream of picture and words, read by a language model, Qwen3.

Its times run the other way, and so does its answer; it wants each picture and each caption apart, of any length.
"""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.transformer import TransformerFamily, renamed

if TYPE_CHECKING:
    from torch import Tensor

_TOKENS = 512  # of a caption at most, as in diffusers' pipeline
_ORIGINAL = {
    "attention.to_q": "attention.qkv",
    "attention.to_k": "attention.qkv",
    "attention.to_v": "attention.qkv",
    "attention.to_out.0": "attention.out",
}
_ROWS = {"to_q": 0, "to_k": 1, "to_v": 2}


class ZImage(TransformerFamily):
    """A transformer over one stream of picture and words, which are read by a language model."""

    pipeline = "ZImagePipeline"
    network = "networks.lora_zimage"
    title = "Z-Image"
    text_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer"}
    tokens: ClassVar[dict[str, int]] = {"text_encoder": _TOKENS}
    targets = ("to_q", "to_k", "to_v", "to_out.0")
    shape = ("dim",)
    mean_latents = True
    guidance = 5.0
    prefix = "diffusion_model"

    def embed(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        said = [
            pipeline.tokenizer.apply_chat_template(
                [{"role": "user", "content": caption}], tokenize=False, add_generation_prompt=True, enable_thinking=True
            )
            for caption in captions
        ]
        tokens = pipeline.tokenizer(
            said, padding="max_length", max_length=_TOKENS, truncation=True, return_tensors="pt"
        )
        encoder, mask = pipeline.text_encoder, tokens.attention_mask.bool()
        read = encoder(
            input_ids=tokens.input_ids.to(encoder.device),
            attention_mask=None if mask.all() else mask.to(encoder.device),
            output_hidden_states=True,
        )
        return {"words": read.hidden_states[-2], "lengths": mask.sum(1)}

    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 0,
    ) -> "Tensor":
        import torch

        captions = [
            words[:length] for words, length in zip(embedded["words"], embedded["lengths"].tolist(), strict=True)
        ]
        answer = denoiser(list(noisy.unsqueeze(2)), (1000 - times) / 1000, captions).sample
        return -torch.stack(answer).squeeze(2)

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
        return pipeline(
            list(prompts),
            negative_prompt=[negative] * len(prompts),
            latents=noise,  # float32 at any precision
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            guidance_scale=guidance,
            output_type="latent",
        ).images

    writes_fused = False  # musubi-tuner's modules are diffusers', and ComfyUI's one

    def kohya(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        return f"lora_unet_{module.replace('.', '_')}"

    def joint(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        return f"lora_unet_{self.original(module).replace('.', '_')}"

    def aliases(self, part: str, module: str, shape: Mapping[str, Any]) -> set[str]:
        shared = self.fused(part, module, shape) is not None
        return super().aliases(part, module, shape) | (set() if shared else {self.joint(part, module, shape)})

    def original(self, module: str) -> str:
        outside = module.replace("all_final_layer.2-1.", "final_layer.").replace("all_x_embedder.2-1", "x_embedder")
        return renamed(outside, _ORIGINAL)

    def fused(self, part: str, module: str, shape: Mapping[str, Any]) -> tuple[int, tuple[int, ...]] | None:
        row = _ROWS.get(module.rsplit(".", 1)[-1])
        return None if part != self.denoiser or row is None else (row, (shape["dim"],) * 3)

    def versions(self, shape: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
        return "zimage", "z-image"
