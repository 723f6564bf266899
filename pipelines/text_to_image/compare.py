"""Generates the same pictures from every run of a comparison, and from the untouched base, and measures them.

The base is loaded once; each run's LoRA file goes through diffusers' own loader and off again. Prompts, seeds and
starting noise are the same everywhere, so what differs between two pictures of a column is what training did.
"""

import json
import logging
import math
import sys
import warnings
from collections.abc import Callable, Iterator, Sequence
from contextlib import AbstractContextManager, contextmanager, nullcontext
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path

from PIL.Image import Image
from PIL.Image import new as new_image

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.comparing.comparison import (
    Cell,
    Comparison,
    Picture,
    column_of,
    folder_names,
    is_rate,
    lay_out,
    means,
    measured,
)
from equipoise.pipelines.progress import progress
from equipoise.pipelines.runs import environment
from equipoise.pipelines.runs.run import Run, memory_full
from equipoise.pipelines.text_to_image.base import Base, load_base
from equipoise.pipelines.text_to_image.config import (
    JudgesSection,
    NoiseSection,
    TextToImageConfig,
    TextToImageModel,
    TextToImageSamples,
)
from equipoise.pipelines.text_to_image.data import drawn_if_demo, read_examples
from equipoise.pipelines.text_to_image.generate import Sample, generate, sources_of
from equipoise.pipelines.text_to_image.inversion import WORD_FILE, read_word, with_token
from equipoise.pipelines.text_to_image.judges import MEANINGS, Judges
from equipoise.pipelines.text_to_image.metrics import (
    DRAWN_SCORE,
    KEPT,
    LOSS_SCORE,
    drawn_subject,
    measure,
    score,
)
from equipoise.pipelines.text_to_image.result import LORA_FILE

_NO_FACTORS = ("No LoRA keys associated to CLIPTextModel", "No LoRA keys associated to T5EncoderModel")
# Said once per cell, and no news: a run that leaves the text encoder as it is has no factors for it.
logging.getLogger("diffusers.loaders.lora_base").addFilter(
    lambda record: not record.getMessage().startswith(_NO_FACTORS)
)

NOTHING = "comparison: there is nothing to generate. Set samples.prompts in the configuration, or give --prompt."
ALIKE = "The pictures of a prompt begin from the same noise in every cell."
THUMBNAIL = 160  # pixels, the longer side


def compare(
    name: str,
    folder: Path,
    runs: Sequence[Run],
    configs: Sequence[TextToImageConfig],
    samples: TextToImageSamples | None = None,
    judges: JudgesSection | None = None,
) -> Comparison:
    """Generates, measures and writes every picture of a comparison into `folder`.

    Args:
        name: What the comparison is called.
        folder: Where pictures, thumbnails and tables go.
        runs: Finished, diverged or failed runs; a run without a result becomes a cell without pictures.
        configs: Theirs, in the same order.
        samples: What to generate; the first run's own samples by default.
        judges: The models to score pictures by; the first run's own by default.

    Raises:
        InputError: the runs tuned different bases, there is no prompt, a LoRA file is missing, or a judge cannot be
            loaded.
    """
    first = configs[0]
    samples = samples or first.samples
    if not samples.prompts:
        raise InputError(NOTHING)
    bases = [_located(run, config) for run, config in zip(runs, configs, strict=True)]
    for config, base in zip(configs, bases, strict=True):
        resolutions = ("data.resolution", first.data.resolution, config.data.resolution)
        models = [(f"model.{key}", mine, getattr(base, key)) for key, mine in bases[0] if key != "offload"]
        for key, mine, theirs in (*models, resolutions):
            if mine != theirs:
                both = " and ".join("null" if value is None else str(value) for value in (mine, theirs))
                raise InputError(f"comparison: {key} differs between the runs ({both}); compare runs of one base.")
    results = [_result(run) for run in runs]
    scorer = Judges(**(judges or first.judges).model_dump())
    pictures = [_training_pictures(run, config) if scorer else [] for run, config in zip(runs, configs, strict=True)]
    base = load_base(bases[0], first.train.precision)
    losses = [result["loss_before"] for result in results if result]
    untouched = {"loss_before": losses[0], "loss_after": losses[0]} if losses else {}
    cells = []
    for run, config, result, files, position in zip(runs, configs, results, pictures, lay_out(configs), strict=True):
        cell = Cell.of(run, config, position)
        cell.metrics = measured(result or {})
        # By this schedule its factors were trained; the untouched base keeps its own.
        tuned = partial(with_result, base, run.folder / "result", samples.scale, config.noise)
        cells.append(Drawn(cell, tuned if result else None, files, samples.scale))
    return draw_all(name, folder, base, first, samples, cells, scorer, untouched, column_of(configs))


