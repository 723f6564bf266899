"""Several conversations in one row, each with positions of its own and without attention to the others.

transformers makes the mask from the positions: where they do not go on by one, another sequence begins, if there is no
attention mask (as in its DataCollatorWithFlattening). Models that do not do so are found by the self-check.
"""

import inspect
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from equipoise.pipelines.instruction_tuning.talk import PER_TOKEN


@dataclass(frozen=True)
class Packed:
    """A padded batch in fewer rows."""

    batch: dict[str, Tensor]  # what the model is given, without an attention mask
    index: Tensor  # (rows, width), which of the padded batch's tokens stands there, counted row by row; −1 is padding
    shape: tuple[int, int]  # of the padded batch

    @property
    def sample(self) -> Tensor:  # (rows, width)
        """The conversation that each token is of; −1 is padding."""
        return torch.where(self.index < 0, -1, self.index // self.shape[1])

    def padded(self, values: Tensor) -> Tensor:
        """What a model has of each token, (rows, width, …), where the padded batch has that token; 0 elsewhere."""
        made = values.new_zeros((self.shape[0] * self.shape[1], *values.shape[2:]))
        real = self.index >= 0
        made[self.index[real]] = values[real]
        return made.view(*self.shape, *values.shape[2:])


def pack(
    batch: dict[str, Tensor],  # padded on the right
    width: int,  # the most tokens of a row; one that is longer by itself has a row of its own
    model: nn.Module,
) -> Packed:
    """The conversations stay in their order, and so do their media."""
    mask = batch["attention_mask"].bool()
    index = _index(mask, width)
    real = index >= 0
    made = {}
    for name, value in batch.items():
        if name not in PER_TOKEN or value.shape[:2] != mask.shape:
            made[name] = value
        elif name != "attention_mask":
            made[name] = torch.where(_like(real, value), value.flatten(0, 1)[index.clamp(min=0)], _filler(name))
    text = torch.where(real, index % mask.shape[1], 0)
    text -= torch.where(real, mask.int().argmax(1)[index.clamp(min=0) // mask.shape[1]], 0)
    ends = real.sum(1, keepdim=True)
    text = torch.where(real, text, torch.arange(index.shape[1], device=index.device) - ends)  # padding by itself
    made["position_ids"] = text
    if (turned := _turned(batch, model)) is not None:  # Qwen-VL's kind: positions in time, height and width
        chosen = turned.flatten(1)[:, index.clamp(min=0)]
        made["position_ids"] = torch.cat([text[None], torch.where(real, chosen, text)])
    return Packed(made, index, (mask.shape[0], mask.shape[1]))


def width(batch: dict[str, Tensor], max_tokens: int | None) -> int:
    """How long a row may become."""
    return max_tokens or int(batch["attention_mask"].sum(1).max())


def packing_problem(model: Any, kind: str) -> str | None:
    """Why a model cannot be packed, as far as it can be seen without running it."""
    if "position_ids" in inspect.signature(model.forward).parameters:
        return None
    return f"train.packing: {kind} takes no positions, and would read conversations in one row as one. Leave it out."


def _index(mask: Tensor, width: int) -> Tensor:
    rows: list[Tensor] = []
    waiting: list[Tensor] = []
    count = 0
    for number, row in enumerate(mask):
        mine = row.nonzero()[:, 0] + number * mask.shape[1]
        if waiting and count + len(mine) > width:
            rows.append(torch.cat(waiting))
            waiting, count = [], 0
        waiting.append(mine)
        count += len(mine)
    rows.append(torch.cat(waiting))
    return nn.utils.rnn.pad_sequence(rows, batch_first=True, padding_value=-1)


def _like(real: Tensor, value: Tensor) -> Tensor:
    return real.view(*real.shape, *(1 for _ in value.shape[2:]))


def _filler(name: str) -> int:
    return -100 if name == "labels" else 0


def _turned(batch: dict[str, Tensor], model: nn.Module) -> Tensor | None:  # (3, batch, tokens)
    """The positions of pictures' tokens in models that turn them about, of the padded batch."""
    for module in model.modules():
        if (find := getattr(module, "get_rope_index", None)) is not None:
            known = inspect.signature(find).parameters
            given = {name: value for name, value in batch.items() if name in known}
            return find(**given)[0]
    return None


def leaks(model: Any, packed: Packed) -> bool:
    """Whether what a model says of the last conversation depends on those before it, in the row that they share. By the
    gradient, which is exactly 0 where there is no way; a loss that is right to rounding does not show that."""
    seen: list[Tensor] = []

    def watched(module: nn.Module, args: Any, kwargs: dict[str, Any]) -> tuple[Any, dict[str, Any]]:
        if (given := kwargs.get("inputs_embeds")) is not None:
            seen.append(given.detach().requires_grad_())
            kwargs = kwargs | {"inputs_embeds": seen[-1]}
        return args, kwargs

    last = packed.sample.max()
    row = int((packed.sample == last).any(1).int().argmax())
    mine, others = (packed.sample[row] == last), (packed.sample[row] != last) & (packed.sample[row] >= 0)
    hook = model.get_decoder().register_forward_pre_hook(watched, with_kwargs=True)
    try:
        with torch.enable_grad():
            inputs = {name: value for name, value in packed.batch.items() if name != "labels"}
            logits = model(**inputs, use_cache=False).logits[row, mine]
            found = torch.autograd.grad(logits.float().square().sum(), seen, allow_unused=True)
    finally:
        hook.remove()
    return not seen or any(grad is None or bool(grad[row, others].any()) for grad in found)
