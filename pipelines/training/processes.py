"""Several processes that train one run, started by `accelerate launch` or `torchrun`: who is who, and what they share.

The first process leads: it alone writes, and answers requests. The others follow, taking the same steps on other
examples. Gradients and losses are averaged over all, so that every process takes the step of one with the whole batch,
whatever the objective, the coordinator and the optimizer make of them; no wrapper is put around a model. Alone, nothing
here does anything. Torch is imported when it is needed.
"""

import os
from collections.abc import Sequence
from datetime import timedelta
from functools import cache
from typing import TYPE_CHECKING, Any

from equipoise.errors import EquipoiseError, InputError

if TYPE_CHECKING:
    from torch import Tensor

    from equipoise.pipelines.runs.run import Run

_PATIENCE = timedelta(hours=3)  # that the others wait while the first one draws samples or writes
_begun = False
# What accelerate launch sets where it would take a model apart, which needs wrappers of its own around it.
_PLUGINS = {
    "ACCELERATE_USE_FSDP": "FSDP",
    "ACCELERATE_USE_DEEPSPEED": "DeepSpeed",
    "ACCELERATE_USE_MEGATRON_LM": "Megatron-LM",
}


def count() -> int:
    """How many processes train together."""
    return int(os.environ.get("WORLD_SIZE", "1")) if "RANK" in os.environ else 1


def command(number: int) -> str:
    """What starts the command line in so many processes."""
    return f"torchrun --nproc-per-node {number} -m equipoise.pipelines.cli" if number > 1 else "equipoise"


def rank() -> int:
    """This process's number among them; 0 leads."""
    return int(os.environ["RANK"]) if count() > 1 else 0


def leads() -> bool:
    return rank() == 0


def alone(what: str) -> None:
    """
    Raises:
        InputError: Several processes were started for what starts its own.
    """
    check()
    if count() > 1:
        raise InputError(
            f"{what} starts processes of its own. Run it without accelerate launch and torchrun, and without their "
            "variables RANK and WORLD_SIZE."
        )


def check() -> None:
    """
    Raises:
        InputError: This was started, alone or among others, for a way of training that the pipelines do not have.
    """
    for variable, name in _PLUGINS.items():
        if os.environ.get(variable, "false").lower() in ("1", "true"):
            raise InputError(
                f"accelerate launch: {name} takes models apart, and the pipelines train whole ones, a copy in each "
                "process. Start them with accelerate launch --multi_gpu, or with torchrun; instruction tuning then "
                "spreads a language model's frozen weights with model.shard=true."
            )


def join() -> None:
    """Meets the other processes."""
    from accelerate.state import PartialState

    PartialState(timeout=_PATIENCE)


def begin(folder: str) -> None:
    """Sends the others, who `receive` it once, the run's folder, or "" if none begins; only the first call sends."""
    global _begun
    if count() > 1 and not _begun:
        _begun = True
        _broadcast(folder)


def receive() -> str:
    """The run's folder, or "": see `begin`."""
    return _broadcast("")


def shared(text: str) -> str:
    """The first process's text, in all of them."""
    return _broadcast(text) if count() > 1 else text


def gathered_texts(text: str) -> list[str]:
    """Every process's text, in their order, in all of them."""
    return [_broadcast(text, source) for source in range(count())] if count() > 1 else [text]


def requests(run: "Run") -> set[str]:
    """What the run is asked to do, by the first process's look at it."""
    return set(shared(" ".join(run.requested())).split())


def first(numbers: dict[str, float]) -> dict[str, float]:
    """The first process's numbers, in all of them; exactly."""
    if count() == 1:
        return numbers
    sent = shared(" ".join(float(value).hex() for value in numbers.values()))
    return {name: float.fromhex(value) for name, value in zip(numbers, sent.split(), strict=True)}


def mean(tensor: "Tensor") -> "Tensor":
    """The mean over the processes. Its gradient is that of each process's own share, which `average` then averages."""
    return tensor if count() == 1 else _mean_function().apply(tensor)


def gathered(tensor: "Tensor") -> "Tensor":
    """All processes' rows, (count · n, …), in their order; each must have as many. Its gradient is that of each
    process's own rows, times the count, which `average` then divides by."""
    return tensor if count() == 1 else _gathered_function().apply(tensor)


def average(tensors: Sequence["Tensor"]) -> None:
    """Replaces each tensor by its mean over the processes, in place, in one message for each data type."""
    if count() == 1:
        return
    import torch

    for kind in dict.fromkeys(tensor.dtype for tensor in tensors):
        same = [tensor for tensor in tensors if tensor.dtype == kind]
        flat = torch.cat([tensor.detach().reshape(-1) for tensor in same])
        torch.distributed.all_reduce(flat)
        parts = flat.div_(count()).split([tensor.numel() for tensor in same])
        torch._foreach_copy_([t.detach() for t in same], [p.view_as(t) for p, t in zip(parts, same, strict=True)])


def average_gradients(parameters: Sequence["Tensor"]) -> None:
    """Averages gradients; one that only some processes have counts as zero in the others."""
    if count() == 1:
        return
    import torch

    some = torch.tensor([p.grad is not None for p in parameters], dtype=torch.float32, device=parameters[0].device)
    torch.distributed.all_reduce(some)
    wanted = [p for p, here in zip(parameters, some.tolist(), strict=True) if here]
    for parameter in wanted:
        if parameter.grad is None:
            parameter.grad = torch.zeros_like(parameter)
    average([parameter.grad for parameter in wanted if parameter.grad is not None])


def lost(error: BaseException) -> EquipoiseError | None:
    """What to say if an error only means that another process is gone."""
    words = ("Connection closed by peer", "Connection reset by peer", "NCCL", "Broken pipe", "Timed out waiting")
    if count() == 1 or not any(word in str(error) for word in words):
        return None
    return EquipoiseError("another process of this run has ended. Resume it; the last checkpoint stays.")


def _broadcast(text: str, source: int = 0) -> str:
    import torch
    from accelerate.state import PartialState

    device = PartialState().device
    written = torch.tensor(list(text.encode()), dtype=torch.uint8, device=device)
    size = torch.tensor([len(written)], device=device)
    torch.distributed.broadcast(size, source)
    content = written if rank() == source else torch.empty(int(size), dtype=torch.uint8, device=device)
    torch.distributed.broadcast(content, source)
    return bytes(content.tolist()).decode()


@cache
def _mean_function() -> Any:
    import torch

    class Mean(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: "Tensor") -> "Tensor":
            found = tensor.detach().clone()
            torch.distributed.all_reduce(found)
            return found / count()

        @staticmethod
        def backward(ctx: Any, gradient: "Tensor") -> "Tensor":  # pyright: ignore[reportIncompatibleMethodOverride]
            return gradient

    return Mean


@cache
def _gathered_function() -> Any:
    import torch

    class Gathered(torch.autograd.Function):
        @staticmethod
        def forward(ctx: Any, tensor: "Tensor") -> "Tensor":
            own = tensor.detach().contiguous()
            parts = [torch.empty_like(own) for _ in range(count())]
            torch.distributed.all_gather(parts, own)
            return torch.cat(parts)

        @staticmethod
        def backward(ctx: Any, gradient: "Tensor") -> "Tensor":  # pyright: ignore[reportIncompatibleMethodOverride]
            return gradient.chunk(count())[rank()] * count()

    return Gathered
