"""How much memory instruction tuning will take: see `equipoise.pipelines.training.memory`."""

# peft and transformers annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import torch
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.config import InstructionTuningConfig
from equipoise.pipelines.instruction_tuning.model import Tuned, is_sharded, outline
from equipoise.pipelines.instruction_tuning.quantized import layers
from equipoise.pipelines.instruction_tuning.sharding import saved
from equipoise.pipelines.pipeline import MemoryEstimate
from equipoise.pipelines.training.memory import DTYPES, PROGRAM, activations, size, training
from equipoise.pipelines.training.quantized import BYTES

TOKENS = 512  # of a sequence, where data.max_tokens is empty
_LOGITS = 3  # copies of the logits at the peak: they, their logarithms and their gradient


def estimate_memory(config: InstructionTuningConfig) -> MemoryEstimate | None:
    """Of the language side's activations, which are nearly all. None where the model is not on this machine, or takes
    more than shapes to run."""
    dtype = DTYPES[config.train.precision]
    try:
        tuned = outline(config, local=True)
    except InputError:
        return None
    text, decoder = tuned.plain.config.get_text_config(), tuned.plain.get_decoder()
    length = min(config.data.max_tokens or TOKENS, getattr(text, "max_position_embeddings", None) or TOKENS)
    batch = config.train.batch

    def step(mask: bool) -> None:
        embeddings = torch.zeros(batch, length, text.hidden_size, dtype=dtype, requires_grad=True)
        given = {"attention_mask": torch.zeros(batch, 1, length, length, dtype=dtype)} if mask else {}
        decoder.train()(inputs_embeds=embeddings, use_cache=False, **given)

    weights = list(tuned.model.parameters())
    for mask in (True, False):  # some read values to make a mask, some to place tokens by it
        try:
            kept = activations(lambda mask=mask: step(mask), weights, config.train.gradient_checkpointing)
        except (NotImplementedError, RuntimeError, TypeError, ValueError, IndexError):
            continue
        kept += _LOGITS * 4 * batch * length * text.vocab_size
        added = training(tuned.named.values(), config.optimizer)
        added += size(tuned.named.values()) if config.train.keep == "best" else 0
        held = size(weights) - _saved(tuned, config) - (saved(tuned) if is_sharded(config.model) else 0)
        return MemoryEstimate(held, added, kept, PROGRAM, f"in sequences of {length} tokens")
    return None


def _saved(tuned: Tuned, config: InstructionTuningConfig) -> int:
    """Bytes that model.quantize saves."""
    if config.model.quantize is None:
        return 0
    modules = dict(tuned.plain.named_modules())
    names = layers(tuned.plain, tuned.parts, config.model.quantize)
    held: list[Tensor] = [modules[name].weight for name in names]
    return round(size(held) - sum(weight.numel() for weight in held) * BYTES[config.model.quantize])
