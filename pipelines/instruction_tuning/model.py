"""A multimodal language model of transformers, with LoRA on its language side and its encoder side to be trained."""

# peft and transformers annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import json
import os
import re
import warnings
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
import transformers
from accelerate.state import PartialState
from peft import LoraConfig, PeftModel, get_peft_model
from torch import Tensor, nn
from transformers import AutoConfig, AutoModelForMultimodalLM, AutoProcessor, PretrainedConfig, ProcessorMixin
from transformers.models.auto.processing_auto import PROCESSOR_MAPPING_NAMES
from transformers.utils import logging as transformers_logging

from equipoise.coordination.components import Architecture, architecture, matches, partition
from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.instruction_tuning import quantized
from equipoise.pipelines.instruction_tuning.config import (
    InstructionTuningConfig,
    InstructionTuningEncoder,
    InstructionTuningModel,
)
from equipoise.pipelines.instruction_tuning.novideos import NoVideos
from equipoise.pipelines.runs.run import memory_full
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.fused_lora import fuse
from equipoise.pipelines.training.layers import named_by, unmatched
from equipoise.pipelines.training.memory import DTYPES
from equipoise.pipelines.training.quantized import keep_differentiable

_TABLE = re.compile(r"(^|\.)(embed_positions|position_embeddings?|wpe)$")
_LINEAR = (nn.Linear, nn.Conv1d, nn.Conv2d, nn.Embedding)


@dataclass
class Tuned:
    """A model with its LoRA factors, and what of it is trained."""

    model: Any  # peft's, or where nothing has factors that of transformers
    parts: Architecture
    components: dict[str, dict[str, Tensor]]  # component → name → parameter, all trained ones
    sharded: bool = False  # whether every forward pass is one of all processes

    @property
    def plain(self) -> Any:
        """The model of transformers inside."""
        return self.model.base_model.model if self.has_factors else self.model

    @property
    def has_factors(self) -> bool:
        return isinstance(self.model, PeftModel)

    @property
    def named(self) -> dict[str, Tensor]:
        return {name: tensor for inside in self.components.values() for name, tensor in inside.items()}

    @property
    def encoder_weights(self) -> dict[str, Tensor]:
        """What is trained in full in front of the language model, by its names in the model of transformers."""
        return {name: tensor for name, tensor in self._in_full.items() if self.parts.part(name) != "language"}

    @property
    def language_weights(self) -> dict[str, Tensor]:
        """What is trained in full of the language model, likewise."""
        return {name: tensor for name, tensor in self._in_full.items() if self.parts.part(name) == "language"}

    @property
    def _in_full(self) -> dict[str, Tensor]:
        return {_plain(name): tensor for name, tensor in self.named.items() if "lora_" not in name}


def source(path: str) -> str:
    return str(demo.multimodal_folder()) if path == demo.NAME else path


def model_problems(model: InstructionTuningModel) -> list[str]:
    """What is wrong with a local folder, found without loading its weights."""
    folder = Path(source(model.path))
    if not os.path.exists(folder):  # unlike pathlib's, False also where no path can be so long
        if model.path.startswith((".", "/", "~")) or model.path.count("/") != 1:
            return [f"model.path: {model.path} does not exist. Give a folder, or a hub id such as owner/name."]
        return []
    if not (folder / "config.json").is_file():
        return [f"model.path: {model.path} has no config.json; give the folder of a model saved by transformers."]
    try:
        settings = json.loads((folder / "config.json").read_text())
        if not isinstance(settings, dict):
            raise ValueError(f"must be an object, is a {type(settings).__name__}")
        kind = settings.get("model_type")
    except (OSError, ValueError, RecursionError) as error:
        return [f"model.path: {folder / 'config.json'} cannot be read ({error})."]
    from transformers.models.auto.modeling_auto import MODEL_FOR_MULTIMODAL_LM_MAPPING_NAMES as known

    if not isinstance(kind, str) or kind not in known:
        return [
            f"model.path: {model.path} is a {kind or 'model of unknown kind'}, which is no multimodal language model. "
            "transformers has BLIP-2, LLaVA, Qwen2-VL, SmolVLM, Qwen2-Audio and others."
        ]
    if not any(folder.glob("*.safetensors")):
        return [f"model.path: {model.path} has no .safetensors file; other formats can run code and are not loaded."]
    return []


