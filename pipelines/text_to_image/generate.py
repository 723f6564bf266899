"""Pictures from fixed noise: prompt, seed and starting noise are the same for every run; only the weights differ."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from diffusers import DiffusionPipeline
from peft.tuners.tuners_utils import BaseTunerLayer
from PIL import Image, PngImagePlugin

from equipoise.errors import InputError
from equipoise.pipelines.media.pictures import open_picture
from equipoise.pipelines.text_to_image.config import TextToImageSamples
from equipoise.pipelines.text_to_image.cuts import cut, to_tensor
from equipoise.pipelines.text_to_image.families import autoencoders, family
from equipoise.pipelines.text_to_image.pairs import each_prompts


@dataclass(frozen=True)
class Sample:
    prompt: str
    seed: int
    image: Image.Image
    finite: bool  # False where the picture holds NaN or infinity, drawn as black

    @property
    def broken(self) -> bool:
        """Black, blank or one flat tone, or not finite."""
        return not self.finite or float(np.asarray(self.image, dtype=np.float64).std(axis=(0, 1)).max()) < 4.0

    def save(self, path: Path, **facts: object) -> None:
        """Writes a PNG whose metadata says how it was made."""
        info = PngImagePlugin.PngInfo()
        for key, value in {"prompt": self.prompt, "seed": self.seed, **facts}.items():
            info.add_itxt(key, str(value))
        path.parent.mkdir(parents=True, exist_ok=True)
        self.image.save(path, pnginfo=info)


@torch.no_grad()
def generate(pipeline: DiffusionPipeline, samples: TextToImageSamples, size: int, progress=None) -> list[Sample]:
    """Every prompt from every seed, prompts outermost.

    Args:
        pipeline: with the LoRA to show, at the strength to show, already active.
        size: pixels, both ways.
        progress: called with the number of pictures after each batch.
    """
    kind, vae = family(type(pipeline).__name__), pipeline.vae
    wanted = [(prompt, samples.seed + index) for prompt in samples.prompts for index in range(samples.count)]
    shape = autoencoders.shape(vae, size, size)
    guidance = kind.usual_guidance(pipeline) if samples.guidance is None else samples.guidance
    sources = _sources(pipeline, samples, size)
    made: list[Sample] = []
    for start in range(0, len(wanted), samples.batch):
        chunk = wanted[start : start + samples.batch]
        noise = [  # drawn on the CPU: equal on any device
            torch.randn(shape, generator=torch.Generator().manual_seed(seed)) for _, seed in chunk
        ]
        latents = kind.draw(
            pipeline,
            [prompt for prompt, _ in chunk],
            samples.negative,
            torch.stack(noise).to(vae.device),
            (size, size),
            samples.steps,
            guidance,
            **({"source": torch.stack(sources[start : start + samples.batch])} if sources else {}),
        )
        decoded = autoencoders.decode(vae, latents)
        for (prompt, seed), pixels in zip(chunk, decoded.float().cpu(), strict=True):
            made.append(Sample(prompt, seed, _to_image(pixels), bool(torch.isfinite(pixels).all())))
        if progress:
            progress(len(chunk))
    return made


def _sources(pipeline: DiffusionPipeline, samples: TextToImageSamples, size: int) -> list[torch.Tensor]:
    """Of each picture that is wanted: the latents (sources, channels, height, width) of those to start from."""
    vae, pictures = pipeline.vae, sources_of(samples, size)
    one = len(samples.sources) == 1
    made = [
        torch.cat([autoencoders.encode(vae, to_tensor(picture)[None].to(vae.device))[0] for picture in several])
        for several in (pictures[:1] if one else pictures)
    ]
    return [latents for latents in (made * len(pictures) if one else made) for _ in range(samples.count)]


def sources_of(samples: TextToImageSamples, size: int) -> list[list[Image.Image]]:
    """Of each prompt the pictures to start from, as they are cut; nothing where the base does not edit.

    Raises:
        InputError: There are neither as many as prompts nor one for all.
    """
    made = [
        [cut(open_picture(Path(path)), (size, size), (0.5, 0.5)) for path in paths] for paths in each_prompts(samples)
    ]
    if made and len(made) not in (1, len(samples.prompts)):
        counts = f"{len(made)} pictures for {len(samples.prompts)} prompts"
        raise InputError(f"samples.sources: {counts}. Give one for each, or one for all.")
    return made * len(samples.prompts) if len(made) == 1 else made


@contextmanager
def lora_scale(parts: dict[str, torch.nn.Module], scale: float) -> Iterator[None]:
    """The adapters' strength for the time of the block; 1 changes nothing."""
    layers = [m for part in parts.values() for m in part.modules() if isinstance(m, BaseTunerLayer)]
    before = [dict(layer.scaling) for layer in layers]
    for layer in layers:
        layer.scale_layer(scale)
    try:
        yield
    finally:
        for layer, own in zip(layers, before, strict=True):
            layer.scaling.update(own)  # unscale_layer would divide by what may be 0


def _to_image(pixels: torch.Tensor) -> Image.Image:  # (3, height, width), −1 … 1
    levels = (torch.nan_to_num(pixels, -1.0, -1.0, -1.0).clamp(-1, 1) + 1) * 127.5
    return Image.fromarray(levels.round().to(torch.uint8).permute(1, 2, 0).numpy())
