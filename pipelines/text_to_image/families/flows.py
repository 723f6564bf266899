"""Facts about the families that are trained by their pipelines' own code: see `generic`."""

import math
import re
from collections.abc import Mapping, Sequence
from copy import copy
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.pipelines.text_to_image.families.anima import Anima
from equipoise.pipelines.text_to_image.families.chroma import Chroma
from equipoise.pipelines.text_to_image.families.flux import Flux
from equipoise.pipelines.text_to_image.families.generic import GenericFlow
from equipoise.pipelines.text_to_image.families.hidream import HiDream
from equipoise.pipelines.text_to_image.families.transformer import renamed

if TYPE_CHECKING:
    from torch import Tensor

_MARK = "CAPTION"
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
    edits = several = True

    fused = Flux.fused

    def starting(self, pipeline: Any, sources: "Tensor | None") -> tuple[Any, dict[str, Any]]:
        """Its call takes pictures and encodes them, the same for all prompts; here each prompt has its own latents."""
        from torch import cat

        if sources is None:
            return pipeline, {}

        def given(**_: Any) -> "tuple[Tensor, Tensor]":
            places = pipeline._prepare_image_ids(list(sources[:1].unbind(1))).to(sources.device)
            tokens = cat([pipeline._pack_latents(one) for one in sources.unbind(1)], dim=1)
            return tokens, places.expand(len(tokens), -1, -1)

        own = copy(pipeline)
        vars(own).update(prepare_image_latents=given, image_processor=_Encoded())
        return own, {"image": [_Encoded()] * sources.shape[1]}

    def before(self, tokenizer: Any, special: int) -> int:
        written = tokenizer.apply_chat_template(self.messages(_MARK), tokenize=False)
        return len(tokenizer(written.partition(_MARK)[0], add_special_tokens=False).input_ids)

    def messages(self, caption: str) -> list[dict[str, Any]]:
        from diffusers.pipelines.flux2.pipeline_flux2 import SYSTEM_MESSAGE, format_input

        return format_input([caption], SYSTEM_MESSAGE)[0]

    def original(self, module: str) -> str:
        inside = re.sub(r"^(single_)?transformer_blocks\.", lambda found: f"{found[1] or 'double_'}blocks.", module)
        return renamed(inside, _FLUX2 if inside.startswith("double_") else _FLUX2_SINGLE)


class _Encoded:
    """In place of a picture whose latents are there, and of what would check and cut it."""

    size = (0, 0)

    def check_image_input(self, image: Any) -> None: ...

    def preprocess(self, image: Any, **_: Any) -> None: ...


class Flux2Klein(Flux2):
    """FLUX.2 [klein] (Black Forest Labs, 2026): smaller, with captions read by Qwen3, and guided in the usual way."""

    pipeline = "Flux2KleinPipeline"
    title = "FLUX.2 klein"
    distilled = False

    def messages(self, caption: str) -> list[dict[str, Any]]:
        return [{"role": "user", "content": caption}]


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


class Lumina2(GenericFlow):
    """Lumina-Image 2.0 (Shanghai AI Laboratory, arXiv:2503.21758, 2025): one stream, read by Gemma 2."""

    pipeline = "Lumina2Pipeline"
    title = "Lumina 2"
    captions: ClassVar = {"prompt_embeds": (0, (256, "cap_feat_dim")), _MASKED: (1, (256,))}
    tokens: ClassVar = {"text_encoder": 256}
    negatives = 2  # without the system prompt
    casts = False
    guidance = 4.0

    def before(self, tokenizer: Any, special: int) -> int:
        from diffusers import Lumina2Pipeline

        parts = ("transformer", "scheduler", "vae", "text_encoder", "tokenizer")
        empty: dict[str, Any] = dict.fromkeys(parts)
        written = f"{Lumina2Pipeline(**empty).system_prompt} <Prompt Start> "
        return special + len(tokenizer(written, add_special_tokens=False).input_ids)