def _where(model: InstructionTuningModel) -> dict[str, Any]:
    """The options of from_pretrained. Without the last, it asks on the terminal whether to run a hub's own code."""
    return {
        "pretrained_model_name_or_path": source(model.path),
        "revision": model.revision,
        "trust_remote_code": False,
    }


def described(model: InstructionTuningModel, **options: Any) -> PretrainedConfig:
    """A model's configuration; of one that also speaks, as Qwen's Omni, that of the part which reads and writes."""
    found = AutoConfig.from_pretrained(**_where(model), **options)
    return getattr(found, "thinker_config", found)


def model_type(model: InstructionTuningModel) -> str:
    """A model's kind, such as `llava`.

    Raises:
        InputError: its configuration cannot be read.
    """
    try:
        return described(model).model_type
    except Exception as error:  # whatever a damaged one raises
        raise InputError(f"model.path: the configuration of {model.path} cannot be read: {_short(error)}") from None


def own_dtype(model: InstructionTuningModel) -> torch.dtype:
    """The format of numbers that a model is kept in, by its configuration; float32 where that does not say.

    Raises:
        InputError: its configuration cannot be read.
    """
    try:
        found = AutoConfig.from_pretrained(**_where(model))
    except Exception as error:  # whatever a damaged one raises
        raise InputError(f"model.path: the configuration of {model.path} cannot be read: {_short(error)}") from None
    kept: Any = found.dtype or found.get_text_config().dtype or torch.float32
    return kept


def load_processor(model: InstructionTuningModel) -> Any:
    """The processor that belongs to a model.

    Raises:
        InputError: there is none, or it takes no media.
    """
    transformers_logging.disable_progress_bar()  # a second bar, gone in an instant, would break up ours
    try:
        where = _where(model)
        loader = AutoProcessor
        if not find_spec("torchvision"):
            kind = AutoConfig.from_pretrained(**where).model_type
            # of a part that was saved alone, as an Omni's thinker, only its processor knows
            known = (
                PROCESSOR_MAPPING_NAMES.get(kind) or ProcessorMixin.get_processor_dict(**where)[0]["processor_class"]
            )
            found = getattr(transformers, known, None)
            if found and "video_processor" in found.get_attributes():
                loader = without_videos(found)
        processor = loader.from_pretrained(**where)
        if getattr(processor, "num_query_tokens", 0) is None:  # older checkpoints': the picture would be left out
            processor.num_query_tokens = AutoConfig.from_pretrained(**where).num_query_tokens
    except Exception as error:  # whatever a damaged one raises
        raise InputError(f"model.path: the processor of {model.path} {_failed(error)}") from None
    parts = ("image_processor", "feature_extractor", "audio_processor")
    if not hasattr(processor, "tokenizer") or not any(getattr(processor, part, None) for part in parts):
        raise InputError(f"model.path: {model.path} has no processor for pictures or sounds, only for text.")
    _set_pixels(processor, model)
    return processor


def _set_pixels(processor: Any, model: InstructionTuningModel) -> None:
    """Gives a processor the sizes of pictures, and of the frames of videos, that are set.

    Raises:
        InputError: it counts no pixels, or they are in the wrong order with the one that it has.
    """
    given = {"min_pixels": model.min_pixels, "max_pixels": model.max_pixels}
    chosen = {name: value for name, value in given.items() if value is not None}
    if not chosen:
        return
    looks: Any = getattr(processor, "image_processor", None)
    known = getattr(getattr(looks, "valid_kwargs", None), "__annotations__", {})
    size = dict(getattr(looks, "size", None) or {})
    key = f"model.{next(iter(chosen))}"
    if not (chosen.keys() <= known.keys() and {"shortest_edge", "longest_edge"} <= size.keys()):
        raise InputError(
            f"{key}: the processor of {model.path} does not size pictures by their number of pixels, as Qwen2-VL's "
            "does. Leave it out."
        )
    edges = {"min_pixels": "shortest_edge", "max_pixels": "longest_edge"}  # what transformers calls these pixels
    size |= {edges[name]: value for name, value in chosen.items()}
    if size["shortest_edge"] > size["longest_edge"]:
        raise InputError(
            f"{key}: the processor of {model.path} would enlarge pictures to {size['shortest_edge']} pixels and reduce "
            f"them to {size['longest_edge']}. Give both min_pixels and max_pixels."
        )
    looks.size = size
    if _counts_of_frames(processor):  # not those of others, whose sizes are whole videos'
        processor.video_processor.size = dict(processor.video_processor.size) | size


