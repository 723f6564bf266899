"""LoRA files under the names that apps look for: diffusers and PEFT, kohya's scripts, and ComfyUI.

All three hold the same factors A (r, n…) and B (m, r…) of each layer; they differ in what they call a layer, and in
where α stands. kohya's names are those of diffusers with underscores; ComfyUI's are the modules of the original code,
from before diffusers renamed them.
"""

# peft and safetensors annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import json
from collections.abc import Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from peft.tuners.lora import LoraLayer
from safetensors import SafetensorError, safe_open
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.checkpoints import save_tensors
from equipoise.pipelines.files import explained
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.families.unet import original_name

ADAPTER = "default"  # peft's name for the one that is trained
FORMATS = ("diffusers", "kohya", "comfyui")

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
}


@dataclass(frozen=True, eq=False)
class Factors:
    """One layer's update of its weight: alpha / r · up @ down."""

    down: Tensor  # A (r, n…)
    up: Tensor  # B (m, r…)
    alpha: float

    @property
    def rank(self) -> int:
        return self.down.shape[0]


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
    if format == "diffusers":
        return layer
    part, module = layer.split(".", 1)
    return getattr(family(shape["family"]), format)(part, module, shape)


def factors_of(part: str, model: torch.nn.Module) -> dict[str, Factors]:
    """The factors on a tuned part, the very tensors, by their layers' names in diffusers."""
    return {
        canonical(part, name): Factors(
            layer.lora_A[ADAPTER].weight.data, layer.lora_B[ADAPTER].weight.data, float(layer.lora_alpha[ADAPTER])
        )
        for name, layer in model.named_modules()
        if isinstance(layer, LoraLayer)
    }


def write_lora(
    path: Path,
    format: str,  # one of FORMATS
    layers: Mapping[str, Factors],  # by their names in diffusers
    shape: Mapping[str, Any],  # the base's, from `families.shape_of`
    metadata: Mapping[str, str],
) -> None:
    """Writes one file with the factors as they are; α stands beside them, except in diffusers' format: in its metadata.

    Raises:
        InputError: it cannot be written (a full disk, say).
    """
    down, up = (
        (".lora_A.weight", ".lora_B.weight") if format == "diffusers" else (".lora_down.weight", ".lora_up.weight")
    )
    tensors: dict[str, Tensor] = {}
    for layer, factors in layers.items():
        name = name_in(format, layer, shape)
        tensors |= {name + down: factors.down, name + up: factors.up}
        if format != "diffusers":
            tensors[f"{name}.alpha"] = torch.tensor(factors.alpha)
    with explained(path):
        path.parent.mkdir(parents=True, exist_ok=True)
        save_tensors(path, tensors, dict(metadata))


def read_metadata(path: Path) -> dict[str, str]:
    """Raises InputError if the file is no safetensors file."""
    with _opened(path) as file:
        return file.metadata() or {}


def layer_names(path: Path) -> set[str]:
    """The layers, as diffusers names them, in a file of its format. Raises InputError if it is no safetensors file."""
    with _opened(path) as file:
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
    known = {name: layer for layer in layers for name in _all_names(layer, shape)}
    found: dict[str, dict[str, Tensor]] = {}
    strange: list[str] = []
    with _opened(path, key) as file:
        metadata = file.metadata() or {}
        for name in file.keys():
            end = next((end for end in _ENDS if name.endswith(end)), "")
            layer = known.get(name.removesuffix(end)) if end else None
            if layer is None:
                strange.append(name)
            else:
                found.setdefault(layer, {})[_ENDS[end]] = file.get_tensor(name)
    where = f"{key}: {path}" if key else str(path)
    if strange:
        more = f" and {len(strange) - 3} more" if len(strange) > 3 else ""
        raise InputError(
            f"{where}: {', '.join(strange[:3])}{more} are no LoRA factors of layers that are tuned here. Are "
            "lora.targets the file's? Is it for another base, or of another kind, such as LoHa or DoRA?"
        )
    half = [layer for layer, tensors in found.items() if not {"down", "up"} <= tensors.keys()]
    if half or not found:
        what = f"one of both factors of {', '.join(half[:3])} is missing" if half else "holds no factors"
        raise InputError(f"{where}: {what}. Is it the whole file?")
    alphas = _described_alphas(metadata)
    return {
        layer: Factors(
            tensors["down"],
            tensors["up"],
            float(tensors["alpha"]) if "alpha" in tensors else alphas.get(layer.split(".")[0], len(tensors["down"])),
        )
        for layer, tensors in found.items()
    }


@contextmanager
def _opened(path: Path, key: str = "") -> Iterator[Any]:
    try:
        with safe_open(path, "pt") as file:
            yield file
    except (OSError, SafetensorError) as error:
        where = f"{key}: {path}" if key else str(path)
        raise InputError(f"{where}: cannot be read as safetensors ({error}).") from None


def _all_names(layer: str, shape: Mapping[str, Any]) -> set[str]:
    """A layer's names in all formats, and in files of other versions of the apps."""
    names = {name_in(format, layer, shape) for format in FORMATS}
    part, module = layer.split(".", 1)
    if part == "unet":  # kohya's scripts of either kind of U-Net
        names |= {f"lora_unet_{name.replace('.', '_')}" for name in (module, original_name(module, shape))}
    return names | {layer.replace(".text_model.", ".", 1)}


def _described_alphas(metadata: Mapping[str, str]) -> dict[str, float]:
    """By part, as diffusers' metadata has them; it leaves α out of the tensors."""
    try:
        described = json.loads(metadata.get("lora_adapter_metadata", "{}"))
        return {
            key.removesuffix(".lora_alpha"): float(value)
            for key, value in described.items()
            if key.endswith(".lora_alpha")
        }
    except (ValueError, TypeError, AttributeError):  # another program's, not as diffusers writes it
        return {}
