"""Pictures of any prompts by a run's LoRA, and its loss on captioned pictures beside the untouched base's."""

# diffusers, peft and accelerate annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import sys
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.files import explained
from equipoise.pipelines.pipeline import Asked, Predictions, refuse
from equipoise.pipelines.progress import progress
from equipoise.pipelines.runs.run import Run
from equipoise.pipelines.text_to_image.base import load_base
from equipoise.pipelines.text_to_image.compare import with_result
from equipoise.pipelines.text_to_image.config import TextToImageConfig, TextToImageData
from equipoise.pipelines.text_to_image.data import Folder, open_picture, read_folder
from equipoise.pipelines.text_to_image.fixed import FixedLosses, Measure
from equipoise.pipelines.text_to_image.generate import generate
from equipoise.pipelines.text_to_image.inversion import WORD_FILE
from equipoise.pipelines.text_to_image.latents import prepare_latents
from equipoise.pipelines.text_to_image.result import LORA_FILE
from equipoise.pipelines.text_to_image.tables import ENCODING
from equipoise.pipelines.training.state import make_accelerator, number


def predict(run: Path, config: TextToImageConfig, sources: Sequence[Path], asked: Asked) -> Predictions:
    """Draws every prompt into `asked.folder`, from the noise of the run's samples; a row for each picture.

    Args:
        run: The run's folder.
        sources: Text files with a prompt on each line; `asked.prompts` follow them.

    Raises:
        InputError: There is no result or no prompt, or what is wrong with these.
    """
    prompts = [*_prompts(sources), *asked.prompts]
    if not prompts:
        raise InputError("there is nothing to draw. Give a text file with a prompt on each line, or --prompt.")
    _check_result(run)
    given = {"count": asked.count, "scale": asked.scale}
    changes = {f"samples.{key}": value for key, value in given.items() if value is not None}
    config = configs.set_keys(config, {"samples.prompts": prompts, **changes}, source="predict")
    samples, folder = config.samples, asked.folder
    assert folder is not None
    base = load_base(config.model, config.train.precision)
    rows, digits = [], max(2, len(str(len(prompts) - 1)))
    some = max(1, samples.batch // samples.count)  # prompts whose pictures are held in memory
    with (
        progress("pictures", "picture", total=len(prompts) * samples.count) as bar,
        base.encoders_on_device(),
        with_result(base, run / "result", samples.scale, config.noise),
    ):
        for start in range(0, len(prompts), some):
            part = samples.model_copy(update={"prompts": prompts[start : start + some]})
            for index, picture in enumerate(generate(base.pipeline, part, config.data.resolution, bar.update)):
                file = f"{start + index // samples.count:0{digits}d}-{picture.seed}.png"
                with explained(folder / file):
                    picture.save(folder / file, run=Run(run).id, scale=samples.scale, steps=samples.steps)
                rows.append({"prompt": picture.prompt, "seed": picture.seed, "file": file})
    return Predictions(rows)


def evaluate(run: Path, config: TextToImageConfig, folder: Path) -> Predictions:
    """The loss on a folder's pictures at fixed noise and times, with the run's LoRA and without; a row for each one.

    Raises:
        InputError: There is no result, or all that is wrong with the pictures and their captions.
    """
    _check_result(run)
    if config.data.sources:
        raise InputError("evaluate: pairs, as data.sources makes them, are not evaluated yet.")
    found, data = _read(config.data, folder)
    for doubt in found.doubts:
        print(doubt, file=sys.stderr)
    base = load_base(config.model, config.train.precision)
    noise = base.set_scheduler(config.noise)
    latents = prepare_latents(base, found.examples, data, Run(run).root / ".cache")
    captions = [example.caption for example in found.examples]
    base.read(captions)
    measure = Measure(config, make_accelerator(config.train.precision), base, noise)
    fixed = FixedLosses(measure, latents, captions, config.seed)
    live = config.lora.text_encoder or (run / "result" / WORD_FILE).is_file()
    with progress("loss", "draw", total=2 * fixed.draws) as bar:
        untouched = fixed.losses(base.known, bar.update)
        with (
            base.encoders_on_device() if live else nullcontext(),
            with_result(base, run / "result", 1.0, config.noise),
        ):
            tuned = fixed.losses(fixed.embed if live else base.known, bar.update)
    rows = [
        {"image": str(example.path), "caption": example.caption, "loss": number(own), "loss_base": number(without)}
        for example, own, without in zip(
            found.examples, fixed.by_picture(tuned), fixed.by_picture(untouched), strict=True
        )
    ]
    meaning = (
        f"Loss: the mean of {fixed.draws} fixed draws of noise and times; loss_base: the untouched base's, of the same "
        f"draws. {found.summary}"
    )
    return Predictions(rows, {"loss": tuned.mean().item(), "loss_base": untouched.mean().item()}, meaning)


def _prompts(sources: Sequence[Path]) -> list[str]:
    """The lines of text files that are not blank."""
    prompts, problems = [], []
    for source in sources:
        try:
            lines = [line.strip() for line in source.read_text(encoding=ENCODING).split("\n") if line.strip()]
            problems += [] if lines else [f"{source}: holds no prompt."]
            prompts += lines
        except IsADirectoryError:
            problems.append(f"{source}: is a folder. Give a text file with a prompt on each line.")
        except UnicodeDecodeError:
            problems.append(f"{source}: is not UTF-8 text. Give a text file with a prompt on each line.")
        except OSError as error:
            problems.append(f"{source}: cannot be read: {error.strerror or error}.")
    refuse(problems)
    return prompts


def _read(given: TextToImageData, folder: Path) -> tuple[Folder, TextToImageData]:
    """A folder's pictures with their own captions, or, where it has none, with the run's; and how they are cut.

    Raises:
        InputError: All that is wrong with them.
    """
    plain = {"folder": str(folder), "instance_prompt": None, "repeats": {}, "crop": "center", "flip": False}
    data = given.model_copy(update=plain)
    found = read_folder(data)
    if not found.examples and given.instance_prompt is not None:
        found = read_folder(data.model_copy(update={"instance_prompt": given.instance_prompt}))
    problems = [problem.replace("data.folder: ", "") for problem in found.problems]
    for example in progress("reading", "picture", found.examples, leave=False):
        try:
            open_picture(example.path)
        except InputError as error:
            problems.append(str(error))
    refuse(problems)
    return found, data


def _check_result(run: Path) -> None:
    if not (run / "result" / "result.json").is_file():
        raise InputError(f"{run.name}: has no result yet. `equipoise resume` goes on with it.")
    if not (file := run / "result" / LORA_FILE).is_file():
        raise InputError(f"{file}: is missing. Put it back, or train anew.")
