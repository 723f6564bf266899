"""What is wrong with the world a configuration points to, found before anything is written."""

import math
import os
import shutil
from importlib.util import find_spec
from pathlib import Path

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.config.keys import is_set
from equipoise.pipelines.config.sections import objective_problems, one_sided
from equipoise.pipelines.text_to_image import overview, pairs
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.data import (
    DECODED,
    Example,
    Folder,
    drawn_if_demo,
    open_picture,
    read_class,
    read_examples,
    read_folder,
    read_held,
)
from equipoise.pipelines.text_to_image.families import NOTHING_TO_SEE, Family, family
from equipoise.pipelines.text_to_image.formats.layout import (
    encoder_problems,
    hub_problems,
    is_local,
    layers,
    model_problems,
    model_source,
    native_resolution,
    prediction,
    read_config,
    read_index,
    stride,
)
from equipoise.pipelines.text_to_image.pairs import each_prompts, read_sources
from equipoise.pipelines.text_to_image.unread import unread
from equipoise.pipelines.training.layers import unmatched

FAR = 2  # times the resolution a base was made for, or a half: bases of 512 are tuned at 768, and those of 768 at 512


def examples(config: TextToImageConfig) -> int:
    """How many pictures an epoch has, a repeated one as often as it is repeated."""
    return sum(example.repeats for example in read_examples(drawn_if_demo(config.data, Path(config.runs)))[0])


def problems(config: TextToImageConfig) -> list[str]:
    model = config.model
    local = is_local(model.path)
    if local:
        found = model_problems(model.path, model.variant, model.apart)
    else:
        found = hub_problems(model.path, model.revision, model.apart)
    if not found:
        kind = family(read_index(model.path, model.revision)["_class_name"])
        found = unread(config, kind) + (_target_problems(config, kind) if local else [])
        answer = config.noise.prediction or (prediction(model.path, model.revision) if local else "")
        if config.noise.zero_terminal_snr and kind.noise == "diffusion" and answer == "epsilon":
            found.append(NOTHING_TO_SEE)
        found += _bucket_problems(config, kind)
        pixels = stride(model.path, model.revision) if local else None
        if pixels and config.data.resolution % pixels:
            found.append(
                f"data.resolution: must be a multiple of {pixels} for {kind.title}, got {config.data.resolution}."
            )
    if config.script:
        from equipoise.pipelines.text_to_image.foreign import problems as wrong_in_the_command

        found += wrong_in_the_command(config)
    if config.train.compile and (missing := _no_compiler()):
        found.append(f"train.compile: needs {missing}. Install it, or leave train.compile out.")
    if config.data.folder != demo.NAME:
        examples, wrong = read_examples(config.data)
        sources, unpaired = read_sources(config.data, examples)
        found += wrong or unpaired or [problem for some in (examples, *sources) for problem in _unreadable(some)]
        if (word := config.token.name) and not wrong and not any(word in example.caption for example in examples):
            found.append(f"token.name: no caption has the word {word}. Write it where the subject is meant.")
    found += pairs.problems(config) + _sample_source_problems(config)
    found += _validation_problems(config)
    found += _class_problems(config)
    if (start := config.lora.start) and not Path(start).is_file():
        what = "is a folder" if Path(start).is_dir() else "does not exist"
        found.append(f"lora.start: {start} {what}. Give a .safetensors file, or leave it out.")
    others = [(f"judges.{judge}", path) for judge, path in config.judges]
    for key, path in [*others, *((f"model.{part}", path) for part, path in model.apart.items())]:
        if path and is_local(path) and not (Path(model_source(path)) / "config.json").is_file():
            found.append(f"{key}: {path} is no folder with a model's config.json, and no hub id.")
    found += objective_problems(config) + one_sided(config)
    if config.train.precision == "fp16":
        import torch

        if not torch.cuda.is_available():
            found.append("train.precision: fp16 needs a CUDA device, and none is here. Use no or bf16.")
    if model.quantize == "int8" and not find_spec("torchao"):
        found.append("model.quantize: int8 needs the package torchao. pip install torchao.")
    if model.quantize in ("fp8", "nf4"):
        from equipoise.pipelines.training.quantized import problems as quantized_problems

        found += quantized_problems(model.quantize)
    if model.quantize not in (None, "fp8") and model.offload:
        found.append(f"model.offload: works with whole weights, not in {model.quantize}. Leave one of the two out.")
    if "8bit" in config.optimizer.name and not find_spec("bitsandbytes"):
        found.append(
            f"optimizer.name: {config.optimizer.name} needs the package bitsandbytes. pip install bitsandbytes."
        )
    return found


