"""What the figures of a comparison are, in words."""

from equipoise.pipelines.comparing import votes
from equipoise.pipelines.comparing.comparison import Comparison

_WORDS = {
    "loss_before": "the loss on fixed examples, held-out ones where there are any, before the first step",
    "loss_after": "the loss on the same examples at the end",
    "seconds": "how long the training took",
    "step": "the steps that were trained",
    "broken": "share of pictures that are black, flat, not finite or noise",
    "roughness": "change from a spot to the next: 0 in an even picture, 1 in pure noise; the mean of all pictures",
    "black": "share of pictures that are black",
    "flat": "share of pictures of one tone",
    "not_finite": "share of pictures of which the model computed no finite numbers",
    "noise": "share of pictures that are noise",
    "object": "share of pictures of the new object whose colours and outline are right",
    "colour": "share of pictures of the new object whose colours are right",
    "shape": "share of pictures of the new object whose outline is right",
    "overlap": "intersection over union of the new object and its outline, 0 to 1; the mean of its pictures",
    votes.VOTES: "how many blind votes this cell was part of",
}
_EACH = {  # of a modality, which the rest of the name is
    "accuracy": "share of test clips that are named rightly",
    "f1": "macro-F1, the mean over the classes of precision and recall's harmonic mean",
    "probe": "accuracy of a probe on the frozen features",
    "contribution": "Shapley value: what it adds to a probe's accuracy",
    "loss": "loss on the test clips",
}


def meaning(comparison: Comparison, metric: str) -> str:
    """A metric of the comparison's cells in words; "" of one that nobody has described."""
    own = {"score": comparison.score, **comparison.scored, **comparison.beside}
    if found := own.get(metric) or _WORDS.get(metric):
        return found
    kind, _, of = metric.partition("_")
    return f"{_EACH[kind]}, {of.replace('_', ' ')}" if of and kind in _EACH else ""
