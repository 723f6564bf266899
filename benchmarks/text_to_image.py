"""Tuning by `equipoise train` beside diffusers' train_text_to_image_lora.py: speed, memory, and the same loss curve.

    python benchmarks/text_to_image.py --script PATH      PATH is your copy of diffusers' script
    python benchmarks/text_to_image.py --script PATH --model FOLDER --resolution 512

Both tune the same base on the same twelve captioned pictures: resolution, batch, rank, targets, steps, AdamW and its
settings, and the initial factors are equal (the script's, which `lora.start` reads). Each run is a process of its own;
the two take turns, and medians are told:

    steps per second   of the steps after the first tenth; the script encodes pictures and captions anew at each step.
                       By the wall clock, and by the process's own processor time, for machines that are not quiet
    first step         seconds from the process's start until the first loss is known
    peak memory        of the process, or of the CUDA device's tensors where there is one
    final loss         mean loss of the last tenth of the steps, and so of different draws

Both take AdamW by their defaults. Equipoise's runs on torch's fused kernel, for which the script has no option; a third
row has Equipoise without it, a fourth with train.compile, each time compiled from nothing.

Then both run once more with equal draws: in place of the script's own, it is given the order of pictures, the latents'
draws, the noise and the timesteps that Equipoise takes from (seed, step). The loss curves must then be the same.

The script is run as it is. It clips nothing: its iterator over the parameters is used up by the optimizer, and so
Equipoise is told to clip nothing. It imports torchvision.transforms; where torchvision is not installed, a stand-in
with what it uses of that is put in place, PIL's resizing behind it as behind the real one.
"""

import argparse
import json
import os
import resource
import runpy
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from types import ModuleType, SimpleNamespace
from typing import Any

SEED, RANK, RATE = 0, 4, 1e-3
TARGETS = ["to_k", "to_q", "to_v", "to_out.0"]  # the script's
VARIANTS = {"without fused": "optimizer.options={fused: false}", "compiled": "train.compile=true"}
STARTED = float(os.environ.get("BENCHMARK_STARTED", 0))  # when the parent began this process


class Record:
    """What a child tells: when each loss was known, and what it was."""

    def __init__(self, file: Path):
        self.file, self.losses, self.times, self.cpu = file, [], [], []

    def add(self, loss: float) -> None:
        self.times.append(time.time() - STARTED)
        self.cpu.append(time.process_time())
        self.losses.append(loss)

    def write(self) -> None:
        import torch

        peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * 1024
        if torch.cuda.is_available():
            peak = torch.cuda.max_memory_allocated()
        told = {"losses": self.losses, "wall": self.times, "cpu": self.cpu, "peak": peak}
        self.file.write_text(json.dumps(told))


def script(args: argparse.Namespace, work: Path) -> None:
    """In a process of its own: diffusers' script, listened to, and in the equal run given Equipoise's draws."""
    import datasets  # before the stand-in, so that nobody takes it for torchvision
    import diffusers
    import peft
    import safetensors.torch
    import transformers
    from accelerate import Accelerator

    transformers.utils.is_torchvision_available()
    assert datasets and diffusers.StableDiffusionPipeline and transformers.CLIPTextModel
    try:
        import torchvision  # noqa: F401  only whether it is there
    except ImportError:
        stand_in()
    record = Record(work / "told.json")
    Accelerator.log = lambda self, values, step=None, log_kwargs=None: record.add(values["train_loss"])
    add_adapter = diffusers.UNet2DConditionModel.add_adapter

    def adapted(unet: Any, *given: Any) -> None:
        add_adapter(unet, *given)
        factors = peft.get_peft_model_state_dict(unet)
        safetensors.torch.save_file(
            {f"unet.{name}": tensor.contiguous() for name, tensor in factors.items()}, work / "start.safetensors"
        )

    diffusers.UNet2DConditionModel.add_adapter = adapted
    if args.equal:
        equal_draws(args, work)
    sys.argv = [
        args.script,
        f"--pretrained_model_name_or_path={args.model}",
        f"--train_data_dir={work.parent / 'pictures'}",
        f"--resolution={args.resolution}",
        "--center_crop",
        f"--train_batch_size={args.batch}",
        f"--max_train_steps={args.steps}",
        f"--learning_rate={RATE}",
        f"--rank={RANK}",
        "--lr_scheduler=constant",
        "--lr_warmup_steps=0",
        f"--seed={SEED}",
        "--caption_column=text",
        "--checkpointing_steps=1000000",
        f"--output_dir={work / 'output'}",
        f"--cache_dir={work / 'cache'}",
    ]
    runpy.run_path(args.script, run_name="__main__")
    record.write()


