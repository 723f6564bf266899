"""The formats of LoRA files, by what layers are called in them. Torch is not imported here.

A new format is a function in a file of its own here, and its line in FORMATS.
"""

from collections.abc import Callable, Mapping
from typing import Any

from equipoise.pipelines.text_to_image.families import Family

# What `export --format` knows → a layer's name there, given its part, its name in that, and the base's `shape`.
FORMATS: dict[str, Callable[[Family, str, str, Mapping[str, Any]], str]] = {
    "diffusers": lambda kind, part, module, shape: f"{part}.{module}",
    "kohya": lambda kind, *layer: kind.kohya(*layer),
    "comfyui": lambda kind, *layer: kind.comfyui(*layer),
}
