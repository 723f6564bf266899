"""Time of one optimizer step on the LoRA shapes of Stable Diffusion 1.5's or XL's attention, or on all of GPT-2's.

    python benchmarks/optimizer_step.py --ranks 4 16 64 --threads 1
    python benchmarks/optimizer_step.py --shapes sdxl --ranks 4 16 64 256
    python benchmarks/optimizer_step.py --shapes gpt2 --only "torch AdamW" AlphaAdam
    python benchmarks/optimizer_step.py --training-step --ranks 16

`--authors FILE` adds the AdamW of the paper's authors, from your copy of Mix-of-Show/custom_optimizers.py of their
repository; `--training-step` measures forward and backward of a randomly initialised SD 1.5 U-Net at batch 1 and
`--pixels`, and how much of a training step the optimizer's is.

Prints a Markdown table: the median step time of each optimizer, and its ratio to torch's AdamW as it comes. The
optimizers take turns, one step each, so that whatever else the machine does falls on all of them alike; on a machine
that others keep busy, `--clock cpu` counts this process's time alone.
"""

import argparse
import runpy
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import torch
from peft import LoraConfig, inject_adapter_in_model
from peft.optimizers import create_riemannian_optimizer
from torch import nn
from torch.optim import AdamW, Optimizer

from equipoise import AlphaAdam, BoundedAdamW, ScaledAdamW


def attention(rank: int, blocks: dict[int, int], text: int) -> nn.Module:
    """The LoRA factors of a U-Net's attention alone, under peft's names: the frozen weights play no part in a step.

    Args:
        blocks: Transformer blocks by channel count. Each has attn1 (self) and attn2 (text) with to_q, to_k, to_v and
            to_out.0, so eight pairs.
        text: Width of the text embedding.
    """
    layers = []  # (in, out) of every adapted linear layer
    for width, count in blocks.items():
        self_attention = [(width, width)] * 4
        cross_attention = [(width, width), (text, width), (text, width), (width, width)]
        layers += (self_attention + cross_attention) * count
    net = nn.Module()
    for index, (n, m) in enumerate(layers):
        layer = nn.Module()
        for name, size in (("lora_A", (rank, n)), ("lora_B", (m, rank))):
            factor = nn.Linear(1, 1, bias=False)
            factor.weight = nn.Parameter(torch.empty(size))
            layer.add_module(name, nn.ModuleDict({"default": factor}))
        layer.register_buffer("weight", torch.ones(1).expand(m, n))  # the frozen weight; only its norm is asked for
        net.add_module(str(index), layer)
    return net


def gpt2(rank: int) -> nn.Module:
    """Every weight of GPT-2 small, 124 million, for full fine-tuning; `rank` plays no part."""
    width = 768
    linear = [(width, 3 * width), (width, width), (width, 4 * width), (4 * width, width)]
    block = [size for n, m in linear for size in ((n, m), (m,))] + [(width,)] * 4  # and two layer norms
    sizes = [(50257, width), (1024, width), *block * 12, (width,), (width,)]
    return nn.ParameterList(nn.Parameter(torch.empty(size)) for size in sizes)


SHAPES: dict[str, Callable[[int], nn.Module]] = {
    # two blocks in each of three down stages, one in the middle, three in each of three up stages: 128 pairs
    "sd15": lambda rank: attention(rank, {320: 5, 640: 5, 1280: 6}, text=768),
    # 2·2 and 2·10 down, 10 in the middle, 3·10 and 3·2 up: 560 pairs
    "sdxl": lambda rank: attention(rank, {640: 10, 1280: 60}, text=2048),
    "gpt2": gpt2,
}


def model(shapes: str, rank: int, decades: float = 0.0) -> nn.Module:
    """The parameters and their gradients; the columns of every B fall in size by `decades` powers of ten."""
    generator = torch.Generator().manual_seed(0)
    net = SHAPES[shapes](rank)
    for name, param in net.named_parameters():
        param.data.normal_(0, 0.02, generator=generator)
        if "lora_B" in name:
            param.data *= torch.logspace(0, -decades, rank)
        param.grad = torch.randn(param.shape, generator=generator) * 1e-3
    return net


def fresh(net: nn.Module) -> nn.Module:
    """The same as adapters begin, with B = 0."""
    for name, param in net.named_parameters():
        if "lora_B" in name:
            param.data.zero_()
    return net


OPTIMIZERS: dict[str, Callable[[nn.Module], Optimizer]] = {
    "torch AdamW (default)": lambda net: AdamW(net.parameters(), lr=1e-6),
    "torch AdamW (foreach)": lambda net: AdamW(net.parameters(), lr=1e-6, foreach=True),
    "torch AdamW (fused)": lambda net: AdamW(net.parameters(), lr=1e-6, fused=True),
    "ScaledAdamW": lambda net: ScaledAdamW(net, lr=1e-6),
    "ScaledAdamW (sequential)": lambda net: ScaledAdamW(net, lr=1e-6, order="sequential"),
    "BoundedAdamW (trust alone)": lambda net: BoundedAdamW(fresh(net), lr=1.0, trust=0.004),
    "BoundedAdamW": lambda net: BoundedAdamW(fresh(net)),  # at the border of its reach after ten steps
    "BoundedAdamW (from B ≠ 0)": lambda net: BoundedAdamW(net),  # as PiSSA and adapters that are trained further
    "AlphaAdam": lambda net: AlphaAdam(net, lr=1e-6),
    "peft Riemannian AdamW": lambda net: create_riemannian_optimizer(net, AdamW, lr=1e-6, reg=1e-6),  # type: ignore
}


