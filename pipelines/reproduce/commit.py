"""CoMMIT's Table 1 and Figures 2, 3, 5 and 6 in small: five baselines, CoMMIT-CLR and CoMMIT on pictures and sounds.
Figure 1's contours of κ by `--task contours`, which is no table's.

Paper: Wu et al., CoMMIT: Coordinated Instruction Tuning for Multimodal Large Language Models: BLIP-2 with OPT-2.7B on
three visual question-answering tasks, SALMONN on three of sound, one rate of 1e-4 for all. Here: the embedded BLIP-2 on
questions about drawn scenes, as it is and with a language side whose update counts twenty times (`uneven`), and a small
Qwen2-Audio, which first learns to describe made sounds, on questions about those and on descriptions in other words.
Every method starts from one rate and sees the same batches; κ is measured in all of them but coordinate descent, where
one side stands still.
"""

import json
import time
from collections.abc import Callable, Sequence
from itertools import product
from math import log10
from pathlib import Path
from statistics import fmean, median, pstdev
from tempfile import TemporaryDirectory

import torch
from PIL import Image

from equipoise.errors import InputError
from equipoise.pipelines import demo
from equipoise.pipelines.demo import tones
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, interval, spread, workers
from equipoise.pipelines.tables import table

STEPS, BASE_STEPS, MEASURED = 300, 500, 5  # of a training; of the sounds' base; steps between measurements of κ
SOUNDS = 2000  # each with one question
RATES = {"pictures": 7e-4, "uneven": 7e-4, "sounds": 1e-3, "captions": 1e-3}
UNEVEN = ["lora.alpha=320"]  # 20 times the rank: each of the language side's steps moves the answers further
DRAWN = {"pictures", "uneven", "contours"}  # tasks on questions about drawn scenes
METHODS = {  # name → (coordinator, its options)
    "Constant LR": ("constant", {}),
    "Feature CD": ("feature_cd", {}),
    "Language CD": ("language_cd", {}),
    "Language LR↑": ("language_lr_up", {}),
    "Vision LR↑": ("vision_lr_up", {}),
    "CoMMIT-CLR": ("commit_clr", {}),
    "CoMMIT": ("commit", {}),
}
PAPER = {  # Table 1: means of the three accuracies of BLIP-2; ClothoAQA, SALMONN's one accuracy; MACS, ROUGE-L
    "Constant LR": {"pictures": 39.23, "sounds": 42.49, "captions": 24.60},
    "Feature CD": {"pictures": 37.16, "sounds": 45.80, "captions": 22.41},
    "Language CD": {"pictures": 34.59, "sounds": 38.52, "captions": 23.64},
    "CoMMIT-CLR": {"pictures": 42.40, "sounds": 52.86, "captions": 23.81},
    "CoMMIT": {"pictures": 43.71, "sounds": 50.55, "captions": 25.06},
}
COMPARED = [
    ("CoMMIT-CLR", "Constant LR"),
    ("CoMMIT", "Constant LR"),
    ("CoMMIT", "CoMMIT-CLR"),
    ("Feature CD", "Constant LR"),
    ("Language CD", "Constant LR"),
]
TENTHS = 10
CONTOURS = "contours"  # the task that draws Figure 1
Got = Callable[[str, str, str], list]  # (key, task, method) → one value per seed


def reproduce(
    seeds: int,
    count: int,
    steps: int | None = None,
    earlier: Sequence[Trial] = (),
    tasks: Sequence[str] | None = None,
    keep: Callable[[Trial], None] | None = None,
) -> Reproduction:
    """Trains all methods on the tasks, with seeds from 0, in `count` processes; `steps` None: the published number.
    What is among the `earlier` runs is not trained again; what is trained goes to `keep`, run by run.

    Raises:
        InputError: a task that there is not.
    """
    tasks = list(tasks or RATES)
    if wrong := [task for task in tasks if task not in (*RATES, CONTOURS)]:
        raise InputError(f"--task: {wrong[0]!r} is none of {', '.join([*RATES, CONTOURS])}.")
    drawn = [_contours(steps or STEPS)] if CONTOURS in tasks else []
    steps, tasks = steps or STEPS, [task for task in tasks if task != CONTOURS]
    settings = [
        {"task": task, "method": method, "seed": seed, "steps": steps, "evaluations": steps}
        for seed, task, method in product(range(seeds), tasks, METHODS)
    ] + drawn
    found = {cell_key(cell): cell for cell in earlier}
    if missing := [cell for cell in settings if cell_key(cell) not in found]:
        found |= {cell_key(cell): cell for cell in _train_all(missing, count, keep)}
    cells = [found.pop(cell_key(cell)) for cell in settings]

    def got(key: str, task: str, method: str) -> list:
        return [cell[key] for cell in cells if (cell["task"], cell["method"]) == (task, method)]

    text, panels, pictures = ([], [], {}) if not drawn else _report_contours(cells[-1])
    if tasks:
        text.append(
            f"Held-out accuracy (captions: ROUGE-L) in % after {steps} steps at one learning rate, {seeds} seed(s)."
        )
    for task in tasks:
        untuned = median(100 * value for value in got("untuned", task, "Constant LR"))
        text += [f"\n{task.capitalize()}, learning rate {RATES[task]:g}, untuned {untuned:.1f}:\n", _table(task, got)]
    text += ["\nDifferences, seed by seed, in points; of κ's standard deviation in its own units:"] * bool(tasks)
    for task in tasks:
        text += _findings(task, got)
    panels += _panels(tasks, got) if tasks else []
    return Reproduction("\n".join(text), panels, [*cells, *found.values()], pictures)


