"""Pairs, for bases that edit: every picture of `data.folder` with the one that it is to be made from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from equipoise.pipelines.media.pictures import of_systems, suffixes
from equipoise.pipelines.text_to_image.config import TextToImageConfig, TextToImageData, TextToImageSamples
from equipoise.pipelines.text_to_image.data import Example
from equipoise.pipelines.text_to_image.tables import listed


def read_sources(data: TextToImageData, examples: Sequence[Example]) -> tuple[list[list[Example]], list[str]]:
    """Of each folder of `data.sources`, the examples with their sources in place of their pictures, in the same order,
    and what is wrong with the folders. Decodes no picture."""
    read = [_from_folder(Path(folder), data, examples) for folder in data.sources]
    return [found for found, _ in read], [problem for _, wrong in read for problem in wrong]


def _from_folder(folder: Path, data: TextToImageData, examples: Sequence[Example]) -> tuple[list[Example], list[str]]:
    if not folder.is_dir():
        what = "is a file" if folder.is_file() else "does not exist"
        return [], [f"data.sources: {folder} {what}. Give a folder of pictures."]
    known: dict[Path, Path] = {}
    for path in sorted(folder.rglob("*")):
        inside = path.relative_to(folder)
        if path.suffix.lower() in suffixes() and not any(map(of_systems, inside.parts)):
            known.setdefault(inside.with_suffix(""), path)
    wanted = [example.path.relative_to(data.folder).with_suffix("") for example in examples]
    if absent := [example.path for example, name in zip(examples, wanted, strict=True) if name not in known]:
        return [], [
            f"data.sources: {folder} has no picture for {listed(absent, Path(data.folder))}. Name each source as its "
            "picture in data.folder; endings may differ."
        ]
    return [replace(example, path=known[name]) for example, name in zip(examples, wanted, strict=True)], []


def problems(config: TextToImageConfig) -> list[str]:
    """What is not read in pairs."""
    if not config.data.sources:
        return []
    asked = {
        "data.crop: random": config.data.crop == "random",
        "data.validation": config.data.validation,
        "prior.prompt": config.prior.prompt,
        "script": config.script,
    }
    wrong = [key for key, given in asked.items() if given]
    return [f"{key}: is not for pairs, as data.sources makes them. Leave it out." for key in wrong]


def notes(config: TextToImageConfig, examples: Sequence[Example]) -> list[str]:
    """How many pairs will be trained on, in a sentence."""
    count, folders = len({example.path for example in examples}), " and in ".join(config.data.sources)
    return [f"pairs: {count}, each with its picture in {folders} to start from."] if folders else []


def each_prompts(samples: TextToImageSamples) -> list[list[str]]:
    """`samples.sources`, with one picture as a list of one."""
    return [[source] if isinstance(source, str) else source for source in samples.sources]
