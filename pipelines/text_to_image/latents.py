"""What training reads in place of the pictures: the autoencoder's means and deviations, computed once and kept."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from pathlib import Path

import torch
from safetensors import SafetensorError
from safetensors.torch import load_file

from equipoise.pipelines.files import explained
from equipoise.pipelines.media.reading import forget
from equipoise.pipelines.progress import progress
from equipoise.pipelines.runs.checkpoints import save_tensors
from equipoise.pipelines.text_to_image.base import Base, Latents
from equipoise.pipelines.text_to_image.buckets import nearest, sizes
from equipoise.pipelines.text_to_image.config import TextToImageData
from equipoise.pipelines.text_to_image.data import Example, cache_key, open_picture, to_tensor, variants


def prepare_latents(base: Base, examples: list[Example], data: TextToImageData, cache: Path) -> Latents:
    """Of every picture, computed once.

    Kept in memory for the process and on disk for the next one, by the files' names, sizes and times, the cut, and
    the autoencoder.
    """
    key = cache_key(examples, data, base.identity)
    if key not in base.latents:
        for old in list(base.latents)[:-1]:  # those of the last pictures stay: a run may have class pictures beside
            del base.latents[old]
        file = cache / f"moments-{key}.safetensors"
        base.latents[key] = _kept(file, len(examples)) or _encode(base, examples, data)
        forget()  # the pictures themselves
        if not file.is_file():
            with explained(file):
                cache.mkdir(parents=True, exist_ok=True)
                made = base.latents[key]
                numbered = {f"moments.{index}": moments for index, moments in enumerate(made.moments)}
                save_tensors(file, numbered | {"places": made.crops})
    return base.latents[key]


def _kept(file: Path, count: int) -> Latents | None:
    """What an earlier process has computed; a file that was damaged since is no more."""
    try:
        found = load_file(file)
        return Latents([found[f"moments.{index}"] for index in range(count)], found["places"])
    except FileNotFoundError:
        return None
    except (OSError, SafetensorError, KeyError):
        file.unlink(missing_ok=True)
        return None


@torch.no_grad()
def _encode(base: Base, examples: list[Example], data: TextToImageData) -> Latents:
    rows, crops = [], []
    cuts = torch.Generator().manual_seed(0)
    among = sizes(data, base.stride)
    for example in progress("latents", "picture", examples, leave=False):
        whole = open_picture(example.path)
        cut = variants(whole, data, cuts, nearest(whole.size, among))
        pictures = [to_tensor(picture) for picture, _ in cut]
        crops.append(torch.tensor([[whole.height, whole.width, *corner, *pictures[0].shape[1:]] for _, corner in cut]))
        posteriors = [base.vae.encode(picture[None].to(base.vae.device)).latent_dist for picture in pictures]
        moments = torch.stack([torch.cat([p.mean, p.std]).cpu() for p in posteriors])
        moments[:, 0] -= base.vae.config.shift_factor or 0.0  # of the means; deviations have none
        rows.append(moments * base.vae.config.scaling_factor)
    return Latents(rows, torch.stack(crops).float())