def stand_in() -> None:
    import numpy as np
    import torch
    from PIL import Image, ImageOps

    def resize(side: int, interpolation: int):
        def apply(image: Image.Image) -> Image.Image:
            scale = side / min(image.size)
            size = tuple(side if length == min(image.size) else int(length * scale) for length in image.size)
            return image.resize(size, Image.Resampling(interpolation))

        return apply

    def cut(side: int):
        return lambda image: ImageOps.fit(image, (side, side)) if image.size != (side, side) else image

    def compose(steps: list):
        def apply(image):
            for step in steps:
                image = step(image)
            return image

        return apply

    module, transforms = ModuleType("torchvision"), ModuleType("torchvision.transforms")
    transforms.__dict__.update(
        InterpolationMode=SimpleNamespace(LANCZOS=1, BILINEAR=2, BICUBIC=3),
        Compose=compose,
        Resize=resize,
        CenterCrop=cut,
        Lambda=lambda function: function,
        ToTensor=lambda: lambda image: torch.from_numpy(np.array(image)).permute(2, 0, 1).float() / 255,
        Normalize=lambda mean, deviation: lambda pixels: (pixels - mean[0]) / deviation[0],
    )
    module.__dict__.update(transforms=transforms)
    sys.modules |= {"torchvision": module, "torchvision.transforms": transforms}


def equal_draws(args: argparse.Namespace, work: Path) -> None:
    """From here on, what the script draws is what Equipoise draws."""
    import torch
    from diffusers.models.autoencoders.vae import DiagonalGaussianDistribution

    from equipoise.pipelines.text_to_image.buckets import BucketBatches
    from equipoise.pipelines.text_to_image.config import NoiseSection
    from equipoise.pipelines.text_to_image.families import family
    from equipoise.pipelines.text_to_image.families.noise import load_scheduler, make_noise
    from equipoise.pipelines.training.state import mix

    kind = family("StableDiffusionPipeline")
    way = make_noise(kind, load_scheduler(kind, args.model), NoiseSection())
    pictures = len(list((work.parent / "pictures").glob("*.png")))
    batches = BucketBatches([1] * pictures, [(1, 1)] * pictures, args.batch, SEED)
    drawn: dict[str, Any] = {"step": 0}
    randn_like, randint = torch.randn_like, torch.randint

    def sample(posterior: Any, generator: Any = None) -> torch.Tensor:
        own = torch.Generator().manual_seed(mix(SEED, drawn["step"], 0, 0))
        drawn["step"] += 1
        randint(1, (args.batch,), generator=own)  # which variant of each picture: there is one
        latents = posterior.mean + posterior.std * torch.randn(posterior.mean.shape, generator=own)
        drawn["noise"], drawn["times"] = way.draw(latents.shape, own)
        return latents

    DiagonalGaussianDistribution.sample = sample
    torch.randn_like = lambda like, **more: drawn.pop("noise") if "noise" in drawn else randn_like(like, **more)
    torch.randint = lambda *given, **more: drawn.pop("times") if "times" in drawn else randint(*given, **more)

    class Ordered(torch.utils.data.DataLoader):
        def __init__(self, dataset: Any, collate_fn: Any, **_: Any):
            order = [batches[step] for step in range(args.steps)]
            super().__init__(dataset, collate_fn=collate_fn, batch_sampler=order)

    torch.utils.data.DataLoader = Ordered


def equipoise(args: argparse.Namespace, work: Path) -> None:
    """In a process of its own: `equipoise train`, listened to."""
    from equipoise.pipelines.cli import main
    from equipoise.pipelines.runs.run import Run

    record = Record(work / "told.json")
    metric = Run.metric

    def told(run: Run, step: int, **values: float) -> None:
        record.add(values["loss"])
        metric(run, step, **values)

    Run.metric = told
    given = {
        "model": args.model,
        "data": work.parent / "pictures",
        "data.resolution": args.resolution,
        "data.instance_prompt": "null",
        "batch": args.batch,
        "steps": args.steps,
        "optimizer": "adamw",
        "learning_rate": RATE,
        "rank": RANK,
        "lora.targets": f"[{', '.join(TARGETS)}]",
        "lora.start": args.start,
        "train.clip": 0,
        "train.give_up": 0,
        "seed": SEED,
        "samples.prompts": "[]",
        "checkpoint.every": 0,
        "runs": work / "runs",
    }
    words = [*(f"{key}={value}" for key, value in given.items()), *([args.more] if args.more else [])]
    code = main(["train", "text_to_image/dreambooth", *words])
    record.write()
    sys.exit(code)


