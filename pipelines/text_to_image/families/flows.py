"""Facts about the families that are trained by their pipelines' own code: see `generic`."""

import math
import re
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from functools import partial
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.families.flux import Flux
from equipoise.pipelines.text_to_image.families.generic import GenericFlow
from equipoise.pipelines.text_to_image.families.transformer import renamed

if TYPE_CHECKING:
    from torch import Tensor

_MASKED = "prompt_attention_mask"
_FLUX2 = {
    "attn.to_q": "img_attn.qkv",
    "attn.to_k": "img_attn.qkv",
    "attn.to_v": "img_attn.qkv",
    "attn.to_out.0": "img_attn.proj",
    "attn.add_q_proj": "txt_attn.qkv",
    "attn.add_k_proj": "txt_attn.qkv",
    "attn.add_v_proj": "txt_attn.qkv",
    "attn.to_add_out": "txt_attn.proj",
    "ff.linear_in": "img_mlp.0",
    "ff.linear_out": "img_mlp.2",
    "ff_context.linear_in": "txt_mlp.0",
    "ff_context.linear_out": "txt_mlp.2",
}
_FLUX2_SINGLE = {"attn.to_qkv_mlp_proj": "linear1", "attn.to_out": "linear2"}


class Flux2(GenericFlow):
    """FLUX.2 [dev] (Black Forest Labs, 2025): distilled, with captions read by Mistral 3."""

    pipeline = "Flux2Pipeline"
    title = "FLUX.2 dev"
    captions: ClassVar = {"prompt_embeds": (0, (512, "joint_attention_dim"))}
    tokens: ClassVar = {"text_encoder": 512}
    targets = (
        "attn.to_q",
        "attn.to_k",
        "attn.to_v",
        "attn.to_out.0",
        "attn.add_q_proj",
        "attn.add_k_proj",
        "attn.add_v_proj",
        "attn.to_add_out",
        "attn.to_qkv_mlp_proj",
    )
    mean_latents = True
    distilled = True
    negative = False
    guidance = 4.0
    refused = ()
    network = "networks.lora_flux_2"
    shape = ("num_attention_heads", "attention_head_dim")

    fused = Flux.fused

    def original(self, module: str) -> str:
        inside = re.sub(r"^(single_)?transformer_blocks\.", lambda found: f"{found[1] or 'double_'}blocks.", module)
        return renamed(inside, _FLUX2 if inside.startswith("double_") else _FLUX2_SINGLE)


class Flux2Klein(Flux2):
    """FLUX.2 [klein] (Black Forest Labs, 2026): smaller, with captions read by Qwen3, and guided in the usual way."""

    pipeline = "Flux2KleinPipeline"
    title = "FLUX.2 klein"
    distilled = False


class QwenImage(GenericFlow):
    """Qwen-Image (Alibaba, arXiv:2508.02324, 2025)."""

    pipeline = "QwenImagePipeline"
    title = "Qwen-Image"
    captions: ClassVar = {"prompt_embeds": (0, (512, "joint_attention_dim")), "prompt_embeds_mask": (1, (512,))}
    tokens: ClassVar = {"text_encoder": 512}
    packed = True
    strength, guidance = "true_cfg_scale", 4.0
    refused = ()
    network = "networks.lora_qwen_image"


class Krea2(GenericFlow):
    """Krea 2 (Krea, 2026): one stream, which reads several layers of Qwen3-VL."""

    pipeline = "Krea2Pipeline"
    title = "Krea 2"
    captions: ClassVar = {
        "prompt_embeds": (0, (512, "num_text_layers", "text_hidden_dim")),
        "prompt_embeds_mask": (1, (512,)),
    }
    tokens: ClassVar = {"text_encoder": 507}
    packed = True
    unguided, guidance = 0.0, 4.5  # it counts from 0
    refused = ("kohya",)


