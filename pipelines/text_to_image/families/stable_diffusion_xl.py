"""Stable Diffusion XL: a U-Net that reads two CLIP text encoders and how a picture was cut (arXiv 2307.01952, §2.2)."""

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.unet import UNetFamily, original_name

if TYPE_CHECKING:
    from torch import Tensor


class StableDiffusionXL(UNetFamily):
    """A U-Net that reads two CLIP text encoders and how a picture was cut."""

    pipeline = "StableDiffusionXLPipeline"
    title = "Stable Diffusion XL"
    text_encoders: ClassVar[dict[str, str]] = {"text_encoder": "tokenizer", "text_encoder_2": "tokenizer_2"}
    tuned_encoders = ("text_encoder", "text_encoder_2")
    loads_textual_inversion = True
    left_out = ("feature_extractor", "image_encoder")

    def embed(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        words, _, pooled, _ = pipeline.encode_prompt(list(captions), do_classifier_free_guidance=False)
        return {"encoder_hidden_states": words, "text_embeds": pooled}

    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 0,
    ) -> "Tensor":
        added = {"text_embeds": embedded["text_embeds"], "time_ids": crops.to(noisy.dtype)}
        return denoiser(noisy, times, embedded["encoder_hidden_states"], added_cond_kwargs=added).sample

    def kohya(self, part: str, module: str, shape: Mapping[str, Any]) -> str:
        if part == "unet":  # kohya's scripts train XL on the original code's U-Net
            return f"lora_unet_{original_name(module, shape).replace('.', '_')}"
        return f"lora_te{'2' if part == 'text_encoder_2' else '1'}_{module.replace('.', '_')}"

    def encoder(self, part: str, shape: Mapping[str, Any]) -> str:
        return "clip_g" if part == "text_encoder_2" else "clip_l"

    def versions(self, shape: Mapping[str, Any], prediction: str | None) -> tuple[str, str]:
        return "sdxl_base_v1-0", "stable-diffusion-xl-v1-base"
