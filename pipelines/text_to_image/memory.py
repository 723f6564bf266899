"""How much memory a tuning of Stable Diffusion will take: see `equipoise.pipelines.memory`."""

# diffusers, peft and transformers annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import json
from pathlib import Path
from typing import Any

import torch
from diffusers import AutoencoderKL, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from huggingface_hub import try_to_load_from_cache
from peft import LoraConfig
from transformers import CLIPTextConfig, CLIPTextModel

from equipoise.pipelines.memory import DTYPES, PROGRAM, activations, size, training
from equipoise.pipelines.pipeline import Memory
from equipoise.pipelines.text_to_image.config import ModelSection, TextToImageConfig
from equipoise.pipelines.text_to_image.families.stable_diffusion import StableDiffusion
from equipoise.pipelines.text_to_image.layout import is_local, model_source, pipeline_class


def memory(config: TextToImageConfig) -> Memory | None:
    """None where the checkpoint is not on this machine, or of another family."""
    dtype = DTYPES[config.train.precision]
    try:
        if is_local(config.model.path) and pipeline_class(config.model.path) != StableDiffusion.pipeline:
            return None
        described = {part: _read(config.model, part) for part in StableDiffusion.parts}
    except (OSError, ValueError):
        return None
    words = CLIPTextConfig(**described["text_encoder"])
    with torch.device("meta"):
        unet = UNet2DConditionModel.from_config(described["unet"])
        text_encoder = CLIPTextModel._from_config(words, dtype=dtype)
        vae = AutoencoderKL.from_config(described["vae"])
    parts = {unet: config.lora.targets}
    if config.lora.text_encoder:
        parts[text_encoder] = config.lora.text_encoder_targets
    trained = []
    for parameter in unet.parameters():
        parameter.data = parameter.data.to(dtype)
    for part in (unet, text_encoder):
        part.requires_grad_(False).train()
        if part in parts:
            with torch.device("meta"):
                part.add_adapter(
                    LoraConfig(r=config.lora.rank, lora_dropout=config.lora.dropout, target_modules=list(parts[part]))
                )
            cast_training_params(part, torch.float32)
            trained += [parameter for parameter in part.parameters() if parameter.requires_grad]
    batch = config.train.batch
    side = config.data.resolution // 2 ** (len(vae.config.block_out_channels) - 1)
    weights = [*unet.parameters(), *text_encoder.parameters(), *vae.parameters()]

    def step() -> None:
        tokens = torch.zeros(batch, words.max_position_embeddings, dtype=torch.long)
        spoken = text_encoder(tokens)[0]
        noisy = torch.zeros(batch, unet.config.in_channels, side, side, dtype=dtype)
        unet(noisy, torch.zeros(batch, dtype=torch.long), spoken)

    kept = activations(step, weights, config.train.gradient_checkpointing)
    return Memory(size(weights), training(trained, config.optimizer), kept, PROGRAM)


def _read(model: ModelSection, part: str) -> dict[str, Any]:
    """A part's config.json, from the folder or from what was fetched from the hub before."""
    name = f"{part}/config.json"
    if is_local(model.path):
        return json.loads(Path(model_source(model.path), name).read_text(encoding="utf-8"))
    file = try_to_load_from_cache(model.path, name, revision=model.revision)
    if not isinstance(file, str):
        raise OSError(f"{model.path} was not fetched yet")
    return json.loads(Path(file).read_text(encoding="utf-8"))
