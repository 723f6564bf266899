"""κ's contours over the rates of both sides, after CoMMIT's Figure 1: one direction of each side's step, many lengths.

From where a short training leads, one more step of AdamW gives a direction for each side. A step at another rate is
that direction at another length, so that κ at rates (a, b) is d of the language side's step at a over d of the encoder
side's at b, on the step's batch: as many forward passes as there are rates of both sides, for all pairs of rates.
"""

from collections.abc import Sequence
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import numpy as np
import torch
from PIL import Image, ImageDraw, ImageFont

from equipoise.pipelines.reproduce import Panel, Trial
from equipoise.pipelines.tables import table

RATES = [10 ** (exponent / 2) for exponent in range(-10, -1)]  # 1e-5 to 1e-1
WIDE, MARGIN = 420, 70  # pixels, of the square and beside it
_STOPS = [(-3, (33, 102, 172)), (0, (247, 247, 247)), (3, (178, 24, 43))]  # log10 κ → colour


def train(cell: Trial) -> Trial:
    """Trains for the cell's steps at one rate; d of either side's step at each of RATES."""
    from equipoise.coordination.balance import LANGUAGE, Prediction, mean_distance, undisturbed
    from equipoise.pipelines import config
    from equipoise.pipelines.instruction_tuning.examples import load_examples
    from equipoise.pipelines.instruction_tuning.model import adapt, load_model, load_processor, model_type
    from equipoise.pipelines.instruction_tuning.talk import Talk
    from equipoise.pipelines.instruction_tuning.train import InstructionTuningWork
    from equipoise.pipelines.runs.store import Store
    from equipoise.pipelines.training.state import make_accelerator

    data = Path(cell["folder"]) / ".demo" / "questions" / "questions.jsonl"
    with TemporaryDirectory(prefix="equipoise-") as runs:
        words = [f"learning_rate={cell['rate']}", f"steps={cell['steps'] + 1}", f"seed={cell['seed']}", f"data={data}"]
        words += ["coordinator=constant", "coordinator.options={}", "schedule=constant", f"runs={runs}"]
        settings = config.load("instruction_tuning/demo", words)
        talk = Talk(load_processor(settings.model), model_type(settings.model))
        kept, held, _ = load_examples(settings, talk, lambda text: None)
        tuned = adapt(load_model(settings.model, "no"), settings)
        run = Store(settings.runs).create(settings)
        work = InstructionTuningWork(settings, run, make_accelerator("no"), tuned, talk, kept, held)
        for step in range(cell["steps"] + 1):
            before = {name: tensor.detach().clone() for name, tensor in tuned.named.items()}
            work.step(step)
        batch = work.batches.get(cell["steps"])
    directions = {name: (tensor.detach() - before[name]) / cell["rate"] for name, tensor in tuned.named.items()}

    def predict() -> Prediction:
        logits, _, sample = work._forward(work._moved_to_device(batch))
        return Prediction(logits, sample)

    @torch.no_grad()
    def moved(side: Sequence[str], rate: float) -> float:
        for name, tensor in tuned.named.items():
            tensor.copy_(before[name] + (rate * directions[name] if name in side else 0.0))
        return mean_distance(base, predict()).item()

    language = list(tuned.components[LANGUAGE])
    encoder = [name for name in tuned.named if name not in language]
    with undisturbed(work.model), torch.no_grad():
        for name, tensor in tuned.named.items():
            tensor.copy_(before[name])
        base = predict()
        found = {key: [moved(side, rate) for rate in RATES] for key, side in (("T", language), ("S", encoder))}
    return {"language": found["T"], "encoder": found["S"]}


def report(cell: Trial) -> tuple[str, list[Panel], dict[str, Image.Image]]:
    """What was measured: a table of κ, a panel of either side's d, and the picture of the contours."""
    language, encoder = cell["language"], cell["encoder"]
    rows = [[f"{RATES[j]:.0e}", *(f"{language[i] / encoder[j]:.3g}" for i in range(0, len(RATES), 2))]
            for j in range(0, len(RATES), 2)]  # fmt: skip
    head = ["encoder side's rate ↓, language side's →", *(f"{rate:.0e}" for rate in RATES[::2])]
    text = (
        f"κ of one step at other rates of both sides, from where {cell['steps']} steps at {cell['rate']:g} lead:\n\n"
        f"{table(head, rows)}"
    )
    lines = {"language side": language, "encoder side": encoder}
    panel = Panel("d of one side's step alone", "its rate", lines, [f"{rate:.0e}" for rate in RATES])
    return text, [panel], {"kappa.png": _picture(language, encoder)}


def _picture(language: Sequence[float], encoder: Sequence[float]) -> Image.Image:
    """log10 κ in colours, with a line at each half power of ten, over the logarithms of both rates."""
    at = np.linspace(0, len(RATES) - 1, WIDE)
    across, up = (np.interp(at, range(len(RATES)), np.log10(moved)) for moved in (language, encoder))
    fine = across[None, :] - up[::-1, None]
    stops = [stop for stop, _ in _STOPS]
    colours = [np.interp(fine, stops, [colour[i] for _, colour in _STOPS]) for i in range(3)]
    square = np.stack(colours, axis=2).astype(np.uint8)
    for width, every in ((0, 0.5), (1, 1.0)):  # thin lines at the halves
        band = np.floor(fine / every)
        passed = np.zeros((WIDE, WIDE), bool)
        passed[1:] |= band[1:] != band[:-1]
        passed[:, 1:] |= band[:, 1:] != band[:, :-1]
        if width:
            passed[:-1] |= passed[1:]
        square[passed] = (60, 60, 60) if width else (150, 150, 150)
    image = Image.new("RGB", (WIDE + 2 * MARGIN, WIDE + 2 * MARGIN), "white")
    image.paste(Image.fromarray(square), (MARGIN, MARGIN))
    _label(ImageDraw.Draw(image))
    return image


def _label(pen: Any) -> None:
    font, ink, end = ImageFont.load_default(14), "#1b1f24", MARGIN + WIDE
    for index in range(0, len(RATES), 2):
        at, text = WIDE * index / (len(RATES) - 1), f"{RATES[index]:.0e}"
        pen.text((MARGIN + at, end + 14), text, ink, font, anchor="mm")
        pen.text((MARGIN - 6, end - at), text, ink, font, anchor="rm")
    pen.text((MARGIN + WIDE / 2, end + 42), "rate of the language side", ink, font, anchor="mm")
    pen.text((8, MARGIN - 24), "rate of the encoder side", ink, font)
    title = "log10 of kappa: blue below 0, red above, a dark line at each whole number"
    pen.text((8, 18), title, ink, font, anchor="lm")
