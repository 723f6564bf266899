"""What CPUs cannot check, on one card, in at most eight minutes: writes a table of it.

    python benchmarks/gpu.py --output benchmarks/gpu.md
    python benchmarks/gpu.py --script PATH          beside diffusers' train_text_to_image_lora.py, your copy of it
    python benchmarks/gpu.py --model FOLDER --resolution 512
    python benchmarks/gpu.py --device cpu --small   all of it in small, to see that it runs

- **Optimizers**: every one that is installed takes the same steps on LoRA factors in float64 on the processor, and in
  float32 and bfloat16 on the device; the table has by how much the ways that they went differ.
- **Step**: the time of an optimizer's step on the factors of Stable Diffusion 1.5's attention, beside torch's fused
  AdamW and peft's; and of a LoRA layer's forward and backward pass beside peft's.
- **Runs**: a tuning in each precision (fp16 by a GradScaler), with the base in fewer bits, with weights that wait in
  the computer's memory, with checkpointing, compiled: seconds until the first step, steps per second, the device's peak
  memory (on the processor, the process's), and the loss before and after.

What fails has its reason in the table, and what the time does not reach is named: neither ends the rest.
"""

import argparse
import json
import os
import resource
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator
from contextlib import suppress
from pathlib import Path
from typing import Any

import optimizer_step
import torch
from torch import nn
from torch.optim import Optimizer

from equipoise import registry

MINUTES = 8
STEPS = 10  # of the optimizers
CLOSE = 1e-3  # how far float32 may be from float64 over these: rounding alone stays far below
RUNS: dict[str, list[str]] = {
    "float32": ["train.precision=no"],
    "bf16": ["train.precision=bf16"],
    "fp16, by a GradScaler": ["train.precision=fp16"],
    "bf16, gradient checkpointing": ["train.precision=bf16", "train.gradient_checkpointing=true"],
    "bf16, `model.offload=1`": ["train.precision=bf16", "model.offload=1"],
    "bf16, `model.quantize=fp8`": ["train.precision=bf16", "model.quantize=fp8"],
    "bf16, `model.quantize=int8`": ["train.precision=bf16", "model.quantize=int8"],
    "bf16, `model.quantize=nf4`": ["train.precision=bf16", "model.quantize=nf4"],
    "bf16, `train.compile=true`": ["train.precision=bf16", "train.compile=true"],
}


def brief(error: BaseException | str) -> str:
    """A reason, for a cell of a table."""
    return " ".join(str(error).split()).replace("|", "/")[:120] or type(error).__name__


def walked(name: str, dtype: torch.dtype, device: str) -> torch.Tensor:
    """(numbers,) float64: how far an optimizer has moved LoRA factors by gradients that are the same for all."""
    net = optimizer_step.attention(4, {32: 2}, text=24)
    generator = torch.Generator().manual_seed(0)
    for parameter in net.parameters():
        parameter.data.normal_(0, 0.05, generator=generator)
    net.to(device, dtype)
    first = [parameter.detach().clone() for parameter in net.parameters()]
    groups = [{"params": list(net.named_parameters())}]
    optimizer: Optimizer = registry.load("optimizers", name)(groups, lr=1e-2)
    for _ in range(STEPS):
        drawn = [torch.randn(p.shape, generator=generator, dtype=torch.float64) * 1e-2 for p in net.parameters()]

        def closure(drawn: list[torch.Tensor] = drawn) -> torch.Tensor:
            optimizer.zero_grad()
            pairs = zip(net.parameters(), drawn, strict=True)
            loss = torch.stack([(p * wanted.to(p)).sum() for p, wanted in pairs]).sum()
            loss.backward()  # the gradient is what was drawn, wherever an optimizer asks for it
            return loss

        optimizer.step(closure)
    ways = [(p.detach() - old).double().flatten().cpu() for p, old in zip(net.parameters(), first, strict=True)]
    return torch.cat(ways)