def _unreadable(examples: list[Example]) -> list[str]:
    found = []
    for example in examples[:DECODED]:
        try:
            open_picture(example.path)
        except InputError as error:
            found.append(str(error))
    return found


def _sample_source_problems(config: TextToImageConfig) -> list[str]:
    samples, found = config.samples, []
    if samples.sources and len(samples.sources) not in (1, len(samples.prompts)):
        found.append(
            f"samples.sources: {len(samples.sources)} pictures for {len(samples.prompts)} prompts. Give one for each, "
            "or one for all."
        )
    return found + _unreadable([Example(Path(path), "") for several in each_prompts(samples) for path in several])


def _validation_problems(config: TextToImageConfig) -> list[str]:
    if held := read_held(config.data):
        return held.problems or _unreadable(held.examples)
    if config.train.validate_every:
        return ["train.validate_every: there is nothing to validate on. Give data.validation, a folder of pictures."]
    return []


def _class_problems(config: TextToImageConfig) -> list[str]:
    classed, wrong = read_class(config)
    return wrong or _unreadable(classed)


def _no_compiler() -> str:
    """What torch.compile would miss here; empty where it has all."""
    import torch

    if torch.cuda.is_available():
        return "" if find_spec("triton") else "the package triton"
    names = [os.environ.get("CXX"), "g++", "clang++"]
    return "" if any(name and shutil.which(name) for name in names) else "a C++ compiler, such as g++"


def _accelerated() -> bool:
    import torch

    return torch.accelerator.is_available()


def doubts(config: TextToImageConfig) -> list[str]:
    """What of the folder, the options and the resolution may not be meant."""
    found = overview.doubts(config, _folder(config), read_held(config.data))
    found += [
        f"{section}.{key}: has no effect without {other}."
        for section, keys, on, other in (
            ("data", ("keep_tags",), config.data.shuffle_tags, "data.shuffle_tags"),
            ("data", ("bucket_step", "bucket_limit"), config.data.buckets, "data.buckets"),
            ("token", ("start", "vectors", "learning_rate"), config.token.name, "token.name"),
            (
                "prior",
                ("count", "more_prompts"),
                config.prior.prompt and not config.prior.folder,
                "prior.prompt, or with prior.folder",
            ),
            ("prior", ("weight",), config.prior.prompt, "prior.prompt"),
            ("lora", ("text_encoder_targets",), config.lora.text_encoder, "lora.text_encoder"),
            ("optimizer", ("text_encoder_learning_rate",), config.lora.text_encoder, "lora.text_encoder"),
        )
        for key in keys
        if not on and is_set(getattr(config, section), key)
    ]
    if config.train.offload_activations and not _accelerated():
        found.append("train.offload_activations: has no effect on a CPU.")
    made_for, given = native_resolution(config.model.path, config.model.revision), config.data.resolution
    if made_for is None or made_for / FAR < given < made_for * FAR:
        return found
    return [
        *found,
        f"data.resolution: {given} pixels, but {config.model.path} was made for {made_for}; what it learns may be of "
        f"little use. data.resolution={made_for} fits.",
    ]


def notes(config: TextToImageConfig) -> list[str]:
    """What the folder holds, as it will be trained on."""
    return overview.notes(config, _folder(config), read_held(config.data))


def _folder(config: TextToImageConfig) -> Folder | None:
    """What is trained on; None where it may still have to be drawn."""
    return None if config.data.folder == demo.NAME else read_folder(config.data)


def _bucket_problems(config: TextToImageConfig, kind: Family) -> list[str]:
    """Of families that fill up pictures that are no squares, where these would be too large."""
    from equipoise.pipelines.text_to_image.buckets import sizes

    model, data = config.model, config.data
    try:
        described = read_config(model.path, kind.denoiser, model.revision) if data.buckets else {}
        most, pixels = kind.most_tokens(described) if described else None, stride(model.path, model.revision)
    except (KeyError, OSError, TypeError, ValueError):  # a damaged one, which is found out when it is loaded
        return []
    if not most or not pixels:
        return []
    area = most * pixels**2
    for width, height in sizes(data, pixels):
        if width != height and width * height > area:
            return [
                f"data.buckets: {kind.title} takes pictures that are no squares up to {area} pixels, but one of "
                f"{width} × {height} has {width * height}. Set data.resolution to {math.isqrt(most) * pixels}."
            ]
    return []


def _target_problems(config: TextToImageConfig, kind: Family) -> list[str]:
    folder, lora, variant = Path(model_source(config.model.path)), config.lora, config.model.variant
    found = unmatched(lora.targets or kind.targets, layers(folder, kind.denoiser, variant), "lora.targets")
    for part in kind.tuned_encoders if lora.text_encoder else ():
        found += encoder_problems(lora.text_encoder_targets, layers(folder, part, variant))
    return found
