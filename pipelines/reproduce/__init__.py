"""Papers' tables in small, one module each with `reproduce(seeds, count, steps)`; here is what those share."""

import io
import json
import math
import multiprocessing
import os
import signal
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ProcessPoolExecutor, as_completed
from concurrent.futures.process import BrokenProcessPool
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from statistics import fmean, median, stdev
from typing import Any, Literal

from PIL import Image, ImageDraw, ImageFont
from tqdm import tqdm

from equipoise.errors import EquipoiseError
from equipoise.pipelines.files import write_atomic

Trial = dict[str, Any]  # a training run: its settings, among them its count of gradient "evaluations", and its results
Train = Callable[[Trial], Trial]
Measure = Callable[[Train, Sequence[Trial]], list[Trial]]
Sign = Literal["above 0", "below 0"]  # of a difference whose size a paper does not report

_STUDENT = (0.0, 12.71, 4.30, 3.18, 2.78, 2.57, 2.45, 2.36, 2.31, 2.26, 2.23)  # by degrees of freedom, two-sided 95 %
_INK, _MUTED, _GRID, _PAPER = "#1b1f24", "#6a737d", "#e4e8ec", "#ffffff"
_LINES = ["#0969da", "#bc4c00", "#1a7f37", "#8250df", "#bf3989", "#57606a"]
_COLUMNS = 3
# what Pillow's font has not
_WORDS = str.maketrans({"κ": "kappa", "λ": "lambda", "θ": "theta", "μ": "mu", "‖": "|", "×": "x", "↑": " up"})
_WIDTH, _HEIGHT, _LEFT, _RIGHT, _TOP, _BOTTOM = 620, 430, 70, 24, 64, 56  # pixels, of a panel and its margins


@dataclass(frozen=True)
class Panel:
    """A chart: lines by name, each with one value per tick, and what the ticks are called."""

    title: str
    across: str
    lines: Mapping[str, Sequence[float]]
    ticks: Sequence[str]


