"""How much memory a tuning will take: see `equipoise.pipelines.training.memory`."""

# diffusers, peft and transformers annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import math
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import Any

import diffusers
import torch
import transformers
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from transformers import BatchEncoding

from equipoise.errors import InputError
from equipoise.pipelines import config as configs
from equipoise.pipelines import demo
from equipoise.pipelines.pipeline import MemoryEstimate
from equipoise.pipelines.tables import size_words
from equipoise.pipelines.text_to_image.config import TextToImageConfig, TextToImageModel
from equipoise.pipelines.text_to_image.data import read_class, read_examples, read_held
from equipoise.pipelines.text_to_image.families import Family, family
from equipoise.pipelines.text_to_image.families.autoencoders import factor
from equipoise.pipelines.text_to_image.families.autoencoders import shape as latent_shape
from equipoise.pipelines.text_to_image.formats.layout import encoders_of, read_config, read_index
from equipoise.pipelines.text_to_image.offloading import blocks, in_blocks
from equipoise.pipelines.training.memory import (
    CHECKPOINTED,
    DTYPES,
    PEAK,
    PROGRAM,
    activations,
    kept_for_backward,
    size,
    training,
)
from equipoise.pipelines.training.quantized import BLOCK, BYTES

_CONTEXT = 600_000_000  # bytes of a device that CUDA itself and torch's kernels take, about; not measured here
_WORTH = 200_000_000  # bytes of a device from which on a slower setting is named that saves them
_CARDS = (8, 12, 16, 24)  # GB of devices that people have
# What makes a tuning smaller, one after the other, from what costs the least time; nf4 excludes what follows.
_SMALLER: tuple[dict[str, Any], ...] = (
    {"train.precision": "bf16"},
    {"train.gradient_checkpointing": True},
    {"model.quantize": "fp8"},
    {"model.quantize": "nf4", "model.offload": 0.0},
    {"model.quantize": "fp8", "model.offload": 1.0},
    {"train.offload_activations": True},
)