def _counts_of_frames(processor: Any) -> bool:
    """Whether videos are sized by the number of pixels of a frame; others are by those of all frames together."""
    watches: Any = getattr(processor, "video_processor", None)
    return any(cls.__name__ == "Qwen2VLVideoProcessor" for cls in type(watches).__mro__)


def no_videos(processor: Any, model: InstructionTuningModel) -> str:
    """Why a processor can take no videos with the sizes of pictures that are set; empty where it can."""
    key = "min_pixels" if model.min_pixels is not None else "max_pixels" if model.max_pixels is not None else ""
    if not key or _counts_of_frames(processor):
        return ""
    return (
        f"has a video, and the processor of {model.path} does not size videos by the pixels of a frame. Leave "
        f"model.{key} out."
    )


def without_videos(cls: type[ProcessorMixin]) -> type[ProcessorMixin]:
    """A processor class that leaves videos alone: they need torchvision, and pictures do not."""
    index = cls.get_attributes().index("video_processor")

    @classmethod
    def get_attributes(kind: type[ProcessorMixin]) -> list[str]:
        return [name for name in cls.get_attributes() if name != "video_processor"]

    @classmethod
    def load(kind: type[ProcessorMixin], *args: Any, **kwargs: Any) -> list[Any]:
        found = super(made, kind)._get_arguments_from_pretrained(*args, **kwargs)
        found.insert(index, None)  # arguments are given by position
        return found

    class Without(ProcessorMixin):  # between the class and its base, which would miss the part
        def __init__(self, *args: Any, **kwargs: Any):
            kwargs.pop("video_processor", None)
            super().__init__(*args[:index], *args[index + 1 :], **kwargs)

    own = {
        "get_attributes": get_attributes,
        "_get_arguments_from_pretrained": load,
        "video_processor": NoVideos(),
        "__module__": cls.__module__,
    }
    made = type(cls.__name__, (cls, Without), own)  # pyright: ignore[reportGeneralTypeIssues]
    return made


def load_model(
    model: InstructionTuningModel, precision: str, components: Mapping[str, Sequence[str]] | None = None
) -> Any:
    """A model with every parameter frozen, on this process's device; with model.quantize in fewer bits, and in the main
    memory where model.shard will leave this process a share of it.

    Args:
        components: the configuration's, where it names the language model.

    Raises:
        InputError: it cannot be loaded, or is no multimodal language model.
    """
    if wrong := model_problems(model):
        raise InputError("\n".join(wrong))
    transformers_logging.disable_progress_bar()
    fewer = _fewer_bits(model, precision, components) if model.quantize else {}
    try:
        loaded, report = AutoModelForMultimodalLM.from_pretrained(
            **_where(model),
            config=described(model),
            dtype=DTYPES[precision],
            use_safetensors=True,
            output_loading_info=True,
            **fewer,
        )
    except Exception as error:  # whatever a damaged one makes of transformers
        if memory_full(error):
            raise
        raise InputError(f"model.path: {model.path} {_failed(error)}") from None
    if missing := sorted(report["missing_keys"]):
        raise InputError(
            f"model.path: {model.path} lacks {len(missing)} weights of a {loaded.config.model_type}, such as "
            f"{missing[0]}; they would be random. Give a folder that holds them all."
        )
    keep_differentiable(loaded)
    loaded = loaded.requires_grad_(False).eval()
    return loaded if fewer or is_sharded(model) else loaded.to(PartialState().device)


