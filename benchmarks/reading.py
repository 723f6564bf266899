"""What reading conversations costs a step of instruction tuning, and what threads that read ahead gain.

    python benchmarks/reading.py                    # the embedded model; --steps 100, --workers 0 1 2

Prints a Markdown table: the median step, and the part of it in which batches are made where no thread does it.
"""

import argparse
import statistics
import tempfile
import time

from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.ahead import BatchesAhead
from equipoise.pipelines.pipeline import execute
from equipoise.pipelines.runs.store import Store


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--steps", type=int, default=60)
    parser.add_argument("--workers", type=int, nargs="+", default=[0, 1, 2])
    args = parser.parse_args()
    waited: list[float] = []  # seconds for each batch
    get = BatchesAhead.get

    def timed(batches: BatchesAhead, number: int) -> dict:
        started = time.perf_counter()
        found = get(batches, number)
        waited.append(time.perf_counter() - started)
        return found

    BatchesAhead.get = timed
    print("| workers | ms per step | of it waiting for a batch |\n| --- | --- | --- |")
    with tempfile.TemporaryDirectory() as folder:
        for workers in args.workers:
            words = [f"runs={folder}", f"steps={args.steps}", f"train.workers={workers}", "samples.count=1"]
            settings = config.load("instruction_tuning/demo", [*words, "coordinator=constant"])
            run = Store(settings.runs).create(settings)
            waited.clear()
            execute(InstructionTuning, settings, run)
            step = statistics.median(record["seconds"] for record in run.metrics())
            print(f"| {workers} | {1000 * step:.0f} | {statistics.median(waited) / step:.0%} |", flush=True)


if __name__ == "__main__":
    main()
