"""LoRA files under the names that apps look for: diffusers and PEFT, kohya's scripts, and ComfyUI.

All three hold the same factors A (r, n…) and B (m, r…) of each layer; they differ in what they call a layer, and in
where α stands. kohya's names are those of diffusers with underscores; ComfyUI's are the modules of the original code,
from before diffusers renamed them.
"""

# peft and safetensors annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import json
import re
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from peft.utils.integrations import dequantize_module_weight
from safetensors import SafetensorError, safe_open
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.files import explained
from equipoise.pipelines.runs.checkpoints import save_tensors
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.formats.factors import Factors, exchanged, halves_exchanged, join, split
from equipoise.pipelines.text_to_image.formats.names import FORMATS

ADAPTER = "default"  # peft's name for the one that is trained
COMFYUI_SIZES = "comfyui_sizes"  # in our metadata: the sizes of DoRA are times `proportions_of`

_ENDS = {  # of a tensor's name → what it is, in all formats, and in files that diffusers' own scripts write
    ".lora_A.weight": "down",
    ".lora_B.weight": "up",
    ".lora_down.weight": "down",
    ".lora_up.weight": "up",
    ".lora.down.weight": "down",
    ".lora.up.weight": "up",
    ".lora_linear_layer.down.weight": "down",
    ".lora_linear_layer.up.weight": "up",
    ".alpha": "alpha",
    ".lora_magnitude_vector": "magnitude",  # DoRA's, in diffusers' files
    ".lora_magnitude_vector.weight": "magnitude",  # the same: what diffusers finds of a text encoder's
    ".dora_scale": "magnitude",  # in the others, (m, 1…)
}
DOWN, UP = (tuple(end for end, what in _ENDS.items() if what == wanted) for wanted in ("down", "up"))


def canonical(part: str, module: str) -> str:
    """A layer's name in a file: transformers 5 took `text_model` out of the text encoder's, other versions want it."""
    lost = part.startswith("text_encoder") and not module.startswith("text_model.")
    return f"{part}.text_model.{module}" if lost else f"{part}.{module}"


def name_in(format: str, layer: str, shape: Mapping[str, Any]) -> str:
    """What a format calls a layer.

    Args:
        format: one of FORMATS.
        layer: as diffusers calls it, such as unet.mid_block.attentions.0.proj_in.
        shape: the base's, from `families.shape_of`.
    """
    part, module = layer.split(".", 1)
    return FORMATS[format](family(shape["family"]), part, module, shape)


