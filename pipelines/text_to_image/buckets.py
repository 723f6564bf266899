"""Aspect-ratio buckets: the few sizes that pictures are cut to, and batches that hold one size each.

A picture is cut to the size whose shape is nearest its own, so that little of it is lost; all sizes have about the area
of the square. Batches, and their order, follow from (seed, epoch) alone, and so they are the same after a resume.
"""

import math
from collections.abc import Sequence
from functools import lru_cache

import torch

from equipoise.pipelines.text_to_image.config import TextToImageData
from equipoise.pipelines.training.state import mix, place

Size = tuple[int, int]  # pixels or cells: width, height


def sizes(data: TextToImageData, stride: int = 8) -> list[Size]:
    """All sizes that pictures are cut to, the square among them: sides are multiples of the step and of `stride`, the
    area is at most the square's, and as near to it as the step allows."""
    side, square = data.resolution, (data.resolution, data.resolution)
    if not data.buckets:
        return [square]
    step = math.lcm(data.bucket_step or max(8, min(64, side // 64 * 8)), stride)
    found = {square}
    for short in range(step, side, step):
        long = side * side // short // step * step
        if short < long <= data.bucket_limit * short:
            found |= {(short, long), (long, short)}
    return sorted(found)


def nearest(given: Size, among: Sequence[Size]) -> Size:
    """The size whose shape differs least, as a factor, from the given one."""
    return min(among, key=lambda size: abs(math.log(size[0] / size[1] * given[1] / given[0])))


class BucketBatches:
    """Which examples come at which position of the endless sequence of batches.

    In each epoch every example comes as often as it is repeated. Where there is one size, batches are cut from an
    endless sequence of shuffled epochs, across their borders; where there are several, a bucket's last batch is filled
    up with its first examples of that epoch, and the buckets' batches are shuffled.
    """

    def __init__(self, repeats: Sequence[int], shapes: Sequence[Size], size: int, seed: int):
        self.size, self.seed = size, seed
        self.buckets: dict[Size, list[int]] = {}
        for index, (times, shape) in enumerate(zip(repeats, shapes, strict=True)):
            self.buckets.setdefault(shape, []).extend([index] * times)
        self.per_epoch = sum(-(-len(bucket) // size) for bucket in self.buckets.values())
        self._epoch = lru_cache(2)(self._make)

    def __getitem__(self, number: int) -> list[int]:
        """The examples of a batch."""
        if len(self.buckets) == 1:
            (bucket,) = self.buckets.values()
            positions = range(number * self.size, (number + 1) * self.size)
            return [bucket[place(at, len(bucket), self.seed)] for at in positions]
        epoch, index = divmod(number, self.per_epoch)
        return self._epoch(epoch)[index]

    def _make(self, epoch: int) -> list[list[int]]:
        generator = torch.Generator().manual_seed(mix(self.seed, "buckets", epoch))
        made = []
        for _, bucket in sorted(self.buckets.items()):
            order = [bucket[i] for i in torch.randperm(len(bucket), generator=generator)]
            padded = -(-len(order) // self.size) * self.size
            order = (order * (padded // len(order) + 1))[:padded]
            made += [order[start : start + self.size] for start in range(0, padded, self.size)]
        return [made[i] for i in torch.randperm(len(made), generator=generator)]