def is_sharded(model: InstructionTuningModel) -> bool:
    """Whether frozen weights are to be sharded, and there are processes to share them."""
    return model.shard and processes.count() > 1


def _fewer_bits(
    model: InstructionTuningModel, precision: str, components: Mapping[str, Sequence[str]] | None
) -> dict[str, Any]:
    """How from_pretrained is to hold a model in fewer bits."""
    empty = _of_shapes(model, precision)
    if getattr(empty.config, "quantization_config", None):
        raise InputError(f"model.quantize: {model.path} is kept in fewer bits already. Leave it out.")
    parts = architecture(empty.config.model_type, [name for name, _ in empty.named_parameters()], components, empty)
    how = str(model.quantize)
    return quantized.options(how, quantized.layers(empty, parts, how), DTYPES[precision])


def outline(config: InstructionTuningConfig, *, local: bool = False) -> Tuned:
    """A model as `adapt` makes it, of shapes alone: neither its weights nor memory for them are needed.

    Args:
        local: Whether a hub's model may only come from this machine's cache.

    Raises:
        InputError: its configuration cannot be read or made into a model, or `adapt` refuses it.
    """
    made = _of_shapes(config.model, config.train.precision, local_files_only=local)
    with torch.device("meta"):
        return adapt(made.requires_grad_(False), config)


def _of_shapes(model: InstructionTuningModel, precision: str, **options: Any) -> Any:
    """A model of transformers without memory for its weights."""
    try:
        chosen = described(model, **options)
        with torch.device("meta"):
            return AutoModelForMultimodalLM.from_config(chosen, dtype=DTYPES[precision])
    except Exception as error:  # whatever a model makes of sizes that do not fit
        if missing_package(error):
            raise InputError(f"model.path: {model.path} {_failed(error)}") from None
        raise InputError(f"model.path: the configuration of {model.path} makes no model: {_short(error)}") from None


def adapt(model: Any, config: InstructionTuningConfig) -> Tuned:
    """Adds the LoRA factors, sets free what is trained in full, and splits all into components.

    Everything trained is float32. Equal seeds give equal factors, whatever the optimizer.

    Raises:
        InputError: targets or patterns that fit nothing, or trained parameters in no component or several.
    """
    names = [name for name, _ in model.named_parameters()]
    kind = model.config.model_type
    if model.config.is_encoder_decoder or model.config.get_text_config().is_encoder_decoder:
        raise InputError(
            f"model.path: this {kind} has a language model with an encoder of its own, as T5 and BART have; here "
            "answers follow their questions in one text, as in OPT, LLaMA and Qwen. Use such a model."
        )
    parts = architecture(kind, names, config.components, model)
    idle = [pattern for pattern in config.frozen if not any(matches(pattern, name) for name in names)]
    wrong = [f"frozen: {', '.join(idle)}: matches no parameter of the model."] * bool(idle)
    chosen, unfit = targets(model, parts, config)
    full = _in_full(model, parts, config, unfit)
    if config.model.quantize:
        unfit += _held_in_bits(model, parts, config.model.quantize, full)
    language = bool(unfit) or any(parts.part(name) == "language" for name in [*chosen, *full])
    known = [name for name in config.components or parts.components(names) if language or name != "language"]
    for key, given in (("rates", config.optimizer.rates), ("weight_decays", config.optimizer.weight_decays)):
        if strangers := [name for name in given if name not in known]:
            wrong.append(f"optimizer.{key}: {', '.join(strangers)}: no such component. There are {', '.join(known)}.")
    wrong += unfit
    if unfit and not chosen:  # without factors nothing of it can be split into components
        raise InputError("\n".join(wrong))
    torch.manual_seed(config.seed)
    wrapped = _with_factors(model, chosen, config) if chosen else model
    free = set(map(id, full.values()))
    for name, tensor in wrapped.named_parameters():
        tensor.requires_grad_("lora_" in name or id(tensor) in free)
        if tensor.requires_grad:
            tensor.data = tensor.data.float()
    trained = {name: tensor for name, tensor in wrapped.named_parameters() if tensor.requires_grad}
    components: dict[str, dict[str, Tensor]] = {}
    if config.components:
        patterns = {name: some for name, some in config.components.items() if name in known}
        try:
            components = partition(trained, patterns)
        except InputError as error:
            wrong.append(str(error))
    else:
        wrong += [] if unfit else _untrained(trained, parts, config.encoder)
        for name in parts.components(trained):
            components[name] = {n: tensor for n, tensor in trained.items() if parts.component(n) == name}
    if wrong:
        raise InputError("\n".join(wrong))
    return Tuned(wrapped, parts, components)


