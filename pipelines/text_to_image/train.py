"""Tunes LoRA factors of a Stable Diffusion base: load → compute latents once → train → save a file diffusers loads."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from torch import Tensor

from equipoise.balancing.objective import Losses
from equipoise.errors import ConfigError
from equipoise.pipelines import demo
from equipoise.pipelines.loop import train_loop
from equipoise.pipelines.pipeline import Outcome
from equipoise.pipelines.run import Run
from equipoise.pipelines.text_to_image.base import Base, load_base
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.data import read_examples, unread_captions
from equipoise.pipelines.text_to_image.generate import generate, lora_scale
from equipoise.pipelines.text_to_image.latents import prepare_latents
from equipoise.pipelines.text_to_image.result import write_result
from equipoise.pipelines.work import OptimizedWork, make_accelerator, mix, number, place

_EVALUATED = 64  # fixed draws behind "loss before" and "loss after"


def train(config: TextToImageConfig, run: Run) -> Outcome:
    accelerator = make_accelerator(config.train.precision)
    base = load_base(config.model, config.train.precision)
    runs = Path(config.runs)
    data = config.data
    if data.folder == demo.NAME:
        data = data.model_copy(update={"folder": str(demo.pictures_folder(runs))})
    examples, wrong = read_examples(data)
    if wrong:  # since the check
        raise ConfigError(wrong)
    if warning := unread_captions(data, [example.path for example in examples]):
        run.log(warning)
        print(warning, file=sys.stderr)
    latents = prepare_latents(base, examples, data, runs / ".cache")
    with base.adapted(config.lora, config.seed) as parts:
        work = TextToImageWork(
            config, run, accelerator, base, parts, [example.caption for example in examples], latents
        )
        before = work.evaluation_loss()
        started = time.perf_counter()
        outcome = train_loop(
            run, work, config.train.steps, config.checkpoint.every, config.checkpoint.keep, config.samples.every
        )
        if outcome.state != "stopped":
            facts = {
                "state": outcome.state,
                "step": outcome.step,
                "loss_before": number(before),
                "loss_after": number(work.evaluation_loss()),
                "seconds": time.perf_counter() - started,
            }
            work.save_result(facts)
            if not run.sweep:  # the comparison of a sweep draws its cells' samples
                work.sample(outcome.step or 0)
    return outcome


class TextToImageWork(OptimizedWork):
    """One run's tuning: see `equipoise.pipelines.loop.Work` for when each method is called."""

    tensors = "LoRA factors"

    def __init__(
        self,
        config: TextToImageConfig,
        run: Run,
        accelerator: Accelerator,
        base: Base,
        parts: dict[str, torch.nn.Module],  # the tuned parts by name: "unet", and "text_encoder" if asked
        captions: list[str],
        latents: Tensor,  # (pictures, variants, 2, 4, height, width)
    ):
        self.base, self.parts, self.captions, self.latents = base, parts, captions, latents
        named = {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        if config.train.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        else:
            base.unet.disable_gradient_checkpointing()
        rates = {"unet": config.optimizer.learning_rate}
        rates["text_encoder"] = config.optimizer.text_encoder_learning_rate or rates["unet"]
        groups = [
            {
                "params": [(name, p) for name, p in named.items() if name.startswith(f"{part}.")],
                "lr": rates[part],
                "component": part,
            }
            for part in parts
        ]
        super().__init__(config, run, accelerator, named, groups)
        self.embeddings: dict[str, Tensor] = {}
        self.pipeline = base.pipeline()

    def evaluate(self, step: int, micro: int) -> Losses:
        for part in self.parts.values():
            part.train()
        size = self.config.train.batch
        generator = torch.Generator().manual_seed(mix(self.config.seed, step, micro, 0))  # 0: the one process
        torch.manual_seed(generator.initial_seed())  # for dropout
        first = (step * self.config.train.accumulate + micro) * size
        chosen = [place(index, len(self.captions), self.config.seed) for index in range(first, first + size)]
        variant = torch.randint(self.latents.shape[1], (size,), generator=generator)
        moments = self.latents[chosen, variant]
        clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(self.base.scheduler.config.num_train_timesteps, (size,), generator=generator)
        return Losses(self._loss(clean, noise, times, [self.captions[index] for index in chosen]), {})

    def _loss(self, clean: Tensor, noise: Tensor, times: Tensor, captions: list[str]) -> Tensor:
        device = self.accelerator.device
        clean, noise, times = clean.to(device), noise.to(device), times.to(device)
        noisy = self.base.scheduler.add_noise(clean, noise, times)
        target = {"epsilon": noise, "sample": clean}.get(self.base.scheduler.config.prediction_type)
        if target is None:  # v_prediction
            target = self.base.scheduler.get_velocity(clean, noise, times)
        with self.accelerator.autocast():
            predicted = self.base.unet(noisy.to(self.base.unet.dtype), times, self._embed(captions)).sample
        return F.mse_loss(predicted.float(), target)

    def _embed(self, captions: list[str]) -> Tensor:  # (batch, tokens, width)
        encoder = self.base.text_encoder
        if "text_encoder" in self.parts:
            return encoder(self._tokens(captions))[0]
        for caption in set(captions) - self.embeddings.keys():
            with torch.no_grad():
                self.embeddings[caption] = encoder(self._tokens([caption]))[0][0]
        return torch.stack([self.embeddings[caption] for caption in captions])

    def _tokens(self, captions: list[str]) -> Tensor:
        tokens = self.base.tokenizer(captions, padding="max_length", truncation=True, return_tensors="pt")
        return tokens.input_ids.to(self.accelerator.device)

    @torch.no_grad()
    def evaluation_loss(self) -> float:
        """The loss over fixed pictures, noise and evenly spread timesteps: comparable between runs and steps."""
        for part in self.parts.values():
            part.eval()
        generator = torch.Generator().manual_seed(mix(self.config.seed, "evaluation"))
        noises = torch.randn((_EVALUATED, *self.latents.shape[3:]), generator=generator)
        # 37: every picture, all times
        spread = (torch.arange(_EVALUATED) * 37 % _EVALUATED + 0.5) / _EVALUATED
        times = (spread * self.base.scheduler.config.num_train_timesteps).long()
        total = 0.0
        # never more at a time than a step takes, which is what the device's memory is known to hold
        for indices in torch.arange(_EVALUATED).split(min(16, self.config.train.batch)):
            chosen = [int(index) % len(self.captions) for index in indices]
            captions = [self.captions[index] for index in chosen]
            loss = self._loss(self.latents[chosen, 0, 0], noises[indices], times[indices], captions)
            total += loss.item() * len(chosen)
        return total / _EVALUATED

    def sample(self, step: int) -> None:
        if not self.config.samples.prompts:
            return
        for part in self.parts.values():
            part.eval()
        with lora_scale(self.parts, self.config.samples.scale):
            made = generate(self.pipeline, self.config.samples, self.config.data.resolution)
        folder = self.run.folder / "samples" / f"step-{step:08d}"
        for index, picture in enumerate(made):
            prompt = index // self.config.samples.count
            picture.save(folder / f"{prompt:02d}-{picture.seed}.png", step=step, run=self.run.id)
        self.run.log(f"drew {len(made)} samples at step {step}")

    def save_result(self, facts: dict[str, Any]) -> None:
        """Writes result/pytorch_lora_weights.safetensors with its metadata, and result.json."""
        described = {
            "base": self.config.model.path,
            "optimizer": self.config.optimizer.name,
            "learning_rate": self.config.optimizer.learning_rate,
            "rank": self.config.lora.rank,
            "alpha": self.config.lora.alpha or self.config.lora.rank,
            "trigger": self.config.data.instance_prompt,
            **facts,
        }
        fallbacks = getattr(self.optimizer.optimizer, "fallbacks", None)
        more = {} if fallbacks is None else {"fallbacks": int(fallbacks)}
        write_result(self.run.folder / "result", self.parts, self.base.unet.config, described, more)
