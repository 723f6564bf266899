"""The norms that H^T and H^S of eq. 5 are divided by: of the media, the instruction and what the encoder side gives."""

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from equipoise.coordination.balance import Prediction

IGNORED = -100  # the label of a token that is no answer's


def media_ids(config: Any) -> list[int]:
    """The tokens that a model puts pictures, sounds and videos in place of, from its configuration."""
    names = [f"{kind}_token_{end}" for kind in ("image", "audio", "video") for end in ("id", "index")]
    inside = [config, *(getattr(config, name, None) for name in ("vision_config", "audio_config"))]  # Phi-4's are there
    return [value for part in inside for name in names if isinstance(value := getattr(part, name, None), int)]


@torch.no_grad()
def with_norms(prediction: Prediction, batch: Mapping[str, Any], embeddings: Tensor | None, config: Any) -> Prediction:
    """The prediction with its norms, each a root mean square over the samples.

    Args:
        batch: What the model was given, with `labels` of every token.
        embeddings: What its language model was given then (batch, tokens, width); without them nothing is known.
        config: The model's.
    """
    ids, labels = batch.get("input_ids"), batch["labels"]
    if embeddings is None or ids is None or embeddings.shape[:2] != ids.shape:
        return prediction
    placeholder = torch.isin(ids, torch.tensor(media_ids(config), device=ids.device))
    text = ~placeholder & (labels == IGNORED)  # I^T is without answers
    if isinstance(mask := batch.get("attention_mask"), Tensor) and mask.shape == ids.shape:
        text &= mask.bool()

    def norm(*tensors: Tensor) -> float:
        return sum(t.float().square().sum().item() for t in tensors) ** 0.5 / len(ids) ** 0.5

    media = (t for t in batch.values() if isinstance(t, Tensor) and t.is_floating_point())
    return prediction._replace(
        text_norm=norm(embeddings[text]), media_norm=norm(*media), encoded_norm=norm(embeddings[placeholder])
    )
