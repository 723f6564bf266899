"""Tunes LoRA factors of a Stable Diffusion base: load → compute latents once → train → save a file diffusers loads."""

# diffusers, peft and accelerate annotate too narrowly: tuple[int] for any length, one return type for several.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false, reportIndexIssue=false

import hashlib
import sys
import time
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from accelerate import Accelerator
from accelerate.state import AcceleratorState
from torch import Tensor

from equipoise import registry
from equipoise.balancing.objective import Losses
from equipoise.errors import ConfigError, InputError
from equipoise.pipelines import demo
from equipoise.pipelines.loop import NonFiniteError, train_loop
from equipoise.pipelines.pipeline import Outcome
from equipoise.pipelines.run import Run
from equipoise.pipelines.text_to_image.base import Base, load_base
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.data import read_examples, unread_captions
from equipoise.pipelines.text_to_image.generate import generate, lora_scale
from equipoise.pipelines.text_to_image.latents import prepare_latents
from equipoise.pipelines.text_to_image.result import write_result
from equipoise.pipelines.text_to_image.schedule import make_schedule

_EVALUATED = 64  # fixed draws behind "loss before" and "loss after"


def train(config: TextToImageConfig, run: Run) -> Outcome:
    if AcceleratorState._shared_state:  # a sweep's earlier cell may have used another precision
        AcceleratorState._reset_state()
    accelerator = Accelerator(mixed_precision=config.train.precision)
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
                "loss_before": _number(before),
                "loss_after": _number(work.evaluation_loss()),
                "seconds": time.perf_counter() - started,
            }
            work.save_result(facts)
            if not run.sweep:  # the comparison of a sweep draws its cells' samples
                work.sample(outcome.step or 0)
    return outcome