def authors(file: Path) -> Callable[[nn.Module], Optimizer]:
    """The class AdamWr of a file that pairs neighbouring parameters by their order."""
    module = runpy.run_path(str(file))
    return lambda net: module["AdamWr"](list(net.parameters()), lr=1e-6, reg=1e-6)


def training_step(rank: int, pixels: int, clock: Callable[[], float]) -> float:
    """Median seconds of forward and backward of the whole U-Net with LoRA on its attention."""
    from diffusers import UNet2DConditionModel

    unet = UNet2DConditionModel(cross_attention_dim=768, attention_head_dim=8).requires_grad_(False)
    inject_adapter_in_model(LoraConfig(r=rank, target_modules=["to_q", "to_k", "to_v", "to_out.0"]), unet)
    inputs = torch.randn(1, 4, pixels // 8, pixels // 8), torch.tensor([500]), torch.randn(1, 77, 768)
    times = []
    for _ in range(4):
        start = clock()
        unet(*inputs).sample.square().mean().backward()
        times.append(clock() - start)
    return statistics.median(times[1:])


CLOCKS = {"wall": time.perf_counter, "cpu": time.process_time}


def measure(
    names: list[str], shapes: str, rank: int, steps: int, clock: Callable[[], float], decades: float = 0.0
) -> dict[str, float]:
    """Median seconds per step of each optimizer, after two steps that nobody counts."""
    models = {name: model(shapes, rank, decades) for name in names}
    optimizers = {name: OPTIMIZERS[name](models[name]) for name in names}
    grads = {
        name: [(p, p.grad.clone()) for group in opt.param_groups for p in group["params"]]
        for name, opt in optimizers.items()
    }
    times: dict[str, list[float]] = {name: [] for name in optimizers}
    for round_ in range(steps + 2):
        for name, optimizer in optimizers.items():
            for param, fresh in grads[name]:  # scaling replaces gradients: each step must see a raw one
                param.grad.copy_(fresh)
            start = clock()
            optimizer.step()
            if round_ >= 2:
                times[name].append(clock() - start)
    return {name: statistics.median(seconds) for name, seconds in times.items()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--shapes", choices=SHAPES, default="sd15")
    parser.add_argument("--training-step", action="store_true")
    parser.add_argument("--pixels", type=int, default=512, help="side of the pictures of the training step")
    parser.add_argument("--authors", type=Path, metavar="FILE")
    parser.add_argument("--only", nargs="+", default=[""], help="parts of the names of the optimizers to measure")
    parser.add_argument("--ranks", type=int, nargs="+", default=[4, 16, 64])
    parser.add_argument("--steps", type=int, default=30, help="timed steps of each optimizer")
    parser.add_argument(
        "--decades", type=float, default=0.0, help="powers of ten that the columns of every B differ by"
    )
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--clock", choices=CLOCKS, default="wall")
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)

    if arguments.training_step:
        for rank in arguments.ranks:
            whole = training_step(rank, arguments.pixels, CLOCKS[arguments.clock])
            steps = measure(["ScaledAdamW", "BoundedAdamW"], "sd15", rank, 20, CLOCKS[arguments.clock])
            shares = ", ".join(f"{name} {step:.4f} s ({step / whole:.1%})" for name, step in steps.items())
            print(f"rank {rank}, {arguments.pixels} pixels: forward and backward {whole:.2f} s, {shares}")
        return
    if arguments.authors:
        OPTIMIZERS["the authors' AdamWr"] = authors(arguments.authors)
    names = [name for name in OPTIMIZERS if any(part in name for part in arguments.only)]
    base, what = names[0], f"{arguments.threads} thread(s), {arguments.clock} time, {arguments.steps} steps"
    print(f"{arguments.shapes}, {what}, torch {torch.__version__}\n")
    versus = [base] + ["ScaledAdamW"] * ("ScaledAdamW" in names and base != "ScaledAdamW")
    print(f"| rank | optimizer | median ms | {' | '.join(f'× {name}' for name in versus)} |")
    print(f"| ---: | --- | ---: |{' ---: |' * len(versus)}")
    for rank in arguments.ranks if arguments.shapes != "gpt2" else [0]:
        medians = measure(names, arguments.shapes, rank, arguments.steps, CLOCKS[arguments.clock], arguments.decades)
        for name, seconds in medians.items():
            ratios = " | ".join(f"{seconds / medians[other]:.2f}" for other in versus)
            print(f"| {rank or 'full'} | {name} | {seconds * 1e3:.2f} | {ratios} |", flush=True)


if __name__ == "__main__":
    main()
