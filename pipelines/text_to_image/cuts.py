"""How pictures are cut to the size that training reads."""

from typing import TYPE_CHECKING

from PIL import Image, ImageOps

from equipoise.pipelines.text_to_image.config import TextToImageData

if TYPE_CHECKING:
    from torch import Tensor

RANDOM_CUTS = 4  # per picture, where data.crop is random


def variants_of_each(data: TextToImageData) -> int:
    """How many `variants` gives of a picture."""
    return (RANDOM_CUTS if data.crop == "random" else 1) * (2 if data.flip else 1)


def cut(image: Image.Image, size: tuple[int, int], position: tuple[float, float]) -> Image.Image:
    """Scaled so that it just covers `size` (width, height), then cut at `position` (0 … 1 across and down)."""
    return ImageOps.fit(image, size, Image.Resampling.LANCZOS, centering=position)


def variants(
    image: Image.Image, data: TextToImageData, generator, size: tuple[int, int] | None = None
) -> list[tuple[Image.Image, tuple[int, int]]]:
    """Every cut and mirror image of one picture that training may draw, and where it was cut: (top, left) pixels of the
    picture when it just covers the cut.

    Args:
        generator: of the places of random cuts.
        size: width and height of the cut; the square of `data.resolution` unless it is given.
    """
    import torch

    positions = [(0.5, 0.5)]
    if data.crop == "random":
        positions = [tuple(torch.rand(2, generator=generator).tolist()) for _ in range(RANDOM_CUTS)]
    size = size or (data.resolution, data.resolution)
    scale = max(wanted / side for wanted, side in zip(size, image.size, strict=True))
    free = [max(0, round(side * scale) - wanted) for wanted, side in zip(size, image.size, strict=True)]  # across, down
    cuts = [
        (cut(image, size, (x, y)), (round(y * free[1]), round(x * free[0])))  # (top, left)
        for x, y in positions
    ]
    if not data.flip:
        return cuts
    return cuts + [(ImageOps.mirror(picture), (top, free[0] - left)) for picture, (top, left) in cuts]


def to_tensor(image: Image.Image) -> "Tensor":  # (3, height, width) in −1 … 1
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1
