"""A caption as it is drawn for a step: tags in another order, or nothing at all."""

import torch

from equipoise.pipelines.text_to_image.config import TextToImageData


def spoken(caption: str, data: TextToImageData, generator: torch.Generator) -> str:
    """A caption as one step reads it; draws nothing where the configuration asks for nothing.

    With `data.shuffle_tags`, tags, which commas separate, are shuffled, but for the first `data.keep_tags`; one in
    1 / `data.caption_dropout` captions is empty, which teaches what classifier-free guidance leads away from.
    """
    if data.caption_dropout and torch.rand((), generator=generator) < data.caption_dropout:
        return ""
    if not data.shuffle_tags:
        return caption
    tags = [tag.strip() for tag in caption.split(",")]
    kept, rest = tags[: data.keep_tags], tags[data.keep_tags :]
    return ", ".join([*kept, *(rest[i] for i in torch.randperm(len(rest), generator=generator))])
