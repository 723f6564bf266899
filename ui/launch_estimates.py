"""How long a plan may take, and how much memory: measured by earlier runs like it, or reasoned."""

import math
from contextlib import suppress
from functools import lru_cache
from itertools import islice
from pathlib import Path
from statistics import median
from typing import Any

from equipoise import registry
from equipoise.errors import EquipoiseError
from equipoise.pipelines import config as configs
from equipoise.pipelines.config import RunConfig
from equipoise.pipelines.files import version
from equipoise.pipelines.runs.run import metric_lines
from equipoise.pipelines.runs.status import Status
from equipoise.pipelines.tables import size_words
from equipoise.ui import draw
from equipoise.ui.launch import Plan
from equipoise.ui.safety import Site

FEW = 5  # finished runs that the estimate is made from
LOOKED_AT = 200  # finished runs among which they are sought
_READ = 2**20  # characters of a run's metrics, enough for its pace
_SIZES = ("train.batch", "lora.rank", "data.resolution")  # by which the largest cell of a sweep is found


def alike(site: Site, made: Plan) -> list[Status]:
    """The newest finished runs whose steps cost what these will: the same but for rate, length, data and samples."""
    wanted = {repr(_cost(cell)) for cell in made.runs}
    able = [
        item
        for item in site.store.list(states=("done",), kinds=("run", "cell"))
        if item.pipeline == made.config.pipeline and item.step and item.duration > 0
    ]
    files = ((item, site.store.root / item.id / "config.yaml") for item in able[:LOOKED_AT])
    return list(islice((item for item, file in files if _cost_of(file, *version(file)) in wanted), FEW))


@lru_cache(2 * LOOKED_AT)
def _cost_of(file: Path, *version: int) -> str:
    try:
        return repr(_cost(configs.load(file)))
    except EquipoiseError:
        return ""


def _cost(config: RunConfig) -> list[tuple[str, Any]]:
    """What of a configuration decides how long a step takes and how much memory."""
    free = ("train.steps", "train.epochs", "train.clip", config.SHORT.get("data"))
    sections = ("model", "data", "lora", "encoder", "train", "objective", "coordinator")
    return [
        (key, value)
        for key, value in configs.flat(config).items()
        if key == "optimizer.name" or (key.partition(".")[0] in sections and key not in free)
    ]


def estimate(site: Site, made: Plan, workers: int) -> str:
    """How long it may take, from what earlier runs like it measured here."""
    if any(configs.flat(cell).get("train.epochs") for cell in made.runs):
        return "How many steps the epochs are is counted when it starts."
    steps = [count for count in (configs.flat(cell).get("train.steps") for cell in made.runs) if isinstance(count, int)]
    runs = f"{len(made.runs)} runs" if len(made.runs) > 1 else "1 run"
    long = " to ".join(map(str, dict.fromkeys([min(steps, default=0), max(steps, default=0)])))
    costs = [_took(site.store.root / item.id, item) for item in alike(site, made)]
    if not costs or not steps:
        each = " each" if len(made.runs) > 1 else ""
        return f"{runs} of {long} steps{each}. How long a step takes is not known yet: nothing like it has run here."
    pace, rest = (median(values) for values in zip(*costs, strict=True))
    busy = [0.0] * max(1, workers)  # seconds of each worker, who takes the next run when it is done with one
    for count in steps:
        busy[busy.index(min(busy))] += pace * count + rest
    besides = f", and {rest:.3g} s for the rest of each run" if rest else ""
    words = f"{pace:.3g} s per step{besides}, measured here"
    return f"{runs} of {long} steps, about {draw.span(max(busy))} in all ({words})."


def _took(folder: Path, item: Status) -> tuple[float, float]:
    """Seconds of a finished run's steps, each, and of all else: loading, samples and checkpoints."""
    text = ""
    with suppress(OSError), open(folder / "metrics.jsonl", errors="replace") as file:  # deleted since, perhaps
        text = file.read(_READ)
    measured = [record.get("seconds") for _, record in metric_lines(text)]
    seconds = [value for value in measured if isinstance(value, int | float) and 0 <= value < math.inf]
    if not seconds:
        return item.duration / item.step, 0.0
    pace = median(seconds)  # a first step may take long
    return pace, max(0.0, item.duration - pace * item.step)


def memory(site: Site, made: Plan, workers: int) -> str:
    """How much memory it may take: what earlier runs like it held, or what the pipeline reasons."""
    at_once = min(len(made.runs), max(1, workers))
    times = f", {at_once} of them at a time" if at_once > 1 else ""
    similar = alike(site, made)
    held, device = (
        max((getattr(item, name) or 0 for item in similar), default=0) for name in ("memory", "device_memory")
    )
    if held:
        more = f", and {size_words(device)} on its accelerator" if device else ""
        return f"Memory: about {size_words(held)} for each run's process{more}, measured here{times}."
    largest = max(made.runs, key=lambda cell: math.prod(configs.flat(cell).get(key) or 1 for key in _SIZES))
    try:
        found = registry.load("pipelines", made.config.pipeline).estimate_memory(largest)
    except Exception:  # a model that runs on shapes alone is more than a pipeline can promise
        found = None
    if found is None:
        return "Memory: cannot be reasoned for this model before it has run here once."
    return f"Memory: about {size_words(found.total)} for each run's process{times}. {found.in_parts}"
