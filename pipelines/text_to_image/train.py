"""Tunes LoRA factors of a base: load → compute latents once → train → save a file diffusers loads."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

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
from equipoise.pipelines.text_to_image.base import Base, Latents, load_base
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
        parts: dict[str, torch.nn.Module],  # the tuned parts by name: "unet", and the text encoders if asked
        captions: list[str],
        latents: Latents,
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
        own = config.optimizer.learning_rate
        words = config.optimizer.text_encoder_learning_rate or own
        groups = [
            {
                "params": [(name, p) for name, p in named.items() if name.startswith(f"{part}.")],
                "lr": own if part == "unet" else words,
                "component": part,
            }
            for part in parts
        ]
        super().__init__(config, run, accelerator, named, groups)
        self.embeddings: dict[str, dict[str, Tensor]] = {}
        self.scheduler = base.pipeline.scheduler

    def evaluate(self, step: int, micro: int) -> Losses:
        for part in self.parts.values():
            part.train()
        size = self.config.train.batch
        generator = torch.Generator().manual_seed(mix(self.config.seed, step, micro, 0))  # 0: the one process
        torch.manual_seed(generator.initial_seed())  # for dropout
        first = (step * self.config.train.accumulate + micro) * size
        chosen = [place(index, len(self.captions), self.config.seed) for index in range(first, first + size)]
        variant = torch.randint(self.latents.moments.shape[1], (size,), generator=generator)
        moments = self.latents.moments[chosen, variant]
        clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(self.scheduler.config.num_train_timesteps, (size,), generator=generator)
        return Losses(self._loss(clean, noise, times, chosen, variant), {})

    def _loss(self, clean: Tensor, noise: Tensor, times: Tensor, chosen: list[int], variant: Tensor | int) -> Tensor:
        """Of the pictures `chosen`, in those variants."""
        device, unet = self.accelerator.device, self.base.unet
        clean, noise, times = clean.to(device), noise.to(device), times.to(device)
        noisy = self.scheduler.add_noise(clean, noise, times)
        target = {"epsilon": noise, "sample": clean}.get(self.scheduler.config.prediction_type)
        if target is None:  # v_prediction
            target = self.scheduler.get_velocity(clean, noise, times)
        places = self.latents.places[chosen, variant].to(device)
        with self.accelerator.autocast():
            embedded = self._embed([self.captions[index] for index in chosen])
            predicted = self.base.family.predict(unet, noisy.to(unet.dtype), times, embedded, places)
        return F.mse_loss(predicted.float(), target)

    def _embed(self, captions: list[str]) -> dict[str, Tensor]:
        """Of captions that nothing tunes the reading of, computed once."""
        embed, pipeline = self.base.family.embed, self.base.pipeline
        if self.config.lora.text_encoder:
            return embed(pipeline, captions)
        for caption in set(captions) - self.embeddings.keys():
            with torch.no_grad():
                self.embeddings[caption] = embed(pipeline, [caption])
        known = [self.embeddings[caption] for caption in captions]
        return {name: torch.cat([one[name] for one in known]) for name in known[0]}

    @torch.no_grad()
    def evaluation_loss(self) -> float:
        """The loss over fixed pictures, noise and evenly spread timesteps: comparable between runs and steps."""
        for part in self.parts.values():
            part.eval()
        generator = torch.Generator().manual_seed(mix(self.config.seed, "evaluation"))
        noises = torch.randn((_EVALUATED, *self.latents.moments.shape[3:]), generator=generator)
        # 37: every picture, all times
        spread = (torch.arange(_EVALUATED) * 37 % _EVALUATED + 0.5) / _EVALUATED
        times = (spread * self.scheduler.config.num_train_timesteps).long()
        total = 0.0
        # never more at a time than a step takes, which is what the device's memory is known to hold
        for indices in torch.arange(_EVALUATED).split(min(16, self.config.train.batch)):
            chosen = [int(index) % len(self.captions) for index in indices]
            loss = self._loss(self.latents.moments[chosen, 0, 0], noises[indices], times[indices], chosen, 0)
            total += loss.item() * len(chosen)
        return total / _EVALUATED

    def sample(self, step: int) -> None:
        if not self.config.samples.prompts:
            return
        for part in self.parts.values():
            part.eval()
        with lora_scale(self.parts, self.config.samples.scale):
            made = generate(self.base.pipeline, self.config.samples, self.config.data.resolution)
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
        write_result(self.run.folder / "result", self.parts, self.base.shape, described, more)