@dataclass
class Drawn:
    """A cell, and how the base is made to draw it."""

    cell: Cell
    tuned: Callable[[], AbstractContextManager] | None  # in the block the base has what the cell shows; None: nothing
    references: list[Path] = field(default_factory=list)  # pictures of the subject, for judges
    scale: float = 1.0  # strength of the factors, for the pictures' metadata


def draw_all(
    name: str,
    folder: Path,
    base: Base,
    first: TextToImageConfig,
    samples: TextToImageSamples,
    cells: Sequence[Drawn],
    scorer: Judges,
    losses: dict[str, float],  # the untouched base's metrics as far as they are known
    column: str = "learning rate",
) -> Comparison:
    """Draws the same prompts from the same noise with the untouched base and with each cell, and measures them."""
    drawn = first.model.path == demo.NAME and any(drawn_subject(prompt) for prompt in samples.prompts)
    total = len(samples.prompts) * samples.count * (1 + sum(one.tuned is not None for one in cells))
    places = folder_names([one.cell.run for one in cells])
    with base.encoders_on_device(), progress("pictures", "picture", total=total) as bar:
        plain: list[Sample] = []  # the untouched base's pictures, which come first

        def fill(cell: Cell, references: list[Path], scale: float) -> None:
            made = generate(base.pipeline, samples, first.data.resolution, bar.update)
            metrics, verdicts, scores = measure(made, drawn, base.pipeline.vae_scale_factor, plain)
            plain.extend(made if not cell.run else ())
            judged = scorer(made, references)
            cell.metrics |= metrics | means(judged)
            if is_rate(column) or "object" in cell.metrics:  # of files no loss is known to judge by
                cell.metrics["score"] = score(cell.metrics)
            cell.pictures = _write(folder, places[cell.run], cell, samples, made, verdicts, scale)
            for picture, *found in zip(cell.pictures, scores, judged, strict=True):
                picture.scores = found[0] | found[1]

        untouched = Cell("", "base", math.nan, first.seed, "untouched", metrics=losses)
        fill(untouched, cells[0].references, samples.scale)
        for one in cells:
            if one.tuned is not None:
                with one.tuned():
                    fill(one.cell, one.references, one.scale)
    meaning = DRAWN_SCORE if "object" in untouched.metrics else LOSS_SCORE
    kept = "kept" if "kept" in untouched.metrics else ""
    beside = {kept: KEPT} if kept else {}
    scored = {judge: words for judge, words in MEANINGS.items() if judge in untouched.metrics}
    shown = [one.cell for one in cells]
    prompts = list(samples.prompts)
    found = Comparison(
        name, folder, prompts, meaning, untouched, shown, beside, scored, ALIKE, kept=kept, column=column
    )
    found.sources = _write_sources(folder, samples, first.data.resolution)
    return found


def _located(run: Run, config: TextToImageConfig) -> TextToImageModel:
    """The base that a run tuned; a relative path starts in the folder that the run was started in."""
    where = environment.working_folder(run.folder / "environment.json")
    path = where and where / config.model.path
    local = path and path.is_dir() and config.model.path != demo.NAME
    changes = {"path": str(path)} if local else {}
    for part, other in config.model.apart.items():
        if where and (where / other).is_dir():
            changes[part] = str(where / other)
    return config.model.model_copy(update=changes)


