"""What training reads in place of the pictures: the autoencoder's means and deviations, computed once and kept."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from pathlib import Path

import torch
from safetensors.torch import load_file
from torch import Tensor
from tqdm import tqdm

from equipoise.pipelines.checkpoints import save_tensors
from equipoise.pipelines.files import explained
from equipoise.pipelines.text_to_image.base import Base
from equipoise.pipelines.text_to_image.config import DataSection
from equipoise.pipelines.text_to_image.data import Example, cache_key, open_picture, to_tensor, variants


def prepare_latents(base: Base, examples: list[Example], data: DataSection, cache: Path) -> Tensor:
    """Means and standard deviations of every picture's variants: (pictures, variants, 2, 4, height, width).

    Kept in memory for the process and on disk for the next one, by the files' names, sizes and times, the cut, and
    the autoencoder.
    """
    key = cache_key(examples, data, base.identity)
    if key not in base.latents:
        base.latents.clear()
        file = cache / f"latents-{key}.safetensors"
        if file.is_file():
            base.latents[key] = load_file(file)["latents"]
        else:
            base.latents[key] = _encode(base, examples, data)
            with explained(file):
                cache.mkdir(parents=True, exist_ok=True)
                save_tensors(file, {"latents": base.latents[key]})
    return base.latents[key]


@torch.no_grad()
def _encode(base: Base, examples: list[Example], data: DataSection) -> Tensor:
    rows = []
    cuts = torch.Generator().manual_seed(0)
    for example in tqdm(examples, desc="latents", unit="picture", dynamic_ncols=True, leave=False, disable=None):
        pictures = [to_tensor(picture) for picture in variants(open_picture(example.path), data, cuts)]
        posteriors = [base.vae.encode(picture[None].to(base.vae.device)).latent_dist for picture in pictures]
        rows.append(torch.stack([torch.cat([p.mean, p.std]).cpu() for p in posteriors]))
    return torch.stack(rows) * base.vae.config.scaling_factor
