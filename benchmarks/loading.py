"""How much of an audio-visual training step is waiting for the batch, with features that are on disk already.

    python benchmarks/loading.py
    python benchmarks/loading.py --configuration crema_d --batch 8 --steps 3 --clips 48

The configurations are those of `audio_visual/`: the demo's, on its drawn digits, whose steps are so short that waiting
would show; or CREMA-D's, two ResNet-18s on 3 s of sound (257 × 188 numbers) and a picture of 224 × 224, on made clips.
"in memory": as they are kept where all of them fit; "from disk": every batch is read while the step before it is
computed. Waiting includes flips and shifts. The last line is the reader by itself: by it, one can tell from how fast a
device on it would have to wait.

Prints a Markdown table. Files that were written a moment ago come from the system's cache, not from the disk itself.
"""

import argparse
import csv
import statistics
import tempfile
import time
from pathlib import Path

import numpy as np
import soundfile
import torch
from PIL import Image

from equipoise.pipelines import config as configs
from equipoise.pipelines.audio_visual import features
from equipoise.pipelines.audio_visual.config import AudioVisualConfig
from equipoise.pipelines.audio_visual.prepared import prepare
from equipoise.pipelines.audio_visual.train import AudioVisualWork
from equipoise.pipelines.training.state import make_accelerator

RATE, SECONDS, SIDE = 22050, 3, 224


def make_clips(folder: Path, count: int) -> Path:
    """Noise in two classes, a few clips of each for the test, and their manifest."""
    rng = np.random.default_rng(0)
    rows = []
    for index in range(count + 4):
        soundfile.write(folder / f"{index}.wav", 0.1 * rng.standard_normal(RATE * SECONDS), RATE)
        Image.fromarray(rng.integers(0, 256, (SIDE, SIDE, 3), dtype=np.uint8)).save(folder / f"{index}.jpg")
        rows.append([f"{index}.wav", f"{index}.jpg", index % 2, "train" if index < count else "test"])
    with (folder / "manifest.csv").open("w", newline="") as file:
        csv.writer(file).writerows([["audio", "frames", "label", "split"], *rows])
    return folder / "manifest.csv"


class Quiet:
    """What a training asks of a run, where there is none."""

    def log(self, text: str) -> None: ...


def measure(config: AudioVisualConfig, memory: int, steps: int) -> tuple[float, float]:
    """Median seconds of a step, and of waiting in it."""
    features.MEMORY = memory
    work = AudioVisualWork(config, Quiet(), make_accelerator("no"), prepare(config))  # type: ignore[arg-type]
    times = []
    for step in range(steps + 1):
        started = time.perf_counter()
        waited = work.step(step)["loading"]
        times.append((time.perf_counter() - started, waited))
    whole, waiting = (statistics.median(values) for values in zip(*times[1:], strict=True))
    return whole, waiting


def main() -> None:
    parser = argparse.ArgumentParser(description="waiting for batches")
    parser.add_argument("--configuration", choices=("demo", "crema_d"), default="demo")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--steps", type=int, default=40, help="measured, after one that is not")
    parser.add_argument("--clips", type=int, default=128, help="to be made, for crema_d")
    parser.add_argument("--threads", type=int, default=1)
    args = parser.parse_args()
    torch.set_num_threads(args.threads)
    with tempfile.TemporaryDirectory(prefix="equipoise-loading-") as place:
        folder = Path(place)
        words = {"runs": str(folder / "runs"), "train.batch": args.batch, "seed": 0}
        if args.configuration != "demo":
            words["data.manifest"] = str(make_clips(folder, args.clips))
        config = configs.set_keys(configs.load(f"audio_visual/{args.configuration}"), words, "loading")
        print(f"{args.configuration}, batch {args.batch}, {args.threads} thread(s), torch {torch.__version__}\n")
        print("| features | ms per step | ms waiting | share |\n| --- | --- | --- | --- |")
        for name, memory in (("in memory", 2 << 30), ("from disk", 0)):
            whole, waiting = measure(config, memory, args.steps)
            print(f"| {name} | {1e3 * whole:.0f} | {1e3 * waiting:.1f} | {waiting / whole:.1%} |")
        reading = read_alone(config, args.steps)
    print(f"\nThe reader alone: {1e3 * reading:.1f} ms per batch, {args.batch / reading:.0f} clips per second.")


def read_alone(config: AudioVisualConfig, steps: int) -> float:
    """Median seconds of reading a batch from disk."""
    prepared = prepare(config)
    clips = prepared.manifest.split("train")
    batches = features.Batches(prepared.store, clips)
    chosen = [index % len(clips) for index in range(config.train.batch)]
    times = []
    for _ in range(steps + 1):
        started = time.perf_counter()
        batches.get(chosen)
        times.append(time.perf_counter() - started)
    return statistics.median(times[1:])


if __name__ == "__main__":
    main()