class Sana(GenericFlow):
    """Sana (NVIDIA, arXiv:2410.10629, 2024): linear attention over the few latents of DC-AE."""

    pipeline = "SanaPipeline"
    title = "Sana"
    captions: ClassVar = {"prompt_embeds": (0, (300, "caption_channels")), _MASKED: (1, (300,))}
    tokens: ClassVar = {"text_encoder": 300}
    negatives = 2  # without its instruction
    patch = 1
    options: ClassVar = {"use_resolution_binning": False}  # else it draws the nearest of its own sizes
    guidance = 4.5


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

    def predict(
        self,
        denoiser: Any,
        noisy: "Tensor",
        times: "Tensor",
        embedded: "Mapping[str, Tensor]",
        crops: "Tensor",
        guidance: float = 0,
    ) -> "Tensor":
        """Its pipeline gives the denoiser times that are not shifted, at noise that is: those are found here again."""
        factor = self._shift(noisy.shape[-2:])
        read = 1000 * times / (times + factor * (1000 - times))
        return super().predict(denoiser, noisy, read, embedded, crops, guidance)

    def drawn(self, times: "Tensor", size: Sequence[int]) -> "Tensor":
        """So that training, as sampling, has times evenly before their shift, and noise as these make it."""
        factor = self._shift(size)
        return 1000 * factor * times / (factor * times + 1000 - times)

    def _shift(self, size: Sequence[int]) -> float:
        """How its scheduler makes noise σ of times t in 0 … 1: 1 / σ − 1 = (1 / t − 1) / shift."""
        from diffusers.pipelines.cogview4.pipeline_cogview4 import calculate_shift

        scheduler = self._pipeline and self._pipeline.scheduler
        if scheduler is None:  # of an estimate
            return 1.0
        config = scheduler.config
        if not config.get("use_dynamic_shifting"):
            return config.get("shift", 1.0)
        tokens = size[0] * size[1] // self.patch**2
        shift = calculate_shift(tokens, *(config[key] for key in ("base_image_seq_len", "base_shift", "max_shift")))
        return shift if config.time_shift_type == "linear" else math.exp(shift)


class Ernie(GenericFlow):
    """ERNIE-Image (Baidu, 2026): one stream, read by Ministral 3."""

    pipeline = "ErnieImagePipeline"
    title = "ERNIE-Image"
    captions: ClassVar = {"prompt_embeds": (0, (512, "text_in_dim"))}
    left_out = ("pe", "pe_tokenizer")  # which write prompts anew
    casts = False
    guidance = 4.0
    refused = ("kohya",)

    def bind(self, pipeline: Any) -> None:
        super().bind(pipeline)
        pipeline.vae.register_to_config(batch_norm_eps=1e-5)  # as its pipeline decodes, whatever the config says

    def read(self, pipeline: Any, caption: str) -> "dict[str, Tensor]":
        import torch

        (words,) = pipeline.encode_prompt([caption], device=pipeline.text_encoder.device)
        return {"prompt_embeds": words[None], "lengths": torch.tensor([len(words)])}

    def embed_empty(self, pipeline: Any, captions: Sequence[str]) -> "dict[str, Tensor]":
        import torch

        places = (
            pipeline.transformer.pos_embed
        )  # are reckoned without autocast, which a tensor without values knows not
        own = places.forward
        places.forward = lambda ids: own(torch.zeros(ids.shape, device="cpu")).to(ids.device)
        return super().embed_empty(pipeline, captions)

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
        lengths = embedded["lengths"].to(noisy.device)
        return denoiser(noisy, timestep=times, text_bth=embedded["prompt_embeds"], text_lens=lengths).sample


FLOWS: dict[str, type[GenericFlow]] = {
    kind.pipeline: kind
    for kind in (Flux2, Flux2Klein, QwenImage, Krea2, Chroma, Lumina2, Sana, HiDream, Anima, AuraFlow, CogView4, Ernie)
}
