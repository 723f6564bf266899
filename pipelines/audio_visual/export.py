"""A result for others: the weights as they are, or the whole model as ONNX, each with a model card."""

import json
import logging
import shutil
import sys
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path

import torch
from torch import Tensor, nn

from equipoise.errors import InputError
from equipoise.pipelines.audio_visual.card import card, complete, described
from equipoise.pipelines.audio_visual.features import blank
from equipoise.pipelines.audio_visual.model import DESCRIPTION, WEIGHTS, LateFusion, load
from equipoise.pipelines.files import explained
from equipoise.pipelines.jobs.making import swapped_in

ONNX = "model.onnx"
_NEEDED = ("onnx", "onnxscript")
_LARGEST = 1 << 30  # bytes of weights inside of the file; more are beside it, for it may not pass 2 GB


def export(result: Path, format: str, output: Path) -> None:
    """Writes a folder, which is there complete or not at all.

    Args:
        result: The run's result/.
        format: `weights`: what `load` takes; `onnx`: model.onnx and features.json.
        output: The folder, which must not be there.

    Raises:
        InputError: There is no result, or what ONNX needs is not installed.
    """
    if not (result / "result.json").is_file():
        raise InputError(f"{result} holds no result yet. `equipoise resume` goes on with the run.")
    if format == "onnx" and (missing := [name for name in _NEEDED if find_spec(name) is None]):
        raise InputError(
            f"--format: onnx needs {' and '.join(missing)}. Install them with pip install 'equipoise[onnx]'."
        )
    model, classes = load(result)
    figures = json.loads((result / "result.json").read_text(encoding="utf-8"))
    with swapped_in(output) as folder, explained(output):
        if format == "onnx":
            write_onnx(model, folder / ONNX)
            (folder / "features.json").write_text(described(model.config, classes), encoding="utf-8")
        else:
            for name in (WEIGHTS, DESCRIPTION, "result.json"):
                shutil.copyfile(result / name, folder / name)
        (folder / "README.md").write_text(card(model.config, classes, figures, format), encoding="utf-8")
    if format == "onnx" and model.config.data.missing == "mask":
        print(f"{output / ONNX}: {complete(model.config)}", file=sys.stderr)


class Whole(nn.Module):
    """The model as one function of its inputs: logits of the joint head and of each modality's own, and features."""

    def __init__(self, model: LateFusion):
        super().__init__()
        self.model = model
        self.names = ["joint", *model.modalities]

    @property
    def outputs(self) -> list[str]:
        return [*(f"logits_{name}" for name in self.names), *(f"features_{name}" for name in self.model.modalities)]

    def forward(self, *given: Tensor) -> tuple[Tensor, ...]:
        features = self.model.features(dict(zip(self.model.modalities, given, strict=True)))
        own = [self.model.heads[name](made) for name, made in features.items()]
        return self.model.fusion(features), *own, *features.values()


def write_onnx(model: LateFusion, file: Path) -> None:
    """Writes the whole model, for any number of clips."""
    whole = Whole(model.float().cpu()).eval()
    given = blank(model.config.data, 2)
    weights = sum(tensor.nbytes for tensor in model.state_dict().values())
    clips = torch.export.Dim("clips")
    with _quiet():
        torch.onnx.export(
            whole,
            tuple(given.values()),
            file,
            dynamo=True,
            input_names=list(given),
            output_names=whole.outputs,
            dynamic_shapes=(tuple({0: clips} for _ in given),),
            external_data=weights > _LARGEST,
            verbose=False,
        )


@contextmanager
def _quiet() -> Iterator[None]:
    """The exporter's notes on its own workings are nothing to whoever exports."""
    before = logging.root.manager.disable
    logging.disable(logging.ERROR)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            yield
    finally:
        logging.disable(before)
