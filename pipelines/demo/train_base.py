"""The recipe of the embedded base model: `make demo-base` runs it from nothing, seeded, in under an hour on two cores.

It trains a Stable Diffusion 1.x checkpoint small enough to ship: an autoencoder on random drawn pictures, then a text
encoder and a U-Net together on captioned shapes, all saved in diffusers' layout as fp16 safetensors. A report beside
the weights says how many samples of every colour × shape the judge calls right. Four colour × shape pairs are held out
of training, to see whether the model composes; the object that the demo teaches appears nowhere.
"""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import argparse
import json
import math
import time
from copy import deepcopy
from itertools import pairwise
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F
from diffusers import AutoencoderKL, DDIMScheduler, StableDiffusionPipeline, UNet2DConditionModel
from PIL import Image
from torch import Tensor
from tqdm import tqdm
from transformers import CLIPTextConfig, CLIPTextModel, CLIPTokenizer

from equipoise.pipelines.demo import base_folder, shapes

HELD_OUT = {("red", "star"), ("blue", "heart"), ("green", "cross"), ("yellow", "circle")}
TOKENS = 32  # a prompt's length, with start and end
STEPS, GUIDANCE = 20, 4.0  # of the report's samples


def tokenizer(folder: Path) -> CLIPTokenizer:
    """A CLIP tokenizer that knows the domain's words whole and spells out any other from bytes, as CLIP's own does."""
    words = ["a", "on", "background", "object", shapes.IDENTIFIER, *shapes.COLOURS, *shapes.SHAPES, *shapes.BACKGROUNDS]
    printable = [*range(33, 127), *range(161, 173), *range(174, 256)]
    alphabet = [chr(code) for code in printable]
    alphabet += [chr(256 + index) for index in range(256 - len(printable))]  # GPT-2's byte-to-character table
    merges: list[tuple[str, str]] = []
    pieces = [*alphabet, *(letter + "</w>" for letter in alphabet)]
    for word in words:
        split = [*word[:-1], word[-1] + "</w>"]
        while len(split) > 1:  # the merges so far, lowest rank first, as the tokenizer applies them; then new ones
            known = [pair for pair in pairwise(split) if pair in merges]
            left, right = min(known, key=merges.index) if known else (split[0], split[1])
            if not known:
                merges.append((left, right))
                pieces.append(left + right)
            split = _merge(split, left, right)
    pieces += ["<|startoftext|>", "<|endoftext|>"]
    folder.mkdir(parents=True, exist_ok=True)
    (folder / "vocab.json").write_text(
        json.dumps({piece: index for index, piece in enumerate(pieces)}, ensure_ascii=False)
    )
    (folder / "merges.txt").write_text("#version: 0.2\n" + "".join(f"{left} {right}\n" for left, right in merges))
    return CLIPTokenizer(
        str(folder / "vocab.json"), str(folder / "merges.txt"), pad_token="<|endoftext|>", model_max_length=TOKENS
    )


def _merge(split: list[str], left: str, right: str) -> list[str]:
    merged: list[str] = []
    for piece in split:
        if merged and merged[-1] == left and piece == right:
            merged[-1] += piece
        else:
            merged.append(piece)
    return merged


def build(vocabulary: int, end: int) -> tuple[AutoencoderKL, CLIPTextModel, UNet2DConditionModel]:
    vae = AutoencoderKL(
        sample_size=shapes.SIZE,
        block_out_channels=(16, 32, 64),  # latents of 16×16: the 8×8 of Stable Diffusion blurs pictures this small
        down_block_types=("DownEncoderBlock2D",) * 3,
        up_block_types=("UpDecoderBlock2D",) * 3,
        layers_per_block=1,
        latent_channels=4,
        norm_num_groups=1,  # groups of a few channels wipe out a flat picture's colour
    )
    text_encoder = CLIPTextModel(
        CLIPTextConfig(
            vocab_size=vocabulary,
            hidden_size=96,
            intermediate_size=192,
            num_hidden_layers=2,
            num_attention_heads=4,
            max_position_embeddings=TOKENS,
            bos_token_id=end - 1,
            eos_token_id=end,
            pad_token_id=end,
        )
    )
    unet = UNet2DConditionModel(
        sample_size=shapes.SIZE // 4,
        in_channels=4,
        out_channels=4,
        block_out_channels=(32, 64, 128),
        down_block_types=("DownBlock2D", "CrossAttnDownBlock2D", "DownBlock2D"),
        up_block_types=("UpBlock2D", "CrossAttnUpBlock2D", "UpBlock2D"),
        layers_per_block=1,
        cross_attention_dim=96,
        attention_head_dim=4,
        norm_num_groups=4,
    )
    return vae, text_encoder, unet


