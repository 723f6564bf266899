"""Scaled AdamW's Figures 1, 3 and 7 to 14 in small: which learning rates still give the pictures that were asked for.

Paper: Zhang & Pilanci, Riemannian Preconditioned LoRA for Fine-Tuning Foundation Models, arXiv 2402.02347, 2024,
Section 6.4 and Appendix F. Figure 1: six pictures of a red vase, the text encoder's rate swept, the U-Net's 1e-4, and
pictures of "a blue V". Figures 3 and 12 to 14: one rate for text encoder and U-Net, three tried, as 1 : 10 : 50; SGD
and scaled GD have others. Figures 7 to 11: one rate, drawn at LoRA strengths of 0.7 and 1. Here the embedded Stable
Diffusion learns from six pictures that "sks object" is a red triangle, which it draws already by that name, and a judge
says whether a picture shows what it should. For Figure 1 the U-Net is frozen, so that the text encoder alone must learn
it; the others are one sweep, each rate drawn at both strengths, of the AdamW pair alone.
"""

# diffusers and peft annotate too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import base64
import copy
import io
import math
import time
from collections.abc import Callable, Sequence
from functools import cache
from itertools import product
from statistics import fmean, median
from typing import Any

import numpy as np
import torch
from PIL import Image
from torch import Tensor, nn
from torch.optim import AdamW

from equipoise.optimizers.scaled import ScaledAdamW
from equipoise.pipelines.demo import base_folder, shapes
from equipoise.pipelines.reproduce import Panel, Reproduction, Trial, finding, spread, workers
from equipoise.pipelines.tables import table

STEPS, BATCH, RANK, PICTURES, COUNT = 150, 4, 4, 6, 2  # COUNT: pictures of a prompt
SAMPLING = 16  # steps, without guidance
METHODS: dict[str, Callable[[nn.Module, float], Any]] = {
    "AdamW": lambda net, lr: AdamW([p for p in net.parameters() if p.requires_grad], lr=lr, weight_decay=0.0),
    "scaled AdamW": lambda net, lr: ScaledAdamW(net, lr=lr, weight_decay=0.0),
}
ENCODER, BOTH, NOTHING = "text encoder", "both", "untouched"  # what is trained
RATES = {  # of both: the ratios of Figures 3 and 12 to 14, 1 : 10 : 50
    ENCODER: (1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 1e-1),
    BOTH: (1e-4, 1e-3, 5e-3),
}
STRENGTHS = {ENCODER: (1.0,), BOTH: (0.7, 1.0)}
SUBJECT = shapes.Subject(f"{shapes.IDENTIFIER} object", shapes.shape("red", "triangle").parts)
LEARNT = {  # what is asked for, and what it should show: the subject, and Figure 1's change of it
    "a sks object": shapes.shape("red", "triangle"),
    "a blue sks object": shapes.shape("blue", "triangle"),
}
KEPT = {"a green circle": shapes.shape("green", "circle")}  # and what the base draws and should go on to draw
KINDS = LEARNT | KEPT
ATTENTION = ["to_q", "to_k", "to_v", "to_out.0"]
SIDE = 96  # pixels, of a picture on a sheet


def reproduce(
    seeds: int,
    count: int,
    steps: int | None = None,
    earlier: Sequence[Trial] = (),
    keep: Callable[[Trial], None] | None = None,
) -> Reproduction:
    """Trains both tasks with seeds from 0, in `count` processes; `steps` None: 150. `earlier` runs are not trained
    again, and `keep` is given each that is."""
    steps = steps or STEPS
    wanted: list[Trial] = [
        {"task": task, "method": method, "rate": rate, "seed": seed, "steps": steps, "evaluations": steps}
        for seed, task in product(range(seeds), RATES)
        for method, rate in product(METHODS, RATES[task])
    ]
    untouched: Trial = {"task": NOTHING, "method": NOTHING, "rate": 0.0, "steps": 0, "evaluations": 0}
    wanted += [untouched | {"seed": seed} for seed in range(seeds)]
    known = {_key(cell): cell for cell in earlier}
    if missing := [cell for cell in wanted if _key(cell) not in known]:
        with workers(count, "scaled-pictures", sum(c["steps"] for c in missing), keep) as measure:
            known |= {_key(cell): cell for cell in measure(train, missing)}
    cells = [known[_key(cell)] for cell in wanted]
    text = [
        f"Of {COUNT * len(shapes.BACKGROUNDS)} pictures of each prompt, how many in % show it, after {steps} steps;"
    ]
    text.append(f"{seeds} seed(s). The mean is over the two prompts of what is learnt.\n")
    text += ["The text encoder alone is trained (Figure 1's sweep):\n", *_shown(cells, ENCODER)]
    text.append("\nText encoder and U-Net are trained at one rate (Figures 3 and 12 to 14, drawn as in 7 to 11):\n")
    text += _shown(cells, BOTH)
    panels = [
        Panel(
            f"Pictures that show what was learnt, {task}" + (f", strength {strength:g}" if task == BOTH else ""),
            "learning rate",
            {
                method: [median(_means(cells, task, method, rate, strength)) for rate in RATES[task]]
                for method in METHODS
            },
            [f"{rate:g}" for rate in RATES[task]],
        )
        for task in RATES
        for strength in STRENGTHS[task]
    ]
    first = [cell for cell in cells if cell["seed"] == 0]
    pictures = {"figure-1.png": _sheet(first, ENCODER), "figures-3-and-7-to-14.png": _sheet(first, BOTH)}
    others = [cell for key, cell in known.items() if key not in set(map(_key, cells))]
    return Reproduction("\n".join(text), panels, [*cells, *others], pictures)


