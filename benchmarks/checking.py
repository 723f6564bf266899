"""What looking at the data costs before a run, and the self-check, on the embedded model.

    python benchmarks/checking.py                   # 400 photographs of 1024 × 768 and 768 × 1024; --pictures 2000

"first": nothing is known of the files. "one more": a conversation about one more picture was added since. "again":
nothing changed. Each check is as in a process of its own; the seconds are of processor time, of all threads.
Prints a Markdown table.
"""

import argparse
import json
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from equipoise.pipelines import config
from equipoise.pipelines.instruction_tuning import InstructionTuning, good_media
from equipoise.pipelines.instruction_tuning.check import _talk
from equipoise.pipelines.instruction_tuning.examples import load_examples
from equipoise.pipelines.instruction_tuning.model import load_model
from equipoise.pipelines.instruction_tuning.verify import verify

SIZES = (1024, 768), (768, 1024)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--pictures", type=int, default=400)
    count = parser.parse_args().pictures
    print("| | s | per picture, ms |\n| --- | ---: | ---: |")
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        (folder / "runs").mkdir()
        made = config.load("instruction_tuning/demo", [f"data={folder / 'talk.jsonl'}", f"runs={folder / 'runs'}"])
        write(folder, count)
        timed("check, first", lambda: check(made), count)
        write(folder, count + 1)
        timed("check, one more", lambda: check(made), count)
        timed("check, again", lambda: check(made), count)
        drawn = config.load("instruction_tuning/demo", [f"runs={folder / 'runs'}"])
        talk, model = _talk(drawn), load_model(drawn.model, "no")
        kept, _, _ = load_examples(drawn, talk)
        timed("self-check of the demo", lambda: verify(talk, model, kept, drawn.train.batch), None)


def check(made: Any) -> None:
    good_media._known.clear()
    assert InstructionTuning.check(made) == []


def timed(what: str, run: Callable[[], object], count: int | None) -> None:
    started = time.process_time()
    run()
    seconds = time.process_time() - started
    print(f"| {what} | {seconds:.2f} | {f'{1000 * seconds / count:.1f}' if count else ''} |", flush=True)


def write(folder: Path, count: int) -> None:
    """Questions about so many pictures, of which those that are there stay."""
    lines = []
    for number in range(count):
        path = folder / f"{number}.jpg"
        if not path.exists():
            blurred = np.random.default_rng(number).integers(0, 256, (24, 32, 3), dtype=np.uint8)
            Image.fromarray(blurred).resize(SIZES[number % 2], Image.Resampling.BICUBIC).save(path, quality=90)
        asked = [{"from": "human", "value": "<image>\nWhat is it?"}, {"from": "gpt", "value": f"Picture {number}."}]
        lines.append(json.dumps({"image": path.name, "conversations": asked}))
    (folder / "talk.jsonl").write_text("\n".join(lines) + "\n")


if __name__ == "__main__":
    main()
