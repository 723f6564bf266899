"""Anima: one of diffusers' modular pipelines, which are loaded and called in another way."""

from collections.abc import Mapping, Sequence
from importlib.util import find_spec
from typing import TYPE_CHECKING, Any, ClassVar

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.families.generic import GenericFlow

if TYPE_CHECKING:
    from torch import Tensor


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
        read: dict[str, Any] = AnimaTextEncoderStep.encode_prompt(
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