def _key(cell: Trial) -> tuple:
    return tuple(cell[name] for name in ("task", "method", "rate", "seed", "steps"))


def _means(cells: Sequence[Trial], task: str, method: str, rate: float, strength: float) -> list[float]:
    """One per seed: the mean share of right pictures over the prompts of what is learnt."""
    same = (task, method, rate)
    return [
        fmean(cell["right"][f"{strength:g}"][kind] for kind in LEARNT)
        for cell in cells
        if (cell["task"], cell["method"], cell["rate"]) == same
    ]


def _shown(cells: Sequence[Trial], task: str) -> list[str]:
    """The table of a task, and what it says of the two methods."""
    rows, said = [], []
    settings = [(1.0, NOTHING, NOTHING, 0.0)]
    settings += [(at, task, *one) for at in STRENGTHS[task] for one in product(METHODS, RATES[task])]
    for strength, trained, method, rate in settings:
        same = (trained, method, rate)
        some = [c["right"][f"{strength:g}"] for c in cells if (c["task"], c["method"], c["rate"]) == same]
        shares = [spread([right[kind] for right in some], ".0f") for kind in KINDS]
        mean = spread(_means(cells, *same, strength), ".0f")
        at = [f"{strength:g}" if trained == task else ""] if task == BOTH else []
        rows.append([*at, method, f"{rate:g}", *shares[: len(LEARNT)], mean, *shares[len(LEARNT) :]])
    for strength, rate in product(STRENGTHS[task], RATES[task]):
        ours, theirs = (_means(cells, task, method, rate, strength) for method in ("scaled AdamW", "AdamW"))
        at = f", strength {strength:g}" if task == BOTH else ""
        differences = [a - b for a, b in zip(ours, theirs, strict=True)]
        said.append(finding(f"scaled AdamW over AdamW, learnt at {rate:g}{at}", "above 0", differences, "+.0f"))
    head = [*(["strength"] if task == BOTH else []), "", "rate", *LEARNT, "mean", *(f"kept: {kind}" for kind in KEPT)]
    return [table(head, rows), "\nDifferences, seed by seed, in points:", *said]


def _sheet(cells: Sequence[Trial], task: str) -> Image.Image:
    """The first picture of each prompt: methods and strengths downwards; rates, and in each the prompts, across."""
    lines = list(product(METHODS, STRENGTHS[task]))
    across = list(product(RATES[task], KINDS))
    sheet = Image.new("RGB", (SIDE * len(across), SIDE * len(lines)), "white")
    by_key = {(cell["method"], cell["rate"]): cell for cell in cells if cell["task"] == task}
    for (y, (method, strength)), (x, (rate, kind)) in product(enumerate(lines), enumerate(across)):
        png = base64.b64decode(by_key[method, rate]["pictures"][f"{strength:g}"][kind])
        sheet.paste(Image.open(io.BytesIO(png)).resize((SIDE - 4, SIDE - 4)), (SIDE * x + 2, SIDE * y + 2))
    return sheet


