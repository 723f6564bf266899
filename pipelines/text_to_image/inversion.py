"""Textual inversion (Gal et al., arXiv:2208.01618, 2022): a new word, of which only the vectors are trained.

The tokenizers get the word for the time of a run, and the text encoders' first layer a few rows beside its own, which
stay as they are. The rows are saved as diffusers' `load_textual_inversion` reads them.
"""

# transformers and diffusers annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import copy
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import torch
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.files import explained
from equipoise.pipelines.runs.checkpoints import save_tensors
from equipoise.pipelines.text_to_image.base import Base
from equipoise.pipelines.text_to_image.config import TokenSection
from equipoise.pipelines.text_to_image.formats.lora_files import opened

WORD_FILE = "learned_embeds.safetensors"
_SEVERAL = {"text_encoder": "clip_l", "text_encoder_2": "clip_g"}  # their names where a file is of both


class Rows(torch.nn.Module):
    """A text encoder's first layer, with rows for words that it does not know."""

    def __init__(self, known: torch.nn.Module, rows: Tensor, first: int):
        super().__init__()
        self.known, self.first = known, first
        self.__dict__["rows"] = rows  # not one of the encoder's parameters: freezing and casting it pass them by

    def forward(self, ids: Tensor) -> Tensor:  # (…,) → (…, width)
        old = self.known(ids.clamp(max=self.first - 1))
        new = self.rows.to(old.dtype)[(ids - self.first).clamp(min=0)]
        return torch.where((ids >= self.first)[..., None], new, old)


def fresh_rows(base: Base, token: TokenSection) -> dict[str, Tensor]:
    """By text encoder: float32, trainable, (vectors, width), each the mean of what `token.start` reads as."""
    made = {}
    for encoder, tokenizer in _readers(base).items():
        words = getattr(base.pipeline, tokenizer)(token.start, add_special_tokens=False).input_ids
        known = getattr(base.pipeline, encoder).get_input_embeddings().weight
        start = known[words].float().mean(0) if words else known.float().mean(0)
        made[encoder] = start.detach().to(base.denoiser.device).repeat(token.vectors, 1).requires_grad_()
    return made


@contextmanager
def with_token(base: Base, name: str, rows: Mapping[str, Tensor]) -> Iterator[None]:
    """For the time of the block, the tokenizers know the word and the text encoders read it as `rows`.

    Raises:
        InputError: they know it already, or the base is of a family that diffusers loads no words for.
    """
    readers = _readers(base)
    names = [name, *(f"{name}_{index}" for index in range(1, len(next(iter(rows.values())))))]
    before = {part: getattr(base.pipeline, part) for part in readers.values()}
    layers = {encoder: getattr(base.pipeline, encoder).get_input_embeddings() for encoder in readers}
    try:
        for encoder, part in readers.items():
            tokenizer = copy.deepcopy(before[part])
            known = tokenizer.get_vocab()
            if clash := [word for word in names if word in known or f"{word}</w>" in known]:  # CLIP marks a word's end
                raise InputError(f"token.name: the base knows {', '.join(clash)} already. Give a new word.")
            first = len(tokenizer)
            tokenizer.add_tokens(names)
            setattr(base.pipeline, part, tokenizer)
            getattr(base.pipeline, encoder).set_input_embeddings(Rows(layers[encoder], rows[encoder], first))
        yield
    finally:
        for encoder, part in readers.items():
            setattr(base.pipeline, part, before[part])
            getattr(base.pipeline, encoder).set_input_embeddings(layers[encoder])


def write_word(folder: Path, name: str, rows: Mapping[str, Tensor]) -> None:
    """Writes result/learned_embeds.safetensors. Of one text encoder, the word's own name stands for its rows."""
    keys = _SEVERAL if len(rows) > 1 else dict.fromkeys(rows, name)
    with explained(folder / WORD_FILE):
        folder.mkdir(parents=True, exist_ok=True)
        tensors = {keys[encoder]: tensor.detach().cpu().clone() for encoder, tensor in rows.items()}
        save_tensors(folder / WORD_FILE, tensors, {"format": "pt", "token": name})


def read_word(file: Path, base: Base) -> tuple[str, dict[str, Tensor]]:
    """The name and rows that `write_word` wrote. Raises InputError if it is another file, or for another base."""
    with opened(file) as tensors:
        name = (tensors.metadata() or {}).get("token", "")
        found = {key: tensors.get_tensor(key) for key in tensors.keys()}
    keys = _SEVERAL if len(found) > 1 else dict.fromkeys(("text_encoder",), name)
    device = base.denoiser.device
    rows = {encoder: found[key].to(device) for encoder, key in keys.items() if key in found}
    if not name or rows.keys() != _readers(base).keys():
        raise InputError(f"{file}: holds no word for this base.")
    return name, rows


def _readers(base: Base) -> dict[str, str]:
    """The text encoders that read new words, with their tokenizers."""
    if not base.family.loads_textual_inversion:
        raise InputError(f"token.name: diffusers loads no new words for {base.family.title}. Leave it out.")
    return {encoder: base.family.text_encoders[encoder] for encoder in base.family.tuned_encoders}
