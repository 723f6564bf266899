"""What is wrong with the world a configuration points to, found before anything is written."""

import os
from pathlib import Path

from equipoise import registry
from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.config.sections import objective_problems, one_sided
from equipoise.pipelines.text_to_image.formats.layout import is_local
from equipoise.quick import no_garbage_collection


def problems(config: AudioVisualConfig) -> list[str]:
    found = objective_problems(config, config.data.modalities, config.train.baselines)
    missing = []
    for name in config.data.modalities:
        path = getattr(config.model, name).path
        if path and is_local(path) and not os.path.isdir(path):
            found.append(f"model.{name}.path: {path} does not exist. Give a folder of transformers' own, or a hub id.")
            missing.append(name)
    if not missing:
        found += _model_problems(config)
    if config.data.manifest != demo.NAME:
        found += _data_problems(config, tokenized="text" not in missing)
    found += one_sided(config)
    found += _unmasked(config)
    found += [f"{key}: {said}" for key, name in _chosen(config) if (said := unsuited(name, config.model.fusion))]
    if config.train.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            found.append("train.precision: fp16 needs a CUDA device, and none is here. Use no or bf16.")
    return found


def _chosen(config: AudioVisualConfig) -> list[tuple[str, str]]:
    """The configuration's keys of objectives, and their names."""
    baselines = [("train.baselines", name) for name in config.train.baselines]
    return [("objective.name", config.objective.name), *baselines]


def unsuited(name: str, fusion: str) -> str:
    """Why an objective cannot be trained with a joint head of this kind; empty if it can."""
    needed = registry.load("objectives", name).needs_head
    if needed == "shared" and fusion != "shared":
        return (
            f"{name} trains one head that all modalities go through, and model.fusion={fusion} has none. Set "
            "model.fusion=shared."
        )
    if needed == "sum" and fusion != "sum":
        return (
            f"{name} lets the other modalities' parts of the joint head rest, and model.fusion={fusion} has no parts "
            "with weights of their own. Set model.fusion=sum."
        )
    if needed == "parts" and fusion not in ("sum", "concat"):
        return (
            f"{name} takes the joint logits apart into a part of each modality, and those of model.fusion={fusion} are "
            "no such sum. Set model.fusion=sum or concat."
        )
    return ""


def _unmasked(config: AudioVisualConfig) -> list[str]:
    """Objectives that clips which lack a modality are not for."""
    found = []
    for key, name in _chosen(config) if config.data.missing == "mask" else ():
        objective = registry.load("objectives", name)
        if objective.takes_missing:
            continue
        found.append(
            f"{key}: {name} {objective.needs_all}, and with data.missing=mask a clip may lack one. Use another, such "
            "as mimo, or data.missing=refuse."
        )
    return found


def _data_problems(config: AudioVisualConfig, tokenized: bool) -> list[str]:
    """What is wrong with the manifest and its clips; the features that are made for it are kept. Without its tokenizer,
    what can be said before any clip is opened."""
    from equipoise.pipelines.audio_visual.data import read_manifest
    from equipoise.pipelines.audio_visual.prepared import prepare

    found = []
    if tokenized:
        try:
            prepared = prepare(config)
            return prepared.problems if prepared.manifest.problems or not config.data.skip_bad else []
        except InputError as error:
            found.append(str(error))
    return found + read_manifest(config.data, Path(config.data.manifest)).sentences()


def _model_problems(config: AudioVisualConfig) -> list[str]:
    """What the model says of features of these sizes; nothing is computed or downloaded but a configuration."""
    import torch

    from equipoise.pipelines.audio_visual.features import bins, blank
    from equipoise.pipelines.audio_visual.model import LateFusion

    try:
        with torch.device("meta"), no_garbage_collection():  # transformers is imported
            model = LateFusion(config, 2, bins(config.data.audio), pretrained=False)
            # a text encoder's attention asks for its mask's values, which meta tensors have not
            model.modalities = [name for name in model.modalities if name != "text"]  # type: ignore[assignment]
            model.features(blank(config.data, 2))
    except InputError as error:
        return [str(error)]
    except Exception as error:  # of any encoder
        reason = " ".join(str(error).split())[:200].rstrip(".")
        return [f"model: its encoders cannot take what data gives, or their own sizes do not fit: {reason}."]
    return []


def doubts(config: AudioVisualConfig) -> list[str]:
    if config.data.manifest == demo.NAME:
        return []
    from equipoise.pipelines.audio_visual.data import doubts, read_manifest

    return doubts(read_manifest(config.data, Path(config.data.manifest)))