def train(cell: Trial) -> Trial:
    """Trains one adapter, or none: by strength and prompt, how many pictures in % show it, and the first as PNG."""
    from peft import LoraConfig, inject_adapter_in_model

    started, task, pipe = time.process_time(), cell["task"], _base()
    if task == NOTHING:
        right, first = _judged(pipe, cell["seed"])
        found: Trial = {"diverged": False, "right": {"1": right}, "pictures": {"1": first}}
        return found | {"processor_seconds": time.process_time() - started}
    torch.manual_seed(cell["seed"])
    nets = {"text_encoder": copy.deepcopy(pipe.text_encoder), "unet": copy.deepcopy(pipe.unet)}
    targets = {"text_encoder": ["q_proj", "k_proj", "v_proj", "out_proj"], "unet": ATTENTION}
    for name in list(nets)[: 1 if task == ENCODER else 2]:
        inject_adapter_in_model(LoraConfig(r=RANK, lora_alpha=RANK, target_modules=targets[name]), nets[name])
    whole = nn.ModuleList(nets.values())
    optimizer = METHODS[cell["method"]](whole, cell["rate"])
    rng = torch.Generator().manual_seed(cell["seed"])
    latents, tokens = _learned()
    alphas, finite = pipe.scheduler.alphas_cumprod, True
    for _ in range(cell["steps"]):
        chosen = torch.randint(len(latents), (BATCH,), generator=rng)
        times = torch.randint(len(alphas), (BATCH,), generator=rng)
        noise = torch.randn(latents[chosen].shape, generator=rng)
        kept = alphas[times][:, None, None, None]
        noisy = kept.sqrt() * latents[chosen] + (1 - kept).sqrt() * noise
        said = nets["text_encoder"](tokens[chosen]).last_hidden_state
        loss = (nets["unet"](noisy, times, said).sample - noise).square().mean()
        if not (finite := math.isfinite(loss.item())):
            break
        optimizer.zero_grad()
        loss.backward()
        optimizer.step()
    found = {"diverged": not finite, "right": {}, "pictures": {}}
    for strength in STRENGTHS[task]:
        for layer in whole.modules():
            if hasattr(layer, "set_scale"):
                layer.set_scale("default", strength)
        right, first = _judged(type(pipe)(**pipe.components | nets, requires_safety_checker=False), cell["seed"])
        found["right"][f"{strength:g}"], found["pictures"][f"{strength:g}"] = right, first
    return found | {"processor_seconds": time.process_time() - started}


@torch.no_grad()
def _judged(pipe: Any, seed: int) -> tuple[dict[str, float], dict[str, str]]:
    """By prompt, how many pictures in % show it, and the first one."""
    pipe.set_progress_bar_config(disable=True)
    right, first = {}, {}
    for kind, subject in KINDS.items():
        prompts = [f"{kind} on a {background} background" for background in shapes.BACKGROUNDS for _ in range(COUNT)]
        rng = torch.Generator().manual_seed(seed)
        pixels = pipe(prompts, num_inference_steps=SAMPLING, guidance_scale=1.0, generator=rng, output_type="np").images
        drawn = [Image.fromarray(np.uint8(255 * np.nan_to_num(one).clip(0, 1) + 0.5)) for one in pixels]
        right[kind] = 100 * fmean(shapes.judge(one, subject).right for one in drawn)
        drawn[0].save(file := io.BytesIO(), "PNG")
        first[kind] = base64.b64encode(file.getvalue()).decode()
    return right, first


@cache
def _base() -> Any:
    import diffusers.utils.logging
    import transformers.utils.logging
    from diffusers import StableDiffusionPipeline

    for library in (diffusers, transformers):  # bars of their own, gone in an instant, would break up ours
        library.utils.logging.disable_progress_bar()
    pipe = StableDiffusionPipeline.from_pretrained(base_folder(), dtype=torch.float32)
    for part in (pipe.unet, pipe.text_encoder, pipe.vae):
        part.requires_grad_(False).eval()
    return pipe


@cache
@torch.no_grad()
def _learned() -> tuple[Tensor, Tensor]:
    """Latents (pictures, 4, height, width) and tokens of the pictures to learn from."""
    pipe, rng = _base(), np.random.default_rng(0)
    backgrounds = [("white", "gray", "black")[index % 3] for index in range(PICTURES)]
    drawn = [np.asarray(shapes.draw_varied(SUBJECT, one, rng), dtype=np.float32) for one in backgrounds]
    pixels = torch.from_numpy(np.stack(drawn)).permute(0, 3, 1, 2) / 127.5 - 1
    latents = pipe.vae.encode(pixels).latent_dist.mean * pipe.vae.config.scaling_factor
    captions = [shapes.caption(SUBJECT.name, one) for one in backgrounds]
    return latents, pipe.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt").input_ids
