"""Factors that FSDP2 spreads over two processes: the step is that of one process with whole ones."""

import itertools
import os
import tempfile
from functools import partial
from pathlib import Path

import pytest
import torch
import torch.distributed as dist
from accelerate import Accelerator, DistributedType, FullyShardedDataParallelPlugin
from accelerate.state import AcceleratorState
from peft import LoraConfig, inject_adapter_in_model
from peft.tuners.lora.config import BdLoraConfig
from schedulefree import AdamWScheduleFree
from torch import nn
from torch.distributed.device_mesh import init_device_mesh
from torch.distributed.fsdp import fully_shard
from torch.optim import Optimizer

from equipoise import AlphaAdam, BoundedAdamW, ScaledAdamW, ScaledGD, SharpnessAware, attach, bounded, scaled
from equipoise.errors import InputError

STEPS = 4
MAKERS = {
    "scaled_adamw": lambda net: ScaledAdamW(net, 1e-2),
    "relative": lambda net: ScaledAdamW(net, 1e-2, damping=1e-2, damping_mode="relative"),
    "sequential": lambda net: ScaledAdamW(net, 1e-2, order="sequential"),
    "scaled_gd": lambda net: ScaledGD(net, 1e-2, momentum=0.9),
    "bounded": lambda net: BoundedAdamW(net, 0.1, trust=0.01),
    "bounded run": lambda net: BoundedAdamW(net, 0.1, reach=0.02),
    "scaled and bounded": lambda net: ScaledAdamW(net, 0.1, trust=0.01),
    "attached": lambda net: attach(torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2), net),
    "attached, foreach": lambda net: attach(
        torch.optim.AdamW([p for p in net.parameters() if p.requires_grad], 1e-2, foreach=True), net
    ),
    "scaled AlphaAdam": lambda net: scaled(AlphaAdam)(net, 1e-2),
    "AlphaAdam, foreach": lambda net: AlphaAdam(net, 1e-2, foreach=True),
}


REFUSED = {
    "sharp": lambda net: SharpnessAware(ScaledAdamW)(net, 1e-2),
    "bounded, schedule-free": lambda net: bounded(AdamWScheduleFree)(net, 1e-2, trust=0.01),
}
RANKS = (1, 3, "blocks")  # one row for two processes, and three; and several pairs in two parameters
PREPARED = ("scaled_adamw", "scaled and bounded", "attached")  # also by accelerate


def model(r: int | str) -> nn.Module:
    torch.manual_seed(0)
    if r == "blocks":
        net = nn.Sequential(nn.Linear(12, 8), nn.Tanh(), nn.Linear(8, 9)).double()
        blocks = BdLoraConfig(target_modules_bd_a=["2"], target_modules_bd_b=["0"], nblocks=2)
        inject_adapter_in_model(LoraConfig(r=6, target_modules=["0", "2"], use_bdlora=blocks), net)
        for name, param in net.named_parameters():
            if "lora_B" in name:
                nn.init.normal_(param)
        return net.double()
    net = nn.Sequential(nn.Linear(12, 7), nn.Tanh(), nn.Linear(7, 9)).double()
    config = LoraConfig(r=r, target_modules=["0", "2"], init_lora_weights=False)  # B is not zero
    return inject_adapter_in_model(config, net).double()


def spread_out(net: nn.Module) -> nn.Module:
    for layer in (net[0], net[2], net):
        fully_shard(layer, mesh=init_device_mesh("cpu", (2,)))
    return net


def loss(net: nn.Module, optimizer: Optimizer, x: torch.Tensor) -> torch.Tensor:
    optimizer.zero_grad()
    value = net(x).square().mean()
    value.backward()
    return value


def trained(net: nn.Module, optimizer: Optimizer, rank: int | None) -> list[torch.Tensor]:
    """The factors after some steps on a batch of which each process has its half."""
    for step in range(STEPS):
        x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        part = x if rank is None else x[4 * rank : 4 * rank + 4]
        optimizer.step(partial(loss, net, optimizer, part))
    params = [param.detach() for param in net.parameters() if param.requires_grad]
    return params if rank is None else [param.full_tensor() for param in params]


def process(rank: int, file: str) -> None:
    dist.init_process_group("gloo", init_method=f"file://{file}", rank=rank, world_size=2)
    found: dict = {}
    for maker, r in itertools.product(MAKERS, RANKS):
        net = spread_out(model(r))
        found[maker, r] = trained(net, MAKERS[maker](net), rank)
    for maker, make in REFUSED.items():
        with pytest.raises(InputError) as refused:
            trained(net := spread_out(model(3)), make(net), rank)
        found[maker] = str(refused.value)
    found |= {(maker, "accelerate"): prepared(rank, maker) for maker in PREPARED}
    if rank == 0:
        torch.save(found, f"{file}.pt")
    dist.barrier()
    os._exit(0)  # the store's threads, taken down in an order of chance, may abort what has ended well


def prepared(rank: int, maker: str) -> list[torch.Tensor]:
    """The same by accelerate's own FSDP2, which exchanges the parameters of an optimizer that is there already."""
    launcher = {"RANK": str(rank), "LOCAL_RANK": str(rank), "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1"}
    os.environ.update(launcher, ACCELERATE_USE_CPU="true", ACCELERATE_USE_FSDP="true", FSDP_VERSION="2")
    plugin = FullyShardedDataParallelPlugin(
        fsdp_version=2, auto_wrap_policy="transformer_based_wrap", transformer_cls_names_to_wrap=["Tanh"]
    )
    accelerator = Accelerator(fsdp_plugin=plugin, cpu=True)
    # It offers FSDP for accelerators alone; on the CPU it has to be told.
    AcceleratorState._shared_state.update(distributed_type=DistributedType.FSDP, fsdp_plugin=plugin)
    net = model(3)
    net, optimizer = accelerator.prepare(net, MAKERS[maker](net))
    for step in range(STEPS):
        optimizer.zero_grad()
        x = torch.randn(8, 12, dtype=torch.float64, generator=torch.Generator().manual_seed(step))
        accelerator.backward(net(x[4 * rank : 4 * rank + 4]).square().mean())
        optimizer.step()
    return [param.full_tensor() for param in net.parameters() if param.requires_grad]


@pytest.fixture(scope="module")
def spread() -> dict:
    """What two processes came to, by optimizer."""
    with tempfile.TemporaryDirectory() as folder:
        file = str(Path(folder, "store"))
        torch.multiprocessing.spawn(process, (file,), nprocs=2)
        return torch.load(f"{file}.pt")


@pytest.mark.parametrize("r", RANKS)
@pytest.mark.parametrize("maker", MAKERS)
def test_sharded_factors_take_the_step_of_full_ones(maker, r, spread):
    net = model(r)
    for got, expected in zip(spread[maker, r], trained(net, MAKERS[maker](net), None), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)


def test_what_cannot_be_right_is_refused(spread):
    assert "is a DTensor, and the norm over all parameters needs whole ones" in spread["sharp"]
    assert "cannot bound a schedule-free step of factors that FSDP2 shards" in spread["bounded, schedule-free"]


@pytest.mark.parametrize("maker", PREPARED)
def test_accelerate_spreads_what_an_optimizer_was_made_for(maker, spread):
    net = model(3)
    for got, expected in zip(spread[maker, "accelerate"], trained(net, MAKERS[maker](net), None), strict=True):
        torch.testing.assert_close(got, expected, rtol=1e-9, atol=1e-12)
