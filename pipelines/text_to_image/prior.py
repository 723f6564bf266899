"""Prior preservation (Ruiz et al., DreamBooth, arXiv:2208.12242, 2022, §3.3): the class is trained on too.

Each step's loss is of pictures of yours + weight × of pictures of the class, such as "a photo of a vase", so that the
tuned model goes on drawing other vases. Where there are none, the untouched base draws them, once.
"""

# pydantic's sections are complete without arguments; pyright misses defaults that Field takes by position.
# pyright: reportCallIssue=false

import hashlib
import io
import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch

from equipoise.errors import InputError
from equipoise.pipelines.files import explained, write_atomic
from equipoise.pipelines.progress import progress
from equipoise.pipelines.text_to_image.base import Base
from equipoise.pipelines.text_to_image.config import NoiseSection, TextToImageConfig
from equipoise.pipelines.text_to_image.data import Example, read_class
from equipoise.pipelines.text_to_image.generate import generate
from equipoise.pipelines.text_to_image.offloading import VisitingLinear
from equipoise.pipelines.training.loop import StoppedError


def class_examples(
    base: Base, config: TextToImageConfig, cache: Path, stopped: Callable[[], bool] = lambda: False
) -> list[Example]:
    """The pictures that the class is learnt from: those of `prior.folder`, or drawn by the untouched base.

    Args:
        base: without factors.
        cache: where drawn pictures are kept for the next run.
        stopped: asked before each batch is drawn whether to end.

    Raises:
        InputError: the folder holds none.
        StoppedError: it was to end; what was drawn is kept.
    """
    found, problems = read_class(config)
    if problems:
        raise InputError("\n".join(problems))
    if found or not config.prior.prompt:
        return found
    prompts = [config.prior.prompt, *config.prior.more_prompts]
    counts = [len(range(first, config.prior.count, len(prompts))) for first in range(len(prompts))]
    base.set_scheduler(NoiseSection())  # an earlier run of this process may have sampled by another schedule
    with (
        base.encoders_on_device(),
        progress("class pictures", "picture", total=config.prior.count, leave=False) as bar,
    ):
        return [
            Example(path, prompt)
            for prompt, count in zip(prompts, counts, strict=True)
            for path in _drawn(base, config, prompt, count, cache, bar, stopped)
        ]


def _drawn(
    base: Base,
    config: TextToImageConfig,
    prompt: str,
    count: int,
    cache: Path,
    bar: Any,
    stopped: Callable[[], bool],
) -> list[Path]:
    """Pictures of a prompt by the untouched base, those that are not there yet drawn now."""
    samples = config.samples
    guidance, usual = samples.guidance, base.family.usual_guidance(base.pipeline)
    if guidance is None and usual != base.family.guidance:  # a distilled checkpoint's, which weights may not show
        guidance = usual
    facts = [_fingerprint(base), prompt, config.data.resolution, samples.steps, guidance]
    facts += [config.model.quantize] if config.model.quantize else []
    folder = cache / f"prior-{hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]}"
    with explained(folder):
        folder.mkdir(parents=True, exist_ok=True)
    paths = [folder / f"{seed:05d}.png" for seed in range(count)]
    for start in range(0, count, samples.batch):
        some = paths[start : start + samples.batch]
        if not all(path.is_file() for path in some):
            if stopped():
                raise StoppedError(
                    f"stopped on request after {bar.n} of {config.prior.count} class pictures were drawn"
                )
            wanted = {"prompts": [prompt], "negative": "", "count": len(some), "seed": start}
            asked = samples.model_copy(update=wanted)
            for path, sample in zip(some, generate(base.pipeline, asked, config.data.resolution), strict=True):
                png = io.BytesIO()
                sample.image.save(png, "PNG")
                write_atomic(path, png.getvalue())
        bar.update(len(some))
    return paths


def _fingerprint(base: Base) -> str:
    """Changes when the denoiser does, wherever the checkpoint lies."""
    digest = hashlib.sha256(base.identity.encode())
    away = {
        f"{name}.{part}": tensor
        for name, layer in base.denoiser.named_modules()
        if isinstance(layer, VisitingLinear)
        for part, tensor in (("weight", layer.offloaded.weight), ("scale", layer.offloaded.scale))
        if tensor is not None
    }
    for name, tensor in (base.denoiser.state_dict() | away).items():
        if type(tensor) not in (torch.Tensor, torch.nn.Parameter):  # quantised weights do not show theirs
            continue
        digest.update(name.encode())
        digest.update(tensor.detach().flatten()[:8].float().cpu().numpy().tobytes())
    return digest.hexdigest()
