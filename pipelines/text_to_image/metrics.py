"""What can be measured about generated pictures, and the score that learning rates are compared by."""

from collections.abc import Sequence

import numpy as np

from equipoise.errors import InputError
from equipoise.pipelines.demo import shapes
from equipoise.pipelines.text_to_image.generate import Sample

DRAWN_SCORE = "share of pictures of the taught object whose colours and outline are right"
LOSS_SCORE = "share of the base's loss on the training pictures that tuning removed × share of pictures not broken"


def drawn_subject(prompt: str) -> shapes.Subject | None:
    """The subject a prompt of the drawn domain asks for, or None where it is another kind of prompt."""
    for background in shapes.BACKGROUNDS:
        for subject in _SUBJECTS:
            if prompt == shapes.caption(subject.name, background):
                return subject
    return None


_SUBJECTS = [shapes.OBJECT, *(shapes.shape(colour, name) for colour in shapes.COLOURS for name in shapes.SHAPES)]


def measure(samples: Sequence[Sample], drawn: bool) -> tuple[dict[str, float], list[tuple[bool | None, str]]]:
    """Metrics of one cell's pictures, and a verdict with a note for each picture.

    Where the domain is drawn: `object` is the share of right pictures among prompts for the taught object (with
    `colour` and `shape` apart, and the mean `overlap`), `kept` the share among prompts the base already knew.
    """
    metrics = {"broken": float(np.mean([sample.broken for sample in samples]))}
    verdicts: list[tuple[bool | None, str]] = [(None, "broken" if sample.broken else "") for sample in samples]
    if not drawn:
        return metrics, verdicts
    taught, known = [], []
    for index, sample in enumerate(samples):
        if subject := drawn_subject(sample.prompt):
            verdict = shapes.judge(sample.image, subject)
            (taught if subject is shapes.OBJECT else known).append(verdict)
            seen = f"colour {'right' if verdict.colour else 'wrong'}, shape {'right' if verdict.shape else 'wrong'}"
            verdicts[index] = (verdict.right, f"{seen}, overlap {verdict.overlap:.2f}")
    if taught:
        metrics["object"] = float(np.mean([verdict.right for verdict in taught]))
        metrics["colour"] = float(np.mean([verdict.colour for verdict in taught]))
        metrics["shape"] = float(np.mean([verdict.shape for verdict in taught]))
        metrics["overlap"] = float(np.mean([verdict.overlap for verdict in taught]))
    if known:
        metrics["kept"] = float(np.mean([verdict.right for verdict in known]))
    return metrics, verdicts


def score(metrics: dict[str, float]) -> float:
    """Higher is better; the untouched base gets its own. See DRAWN_SCORE and LOSS_SCORE."""
    if "object" in metrics:
        return metrics["object"]
    before, after = metrics.get("loss_before"), metrics.get("loss_after")
    if before is None or after is None:
        return 0.0
    return (before - after) / before * (1 - metrics["broken"]) if np.isfinite(after) else float("-inf")


class ClipScore:
    """100 · cosine of picture and prompt under a CLIP model, as in Hessel et al., CLIPScore, arXiv:2104.08718, 2021.

    Raises:
        InputError: the path or hub id holds no CLIP model with safetensors weights.
    """

    def __init__(self, path: str):
        from transformers import AutoProcessor, CLIPModel

        try:
            self.model = CLIPModel.from_pretrained(path, use_safetensors=True).eval()
            self.processor = AutoProcessor.from_pretrained(path)
        except (OSError, ValueError, KeyError) as error:
            raise InputError(f"--clip: {path} cannot be loaded as CLIP: {' '.join(str(error).split())[:300]}") from None

    def __call__(self, samples: Sequence[Sample]) -> float:
        import torch

        inputs = self.processor(
            text=[sample.prompt for sample in samples],
            images=[sample.image for sample in samples],
            return_tensors="pt",
            padding=True,
            truncation=True,
        )
        with torch.no_grad():
            made = self.model(**inputs)
        cosine = (made.image_embeds * made.text_embeds).sum(-1)  # both of unit length
        return 100 * cosine.clamp(min=0).mean().item()