def _with_factors(model: Any, chosen: list[str], config: InstructionTuningConfig) -> PeftModel:
    lora = config.lora
    settings = LoraConfig(
        r=lora.rank,
        lora_alpha=lora.alpha or lora.rank,
        lora_dropout=lora.dropout,
        use_rslora=lora.rslora,
        use_dora=lora.dora,
        target_modules=chosen,
    )
    with old_names():
        wrapped = get_peft_model(model, settings)
    fuse(wrapped)
    settings.base_model_name_or_path = config.model.path
    return wrapped


def _in_full(
    model: nn.Module, parts: Architecture, config: InstructionTuningConfig, wrong: list[str]
) -> dict[str, nn.Parameter]:
    """What is trained in full, by name; `wrong` gets a sentence for each of lora.modules_to_save that names nothing."""
    saved = config.lora.modules_to_save
    modules = [name for name, _ in model.named_modules() if parts.part(name) == "language"]
    wrong += unmatched(saved, modules, "lora.modules_to_save", "language model") if saved else []
    inside = {id(p) for name in modules if named_by(saved, name) for p in model.get_submodule(name).parameters()}

    def is_free(name: str, tensor: nn.Parameter) -> bool:
        part = parts.part(name)
        if any(matches(pattern, name) for pattern in config.frozen):
            return False
        if part == "language":
            return config.language.method == "full" or id(tensor) in inside
        return config.encoder.method == "full" and part in config.encoder.parts

    return {name: tensor for name, tensor in model.named_parameters() if is_free(name, tensor)}


def _held_in_bits(model: nn.Module, parts: Architecture, how: str, full: Iterable[str]) -> list[str]:
    """A sentence where weights would be trained in full that model.quantize holds in fewer bits."""
    held = {f"{name}.weight" for name in quantized.layers(model, parts, how)}
    if not (both := [name for name in full if name in held]):
        return []
    return [
        f"lora.modules_to_save: {both[0].removesuffix('.weight')} is held in {how}, and cannot be trained in full. "
        "Name others, or leave model.quantize out."
    ]


def _plain(name: str) -> str:
    """A parameter's name in the model of transformers."""
    return name.removeprefix("base_model.model.")


@contextmanager
def old_names() -> Iterator[None]:
    """Around peft, which asks transformers by names that are going away."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        yield


def positions(model: nn.Module, parts: Architecture) -> int | None:
    """How many tokens a language model's table of positions is for; None of one that counts without a table."""
    for name, module in model.named_modules():
        if isinstance(module, nn.Embedding) and _TABLE.search(name) and parts.part(name) == "language":
            return module.num_embeddings - getattr(module, "offset", 0)
    return None


def tied(plain: Any) -> list[str]:
    """The layers with factors that share their weights with another, by name: the head and the embedding."""
    ends = [plain.get_input_embeddings(), plain.get_output_embeddings()]
    weights = [getattr(getattr(module, "base_layer", module), "weight", None) for module in ends]
    if weights[0] is None or weights[0] is not weights[1]:
        return []
    return [name for name, module in plain.named_modules() if hasattr(module, "base_layer") and module in ends]


