"""Draws by which losses are compared: pictures, noise and times that are the same whatever is measured."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cached_property, partial
from typing import Any

import torch
from accelerate import Accelerator
from torch import Tensor

from equipoise.pipelines.text_to_image.base import Base
from equipoise.pipelines.text_to_image.config import TextToImageConfig
from equipoise.pipelines.text_to_image.families.noise import Noise
from equipoise.pipelines.text_to_image.latents import Latents, taken
from equipoise.pipelines.training.state import mix

DRAWS = 64  # by which a run evaluates, and at least where more pictures are judged one by one
_STEP = 37  # has no divisor in common with DRAWS: a picture that comes again comes with other times


def spread(count: int) -> list[int]:
    """The pictures, of so many, by which a run evaluates: evenly from all."""
    return [index * max(count, DRAWS) // DRAWS % count for index in range(DRAWS)]


@dataclass(frozen=True)
class FixedDraws:
    pictures: Sequence[int]  # of each draw
    noises: Sequence[Tensor]  # (channels, height, width) of each, as its picture's latents
    spread: Tensor  # (draws,) in 0 … 1, evenly over all times

    @classmethod
    def of(cls, pictures: Sequence[int], shapes: Sequence[tuple[int, ...]], seed: int, levels: int) -> "FixedDraws":
        """Draws of these pictures, in their order.

        Args:
            shapes: Of all pictures' latents.
            levels: How many different times there are.
        """
        generator = torch.Generator().manual_seed(mix(seed, "evaluation"))
        noises = [torch.randn(shapes[picture], generator=generator) for picture in pictures]
        return cls(pictures, noises, (torch.arange(len(pictures)) * _STEP % levels + 0.5) / levels)

    def batches(self, most: int) -> Iterator[tuple[list[int], list[int], Tensor]]:
        """(draws, their pictures, their noise) of at most so many draws, of one shape each."""
        for shape in dict.fromkeys(noise.shape for noise in self.noises):
            alike = [index for index, noise in enumerate(self.noises) if noise.shape == shape]
            for some in (alike[start : start + most] for start in range(0, len(alike), most)):
                yield some, [self.pictures[i] for i in some], torch.stack([self.noises[i] for i in some])


@dataclass(frozen=True)
class Measure:
    """How a base's answer is measured, in training as at fixed draws."""

    config: TextToImageConfig
    accelerator: Accelerator
    base: Base
    noise: Noise

    def losses(
        self,
        clean: Tensor,  # (batch, channels, height, width), as `noise`
        noise: Tensor,
        times: Tensor,  # (batch,)
        crops: Tensor,  # (batch, 6)
        embed: Callable[[], dict[str, Tensor]],  # makes the denoiser's inputs of the captions
        denoiser: Any = None,  # what is called for the base's own
        source: Tensor | None = None,  # (batch, sources, channels, height, width): latents of those to start from
    ) -> Tensor:  # (batch,)
        denoiser = self.base.denoiser if denoiser is None else denoiser  # a compiled one has no truth value
        clean, noise, times, crops = (t.to(self.accelerator.device) for t in (clean, noise, times, crops))
        noisy = self.noise.add(clean, noise, times).to(self.dtype)
        with self.accelerator.autocast():
            embedded = embed() if source is None else embed() | {"source": source.to(noisy)}
            predicted = self.base.family.predict(denoiser, noisy, times, embedded, crops, self.config.noise.guidance)
        return self.noise.losses(predicted, clean, noise, times)

    @cached_property
    def dtype(self) -> torch.dtype:
        return self.base.denoiser.dtype  # which looks through all its parameters


@dataclass(frozen=True)
class FixedLosses:
    """What the draws cost a base as it is, with whatever it has been given."""

    measure: Measure
    latents: Latents
    captions: Sequence[str]
    seed: int
    sources: Sequence[Latents] = ()  # of the pictures to start from

    @property
    def draws(self) -> int:
        return max(DRAWS, len(self.captions))

    @torch.no_grad()
    def losses(
        self,
        embed: Callable[[list[str]], dict[str, Tensor]],
        drawn: Callable[[int], object] = lambda count: None,
        pictures: Sequence[int] = (),
    ) -> Tensor:
        """(draws,) float64: of draw i the loss of picture i modulo the number of pictures, or of these pictures.

        Args:
            embed: What makes a denoiser's inputs of captions.
            drawn: Gets the number of draws that were just measured.
        """
        pictures = pictures or [index % len(self.captions) for index in range(self.draws)]
        fixed = FixedDraws.of(pictures, self.latents.shapes, self.seed, DRAWS)
        times, made = self.measure.noise.at(fixed.spread), torch.zeros(len(pictures), dtype=torch.float64)
        for some, chosen, noise in fixed.batches(self._together()):
            clean, _, crops = self.latents.take(chosen, [0] * len(chosen))
            read = partial(embed, [self.captions[index] for index in chosen])
            source = taken(self.sources, chosen, [0] * len(chosen))
            own = self.measure.noise.scheduled(times[some], noise.shape)
            found = self.measure.losses(clean, noise, own, crops, read, source=source)
            made[some] = found.double().cpu()
            drawn(len(some))
        return made

    def _together(self) -> int:
        """How many draws a step's memory surely holds: without gradients, a layer's results need not wait for them."""
        train = self.measure.config.train
        return min(16, train.batch * (1 if train.gradient_checkpointing else 4))

    def mean(self, embed: Callable[[list[str]], dict[str, Tensor]]) -> float:
        """Over the draws by which a run evaluates."""
        return self.losses(embed, pictures=spread(len(self.captions))).mean().item()

    def by_picture(self, losses: Tensor) -> list[float]:
        """The mean of each picture's draws."""
        return [losses[index :: len(self.captions)].mean().item() for index in range(len(self.captions))]

    def embed(self, captions: list[str]) -> dict[str, Tensor]:
        """By the text encoders as they are now."""
        return self.measure.base.family.embed(self.measure.base.pipeline, captions)
