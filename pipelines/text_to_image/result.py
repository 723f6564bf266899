"""What a run leaves: a LoRA file that diffusers loads, what is known about it, and the same file for other apps."""

# peft annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import json
import sys
from collections import Counter
from collections.abc import Mapping
from dataclasses import replace
from importlib.metadata import version
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.files import explained, write_atomic
from equipoise.pipelines.runs.checkpoints import save_tensors
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.formats.layout import is_local
from equipoise.pipelines.text_to_image.formats.lora_files import (
    ADAPTER,
    COMFYUI_SIZES,
    Factors,
    comfyui_rows,
    factors_of,
    layer_names,
    opened,
    proportions_of,
    read_lora,
    read_metadata,
    write_lora,
)

LORA_FILE = "pytorch_lora_weights.safetensors"
_PROPORTIONS = "dora_proportions.safetensors"  # see `proportions_of`


def facts_of(config: TextToImageConfig, pictures: int) -> dict[str, Any]:
    """What others want to know of how a LoRA was made. Of a base on this machine, the folder's name alone."""
    lora, optimizer, train = config.lora, config.optimizer, config.train
    return {
        "base": Path(config.model.path).name if is_local(config.model.path) else config.model.path,
        "revision": config.model.revision,
        "optimizer": optimizer.name,
        "optimizer_options": optimizer.options,
        "learning_rate": optimizer.learning_rate,
        "text_encoder_learning_rate": (optimizer.text_encoder_learning_rate or optimizer.learning_rate)
        if lora.text_encoder
        else None,
        "schedule": config.schedule.name,
        "warmup": config.schedule.warmup,
        "rank": lora.rank,
        "alpha": lora.alpha or lora.rank,
        "dropout": lora.dropout,
        "trigger": config.data.instance_prompt or config.token.name,
        "resolution": config.data.resolution,
        "pictures": pictures,
        "batch": train.batch,
        "accumulate": train.accumulate,
        "precision": train.precision,
        "noise": config.noise.model_dump(exclude_defaults=True),
        "average": train.ema or None,
        "seed": config.seed,
        "steps": train.steps,
        "equipoise": version("equipoise"),
    }


def write_result(
    folder: Path,  # the run's result/
    parts: dict[str, torch.nn.Module],  # the tuned parts by name, with their adapters
    shape: Mapping[str, Any],  # the base's, from `families.shape_of`
    described: dict[str, Any],  # goes into both files
    more: dict[str, Any],  # goes into result.json alone
) -> None:
    """Writes pytorch_lora_weights.safetensors with its metadata, what DoRA's sizes become for ComfyUI, and result.json.

    Raises:
        InputError: they cannot be written (a full disk, say); an earlier result is untouched.
    """
    layers: dict[str, Factors] = {}
    adapters: dict[str, Any] = {}
    proportions: dict[str, Tensor] = {}
    for name, part in parts.items():
        layers |= factors_of(name, part)
        proportions |= proportions_of(name, part)
        settings = part.peft_config[ADAPTER].to_dict()
        settings.pop("base_model_name_or_path", None)  # where it lies on this machine
        adapters |= {f"{name}.{key}": sorted(v) if isinstance(v, set) else v for key, v in settings.items()}
    metadata = {
        "format": "pt",
        "lora_adapter_metadata": json.dumps(adapters, default=str, sort_keys=True),  # read by diffusers
        "equipoise": json.dumps(described | {"shape": shape}),
    }
    write_lora(folder / LORA_FILE, "diffusers", layers, shape, metadata)
    if proportions:
        with explained(folder / _PROPORTIONS):
            save_tensors(folder / _PROPORTIONS, proportions)
    write_atomic(folder / "result.json", json.dumps(described | more, indent=1) + "\n")


