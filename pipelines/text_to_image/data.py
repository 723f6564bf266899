"""Captioned pictures in a folder: which there are, what they say, and how they are cut.

Captions come from, in this order: `data.instance_prompt` for all; `metadata.jsonl` or `metadata.csv` (columns
`file_name` and `text`, as the datasets library's image folders have them); a `.txt` file beside each picture; the name
of its folder, where that is a number and words (`10_sks vase`), as kohya's scripts have it: the number says how often
its pictures come in an epoch.
"""

import csv
import hashlib
import json
import os
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from PIL import Image, ImageOps

from equipoise.pipelines.files import first_line
from equipoise.pipelines.media.pictures import NAMED, suffixes
from equipoise.pipelines.media.pictures import open_picture as open_picture
from equipoise.pipelines.media.reading import VERSION
from equipoise.pipelines.text_to_image.config import TextToImageConfig, TextToImageData

if TYPE_CHECKING:
    from torch import Tensor

ENCODING = "utf-8-sig"  # with or without the mark that Excel and Notepad put first
RANDOM_CUTS = 4  # per picture, where data.crop is random
_REPEATED = re.compile(r"(\d+)_(.+)")


@dataclass(frozen=True)
class Example:
    path: Path
    caption: str
    repeats: int = 1  # times in an epoch


def read_examples(data: TextToImageData) -> tuple[list[Example], list[str]]:
    """The folder's examples in a fixed order, and all that is wrong with it. Decodes no picture."""
    folder = Path(data.folder)
    if not os.path.isdir(folder):  # unlike pathlib's, False also where no path can be so long
        what = "is a file" if os.path.isfile(folder) else "does not exist"
        return [], [f"data.folder: {folder} {what}. Give a folder of pictures."]
    pictures = sorted(path for path in folder.rglob("*") if path.suffix.lower() in suffixes() and path.is_file())
    if not pictures:
        return [], [f"data.folder: {folder} holds no pictures ({NAMED})."]
    if data.instance_prompt is not None:
        examples, problems = [Example(path, data.instance_prompt) for path in pictures], []
    else:
        tables = ((folder / "metadata.jsonl", _read_jsonl), (folder / "metadata.csv", _read_csv))
        found = next(((table, reader) for table, reader in tables if table.is_file()), None)
        examples, problems = _from_metadata(*found, pictures) if found else _from_text_files(folder, pictures)
    folders = {path.relative_to(folder).parent.as_posix() for path in pictures}
    for name in data.repeats.keys() - folders:
        there = ", ".join(sorted(folders - {"."})) or "no folders"
        problems.append(f"data.repeats: {name} is no folder with pictures in {folder}. There are {there}.")
    return [replace(example, repeats=_repeats(example.path, folder, data)) for example in examples], problems


def read_class(config: TextToImageConfig) -> tuple[list[Example], list[str]]:
    """The class pictures of `prior.folder`, if it is given, and all that is wrong with the section."""
    prior = config.prior
    if not prior.prompt:
        return [], ["prior.folder: needs prior.prompt, what the class is called."] if prior.folder else []
    if not prior.folder:
        prompts = 1 + len(prior.more_prompts)
        few = f"prior.count: {prior.count} pictures are too few for {prompts} prompts, which share them. Give at least "
        return [], [few + f"{prompts}."] if prior.count < prompts else []
    data = TextToImageData(folder=prior.folder, instance_prompt=prior.prompt)  # pyright: ignore[reportCallIssue]
    examples, problems = read_examples(data)
    return examples, [problem.replace("data.folder", "prior.folder") for problem in problems]


def _repeats(path: Path, folder: Path, data: TextToImageData) -> int:
    place = path.relative_to(folder).parent
    named = [int(found[1]) for name in reversed(place.parts) if (found := _REPEATED.fullmatch(name))]
    return data.repeats.get(place.as_posix(), max(1, named[0]) if named else 1)


def unread_captions(data: TextToImageData, pictures: Sequence[Path]) -> str:
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
    except (OSError, ValueError, csv.Error) as error:
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
            except (ValueError, RecursionError) as error:
                raise ValueError(f"line {number}: {error}") from None
            yield number, row if isinstance(row, dict) else {}


def _read_csv(path: Path) -> Iterator[tuple[int, dict[str, Any]]]:
    with path.open(newline="", encoding=ENCODING) as file:
        reader = csv.DictReader(file)
        for row in reader:
            yield first_line(reader, row.values()), row


def _from_text_files(folder: Path, pictures: list[Path]) -> tuple[list[Example], list[str]]:
    examples, missing, problems = [], [], []
    for path in pictures:
        text, named = path.with_suffix(".txt"), _REPEATED.fullmatch(path.parent.name if path.parent != folder else "")
        if not text.is_file():
            if named:
                examples.append(Example(path, named[2]))
                continue
            missing.append(path)
            continue
        try:
            examples.append(Example(path, text.read_text(encoding=ENCODING).strip()))
        except UnicodeDecodeError:
            problems.append(f"{text}: is not UTF-8 text.")
        except OSError as error:
            problems.append(f"{text}: cannot be read: {error.strerror or error}.")
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


def cache_key(examples: list[Example], data: TextToImageData, base: str) -> str:
    """Names the latents of these files, cut this way, under this autoencoder."""
    facts: list[Any] = [VERSION, base, data.resolution, data.crop, data.flip]
    if data.buckets:
        facts.append((data.bucket_step, data.bucket_limit))
    for example in examples:
        stat = example.path.stat()
        facts.append((str(example.path.resolve()), stat.st_size, stat.st_mtime_ns))
    return hashlib.sha256(json.dumps(facts).encode()).hexdigest()[:24]
