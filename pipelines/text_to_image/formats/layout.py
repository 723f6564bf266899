"""What a checkpoint must hold, found out from names, JSON and headers: no weight is loaded."""

import json
import os
import shlex
from collections.abc import Collection, Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from safetensors import SafetensorError, safe_open

from equipoise.errors import InputError, UnknownNameError
from equipoise.pipelines import demo
from equipoise.pipelines.config.records import HUB_ID
from equipoise.pipelines.text_to_image.families import TITLES, Family, family, trained
from equipoise.pipelines.training.layers import named_by, unmatched

PREDICTIONS = ("epsilon", "v_prediction", "sample")  # what a denoiser may have learnt to predict
INDEXES = ("model_index.json", "modular_model_index.json")  # a checkpoint has either
_SINGLE = {  # layers that one family's files have, with the text encoders → its pipeline
    "conditioner.embedders.1.model.": "StableDiffusionXLPipeline",
    "cond_stage_model.": "StableDiffusionPipeline",
    "text_encoders.clip_g.": "StableDiffusion3Pipeline",
}
HUB_TIMEOUT = 10.0  # seconds for the hub to answer the first time


def model_source(path: str) -> str:
    """What to hand to from_pretrained: a folder or a hub id."""
    return str(demo.base_folder()) if path == demo.NAME else path


def is_local(path: str) -> bool:
    return path == demo.NAME or os.path.exists(model_source(path)) or not HUB_ID.fullmatch(path)


def model_problems(path: str, variant: str | None = None, apart: Collection[str] = ()) -> list[str]:
    """Why a local path is not a checkpoint of a known family that can be loaded safely.

    Args:
        apart: Parts that come from elsewhere.
    """
    folder = Path(model_source(path))
    if os.path.isfile(folder):  # unlike pathlib's, False also where no path can be so long
        if folder.suffix == ".safetensors":
            return [_single_file(folder)]
        return [
            f"model.path: {folder} is not a checkpoint folder; pickles (.ckpt, .bin, .pt) are never opened. "
            "Give a folder in diffusers' layout with safetensors weights."
        ]
    if not os.path.isdir(folder):
        return [
            f"model.path: {folder} does not exist. Give a checkpoint folder, a hub id such as owner/name, or `demo`."
        ]
    index = next((file for file in (folder / name for name in INDEXES) if file.is_file()), None)
    if index is None:
        return [f"model.path: {folder} has no model_index.json, so it is not a checkpoint in diffusers' layout."]
    described = _json(index)
    if wrong := _index_problems(described, index, str(folder), apart):
        return wrong
    described = described or {}
    kind = family(described["_class_name"])
    encoders = [name for name in encoders_of(kind, described) if name not in apart]
    parts = (kind.denoiser, "vae", *encoders)
    found = _config_problems(folder, kind, parts, [kind.text_encoders[name] for name in encoders])
    for part in parts:
        found += _weight_problems(folder / part, variant)
    return found


def _single_file(file: Path) -> str:
    """What to do with a checkpoint in one file: with a command, where its layers' names say whose it is."""
    try:
        with safe_open(file, "pt") as weights:
            names = "\n".join(weights.keys())
    except (OSError, SafetensorError):
        names = ""
    said, path = f"model.path: {file} is a single-file checkpoint", json.dumps(str(file), ensure_ascii=False)
    if "lora_" in names:
        return f"{said} of LoRA factors. Give the base that they are for, and the file as lora.start to go on from it."
    kind = next((kind for layer, kind in _SINGLE.items() if layer in names), "")
    if not kind:
        kinds = ", ".join(trained())
        return (
            f"{said}. Convert it once, by the pipeline of diffusers that it is for ({kinds}): "
            f'PIPELINE.from_single_file({path}).save_pretrained("FOLDER"), then give FOLDER.'
        )
    code = f'from diffusers import {kind}; {kind}.from_single_file({path}).save_pretrained("FOLDER")'
    return f"{said} of {kind[: -len('Pipeline')]}. Convert it once: python -c {shlex.quote(code)}, then give FOLDER."


def read_index(path: str, revision: str | None = None, fetch: bool = True) -> dict[str, Any]:
    """A checkpoint's model_index.json; empty where it is no JSON object. Raises OSError or ValueError without one.

    Args:
        fetch: ask the hub where it was not fetched before.
    """
    found = None
    for name in INDEXES:
        try:
            found = _json(_file(path, name, revision, fetch))
        except OSError:
            if name == INDEXES[-1]:
                raise
        if found is not None:
            return found
    return {}


