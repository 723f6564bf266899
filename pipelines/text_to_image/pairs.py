"""Pairs, for bases that edit: every picture of `data.folder` with the one that it is to be made from."""

from collections.abc import Sequence
from dataclasses import replace
from pathlib import Path

from equipoise.pipelines.media.pictures import of_systems, suffixes
from equipoise.pipelines.text_to_image.config import TextToImageConfig, TextToImageData
from equipoise.pipelines.text_to_image.data import Example
from equipoise.pipelines.text_to_image.tables import listed


def read_sources(data: TextToImageData, examples: Sequence[Example]) -> tuple[list[Example], list[str]]:
    """The examples with their sources in place of their pictures, in the same order, and what is wrong with the folder.
    Nothing where `data.sources` is not given. Decodes no picture."""
    if data.sources is None:
        return [], []
    folder = Path(data.sources)
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
    if config.data.sources is None:
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
    found, _ = read_sources(config.data, examples)
    count = len({example.path for example in examples})
    return [f"pairs: {count}, each with its picture in {config.data.sources} to start from."] if found else []