def optimizers(device: str, small: bool) -> Iterator[str]:
    yield "| optimizer | float32 | bfloat16 | |"
    yield "| --- | ---: | ---: | --- |"
    names = [entry.name for entry in registry.entries("optimizers") if not entry.error]
    for name in names[:6] if small else names:
        cells, note = [], ""
        try:
            exact = walked(name, torch.float64, "cpu")
            for dtype in (torch.float32, torch.bfloat16):
                apart = ((walked(name, dtype, device) - exact).norm() / exact.norm()).item()
                cells.append(f"{apart:.1e}")
                note = note or ("**far off**" if dtype is torch.float32 and not apart < CLOSE else "")
        except Exception as error:  # whatever an optimizer does not take
            note = brief(error)
        yield f"| {name} | {' | '.join([*cells, '–', '–'][:2])} | {note} |"


def clock(device: str) -> float:
    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


def median_time(call: Callable[[], Any], device: str, repeats: int) -> float:
    """Seconds of a call, after three that nobody counts."""
    times = []
    for _ in range(repeats + 3):
        started = clock(device)
        call()
        times.append(clock(device) - started)
    return statistics.median(times[3:])


def steps(device: str, small: bool) -> Iterator[str]:
    yield "| optimizer | ms | × torch AdamW (fused) |"
    yield "| --- | ---: | ---: |"
    names = ["torch AdamW (fused)", "torch AdamW (foreach)", "peft Riemannian AdamW"]
    names += ["ScaledAdamW", "BoundedAdamW", "AlphaAdam"]
    base = float("nan")
    for name in names[:4] if small else names:
        try:
            net = optimizer_step.model("sd15", 4 if small else 16).to(device)
            made = optimizer_step.OPTIMIZERS[name](net)
            kept = [(parameter, parameter.grad.clone()) for parameter in net.parameters()]

            def step(made: Optimizer = made, kept: list[Any] = kept) -> None:
                for parameter, grad in kept:  # scaling replaces gradients
                    parameter.grad.copy_(grad)
                made.step()

            taken = median_time(step, device, 3 if small else 30)
            base = taken if name == names[0] else base
            yield f"| {name} | {taken * 1e3:.2f} | {taken / base:.2f} |"
        except Exception as error:  # fused AdamW is not for every device
            yield f"| {name} | – | {brief(error)} |"
    yield ""
    yield from layers(device, small)


def layers(device: str, small: bool) -> Iterator[str]:
    """A LoRA layer in float32, as peft has it and as it is trained here."""
    from peft import LoraConfig, inject_adapter_in_model

    from equipoise.pipelines.training.fused_lora import fuse

    width, rows = (256, 64) if small else (3072, 4096)
    times = []
    for fused in (False, True):
        net = nn.Sequential(nn.Linear(width, width)).requires_grad_(False)
        inject_adapter_in_model(LoraConfig(r=16, target_modules=["0"]), net)
        if fused:
            fuse(net)
        net.to(device).train()
        given = torch.randn(rows, width, device=device, requires_grad=True)
        times.append(median_time(lambda net=net, given=given: net(given).sum().backward(), device, 3 if small else 20))
    theirs, ours = times
    what = f"A layer of {width} × {width} with factors of rank 16, {rows} rows"
    yield f"{what}: {theirs * 1e3:.2f} ms by peft, {ours * 1e3:.2f} ms here (× {ours / theirs:.2f})."


def run(words: list[str], folder: Path) -> None:
    """In a process of its own: one tuning, and what was measured of it, as JSON in the folder."""
    from equipoise.pipelines.cli import main
    from equipoise.pipelines.runs.run import Run

    times, metric = [], Run.metric

    def watched(run: Run, step: int, **values: float) -> None:
        times.append(time.time())
        metric(run, step, **values)

    started, Run.metric = time.time(), watched
    code = main(["train", "text_to_image/dreambooth", *words, "--id", "measured"])
    if code or len(times) < 2:
        sys.exit(code or 1)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
    if torch.cuda.is_available():
        peak = torch.cuda.max_memory_allocated()
    result = json.loads((folder / "runs" / "measured" / "result" / "result.json").read_text())
    last = times[len(times) // 2 :]
    found = {"first": times[0] - started, "speed": (len(last) - 1) / (last[-1] - last[0]) if len(last) > 1 else 0}
    found |= {"peak": peak, "before": result["loss_before"], "after": result["loss_after"]}
    (folder / "found.json").write_text(json.dumps(found))


def child(words: list[str], device: str, seconds: float) -> dict[str, float]:
    """What `run` finds.

    Raises:
        RuntimeError: The run fails, with its last line.
        subprocess.TimeoutExpired: It takes longer.
    """
    with tempfile.TemporaryDirectory() as temporary:
        environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if device == "cpu" else {})
        command = [sys.executable, __file__, "--child", temporary, *words, f"runs={temporary}/runs"]
        done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=seconds)
        if done.returncode:
            raise RuntimeError((done.stderr.strip().splitlines() or ["no reason is given"])[-1])
        return json.loads((Path(temporary) / "found.json").read_text())


