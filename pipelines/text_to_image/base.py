"""The frozen base: loaded once per process, given LoRA factors for a run, and left as it was afterwards."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import gc
import hashlib
import json
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, NamedTuple

import diffusers
import torch
from accelerate.state import PartialState
from diffusers import AutoencoderKL, DDIMScheduler, DiffusionPipeline, UNet2DConditionModel
from diffusers.training_utils import cast_training_params
from diffusers.utils import logging as diffusers_logging
from diffusers.utils.peft_utils import recurse_remove_peft_layers
from peft import LoraConfig
from safetensors import SafetensorError
from torch import Tensor
from transformers import CLIPTextModel, CLIPTokenizer
from transformers.utils import logging as transformers_logging

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.config import LoraSection, ModelSection
from equipoise.pipelines.text_to_image.families import Family, family, shape_of
from equipoise.pipelines.text_to_image.formats import ADAPTER, Factors, factors_of, read_lora
from equipoise.pipelines.text_to_image.layout import (
    is_local,
    model_problems,
    model_source,
    pipeline_class,
    unmatched,
)

DTYPES = {"no": torch.float32, "fp16": torch.float16, "bf16": torch.bfloat16}


class Latents(NamedTuple):
    """What training reads in place of pictures, of every variant (cut, mirror image) of each."""

    moments: Tensor  # (pictures, variants, 2, channels, height, width): the autoencoder's means and deviations
    places: Tensor  # (pictures, variants, 6) pixels, as `Family.predict` reads them


@dataclass
class Base:
    """A checkpoint with every parameter frozen, as a diffusers pipeline: to train, to sample, to load LoRA files."""

    identity: str  # what the latents computed with it depend on
    family: Family
    # Its scheduler has the checkpoint's noise schedule, read by training as DDPM and by sampling as DDIM.
    pipeline: DiffusionPipeline
    latents: dict[str, Latents] = field(default_factory=dict)  # by cache key, shared by the runs of this process

    @property
    def unet(self) -> UNet2DConditionModel:
        return self.pipeline.unet

    @property
    def vae(self) -> AutoencoderKL:
        return self.pipeline.vae

    @property
    def shape(self) -> dict[str, Any]:
        return shape_of(self.family.pipeline, self.unet.config)

    @property
    def tunable(self) -> dict[str, torch.nn.Module]:
        """By name: the parts that can be given factors."""
        return {name: getattr(self.pipeline, name) for name in ("unet", *self.family.text_encoders)}

    @contextmanager
    def adapted(self, lora: LoraSection, seed: int) -> Iterator[dict[str, torch.nn.Module]]:
        """Adds LoRA factors, float32 and trainable, for the time of the block; yields the tuned parts by name.

        They are those of the file `lora.start`, or fresh: equal seeds give equal factors, whatever the optimizer.

        Raises:
            InputError: a target names no layer; `lora.start` does not fit.
        """
        parts: dict[str, torch.nn.Module] = self.tunable if lora.text_encoder else {"unet": self.unet}
        try:
            torch.manual_seed(seed)
            for name, part in parts.items():
                key = "lora.targets" if name == "unet" else "lora.text_encoder_targets"
                targets = lora.targets if name == "unet" else lora.text_encoder_targets
                if wrong := unmatched(targets, _layers(part), key):
                    raise InputError("\n".join(wrong))
                adapter = LoraConfig(
                    r=lora.rank,
                    lora_alpha=lora.alpha or lora.rank,
                    lora_dropout=lora.dropout,
                    target_modules=list(targets),
                )
                try:
                    part.add_adapter(adapter, ADAPTER)
                except ValueError as error:
                    raise InputError(f"{key}: {', '.join(targets)}: {str(error).splitlines()[0]}") from None
                cast_training_params(part, torch.float32)
            if lora.start:
                self._start(lora, parts)
            yield parts
        finally:
            for part in parts.values():
                self.restore(part)

    def _start(self, lora: LoraSection, parts: dict[str, torch.nn.Module]) -> None:
        """Puts the factors of the file `lora.start` where they belong; layers that it lacks keep their fresh ones."""
        places: dict[str, Factors] = {}
        for name, part in parts.items():
            places |= factors_of(name, part)
        given = read_lora(Path(lora.start or ""), places, self.shape, key="lora.start")
        wrong = {f"rank {factors.rank}" for layer, factors in given.items() if factors.rank != places[layer].rank}
        wrong |= {
            f"alpha {factors.alpha:g}" for layer, factors in given.items() if factors.alpha != places[layer].alpha
        }
        if wrong:
            raise InputError(
                f"lora.start: {lora.start} has {', '.join(sorted(wrong))}, but lora.rank is {lora.rank} and lora.alpha "
                f"{lora.alpha or lora.rank:g}. Set them to the file's."
            )
        with torch.no_grad():
            for layer, factors in given.items():
                for ours, theirs in ((places[layer].down, factors.down), (places[layer].up, factors.up)):
                    if ours.shape != theirs.shape:
                        raise InputError(
                            f"lora.start: {lora.start}: a factor of {layer} is {tuple(theirs.shape)}, but here it is "
                            f"{tuple(ours.shape)}. The file is for another base."
                        )
                    ours.copy_(theirs)

    def restore(self, part: torch.nn.Module) -> None:
        """Takes every LoRA layer off again: the base's own weights were never touched."""
        recurse_remove_peft_layers(part)
        for attribute in ("peft_config", "_hf_peft_config_loaded"):
            part.__dict__.pop(attribute, None)
        part.eval().requires_grad_(False)
        part.zero_grad(set_to_none=True)