def targets(model: nn.Module, parts: Architecture, config: InstructionTuningConfig) -> tuple[list[str], list[str]]:
    """(the layers that get factors, by their full names; targets that name no layer of the language model, or of the
    encoder side's trained parts, a sentence each)."""
    wrong: list[str] = []
    modules = dict(model.named_modules())
    layers = {
        name: m for name, m in modules.items() if isinstance(m, _LINEAR) and not quantized.is_router(name, modules)
    }
    found: list[str] = []
    if config.language.method == "lora":
        language = [name for name in layers if parts.part(name) == "language"]
        if config.lora.targets:
            found = _ending(language, config.lora.targets, "lora", "language model", wrong)
        else:
            found = [n for n in language if isinstance(layers[n], nn.Linear) and not re.search(r"(^|\.)lm_head$", n)]
        if not found and not wrong:
            wrong.append("lora.targets: the language model has no linear layer to get factors; name others.")
        found = [name for name in found if not _within(config.lora.modules_to_save, name)]
    if config.encoder.method == "lora":
        encoder = [name for name in layers if parts.part(name) in config.encoder.parts]
        if config.encoder.targets:
            found += _ending(encoder, config.encoder.targets, "encoder", " and ".join(config.encoder.parts), wrong)
        else:
            found += [name for name in encoder if isinstance(layers[name], nn.Linear)]
    left = [name for name in found if not any(matches(pattern, name) for pattern in config.frozen)]
    mistaken = _mistaken(model, left) if left else []
    if mistaken and config.lora.targets:
        wrong.append(
            f"lora.targets: peft would put the factors for {mistaken[0]} on the experts of this "
            f"{model.config.model_type}. Leave out {', '.join(sorted({name.rpartition('.')[2] for name in mistaken}))}."
        )
    left = [name for name in left if name not in mistaken]
    if found and not left and not wrong and (config.lora.targets or config.encoder.method == "lora"):
        wrong.append("lora.targets: no layer is left to get factors; fewer patterns in frozen leave some.")
    return left, wrong


def _within(ends: Sequence[str], layer: str) -> bool:
    """Whether a layer is one of some modules, which are given by the ends of their names, or inside of one."""
    steps = layer.split(".")
    return any(named_by(ends, ".".join(steps[: count + 1])) for count in range(len(steps)))


def _mistaken(model: nn.Module, names: list[str]) -> list[str]:
    """The layers whose names peft reads as the names that a model's experts once had, and would not give factors to."""
    try:
        from peft.utils.transformers_weight_conversion import convert_peft_config_for_transformers
    except ImportError:  # an older one, which reads names as they are
        return []
    settings = LoraConfig(target_modules=names)
    try:
        convert_peft_config_for_transformers(settings, model, None)
    except ValueError:  # some of the names that one weight of the experts now stands for, and not all
        return [name for name in names if re.search(r"(^|\.)(gate|up|down)_proj$", name)]
    return [name for name in names if name not in (settings.target_modules or ())]


def _ending(layers: Iterable[str], ends: Sequence[str], section: str, what: str, wrong: list[str]) -> list[str]:
    layers = list(layers)
    wrong += unmatched(ends, layers, f"{section}.targets", what)
    return [name for name in layers if named_by(ends, name)]


def _untrained(trained: Iterable[str], parts: Architecture, encoder: InstructionTuningEncoder) -> list[str]:
    found = {parts.part(name) for name in trained}
    if missing := [part for part in encoder.parts if part not in found]:
        what = " and the ".join(missing)
        return [f"encoder.parts: nothing is trained of the {what}: this model has none, or frozen covers it."]
    return []


def _failed(error: BaseException) -> str:
    """Why something could not be loaded, to go on after its name."""
    if package := missing_package(error):
        return f"needs the package {package}, which is not installed. pip install {package}."
    return f"cannot be loaded: {_short(error)}"


def missing_package(error: BaseException) -> str | None:
    """What transformers says is missing."""
    found = re.search(r"requires the (\S+) library|[Mm]issing optional dependencies: (\w+)", str(error))
    return (found[1] or found[2]).lower() if found else None


def _short(error: BaseException) -> str:
    return " ".join(str(error).split())[:300]
