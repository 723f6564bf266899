"""How noise is added to latents, what the denoiser is to answer, and how the loss weighs it: two ways for all families.

Diffusion: x_t = √ᾱ_t x + √(1 − ᾱ_t) ε (Ho et al., Denoising Diffusion Probabilistic Models, arXiv:2006.11239, 2020).
Flow matching: x_σ = (1 − σ) x + σ ε, and the answer is ε − x (Lipman et al., arXiv:2210.02747, 2022; with the draws of
times of Esser et al., Scaling Rectified Flow Transformers, arXiv:2403.03206, 2024, §3.1, as Stable Diffusion 3 has it).
"""

# diffusers annotates too narrowly.
# pyright: reportArgumentType=false, reportAttributeAccessIssue=false, reportCallIssue=false

import math
from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from diffusers import (
    DDIMScheduler,
    DPMSolverMultistepScheduler,
    FlowMatchEulerDiscreteScheduler,
    FlowMatchHeunDiscreteScheduler,
    FlowMatchLCMScheduler,
    UniPCMultistepScheduler,
)
from torch import Tensor

from equipoise.errors import InputError
from equipoise.pipelines.text_to_image.families import NOTHING_TO_SEE, Family
from equipoise.pipelines.text_to_image.families.config import NoiseSection


class Noise(ABC):
    """One way of adding noise. Times are what the denoiser is given: (batch,)."""

    prediction: str | None = None  # what the denoiser answers, where there is a choice

    def __init__(self, section: NoiseSection, kind: Family):
        self.section, self.kind = section, kind

    def draw(self, shape: torch.Size, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """Noise (batch, channels, height, width) and times (batch,)."""
        noise = torch.randn(shape, generator=generator)
        times = self.scheduled(self.times(shape[0], generator), shape)
        if self.section.offset:  # a little more or less of a whole channel: pictures darker or brighter than the mean
            noise += self.section.offset * torch.randn((*shape[:2], 1, 1), generator=generator)
        return noise, times

    @abstractmethod
    def times(self, count: int, generator: torch.Generator) -> Tensor: ...

    @abstractmethod
    def at(self, fractions: Tensor) -> Tensor:
        """The times at fractions 0 … 1 of all there are."""

    def scheduled(self, times: Tensor, shape: Sequence[int]) -> Tensor:
        """Times for latents of that shape, where the schedule depends on it."""
        return times

    @abstractmethod
    def add(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor: ...

    @abstractmethod
    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        """What the denoiser ought to answer."""

    @abstractmethod
    def weights(self, times: Tensor) -> Tensor | None:
        """Of each picture's loss; None where all count the same."""

    def losses(self, predicted: Tensor, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:  # (batch,)
        errors = (predicted.float() - self.target(clean, noise, times)).square().flatten(1).mean(1)
        weights = self.weights(times)
        return errors if weights is None else weights * errors


class Diffusion(Noise):
    def __init__(self, scheduler: DDIMScheduler, section: NoiseSection, kind: Family):
        super().__init__(section, kind)
        self.scheduler, self.prediction = scheduler, scheduler.config.prediction_type

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        return torch.randint(self.scheduler.config.num_train_timesteps, (count,), generator=generator)

    def at(self, fractions: Tensor) -> Tensor:
        return (fractions * self.scheduler.config.num_train_timesteps).long()

    def add(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return self.scheduler.add_noise(clean, noise, times)

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        if self.prediction == "v_prediction":
            return self.scheduler.get_velocity(clean, noise, times)
        return noise if self.prediction == "epsilon" else clean

    def weights(self, times: Tensor) -> Tensor | None:
        """Min-SNR-γ (Hang et al., Efficient Diffusion Training via Min-SNR Weighting, arXiv:2303.09556, 2023, §3.4):
        min(SNR, γ) on the error of the clean latents, with SNR = ᾱ / (1 − ᾱ), as it reads for each kind of answer."""
        gamma = self.section.snr_gamma
        if gamma is None:
            return None
        kept = self.scheduler.alphas_cumprod.to(times.device)[times].double()
        snr = kept / (1 - kept)
        scale = {"epsilon": snr, "v_prediction": snr + 1, "sample": torch.ones_like(snr)}[self.prediction]
        return (snr.clamp(max=gamma) / scale).float()


class Flow(Noise):
    def __init__(self, scheduler: FlowMatchEulerDiscreteScheduler, section: NoiseSection, kind: Family):
        super().__init__(section, kind)
        # Sampling changes the scheduler's own table. A shift that depends on the picture's size is for sampling alone.
        shift = {} if section.shift is None else {"shift": section.shift, "use_dynamic_shifting": False}
        config = scheduler.config
        if "flow_shift" in config:  # a solver that has other ways of adding noise too
            config = {"num_train_timesteps": config.num_train_timesteps, "shift": config.flow_shift}
        fresh = FlowMatchEulerDiscreteScheduler.from_config(config, **shift)
        self.steps = fresh.config.num_train_timesteps
        self.table = fresh.sigmas * self.steps  # (steps,) from all noise to almost none

    def times(self, count: int, generator: torch.Generator) -> Tensor:
        section, kind = self.section, self.section.times or self.kind.times
        if kind == "logit_normal":
            fractions = torch.normal(section.mean, section.std, (count,), generator=generator).sigmoid()
        else:
            fractions = torch.rand((count,), generator=generator)
        if kind == "mode":
            fractions = 1 - fractions - section.mode_scale * ((math.pi * fractions / 2).cos().square() - 1 + fractions)
        return self.at(fractions)

    def at(self, fractions: Tensor) -> Tensor:
        return self.table[(fractions * self.steps).long().clamp(0, self.steps - 1)]

    def scheduled(self, times: Tensor, shape: Sequence[int]) -> Tensor:
        return times if self.section.shift is not None else self.kind.drawn(times, shape[-2:])

    def add(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        sigma = (times / self.steps)[:, None, None, None]
        return (1 - sigma) * clean + sigma * noise

    def target(self, clean: Tensor, noise: Tensor, times: Tensor) -> Tensor:
        return noise - clean

    def weights(self, times: Tensor) -> Tensor | None:
        """The picture that an answer v stands for is x_σ − σ v: its error is σ times that of v."""
        return (times / self.steps).square() if self.kind.preconditioned else None


_KINDS: dict[str, type] = {"diffusion": Diffusion, "flow": Flow}
# DDIM cuts what it predicts to ±1, where pixels end, unless it is set not to. Latents have no such bounds, and the
# configs of other schedulers, from which it is made, do not set it.
_BOUNDLESS: dict[str, dict[str, Any]] = {"diffusion": {"clip_sample": False}, "flow": {}}


_SOLVERS = {  # by which families that were trained by flow matching are sampled
    kind.__name__: kind
    for kind in (
        DPMSolverMultistepScheduler,
        FlowMatchEulerDiscreteScheduler,
        FlowMatchHeunDiscreteScheduler,
        FlowMatchLCMScheduler,
        UniPCMultistepScheduler,
    )
}


def _scheduler(kind: Family, config: Mapping[str, Any]) -> Any:
    """The class of the noise schedule by which is sampled: for flow matching, the checkpoint's own."""
    if kind.noise == "diffusion":
        return DDIMScheduler
    return _SOLVERS.get(str(config.get("_class_name")), FlowMatchEulerDiscreteScheduler)


def load_scheduler(kind: Family, source: str, **options: Any) -> Any:
    """A checkpoint's noise schedule, as diffusers' scheduler that samples with it."""
    config = FlowMatchEulerDiscreteScheduler.load_config(source, subfolder="scheduler", **options)
    return _scheduler(kind, config).from_config(config, **_BOUNDLESS[kind.noise])


def make_noise(kind: Family, scheduler: Any, section: NoiseSection) -> Noise:
    return _KINDS[kind.noise](scheduler, section, kind)


def scheduler_with(kind: Family, config: Mapping[str, Any], section: NoiseSection) -> Any:
    """The scheduler of a base's own `config`, but for what the section says: for training and for sampling.

    Raises:
        InputError: the base predicts the noise, and a schedule that ends in pure noise would leave nothing to learn.
    """
    given = _BOUNDLESS[kind.noise] | section.scheduler
    if section.zero_terminal_snr and {**config, **given}.get("prediction_type", "epsilon") == "epsilon":
        raise InputError(NOTHING_TO_SEE)
    return _scheduler(kind, config).from_config(config, **given)
