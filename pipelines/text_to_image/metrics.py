"""What can be measured about generated pictures, and the score that learning rates are compared by."""

from collections.abc import Sequence

import numpy as np
from PIL import Image

from equipoise.pipelines.comparing.comparison import means
from equipoise.pipelines.demo import shapes
from equipoise.pipelines.text_to_image.generate import Sample

DRAWN_SCORE = "share of pictures of the new object whose colours and outline are right"
KEPT = "share of pictures of what the base already knew that are right"
LOSS_SCORE = "share of the base's loss on the training pictures that tuning removed, times that of pictures not broken"

# Roughness above which a picture counts as noise: halfway between an even tone and pixels drawn at random. Measured
# on the embedded base, 64 pixels: pictures of rates that broke it 0.54 to 0.65; 672 others (28 cells, rates up to 1)
# at most 0.43, but for one ghost of 0.53. Measured on 16 photographs, four pixels to a latent cell: at most 0.46 at
# 64 pixels (at which a cell holds much of a photograph), 0.13 at 256, and with noise of standard deviation 128 (of
# 255) added at least 0.66. One picture may fall on the wrong side, and so most of a cell's have to: see
# comparison.MOSTLY.
NOISE = 0.5
BLACK = 16  # mean level, of 255, below which a flat picture counts as black: what an autoencoder overflows into
FAULTS = ("black", "flat", "not_finite", "noise")  # a picture has one of them at most; `broken` is any


def drawn_subject(prompt: str) -> shapes.Subject | None:
    """The subject a prompt of the drawn domain asks for, or None where it is another kind of prompt."""
    for background in shapes.BACKGROUNDS:
        for subject in _SUBJECTS:
            if prompt == shapes.caption(subject.name, background):
                return subject
    return None


_SUBJECTS = [shapes.OBJECT, *(shapes.shape(colour, name) for colour in shapes.COLOURS for name in shapes.SHAPES)]


def roughness(image: Image.Image, cell: int) -> float:
    """How much of a picture changes from one latent cell to the next: 0 where it is even, 1 where it is pure noise.

    The mean squared difference of pixels `cell` apart over that of any two pixels (twice the variance), along rows or
    columns, whichever is smaller: stripes are rough one way, and noise is both ways.

    Args:
        image: Larger than `cell`, both ways.
        cell: Pixels to a side of a latent cell (the autoencoder's factor); broken weights draw noise in these units.
    """
    pixels = np.asarray(image.convert("RGB"), dtype=np.float64)
    steps = [pixels[cell:] - pixels[:-cell], pixels[:, cell:] - pixels[:, :-cell]]
    return float(min(np.square(step).mean() for step in steps) / max(2 * pixels.var(axis=(0, 1)).mean(), 1e-9))


def measure(
    samples: Sequence[Sample], drawn: bool, cell: int, base: Sequence[Sample] = ()
) -> tuple[dict[str, float], list[tuple[bool | None, str]], list[dict[str, float]]]:
    """Metrics of one cell's pictures, and for each picture a verdict with a note, and its own part in the metrics.

    `broken` is the share of pictures that are black, flat, not finite, or noise (FAULTS, of which each has its share
    too): rougher than NOISE and than whatever the untouched base drew for the same prompt, which may ask for gravel;
    `roughness` is the pictures' mean. Where the domain is drawn: `object` is the share of right pictures among prompts
    for the new object (with `colour` and `shape` apart, and the mean `overlap`), `kept` the share among prompts the
    base already knew.

    Args:
        samples: The cell's pictures.
        drawn: Whether the domain is drawn.
        cell: Pixels to a side of a latent cell.
        base: The untouched base's pictures of the same prompts; none where `samples` are these.
    """
    known = [(sample.prompt, roughness(sample.image, cell)) for sample in base if not sample.broken]
    rough = [0.0 if sample.broken else roughness(sample.image, cell) for sample in samples]
    verdicts: list[tuple[bool | None, str]] = []
    scores: list[dict[str, float]] = []
    for sample, value in zip(samples, rough, strict=True):
        noise = value > max([NOISE, *(usual for prompt, usual in known if prompt == sample.prompt)])
        fault = _fault(sample) or ("noise" if noise else "")
        share = f" {value:.2f}" if fault == "noise" else ""
        verdicts.append((None, f"broken: {fault.replace('_', ' ')}{share}" if fault else ""))
        scores.append(
            {"broken": float(bool(fault)), "roughness": value} | {name: float(name == fault) for name in FAULTS}
        )
    metrics = means(scores)
    if not drawn:
        return metrics, verdicts, scores
    new, known = [], []
    for index, sample in enumerate(samples):
        if subject := drawn_subject(sample.prompt):
            verdict = shapes.judge(sample.image, subject)
            (new if subject is shapes.OBJECT else known).append(verdict)
            parts = f"colour {'right' if verdict.colour else 'wrong'}, shape {'right' if verdict.shape else 'wrong'}"
            note = ", ".join(filter(None, [verdicts[index][1], parts, f"overlap {verdict.overlap:.2f}"]))
            verdicts[index] = (verdict.right, note)
            scores[index]["right"] = float(verdict.right)
    if new:
        metrics["object"] = float(np.mean([verdict.right for verdict in new]))
        metrics["colour"] = float(np.mean([verdict.colour for verdict in new]))
        metrics["shape"] = float(np.mean([verdict.shape for verdict in new]))
        metrics["overlap"] = float(np.mean([verdict.overlap for verdict in new]))
    if known:
        metrics["kept"] = float(np.mean([verdict.right for verdict in known]))
    return metrics, verdicts, scores


def _fault(sample: Sample) -> str:
    if not sample.broken:
        return ""
    return "not_finite" if not sample.finite else "black" if np.mean(np.asarray(sample.image)) < BLACK else "flat"


def score(metrics: dict[str, float]) -> float:
    """Higher is better; the untouched base gets its own. See DRAWN_SCORE and LOSS_SCORE."""
    if "object" in metrics:
        return metrics["object"]
    before, after = metrics.get("loss_before"), metrics.get("loss_after")
    if before is None or after is None:
        return 0.0
    return (before - after) / before * (1 - metrics["broken"]) if np.isfinite(after) else float("-inf")