@dataclass(frozen=True)
class Counted:
    """What a tuning holds, in bytes, where nothing is quantised, kept away or recomputed."""

    denoiser: int
    linear: int  # of these, those of linear layers
    numbers: int  # the weights of these layers
    in_blocks: int  # bytes of those that may wait in the computer's memory
    vae: int
    encoders: int
    words: int  # of captions that were read
    training: int
    activations: int
    ragged: int = 0  # of the weights of linear layers, those whose rows are no whole blocks of nf4
    inputs: int = 0  # bytes of activations that gradient checkpointing keeps
    blocks: int = 1

    def saved(self, quantize: str | None, cpu: bool = False) -> int:
        """By fewer bits; on a CPU some layers stay whole in nf4."""
        if quantize is None:
            return 0
        each = self.linear / self.numbers  # bytes of a weight
        numbers = (
            self.in_blocks / each if quantize == "fp8" else self.numbers - self.ragged * (cpu and quantize == "nf4")
        )
        return round(numbers * (each - BYTES[quantize]))

    def waiting(self, model: TextToImageModel) -> int:
        """In the computer's memory, of weights that are in fewer bits there too."""
        fewer = self.saved("fp8") if model.quantize == "fp8" else 0
        return round(model.offload * (self.in_blocks - fewer))

    def kept(self, config: TextToImageConfig) -> int:
        return self.activations // (CHECKPOINTED if config.train.gradient_checkpointing else 1)

    def away(self, config: TextToImageConfig) -> int:
        """Of activations, in the computer's memory where `train.offload_activations` is on."""
        whole = self.kept(config)
        waiting = self.inputs if config.train.gradient_checkpointing else round(self.activations / PEAK)
        return whole - min(whole, max(whole - waiting, self.activations // self.blocks))  # one block is at work

    def on_device(self, config: TextToImageConfig) -> int:
        """At its peak: text encoders that nothing tunes are gone when the steps begin."""
        denoiser = self.denoiser - self.saved(config.model.quantize) - self.waiting(config.model)
        away = self.away(config) if config.train.offload_activations else 0
        steps = self.training + self.kept(config) - away
        beside = self.encoders + steps if _live(config) else max(self.encoders, steps)
        return denoiser + self.vae + beside + _CONTEXT


def estimate_memory(config: TextToImageConfig) -> MemoryEstimate | None:
    """None where the checkpoint is not on this machine, or of another family."""
    if (found := _counted(config)) is None:
        return None
    cpu = not torch.accelerator.is_available()  # accelerate would wait for processes that make no dry run
    held = found.denoiser - found.saved(config.model.quantize, cpu) + found.vae + found.encoders + found.words
    return MemoryEstimate(held, found.training, found.kept(config), PROGRAM, advice=lambda: _advice(config, found))


def _advice(config: TextToImageConfig, counted: Counted) -> list[str]:
    """For devices of several sizes, a sentence each: what makes this fit, of settings that cost more and more time."""
    known: dict[Any, Counted | None] = {(config.train.precision, config.train.batch): counted}

    def needed(some: TextToImageConfig) -> int:
        which = some.train.precision, some.train.batch
        if which not in known:
            known[which] = _counted(some)
        found = known[which]
        return found.on_device(some) if found else 0

    ways = [({}, needed(config))]
    for way in _ways(config):
        if ways[-1][1] <= _CARDS[0] * 10**9:
            break
        ways.append((way, needed(configs.set_keys(config, way))))
    cards: dict[str, list[str]] = {}
    for card in _CARDS:
        fits = next(((way, most) for way, most in ways if most <= card * 10**9), None)
        way, most = fits or min(ways, key=lambda one: one[1])
        keys = " ".join(f"{key}={_word(value)}" for key, value in way.items()) or "as it is"
        said = keys if fits else f"too small, even with {keys}"
        cards.setdefault(f"{said} (about {size_words(most)})", []).append(str(card))
    named = {said: " or ".join(filter(None, (", ".join(sizes[:-1]), sizes[-1]))) for said, sizes in cards.items()}
    return [f"A device of {sizes} GB: {said}." for said, sizes in named.items()] + _activations_words(config, counted)


def _activations_words(config: TextToImageConfig, counted: Counted) -> list[str]:
    """What offloading activations saves, where that is known to be worth a word."""
    train, away = config.train, counted.away(config)
    if train.offload_activations:
        return [f"train.offload_activations keeps about {size_words(away)} of activations off the device."]
    if train.gradient_checkpointing and away >= _WORTH:
        return [f"train.offload_activations=true would keep about {size_words(away)} of activations off the device."]
    return []


def _ways(config: TextToImageConfig) -> Iterator[dict[str, Any]]:
    """Changes of a configuration that make it smaller and smaller: each with those before it."""
    made, given, batch = dict[str, Any](), configs.flat(config), config.train.batch
    one = {"train.batch": 1, "train.accumulate": config.train.accumulate * batch} if batch > 1 else {}
    for step in _SMALLER:
        made = {key: value for key, value in (made | step).items() if given.get(key) != value}
        yield made
        if one:
            yield made | one


def _word(value: Any) -> str:
    return str(value).lower() if isinstance(value, bool) else f"{value:g}" if isinstance(value, float) else str(value)


def _live(config: TextToImageConfig) -> bool:
    """Whether text encoders read at every step."""
    return bool(config.lora.text_encoder or config.token.name or config.data.shuffle_tags)


def _described(config: TextToImageConfig) -> tuple[Family, tuple[str, ...], dict[str, Any]] | None:
    """The family of a checkpoint on this machine, its text encoders, and its parts without their values."""
    model = config.model
    try:
        index = read_index(model.path, model.revision, fetch=False)
        kind = family(index.get("_class_name", ""))
        encoders = encoders_of(kind, index)
        names = (kind.denoiser, "vae", *encoders)
        described = {
            part: read_config(model.path, part, model.revision, fetch=False)
            for part in names
            if part not in model.apart
        }
        for part, path in model.apart.items():
            described[part], index[part] = read_config(path, "", fetch=False), ["transformers", kind.apart[part][0]]
    except (InputError, KeyError, OSError, ValueError):
        return None
    return kind, encoders, {part: _empty(index[part], described[part]) for part in names}


def _counted(config: TextToImageConfig) -> Counted | None:
    if (found := _described(config)) is None:
        return None
    kind, encoders, parts = found
    dtype, lora = DTYPES[config.train.precision], config.lora
    for part, module in parts.items():
        module.requires_grad_(False).train()
        for parameter in module.parameters() if part != "vae" else ():
            parameter.data = parameter.data.to(dtype)
    linear = [layer.weight for layer in parts[kind.denoiser].modules() if isinstance(layer, torch.nn.Linear)]
    ragged = sum(weight.numel() for weight in linear if weight.shape[1] % BLOCK)
    waiting = size(layer.weight for layer in in_blocks(parts[kind.denoiser]))
    targets = {kind.denoiser: lora.targets or kind.targets}
    if lora.text_encoder:
        targets |= dict.fromkeys((name for name in kind.tuned_encoders if name in encoders), lora.text_encoder_targets)
    trained = []
    for part, layers in targets.items():
        with torch.device("meta"):
            parts[part].add_adapter(LoraConfig(r=lora.rank, lora_dropout=lora.dropout, target_modules=list(layers)))
        cast_training_params(parts[part], torch.float32)
        trained += [parameter for parameter in parts[part].parameters() if parameter.requires_grad]
    step, read, weights = _one_step(config, kind, encoders, parts)
    read_once = size(read.values()) // config.train.batch * _captions(config)  # kept in the computer's memory
    kept = activations(step, weights)
    parts[kind.denoiser].enable_gradient_checkpointing()
    inputs = kept_for_backward(step, weights)
    each = {part: size((*module.parameters(), *module.buffers())) for part, module in parts.items()}
    return Counted(
        denoiser=each[kind.denoiser],
        linear=size(linear),
        numbers=sum(weight.numel() for weight in linear),
        in_blocks=waiting,
        vae=each["vae"],
        encoders=sum(each[name] for name in encoders),
        words=read_once,
        training=training(trained, config.optimizer),
        activations=kept,
        ragged=ragged,
        inputs=inputs,
        blocks=blocks(parts[kind.denoiser]),
    )


def _one_step(
    config: TextToImageConfig, kind: Family, encoders: tuple[str, ...], parts: dict[str, Any]
) -> tuple[Callable[[], None], dict[str, Any], list[Any]]:
    """A forward pass without values, what it reads of captions if these were read before, and all weights."""
    left = [*kind.left_out, *(name for name in kind.text_encoders if name not in encoders)]
    pipeline = kind.assemble(
        **parts,
        **dict.fromkeys([*left, *(kind.text_encoders[name] for name in left if name in kind.text_encoders)]),
        **{kind.text_encoders[name]: _Lengths(parts[name].config) for name in encoders},
        **({"requires_safety_checker": False} if "safety_checker" in left else {}),
        scheduler=None,
    )
    pipeline.set_progress_bar_config(disable=True)
    kind.bind(pipeline)
    batch, side, count = config.train.batch, config.data.resolution, len(config.data.sources)
    if config.data.buckets and (most := kind.most_tokens(parts[kind.denoiser].config)):
        side = math.isqrt(most) * factor(parts["vae"].config) * kind.patch  # what is no square is filled up
    weights = [tensor for module in parts.values() for tensor in (*module.parameters(), *module.buffers())]
    captions = ["a picture"] * batch
    with torch.device("meta"):
        read = {} if config.lora.text_encoder else kind.embed_empty(pipeline, captions)

    def step() -> None:
        embedded = read or kind.embed_empty(pipeline, captions)
        noisy = torch.zeros(batch, *latent_shape(parts["vae"], side, side), dtype=DTYPES[config.train.precision])
        embedded = embedded | ({"source": torch.stack([torch.zeros_like(noisy)] * count, 1)} if count else {})
        kind.predict(parts[kind.denoiser], noisy, torch.zeros(batch), embedded, torch.zeros(batch, 6))

    return step, read, weights


def _captions(config: TextToImageConfig) -> int:
    """How many different ones are read once and kept; of a folder that may still have to be drawn, none are counted."""
    if _live(config) or config.data.folder == demo.NAME:
        return 0
    found = {example.caption for example in read_examples(config.data)[0]}
    if held := read_held(config.data):
        found |= {example.caption for example in held.examples}
    found |= {example.caption for example in read_class(config)[0]}
    found |= {config.prior.prompt, *config.prior.more_prompts} if config.prior.prompt else set()
    return len(found | ({""} if config.data.caption_dropout else set()))


def _empty(named: list[str], config: dict[str, Any]) -> Any:
    """A part without its values, of the class that model_index.json names."""
    library, name = named[:2]  # modular pipelines say more
    with torch.device("meta"):
        if library == "diffusers":
            return getattr(diffusers, name).from_config(config)
        kind = getattr(transformers, name)
        return kind._from_config(kind.config_class(**config))


class _Lengths:
    """In place of a tokenizer: as many tokens as there may be of any text, without the words."""

    eos_token = pad_token = ""

    def __init__(self, config: Any):
        self.model_max_length = getattr(config, "max_position_embeddings", 512)

    def __call__(self, texts: list[str], padding: str, max_length: int | None = None, **_: Any) -> BatchEncoding:
        count = 1 if padding == "longest" else max_length or self.model_max_length
        empty = torch.zeros(len(texts), count, dtype=torch.long, device="cpu")
        return BatchEncoding({"input_ids": empty, "attention_mask": torch.ones_like(empty)})

    def tokenize(self, text: str) -> list[str]:
        return []

    def apply_chat_template(self, *_: Any, **__: Any) -> str:
        return ""
