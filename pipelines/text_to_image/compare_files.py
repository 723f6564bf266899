"""The same pictures from LoRA files of any origin, and from a run's checkpoints, each at several strengths."""

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, nullcontext, suppress
from functools import partial
from pathlib import Path
from tempfile import TemporaryDirectory

import torch
from peft.tuners.tuners_utils import BaseTunerLayer

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import Cell, Comparison
from equipoise.pipelines.config.keys import is_set
from equipoise.pipelines.runs import checkpoints
from equipoise.pipelines.text_to_image.base import Base, layers, load_base
from equipoise.pipelines.text_to_image.compare import NOTHING, Drawn, draw_all, with_lora, with_result
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.formats.factors import Factors
from equipoise.pipelines.text_to_image.formats.layout import native_resolution
from equipoise.pipelines.text_to_image.formats.lora_files import (
    DOWN,
    UP,
    canonical,
    opened,
    read_lora,
    sizes_for_comfyui,
    write_lora,
)
from equipoise.pipelines.text_to_image.generate import lora_scale
from equipoise.pipelines.text_to_image.inversion import with_token
from equipoise.pipelines.text_to_image.judges import Judges
from equipoise.pipelines.text_to_image.result import LORA_FILE


def compare_files(
    name: str,
    folder: Path,
    given: Mapping[str, Path],
    config: TextToImageConfig,
    strengths: Sequence[float],
) -> Comparison:
    """Rows are files, columns strengths, and the untouched base stands before them.

    Args:
        name: What the comparison is called.
        folder: Where pictures, thumbnails and tables go.
        given: Label → a .safetensors file in diffusers', kohya's or ComfyUI's names, or the folder of a checkpoint.
        config: The base, the samples and the judges.
        strengths: Above 0.

    Raises:
        InputError: A file fits the base in part or not at all.
    """
    if not config.samples.prompts:
        raise InputError(NOTHING)
    if not is_set(config.data, "resolution") and (side := native_resolution(config.model.path, config.model.revision)):
        config = configs.set_keys(config, {"data.resolution": side})
    base = load_base(config.model, config.train.precision)  # with its own schedule, for itself and for files
    scorer = Judges(**config.judges.model_dump())
    with TemporaryDirectory() as rewritten:
        files = {path: _loadable(base, path, Path(rewritten)) for path in given.values() if not path.is_dir()}
        cells = []
        for label, path in given.items():
            for strength in strengths:
                cell = Cell(f"{label} at {strength:g}", label, strength, config.seed, "done", config={"file": label})
                tuned = partial(_with_checkpoint, base, path, strength)
                if path in files:
                    tuned = partial(_with_file, base, path, files[path], strength)
                cells.append(Drawn(cell, tuned, scale=strength))
        return draw_all(name, folder, base, config, config.samples, cells, scorer, {}, column="strength")


@contextmanager
def _with_checkpoint(base: Base, path: Path, strength: float) -> Iterator[None]:
    """The base has the factors that a run had at a checkpoint, or their average, for the time of the block."""
    settings: TextToImageConfig = configs.load(path.parent.parent / "config.yaml")
    _, weights, _ = checkpoints.load(path)
    base.set_scheduler(settings.noise)
    word = {name.removeprefix("word."): rows for name, rows in weights.items() if name.startswith("word.")}
    named = with_token(base, settings.token.name or "", word) if word else nullcontext()
    with named, base.adapted(settings.lora, settings.seed) as parts:
        for part, module in parts.items():
            for name, parameter in module.named_parameters():
                if parameter.requires_grad:
                    own = weights.get(f"{part}.{name}")
                    if own is None or own.shape != parameter.shape:
                        raise InputError(f"{path}: does not fit the configuration beside it. Was that changed?")
                    with torch.no_grad():
                        parameter.copy_(weights.get(f"average.{part}.{name}", own))
        for module in parts.values():
            module.eval()
        with lora_scale(parts, strength):
            yield


@contextmanager
def _with_file(base: Base, path: Path, loadable: Path, strength: float) -> Iterator[None]:
    """The base has a file's factors for the time of the block, and of a run's result all else that this learnt."""
    settings = path.parent.parent / "config.yaml"
    if path == loadable and path.name == LORA_FILE and (path.parent / "result.json").is_file() and settings.is_file():
        with with_result(base, path.parent, strength, configs.load(settings).noise):
            yield
        return
    base.set_scheduler(TextToImageConfig(name="files").noise)  # pyright: ignore[reportCallIssue]
    with with_lora(base, loadable, strength):
        yield


def _loadable(base: Base, path: Path, folder: Path) -> Path:
    """A file that diffusers' loader takes whole: the given one, or where that does not know all its names, or what is
    added to them, one in `folder` under diffusers' own.

    Raises:
        InputError: It fits the base under no app's names.
    """
    with suppress(InputError), with_lora(base, path, 1.0):
        if _whole(path) and _layers(base) >= len(_layers_of(path, DOWN)):
            return path
    output = folder / f"{len(list(folder.iterdir()))}.safetensors"
    _rewrite(base, path, output)
    return output


def _layers(base: Base) -> int:
    return sum(isinstance(m, BaseTunerLayer) for part in base.tunable.values() for m in part.modules())


def _layers_of(path: Path, ends: tuple[str, ...]) -> set[str]:
    """The layers of which a file has a factor, by its own names."""
    with opened(path) as file:
        return {name.removesuffix(end) for name in file.keys() for end in ends if name.endswith(end)}


def _whole(path: Path) -> bool:
    """Whether a file has both factors of each layer: peft takes a lone one, beside a fresh other."""
    return _layers_of(path, DOWN) == _layers_of(path, UP)


def _rewrite(base: Base, path: Path, output: Path) -> None:
    """Writes a file anew as diffusers reads it."""
    write_lora(output, "diffusers", plain_factors(base, path), base.shape, {"format": "pt"})


def plain_factors(base: Base, path: Path) -> dict[str, Factors]:
    """A file's factors by diffusers' names, whichever app has written it, α within them.

    Raises:
        InputError: It fits the base in part or not at all.
    """
    names = [canonical(part, name) for part, module in base.tunable.items() for name in layers(module)]
    found = read_lora(path, names, base.shape)
    if sizes_for_comfyui(path) and any(factors.magnitude is not None for factors in found.values()):
        raise InputError(f"{path}: its sizes of DoRA are ComfyUI's. Give the run, or its file for diffusers.")
    return {
        layer: Factors(factors.down, factors.up * (factors.alpha / factors.rank), factors.rank, factors.magnitude)
        for layer, factors in found.items()
    }