def _contours(steps: int) -> Trial:
    """The one training behind Figure 1."""
    rate, short = RATES["pictures"], max(1, steps // 10)
    return {
        "task": CONTOURS,
        "method": "Constant LR",
        "seed": 0,
        "steps": short,
        "evaluations": short + 1,
        "rate": rate,
    }


def _report_contours(cell: Trial) -> tuple[list[str], list[Panel], dict[str, Image.Image]]:
    from equipoise.pipelines.reproduce._contours import report

    text, panels, pictures = report(cell)
    return [text], panels, pictures


def _train_all(missing: Sequence[Trial], count: int, keep: Callable[[Trial], None] | None) -> list[Trial]:
    def bare(cell: Trial) -> Trial:
        return {name: value for name, value in cell.items() if name != "folder"}

    with TemporaryDirectory(prefix="equipoise-") as folder:
        shared, tasks = Path(folder), {cell["task"] for cell in missing}
        if tasks & DRAWN:
            demo.questions_file(shared)
        if tasks - DRAWN:
            prepare_sounds(shared, BASE_STEPS)
        evaluations = sum(cell["evaluations"] for cell in missing)
        with workers(count, "commit", evaluations, (lambda cell: keep(bare(cell))) if keep else None) as measure:
            return [bare(cell) for cell in measure(train, [{**cell, "folder": folder} for cell in missing])]


def _table(task: str, got: Got) -> str:
    rows = [
        [
            method,
            interval([100 * value for value in got("accuracy", task, method)]),
            *(f"{median(losses[i] for losses in got('losses', task, method)):.3f}" for i in (1, 4, 9)),
            kappa(median(got("kappa_mean", task, method)), median(got("kappa_mean", task, method))),
            kappa(median(got("kappa_mean", task, method)), median(got("kappa_deviation", task, method))),
            f"{median(got('milliseconds', task, method)):.0f}",
            f"{PAPER[method][task]:.2f}" if task in PAPER.get(method, {}) else "",
        ]
        for method in METHODS
    ]
    head = ["", "score", "loss 20 %", "50 %", "100 %", "κ mean", "κ std", "ms/step", "paper"]
    return table(head, rows)


def _findings(task: str, got: Got) -> list[str]:
    text = []
    for one, other in COMPARED:
        pairs = zip(got("accuracy", task, one), got("accuracy", task, other), strict=True)
        here = [100 * (a - b) for a, b in pairs]
        paper = PAPER[one][task] - PAPER[other][task] if task in PAPER[one] else None
        said = finding(f"{task}, {one} over {other}", paper, here, "+.1f")
        text.append(f"{said} Mean {interval(here, '+.1f')}.")
    for one in ("CoMMIT-CLR", "CoMMIT"):
        pairs = zip(got("kappa_deviation", task, one), got("kappa_deviation", task, "Constant LR"), strict=True)
        here = [a - b for a, b in pairs]
        same = "Same direction" if max(here) < 0 else "OPPOSITE direction" if min(here) > 0 else "Undecided"
        text.append(f"- {task}, κ's std, {one} over Constant LR (Figure 6: it falls): {spread(here, '+.2f')}. {same}.")
    return text


def _panels(tasks: Sequence[str], got: Got) -> list[Panel]:
    shares = [f"{100 // TENTHS * (i + 1)}" for i in range(TENTHS)]
    shown = [method for method in METHODS if "CD" not in method]

    def panel(title: str, key: str, scale: Callable[[float], float] = float, task: str = tasks[0]) -> Panel:
        lines = {m: [scale(median(v)) for v in zip(*got(key, task, m), strict=True)] for m in shown}
        return Panel(f"{task.capitalize()}: {title}", "% of training", lines, shares)

    return [
        panel("training loss (Figure 3c)", "losses"),
        panel("log10 of κ (Figures 2c and 6)", "kappas", lambda value: log10(value) if value else 0.0),
        panel("H of the encoder side × 1000 (Figure 2a)", "h_encoder"),
        panel("H of the language side × 1000 (Figure 2b)", "h_language"),
        panel("‖G‖/‖θ‖ of the encoder side (Figure 3a)", "gradient_encoder"),
        panel("‖G‖/‖θ‖ of the language side (Figure 3b)", "gradient_language"),
        *(panel("training loss (Figure 5)", "losses", task=task) for task in tasks[1:]),
    ]


def kappa(mean: float, value: float) -> str:
    """Coordinate descent has none: one side stands still, and nothing is measured."""
    return f"{value:.2f}" if mean else "none"


def cell_key(cell: Trial) -> tuple:
    return tuple(cell[name] for name in ("task", "method", "seed", "steps"))


def prepare_sounds(shared: Path, steps: int) -> None:
    """Makes the sounds with their questions and captions, and teaches the base to describe sounds."""
    (shared / "sounds").mkdir()
    tones.write_questions(shared / "sounds", SOUNDS, seed=1)
    threads = torch.get_num_threads()
    torch.set_num_threads(1)  # as in the workers, so that no number depends on the machine's threads
    try:
        tones.train_base(shared / "base", steps)
    finally:
        torch.set_num_threads(threads)


def train(cell: Trial) -> Trial:
    """Trains one run of the pipeline: its accuracy, and losses, κ, H and gradients by tenths of the training."""
    started = time.process_time()
    if cell["task"] == CONTOURS:
        from equipoise.pipelines.reproduce._contours import train as train_contours

        return train_contours(cell) | {"processor_seconds": round(time.process_time() - started, 1)}
    shared, task = Path(cell["folder"]), cell["task"]
    words = [f"learning_rate={RATES[task]}"]
    if task in DRAWN:
        words += UNEVEN if task == "uneven" else []
        words.append(f"data={shared / '.demo' / 'questions' / 'questions.jsonl'}")
    else:
        file = "captions.csv" if task == "captions" else "questions.csv"
        words += [f"model={shared / 'base'}", f"data={shared / 'sounds' / file}"]
    if task == "captions":
        words += ["samples.metric=rouge_l", "samples.max_new_tokens=40"]
    return tune(cell, ["samples.count=200", *words]) | {"processor_seconds": round(time.process_time() - started, 1)}


def tune(cell: Trial, words: Sequence[str]) -> Trial:
    """What a run of a cell's method, seed and steps came to; `words` are settings as on the command line."""
    from equipoise.pipelines import config
    from equipoise.pipelines.instruction_tuning import InstructionTuning
    from equipoise.pipelines.pipeline import execute
    from equipoise.pipelines.runs.store import Store

    name, options = METHODS[cell["method"]]
    words = [*words, f"steps={cell['steps']}", f"seed={cell['seed']}", f"coordinator={name}"]
    with TemporaryDirectory(prefix="equipoise-") as runs:
        every = {"measure_every": 0 if name.endswith("_cd") else MEASURED, **options}
        words += [f"coordinator.options={every}", "checkpoint_every=0", f"runs={runs}"]
        settings = config.load("instruction_tuning/demo", words)
        run = Store(settings.runs).create(settings)
        outcome = execute(InstructionTuning, settings, run)
        result, metrics = json.loads((run.result / "result.json").read_text()), run.metrics()
    measured = [record for record in metrics if record.get("kappa", 0) > 0]
    kappas = [record["kappa"] for record in measured] or [0.0]

    def tenths(key: str, records: list[dict], scale: float = 1.0) -> list[float]:
        found = []
        for tenth in range(TENTHS):
            some = [r[key] for r in records if tenth <= (r["step"] - 1) * TENTHS / cell["steps"] < tenth + 1]
            found.append(scale * fmean(some) if some else found[-1] if found else 0.0)
        return found

    plain = [record["seconds"] for record in metrics if "kappa" not in record]
    probed = [record["seconds"] for record in metrics if "kappa" in record]
    share = {"commit": 1.0, "commit_clr": 0.1}.get(name, 0.0)  # of the steps that are measured at the defaults
    seconds = (1 - share) * (median(plain) if plain else 0) + share * (median(probed) if probed else 0)
    return {
        "state": outcome.state,
        "accuracy": result["score_after"],
        "untuned": result["score_before"],
        "held_out": result["loss_after"],
        "losses": tenths("loss", metrics),
        "kappas": tenths("kappa", measured),
        "h_encoder": tenths("h_encoder", measured, 1000),
        "h_language": tenths("h_language", measured, 1000),
        "gradient_encoder": tenths("gradient_encoder", measured),
        "gradient_language": tenths("gradient_language", measured),
        "kappa_mean": fmean(kappas),
        "kappa_deviation": pstdev(kappas),
        "milliseconds": 1000 * seconds,
    }
