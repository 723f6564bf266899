"""Stable Diffusion 1.x and 2.x: a U-Net that reads one CLIP text encoder."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.unet import UNetFamily

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusion(UNetFamily):
    """A U-Net that reads one CLIP text encoder, of another kind in 2.x."""

    pipeline = "StableDiffusionPipeline"
    title = "Stable Diffusion"
    text_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer"}
    tuned_encoders = ("text_encoder",)
    loads_textual_inversion = True
    left_out = ("safety_checker", "feature_extractor", "image_encoder")

    def embed(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        captions = pipeline.maybe_convert_prompt(list(captions), pipeline.tokenizer)  # new words of several vectors
        tokens = pipeline.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return {"encoder_hidden_states": pipeline.text_encoder(tokens.input_ids.to(pipeline.text_encoder.device))[0]}

    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 0,
    ) -> "Tensor":
        return denoiser(noisy, times, **embedded).sample

    def kohya(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        return f"{'lora_unet' if part == 'unet' else 'lora_te'}_{module.replace('.', '_')}"

    def encoder(self, part: str, shape: Mapping[str, Any]) -> str:
        return "clip_h" if _is_v2(shape) else "clip_l"

    def versions(self, shape: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
        if not _is_v2(shape):
            return "sd_v1", "stable-diffusion-v1"
        return "sd_v2", "stable-diffusion-v2-768-v" if prediction == "v_prediction" else "stable-diffusion-v2-512"

    def is_kohyas_v2(self, shape: Mapping[str, Any]) -> bool:
        return _is_v2(shape)


def _is_v2(shape: Mapping[str, Any]) -> bool:
    return shape["cross_attention_dim"] == 1024  # 2.x has OpenCLIP's encoder, of that width
