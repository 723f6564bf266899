"""What is wrong with the world a configuration points to, found before anything is written."""

import os
from importlib.util import find_spec
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.data import open_picture, read_examples, unread_captions
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.layout import (
    hub_problems,
    is_local,
    layers,
    model_problems,
    model_source,
    native_resolution,
    pipeline_class,
    unmatched,
)

FAR = 2  # times the resolution a base was made for, or a half: bases of 512 are tuned at 768, and those of 768 at 512
_DECODED = 2_000  # pictures decoded beforehand; in larger folders the rest is found out while latents are computed


def problems(config: TextToImageConfig) -> list[str]:
    if is_local(config.model.path):
        found = model_problems(config.model.path, config.model.variant) or _target_problems(config)
    else:
        found = hub_problems(config.model.path, config.model.revision)
    if config.data.folder != demo.NAME:
        examples, wrong = read_examples(config.data)
        found += wrong
        for example in examples[:_DECODED] if not wrong else []:
            try:
                open_picture(example.path)
            except InputError as error:
                found.append(str(error))
    if (start := config.lora.start) and not Path(start).is_file():
        found.append(f"lora.start: {start} does not exist. Give a .safetensors file, or leave it out.")
    if config.train.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            found.append("train.precision: fp16 needs a CUDA device, and none is here. Use no or bf16.")
    if "8bit" in config.optimizer.name and not find_spec("bitsandbytes"):
        found.append(
            f"optimizer.name: {config.optimizer.name} needs the package bitsandbytes. pip install bitsandbytes."
        )
    if (processes := os.environ.get("WORLD_SIZE", "1")) != "1":  # set by accelerate launch and torchrun
        found.append(
            f"WORLD_SIZE: a run trains in one process, and this is one of {processes}. Start it without accelerate "
            "launch or torchrun."
        )
    return found


def doubts(config: TextToImageConfig) -> list[str]:
    """A sentence if captions stay unread, and one if the pictures are far larger or smaller than the base's were."""
    pictures = [example.path for example in read_examples(config.data)[0]]
    found = [warning] if (warning := unread_captions(config.data, pictures)) else []
    made_for, given = native_resolution(config.model.path, config.model.revision), config.data.resolution
    if made_for is None or made_for / FAR < given < made_for * FAR:
        return found
    return [
        *found,
        f"data.resolution: {given} pixels, but {config.model.path} was made for {made_for}; what it learns may be of "
        f"little use. data.resolution={made_for} fits.",
    ]


def _target_problems(config: TextToImageConfig) -> list[str]:
    folder, lora, variant = Path(model_source(config.model.path)), config.lora, config.model.variant
    found = unmatched(lora.targets, layers(folder, "unet", variant), "lora.targets")
    for part in family(pipeline_class(config.model.path)).text_encoders if lora.text_encoder else ():
        found += unmatched(lora.text_encoder_targets, layers(folder, part, variant), "lora.text_encoder_targets")
    return found