def pixels(pictures: list[Image.Image]) -> Tensor:  # (batch, 3, 64, 64) in −1 … 1
    return torch.from_numpy(np.stack([np.asarray(picture) for picture in pictures])).permute(0, 3, 1, 2) / 127.5 - 1


def scribble(rng: np.random.Generator) -> Image.Image:
    """A picture for the autoencoder alone: one or two random polygons of any hue, so that it can paint what it must
    never have been a subject in training."""
    parts = []
    for _ in range(rng.integers(1, 3)):
        points = np.sort(rng.uniform(0, 2 * math.pi, rng.integers(3, 9)))
        radius = rng.uniform(0.3, 1.1, len(points))
        outline = np.stack([np.cos(points) * radius, np.sin(points) * radius], axis=1) + rng.uniform(-0.4, 0.4, 2)
        parts.append(shapes.Part(outline, rng.uniform(0, 360)))
    return shapes.draw_varied(shapes.Subject("scribble", tuple(parts)), str(rng.choice(shapes.BACKGROUNDS)), rng)


def bank(count: int, rng: np.random.Generator) -> tuple[list[Image.Image], list[tuple[str, str, str]]]:
    """Training pictures and what each shows: (colour, shape, background), the held-out pairs left out."""
    pairs = [(c, s) for c in shapes.COLOURS for s in shapes.SHAPES if (c, s) not in HELD_OUT]
    kinds = [(colour, name, background) for colour, name in pairs for background in shapes.BACKGROUNDS]
    labels = [kinds[index % len(kinds)] for index in range(count)]
    return [shapes.draw_varied(shapes.shape(c, s), b, rng) for c, s, b in tqdm(labels, desc="drawing")], labels