_loaded: dict[str, Base] = {}


def load_base(model: ModelSection, precision: str) -> Base:
    """Loads a checkpoint from safetensors, or returns the one this process already has.

    Raises:
        InputError: the path or hub id holds no loadable Stable Diffusion checkpoint.
    """
    device = PartialState().device
    key = json.dumps([model.model_dump(), precision, str(device)])
    if key in _loaded:
        return _loaded[key]
    _loaded.clear()  # one base in memory at a time
    gc.collect()
    wrong = model_problems(model.path, model.variant) if is_local(model.path) else []
    if wrong:
        raise InputError("\n".join(wrong))
    for logging in (transformers_logging, diffusers_logging):
        logging.disable_progress_bar()  # a second bar, gone in an instant, would break up ours
    source, dtype, common = model_source(model.path), DTYPES[precision], {"revision": model.revision}
    try:
        kind = family(pipeline_class(model.path, model.revision))
        pipeline = getattr(diffusers, kind.pipeline).from_pretrained(
            source,
            scheduler=DDIMScheduler.from_pretrained(source, subfolder="scheduler", **common),
            # The autoencoder stays in float32: those of Stable Diffusion overflow into black pictures in fp16.
            dtype={"vae": torch.float32, "default": dtype},
            variant=model.variant,
            use_safetensors=True,
            **dict.fromkeys(kind.left_out),
            **common,
        )
    except (OSError, ValueError, KeyError, TypeError, SafetensorError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"model.path: {model.path} cannot be loaded as Stable Diffusion: {reason}") from None
    pipeline.set_progress_bar_config(disable=True)
    for encoder, tokenizer in kind.text_encoders.items():
        _check_tokenizer(model.path, getattr(pipeline, tokenizer), getattr(pipeline, encoder))
    for part in kind.parts:
        getattr(pipeline, part).requires_grad_(False).eval().to(device)
    base = Base(_identity(source, pipeline.vae), kind, pipeline)
    _loaded[key] = base
    return base


def _layers(part: torch.nn.Module) -> list[str]:
    """The names of the layers with a matrix or a kernel, which factors can be added to."""
    return [name for name, module in part.named_modules() if getattr(getattr(module, "weight", None), "ndim", 0) > 1]


def _check_tokenizer(path: str, tokenizer: CLIPTokenizer, text_encoder: CLIPTextModel) -> None:
    """Without its files, transformers makes an empty tokenizer, and every caption would read the same."""
    words, length = text_encoder.config.vocab_size, text_encoder.config.max_position_embeddings
    if len(tokenizer) != words or tokenizer.model_max_length > length:
        raise InputError(
            f"model.path: {path}: the tokenizer has {len(tokenizer)} words and gives up to "
            f"{tokenizer.model_max_length} tokens, but the text encoder reads {words} words and {length} tokens. "
            "Put the tokenizer that belongs to this text encoder into the checkpoint's folder tokenizer."
        )


def _identity(source: str, vae: AutoencoderKL) -> str:
    """Changes when the autoencoder does, wherever the checkpoint lies."""
    digest = hashlib.sha256(json.dumps(vae.config, default=str, sort_keys=True).encode())
    for name, tensor in vae.state_dict().items():
        digest.update(name.encode())
        digest.update(tensor.flatten()[:64].cpu().numpy().tobytes())
    return f"{Path(source).name}-{digest.hexdigest()[:16]}"