def child(which: str, args: argparse.Namespace, work: Path, equal: bool = False, start: Path | None = None) -> dict:
    work.mkdir(parents=True)
    more = VARIANTS.get(which, "")
    command = [
        sys.executable,
        __file__,
        "--child",
        "equipoise" if more else which,
        "--work",
        work,
        "--script",
        args.script,
    ]
    command += ["--model", args.model, "--resolution", args.resolution, "--batch", args.batch, "--steps", args.steps]
    command += ["--equal"] if equal else []
    command += ["--more", more] if more else []
    command += ["--start", start] if start else []
    environment = {**os.environ, "BENCHMARK_STARTED": str(time.time()), "HF_DATASETS_CACHE": str(work / "datasets")}
    environment["TORCHINDUCTOR_CACHE_DIR"] = str(work / "compiled")
    done = subprocess.run([str(word) for word in command], env=environment, capture_output=True, text=True)
    if done.returncode:
        raise SystemExit(f"{which} failed:\n{done.stderr[-3000:]}")
    return json.loads((work / "told.json").read_text())


def figures(told: dict) -> tuple[float, ...]:
    wall, cpu, losses = told["wall"], told["cpu"], told["losses"]
    skipped = max(1, len(losses) // 10)
    speeds = [(len(losses) - 1 - skipped) / (times[-1] - times[skipped]) for times in (wall, cpu)]
    return *speeds, wall[0], cpu[0], told["peak"] / 2**20, statistics.mean(losses[-skipped:])


def prepare(folder: Path, resolution: int) -> None:
    """The embedded base's six pictures of an object, twice, at the resolution asked for: an epoch is whole batches."""
    from PIL import Image

    from equipoise.pipelines import demo

    source = demo.pictures_folder(folder / "drawn")
    (folder / "pictures").mkdir()
    lines = []
    for line in map(json.loads, (source / "metadata.jsonl").read_text().splitlines()):
        for copy in "ab":
            name = f"{copy}-{line['file_name']}"
            with Image.open(source / line["file_name"]) as picture:
                picture.convert("RGB").resize((resolution, resolution)).save(folder / "pictures" / name)
            lines.append(json.dumps({"file_name": name, "text": line["text"]}))
    (folder / "pictures" / "metadata.jsonl").write_text("\n".join(sorted(lines)) + "\n")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--script", required=True, help="diffusers' examples/text_to_image/train_text_to_image_lora.py")
    parser.add_argument("--model", default="demo", help="a Stable Diffusion checkpoint; `demo` is the embedded one")
    parser.add_argument("--resolution", type=int, default=64)
    parser.add_argument("--batch", type=int, default=4)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--variants", nargs="*", choices=VARIANTS, default=list(VARIANTS), help="further rows")
    for hidden in ("--child", "--work", "--start", "--more"):
        parser.add_argument(hidden, help=argparse.SUPPRESS)
    parser.add_argument("--equal", action="store_true", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.child:
        return {"script": script, "equipoise": equipoise}[args.child](args, Path(args.work))
    if args.model == "demo":
        from equipoise.pipelines import demo

        args.model = str(demo.base_folder())
    more = {name: VARIANTS[name] for name in args.variants}
    names = ["script", "equipoise", *more]
    found: dict[str, list[tuple[float, ...]]] = {name: [] for name in names}
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        prepare(folder, args.resolution)
        start = folder / "equal-script" / "start.safetensors"
        curves = {name: child(name, args, folder / f"equal-{name}", True, start)["losses"] for name in names[:2]}
        for repeat in range(args.repeats):
            for name in names if repeat % 2 else reversed(names):
                found[name].append(figures(child(name, args, folder / f"{repeat}-{name}", start=start)))
    pairs = list(zip(*curves.values(), strict=True))
    apart = max(abs(one - other) / one for one, other in pairs)
    side = f"{args.resolution}×{args.resolution}"
    print(f"{side}, batch {args.batch}, rank {RANK}, {args.steps} steps, medians of {args.repeats}")
    print("| | steps/s | steps per CPU s | first step, s | first step, CPU s | peak memory, MiB | final loss |")
    print("| --- | ---: | ---: | ---: | ---: | ---: | ---: |")
    middle = {name: [statistics.median(values) for values in zip(*rows, strict=True)] for name, rows in found.items()}
    titles = ["train_text_to_image_lora.py", "equipoise train", *(f"the same, `{words}`" for words in more.values())]
    for name, title in zip(names, titles, strict=True):
        speed, per_cpu, first, first_cpu, peak, loss = middle[name]
        print(f"| {title} | {speed:.2f} | {per_cpu:.2f} | {first:.1f} | {first_cpu:.1f} | {peak:.0f} | {loss:.4f} |")
    for name, title in zip(names[1:], titles[1:], strict=True):
        ratios = [ours / theirs for ours, theirs in zip(middle[name], middle["script"], strict=True)]
        print(f"| {title}: × | {' | '.join(f'{ratio:.2f}' for ratio in ratios[:-1])} | |")
    print(f"With equal draws, {len(pairs)} losses differ by {apart:.1e} of their size at most.")


if __name__ == "__main__":
    main()