def train_autoencoder(vae: AutoencoderKL, pictures: list[Image.Image], rng: np.random.Generator, steps: int) -> None:
    """L1 + MSE, with a very small pull of the latents towards N(0, 1): at 1e-4 its noise already blurs every edge."""
    batch = 16
    optimizer = torch.optim.AdamW(vae.parameters(), lr=1.5e-3, weight_decay=1e-4, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.1)
    error = 0.0
    bar = tqdm(range(steps), desc="autoencoder")
    for step in bar:
        chosen = [pictures[index] for index in rng.integers(0, len(pictures), batch // 2)]
        real = pixels(chosen + [scribble(rng) for _ in range(batch - len(chosen))])
        with torch.autocast("cpu", torch.bfloat16, enabled=step < steps * 0.95):  # the end in float32, for fine edges
            posterior = vae.encode(real).latent_dist
            made = vae.decode(posterior.sample()).sample
        made = made.float()
        kl = posterior.kl().mean() / posterior.mean[0].numel()
        absolute = (made - real).abs().mean()
        loss = absolute + (made - real).square().mean() + 2e-6 * kl
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(vae.parameters(), 1.0)
        optimizer.step()
        schedule.step()
        error = 0.98 * error + 0.02 * absolute.item() * 127.5
        bar.set_postfix(l1=f"{error:.2f}")


@torch.no_grad()
def reconstruction_error(vae: AutoencoderKL, pictures: list[Image.Image]) -> float:
    """Mean absolute error of decoded means, in units of 0…255."""
    real = pixels(pictures)
    return (vae.decode(vae.encode(real).latent_dist.mode()).sample - real).abs().mean().item() * 127.5


@torch.no_grad()
def encode(vae: AutoencoderKL, pictures: list[Image.Image]) -> Tensor:  # (pictures, 4, 16, 16), before scaling
    batches = [pictures[start : start + 128] for start in range(0, len(pictures), 128)]
    return torch.cat([vae.encode(pixels(batch)).latent_dist.mean for batch in tqdm(batches, desc="encoding")])


def captions(labels: list[tuple[str, str, str]], rng: np.random.Generator) -> list[str]:
    """One caption each; some name the class instead of the shape, some are empty, as guidance needs."""
    texts = []
    for colour, name, background in labels:
        dropped = rng.random()
        if dropped < 0.1:
            texts.append("")
        elif dropped < 0.17:
            texts.append(shapes.caption("object", background))
        elif dropped < 0.22:
            texts.append(shapes.caption(f"{colour} object", background))
        else:
            texts.append(shapes.caption(f"{colour} {name}", background))
    return texts


def train_denoiser(unet, text_encoder, tokens, noise_schedule, latents, labels, rng, generator, steps, batch) -> float:
    """ε-prediction; the weights kept are an exponential moving average. Returns the smoothed last loss."""
    trained = [*unet.parameters(), *text_encoder.parameters()]
    average = [parameter.detach().clone() for parameter in trained]
    optimizer = torch.optim.AdamW(trained, lr=1.5e-3, betas=(0.9, 0.99), weight_decay=1e-2, fused=True)
    schedule = torch.optim.lr_scheduler.OneCycleLR(optimizer, 1.5e-3, total_steps=steps, pct_start=0.03)
    smoothed = 1.0
    bar = tqdm(range(steps), desc="text encoder and U-Net")
    for step in bar:
        chosen = rng.integers(0, len(latents), batch)
        clean = latents[chosen]
        ids = tokens(captions([labels[index] for index in chosen], rng))
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(0, 1000, (batch,), generator=generator)
        noisy = noise_schedule.add_noise(clean, noise, times)
        predicted = unet(noisy, times, text_encoder(ids)[0]).sample
        loss = F.mse_loss(predicted, noise)
        optimizer.zero_grad()
        loss.backward()
        torch.nn.utils.clip_grad_norm_(trained, 1.0)
        optimizer.step()
        schedule.step()
        torch._foreach_lerp_(average, [parameter.detach() for parameter in trained], min(0.005, 10 / (step + 10)))
        smoothed = 0.99 * smoothed + 0.01 * loss.item()
        bar.set_postfix(loss=f"{smoothed:.4f}")
    with torch.no_grad():
        for parameter, mean in zip(trained, average, strict=True):
            parameter.copy_(mean)
    return smoothed


def sample(pipeline: StableDiffusionPipeline, prompts: list[str], seed: int) -> list[Image.Image]:
    pictures = []
    pipeline.set_progress_bar_config(disable=True)
    for start in tqdm(range(0, len(prompts), 64), desc="sampling"):
        generator = torch.Generator().manual_seed(seed + start)
        chosen = prompts[start : start + 64]
        pictures += pipeline(
            chosen,
            height=shapes.SIZE,
            width=shapes.SIZE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=generator,
        ).images
    return pictures


def report(pipeline: StableDiffusionPipeline, folder: Path, each: int, facts: dict) -> dict:
    """Judges `each` samples of every colour × shape (backgrounds in turn) and writes report.json and report.md."""
    cells = [(colour, name) for colour in shapes.COLOURS for name in shapes.SHAPES]
    wanted = [(c, s, shapes.BACKGROUNDS[index % 4]) for c, s in cells for index in range(each)]
    pictures = sample(pipeline, [shapes.caption(f"{c} {s}", b) for c, s, b in wanted], seed=1000)
    table = {}
    for index, (colour, name) in enumerate(cells):
        verdicts = [shapes.judge(p, shapes.shape(colour, name)) for p in pictures[index * each : (index + 1) * each]]
        table[f"{colour} {name}"] = {
            "right": float(np.mean([verdict.right for verdict in verdicts])),
            "colour": float(np.mean([verdict.colour for verdict in verdicts])),
            "shape": float(np.mean([verdict.shape for verdict in verdicts])),
            "overlap": float(np.mean([verdict.overlap for verdict in verdicts])),
            "trained": (colour, name) not in HELD_OUT,
        }
    object_prompts = [shapes.caption(shapes.OBJECT.name, b) for b in shapes.BACKGROUNDS] * (each // 4)
    object_verdicts = [shapes.judge(p, shapes.OBJECT) for p in sample(pipeline, object_prompts, seed=2000)]
    trained = [row["right"] for row in table.values() if row["trained"]]
    unseen = [row["right"] for row in table.values() if not row["trained"]]
    result = {
        **facts,
        "samples per cell": each,
        "sampling": f"DDIM, {STEPS} steps, guidance {GUIDANCE}",
        "worst trained cell": min(trained),
        "mean of trained cells": float(np.mean(trained)),
        "mean of held-out cells": float(np.mean(unseen)),
        "the untaught object": float(np.mean([verdict.right for verdict in object_verdicts])),
        "cells": table,
    }
    (folder / "report.json").write_text(json.dumps(result, indent=1) + "\n")
    (folder / "report.md").write_text(_markdown(result))
    picture = Image.new("RGB", (shapes.SIZE * len(shapes.SHAPES) * 2, shapes.SIZE * len(shapes.COLOURS)))
    for index in range(len(cells)):
        for copy in range(2):
            x, y = (index % 6) * 2 + copy, index // 6
            picture.paste(pictures[index * each + 2 * copy + index % 2], (x * shapes.SIZE, y * shapes.SIZE))
    picture.save(folder / "report.png")
    return result


def _markdown(result: dict) -> str:
    head = [
        f"- {key}: {value:.3g}" if isinstance(value, float) else f"- {key}: {value}"
        for key, value in result.items()
        if key != "cells"
    ]
    rows = ["| | " + " | ".join(shapes.SHAPES) + " |", "|---|" + "---|" * len(shapes.SHAPES)]
    for colour in shapes.COLOURS:
        cells = [result["cells"][f"{colour} {name}"] for name in shapes.SHAPES]
        rows.append(
            f"| {colour} | "
            + " | ".join(f"{c['right']:.0%}" + ("" if c["trained"] else " (held out)") for c in cells)
            + " |"
        )
    title = "Made by `make demo-base`. Share of samples whose colour and shape are both right:"
    lines = ["# The embedded base model", "", title, "", *rows, "", "![samples](report.png)", "", *head, ""]
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument(
        "--out", type=Path, default=base_folder(), help="folder of the checkpoint (default: the shipped one)"
    )
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--pictures", type=int, default=12_800)
    parser.add_argument("--vae-steps", type=int, default=2_400)
    parser.add_argument("--steps", type=int, default=5_000, help="of the text encoder and U-Net")
    parser.add_argument("--batch", type=int, default=32)
    parser.add_argument("--each", type=int, default=40, help="samples judged per colour × shape")
    parser.add_argument("--work", type=Path, help="keep the autoencoder here between trials")
    arguments = parser.parse_args()
    started = time.time()
    torch.manual_seed(arguments.seed)
    rng = np.random.default_rng(arguments.seed)
    generator = torch.Generator().manual_seed(arguments.seed)
    words = tokenizer(arguments.out / "tokenizer")
    end = words.eos_token_id
    vae, text_encoder, unet = build(len(words), end)
    pictures, labels = bank(arguments.pictures, rng)
    kept = arguments.work / "vae" if arguments.work else None
    if kept and kept.exists():
        vae = AutoencoderKL.from_pretrained(kept)
    else:
        train_autoencoder(vae, pictures, deepcopy(rng), arguments.vae_steps)
        if kept:
            vae.save_pretrained(kept)
    vae.eval().requires_grad_(False)
    latents = encode(vae, pictures)
    scale = 1 / latents.std().item()
    vae.register_to_config(scaling_factor=scale)
    noise_schedule = DDIMScheduler(
        beta_start=0.00085,
        beta_end=0.012,
        beta_schedule="scaled_linear",
        clip_sample=False,
        set_alpha_to_one=False,
        steps_offset=1,
    )

    def tokens(texts: list[str]) -> Tensor:
        return words(texts, padding="max_length", truncation=True, return_tensors="pt").input_ids

    loss = train_denoiser(
        unet,
        text_encoder,
        tokens,
        noise_schedule,
        latents * scale,
        labels,
        rng,
        generator,
        arguments.steps,
        arguments.batch,
    )
    pipeline = StableDiffusionPipeline(
        vae.half(), text_encoder.half(), words, unet.half(), noise_schedule, None, None, requires_safety_checker=False
    )
    pipeline.save_pretrained(arguments.out, safe_serialization=True)
    shipped = StableDiffusionPipeline.from_pretrained(arguments.out, dtype=torch.float32)
    error = reconstruction_error(vae.float(), pictures[:256])
    facts = {
        "parameters": {
            name: sum(p.numel() for p in part.parameters())
            for name, part in (("vae", vae), ("text encoder", text_encoder), ("unet", unet))
        },
        "seed": arguments.seed,
        "autoencoder": f"{arguments.vae_steps} steps of 16, L1 error {error:.2f} of 255",
        "denoiser": f"{arguments.steps} steps of {arguments.batch}, loss {loss:.4f}",
        "minutes of training": (time.time() - started) / 60,
    }
    result = report(shipped, arguments.out, arguments.each, facts)
    print(_markdown(result))


if __name__ == "__main__":
    main()