@dataclass(frozen=True)
class Reproduction:
    """What came of it: the text to print, the chart's panels, and every training run."""

    text: str
    panels: Sequence[Panel]
    cells: Sequence[Trial]
    pictures: Mapping[str, Image.Image] = field(default_factory=dict)  # further ones, by file name

    def write(self, folder: Path, about: Mapping[str, Any]) -> list[Path]:
        """Writes results.json, with `about`, chart.png and further pictures into an existing folder; their paths."""
        document = {**about, "text": self.text.splitlines(), "runs": list(self.cells)}
        columns = min(_COLUMNS, len(self.panels))
        sheet = Image.new("RGB", (_WIDTH * columns, _HEIGHT * math.ceil(len(self.panels) / columns)), _PAPER)
        for index, panel in enumerate(self.panels):
            sheet.paste(_draw(panel), (_WIDTH * (index % columns), _HEIGHT * (index // columns)))
        sheet.save(picture := io.BytesIO(), "PNG")
        files = {"results.json": json.dumps(document, indent=1) + "\n", "chart.png": picture.getvalue()}
        for name, image in self.pictures.items():
            image.save(picture := io.BytesIO(), "PNG")
            files[name] = picture.getvalue()
        for name, data in files.items():
            write_atomic(folder / name, data)
        return [folder / name for name in files]


@contextmanager
def workers(count: int, name: str, evaluations: int, keep: Callable[[Trial], None] | None = None) -> Iterator[Measure]:
    """Processes of one thread each, so that no number depends on their count or on the machine's.

    Gives a function that trains cells in them, and returns each with its results, in order.

    Args:
        count: Processes.
        name: Of the progress bar on standard error.
        evaluations: Of gradients, in all cells that will be trained: the bar's length.
        keep: Gets each cell with its results as soon as it is trained.
    """
    with _safe_path():
        executor = ProcessPoolExecutor(count, multiprocessing.get_context("spawn"), _begin)

    def measure(train: Train, cells: Sequence[Trial]) -> list[Trial]:
        # Ended in the middle of starting a worker, this process would leave it without what it is to do. Workers
        # inherit that: Ctrl-C is for this process, and `_begin` listens to the other.
        signal.pthread_sigmask(signal.SIG_BLOCK, {signal.SIGINT, signal.SIGTERM})
        try:
            with _safe_path():
                futures = {executor.submit(train, cell): cell for cell in cells}
        finally:
            signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGINT, signal.SIGTERM})
        for future in as_completed(futures):
            trained = futures[future] | future.result()
            if keep:
                keep(trained)
            bar.update(trained["evaluations"])
        return [cell | future.result() for future, cell in futures.items()]

    bar = tqdm(total=evaluations, desc=name, unit="gradient", dynamic_ncols=True, smoothing=0, disable=None)
    before = signal.signal(signal.SIGTERM, signal.default_int_handler)  # or the workers would go on by themselves
    try:
        with bar:
            yield measure
    except BaseException as error:
        for process in multiprocessing.active_children():
            process.terminate()
        if isinstance(error, BrokenProcessPool):
            raise EquipoiseError(
                f"{name}: a worker process was ended from outside, perhaps for want of memory. Nothing was written. "
                "Try again with --workers 1."
            ) from error
        raise
    finally:
        executor.shutdown(cancel_futures=True)
        signal.signal(signal.SIGTERM, before)


@contextmanager
def _safe_path() -> Iterator[None]:
    """Processes that are started within it have no modules of the current folder: a socket.py there is not Python's."""
    before = os.environ.get("PYTHONSAFEPATH", "")
    os.environ["PYTHONSAFEPATH"] = "1"
    try:
        yield
    finally:
        os.environ["PYTHONSAFEPATH"] = before  # empty is as good as none


def _begin() -> None:
    signal.pthread_sigmask(signal.SIG_UNBLOCK, {signal.SIGTERM})
    import torch

    torch.set_num_threads(1)


def spread(values: Sequence[float], form: str = ".3f") -> str:
    """The median and, of several seeds, their span: "1.234 (1.230 to 1.240)"."""
    middle = f"{median(values):{form}}"
    return middle if len(values) < 2 else f"{middle} ({min(values):{form}} to {max(values):{form}})"


def interval(values: Sequence[float], form: str = ".1f") -> str:
    """The mean and, of several seeds, half the width of its 95 % interval by Student's t: "61.0 ± 1.5"."""
    middle = f"{fmean(values):{form}}"
    if len(values) < 2:
        return middle
    width = _STUDENT[min(len(values), len(_STUDENT)) - 1] * stdev(values) / math.sqrt(len(values))
    return f"{middle} ± {width:{form.lstrip('+')}}"


def finding(claim: str, paper: float | Sign | None, here: Sequence[float], form: str = "+.3f") -> str:
    """Whether a difference has one sign in every seed here, in a sentence; `paper` is what it reports, if anything."""
    if min(here) <= 0 <= max(here):
        verdict = "Undecided: the seeds disagree" if min(here) < max(here) else "No difference"
    elif paper is None:
        verdict = "The same in every seed" if len(here) > 1 else "Of one seed"
    else:
        above = paper == "above 0" if isinstance(paper, str) else paper > 0
        verdict = "Same direction" if above == (here[0] > 0) else "OPPOSITE direction"
        verdict += ", of one seed" if len(here) < 2 else ""
    reported = "" if paper is None else f"paper {paper if isinstance(paper, str) else f'{paper:{form}}'}, "
    return f"- {claim}: {reported}here {spread(here, form)}. {verdict}."


def _draw(panel: Panel) -> Image.Image:
    image = Image.new("RGB", (_WIDTH, _HEIGHT), _PAPER)
    pen, font = ImageDraw.Draw(image), ImageFont.load_default(14)
    values = [value for line in panel.lines.values() for value in line]
    margin = 0.05 * (max(values) - min(values)) or 1
    low, high = min(values) - margin, max(values) + margin
    right, bottom, last = _WIDTH - _RIGHT, _HEIGHT - _BOTTOM, max(1, len(panel.ticks) - 1)

    def point(index: int, value: float) -> tuple[float, float]:
        return _LEFT + (right - _LEFT) * index / last, bottom - (bottom - _TOP) * (value - low) / (high - low)

    unit = 10.0 ** math.floor(math.log10(high - low))
    step = next(size * unit for size in (0.1, 0.2, 0.5, 1, 2) if (high - low) / (size * unit) <= 6)
    for count in range(math.ceil(low / step), math.floor(high / step) + 1):
        y = point(0, count * step)[1]
        pen.line((_LEFT, y, right, y), _GRID)
        pen.text((_LEFT - 8, y), f"{count * step:.6g}", _MUTED, font, anchor="rm")
    for index in range(last, -1, -max(1, len(panel.ticks) // 10)):
        pen.text((point(index, low)[0], bottom + 14), panel.ticks[index], _MUTED, font, anchor="mm")
    pen.text(((_LEFT + right) / 2, _HEIGHT - 16), panel.across.translate(_WORDS), _MUTED, font, anchor="mm")
    pen.text((12, 10), panel.title.translate(_WORDS), _INK, ImageFont.load_default(16))
    x = 12.0
    for colour, (name, line) in zip(_LINES, panel.lines.items(), strict=False):
        name = name.translate(_WORDS)
        pen.line([point(*pair) for pair in enumerate(line)], colour, width=2)
        pen.text((x, 36), name, colour, font)
        x += pen.textlength(name, font) + 18
    return image