def export(result: Path, format: str, output: Path) -> None:
    """Writes a run's LoRA file anew under another app's names: the same factors to the bit, the true α.

    DoRA's sizes are those that give the same weights there: ComfyUI's are others, and kohya's scripts know none.

    Args:
        result: the run's result/.
        format: one of `formats.names.FORMATS`.
        output: the file to write.

    Raises:
        InputError: there is no result, or it cannot be written.
    """
    source = result / LORA_FILE
    if not source.is_file():
        raise InputError(f"{source} is not there: the run has no result yet. `equipoise resume` goes on with it.")
    metadata = read_metadata(source)
    try:
        described = json.loads(metadata["equipoise"])
        shape = described["shape"]
        family(shape["family"])
    except (InputError, KeyError, TypeError, ValueError, RecursionError):
        raise InputError(f"{source}: its metadata are not those that a run writes. Was it replaced?") from None
    layers = read_lora(source, layer_names(source), shape)
    sized = any(factors.magnitude is not None for factors in layers.values())
    if sized and format == "comfyui":
        layers, described = _sized(layers, shape, result / _PROPORTIONS), described | {COMFYUI_SIZES: True}
    if format != "diffusers":
        metadata = _elsewhere(described, layers, output.stem) | {"equipoise": json.dumps(described)}
    write_lora(output, format, layers, shape, metadata)
    if sized and format == "kohya":
        print(
            "kohya's own scripts and diffusers leave DoRA's sizes out of such a file, and ComfyUI takes them for "
            "others. For these two there are --format diffusers and comfyui.",
            file=sys.stderr,
        )


def _sized(layers: Mapping[str, Factors], shape: Mapping[str, Any], file: Path) -> dict[str, Factors]:
    """With the sizes that ComfyUI makes the same weights of."""
    if not file.is_file():
        raise InputError(
            f"--format: ComfyUI's sizes of DoRA need {file}, which versions before this one did not write. Train anew, "
            "or take diffusers' or kohya's format."
        )
    made = dict(layers)
    with opened(file) as tensors:
        proportions = {name: tensors.get_tensor(name) for name in tensors.keys()}
    for name, factors in layers.items():
        if factors.magnitude is not None:
            own = proportions.get(name, torch.empty(0))
            if own.numel() != factors.magnitude.numel() or not own.isfinite().all():
                raise InputError(f"{file}: {name}: not as it was written. Give --format diffusers, or train anew.")
            size = comfyui_rows(name, shape, factors.magnitude.flatten() * own.flatten())
            made[name] = replace(factors, magnitude=size)
    return made


def _elsewhere(described: Mapping[str, Any], layers: Mapping[str, Factors], name: str) -> dict[str, str]:
    """What kohya's scripts and Stability's ModelSpec call the same facts; ComfyUI's and other apps' menus show them."""
    kind = family(described["shape"]["family"])
    known = described.get  # an earlier version's results hold less
    side, noise = known("resolution"), known("noise") or {}
    prediction = known("prediction") or noise.get("prediction")
    kohya, stability = kind.versions(described["shape"], prediction)
    # of most layers, as the tensors have it: rsLoRA's factors too are divided by the rank
    (rank, alpha), _ = Counter((factors.rank, factors.alpha) for factors in layers.values()).most_common(1)[0]
    facts = {
        "ss_output_name": name,
        "ss_network_module": kind.network,
        "ss_noise_offset": noise.get("offset"),
        "ss_min_snr_gamma": noise.get("snr_gamma"),
        "ss_zero_terminal_snr": noise.get("zero_terminal_snr"),
        "modelspec.prediction_type": {"v_prediction": "v"}.get(prediction, prediction),
        "ss_network_dim": rank,
        "ss_network_alpha": alpha,
        "ss_base_model_version": kohya,
        "ss_v2": kind.is_kohyas_v2(described["shape"]),  # A1111 and kohya's merging tell 1.x from 2.x by it
        "ss_sd_model_name": described["base"],
        "ss_optimizer": described["optimizer"],
        "ss_learning_rate": described["learning_rate"],
        "ss_unet_lr": described["learning_rate"],
        "ss_text_encoder_lr": known("text_encoder_learning_rate"),
        "ss_lr_scheduler": known("schedule"),
        "ss_lr_warmup_steps": known("warmup"),
        "ss_network_dropout": known("dropout"),
        "ss_resolution": side and f"({side}, {side})",
        "ss_batch_size_per_device": known("batch"),
        "ss_gradient_accumulation_steps": known("accumulate"),
        "ss_num_train_images": known("pictures"),
        "ss_mixed_precision": known("precision"),
        "ss_seed": known("seed"),
        "ss_max_train_steps": known("steps"),
        "ss_steps": described["step"],
        "modelspec.sai_model_spec": "1.0.1",
        "modelspec.architecture": f"{stability}/lora",
        "modelspec.title": name,
        "modelspec.resolution": side and f"{side}x{side}",
        "modelspec.trigger_phrase": described["trigger"],
    }
    return {"format": "pt"} | {key: str(value) for key, value in facts.items() if value is not None}
