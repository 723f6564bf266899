"""Small pictures that lie within the page itself, each file's made once."""

import base64
import io
from functools import lru_cache
from pathlib import Path

from PIL import Image

from equipoise.pipelines.files import version
from equipoise.pipelines.media.pictures import decode
from equipoise.ui.safety import PIXELS

SIDE = 128  # pixels
KEPT = 2_000  # of some five kilobytes each


def thumbnail(path: Path) -> str:
    """An address that holds the picture, small. Raises MediaError where it cannot be read."""
    return _made(path, version(path))


@lru_cache(KEPT)
def _made(path: Path, version: tuple[int, ...]) -> str:
    image = decode(path, PIXELS, side=2 * SIDE).convert("RGB")
    image.thumbnail((SIDE, SIDE), Image.Resampling.BICUBIC)
    file = io.BytesIO()
    image.save(file, "JPEG", quality=85)
    return f"data:image/jpeg;base64,{base64.b64encode(file.getvalue()).decode()}"