def factors_of(part: str, model: torch.nn.Module) -> dict[str, Factors]:
    """The factors on a tuned part, the very tensors, by their layers' names in diffusers."""
    return {
        canonical(part, name): Factors(
            layer.lora_A[ADAPTER].weight.data,
            layer.lora_B[ADAPTER].weight.data,
            _alpha(layer.lora_alpha[ADAPTER], layer.r[ADAPTER], layer.use_rslora[ADAPTER]),
            layer.lora_magnitude_vector[ADAPTER].weight.data if ADAPTER in layer.lora_magnitude_vector else None,
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def proportions_of(part: str, model: torch.nn.Module) -> dict[str, Tensor]:
    """‖W‖ / ‖W + α/r·BA‖ (m,) of the rows of each layer with sizes of DoRA, by the layers' names in diffusers.

    DoRA's size is that of a row of W + α/r·BA. ComfyUI divides by ‖W‖ in its place (`weight_decompose` in its
    comfy/weight_adapter/base.py, as of 0.3.75): times this, the size gives there what it gives here.
    """
    found = {}
    for name, layer in model.named_modules():
        if isinstance(layer, LoraLayer) and ADAPTER in layer.lora_magnitude_vector:
            weight = dequantize_module_weight(layer.get_base_layer()).float()
            whole = weight + layer.get_delta_weight(ADAPTER)
            found[canonical(part, name)] = weight.flatten(1).norm(dim=1) / whole.flatten(1).norm(dim=1)
    return found


def comfyui_rows(layer: str, shape: Mapping[str, Any], rows: Tensor) -> Tensor:
    """Numbers (m,) of a layer's rows in ComfyUI's order, or back: it reorders factors that it reads, but no sizes."""
    return exchanged(rows) if family(shape["family"]).swapped(*layer.split(".", 1), shape) else rows


def write_lora(
    path: Path,
    format: str,  # one of FORMATS
    layers: Mapping[str, Factors],  # by their names in diffusers
    shape: Mapping[str, Any],  # the base's, from `families.shape_of`
    metadata: Mapping[str, str],
) -> None:
    """Writes one file with the factors as they are; α stands beside them, except in diffusers' format: in its metadata.

    Raises:
        InputError: it cannot be written (a full disk, say), or the format has no names for what these are.
    """
    down, up = (
        (".lora_A.weight", ".lora_B.weight") if format == "diffusers" else (".lora_down.weight", ".lora_up.weight")
    )
    tensors: dict[str, Tensor] = {}
    for name, factors in _named(format, layers, shape).items():
        tensors |= {name + down: factors.down, name + up: factors.up}
        if factors.magnitude is not None and format == "diffusers":
            end = ".weight" if name.startswith("text_encoder") else ""
            tensors[f"{name}.lora_magnitude_vector{end}"] = factors.magnitude
        elif factors.magnitude is not None:
            tensors[f"{name}.dora_scale"] = factors.magnitude.reshape(-1, *[1] * (factors.down.ndim - 1))
        if format != "diffusers":
            tensors[f"{name}.alpha"] = torch.tensor(factors.alpha)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors, dict(metadata))


def _named(format: str, layers: Mapping[str, Factors], shape: Mapping[str, Any]) -> dict[str, Factors]:
    """By their names in a file; where kohya's scripts have one layer for several of ours, those as one."""
    if format != "kohya":
        return {name_in(format, layer, shape): factors for layer, factors in layers.items()}
    kind = family(shape["family"])
    joint = _joint(layers, shape) if kind.writes_fused else {}
    made = {name: join([layers.get(layer) for layer in ours], rows) for name, (ours, rows) in joint.items()}
    for layer, factors in layers.items():
        swapped = kind.swapped(*layer.split(".", 1), shape)
        made.setdefault(name_in(format, layer, shape), halves_exchanged(factors) if swapped else factors)
    return made


def _joint(layers: Iterable[str], shape: Mapping[str, Any]) -> dict[str, tuple[list[str], tuple[int, ...]]]:
    """kohya's layers that are several of ours: ours in order ("" for one without factors), and the rows of each."""
    kind = family(shape["family"])
    found: dict[str, tuple[list[str], tuple[int, ...]]] = {}
    for layer in layers:
        if at := kind.fused(*layer.split(".", 1), shape):
            place, rows = at
            ours, _ = found.setdefault(kind.joint(*layer.split(".", 1), shape), ([""] * len(rows), rows))
            ours[place] = layer
    return found


def read_metadata(path: Path) -> dict[str, str]:
    """Raises InputError if the file is no safetensors file."""
    with opened(path) as file:
        return file.metadata() or {}


def sizes_for_comfyui(file: Path) -> bool:
    """Whether the sizes of DoRA in a LoRA file are those that ComfyUI wants, written by `export`."""
    try:
        return json.loads(read_metadata(file).get("equipoise", "{}")).get(COMFYUI_SIZES) is True
    except (ValueError, AttributeError, RecursionError):  # another program's
        return False


def layer_names(path: Path) -> set[str]:
    """The layers, as diffusers names them, in a file of its format. Raises InputError if it is no safetensors file."""
    with opened(path) as file:
        return {name.removesuffix(end) for name in file.keys() for end in _ENDS if name.endswith(end)}


def read_lora(path: Path, layers: Iterable[str], shape: Mapping[str, Any], key: str = "") -> dict[str, Factors]:
    """The factors in a file of any of the formats, by their layers' names in diffusers.

    Args:
        layers: all that may be in it, as diffusers names them.
        shape: the base's, from `families.shape_of`.
        key: what stands before the path in errors, such as the configuration's key.

    Raises:
        InputError: it is not safetensors, or holds other layers, other kinds of adapters, or half a pair.
    """
    layers = list(layers)
    joint = _joint(layers, shape)
    known = {name: layer for layer in layers for name in _all_names(layer, shape)} | {name: name for name in joint}
    found: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    kind, swapped = family(shape["family"]), set()
    with opened(path, key) as file:
        metadata = file.metadata() or {}
        for name in file.keys():
            end = next((end for end in _ENDS if name.endswith(end)), "")
            layer = known.get(name.removesuffix(end)) if end else None
            if layer is None:
                strange.append(name)
            else:
                turned = layer not in joint and kind.swapped(*layer.split(".", 1), shape)
                if turned and name.removesuffix(end) == name_in("kohya", layer, shape):
                    swapped.add(layer)
                found.setdefault(layer, {})[_ENDS[end]] = file.get_tensor(name)
    where = f"{key}: {path}" if key else str(path)
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise InputError(
            f"{where}: {', '.join(strange[:3])}{more} are no LoRA factors of layers that are tuned here. Are "
            "lora.targets and lora.text_encoder the file's? Is it for another base, or of another kind, such as LoHa?"
        )
    half = [layer for layer, tensors in found.items() if not {"down", "up"} <= tensors.keys()]
    if half or not found:
        what = f"one of both factors of {', '.join(half[:3])} is missing" if half else "holds no factors"
        raise InputError(f"{where}: {what}. Is it the whole file?")
    described = _described(metadata)
    made: dict[str, Factors] = {}
    for layer, tensors in found.items():
        pair, alpha = (tensors["down"], tensors["up"]), tensors.get("alpha", torch.ones(1))
        fits = layer not in joint or len(tensors["up"]) == sum(joint[layer][1])
        fits = fits and ("magnitude" not in tensors or tensors["magnitude"].numel() == len(tensors["up"]))
        if not all(tensor.ndim > 1 and tensor.numel() for tensor in pair) or alpha.numel() != 1 or not fits:
            raise InputError(f"{where}: {layer}: its tensors have not the shapes of LoRA factors. Is the file damaged?")
        if not all(tensor.float().isfinite().all() for tensor in tensors.values()):
            raise InputError(f"{where}: {layer} holds numbers that are not finite. Take an earlier file.")
        rank = len(tensors["down"])
        alpha = float(tensors["alpha"]) if "alpha" in tensors else _described_alpha(described, layer, rank)
        factors = Factors(tensors["down"], tensors["up"], alpha, tensors.get("magnitude"))
        if layer not in joint:
            made[layer] = halves_exchanged(factors) if layer in swapped else factors
            continue
        ours, rows = joint[layer]
        for one, own in zip(ours, split(factors, rows), strict=True):
            if one:
                made[one] = own
            elif own.up.any():
                raise InputError(
                    f"{where}: {layer} changes a layer that is not tuned here. Are lora.targets the file's?"
                )
    return made


@contextmanager
def opened(path: Path, key: str = "") -> Iterator[Any]:
    """A safetensors file. Raises InputError, with `key` before the path, if it is none."""
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        where = f"{key}: {path}" if key else str(path)
        raise InputError(f"{where}: cannot be read as safetensors ({error}).") from None


def _all_names(layer: str, shape: Mapping[str, Any]) -> set[str]:
    """A layer's names in all formats and in files of other versions of the apps, but for one that it shares."""
    part, module = layer.split(".", 1)
    kind = family(shape["family"])
    shared = kind.writes_fused and kind.fused(part, module, shape) is not None
    names = {
        name_in(format, layer, shape)
        for format in FORMATS
        if format not in kind.refused and (format != "kohya" or not shared)
    }
    return names | kind.aliases(part, module, shape) | {layer.replace(".text_model.", ".", 1)}


def _described(metadata: Mapping[str, str]) -> dict[str, Any]:
    """What diffusers' metadata says; it leaves α out of the tensors."""
    try:
        described = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return described if isinstance(described, dict) else {}
    except (ValueError, RecursionError):  # another program's, not as diffusers writes it
        return {}


def _described_alpha(described: Mapping[str, Any], layer: str, rank: int) -> float:
    """A layer's α, as it is read with α / rank; the rank where nothing is said."""
    part, _, module = layer.replace(".text_model.", ".", 1).partition(".")
    alpha, patterns = described.get(f"{part}.lora_alpha", rank), described.get(f"{part}.alpha_pattern") or {}
    try:
        own = next((value for key, value in patterns.items() if _matches(key, module)), alpha)
        return _alpha(float(own), rank, bool(described.get(f"{part}.use_rslora")))
    except (ValueError, TypeError, AttributeError, re.error):
        return float(rank)


def _matches(pattern: str, module: str) -> bool:
    """Whether a file's pattern is that of a layer. Raises InputError for those that could take for ever to find out."""
    repeats = re.sub(r"\\.", "", pattern)
    if re.search(r"\)[*+?{]", repeats) or len(re.findall(r"[*+?{]", repeats)) > 2:
        raise InputError(f"alpha_pattern: {pattern[:80]!r} is too intricate; write out the layers' names.")
    return re.match(rf"(.*\.)?({pattern})$", module) is not None


def _alpha(alpha: float, rank: int, rslora: bool) -> float:
    """Of a layer whose factors count by alpha / rank, as all apps but peft have it: rsLoRA divides by √rank."""
    return float(alpha) * (rank**0.5 if rslora else 1.0)