class Chroma(GenericFlow):
    """Chroma (Lodestone Rock, 2025): FLUX.1 without distillation, which reads T5 alone."""

    pipeline = "ChromaPipeline"
    title = "Chroma"
    captions: ClassVar = {"prompt_embeds": (0, (512, "joint_attention_dim")), _MASKED: (2, (512,))}
    tokens: ClassVar = {"text_encoder": 512}
    left_out = ("image_encoder", "feature_extractor")
    packed = True
    guidance = 5.0
    refused = ()
    network = "networks.lora_flux"
    shape = ("num_attention_heads", "attention_head_dim")
    original, fused = Flux.original, Flux.fused  # its layers are called as FLUX.1's

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


class Lumina2(GenericFlow):
    """Lumina-Image 2.0 (Shanghai AI Laboratory, arXiv:2503.21758, 2025): one stream, read by Gemma 2."""

    pipeline = "Lumina2Pipeline"
    title = "Lumina 2"
    captions: ClassVar = {"prompt_embeds": (0, (256, "cap_feat_dim")), _MASKED: (1, (256,))}
    tokens: ClassVar = {"text_encoder": 256}
    casts = False
    guidance = 4.0


class Sana(GenericFlow):
    """Sana (NVIDIA, arXiv:2410.10629, 2024): linear attention over the few latents of DC-AE."""

    pipeline = "SanaPipeline"
    title = "Sana"
    captions: ClassVar = {"prompt_embeds": (0, (300, "caption_channels")), _MASKED: (1, (300,))}
    tokens: ClassVar = {"text_encoder": 300}
    patch = 1
    options: ClassVar = {"use_resolution_binning": False}  # else it draws the nearest of its own sizes
    guidance = 4.5


class HiDream(GenericFlow):
    """HiDream-I1 (HiDream.ai, arXiv:2505.22705, 2025): a mixture of experts, which reads four text encoders."""

    pipeline = "HiDreamImagePipeline"
    title = "HiDream-I1"
    text_encoders: ClassVar = {f"text_encoder{n}": f"tokenizer{n}" for n in ("", "_2", "_3", "_4")}
    tokens: ClassVar = {f"text_encoder{n}": 128 for n in ("", "_2", "_3", "_4")}
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

    def sized(self, pipeline: Any, height: int, width: int) -> Any:
        """It makes every size one of so many pixels."""
        from copy import copy

        own = copy(pipeline)
        own.default_sample_size = math.sqrt(height * width) / pipeline.vae_scale_factor * (1 + 1e-9)  # rounded down
        return own


def _through_one(layer: Any, given: "Tensor") -> "Tensor":
    repeated = given.repeat_interleave(layer.num_activated_experts, dim=1)
    made = layer.experts[0](repeated).unflatten(1, (-1, layer.num_activated_experts)).sum(2)
    return made + layer.shared_experts(given)


