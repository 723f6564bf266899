"""What `equipoise wrap` adds to the start of a Python that trains nothing: interleaved medians, in milliseconds.

python benchmarks/python_start.py [--rounds 40] [--torch]
"""

import argparse
import os
import subprocess
import sys
import time
from statistics import median

from equipoise.hosts.wrap import VARIABLE, environment

PROGRAMS = {"nothing": "pass", "argparse, json, subprocess": "import argparse, json, subprocess"}


def start(program: str, env: dict[str, str]) -> float:
    """Milliseconds from starting a Python to its end."""
    begun = time.perf_counter()
    subprocess.run([sys.executable, "-c", program], env=env, check=True)
    return 1e3 * (time.perf_counter() - begun)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=40, help="starts of each kind (default: %(default)s)")
    parser.add_argument("--torch", action="store_true", help="also a program that imports torch: takes minutes")
    args = parser.parse_args()
    plain = {key: value for key, value in os.environ.items() if key not in ("PYTHONPATH", VARIABLE)}
    wrapped = environment("scaled_adamw", {"damping": "1e-2"}, plain)
    programs = {**PROGRAMS, **({"torch": "import torch"} if args.torch else {})}
    print(f"Python {sys.version.split()[0]}, {args.rounds} starts of each, interleaved; medians in ms\n")
    print("| the program imports | plain | wrapped | difference |\n| --- | --- | --- | --- |")
    for name, program in programs.items():
        times: dict[bool, list[float]] = {False: [], True: []}
        for number in range(2 * args.rounds + 2):
            took = start(program, wrapped if number % 2 else plain)
            if number > 1:  # the first of each warms the caches
                times[bool(number % 2)].append(took)
        before, after = median(times[False]), median(times[True])
        print(f"| {name} | {before:.1f} | {after:.1f} | {after - before:+.1f} |", flush=True)


if __name__ == "__main__":
    main()
