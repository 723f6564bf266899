"""Captioned pictures in a folder: which there are, what they say, and how they are cut.

Captions come from, in this order: `data.instance_prompt` for all; `metadata.jsonl` or `metadata.csv` (columns
`file_name` and `text`, as the datasets library's image folders have them); a `.txt` file beside each picture.
"""

import csv
import hashlib
import json
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.config import DataSection

if TYPE_CHECKING:
    from torch import Tensor

SUFFIXES = {".png", ".jpg", ".jpeg", ".webp", ".bmp"}
ENCODING = "utf-8-sig"  # with or without the mark that Excel and Notepad put first
RANDOM_CUTS = 4  # per picture, where data.crop is random


@dataclass(frozen=True)
class Example:
    path: Path
    caption: str


def read_examples(data: DataSection) -> tuple[list[Example], list[str]]:
    """The folder's examples in a fixed order, and all that is wrong with it. Decodes no picture."""
    folder = Path(data.folder)
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        return [], [f"data.folder: {folder} {what}. Give a folder of pictures."]
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in SUFFIXES and path.is_file())
    if not pictures:
        return [], [f"data.folder: {folder} holds no pictures ({', '.join(sorted(SUFFIXES))})."]
    if data.instance_prompt is not None:
        return [Example(path, data.instance_prompt) for path in pictures], []
    for name, reader in (("metadata.jsonl", _read_jsonl), ("metadata.csv", _read_csv)):
        if (folder / name).is_file():
            return _from_metadata(folder / name, reader, pictures)
    return _from_text_files(folder, pictures)


def unread_captions(data: DataSection, pictures: Sequence[Path]) -> str:
    """A sentence if the folder has captions that an instance prompt leaves unread; else empty."""
    if data.instance_prompt is None:
        return ""
    files = [Path(data.folder) / name for name in ("metadata.jsonl", "metadata.csv")]
    found = [file for file in [*files, *(path.with_suffix(".txt") for path in pictures)] if file.is_file()]
    if not found:
        return ""
    return (
        f"data.instance_prompt is the caption of every picture: the {len(found)} caption files of {data.folder} are "
        "not read. data.instance_prompt=null reads them."
    )


def _from_metadata(table: Path, reader, pictures: list[Path]) -> tuple[list[Example], list[str]]:
    examples, problems = [], []
    known = set(pictures)
    try:
        for line, row in reader(table):
            name, text = row.get("file_name"), row.get("text")
            if not isinstance(name, str) or not isinstance(text, str):
                problems.append(
                    f"{table}:{line}: needs file_name and text, got {', '.join(map(str, row)) or 'nothing'}."
                )
            elif (table.parent / name) not in known:
                problems.append(f"{table}:{line}: a caption for {name}, which is not in {table.parent}.")
            else:
                examples.append(Example(table.parent / name, text))
    except (UnicodeDecodeError, ValueError, csv.Error) as error:
        problems.append(f"{table}: cannot be read ({error}).")
    if not examples and not problems:
        problems.append(f"{table}: holds no captions.")
    missing = sorted(known - {example.path for example in examples})
    if missing and not problems:
        problems.append(
            f"{table}: has no captions for {_listed(missing, table.parent)}. Add their lines, take the pictures away, "
            "or set data.instance_prompt."
        )
    return examples, problems


def _read_jsonl(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    for number, line in enumerate(path.read_text(encoding=ENCODING).splitlines(), start=1):
        if line.strip():
            try:
                row = json.loads(line)
            except ValueError as error:
                raise ValueError(f"line {number}: {error}") from None
            yield number, row if isinstance(row, dict) else {}


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding=ENCODING) as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield reader.line_num, row


def _from_text_files(folder: Path, pictures: list[Path]) -> tuple[list[Example], list[str]]:
    examples, missing, problems = [], [], []
    for path in pictures:
        text = path.with_suffix(".txt")
        if not text.is_file():
            missing.append(path)
            continue
        try:
            examples.append(Example(path, text.read_text(encoding=ENCODING).strip()))
        except UnicodeDecodeError:
            problems.append(f"{text}: is not UTF-8 text.")
    if missing:
        name = missing[0].relative_to(folder).as_posix()
        problems.append(
            f"data.folder: {folder} has no captions for {_listed(missing, folder)}. Set data.instance_prompt, "
            f'add metadata.jsonl (lines such as {{"file_name": "{name}", "text": "…"}}), or put a .txt file beside '
            "each picture."
        )
    return examples, problems


def _listed(missing: list[Path], folder: Path) -> str:
    names = [path.relative_to(folder).as_posix() for path in missing]
    return ", ".join(names[:3]) + (f" and {len(names) - 3} more" if len(names) > 3 else "")


def open_picture(path: Path) -> Image.Image:
    """A picture as RGB, upright, transparency over white. Raises InputError if it cannot be decoded."""
    try:
        with Image.open(path) as image:
            upright = ImageOps.exif_transpose(image)
            if upright.mode in ("RGBA", "LA", "PA") or "transparency" in upright.info:
                upright = upright.convert("RGBA")
                white = Image.new("RGBA", upright.size, "white")
                upright = Image.alpha_composite(white, upright)
            return upright.convert("RGB")
    except (OSError, SyntaxError, ValueError, Image.DecompressionBombError) as error:
        raise InputError(f"{path}: cannot be read as a picture ({error}). Remove or replace it.") from None


def cut(image: Image.Image, resolution: int, position: tuple[float, float]) -> Image.Image:
    """The shorter side scaled to `resolution`, then a square at `position` (0 … 1 across and down)."""
    return ImageOps.fit(image, (resolution, resolution), Image.Resampling.LANCZOS, centering=position)


def variants(image: Image.Image, data: DataSection, generator) -> list[tuple[Image.Image, tuple[int, int]]]:
    """Every cut and mirror image of one picture that training may draw, and where it was cut: (top, left) pixels of the
    picture with its shorter side scaled to the resolution."""
    import torch

    positions = [(0.5, 0.5)]
    if data.crop == "random":
        positions = [tuple(torch.rand(2, generator=generator).tolist()) for _ in range(RANDOM_CUTS)]
    scale = data.resolution / min(image.size)
    free = [max(0, round(side * scale) - data.resolution) for side in image.size]  # across, down
    cuts = [
        (cut(image, data.resolution, (x, y)), (round(y * free[1]), round(x * free[0])))  # (top, left)
        for x, y in positions
    ]
    return cuts + [(ImageOps.mirror(picture), corner) for picture, corner in cuts] if data.flip else cuts


def to_tensor(image: Image.Image) -> "Tensor":  # (3, height, width) in −1 … 1
    import numpy as np
    import torch

    return torch.from_numpy(np.array(image, dtype=np.float32)).permute(2, 0, 1) / 127.5 - 1


def cache_key(examples: list[Example], data: DataSection, base: str) -> str:
    """Names the latents of these files, cut this way, under this autoencoder."""
    facts = [base, data.resolution, data.crop, data.flip]
    for example in examples:
        stat = example.path.stat()
        facts.append((str(example.path.resolve()), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
