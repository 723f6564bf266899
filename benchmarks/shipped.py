"""What the shipped configurations do: the tables of README.md, docs/audio_visual.md and docs/ui.md.

python benchmarks/shipped.py demo           `equipoise demo`: learned and kept, by optimizer and rate
python benchmarks/shipped.py audio_visual   `equipoise train audio_visual/demo`: accuracies with MIMO and without
python benchmarks/shipped.py memory         the memory that the page estimates, beside what four steps took
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path

from equipoise import registry
from equipoise.pipelines import config as configs
from equipoise.pipelines.comparing.comparison import Comparison

CLIPS = "the same, `batch=256 data.visual.size=128 model.visual.widths=[64,128,256]`"
CONFIGURATIONS = {  # what is printed of each, and its words
    "`text_to_image/demo`": ["text_to_image/demo"],
    "the same, `batch=128`": ["text_to_image/demo", "batch=128"],
    "`instruction_tuning/demo`, for 128 tokens; its own are fewer": ["instruction_tuning/demo"],
    "`audio_visual/demo`": ["audio_visual/demo"],
    CLIPS: ["audio_visual/demo", "batch=256", "data.visual.size=128", "model.visual.widths=[64,128,256]"],
}


def equipoise(*words: str) -> None:
    subprocess.run([sys.executable, "-m", "equipoise.pipelines.cli", *words], check=True, stdout=sys.stderr)


def demo(runs: Path) -> None:
    equipoise("demo", "--runs", str(runs))
    print(learned_and_kept(Comparison.read(next(runs.glob("*/comparison")))))


def learned_and_kept(found: Comparison) -> str:
    rates, names = found.rates, {"adamw": "AdamW", "bounded_adamw": "bounded AdamW"}
    lines = [f"| learned, kept at a learning rate of | {' | '.join(map(found.shown, rates))} | usable range |"]
    lines.append("| --- |" + " --- |" * (len(rates) + 1))
    for row, usable in found.ranges().items():
        name, *options = row.replace("=", " ").split(" ")
        pairs = ", ".join(map(" ".join, zip(options[::2], options[1::2], strict=True)))
        points = {point.rate: f"{point.score:.2g}, {point.kept:.2g}" for point in found.points(row)}
        cells = [f"{names[name]} ({pairs})" if pairs else names[name], *(points[rate] for rate in rates)]
        until = str(usable).replace(" (", " and beyond (") if usable and usable.open_high else str(usable or "none")
        lines.append(f"| {' | '.join([*cells, until])} |")
    return "\n".join(lines)


def audio_visual(runs: Path) -> None:
    equipoise("train", "audio_visual/demo", f"runs={runs}")
    mimo = json.loads(next(runs.glob("*/result/result.json")).read_text())
    print("| | joint | audio | visual |\n| --- | --- | --- | --- |")
    for name, figures in (("`joint` (MML)", mimo["baselines"]["joint"]), ("`mimo`", mimo)):
        cells = [f"{figures[f'accuracy_{which}']:.1%}".replace("%", " %") for which in ("joint", "audio", "visual")]
        print(f"| {name} | {' | '.join(cells)} |")


def memory(runs: Path) -> None:
    print("| configuration | estimate | measured |\n| --- | --- | --- |")
    for name, (configuration, *words) in CONFIGURATIONS.items():
        config = configs.load(configuration, [*words, "steps=4"])
        estimate = registry.load("pipelines", config.pipeline).estimate_memory(config)
        folder = Path(tempfile.mkdtemp(dir=runs))
        equipoise("train", configuration, *words, "steps=4", f"runs={folder}")
        held = json.loads(next(folder.glob("*/status.json")).read_text())["memory"]
        print(f"| {name} | {estimate.total / 1e9:.2f} GB | {held / 1e9:.2f} GB |", flush=True)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    tables = {"demo": demo, "audio_visual": audio_visual, "memory": memory}
    parser.add_argument("table", choices=tables)
    with tempfile.TemporaryDirectory() as folder:
        tables[parser.parse_args().table](Path(folder))


if __name__ == "__main__":
    main()
