"""What is wrong with the world a configuration points to, found before anything is written."""

import json
import os
import re
from importlib.util import find_spec
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.data import open_picture, read_examples

PARTS = {"unet": "diffusion_pytorch_model", "vae": "diffusion_pytorch_model", "text_encoder": "model"}
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")
_DECODED = 2_000  # pictures decoded beforehand; in larger folders the rest is found out while latents are computed


def model_source(path: str) -> str:
    """What to hand to from_pretrained: a folder or a hub id."""
    return str(demo.base_folder()) if path == demo.NAME else os.path.expanduser(path)


def is_local(path: str) -> bool:
    return path == demo.NAME or Path(model_source(path)).exists() or not _HUB_ID.fullmatch(path)


def problems(config: TextToImageConfig) -> list[str]:
    found = model_problems(config.model.path, config.model.variant) if is_local(config.model.path) else []
    if config.data.folder != demo.NAME:
        examples, wrong = read_examples(config.data)
        found += wrong
        for example in examples[:_DECODED] if not wrong else []:
            try:
                open_picture(example.path)
            except InputError as error:
                found.append(str(error))
    if config.train.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            found.append("train.precision: fp16 needs a CUDA device, and none is here. Use no or bf16.")
    if "8bit" in config.optimizer.name and not find_spec("bitsandbytes"):
        found.append(
            f"optimizer.name: {config.optimizer.name} needs the package bitsandbytes. pip install bitsandbytes."
        )
    return found


def model_problems(path: str, variant: str | None = None) -> list[str]:
    """Why a local path is not a Stable Diffusion 1.x/2.x checkpoint that can be loaded safely."""
    folder = Path(model_source(path))
    if folder.is_file():
        if folder.suffix == ".safetensors":
            return [
                f"model.path: {folder} is a single-file checkpoint. Convert it once: StableDiffusionPipeline."
                f'from_single_file("{folder}").save_pretrained(FOLDER), then give FOLDER.'
            ]
        return [
            f"model.path: {folder} is not a checkpoint folder; pickles (.ckpt, .bin, .pt) are never opened. "
            "Give a folder in diffusers' layout with safetensors weights."
        ]
    if not folder.is_dir():
        return [
            f"model.path: {folder} does not exist. Give a checkpoint folder, a hub id such as owner/name, or `demo`."
        ]
    index = folder / "model_index.json"
    if not index.is_file():
        return [f"model.path: {folder} has no model_index.json, so it is not a checkpoint in diffusers' layout."]
    try:
        described = json.loads(index.read_text(encoding="utf-8"))
        kind = described.get("_class_name")
    except (ValueError, AttributeError):
        return [f"model.path: {index} is not a JSON object."]
    if kind != "StableDiffusionPipeline":
        return [
            f"model.path: {folder} is a {kind}; this pipeline tunes Stable Diffusion 1.x and 2.x "
            "(StableDiffusionPipeline)."
        ]
    found = []
    for part, stem in PARTS.items():
        stem = f"{stem}.{variant}" if variant else stem
        weights = folder / part / f"{stem}.safetensors"
        if weights.is_file() or list((folder / part).glob(f"{stem.split('.')[0]}*.index*.json")):
            continue
        pickles = [*(folder / part).glob("*.bin"), *(folder / part).glob("*.ckpt"), *(folder / part).glob("*.pt")]
        others = sorted(file.name for file in (folder / part).glob("*.safetensors"))
        if others:
            found.append(
                f"model.path: {weights} is missing, but {', '.join(others)} is there. Set model.variant accordingly."
            )
        elif pickles:
            found.append(
                f"model.path: {pickles[0]} is a pickle, and pickles are never opened: they can run code. "
                "Get the safetensors version of this checkpoint, or convert it where you trust it."
            )
        else:
            found.append(f"model.path: {weights} is missing.")
    return found
