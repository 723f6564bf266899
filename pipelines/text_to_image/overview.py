"""What a run will be trained on, told before it begins, and what of that may not be meant."""

from collections import Counter
from collections.abc import Iterable
from functools import lru_cache
from pathlib import Path
from typing import Any

from equipoise.errors import InputError
from equipoise.pipelines.files import version
from equipoise.pipelines.media.pictures import size_of
from equipoise.pipelines.text_to_image import pairs
from equipoise.pipelines.text_to_image.config import TextToImageConfig, TextToImageData
from equipoise.pipelines.text_to_image.data import Example, Folder, in_both
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.formats.layout import encoders_of, is_local, model_source, read_index, stride
from equipoise.pipelines.text_to_image.tables import listed

_SHOWN = 8  # shapes in a sentence


def notes(config: TextToImageConfig, folder: Folder | None, held: Folder | None = None) -> list[str]:
    """What will be trained on and what is held out, a sentence each."""
    found = _trained(config, folder) if folder else []
    return [*found, f"held out for validation: {held.summary}"] if held else found


def _trained(config: TextToImageConfig, folder: Folder) -> list[str]:
    found = [folder.summary, *pairs.notes(config, folder.examples)]
    if shapes := _shapes(config, folder.examples):
        parts = [f"{count} of {width} × {height}" for (width, height), count in shapes.most_common(_SHOWN)]
        more = f" and {len(shapes) - _SHOWN} shapes more" if len(shapes) > _SHOWN else ""
        found.append(f"pictures in an epoch by shape: {', '.join(parts)}{more}.")
    first = next((example for example in folder.examples if example.caption), None)
    if first and config.data.instance_prompt is None:
        found.append(f"the first caption, of {first.path.name}: {first.caption[:200]!r}")
    return found


def doubts(config: TextToImageConfig, folder: Folder | None, held: Folder | None = None) -> list[str]:
    """What may not be meant of what will be trained on and of what is held out, a sentence each."""
    found = held.doubts if held else []
    if not folder:
        return found
    found = [*folder.doubts, *_lone_shapes(config, folder.examples), *_cut_captions(config, folder), *found]
    return [*found, *_trained_too(folder, held)] if held else found


def _trained_too(folder: Folder, held: Folder) -> list[str]:
    if not (both := in_both(folder.examples, held.examples)):
        return []
    count = len(both)
    return [
        f"data.validation: {count} picture{'s' * (count > 1)} of {held.path} ({listed(both, held.path)}) "
        f"{'are' if count > 1 else 'is'} in data.folder too, so that what is trained on is also judged by. "
        "Take them out of one of the two."
    ]


def _shapes(config: TextToImageConfig, examples: Iterable[Example]) -> Counter[tuple[int, int]]:
    """The same; nothing where there is one shape, or none is known."""
    cells = known_stride(config) if config.data.buckets else None
    return shapes(config.data, examples, cells) if cells else Counter()


def known_stride(config: TextToImageConfig) -> int | None:
    """Pixels: sides of pictures are multiples of it; None of a base on the hub, and where its files do not say."""
    return stride(config.model.path, config.model.revision) if is_local(config.model.path) else None


def shapes(data: TextToImageData, examples: Iterable[Example], cells: int) -> Counter[tuple[int, int]]:
    """How often the pictures of each shape, in pixels, come in an epoch. Those that cannot be read are left to the
    check.

    Args:
        data: how they are cut.
        examples: the pictures.
        cells: pixels, of which sides are multiples.
    """
    from equipoise.pipelines.text_to_image.buckets import nearest, sizes  # which needs torch

    among, found = sizes(data, cells), Counter()
    for example in examples:
        try:
            found[nearest(_size(example.path, version(example.path)), among)] += example.repeats
        except InputError:
            continue
    return found


@lru_cache(20_000)
def _size(path: Path, version: tuple[int, ...]) -> tuple[int, int]:
    return size_of(path)  # which reads a PNG to its end


def _lone_shapes(config: TextToImageConfig, examples: Iterable[Example]) -> list[str]:
    batch = config.train.batch
    few = {shape: count for shape, count in _shapes(config, examples).items() if count < batch}
    if not few:
        return []
    named = ", ".join(f"{count} of {width} × {height}" for (width, height), count in list(few.items())[:_SHOWN])
    times = batch // min(few.values())
    return [
        f"data.buckets: of some shapes there are fewer pictures than a batch of {batch} holds ({named}); such a batch "
        f"is filled up with the same ones, which then count up to {times} times as much as others. "
        "Cut them to a commoner shape, add pictures, or use a smaller train.batch."
    ]


def _cut_captions(config: TextToImageConfig, folder: Folder) -> list[str]:
    """A sentence if captions are longer than all text encoders read. Of a base on the hub the run itself can tell."""
    model = config.model
    captions = {example.caption for example in folder.examples}
    if not is_local(model.path):
        return []
    try:
        lost = {caption: words for caption in captions if (words := unread_words(model.path, caption))}
    except (InputError, KeyError, NotImplementedError, OSError, TypeError, ValueError):
        return []  # a damaged checkpoint, which the check describes
    if not lost:
        return []
    cut = [example for example in folder.examples if example.caption in lost]
    words = lost[cut[0].caption]
    shown = words if len(words) <= 80 else f"{words[:80]}…"
    if config.data.instance_prompt is not None:
        return [f"data.instance_prompt: is longer than the text encoders read; “{shown}” is cut off."]
    return [
        f"data.folder: {len(cut)} caption{'s' * (len(cut) > 1)} ({listed((e.path for e in cut), folder.path)}) "
        f"{'are' if len(cut) > 1 else 'is'} longer than the text encoders read; what comes last is cut off, such as "
        f"“{shown}”. Put what matters first, or write less."
    ]


def unread_words(path: str, caption: str) -> str:
    """The end of a caption that none of a local base's text encoders reads; empty where one reads all."""
    ends = []
    for tokenizer, most in _readers(path):
        if len(caption.encode()) <= most:  # no more tokens than bytes: none can be cut
            return ""
        offsets = tokenizer(caption, add_special_tokens=False, return_offsets_mapping=True, verbose=False)
        place = offsets["offset_mapping"][most:]
        ends.append(place[0][0] if place else len(caption))
    return caption[max(ends) :].strip() if ends else ""


@lru_cache(4)
def _readers(path: str) -> list[tuple[Any, int]]:
    """Of each text encoder of a local base: its tokenizer, and how many tokens of a caption it reads at most."""
    index = read_index(path)
    kind = family(index["_class_name"])
    folder = Path(model_source(path))
    encoders = [name for name in encoders_of(kind, index) if name not in kind.apart or (folder / name).is_dir()]
    found = []
    for name in encoders:
        tokenizer = _tokenizer(folder / kind.text_encoders[name])
        around = len(tokenizer("x", verbose=False)["input_ids"])
        special = around - len(tokenizer("x", add_special_tokens=False, verbose=False)["input_ids"])
        most = kind.tokens.get(name) or tokenizer.model_max_length
        found.append((tokenizer, most - kind.before(tokenizer, special)))
    return found


@lru_cache(8)
def _tokenizer(folder: Path) -> Any:
    from transformers import AutoTokenizer

    return AutoTokenizer.from_pretrained(folder, local_files_only=True, trust_remote_code=False)
