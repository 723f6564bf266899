"""Which pictures a cell of a comparison has: those of the comparison, or those that its run drew while training."""

import re
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from equipoise.errors import EquipoiseError
from equipoise.pipelines.comparing.comparison import Cell, Comparison
from equipoise.ui.runs import open_run
from equipoise.ui.runs_detail import sample_steps
from equipoise.ui.safety import Site

MOST = 8  # pictures in a cell of the grid: the demo's prompts, those for what was known before among them
_NAME = re.compile(r"(\d+)-(\w+)")  # PROMPT-NOISE, as samples are called


@dataclass(frozen=True)
class Shot:
    """One picture of a cell."""

    key: str  # PROMPT-NOISE, by which the same one is found in another cell and at another step
    prompt: int  # counted from 0
    file: str  # below the runs folder
    thumbnail: str
    noise: str = ""  # the seed of its noise, where it was drawn from any
    note: str = ""  # what the judge saw
    right: bool | None = None


def shots(site: Site, comparison: Comparison, id: str, cell: Cell, step: int | None = None) -> list[Shot]:
    """A cell's pictures by prompt and noise.

    Args:
        id: the comparison's folder below the runs folder.
        step: those that were drawn at the step nearest to this one while training; None: those of the comparison.
    """
    if step is not None and cell.run:
        folder = nearest(site, cell.run, step)
        return _drawn(site, folder) if folder else []
    return [
        Shot(
            *(picture.key, picture.prompt),
            *(f"{id}/{picture.file}", f"{id}/{picture.thumbnail}"),
            *("" if picture.seed is None else str(picture.seed), picture.note, picture.right),
        )
        for picture in cell.pictures
    ]


def _drawn(site: Site, folder: Path) -> list[Shot]:
    found = []
    for file in sorted(folder.glob("*.png")):
        if name := _NAME.fullmatch(file.stem):
            place = file.relative_to(site.store.root).as_posix()
            found.append(Shot(f"{int(name[1])}-{name[2]}", int(name[1]), place, place, name[2]))
    return found


def chosen(found: Sequence[Shot], prompt: int, noise: int = 1) -> list[Shot]:
    """What the grid shows of a cell's pictures.

    Args:
        prompt: 0 for one picture of each prompt, or which prompt's, counted from 1.
        noise: which picture of each prompt, counted from 1; the last where there are fewer.
    """
    if prompt:
        return [shot for shot in found if shot.prompt == prompt - 1][:MOST]
    by_prompt: dict[int, list[Shot]] = {}
    for shot in found:
        by_prompt.setdefault(shot.prompt, []).append(shot)
    return [some[min(max(noise, 1), len(some)) - 1] for some in by_prompt.values()][:MOST]


def noises(comparison: Comparison) -> int:
    """How many pictures of one prompt there are at most."""
    counts = [
        sum(picture.prompt == prompt for picture in cell.pictures)
        for cell in (comparison.base, *comparison.cells)
        for prompt in range(len(comparison.prompts))
    ]
    return max(counts, default=1) or 1


def nearest(site: Site, run: str, step: int) -> Path | None:
    """The folder of what a run drew while training at the step nearest to this one."""
    try:
        it = open_run(site, run)
        near = min(sample_steps(it), key=lambda one: abs(one - step))
    except (EquipoiseError, ValueError):  # gone, or no samples at all
        return None
    return it.samples / f"step-{near:08d}"


def step_of(folder: Path) -> int:
    return int(folder.name.removeprefix("step-"))
