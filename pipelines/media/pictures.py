"""Pictures from files, as a browser shows them: upright, in sRGB, on white, 8 bits a channel.

- EXIF's orientation is applied; of an animation, and of a file of several pages, the first picture is taken.
- Transparency is laid over white.
- An embedded colour profile is converted to sRGB. A damaged one, or one of other colours than the picture, is ignored.
- Of 16 bits the upper 8 are taken, in grey as in colour. Grey in floating point may span 0 … 1 or 0 … 255.
"""

import io
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from PIL import ExifTags, Image, ImageCms, ImageOps

from equipoise.pipelines.media.reading import EnormousError, MediaError, brief, kept, once

LARGEST = Image.MAX_IMAGE_PIXELS or 1 << 26  # pixels: from here on Pillow warns, and from twice that refuses
NAMED = ".png, .jpg, .webp, .tiff and all else that Pillow reads"  # for messages
_LEFT_OUT = {"EPS", "WMF", "MPEG", "BUFR", "GRIB", "HDF5"}  # Pillow has other programs draw them, or knows but names
_WORDS = {b"eXIf", b"tEXt", b"zTXt", b"iTXt"}  # parts of PNGs that EXIF can be in
_SYSTEMS = {"__MACOSX", "@eaDir", "Thumbs.db"}
_COLOURS = {"RGB ": "RGB", "GRAY": "L", "CMYK": "CMYK", "Lab ": "LAB"}  # of a profile → Pillow's mode
REPLACE = " Remove or replace it."  # at the end of a sentence on a damaged one


def open_picture(path: Path) -> Image.Image:  # RGB; shared, not to be changed
    """A picture; within a run it is decoded once, where it fits into memory.

    Raises:
        MediaError: it cannot be read, or has too many pixels.
    """
    return once(decode, path, lambda image: 3 * image.width * image.height)


def decode(
    path: Path, largest: int = LARGEST, formats: tuple[str, ...] | None = None, side: int | None = None
) -> Image.Image:
    """A picture as RGB, with its file's `format`.

    Args:
        largest: pixels that it may have.
        formats: Pillow's names of those that are read; all unless given.
        side: pixels of its longer side that are enough; a JPEG is then decoded smaller, in a fraction of the time.

    Raises:
        MediaError: it cannot be read, or has too many pixels.
    """
    try:
        with Image.open(path, formats=formats or _formats()) as image:
            if image.width * image.height > largest:
                size = f"{image.width} × {image.height} pixels"
                raise EnormousError(path, f"is enormous ({size}). Make it smaller.")
            if side:
                image.draft(None, (side, side))
            made = _flat(image)
            made.format = image.format
            return made
    except (Image.DecompressionBombError, Image.DecompressionBombWarning):
        raise EnormousError(path, f"is enormous (over {LARGEST} pixels). Make it smaller.") from None
    except MediaError:
        raise
    except Exception as error:  # whatever a damaged one makes of its decoder
        raise MediaError(path, f"cannot be read as a picture ({brief(error)}).{REPLACE}") from None


def of_systems(name: str) -> bool:
    """Whether a file or folder is one that systems and programs put among pictures for themselves, by its name."""
    return name.startswith(".") or name in _SYSTEMS


def size_of(path: Path, upright: bool = True) -> tuple[int, int]:
    """Width and height of a picture as `open_picture` gives it, without decoding it, unless it is a PNG with
    words or EXIF behind its pixels, for they may turn it.

    Args:
        upright: False: as it lies in the file, whose beginning says so in any format.

    Raises:
        MediaError: it cannot be read.
    """
    if upright and (known := kept(decode, path)) is not None:
        return known.size
    try:
        with Image.open(path, formats=_formats()) as image:
            width, height = image.size
            if not upright:
                return width, height
            # Pillow decodes any PNG for what may stand behind its pixels
            early = image.format == "PNG" and not _tells_more_behind(path)
            exif = Image.Image.getexif(image) if early else image.getexif()
            return (height, width) if exif.get(ExifTags.Base.Orientation, 1) in (5, 6, 7, 8) else (width, height)
    except Exception as error:  # whatever a damaged one makes of its decoder
        raise MediaError(path, f"cannot be read as a picture ({brief(error)}).{REPLACE}") from None