class TextToImageWork:
    """One run's tuning: see `equipoise.pipelines.loop.Work` for when each method is called."""

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
        self.config, self.run, self.accelerator, self.base, self.parts = config, run, accelerator, base, parts
        self.captions, self.latents = captions, latents
        self.named = {
            f"{part}.{name}": parameter
            for part, module in parts.items()
            for name, parameter in module.named_parameters()
            if parameter.requires_grad
        }
        if config.train.gradient_checkpointing:
            base.unet.enable_gradient_checkpointing()
        else:
            base.unet.disable_gradient_checkpointing()
        self.optimizer = accelerator.prepare_optimizer(self._make_optimizer())
        # stepped once per optimizer step, also where a scaler skipped that one: not accelerate's wrapper
        self.schedule = make_schedule(config.schedule, self.optimizer.optimizer, config.train.steps)
        self.objective = registry.load("objectives", config.objective.name)(**config.objective.options)
        self.coordinator = registry.load("coordinators", config.coordinator.name)(**config.coordinator.options)
        self.good = [parameter.detach().clone() for parameter in self.named.values()]
        self.embeddings: dict[str, Tensor] = {}
        self.pipeline = base.pipeline()

    def _make_optimizer(self) -> torch.optim.Optimizer:
        chosen = self.config.optimizer
        optimizer = registry.load("optimizers", chosen.name)
        try:
            return optimizer(self._groups(), lr=chosen.learning_rate, **chosen.options)
        except (TypeError, ValueError) as error:
            raise InputError(f"optimizer.name: {chosen.name} does not take these LoRA factors: {error}") from error

    def _groups(self) -> list[dict[str, Any]]:
        rates = {"unet": self.config.optimizer.learning_rate}
        rates["text_encoder"] = self.config.optimizer.text_encoder_learning_rate or rates["unet"]
        return [
            {
                "params": [(name, p) for name, p in self.named.items() if name.startswith(f"{part}.")],
                "lr": rates[part],
                "component": part,
            }
            for part in self.parts
        ]

    def step(self, step: int) -> dict[str, float]:
        train = self.config.train
        for part in self.parts.values():
            part.train()
        components = [group["component"] for group in self.optimizer.param_groups]
        factors = self.coordinator.factors(components)
        rates = dict(zip(components, self.schedule.get_last_lr(), strict=True))
        for group in self.optimizer.param_groups:
            group["lr"] = rates[group["component"]] * factors[group["component"]]
        mean, logged = self._evaluate_all(step)
        if not _finite(mean):
            self.optimizer.zero_grad()
            raise NonFiniteError("the loss was not finite")
        optimizer = self.optimizer.optimizer
        if hasattr(optimizer, "perturb") and optimizer.perturb():  # it wants the gradient at another point too
            try:
                self._evaluate_all(step)
            finally:
                optimizer.restore()
        norm = float(self.accelerator.clip_grad_norm_(self.named.values(), train.clip or torch.inf))
        if not _finite(norm) and self.accelerator.scaler is None:  # with a scaler, it skips the step by itself
            self.optimizer.zero_grad()
            raise NonFiniteError("the gradient was not finite")
        torch._foreach_copy_(self.good, [parameter.detach() for parameter in self.named.values()])
        self.optimizer.step()
        self.optimizer.zero_grad()
        values = {"loss": mean, "gradient_norm": norm}
        values |= {name: float(value) for name, value in logged.items() if name not in values}
        values["rate"] = self.optimizer.param_groups[0]["lr"]
        if len(components) > 1:
            values |= {f"rate_{group['component']}": group["lr"] for group in self.optimizer.param_groups}
        self.schedule.step()
        return values

    def _evaluate_all(self, step: int) -> tuple[float, dict[str, Any]]:
        """The gradients of a step's micro-batches; their mean loss, and what the objective says of the last."""
        losses, logged, count = [], {}, self.config.train.accumulate
        for micro in range(count):
            loss = self.evaluate(step, micro)
            losses.append(loss.joint.detach())
            logged = self.objective.backward(loss, lambda total: self.accelerator.backward(total / count))
        return torch.stack(losses).mean().item(), logged

    def evaluate(self, step: int, micro: int) -> Losses:
        """The losses of one forward pass. All it draws comes from (seed, step, micro): asked again, it is the same
        batch, noise and timesteps, and so it is after a resume and in every cell of a sweep."""
        size = self.config.train.batch
        generator = torch.Generator().manual_seed(_mix(self.config.seed, step, micro, 0))  # 0: the one process
        torch.manual_seed(generator.initial_seed())  # for dropout
        first = (step * self.config.train.accumulate + micro) * size
        chosen = [self._picture(index) for index in range(first, first + size)]
        variant = torch.randint(self.latents.shape[1], (size,), generator=generator)
        moments = self.latents[chosen, variant]
        clean = moments[:, 0] + moments[:, 1] * torch.randn(moments[:, 1].shape, generator=generator)
        noise = torch.randn(clean.shape, generator=generator)
        times = torch.randint(self.base.scheduler.config.num_train_timesteps, (size,), generator=generator)
        return Losses(self._loss(clean, noise, times, [self.captions[index] for index in chosen]), {})

    def _picture(self, position: int) -> int:
        """Each epoch is a permutation of the pictures, known from its number."""
        epoch, index = divmod(position, len(self.captions))
        order = torch.randperm(
            len(self.captions), generator=torch.Generator().manual_seed(_mix(self.config.seed, epoch))
        )
        return int(order[index])

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
        generator = torch.Generator().manual_seed(_mix(self.config.seed, "evaluation"))
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

    def weights(self) -> dict[str, Tensor]:
        return dict(self.named)

    def state(self) -> dict[str, Any]:
        scaler = self.accelerator.scaler
        return {
            "optimizer": self.optimizer.state_dict(),
            "schedule": self.schedule.state_dict(),
            "coordinator": self.coordinator.state_dict(),
            "objective": self.objective.state_dict() if hasattr(self.objective, "state_dict") else {},
            "scaler": scaler.state_dict() if scaler else None,
            # the weights above may be those of a step that went wrong, which only the next loss will tell
            "good": dict(zip(self.named, self.good, strict=True)),
        }

    @torch.no_grad()
    def restore(self, weights: dict[str, Tensor], state: dict[str, Any]) -> None:
        for name, parameter in self.named.items():
            parameter.copy_(weights[name])
        self.optimizer.load_state_dict(state["optimizer"])
        self.schedule.load_state_dict(state["schedule"])
        self.coordinator.load_state_dict(state["coordinator"])
        if state["objective"]:
            self.objective.load_state_dict(state["objective"])
        if self.accelerator.scaler and state["scaler"]:
            self.accelerator.scaler.load_state_dict(state["scaler"])
        for name, kept in zip(self.named, self.good, strict=True):
            kept.copy_(state["good"][name])

    @torch.no_grad()
    def sound(self) -> bool:
        finite = all(torch.isfinite(parameter).all() for parameter in self.named.values())
        return finite and _finite(self.evaluation_loss())

    @torch.no_grad()
    def rewind(self) -> None:
        torch._foreach_copy_(list(self.named.values()), self.good)

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
            **facts,
        }
        fallbacks = getattr(self.optimizer.optimizer, "fallbacks", None)
        more = {} if fallbacks is None else {"fallbacks": int(fallbacks)}
        write_result(self.run.folder / "result", self.parts, described, more)


def _finite(value: float) -> bool:
    return value - value == 0


def _number(value: float) -> float | None:
    """JSON has no word for NaN and infinity."""
    return value if _finite(value) else None


def _mix(*parts: object) -> int:
    """A seed from several numbers and words, well spread."""
    return int.from_bytes(hashlib.blake2s(repr(parts).encode(), digest_size=8).digest(), "big") >> 1