def encoders_of(kind: Family, index: Mapping[str, Any]) -> tuple[str, ...]:
    """The text encoders that a checkpoint has: all of its family's, but for the optional that its index leaves out."""
    return tuple(name for name in kind.text_encoders if name not in kind.optional or _names(index, name))


def _names(index: Mapping[str, Any], part: str) -> bool:
    entry = index.get(part)  # [library, class]
    return isinstance(entry, list) and len(entry) == 2 and entry[1] is not None


def _index_problems(
    described: Mapping[str, Any] | None, index: Path, name: str, apart: Collection[str] = ()
) -> list[str]:
    """Why the checkpoint that this model_index.json describes is of another kind."""
    if described is None:
        return [f"model.path: {index} is not a JSON object."]
    kind = str(described.get("_class_name"))
    try:
        family(kind)
    except UnknownNameError:
        return [f"model.path: {name} is a {kind}; this pipeline tunes {TITLES} ({', '.join(trained())})."]
    except InputError as error:
        return [f"model.path: {name} is a {kind}: {error}"]
    return _lacking(family(kind), described, name, apart)


def _lacking(kind: Family, described: Mapping[str, Any], name: str, apart: Collection[str]) -> list[str]:
    """A sentence for each part that is needed, is not in the index, and does not come from elsewhere."""
    found = []
    for part in (*kind.parts, *kind.text_encoders.values()):
        if part in kind.apart and part not in apart and not _names(described, part):
            found.append(f"model.path: {name} has no {part}. Give model.{part}: {kind.apart[part][1]}.")
        elif part in described and not kind.modular and not _names(described, part):
            owner = next((encoder for encoder, words in kind.text_encoders.items() if words == part), part)
            if owner not in (*kind.optional, *kind.apart):
                found.append(f"model.path: {name} has no {part}, which {kind.title} needs. Give one that has it.")
    return found


def hub_problems(path: str, revision: str | None = None, apart: Collection[str] = ()) -> list[str]:
    """Why a hub id is not a checkpoint of a known family, asked before gigabytes are fetched."""
    try:
        index = _hub_index(path, revision)
    except Exception as error:  # OSError, ValueError, or the HTTP client's own, whichever that is
        reason = " ".join(str(error).split()).split(". ")[0]
        return [
            f"model.path: {path} is no folder here, and the hub gave no model_index.json of that name ({reason}). "
            "Check the spelling, the revision and the connection."
        ]
    return _index_problems(_json(index), index, path, apart)


def _hub_index(path: str, revision: str | None) -> Path:
    """A hub id's index of either name. Raises whatever the hub's client does without one."""
    from huggingface_hub import get_hf_file_metadata, hf_hub_download, hf_hub_url, try_to_load_from_cache
    from huggingface_hub.errors import EntryNotFoundError

    for name in INDEXES:
        if isinstance(known := try_to_load_from_cache(path, name, revision=revision), str):
            return Path(known)
    for name in INDEXES:
        try:
            # Asks once; a download from a hub that does not answer is tried again for minutes.
            get_hf_file_metadata(hf_hub_url(path, name, revision=revision), timeout=HUB_TIMEOUT)
        except EntryNotFoundError:  # the repository is there
            if name == INDEXES[-1]:
                raise
        else:
            return Path(hf_hub_download(path, name, revision=revision))
    raise AssertionError(path)


def native_resolution(path: str, revision: str | None = None) -> int | None:
    """Pixels, the side of the pictures that a checkpoint's denoiser was made for; None where its files do not say."""
    try:
        kind = family(read_index(path, revision).get("_class_name", ""))
        denoiser = read_config(path, kind.denoiser, revision)
        return int(denoiser["sample_size"]) * _factor(read_config(path, "vae", revision))
    except (KeyError, InputError):  # no family, or one whose config leaves it out
        return kind.native if "kind" in locals() else None
    except (OSError, TypeError, ValueError, OverflowError, RecursionError):  # sample_size may be missing, or a pair
        return None


