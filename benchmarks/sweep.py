"""What ten cells of a sweep cost beside ten separate runs of the same configurations, each in a new process.

    python benchmarks/sweep.py                 ten learning rates, 10 steps each, on the embedded base
    python benchmarks/sweep.py --steps 100
    python benchmarks/sweep.py --compile --cells 4        with train.compile, each run compiling from nothing

Both train without samples and without a comparison, one after the other on the same cores; half of the runs come before
the sweep and half after it, so that a machine whose speed changes changes it for both. Latents are on disk for all but
the first of either kind.
"""

import argparse
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

RATES = [1e-5, 3e-5, 1e-4, 3e-4, 1e-3, 2e-3, 3e-3, 5e-3, 7e-3, 1e-2]
EQUIPOISE = [sys.executable, "-m", "equipoise.pipelines.cli"]


def seconds(words: list[str]) -> float:
    with tempfile.TemporaryDirectory() as compiled:
        environment = {**os.environ, "TORCHINDUCTOR_CACHE_DIR": compiled}
        started = time.perf_counter()
        subprocess.run([*EQUIPOISE, *words], check=True, capture_output=True, env=environment)
        return time.perf_counter() - started


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=10)
    parser.add_argument("--cells", type=int, default=len(RATES))
    parser.add_argument("--compile", action="store_true", help="train.compile=true")
    parser.add_argument("--repeats", type=int, default=1, help="of all of it")
    args = parser.parse_args()
    common = ["text_to_image/demo", f"steps={args.steps}", "samples.prompts=[]", "train.give_up=0"]
    common += [f"train.compile={args.compile}"]
    rates = RATES[: args.cells]
    alone: list[float] = []
    together: list[float] = []
    for _ in range(args.repeats):
        with tempfile.TemporaryDirectory() as folder:
            runs, sweep = Path(folder, "alone"), Path(folder, "together")

            def train(rates: list[float], runs: Path = runs) -> list[float]:
                return [seconds(["train", *common, f"learning_rate={rate}", f"runs={runs}"]) for rate in rates]

            first = train(rates[: len(rates) // 2])
            axis = ",".join(map(str, rates))
            words = ["--axis", f"learning_rate={axis}", "--workers", "1", "--no-compare"]
            together.append(seconds(["sweep", *common, *words, f"runs={sweep}"]))
            cold = first + train(rates[len(rates) // 2 :])
            alone.append(sum(cold))
            print(f"one run alone: {statistics.median(cold):.1f} s, the median of {len(cold)}", flush=True)
    one, ten = statistics.median(alone), statistics.median(together)
    print(f"{len(rates)} runs of {args.steps} steps, {os.cpu_count()} cores\n\n| | seconds | |\n| --- | ---: | ---: |")
    print(f"| {len(rates)} separate runs | {one:.1f} | 1.00 |")
    print(f"| one sweep of {len(rates)} cells | {ten:.1f} | {ten / one:.2f} |")


if __name__ == "__main__":
    main()