def _tells_more_behind(path: Path) -> bool:
    """Whether a PNG has words or EXIF behind its pixels, or no end."""
    with open(path, "rb") as file:
        file.seek(8)
        pixels = False
        while len(head := file.read(8)) == 8:
            length, name = int.from_bytes(head[:4], "big"), head[4:]
            if name == b"IEND":
                return False
            if pixels and name in _WORDS:
                return True
            pixels = pixels or name == b"IDAT"
            file.seek(length + 4, io.SEEK_CUR)  # and its sum
    return True


@lru_cache
def suffixes() -> frozenset[str]:
    """What the names of pictures end in, in small letters."""
    known = _formats()
    return frozenset(suffix for suffix, kind in Image.registered_extensions().items() if kind in known)


@lru_cache
def _formats() -> tuple[str, ...]:
    Image.init()
    return tuple(kind for kind in Image.ID if kind not in _LEFT_OUT)


def _flat(image: Image.Image) -> Image.Image:
    """The picture as RGB."""
    upright = ImageOps.exif_transpose(image)
    profile = upright.info.get("icc_profile")
    colours, alpha = _separated(upright)
    made = (_in_srgb(colours, profile) if profile else None) or _converted(colours)
    if alpha is None:
        return made
    made.putalpha(alpha)
    return Image.alpha_composite(Image.new("RGBA", made.size, "white"), made).convert("RGB")


def _separated(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """The colours, 8 bits a channel, and how opaque each pixel is, where not all are."""
    if image.mode.startswith(("I", "F")):
        return _eight_bits(image)
    if "transparency" in image.info or image.mode in ("RGBA", "LA", "PA", "RGBa", "La"):
        clear = image.convert("RGBA")
        grey = image.mode in ("L", "LA", "La")
        return (clear.getchannel("R") if grey else clear.convert("RGB")), clear.getchannel("A")
    return (image.convert("RGB") if image.mode == "P" else image), None


def _eight_bits(image: Image.Image) -> tuple[Image.Image, Image.Image | None]:
    """Grey of 16 or 32 bits or in floating point, and its transparency, which a PNG gives as one value."""
    values = np.asarray(image)
    low, high = float(values.min()), float(values.max())
    top = 1 if high <= 1 and image.mode == "F" else 255 if image.mode == "F" else 65535
    if not (0 <= low and high <= top):
        raise ValueError(f"its values go from {low:g} to {high:g}; save it with 8 or 16 bits a channel")
    grey = (values * (255 / top)).round() if image.mode == "F" else values // 256
    key = image.info.get("transparency")
    alpha = None if key is None else Image.fromarray(np.where(values == key, 0, 255).astype(np.uint8))
    return Image.fromarray(grey.astype(np.uint8)), alpha


def _in_srgb(image: Image.Image, profile: bytes) -> Image.Image | None:
    """The picture by its own colour profile; None where that cannot be used, or is sRGB itself."""
    try:
        given = ImageCms.getOpenProfile(io.BytesIO(profile))
        facts: Any = given.profile
        mode = _COLOURS.get(facts.xcolor_space)
        grey = mode == "L" and image.mode == "1"
        if (image.mode != mode and not grey) or "sRGB" in (facts.profile_description or ""):
            return None
        return ImageCms.profileToProfile(image.convert(mode), given, ImageCms.createProfile("sRGB"), outputMode="RGB")
    except (ImageCms.PyCMSError, ImportError, OSError, TypeError, ValueError):
        return None


def _converted(image: Image.Image) -> Image.Image:
    if image.mode != "LAB":
        return image.convert("RGB")
    spaces = ImageCms.createProfile("LAB"), ImageCms.createProfile("sRGB")
    made = ImageCms.profileToProfile(image, *spaces, outputMode="RGB")
    assert made is not None  # it is only where a picture is changed in place
    return made