def _training_pictures(run: Run, config: TextToImageConfig) -> list[Path]:
    """The pictures that a run was trained on; none, with a word about it, where they are gone."""
    data = drawn_if_demo(config.data, run.root)
    with environment.there(run.folder / "environment.json"):
        examples, problems = read_examples(data)
        if problems:
            print(f"{run.id}: no likeness to the training pictures is scored. {problems[0]}", file=sys.stderr)
            return []
        return sorted({example.path.resolve() for example in examples})


def _result(run: Run) -> dict | None:
    folder = run.folder / "result"
    if not (folder / "result.json").is_file():
        return None
    if not (folder / LORA_FILE).is_file():
        raise InputError(f"{folder / LORA_FILE}: is missing. Put it back, or compare the other runs without {run.id}.")
    return json.loads((folder / "result.json").read_text())


@contextmanager
def with_result(base: Base, folder: Path, scale: float, noise: NoiseSection) -> Iterator[None]:
    """The base has what a run has learnt for the time of the block, and its noise schedule."""
    base.set_scheduler(noise)
    word = folder / WORD_FILE
    with with_lora(base, folder / LORA_FILE, scale):
        with with_token(base, *read_word(word, base)) if word.is_file() else nullcontext():
            yield


@contextmanager
def with_lora(base: Base, file: Path, scale: float) -> Iterator[None]:
    """The base has the factors of a LoRA file for the time of the block.

    Raises:
        InputError: it is none, or for another base.
    """
    pipeline = base.pipeline
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", RuntimeWarning)  # peft's only word on factors that fit nowhere
            try:
                pipeline.load_lora_weights(str(file.parent), weight_name=file.name, adapter_name="run")
                pipeline.set_adapters("run", scale)
            except Exception as error:  # whatever a damaged one makes of diffusers and peft
                if memory_full(error):
                    raise
                reason = " ".join(str(error).split())[:300] or type(error).__name__
                raise InputError(f"{file}: cannot be loaded on this base: {reason}") from error
        for part in base.tunable.values():
            part.eval()  # the loader's new layers would drop as many of their inputs as in training
        yield
    finally:
        for part in base.tunable.values():
            base.restore(part)


def _write(
    folder: Path, name: str, cell: Cell, samples: TextToImageSamples, made: list[Sample], verdicts, scale: float
) -> list[Picture]:
    pictures = []
    for index, (sample, (right, note)) in enumerate(zip(made, verdicts, strict=True)):
        prompt = index // samples.count
        file, thumbnail = (f"cells/{name}/{prompt:02d}-{sample.seed}{end}" for end in (".png", ".thumb.png"))
        sample.save(folder / file, run=cell.run or "base", row=cell.row, learning_rate=cell.rate, scale=scale)
        _shrink(sample.image, folder / thumbnail)
        pictures.append(Picture(prompt, sample.seed, file, thumbnail, right, note))
    return pictures


def _write_sources(folder: Path, samples: TextToImageSamples, size: int) -> list[Picture]:
    """What each prompt's pictures are made of, beside the base's, which come first."""
    found = []
    for prompt, several in enumerate(sources_of(samples, size)):
        picture = several[0] if len(several) == 1 else _side_by_side(several)
        file, thumbnail = (f"cells/base/source-{prompt:02d}{end}" for end in (".png", ".thumb.png"))
        picture.save(folder / file)
        _shrink(picture, folder / thumbnail)
        found.append(Picture(prompt, None, file, thumbnail))
    return found


def _side_by_side(pictures: list[Image]) -> Image:
    width = pictures[0].width
    made = new_image("RGB", (width * len(pictures), pictures[0].height))
    for index, picture in enumerate(pictures):
        made.paste(picture, (width * index, 0))
    return made


def _shrink(image: Image, file: Path) -> None:
    small = image.copy()
    small.thumbnail((THUMBNAIL, THUMBNAIL))
    small.save(file)
