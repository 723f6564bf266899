"""Draws by which losses are compared: pictures, noise and times that are the same whatever is measured."""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from equipoise.pipelines.training.state import mix

DRAWS = 64  # by which a run evaluates, and at least where more pictures are judged one by one
_STEP = 37  # has no divisor in common with DRAWS: a picture that comes again comes with other times


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