class Anima(GenericFlow):
    """Anima (CircleStone Labs, 2026): Cosmos-Predict2, which reads Qwen3 by way of T5's words. A modular pipeline."""

    pipeline = "AnimaModularPipeline"
    title = "Anima"
    modular = True
    text_encoders: ClassVar = {"text_encoder": "tokenizer", "text_conditioner": "t5_tokenizer"}
    captions: ClassVar = {"prompt_embeds": (0, (512, "text_embed_dim"))}
    tokens: ClassVar = {"text_encoder": 512, "text_conditioner": 512}
    guidance = 4.0

    def load(self, source: str, **options: Any) -> Any:
        """Part by part: the loader of modular pipelines may run code that comes with a checkpoint."""
        pipeline, types = self.assemble(), options.pop("dtype")
        common = {key: options[key] for key in ("variant", "revision")}
        parts = {"scheduler": options["scheduler"]}
        for name in (*self.parts, *self.text_encoders.values()):
            more = common if name not in self.parts else common | {"dtype": types.get(name, types["default"])}
            if name == self.denoiser and "quantization_config" in options:
                more["quantization_config"] = options["quantization_config"].quant_mapping[name]
            kind = pipeline.get_component_spec(name).type_hint
            parts[name] = kind.from_pretrained(source, subfolder=name, **more)
        if parts[self.denoiser].config.concat_padding_mask and not find_spec("torchvision"):
            raise InputError("diffusers needs the package torchvision for this transformer. pip install torchvision.")
        pipeline.update_components(**parts)
        _silence(pipeline.blocks)
        return pipeline

    def assemble(self, **parts: Any) -> Any:
        import diffusers

        pipeline = diffusers.AnimaModularPipeline()
        pipeline.update_components(**{name: part for name, part in parts.items() if name in self.parts})
        return pipeline

    def read(self, pipeline: Any, caption: str) -> "dict[str, Tensor]":
        import torch
        from diffusers.modular_pipelines.anima.before_denoise import AnimaTextConditioningStep
        from diffusers.modular_pipelines.anima.encoders import AnimaTextEncoderStep

        encoder, device = pipeline.text_encoder, pipeline.text_encoder.device
        read = AnimaTextEncoderStep.encode_prompt(
            pipeline, [caption], prepare_unconditional_embeds=False, device=device
        )
        words = AnimaTextConditioningStep._condition_prompt_embeds(
            pipeline,
            **{name: tensor for name, tensor in read.items() if not name.startswith("negative_")},
            device=device,
            conditioning_dtype=pipeline.text_conditioner.dtype,
            output_dtype=encoder.dtype,
        )
        return {"prompt_embeds": words, "lengths": torch.tensor([words.shape[1]])}

    def _answer(
        self, denoiser: Any, noisy: "Tensor", times: "Tensor", embedded: "Mapping[str, Tensor]", guidance: float
    ) -> "Tensor":
        height, width = self._pixels(noisy)
        return denoiser(
            hidden_states=noisy.unsqueeze(2),
            timestep=times / 1000,
            encoder_hidden_states=embedded["prompt_embeds"],
            padding_mask=noisy.new_zeros(1, 1, height, width),
        ).sample.squeeze(2)

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
        pipeline.guider.guidance_scale = guidance
        return pipeline(
            prompt=list(prompts),
            negative_prompt=[negative] * len(prompts),
            latents=noise.unsqueeze(2),
            height=size[0],
            width=size[1],
            num_inference_steps=steps,
            output="latents",
        ).squeeze(2)


def _silence(blocks: Any) -> None:
    """Modular pipelines leave the progress bars of blocks inside of blocks on."""
    for block in blocks.sub_blocks.values():
        if hasattr(block, "set_progress_bar_config"):
            block.set_progress_bar_config(disable=True)
        if hasattr(block, "sub_blocks"):
            _silence(block)


class AuraFlow(GenericFlow):
    """AuraFlow (fal, 2024)."""

    pipeline = "AuraFlowPipeline"
    title = "AuraFlow"
    captions: ClassVar = {"prompt_embeds": (0, (256, "joint_attention_dim"))}
    tokens: ClassVar = {"text_encoder": 256}
    guidance = 3.5
    refused = ("kohya",)

    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 0,
    ) -> "Tensor":
        """The pipeline's call has one time for all."""
        return denoiser(noisy, encoder_hidden_states=embedded["prompt_embeds"], timestep=times / 1000).sample


class CogView4(GenericFlow):
    """CogView4 (Zhipu AI, 2025)."""

    pipeline = "CogView4Pipeline"
    title = "CogView4"
    captions: ClassVar = {"prompt_embeds": (0, (224, "text_embed_dim"))}
    tokens: ClassVar = {"text_encoder": 1024}
    guidance = 5.0


FLOWS: dict[str, type[GenericFlow]] = {
    kind.pipeline: kind
    for kind in (Flux2, Flux2Klein, QwenImage, Krea2, Chroma, Lumina2, Sana, HiDream, Anima, AuraFlow, CogView4)
}
