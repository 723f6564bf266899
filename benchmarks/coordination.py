"""What coordinated learning rates cost: time per step over a run, of the instruction-tuning pipeline itself.

    python benchmarks/coordination.py
    python benchmarks/coordination.py --width 512 --rounds 6 --clock cpu

A BLIP-2 with random weights (`--width`; 0: the embedded one) is tuned on drawn questions: constant rates, CoMMIT-CLR at
its defaults, and CoMMIT at several `regularize_every`. They take turns, ten steps each, so that whatever else the
machine does falls on all alike and every ten steps hold one measurement of κ; `--clock cpu` counts this process's time
alone. Prints a Markdown table.
"""

import argparse
import statistics
import sys
import tempfile
import time
from pathlib import Path

import torch

from equipoise.pipelines import config as configs
from equipoise.pipelines import demo
from equipoise.pipelines.instruction_tuning.examples import load_examples
from equipoise.pipelines.instruction_tuning.model import adapt, load_model, load_processor
from equipoise.pipelines.instruction_tuning.talk import Talk
from equipoise.pipelines.instruction_tuning.train import InstructionTuningWork
from equipoise.pipelines.runs.store import Store
from equipoise.pipelines.training.state import make_accelerator

CASES = {
    "constant rates": ("constant", {}),
    "CoMMIT-CLR (defaults)": ("commit_clr", {}),
    "CoMMIT-CLR, measure_every 1": ("commit_clr", {"measure_every": 1}),
    "CoMMIT, regularize_every 10": ("commit", {"regularize_every": 10}),
    "CoMMIT, regularize_every 4": ("commit", {"regularize_every": 4}),
    "CoMMIT, regularize_every 1": ("commit", {}),
}
TURN = 10  # steps


def widen(width: int, folder: Path) -> str:
    """A BLIP-2 of random weights with the embedded one's processor."""
    if not width:
        return demo.NAME
    from transformers import Blip2Config, Blip2ForConditionalGeneration

    settings = Blip2Config.from_pretrained(demo.multimodal_folder())
    for part, size in ((settings.vision_config, 4 * width), (settings.qformer_config, 4 * width)):
        part.hidden_size, part.intermediate_size, part.num_attention_heads = width, size, width // 64
    settings.qformer_config.encoder_hidden_size = width
    language = settings.text_config
    language.hidden_size = language.word_embed_proj_dim = width
    language.ffn_dim, language.num_attention_heads, language.num_hidden_layers = 4 * width, width // 64, 6
    torch.manual_seed(0)
    Blip2ForConditionalGeneration(settings).save_pretrained(folder)
    for name in ("processor_config.json", "tokenizer.json", "tokenizer_config.json"):
        (folder / name).write_bytes((demo.multimodal_folder() / name).read_bytes())
    return str(folder)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--width", type=int, default=256, help="of every part; 0: the embedded model (default: 256)")
    parser.add_argument("--batch", type=int, default=16)
    parser.add_argument("--rounds", type=int, default=5, help="turns of ten steps per case (default: %(default)s)")
    parser.add_argument("--threads", type=int, default=1)
    parser.add_argument("--dropout", type=float, default=0.0, help="of the LoRA factors (default: %(default)s)")
    parser.add_argument("--clock", choices=("wall", "cpu"), default="wall")
    parser.add_argument(
        "--only", nargs="+", choices=CASES, default=list(CASES), help="cases; constant rates among them"
    )
    arguments = parser.parse_args()
    torch.set_num_threads(arguments.threads)
    clock = time.process_time if arguments.clock == "cpu" else time.perf_counter
    with tempfile.TemporaryDirectory() as place:
        model = widen(arguments.width, Path(place) / "model")
        works = {}
        for name in arguments.only:
            coordinator, options = CASES[name]
            words = [f"model={model}", f"coordinator={coordinator}", f"coordinator.options={options}", f"runs={place}"]
            words += [f"batch={arguments.batch}", f"steps={TURN * arguments.rounds}", "learning_rate=1e-4"]
            words.append(f"lora.dropout={arguments.dropout}")
            settings = configs.load("instruction_tuning/demo", words)
            loaded = load_model(settings.model, "no")
            talk = Talk(load_processor(settings.model), "blip-2")
            kept, held, _ = load_examples(settings, talk)
            run = Store(settings.runs).create(settings)
            works[name] = InstructionTuningWork(
                settings, run, make_accelerator("no"), adapt(loaded, settings), talk, kept, held
            )
        spent: dict[str, list[float]] = {name: [] for name in works}
        for turn in range(arguments.rounds):
            for name, work in works.items():
                started = clock()
                for step in range(turn * TURN, (turn + 1) * TURN):
                    work.step(step)
                spent[name].append((clock() - started) / TURN * 1000)
                print(f"turn {turn + 1}: {name} {spent[name][-1]:.1f} ms", file=sys.stderr)
        total = sum(p.numel() for p in loaded.parameters())
    print(
        f"{total / 1e6:.1f}M parameters, batch {arguments.batch}, {arguments.clock} time, torch {torch.__version__}\n"
    )
    print("| | ms per step | × constant rates |\n| --- | ---: | ---: |")
    for name, times in spent.items():
        ratios = [mine / plain for mine, plain in zip(times, spent["constant rates"], strict=True)]  # turn by turn
        print(f"| {name} | {statistics.median(times):.1f} | {statistics.median(ratios):.2f} |")


if __name__ == "__main__":
    main()
