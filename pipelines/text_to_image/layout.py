"""What a checkpoint must hold, found out from names, JSON and headers: no weight is loaded."""

import json
import os
import re
from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from equipoise.pipelines import demo
from equipoise.pipelines.text_to_image.families import FAMILIES, TITLES, Family, family

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a U-Net may have learnt to predict
HUB_TIMEOUT = 10.0  # seconds for the hub to answer the first time
_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+")


def model_source(path: str) -> str:
    """What to hand to from_pretrained: a folder or a hub id."""
    return str(demo.base_folder()) if path == demo.NAME else os.path.expanduser(path)


def is_local(path: str) -> bool:
    return path == demo.NAME or Path(model_source(path)).exists() or not _HUB_ID.fullmatch(path)


def model_problems(path: str, variant: str | None = None) -> list[str]:
    """Why a local path is not a checkpoint of a known family that can be loaded safely."""
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
    if wrong := index_problems(index, str(folder)):
        return wrong
    kind = family(pipeline_class(path))
    found = _config_problems(folder, kind)
    for part in kind.parts:
        found += _weight_problems(folder / part, variant)
    return found


def pipeline_class(path: str, revision: str | None = None) -> str:
    """The class that a checkpoint's model_index.json names. Raises OSError or ValueError where it does not."""
    from huggingface_hub import hf_hub_download

    name = "model_index.json"
    local = is_local(path)
    index = Path(model_source(path), name) if local else Path(hf_hub_download(path, name, revision=revision))
    return (_json(index) or {}).get("_class_name", "")


def index_problems(index: Path, name: str) -> list[str]:
    """Why the checkpoint that this model_index.json describes is of another kind."""
    described = _json(index)
    if described is None:
        return [f"model.path: {index} is not a JSON object."]
    if (kind := described.get("_class_name")) not in FAMILIES:
        return [f"model.path: {name} is a {kind}; this pipeline tunes {TITLES} ({', '.join(FAMILIES)})."]
    return []


def hub_problems(path: str, revision: str | None = None) -> list[str]:
    """Why a hub id is not a checkpoint of a known family, asked before gigabytes are fetched."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache

    name = "model_index.json"
    try:
        index = try_to_load_from_cache(path, name, revision=revision)
        if not isinstance(index, str):
            # Asks once; a download from a hub that does not answer is tried again for minutes.
            get_hf_file_metadata(hf_hub_url(path, name, revision=revision), timeout=HUB_TIMEOUT)
            index = hf_hub_download(path, name, revision=revision)
    except Exception as error:  # OSError, ValueError, or the HTTP client's own, whichever that is
        reason = " ".join(str(error).split()).split(". ")[0]
        return [
            f"model.path: {path} is no folder here, and the hub gave no model_index.json of that name ({reason}). "
            "Check the spelling, the revision and the connection."
        ]
    return index_problems(Path(index), path)


def native_resolution(path: str, revision: str | None = None) -> int | None:
    """Pixels, the side of the pictures that a checkpoint's U-Net was made for; None where its files do not say."""
    from huggingface_hub import hf_hub_download

    described = []
    for name in ("unet/config.json", "vae/config.json"):  # both are fetched later in any case
        try:
            local = is_local(path)
            described.append(
                _json(Path(model_source(path), name) if local else Path(hf_hub_download(path, name, revision=revision)))
            )
        except (OSError, ValueError):
            return None
    try:
        unet, vae = described
        return int(unet["sample_size"]) * 2 ** (len(vae["block_out_channels"]) - 1)
    except (KeyError, TypeError, ValueError):  # sample_size may be missing, or a pair
        return None


def layers(folder: Path, part: str, variant: str | None = None) -> list[str]:
    """The names of a part's linear and convolutional layers, which LoRA factors can be added to."""
    shapes: dict[str, list[int]] = {}
    for file in _weights(folder / part, variant):
        shapes |= _shapes(file)
    return [key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and len(shape) > 1]


def unmatched(targets: Sequence[str], layers: Iterable[str], key: str) -> list[str]:
    """A sentence for each target that names no layer; a target is a layer's name or the end of one, as in PEFT."""
    known = list(layers)
    ends = sorted({re.sub(r"^.*\.(?=[^.\d][^.]*(\.\d+)?$)", "", name) for name in known})
    return [
        f"{key}: {target}: no layer has a name that ends so. There are {', '.join(ends)}."
        for target in targets
        if not any(name == target or name.endswith(f".{target}") for name in known)
    ]


def _config_problems(folder: Path, kind: Family) -> list[str]:
    found = []
    tokenizers = kind.text_encoders.values()
    configs = [f"{part}/config.json" for part in kind.parts] + [f"{name}/tokenizer_config.json" for name in tokenizers]
    for name in [*configs, "scheduler/scheduler_config.json"]:
        if not (folder / name).is_file():
            found.append(f"model.path: {folder / name} is missing.")
        elif _json(folder / name) is None:
            found.append(f"model.path: {folder / name} is not a JSON object.")
    for words in (folder / name for name in tokenizers):
        if not (words / "tokenizer.json").is_file() and not all(
            (words / name).is_file() for name in ("vocab.json", "merges.txt")
        ):
            found.append(
                f"model.path: {words} has no vocabulary: neither tokenizer.json nor both vocab.json and merges.txt."
            )
    scheduler = folder / "scheduler" / "scheduler_config.json"
    kind = (_json(scheduler) or {}).get("prediction_type", "epsilon")
    if kind not in PREDICTIONS:
        found.append(f"model.path: {scheduler}: prediction_type must be {' or '.join(PREDICTIONS)}, got {kind!r}.")
    return found


def _weights(part: Path, variant: str | None) -> list[Path]:
    """The files of a part's weights, whether or not they are there."""
    stem = "model" if part.name.startswith("text_encoder") else "diffusion_pytorch_model"
    dot = f".{variant}" if variant else ""
    index = _json(part / f"{stem}.safetensors.index{dot}.json")
    shards = (index or {}).get("weight_map")
    if isinstance(shards, dict):
        return [part / name for name in sorted(set(map(str, shards.values())))]
    return [part / f"{stem}{dot}.safetensors"]


def _weight_problems(part: Path, variant: str | None) -> list[str]:
    found = []
    for weights in _weights(part, variant):
        if not weights.is_file():
            found.append(_missing(weights))
            continue
        try:
            _shapes(weights)
        except (OSError, SafetensorError) as error:
            found.append(
                f"model.path: {weights} cannot be read as safetensors ({error}). Is it cut short? Get it again."
            )
    return found


def _missing(weights: Path) -> str:
    part = weights.parent
    pickles = [file for end in ("bin", "ckpt", "pt") for file in sorted(part.glob(f"*.{end}"))]
    others = sorted(file.name for file in part.glob("*.safetensors"))
    if others:
        return f"model.path: {weights} is missing, but {', '.join(others)} is there. Set model.variant accordingly."
    if pickles:
        return (
            f"model.path: {pickles[0]} is a pickle, and pickles are never opened: they can run code. "
            "Get the safetensors version of this checkpoint, or convert it where you trust it."
        )
    return f"model.path: {weights} is missing."


def _shapes(weights: Path) -> dict[str, list[int]]:
    """By tensor. Opening compares the header with the file's size; nothing else is read."""
    with safe_open(weights, "np") as file:
        return {name: file.get_slice(name).get_shape() for name in file.keys()}


def _json(path: Path) -> dict[str, Any] | None:
    try:
        read = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return None
    return read if isinstance(read, dict) else None
