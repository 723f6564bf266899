"""What training reads in place of the pictures: the autoencoder's means and deviations, computed once and kept."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

from pathlib import Path

import torch
from safetensors.torch import load_file
from tqdm import tqdm

from equipoise.pipelines.checkpoints import save_tensors
from equipoise.pipelines.files import explained
from equipoise.pipelines.text_to_image.base import Base, Latents
from equipoise.pipelines.text_to_image.config import DataSection
from equipoise.pipelines.text_to_image.data import Example, cache_key, open_picture, to_tensor, variants


def prepare_latents(base: Base, examples: list[Example], data: DataSection, cache: Path) -> Latents:
    """Of every picture, computed once.

    Kept in memory for the process and on disk for the next one, by the files' names, sizes and times, the cut, and
    the autoencoder.
    """
    key = cache_key(examples, data, base.identity)
    if key not in base.latents:
        base.latents.clear()
        file = cache / f"moments-{key}.safetensors"
        if file.is_file():
            base.latents[key] = Latents(**load_file(file))
        else:
            base.latents[key] = _encode(base, examples, data)
            with explained(file):
                cache.mkdir(parents=True, exist_ok=True)
                save_tensors(file, base.latents[key]._asdict())
    return base.latents[key]


@torch.no_grad()
def _encode(base: Base, examples: list[Example], data: DataSection) -> Latents:
    rows, places = [], []
    cuts = torch.Generator().manual_seed(0)
    for example in tqdm(examples, desc="latents", unit="picture", dynamic_ncols=True, leave=False, disable=None):
        whole = open_picture(example.path)
        cut = variants(whole, data, cuts)
        pictures = [to_tensor(picture) for picture, _ in cut]
        places.append(torch.tensor([[whole.height, whole.width, *corner, *pictures[0].shape[1:]] for _, corner in cut]))
        posteriors = [base.vae.encode(picture[None].to(base.vae.device)).latent_dist for picture in pictures]
        rows.append(torch.stack([torch.cat([p.mean, p.std]).cpu() for p in posteriors]))
    return Latents(torch.stack(rows) * base.vae.config.scaling_factor, torch.stack(places).float())
