"""What looking at the data costs before a run, and the self-check, on the embedded model.

    python benchmarks/checking.py                   # 400 photographs of 1024 × 768 and 768 × 1024; --pictures 2000
    python benchmarks/checking.py --format png

"first": nothing is known of the files. "one more": a conversation about one more picture was added since. "again":
nothing changed. Each is done in a process of its own; the seconds are of processor time, of all threads, without the
imports. Prints a Markdown table.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from PIL import Image

from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning import InstructionTuning
from equipoise.pipelines.instruction_tuning.examples import load_examples
from equipoise.pipelines.instruction_tuning.model import load_model, load_processor, model_type
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.instruction_tuning.verify import verify

SIZES = (1024, 768), (768, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400)
    parser.add_argument("--format", choices=("jpg", "png"), default="jpg")
    parser.add_argument("--only", nargs=2, metavar=("WHAT", "FOLDER"), help="time one of them, and print the seconds")
    words = parser.parse_args()
    if words.only:
        return print(timed(words.only[0], Path(words.only[1])))
    print("| | s | per picture, ms |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        (Path(name) / "runs").mkdir()
        for what, more in (("check, first", 0), ("check, one more", 1), ("check, again", 1), ("self-check", None)):
            if more is not None:
                write(Path(name), words.pictures + more, words.format)
            command = [sys.executable, __file__, "--only", what, name]
            seconds = float(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
            each = "" if more is None else f"{1000 * seconds / (words.pictures + more):.1f}"
            print(f"| {what} | {seconds:.2f} | {each} |", flush=True)


def timed(what: str, folder: Path) -> float:
    """The seconds that one of the rows takes in this process."""
    run = self_check(folder) if what == "self-check" else check(folder)
    started = time.process_time()
    run()
    return time.process_time() - started


def check(folder: Path) -> Callable[[], object]:
    made = config.load("instruction_tuning/demo", [f"data={folder / 'talk.jsonl'}", f"runs={folder / 'runs'}"])

    def run() -> None:
        assert InstructionTuning.check(made) == []

    return run


def self_check(folder: Path) -> Callable[[], object]:
    """Of the demo's own conversations."""
    made = config.load("instruction_tuning/demo", [f"runs={folder / 'runs'}"])
    talk, model = Talk(load_processor(made.model), model_type(made.model)), load_model(made.model, "no")
    kept, _, _ = load_examples(made, talk)
    return lambda: verify(talk, model, kept, made.train.batch)


def write(folder: Path, count: int, ending: str) -> None:
    """Questions about so many pictures, of which those that are there stay."""
    lines = []
    for number in range(count):
        path = folder / f"{number}.{ending}"
        if not path.exists():
            blurred = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(blurred).resize(SIZES[number % 2], Image.Resampling.BICUBIC).save(
                path, quality=90, compress_level=1
            )
        asked = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Picture {number}."}]
        lines.append(json.dumps({"image": path.name, "conversations": asked}))
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
