"""Scores of pictures where nobody knows what is right: CLIP for the prompt, CLIP and DINO for the subject."""

# transformers annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import json
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from accelerate.state import PartialState
from PIL import Image
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.data import open_picture
from equipoise.pipelines.text_to_image.generate import Sample

MEANINGS = {
    "clip": "100 × cosine of picture and prompt under CLIP",
    "clip_image": "cosine of picture and training pictures under CLIP, the mean over all pairs",
    "dino": "cosine of picture and training pictures under DINO, the mean over all pairs",
}
MOST = 256  # training pictures that others are compared with; of more, these many, evenly spread
_AT_A_TIME = 16  # pictures or prompts per forward pass


class Judges:
    """The models that pictures are scored by, each loaded once, and what they make of training pictures.

    `clip` is CLIPScore without its factor 2.5 (Hessel et al., arXiv:2104.08718, 2021); `clip_image` and `dino` are
    CLIP-I and DINO of DreamBooth (Ruiz et al., arXiv:2208.12242, 2022, §4.2).

    Raises:
        InputError: a path or hub id holds no such model with safetensors weights.
    """

    def __init__(self, clip: str | None = None, dino: str | None = None):
        self.clip = ClipJudge(clip) if clip else None
        self.dino = DinoJudge(dino) if dino else None
        self._references: dict[tuple[str, tuple[Path, ...]], Tensor] = {}

    def __bool__(self) -> bool:
        return bool(self.clip or self.dino)

    def __call__(self, samples: Sequence[Sample], references: Sequence[Path] = ()) -> list[dict[str, float]]:
        """The scores of each picture.

        Args:
            samples: Generated pictures.
            references: The training pictures; without any, there is only `clip`.
        """
        scores: list[dict[str, float]] = [{} for _ in samples]
        for name, model in (("clip_image", self.clip), ("dino", self.dino)):
            if not model:
                continue
            made = model.pictures([sample.image for sample in samples])
            if model is self.clip:
                for score, cosine in zip(
                    scores, (made * model.texts([s.prompt for s in samples])).sum(-1), strict=True
                ):
                    score["clip"] = 100 * max(0.0, cosine.item())
            if references:
                likeness = (made @ self._embedded(name, model, references).T).mean(-1)
                for score, cosine in zip(scores, likeness, strict=True):
                    score[name] = cosine.item()
        return scores

    def _embedded(self, name: str, model: "ClipJudge | DinoJudge", paths: Sequence[Path]) -> Tensor:
        chosen = tuple(paths[round(i)] for i in np.linspace(0, len(paths) - 1, min(MOST, len(paths))))
        if (name, chosen) not in self._references:
            chunks = [chosen[start : start + _AT_A_TIME] for start in range(0, len(chosen), _AT_A_TIME)]
            rows = [model.pictures([open_picture(path) for path in some]) for some in chunks]
            self._references[name, chosen] = torch.cat(rows)
        return self._references[name, chosen]


class ClipJudge:
    """A CLIP model: pictures and prompts as unit vectors of one space."""

    def __init__(self, path: str):
        from transformers import AutoTokenizer, CLIPModel

        self.model, self.prepare = _load(CLIPModel, path, "clip")
        self.tokenizer = _explained(lambda: AutoTokenizer.from_pretrained(path), path, "clip")
        self.longest = self.model.config.text_config.max_position_embeddings

    @torch.no_grad()
    def texts(self, prompts: Sequence[str]) -> Tensor:  # (prompts, width)
        rows = []
        for start in range(0, len(prompts), _AT_A_TIME):
            tokens = self.tokenizer(
                list(prompts[start : start + _AT_A_TIME]),
                padding=True,
                truncation=True,
                max_length=self.longest,
                return_tensors="pt",
            ).to(self.model.device)
            read = self.model.text_model(input_ids=tokens["input_ids"], attention_mask=tokens["attention_mask"])
            rows.append(self.model.text_projection(read.pooler_output))
        return _unit(rows)

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:  # (images, width)
        return _unit(
            self.model.visual_projection(self.model.vision_model(pixels.to(self.model.device)).pooler_output)
            for pixels in _chunks(images, self.prepare)
        )


