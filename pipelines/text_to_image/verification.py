"""Which pictures are damaged, found beside the first steps: the step that needs one may come hours later."""

import sys
import time
from collections.abc import Mapping, Sequence
from threading import Event, Thread
from types import TracebackType

from equipoise.pipelines.media.reading import brief
from equipoise.pipelines.text_to_image.latents import Latents

_PATIENCE = 60.0  # seconds that an end for a damaged picture waits for the others to be looked at


class Verification:
    """Decodes the pictures whose latents are not made, in a thread of its own for the time of the block.

    Args:
        kinds: By the name of a kind of pictures: its latents, and those of the pictures to start from.
        first: The first pictures of each, which the check of the configuration has decoded; they are left out.
    """

    def __init__(self, kinds: Mapping[str, Sequence[Latents]], first: int):
        parts = [(kind, latents, len(latents.shapes)) for kind, some in kinds.items() for latents in some]
        self._others = [(kind, latents, picture) for kind, latents, count in parts for picture in range(first, count)]
        self._first = [(kind, latents, picture) for kind, latents, count in parts for picture in range(first)[:count]]
        self._left = Event()
        self._thread = Thread(target=self._look, name="verification", daemon=True)
        self.finished = not self._others
        self.damage: dict[tuple[str, int], str] = {}  # so far: kind and number of a picture → what is wrong with it

    def __enter__(self) -> "Verification":
        if not self.finished:
            self._thread.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, _: TracebackType | None) -> None:
        self._left.set()
        if self._thread.is_alive():
            self._thread.join()

    def all_damage(self) -> dict[tuple[str, int], str]:
        """Of all pictures, as far as a minute goes."""
        until = time.monotonic() + _PATIENCE
        if self._thread.is_alive():
            self._thread.join(_PATIENCE)
        for one in self._first if self.finished else [*self._first, *self._others]:
            if time.monotonic() > until:
                break
            self._judge(*one)
        return dict(self.damage)

    def _look(self) -> None:
        try:
            for one in self._others:
                if self._left.is_set():
                    return
                self._judge(*one)
        except Exception as error:  # of a folder that is gone, say: the run is not ended by what it may never need
            print(
                f"Not all pictures could be looked at beside the steps ({brief(error)}); a damaged one is found by the "
                "step that needs it.",
                file=sys.stderr,
            )
        finally:
            self.finished = True

    def _judge(self, kind: str, latents: Latents, picture: int) -> None:
        if fault := latents.fault(picture):
            self.damage[kind, picture] = fault
