"""Batches made in the background while a step runs: the same ones in the same order, only sooner."""

import copy
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import Future, ThreadPoolExecutor

from torch import Tensor

from equipoise.pipelines.instruction_tuning.data import Conversation
from equipoise.pipelines.instruction_tuning.talk import Talk

Batch = dict[str, Tensor]


class BatchesAhead:
    """Training batches by number, of which the next ones are made by threads.

    Each thread has a processor of its own: those of transformers are not for several threads.
    """

    def __init__(
        self,
        talk: Talk,
        chosen: Callable[[int], list[Conversation]],  # the conversations of a batch
        total: int,  # batches that there will be
        workers: int,  # threads, and batches that are made ahead; 0 makes each when it is asked for
    ):
        self._talk, self._chosen, self._total, self._workers = talk, chosen, total, workers
        self._pool = ThreadPoolExecutor(workers, "batches") if workers else None
        self._own = threading.local()
        self._coming: dict[int, Future[Batch]] = {}
        self._last: tuple[int, Batch] = (-1, {})  # some optimizers evaluate a batch twice

    def get(self, number: int) -> Batch:
        """A batch, which is not to be changed. Errors in making it are raised here."""
        if self._last[0] != number:
            self._last = number, self._next(number)
        return self._last[1]

    def _next(self, number: int) -> Batch:
        if self._pool is None:
            return self._talk.training_batch(self._chosen(number))
        wanted = range(number, max(number + 1, min(number + 1 + self._workers, self._total)))
        for skipped in self._coming.keys() - set(wanted):  # where training goes on elsewhere
            self._coming.pop(skipped).cancel()
        for index in wanted:
            if index not in self._coming:
                self._coming[index] = self._pool.submit(self._make, self._chosen(index))
        return self._coming.pop(number).result()

    def _make(self, examples: Sequence[Conversation]) -> Batch:
        if not hasattr(self._own, "talk"):
            self._own.talk = copy.deepcopy(self._talk)
        return self._own.talk.training_batch(examples)
