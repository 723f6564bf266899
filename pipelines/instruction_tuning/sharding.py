"""A language model's frozen weights spread over the processes of a run, by FSDP2: each holds its share of every layer,
and layers are put together one at a time, while they work.

What is trained stays whole in every process, so that gradients, optimizers, coordinators and checkpoints are those of
copies. Towers and connectors stay whole too: a batch of text alone passes them by, and the processes that have media
would wait for the others.
"""

# torch annotates too narrowly.
# pyright: reportArgumentType=false

from collections.abc import Iterator
from functools import partial

import torch
from torch import Tensor, nn

from equipoise.coordination.components import Architecture
from equipoise.errors import InputError
from equipoise.pipelines.instruction_tuning.model import Tuned
from equipoise.pipelines.training import processes
from equipoise.pipelines.training.memory import size


def shard(tuned: Tuned, device: torch.device) -> None:
    """Leaves each process its share of the frozen weights, and brings all of the model to this process's device.

    From then on every forward pass is one of all processes.

    Raises:
        InputError: this torch cannot, or there is nothing to spread.
    """
    from torch.distributed.device_mesh import init_device_mesh
    from torch.distributed.fsdp import fully_shard

    plain, mesh = tuned.plain, init_device_mesh(device.type, (processes.count(),))
    whole = {parameter for parameter in plain.parameters() if _stays(parameter)}
    if not (chosen := list(layers(plain, tuned.parts))):
        raise InputError("model.shard: the language model has no frozen layers to spread. Leave it out.")
    try:
        for layer in chosen:
            fully_shard(layer, mesh=mesh, reshard_after_forward=True, ignored_params=whole)
        fully_shard(plain, mesh=mesh, ignored_params=set(plain.parameters()))  # has the layers fetched ahead
    except TypeError:
        raise InputError("model.shard: needs torch 2.7 or newer. pip install --upgrade torch.") from None
    if tuned.has_factors:  # peft before 0.20 would call the model's forward itself, past what puts weights together
        tuned.model.base_model.forward = partial(nn.Module.__call__, plain)
    plain.to(device)
    tuned.sharded = True


def layers(plain: nn.Module, parts: Architecture) -> Iterator[nn.Module]:
    """The modules of the language model that are put together one at a time and that every forward pass calls: its
    layers, and its embeddings and head where these share no weight."""
    modules = {name: module for name, module in plain.named_modules() if parts.part(name) == "language"}
    lists = [f"{name}." for name, module in modules.items() if isinstance(module, nn.ModuleList)]
    shared = _shared(plain)
    for name, module in modules.items():
        inside = [above for above in lists if name.startswith(above)]
        if inside:
            # of a list, not of one within another; with layers that only attend to media some batches have none
            fits = len(inside) == 1 and name.count(".") == inside[0].count(".") and "Cross" not in type(module).__name__
        else:
            leaf = getattr(module, "base_layer", module)
            fits = isinstance(leaf, nn.Embedding | nn.Linear) and not name.endswith(".base_layer")
        if fits and any(not _stays(p) for p in module.parameters()) and not shared & set(module.parameters()):
            yield module


def saved(tuned: Tuned) -> int:
    """Bytes of the frozen weights that a process does not hold, less what it puts together at a time."""
    each = [size(p for p in layer.parameters() if not _stays(p)) for layer in layers(tuned.plain, tuned.parts)]
    at_once = sum(sorted(each)[-2:])  # while one works, the next is fetched
    return max(0, round((sum(each) - at_once) * (1 - 1 / processes.count())))


def _stays(parameter: Tensor) -> bool:
    """Whether a parameter stays whole: a trained one, and a single number, which has no share."""
    return parameter.requires_grad or not parameter.ndim


def _shared(model: nn.Module) -> set[nn.Parameter]:
    """The parameters that several modules have, as a tied head and the embedding do."""
    seen: set[nn.Parameter] = set()
    found: set[nn.Parameter] = set()
    for module in model.modules():
        for parameter in module.parameters(recurse=False):
            (found if parameter in seen else seen).add(parameter)
    return found