def runs(args: argparse.Namespace, deadline: float) -> Iterator[str]:
    yield "| run | first step, s | steps/s | peak memory, MiB | loss before | after |"
    yield "| --- | ---: | ---: | ---: | ---: | ---: |"
    count, kinds = (4, list(RUNS)[:1]) if args.small else (40, list(RUNS))
    shared = [f"model={args.model}", f"data={args.data}", f"data.resolution={args.resolution}", f"steps={count}"]
    shared += ["samples.prompts=[]", "batch=2", "learning_rate=1e-3", "rank=8", "checkpoint.every=0"]
    shared += [] if args.data == "demo" else ["data.instance_prompt=a photo of sks object"]
    shared += ["data.instance_prompt=null"] if args.data == "demo" else []
    for kind in kinds:
        left = deadline - time.monotonic()
        if left < 5:
            yield f"| {kind} | not reached in {MINUTES} minutes | | | | |"
            continue
        try:
            found = child([*shared, *RUNS[kind]], args.device, left)
            speed, peak = f"{found['speed']:.2f}", f"{found['peak'] / 2**20:.0f}"
            yield f"| {kind} | {found['first']:.1f} | {speed} | {peak} | {found['before']:.4f} | {found['after']:.4f} |"
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            yield f"| {kind} | {brief(error)} | | | | |"


def beside(args: argparse.Namespace, deadline: float) -> Iterator[str]:
    """The other benchmark's own tables."""
    command = [sys.executable, str(Path(__file__).with_name("text_to_image.py")), "--script", args.script]
    command += ["--model", args.model, "--resolution", str(args.resolution), "--steps", "20", "--repeats", "1"]
    environment = os.environ | ({"CUDA_VISIBLE_DEVICES": ""} if args.device == "cpu" else {})
    left = max(5.0, deadline - time.monotonic())
    with suppress(subprocess.TimeoutExpired):
        done = subprocess.run([*command, "--variants"], env=environment, capture_output=True, text=True, timeout=left)
        yield done.stdout if not done.returncode else brief(done.stderr[-300:])
        return
    yield f"Not reached in {MINUTES} minutes."


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--device", choices=("cuda", "cpu"), default="cuda")
    parser.add_argument("--small", action="store_true", help="few of everything, to see that it runs")
    parser.add_argument("--model", default="demo", help="a base for the runs; `demo` is the embedded one")
    parser.add_argument("--data", default="demo", help="a folder of pictures for the runs")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--script", help="diffusers' examples/text_to_image/train_text_to_image_lora.py")
    parser.add_argument("--output", type=Path, help="a file for the tables, which are printed in any case")
    parser.add_argument("--child", type=Path, help=argparse.SUPPRESS)
    args, words = parser.parse_known_args()
    if args.child:
        return run(words, args.child)
    if words:
        parser.error(f"unrecognized arguments: {' '.join(words)}")
    if args.device == "cuda" and not torch.cuda.is_available():
        parser.error("there is no CUDA device here. --device cpu --small shows that the script runs.")
    deadline = time.monotonic() + 60 * MINUTES
    card = torch.cuda.get_device_name() if args.device == "cuda" else "a processor, in small: no measurement"
    parts: dict[str, Callable[[], Iterator[str]]] = {
        "Optimizers, beside float64": lambda: optimizers(args.device, args.small),
        "Step": lambda: steps(args.device, args.small),
        "Runs": lambda: runs(args, deadline - (120 if args.script else 0)),
        "Beside diffusers' script": lambda: beside(args, deadline) if args.script else iter(["No --script was given."]),
    }
    lines = [f"# On {card}", "", f"torch {torch.__version__}; `python benchmarks/gpu.py {' '.join(sys.argv[1:])}`"]
    print("\n".join(lines))
    for title, part in parts.items():
        for line in ["", f"## {title}", "", *part()]:
            lines.append(line)
            print(line, flush=True)
    if args.output:
        args.output.write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