class DinoJudge:
    """A vision transformer (DINO, DINOv2, DINOv3): a picture is what its first token, of the class, came to."""

    def __init__(self, path: str):
        from transformers import AutoModel

        self.model, self.prepare = _load(AutoModel, path, "dino")
        if self.model.main_input_name != "pixel_values" or hasattr(self.model.config, "text_config"):
            kind = self.model.config.model_type
            raise InputError(f"judges.dino: {path} is a {kind}. Give a vision transformer, facebook/dinov2-small say.")

    @torch.no_grad()
    def pictures(self, images: Sequence[Image.Image]) -> Tensor:  # (images, width)
        return _unit(
            self.model(pixels.to(self.model.device)).last_hidden_state[:, 0] for pixels in _chunks(images, self.prepare)
        )


def preparation(path: str) -> Callable[[Sequence[Image.Image]], Tensor]:
    """What makes pictures into a model's pixels, (images, 3, height, width): transformers' own class where it works.

    Some classes, DINOv3's among them, want torchvision even to resize; for those, PIL does what their
    preprocessor_config.json says.
    """
    from transformers import AutoImageProcessor

    try:
        processor = AutoImageProcessor.from_pretrained(path)
    except ImportError:
        return by_hand(_config(path))
    return lambda images: processor(images=list(images), return_tensors="pt")["pixel_values"]


def by_hand(config: dict[str, Any]) -> Callable[[Sequence[Image.Image]], Tensor]:
    """Resize, cut from the centre, scale and normalise, as a preprocessor_config.json has it."""

    def one(image: Image.Image) -> Tensor:
        image = image.convert("RGB")
        if config.get("do_resize", True):
            image = image.resize(_target(config["size"], image.size), Image.Resampling(config.get("resample") or 3))
        if config.get("do_center_crop") and (crop := config.get("crop_size")):
            high, wide = (crop["height"], crop["width"]) if isinstance(crop, dict) else (crop, crop)
            left, top = (image.width - wide) // 2, (image.height - high) // 2
            image = image.crop((left, top, left + wide, top + high))
        pixels = np.asarray(image, dtype=np.float32)
        if config.get("do_rescale", True):
            pixels = pixels * np.float32(config.get("rescale_factor") or 1 / 255)
        if config.get("do_normalize", True):
            mean, deviation = (np.asarray(config[name], np.float32) for name in ("image_mean", "image_std"))
            pixels = (pixels - mean) / deviation
        return torch.from_numpy(pixels).permute(2, 0, 1)

    return lambda images: torch.stack([one(image) for image in images])


def _target(size: Any, given: tuple[int, int]) -> tuple[int, int]:  # (width, height)
    """`size` is both sides, {"height", "width"}, or the shorter one alone, {"shortest_edge"}."""
    if isinstance(size, int):
        return size, size
    if "height" in size:
        return size["width"], size["height"]
    scale = size["shortest_edge"] / min(given)
    return int(given[0] * scale), int(given[1] * scale)


def _chunks(images: Sequence[Image.Image], prepare: Callable[[Sequence[Image.Image]], Tensor]):
    for start in range(0, len(images), _AT_A_TIME):
        yield prepare(images[start : start + _AT_A_TIME])


def _unit(rows) -> Tensor:
    return torch.nn.functional.normalize(torch.cat(list(rows)).float().cpu(), dim=-1)


def _load(kind: Any, path: str, judge: str) -> tuple[Any, Callable[[Sequence[Image.Image]], Tensor]]:
    model = _explained(lambda: kind.from_pretrained(path, use_safetensors=True), path, judge)
    return model.eval().requires_grad_(False).to(PartialState().device), _explained(
        lambda: preparation(path), path, judge
    )


def _explained(load: Callable[[], Any], path: str, judge: str) -> Any:
    try:
        return load()
    except (OSError, ValueError, KeyError, TypeError, RuntimeError) as error:
        reason = " ".join(str(error).split())[:300]
        raise InputError(f"judges.{judge}: {path} cannot be loaded as {judge.upper()}: {reason}") from None


def _config(path: str) -> dict[str, Any]:
    from huggingface_hub import hf_hub_download

    name = "preprocessor_config.json"
    return json.loads((Path(path) / name if Path(path).is_dir() else Path(hf_hub_download(path, name))).read_text())
