"""How much memory a tuning will take: see `equipoise.pipelines.training.memory`."""

# diffusers, peft and transformers annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import math
from typing import Any

import diffusers
import torch
import transformers
from diffusers.training_utils import cast_training_params
from peft import LoraConfig
from transformers import BatchEncoding

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.pipeline import MemoryEstimate
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.data import read_class, read_examples, read_held
from equipoise.pipelines.text_to_image.families import family
from equipoise.pipelines.text_to_image.families.autoencoders import factor
from equipoise.pipelines.text_to_image.families.autoencoders import shape as latent_shape
from equipoise.pipelines.text_to_image.formats.layout import encoders_of, read_config, read_index
from equipoise.pipelines.training.memory import DTYPES, PROGRAM, activations, size, training

_BYTES = {"int8": 1.0, "nf4": 0.5}  # of a quantised weight


def estimate_memory(config: TextToImageConfig) -> MemoryEstimate | None:
    """None where the checkpoint is not on this machine, or of another family."""
    dtype, model, lora = DTYPES[config.train.precision], config.model, config.lora
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
    parts: dict[str, Any] = {part: _empty(index[part], described[part]) for part in names}
    for part in names:
        parts[part].requires_grad_(False).train()
        for parameter in parts[part].parameters() if part != "vae" else ():
            parameter.data = parameter.data.to(dtype)
    saved = _saved(parts[kind.denoiser], model.quantize)
    targets = {kind.denoiser: lora.targets or kind.targets}
    if lora.text_encoder:
        targets |= dict.fromkeys((name for name in kind.tuned_encoders if name in encoders), lora.text_encoder_targets)
    trained = []
    for part, layers in targets.items():
        with torch.device("meta"):
            parts[part].add_adapter(LoraConfig(r=lora.rank, lora_dropout=lora.dropout, target_modules=list(layers)))
        cast_training_params(parts[part], torch.float32)
        trained += [parameter for parameter in parts[part].parameters() if parameter.requires_grad]
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
    batch, side = config.train.batch, config.data.resolution
    if config.data.buckets and (most := kind.most_tokens(parts[kind.denoiser].config)):
        side = math.isqrt(most) * factor(parts["vae"].config) * kind.patch  # what is no square is filled up
    weights = [tensor for part in names for tensor in (*parts[part].parameters(), *parts[part].buffers())]
    captions = ["a picture"] * batch
    with torch.device("meta"):
        read = {} if lora.text_encoder else kind.embed_empty(pipeline, captions)

    def step() -> None:
        embedded = read or kind.embed_empty(pipeline, captions)
        noisy = torch.zeros(batch, *latent_shape(parts["vae"], side, side), dtype=dtype)
        kind.predict(parts[kind.denoiser], noisy, torch.zeros(batch), embedded, torch.zeros(batch, 6))

    kept = activations(step, weights, config.train.gradient_checkpointing)
    read_once = size(read.values()) // batch * _captions(config)  # kept in the computer's memory
    return MemoryEstimate(size(weights) - saved + read_once, training(trained, config.optimizer), kept, PROGRAM)


def _saved(denoiser: Any, quantize: str | None) -> int:
    """Bytes that model.quantize saves, of the linear layers' weights."""
    if not quantize:
        return 0
    linear = [layer.weight for layer in denoiser.modules() if isinstance(layer, torch.nn.Linear)]
    return round(size(linear) - sum(weight.numel() for weight in linear) * _BYTES[quantize])


def _captions(config: TextToImageConfig) -> int:
    """How many different ones are read once and kept; of a folder that may still have to be drawn, none are counted."""
    live = config.lora.text_encoder or config.token.name or config.data.shuffle_tags
    if live or config.data.folder == demo.NAME:
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