def stride(path: str, revision: str | None = None) -> int | None:
    """Pixels: sides of pictures must be multiples of it; None where the checkpoint's files do not say."""
    try:
        kind = family(read_index(path, revision).get("_class_name", ""))
        return _factor(read_config(path, "vae", revision)) * kind.patch
    except (InputError, KeyError, OSError, TypeError, ValueError, RecursionError):
        return None


def read_config(path: str, part: str, revision: str | None = None, fetch: bool = True) -> dict[str, Any]:
    """A part's config.json, likewise, or that of a model that is one part."""
    return json.loads(_file(path, f"{part}/config.json".lstrip("/"), revision, fetch).read_text(encoding="utf-8"))


def prediction(path: str, revision: str | None = None) -> str:
    """What a base that was trained by diffusion answers. Raises OSError or ValueError where no scheduler is."""
    file = _file(path, "scheduler/scheduler_config.json", revision, fetch=True)
    return json.loads(file.read_text(encoding="utf-8")).get("prediction_type", "epsilon")


def _file(path: str, name: str, revision: str | None, fetch: bool) -> Path:
    from huggingface_hub import hf_hub_download, try_to_load_from_cache

    if is_local(path):
        return Path(model_source(path), name)
    if fetch:  # it is fetched later in any case
        return Path(hf_hub_download(path, name, revision=revision))
    if isinstance(known := try_to_load_from_cache(path, name, revision=revision), str):
        return Path(known)
    raise OSError(f"{path} was not fetched yet")


def _factor(vae: Mapping[str, Any]) -> int:
    """Pixels to a side of a latent cell."""
    if "temperal_downsample" in vae:  # of autoencoders of videos
        return 2 ** len(vae["temperal_downsample"])
    return 2 ** (len(vae.get("encoder_block_out_channels") or vae["block_out_channels"]) - 1)


def layers(folder: Path, part: str, variant: str | None = None) -> list[str]:
    """The names of a part's linear and convolutional layers, which LoRA factors can be added to."""
    shapes: dict[str, list[int]] = {}
    for file in _weights(folder / part, variant):
        shapes |= _shapes(file)
    names = [key.removesuffix(".weight") for key, shape in shapes.items() if key.endswith(".weight") and len(shape) > 1]
    return [name for name in names if not name.endswith("embedding")]  # a table of words or places


def encoder_problems(targets: Sequence[str], known: Sequence[str]) -> list[str]:
    """What is wrong with `lora.text_encoder_targets`, given a text encoder's layers."""
    key = "lora.text_encoder_targets"
    if wrong := unmatched(targets, known, key):
        return wrong
    if any(".self_attn." in name and named_by(targets, name) for name in known):
        return []
    return [f"{key}: diffusers loads a text encoder's factors only if some are on its attention. Add q_proj."]


def _config_problems(folder: Path, kind: Family, parts: Iterable[str], tokenizers: Sequence[str]) -> list[str]:
    found = []
    configs = [f"{part}/config.json" for part in parts] + [f"{name}/tokenizer_config.json" for name in tokenizers]
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
    described = _json(scheduler) or {}
    if kind.noise == "diffusion" and (answer := described.get("prediction_type", "epsilon")) not in PREDICTIONS:
        found.append(f"model.path: {scheduler}: prediction_type must be {' or '.join(PREDICTIONS)}, got {answer!r}.")
    if kind.noise == "diffusion" and str(described.get("_class_name")).startswith(("EDM", "FlowMatch")):
        found.append(
            f"model.path: {scheduler}: {described['_class_name']} has another noise schedule than {kind.title} is "
            "trained with here. Use a base with a scheduler of betas, such as DDIM or Euler."
        )
    if kind.noise == "flow" and not _is_flow(described):
        found.append(f"model.path: {scheduler}: must be a flow-matching scheduler, got {described['_class_name']}.")
    return found


def _is_flow(scheduler: Mapping[str, Any]) -> bool:
    """Whether a scheduler adds noise by flow matching; solvers for several ways say so in their config."""
    named = str(scheduler.get("_class_name", "FlowMatch")).startswith("FlowMatch")
    return named or (bool(scheduler.get("use_flow_sigmas")) and scheduler.get("prediction_type") == "flow_prediction")


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
        if not os.path.isfile(weights):
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
    except (OSError, ValueError, RecursionError):
        return None
    return read if isinstance(read, dict) else None
